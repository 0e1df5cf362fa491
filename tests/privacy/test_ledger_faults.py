"""What a disk, a folder, another process or a clock can do: charging stops, the cause is named, no charge is lost."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from auditor.verify import verify_ledger
from client.budget import Budget
from shared_models.errors import LedgerError
from shared_models.privacy import ledger as module
from shared_models.privacy.head import SLOT_BYTES, head_path
from shared_models.privacy.ledger import Entry, Ledger, Reserved, StudyLimit, read_ledger
from shared_models.privacy.mechanisms import PoissonGaussian
from shared_models.software import software_digest
from tests.privacy.test_ledger import KEY, PUBLIC, open_budget, without_privileges

STEP = PoissonGaussian(sample_rate=0.01, noise_multiplier=100.0, steps=1, clip=1.0, expected_batch=1.0)
STUDY, DIGEST = "long", "ab" * 32
PATIENCE = 3000  # charges; more than any small disk here takes


def prepared(path: Path) -> None:
    """A ledger with one approved study of many cheap rounds."""
    with Ledger.create(path, KEY, hospital="north") as ledger:
        open_budget(ledger)
        ledger.append(
            "plan-approved",
            population="all",
            study=STUDY,
            plan_digest=DIGEST,
            limit=StudyLimit(epsilon=1.0, delta=1e-4),
            reservation=(Reserved(mechanism=STEP, charges=PATIENCE),),
            software_digest=software_digest(),
        )


def charge(budget: Budget, number: int) -> Entry:
    return budget.charge(STUDY, DIGEST, round=number, attempt=1, mechanism=STEP, parameters_digest=DIGEST)


def charge_until_refused(budget: Budget, first: int = 1) -> tuple[list[Entry], LedgerError]:
    """All charges that returned, and the error that ended it."""
    returned = []
    for number in range(first, PATIENCE):
        try:
            returned.append(charge(budget, number))
        except LedgerError as error:
            return returned, error
    raise AssertionError("nothing went wrong")


def stays_stopped(budget: Budget) -> None:
    """Until somebody has mended the cause and opened the ledger again."""
    with pytest.raises(LedgerError, match="failed before"):
        charge(budget, PATIENCE)


def holds_after_mending(path: Path, returned: list[Entry]) -> None:
    """It opens, with every charge that returned and at most one more, and goes on; an auditor agrees."""
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        charged = [entry for entry in ledger.entries() if entry.kind == "charge"]
        assert charged[: len(returned)] == returned
        assert len(charged) - len(returned) in {0, 1}
        assert len(budget.spent(STUDY)) == len(charged)
        charge(budget, PATIENCE)
    assert verify_ledger(path, [PUBLIC]).charges == len(charged) + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    prepared(tmp_path / "ledger.sqlite")
    return tmp_path / "ledger.sqlite"


def run(command: str, *arguments: str) -> int:
    """A command of the system, its exit status."""
    found = shutil.which(command)
    return 127 if found is None else subprocess.run([found, *arguments], capture_output=True, check=False).returncode


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own, where this user may mount one."""
    folder.mkdir()
    if os.geteuid() != 0 or run("mount", *options, str(folder)) != 0:
        pytest.skip("this user may not mount a file system here")
    try:
        yield folder
    finally:
        assert run("umount", str(folder)) == 0


@contextmanager
def small_ext4(folder: Path, image: Path) -> Iterator[Path]:
    """Two megabytes of ext4 in a file."""
    image.write_bytes(bytes(2 << 20))
    if run("mkfs.ext4", "-q", "-O", "^has_journal", str(image)) != 0:
        pytest.skip("there is no mkfs.ext4 here")
    with mounted(folder, "-o", "loop", str(image)) as disk:
        yield disk


# A full disk


def test_a_full_disk_stops_charging(tmp_path: Path) -> None:
    """A real one; then room is made, and the study goes on."""
    with small_ext4(tmp_path / "disk", tmp_path / "image") as disk:
        path = disk / "ledger.sqlite"
        prepared(path)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(700_000))
        with Ledger.open(path, KEY) as ledger:
            budget = Budget(ledger)
            returned, error = charge_until_refused(budget)
            assert "database or disk is full" in str(error) or "disk I/O error" in str(error)
            assert len(returned) > 10
            assert shutil.disk_usage(disk).free < 20_000
            stays_stopped(budget)
        ballast.unlink()

        holds_after_mending(path, returned)


def test_a_disk_that_is_full_in_memory_stops_charging(tmp_path: Path) -> None:
    """The same on a tmpfs, which runs out of pages in other places."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=400k", "tmpfs") as disk:
        path = disk / "ledger.sqlite"
        prepared(path)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(100_000))
        with Ledger.open(path, KEY) as ledger:
            budget = Budget(ledger)
            returned, error = charge_until_refused(budget)
            assert "full" in str(error)
            assert "Make room" in error.hint
            stays_stopped(budget)
        ballast.unlink()

        holds_after_mending(path, returned)


@pytest.mark.parametrize("room", [0, 1, 4000, 9000, 30_000])
def test_a_limit_on_the_files_size_stops_charging(path: Path, room: int) -> None:
    """Wherever in an entry's pages the write ends: the kernel refuses the rest of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = path.with_name(path.name + "-wal")
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        before = [charge(budget, 1)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + room, limits[1]))
        try:
            returned, error = charge_until_refused(budget, first=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(path) in str(error)
        stays_stopped(budget)

    holds_after_mending(path, before + returned)


def test_a_full_disk_of_the_head_file_stops_charging(path: Path) -> None:
    """The kernel's own full device in the head file's place: the charge is on disk, and nobody was told so."""
    full = os.open("/dev/full", os.O_RDWR)
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, number) for number in range(1, 4)]
        os.dup2(full, ledger._head._file)
        os.close(full)
        with pytest.raises(LedgerError, match=r"head file .* No space left on device") as caught:
            charge(budget, 4)
        assert "space" in caught.value.hint
        stays_stopped(budget)

    holds_after_mending(path, returned)


def test_no_ledger_is_made_on_a_full_disk(tmp_path: Path) -> None:
    """And what is left of the attempt is in nobody's way once there is room."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=40k", "tmpfs") as disk:
        path, ballast = disk / "ledger.sqlite", disk / "ballast"
        ballast.write_bytes(bytes(24_000))
        with pytest.raises(LedgerError, match=r"cannot be (used|written)"):
            Ledger.create(path, KEY, hospital="north")
        ballast.unlink()
        assert not Ledger.begun(path, KEY)


# Read-only


def test_a_disk_that_turns_read_only_stops_charging(tmp_path: Path) -> None:
    """As a kernel does to a disk with errors. It can still be read and audited; it does not open."""
    with small_ext4(tmp_path / "disk", tmp_path / "image") as disk:
        path = disk / "ledger.sqlite"
        prepared(path)
        with Ledger.open(path, KEY) as ledger:
            returned = [charge(Budget(ledger), number) for number in range(1, 4)]

        assert run("mount", "-o", "remount,ro", str(disk)) == 0
        with pytest.raises(LedgerError, match=r"Read-only file system|readonly|read-only"):
            Ledger.open(path, KEY)
        assert verify_ledger(path, [PUBLIC]).charges == 3
        assert run("mount", "-o", "remount,rw", str(disk)) == 0

        holds_after_mending(path, returned)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("folder", "lock .* cannot be opened: Permission denied"),
        ("ledger", "attempt to write a readonly database"),
        ("head", "head file .* cannot be written: Permission denied"),
    ],
)
def test_what_may_not_be_written_does_not_open(what: str, said: str) -> None:
    """Noticed when the hospital starts, and said which file it is; nothing that was charged is lost."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "ledger.sqlite"
        prepared(path)
        with Ledger.open(path, KEY) as ledger:
            returned = [charge(Budget(ledger), 1)]
        for file in folder.iterdir():
            file.chmod(0o666)
        folder.chmod(0o777)
        target = {"folder": folder, "ledger": path, "head": head_path(path)}[what]
        target.chmod(0o555)
        if what == "folder":
            path.with_name(path.name + ".lock").unlink()

        with without_privileges(), pytest.raises(LedgerError, match=said):
            Ledger.open(path, KEY)
        target.chmod(0o777)
        holds_after_mending(path, returned)
    finally:
        shutil.rmtree(folder)


# Another process

HOLDER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process that has begun to write into the database and does not end."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    try:
        yield
    finally:
        holder.communicate(timeout=60)


def test_a_locked_database_stops_charging(path: Path) -> None:
    """At once, without waiting; and it does not open either."""
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, 1), charge(budget, 2)]
        with locked(path):
            with pytest.raises(LedgerError, match="database is locked") as caught:
                charge(budget, 3)
            assert "Another process" in caught.value.hint
            stays_stopped(budget)
    with locked(path), pytest.raises(LedgerError, match="database is locked"):
        Ledger.open(path, KEY)

    holds_after_mending(path, returned)


# The clock


def test_a_clock_that_was_set_back_stops_charging(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both times are named, nothing is written, and with the clock right again the same process goes on."""
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, 1)]
        with monkeypatch.context() as clock:
            clock.setattr(module, "_now", lambda: datetime(2026, 1, 31, 12, 30, tzinfo=UTC) - timedelta(days=3650))
            with pytest.raises(LedgerError, match=rf"2016-02-03T12:30:00Z.* {returned[0].time}: it was set back"):
                charge(budget, 2)
        assert len(read_ledger(path)) == 3
        returned.append(charge(budget, 2))

    holds_after_mending(path, returned)


@pytest.mark.parametrize(("step", "stops"), [(1.0, False), (299.0, False), (301.0, True)])
def test_a_small_step_back_is_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: float, stops: bool
) -> None:
    """Clocks are set right all the time; the chain's times stand still until it has caught up."""
    with Ledger.open(path, KEY) as ledger:
        budget, last = Budget(ledger), ledger.entries()[-1].time
        now = datetime.fromisoformat(last) - timedelta(seconds=step)
        monkeypatch.setattr(module, "_now", lambda: now)
        if stops:
            with pytest.raises(LedgerError, match="it was set back"):
                charge(budget, 1)
        else:
            assert charge(budget, 1).time == last


# A damaged file


def damaged(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
def test_a_corrupted_page_stops_the_hospital(path: Path, where: float) -> None:
    """With the page back in its place, every charge is there."""
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, number) for number in range(1, 120)]
    content = path.read_bytes()
    page = int(where * len(content)) // 4096
    damaged(path, page * 4096, os.urandom(4096))

    with pytest.raises(LedgerError, match=r"malformed|not a database|ledger entry \d+|ends at entry"):
        verify_ledger(path, [PUBLIC])
    with pytest.raises(LedgerError):
        Ledger.open(path, KEY)
    damaged(path, page * 4096, content[page * 4096 : (page + 1) * 4096])

    holds_after_mending(path, returned)


@pytest.mark.parametrize("left", [0, 100, 4096, 4096 * 3 + 7, -4096, -1])
def test_a_file_that_lost_its_end_stops_the_hospital(path: Path, left: int) -> None:
    """As after a copy that was cut off."""
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, number) for number in range(1, 120)]
    content = path.read_bytes()
    path.write_bytes(content[:left])

    with pytest.raises(LedgerError):
        Ledger.open(path, KEY)
    path.write_bytes(content)

    holds_after_mending(path, returned)


def test_a_lost_log_of_recent_writes_stops_the_hospital(path: Path) -> None:
    """SQLite alone would open the shorter history without a word."""
    aside = path.with_name("aside")
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, 1), charge(budget, 2)]
        shutil.copy(path, aside)
        content = aside.read_bytes()
    whole = path.read_bytes()
    path.write_bytes(content)

    with pytest.raises(LedgerError, match="ends at entry 2, but its head file knows entry 4"):
        Ledger.open(path, KEY)
    path.write_bytes(whole)

    holds_after_mending(path, returned)


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_head_file_stops_the_hospital(path: Path, both: bool) -> None:
    """Except for what a power cut does, half of the newest statement, its entry on disk: the next start mends that."""
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        returned = [charge(budget, number) for number in range(1, 4)]
        newest = ledger.seq % 2
    head = head_path(path)
    content = head.read_bytes()
    damaged(head, newest * SLOT_BYTES + 20, os.urandom(80))
    if both:
        damaged(head, (1 - newest) * SLOT_BYTES + 20, os.urandom(80))

    with pytest.raises(LedgerError, match=r"head file"):
        verify_ledger(path, [PUBLIC])
    if both:
        with pytest.raises(LedgerError, match=r"head file .* is damaged"):
            Ledger.open(path, KEY)
        head.write_bytes(content)
    else:
        with closing(Ledger.open(path, KEY)):
            assert head.read_bytes() == content

    holds_after_mending(path, returned)


def test_half_a_head_file_does_not_hide_a_cut(path: Path) -> None:
    """The older half alone would fit a ledger that is one entry shorter."""
    backups = []
    with Ledger.open(path, KEY) as ledger:
        budget = Budget(ledger)
        for number in range(1, 4):
            charge(budget, number)
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA wal_checkpoint(FULL)")
            backups.append(path.read_bytes())
        newest = ledger.seq % 2
    damaged(head_path(path), newest * SLOT_BYTES + 20, os.urandom(80))
    path.write_bytes(backups[1])

    with pytest.raises(LedgerError, match="one half of the head file is damaged"):
        Ledger.open(path, KEY)
