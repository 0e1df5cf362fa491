"""The head file: which entry of a ledger is the newest that was ever durable, kept apart from the ledger itself.

A file of two slots of fixed size, written in turn and in place: entry n's statement goes into slot n mod 2, so the
statement before it stays whole whatever happens to the write. No file is made, renamed or grown for an entry.
"""

import hashlib
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared_models.durable import file_identity, replace_file
from shared_models.errors import IdentityError, LedgerError
from shared_models.identity import sign, verify

SLOT_BYTES = 4096  # a page and a sector: a write of one slot touches nothing of the other
_SLOT = struct.Struct(">16sQ32s64s")  # magic, seq, hash, signature; then their SHA-256, then zeros
_MAGIC = b"konsil head v1\0\0"


@dataclass(frozen=True)
class Statement:
    """That an entry was durable, signed by the key that signs the entry after it; ``seq`` is 0 before the first."""

    seq: int
    hash: str
    signature: bytes

    def signed_by(self, public_key: bytes) -> bool:
        """Whether this key made it."""
        try:
            verify(public_key, "ledger-head", _signed(self.seq, self.hash), self.signature)
        except IdentityError:
            return False
        return True


@dataclass(frozen=True)
class Head:
    """What a head file says: its slots in order, None where a slot is damaged; at least one is whole."""

    slots: tuple[Statement | None, Statement | None]

    @property
    def statements(self) -> list[Statement]:
        """The whole slots, newest first."""
        return sorted((slot for slot in self.slots if slot), key=lambda slot: -slot.seq)

    @property
    def seq(self) -> int:
        """Number of the newest entry it knows."""
        return self.statements[0].seq

    @property
    def hash(self) -> str:
        """Hash of the newest entry it knows."""
        return self.statements[0].hash


def head_path(ledger: Path) -> Path:
    """Where the head file of a ledger lies unless told otherwise."""
    return ledger.with_name(ledger.name + ".head")


def create_head(path: Path, key: Ed25519PrivateKey, *, genesis: str) -> None:
    """Write the head file of an empty ledger, whole or not at all, and at its full size for ever.

    Raises:
        LedgerError: It could not be written.
    """
    slot = _slot(key, 0, genesis)
    try:
        replace_file(path, slot, slot)
    except OSError as error:
        raise _unwritable(path, error.strerror) from None


def read_head(path: Path) -> Head:
    """Read a head file; whether it is the ledger's, and up to date, is ``ledger.verify_head``'s question.

    Raises:
        LedgerError: It is missing, of another size, has no whole slot, or its slots do not follow each other.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise LedgerError(f"the head file {path} {what}", hint="Restore it together with its ledger.") from None
    if len(content) != 2 * SLOT_BYTES:
        raise _damaged(path)
    slots = (_statement(content[:SLOT_BYTES], 0), _statement(content[SLOT_BYTES:], 1))
    numbers = sorted(slot.seq for slot in slots if slot)
    if not numbers or (len(numbers) == 2 and numbers[0] + 1 != numbers[1] and numbers != [0, 0]):
        raise _damaged(path)
    return Head(slots)


class HeadWriter:
    """A head file open for writing, which is the ledger's to open and to close.

    Guarantees:
        * When ``write`` returns, the statement is on the disk.
        * Cut off at any byte, it leaves the statement before it whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _unwritable(path, error.strerror) from None
        self._identity = file_identity(path)

    def write(self, key: Ed25519PrivateKey, *, seq: int, entry_hash: str) -> None:
        """State that an entry is the newest.

        Raises:
            LedgerError: It could not be written, or the file is not the one that was opened any more.
        """
        slot = _slot(key, seq, entry_hash)
        try:
            if file_identity(self.path) != self._identity:
                raise _unwritable(self.path, "it was removed or replaced while in use")
            written = os.pwrite(self._file, slot, seq % 2 * SLOT_BYTES)
            os.fdatasync(self._file)
        except OSError as error:
            raise _unwritable(self.path, error.strerror) from None
        if written != len(slot):
            raise _unwritable(self.path, "the disk took only a part of it")

    def close(self) -> None:
        """Let go of the file; can be called twice."""
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
            self._file = -1


def _slot(key: Ed25519PrivateKey, seq: int, entry_hash: str) -> bytes:
    signature = sign(key, "ledger-head", _signed(seq, entry_hash))
    content = _SLOT.pack(_MAGIC, seq, bytes.fromhex(entry_hash), signature)
    return (content + hashlib.sha256(content).digest()).ljust(SLOT_BYTES, b"\0")


def _statement(slot: bytes, place: int) -> Statement | None:
    """A slot's statement; None if a single bit of the slot is wrong, or it stands in the other's place."""
    content = slot[: _SLOT.size]
    magic, seq, entry_hash, signature = _SLOT.unpack(content)
    whole = (content + hashlib.sha256(content).digest()).ljust(SLOT_BYTES, b"\0")
    if slot != whole or magic != _MAGIC or (seq and seq % 2 != place):
        return None
    return Statement(seq, entry_hash.hex(), signature)


def _signed(seq: int, entry_hash: str) -> bytes:
    return rfc8785.dumps({"seq": seq, "hash": entry_hash})


def _damaged(path: Path) -> LedgerError:
    return LedgerError(f"the head file {path} is damaged", hint="Restore it together with its ledger.")


def _unwritable(path: Path, why: str | None) -> LedgerError:
    return LedgerError(f"the head file {path} cannot be written: {why}", hint="Check the folder and the space left.")
