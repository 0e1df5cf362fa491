"""The privacy ledger, both halves: appending entries that cannot be taken back, and verifying that none was.

One SQLite file per hospital holds signed entries, each with the hash of the one before. A head file beside it (or
elsewhere) names the newest entry, so that a chain that was cut at its end is noticed too. The ledger stores mechanisms;
epsilon is derived. It fails closed: whatever is wrong with it is a ``LedgerError``, and training stops.
"""

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Annotated, Any, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError, model_validator

from shared_models.config import Count, Frozen, Name, Positive, explain
from shared_models.durable import replace_file, sync_folder
from shared_models.errors import IdentityError, LedgerError
from shared_models.identity import fingerprint, public_bytes, sign, verify
from shared_models.privacy.mechanisms import LARGEST_ORDER, Mechanism

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
Delta = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]

# Kinds are never removed and never given another meaning.
Kind = Literal[
    "budget-opened",
    "plan-approved",
    "charge",
    "round-done",
    "release",
    "conformance",
    "study-closed",
    "population-changed",
    "key-rotated",
    "checkpoint",
]

GENESIS = "0" * 64  # what the first entry names as the one before it

_STUDY = frozenset({"study", "plan_digest"})
_ROUND = _STUDY | {"round", "attempt"}
_REQUIRED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "budget-opened": frozenset({"population", "budget", "public_key"}),
        "plan-approved": _STUDY | {"population", "limit", "reservation"},
        "charge": _ROUND | {"population", "mechanism", "parameters_digest"},
        "round-done": _ROUND,
        "release": _ROUND | {"mechanism"},
        "study-closed": _STUDY | {"population"},
    }
)


class BudgetTerms(Frozen):
    """What a population's budget was opened with; fixed from then on.

    Attributes:
        epsilon: The most that all studies together may cost a patient.
        delta: What ``epsilon`` holds at.
        order: Renyi order of the filter.
        public_size: The steward's figure for the population, never recomputed from records.
    """

    epsilon: Positive
    delta: Delta
    order: Annotated[int, Field(ge=2, le=LARGEST_ORDER)]
    public_size: Count
    unit: Literal["patient"] = "patient"
    neighbouring: Literal["add or remove one patient"] = "add or remove one patient"


class StudyLimit(Frozen):
    """What the plan of one study promises to stay within."""

    epsilon: Positive
    delta: Delta


class Reserved(Frozen):
    """Charges that an approval set aside: so many of one mechanism."""

    mechanism: Mechanism
    charges: Count


class Entry(Frozen):
    """One event. What an event of its kind does not have is None, and is left out of the canonical JSON.

    Attributes:
        seq: Number of the entry, from 1, without gaps.
        previous_hash: Hash of the entry before; ``GENESIS`` for the first.
        time: UTC, to the millisecond; the hospital's own clock, and so no proof of anything.
        population_fingerprint: Keyed hash of the population's patients; the key never leaves.
        signature: Ed25519 by the hospital over the canonical JSON of all the other fields.
    """

    seq: Annotated[int, Field(ge=1, le=2**53 - 1)]
    previous_hash: Digest
    time: Time
    kind: Kind
    hospital: Name
    population: Name | None = None
    population_fingerprint: Digest | None = None
    public_key: Digest | None = None  # 32 raw bytes in hexadecimal
    budget: BudgetTerms | None = None
    study: Name | None = None
    plan_digest: Digest | None = None
    limit: StudyLimit | None = None
    reservation: tuple[Reserved, ...] | None = None
    approved_by: Literal["steward", "standing-rule"] | None = None
    approval: Signature | None = None  # the steward's, of kind study-approval; see shared_models/approval.py
    round: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    attempt: Annotated[int, Field(ge=1, le=1_000)] | None = None
    mechanism: Mechanism | None = None
    parameters_digest: Digest | None = None
    software_digest: Digest | None = None
    signature: Signature

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "Entry":
        missing = sorted(name for name in _REQUIRED.get(self.kind, ()) if getattr(self, name) is None)
        if missing:
            raise ValueError(f"an entry of kind {self.kind} needs {', '.join(missing)}")
        return self

    @cached_property
    def canonical(self) -> bytes:
        """Canonical JSON (RFC 8785) of all fields but the signature: what is stored, hashed and signed.

        Fields that are None are left out, so that a later version can add one without changing any older entry's hash.
        """
        return _canonical(self.model_dump(mode="json", exclude={"signature"}, exclude_none=True))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of ``canonical``, in hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()


class Head(Frozen):
    """The newest entry that was ever durable, as the head file names it, signed; ``seq`` is 0 when there is none."""

    seq: Annotated[int, Field(ge=0)]
    hash: Digest
    signature: Signature


class Ledger:
    """A hospital's own ledger, open for appending by this process alone.

    Use ``create`` once and ``open`` from then on; a context manager.

    Guarantees:
        * ``append`` returns after the entry is on disk (WAL, ``synchronous=FULL``), and the head file too.
        * A process killed at any point leaves a ledger that opens again, with every entry that ``append`` returned, and
          at most one more.
        * After any failure to append, this object refuses to go on.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, hospital: str, head: Path, lock: int) -> None:
        self.path, self.hospital = path, hospital
        self.public_key = public_bytes(key)
        self._key, self._head_path, self._lock = key, head, lock
        self._process, self._turn, self._failed = os.getpid(), threading.RLock(), False
        self._entries: list[Entry] = []

    @classmethod
    def create(cls, path: Path, key: Ed25519PrivateKey, *, hospital: str, head: Path | None = None) -> "Ledger":
        """Make an empty ledger and open it.

        Args:
            path: The SQLite file to make.
            key: Signs every entry.
            hospital: The hospital's registered name, part of every entry.
            head: The head file; ``PATH.head`` unless told otherwise. Another disk protects against one restored backup.

        Raises:
            LedgerError: There is a ledger, or the head file of one that is gone: what it spent is not forgotten.
        """
        head = head or head_path(path)
        for file in (path, head):
            if file.exists():
                raise LedgerError(
                    f"{file} exists: this hospital has, or had, a ledger",
                    hint="Open it; or restore the ledger that belongs to the head file. A budget is opened once.",
                )
        lock = _lock(path)
        try:
            with _explained(path), closing(_connect(path)) as database:
                _make_tables(database, hospital)
            with _explained(path):
                sync_folder(path.parent)
            write_head(head, key, seq=0, entry_hash=GENESIS)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return cls.open(path, key, head=head)

    @classmethod
    def open(cls, path: Path, key: Ed25519PrivateKey, *, head: Path | None = None) -> "Ledger":
        """Open an existing ledger for appending, after checking all of it.

        Raises:
            LedgerError: It is missing, locked by another process, unwritable, or damaged; an entry was changed,
                removed, inserted or moved; it belongs to another key; or it is shorter than its head file says.
        """
        head = head or head_path(path)
        if not path.is_file():
            raise LedgerError(
                f"there is no ledger at {path}", hint="Restore it. Without its ledger a hospital trains nothing."
            )
        lock = _lock(path)
        try:
            ledger = cls(path, key, read_hospital(path), head, lock)
            ledger._entries = ledger._checked()
            ledger._begin()
        except BaseException:
            os.close(lock)
            raise
        return ledger

    def _checked(self) -> list[Entry]:
        """All entries on disk, once nothing is wrong with them."""
        entries = read_ledger(self.path)
        verify_entries(entries, self.public_key)
        verify_head(read_head(self._head_path), entries, self.public_key)
        if entries and entries[0].hospital != self.hospital:
            raise _wrong(1, f"it belongs to {entries[0].hospital}, the file says {self.hospital}")
        return entries

    def _begin(self) -> None:
        """Connect for writing, and prove at once that both files can be written."""
        with _explained(self.path):
            self._database = _connect(self.path)
        try:
            with _explained(self.path):
                self._database.execute("BEGIN IMMEDIATE")
                # To begin is not enough: SQLite quietly begins a read-only transaction on a read-only file.
                self._database.execute("UPDATE about SET value = value")
                self._database.execute("ROLLBACK")
            # A process that was killed between the two files has left a head that is one entry behind.
            write_head(self._head_path, self._key, seq=len(self._entries), entry_hash=self.head)
        except BaseException:
            self._database.close()
            raise

    @property
    def head(self) -> str:
        """Hash of the newest entry; ``GENESIS`` when there is none."""
        return self._entries[-1].hash if self._entries else GENESIS

    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first."""
        return tuple(self._entries)

    def append(self, kind: Kind, **fields: Any) -> Entry:
        """Write one entry; durable before this returns.

        Args:
            kind: What happened.
            fields: Fields of ``Entry`` that an event of this kind has.

        Raises:
            LedgerError: The fields do not fit the kind; or the entry could not be written, and nothing more will be.
        """
        with self._turn:
            self._refuse_if_unusable()
            entry = self._sign(kind, fields)
            self._failed = True  # until both files are safe
            with _explained(self.path):
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute(
                    "INSERT INTO entries (seq, body, signature) VALUES (?, ?, ?)",
                    (entry.seq, entry.canonical, bytes.fromhex(entry.signature)),
                )
                self._database.execute("COMMIT")
            self._entries.append(entry)
            write_head(self._head_path, self._key, seq=entry.seq, entry_hash=entry.hash)
            self._failed = False
            return entry

    def _refuse_if_unusable(self) -> None:
        if self._process != os.getpid():
            raise LedgerError("this ledger was opened by another process", hint="Open it in the process that writes.")
        if self._failed:
            raise LedgerError(
                f"the ledger {self.path} is closed, or failed before", hint="Mend the cause and restart the hospital."
            )

    def _sign(self, kind: Kind, fields: Mapping[str, Any]) -> Entry:
        """The next entry of the chain, complete and validated; nothing is written."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fixed = {"seq": len(self._entries) + 1, "previous_hash": self.head, "time": now, "hospital": self.hospital}
        try:
            unsigned = Entry.model_validate({"kind": kind, **fields, **fixed, "signature": "0" * 128})
            signature = sign(self._key, "ledger-entry", unsigned.canonical)
            return _parse(unsigned.canonical, signature)
        except (ValidationError, TypeError, ValueError) as error:
            text = explain(error) if isinstance(error, ValidationError) else str(error)
            raise LedgerError(f"no valid entry of kind {kind}: {text}", hint="Nothing was written.") from None

    def close(self) -> None:
        """Let go of the file and of the lock; can be called twice."""
        with self._turn:
            self._failed = True
            if self._lock < 0 or self._process != os.getpid():
                return
            with suppress(sqlite3.Error):
                self._database.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_ledger(path: Path) -> list[Entry]:
    """Read a ledger without a key and without changing it: for the auditor.

    Every body must be canonical and agree with its row; whether the entries belong together and to whom is
    ``verify_entries``'s question.

    Raises:
        LedgerError: It is missing, unreadable or damaged; the message names the entry.
    """
    with _reading(path) as database:
        rows = database.execute("SELECT seq, body, signature FROM entries ORDER BY seq").fetchall()
    return [_read_row(row) for row in rows]


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


def verify_entries(entries: Sequence[Entry], public_key: bytes) -> None:
    """Check that entries are one unbroken chain, signed by one key, that starts with the opening of a budget.

    Guarantees:
        * Any edit, deletion (but at the end: see ``verify_head``), insertion, reordering or replay is found.

    Raises:
        LedgerError: The first entry that is wrong, by its number, and what is wrong with it.
    """
    previous = GENESIS
    for place, entry in enumerate(entries, start=1):
        if entry.seq != place:
            raise _wrong(place, f"entry {entry.seq} stands in its place: entries were removed, inserted or reordered")
        if entry.previous_hash != previous:
            raise _wrong(place, "it does not follow the entry before it: one of the two was changed or replaced")
        try:
            verify(public_key, "ledger-entry", entry.canonical, bytes.fromhex(entry.signature))
        except IdentityError:
            raise _wrong(
                place, f"it is not signed by {fingerprint(public_key)[:19]}…: it was changed, or the key is another's"
            ) from None
        if entry.hospital != entries[0].hospital:
            raise _wrong(place, f"it belongs to {entry.hospital}, the first one to {entries[0].hospital}")
        if (place == 1) != (entry.kind == "budget-opened"):
            raise _wrong(place, "a ledger opens exactly one budget, in its first entry")
        previous = entry.hash
    if entries and entries[0].public_key != public_key.hex():
        raise _wrong(1, "it names another public key than the one that signed it")


def verify_head(head: Head, entries: Sequence[Entry], public_key: bytes) -> None:
    """Check that no entry is missing at the end: the chain reaches at least as far as its head file says.

    Raises:
        LedgerError: The chain is shorter, or another entry stands where the head file points; or the head file is
            foreign.
    """
    try:
        verify(public_key, "ledger-head", _head_statement(head.seq, head.hash), bytes.fromhex(head.signature))
    except IdentityError:
        raise LedgerError(
            "the head file is not signed by this ledger's key", hint="It was changed, or belongs to another ledger."
        ) from None
    if head.seq > len(entries):
        raise LedgerError(
            f"the ledger ends at entry {len(entries)}, but its head file knows entry {head.seq}",
            hint="It was cut, or an old backup was restored. Restore the newest: a budget is never refunded.",
        )
    if head.hash != (entries[head.seq - 1].hash if head.seq else GENESIS):
        raise _wrong(head.seq, "it is not the one that the head file knows")


def head_path(path: Path) -> Path:
    """Where the head file of a ledger lies unless told otherwise."""
    return path.with_name(path.name + ".head")


def read_head(path: Path) -> Head:
    """Read a head file.

    Raises:
        LedgerError: It is missing or malformed.
    """
    try:
        return Head.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged or cannot be read"
        raise LedgerError(f"the head file {path} {what}", hint="Restore it together with its ledger.") from None


def write_head(path: Path, key: Ed25519PrivateKey, *, seq: int, entry_hash: str) -> None:
    """Replace the head file: durable, and never half-written.

    Raises:
        LedgerError: It could not be written.
    """
    signature = sign(key, "ledger-head", _head_statement(seq, entry_hash)).hex()
    text = _canonical({"seq": seq, "hash": entry_hash, "signature": signature})
    try:
        replace_file(path, text)
    except OSError as error:
        raise LedgerError(
            f"the head file {path} cannot be written: {error.strerror}", hint="Check the folder and the space left."
        ) from None


def _head_statement(seq: int, entry_hash: str) -> bytes:
    return _canonical({"seq": seq, "hash": entry_hash})


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return rfc8785.dumps(dict(fields))


def _parse(body: bytes, signature: bytes) -> Entry:
    """An entry from what is stored. Python's lists and JSON's tuples differ to the strict model, so it reads JSON."""
    fields = json.loads(body)
    if not isinstance(fields, dict) or "signature" in fields:
        raise ValueError("not an entry")
    return Entry.model_validate_json(json.dumps(fields | {"signature": signature.hex()}))


def _read_row(row: tuple[Any, Any, Any]) -> Entry:
    seq, body, signature = row
    if not (isinstance(body, bytes) and isinstance(signature, bytes)):
        raise _wrong(seq, "it is not stored as bytes")
    try:
        entry = _parse(body, signature)
    except (ValueError, TypeError, RecursionError):
        raise _wrong(seq, "it cannot be read") from None
    if entry.canonical != body:
        raise _wrong(seq, "it is not in canonical form")
    if entry.seq != seq:
        raise _wrong(seq, f"its content says that it is entry {entry.seq}")
    return entry


def _wrong(seq: int, what: str) -> LedgerError:
    return LedgerError(
        f"ledger entry {seq}: {what}", hint="Restore the ledger from a good copy, and find out who changed it."
    )


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
        "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, signature BLOB NOT NULL) STRICT"
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
        raise LedgerError(
            f"the ledger {path} cannot be used: {error}",
            hint="Check that the folder is writable, the disk has space and the file is intact.",
        ) from None


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
