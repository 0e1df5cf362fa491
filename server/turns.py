"""Whose turn it is at which hospital: one study trains there at a time; others queue in order of submission."""

import threading
from collections.abc import Collection

from server.halt import Halt

LOOK_EVERY_S = 0.2


class Turns:
    """The queue of studies at all hospitals.

    Guarantees:
        * Two studies that have a hospital in common never have their turn at the same time.
        * Studies that share no hospital do not wait for each other.
        * No study is overtaken at a hospital by one that was submitted later.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._having: dict[str, frozenset[str]] = {}
        self._waiting: dict[str, tuple[int, frozenset[str]]] = {}

    def take(self, study: str, number: int, hospitals: Collection[str], halt: Halt) -> None:
        """Wait until it is this study's turn at all of its hospitals.

        Args:
            study: Its name.
            number: Its place in the order of submission.
            hospitals: Where it may train.
            halt: Ends the waiting.

        Raises:
            HaltedError: It was told to end; then it has no turn and no place.
        """
        with self._changed:
            self._waiting[study] = (number, frozenset(hospitals))
            try:
                while self._before(study):
                    self._changed.wait(LOOK_EVERY_S)
                    halt.check()
                self._having[study] = frozenset(hospitals)
            finally:
                del self._waiting[study]
                self._changed.notify_all()

    def give_back(self, study: str) -> None:
        """The study does not train now; it may take a turn again."""
        with self._changed:
            self._having.pop(study, None)
            self._changed.notify_all()

    def position(self, study: str) -> int:
        """How many studies are before this one at its hospitals; 0 for one that has its turn, or does not wait."""
        with self._changed:
            return len(self._before(study)) if study in self._waiting else 0

    def _before(self, study: str) -> set[str]:
        number, hospitals = self._waiting[study]
        having = {other for other, theirs in self._having.items() if theirs & hospitals}
        earlier = {other for other, (place, theirs) in self._waiting.items() if place < number and theirs & hospitals}
        return having | earlier
