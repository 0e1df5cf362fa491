"""One daemon per hospital: who runs, and how it is asked to end after the message that it is answering.

Linux only: a process is its number and the moment it began, so that a number that was given away again is nobody.
"""

import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from shared_models.durable import replace_file
from shared_models.errors import AlreadyRunningError, LedgerError
from shared_models.service import Pulse, Signalled, tell

log = logging.getLogger("konsil.hospital")

PROCESS = "daemon.json"


class Process(NamedTuple):
    """A running process.

    Attributes:
        began: Clock ticks from the machine's start to the process's, and which start of the machine that was.
    """

    pid: int
    began: str


class Ending(Signalled):
    """Set when the daemon shall end. By SIGTERM at once where it is idle, else after the answer is sent.

    Made in the main thread, whose signs of life it has: ``pulse``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._answering = False
        self.pulse = Pulse()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a message is answered, SIGTERM waits."""
        self._answering = True
        try:
            with self.pulse.working():
                yield
        finally:
            self._answering = False

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """The handler of SIGTERM: in the main thread, which may be waiting for the coordinator."""
        self.set()
        tell(STOPPING=1, STATUS="ending after the message at hand" if self._answering else "ending")
        if not self._answering:
            raise SystemExit(0)

    def rest(self, seconds: float) -> None:
        """Wait, alive, or until told to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.wait(min(left, 1.0)):
            self.pulse.beat()


def keep_texts_of_crashes_out() -> None:
    """What nobody has caught is logged by its kind and place: an exception's text can hold a patient's values."""

    def log_place(kind: type[BaseException], trace: TracebackType | None) -> None:
        log.critical("a fault of this program: %s\n%s", kind.__name__, "".join(traceback.format_tb(trace)))

    sys.excepthook = lambda kind, _, trace: log_place(kind, trace)
    threading.excepthook = lambda args: log_place(args.exc_type, args.exc_traceback)


def refuse_second(state: Path) -> None:
    """Say who runs, if a daemon does; the ledger's lock is what keeps two from writing.

    Raises:
        AlreadyRunningError: Another daemon has this state folder.
    """
    other = running(state)
    if other is not None:
        raise AlreadyRunningError(
            f"a daemon of this hospital runs already: process {other.pid}",
            hint="One daemon per hospital. End that one with konsil-hospital stop.",
        )


@contextmanager
def announced(state: Path) -> Iterator[None]:
    """Name this process as the one that runs, until it ends.

    Raises:
        LedgerError: The file cannot be written.
    """
    path = state / PROCESS
    try:  # from here on, because a signal may come before the first message does
        try:
            replace_file(path, json.dumps(Process(os.getpid(), _began(os.getpid()))._asdict()).encode())
        except OSError as error:
            raise LedgerError(f"{path} cannot be written: {error.strerror}", hint="Check the disk.") from None
        yield
    finally:
        path.unlink(missing_ok=True)


def running(state: Path) -> Process | None:
    """The daemon that has this state folder; None where there is none, whatever a killed one has left behind."""
    try:
        found = Process(**json.loads((state / PROCESS).read_bytes()))
        return found if _began(found.pid) == found.began else None
    except (OSError, ValueError, TypeError, IndexError):
        return None


def stop(state: Path, *, patience_s: float) -> Process | None:
    """Ask the daemon to end after its current message, and wait until it is gone.

    Returns:
        The process that ended; None if none ran.

    Raises:
        AlreadyRunningError: It has not ended in time. It was not killed: it may be training under a charge.
    """
    found = running(state)
    if found is None:
        return None
    try:
        gone = _end(found, state, patience_s)
    except ProcessLookupError:
        return found
    except OSError as error:
        raise AlreadyRunningError(
            f"process {found.pid} cannot be told to end: {error.strerror}", hint="Be the user that started it."
        ) from None
    if not gone:
        raise AlreadyRunningError(
            f"process {found.pid} is still at its message after {patience_s:g} s",
            hint="It ends when the message is answered. What was charged stays charged if it is killed.",
        )
    return found


def _end(process: Process, state: Path, patience_s: float) -> bool:
    """SIGTERM to this process and no other, through a handle that its number's next owner would not answer to."""
    handle = os.pidfd_open(process.pid)
    try:
        if running(state) != process:
            return True
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        gone, _, _ = select.select([handle], [], [], patience_s)
        return bool(gone)
    finally:
        os.close(handle)


def _began(pid: int) -> str:
    """When a process began, unlike that of any other with its number.

    Raises:
        OSError: There is no such process, or it has ended and only its parent has not noticed.
    """
    # The command's name is in parentheses and may hold anything; state and start time are fields 3 and 22 of proc(5).
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if fields[0] in {"Z", "X"}:
        raise ProcessLookupError(pid)
    return f"{fields[19]}@{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()}"
