"""Columns of results into a CSV or Parquet file, in parts: whole or not at all, and for its owner alone."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow
import pyarrow.parquet

from shared_models.durable import sync_file, sync_folder
from shared_models.errors import ConfigError


class Writer(Protocol):
    """Takes columns, all of one length, in their order; several times."""

    def write(self, columns: Mapping[str, Sequence[object]]) -> None:
        """Append rows; None is an empty cell."""

    def close(self) -> None:
        """No more."""


@contextmanager
def writing(out: Path, columns: Mapping[str, type]) -> Iterator[Writer]:
    """Around writing a file.

    Guarantees:
        * The file is there whole or not at all, readable by its owner alone.

    Args:
        out: Ends in ``.csv`` or ``.parquet``; replaced if it is there.
        columns: ``int``, ``float`` or ``str`` by name.

    Raises:
        ConfigError: ``out`` ends in something else, or cannot be written.
    """
    kinds: Mapping[str, Callable[[Path, Mapping[str, type]], Writer]] = {".csv": _Csv, ".parquet": _Parquet}
    if out.suffix not in kinds:
        raise ConfigError(f"{out} ends in {out.suffix or 'nothing'}", hint="Choose .csv or .parquet.")
    temporary = out.with_name(f"{out.name}.new")
    try:
        temporary.unlink(missing_ok=True)  # of a crash
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        writer = kinds[out.suffix](temporary, columns)
        try:
            yield writer
        finally:
            writer.close()
        sync_file(temporary)
        temporary.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"{out} cannot be written: {why}", hint="Check the folder and the disk.") from None
    finally:
        temporary.unlink(missing_ok=True)


class _Csv:
    """UTF-8, comma, one header row; numbers with six digits."""

    def __init__(self, path: Path, columns: Mapping[str, type]) -> None:
        self._stream = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._stream, lineterminator="\n")
        self._writer.writerow(columns)

    def write(self, columns: Mapping[str, Sequence[object]]) -> None:
        for row in zip(*columns.values(), strict=True):
            self._writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    """One row group per batch."""

    def __init__(self, path: Path, columns: Mapping[str, type]) -> None:
        kinds = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
        self._schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, columns: Mapping[str, Sequence[object]]) -> None:
        self._writer.write_table(pyarrow.table(dict(columns), schema=self._schema))

    def close(self) -> None:
        self._writer.close()
