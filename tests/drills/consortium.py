"""A consortium for drills: made by the commands that people type, on a port of its own; and commands as processes."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import client.cli
import server.cli
from client.daemon import FleetConnection
from client.settings import read_settings as read_hospital
from server.cli import app as coordinator_app
from server.coordinator import SuperLink
from server.demo import free_port
from server.processes import find_command
from server.settings import read_settings as read_coordinator
from tests.client.test_enrol import Consortium, run

PATIENCE_S = 60
OPERATIONS = " ".join((Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8").split())


class Said(NamedTuple):
    """What a command did in a process of its own."""

    code: int
    text: str

    @property
    def last_words(self) -> list[str]:
        """Its ``error:`` and ``hint:`` lines."""
        return [line for line in self.text.splitlines() if line.startswith(("error:", "hint:"))]


def say(
    command: str, *arguments: object, before: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Said:
    """Run a command as a process. No operator ever sees a traceback.

    Args:
        command: ``konsil-hospital`` or ``konsil-coordinator``.
        arguments: As typed.
        before: What it is run under, such as ``faketime``; else it is forked from a server that has imported
            everything, because importing torch takes seconds.
        environment: More of it.
    """
    words = [str(argument) for argument in arguments]
    said = _executed([*before, find_command(command), *words]) if before else _forked(command, words, environment or {})
    assert "Traceback" not in said.text, said.text
    return said


def _executed(command: list[str]) -> Said:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, **options, check=False, timeout=PATIENCE_S)  # type: ignore[call-overload]
    return Said(done.returncode, done.stdout)


def _forked(command: str, words: list[str], environment: Mapping[str, str]) -> Said:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kill", "pytest"])
    with tempfile.NamedTemporaryFile() as log:
        process = context.Process(target=_live, args=(command, words, environment, log.name))
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}):  # one thread can be forked
            process.start()
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Said(process.exitcode or 0, log.read().decode())


def _live(command: str, words: list[str], environment: Mapping[str, str], log: str) -> None:
    """In the new process: be the command."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    sys.argv = [command, *words]
    {"konsil-hospital": client.cli.main, "konsil-coordinator": server.cli.main}[command]()


def read(text: str, words: str) -> bool:
    """Whether an operator reads these words, and docs/operations.md says that they are read.

    Held against both, so that neither can change alone.
    """
    return words in text and f"`{words}`" in OPERATIONS


def found(folder: Path, *names: str) -> Consortium:
    """A consortium whose hospitals have all joined."""
    made = Consortium(folder, f"127.0.0.1:{free_port()}")
    run(coordinator_app, "init", made.centre, "--address", made.address)
    for name in names:
        made.init(name)
        made.enrol(name)
    made.sign()
    for name in names:
        made.join(name)
    return made


def serving(consortium: Consortium) -> SuperLink:
    """The coordinator's side of every hospital's connection, as it starts."""
    return SuperLink(read_coordinator(consortium.settings))


def connects(consortium: Consortium, name: str) -> None:
    """A hospital connects as its daemon does, or the daemon's error is raised."""
    with FleetConnection(read_hospital(consortium.hospital(name))):
        pass
