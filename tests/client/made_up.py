"""Tasks and records that no patient stands behind."""

import numpy as np
import torch
from numpy.typing import NDArray

from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.tasks import (
    Choice,
    Head,
    ImageInput,
    Numeric,
    Outline,
    Quantity,
    SeriesInput,
    Survival,
    TableInput,
    Task,
    TokensInput,
)

Input = TableInput | ImageInput | SeriesInput | TokensInput


def repeatable(number: int = 0) -> SecureRandom:
    """A generator for tests that gives the same stream for the same number."""
    return SecureRandom.for_tests(number.to_bytes(32, "big"))


def table(width: int) -> TableInput:
    """Rows of ``width`` numerics in [-1, 1]."""
    return TableInput(columns=tuple(numeric(f"column-{i}") for i in range(width)))


def numeric(name: str) -> Numeric:
    """A numeric in [-1, 1]."""
    return Numeric(name=name, unit="1", low=-1, high=1)


def task_of(inputs: Input, classes: int | tuple[Head, ...] = 2) -> Task:
    """A task over these inputs: one choice between so many classes, or these heads."""
    if isinstance(classes, int):
        classes = (Choice(name="label", classes=tuple(f"class {i}" for i in range(classes))),)
    return Task(
        name="made-up",
        description="Made up for a test.",
        input=inputs,
        heads=classes,
    )


SURVIVAL: tuple[Head, ...] = (Survival(name="death", time="time", event="event", unit="year", edges=(1, 2, 5)),)
# One of each kind, a choice with class weights among them.
HEADS: tuple[Head, ...] = (
    Choice(name="grade", classes=("low", "middle", "high"), weights=(1.0, 2.0, 0.5)),
    Choice(name="ill", classes=("no", "yes"), weights=(1.0, 6.0)),
    Quantity(measure=numeric("dose")),
    Quantity(measure=numeric("wait"), loss="absolute"),
    *SURVIVAL,
)
OUTLINE: tuple[Head, ...] = (Outline(name="mask"),)


def table_records(patients: list[int] | NDArray[np.int64], *, width: int = 5, seed: int = 0) -> Records:
    """Random rows for a binary task, one for each entry of ``patients``."""
    generator = torch.Generator().manual_seed(seed)
    owners = np.asarray(patients, dtype=np.int64)
    inputs = torch.rand(len(owners), width, generator=generator) * 2 - 1
    targets = (torch.rand(len(owners), generator=generator) < 0.5).float()
    return Records(inputs, targets, owners, int(owners.max()) + 1)


def chosen(records: Records, rows: NDArray[np.int64] | list[int]) -> Records:
    """These rows, each as often as it is named, with patients numbered again."""
    _, patients = np.unique(records.patients[rows], return_inverse=True)
    picked = torch.as_tensor(rows)
    return Records(records.inputs[picked], records.targets[picked], patients, int(patients.max()) + 1)
