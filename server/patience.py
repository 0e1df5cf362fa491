"""Hospitals that said "not now", or that keep failing: they are asked again, after pauses that grow."""

import time
from collections.abc import Collection

from shared_models.errors import DailyRoundsError, ForgedApprovalError, OutsideHoursError, PendingError

NOT_YET = frozenset({PendingError.code, ForgedApprovalError.code})  # to a proposal: the steward has not said yes
NOT_NOW = frozenset({OutsideHoursError.code, DailyRoundsError.code})  # to a round: at another hour
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
ASIDE = (10.0, 600.0)  # a hospital whose answers have failed again and again


class Patience:
    """Who is waited for, and until when.

    Args:
        pauses: Length of a hospital's first pause, and the length that none passes, in seconds.
    """

    def __init__(self, pauses: tuple[float, float] | None = None) -> None:
        self._shortest_s, self._longest_s = pauses or (SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
        self._pauses: dict[str, tuple[float, float]] = {}  # name -> (length of the pause, when it is over)

    def wait_for(self, hospital: str) -> bool:
        """Ask this hospital again after a pause, twice as long as its last. Returns whether it is its first."""
        first = hospital not in self._pauses
        length = self._shortest_s if first else min(2 * self._pauses[hospital][0], self._longest_s)
        self._pauses[hospital] = (length, time.monotonic() + length)
        return first

    def forget(self, hospital: str) -> None:
        """It answered."""
        self._pauses.pop(hospital, None)

    def due(self, hospitals: Collection[str]) -> set[str]:
        """Those of these hospitals that may be asked now."""
        now = time.monotonic()
        return {name for name in hospitals if now >= self._pauses.get(name, (0.0, now))[1]}

    def __contains__(self, hospital: str) -> bool:
        """Whether it is waited for."""
        return hospital in self._pauses
