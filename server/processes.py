"""Child processes of a trial: started together, watched together, and ended together, whatever happens."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import psutil

from shared_models.errors import ConfigError, FederationError

SAMPLE_EVERY_S = 0.5


class Children:
    """A context of child processes; leaving it, for any reason, ends every one of them.

    Each child's output goes to a log file of its own, whose last ``error:`` and ``hint:`` lines say why it failed.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._files: list[IO[str]] = []

    def __enter__(self) -> "Children":
        self._logs.mkdir(parents=True, exist_ok=True)
        self._previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._previous)

    def stop(self) -> None:
        """End every child: ask first, insist after five seconds."""
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + 5
        for child in self._children.values():
            try:
                child.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        for file in self._files:
            file.close()
        self._children.clear()
        self._files.clear()

    def start(self, name: str, command: str, *arguments: str, talk: bool = False) -> "subprocess.Popen[str]":
        """Start one of Konsil's commands. With ``talk`` its standard input and output are pipes."""
        log = (self._logs / f"{name}.log").open("w", encoding="utf-8")
        self._files.append(log)
        pipe = subprocess.PIPE if talk else None
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [find_command(command), *arguments],
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or log,
            stderr=log,
            text=True,
            env=environment,
        )
        self._children[name] = child
        return child

    def run(self, name: str, command: str, *arguments: str) -> str:
        """Run one of Konsil's commands to its end and return what it printed.

        Raises:
            FederationError: It failed; the error and the hint are its own.
        """
        child = self.start(name, command, *arguments, talk=True)
        output, _ = child.communicate()
        self.check(name)
        return output

    def wait(self, name: str) -> int:
        """Wait for a child that was started, and return its exit status."""
        return self._children[name].wait()

    def check(self, name: str) -> bool:
        """Whether a child is still running.

        A child that was killed by a signal from outside is simply gone: rounds go on without it.

        Raises:
            FederationError: It ended with an error.
        """
        code = self._children[name].poll()
        if code is None:
            return True
        if code > 0:
            raise self._failure(name, code)
        return False

    def _failure(self, name: str, code: int) -> FederationError:
        """The child's own last words."""
        path = self._logs / f"{name}.log"
        said = dict(
            line.split(": ", 1) for line in path.read_text("utf-8").splitlines() if line.startswith(_LAST_WORDS)
        )
        error = said.get("error", f"ended with status {code}")
        return FederationError(f"{name}: {error}", hint=said.get("hint", f"See {path}."))


_LAST_WORDS = ("error: ", "hint: ")


def find_command(name: str) -> str:
    """Path of a console script of this installation.

    Raises:
        ConfigError: It is not installed beside this Python.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(
            f"the command {name} is not installed", hint="Run `make setup`, or pip install konsil[hospital]."
        )
    return found


class MemoryMeter:
    """Samples the proportional set size of this process and all its children; a context."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> "MemoryMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_EVERY_S):
            self.peak_mb = max(self.peak_mb, _tree_pss_mb(psutil.Process()))


def _tree_pss_mb(root: psutil.Process) -> float:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended while we looked
            continue
    return total / 1e6
