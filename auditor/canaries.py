"""Canaries for a black-box audit, both halves: made-up records of which a fair coin says whether they go in.

They are put among a hospital's records in a rehearsal, never in a study that treats patients' records as theirs. Who
knows the coins can then hold a model that came out against them.
"""

import csv
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import ConfigError
from shared_models.tasks import Categorical, Numeric, TableInput, Task

MEMBER = "member"  # the column that says whether a record was among the training records
LARGEST_FILE = 2**28


@dataclass(frozen=True)
class Candidates:
    """Records of which it is known whether a model was trained on them; each of another patient.

    Attributes:
        inputs: As the network takes them, shape ``(n, ...)``.
        targets: Class indices, shape ``(n,)``.
        members: Shape ``(n,)``.
    """

    inputs: NDArray[np.float32]
    targets: NDArray[np.int64]
    members: NDArray[np.bool_]


def write_canaries(task: Task, folder: Path, *, count: int) -> int:
    """Make canaries up, flip a coin for each, and write who is in.

    Columns are drawn evenly over their public ranges and categories, and labels by coin, so that there is nothing to
    learn of one but itself.

    Args:
        task: A table's.
        folder: Gets ``canaries.csv``, all with the coins, for the auditor alone; and ``insert.csv``, those that are in,
            as rows to add to a hospital's file.
        count: How many coins.

    Returns:
        How many are in.

    Raises:
        ConfigError: The task is no table, or a file is there already or cannot be written.
    """
    table = _table_of(task)
    rng = np.random.default_rng(secrets.randbits(128))
    members = rng.random(count) < 0.5
    header = [column.name for column in table.columns] + [task.label]
    rows = [[*(_made_up(column, rng) for column in table.columns), str(rng.choice(task.classes))] for _ in members]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "canaries.csv").open("x", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*header, MEMBER])
            writer.writerows([*row, int(member)] for row, member in zip(rows, members, strict=True))
        with (folder / "insert.csv").open("x", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(row for row, member in zip(rows, members, strict=True) if member)
    except OSError as error:
        raise ConfigError(f"canaries cannot be written: {error}", hint="Choose another folder.") from None
    return int(members.sum())


def _made_up(column: Numeric | Categorical, rng: np.random.Generator) -> str:
    if isinstance(column, Categorical):
        return str(rng.choice(column.categories))
    return f"{column.low + (0.001 + 0.998 * rng.random()) * (column.high - column.low):.5g}"


def read_candidates(path: Path, task: Task) -> Candidates:
    """Read records with known membership: a CSV file in the task's own names and units, or safetensors.

    A CSV file has the task's columns, its label and ``member`` (0 or 1). A safetensors file has ``inputs``, as the
    network takes them, ``targets`` and ``member``.

    Raises:
        ConfigError: It is missing, too large or damaged, a cell is outside its public range, or members or others are
            missing.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path} is larger than {LARGEST_FILE} bytes", hint="Take fewer records.")
        found = _from_tensors(path) if path.suffix == ".safetensors" else _from_table(path, task)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Give a CSV or safetensors file.") from None
    if not found.members.any() or found.members.all():
        raise ConfigError(f"{path} holds only members, or none", hint="An attack needs both to tell them apart.")
    if found.targets.min() < 0 or found.targets.max() >= len(task.classes) or not np.isfinite(found.inputs).all():
        raise ConfigError(f"{path} does not fit task {task.name}", hint="Targets are class indices; inputs are finite.")
    return found


def _from_table(path: Path, task: Task) -> Candidates:
    table = _table_of(task)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {*(column.name for column in table.columns), task.label, MEMBER} - set(rows[0] if rows else ())
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}", hint="Name columns as the task does.")
    encoded = [_encode(column, [row[column.name] for row in rows], path) for column in table.columns]
    members = [row[MEMBER] for row in rows]
    if unknown := {member for member in members if member not in {"0", "1"}}:
        raise ConfigError(f"{path}: {MEMBER} is {unknown.pop()!r}", hint="1 for records trained on, 0 for others.")
    targets = _indices([row[task.label] for row in rows], task.classes, task.label, path)
    return Candidates(np.concatenate(encoded, axis=1).astype(np.float32), targets, np.array(members) == "1")


def _encode(column: Numeric | Categorical, cells: list[str], path: Path) -> NDArray[np.float64]:
    """One column as hospitals encode it, shape ``(n, width)``."""
    if isinstance(column, Categorical):
        codes = _indices(cells, column.categories, column.name, path)
        return np.asarray(codes[:, None] == np.arange(1, len(column.categories)), dtype=np.float64)
    try:
        values = np.array(cells, dtype=np.float64)
    except (ValueError, TypeError):
        values = np.array([np.nan])
    if not ((values >= column.low) & (values <= column.high)).all():
        raise ConfigError(
            f"{path}: {column.name} is not from {column.low:g} to {column.high:g} {column.unit} in every row",
            hint="Records outside their public ranges are not trained on either.",
        )
    return column.scaled(values)[:, None]


def _indices(cells: list[str], known: tuple[str, ...], name: str, path: Path) -> NDArray[np.int64]:
    if unknown := sorted(set(map(str, cells)) - set(known)):
        raise ConfigError(f"{path}: {name} is {unknown[0]!r}", hint=f"One of: {', '.join(known)}.")
    return np.array([known.index(cell) for cell in cells], dtype=np.int64)


def _from_tensors(path: Path) -> Candidates:
    from safetensors import SafetensorError  # noqa: PLC0415 - only where torch is, too
    from safetensors.numpy import load_file  # noqa: PLC0415

    try:
        arrays = load_file(path)
        inputs, targets, members = arrays["inputs"], arrays["targets"], arrays["member"]
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"{path} is no file of candidates: {error}", hint="inputs, targets, member.") from None
    if not len(inputs) == len(targets) == len(members) > 0:
        raise ConfigError(f"{path}: inputs, targets and member differ in length", hint="One of each per record.")
    return Candidates(inputs.astype(np.float32), targets.astype(np.int64), members.astype(np.bool_))


def _table_of(task: Task) -> TableInput:
    if not isinstance(task.input, TableInput):
        raise ConfigError(f"task {task.name} is no table", hint="Give a safetensors file: inputs, targets, member.")
    return task.input
