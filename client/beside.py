"""The page's own process, beside the daemon's: it answers while the daemon trains, and holds none of its memory.

The daemon listens and hands the socket on, so that nobody else on this machine takes the port while it runs. A pipe
says how the connection to the coordinator is; when it closes, however the daemon ended, the page ends too.
"""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from client.settings import Settings
from shared_models.errors import ConfigError

log = logging.getLogger("konsil.hospital")

SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
PATIENCE_S = 5.0

Connection = Literal["connected", "away"]


class Beside:
    """The page's process, as the daemon knows it; started again, after a pause, if it ends by itself.

    Args:
        command: What is run.
        socket: The descriptor that it is given.
    """

    def __init__(self, command: list[str], socket: int) -> None:
        self._command, self._socket = command, socket
        self._over, self._turn = threading.Event(), threading.Lock()
        self._said = b""
        self._child = self._started()
        self._thread = threading.Thread(target=self._watch, name="page", daemon=True)
        self._thread.start()

    def tell(self, connection: Connection) -> None:
        """Say how it stands with the coordinator; never waits, and never fails."""
        with self._turn:
            self._said = f"{connection} {time.time():.0f}\n".encode()
            _say(self._child, self._said)

    def close(self) -> None:
        """End it, and wait until it is gone."""
        self._over.set()
        with self._turn:
            child = self._child
        assert child.stdin is not None  # noqa: S101 - a pipe
        with suppress(OSError):
            child.stdin.close()
        try:
            child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _started(self) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, pass_fds=[self._socket], bufsize=0, start_new_session=True
        )
        assert child.stdin is not None  # noqa: S101 - a pipe
        os.set_blocking(child.stdin.fileno(), False)
        _say(child, self._said)
        return child

    def _watch(self) -> None:
        retry_s = SHORTEST_RETRY_S
        while True:
            began, status = time.monotonic(), self._child.wait()
            if self._over.is_set() or status in {0, -signal.SIGTERM}:  # told to, as a service's whole group is
                return
            retry_s = SHORTEST_RETRY_S if time.monotonic() - began > LONGEST_RETRY_S else retry_s
            log.error("the page ended with status %d; starting it again in %.0f s", status, retry_s)
            if self._over.wait(retry_s):
                return
            retry_s = min(2 * retry_s, LONGEST_RETRY_S)
            with self._turn:
                if self._over.is_set():
                    return
                self._child = self._started()


class Nobody:
    """Where there is no page."""

    def tell(self, connection: Connection) -> None:
        """Nobody hears."""


@contextmanager
def beside(settings: Settings, settings_file: Path) -> Iterator[Beside | Nobody]:
    """The page's process while the context is open; without ``[page]`` in the settings, nobody.

    Raises:
        ConfigError: The port is in use, or what serves the page is not installed.
    """
    if settings.page is None:
        yield Nobody()
        return
    require_page()
    from shared_models.listening import listen  # noqa: PLC0415 - with uvicorn, which only the page needs

    with listen("127.0.0.1", settings.page.port, hint="Stop what uses it, or choose another: [page] port.") as socket:
        number = socket.fileno()
        command = [
            sys.executable,
            "-P",
            "-m",
            "client.cli",
            "page",
            str(settings_file.absolute()),
            "--socket",
            str(number),
        ]
        process = Beside(command, number)
        log.info("the page: %s://127.0.0.1:%d", settings.page.scheme, settings.page.port)
        try:
            yield process
        finally:
            process.close()


def require_page() -> None:
    """Check that what serves the page is there.

    Raises:
        ConfigError: It is not installed.
    """
    for library in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"the page needs {library}, which is not installed",
                hint="pip install --constraint deploy/constraints.txt 'konsil[serve]', or take [page] out.",
            )


class Told:
    """What the daemon said last, as the page's process knows it.

    Attributes:
        connection: How it stands with the coordinator; None before anything was said.
        since: Since when, Unix time.
    """

    def __init__(self) -> None:
        self.connection: str | None = None
        self.since = 0.0

    def listen(self, pipe: IO[bytes]) -> None:
        """Take in what is said until the daemon ends."""
        for line in pipe:
            word, _, at = line.decode("ascii", "replace").strip().partition(" ")
            if word in {"connected", "away"} and at.isdigit() and word != self.connection:
                self.since, self.connection = float(at), word


def _say(child: "subprocess.Popen[bytes]", text: bytes) -> None:
    assert child.stdin is not None  # noqa: S101 - a pipe
    with suppress(OSError, ValueError):  # it has ended, or does not listen
        child.stdin.write(text)
