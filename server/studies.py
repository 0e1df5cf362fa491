"""All studies of a coordinator: taken up when it starts, run side by side where hospitals differ, told what to do.

The control service, the page and ``konsil-coordinator run`` see studies through this; each study runs in a thread.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import logs
from server.evidence import RECEIPTS, SUMS
from server.halt import Halt
from server.journal import read_events
from server.store import State, Store, StudyRow, Wish
from server.turns import Turns
from shared_models.errors import FederationError, StudyStateError
from shared_models.plan import StudyPlan, parse_plan

log = logging.getLogger("konsil.coordinator")

RETRY_EVERY_S = 30.0  # a study that something outside of it interrupted
LOOK_EVERY_S = 0.5

Conduct = Callable[[StudyRow, Turns, Halt], None]


@dataclass(frozen=True)
class StudyStatus:
    """A study as people see it.

    Attributes:
        row: As the database has it.
        position: Studies before it in the queue at its hospitals; 0 where it does not wait.
    """

    row: StudyRow
    position: int


@dataclass
class _Running:
    halt: Halt = field(default_factory=Halt)
    thread: threading.Thread | None = None


class Studies:
    """Runs studies and takes orders about them; safe to use from several threads. A context manager.

    Entering it takes up every study that a coordinator before this one left unfinished. Leaving it ends every study
    where that loses nothing but the attempt at hand; each goes on when the next coordinator starts.

    Args:
        store: The database.
        folder: Where the studies' folders are made.
        conduct: Runs one study from where it is to its end.
        check: Raises where a plan could never run here, before it is entered.
    """

    def __init__(
        self, store: Store, folder: Path, conduct: Conduct, *, check: Callable[[StudyPlan], None] = lambda _: None
    ) -> None:
        self._store, self._folder, self._conduct, self._check = store, folder, conduct, check
        self._turns = Turns()
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="studies", daemon=True)

    def __enter__(self) -> "Studies":
        for row in self._store.all():
            self._take_up(row.name)
        self._supervisor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with self._lock:
            running = list(self._running.values())
        for one in running:
            one.halt.stop()
        for one in running:
            if one.thread is not None:
                one.thread.join(timeout=10)
        self._supervisor.join(timeout=1)

    def finish_rounds(self, *, patience_s: float, hurry: threading.Event) -> None:
        """Begin nothing any more, and let every study end after the round at hand: what hospitals paid is not lost.

        Args:
            patience_s: After which an attempt that goes on is given up when this is left.
            hurry: Ends the waiting.
        """
        self._over.set()
        with self._lock:
            running = list(self._running.values())
        for one in running:
            one.halt.pause()
        until = time.monotonic() + patience_s
        for one in running:
            while one.thread is not None and one.thread.is_alive() and time.monotonic() < until and not hurry.is_set():
                one.thread.join(timeout=LOOK_EVERY_S)

    def submit(self, plan: Mapping[str, Any], *, by: str, folder: Path | None = None) -> StudyStatus:
        """Enter a study and begin it. The same plan again changes nothing.

        Raises:
            ConfigError: The plan is invalid, every error at once, or names a hospital that is not on the roster.
            FederationError: It could never run: too few hospitals, or sums that overflow.
            StudyStateError: There is a study of this name with another plan.
        """
        valid = parse_plan(plan, "the submitted plan")
        self._check(valid)
        row = self._store.submit(valid, by=by, folder=folder or self._folder / valid.study)
        self._take_up(row.name)
        return self.show(row.name)

    def all(self) -> list[StudyStatus]:
        """All studies, in the order of their submission."""
        return [self._status(row) for row in self._store.all()]

    def show(self, name: str) -> StudyStatus:
        """One study.

        Raises:
            UnknownStudyError: There is none of this name.
        """
        return self._status(self._store.study(name))

    def _status(self, row: StudyRow) -> StudyStatus:
        return StudyStatus(row, self._turns.position(row.name))

    def pause(self, name: str) -> StudyStatus:
        """Pause a study after the round at hand.

        Raises:
            UnknownStudyError, StudyStateError: There is none, or it is over.
        """
        self._store.wish(name, Wish.PAUSE)
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                running.halt.pause()
            else:
                self._store.enter(name, State.PAUSED, "by an operator")
        return self.show(name)

    def resume(self, name: str) -> StudyStatus:
        """Go on with a paused study.

        Raises:
            UnknownStudyError, StudyStateError: There is none, or it is over.
        """
        self._store.wish(name, Wish.RUN)
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                running.halt.go_on()
        self._take_up(name)
        return self.show(name)

    def stop(self, name: str) -> StudyStatus:
        """End a study for good, at once; hospitals get back what they reserved, what was charged stays charged.

        Raises:
            UnknownStudyError, StudyStateError: There is none, or it is over.
        """
        self._store.wish(name, Wish.STOP)
        self._take_up(name)  # one that is paused has to tell its hospitals
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                running.halt.stop()
        return self.show(name)

    def events(self, name: str, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """A study's journal from a byte offset on, and the offset behind it.

        Raises:
            UnknownStudyError: There is none of this name.
        """
        return read_events(self._store.study(name).folder / "events.jsonl", offset)

    def model(self, name: str) -> Path:
        """File of the finished model.

        Raises:
            UnknownStudyError, StudyStateError: There is none, or it is not finished.
        """
        row = self._store.study(name)
        path = row.folder / "model.safetensors"
        if row.state is not State.FINISHED or not path.exists():
            raise StudyStateError(
                f"study {name} is {row.state}: there is no model yet", hint="The checkpoints are in its folder."
            )
        return path

    def evidence(self, name: str) -> list[Path]:
        """The files that an auditor cross-checks: receipts and sums.

        Raises:
            UnknownStudyError: There is none of this name.
        """
        folder = self._store.study(name).folder
        return [path for path in (folder / RECEIPTS, folder / SUMS) if path.exists()]

    def wait(self, name: str) -> StudyRow:
        """Wait until a study is over, or rests because an operator wants it to.

        Raises:
            UnknownStudyError: There is none of this name.
        """
        while True:
            row = self._store.study(name)
            if row.state.over or (row.state is State.PAUSED and row.wish is Wish.PAUSE):
                return row
            self._over.wait(LOOK_EVERY_S)

    def _take_up(self, name: str) -> None:
        with self._lock:
            row = self._store.study(name)
            if row.state.over or row.wish is Wish.PAUSE or name in self._running or self._over.is_set():
                return
            running = _Running()
            if row.wish is Wish.STOP:  # it only has to tell its hospitals
                running.halt.stop()
            running.thread = threading.Thread(target=self._run, args=(row, running), name=row.name, daemon=True)
            self._running[name] = running
            running.thread.start()

    def _run(self, row: StudyRow, running: _Running) -> None:
        again = False
        logs.about(study=row.name)
        try:
            self._conduct(row, self._turns, running.halt)
            again = True  # if it was resumed at the moment at which it paused
        except FederationError as error:
            log.error("study %s: %s (%s)", row.name, error, error.hint)  # noqa: TRY400 - no traceback for what is known
        except Exception:
            log.exception("study %s: a fault of this program", row.name)
        finally:
            self._turns.give_back(row.name)
            with self._lock:
                del self._running[row.name]
        if again:
            self._take_up(row.name)

    def _supervise(self) -> None:
        """Take up again what something outside of the study interrupted: a full disk, a database that was away."""
        while not self._over.wait(RETRY_EVERY_S):
            try:
                for row in self._store.all():
                    self._take_up(row.name)
            except FederationError as error:
                log.warning("%s (%s)", error, error.hint)
