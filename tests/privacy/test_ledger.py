"""What was recorded stays recorded: durable, unchanged, complete, ours; or nothing goes on."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.errors import LedgerError
from shared_models.identity import create_key, public_bytes
from shared_models.privacy.ledger import (
    GENESIS,
    BudgetTerms,
    Entry,
    Ledger,
    Reserved,
    StudyLimit,
    head_path,
    read_head,
    read_ledger,
    snapshot,
    verify_entries,
    verify_head,
)
from shared_models.privacy.mechanisms import PoissonGaussian

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = public_bytes(KEY)
TERMS = BudgetTerms(epsilon=1.0, delta=1e-4, order=20, public_size=100)
MECHANISM = PoissonGaussian(sample_rate=0.2, noise_multiplier=8.8, steps=5, clip=1.0, expected_batch=20.0)
STUDY = {"study": "heart", "plan_digest": "ab" * 32}
CHARGES = 6


def open_budget(ledger: Ledger) -> None:
    ledger.append("budget-opened", population="all", budget=TERMS, public_key=ledger.public_key.hex())


def charge(ledger: Ledger, number: int) -> Entry:
    return ledger.append(
        "charge",
        **STUDY,
        population="all",
        round=number,
        attempt=1,
        mechanism=MECHANISM,
        parameters_digest="cd" * 32,
    )


def filled(folder: Path, key: Ed25519PrivateKey = KEY) -> Path:
    """A closed ledger: budget, approval, charges."""
    path = folder / "ledger.sqlite"
    with Ledger.create(path, key, hospital="north") as ledger:
        open_budget(ledger)
        ledger.append(
            "plan-approved",
            **STUDY,
            population="all",
            limit=StudyLimit(epsilon=1.0, delta=1e-4),
            reservation=(Reserved(mechanism=MECHANISM, charges=20),),
        )
        for number in range(1, CHARGES + 1):
            charge(ledger, number)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return filled(tmp_path)


def change(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    """What somebody with a text book on SQLite can do to the file."""
    with closing(sqlite3.connect(path)) as database:
        for trigger in ("no_update", "no_delete"):
            database.execute(f"DROP TRIGGER {trigger}")
        for statement, values in statements:
            database.execute(statement, values)
        database.commit()


def check(path: Path) -> list[Entry]:
    """What both the hospital and an auditor check."""
    entries = read_ledger(path)
    verify_head(read_head(head_path(path)), verify_entries(entries, PUBLIC))
    return entries


# The honest life of a ledger


def test_entries_come_back_as_they_were_appended(path: Path) -> None:
    """Same fields, same hashes; the chain goes on from where it was."""
    with Ledger.open(path, KEY) as ledger:
        before = ledger.entries()
        new = charge(ledger, CHARGES + 1)

    assert read_ledger(path) == [*before, new]
    assert [entry.seq for entry in check(path)] == list(range(1, CHARGES + 4))
    assert new.previous_hash == before[-1].hash
    assert new.mechanism == MECHANISM
    assert before[0].previous_hash == GENESIS
    assert {entry.hospital for entry in before} == {"north"}


def test_an_appended_entry_is_on_disk_before_append_returns(path: Path) -> None:
    """Another reader sees it at once, and the head file names it."""
    with Ledger.open(path, KEY) as ledger:
        entry = charge(ledger, CHARGES + 1)

        assert read_ledger(path)[-1] == entry
        assert read_head(head_path(path)).hash == entry.hash == ledger.head


def test_sqlite_is_told_to_reach_the_disk(path: Path) -> None:
    """FULL is 2; with NORMAL a power cut could take back a commit in WAL mode."""
    with Ledger.open(path, KEY) as ledger:
        assert ledger._database.execute("PRAGMA synchronous").fetchone() == (2,)
        assert ledger._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_copy_of_a_ledger_in_use_can_be_audited(path: Path, tmp_path: Path) -> None:
    """With its write-ahead log, which holds the newest entries."""
    copy = tmp_path / "copy"
    copy.mkdir()
    with Ledger.open(path, KEY) as ledger:
        charge(ledger, CHARGES + 1)
        for file in (path, path.with_name(path.name + "-wal"), head_path(path)):
            shutil.copy(file, copy)

    assert len(check(copy / path.name)) == CHARGES + 3


def test_auditing_leaves_no_trace(path: Path) -> None:
    """No helper file beside the evidence, and not a bit changed."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    read_ledger(path)

    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_updates_and_deletions_are_refused_by_the_database_itself(path: Path) -> None:
    """Against accidents; the chain is against intent."""
    with closing(sqlite3.connect(path)) as database:
        for statement in ("UPDATE entries SET seq = seq + 100", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                database.execute(statement)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("charge", {**STUDY, "round": 1, "attempt": 1}),
        ("charge", {**STUDY, "round": 0, "attempt": 1, "mechanism": MECHANISM}),
        ("a-kind-of-our-own", {}),
        ("checkpoint", {"patient": "4711"}),
        ("study-closed", {"study": "Not A Name", "plan_digest": "ab" * 32, "population": "all"}),
    ],
    ids=["incomplete", "out of range", "unknown kind", "unknown field", "no name"],
)
def test_an_invalid_entry_is_not_written(path: Path, kind: str, fields: dict[str, object]) -> None:
    """And the ledger stays usable: nothing happened."""
    with Ledger.open(path, KEY) as ledger:
        with pytest.raises(LedgerError, match="no valid entry"):
            ledger.append(kind, **fields)  # type: ignore[arg-type]  # the point of the test

        assert charge(ledger, CHARGES + 1).seq == CHARGES + 3


# Tampering


Change = Callable[[list[tuple[int, bytes, bytes]]], tuple[str, tuple[object, ...]]]
TAMPERING: dict[str, Change] = {
    "the first entry removed": lambda _: ("DELETE FROM entries WHERE seq = 1", ()),
    "one in the middle removed": lambda _: ("DELETE FROM entries WHERE seq = 4", ()),
    "the last removed": lambda rows: ("DELETE FROM entries WHERE seq = ?", (len(rows),)),
    "half of them removed": lambda _: ("DELETE FROM entries WHERE seq > 4", ()),
    "all removed": lambda _: ("DELETE FROM entries", ()),
    "an old one repeated": lambda rows: (
        "INSERT INTO entries VALUES (?, ?, ?, ?)",
        (len(rows) + 1, *rows[3][1:3], bytes(32)),
    ),
    "one before the first": lambda rows: ("INSERT INTO entries VALUES (0, ?, ?, ?)", (*rows[0][1:3], bytes(32))),
    "less noise claimed": lambda _: (
        "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), '8.8', '9.8') AS BLOB) WHERE seq = 4",
        (),
    ),
    "the same in another notation": lambda _: ("UPDATE entries SET body = CAST(body || ' ' AS BLOB) WHERE seq = 4", ()),
    "a field added": lambda _: (
        "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), ?, ?) AS BLOB) WHERE seq = 4",
        ('{"att', '{"aaa":1,"att'),
    ),
    "signatures exchanged": lambda rows: ("UPDATE entries SET signature = ? WHERE seq = 4", (rows[5][2],)),
    "a signature cut": lambda rows: ("UPDATE entries SET signature = ? WHERE seq = 4", (rows[3][2][:-1],)),
    "not JSON": lambda _: ("UPDATE entries SET body = x'ff' WHERE seq = 4", ()),
}


@pytest.mark.parametrize("tamper", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_found(path: Path, tamper: Change) -> None:
    """By an auditor, and by the hospital before it trains again."""
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT seq, body, signature FROM entries ORDER BY seq").fetchall()
    change(path, tamper(rows))

    with pytest.raises(LedgerError, match=r"ledger entry \d+|ends at entry"):
        check(path)
    with pytest.raises(LedgerError):
        Ledger.open(path, KEY)


@given(order=st.permutations(range(1, CHARGES + 3)))
@settings(max_examples=25, deadline=None)
def test_reordering_is_found(order: list[int]) -> None:
    """Any permutation but the true one."""
    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder))
        moves: list[tuple[str, tuple[object, ...]]] = [("UPDATE entries SET seq = -seq", ())]
        moves += [("UPDATE entries SET seq = ? WHERE seq = ?", (new, -old)) for old, new in enumerate(order, start=1)]
        change(path, *moves)

        if order != sorted(order):
            with pytest.raises(LedgerError, match=r"ledger entry \d+"):
                check(path)


class Good:
    """The bytes of a good ledger and of its head file, and what they say."""

    def __init__(self, path: Path) -> None:
        self.database, self.head = path.read_bytes(), head_path(path).read_bytes()
        self.entries = read_ledger(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(filled(tmp_path_factory.mktemp("good")))


def check_bytes(database: bytes, head: bytes) -> list[Entry]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        path.write_bytes(database)
        head_path(path).write_bytes(head)
        return check(path)


@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4))
@settings(max_examples=400, deadline=None)
def test_a_mutated_file_is_refused_or_says_the_same(good: Good, seed: int, changes: int) -> None:
    """Any bytes anywhere in the file: no mutation changes what is read and goes unnoticed."""
    database, head, entries = good.database, good.head, good.entries
    draw, mutated = random.Random(seed), bytearray(database)
    for _ in range(changes):
        mutated[draw.randrange(len(mutated))] = draw.randrange(256)

    try:
        read = check_bytes(bytes(mutated), head)
    except LedgerError:
        return
    assert read == entries


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_mutated_entry_is_refused(good: Good, seed: int) -> None:
    """Any bit of any entry's body or signature, wherever SQLite keeps it."""
    database, head, entries = good.database, good.head, good.entries
    draw, mutated = random.Random(seed), bytearray(database)
    entry = draw.choice(entries)
    part = draw.choice([entry.canonical, bytes.fromhex(entry.signature)])
    mutated[database.index(part) + draw.randrange(len(part))] ^= 1 << draw.randrange(8)

    with pytest.raises(LedgerError):
        check_bytes(bytes(mutated), head)


@given(size=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_refused(good: Good, size: int) -> None:
    """At whatever byte it ends."""
    database, head = good.database, good.head

    with pytest.raises(LedgerError):
        check_bytes(database[: size % len(database)], head)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_mutated_head_file_is_refused(good: Good, seed: int) -> None:
    """Else a truncation could hide behind it."""
    database, head = good.database, good.head
    draw, mutated = random.Random(seed), bytearray(head)
    mutated[draw.randrange(len(mutated))] ^= 1 << draw.randrange(8)

    with pytest.raises(LedgerError):
        check_bytes(database, bytes(mutated))


# Whose ledger, how long


def test_another_key_does_not_open_a_ledger(path: Path) -> None:
    """A hospital continues its own ledger only."""
    with pytest.raises(LedgerError, match="entry 1: it is not signed by"):
        Ledger.open(path, OTHER_KEY)


def test_an_empty_ledger_belongs_to_its_key_too(tmp_path: Path) -> None:
    """The signed head file says whose it is before the first entry does."""
    Ledger.create(tmp_path / "l", KEY, hospital="north").close()

    with pytest.raises(LedgerError, match="head file is not signed"):
        Ledger.open(tmp_path / "l", OTHER_KEY)


def test_entries_signed_by_somebody_else_do_not_continue_a_chain(path: Path, tmp_path: Path) -> None:
    """Even if every hash is right."""
    (tmp_path / "other").mkdir()
    entries = read_ledger(path)
    foreign = read_ledger(filled(tmp_path / "other", OTHER_KEY))

    with pytest.raises(LedgerError, match="entry 1: it is not signed"):
        verify_entries(foreign, PUBLIC)
    with pytest.raises(LedgerError, match="entry 5: it does not follow"):
        verify_entries([*entries[:4], *foreign[4:]], PUBLIC)


def test_a_restored_backup_refunds_nothing(path: Path) -> None:
    """Shorter than the head file says: refused, with both numbers."""
    backup = path.read_bytes()
    with Ledger.open(path, KEY) as ledger:
        charge(ledger, CHARGES + 1)
    path.write_bytes(backup)

    with pytest.raises(LedgerError, match="ends at entry 8, but its head file knows entry 9"):
        Ledger.open(path, KEY)


def test_a_lost_write_ahead_log_is_noticed(path: Path, tmp_path: Path) -> None:
    """A copy of the main file alone misses the newest entries."""
    (tmp_path / "copy").mkdir()
    with Ledger.open(path, KEY) as ledger:
        charge(ledger, CHARGES + 1)
        for file in (path, head_path(path)):
            shutil.copy(file, tmp_path / "copy")

    with pytest.raises(LedgerError, match="ends at entry 8, but its head file knows entry 9"):
        Ledger.open(tmp_path / "copy" / path.name, KEY)


def test_a_branched_ledger_is_noticed(path: Path, tmp_path: Path) -> None:
    """As long as the head file says, signed and chained, but another history since the backup."""
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in (path, head_path(path)):
        shutil.copy(file, backup)
    with Ledger.open(path, KEY) as ledger:
        charge(ledger, CHARGES + 1)
    with Ledger.open(backup / path.name, KEY) as ledger:
        charge(ledger, CHARGES + 2)
    shutil.copy(backup / path.name, path)

    with pytest.raises(LedgerError, match="entry 9: it is not the one that the head file knows"):
        Ledger.open(path, KEY)


def test_another_hospitals_name_on_the_file_is_noticed(path: Path) -> None:
    """New entries would carry it."""
    change(path, ("UPDATE about SET value = 'south'", ()))

    with pytest.raises(LedgerError, match="belongs to north, the file says south"):
        Ledger.open(path, KEY)


def test_a_chain_of_another_hospital_or_without_a_budget_is_no_ledger(tmp_path: Path) -> None:
    """Signatures alone do not make one."""
    with Ledger.create(tmp_path / "l", KEY, hospital="north") as ledger:
        charge(ledger, 1)
    with pytest.raises(LedgerError, match="opens exactly one budget, in its first entry"):
        Ledger.open(tmp_path / "l", KEY)

    with Ledger.create(tmp_path / "m", KEY, hospital="north") as ledger:
        ledger.append("budget-opened", population="all", budget=TERMS, public_key="ee" * 32)
    with pytest.raises(LedgerError, match="names another public key"):
        Ledger.open(tmp_path / "m", KEY)


# Failing closed


def test_a_missing_ledger_is_never_made_anew(path: Path) -> None:
    """Neither by opening it nor by creating it while its head file remembers."""
    path.unlink()

    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger.open(path, KEY)
    with pytest.raises(LedgerError, match="has, or had, a ledger"):
        Ledger.create(path, KEY, hospital="north")
    with pytest.raises(LedgerError, match="there is no ledger"):
        read_ledger(path)


def test_a_ledger_is_created_once(path: Path) -> None:
    """The old one stays as it was."""
    with pytest.raises(LedgerError, match="has, or had, a ledger"):
        Ledger.create(path, KEY, hospital="north")

    assert len(check(path)) == CHARGES + 2


def test_without_its_head_file_a_ledger_does_not_open(path: Path) -> None:
    """Nobody could say whether entries are missing at its end."""
    head_path(path).unlink()

    with pytest.raises(LedgerError, match=r"head file .* is missing"):
        Ledger.open(path, KEY)


def test_a_head_file_can_lie_elsewhere(tmp_path: Path) -> None:
    """On another disk, which a backup of the first does not restore."""
    elsewhere = tmp_path / "elsewhere"
    with Ledger.create(tmp_path / "l", KEY, hospital="north", head=elsewhere) as ledger:
        open_budget(ledger)

    assert read_head(elsewhere).seq == 1
    assert not head_path(tmp_path / "l").exists()
    Ledger.open(tmp_path / "l", KEY, head=elsewhere).close()


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + bytes(100)])
def test_what_is_no_database_is_a_ledger_error(path: Path, content: bytes) -> None:
    """Never an exception of SQLite's, and the file is not repaired or replaced."""
    path.write_bytes(content)

    with pytest.raises(LedgerError):
        Ledger.open(path, KEY)

    assert path.read_bytes() == content


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write anywhere; be nobody for a while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own ones are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


@pytest.mark.parametrize("read_only", ["folder", "ledger", "head"])
def test_a_ledger_that_cannot_be_written_does_not_open(open_folder: Path, read_only: str) -> None:
    """Noticed at the start of the day, not at the first charge; an auditor can still read it."""
    path, head = open_folder / "ledger.sqlite", open_folder / "head"
    with without_privileges(), Ledger.create(path, KEY, hospital="north", head=head) as ledger:
        open_budget(ledger)
    {"folder": open_folder, "ledger": path, "head": head}[read_only].chmod(0o555)

    with without_privileges():
        with pytest.raises(LedgerError, match=r"writable|written|readonly|read-only|cannot be"):
            Ledger.open(path, KEY, head=head)
        assert len(read_ledger(path)) == 1


def test_a_full_disk_stops_the_ledger(path: Path) -> None:
    """The append fails, and every later one: nobody knows what the disk holds. What was returned before is there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger.open(path, KEY) as ledger:
        charge(ledger, CHARGES + 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name(path.name + "-wal").stat().st_size + 10, limits[1]))
        try:
            with pytest.raises(LedgerError, match="cannot be used"):
                charge(ledger, CHARGES + 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(LedgerError, match="failed before"):
            charge(ledger, CHARGES + 2)

    with Ledger.open(path, KEY) as ledger:
        assert ledger.entries()[-1].round == CHARGES + 1


def test_a_head_file_that_cannot_be_written_stops_the_ledger(path: Path) -> None:
    """The entry is on disk by then, so it counts: one too many, never one too few."""
    full = os.open("/dev/full", os.O_RDWR)
    with Ledger.open(path, KEY) as ledger:
        os.dup2(full, ledger._head._file)
        with pytest.raises(LedgerError, match=r"head file .* cannot be written: No space left on device"):
            charge(ledger, CHARGES + 1)
        with pytest.raises(LedgerError, match="failed before"):
            charge(ledger, CHARGES + 2)
    os.close(full)

    with Ledger.open(path, KEY) as ledger:
        assert ledger.entries()[-1].round == CHARGES + 1


@pytest.mark.parametrize("which", ["ledger", "head file"])
def test_a_file_that_is_removed_in_use_stops_the_ledger(path: Path, which: str) -> None:
    """Writing to what has no name any more would succeed, and keep nothing."""
    file = {"ledger": path, "head file": head_path(path)}[which]
    with Ledger.open(path, KEY) as ledger:
        file.rename(file.with_name("aside"))
        with pytest.raises(LedgerError, match="removed or replaced while in use"):
            charge(ledger, CHARGES + 1)


def test_a_closed_ledger_takes_nothing(path: Path) -> None:
    """And closing twice is closing once."""
    ledger = Ledger.open(path, KEY)
    ledger.close()
    ledger.close()

    with pytest.raises(LedgerError, match="closed"):
        charge(ledger, CHARGES + 1)


# Other processes


WRITER = """
import os, signal, sys
from pathlib import Path
from shared_models.identity import load_key
from shared_models.privacy import ledger as module
from shared_models.privacy.head import HeadWriter
from shared_models.privacy.ledger import Ledger
from tests.privacy.test_ledger import charge

def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

ledger = Ledger.open(Path(sys.argv[1]), load_key(Path(sys.argv[2])))
print("open", flush=True)
number = len(ledger.entries())
if sys.argv[3] == "loop":
    while True:
        number += 1
        print(charge(ledger, number).seq, flush=True)
print(charge(ledger, number + 1).seq, flush=True)
match sys.argv[3]:
    case "wait":
        sys.stdin.read()
    case "before signing":
        Ledger._sign = die
    case "before the insert":
        module._explained = die
    case "before the commit":
        ledger._database.set_trace_callback(lambda statement: die() if statement.startswith("COMMIT") else None)
    case "before the head file":
        HeadWriter.write = die
    case "within the head file":
        pwrite = os.pwrite
        os.pwrite = lambda file, slot, place: (pwrite(file, slot[:80], place), die())
    case "before the head file is durable":
        os.fdatasync = die
charge(ledger, number + 2)
"""

KILLED_AT = {
    "before signing": 0,
    "before the insert": 0,
    "before the commit": 0,
    "before the head file": 1,
    "within the head file": 1,
    "before the head file is durable": 1,
}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def theirs(tmp_path: Path, key_file: Path) -> tuple[Path, Ed25519PrivateKey]:
    """A ledger whose key a child process can load."""
    from shared_models.identity import load_key

    key = load_key(key_file)
    folder = tmp_path / "theirs"
    folder.mkdir()
    return filled(folder, key), key


def writer(path: Path, key_file: Path, mode: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(key_file), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_one_process_writes_at_a_time(theirs: tuple[Path, Ed25519PrivateKey], key_file: Path) -> None:
    """A second one is told so at once; when the first is killed, nothing has to be cleaned up."""
    path, key = theirs
    child = writer(path, key_file, "wait")
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"

    with pytest.raises(LedgerError, match="in use by another process"):
        Ledger.open(path, key)

    child.kill()
    child.communicate()
    Ledger.open(path, key).close()


def test_this_process_opens_a_ledger_once(path: Path) -> None:
    """Two objects would each continue the chain."""
    with Ledger.open(path, KEY), pytest.raises(LedgerError, match="in use"):
        Ledger.open(path, KEY)


def test_a_forked_child_cannot_append(path: Path) -> None:
    """It would write beside its parent, with a lock that both believe to hold."""
    with Ledger.open(path, KEY) as ledger:
        child = os.fork()
        if not child:
            try:
                charge(ledger, CHARGES + 1)
            except LedgerError:
                os._exit(7)
            os._exit(0)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert charge(ledger, CHARGES + 1).seq == CHARGES + 3


def test_a_ledger_in_use_is_read_as_of_one_moment(theirs: tuple[Path, Ed25519PrivateKey], key_file: Path) -> None:
    """Ledger and head file are two files, and an entry is written to one after the other: no false alarm."""
    path, key = theirs
    child = writer(path, key_file, "loop")
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    lengths, draw = [], random.Random(7)
    try:
        for _ in range(40):
            child.send_signal(signal.SIGCONT)
            child.stdout.readline()  # it writes
            time.sleep(draw.uniform(0, 0.01))  # and is anywhere between two entries
            with snapshot(path, head_path(path)) as (head, entries):
                child.send_signal(signal.SIGSTOP)  # the moment is fixed; else the ledger grows while it is verified
                assert head is not None
                chain = verify_entries(entries, public_bytes(key))
                verify_head(head, chain)
            lengths.append(chain.seq)
    finally:
        child.kill()
        child.communicate()

    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]


def test_a_writer_killed_at_any_moment_loses_nothing(theirs: tuple[Path, Ed25519PrivateKey], key_file: Path) -> None:
    """Every entry whose append returned is there; at most one more is: over-counted by one, never under-counted."""
    path, key = theirs
    draw = random.Random(7)
    for _ in range(6):
        child = writer(path, key_file, "loop")
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        returned = [int(child.stdout.readline()) for _ in range(draw.randrange(1, 12))]
        child.send_signal(signal.SIGKILL)
        returned += [int(line) for line in child.communicate()[0].split()]

        with Ledger.open(path, key) as ledger:
            assert len(ledger.entries()) - returned[-1] in {0, 1}
            assert returned == list(range(returned[0], returned[-1] + 1))


@pytest.mark.parametrize(("moment", "more"), KILLED_AT.items(), ids=KILLED_AT.keys())
def test_a_writer_killed_at_each_step_leaves_a_ledger_that_opens(
    theirs: tuple[Path, Ed25519PrivateKey], key_file: Path, moment: str, more: int
) -> None:
    """The commit is what counts: before it the entry never was, after it it stays."""
    path, key = theirs
    child = writer(path, key_file, moment)
    lines = child.communicate(timeout=60)[0].split()
    assert child.returncode == -signal.SIGKILL

    with Ledger.open(path, key) as ledger:
        assert len(ledger.entries()) == int(lines[-1]) + more
        assert read_head(head_path(path)).seq == len(ledger.entries())
        charge(ledger, 99)


CREATOR = """
import os, signal, sys
from pathlib import Path
from shared_models.identity import load_key
from shared_models.privacy import ledger as module
from shared_models.privacy.ledger import Ledger

def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

match sys.argv[3]:
    case "before the tables":
        module._make_tables = die
    case "before the head file":
        module.create_head = die
    case "before it has its name":
        Path.replace = lambda *_: die() if _[0].name == "ledger.sqlite.new" else os.replace(*_)
    case "before the folder is durable":
        module.sync_folder = die
Ledger.create(Path(sys.argv[1]), load_key(Path(sys.argv[2])), hospital="north")
"""


@pytest.mark.parametrize(
    "moment", ["before the tables", "before the head file", "before it has its name", "before the folder is durable"]
)
def test_a_creation_killed_at_each_step_can_be_repeated(tmp_path: Path, key_file: Path, moment: str) -> None:
    """Nothing was spent, and nobody has to clean up."""
    from shared_models.identity import load_key

    path, key = tmp_path / "ledger.sqlite", load_key(key_file)
    child = subprocess.run([sys.executable, "-c", CREATOR, str(path), str(key_file), moment], check=False)
    assert child.returncode == -signal.SIGKILL

    begun = Ledger.begun(path, key)

    assert begun == (moment == "before the folder is durable")
    with Ledger.open(path, key) if begun else Ledger.create(path, key, hospital="north") as ledger:
        open_budget(ledger)
    assert len(read_ledger(path)) == 1


def test_a_head_file_of_another_key_is_no_creation_cut_off(tmp_path: Path) -> None:
    """Whoever changed the key must not get a second budget by it."""
    Ledger.create(tmp_path / "l", OTHER_KEY, hospital="north").close()
    (tmp_path / "l").unlink()

    with pytest.raises(LedgerError, match="has, or had, a ledger"):
        Ledger.create(tmp_path / "l", KEY, hospital="north")
