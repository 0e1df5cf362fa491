"""Encoding is unbiased, its error is bounded, no sum wraps, and what does not fit is refused before it is sent."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared_models.errors import ConfigError, EncodingError, FederationError, ScaleTooSmallError
from shared_models.secagg.quantize import dequantize, quantization_scale, quantize, rounding_error

BOUNDS = st.floats(1e-6, 300)


def coins(seed: int) -> Any:
    return np.random.default_rng(seed).random


@given(bound=BOUNDS, hospitals=st.integers(3, 100))
def test_no_sum_can_wrap(bound: float, hospitals: int) -> None:
    """Even if every hospital sends the largest integer that it may, with one sign."""
    scale = quantization_scale(bound=bound, hospitals=hospitals)

    assert hospitals * math.ceil(bound * scale) <= 2**31 - 1


@given(bound=BOUNDS, seed=st.integers(0, 2**32), weight=st.floats(0.001, 1))
def test_no_entry_exceeds_its_share_of_the_modulus(bound: float, seed: int, weight: float) -> None:
    """Also the entry that holds the whole norm, with either sign."""
    scale = quantization_scale(bound=bound, hospitals=3)

    for entry in (bound, -bound):
        cells = quantize(np.array([entry]), weight=weight, bound=bound, scale=scale, uniform=coins(seed))
        assert abs(int(cells.view(np.int32)[0])) <= math.ceil(bound * scale)


@given(seed=st.integers(0, 2**32), hospitals=st.integers(3, 40), bound=BOUNDS, data=st.data())
@settings(deadline=None)
def test_the_decoded_mean_is_within_the_stated_error(
    seed: int, hospitals: int, bound: float, data: st.DataObject
) -> None:
    """For random updates at their bound, random weights, and any number of survivors."""
    random = np.random.default_rng(seed)
    left = data.draw(st.integers(1, hospitals))
    scale = quantization_scale(bound=bound, hospitals=hospitals)
    updates = random.normal(size=(left, 64))
    updates *= bound / np.linalg.norm(updates, axis=1, keepdims=True)
    weights = random.uniform(0.01, 1, left)

    cells = [
        quantize(update, weight=weight, bound=bound, scale=scale, uniform=random.random)
        for update, weight in zip(updates, weights, strict=True)
    ]
    mean = dequantize(np.sum(cells, axis=0, dtype=np.uint32), scale=scale, total_weight=weights.sum())

    error = np.abs(mean - weights @ updates / weights.sum()).max()
    stated = rounding_error(scale=scale, hospitals=hospitals, total_weight=weights.sum())
    assert error <= stated * (1 + 1e-6)  # float64, as its docstring says


def test_the_error_is_the_designs() -> None:
    """Worst case per coordinate of the mean: n / (scale * sum of m)."""
    assert rounding_error(scale=65536, hospitals=4, total_weight=2.0) == 4 / (65536 * 2)


def test_rounding_is_unbiased() -> None:
    """The mean of many roundings of one number is that number, to five standard errors."""
    scale, value, times = 65536, 0.3 / 65536, 200_000

    cells = quantize(np.full(times, value), weight=1.0, bound=1.0, scale=scale, uniform=coins(0))

    assert set(cells) == {0, 1}
    assert cells.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / times))


def test_what_is_on_the_grid_stays() -> None:
    """Whatever the coins say, zero included; negative integers wrap as in two's complement."""
    cells = quantize(np.array([0.0, -0.5, 0.25]), weight=1.0, bound=1.0, scale=2**20, uniform=coins(1))

    assert cells.tolist() == [0, 2**32 - 2**19, 2**18]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_chunks_do_not_show(kind: type) -> None:
    """A vector of many chunks is encoded as its entries are; float32 is multiplied in float64."""
    update: NDArray[Any] = (np.random.default_rng(0).normal(size=50_001) / 300).astype(kind)

    cells = quantize(update, weight=0.3, bound=1.0, scale=2**28, uniform=np.zeros)

    np.testing.assert_array_equal(cells.view(np.int32), np.floor(update.astype(np.float64) * (0.3 * 2**28)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.001, -1.001])
def test_a_broken_update_is_refused_wherever_it_breaks(bad: float) -> None:
    """NaN, infinity, or a norm beyond the bound that it was said to be clipped to."""
    update = np.zeros(20_000)
    update[19_999] = bad

    with pytest.raises(EncodingError, match="beyond its bound"):
        quantize(update, weight=1.0, bound=1.0, scale=2**20, uniform=coins(0))


def test_the_whole_norm_counts() -> None:
    """Also spread over many chunks, where no single entry stands out."""
    update = np.full(40_000, 1.01 / 200)

    with pytest.raises(EncodingError, match="beyond its bound"):
        quantize(update, weight=0.5, bound=1.0, scale=2**20, uniform=coins(0))

    assert len(quantize(update / 1.01, weight=0.5, bound=1.0, scale=2**20, uniform=coins(0))) == 40_000


@pytest.mark.parametrize("update", [np.zeros((2, 2)), np.zeros(3, np.int64), np.zeros(3, np.float16)])
def test_only_flat_floats_are_encoded(update: Any) -> None:
    """Anything else is a fault of the caller, said so."""
    with pytest.raises(EncodingError, match="an update of type"):
        quantize(update, weight=1.0, bound=1.0, scale=2**20, uniform=coins(0))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: quantization_scale(bound=400.0, hospitals=100), ScaleTooSmallError),
        (lambda: quantization_scale(bound=11_000.0, hospitals=3), ScaleTooSmallError),
        (lambda: quantization_scale(bound=0.0, hospitals=3), ConfigError),
        (lambda: quantization_scale(bound=math.nan, hospitals=3), ConfigError),
        (lambda: quantization_scale(bound=math.inf, hospitals=3), ConfigError),
        (lambda: quantization_scale(bound=1.0, hospitals=0), ConfigError),
        (lambda: quantize(np.zeros(1), weight=0.0, bound=1.0, scale=2**16, uniform=np.zeros), ConfigError),
        (lambda: quantize(np.zeros(1), weight=1.1, bound=1.0, scale=2**16, uniform=np.zeros), ConfigError),
        (lambda: quantize(np.zeros(1), weight=math.nan, bound=1.0, scale=2**16, uniform=np.zeros), ConfigError),
        (lambda: dequantize(np.zeros(1, np.uint32), scale=2**16, total_weight=0.0), ConfigError),
        (lambda: dequantize(np.zeros(1, np.uint32), scale=0, total_weight=1.0), ConfigError),
    ],
)
def test_settings_that_cannot_work_are_refused(call: Any, kind: type[FederationError]) -> None:
    """Before anything is sent, with a hint."""
    with pytest.raises(kind) as caught:
        call()

    assert caught.value.hint


def test_an_empty_update_is_empty() -> None:
    """No special case."""
    assert len(quantize(np.zeros(0), weight=1.0, bound=1.0, scale=2**16, uniform=np.zeros)) == 0
