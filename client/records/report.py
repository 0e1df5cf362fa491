"""What ``check-data`` prints: the records as a study would read them. True counts; nothing of it ever leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table as Grid
from rich.text import Text

from client import keys
from client.records.manifest import IMAGES, TEXT, read_manifest
from client.records.on_disk import OnDisk, walk
from client.records.opt_out import read_opt_outs
from client.records.patient_ids import plain
from client.records.population import opted_out, room_of
from client.records.records import Records
from client.records.scratch import ROOM, Room
from client.records.tabular import Table, checked_table, class_counts, content_of, repeats, split_table
from client.settings import Settings
from shared_models.plan import StudyPlan
from shared_models.tasks import (
    Categorical,
    ImageInput,
    Numeric,
    SeriesInput,
    TableInput,
    Task,
    TokensInput,
    find_task,
    task_of,
)
from shared_models.tokens import PADDING


@dataclass(frozen=True)
class ColumnSummary:
    """One column as it was read.

    Attributes:
        missing: Cells without a value; of a series, steps.
        found: The range found, or how often each category occurs.
        public: The task's public range, with its unit; empty for categories.
    """

    name: str
    missing: int
    found: str
    public: str


@dataclass(frozen=True)
class Summary:
    """A table as it was read.

    Attributes:
        left_out: Rows with a missing value, where the manifest leaves such rows out.
        repeated_rows: Rows equal to an earlier one in every column of the schema. Where no patient column is named, a
            hint that such a row might not be a patient of its own.
        parts: Training and validation part, less opt-outs: records, patients and records of each class.
        set_aside: Measurements of series that were left aside, by reason.
        opt_outs: Ids on the opt-out list, and how many of them these records hold; None where there is no list.
    """

    file: Path
    left_out: int
    repeated_rows: int
    parts: dict[str, tuple[int, int, dict[str, int]]]
    set_aside: Mapping[str, int]
    opt_outs: tuple[int, int] | None
    columns: tuple[ColumnSummary, ...]


def summarise(
    folder: Path,
    *,
    split_key: bytes = bytes(32),
    opt_out: Path | None = None,
    plan: StudyPlan | None = None,
    room: Room = ROOM,
) -> Summary:
    """Read a records folder as a study would, and count.

    Args:
        folder: Folder with ``manifest.toml``.
        split_key: The hospital's own key shows its own split; any other key shows one of the same proportions.
        opt_out: The list of patients who say no, if there is one.
        plan: Of the study: with it, the columns of its subgroups are read too.
        room: Where what was encoded may lie.

    Raises:
        RecordsError, ConfigError: Whatever would keep a study from reading the records.
    """
    manifest = read_manifest(folder)
    task = find_task(manifest.task) if plan is None else task_of(plan)
    table = checked_table(manifest, task, room=room)
    listed = read_opt_outs(opt_out)
    out = opted_out(table, manifest, listed, listed=opt_out is not None)
    training, validation = split_table(table, manifest, task, split_key=split_key, opted_out=out, room=room)
    here = {plain(patient) for patient in table.patients.names} & listed if listed else set()
    columns = _columns(task, table)
    return Summary(
        file=manifest.file,
        left_out=table.left_out,
        repeated_rows=_repeated(task, table),
        parts={"training": _part(training, task), "validation": _part(validation, task)},
        set_aside=table.set_aside,
        opt_outs=(len(listed), len(here)) if opt_out else None,
        columns=(*columns, *_groups(task, table)),
    )


def summarise_own(settings: Settings, *, plan: StudyPlan | None = None) -> Summary:
    """``summarise`` of a hospital's own records, with its key, its opt-out list and the room that it gives."""
    key, room = keys.split_key(settings.state), room_of(settings)
    return summarise(settings.records, split_key=key, opt_out=settings.opt_out, plan=plan, room=room)


def describe(summary: Summary) -> Group:
    """A summary for a terminal."""
    lines = [f"{summary.file}: fit for training"]
    for name, (records, patients, classes) in summary.parts.items():
        counts = ", ".join(f"{n} {label}" for label, n in classes.items())
        lines.append(f"{name}: {records} records of {patients} patients" + (f" ({counts})" if counts else ""))
    lines.append(
        f"left out for a missing value: {summary.left_out} rows; equal to an earlier row: {summary.repeated_rows}"
    )
    if summary.set_aside:
        lines.append(f"measurements left aside: {', '.join(f'{n} {why}' for why, n in summary.set_aside.items())}")
    if summary.opt_outs:
        lines.append(f"opt-out list: {summary.opt_outs[0]} ids, {summary.opt_outs[1]} of them in these records")
    grid = Grid("column", "missing", "found", "public range")
    for column in summary.columns:
        grid.add_row(*(Text(cell) for cell in (column.name, str(column.missing), column.found, column.public)))
    return Group(*(Text(line) for line in lines), grid)


def _part(records: Records, task: Task) -> tuple[int, int, dict[str, int]]:
    return len(records), records.patient_count, class_counts(records, task)


def _columns(task: Task, table: Table) -> tuple[ColumnSummary, ...]:
    """Every column."""
    match task.input:
        case TableInput() as schema:
            return tuple(_column(column, table) for column in schema.columns)
        case ImageInput():
            least, greatest = _range(table)
            return (ColumnSummary(IMAGES, 0, f"{least:g} to {greatest:g}", "0 to 255"),)
        case SeriesInput() as schema:
            cells = len(table.labels) * schema.steps
            return tuple(_variable(variable, table, cells) for variable in schema.variables)
        case TokensInput() as schema:
            lengths = np.concatenate([(tokens != PADDING).sum(axis=1) for tokens in walk(table.content)])
            words = f"{lengths.min()} to {lengths.max()} words used, {int((lengths == schema.length).sum())} texts cut"
            return (ColumnSummary(TEXT, 0, words, f"{schema.length} words"),)


def _range(table: Table) -> tuple[float, float]:
    if isinstance(table.content, OnDisk):
        return table.content.whole.least, table.content.whole.greatest
    ends = [(rows.min(), rows.max()) for rows in walk(table.content)]
    return min(least for least, _ in ends), max(greatest for _, greatest in ends)


def _repeated(task: Task, table: Table) -> int:
    """How many rows equal an earlier one: those of a table in their labels too."""
    labels = table.labels if isinstance(task.input, TableInput) else None
    return int(np.count_nonzero(repeats(content_of(table.content, labels, task))))


def _variable(variable: Numeric, table: Table, cells: int) -> ColumnSummary:
    """A variable of a series: how many steps of all rows are without it."""
    count, least, greatest = table.seen[variable.name]
    found = f"{least:g} to {greatest:g}" if count else "never measured"
    return ColumnSummary(variable.name, cells - count, found, _public(variable))


def _public(column: Numeric) -> str:
    return f"{column.low:g} to {column.high:g} {column.unit}"


def _groups(task: Task, table: Table) -> list[ColumnSummary]:
    """What evaluations tell patients apart by; who has no value there is in no group."""
    beside = np.empty((len(table.labels), 0)) if table.beside is None else table.beside
    return [
        _summary(column, [values[~np.isnan(values)]], int(np.isnan(values).sum()))
        for column, values in zip(task.groups, beside.T, strict=True)
    ]


def _column(column: Numeric | Categorical, table: Table) -> ColumnSummary:
    return _summary(column, [rows[column.name] for rows in walk(table.content)], table.missing[column.name])


def _summary(column: Numeric | Categorical, parts: list[NDArray[Any]], missing: int) -> ColumnSummary:
    if not any(len(cells) for cells in parts):
        return ColumnSummary(column.name, missing, "nothing", "")
    if isinstance(column, Numeric):
        least, greatest = min(cells.min() for cells in parts), max(cells.max() for cells in parts)
        return ColumnSummary(column.name, missing, f"{least:g} to {greatest:g}", _public(column))
    counts = np.sum([np.bincount(cells.astype(np.int64), minlength=len(column.categories)) for cells in parts], axis=0)
    found = ", ".join(f"{n} {category}" for category, n in zip(column.categories, counts, strict=True))
    return ColumnSummary(column.name, missing, found, "")
