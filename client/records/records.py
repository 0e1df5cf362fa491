"""Validated records: inputs in memory or read on demand, targets, and which patient each row belongs to."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.errors import RecordsError


class Rows(Protocol):
    """Encoded inputs, or targets, that are made when they are asked for: not all of them need to fit in memory."""

    @property
    def shape(self) -> torch.Size:
        """Of all inputs together, ``(n, ...)``."""
        ...

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """Inputs of some records; NaN for one whose content cannot be had, where an error must not be."""
        ...


@dataclass(frozen=True, eq=False)
class Records:
    """Records of one hospital, or of one part (training, validation) of them.

    Attributes:
        inputs: Encoded inputs, shape ``(n, ...)``; float32, or int64 token ids. In memory, or made on demand.
        targets: Shape ``(n, *task.target_shape)``: of a task with one choice int64 class indices, float32 where it is
            between two; else float32 numbers, NaN where one is not known. Masks may be made on demand.
        patients: For each record the index of its patient, shape ``(n,)``, each of ``0 .. patient_count - 1`` at least
            once. An index says nothing about the patient's id, which never leaves the reader of the file.
        patient_count: Number of patients: a true count, which stays at the hospital.
        beside: Values of ``Task.groups``, for evaluations only, shape ``(n, len(task.groups))``: numbers, or indices of
            categories; NaN where one is not known. None where the task has no such columns.

    Raises:
        RecordsError: The lengths disagree, or the patient indices are not as above.
    """

    inputs: Tensor | Rows
    targets: Tensor | Rows
    patients: NDArray[np.int64]
    patient_count: int
    beside: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.inputs), len(self.targets), self.patients.size, len(self.groups)}
        if self.patients.ndim != 1 or len(lengths) > 1:
            raise RecordsError("inputs, targets and patients have different lengths", hint="Read the records again.")
        if not np.array_equal(np.unique(self.patients), np.arange(self.patient_count)):
            raise RecordsError("patient indices are not 0, 1, 2, ... without gaps", hint="Read the records again.")

    @property
    def groups(self) -> NDArray[np.float64]:
        """``beside``, with no columns where there are none."""
        return np.empty((len(self.patients), 0)) if self.beside is None else self.beside

    def __len__(self) -> int:
        """Number of records."""
        return len(self.patients)

    def __repr__(self) -> str:
        """Counts only: a log line must not hold a patient's values."""
        return f"Records({len(self)} records, {self.patient_count} patients)"

    def select(self, patients: NDArray[np.int64]) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        """All records of some patients, grouped by patient.

        Args:
            patients: Distinct patient indices, in any order; may be empty.

        Returns:
            Inputs, targets, and for each of these records the *position* of its patient in ``patients``, ascending.
        """
        rows, owners = self.rows_of(patients)
        chosen = torch.from_numpy(rows)
        return self.inputs[chosen], self.targets[chosen], owners

    def parts(self, patients: NDArray[np.int64], most: int) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """The same, at most so many records at once: what must not be in memory together is not."""
        for rows, owners in self.row_parts(patients, most):
            chosen = torch.from_numpy(rows)
            yield self.inputs[chosen], self.targets[chosen], owners

    def row_parts(
        self, patients: NDArray[np.int64], most: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """``rows_of``, so many at once."""
        rows, owners = self.rows_of(patients)
        for first in range(0, len(rows), most):
            yield rows[first : first + most], owners[first : first + most]

    def rows_of(self, patients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers of all records of some patients, and the position of each row's patient in ``patients``."""
        counts = self.record_counts[patients]
        owners = np.repeat(np.arange(len(patients)), counts)
        # The k-th chosen row lies as far into its patient's rows as k lies behind that patient's first chosen row.
        shift = self._first_row[patients] - (np.cumsum(counts) - counts)
        return self._by_patient[np.arange(len(owners)) + shift[owners]], owners

    @cached_property
    def record_counts(self) -> NDArray[np.int64]:
        """Number of records of each patient, shape ``(patient_count,)``."""
        return np.bincount(self.patients, minlength=self.patient_count)

    @cached_property
    def _by_patient(self) -> NDArray[np.int64]:
        """Row numbers, all of patient 0 first, then all of patient 1, ..."""
        return np.argsort(self.patients, kind="stable")

    @cached_property
    def _first_row(self) -> NDArray[np.int64]:
        """Where each patient's rows begin in ``_by_patient``."""
        return np.cumsum(self.record_counts) - self.record_counts
