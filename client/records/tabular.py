"""Records on disk -> validated tensors. Patient ids stay in this folder; what leaves it is an index without meaning.

All checks run when records are read, before a study is approved and before anything is charged, and their texts are for
the hospital's own terminal: they name file, row, column and value. What a record is made of besides its row (pictures,
series, texts) is read by a file of this folder each.
"""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from client.records.columns import categories, numbers
from client.records.frames import CHECK, Flags, check_header, load, missing, refuse, texts
from client.records.identifiers import refuse_columns
from client.records.images import read_images, scaled
from client.records.labels import Targets, absent_labels, label_columns, read_labels
from client.records.manifest import IMAGES, SIGNALS, TEXT, Manifest, check_fits, schema_names
from client.records.pictures import read_pictures
from client.records.records import Records
from client.records.series import Series, read_long_form
from client.records.signals import read_signals
from client.records.stamps import Stamp
from client.records.text import read_texts
from shared_models.errors import RecordsError
from shared_models.tasks import Choice, ImageInput, Numeric, SeriesInput, TableInput, Task, TokensInput

SERIES = "series"


@dataclass(frozen=True)
class Table:
    """A file, checked; it stays behind the firewall, like the file.

    Attributes:
        cells: Every column of the schema: numbers as float64, categories as their index; images, series or tokens as
            one array.
        labels: Targets, as ``read_labels`` gives them: of a task with one choice the index into its classes.
        ids: The patient of each row.
        missing: Cells that were missing, by schema name; their rows are not in ``cells``.
        left_out: Rows with a missing value, where the manifest leaves such rows out.
        seen: Of each variable of a series the cells with a value, and the least and the greatest one.
        set_aside: Measurements that were left aside, by reason.
        files: Files that the rows name, with their stamps from before they were read.
    """

    cells: Mapping[str, NDArray[Any]]
    labels: Targets
    ids: list[str]
    missing: Mapping[str, int]
    left_out: int
    seen: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    set_aside: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[Path, Stamp] = field(default_factory=dict)


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
    left = np.ones(len(held_out), dtype=np.bool_) if opted_out is None else ~opted_out
    training, validation = (_records(table, task, part & left) for part in (~held_out, held_out))
    return training, validation


def checked_table(manifest: Manifest, task: Task) -> Table:
    """Load the file and check all that the task needs; see ``read_table`` for what is refused."""
    labels: Targets
    schema = check_fits(manifest, task)
    if isinstance(schema, ImageInput) and manifest.file.suffix == ".npz":
        pixels, labels, ids = read_images(manifest, task, schema)
        return Table({IMAGES: pixels}, labels, ids, {}, 0)
    frame, counts, left_out = _complete_rows(manifest, task)
    labels = read_labels(manifest, task, frame)
    match schema:
        case TableInput():
            cells: dict[str, NDArray[Any]] = {
                c.name: numbers(frame, manifest, c) if isinstance(c, Numeric) else categories(frame, manifest, c)
                for c in schema.columns
            }
            return Table(cells, labels, _patient_ids(frame, manifest, cells, labels), counts, left_out)
        case ImageInput():
            pixels, files = read_pictures(manifest, schema, frame)
            cells = {IMAGES: pixels}
            return Table(cells, labels, _patient_ids(frame, manifest, cells, labels), counts, left_out, files=files)
        case SeriesInput():
            reader = read_long_form if manifest.series else read_signals
            series = reader(manifest, schema, frame)
            return _with_series(frame, manifest, labels, counts, left_out, series)
        case TokensInput():
            cells = {TEXT: read_texts(manifest, schema, frame)}
            return Table(cells, labels, _patient_ids(frame, manifest, cells, labels), counts, left_out)


def _complete_rows(manifest: Manifest, task: Task) -> tuple[pd.DataFrame, dict[str, int], int]:
    """Rows without a missing value, missing cells by schema name, and how many rows were left out."""
    frame = load(manifest)
    columns = {name: manifest.column(name) for name in _row_columns(manifest, task)}
    labels = label_columns(manifest, task)
    wanted = [*columns.values(), *labels.values(), *([manifest.patient] if manifest.patient else [])]
    check_header(manifest.file, list(frame.columns), wanted)
    _refuse_identifiers(manifest, frame, wanted)
    absent = {name: missing(frame[column], manifest) for name, column in columns.items()}
    absent |= absent_labels(manifest, task, frame)
    incomplete = np.logical_or.reduce(list(absent.values()))
    if manifest.incomplete_rows == "refuse":
        for name, flags in absent.items():
            refuse(manifest, frame, (columns | labels)[name], flags, "the value is missing")
    frame = frame[~incomplete]
    if frame.empty:
        raise RecordsError(f"{manifest.file} has no complete row", hint=CHECK)
    return frame, {name: int(flags.sum()) for name, flags in absent.items()}, int(incomplete.sum())


def _row_columns(manifest: Manifest, task: Task) -> list[str]:
    """Schema names whose cells stand in the rows of the manifest's file, in the schema's order."""
    if isinstance(task.input, TableInput):
        return [column.name for column in task.input.columns]
    if isinstance(task.input, SeriesInput):
        return [] if manifest.series else [SIGNALS]
    return sorted(schema_names(task))


def _refuse_identifiers(manifest: Manifest, frame: pd.DataFrame, wanted: list[str]) -> None:
    """Of the columns that nothing uses; of those that something does, the manifest has given the meaning."""
    keys = (
        [manifest.series.record, *([manifest.series.start] if manifest.series.start else [])] if manifest.series else []
    )
    refuse_columns(manifest.file, list(frame.columns), drop=manifest.drop, mapped=[*wanted, *keys])


def _with_series(
    frame: pd.DataFrame,
    manifest: Manifest,
    labels: Targets,
    counts: dict[str, int],
    left_out: int,
    series: Series,
) -> Table:
    """A table of series; a row without any measurement is one with a missing value."""
    if manifest.incomplete_rows == "refuse":
        column = manifest.series.record if manifest.series else manifest.column(SIGNALS)
        refuse(manifest, frame, column, series.empty, "the record has no measurement that can be used", quoted=False)
    kept = ~series.empty
    if not kept.any():
        raise RecordsError(f"{manifest.file} has no record with a measurement", hint=CHECK)
    cells = {SERIES: series.inputs[kept]}
    return Table(
        cells,
        labels[kept],
        _patient_ids(frame[kept], manifest, cells, labels[kept]),
        {**counts, SERIES: int(series.empty.sum())},
        left_out + int(series.empty.sum()),
        seen=series.seen,
        set_aside=series.left_out,
        files=series.files,
    )


# patients


def _patient_ids(
    frame: pd.DataFrame, manifest: Manifest, cells: Mapping[str, NDArray[Any]], labels: Targets
) -> list[str]:
    """An id per row: the patient column, or where there is none the row's content with a number for equal rows."""
    if manifest.patient is None:
        content = pd.DataFrame({name: content_of(values) for name, values in {**cells, "": labels}.items()})
        repeat = content.groupby(list(content.columns)).cumcount()
        return [repr(row) for row in zip(*(content[name].tolist() for name in content), repeat, strict=True)]
    refuse(manifest, frame, manifest.patient, missing(frame[manifest.patient], manifest), "the patient id is missing")
    ids = texts(frame[manifest.patient])
    if manifest.one_row_per_patient:
        what = "the patient has an earlier row, but the manifest declares one_row_per_patient"
        refuse(manifest, frame, manifest.patient, ids.duplicated().to_numpy(), what)
    return list(ids)


def content_of(values: NDArray[Any]) -> NDArray[Any] | list[str]:
    """What stands for a row's content: a cell itself, and of an image, a series or a text its digest."""
    if values.ndim == 1:
        return values
    return [hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for value in values]


def _held_out(ids: list[str], fraction: float, key: bytes) -> Flags:
    """Which rows belong to validation patients: the keyed hash of the id, as a number in [0, 1), is below fraction."""
    chosen = {i: int.from_bytes(hmac.digest(key, i.encode(), "sha256")[:8]) < fraction * 2**64 for i in set(ids)}
    return np.array([chosen[i] for i in ids], dtype=np.bool_)


def _records(table: Table, task: Task, part: Flags) -> Records:
    """One part of the table as tensors, its patients numbered 0, 1, 2, ... as they come."""
    patients, distinct = pd.factorize(np.array(table.ids, dtype=object)[part])
    targets = torch.from_numpy(table.labels[part])
    indices = task.choice is not None and task.outputs > 1
    return Records(
        inputs=torch.from_numpy(_encode(table, task, part)),
        targets=targets if indices else targets.to(torch.float32),
        patients=patients.astype(np.int64),
        patient_count=len(distinct),
    )


def _encode(table: Table, task: Task, part: Flags) -> NDArray[Any]:
    """Inputs of some rows, as the task's ``input`` says: float32, or int64 for tokens."""
    match task.input:
        case ImageInput():
            return scaled(table.cells[IMAGES][part])
        case SeriesInput():
            return table.cells[SERIES][part]
        case TokensInput():
            return table.cells[TEXT][part]
        case TableInput() as schema:
            return _encode_columns(table, schema, part)


def _encode_columns(table: Table, schema: TableInput, part: Flags) -> NDArray[np.float32]:
    blocks = []
    for column in schema.columns:
        cells = table.cells[column.name][part]
        if isinstance(column, Numeric):
            blocks.append(column.scaled(cells)[:, None])
        else:
            blocks.append(cells[:, None] == np.arange(1, len(column.categories)))
    return np.concatenate(blocks, axis=1, dtype=np.float32)


# the parts


def class_counts(records: Records, task: Task) -> dict[str, int]:
    """How many records of each class of each choice there are: true counts, for the hospital's own eyes."""
    return _class_counts(records.targets.numpy(), task)


def _class_counts(targets: NDArray[Any], task: Task) -> dict[str, int]:
    """Of several heads, a class's name stands after its head's."""
    if task.choice is not None:
        return _counted(targets, task.choice.classes)
    starts = np.cumsum([0, *(widths[1] for widths in task.widths)])
    return {
        f"{head.name}: {name}": count
        for head, start in zip(task.heads, starts, strict=False)
        if isinstance(head, Choice)
        for name, count in _counted(targets[~np.isnan(targets[:, start]), start], head.classes).items()
    }


def _counted(labels: NDArray[Any], classes: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(labels.astype(np.int64), minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True)}


def _check_classes(manifest: Manifest, task: Task, targets: NDArray[Any], part: str) -> None:
    """Refuse a part without a class, unless the manifest declares that this hospital never sees it."""
    absent = [n for n, k in _class_counts(targets, task).items() if not k and n not in manifest.absent_classes]
    if absent:
        raise RecordsError(
            f"{manifest.file}: no record of class {', '.join(map(repr, absent))} in the {part} part",
            hint="Add records, change validation_fraction, or declare absent_classes = [...] in the manifest.",
        )
