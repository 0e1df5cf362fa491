"""The unit files: systemd accepts them, rates them, and they start what there is."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

import client.cli
import server.cli
from server.cli_control import ROUNDS_MAY_TAKE_S

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ("konsil-hospital", "konsil-coordinator")
MOST_EXPOSED = 20  # tenths

analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def _section(name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # systemd's keys have capitals
    parser.read(UNITS / f"{name}.service", encoding="utf-8")
    return parser["Service"]


@analyze
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_examples", [False, True])
def test_systemd_finds_nothing_wrong(name: str, with_examples: bool, tmp_path: Path) -> None:
    """Also with every drop-in that the documents name; only the program is not installed here."""
    unit = tmp_path / f"{name}.service"
    text = (UNITS / unit.name).read_text(encoding="utf-8")
    unit.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text), encoding="utf-8")
    if with_examples:
        shutil.copytree(UNITS / "examples", tmp_path / f"{name}.service.d")

    command = ["systemd-analyze", "verify", str(unit)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@analyze
@pytest.mark.parametrize("name", NAMES)
def test_the_exposure_is_low(name: str) -> None:
    """At most 2.0 of 10, by systemd's own rating."""
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}"]

    found = subprocess.run([*command, UNITS / f"{name}.service"], capture_output=True, text=True, check=False)

    assert found.returncode == 0, found.stdout[-400:] + found.stderr


@pytest.mark.parametrize(("name", "app"), [*zip(NAMES, (client.cli.app, server.cli.app), strict=True)])
def test_a_unit_starts_a_command_that_there_is(name: str, app: typer.Typer) -> None:
    """Under the settings' documented place, and as nobody else's user."""
    service = _section(name)
    program, command, *options = service["ExecStart"].split()

    found = typer.main.get_command(app).make_context(name, [command, *options], resilient_parsing=True)

    assert program == f"/opt/konsil/current/bin/{name}"
    assert command in found.command.commands  # type: ignore[attr-defined]
    assert options[-1].startswith("/etc/konsil/")
    assert service["User"] == "konsil"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_memory_stays_there(name: str) -> None:
    """No core dump, also none that the watchdog would ask for with its usual signal."""
    service = _section(name)

    assert (service["LimitCORE"], service["WatchdogSignal"]) == ("0", "SIGKILL")


def test_the_end_of_a_round_is_waited_for() -> None:
    """The service manager kills a coordinator only after it has given its rounds up by itself."""
    minutes = re.fullmatch(r"(\d+)min", _section("konsil-coordinator")["TimeoutStopSec"])

    assert minutes is not None
    assert int(minutes[1]) * 60 > ROUNDS_MAY_TAKE_S + 60


def test_the_only_folder_that_can_be_written_is_the_states() -> None:
    """Settings, keys and records are read-only to the daemon, wherever they lie."""
    services = [_section(name) for name in NAMES]

    assert [(each["ProtectSystem"], each["StateDirectory"]) for each in services] == [("strict", "konsil")] * 2
    assert not any("ReadWritePaths" in each for each in services)
