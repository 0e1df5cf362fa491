"""What a daemon tells the service manager that started it: ready, alive, ending, and a line of status.

systemd names a datagram socket in ``NOTIFY_SOCKET`` and expects lines ``KEY=VALUE`` there, see sd_notify(3). Without a
socket all of this does nothing.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LOOKS_PER_PERIOD = 4  # one look may miss a loop that is just waiting for an answer
TURN_WITHIN_S = 5.0


class Signalled(threading.Event):
    """An event that a signal's handler may set.

    The handler runs in the main thread, perhaps while that holds the event's lock on its way into a wait or out of it:
    the lock is one that a thread may take twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cond = threading.Condition(threading.RLock())


def tell(**fields: str | int) -> None:
    """Send one datagram, ``tell(READY=1, STATUS="waiting")``; nothing depends on whether somebody reads it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    lines = "\n".join(f"{key}={' '.join(str(value).split())}" for key, value in fields.items())
    if address.startswith("@"):  # an abstract socket's name begins with a zero byte
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.connect(address)
        out.sendall(lines.encode())


def watchdog_period_s() -> float | None:
    """How often the service manager wants a sign of life from this process; None where it wants none."""
    period, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    meant = not process or process == str(os.getpid())
    return int(period) / 1e6 if meant and period.isascii() and period.isdigit() and int(period) > 0 else None


class Pulse:
    """Signs of life of a main thread: it beats when it comes round its loop; while it works, its processor time counts.

    Training has no end that could be known here, so work is alive for as long as it computes. A thread that waits for
    a lock, a dead network file system or a peer that never finishes does not compute.

    Made in the thread that it is about; asked from another.
    """

    def __init__(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._beats, self._working = 0, False
        self._last: tuple[int, float] | None = None

    def beat(self) -> None:
        """The loop came round."""
        self._beats += 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """What takes as long as it takes."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    def went_on(self) -> bool:
        """Whether the thread has got on since this was asked last."""
        now = (self._beats, time.clock_gettime(self._clock) if self._working else 0.0)
        moved, self._last = now != self._last, now
        return moved


def turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether an event loop of another thread comes round."""
    came = threading.Event()
    try:
        loop.call_soon_threadsafe(came.set)
    except RuntimeError:  # it is closed
        return False
    return came.wait(TURN_WITHIN_S)


class Watchdog:
    """A thread that gives the service manager signs of life while every check passes; a context manager.

    Guarantees:
        * No sign of life while a check says no, raises or does not return: the service manager then ends the process
          and starts it again.
    """

    def __init__(self, *checks: Callable[[], bool]) -> None:
        self._checks = [*checks]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._period_s = watchdog_period_s()

    def watch(self, check: Callable[[], bool]) -> None:
        """From here on this has to pass, too."""
        self._checks.append(check)

    def __enter__(self) -> "Watchdog":
        if self._period_s is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _run(self) -> None:
        pause_s = (self._period_s or 0.0) / LOOKS_PER_PERIOD
        while not self._over.wait(pause_s):
            passed = [check() for check in self._checks]  # each is asked: some compare with the time before
            if all(passed):
                tell(WATCHDOG=1)
