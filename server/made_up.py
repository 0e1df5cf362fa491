"""Hospitals that nobody has: made-up records that fit a task, laid out as hospitals have theirs, for simulations.

Labels follow a fixed rule with some error, so that there is something to learn; the figures mean nothing else.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from server.examples import ExampleHospital
from shared_models.errors import ConfigError
from shared_models.public_data import declared_size
from shared_models.tasks import Categorical, ImageInput, TableInput, Task

RULE_SEED = 2026  # of the rule that gives labels: the same at every hospital and in every simulation
WRONG_LABELS = 0.1


def write_made_up(task: Task, root: Path, *, hospitals: int, patients: int, seed: int) -> list[ExampleHospital]:
    """Write a records folder for each hospital below ``root``; every patient has one record.

    Args:
        task: Whose schema the records fit: a table's or images'.
        root: Folder to write into; made if missing.
        hospitals: How many.
        patients: At each of them; at least one.
        seed: Of the records.

    Raises:
        ConfigError: The task reads neither tables nor images.
    """
    write = _write_images if isinstance(task.input, ImageInput) else _write_table
    if not isinstance(task.input, TableInput | ImageInput):
        raise ConfigError(f"no records can be made up for task {task.name}", hint="Choose one with tables or images.")
    rng = np.random.default_rng(seed)
    digits = len(str(hospitals))
    found = []
    for number in range(1, hospitals + 1):
        name = f"hospital-{number:0{digits}}"
        folder = root / name
        folder.mkdir(parents=True)
        labels, manifest = write(folder, task, patients, rng)
        absent = [kind for label, kind in enumerate(task.classes) if label not in labels]
        groups = {"groups": {column.name: "" for column in task.groups}} if task.groups else {}
        fields = {"task": task.name, "one_row_per_patient": True, "validation_fraction": 0.0, **groups, **manifest}
        (folder / "manifest.toml").write_text(
            tomli_w.dumps(fields | ({"absent_classes": absent} if absent else {})), encoding="utf-8"
        )
        found.append(ExampleHospital(name=name, folder=folder, public_size=declared_size(patients)))
    return found


def _write_table(
    folder: Path, task: Task, patients: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Mapping[str, Any]]:
    """Columns drawn evenly over their public ranges and categories."""
    assert isinstance(task.input, TableInput)  # noqa: S101 - the caller has chosen by it
    position = rng.random((patients, len(task.input.columns)))
    rule = np.random.default_rng(RULE_SEED).normal(size=(len(task.input.columns), len(task.classes)))
    labels = _with_errors(((position - 0.5) @ rule).argmax(axis=1), len(task.classes), rng)
    cells = []
    for column, place in zip(task.input.columns, position.T, strict=True):
        if isinstance(column, Categorical):
            cells.append([column.categories[int(p * len(column.categories))] for p in place])
        else:
            # Five digits, away from the ends, so that no rounding leaves the public range.
            cells.append([f"{column.low + (0.001 + 0.998 * p) * (column.high - column.low):.5g}" for p in place])
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["patient", *(column.name for column in task.input.columns), task.label])
        names = [f"patient-{number}" for number in range(patients)]
        writer.writerows(zip(names, *cells, [task.classes[label] for label in labels], strict=True))
    return labels, {"file": "data.csv", "label": task.label, "patient": "patient"}


def _write_images(
    folder: Path, task: Task, patients: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Mapping[str, Any]]:
    """A blurred pattern for each class, under noise."""
    assert isinstance(task.input, ImageInput)  # noqa: S101 - the caller has chosen by it
    shape = (task.input.channels, -(-task.input.height // 4), -(-task.input.width // 4))
    coarse = np.random.default_rng(RULE_SEED).uniform(40, 215, size=(len(task.classes), *shape))
    patterns = coarse.repeat(4, axis=2).repeat(4, axis=3)[:, :, : task.input.height, : task.input.width]
    kinds = rng.integers(len(task.classes), size=patients)
    pixels = patterns[kinds] + rng.normal(scale=40, size=(patients, *patterns.shape[1:]))
    labels = _with_errors(kinds, len(task.classes), rng)
    np.savez(
        folder / "data.npz",
        images=pixels.clip(0, 255).astype(np.uint8),
        labels=np.array([task.classes[label] for label in labels]),
        patients=np.array([f"patient-{number}" for number in range(patients)]),
    )
    return labels, {"file": "data.npz", "label": "labels", "patient": "patients"}


def _with_errors(labels: NDArray[np.int64], classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    wrong = rng.random(len(labels)) < WRONG_LABELS
    return np.where(wrong, rng.integers(classes, size=len(labels)), labels).astype(np.int64)
