"""Enough shares give the secret, fewer give nothing, and a changed one is found and blamed on who changed it."""

import os
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.errors import BadShareError, TamperedShareError, WrongSharesError
from shared_models.secagg.secret_sharing import (
    PRIME,
    SEALED_BYTES,
    SHARE_BYTES,
    SealedShare,
    Secret,
    Shares,
    recover,
    seal,
    share_hash,
    split,
    unseal,
)

SECRETS = st.binary(min_size=32, max_size=32)
CONTEXT, KEY = bytes(range(32)), bytes(range(32, 64))


def test_the_field_is_prime_and_holds_every_secret() -> None:
    """Fermat's test to the first primes; above 2**256."""
    assert PRIME > 2**256
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37))


@given(secret=SECRETS, holders=st.integers(1, 30), data=st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, holders: int, data: st.DataObject) -> None:
    """And so do more."""
    threshold = data.draw(st.integers(1, holders))
    shares = dict(enumerate(split(secret, threshold=threshold, holders=holders, entropy=os.urandom), 1))
    some = data.draw(st.lists(st.sampled_from(sorted(shares)), min_size=threshold, unique=True))

    assert recover({index: shares[index] for index in some}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, (2**256 - 1).to_bytes(32, "big")])
def test_extreme_secrets_survive(secret: bytes) -> None:
    """The largest is above many primes of 256 bits, not above this one."""
    shares = dict(enumerate(split(secret, threshold=3, holders=5, entropy=os.urandom), 1))

    assert {recover({i: shares[i] for i in some}) for some in combinations(shares, 3)} == {secret}


def test_fewer_shares_fit_every_secret() -> None:
    """For t - 1 shares and any other secret there is one polynomial through both: the shares say nothing."""
    secret, other = os.urandom(32), os.urandom(32)
    shares = split(secret, threshold=3, holders=5, entropy=os.urandom)
    known = {1: shares[0], 2: shares[1]}

    # Shares at 1 and 2 and `other` at 0 fix a share at 3; with it the three give `other`.
    third = (3 * int.from_bytes(shares[1], "big") - 3 * int.from_bytes(shares[0], "big")) % PRIME
    third = (third + int.from_bytes(other, "big")) % PRIME

    assert recover(known | {3: third.to_bytes(SHARE_BYTES, "big")}) == other


def test_too_few_shares_do_not_give_the_secret() -> None:
    """They give other bytes, or an error."""
    secret = os.urandom(32)
    shares = dict(enumerate(split(secret, threshold=4, holders=6, entropy=os.urandom), 1))

    for some in combinations(shares, 3):
        try:
            found = recover({i: shares[i] for i in some})
        except WrongSharesError:
            continue
        assert found != secret


@pytest.mark.parametrize(
    "shares",
    [{}, {0: bytes(33)}, {70_000: bytes(33)}, {1: bytes(32)}, {1: b"\xff" * 33}, {1: PRIME.to_bytes(33, "big")}],
)
def test_what_is_no_share_is_refused(shares: dict[int, bytes]) -> None:
    """No index 0, which would be the secret itself; nothing outside the field."""
    with pytest.raises(WrongSharesError):
        recover(shares)


@pytest.mark.parametrize(("threshold", "holders"), [(0, 3), (4, 3), (1, 70_000)])
def test_impossible_thresholds_are_refused(threshold: int, holders: int) -> None:
    """A fault of the program, found at once."""
    with pytest.raises(ValueError, match="t <= n"):
        split(bytes(32), threshold=threshold, holders=holders, entropy=os.urandom)


def test_a_secret_hides_and_can_be_erased() -> None:
    """From representations; and from memory, as far as Python goes."""
    secret = Secret(b"a secret of this hospital")
    assert "hospital" not in repr(secret)

    secret.erase()

    assert secret.reveal() == b""


# sealing


def sealed() -> tuple[Shares, SealedShare]:
    shares = Shares(Secret(b"1" * SHARE_BYTES), Secret(b"2" * SHARE_BYTES))
    return shares, seal(shares, key=KEY, context=CONTEXT, dealer="ann", holder="bob")


def test_a_sealed_share_opens_for_its_holder() -> None:
    """Both shares come back, in their roles."""
    shares, box = sealed()

    opened = unseal(box, key=KEY, leaf=box.leaf(), context=CONTEXT, dealer="ann", holder="bob")

    assert len(box.ciphertext) == SEALED_BYTES
    assert (opened.of_seed.reveal(), opened.of_key.reveal()) == (shares.of_seed.reveal(), shares.of_key.reveal())


@pytest.mark.parametrize("field", ["ciphertext", "self_hash", "key_hash"])
def test_whoever_changes_a_sealed_share_does_not_frame_its_dealer(field: str) -> None:
    """Every byte of it is under the dealer's signature."""
    _, box = sealed()
    value = getattr(box, field)

    for position in range(len(value)):
        changed = bytearray(value)
        changed[position] ^= 1
        tampered = box.model_copy(update={field: bytes(changed)})
        with pytest.raises(TamperedShareError):
            unseal(tampered, key=KEY, leaf=box.leaf(), context=CONTEXT, dealer="ann", holder="bob")


@pytest.mark.parametrize(
    "changes",
    [{"key": bytes(32)}, {"context": bytes(32)}, {"dealer": "eve"}, {"holder": "eve"}],
    ids=["key", "context", "dealer", "holder"],
)
def test_a_sealed_share_opens_for_nobody_and_nothing_else(changes: dict[str, object]) -> None:
    """Key, context, sender and receiver are all bound."""
    _, box = sealed()
    arguments = {"key": KEY, "leaf": box.leaf(), "context": CONTEXT, "dealer": "ann", "holder": "bob"}

    with pytest.raises(BadShareError, match="decrypt"):
        unseal(box, **arguments | changes)  # type: ignore[arg-type]  # one of the keyword arguments above


def test_commitments_tell_roles_and_names_apart() -> None:
    """No share can be shown in another's place."""
    share = b"1" * SHARE_BYTES
    hashes = {
        share_hash(share, context=context, of=of, dealer=dealer, holder=holder)
        for context in (CONTEXT, KEY)
        for of in ("seed", "key")
        for dealer, holder in (("ann", "bob"), ("bob", "ann"), ("an", "nbob"))
    }

    assert len(hashes) == 12
