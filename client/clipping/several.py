"""Gradients on several devices of one hospital: each measures, clips and sums for a part of the patients drawn."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.clipping.gradients import Gradients
from client.records.records import Records, Rows

_COPIES: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


class SeveralDevices:
    """Engines on several devices that act as one; see ``Gradients`` for what the methods do.

    Guarantees:
        * Every patient drawn is measured and clipped on one device, with all records. So the sum moves by at most C
          with any one of them, as on one device; sums of devices are added in float64.
        * All devices take the same steps. The first one's network is the caller's.

    Args:
        model: Network.
        records: Training records; they are read by one device at a time.
        devices: At least one; the same device may stand there more than once.
        engine: Makes the engine of one device, for a network and records.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Records,
        devices: Sequence[torch.device],
        engine: Callable[[nn.Module, Records, torch.device], Gradients],
    ) -> None:
        self._records = records
        shared = replace(records, inputs=_shared(records.inputs), targets=_shared(records.targets))
        self._engines = [
            engine(each, shared, device) for each, device in zip(_copies(model, devices), devices, strict=True)
        ]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine)
            self._threads = stack.enter_context(ThreadPoolExecutor(len(self._engines)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def clipped_sum(self, patients: NDArray[np.int64], *, clip: float) -> Tensor:
        """See ``Gradients``; on the first device."""
        # In order of their records every so-manieth patient: parts of about the same size.
        order = np.argsort(self._records.record_counts[patients], kind="stable")
        parts = [patients[order[first :: len(self._engines)]] for first in range(len(self._engines))]
        first, *others = self._threads.map(
            lambda engine, part: engine.clipped_sum(part, clip=clip), self._engines, parts
        )
        for other in others:
            first += other.to(first.device)
        return first

    def descend(self, gradient: Tensor, *, learning_rate: float) -> None:
        """See ``Gradients``; on every device."""
        for engine in self._engines:
            engine.descend(gradient.to(engine.device), learning_rate=learning_rate)

    def position(self) -> list[Tensor]:
        """See ``Gradients``."""
        return self._engines[0].position()

    def return_towards(self, start: list[Tensor], *, share: float) -> None:
        """See ``Gradients``; on every device."""
        for engine in self._engines:
            engine.return_towards([origin.to(engine.device) for origin in start], share=share)

    def counts(self) -> tuple[int, int]:
        """See ``Gradients``; of all devices together."""
        clipped, not_finite = zip(*(engine.counts() for engine in self._engines), strict=True)
        return sum(clipped), sum(not_finite)


def _shared(rows: Tensor | Rows) -> Tensor | Rows:
    return rows if isinstance(rows, Tensor) else _OneAtATime(rows)


class _OneAtATime:
    """Rows that several threads ask for, and one at a time gets."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._lock = rows, Lock()

    @property
    def shape(self) -> torch.Size:
        return self._rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        with self._lock:
            return self._rows[rows]


def _copies(model: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """The network, and one like it for each further device: the same ones every round, for what is known of them."""
    copies = _COPIES.setdefault(model, [])
    for copied in copies:
        copied.load_state_dict(model.state_dict())
    copies += [copy.deepcopy(model) for _ in range(len(copies) + 1, len(devices))]
    return [model, *copies[: len(devices) - 1]]
