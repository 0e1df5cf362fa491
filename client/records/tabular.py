"""Records on disk -> validated tensors. Patient ids stay in this folder; what leaves it is an index without meaning.

All checks run when records are read, before a study is approved and before anything is charged, and their texts are for
the hospital's own terminal: they name file, row, column and value. What a record is made of besides its row (pictures,
series, texts) is read by a file of this folder each.
"""

import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.records.columns import categories, numbers
from client.records.frames import CHECK, Flags, check_header, load, missing, refuse, texts
from client.records.groups import group_columns, read_groups
from client.records.identifiers import masked, refuse_columns
from client.records.images import read_images, read_unlabelled, scaled
from client.records.labels import Targets, absent_labels, label_columns, read_labels
from client.records.manifest import IMAGES, SIGNALS, TEXT, Manifest, check_fits, schema_names
from client.records.on_disk import OnDemand, OnDisk, digests
from client.records.pictures import open_pictures
from client.records.records import Records
from client.records.series import Account, read_long_form
from client.records.signals import read_signals
from client.records.stamps import Stamp
from client.records.text import read_texts
from shared_models.errors import RecordsError
from shared_models.plan import Fold
from shared_models.tasks import Choice, ImageInput, Numeric, SeriesInput, TableInput, Task, TokensInput

SERIES = "series"


@dataclass(frozen=True)
class Table:
    """A file, checked; it stays behind the firewall, like the file.

    Attributes:
        cells: Every column of the schema: numbers as float64, categories as their index; images, series or tokens as
            one array, unless they are in ``on_disk``.
        labels: Targets, as ``read_labels`` gives them: of a task with one choice the index into its classes.
        ids: The patient of each row.
        missing: Cells that were missing, by schema name; their rows are not in ``cells``.
        left_out: Rows with a missing value, where the manifest leaves such rows out.
        seen: Of each variable of a series the cells with a value, and the least and the greatest one.
        set_aside: Measurements that were left aside, by reason.
        on_disk: Images or series that are read when they are needed.
        beside: What evaluations tell patients apart by, as ``read_groups`` gives it.
    """

    cells: Mapping[str, NDArray[Any]]
    labels: Targets
    ids: list[str]
    missing: Mapping[str, int]
    left_out: int
    seen: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    set_aside: Mapping[str, int] = field(default_factory=dict)
    on_disk: OnDisk | None = None
    beside: NDArray[np.float64] | None = None

    def content(self, name: str) -> OnDisk | NDArray[Any]:
        """What all records are made of where it is one array: images, series or tokens."""
        return self.cells[name] if self.on_disk is None else self.on_disk

    @property
    def files(self) -> Mapping[Path, Stamp]:
        """Files behind the rows besides those that the manifest names, with stamps from before they were checked."""
        return {} if self.on_disk is None else self.on_disk.stamps


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
    table: Table,
    manifest: Manifest,
    task: Task,
    *,
    split_key: bytes,
    opted_out: Flags | None = None,
    fold: Fold | None = None,
) -> tuple[Records, Records]:
    """Encode a checked table and cut it into training and validation part; see ``read_table``.

    Rows in ``opted_out`` are left out of both, after all checks: a part may end up without a class, or empty. With a
    ``fold``, that is the validation part in place of the manifest's; it may lack a class: nobody chose its patients.
    """
    held_out = _held_out(table.ids, _stretch(manifest.validation_fraction, fold), split_key)
    _check_classes(manifest, task, table.labels[~held_out], "training")
    if manifest.validation_fraction > 0 and fold is None:
        _check_classes(manifest, task, table.labels[held_out], "validation")
    left = np.ones(len(held_out), dtype=np.bool_) if opted_out is None else ~opted_out
    training, validation = (_records(table, task, part & left) for part in (~held_out, held_out))
    return training, validation


def checked_table(manifest: Manifest, task: Task) -> Table:
    """Load the file and check all that the task needs; see ``read_table`` for what is refused."""
    labels: Targets
    schema = check_fits(manifest, task)
    if isinstance(schema, ImageInput) and manifest.file.suffix == ".npz":
        pixels, labels, ids, beside = read_images(manifest, task, schema)
        in_memory = {} if isinstance(pixels, OnDisk) else {IMAGES: pixels}
        on_disk = pixels if isinstance(pixels, OnDisk) else None
        return Table(in_memory, labels, ids, {}, 0, on_disk=on_disk, beside=beside)
    frame, counts, left_out = _complete_rows(manifest, task)
    labels, beside = read_labels(manifest, task, frame), read_groups(manifest, task, frame)
    match schema:
        case TableInput():
            cells: dict[str, NDArray[Any]] = {
                c.name: numbers(frame, manifest, c) if isinstance(c, Numeric) else categories(frame, manifest, c)
                for c in schema.columns
            }
            ids = _patient_ids(frame, manifest, cells, labels)
            return Table(cells, labels, ids, counts, left_out, beside=beside)
        case ImageInput():
            on_disk = open_pictures(manifest, schema, frame)
            ids = _patient_ids(frame, manifest, {IMAGES: on_disk}, labels)
            return Table({}, labels, ids, counts, left_out, on_disk=on_disk, beside=beside)
        case SeriesInput():
            reader = read_long_form if manifest.series else read_signals
            series, inputs = reader(manifest, schema, frame)
            return _with_series(frame, manifest, labels, beside, counts, left_out, series, inputs)
        case TokensInput():
            cells = {TEXT: read_texts(manifest, schema, frame)}
            ids = _patient_ids(frame, manifest, cells, labels)
            return Table(cells, labels, ids, counts, left_out, beside=beside)


def _complete_rows(manifest: Manifest, task: Task) -> tuple[pd.DataFrame, dict[str, int], int]:
    """Rows without a missing value, missing cells by schema name, and how many rows were left out."""
    frame = load(manifest)
    columns = {name: manifest.column(name) for name in _row_columns(manifest, task)}
    labels = label_columns(manifest, task)
    wanted = [*columns.values(), *labels.values(), *([manifest.patient] if manifest.patient else [])]
    check_header(manifest.file, list(frame.columns), [*wanted, *group_columns(manifest, task).values()])
    _refuse_identifiers(manifest, frame, wanted)  # what tells groups apart must not identify anybody
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
    beside: NDArray[np.float64] | None,
    counts: dict[str, int],
    left_out: int,
    series: Account,
    inputs: OnDisk | NDArray[np.float32],
) -> Table:
    """A table of series; a row without any measurement is one with a missing value."""
    if manifest.incomplete_rows == "refuse":
        column = manifest.series.record if manifest.series else manifest.column(SIGNALS)
        refuse(manifest, frame, column, series.empty, "the record has no measurement that can be used", quoted=False)
    kept = ~series.empty
    if not kept.any():
        raise RecordsError(f"{manifest.file} has no record with a measurement", hint=CHECK)
    left = inputs.only(kept) if isinstance(inputs, OnDisk) else inputs[kept]
    on_disk = left if isinstance(left, OnDisk) else None
    return Table(
        {} if isinstance(left, OnDisk) else {SERIES: left},
        labels[kept],
        _patient_ids(frame[kept], manifest, {SERIES: left}, labels[kept]),
        {**counts, SERIES: int(series.empty.sum())},
        left_out + int(series.empty.sum()),
        seen=series.seen,
        set_aside=series.left_out,
        on_disk=on_disk,
        beside=None if beside is None else beside[kept],
    )


# patients


def _patient_ids(
    frame: pd.DataFrame, manifest: Manifest, cells: Mapping[str, NDArray[Any] | OnDisk], labels: Targets
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


def content_of(values: NDArray[Any] | OnDisk) -> NDArray[Any] | list[str]:
    """What stands for a row's content: a cell itself, and of an image, a series or a text its digest."""
    return values if isinstance(values, np.ndarray) and values.ndim == 1 else digests(values)


def _stretch(fraction: float, fold: Fold | None) -> tuple[float, float]:
    """Where in [0, 1) the validation patients' hashes lie, times 2**64; folds lie side by side and leave nobody out."""
    if fold is None:
        return 0, fraction * 2**64
    return (fold.index - 1) * 2**64 // fold.count, fold.index * 2**64 // fold.count


def _held_out(ids: list[str], stretch: tuple[float, float], key: bytes) -> Flags:
    """Which rows belong to validation patients: the keyed hash of the id, a number below 2**64, lies in the stretch."""
    low, high = stretch
    chosen = {i: low <= int.from_bytes(hmac.digest(key, i.encode(), "sha256")[:8]) < high for i in set(ids)}
    return np.array([chosen[i] for i in ids], dtype=np.bool_)


def _records(table: Table, task: Task, part: Flags) -> Records:
    """One part of the table as tensors, its patients numbered 0, 1, 2, ... as they come."""
    patients, distinct = pd.factorize(np.array(table.ids, dtype=object)[part])
    targets = torch.from_numpy(table.labels[part])
    indices = task.choice is not None and task.outputs > 1
    return Records(
        inputs=_inputs(table, task, part),
        targets=targets if indices else targets.to(torch.float32),
        patients=patients.astype(np.int64),
        patient_count=len(distinct),
        beside=None if table.beside is None else table.beside[part],
    )


def _inputs(table: Table, task: Task, part: Flags) -> Tensor | OnDemand:
    """Inputs of some rows, as the task's ``input`` says: float32, or int64 for tokens; images are scaled per batch."""
    match task.input:
        case ImageInput():
            return OnDemand(table.content(IMAGES), np.flatnonzero(part), scaled)
        case SeriesInput():
            if table.on_disk is not None:
                return OnDemand(table.on_disk, np.flatnonzero(part), np.asarray)
            return torch.from_numpy(table.cells[SERIES][part])
        case TokensInput():
            return torch.from_numpy(table.cells[TEXT][part])
        case TableInput() as schema:
            return torch.from_numpy(_encode_columns(table, schema, part))


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


# without labels


@dataclass(frozen=True)
class Inputs:
    """Some rows of a file as a network takes them, without labels: to be predicted, not to be learnt from.

    Attributes:
        rows: Number of each row, as an editor or a spreadsheet shows it; of an image in ``.npz`` its index.
        patients: The patient of each row; None where the manifest names no column.
        kept: Which rows have all their values.
        inputs: Encoded inputs of the rows that are kept.
        texts: Of texts, what stands in the rows that are kept, as it was encoded; else empty.
    """

    rows: list[int]
    patients: list[str | None]
    kept: Flags
    inputs: torch.Tensor
    texts: list[str] = field(default_factory=list)


def read_inputs(manifest: Manifest, task: Task, *, at_once: int) -> Iterator[Inputs]:
    """Read, check and encode a hospital's records without their labels, in the order of the file.

    All is checked that ``read_table`` checks, but for labels and the classes that a part must have: the label's column
    is not looked at. No more than ``at_once`` rows are encoded at once, but for series in long form.

    Raises:
        RecordsError: As for ``read_table``.
    """
    schema = check_fits(manifest, task, labelled=False)
    if isinstance(schema, ImageInput) and manifest.file.suffix == ".npz":
        pixels, ids = read_unlabelled(manifest, task, schema)
        for first in range(0, len(pixels), at_once):
            images = torch.from_numpy(scaled(pixels[first : first + at_once]))
            rows = list(range(first, first + len(images)))
            yield Inputs(rows, ids[first : first + at_once], np.ones(len(images), dtype=np.bool_), images)
        return
    frame, kept = _rows_without_labels(manifest, task)
    patients = _patients(frame, kept, manifest)
    whole = manifest.series and isinstance(schema, SeriesInput) and kept.any()
    series = read_long_form(manifest, schema, frame[kept]) if whole else None  # type: ignore[arg-type]  # asked above
    done = 0
    for first in range(0, len(frame), at_once):
        part = slice(first, first + at_once)
        here, rows = kept[part].copy(), frame[part][kept[part]]
        if series is None:
            encoded, empty = _encoded_rows(rows, manifest, task)
        else:
            these = slice(done, done + len(rows))
            encoded, empty = series[1][these], series[0].empty[these]
        done += len(rows)
        if empty.any() and manifest.incomplete_rows == "refuse":
            column = manifest.series.record if manifest.series else manifest.column(SIGNALS)
            refuse(manifest, rows, column, empty, "the record has no measurement that can be used", quoted=False)
        here[here] = ~empty
        said = _said(rows, manifest) if isinstance(schema, TokensInput) else []
        yield Inputs(
            [int(row) for row in frame.index[part]], patients[part], here, torch.from_numpy(encoded[~empty]), said
        )


def encode_rows(frame: pd.DataFrame, manifest: Manifest, task: Task) -> torch.Tensor:
    """Encode rows of a table that are in memory, each cell a text; they are checked like those of a file.

    Raises:
        RecordsError: A column or a value is missing, or is not what the task says; with row, column and value.
    """
    assert isinstance(task.input, TableInput)  # noqa: S101  # whoever calls has looked
    columns = [manifest.column(column.name) for column in task.input.columns]
    check_header(manifest.file, list(frame.columns), columns)
    for column in columns:
        refuse(manifest, frame, column, missing(frame[column], manifest), "the value is missing")
    return torch.from_numpy(_encoded_rows(frame, manifest, task)[0])


def _rows_without_labels(manifest: Manifest, task: Task) -> tuple[pd.DataFrame, Flags]:
    """All rows, and which of them have all their values; at least one has."""
    frame = load(manifest)
    columns = [manifest.column(name) for name in _row_columns(manifest, task)]
    wanted = [*columns, *([manifest.patient] if manifest.patient else [])]
    check_header(manifest.file, list(frame.columns), wanted)
    _refuse_identifiers(manifest, frame, [*wanted, *label_columns(manifest, task).values()])
    kept = np.ones(len(frame), dtype=np.bool_)
    for column in columns:
        absent = missing(frame[column], manifest)
        if manifest.incomplete_rows == "refuse":
            refuse(manifest, frame, column, absent, "the value is missing")
        kept &= ~absent
    if not kept.any():
        raise RecordsError(f"{manifest.file} has no complete row", hint=CHECK)
    return frame, kept


def _patients(frame: pd.DataFrame, kept: Flags, manifest: Manifest) -> list[str | None]:
    if manifest.patient is None:
        return [None] * len(frame)
    absent = missing(frame[manifest.patient], manifest) & kept
    refuse(manifest, frame, manifest.patient, absent, "the patient id is missing")
    return list(texts(frame[manifest.patient]))


def _encoded_rows(frame: pd.DataFrame, manifest: Manifest, task: Task) -> tuple[NDArray[Any], Flags]:
    """Encoded inputs of some rows, and which of these are empty: recordings without a sample that can be used."""
    nothing = np.zeros(len(frame), dtype=np.bool_)
    match task.input:
        case TableInput() as schema:
            cells: dict[str, NDArray[Any]] = {
                c.name: numbers(frame, manifest, c) if isinstance(c, Numeric) else categories(frame, manifest, c)
                for c in schema.columns
            }
            table = Table(cells, np.zeros(len(frame), dtype=np.int64), [], {}, 0)
            return _encode_columns(table, schema, np.ones(len(frame), dtype=np.bool_)), nothing
        case ImageInput() as image:
            return scaled(open_pictures(manifest, image, frame)[:]), nothing
        case SeriesInput() as series:
            account, recordings = read_signals(manifest, series, frame)
            return recordings[:], account.empty
        case TokensInput() as tokens:
            if frame.empty:
                return np.empty((0, tokens.length), dtype=np.int64), nothing
            return read_texts(manifest, tokens, frame), nothing


def _said(frame: pd.DataFrame, manifest: Manifest) -> list[str]:
    cells = texts(frame[manifest.column(TEXT)])
    return list(cells.map(masked) if manifest.found_in_text == "mask" else cells)
