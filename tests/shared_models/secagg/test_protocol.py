"""The sum is exact whoever drops out and whenever; one upload is noise; and nothing is left behind."""

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare  # type: ignore[import-untyped]  # scipy ships no types

from shared_models.errors import TooFewLeftError
from shared_models.secagg.protocol import (
    Delivery,
    Transcript,
    smallest_threshold,
    tolerated_colluders,
)
from shared_models.secagg.quantize import dequantize, quantization_scale, quantize, rounding_error
from tests.shared_models.secagg.attempts import STAGES, Attempt, names


def patterns(count: int) -> Iterator[dict[str, int]]:
    """Every choice of hospitals that may drop out, each at every stage."""
    spare = count - smallest_threshold(count)
    for number in range(spare + 1):
        for who in combinations(names(count), number):
            for when in product(STAGES, repeat=number):
                yield dict(zip(who, when, strict=True))


def check_exact(count: int, drop_outs: dict[str, int]) -> None:
    attempt = Attempt(count)

    total = attempt.run(drop_outs)

    np.testing.assert_array_equal(total, attempt.plain_sum(drop_outs), str(drop_outs))
    assert attempt.coordinator.dropped == drop_outs


# exactness


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_the_sum_is_exact_for_every_pattern_of_drop_outs_that_leaves_the_threshold(count: int) -> None:
    """At every stage, and the coordinator says who dropped out in which."""
    for drop_outs in patterns(count):
        check_exact(count, drop_outs)


@pytest.mark.soak
@pytest.mark.parametrize("count", [7, 8])
def test_the_sum_is_exact_for_every_pattern_of_two_drop_outs(count: int) -> None:
    """The smallest cohorts that tolerate two, whole."""
    for drop_outs in patterns(count):
        check_exact(count, drop_outs)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), count=st.integers(3, 50))
def test_the_sum_is_exact_for_random_drop_outs_up_to_fifty_hospitals(data: st.DataObject, count: int) -> None:
    """Hospitals drop out at stages of their own, down to the threshold."""
    spare = count - smallest_threshold(count)
    who = data.draw(st.lists(st.sampled_from(names(count)), max_size=spare, unique=True))
    when = data.draw(st.lists(st.sampled_from(STAGES), min_size=len(who), max_size=len(who)))

    check_exact(count, dict(zip(who, when, strict=True)))


def test_whatever_happens_there_is_the_exact_sum_or_none() -> None:
    """Three hospitals, every one at every stage or never: below the threshold nothing is unmasked."""
    for when in product((*STAGES, 6), repeat=3):
        attempt = Attempt(3)
        drop_outs = dict(zip(attempt.names, when, strict=True))
        if min(when) == 6:
            np.testing.assert_array_equal(attempt.run(drop_outs), attempt.plain_sum(drop_outs))
        else:
            with pytest.raises(TooFewLeftError):
                attempt.run(drop_outs)


def test_a_hundred_hospitals_make_a_cohort() -> None:
    """The largest that is allowed, with as many drop-outs as it tolerates, spread over the stages."""
    who = names(100)[: 100 - smallest_threshold(100)]

    check_exact(100, {name: 1 + i % 5 for i, name in enumerate(who)})


def test_the_decoded_mean_is_within_the_stated_error() -> None:
    """The whole way: weights, rounding, masks, a drop-out, unmasking, decoding."""
    random, length, bound = np.random.default_rng(), 200, 2.0
    attempt = Attempt(5, length)
    scale = quantization_scale(bound=bound, hospitals=5)
    updates = {name: random.normal(size=length) / 20 for name in attempt.names}
    weights = dict(zip(attempt.names, (0.2, 0.5, 1.0, 0.7, 0.9), strict=True))
    for name, update in updates.items():
        attempt.encoded[name] = quantize(update, weight=weights[name], bound=bound, scale=scale, uniform=random.random)
    left = attempt.names[1:]

    total = attempt.run({attempt.names[0]: 3})
    weight = sum(weights[name] for name in left)
    mean = dequantize(total, scale=scale, total_weight=weight)

    exact = sum(weights[name] * updates[name] for name in left) / weight
    assert np.abs(mean - exact).max() <= rounding_error(scale=scale, hospitals=5, total_weight=weight)


# what the coordinator holds of one hospital


def evidence_against_uniform(vector: NDArray[np.uint32]) -> float:
    """The smallest p-value of a chi-squared test over all bytes, and over the bytes of each of the four lanes."""
    lanes = vector.view(np.uint8).reshape(-1, 4)
    samples = [lanes.ravel(), *lanes.T]
    return min(float(chisquare(np.bincount(sample, minlength=256)).pvalue) for sample in samples)


def an_upload(length: int) -> tuple[NDArray[np.float64], NDArray[np.uint32], NDArray[np.uint32]]:
    """An update, its encoding, and what is sent."""
    random = np.random.default_rng()
    attempt = Attempt(3, length).up_to(3)
    update = random.normal(size=length)
    update /= np.linalg.norm(update)
    scale = quantization_scale(bound=1.0, hospitals=3)
    encoded = quantize(update, weight=1.0, bound=1.0, scale=scale, uniform=random.random)
    attempt.encoded = dict.fromkeys(attempt.names, encoded)
    attempt.upload()
    return update, encoded, attempt.uploads[attempt.names[0]]


def test_an_upload_is_uniform_and_uncorrelated_with_the_update() -> None:
    """Chi-squared over bytes and lanes does not tell it from noise; the encoding alone it does."""
    update, encoded, sent = an_upload(1_000_000)

    assert evidence_against_uniform(encoded) < 1e-100
    assert evidence_against_uniform(sent) > 1e-9
    assert abs(np.corrcoef(sent.view(np.int32), update)[0, 1]) < 0.01
    assert abs(np.corrcoef(sent, update)[0, 1]) < 0.01


def test_two_hospitals_with_the_same_update_send_unrelated_vectors() -> None:
    """And so does one hospital in two attempts."""
    encoded = np.arange(100_000, dtype=np.uint32)
    sent = []
    hospitals = None
    for number in (1, 2):
        attempt = Attempt(3, len(encoded), hospitals, attempt=number).up_to(3)
        attempt.encoded = dict.fromkeys(attempt.names, encoded)
        attempt.upload()
        sent += list(attempt.uploads.values())
        hospitals = attempt.hospitals

    assert min(evidence_against_uniform(one - other) for one, other in combinations(sent, 2)) > 1e-9


def test_every_secret_has_256_bits() -> None:
    """Masking key, channel key and seed are 32 bytes of entropy each, unfolded and unencoded."""
    asked: list[int] = []

    def entropy(count: int) -> bytes:
        asked.append(count)
        return np.random.default_rng().bytes(count)

    attempt = Attempt(3)
    attempt.hospital(attempt.names[0], entropy=entropy).advertise(attempt.announcement, plan_digest="a" * 64)

    assert asked == [32, 32, 32]


# the rule about thresholds


@pytest.mark.parametrize(("hospitals", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7), (100, 67)])
def test_the_smallest_threshold_is_the_designs(hospitals: int, threshold: int) -> None:
    """Max(3, floor(2n / 3) + 1)."""
    assert smallest_threshold(hospitals) == threshold


@pytest.mark.parametrize(("hospitals", "colluders"), [(4, 1), (5, 2), (7, 2), (10, 3)])
def test_the_tolerated_colluders_are_the_designs(hospitals: int, colluders: int) -> None:
    """At the smallest threshold."""
    assert tolerated_colluders(hospitals, smallest_threshold(hospitals)) == colluders


def test_no_two_lists_of_survivors_get_enough_signatures_and_no_sum_of_one_opens() -> None:
    """For every cohort, threshold and number of colluders that is tolerated."""
    for hospitals in range(3, 101):
        for threshold in range(smallest_threshold(hospitals), hospitals + 1):
            colluders = tolerated_colluders(hospitals, threshold)
            honest = hospitals - colluders
            assert colluders >= 0
            assert 2 * (threshold - colluders) > honest  # each honest one signs once, a colluder both
            assert threshold - colluders >= 2  # honest hospitals in any list that gets enough signatures


# what is kept and what is not


def test_everybody_has_the_same_transcript() -> None:
    """Apart from the signatures, all of which the coordinator sends to all."""
    attempt = Attempt(4)

    attempt.run({attempt.names[0]: 3})

    kept = [attempt.hospitals[name].transcript() for name in attempt.names[1:]]
    assert kept == [attempt.coordinator.transcript()] * 3
    assert kept[0] is not None
    assert kept[0].uploaders == tuple(sorted(attempt.names[1:]))
    assert Transcript.model_validate_json(kept[0].model_dump_json()) == kept[0]


def test_messages_survive_json() -> None:
    """Bytes become base64 and come back."""
    attempt = Attempt(4).up_to(3)
    delivery = attempt.deliveries[attempt.names[0]]

    assert Delivery.model_validate_json(delivery.model_dump_json()) == delivery


def test_nothing_secret_is_shown_or_kept() -> None:
    """Representations hide secrets; after the last stage there are none."""
    attempt = Attempt(4).up_to(3)
    hospital = attempt.hospitals[attempt.names[0]]
    inner = hospital._attempt
    assert inner is not None
    seed, key = inner.seed.reveal(), inner.pairs
    assert len(seed) == 32
    assert key is not None
    assert seed.hex() not in repr(vars(inner))
    assert repr(seed) not in repr(vars(inner))

    attempt.upload()
    held = [shares.of_key for shares in inner.held.values()]
    assert inner.pairs is None
    assert inner.seed.reveal() == b""
    attempt.agree()
    attempt.unmask()

    assert inner.held == {}
    assert [secret.reveal() for secret in held] == [b""] * 4


def test_messages_of_a_hundred_hospitals_fit_the_wire() -> None:
    """A body has at most 1,000,000 bytes; stage 3 is the largest."""
    attempt = Attempt(100).up_to(3)

    largest = max(len(delivery.model_dump_json()) for delivery in attempt.deliveries.values())

    assert largest < 1_000_000
