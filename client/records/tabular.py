"""Records on disk -> validated tensors. Patient ids stay in this folder; what leaves it is an index without meaning.

All checks run when records are read, before a study is approved and before anything is charged, and their texts are for
the hospital's own terminal: they name file, row, column and value. What a record is made of besides its row (pictures,
series, texts) is read by a file of this folder each.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.records.columns import categories, numbers
from client.records.frames import (
    CHECK,
    ROWS,
    CellsError,
    Flags,
    cell,
    check_header,
    checked,
    missing,
    parts,
    refuse,
    texts,
)
from client.records.groups import group_columns, read_groups
from client.records.identifiers import masked, refuse_columns
from client.records.images import read_images, read_unlabelled, scaled
from client.records.labels import Labels, Targets, absent_labels, label_columns, marks, read_labels, unpacked
from client.records.manifest import SIGNALS, TEXT, Manifest, check_fits, schema_names
from client.records.on_disk import Content, OnDemand, OnDisk, digests, walk
from client.records.patient_ids import Numbering, Patients
from client.records.pictures import open_pictures
from client.records.records import Records
from client.records.scratch import ROOM, Room, Stored
from client.records.series import Account, read_long_form
from client.records.signals import read_signals
from client.records.stamps import Stamp
from client.records.text import read_texts
from shared_models.errors import RecordsError
from shared_models.plan import Fold
from shared_models.tasks import Choice, ImageInput, Numeric, SeriesInput, TableInput, Task, TokensInput

SERIES = "series"
_TEXTS = 2_000  # of a part: they may be long


@dataclass(frozen=True)
class Table:
    """A file, checked; it stays behind the firewall, like the file.

    Attributes:
        content: What each row is made of: of a table every column of the schema, numbers as float64 and categories as
            their index; or an image, a series or tokens.
        labels: Targets, as ``read_labels`` gives them: of a task with one choice the index into its classes.
        patients: Whose each row is.
        missing: Cells that were missing, by schema name; their rows are not in ``content``.
        left_out: Rows with a missing value, where the manifest leaves such rows out.
        seen: Of each variable of a series the cells with a value, and the least and the greatest one.
        set_aside: Measurements that were left aside, by reason.
        beside: What evaluations tell patients apart by, as ``read_groups`` gives it.
    """

    content: Content
    labels: Targets
    patients: Patients
    missing: Mapping[str, int] = field(default_factory=dict)
    left_out: int = 0
    seen: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    set_aside: Mapping[str, int] = field(default_factory=dict)
    beside: NDArray[np.float64] | None = None

    @property
    def files(self) -> Mapping[Path, Stamp]:
        """Files behind the rows besides those that the manifest names, with stamps from before they were checked."""
        return self.content.stamps


def read_table(manifest: Manifest, task: Task, *, split_key: bytes, room: Room = ROOM) -> tuple[Records, Records]:
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
        room: Where what was encoded may lie.

    Returns:
        The training part and the validation part; the latter is empty where the fraction is 0.

    Raises:
        RecordsError: The first problem, with file, row, column and value, and how many more there are like it.
    """
    return split_table(checked_table(manifest, task, room=room), manifest, task, split_key=split_key, room=room)


def split_table(
    table: Table,
    manifest: Manifest,
    task: Task,
    *,
    split_key: bytes,
    opted_out: Flags | None = None,
    fold: Fold | None = None,
    room: Room = ROOM,
) -> tuple[Records, Records]:
    """Encode a checked table and cut it into training and validation part; see ``read_table``.

    Rows in ``opted_out`` are left out of both, after all checks: a part may end up without a class, or empty. With a
    ``fold``, that is the validation part in place of the manifest's; it may lack a class: nobody chose its patients.
    """
    held_out = _held_out(table.patients, _stretch(manifest.validation_fraction, fold), split_key)
    _check_classes(manifest, task, table.labels, ~held_out, "training")
    if manifest.validation_fraction > 0 and fold is None:
        _check_classes(manifest, task, table.labels, held_out, "validation")
    left = np.ones(len(held_out), dtype=np.bool_) if opted_out is None else ~opted_out
    training, validation = (_records(table, task, part & left, room) for part in (~held_out, held_out))
    return training, validation


def checked_table(manifest: Manifest, task: Task, *, room: Room = ROOM, at_once: int = ROWS) -> Table:
    """Read the file and check all that the task needs; see ``read_table`` for what is refused.

    Args:
        manifest: As ``read_manifest`` returned it.
        task: The task that the manifest names.
        room: Where what was encoded may lie.
        at_once: Rows that are read at once; changes nothing in the result, nor in an error.
    """
    schema = check_fits(manifest, task)
    if isinstance(schema, ImageInput) and manifest.file.suffix == ".npz":
        pixels, labels, ids, beside = read_images(manifest, task, schema, room)
        table = Table(pixels, labels, Numbering().add(ids).patients(), beside=beside)
    elif isinstance(schema, TableInput | TokensInput):
        table = _of_rows(manifest, task, schema, room, at_once)
    else:
        table = _of_files(manifest, task, schema, room, at_once)
    if isinstance(table.content, OnDisk):
        table.content.keep(room.memory)
    return table


@dataclass(frozen=True)
class _Part:
    """Some rows of a file, checked.

    Attributes:
        frame: Rows without a missing value.
        labels: Theirs; None where there is no such row.
        beside: What evaluations tell them apart by, likewise; None too where a task has no such columns.
        missing: Cells without a value, by schema name.
        left_out: How many rows were left out for one.
    """

    frame: pd.DataFrame
    labels: Labels | None
    beside: NDArray[np.float64] | None
    missing: Mapping[str, int]
    left_out: int


class _Gathered:
    """What is known of all parts of a file together, besides their rows' content."""

    def __init__(self, manifest: Manifest, room: Room) -> None:
        self._manifest, self._room = manifest, room
        self._labels: list[Labels] = []
        self._beside: list[NDArray[np.float64]] = []
        self._masks: Stored | None = None
        self.missing, self.left_out = Counter[str](), 0

    def add(self, part: _Part) -> bool:
        """The next part of the file; whether any of its rows is complete."""
        self.missing.update(part.missing)
        self.left_out += part.left_out
        if part.labels is None:
            return False
        if part.beside is not None:
            self._beside.append(part.beside)
        if part.labels.dtype == np.uint8:
            self._masks = self._masks or Stored(part.labels.shape[1:], np.uint8, self._room)
            self._masks.append(part.labels)
        else:
            self._labels.append(part.labels)
        return True

    @property
    def labels(self) -> Targets:
        """Of all rows.

        Raises:
            RecordsError: There is none.
        """
        if self._masks is not None:
            return self._masks
        if not self._labels:
            raise RecordsError(f"{self._manifest.file} has no complete row", hint=CHECK)
        labels: NDArray[Any] = np.concatenate(self._labels)
        return labels

    @property
    def beside(self) -> NDArray[np.float64] | None:
        """Of all rows."""
        return np.concatenate(self._beside) if self._beside else None


def _of_rows(manifest: Manifest, task: Task, schema: TableInput | TokensInput, room: Room, at_once: int) -> Table:
    """A file whose rows are all that there is: each part is encoded, and gone."""
    gathered, content = _Gathered(manifest, room), Stored(*_row_type(schema), room)
    numbering, lines = Numbering(), []
    at_once = min(at_once, _TEXTS) if isinstance(schema, TokensInput) else at_once

    def check(frame: pd.DataFrame) -> tuple[_Part, NDArray[Any] | None, list[str]]:
        part = _complete(manifest, task, frame)
        if part.labels is None:
            return part, None, []
        return part, _encoded(part.frame, manifest, schema), _ids(part.frame, manifest)

    for part, rows, ids in checked(parts(manifest, at_once), check):
        if gathered.add(part) and rows is not None:
            content.append(rows)
            numbering.add(ids)
            if manifest.one_row_per_patient:  # else nobody asks which lines they are
                lines.append(part.frame.index.to_numpy(dtype=np.int64))
    labels = gathered.labels
    patients = _patients(manifest, task, content, labels, numbering, np.concatenate([np.empty(0, np.int64), *lines]))
    return Table(content, labels, patients, gathered.missing, gathered.left_out, beside=gathered.beside)


def _of_files(manifest: Manifest, task: Task, schema: ImageInput | SeriesInput, room: Room, at_once: int) -> Table:
    """A file whose rows name other files, or records of a long form: what is left of its rows is in memory."""
    gathered, kept = _Gathered(manifest, room), _kept_columns(manifest, task)
    read = checked(parts(manifest, at_once), partial(_complete, manifest, task))
    frames = [part.frame.loc[:, part.frame.columns.isin(kept)] for part in read if gathered.add(part)]
    labels, frame = gathered.labels, pd.concat(frames)
    if isinstance(schema, ImageInput):
        pictures = open_pictures(manifest, schema, frame)
        return Table(
            pictures,
            labels,
            _patients_of(manifest, task, pictures, labels, frame),
            gathered.missing,
            gathered.left_out,
            beside=gathered.beside,
        )
    account, series = _series(manifest, schema, frame, room)
    _refuse_empty(manifest, frame, account.empty)
    full = ~account.empty
    if not full.any():
        raise RecordsError(f"{manifest.file} has no record with a measurement", hint=CHECK)
    empty, left = int(account.empty.sum()), series if full.all() else series.only(full)
    assert not isinstance(labels, Stored)  # noqa: S101  # masks are of images
    return Table(
        left,
        labels[full],
        _patients_of(manifest, task, left, labels[full], frame[full]),
        {**gathered.missing, SERIES: empty},
        gathered.left_out + empty,
        seen=account.seen,
        set_aside=account.left_out,
        beside=None if gathered.beside is None else gathered.beside[full],
    )


def _series(manifest: Manifest, schema: SeriesInput, frame: pd.DataFrame, room: Room) -> tuple[Account, Content]:
    if manifest.series:
        return read_long_form(manifest, schema, frame, room)
    return read_signals(manifest, schema, frame)


def _refuse_empty(manifest: Manifest, frame: pd.DataFrame, empty: Flags) -> None:
    """A record without any measurement is one with a missing value."""
    if manifest.incomplete_rows == "refuse":
        column = manifest.series.record if manifest.series else manifest.column(SIGNALS)
        refuse(manifest, frame, column, empty, "the record has no measurement that can be used", quoted=False)


def _complete(manifest: Manifest, task: Task, frame: pd.DataFrame) -> _Part:
    """Rows without a missing value and their labels, missing cells by schema name, and how many rows were left out."""
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
    return _Part(
        frame,
        None if frame.empty else read_labels(manifest, task, frame),
        None if frame.empty else read_groups(manifest, task, frame),
        {name: int(flags.sum()) for name, flags in absent.items()},
        int(incomplete.sum()),
    )


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


def _kept_columns(manifest: Manifest, task: Task) -> list[str]:
    """Columns of a row that are looked at once its labels were read."""
    series, images = manifest.series, manifest.images
    keys = [
        manifest.patient,
        *((series.record, series.start) if series else ()),
        *((images.slice_column,) if images else ()),
    ]
    return [*(manifest.column(name) for name in _row_columns(manifest, task)), *(key for key in keys if key)]


# patients


def _ids(frame: pd.DataFrame, manifest: Manifest) -> list[str]:
    """The patient of each row; nothing where no column says it."""
    if manifest.patient is None:
        return []
    refuse(manifest, frame, manifest.patient, missing(frame[manifest.patient], manifest), "the patient id is missing")
    return list(texts(frame[manifest.patient]))


def _patients_of(manifest: Manifest, task: Task, content: Content, labels: Targets, frame: pd.DataFrame) -> Patients:
    numbering = Numbering().add(_ids(frame, manifest))
    return _patients(manifest, task, content, labels, numbering, frame.index.to_numpy())


def _patients(
    manifest: Manifest, task: Task, content: Content, labels: Targets, numbering: Numbering, lines: NDArray[np.int64]
) -> Patients:
    """Whose each row is: by the patient column, or where there is none by the row's content, numbered where equal."""
    if manifest.patient is None:
        return Patients(_Contents(content, labels, task), np.arange(len(content)))
    patients = numbering.patients()
    if manifest.one_row_per_patient:
        again = np.ones(len(patients.rows), dtype=np.bool_)
        again[np.unique(patients.rows, return_index=True)[1]] = False
        if again.any():
            first = int(np.argmax(again))
            place = cell(manifest, lines[first], manifest.patient, list(patients.names)[patients.rows[first]])
            what = "the patient has an earlier row, but the manifest declares one_row_per_patient"
            raise CellsError(place, what, int(again.sum()))
    return patients


class _Contents:
    """Ids of rows without a patient column, made anew each time: they may be longer than the rows."""

    def __init__(self, content: Content, labels: Targets, task: Task) -> None:
        self._content, self._labels, self._task = content, labels, task
        self._repeats = repeats(self._rows())

    def __iter__(self) -> Iterator[str]:
        return (repr((*row, repeat)) for row, repeat in zip(self._rows(), self._repeats.tolist(), strict=True))

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        return content_of(self._content, self._labels, self._task)


def content_of(content: Content, labels: Targets | None, task: Task) -> Iterator[tuple[Any, ...]]:
    """What stands for each row's content, and its label: cells themselves; of an image, a series or a text a digest."""
    rows: Iterator[tuple[Any, ...]]
    if content.dtype.names:
        rows = (row for some in walk(content) for row in some.tolist())
    else:
        rows = (
            (digest,) for digest in digests(content, _tokens if isinstance(task.input, TokensInput) else np.asarray)
        )
    return rows if labels is None else ((*row, mark) for row, mark in zip(rows, marks(labels, task), strict=True))


def repeats(rows: Iterable[tuple[Any, ...]]) -> NDArray[np.int64]:
    """How many earlier rows equal each row."""
    seen: dict[bytes, int] = {}

    def number(row: tuple[Any, ...]) -> int:
        key = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
        seen[key] = seen.get(key, -1) + 1
        return seen[key]

    return np.fromiter(map(number, rows), dtype=np.int64)


def _stretch(fraction: float, fold: Fold | None) -> tuple[float, float]:
    """Where in [0, 1) the validation patients' hashes lie, times 2**64; folds lie side by side and leave nobody out."""
    if fold is None:
        return 0, fraction * 2**64
    return (fold.index - 1) * 2**64 // fold.count, fold.index * 2**64 // fold.count


def _held_out(patients: Patients, stretch: tuple[float, float], key: bytes) -> Flags:
    """Which rows belong to validation patients: the keyed hash of the id, a number below 2**64, lies in the stretch."""
    low, high = stretch
    hashes = (int.from_bytes(hmac.digest(key, name.encode(), "sha256")[:8]) for name in patients.names)
    return np.array([low <= number < high for number in hashes], dtype=np.bool_)[patients.rows]


def _records(table: Table, task: Task, part: Flags, room: Room) -> Records:
    """One part of the table as tensors, its patients numbered 0, 1, 2, ... as they come."""
    patients, distinct = pd.factorize(table.patients.rows[part])
    return Records(
        inputs=_inputs(table, task, part, room),
        targets=_targets(table, task, part, room),
        patients=patients.astype(np.int64),
        patient_count=len(distinct),
        beside=None if table.beside is None else table.beside[part],
    )


def _inputs(table: Table, task: Task, part: Flags, room: Room) -> Tensor | OnDemand:
    """Inputs of some rows, as the task's ``input`` says: float32, or int64 for tokens; images are scaled per batch."""
    rows = partial(OnDemand, table.content, np.flatnonzero(part))
    match task.input:
        case ImageInput():
            return rows(scaled)
        case SeriesInput():
            return _fitting(rows(np.asarray), table.content, room)
        case TokensInput():
            return _fitting(rows(_tokens), table.content, room)
        case TableInput() as schema:
            return _fitting(rows(partial(_columns, schema)), table.content, room)


def _targets(table: Table, task: Task, part: Flags, room: Room) -> Tensor | OnDemand:
    """Targets of some rows: int64 of one choice among three classes or more, else float32."""
    if isinstance(table.labels, Stored):
        (pixels,) = task.target_shape
        masks = OnDemand(table.labels, np.flatnonzero(part), lambda bits: unpacked(bits, pixels).astype(np.float32))
        return _fitting(masks, table.labels, room)
    targets = torch.from_numpy(table.labels[part])
    return targets if task.choice is not None and task.outputs > 1 else targets.to(torch.float32)


def _fitting(rows: OnDemand, content: Content, room: Room) -> Tensor | OnDemand:
    """In memory if there is room for all of the table twice: as it was kept, and as the network takes it."""
    if isinstance(content, Stored) and (content.width + rows.width) * len(content) <= room.memory:
        return rows.in_memory()
    return rows


def _row_type(schema: TableInput | TokensInput) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """How one row is kept: shape and type."""
    if isinstance(schema, TokensInput):
        return (schema.length,), np.min_scalar_type(schema.vocabulary - 1)
    kinds = [
        np.dtype("f8") if isinstance(c, Numeric) else np.min_scalar_type(len(c.categories)) for c in schema.columns
    ]
    return (), np.dtype([(column.name, kind) for column, kind in zip(schema.columns, kinds, strict=True)])


def _encoded(frame: pd.DataFrame, manifest: Manifest, schema: TableInput | TokensInput) -> NDArray[Any]:
    """Content of some rows: token ids, or a number and a category's index for each column."""
    if isinstance(schema, TokensInput):
        return read_texts(manifest, schema, frame)
    rows = np.empty(len(frame), dtype=_row_type(schema)[1])
    for c in schema.columns:
        rows[c.name] = numbers(frame, manifest, c) if isinstance(c, Numeric) else categories(frame, manifest, c)
    return rows


def _tokens(ids: NDArray[Any]) -> NDArray[np.int64]:
    return ids.astype(np.int64)


def _columns(schema: TableInput, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of a table as a network takes them."""
    blocks = []
    for column in schema.columns:
        cells = rows[column.name]
        if isinstance(column, Numeric):
            blocks.append(column.scaled(cells)[:, None])
        else:
            blocks.append(cells[:, None] == np.arange(1, len(column.categories)))
    return np.concatenate(blocks, axis=1, dtype=np.float32)


# the parts


def class_counts(records: Records, task: Task) -> dict[str, int]:
    """How many records of each class of each choice there are: true counts, for the hospital's own eyes."""
    return _class_counts(records.targets.numpy(), task) if isinstance(records.targets, Tensor) else {}


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


def _check_classes(manifest: Manifest, task: Task, labels: Targets, rows: Flags, part: str) -> None:
    """Refuse a part without a class, unless the manifest declares that this hospital never sees it."""
    counts = {} if isinstance(labels, Stored) else _class_counts(labels[rows], task)
    absent = [name for name, count in counts.items() if not count and name not in manifest.absent_classes]
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


def read_inputs(manifest: Manifest, task: Task, *, at_once: int, room: Room = ROOM) -> Iterator[Inputs]:
    """Read, check and encode a hospital's records without their labels, in the order of the file.

    All is checked that ``read_table`` checks, but for labels and the classes that a part must have: the label's column
    is not looked at. No more than ``at_once`` rows are read and encoded at once; of series in long form all are, and
    lie where there is room.

    Raises:
        RecordsError: As for ``read_table``, once the whole file was read: what a part gave before may be of a file that
            is refused in the end.
    """
    schema = check_fits(manifest, task, labelled=False)
    if isinstance(schema, ImageInput) and manifest.file.suffix == ".npz":
        pixels, ids = read_unlabelled(manifest, task, schema, room)
        for first in range(0, len(pixels), at_once):
            images = torch.from_numpy(scaled(pixels[first : first + at_once]))
            rows = list(range(first, first + len(images)))
            yield Inputs(rows, ids[first : first + at_once], np.ones(len(images), dtype=np.bool_), images)
        return
    if isinstance(schema, SeriesInput) and manifest.series:
        yield from _inputs_of_long_form(manifest, task, schema, at_once, room)
        return

    complete = []

    def part_of(frame: pd.DataFrame) -> Inputs:
        kept = _rows_without_labels(manifest, task, frame)
        complete.append(kept.any())
        return _given(manifest, task, frame, kept, *_encoded_rows(frame[kept], manifest, task))

    yield from checked(parts(manifest, at_once), part_of)
    if not any(complete):
        raise RecordsError(f"{manifest.file} has no complete row", hint=CHECK)


def _inputs_of_long_form(
    manifest: Manifest, task: Task, schema: SeriesInput, at_once: int, room: Room
) -> Iterator[Inputs]:
    """``read_inputs`` of series in long form."""

    def part_of(part: pd.DataFrame) -> tuple[pd.DataFrame, Flags]:
        kept = _rows_without_labels(manifest, task, part)
        return part.loc[:, part.columns.isin(_kept_columns(manifest, task))], kept

    frames, flags = zip(*checked(parts(manifest), part_of), strict=True)
    frame, kept = pd.concat(frames), np.concatenate(flags)
    account, series = read_long_form(manifest, schema, frame, room)
    for first in range(0, len(frame), at_once):
        part = slice(first, first + at_once)
        yield _given(manifest, task, frame[part], kept[part], series[part], account.empty[part])


def _given(
    manifest: Manifest, task: Task, frame: pd.DataFrame, kept: Flags, encoded: NDArray[Any], empty: Flags
) -> Inputs:
    """Some rows, of which those that are kept were encoded, and of these some are empty."""
    rows, here = frame[kept], kept.copy()
    _refuse_empty(manifest, rows, empty)
    here[here] = ~empty
    said = _said(rows, manifest) if isinstance(task.input, TokensInput) else []
    patients = _patients_or_none(frame, kept, manifest)
    return Inputs([int(row) for row in frame.index], patients, here, torch.from_numpy(encoded[~empty]), said)


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


def _rows_without_labels(manifest: Manifest, task: Task, frame: pd.DataFrame) -> Flags:
    """Which rows have all their values."""
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
    return kept


def _patients_or_none(frame: pd.DataFrame, kept: Flags, manifest: Manifest) -> list[str | None]:
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
            return _columns(schema, _encoded(frame, manifest, schema)), nothing
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
