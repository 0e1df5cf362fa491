"""A query's result -> frames, through SQLAlchemy. The database is read and never written.

The query is a file beside the manifest, so that it is reviewed and versioned like any other; the database's address is
in a file of its own, because it may hold a password.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from client.records.extras import needed
from client.records.manifest import Manifest
from shared_models.errors import RecordsError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

_READ_ONLY = {  # said before the query, as the first thing of its transaction
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET TRANSACTION READ ONLY",
}
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)


def read_query(manifest: Manifest, at_once: int) -> Iterator[pd.DataFrame]:
    """Run the manifest's query and read its rows, numbered from 1, so many at once.

    Guarantees:
        * On SQLite and PostgreSQL the transaction is read-only; on any database it is rolled back.
        * An error says its kind, and quotes neither query, address nor rows.

    Raises:
        RecordsError: SQLAlchemy or the database's driver is missing; the file is no query; the address is readable by
            others; or the database says no.
    """
    assert manifest.sql is not None  # noqa: S101  # the manifest's validator has seen to it
    query, url = _query(manifest.file), _url(manifest.sql.url_file)
    with needed("sql", "sqlalchemy"):
        import sqlalchemy  # noqa: PLC0415  # an extra
    try:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, hide_parameters=True)
        with engine.connect() as connection:
            yield from _rows(connection, query, at_once)
            connection.rollback()
    except sqlalchemy.exc.SQLAlchemyError as error:
        kind = type(getattr(error, "orig", None) or error).__name__
        raise RecordsError(
            f"the query of {manifest.file} failed: {kind}", hint="Try it with the database's own client first."
        ) from None
    except ImportError as error:
        raise RecordsError(
            f"{manifest.sql.url_file} names a database whose driver is not installed: {error.name}",
            hint="pip install the driver that SQLAlchemy names for this database.",
        ) from None


def _rows(connection: "Connection", query: str, at_once: int) -> Iterator[pd.DataFrame]:
    if first := _READ_ONLY.get(connection.dialect.name):
        connection.exec_driver_sql(first)
    result = connection.execution_options(stream_results=True, yield_per=at_once).exec_driver_sql(query)
    names, before = list(result.keys()), 1
    for rows in result.partitions():
        part = pd.DataFrame([[_text(v) for v in row] for row in rows], dtype=object).set_axis(names, axis="columns")
        part.index += before
        before += len(part)
        yield part


def _text(value: object) -> str:
    """A database's value as it would stand in a CSV file."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _query(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist", hint="Check file = ... in the manifest.") from None
    statement = _COMMENT.sub(" ", text).strip().rstrip(";").rstrip()
    if not re.match(r"(select|with)\b", statement, re.IGNORECASE) or ";" in statement:
        raise RecordsError(f"{path} is not one SELECT", hint="One SELECT or WITH ... SELECT, and no semicolon in it.")
    return statement


def _url(path: Path) -> str:
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise RecordsError(f"{path} cannot be read", hint="Check sql.url_file in the manifest.") from None
    if mode & 0o077:
        raise RecordsError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    if not text or len(text.splitlines()) != 1:
        raise RecordsError(f"{path} is not one line", hint="One line: SQLAlchemy's URL of the database.")
    return text
