"""An evidence bundle: what one hospital shows an auditor, as one file. Packing it, and unpacking it checked.

A zip archive of a signed manifest and the parts it lists. Unpacking proves that nothing was changed since the hospital
packed it; whether what is in it holds, and agrees with others' evidence, is the auditor's question.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, Field, ValidationError

from shared_models.config import ALWAYS_WRITTEN, Evolving, Name, explain
from shared_models.durable import replace_file
from shared_models.errors import EvidenceError, IdentityError, UnsupportedEvidenceError, UnsupportedLedgerError
from shared_models.identity import public_bytes, sign, verify
from shared_models.privacy.entries import KINDS, Delta, Digest, Entry, Signature, Time, canonical_json
from shared_models.privacy.head import Head, Statement
from shared_models.receipts import SignedReceipt
from shared_models.secagg.key_agreement import Roster
from shared_models.secagg.protocol import Transcript
from shared_models.versions import refuse_entry, refuse_version

MANIFEST, MANIFEST_KIND = "manifest.json", "evidence-bundle"
PARTS = ("ledger.jsonl", "head.json", "receipts.jsonl", "transcripts.jsonl", "anchors.jsonl", "roster.json")
LARGEST_PART = 2**31
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

    format: Annotated[Literal["konsil-evidence/1"], ALWAYS_WRITTEN] = "konsil-evidence/1"
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
    """One hospital's evidence.

    Attributes:
        entries: Its ledger, oldest first.
        head: What its head file says; None if it had none.
        receipts: All that it signed, oldest first.
        transcripts: Of the sums that it saw.
        shown: What coordinators showed it.
        roster: As it has pinned it.
    """

    manifest: Manifest
    entries: tuple[Entry, ...]
    head: Head | None
    receipts: tuple[SignedReceipt, ...]
    transcripts: tuple[Transcript, ...]
    shown: tuple[Shown, ...]
    roster: Roster


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
    }


def unpack(path: Path) -> Bundle:
    """Read a bundle, and check that it is as its hospital packed it.

    Guarantees:
        * A part that was changed, cut, added or left out is found; so is a manifest that was.
        * Nothing is written, nothing unpickled, and no part is larger than its manifest says.

    Raises:
        UnsupportedVersionError: A later release wrote it, or a part of it.
        EvidenceError: What does not hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _bundle(*_contents(archive))
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise EvidenceError(f"{path} cannot be read: {error}", hint=_HINT) from None
    except UnsupportedLedgerError:
        raise
    except EvidenceError as error:
        raise EvidenceError(f"{path}: {error}", hint=error.hint) from None
    except (ValidationError, ValueError, TypeError, LookupError, RecursionError) as error:
        if isinstance(error, ValidationError):
            refuse_version(error, str(path), UnsupportedEvidenceError)
        text = explain(error) if isinstance(error, ValidationError) else type(error).__name__
        raise EvidenceError(f"{path} holds something that is no evidence: {text}", hint=_HINT) from None


def _contents(archive: zipfile.ZipFile) -> tuple[Manifest, dict[str, bytes]]:
    if sorted(archive.namelist()) != sorted((MANIFEST, *PARTS)):
        raise EvidenceError("it has other parts than a bundle has", hint=_HINT)
    manifest = _manifest(_read(archive, MANIFEST, LARGEST_PART))
    return manifest, {name: _part(archive, name, manifest) for name in PARTS}


def _read(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    with archive.open(name) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise EvidenceError(f"{name} is larger than it may be", hint=_HINT)
    return data


def _manifest(data: bytes) -> Manifest:
    manifest = Manifest.model_validate_json(data)
    try:
        verify(bytes.fromhex(manifest.public_key), MANIFEST_KIND, manifest.payload(), bytes.fromhex(manifest.signature))
    except IdentityError:
        raise EvidenceError("the manifest is not signed by the key that it names", hint=_HINT) from None
    if set(manifest.parts) != set(PARTS):
        raise EvidenceError("the manifest lists other parts than a bundle has", hint=_HINT)
    return manifest


def _part(archive: zipfile.ZipFile, name: str, manifest: Manifest) -> bytes:
    listed = manifest.parts[name]
    data = _read(archive, name, listed.bytes)
    if len(data) != listed.bytes or hashlib.sha256(data).hexdigest() != listed.sha256:
        raise EvidenceError(f"{name} is not what the hospital signed", hint=_HINT)
    return data


def _bundle(manifest: Manifest, parts: Mapping[str, bytes]) -> Bundle:
    slots, roster = json.loads(parts["head.json"]), json.loads(parts["roster.json"])
    identities = {name: bytes.fromhex(key) for name, key in roster["identities"].items()}
    return Bundle(
        manifest=manifest,
        entries=tuple(_entries(parts["ledger.jsonl"])),
        head=Head((_statement(slots[0]), _statement(slots[1]))) if slots else None,
        receipts=tuple(_parsed(parts["receipts.jsonl"], SignedReceipt)),
        transcripts=tuple(_parsed(parts["transcripts.jsonl"], Transcript)),
        shown=tuple(_parsed(parts["anchors.jsonl"], Shown)),
        roster=Roster(roster["digest"], identities),
    )


def _lines(models: Iterable[BaseModel]) -> bytes:
    dumped = (model.model_dump(mode="json", exclude_none=not isinstance(model, Shown)) for model in models)
    return b"".join(canonical_json(fields) + b"\n" for fields in dumped)


def _parsed(data: bytes, kind: type[Model]) -> Iterator[Model]:
    return (kind.model_validate_json(line) for line in data.splitlines())


def _entries(data: bytes) -> Iterator[Entry]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            yield Entry.model_validate_json(line)
        except ValidationError:
            refuse_entry(line, KINDS, f"ledger entry {number}")
            raise


def _slot(statement: Statement | None) -> dict[str, Any] | None:
    if statement is None:
        return None
    return {"seq": statement.seq, "hash": statement.hash, "signature": statement.signature.hex()}


def _statement(slot: Mapping[str, Any] | None) -> Statement | None:
    return Statement(int(slot["seq"]), str(slot["hash"]), bytes.fromhex(slot["signature"])) if slot else None
