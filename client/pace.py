"""A reply that was paid for leaves on the plan's grid; a failure has one code. Neither tells anything of a record."""

import logging
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from shared_models.errors import ComputationError, LedgerError

log = logging.getLogger("konsil.hospital")


class OnTheGrid:
    """What is computed inside ends at a multiple of the grid after the request came, whether it succeeds or fails.

    A context manager around everything that a charge pays for: how many patients were drawn, and how many records they
    have, moves the time of the reply by whole cells of the grid or not at all.

    Guarantees:
        * Control leaves at the first multiple of ``grid_s`` after the computation's end, counted from ``received``; a
          process that is told to stop does not wait.
        * Every failure but the ledger's leaves as a ``ComputationError``: its code is the same whatever went wrong, and
          its text says nothing. A ledger that cannot be written depends on no record.

    Args:
        received: When the request came, by ``clock``.
        grid_s: Width of a cell, in seconds; the plan's ``reply_grid_s``.
        clock: Monotonic seconds.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        received: float,
        grid_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._received, self._grid_s, self._clock, self._sleep = received, grid_s, clock, sleep

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            passed = self._clock() - self._received
            self._sleep(self._grid_s - passed % self._grid_s)
        if kind is not None and issubclass(kind, Exception) and not issubclass(kind, LedgerError):
            # Without the exception's text, which could hold a patient's values.
            log.error("failed after the charge: %s\n%s", kind.__name__, "".join(traceback.format_tb(trace)))
            raise ComputationError(
                "what was charged could not be computed", hint="See the log; the charge stays, as it must."
            ) from None
