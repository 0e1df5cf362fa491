"""Records on disk -> validated tensors. Patient ids stay in this folder; what leaves it is an index without meaning.

All checks run when records are read, before a study is approved and before anything is charged, and their texts are for
the hospital's own terminal: they name file, row, column and value.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from client.records.images import read_images, scaled
from client.records.manifest import IMAGES, Manifest, check_fits
from client.records.records import Records
from shared_models.errors import RecordsError
from shared_models.tasks import Categorical, ImageInput, Numeric, Task

Flags = NDArray[np.bool_]
_CHECK = "Mend the file or the manifest, then run konsil-hospital check-data again."


@dataclass(frozen=True)
class Table:
    """A file, checked; it stays behind the firewall, like the file.

    Attributes:
        cells: Every column of the schema: numbers as float64, categories as their index; images as one array.
        labels: Index into the task's classes.
        ids: The patient of each row.
        missing: Cells that were missing, by schema name; their rows are not in ``cells``.
        left_out: Rows with a missing value, where the manifest leaves such rows out.
    """

    cells: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64]
    ids: list[str]
    missing: Mapping[str, int]
    left_out: int


def read_table(manifest: Manifest, task: Task, *, split_key: bytes) -> tuple[Records, Records]:
    """Read, check and encode a hospital's table.

    Guarantees:
        * A patient is in the training or in the validation part, never in both, by keyed hash of the id alone: adding
          or removing a patient moves nobody else. (Without an id column the row's own content stands in for the id.)
        * Every number lies in the task's public range and every category is a public one: encoding uses nothing that
          was computed from the records.

    Args:
        manifest: As ``read_manifest`` returned it.
        task: The task that the manifest names.
        split_key: Secret key of the hash, kept by the hospital.

    Returns:
        The training part and the validation part; the latter is empty where the fraction is 0.

    Raises:
        RecordsError: The first problem, with file, row, column and value, and how many more there are like it.
    """
    return split_table(checked_table(manifest, task), manifest, task, split_key=split_key)


def split_table(
    table: Table, manifest: Manifest, task: Task, *, split_key: bytes, opted_out: Flags | None = None
) -> tuple[Records, Records]:
    """Encode a checked table and cut it into training and validation part; see ``read_table``.

    Rows in ``opted_out`` are left out of both, after all checks: a part may end up without a class, or empty.
    """
    held_out = _held_out(table.ids, manifest.validation_fraction, split_key)
    _check_classes(manifest, task, table.labels[~held_out], "training")
    if manifest.validation_fraction > 0:
        _check_classes(manifest, task, table.labels[held_out], "validation")
    inputs = _encode(table, task)
    left = np.ones(len(held_out), dtype=np.bool_) if opted_out is None else ~opted_out
    training, validation = (_records(table, task, inputs, part & left) for part in (~held_out, held_out))
    return training, validation


def checked_table(manifest: Manifest, task: Task) -> Table:
    """Load the file and check every cell that the task needs; see ``read_table`` for what is refused."""
    schema = check_fits(manifest, task)
    if isinstance(schema, ImageInput):
        pixels, labels, ids = read_images(manifest, task, schema)
        return Table({IMAGES: pixels}, labels, ids, {}, 0)
    frame = _load(manifest.file)
    _check_header(frame, manifest, [manifest.column(c.name) for c in schema.columns])
    missing = {c.name: _missing(frame[manifest.column(c.name)], manifest) for c in schema.columns}
    missing[task.label] = _missing(frame[manifest.label], manifest)
    incomplete = np.logical_or.reduce(list(missing.values()))
    if manifest.incomplete_rows == "refuse":
        for name, flags in missing.items():
            column = manifest.label if name == task.label else manifest.column(name)
            _refuse(manifest, frame, column, flags, "the value is missing")
    frame = frame[~incomplete]
    if frame.empty:
        raise RecordsError(f"{manifest.file} has no complete row", hint=_CHECK)
    cells = {
        c.name: _numbers(frame, manifest, c) if isinstance(c, Numeric) else _categories(frame, manifest, c)
        for c in schema.columns
    }
    label = Categorical(name=task.label, categories=task.classes)
    labels = _categories(frame, manifest, label, column=manifest.label)
    counts = {name: int(flags.sum()) for name, flags in missing.items()}
    return Table(cells, labels, _patient_ids(frame, manifest, cells, labels), counts, int(incomplete.sum()))


# the file


def _load(path: Path) -> pd.DataFrame:
    """Read a file as it is; the index is the row number that a spreadsheet shows, the header being row 1."""
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else _load_csv(path)
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist", hint="Check file = ... in the manifest.") from None
    except pd.errors.EmptyDataError:
        raise RecordsError(f"{path} is empty", hint="Export the records again.") from None
    except (OSError, ValueError) as error:  # pandas' and pyarrow's parsing errors are ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecordsError(f"{path} cannot be read: {reason}", hint="Save it as UTF-8 CSV or as Parquet.") from None
    if frame.empty:
        raise RecordsError(f"{path} has a header but no records", hint="Export the records again.")
    return frame


def _load_csv(path: Path) -> pd.DataFrame:
    """Every cell as text, so that nothing is guessed; blank lines keep their row numbers but are no records."""
    frame = pd.read_csv(
        path, header=None, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig"
    )
    header = [str(name).strip() for name in frame.iloc[0]]
    frame = frame.iloc[1:].fillna("").set_axis(header, axis="columns")
    frame.index += 1
    return frame[(frame != "").any(axis="columns")]


def _check_header(frame: pd.DataFrame, manifest: Manifest, columns: list[str]) -> None:
    """Refuse a file that lacks a column, or has one twice."""
    wanted = [*columns, manifest.label, *([manifest.patient] if manifest.patient else [])]
    names = list(frame.columns)
    absent = [name for name in wanted if name not in names]
    if absent:
        raise RecordsError(f"{manifest.file} has no column {', '.join(map(repr, absent))}", hint=_CHECK)
    repeated = [name for name in wanted if names.count(name) > 1]
    if repeated:
        raise RecordsError(f"{manifest.file} has column {repeated[0]!r} more than once", hint=_CHECK)


# the cells


def _refuse(manifest: Manifest, frame: pd.DataFrame, column: str, flags: Flags, what: str) -> None:
    """Raise for the first flagged row of a column, with a count of the rest; return if there is none."""
    rows = np.flatnonzero(flags)
    if not len(rows):
        return
    more = f" (and {len(rows) - 1} more like it)" if len(rows) > 1 else ""
    _refuse_cell(manifest, frame.index[rows[0]], column, frame[column].iloc[rows[0]], f"{what}{more}")


def _refuse_cell(manifest: Manifest, row: Any, column: str, value: Any, what: str) -> NoReturn:
    shown = repr(value if isinstance(value, str) else str(value))
    shown = shown if len(shown) <= 40 else f"{shown[:36]}...'"
    raise RecordsError(f"{manifest.file}, row {row}, column {column!r}, value {shown}: {what}", hint=_CHECK)


def _texts(series: pd.Series) -> pd.Series:
    """Cells as stripped texts; a whole number reads "1" whether the file holds 1, 1.0 or "1"."""
    if pd.api.types.is_float_dtype(series):
        return series.map(lambda value: f"{value:.0f}" if float(value).is_integer() else str(value)).astype(str)
    return series.astype(str).str.strip()


def _missing(series: pd.Series, manifest: Manifest) -> Flags:
    """Which cells are empty, null, or one of the manifest's texts for "not known"."""
    texts = series.astype(str).str.strip()
    flags: Flags = (series.isna() | texts.isin(["", *manifest.missing_values])).to_numpy(dtype=np.bool_)
    return flags


def _numbers(frame: pd.DataFrame, manifest: Manifest, column: Numeric) -> NDArray[np.float64]:
    """A numeric column, every value inside its public range."""
    name = manifest.column(column.name)
    series = frame[name]
    if pd.api.types.is_bool_dtype(series):
        _refuse(manifest, frame, name, np.ones(len(frame), dtype=np.bool_), "is a truth value, not a number")
    texts = series if pd.api.types.is_numeric_dtype(series) else _texts(series)
    values: NDArray[np.float64] = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    not_finite = texts.astype(str).str.lower().str.lstrip("+-").isin(["nan", "inf", "infinity"]).to_numpy()
    _refuse(manifest, frame, name, not_finite | np.isinf(values), "is not a finite number")
    _refuse(manifest, frame, name, np.isnan(values), f"is not a number ({column.unit} expected)")
    outside = ~((values >= column.low) & (values <= column.high))
    _refuse(
        manifest, frame, name, outside, f"is outside the public range {column.low:g} to {column.high:g} {column.unit}"
    )
    return values


def _categories(
    frame: pd.DataFrame, manifest: Manifest, schema: Categorical, column: str | None = None
) -> NDArray[np.int64]:
    """A column of categories, as indices into the schema's; the manifest's map translates codes."""
    name = column or manifest.column(schema.name)
    codes = manifest.categories.get(schema.name, {})
    texts = _texts(frame[name]).map(lambda text: codes.get(text, text))
    index = {category: i for i, category in enumerate(schema.categories)}
    found = texts.map(lambda text: index.get(text, -1)).to_numpy(dtype=np.int64)
    _refuse(manifest, frame, name, found < 0, f"is none of {', '.join(schema.categories)}")
    return found


# patients


def _patient_ids(
    frame: pd.DataFrame, manifest: Manifest, cells: Mapping[str, NDArray[Any]], labels: NDArray[np.int64]
) -> list[str]:
    """An id per row: the patient column, or where there is none the row's content with a number for equal rows."""
    if manifest.patient is None:
        content = pd.DataFrame({**cells, "": labels})
        repeat = content.groupby(list(content.columns)).cumcount()
        return [
            repr(row) for row in zip(*(cells[name].tolist() for name in cells), labels.tolist(), repeat, strict=True)
        ]
    _refuse(manifest, frame, manifest.patient, _missing(frame[manifest.patient], manifest), "the patient id is missing")
    ids = _texts(frame[manifest.patient])
    if manifest.one_row_per_patient:
        what = "the patient has an earlier row, but the manifest declares one_row_per_patient"
        _refuse(manifest, frame, manifest.patient, ids.duplicated().to_numpy(), what)
    return list(ids)


def _held_out(ids: list[str], fraction: float, key: bytes) -> Flags:
    """Which rows belong to validation patients: the keyed hash of the id, as a number in [0, 1), is below fraction."""
    chosen = {i: int.from_bytes(hmac.digest(key, i.encode(), "sha256")[:8]) < fraction * 2**64 for i in set(ids)}
    return np.array([chosen[i] for i in ids], dtype=np.bool_)


def _records(table: Table, task: Task, inputs: NDArray[np.float32], part: Flags) -> Records:
    """One part of the table as tensors, its patients numbered 0, 1, 2, ... as they come."""
    patients, distinct = pd.factorize(np.array(table.ids, dtype=object)[part])
    targets = torch.from_numpy(table.labels[part])
    return Records(
        inputs=torch.from_numpy(inputs[part]),
        targets=targets.to(torch.float32) if task.outputs == 1 else targets,
        patients=patients.astype(np.int64),
        patient_count=len(distinct),
    )


def _encode(table: Table, task: Task) -> NDArray[np.float32]:
    """Rows of shape ``(width,)`` as ``TableInput`` says, or images as ``ImageInput`` does."""
    if isinstance(task.input, ImageInput):
        return scaled(table.cells[IMAGES])
    blocks = []
    for column in task.input.columns:  # type: ignore[union-attr]  # check_fits has refused other kinds of input
        cells = table.cells[column.name]
        if isinstance(column, Numeric):
            blocks.append(column.scaled(cells)[:, None])
        else:
            blocks.append(cells[:, None] == np.arange(1, len(column.categories)))
    return np.concatenate(blocks, axis=1, dtype=np.float32)


# the parts


def class_counts(records: Records, task: Task) -> dict[str, int]:
    """How many records of each class there are: true counts, for the hospital's own eyes."""
    return _class_counts(records.targets.numpy().astype(np.int64), task)


def _class_counts(labels: NDArray[np.int64], task: Task) -> dict[str, int]:
    counts = np.bincount(labels, minlength=len(task.classes))
    return {name: int(count) for name, count in zip(task.classes, counts, strict=True)}


def _check_classes(manifest: Manifest, task: Task, labels: NDArray[np.int64], part: str) -> None:
    """Refuse a part without a class, unless the manifest declares that this hospital never sees it."""
    absent = [n for n, k in _class_counts(labels, task).items() if not k and n not in manifest.absent_classes]
    if absent:
        raise RecordsError(
            f"{manifest.file}: no record of class {', '.join(map(repr, absent))} in the {part} part",
            hint="Add records, change validation_fraction, or declare absent_classes = [...] in the manifest.",
        )
