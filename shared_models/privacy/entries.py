"""What a ledger records: entries, each signed, each with the hash of the one before; and following such a chain.

The ledger stores mechanisms; epsilon is derived.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

import rfc8785
from pydantic import AfterValidator, Field, model_validator

from shared_models.config import ALWAYS_WRITTEN, Count, Evolving, Frozen, Name, Positive
from shared_models.errors import IdentityError, LedgerError
from shared_models.identity import fingerprint, verify
from shared_models.privacy.conformance import Conformance
from shared_models.privacy.head import Head, Statement
from shared_models.privacy.mechanisms import LARGEST_ORDER, Mechanism


def _a_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"), AfterValidator(_a_time)]
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
    "plan-reapproved",
]

KINDS = frozenset[str](get_args(Kind))

GENESIS = "0" * 64  # what the first entry names as the one before it

_STUDY = frozenset({"study", "plan_digest"})
_ROUND = _STUDY | {"round", "attempt"}
_REQUIRED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "budget-opened": frozenset({"population", "budget", "public_key"}),
        "plan-approved": _STUDY | {"population", "limit", "reservation"},
        "plan-reapproved": _STUDY | {"population", "software_digest", "approved_by"},
        "charge": _ROUND | {"population", "mechanism", "parameters_digest"},
        "round-done": _ROUND,
        "release": _ROUND | {"mechanism"},
        "study-closed": _STUDY | {"population"},
        "population-changed": frozenset({"population", "population_fingerprint"}),
        "key-rotated": frozenset({"new_public_key", "new_key_signature"}),
    }
)


class BudgetTerms(Evolving):
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
    unit: Annotated[Literal["patient"], ALWAYS_WRITTEN] = "patient"
    neighbouring: Annotated[Literal["add or remove one patient"], ALWAYS_WRITTEN] = "add or remove one patient"


class StudyLimit(Evolving):
    """What the plan of one study promises to stay within."""

    epsilon: Positive
    delta: Delta


class Reserved(Evolving):
    """Charges that an approval set aside: so many of one mechanism."""

    mechanism: Mechanism
    charges: Count


class Entry(Frozen):
    """One event. What an event of its kind does not have is None, and is left out of the canonical JSON.

    Attributes:
        seq: Number of the entry, from 1, without gaps.
        previous_hash: Hash of the entry before; ``GENESIS`` for the first.
        time: UTC, to the millisecond; the hospital's own clock, and so no proof of anything; it never goes back.
        population_fingerprint: Keyed hash of the population's patients; the key never leaves.
        approved_by: Who agreed to a plan.
        approval: The steward's own signature under it.
        evidence_digest: What a checkpoint stands for.
        conformance: What the hospital found when it tested its own trainer.
        new_public_key: The key that signs from the next entry on.
        new_key_signature: By that new key over ``possession``: nobody can hand a ledger to a key of somebody else.
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
    round: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    attempt: Annotated[int, Field(ge=1, le=1_000)] | None = None
    mechanism: Mechanism | None = None
    parameters_digest: Digest | None = None
    software_digest: Digest | None = None
    approved_by: Literal["steward", "standing-rule"] | None = None
    approval: Signature | None = None
    evidence_digest: Digest | None = None
    conformance: Conformance | None = None
    new_public_key: Digest | None = None  # 32 raw bytes in hexadecimal
    new_key_signature: Signature | None = None
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
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}, exclude_none=True))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of ``canonical``, in hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()


class Chain:
    """Follows entries one by one and remembers the tail only, however many there are.

    Guarantees:
        * Any edit, deletion (but at the end: see ``verify_head``), insertion, reordering or replay is found, and so is
          an entry by a key that was not in force.

    Args:
        public_key: Of whoever must have signed the first entry; None for whomever the first entry names.

    Attributes:
        seq: Number of the newest entry; 0 before the first.
        hash: Its hash.
        time: Its time.
        first: The entry that opened the budget.
        keys: Public keys in the order in which they came into force; the last one signs the next entry. Empty only as
            long as nobody has said who signs the first.
    """

    def __init__(self, public_key: bytes | None = None) -> None:
        self.seq, self.hash, self.time = 0, GENESIS, ""
        self.first: Entry | None = None
        self.keys: list[bytes] = [] if public_key is None else [public_key]
        self._tail = deque[tuple[int, str, bytes | None]](
            [(0, GENESIS, public_key)], maxlen=3
        )  # as many entries as a head file can concern

    def follow(self, entry: Entry) -> None:
        """Take the next entry in, if it follows.

        Raises:
            LedgerError: The number of the entry, and what is wrong with it.
        """
        place = self.seq + 1
        if entry.seq != place:
            raise wrong(place, f"entry {entry.seq} stands in its place: entries were removed, inserted or reordered")
        if entry.previous_hash != self.hash:
            raise wrong(place, "it does not follow the entry before it: one of the two was changed or replaced")
        if (place == 1) != (entry.kind == "budget-opened"):
            raise wrong(place, "a ledger opens exactly one budget, in its first entry")
        self._check_signature(entry)
        first = self.first or entry
        if entry.hospital != first.hospital:
            raise wrong(place, f"it belongs to {entry.hospital}, the first one to {first.hospital}")
        if entry.time < self.time:
            raise wrong(place, f"its time, {entry.time}, is before that of the entry before it, {self.time}")
        if entry.kind == "key-rotated":
            self.keys.append(self._new_key(entry))
        self.take(entry)

    def take(self, entry: Entry) -> None:
        """Move on to an entry that is known to follow."""
        self.seq, self.hash, self.time = entry.seq, entry.hash, entry.time
        self.first = self.first or entry
        self._tail.append((self.seq, self.hash, self.keys[-1]))

    def _check_signature(self, entry: Entry) -> None:
        named = bytes.fromhex(entry.public_key or "")
        signer = self.keys[-1] if self.keys else named
        try:
            verify(signer, "ledger-entry", entry.canonical, bytes.fromhex(entry.signature))
        except IdentityError:
            if not self.keys:
                raise wrong(1, "it names another public key than the one that signed it") from None
            raise wrong(
                entry.seq, f"it is not signed by {fingerprint(signer)[:19]}…: it was changed, or the key is another's"
            ) from None
        if entry.seq == 1:
            if named != signer:
                raise wrong(1, "it names another public key than the one that signed it")
            self.keys = [signer]

    def _new_key(self, entry: Entry) -> bytes:
        new = bytes.fromhex(entry.new_public_key or "")
        if new in self.keys:
            raise wrong(entry.seq, "it brings back a key that was in use before")
        statement = possession(entry.hospital, seq=entry.seq, previous_hash=entry.previous_hash, new_public_key=new)
        try:
            verify(new, "ledger-key", statement, bytes.fromhex(entry.new_key_signature or ""))
        except IdentityError:
            raise wrong(entry.seq, "the new key did not agree to take over") from None
        return new

    def confirms(self, statement: Statement) -> bool:
        """Whether one of the newest three entries is the one that a head file's statement is about.

        Raises:
            LedgerError: The statement is signed by another key than the one in force after that entry.
        """
        _, entry_hash, key = next(known for known in self._tail if known[0] == statement.seq)
        if not statement.signed_by(key or (self.keys[0])):
            raise _foreign_head()
        return entry_hash == statement.hash


def verify_entries(entries: Iterable[Entry], public_key: bytes | None = None) -> Chain:
    """Check that entries are one unbroken chain that starts with the opening of a budget; in memory for its tail only.

    Args:
        entries: Oldest first.
        public_key: Of whoever must have signed the first entry; None for whomever the first entry names. Later keys
            follow from the chain.

    Raises:
        LedgerError: The first entry that is wrong, by its number, and what is wrong with it.
    """
    chain = Chain(public_key)
    for entry in entries:
        chain.follow(entry)
    return chain


def following(entries: Iterable[Entry], chain: Chain) -> Iterator[Entry]:
    """The same entries, each as soon as the chain has followed it.

    Raises:
        LedgerError: As ``Chain.follow``.
    """
    for entry in entries:
        chain.follow(entry)
        yield entry


def verify_head(head: Head, chain: Chain, *, own_key: bytes | None = None, half_written: bool = False) -> None:
    """Check that no entry is missing at the end: the chain reaches as far as its head file says.

    Args:
        head: What the head file says.
        chain: At the end of the entries that lie beside it.
        own_key: Also trusted to have signed a statement about an entry that is missing.
        half_written: Accept what a power cut leaves while the newest entry's statement is written: the slot of that
            very entry damaged, and the other one whole.

    Raises:
        LedgerError: The chain is shorter, or another entry stands where the head file points; the head file is foreign,
            damaged, or older than a crash explains.
    """
    for statement in head.statements:
        if statement.seq > chain.seq:
            keys = {key for key in (*chain.keys, own_key) if key is not None}
            if not any(statement.signed_by(key) for key in keys):
                raise _foreign_head()
            raise LedgerError(
                f"the ledger ends at entry {chain.seq}, but its head file knows entry {statement.seq}",
                hint="It was cut, or an old backup was restored. Restore the newest: a budget is never refunded.",
            )
    if head.seq < chain.seq - 1:
        raise LedgerError(
            f"the ledger has {chain.seq} entries, but its head file knows the first {head.seq} only",
            hint="An old head file was restored. Restore the newest; without it nobody knows what is missing.",
        )
    for statement in head.statements:
        if not chain.confirms(statement):
            raise wrong(statement.seq, "it is not the one that the head file knows")
    if None in head.slots and not (half_written and head.seq == chain.seq - 1):
        raise LedgerError(
            "one half of the head file is damaged",
            hint="If a power cut did it, the hospital mends it when it starts; else find out who changed it.",
        )


def possession(hospital: str, *, seq: int, previous_hash: str, new_public_key: bytes) -> bytes:
    """What a new key signs to take over a ledger, at one place of one chain."""
    fields = {"hospital": hospital, "new_public_key": new_public_key.hex(), "previous_hash": previous_hash, "seq": seq}
    return canonical_json(fields)


def canonical_json(fields: Mapping[str, Any]) -> bytes:
    """Canonical JSON (RFC 8785)."""
    return rfc8785.dumps(dict(fields))


def parse_entry(body: bytes, signature: bytes) -> Entry:
    """An entry from what is stored.

    Raises:
        ValueError: It is none. Whether ``body`` is in canonical form is not asked here.
    """
    if not (body.startswith(b"{") and body.endswith(b"}")):
        raise ValueError("not an entry")
    return Entry.model_validate_json(body[:-1] + b',"signature":"' + signature.hex().encode() + b'"}')


def wrong(seq: int, what: str) -> LedgerError:
    """The error that says which entry is wrong."""
    return LedgerError(
        f"ledger entry {seq}: {what}", hint="Restore the ledger from a good copy, and find out who changed it."
    )


def _foreign_head() -> LedgerError:
    return LedgerError(
        "the head file is not signed by this ledger's key", hint="It was changed, or belongs to another ledger."
    )
