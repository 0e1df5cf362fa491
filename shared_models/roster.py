"""Who is in the consortium: a list of hospitals and their public keys, signed by the consortium's root key.

The root key may live on a machine without a network. A coordinator can delay a roster, but it can neither add a
hospital nor change a key, and whoever has pinned a version takes no older one.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError, model_validator

from shared_models.config import ALWAYS_WRITTEN, Count, Evolving, Name, explain
from shared_models.errors import (
    ForeignRosterError,
    ForkedRosterError,
    IdentityError,
    MalformedRosterError,
    OlderRosterError,
    RepeatedMemberError,
    RosterSignatureError,
    UnsupportedRosterError,
)
from shared_models.identity import fingerprint, public_bytes, sign, verify
from shared_models.secagg.key_agreement import Roster
from shared_models.versions import refuse_version

SIGNED = "roster"  # the kind of signature

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[int, Field(ge=0, le=2**53 - 1)]  # since 1970, UTC; RFC 8785 writes no larger integer
Text = Annotated[str, Field(min_length=1, max_length=200)]
NodeKey = Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{1,300}$")]


class Member(Evolving):
    """One hospital, as the consortium admitted it.

    Attributes:
        name: By which everybody calls it; never given to another hospital.
        display_name: For people.
        identity: Ed25519 public key, 32 bytes in hexadecimal: signs its ledger and its messages.
        node_key: Flower's node key (ECDSA P-384) as OpenSSH writes it, without a comment: who is connecting.
        tls_key: SHA-256 of the SubjectPublicKeyInfo of its TLS client certificate's key, in hexadecimal.
        public_size: Number of patients, declared and rounded.
        ledger_genesis: Hash of the first entry of its privacy ledger; None where it is not known.
        valid_from: First second, in Unix time, at which it is a member.
        valid_until: First second at which it is one no longer.
        revoked: Whether it was turned out before its time.
    """

    name: Name
    display_name: Text
    identity: Hex32
    node_key: NodeKey
    tls_key: Hex32
    public_size: Count
    ledger_genesis: Annotated[Hex32 | None, ALWAYS_WRITTEN] = None
    valid_from: Seconds
    valid_until: Seconds
    revoked: Annotated[bool, ALWAYS_WRITTEN] = False

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> "Member":
        if self.valid_until <= self.valid_from:
            raise ValueError("valid_until must be after valid_from")
        return self

    def valid(self, now: float) -> bool:
        """Whether it is a member at this moment, in Unix time."""
        return not self.revoked and self.valid_from <= now < self.valid_until


class Coordinator(Evolving):
    """Who runs the studies.

    Attributes:
        name: Its name.
        address: ``host:port`` at which hospitals reach it.
        authority: SHA-256 of the TLS authority's certificate (DER), in hexadecimal; None where each party checks it.
    """

    name: Name
    address: Text
    authority: Annotated[Hex32 | None, ALWAYS_WRITTEN] = None


class UnsignedRoster(Evolving):
    """What the root key signs.

    Attributes:
        format: Version of this format.
        consortium: Whose roster it is.
        version: Grows with every signature.
        members: Revoked and expired ones included, so that no name or key is used again.
        root_fingerprint: ``identity.fingerprint`` of the root public key.
    """

    format: Annotated[Literal[1], ALWAYS_WRITTEN] = 1
    consortium: Name
    version: Annotated[int, Field(ge=1, le=2**31)]
    coordinator: Coordinator
    members: Annotated[tuple[Member, ...], Field(max_length=10_000)]
    root_fingerprint: Text

    def payload(self) -> bytes:
        """What is signed: canonical JSON (RFC 8785)."""
        return rfc8785.dumps(self.model_dump(mode="json", exclude={"signature"}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is signed, in hexadecimal."""
        return hashlib.sha256(self.payload()).hexdigest()

    def member(self, name: str) -> Member | None:
        """The member of this name, whether it is valid or not."""
        return next((member for member in self.members if member.name == name), None)


class SignedRoster(UnsignedRoster):
    """A roster with the root key's signature, 64 bytes in hexadecimal."""

    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True)
class Pin:
    """The newest roster that somebody has accepted."""

    version: int
    digest: str


def sign_roster(root: Ed25519PrivateKey, roster: UnsignedRoster) -> SignedRoster:
    """Sign a roster with the consortium's root key.

    Raises:
        RepeatedMemberError: Two members share a name or a key.
        ForeignRosterError: The roster names another root key.
    """
    _check_root(roster, public_bytes(root))
    _check_distinct(roster.members)
    fields = roster.model_dump(exclude={"signature"})
    return SignedRoster(**fields, signature=sign(root, SIGNED, roster.payload()).hex())


def verify_roster(document: bytes | dict[str, Any], root_public: bytes, *, pinned: Pin | None = None) -> SignedRoster:
    """Read a roster and accept it, or say why not.

    Guarantees:
        * What is returned was signed by the root key, is not older than ``pinned``, and names every hospital once and
          every key once.

    Args:
        document: The JSON file's bytes, or what they hold.
        root_public: The root public key, as it was checked by telephone.
        pinned: The newest roster accepted before.

    Raises:
        UnsupportedRosterError: It is of another format.
        MalformedRosterError: It is not a roster.
        ForeignRosterError: It names another root key.
        RosterSignatureError: It has no signature, or one that the root key did not make.
        RepeatedMemberError: Two members share a name or a key.
        OlderRosterError, ForkedRosterError: It is not the successor of what was accepted before.
    """
    roster = _genuine_bytes(document, root_public) if isinstance(document, bytes) else _genuine(document, root_public)
    if pinned is not None:
        _check_succeeds(roster, pinned)
    return roster


def _genuine(document: bytes | dict[str, Any], root_public: bytes) -> SignedRoster:
    """The roster, once it is known to be the root key's."""
    roster = _parse(document)
    _check_root(roster, root_public)
    try:
        verify(root_public, SIGNED, roster.payload(), bytes.fromhex(roster.signature))
    except IdentityError:
        raise RosterSignatureError(
            f"the signature on roster version {roster.version} is not the consortium's",
            hint="It was changed after it was signed. Get the roster again; do not use this one.",
        ) from None
    _check_distinct(roster.members)
    return roster


# A roster of a thousand members takes tens of milliseconds to verify, and a process that simulates them all reads it a
# thousand times. Both results depend on the arguments alone; what is refused is not kept.
_genuine_bytes = lru_cache(maxsize=2)(_genuine)


def members_now(roster: UnsignedRoster, now: float) -> Roster:
    """The identity keys of everybody who is a member at this moment, in Unix time."""
    return _roster_of(tuple((m.name, m.identity) for m in roster.members if m.valid(now)))


@lru_cache(maxsize=2)
def _roster_of(members: tuple[tuple[str, str], ...]) -> Roster:
    return Roster.of({name: bytes.fromhex(identity) for name, identity in members})


def _parse(document: bytes | dict[str, Any]) -> SignedRoster:
    hint = "It must be the JSON file that konsil-coordinator sign wrote."
    try:
        fields = document if isinstance(document, dict) else json.loads(document)
        if isinstance(fields, dict) and not fields.get("signature"):
            raise RosterSignatureError("the roster is not signed", hint="Sign it: konsil-coordinator sign.")
        return SignedRoster.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        refuse_version(error, "this roster", UnsupportedRosterError)
        raise MalformedRosterError(f"this is no roster: {explain(error)}", hint=hint) from None
    except (ValueError, TypeError, RecursionError):
        raise MalformedRosterError("this is no roster: it is not JSON", hint=hint) from None


def _check_root(roster: UnsignedRoster, root_public: bytes) -> None:
    if roster.root_fingerprint != fingerprint(root_public):
        raise ForeignRosterError(
            f"the roster is of another root key, {roster.root_fingerprint[:19]}…",
            hint="It belongs to another consortium, or the root key was changed. Call the coordinator.",
        )


def _check_distinct(members: Iterable[Member]) -> None:
    seen: dict[str, str] = {}
    for member in members:
        for what in ("name", "identity", "node_key", "tls_key"):
            value = f"{what} {getattr(member, what)}"
            if value in seen:
                raise RepeatedMemberError(
                    f"{seen[value]} and {member.name} have the same {what}",
                    hint="Every hospital has a name and keys of its own, also one that was revoked.",
                )
            seen[value] = member.name


def _check_succeeds(roster: SignedRoster, pinned: Pin) -> None:
    if roster.version < pinned.version:
        raise OlderRosterError(
            f"roster version {roster.version} is older than version {pinned.version}, which was accepted before",
            hint="Somebody shows an old list: a revoked hospital may be on it. Get the newest one.",
        )
    if roster.version == pinned.version and roster.digest != pinned.digest:
        raise ForkedRosterError(
            f"roster version {roster.version} differs from the version {pinned.version} that was accepted before",
            hint="The consortium signed two lists of one version. Call the other hospitals.",
        )
