"""Key agreement: what an attempt's keys and signatures are bound to, fresh key pairs, and the keys derived from them.

Wherever the design joins names to other text (its sign ``‖``), a NUL goes between: names hold none, so that no two
different lists of names give the same bytes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import ConfigDict, Field

from shared_models.config import ALWAYS_WRITTEN, Evolving, Name
from shared_models.errors import IdentityError, KeySignatureError, UnknownHospitalError, WeakKeyError
from shared_models.identity import sign, verify

PROTOCOL: Literal["secure-aggregation/v1"] = "secure-aggregation/v1"
KEYS_KIND = "secagg-keys"

Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Field(min_length=64, max_length=64)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Purpose = Literal["train", "evaluate"]

# Secret random bytes; ``os.urandom`` everywhere but in tests and known answers.
Entropy = Callable[[int], bytes]


class SecAggMessage(Evolving):
    """Anything that crosses the wire or is kept as evidence: frozen, sizes checked, bytes as base64 in JSON."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


class Announcement(SecAggMessage):
    """Stage 1, from the coordinator: the fields of ``context0``, by which both sides know what they speak about.

    Attributes:
        purpose: Train or evaluate; each has a context of its own, so that no keystream is used twice.
        roster_digest: Of the roster that identity keys are taken from.
        parameters_digest: Of the global parameters that stage 3 will carry.
        invited: Names of the hospitals invited.
        threshold: t, hospitals without whom nothing is unmasked; one number for all.
    """

    protocol: Annotated[Literal["secure-aggregation/v1"], ALWAYS_WRITTEN] = PROTOCOL
    purpose: Purpose
    study: Name
    plan_digest: Digest
    roster_digest: Digest
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    attempt: Annotated[int, Field(ge=1, le=1_000)]
    parameters_digest: Digest
    invited: tuple[Name, ...]
    threshold: Annotated[int, Field(ge=0, le=1_000)]

    @cached_property
    def context0(self) -> bytes:
        """SHA-256 of all fields as canonical JSON (RFC 8785)."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).digest()


class Advertisement(SecAggMessage):
    """Stage 1, from a hospital: its fresh public keys, signed over ``context0`` with its identity.

    Attributes:
        masking_key: X25519; secrets of pairs come from it.
        channel_key: X25519; shares are encrypted with it.
    """

    hospital: Name
    masking_key: Bytes32
    channel_key: Bytes32
    signature: Bytes64


@dataclass(frozen=True)
class Roster:
    """The consortium's hospitals, as this party has pinned them.

    Attributes:
        digest: SHA-256 of the members as canonical JSON (RFC 8785), in hexadecimal.
        identities: Each hospital's Ed25519 public key, by name.
    """

    digest: str
    identities: Mapping[str, bytes]

    @classmethod
    def of(cls, identities: Mapping[str, bytes]) -> "Roster":
        """The roster of these hospitals; whoever holds the same names and keys has the same digest."""
        members = {name: key.hex() for name, key in identities.items()}
        return cls(hashlib.sha256(rfc8785.dumps(members)).hexdigest(), dict(identities))


@dataclass(frozen=True, repr=False)
class KeyPairs:
    """A hospital's two X25519 pairs for one attempt. In memory only, and never for a second attempt."""

    masking: X25519PrivateKey
    channel: X25519PrivateKey

    @classmethod
    def generate(cls, entropy: Entropy) -> "KeyPairs":
        """Two fresh pairs, 256 random bits each."""
        return cls(X25519PrivateKey.from_private_bytes(entropy(32)), X25519PrivateKey.from_private_bytes(entropy(32)))


def advertise(pairs: KeyPairs, identity: Ed25519PrivateKey, *, hospital: str, context0: bytes) -> Advertisement:
    """Sign the public halves for one attempt.

    Guarantees:
        * The signature holds for this hospital, these two keys in these roles, and this ``context0`` only.
    """
    masking = pairs.masking.public_key().public_bytes_raw()
    channel = pairs.channel.public_key().public_bytes_raw()
    signature = sign(identity, KEYS_KIND, _keys_payload(context0, hospital, masking, channel))
    return Advertisement(hospital=hospital, masking_key=masking, channel_key=channel, signature=signature)


def verify_advertisement(advertisement: Advertisement, *, roster: Roster, context0: bytes) -> None:
    """Check that keys were advertised by the member of the roster that they are said to belong to, for this attempt.

    Raises:
        UnknownHospitalError: No such hospital is on the roster.
        KeySignatureError: The signature is another's, for other keys, or for another attempt.
        WeakKeyError: A key is one of the few with which every agreement gives zero.
    """
    name = advertisement.hospital
    identity = roster.identities.get(name)
    if identity is None:
        raise UnknownHospitalError(f"{name} is not on the roster", hint="Its keys count for nothing.")
    payload = _keys_payload(context0, name, advertisement.masking_key, advertisement.channel_key)
    try:
        verify(identity, KEYS_KIND, payload, advertisement.signature)
    except IdentityError:
        raise KeySignatureError(
            f"the keys advertised for {name} are not signed by it for this attempt",
            hint="Somebody put other keys in their place, or replays old ones.",
        ) from None
    probe = X25519PrivateKey.generate()
    for key in (advertisement.masking_key, advertisement.channel_key):
        _exchange(probe, key, name)


def attempt_context(context0: bytes, cohort: Sequence[Advertisement]) -> bytes:
    """``context``: what everything from stage 2 on is bound to, the cohort's keys included.

    Guarantees:
        * Two hospitals that were shown different cohorts have different contexts: their masks do not cancel.
        * The same for every order of the cohort.
    """
    members = [
        {
            "hospital": member.hospital,
            "masking_key": member.masking_key.hex(),
            "channel_key": member.channel_key.hex(),
            "signature": member.signature.hex(),
        }
        for member in sorted(cohort, key=lambda member: member.hospital)
    ]
    return hashlib.sha256(context0 + rfc8785.dumps(members)).digest()


def pairwise_mask_key(own: X25519PrivateKey, peer: bytes, *, context: bytes, names: tuple[str, str]) -> bytes:
    """The key of the keystream that two hospitals share, from either one's side.

    Args:
        own: Masking key of the one.
        peer: Public masking key of the other.
        context: Of the attempt.
        names: Both names, in any order.
    """
    lower, higher = sorted(names)
    return _derive(_exchange(own, peer, f"{lower} or {higher}"), context, b"pairwise mask", lower, higher)


def self_mask_key(seed: bytes, *, context: bytes) -> bytes:
    """The key of the keystream that a hospital puts over its vector by itself, from its 32-byte seed ``b``."""
    return _derive(seed, context, b"self mask")


def share_key(own: X25519PrivateKey, peer: bytes, *, context: bytes, sender: str, receiver: str) -> bytes:
    """The AES-GCM key of the one message from ``sender`` to ``receiver`` in this attempt, from either one's side."""
    return _derive(_exchange(own, peer, f"{sender} or {receiver}"), context, b"share", sender, receiver)


def join(prefix: bytes, *names: str) -> bytes:
    """The design's ``prefix ‖ name ‖ name``, NUL between: one list of names, one string of bytes."""
    return b"\0".join([prefix, *(name.encode("ascii") for name in names)])


def _derive(secret: bytes, context: bytes, label: bytes, *names: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) to 32 bytes: 256 bits in, 256 bits out."""
    return HKDF(algorithm=SHA256(), length=32, salt=context, info=join(label, *names)).derive(secret)


def _exchange(own: X25519PrivateKey, peer: bytes, whose: str) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise WeakKeyError(
            f"a key advertised for {whose} agrees on zero with everybody", hint="It is hostile."
        ) from None


def _keys_payload(context0: bytes, hospital: str, masking: bytes, channel: bytes) -> bytes:
    fields = {"context0": context0, "masking_key": masking, "channel_key": channel}
    return rfc8785.dumps({"hospital": hospital, **{name: value.hex() for name, value in fields.items()}})
