"""Everything of an attempt is bound to its context, and keys count only with the signature of their owner."""

import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_models.errors import KeySignatureError, UnknownHospitalError, WeakKeyError
from shared_models.secagg.key_agreement import (
    Advertisement,
    KeyPairs,
    advertise,
    attempt_context,
    join,
    pairwise_mask_key,
    self_mask_key,
    share_key,
    verify_advertisement,
)
from tests.shared_models.secagg.attempts import announcement, identity, names, roster

NAMES = names(4)
ANNOUNCED = announcement(NAMES)
CONTEXT = bytes(range(32))
ANN, BOB = (
    KeyPairs(*(X25519PrivateKey.from_private_bytes(bytes([byte]) * 32) for byte in pair)) for pair in (b"\1\2", b"\3\4")
)


def keys(name: str = NAMES[0], context0: bytes = ANNOUNCED.context0, pairs: KeyPairs = ANN) -> Advertisement:
    return advertise(pairs, identity(name), hospital=name, context0=context0)


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "evaluate"},
        {"study": "another"},
        {"plan_digest": "0" * 64},
        {"roster_digest": "0" * 64},
        {"round": 2},
        {"attempt": 2},
        {"parameters_digest": "0" * 64},
        {"invited": tuple(NAMES[:3])},
        {"threshold": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_announcement_changes_the_context(change: dict[str, Any]) -> None:
    """So that signatures and keys of one attempt are worth nothing in another."""
    other = announcement(NAMES, **change)

    assert other.context0 != ANNOUNCED.context0
    with pytest.raises(KeySignatureError):
        verify_advertisement(keys(), roster=roster(NAMES), context0=other.context0)


@given(order=st.permutations(NAMES))
def test_the_context_depends_on_the_cohort_and_not_on_its_order(order: list[str]) -> None:
    """Who was shown other keys has another context: nothing of his cancels."""
    cohort = {name: keys(name, pairs=KeyPairs.generate(os.urandom)) for name in order}

    context = attempt_context(ANNOUNCED.context0, list(cohort.values()))

    assert context == attempt_context(ANNOUNCED.context0, [cohort[name] for name in NAMES])
    assert context != attempt_context(ANNOUNCED.context0, [cohort[name] for name in NAMES[1:]])
    assert context != attempt_context(bytes(32), list(cohort.values()))


def test_two_hospitals_agree_on_mask_and_channel() -> None:
    """Each from its own private and the other's public halves; and no two derived keys are the same."""
    ann, bob = keys("ann", pairs=ANN), keys("bob", pairs=BOB)

    mask = pairwise_mask_key(ANN.masking, bob.masking_key, context=CONTEXT, names=("ann", "bob"))
    there = share_key(ANN.channel, bob.channel_key, context=CONTEXT, sender="ann", receiver="bob")
    back = share_key(ANN.channel, bob.channel_key, context=CONTEXT, sender="bob", receiver="ann")

    assert mask == pairwise_mask_key(BOB.masking, ann.masking_key, context=CONTEXT, names=("bob", "ann"))
    assert there == share_key(BOB.channel, ann.channel_key, context=CONTEXT, sender="ann", receiver="bob")
    assert back == share_key(BOB.channel, ann.channel_key, context=CONTEXT, sender="bob", receiver="ann")
    again = pairwise_mask_key(ANN.masking, bob.masking_key, context=bytes(32), names=("ann", "bob"))
    own = self_mask_key(bytes(32), context=CONTEXT)
    assert len({mask, there, back, again, own, self_mask_key(bytes(32), context=bytes(32))}) == 6


def test_every_bit_of_a_seed_counts() -> None:
    """256 flips, 256 other keys."""
    flipped = {self_mask_key((1 << bit).to_bytes(32, "big"), context=CONTEXT) for bit in range(256)}

    assert len(flipped | {self_mask_key(bytes(32), context=CONTEXT)}) == 257


@pytest.mark.parametrize("field", ["masking_key", "channel_key", "signature"])
def test_a_changed_advertisement_is_refused(field: str) -> None:
    """Nobody puts a key in the place of another's."""
    changed = keys().model_copy(update={field: bytes(len(getattr(keys(), field)))})

    with pytest.raises(KeySignatureError):
        verify_advertisement(changed, roster=roster(NAMES), context0=ANNOUNCED.context0)


def test_swapped_roles_are_refused() -> None:
    """A channel key is no masking key."""
    honest = keys()
    swapped = honest.model_copy(update={"masking_key": honest.channel_key, "channel_key": honest.masking_key})

    with pytest.raises(KeySignatureError):
        verify_advertisement(swapped, roster=roster(NAMES), context0=ANNOUNCED.context0)


def test_keys_of_a_stranger_are_refused() -> None:
    """However well signed."""
    with pytest.raises(UnknownHospitalError):
        verify_advertisement(keys("stranger"), roster=roster(NAMES), context0=ANNOUNCED.context0)


def test_a_genuine_advertisement_is_accepted() -> None:
    """Otherwise all of the above would say little."""
    verify_advertisement(keys(), roster=roster(NAMES), context0=ANNOUNCED.context0)


class LowOrder:
    """A private key whose public half is zero, with which every agreement is zero."""

    def public_key(self) -> "LowOrder":
        """Has the same bytes."""
        return self

    def public_bytes_raw(self) -> bytes:
        """The point of order 4 at zero."""
        return bytes(32)


def test_a_key_of_low_order_is_refused() -> None:
    """A member that advertises one would have a mask that everybody knows."""
    hostile: Any = KeyPairs(LowOrder(), ANN.channel)  # type: ignore[arg-type]  # that is the attack

    with pytest.raises(WeakKeyError):
        verify_advertisement(keys(pairs=hostile), roster=roster(NAMES), context0=ANNOUNCED.context0)


def test_names_are_joined_without_ambiguity() -> None:
    """Two different lists of names never give the same bytes."""
    assert join(b"share", "a", "bc") != join(b"share", "ab", "c") != join(b"share", "abc")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_keys_of_another_length_are_no_keys(length: int) -> None:
    """Refused where the message is read."""
    with pytest.raises(ValidationError):
        Advertisement(hospital="ann", masking_key=bytes(length), channel_key=bytes(32), signature=bytes(64))


def test_key_pairs_are_not_shown() -> None:
    """And are as fresh as their entropy."""
    raw = ANN.masking.private_bytes_raw()

    assert raw == b"\1" * 32
    assert raw.hex() not in repr(ANN)
    assert repr(raw) not in repr(ANN)
