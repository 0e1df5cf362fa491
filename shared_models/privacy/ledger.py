"""The privacy ledger's file, both halves: appending entries that cannot be taken back, and reading them as they lie.

One SQLite file per hospital holds signed entries, each with the hash of the one before. A head file beside it (or
elsewhere) names the newest entry, so that a chain that was cut at its end is noticed too. It fails closed: whatever is
wrong with it is a ``LedgerError``, and training stops. Nothing here holds more than a few entries in memory.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from shared_models.config import explain
from shared_models.durable import file_identity, sync_file, sync_folder
from shared_models.errors import LedgerError
from shared_models.identity import fingerprint, public_bytes, sign
from shared_models.privacy.entries import (
    GENESIS,
    KINDS,
    BudgetTerms,
    Chain,
    Entry,
    Kind,
    Reserved,
    StudyLimit,
    following,
    parse_entry,
    possession,
    verify_entries,
    verify_head,
    wrong,
)
from shared_models.privacy.head import Head, HeadWriter, create_head, head_path, read_head
from shared_models.versions import refuse_entry

# Whoever needs a ledger needs its entries too, and finds both here.
__all__ = [
    "CLOCK_TOLERANCE",
    "GENESIS",
    "BudgetTerms",
    "Chain",
    "Entry",
    "Head",
    "Ledger",
    "Reserved",
    "StudyLimit",
    "head_path",
    "read_head",
    "read_hospital",
    "read_ledger",
    "snapshot",
    "stream_ledger",
    "unused",
    "verified",
    "verify_entries",
    "verify_head",
]

_COLUMNS = "seq, body, signature, hash"
CLOCK_TOLERANCE = timedelta(minutes=5)  # a clock that was set right may have stepped back by so much


class Ledger:
    """A hospital's own ledger, open for appending by this process alone.

    Use ``create`` once and ``open`` from then on; a context manager.

    Guarantees:
        * ``append`` returns after the entry is on disk (WAL, ``synchronous=FULL``), and the head file too.
        * A process killed at any point leaves a ledger that opens again, with every entry that ``append`` returned, and
          at most one more.
        * After any failure to append, this object refuses to go on; a clock that is wrong, or fields that do not fit,
          write nothing and break nothing.
        * Memory does not grow with the number of entries.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, chain: Chain, hospital: str, lock: int) -> None:
        self.path, self.hospital = path, hospital
        self.public_key = public_bytes(key)
        self._key, self._chain, self._lock = key, chain, lock
        self._process, self._turn, self._failed = os.getpid(), threading.RLock(), False

    @classmethod
    def create(cls, path: Path, key: Ed25519PrivateKey, *, hospital: str, head: Path | None = None) -> "Ledger":
        """Make an empty ledger and open it. Killed at any point, it can be called again.

        Args:
            path: The SQLite file to make.
            key: Signs every entry.
            hospital: The hospital's registered name, part of every entry.
            head: The head file; ``PATH.head`` unless told otherwise. Another disk protects against one restored backup.

        Raises:
            LedgerError: There is a ledger, or the head file of one that is gone: what it spent is not forgotten.
        """
        head = head or head_path(path)
        lock = _lock(path)
        try:
            if cls.begun(path, key, head=head):
                raise LedgerError(
                    f"{path if path.exists() else head} exists: this hospital has, or had, a ledger",
                    hint="Open it; or restore the ledger that belongs to the head file. A budget is opened once.",
                )
            new = path.with_name(f"{path.name}.new")
            with _explained(path):
                for left_over in (new, new.with_name(f"{new.name}-wal"), new.with_name(f"{new.name}-shm")):
                    left_over.unlink(missing_ok=True)
                with closing(_connect(new)) as database:
                    _make_tables(database, hospital)
                sync_file(new)
            create_head(head, key, genesis=GENESIS)
            with _explained(path):
                new.replace(path)  # last: from here on there is a ledger
                sync_folder(path.parent)
        finally:
            os.close(lock)
        return cls.open(path, key, head=head)

    @staticmethod
    def begun(path: Path, key: Ed25519PrivateKey, *, head: Path | None = None) -> bool:
        """Whether there is, or was, a ledger here that must be opened and not created.

        A head file of ours that knows no entry, without a ledger, is a creation that was cut off: nothing was spent.
        """
        head = head or head_path(path)
        if path.exists() or path.with_name(f"{path.name}-wal").exists():
            return True
        if not head.exists():
            return False
        known = read_head(head)
        return known.seq > 0 or not known.statements[0].signed_by(public_bytes(key))

    @classmethod
    def open(cls, path: Path, key: Ed25519PrivateKey, *, head: Path | None = None) -> "Ledger":
        """Open an existing ledger for appending, after checking all of it.

        Raises:
            LedgerError: It is missing, locked by another process, unwritable, or damaged; an entry was changed,
                removed, inserted or moved; it belongs to another key, or its key was rotated; or it is shorter than its
                head file says.
        """
        head = head or head_path(path)
        if not path.is_file():
            raise LedgerError(
                f"there is no ledger at {path}", hint="Restore it. Without its ledger a hospital trains nothing."
            )
        lock = _lock(path)
        try:
            chain = verify_entries(stream_ledger(path))
            with _reading(path) as database:
                _refuse_damage(database)
            if not chain.seq:
                chain = Chain(public_bytes(key))
            verify_head(read_head(head), chain, own_key=public_bytes(key), half_written=True)
            ledger = cls(path, key, chain, read_hospital(path), lock)
            ledger._refuse_if_not_ours()
            ledger._begin(head)
        except BaseException:
            os.close(lock)
            raise
        return ledger

    def _refuse_if_not_ours(self) -> None:
        _refuse_other_key(self._chain, self.public_key)
        if self.first is not None and self.first.hospital != self.hospital:
            raise wrong(1, f"it belongs to {self.first.hospital}, the file says {self.hospital}")

    def _begin(self, head: Path) -> None:
        """Connect for writing, and prove at once that both files can be written."""
        with _explained(self.path):
            self._database = _connect(self.path)
            self._identity = file_identity(self.path)
        try:
            with _explained(self.path):
                self._database.execute("BEGIN IMMEDIATE")
                # To begin is not enough: SQLite quietly begins a read-only transaction on a read-only file.
                self._database.execute("UPDATE about SET value = value")
                self._database.execute("ROLLBACK")
            self._head = HeadWriter(head)
        except BaseException:
            self._database.close()
            raise
        try:
            # A process that was killed between the two files has left a head that is one entry behind.
            self._head.write(self._key, seq=self.seq, entry_hash=self.head)
        except BaseException:
            self._head.close()
            self._database.close()
            raise

    @property
    def seq(self) -> int:
        """Number of the newest entry; 0 when there is none."""
        return self._chain.seq

    @property
    def head(self) -> str:
        """Hash of the newest entry; ``GENESIS`` when there is none."""
        return self._chain.hash

    @property
    def first(self) -> Entry | None:
        """The entry that opened the budget; None when there is none."""
        return self._chain.first

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Public keys that have signed entries, or sign the next, in the order in which they came into force."""
        return tuple(self._chain.keys)

    def stream(self) -> Iterator[Entry]:
        """All entries, oldest first, one at a time, as they are when this is called."""
        return stream_ledger(self.path)

    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first, at once: for ledgers known to be small."""
        return tuple(self.stream())

    def find(self, entry_hash: str) -> Entry | None:
        """The entry with this hash, if it is in the ledger; by an index.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        with _reading(self.path) as database:
            row = database.execute(
                f"SELECT {_COLUMNS} FROM entries WHERE hash = ?",  # noqa: S608 - a constant
                (bytes.fromhex(entry_hash),),
            ).fetchone()
        return None if row is None else _read_row(row)

    def append(self, kind: Kind, **fields: Any) -> Entry:
        """Write one entry; durable before this returns.

        Args:
            kind: What happened; for ``key-rotated`` there is ``rotate``.
            fields: Fields of ``Entry`` that an event of this kind has.

        Raises:
            LedgerError: The fields do not fit the kind, or the clock was set back, and nothing was written; or the
                entry could not be written, and nothing more will be.
        """
        if kind == "key-rotated":
            raise LedgerError("a key is not rotated by an entry alone", hint="Use rotate: the new key has to agree.")
        with self._turn:
            self._refuse_if_unusable()
            entry = self._sign(kind, fields)
            self._write(entry, self._key)
            return entry

    def rotate(self, new_key: Ed25519PrivateKey) -> Entry:
        """Hand the ledger over to a new key, which signs from the next entry on; the old one opens it no more.

        Raises:
            LedgerError: The new key was in use before; else as ``append``.
        """
        with self._turn:
            self._refuse_if_unusable()
            new = public_bytes(new_key)
            if new in self._chain.keys:
                raise LedgerError("this key was in use before", hint="Make a new one; an old key never comes back.")
            if not self.seq:
                raise LedgerError("the ledger is empty", hint="Open the budget first; or create it with the new key.")
            agreed = possession(self.hospital, seq=self.seq + 1, previous_hash=self.head, new_public_key=new)
            proof = sign(new_key, "ledger-key", agreed)
            entry = self._sign("key-rotated", {"new_public_key": new.hex(), "new_key_signature": proof.hex()})
            self._chain.keys.append(new)
            self._write(entry, new_key)
            self._key, self.public_key = new_key, new
            return entry

    def _write(self, entry: Entry, next_key: Ed25519PrivateKey) -> None:
        """Both files, the entry first: killed between the two, a charge counts that nobody was told of."""
        self._failed = True  # until both files are safe
        with _explained(self.path):
            if file_identity(self.path) != self._identity:
                raise OSError("it was removed or replaced while in use")
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(
                "INSERT INTO entries (seq, body, signature, hash) VALUES (?, ?, ?, ?)",
                (entry.seq, entry.canonical, bytes.fromhex(entry.signature), bytes.fromhex(entry.hash)),
            )
            self._database.execute("COMMIT")
        self._chain.take(entry)
        self._head.write(next_key, seq=entry.seq, entry_hash=entry.hash)
        self._failed = False

    def _refuse_if_unusable(self) -> None:
        if self._process != os.getpid():
            raise LedgerError("this ledger was opened by another process", hint="Open it in the process that writes.")
        if self._failed:
            raise LedgerError(
                f"the ledger {self.path} is closed, or failed before", hint="Mend the cause and restart the hospital."
            )

    def _sign(self, kind: Kind, fields: Mapping[str, Any]) -> Entry:
        """The next entry of the chain, complete and validated; nothing is written."""
        now = _next_time(self._chain.time)
        fixed = {"seq": self.seq + 1, "previous_hash": self.head, "time": now, "hospital": self.hospital}
        try:
            unsigned = Entry.model_validate({"kind": kind, **fields, **fixed, "signature": "0" * 128})
            body = unsigned.canonical
            # Read back as it will be read from the disk: a model that was made without validation must not get there.
            entry = parse_entry(body, sign(self._key, "ledger-entry", body))
            entry.__dict__["canonical"] = body  # what the property would compute again
        except (ValidationError, TypeError, ValueError) as error:
            text = explain(error) if isinstance(error, ValidationError) else str(error)
            raise LedgerError(f"no valid entry of kind {kind}: {text}", hint="Nothing was written.") from None
        return entry

    def close(self) -> None:
        """Let go of the files and of the lock; can be called twice."""
        with self._turn:
            self._failed = True
            if self._lock < 0 or self._process != os.getpid():
                return
            with suppress(sqlite3.Error):
                self._database.close()
            self._head.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream_ledger(path: Path) -> Iterator[Entry]:
    """Read a ledger entry by entry, without a key and without changing it.

    Every body must be canonical and agree with its row; whether the entries belong together and to whom is
    ``verify_entries``'s question.

    Raises:
        LedgerError: It is missing, unreadable or damaged; the message names the entry.
    """
    with _reading(path) as database:
        yield from _rows(database)


def read_ledger(path: Path) -> list[Entry]:
    """All entries that ``stream_ledger`` gives, at once: for ledgers known to be small."""
    return list(stream_ledger(path))


@contextmanager
def snapshot(path: Path, head: Path) -> Iterator[tuple[Head | None, Iterator[Entry]]]:
    """A ledger and its head file as of one moment, also while its hospital appends: for whoever does not hold the lock.

    Returns:
        What the head file says, None if there is none; and the entries, oldest first, to be read once.

    Raises:
        LedgerError: As ``stream_ledger`` and ``read_head``.
    """
    with _reading(path) as database:
        for _ in range(100):
            known = read_head(head) if head.exists() else None
            database.execute("BEGIN")
            database.execute("SELECT count(*) FROM about").fetchone()  # reading is what fixes the moment
            if known == (read_head(head) if head.exists() else None):
                break
            database.execute("ROLLBACK")  # an entry was written in between
        yield known, _rows(database)
        _refuse_damage(database)


def verified(path: Path, public_key: bytes) -> Iterator[Entry]:
    """Read our own ledger entry by entry without locking it, each once it is known to follow.

    Raises:
        LedgerError: As ``stream_ledger`` and ``Chain.follow``; or, at the end, its newest key is not this one.
    """
    chain = Chain()
    yield from following(stream_ledger(path), chain)
    _refuse_other_key(chain, public_key)


def read_hospital(path: Path) -> str:
    """Whose ledger it is, by the file itself; every entry repeats it and is signed.

    Raises:
        LedgerError: The file does not say.
    """
    with _reading(path) as database:
        row = database.execute("SELECT value FROM about WHERE name = 'hospital'").fetchone()
    if row is None or not isinstance(row[0], str):
        raise LedgerError(f"{path} does not say whose ledger it is", hint="Restore the ledger from a good copy.")
    return str(row[0])


@contextmanager
def unused(path: Path) -> Iterator[None]:
    """Hold a ledger's lock: nobody has it open for appending meanwhile; for whoever puts another in its place.

    Raises:
        LedgerError: Somebody has.
    """
    lock = _lock(path)
    try:
        yield
    finally:
        os.close(lock)


def _rows(database: sqlite3.Connection) -> Iterator[Entry]:
    for row in database.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY seq"):  # noqa: S608 - a constant
        entry = _read_row(row)
        yield entry
        # Once its reader has looked at the entry: a signature that is wrong says more than a hash that is.
        if row[3] != bytes.fromhex(entry.hash):
            raise wrong(entry.seq, "its hash is not the one that is stored beside it")


def _refuse_damage(database: sqlite3.Connection) -> None:
    """What reading every entry does not see: a damaged page of the index, by which entries are found."""
    (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"the file is malformed: {found}")


def _read_row(row: tuple[Any, Any, Any, Any]) -> Entry:
    seq, body, signature, _ = row
    if not (isinstance(body, bytes) and isinstance(signature, bytes)):
        raise wrong(seq, "it is not stored as bytes")
    try:
        entry = parse_entry(body, signature)
    except (ValueError, TypeError, RecursionError):
        refuse_entry(body, KINDS, f"ledger entry {seq}")
        raise wrong(seq, "it cannot be read") from None
    if entry.canonical != body:
        raise wrong(seq, "it is not in canonical form")
    if entry.seq != seq:
        raise wrong(seq, f"its content says that it is entry {entry.seq}")
    return entry


def _refuse_other_key(chain: Chain, public_key: bytes) -> None:
    """Whether a chain that holds is one that this key may continue."""
    if not chain.keys or chain.keys[-1] == public_key:
        return
    ours = fingerprint(public_key)[:19]
    if public_key in chain.keys:
        raise LedgerError(
            f"the ledger's key was rotated: {ours}… signs it no more, {fingerprint(chain.keys[-1])[:19]}… does",
            hint="Name the new key in the settings. The old one must not be used again.",
        )
    raise wrong(1, f"it is not signed by {ours}…: the ledger is another's, or the key is")


def _now() -> datetime:
    return datetime.now(UTC)


def _next_time(last: str) -> str:
    """Now, but never before the last entry: a step back that is small is not written, a large one stops the hospital.

    Raises:
        LedgerError: The clock was set back by more than ``CLOCK_TOLERANCE``.
    """
    now = _now()
    if last and now < datetime.fromisoformat(last) - CLOCK_TOLERANCE:
        raise LedgerError(
            f"the clock says {now:%Y-%m-%dT%H:%M:%SZ}, but the ledger's newest entry is of {last}: it was set back",
            hint="Set the clock right. Nothing was written.",
        )
    return max(last, now.isoformat(timespec="milliseconds").replace("+00:00", "Z"))


def _connect(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on disk when they return."""
    database = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
    try:
        (mode,) = database.execute("PRAGMA journal_mode=WAL").fetchone()
        database.execute("PRAGMA synchronous=FULL")
    except BaseException:
        database.close()
        raise
    if mode != "wal":  # a file system without shared memory
        database.close()
        raise LedgerError(f"{path} cannot be written ahead (journal mode {mode})", hint="Use a local disk.")
    return database


def _make_tables(database: sqlite3.Connection, hospital: str) -> None:
    """Both tables or neither. The triggers stop accidents; what stops intent is the chain."""
    database.execute("BEGIN IMMEDIATE")
    database.execute("CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
    database.execute(
        "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, signature BLOB NOT NULL, "
        "hash BLOB NOT NULL UNIQUE) STRICT"  # the hash is known from the body; stored, it can be looked up
    )
    for verb in ("UPDATE", "DELETE"):
        database.execute(
            f"CREATE TRIGGER no_{verb.lower()} BEFORE {verb} ON entries "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        )
    database.execute("INSERT INTO about (name, value) VALUES ('hospital', ?)", (hospital,))
    database.execute("COMMIT")


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection, also where the folder cannot be written."""
    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}", hint="Check the path.")
    uri = f"{path.absolute().as_uri()}?mode=ro"
    if not path.with_name(path.name + "-wal").exists():
        # Nobody has it open and nothing waits to be merged. Then, and only then, SQLite may go without the helper files
        # that it would otherwise leave beside the evidence, or could not make in a read-only folder.
        uri += "&immutable=1"
    with _explained(path), closing(sqlite3.connect(uri, uri=True, timeout=5)) as database:
        yield database


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors, and the disk's, as ours. On a damaged file even reading a text or a length can fail."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, OverflowError, MemoryError) as error:
        raise LedgerError(f"the ledger {path} cannot be used: {error}", hint=_hint(str(error))) from None


def _hint(problem: str) -> str:
    if "locked" in problem:
        return "Another process has it open for writing. A hospital runs one process; stop the other and restart."
    if "disk I/O error" in problem:  # SQLite's word where it cannot make the file that readers share, too
        return "The disk is full, read-only or failing. Make room (df), then restart. What was charged stays charged."
    if "full" in problem or "No space" in problem:
        return "Make room on the disk, then restart the hospital. What was charged stays charged."
    if "malformed" in problem or "not a database" in problem:
        return "The file is damaged. Restore the newest copy of ledger and head file, and have the disk looked at."
    return "Check that the folder is writable, the disk has space and the file is intact."


def _lock(path: Path) -> int:
    """Take the writer's lock, held by the returned open file and gone with the process.

    A file of its own: closing any other handle on the database would drop SQLite's own locks.
    """
    name = path.with_name(path.name + ".lock")
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LedgerError(
            f"the ledger's lock {name} cannot be opened: {error.strerror}", hint="Check that the folder is writable."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise LedgerError(
            f"the ledger {path} is in use by another process", hint="A hospital runs one process; stop the other."
        ) from None
    return lock
