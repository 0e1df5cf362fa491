"""A machine fails slowly: its clock is off, its disk full or read-only, its GPU gone. What the operator reads."""

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w

from client.books import Books
from client.doctor import examine
from client.log_file import LogFile
from client.settings import Logs
from server.coordinator import SuperLink
from shared_models.config import read_toml
from tests.drills.consortium import read, say
from tests.federation import Federation, changed, make_federation, restart_hospitals
from tests.link import Keys, ready_hospital
from tests.rounds.test_a_server_that_lies import HOSPITAL

Mount = Callable[..., None]
MOUNT, UMOUNT = "/usr/bin/mount", "/usr/bin/umount"


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts something at a folder until the test is over."""
    mounted: list[Path] = []

    def mounting(where: Path, *arguments: str) -> None:
        done = subprocess.run([MOUNT, *arguments, str(where)], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine permits no mounts: {done.stderr.strip()}")
        if "remount" not in " ".join(arguments):
            mounted.append(where)

    try:
        yield mounting
    finally:
        restart_hospitals()
        for where in reversed(mounted):  # lazily: one that is busy must not keep the rest mounted
            subprocess.run([UMOUNT, "--lazy", str(where)], check=False)


def fill(folder: Path) -> Path:
    """Write until the disk takes no more; the file that takes all the room."""
    ballast = folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    return ballast


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A hospital that is ready for studies, and its coordinator's keys."""
    return ready_hospital(tmp_path)


def change(file: Path, **changes: object) -> None:
    """Change keys of a settings file."""
    file.write_text(tomli_w.dumps({**read_toml(file, "settings"), **changes}), encoding="utf-8")


def study(federation: Federation, name: str) -> list[str]:
    """Run a study of this name, and let go of every ledger; the codes with which it was refused here."""
    federation.plan = changed(federation.plan, study=name)
    federation.run(name)
    restart_hospitals()
    return [event["code"] for event in federation.events("refused", name) if event["hospital"] == HOSPITAL]


def test_a_clock_ten_minutes_off_is_named_by_start_and_measured_by_doctor(keys: Keys) -> None:
    """The node's signature is refused; the message speaks of clocks, and doctor says how far and which way."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed (Debian: apt install faketime)")
    file = keys.hospital_file("north")
    with SuperLink(keys.coordinator()):
        start = say("konsil-hospital", "start", file, before=("faketime", "-f", "+10m"))
        ahead, behind = (
            say("konsil-hospital", "doctor", file, before=("faketime", "-f", by)) for by in ("+10m", "-10m")
        )

    assert start.code == 1
    assert read(start.last_words[1], "Are both clocks right (konsil-hospital doctor)?")
    assert read(ahead.text, "s ahead of the coordinator's")
    assert ahead.code == behind.code == 1
    for said, words in ((ahead, "s ahead of the coordinator's"), (behind, "s behind the coordinator's")):
        (line,) = [line for line in said.text.splitlines() if line.split()[1] == "clock"]
        assert line.startswith("fail")
        assert words in line
        assert "by NTP" in line


def test_a_gpu_that_is_gone_stops_a_hospital_that_demands_it(keys: Keys) -> None:
    """Not in silence on the CPU: policy and capacity were planned with it."""
    change(keys.hospital_file("north"), device="cuda")
    hidden = {"CUDA_VISIBLE_DEVICES": ""}

    start = say("konsil-hospital", "start", keys.hospital_file("north"), environment=hidden)
    doctor = say("konsil-hospital", "doctor", keys.hospital_file("north"), environment=hidden)

    assert start.code == 1
    assert start.last_words == [
        "error: the settings demand cuda, which is not available",
        'hint: Set device = "auto" or "cpu"; or have the driver looked at: nvidia-smi.',
    ]
    assert "fail  device        the settings demand cuda, which is not available" in doctor.text
    assert read(start.last_words[0], "the settings demand cuda, which is not available")


def test_a_full_disk_refuses_a_study_and_counts_no_charge_twice(tmp_path: Path, mount: Mount) -> None:
    """The others go on; with room again the hospital does, too, and its ledger holds. Records are mounted read-only."""
    federation = make_federation(tmp_path, rounds=1, privacy={"noise_multiplier": 40.0}, deadline_s=5.0)
    settings = federation.settings(HOSPITAL)
    settings.state.mkdir(mode=0o700, exist_ok=True)
    mount(settings.state, "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs")
    mount(settings.records, "--bind", str(settings.records))
    mount(settings.records, "-o", "remount,bind,ro")
    assert study(federation, "first") == []
    ballast = fill(settings.state)

    start = say("konsil-hospital", "start", federation.settings_file(HOSPITAL))
    refused = study(federation, "second")
    (disk,) = [finding for finding in examine(settings) if finding.check == "disk"]
    budget = say("konsil-hospital", "budget", federation.settings_file(HOSPITAL))
    ballast.unlink()
    charged = federation.charges(HOSPITAL)

    assert start.code == 1
    assert read(start.last_words[1], "Make room")
    assert budget.code == 0 or "Make room" in budget.last_words[1]
    assert refused == ["ledger"]
    assert charged == [(1, 1)]
    assert disk.status == "fail"
    assert "No space left" in disk.text or "MB free" in disk.text
    assert study(federation, "third") == []
    assert federation.charges(HOSPITAL) == [(1, 1)] * 2
    assert say("konsil-hospital", "ledger", "verify", federation.settings_file(HOSPITAL)).code == 0


def test_a_backup_on_a_full_disk_leaves_nothing_and_says_so(keys: Keys, mount: Mount, tmp_path: Path) -> None:
    """Half of a backup would pass for one."""
    there = tmp_path / "small"
    there.mkdir()
    mount(there, "-t", "tmpfs", "-o", "size=16k", "tmpfs")

    said = say("konsil-hospital", "backup", keys.hospital_file("north"), there / "today")

    assert said.code == 1
    assert "No space left on device" in said.last_words[0] or "disk is full" in said.last_words[0]
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("role", ["hospital", "coordinator"])
def test_a_restore_on_a_full_disk_changes_nothing_and_works_with_room(
    keys: Keys, mount: Mount, tmp_path: Path, role: str
) -> None:
    """The same command does it then; the state folder is a mount of its own, as in a container."""
    file = keys.hospital_file("north") if role == "hospital" else keys.folder / "coordinator" / "coordinator.toml"
    state = file.parent / "state"
    state.mkdir(exist_ok=True)
    if role == "coordinator":
        (state / "last-receipts.json").write_text("{}" + 8192 * " ", encoding="ascii")
    options = (file,) if role == "hospital" else ("--settings", file)
    made = (file, tmp_path / "backup") if role == "hospital" else (tmp_path / "backup", *options)
    assert say(f"konsil-{role}", "backup", *made).code == 0
    mount(state, "-t", "tmpfs", "-o", "size=8k,mode=700", "tmpfs")

    full = say(f"konsil-{role}", "restore", tmp_path / "backup", *options)
    left = {path.name for path in state.iterdir()}
    mount(state, "-o", "remount,size=1m")
    done = say(f"konsil-{role}", "restore", tmp_path / "backup", *options)

    assert full.code == 1
    assert "No space left on device" in full.last_words[0]
    assert left <= {"ledger.sqlite.lock"}
    assert done.code == 0, done.text
    if role == "hospital":
        Books.open(keys.hospital("north")).close()
    else:
        assert (state / "last-receipts.json").exists()


def test_half_a_key_is_never_left_by_a_restore(keys: Keys, mount: Mount, tmp_path: Path) -> None:
    """It would pass for another key, and keys are never overwritten."""
    file, own = keys.hospital_file("north"), keys.hospital("north").keys
    backed_up = own.node.read_bytes()
    assert say("konsil-hospital", "backup", file, tmp_path / "backup").code == 0
    small = tmp_path / "small"
    small.mkdir()
    mount(small, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    moved = {"identity": str(own.identity), "node": str(small / "node.key"), "root": str(own.root)}
    change(file, keys=moved)
    ballast = fill(small)

    full = say("konsil-hospital", "restore", tmp_path / "backup", file, "--keys-only")
    left = (small / "node.key").exists()
    ballast.unlink()
    done = say("konsil-hospital", "restore", tmp_path / "backup", file, "--keys-only")

    assert full.code == 1
    assert "No space left on device" in full.last_words[0]
    assert not left
    assert done.code == 0, done.text
    assert (small / "node.key").read_bytes() == backed_up


def test_a_state_folder_that_is_read_only_stops_the_daemon_with_two_lines(keys: Keys, mount: Mount) -> None:
    """It cannot charge, so that it must not train; doctor says which folder."""
    state = keys.hospital("north").state
    mount(state, "--bind", str(state))
    mount(state, "-o", "remount,bind,ro")

    start = say("konsil-hospital", "start", keys.hospital_file("north"))
    (disk,) = [finding for finding in examine(keys.hospital("north")) if finding.check == "disk"]

    assert start.code == 1
    assert read(start.last_words[0], "Read-only file system")
    assert read(start.last_words[1], "Mount it writable")
    assert (disk.status, "Read-only file system" in disk.text) == ("fail", True)


@pytest.mark.parametrize("command", ["init", "rotate"])
def test_no_command_shows_a_traceback_of_a_full_disk(keys: Keys, mount: Mount, tmp_path: Path, command: str) -> None:
    """Also those that write keys: nothing half is left that a second try would stumble over."""
    small = tmp_path / "full"
    small.mkdir()
    mount(small, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    home = small / "west"
    if command == "rotate":
        shutil.copytree(keys.folder / "north" / "keys", small / "keys")
        own = read_toml(keys.hospital_file("north"), "settings")
        moved = {name: str(small / "keys" / f"{name}.key") for name in ("identity", "node")}
        change(keys.hospital_file("north"), keys={**own["keys"], **moved})
    fill(small)

    figures = ("--public-size", 50, "--epsilon", 2, "--delta", 0.0005, "--order", 8)
    options = ("--name", "west", "--coordinator", "127.0.0.1:9", *figures)
    arguments = (home, *options) if command == "init" else (keys.hospital_file("north"), "node")
    said = say("konsil-hospital", command, *arguments)

    assert said.code == 1
    assert "No space left on device" in said.last_words[0]
    assert "oom" in said.last_words[1] or "space" in said.last_words[1]


def test_the_log_is_set_aside_when_it_is_full_and_silent_when_the_disk_is(
    tmp_path: Path, mount: Mount, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ten files of 16 MB unless told otherwise; a line that does not fit shows no traceback."""
    mount(tmp_path, "-t", "tmpfs", "-o", "size=6m", "tmpfs")
    handler = LogFile(tmp_path / "hospital.log", Logs(maximum_mb=1, files=2))
    logger = logging.getLogger("konsil.drill")
    logger.addHandler(handler)
    try:
        for _ in range(40):
            logger.warning("%s", "x" * 100_000)
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        (tmp_path / "ballast").write_bytes(b"\0" * (6 * 2**20 - sum(sizes.values()) - 65_536))
        logger.warning("%s", "y" * 200_000)
    finally:
        logger.removeHandler(handler)
        handler.close()

    assert set(sizes) == {"hospital.log", "hospital.log.1", "hospital.log.2"}
    assert max(sizes.values()) <= 2**20
    assert "Traceback" not in "".join(capfd.readouterr())
