"""The coordinator's audit log, both halves: what a line of it says, and following a log or an export of one.

One canonical JSON object per line, each signed, each with the hash of the line before. A head file
(``privacy/head.py``) names the newest line, so that a log that was cut at its end is noticed too; an export carries the
head's statement as its last line.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from shared_models.config import Frozen, explain
from shared_models.errors import AuditError, IdentityError
from shared_models.identity import fingerprint, verify
from shared_models.privacy.entries import GENESIS, Digest, Signature, Time, canonical_json
from shared_models.privacy.head import Statement

SIGNED = "audit-entry"  # the kind of signature
LONGEST_LINE = 8192

Said = Annotated[str, Field(max_length=200)]
Seq = Annotated[int, Field(ge=1, le=2**53 - 1)]


class AuditEntry(Frozen):
    """One line. What does not apply is None, and is left out of the canonical JSON.

    Attributes:
        seq: Number of the line, from 1, without gaps.
        previous_hash: SHA-256 of the line before, signature included; ``GENESIS`` for the first.
        time: UTC, to the millisecond; the coordinator's own clock, and so no proof of anything.
        kind: ``opened`` begins a log and names its key; ``started`` a process. ``call`` is written before a call has
            any effect, ``done`` when it has ended. Kinds are never removed and never given another meaning.
        public_key: Of the log: 32 raw bytes in hexadecimal.
        call: The method, such as ``Control/Stop``.
        caller: The name in the certificate.
        role: What its certificate makes it; None where that is nothing.
        key: SHA-256 of the SubjectPublicKeyInfo of the certificate's key.
        peer: The network address that called.
        study: The study that the call is about.
        hospital: The hospital whose deposit is asked for.
        outcome: Whether the call was ``allowed``; of a call that is done, whether it succeeded. None where its caller
            went away before the end: what the call was to do may have happened.
        code: Why not; ``cancelled`` where the caller went away.
        of: The line of the call that is done.
        signature: Ed25519 by the coordinator's audit key over the canonical JSON of all the other fields.
    """

    seq: Seq
    previous_hash: Digest
    time: Time
    kind: Literal["opened", "started", "call", "done"]
    public_key: Digest | None = None
    call: Said | None = None
    caller: Said | None = None
    role: Said | None = None
    key: Digest | None = None
    peer: Said | None = None
    study: Said | None = None
    hospital: Said | None = None
    outcome: Literal["allowed", "refused", "succeeded", "failed"] | None = None
    code: Said | None = None
    of: Seq | None = None
    signature: Signature

    def payload(self) -> bytes:
        """What is signed."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}, exclude_none=True))

    def line(self) -> bytes:
        """What is stored, without the end of the line."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


class AuditChain:
    """Follows lines one by one and remembers the last three hashes only, however many there are.

    Guarantees:
        * Any edit, deletion (but at the end: see ``confirm``), insertion, reordering or replay is found, and so is a
          line by another key.

    Args:
        public_key: Of the log; None for the one that its first line names.
    """

    def __init__(self, public_key: bytes | None = None) -> None:
        self.seq, self.hash, self.public_key = 0, GENESIS, public_key
        self._tail = {0: GENESIS}

    def follow(self, line: bytes, *, trusted: bool = False) -> AuditEntry | None:
        """Take the next line in, if it follows.

        Args:
            line: Without its end.
            trusted: Look at number and hash only, which is quick: for whoever wrote the line.

        Raises:
            AuditError: The number of the line, and what is wrong with it.
        """
        place = self.seq + 1
        entry = None if trusted else self.inspect(line, place)
        seq, previous = _place_of(line, place)
        if seq != place:
            raise wrong(place, f"line {seq} stands in its place: lines were removed, inserted or reordered")
        if previous != self.hash:
            raise wrong(place, "it does not follow the line before it: one of the two was changed or replaced")
        self.seq, self.hash = place, hashlib.sha256(line).hexdigest()
        self._tail = {seq: self._tail[seq] for seq in self._tail if seq >= place - 2} | {place: self.hash}
        return entry

    def inspect(self, line: bytes, place: int) -> AuditEntry:
        """What a line says, if it is by the log's key; whether it follows another is not asked.

        Raises:
            AuditError: The number of the line, and what is wrong with it.
        """
        entry = _parse(line, place)
        if (place == 1) != (entry.kind == "opened"):
            raise wrong(place, "a log is opened once, in its first line")
        if entry.kind == "opened":
            named = bytes.fromhex(entry.public_key or "")
            if self.public_key is not None and named != self.public_key:
                raise wrong(1, f"it names the key {fingerprint(named)[:19]}…: the log is another's")
            self.public_key = named
        if self.public_key is None or len(self.public_key) != 32:
            raise wrong(place, "it names no key")
        try:
            verify(self.public_key, SIGNED, entry.payload(), bytes.fromhex(entry.signature))
        except IdentityError:
            raise wrong(place, "it is not signed by the log's key: it was changed") from None
        return entry

    def confirm(self, statement: Statement) -> None:
        """Check that no line is missing at the end: the log reaches as far as a head's statement says.

        Raises:
            AuditError: It does not; another line stands there; or the statement is by another key.
        """
        if self.public_key is None or not statement.signed_by(self.public_key):
            raise AuditError(
                "the head is not signed by the log's key", hint="It was changed, or belongs to another log."
            )
        if statement.seq > self.seq:
            raise AuditError(
                f"the log ends at line {self.seq}, but its head knows line {statement.seq}",
                hint="It was cut, or an old copy was put in its place. Find out who did it.",
            )
        if statement.seq not in self._tail:
            raise AuditError(
                f"the log has {self.seq} lines, but its head knows the first {statement.seq} only",
                hint="An old head was put in its place; without the newest nobody knows what is missing.",
            )
        if self._tail[statement.seq] != statement.hash:
            raise wrong(statement.seq, "it is not the one that the head knows")


@dataclass(frozen=True)
class VerifiedLog:
    """A log that holds.

    Attributes:
        key: Fingerprint of its key.
        refused: Calls that were refused.
    """

    entries: int
    calls: int
    refused: int
    key: str


def read_log(path: Path, head: Statement | None = None) -> Iterator[bytes]:
    """The lines of a log file as of one moment, with the head's statement behind them: what an export holds.

    Args:
        path: The log.
        head: What the head file said before this is called; lines after it are left out.

    Raises:
        AuditError: The file cannot be read, or a line is too long to be one.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while (line := file.readline(LONGEST_LINE + 1)) and (head is None or number < head.seq):
                if not line.endswith(b"\n"):
                    if len(line) > LONGEST_LINE:
                        raise wrong(number + 1, "it is too long")
                    break  # being written, or what a power cut left
                number += 1
                yield line[:-1]
    except OSError as error:
        raise AuditError(f"the audit log {path} cannot be read: {error.strerror}", hint="Check the path.") from None
    if head is not None:
        yield head_line(head)


def head_line(head: Statement) -> bytes:
    """The last line of an export."""
    return canonical_json({"head": {"hash": head.hash, "seq": head.seq, "signature": head.signature.hex()}})


def read_export(path: Path) -> Iterator[bytes]:
    """The lines of an export.

    Raises:
        AuditError: It cannot be read, or does not end with the end of a line.
    """
    size = 0
    for line in read_log(path):
        size += len(line) + 1
        yield line
    if size != path.stat().st_size:
        raise AuditError(f"{path} ends in the middle of a line", hint="It was cut; export the log again.")


def follow_export(lines: Iterable[bytes], public_key: bytes | None = None) -> Iterator[AuditEntry]:
    """The entries of an export, each once it is known to follow; at the end, that none is missing.

    Args:
        lines: As ``read_export`` gives them.
        public_key: Of the log, as it came from elsewhere; None for the one that the first line names.

    Raises:
        AuditError: The first line that is wrong, by its number, and what is wrong with it.
    """
    followed, held = AuditChain(public_key), None
    for line in chain(lines, [None]):
        if held is not None and line is not None:
            entry = followed.follow(held)
            if entry is not None:
                yield entry
        if line is None:
            break
        held = line
    head = _head(held)
    followed.confirm(head)
    if head.seq != followed.seq:
        raise wrong(followed.seq, f"the export's head is of line {head.seq}")


def verify_export(lines: Iterable[bytes], public_key: bytes | None = None) -> VerifiedLog:
    """Verify an export, in memory for its last lines only.

    Guarantees:
        * Any edit, deletion, insertion, reordering, replay or cut is found.
        * Every ``done`` is of a call that was allowed, once.

    Raises:
        AuditError: What does not hold.
    """
    entries = calls = refused = 0
    open_calls = set[int]()
    key = ""
    for entry in follow_export(lines, public_key):
        entries += 1
        key = key or fingerprint(bytes.fromhex(entry.public_key or ""))
        if entry.kind == "started":
            open_calls.clear()  # a process that was killed wrote no ends
        elif entry.kind == "call":
            calls, refused = calls + 1, refused + (entry.outcome == "refused")
            open_calls |= {entry.seq} if entry.outcome == "allowed" else set()
        elif entry.kind == "done":
            if entry.of not in open_calls:
                raise wrong(entry.seq, f"it ends the call of line {entry.of}, which is none that is open")
            open_calls.discard(entry.of)
    return VerifiedLog(entries, calls, refused, key)


def wrong(seq: int, what: str) -> AuditError:
    """The error that says which line is wrong."""
    return AuditError(f"audit log, line {seq}: {what}", hint="Find out who changed it; compare with an older export.")


def _place_of(line: bytes, place: int) -> tuple[Any, Any]:
    try:
        fields = json.loads(line)
        return fields["seq"], fields["previous_hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise wrong(place, "it cannot be read") from None


def _parse(line: bytes, place: int) -> AuditEntry:
    try:
        entry = AuditEntry.model_validate_json(line)
    except ValidationError as error:
        raise wrong(place, f"it cannot be read: {explain(error)}") from None
    if entry.line() != line:
        raise wrong(place, "it is not in canonical form")
    return entry


def _head(line: bytes | None) -> Statement:
    try:
        told = json.loads(line or b"")["head"]
        head = Statement(int(told["seq"]), str(told["hash"]), bytes.fromhex(told["signature"]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        head = None
    if head is None or head_line(head) != line:
        raise AuditError("the export does not end with the log's head", hint="It was cut; export it again.")
    return head
