"""Files with a row per record -> frames, and what every reader asks of a frame's cells.

Every cell is a text, as far as the format allows, so that nothing is guessed. Texts of errors are for the hospital's
own terminal: they name file, row and column, and quote a cell of a table; never a text or a measurement.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from client.records.fhir import read_export
from client.records.manifest import Manifest
from client.records.sql import read_query
from shared_models.errors import RecordsError

Flags = NDArray[np.bool_]
CHECK = "Mend the file or the manifest, then run konsil-hospital check-data again."


# files


def load(manifest: Manifest) -> pd.DataFrame:
    """Read the manifest's file as it is; the index is the row number that an editor or a spreadsheet shows.

    Raises:
        RecordsError: It is missing, empty, or no file of its kind.
    """
    path = manifest.file
    with explained(path):
        match path.suffix:
            case ".parquet":
                frame = from_arrow(pyarrow.parquet.read_table(path))
            case ".jsonl":
                frame = _load_json_lines(path)
            case ".sql":
                frame = read_query(manifest)
            case ".ndjson":
                frame = read_export(manifest)
            case _:
                frame = _load_csv(path)
    if frame.empty:
        raise RecordsError(f"{path} has a header but no records", hint="Export the records again.")
    return frame


def from_arrow(table: "pyarrow.Table | pyarrow.RecordBatch") -> pd.DataFrame:
    """Columns as they are stored, texts checked for being texts.

    What pandas wrote about a file beside its columns is not looked at: an index is a column like any other.
    """
    table.validate(full=True)
    return table.to_pandas(ignore_metadata=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into errors of the records."""
    try:
        yield
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist", hint="Check file = ... in the manifest.") from None
    except pd.errors.EmptyDataError:
        raise RecordsError(f"{path} is empty", hint="Export the records again.") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # pandas' parsing errors are ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecordsError(f"{path} cannot be read: {reason}", hint="Save it as UTF-8 CSV or as Parquet.") from None


def _load_csv(path: Path) -> pd.DataFrame:
    """Every cell as text, so that nothing is guessed; blank lines keep their row numbers but are no records."""
    frame = pd.read_csv(
        path, header=None, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig"
    )
    header = [str(name).strip() for name in frame.iloc[0]]
    frame = frame.iloc[1:].fillna("").set_axis(header, axis="columns")
    frame.index += 1
    return frame[(frame != "").any(axis="columns")]


def _load_json_lines(path: Path) -> pd.DataFrame:
    """One JSON object of plain values per line; blank lines are no records, a key that is left out is missing."""
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_json_row(path, number, line))
                numbers.append(number)
    return pd.DataFrame(rows, index=numbers, dtype=object).fillna("")


def _json_row(path: Path, number: int, line: str) -> dict[str, str]:
    """One line; its numbers stay as they are written."""
    try:
        pairs = json.loads(line, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=list)
    except (ValueError, RecursionError):
        pairs = None
    if line.lstrip()[:1] != "{" or not isinstance(pairs, list):
        raise RecordsError(f"{path}, line {number}: is no JSON object", hint="One object per line, nothing else.")
    row = {}
    for name, value in pairs:
        if name in row:
            raise RecordsError(f"{path}, line {number}: a key is there twice", hint=CHECK)
        if isinstance(value, list):
            raise RecordsError(f"{path}, line {number}: the value of a key is no plain value", hint=CHECK)
        row[name] = "" if value is None else str(value).lower() if isinstance(value, bool) else value
    return row


def check_header(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a file that lacks a column, or has one twice."""
    absent = [name for name in wanted if name not in names]
    if absent:
        raise RecordsError(f"{path} has no column {', '.join(map(repr, absent))}", hint=CHECK)
    repeated = [name for name in wanted if list(names).count(name) > 1]
    if repeated:
        raise RecordsError(f"{path} has column {repeated[0]!r} more than once", hint=CHECK)


# cells


def refuse(
    manifest: Manifest, frame: pd.DataFrame, column: str, flags: Flags, what: str, *, quoted: bool = True
) -> None:
    """Raise for the first flagged row of a column, with a count of the rest; return if there is none.

    Args:
        manifest: Whose file it is.
        frame: The file.
        column: Where the problem is.
        flags: Which rows have it.
        what: The problem, in words.
        quoted: The cell may be shown: it is one of a table.
    """
    rows = np.flatnonzero(flags)
    if not len(rows):
        return
    more = f" (and {len(rows) - 1} more like it)" if len(rows) > 1 else ""
    value = frame[column].iloc[rows[0]] if quoted else None
    _refuse_cell(manifest, frame.index[rows[0]], column, value, f"{what}{more}")


def _refuse_cell(manifest: Manifest, row: Any, column: str, value: Any, what: str) -> NoReturn:
    shown = repr(value if isinstance(value, str) else str(value))
    shown = shown if len(shown) <= 40 else f"{shown[:36]}...'"
    cell = "" if value is None else f", value {shown}"
    raise RecordsError(f"{manifest.file}, row {row}, column {column!r}{cell}: {what}", hint=CHECK)


def texts(series: pd.Series) -> pd.Series:
    """Cells as stripped texts; a whole number reads "1" whether the file holds 1, 1.0 or "1"."""
    if pd.api.types.is_float_dtype(series):
        return series.map(lambda value: f"{value:.0f}" if float(value).is_integer() else str(value)).astype(str)
    return series.astype(str).str.strip()


def missing(series: pd.Series, manifest: Manifest) -> Flags:
    """Which cells are empty, null, or one of the manifest's texts for "not known"."""
    cells = series.astype(str).str.strip()
    flags: Flags = (series.isna() | cells.isin(["", *manifest.missing_values])).to_numpy(dtype=np.bool_)
    return flags
