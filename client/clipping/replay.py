"""A pass over a batch, recorded once as a CUDA graph and replayed: one launch where there were hundreds.

Small networks keep a GPU waiting for the processor, which launches each kernel in turn. A graph launches all of them
at once. It is recorded for a fixed number of patients; a batch of fewer is filled up with rows that weigh nothing.
"""

import logging
from collections.abc import Callable, Hashable
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("konsil.hospital")

_ROUND_UP = 16  # patients; so many graphs are recorded as a Poisson draw has sizes, divided by this
_TOLERANCE = 1e-4  # relative, between a replay and the same pass launched kernel by kernel
_ONE_AT_A_TIME = Lock()  # of the recordings of this process


class Pass(NamedTuple):
    """What a pass gives.

    Attributes:
        total: The clipped sum, flat, float64.
        clipped: Patients whose gradient was longer than C, int64.
        doubtful: Whether some number is too large or too small to be measured by the quick way: then the sum is void.
    """

    total: Tensor
    clipped: Tensor
    doubtful: Tensor


Compute = Callable[[Tensor, Tensor, Tensor], Pass]


class Replay:
    """A recorded pass.

    Args:
        compute: Gives a pass over inputs and targets, of whose patients the first so many count (a tensor without
            dimensions). What it launches depends on shapes alone, and nothing in it waits for the GPU.
        inputs: Of a batch, on the GPU.
        targets: Likewise.
        rows: How many records the pass is for, at least those of the batch.
        pool: Memory that is shared by graphs of which no two run at once.

    Raises:
        RuntimeError: The pass cannot be recorded.
    """

    def __init__(self, compute: Compute, inputs: Tensor, targets: Tensor, rows: int, pool: object) -> None:
        self._inputs, self._targets = (batch.new_zeros(rows, *batch.shape[1:]) for batch in (inputs, targets))
        self._patients = torch.zeros((), dtype=torch.int64, device=inputs.device)
        self._graph = torch.cuda.CUDAGraph()
        with (
            _ONE_AT_A_TIME,
            torch.cuda.device(inputs.device),
            # Another thread may be at work on another GPU.
            torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),  # type: ignore[arg-type]
        ):
            self._found = compute(self._inputs, self._targets, self._patients)

    def __call__(self, inputs: Tensor, targets: Tensor, patients: int) -> Pass:
        """The pass over a batch; what it gives is there until the next one."""
        for buffer, batch in ((self._inputs, inputs), (self._targets, targets)):
            buffer[: len(batch)].copy_(batch)
            buffer[len(batch) :].zero_()
        self._patients.fill_(patients)
        self._graph.replay()
        return self._found


class Replays:
    """The recorded passes of one network.

    Guarantees:
        * The first replay of each is compared with the same pass launched kernel by kernel. A pass that gives another
          sum, or cannot be recorded, is never replayed.
        * A graph reads parameters where they lie. When one moves, all graphs are dropped.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Replay | None] = {}
        self._seen: set[Hashable] = set()
        self._places: Hashable = None
        self._pool: object = None

    def wants(self, key: Hashable, places: Hashable) -> bool:
        """Whether a pass should be recorded: at the second batch of its size, for one is not worth it.

        Args:
            key: What the recorded kernels depend on.
            places: Addresses of all parameters and buffers.
        """
        if places != self._places:
            self._known.clear()
            self._seen.clear()
            self._places, self._pool = places, torch.cuda.graph_pool_handle()
        if key in self._seen:
            return key not in self._known
        self._seen.add(key)
        return False

    def find(self, key: Hashable) -> Replay | None:
        """The recorded pass, if there is one that is right."""
        return self._known.get(key)

    def record(
        self,
        key: Hashable,
        compute: Compute,
        inputs: Tensor,
        targets: Tensor,
        *,
        rows: int,
        patients: int,
        expected: Tensor,
    ) -> None:
        """Record a pass, and hold its first replay against the sum of the same batch."""
        self._known[key] = None
        try:
            replay = Replay(compute, inputs, targets, rows, self._pool)
        except RuntimeError as error:
            log.info("this network's passes are launched kernel by kernel: %s", str(error).partition("\n")[0])
            return
        found = replay(inputs, targets, patients)
        if found.doubtful.item() or (found.total - expected).norm() <= _TOLERANCE * expected.norm():
            self._known[key] = replay  # what is doubtful is not used, so there is nothing to compare
        else:
            log.warning("a recorded pass gives another sum: this network's passes are launched kernel by kernel")


def rounded_up(patients: int) -> int:
    """How many patients a pass is recorded for."""
    return -(-patients // _ROUND_UP) * _ROUND_UP
