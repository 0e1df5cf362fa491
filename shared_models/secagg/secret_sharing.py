"""Secret sharing: Shamir's scheme over a prime field, shares sealed to their holders, and commitments to all of it.

Python's integers do not compute in constant time: whoever can measure a hospital's processor finely has it anyway.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import Field

from shared_models.config import Name
from shared_models.errors import BadShareError, CommitmentError, IdentityError, TamperedShareError, WrongSharesError
from shared_models.identity import sign, verify
from shared_models.secagg.key_agreement import Bytes32, Bytes64, Entropy, SecAggMessage, join

PRIME = 2**256 + 297  # the smallest above 2**256, so that every 32-byte secret is one field element
SECRET_BYTES = 32
SHARE_BYTES = 33
SEALED_BYTES = 2 * SHARE_BYTES + 16
COMMITMENT_KIND = "secagg-commitment"


class Secret:
    """Bytes that are never shown, and overwritten when they have served.

    Python may have copied them meanwhile; ``erase`` shortens a secret's life, and promises no more than that.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytearray(value)

    def reveal(self) -> bytes:
        """The bytes; empty once erased."""
        return bytes(self._value)

    def erase(self) -> None:
        """Overwrite and forget."""
        self._value[:] = bytes(len(self._value))
        self._value.clear()

    def __repr__(self) -> str:
        return f"Secret({len(self._value)} bytes)"


# Shamir's scheme


def split(secret: bytes, *, threshold: int, holders: int, entropy: Entropy) -> list[bytes]:
    """Split a secret into shares, any ``threshold`` of which give it back.

    Guarantees:
        * Fewer than ``threshold`` shares say nothing about the secret (all but 2**-255 of nothing: coefficients are
          512 random bits modulo the prime).

    Args:
        secret: 32 bytes.
        threshold: t, from 1 to ``holders``.
        holders: Shares to make; at most 2**16.
        entropy: Source of the polynomial.

    Returns:
        Shares of 33 bytes; the share at position i (from 0) has index i + 1.

    Source:
        Shamir, Communications of the ACM 22(11), 1979.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders <= 1 << 16:
        raise ValueError(f"{len(secret)} bytes, {threshold} of {holders}: want 32 bytes and 1 <= t <= n <= 65536")
    coefficients = [int.from_bytes(entropy(64), "big") % PRIME for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))  # highest power first, so that the secret comes last
    return [_evaluate(coefficients, index).to_bytes(SHARE_BYTES, "big") for index in range(1, holders + 1)]


def recover(shares: Mapping[int, bytes]) -> bytes:
    """The secret that shares belong to, all of them used.

    Guarantees:
        * With at least as many genuine shares as the threshold, exactly the secret. With fewer, or with changed ones,
          other bytes or an error: compare with a commitment.

    Args:
        shares: By index, from 1.

    Raises:
        WrongSharesError: A share is no field element, an index is out of range, or the result is no 32-byte secret.
    """
    if not shares or not all(1 <= index <= 1 << 16 for index in shares):
        raise WrongSharesError("no shares, or an index out of range", hint="Nothing was reconstructed.")
    weights = _weights_at_zero(tuple(sorted(shares)))
    value = sum(weights[index] * _field_element(share) for index, share in shares.items()) % PRIME
    if value >> (8 * SECRET_BYTES):
        raise WrongSharesError("shares that do not belong together", hint="Their dealer is at fault.")
    return value.to_bytes(SECRET_BYTES, "big")


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in coefficients:  # Horner
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=8)
def _weights_at_zero(indices: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights at 0: the same for all secrets that one set of holders reconstructs."""
    weights = {}
    for i in indices:
        numerator, denominator = 1, 1
        for j in indices:
            if j != i:
                numerator = numerator * j % PRIME
                denominator = denominator * (j - i) % PRIME
        weights[i] = numerator * pow(denominator, -1, PRIME) % PRIME
    return weights


def _field_element(share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise WrongSharesError("a share is no element of the field", hint="It was changed, or its dealer is at fault.")
    return value


# Commitments: what a dealer signs about the shares that it deals


class SealedShare(SecAggMessage):
    """What a dealer has for one holder.

    Attributes:
        ciphertext: Both shares, encrypted; empty from a dealer to itself.
        self_hash: Commitment to the holder's share of ``b``.
        key_hash: Commitment to the holder's share of the masking key.
    """

    ciphertext: Annotated[bytes, Field(max_length=SEALED_BYTES)]
    self_hash: Bytes32
    key_hash: Bytes32

    def leaf(self) -> bytes:
        """One hash of all three."""
        return hashlib.sha256(hashlib.sha256(self.ciphertext).digest() + self.self_hash + self.key_hash).digest()


class Commitment(SecAggMessage):
    """A dealer's signed word on its seed and on every share, sealed and open, one leaf per holder.

    Attributes:
        seed_hash: Commitment to ``b``.
        leaves: ``SealedShare.leaf`` of every member of the cohort, in the order of their names.
    """

    dealer: Name
    seed_hash: Bytes32
    leaves: Annotated[bytes, Field(max_length=32 * 100)]
    signature: Bytes64

    def digest(self) -> bytes:
        """What is signed, beside the context and the dealer's name."""
        return hashlib.sha256(self.seed_hash + self.leaves).digest()


@dataclass(frozen=True, slots=True)
class Shares:
    """One holder's two shares of one dealer's secrets."""

    of_seed: Secret
    of_key: Secret

    def erase(self) -> None:
        """Overwrite both."""
        self.of_seed.erase()
        self.of_key.erase()


def commit(
    identity: Ed25519PrivateKey, *, context: bytes, dealer: str, seed: bytes, sealed: Sequence[SealedShare]
) -> Commitment:
    """Sign what was dealt, ``sealed`` in the order of the holders' names."""
    unsigned = Commitment(
        dealer=dealer,
        seed_hash=seed_hash(seed, context=context, dealer=dealer),
        leaves=b"".join(share.leaf() for share in sealed),
        signature=bytes(64),
    )
    payload = commitment_payload(context=context, dealer=dealer, digest=unsigned.digest())
    return unsigned.model_copy(update={"signature": sign(identity, COMMITMENT_KIND, payload)})


def verify_commitment(commitment: Commitment, *, identity: bytes, context: bytes, holders: int) -> None:
    """Check that a dealer signed a commitment of the right size for this attempt.

    Raises:
        CommitmentError: It did not.
    """
    dealer = commitment.dealer
    if len(commitment.leaves) != 32 * holders:
        raise CommitmentError(
            f"{dealer}'s commitment is not for {holders} holders", hint="Another version, or hostile."
        )
    payload = commitment_payload(context=context, dealer=dealer, digest=commitment.digest())
    try:
        verify(identity, COMMITMENT_KIND, payload, commitment.signature)
    except IdentityError:
        raise CommitmentError(f"{dealer}'s commitment is not signed by it for this attempt", hint="Forged.") from None


def commitment_payload(*, context: bytes, dealer: str, digest: bytes) -> bytes:
    """The bytes that a dealer signs."""
    return rfc8785.dumps({"context": context.hex(), "dealer": dealer, "digest": digest.hex()})


def seed_hash(seed: bytes, *, context: bytes, dealer: str) -> bytes:
    """Commitment to a self-mask seed. It has 256 random bits, so that a hash hides it."""
    return hashlib.sha256(join(b"seed", dealer) + b"\0" + context + seed).digest()


def share_hash(share: bytes, *, context: bytes, of: str, dealer: str, holder: str) -> bytes:
    """Commitment to one share; ``of`` is ``seed`` or ``key``."""
    return hashlib.sha256(join(b"share", of, dealer, holder) + b"\0" + context + share).digest()


# Sealing


def seal(shares: Shares, *, key: bytes | None, context: bytes, dealer: str, holder: str) -> SealedShare:
    """Encrypt a holder's two shares to it (AES-256-GCM).

    Args:
        shares: Both.
        key: From ``share_key``; used for this one message, so that a constant nonce never repeats. None from a dealer
            to itself: it keeps its own shares.
        context: Of the attempt.
        dealer: Who deals.
        holder: Who gets them.
    """
    of_seed, of_key = shares.of_seed.reveal(), shares.of_key.reveal()
    ciphertext = b"" if key is None else AESGCM(key).encrypt(bytes(12), of_seed + of_key, join(context, dealer, holder))
    return SealedShare(
        ciphertext=ciphertext,
        self_hash=share_hash(of_seed, context=context, of="seed", dealer=dealer, holder=holder),
        key_hash=share_hash(of_key, context=context, of="key", dealer=dealer, holder=holder),
    )


def unseal(sealed: SealedShare, *, key: bytes, leaf: bytes, context: bytes, dealer: str, holder: str) -> Shares:
    """Check a sealed share against what its dealer signed, decrypt it, and check what was inside.

    Guarantees:
        * Whoever changes anything on the way gets ``TamperedShareError``, never an accusation of the dealer.

    Args:
        sealed: As it came.
        key: From ``share_key``.
        leaf: The holder's leaf of the dealer's verified commitment.
        context: Of the attempt.
        dealer: Who dealt.
        holder: Who this is for.

    Raises:
        TamperedShareError: It is not what the dealer signed.
        BadShareError: It is, and it does not decrypt or does not match the dealer's commitments to the open shares.
    """
    if sealed.leaf() != leaf:
        raise TamperedShareError(
            f"the share from {dealer} is not what {dealer} signed", hint="The coordinator changed it on the way."
        )
    try:
        plain = AESGCM(key).decrypt(bytes(12), sealed.ciphertext, join(context, dealer, holder))
    except (InvalidTag, ValueError):
        raise BadShareError(
            f"the share that {dealer} signed does not decrypt", hint="The dealer is at fault."
        ) from None
    of_seed, of_key = plain[:SHARE_BYTES], plain[SHARE_BYTES:]
    if (
        len(of_key) != SHARE_BYTES
        or share_hash(of_seed, context=context, of="seed", dealer=dealer, holder=holder) != sealed.self_hash
        or share_hash(of_key, context=context, of="key", dealer=dealer, holder=holder) != sealed.key_hash
    ):
        raise BadShareError(f"the share from {dealer} does not match its commitment", hint="The dealer is at fault.")
    return Shares(Secret(of_seed), Secret(of_key))
