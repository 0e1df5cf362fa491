"""A study on fresh Debian 12 machines without a network, under systemd: installed, upgraded and rolled back."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shared_models.versions import RELEASE
from tests.deploy.machines import Machine, fresh_debian, machine, missing, network

ROOT = Path(__file__).parents[2]
HOSPITALS = ("hospital-1", "hospital-2", "hospital-3")
COORDINATOR, HOSPITAL = "konsil-coordinator", "konsil-hospital"
SETTINGS, OPERATOR = "/etc/konsil/hospital.toml", "/etc/konsil/anna/operator.toml"
STUDY = "breast-cancer"
EXPORT = "/mnt/export/cytology"
NEXT = re.sub(r"\d+$", lambda found: str(int(found[0]) + 1), RELEASE)


@pytest.fixture(scope="module")
def bundles() -> Path:
    """This release's bundles, and the same as the next one; built now, unless KONSIL_BUNDLES names a folder of them."""
    if "KONSIL_BUNDLES" in os.environ:
        return Path(os.environ["KONSIL_BUNDLES"]).absolute()
    folder = ROOT / "build" / "bundles"
    build = (sys.executable, ROOT / "deploy" / "bundle" / "build.py", "hospital-cpu", "coordinator")
    for release in ([], ["--release", NEXT]):
        subprocess.run([*build, "--pip=--quiet", *release], check=True)
    return folder


@pytest.fixture
def machines(bundles: Path) -> Iterator[dict[str, Machine]]:
    """A coordinator's machine, and three hospitals' that have the bundle of a hospital installed."""
    if why := missing():
        pytest.skip(why)
    if not shutil.which("ip"):
        pytest.skip("not installed: iproute2")
    debian, folder = fresh_debian(ROOT / "build" / "fresh" / "debian-12"), ROOT / "build" / "fresh" / "machines"
    shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        net = stack.enter_context(network())

        def start(name: str, system: str) -> Machine:
            made = machine(name, system=system, folder=folder / name, bundles=bundles, net=net)
            return stack.enter_context(made)

        with machine("image", system=str(debian), folder=folder / "image", bundles=bundles, net=net) as image:
            install(image, f"konsil-{RELEASE}-hospital-cpu")
            image.run("sync")
        installed = f"{folder / 'image' / 'changes'}:{debian}"
        yield {"coordinator": start("coordinator", str(debian)), **{name: start(name, installed) for name in HOSPITALS}}


def install(on: Machine, bundle: str) -> str:
    """Run a bundle's installer; gives what it said."""
    began = time.monotonic()
    said = on.run("/bin/sh", "-c", f"/mnt/bundles/{bundle}-*/install.sh install").stdout
    note(f"{on.name}: {bundle} installed in {time.monotonic() - began:.0f} s")
    return said


def note(line: str) -> None:
    """For whoever runs this with -s."""
    print(f"  {line}", flush=True)  # noqa: T201 - a long test tells how far it is


def hand_over(path: str, giver: Machine, taker: Machine) -> str:
    """Carry a file from one machine's settings to another's; gives where it lies there."""
    target = f"/etc/konsil/{Path(path).name}"
    (taker.root / target[1:]).write_bytes((giver.root / path[1:]).read_bytes())
    taker.run("chown", "konsil:konsil", target)
    return target


def set_up_coordinator(centre: Machine) -> str:
    """As docs/install.md has it; gives the root key's fingerprint."""
    install(centre, f"konsil-{RELEASE}-coordinator")
    command = (COORDINATOR, "init", "/etc/konsil", "--address", "127.0.0.1:9092", "--state", "/var/lib/konsil/state")
    said = centre.run(*command).stdout
    centre.run(COORDINATOR, "example", STUDY, "/var/lib/konsil/example", "--hospitals", "3")
    return re.search(r"root key\s+(\S+)", said)[1]  # type: ignore[index]  # else the command said something else


def set_up_hospital(hospital: Machine, centre: Machine, public_size: int) -> None:
    """Records, keys and ledger, and a request that the coordinator enrols."""
    shutil.copytree(centre.root / "var/lib/konsil/example" / hospital.name, hospital.root / EXPORT[1:])
    drop_in = hospital.root / f"etc/systemd/system/{HOSPITAL}.service.d"
    drop_in.mkdir(parents=True)
    shutil.copy(hospital.root / f"opt/konsil/{RELEASE}/systemd/examples/records.conf", drop_in)
    hospital.run("systemctl", "daemon-reload")
    budget = ("--public-size", str(public_size), "--epsilon", "3", "--delta", "3e-4", "--order", "12")
    folders = ("--state", "/var/lib/konsil/state", "--records", EXPORT)
    name = ("--name", hospital.name, "--coordinator", "127.0.0.1:9092")
    said = hospital.run(HOSPITAL, "init", "/etc/konsil", *name, *budget, *folders).stdout
    request = hand_over(f"/etc/konsil/{hospital.name}.request.json", hospital, centre)
    told = re.search(r"fingerprint\s+(\S+)", said)[1]  # type: ignore[index]
    centre.run(COORDINATOR, "enrol", request, "--settings", "/etc/konsil/coordinator.toml", "--fingerprint", told)


def waiting(hospital: Machine) -> None:
    """Until the daemon says that it waits for studies."""
    hospital.until(HOSPITAL, "StatusText", "waiting for studies")


def budget(hospital: Machine) -> Any:
    """What was spent and what is left, to the digit."""
    return hospital.json(HOSPITAL, "budget", SETTINGS)


def approve(hospital: Machine) -> None:
    """As a steward would, once the study is there and asks."""
    deadline = time.monotonic() + 120
    while True:
        listed: Any = hospital.json(HOSPITAL, "studies", SETTINGS)
        if pending := [row["plan_digest"] for row in listed if row["status"] == "pending"]:
            hospital.run(HOSPITAL, "approve", SETTINGS, STUDY, "--yes", "--digest", pending[0])
            return
        assert time.monotonic() < deadline
        time.sleep(1)


def shown(centre: Machine) -> Any:
    """The study, as its operator sees it."""
    return centre.json(COORDINATOR, "show", STUDY, "--operator", OPERATOR)


def until(holds: Any, patience_s: float = 300) -> None:
    """Wait for something that happens on a machine."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(1)


def from_bundle_to_waiting(centre: Machine, hospitals: list[Machine]) -> None:
    """Every command of docs/install.md, until each hospital says that it waits for studies."""
    began = time.monotonic()
    root_fingerprint = set_up_coordinator(centre)
    example = json.loads((centre.root / "var/lib/konsil/example/example.json").read_text(encoding="utf-8"))
    sizes = {row["name"]: row["public_size"] for row in example["hospitals"]}
    for hospital in hospitals:
        set_up_hospital(hospital, centre, sizes[hospital.name])
    signing = ("/etc/konsil/roster.next.json", "--root-key", "/etc/konsil/root/root.key")
    centre.run(COORDINATOR, "sign", *signing, "--settings", "/etc/konsil/coordinator.toml")
    centre.run("systemctl", "enable", "--now", COORDINATOR)
    for hospital in hospitals:
        kit = hand_over(f"/etc/konsil/kits/{hospital.name}.kit.json", centre, hospital)
        hospital.run(HOSPITAL, "join", SETTINGS, kit, "--root-fingerprint", root_fingerprint)
        hospital.run(HOSPITAL, "check-data", SETTINGS)
        hospital.run("systemctl", "enable", "--now", HOSPITAL)
    for hospital in hospitals:
        waiting(hospital)
    note(f"three hospitals wait for studies after {time.monotonic() - began:.0f} s")


def begin_study(centre: Machine, hospitals: list[Machine]) -> None:
    """An operator submits it, every steward approves it, and some rounds are over."""
    names = ("anna", "--role", "operator", "--folder", "/etc/konsil/anna")
    centre.run(COORDINATOR, "issue", *names, "--settings", "/etc/konsil/coordinator.toml")
    plan = "/opt/konsil/current/lib/python3.11/site-packages/server/plans/breast-cancer.toml"
    centre.run(COORDINATOR, "submit", plan, "--operator", OPERATOR)
    for hospital in hospitals:
        approve(hospital)
    until(lambda: shown(centre)["rounds_done"] >= 3)


def check_restrictions(hospital: Machine) -> None:
    """What the unit does not let its process do: from inside its own view of the files, and by its process's status."""
    main = hospital.shown(HOSPITAL, "MainPID")
    inside = ("nsenter", f"--target={main}", "--mount", "--", "/bin/sh", "-c")
    for path in ("/etc/konsil/new", "/opt/konsil/new", f"{EXPORT}/new", "/usr/new"):
        assert "Read-only file system" in hospital.run(*inside, f": > {path}", check=False).stderr
    status = (hospital.root / f"proc/{main}/status").read_text(encoding="utf-8")
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    assert hospital.run("stat", "--format=%U", f"/proc/{main}").stdout.strip() == "konsil"


def upgrade_and_finish(centre: Machine, hospitals: list[Machine]) -> Any:
    """The first hospital in the middle of a study, the coordinator while it runs; gives what was spent at the end."""
    first = hospitals[0]
    centre.run(COORDINATOR, "pause", STUDY, "--operator", OPERATOR)
    until(lambda: shown(centre)["state"] == "paused")
    before = budget(first)
    assert "at a safe point" in install(first, f"konsil-{NEXT}-hospital-cpu")
    waiting(first)
    assert budget(first) == before
    centre.run(COORDINATOR, "resume", STUDY, "--operator", OPERATOR)
    approve(first)  # other software: the steward is asked again
    install(centre, f"konsil-{NEXT}-coordinator")
    until(lambda: shown(centre)["state"] == "finished", 600)
    for hospital in hospitals:
        waiting(hospital)
    spent = budget(first)
    assert spent != before
    return spent


def crash_and_hang(hospital: Machine) -> None:
    """A daemon that is killed is started again, and one that gives no sign of life is killed first."""
    faster = hospital.root / f"etc/systemd/system/{HOSPITAL}.service.d/faster.conf"
    faster.write_text("[Service]\nWatchdogSec=40s\nRestartSec=1s\n", encoding="ascii")
    hospital.run("systemctl", "daemon-reload")
    hospital.run("systemctl", "restart", HOSPITAL)
    waiting(hospital)
    for restarts, what in enumerate(("KILL", "STOP"), start=1):
        hospital.run("systemctl", "kill", f"--signal={what}", HOSPITAL)
        hospital.until(HOSPITAL, "NRestarts", str(restarts))
        waiting(hospital)


def check_journal(hospital: Machine) -> None:
    """It says what happened, and names no patient."""
    journal = hospital.run("journalctl", "--no-pager", "--unit", HOSPITAL).stdout
    header, *rows = (hospital.root / EXPORT[1:] / "data.csv").read_text(encoding="utf-8").splitlines()
    column = header.split(",").index("patient")
    assert "connected to 127.0.0.1:9092" in journal
    assert "Watchdog timeout" in journal
    assert len(rows) > 100
    assert [row for row in rows if row.split(",")[column] in journal] == []


def remove_and_install_again(hospital: Machine) -> None:
    """The ledger stays, and it is said where."""
    assert "/var/lib/konsil" in hospital.run("konsil-install", "uninstall").stdout
    assert (hospital.root / "var/lib/konsil/state/ledger.sqlite").exists()
    assert not (hospital.root / "opt/konsil").exists()
    install(hospital, f"konsil-{RELEASE}-hospital-cpu")
    hospital.run("systemctl", "enable", "--now", HOSPITAL)
    waiting(hospital)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_study_survives_upgrade_and_rollback_with_its_budget_to_the_digit(machines: dict[str, Machine]) -> None:
    """Bundles, units, users and settings as documented; real systemd, and no network but loopback."""
    centre, hospitals = machines["coordinator"], [machines[name] for name in HOSPITALS]
    first = hospitals[0]

    from_bundle_to_waiting(centre, hospitals)
    begin_study(centre, hospitals)
    check_restrictions(first)
    spent = upgrade_and_finish(centre, hospitals)

    assert RELEASE in first.run("konsil-install", "rollback").stdout
    centre.run("konsil-install", "rollback")
    waiting(first)
    assert budget(first) == spent
    first.run(HOSPITAL, "ledger", "verify", SETTINGS)
    assert shown(centre)["state"] == "finished"
    listed = first.run("konsil-install", "status").stdout
    assert listed.splitlines() == [f"* {RELEASE} hospital-cpu", f"  {NEXT} hospital-cpu"]

    crash_and_hang(first)
    check_journal(first)
    remove_and_install_again(first)
    assert budget(first) == spent
    note(json.dumps(spent))
