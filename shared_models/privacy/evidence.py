"""An evidence bundle: what one hospital shows an auditor, as one file. Packing it, and opening it checked.

A zip archive of a signed manifest and the parts it lists. Opening proves that nothing was changed since the hospital
packed it; whether what is in it holds, and agrees with others' evidence, is the auditor's question.
"""

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import IO, Annotated, Any, Literal, TypeVar

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, Field, ValidationError

from shared_models.approval import Approval
from shared_models.config import ALWAYS_WRITTEN, Evolving, Name, explain
from shared_models.durable import replace_file
from shared_models.errors import EvidenceError, IdentityError, UnsupportedEvidenceError
from shared_models.identity import public_bytes, sign, verify
from shared_models.plan import StudyPlan
from shared_models.privacy.entries import KINDS, Delta, Digest, Entry, Signature, Time, canonical_json
from shared_models.privacy.head import Head, Statement
from shared_models.receipts import SignedReceipt
from shared_models.roster import SignedRoster
from shared_models.secagg.key_agreement import Roster
from shared_models.secagg.protocol import Transcript
from shared_models.versions import refuse_entry, refuse_version

MANIFEST, MANIFEST_KIND = "manifest.json", "evidence-bundle"
_OLD_PARTS = ("ledger.jsonl", "head.json", "receipts.jsonl", "transcripts.jsonl", "anchors.jsonl", "roster.json")
PARTS = (*_OLD_PARTS, "claims.jsonl", "plans.jsonl", "approvals.jsonl", "rosters.jsonl")
_FORMATS = MappingProxyType({"konsil-evidence/1": _OLD_PARTS, "konsil-evidence/2": PARTS})
LARGEST_PART = 2**31
LARGEST_MANIFEST = 2**16
LARGEST_DOCUMENT = 2**24  # of a part that is read in one piece
LARGEST_LINE = 2**22
MOST_DOCUMENTS = 10_000  # plans, claims and the like, of one kind
_BLOCK = 2**20
_DIRECTORY = 2**14  # bytes of a zip archive's list of contents; ten names take one kilobyte
_END = struct.Struct("<4s4H2LH")  # an archive's last record, without a comment (PKWARE's APPNOTE, 4.3.16)
_LARGE_END_BYTES = 20  # of the record that leads to a second, larger list (4.3.15)
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # of a zip archive: the same content gives the same file

_HINT = "It was changed after it was packed, or made by another version. Ask the hospital for a fresh one."

Model = TypeVar("Model", bound=BaseModel)


class Part(Evolving):
    """One file in the archive."""

    bytes: Annotated[int, Field(ge=0, le=LARGEST_PART)]
    sha256: Digest


class Manifest(Evolving):
    """What a bundle holds, signed with the hospital's identity key.

    Attributes:
        public_key: The key that signed this, which signs the ledger's next entry too.
        software_digest: Of the hospital's installed ``shared_models``.
        egress_digest: SHA-256 of the hospital's egress log, which stays there: who wants to see it can compare.
        parts: Every file but this one, by name.
    """

    format: Annotated[Literal["konsil-evidence/1", "konsil-evidence/2"], ALWAYS_WRITTEN] = "konsil-evidence/2"
    hospital: Name
    time: Time
    public_key: Digest
    software_digest: Digest
    egress_digest: Digest
    parts: dict[str, Part]
    signature: Annotated[Signature, ALWAYS_WRITTEN] = "0" * 128

    def payload(self) -> bytes:
        """What is signed: canonical JSON of all of it but the signature."""
        return rfc8785.dumps(self.model_dump(mode="json", exclude={"signature"}))


class Shown(Evolving):
    """What a coordinator showed a hospital before it asked for something; see ``receipts.Anchor``.

    Attributes:
        last: Hash of the charge of the hospital's own last receipt.
        everybody: Digest over the last receipts of all hospitals.
    """

    time: str
    study: Name
    purpose: Annotated[Literal["train", "evaluate"] | None, ALWAYS_WRITTEN] = None
    round: Annotated[int | None, ALWAYS_WRITTEN] = None
    attempt: Annotated[int | None, ALWAYS_WRITTEN] = None
    last: Digest | None
    everybody: Digest


class Claim(Evolving):
    """What a hospital says that studies cost one patient, by its own accountant; an auditor computes it again.

    Attributes:
        study: None for all studies together.
        charges: How many were counted.
        epsilon: The tight figure, for the schedule as executed.
        epsilon_filter: What the hospital's Renyi filter holds it at.
        accountant: Whose figure ``epsilon`` is, with its version.
    """

    study: Name | None = None
    charges: Annotated[int, Field(ge=0)]
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    epsilon_filter: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: Delta
    accountant: Annotated[str, Field(max_length=200)]


@dataclass(frozen=True)
class Bundle:
    """One hospital's evidence, whose parts are as the hospital signed them; the large ones are read a line at a time.

    Attributes:
        head: What its head file says; None if it had none.
        roster: As it had it pinned.
        claims: What its studies cost, as it says itself.
        plans: Approved ones. Before format 2 there are none, nor any of what follows.
        approvals: The stewards', signed.
        rosters: All that it has pinned, signed by the consortium's root, oldest first.
    """

    path: Path
    manifest: Manifest
    head: Head | None
    roster: Roster
    claims: tuple[Claim, ...] = ()
    plans: tuple[StudyPlan, ...] = ()
    approvals: tuple[Approval, ...] = ()
    rosters: tuple[SignedRoster, ...] = ()

    def entries(self) -> Iterator[Entry]:
        """Its ledger, oldest first.

        Raises:
            EvidenceError: A line is no entry.
            UnsupportedLedgerError: A later release wrote it.
        """
        for number, line in enumerate(self.lines("ledger.jsonl"), start=1):
            try:
                yield parse_line(line, Entry, f"ledger entry {number}")
            except EvidenceError:
                refuse_entry(line, KINDS, f"ledger entry {number}")
                raise

    def receipts(self) -> Iterator[SignedReceipt]:
        """All that it signed, oldest first.

        Raises:
            EvidenceError: A line is no receipt.
        """
        return self._parsed("receipts.jsonl", SignedReceipt)

    def transcripts(self) -> Iterator[Transcript]:
        """Of the sums that it saw.

        Raises:
            EvidenceError: A line is no transcript.
        """
        return self._parsed("transcripts.jsonl", Transcript)

    def shown(self) -> Iterator[Shown]:
        """What coordinators showed it.

        Raises:
            EvidenceError: A line is none of it.
        """
        return self._parsed("anchors.jsonl", Shown)

    def lines(self, part: str) -> Iterator[bytes]:
        """The lines of a part, without their ends.

        Raises:
            EvidenceError: It cannot be read, or a line is longer than any that we write.
        """
        with _explained(self.path), zipfile.ZipFile(self.path) as archive, archive.open(part) as file:
            yield from split_lines(file, part)

    def _parsed(self, part: str, kind: type[Model]) -> Iterator[Model]:
        return (parse_line(line, kind, f"{part}, line {n}") for n, line in enumerate(self.lines(part), start=1))


def pack(path: Path, key: Ed25519PrivateKey, parts: Mapping[str, bytes], **manifest: Any) -> Manifest:
    """Write a bundle, whole or not at all.

    Args:
        path: Where to.
        key: The hospital's identity; signs the manifest.
        parts: Content by name; ``encode_parts`` makes it.
        manifest: ``hospital``, ``time``, ``software_digest`` and ``egress_digest``.

    Raises:
        EvidenceError: It could not be written.
    """
    listed = {name: Part(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in parts.items()}
    unsigned = Manifest(public_key=public_bytes(key).hex(), parts=listed, **manifest)
    signed = unsigned.model_copy(update={"signature": sign(key, MANIFEST_KIND, unsigned.payload()).hex()})
    temporary = path.with_name(f"{path.name}.zip.new")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {MANIFEST: rfc8785.dumps(signed.model_dump(mode="json")), **parts}.items():
                archive.writestr(zipfile.ZipInfo(name, _EARLIEST), data, zipfile.ZIP_DEFLATED)
        replace_file(path, temporary.read_bytes())
        temporary.unlink()
    except OSError as error:
        raise EvidenceError(f"{path} cannot be written: {error.strerror}", hint="Choose another file.") from None
    return signed


def encode_parts(
    *,
    entries: Iterable[Entry],
    head: Head | None,
    receipts: Iterable[SignedReceipt],
    transcripts: Iterable[Transcript],
    shown: Iterable[Shown],
    roster: Roster,
    claims: Iterable[Claim] = (),
    plans: Iterable[StudyPlan] = (),
    approvals: Iterable[Approval] = (),
    rosters: Iterable[SignedRoster] = (),
) -> dict[str, bytes]:
    """The parts of a bundle, by name, in canonical JSON."""
    identities = {name: key.hex() for name, key in roster.identities.items()}
    slots = [_slot(statement) for statement in head.slots] if head else None
    return {
        "ledger.jsonl": _lines(entries),
        "head.json": rfc8785.dumps(slots),
        "receipts.jsonl": _lines(receipts),
        "transcripts.jsonl": _lines(transcripts),
        "anchors.jsonl": _lines(shown),
        "roster.json": rfc8785.dumps({"digest": roster.digest, "identities": identities}),
        "claims.jsonl": _lines(claims),
        "plans.jsonl": _lines(plans),
        "approvals.jsonl": _lines(approvals),
        "rosters.jsonl": _lines(rosters),
    }


def open_bundle(path: Path) -> Bundle:
    """Open a bundle, and check that it is as its hospital packed it.

    Guarantees:
        * A part that was changed, cut, added or left out is found; so is a manifest that was.
        * Nothing is written, nothing unpickled, and no part is larger than its manifest says. Memory is bounded by
          ``LARGEST_DOCUMENT`` and what is made of it, whatever the size of the file.

    Raises:
        UnsupportedVersionError: A later release wrote it, or a part of it.
        EvidenceError: What does not hold.
    """
    with _explained(path):
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(archive)
            for name in _FORMATS[manifest.format]:
                _check_part(archive, name, manifest)
            slots, roster = json.loads(_whole(archive, "head.json")), json.loads(_whole(archive, "roster.json"))
            identities = {str(name): bytes.fromhex(key) for name, key in roster["identities"].items()}
            return Bundle(
                path=path,
                manifest=manifest,
                head=Head((_statement(slots[0]), _statement(slots[1]))) if slots else None,
                roster=Roster(str(roster["digest"]), identities),
                claims=_documents(archive, "claims.jsonl", Claim),
                plans=_documents(archive, "plans.jsonl", StudyPlan),
                approvals=_documents(archive, "approvals.jsonl", Approval),
                rosters=_documents(archive, "rosters.jsonl", SignedRoster),
            )


def read_manifest(path: Path) -> Manifest:
    """Whose a bundle is, and what it lists, by the manifest alone; whether the parts are what it lists is not asked.

    Guarantees:
        * The manifest is signed by the key that it names; whose key that is, the caller asks.
        * Memory is bounded, whatever the file holds.

    Raises:
        UnsupportedEvidenceError: A later release packed it.
        EvidenceError: It is no bundle, or its manifest was changed.
    """
    with _explained(path):
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            return _manifest(archive)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    name = path.name  # the folder is nobody's business who sent the file
    try:
        yield
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, RecursionError):
            raise EvidenceError(f"{name} holds something that is no evidence: nested too deep", hint=_HINT) from None
        text = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise EvidenceError(f"{name} cannot be read: {text}", hint=_HINT) from None
    except EvidenceError as error:
        if type(error) is EvidenceError and name not in str(error):
            raise EvidenceError(f"{name}: {error}", hint=error.hint) from None
        raise
    except (ValidationError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, ValidationError):
            refuse_version(error, name, UnsupportedEvidenceError)
        text = explain(error) if isinstance(error, ValidationError) else type(error).__name__
        raise EvidenceError(f"{name} holds something that is no evidence: {text}", hint=_HINT) from None


def _check_directory(path: Path) -> None:
    """Look at the size of the archive's list of contents before Python's reader takes it into memory whole.

    A larger list could be announced by a second record, of archives beyond 4 GB, before the last one: ours have none.
    """
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _END.size - _LARGE_END_BYTES, 0))
        tail = file.read()
    end, before = tail[-_END.size :], tail[: -_END.size]
    if len(end) != _END.size or not end.startswith(b"PK\5\6") or before.startswith(b"PK\6\7"):
        raise EvidenceError("it is no bundle: it does not end as an archive of ours does", hint=_HINT)
    *_, entries, size, _, comment = _END.unpack(end)
    if entries > len(PARTS) + 1 or size > _DIRECTORY or comment:
        raise EvidenceError("it has other parts than a bundle has", hint=_HINT)


def _manifest(archive: zipfile.ZipFile) -> Manifest:
    manifest = Manifest.model_validate_json(_whole(archive, MANIFEST, LARGEST_MANIFEST))
    try:
        verify(bytes.fromhex(manifest.public_key), MANIFEST_KIND, manifest.payload(), bytes.fromhex(manifest.signature))
    except IdentityError:
        raise EvidenceError("the manifest is not signed by the key that it names", hint=_HINT) from None
    parts = _FORMATS[manifest.format]
    if set(manifest.parts) != set(parts):
        raise EvidenceError("the manifest lists other parts than a bundle has", hint=_HINT)
    if sorted(archive.namelist()) != sorted((MANIFEST, *parts)):
        raise EvidenceError("it has other parts than a bundle has", hint=_HINT)
    return manifest


def _check_part(archive: zipfile.ZipFile, name: str, manifest: Manifest) -> None:
    listed, size, digest = manifest.parts[name], 0, hashlib.sha256()
    with archive.open(name) as file:
        while size <= listed.bytes and (block := file.read(_BLOCK)):
            size += len(block)
            digest.update(block)
    if size != listed.bytes or digest.hexdigest() != listed.sha256:
        raise EvidenceError(f"{name} is not what the hospital signed", hint=_HINT)


def _whole(archive: zipfile.ZipFile, name: str, largest: int = LARGEST_DOCUMENT) -> bytes:
    with archive.open(name) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise EvidenceError(f"{name} is larger than it may be", hint=_HINT)
    return data


def _documents(archive: zipfile.ZipFile, name: str, kind: type[Model]) -> tuple[Model, ...]:
    if name not in archive.namelist():
        return ()
    with archive.open(name) as file:
        lines = enumerate(split_lines(file, name), start=1)
        found = tuple(parse_line(line, kind, f"{name}, line {n}") for n, line in islice(lines, MOST_DOCUMENTS + 1))
    if len(found) > MOST_DOCUMENTS:
        raise EvidenceError(f"{name} has more than {MOST_DOCUMENTS} lines", hint=_HINT)
    return found


def split_lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The lines of a file, without their ends, none of them longer than any that we write.

    Raises:
        EvidenceError: A line is longer, or the last one has no end.
    """
    while line := file.readline(LARGEST_LINE + 1):
        if not line.endswith(b"\n"):
            what = "is too long" if len(line) > LARGEST_LINE else "has no end: it was cut"
            raise EvidenceError(f"a line of {name} {what}", hint=_HINT)
        yield line[:-1]


def parse_line(line: bytes, kind: type[Model], where: str) -> Model:
    """What a line of evidence says.

    Guarantees:
        * It is in canonical form (RFC 8785): no key stands there twice, nothing is unknown, and the same content has
          the same bytes everywhere.

    Raises:
        UnsupportedEvidenceError: It is of a later version.
        EvidenceError: It is not one.
    """
    try:
        found = kind.model_validate_json(line)
        canonical = _canonical(found)
    except ValidationError as error:
        refuse_version(error, where, UnsupportedEvidenceError)
        raise EvidenceError(f"{where} is not what it should be: {explain(error)}", hint=_HINT) from None
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{where} is not what it should be: {type(error).__name__}", hint=_HINT) from None
    if canonical != line:
        raise EvidenceError(f"{where} is not in canonical form", hint=_HINT)
    return found


def _canonical(model: BaseModel) -> bytes:
    return canonical_json(model.model_dump(mode="json", exclude_none=not isinstance(model, Shown)))


def _lines(models: Iterable[BaseModel]) -> bytes:
    return b"".join(_canonical(model) + b"\n" for model in models)


def _slot(statement: Statement | None) -> dict[str, Any] | None:
    if statement is None:
        return None
    return {"seq": statement.seq, "hash": statement.hash, "signature": statement.signature.hex()}


def _statement(slot: Mapping[str, Any] | None) -> Statement | None:
    return Statement(int(slot["seq"]), str(slot["hash"]), bytes.fromhex(slot["signature"])) if slot else None
