"""A hospital's real daemon that is killed again and again: each life is a process of its own, armed to die somewhere.

Python's fork server imports torch and Flower once, so that a life begins in a fraction of a second; what then runs is
``konsil-hospital start``.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.kill_points import Point

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["client.cli", "client.app", "client.daemon", "tests.kill_points", "tests.killed_daemon"])
_PR_SET_PDEATHSIG = 1


def live(settings_file: Path, log: Path, point: Point | None) -> None:
    """One life, in a process of its own: run the daemon's own command, which a point ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if point is not None:
        point.arm()
    from client.cli import start

    start(settings_file)


class Lives:
    """A context of daemons; leaving it, for any reason, ends every one of them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[ForkServerProcess] = []

    def __enter__(self) -> "Lives":
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
        for process in self._started:
            process.join()
            process.close()

    def start(self, settings_file: Path, point: Point | None = None) -> ForkServerProcess:
        """Start a hospital's daemon, armed or not."""
        log = self._logs / f"{settings_file.parent.name}.log"
        process = _FORKS.Process(target=live, args=(settings_file, log, point), daemon=True)
        process.start()
        self._started.append(process)
        return process


def killed(life: ForkServerProcess, *, while_true: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait until a life has ended; whether it was SIGKILL that ended it."""
    deadline = time.monotonic() + seconds
    while life.exitcode is None and time.monotonic() < deadline and while_true():
        life.join(0.02)
    return life.exitcode == -signal.SIGKILL
