"""Backups as folders, both halves: written whole or not at all, and believed only if every file is what was written.

A backup holds private keys: its folders are 0700 and its files 0600, and whoever has it is its owner. A manifest with
the SHA-256 of every file tells damage; against intent only the place where it lies helps.
"""

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from shared_models.config import ALWAYS_WRITTEN, Evolving, Name, explain
from shared_models.durable import create_file, sync_file, sync_folder
from shared_models.errors import BackupError, UnsupportedFileError
from shared_models.versions import refuse_version

MANIFEST = "manifest.json"
Role = Literal["hospital", "coordinator"]


class File(Evolving):
    """One file of a backup: its length in bytes, and its SHA-256 in hexadecimal."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Evolving):
    """What a backup holds.

    Attributes:
        format: Version of this format.
        role: Whose kind.
        name: Whose.
        time: When it was whole; ISO 8601, UTC.
        software: The release that made it.
        facts: What its maker says of it, for people: how many ledger entries, for example.
        files: By path in the backup.
    """

    format: Annotated[Literal[1], ALWAYS_WRITTEN] = 1
    role: Role
    name: Name
    time: str
    software: str
    facts: dict[str, str | int]
    files: dict[str, File]


def write_backup(
    target: Path, fill: Callable[[Path], Mapping[str, str | int]], *, role: Role, name: str, outside: Path
) -> Manifest:
    """Make a backup: a folder that gets its name once all of it is on the disk.

    Args:
        target: The folder; it must not be there.
        fill: Puts files into the folder that it is given, and returns the facts.
        role: Whose kind of backup.
        name: Whose.
        outside: A folder that is copied, and that the backup must not lie in.

    Raises:
        BackupError: There is something already; it is the wrong place; or the disk does not take it, and nothing is
            left of it.
    """
    partial = target.with_name(f"{target.name}.partial")
    if target.exists():
        raise BackupError(f"{target} exists already", hint="Nothing is overwritten: name a folder for every backup.")
    if target.resolve().is_relative_to(outside.resolve()):
        raise BackupError(f"{target} lies in {outside}, which is backed up", hint="Choose a place on another disk.")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        facts = fill(partial)
        manifest = Manifest(
            role=role,
            name=name,
            time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            software=version("konsil"),
            facts=dict(facts),
            files={path.relative_to(partial).as_posix(): _described(path) for path in _files(partial)},
        )
        create_file(partial / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n", mode=0o600)
        for path in _files(partial):
            sync_file(path)
            sync_folder(path.parent)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise BackupError(
            f"{error.filename or target} cannot be copied or written: {error.strerror}",
            hint="Make room, or check who may write there; nothing is left of this backup.",
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def check_backup(folder: Path, *, role: Role) -> Manifest:
    """Read a backup's manifest, and hold every file against it.

    Raises:
        BackupError: It is no backup, or of another role; a file is missing, changed or not on the list.
        UnsupportedFileError: It is of another format.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        del found[MANIFEST]
        wrong = [name for name in sorted(found.keys() | manifest.files) if not _holds(found.get(name), manifest, name)]
    except OSError as error:
        raise BackupError(
            f"{error.filename or folder} cannot be read: {error.strerror}",
            hint="Give the folder that `backup` made; one that ends in .partial was cut off.",
        ) from None
    except ValidationError as error:
        refuse_version(error, str(folder / MANIFEST), UnsupportedFileError)
        raise BackupError(
            f"{folder / MANIFEST} is no manifest of a backup: {explain(error)}", hint="Use another backup."
        ) from None
    if wrong:
        raise BackupError(
            f"{folder} is damaged: {wrong[0]} is not what was backed up ({len(wrong)} of {len(manifest.files)} files)",
            hint="Nothing was restored. Use another backup, and have the disk looked at.",
        )
    if manifest.role != role:
        raise BackupError(f"{folder} is of a {manifest.role}", hint=f"konsil-{manifest.role} restore")
    return manifest


def copy_file(source: Path, target: Path) -> None:
    """Copy a file into a backup or out of it, its owner's alone: whole, or not at all; never over another.

    Raises:
        OSError: It cannot be read or written.
    """
    with source.open("rb") as stream:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        create_file(target, b"", mode=0o600)
        try:
            with target.open("wb") as copy:
                shutil.copyfileobj(stream, copy)
                copy.flush()
                os.fsync(copy.fileno())
        except OSError:
            target.unlink()  # half a key would pass for another one
            raise


def copy_folder(source: Path, target: Path, *, without: Callable[[Path], bool] = lambda _: False) -> None:
    """Copy a folder's files, but for some, each its owner's alone; files may be growing meanwhile.

    Raises:
        OSError: One cannot be read or written.
    """
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in _files(source):
        if not without(path.relative_to(source)):
            with suppress(FileNotFoundError):  # it was replaced or removed since it was listed
                copy_file(path, target / path.relative_to(source))


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a SQLite database as of one moment, also while it is written to, by SQLite's own backup.

    Raises:
        BackupError: It cannot be read, or the copy is damaged.
    """
    with _explained(source):
        create_file(target, b"", mode=0o600)
        uri = f"{source.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5)) as database, closing(sqlite3.connect(target)) as copy:
            database.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, and nothing beside it
            (state,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
    if state != "ok":
        raise BackupError(f"{source} is damaged: {state}", hint="Restore it from the newest backup that is whole.")


@contextmanager
def _explained(source: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise BackupError(f"{source} cannot be copied: {error}", hint="Check file and disk.") from None


def _files(folder: Path) -> list[Path]:
    """All files below a folder; links are passed by."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]


def _described(path: Path) -> File:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(bytes=path.stat().st_size, sha256=digest)


def _holds(path: Path | None, manifest: Manifest, name: str) -> bool:
    return path is not None and name in manifest.files and _described(path) == manifest.files[name]
