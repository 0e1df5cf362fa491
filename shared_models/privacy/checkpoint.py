"""Checkpoints: what a hospital states of its ledger now and then, signed; and what two of them prove.

A bundle proves what a ledger says today. A checkpoint proves what it said on the day it was signed, to whoever kept it:
a ledger that was cut, restored or rewritten since contradicts one.
"""

from bisect import bisect_left, insort
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, NamedTuple

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from shared_models.config import Evolving, Name, explain
from shared_models.errors import (
    CheckpointError,
    ForkedCheckpointError,
    IdentityError,
    RolledBackCheckpointError,
    UnsupportedEvidenceError,
)
from shared_models.identity import fingerprint, public_bytes, sign, verify
from shared_models.privacy.entries import Digest, Signature, Time
from shared_models.privacy.head import Statement
from shared_models.versions import refuse_version

SIGNED = "checkpoint"  # the kind of signature
LONGEST_LINE = 4096
_TICK, _LONG_AGO = timedelta(milliseconds=1), datetime(1970, 1, 1, tzinfo=UTC)


class Checkpoint(Evolving):
    """That an entry of a hospital's ledger was the newest at a moment.

    Attributes:
        population: Whose budget the ledger is.
        seq: Number of the entry.
        entry_hash: Its hash, which stands for all entries before it too.
        time: When this was signed, UTC, by the hospital's own clock; later than that of the one signed before.
        public_key: The key that signs this, and the ledger's next entry: 32 raw bytes in hexadecimal.
    """

    format: Literal["konsil-checkpoint/1"]
    hospital: Name
    population: Name
    seq: Annotated[int, Field(ge=1, le=2**53 - 1)]
    entry_hash: Digest
    time: Time
    public_key: Digest

    def payload(self) -> bytes:
        """What is signed: canonical JSON (RFC 8785) of all of it but the signature."""
        return rfc8785.dumps(self.model_dump(mode="json", exclude={"signature"}))


class SignedCheckpoint(Checkpoint):
    """A checkpoint with its hospital's signature: Ed25519 of kind ``checkpoint``."""

    signature: Signature

    def line(self) -> bytes:
        """What is stored and sent, without the end of a line."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    @property
    def ledger(self) -> tuple[str, str]:
        """Which ledger it is about: hospital and population."""
        return self.hospital, self.population

    def __str__(self) -> str:
        return f"entry {self.seq} ({self.entry_hash[:12]}…, signed {self.time})"


def sign_checkpoint(
    key: Ed25519PrivateKey, newest: Statement, *, hospital: str, population: str, after: str | None = None
) -> SignedCheckpoint:
    """Sign that an entry is the newest of a ledger, now.

    Whoever signs holds off everybody else of this ledger from reading ``newest`` until this has returned: two that
    overtake each other would look like a rollback.

    Args:
        key: The hospital's identity.
        newest: What the ledger's head file says.
        hospital: Whose ledger it is.
        population: Whose budget.
        after: Time of the one signed before; a clock that was set back is not believed.

    Raises:
        CheckpointError: The head file's statement is not by this key, or the ledger is empty: nothing is known for
            certain, and nothing is signed.
    """
    public = public_bytes(key)
    if not newest.seq or not newest.signed_by(public):
        raise CheckpointError(
            "the head file states no entry under this hospital's key", hint="Run konsil-hospital ledger verify."
        )
    unsigned = Checkpoint(
        format="konsil-checkpoint/1",
        hospital=hospital,
        population=population,
        seq=newest.seq,
        entry_hash=newest.hash,
        time=_text(max(datetime.now(UTC), datetime.fromisoformat(after) + _TICK if after else _LONG_AGO)),
        public_key=public.hex(),
    )
    return SignedCheckpoint(**unsigned.model_dump(), signature=sign(key, SIGNED, unsigned.payload()).hex())


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_checkpoint(line: bytes) -> SignedCheckpoint:
    """Read a checkpoint, and check that it is signed by the key that it names; whose key that is, its reader asks.

    Raises:
        UnsupportedEvidenceError: It is of another format.
        CheckpointError: It is none, or was changed.
    """
    hint = "It was changed, or is no checkpoint."
    if len(line) > LONGEST_LINE:
        raise CheckpointError(f"a checkpoint of {len(line)} bytes", hint=hint)
    try:
        found = SignedCheckpoint.model_validate_json(line)
    except ValidationError as error:
        refuse_version(error, "a checkpoint", UnsupportedEvidenceError)
        raise CheckpointError(f"this is no checkpoint: {explain(error)[:500]}", hint=hint) from None
    try:
        verify(bytes.fromhex(found.public_key), SIGNED, found.payload(), bytes.fromhex(found.signature))
    except IdentityError:
        raise CheckpointError(
            f"a checkpoint of {found.hospital} is not signed by the key that it names", hint=hint
        ) from None
    return found


class _Known(NamedTuple):
    time: str
    seq: int
    entry_hash: str


class CheckpointHistory:
    """The checkpoints of one ledger that somebody has seen, in whatever order they came.

    What contradicts is told from signed fields alone, so that whoever stores and forwards checkpoints can hold some
    back, and can accuse nobody: the same ones in another order say the same.

    Guarantees:
        * Of two checkpoints, either order is refused if they give one entry two hashes, or if the one with the later
          time knows fewer entries.
        * What was refused changes nothing.

    Memory grows with the number of checkpoints that differ in entry or time, by a few hundred bytes each.
    """

    def __init__(self) -> None:
        self._by_entry: dict[int, _Known] = {}
        self._in_time: list[_Known] = []  # whose seq never falls

    def take(self, checkpoint: SignedCheckpoint) -> bool:
        """Take one in, unless it contradicts another. Returns whether its entry was not known before.

        Raises:
            ForkedCheckpointError, RolledBackCheckpointError: It contradicts; the other one is named.
        """
        place = _Known(checkpoint.time, checkpoint.seq, checkpoint.entry_hash)
        same = self._by_entry.get(checkpoint.seq)
        if same is not None and same.entry_hash != checkpoint.entry_hash:
            raise ForkedCheckpointError(
                f"{checkpoint.hospital} signed two hashes for {checkpoint.population}'s ledger entry {checkpoint.seq}: "
                f"{same.entry_hash[:12]}… on {same.time}, and {checkpoint.entry_hash[:12]}… on {checkpoint.time}",
                hint="There are two histories of this ledger. Ask for both, and who was shown which.",
            )
        index = bisect_left(self._in_time, place)
        before = self._in_time[index - 1] if index else None
        after = self._in_time[index] if index < len(self._in_time) else None
        if before is not None and before.time < place.time and before.seq > place.seq:
            raise _rolled_back(checkpoint, before, place)
        if after is not None and place.time < after.time and after.seq < place.seq:
            raise _rolled_back(checkpoint, place, after)
        if after != place:
            insort(self._in_time, place)
        self._by_entry.setdefault(checkpoint.seq, place)
        return same is None


def _rolled_back(about: SignedCheckpoint, earlier: _Known, later: _Known) -> RolledBackCheckpointError:
    return RolledBackCheckpointError(
        f"{about.hospital} signed on {earlier.time} that {about.population}'s ledger has {earlier.seq} entries, and on "
        f"{later.time} that it has {later.seq}",
        hint="The ledger was cut, or an old backup of it is in use: what was spent in between is missing.",
    )


def describe(checkpoint: SignedCheckpoint) -> str:
    """On one line, for people."""
    return (
        f"{checkpoint.time} {checkpoint.hospital}, population {checkpoint.population}: entry {checkpoint.seq} "
        f"{checkpoint.entry_hash[:16]}…, key {fingerprint(bytes.fromhex(checkpoint.public_key))[:19]}…"
    )
