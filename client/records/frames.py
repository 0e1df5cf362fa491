"""Files with a row per record -> frames, in parts, and what every reader asks of a frame's cells.

Every cell is a text, as far as the format allows, so that nothing is guessed. Texts of errors are for the hospital's
own terminal: they name file, row and column, and quote a cell of a table; never a text or a measurement.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

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
T = TypeVar("T")
CHECK = "Mend the file or the manifest, then run konsil-hospital check-data again."
ROWS, _CELLS = 20_000, 2_000_000  # of a part: no more of either
_asked = ContextVar("asked", default=0)  # how many questions ``refuse`` has answered about this part


# files


def parts(manifest: Manifest, at_once: int = ROWS) -> Iterator[pd.DataFrame]:
    """The manifest's file as it is, some rows at a time; the index is the row number that a spreadsheet shows.

    Every part has the same columns, and one row at least.

    Args:
        manifest: Names the file.
        at_once: Most rows of a part; of a file with very many columns there are fewer.

    Raises:
        RecordsError: It is missing, empty, or no file of its kind.
    """
    path, found = manifest.file, False
    with explained(path):
        match path.suffix:
            case ".jsonl":
                read = _json_lines(path, at_once)
            case ".sql":
                read = read_query(manifest, at_once)
            case ".ndjson":
                export = read_export(manifest)
                read = (export[first : first + at_once] for first in range(0, len(export), at_once))
            case _:
                names = header_of(path)
                read = rows_of(path, names, at_once)
        for part in read:
            if not part.empty:
                found = True
                yield part
    if not found:
        raise RecordsError(f"{path} has a header but no records", hint="Export the records again.")


def header_of(path: Path) -> list[str]:
    """Names of a CSV or Parquet file's columns."""
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_schema(path).names)
    return [str(name).strip() for name in pd.read_csv(path, nrows=1, **_CSV).iloc[0]]


def rows_of(
    path: Path, names: Sequence[str], at_once: int, wanted: Iterable[str] | None = None
) -> Iterator[pd.DataFrame]:
    """Rows of a CSV or Parquet file.

    Args:
        path: The file.
        names: As ``header_of`` returned them.
        at_once: Most rows of a part; of a file with very many columns there are fewer.
        wanted: The columns that are read, each of them there once; all if None.
    """
    at_once = min(at_once, max(1, _CELLS // max(1, len(names))))
    chosen = None if wanted is None else [name for name in names if name in set(wanted)]
    return (_parquet if path.suffix == ".parquet" else _csv)(path, names, at_once, chosen)


def _parquet(path: Path, _: Sequence[str], at_once: int, chosen: list[str] | None) -> Iterator[pd.DataFrame]:
    before = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(at_once, columns=chosen):
            part = from_arrow(batch)
            part.index = pd.RangeIndex(before, before + len(part))
            before += len(part)
            yield part


# Every cell as text, so that nothing is guessed; blank lines keep their row numbers but are no records.
_CSV: dict[str, Any] = {
    "header": None,
    "dtype": str,
    "keep_default_na": False,
    "skip_blank_lines": False,
    "encoding": "utf-8-sig",
}


def _csv(path: Path, names: Sequence[str], at_once: int, chosen: list[str] | None) -> Iterator[pd.DataFrame]:
    # Of all columns even if few are wanted: else pandas would take a row with too many cells, as of a decimal comma.
    with pd.read_csv(path, iterator=True, **_CSV) as reader:
        reader.get_chunk(1)  # the header
        while True:
            try:
                part = reader.get_chunk(at_once)
            except StopIteration:
                return
            part.index += 1
            part = part.fillna("").set_axis(list(names), axis="columns")
            part = part if chosen is None else part[chosen]
            yield part[(part != "").any(axis="columns")]


def checked(parts: Iterable[pd.DataFrame], check: Callable[[pd.DataFrame], T]) -> Iterator[T]:
    """What a check makes of each part of a file; what it refuses in several is one error of the whole file.

    Guarantees:
        * However the file is cut into parts, the error is the same: of all questions that the check asks, the first
          that has an answer anywhere in the file; of its cells the first; and the count is of the whole file. So all is
          read, also behind an error.

    Raises:
        RecordsError: A part is refused.
    """
    found: tuple[float, RecordsError] | None = None
    for part in parts:
        _asked.set(0)
        try:
            made = check(part)
        except RecordsError as error:
            # What is no cell's fault, as a damaged file that a row names, lies between two questions.
            place = _asked.get() + (0 if isinstance(error, CellsError) else 0.5)
            found = (place, error) if found is None else _first(found, (place, error))
            continue
        if found is None:
            yield made
    if found is not None:
        raise found[1]


def _first(one: tuple[float, RecordsError], later: tuple[float, RecordsError]) -> tuple[float, RecordsError]:
    if one[0] == later[0] and isinstance(one[1], CellsError) and isinstance(later[1], CellsError):
        return one[0], one[1].and_more(later[1].count)
    return later if later[0] < one[0] else one


def from_arrow(table: "pyarrow.Table | pyarrow.RecordBatch") -> pd.DataFrame:
    """Columns as they are stored, texts checked for being texts.

    What pandas wrote about a file beside its columns is not looked at: an index is a column like any other.
    """
    table.validate(full=True)
    # Whole numbers stay whole where some are missing: else a number of 17 digits would be another one in such a part.
    return table.to_pandas(ignore_metadata=True, integer_object_nulls=True)


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


def _json_lines(path: Path, at_once: int) -> Iterator[pd.DataFrame]:
    """One JSON object of plain values per line; blank lines are no records, a key that is left out is missing.

    It is read twice: the first time for all keys that there are.
    """
    names = list(dict.fromkeys(name for _, row in _json_rows(path) for name in row))
    lines = _json_rows(path)
    while part := list(islice(lines, at_once)):
        numbers, rows = zip(*part, strict=True)
        yield pd.DataFrame(list(rows), index=list(numbers), columns=names, dtype=object).fillna("")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines with their numbers."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_row(path, number, line)


def _json_row(path: Path, number: int, line: str) -> dict[str, str]:
    """One line; its numbers stay as they are written."""
    try:
        pairs = json.loads(line, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=list)
        if "\\u" in line:
            json.dumps(pairs, ensure_ascii=False).encode()  # half of a surrogate pair is no text
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
    _asked.set(_asked.get() + 1)
    rows = np.flatnonzero(flags)
    if len(rows):
        place = cell(manifest, frame.index[rows[0]], column, frame[column].iloc[rows[0]] if quoted else None)
        raise CellsError(place, what, len(rows))


class CellsError(RecordsError):
    """Cells of one column that have one problem.

    Args:
        place: The first of them, as ``cell`` says it.
        what: The problem, in words.
        count: How many there are.
    """

    def __init__(self, place: str, what: str, count: int) -> None:
        more = f" (and {count - 1} more like it)" if count > 1 else ""
        super().__init__(f"{place}: {what}{more}", hint=CHECK)
        self.place, self.what, self.count = place, what, count

    def and_more(self, count: int) -> Self:
        """The same with so many cells more, that come later in the file."""
        return type(self)(self.place, self.what, self.count + count)


def cell(manifest: Manifest, row: Any, column: str, value: Any) -> str:
    """Where a cell is, and what is in it unless that is None."""
    shown = repr(value if isinstance(value, str) else str(value))
    shown = shown if len(shown) <= 40 else f"{shown[:36]}...'"
    return f"{manifest.file}, row {row}, column {column!r}" + ("" if value is None else f", value {shown}")


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
