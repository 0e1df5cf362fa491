"""How a study that runs is told to pause or to stop: it looks where it can end without loss."""

import threading


class HaltedError(Exception):
    """The study was told to end here; it is no failure."""


class Halt:
    """One study's order to end.

    A pause takes effect between two rounds, or while the study waits; a stop also in the middle of a stage, where it
    ends the attempt.
    """

    def __init__(self) -> None:
        self._pause, self._stop = threading.Event(), threading.Event()

    def pause(self) -> None:
        """End after the round at hand."""
        self._pause.set()

    def stop(self) -> None:
        """End as soon as possible."""
        self._stop.set()
        self._pause.set()

    def go_on(self) -> None:
        """Take a pause back that has not taken effect."""
        if not self._stop.is_set():
            self._pause.clear()

    @property
    def stopped(self) -> bool:
        """Whether even the stage at hand should end."""
        return self._stop.is_set()

    def check(self) -> None:
        """Between rounds, and wherever the study waits.

        Raises:
            HaltedError: The study was told to end.
        """
        if self._pause.is_set():
            raise HaltedError

    def wait(self, seconds: float) -> None:
        """Wait, or until told to end.

        Raises:
            HaltedError: The study was told to end.
        """
        self._pause.wait(seconds)
        self.check()
