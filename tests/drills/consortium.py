"""A consortium for drills: made by the commands that people type, on a port of its own; and commands as processes."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from client.daemon import FleetConnection
from client.settings import read_settings as read_hospital
from server.cli import app as coordinator_app
from server.coordinator import SuperLink
from server.demo import free_port
from server.processes import find_command
from server.settings import read_settings as read_coordinator
from tests.client.test_enrol import Consortium, run

PATIENCE_S = 60


class Said(NamedTuple):
    """What a command did in a process of its own."""

    code: int
    text: str

    @property
    def last_words(self) -> list[str]:
        """Its ``error:`` and ``hint:`` lines."""
        return [line for line in self.text.splitlines() if line.startswith(("error:", "hint:"))]


def say(
    command: str, *arguments: object, before: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> Said:
    """Run a command as a process. No operator ever sees a traceback.

    Args:
        command: ``konsil-hospital`` or ``konsil-coordinator``.
        arguments: As typed.
        before: What it is run under, such as ``faketime``.
        environment: More of it.
    """
    done = subprocess.run(
        [*before, find_command(command), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    return Said(done.returncode, text)


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
