"""Two models on the same patients: DeLong's test, and what several records per patient change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, norm  # type: ignore[import-untyped]  # scipy ships no types
from sklearn.metrics import roc_auc_score

from client.paired import difference
from shared_models.errors import ConfigError

Floats = NDArray[np.float64]
FALSE_ALARM = 1e-6


def two_models(seed: int, count: int = 60, ties: bool = False) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Scores of two models that agree in part, and the labels; each class has two patients at least."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[True, True, False, False], rng.random(count) < 0.4])
    shared = rng.normal(size=len(labels)) + labels
    one, other = shared + rng.normal(size=len(labels)), shared + 1.5 * rng.normal(size=len(labels))
    return (np.round(one), np.round(other), labels) if ties else (one, other, labels)


def delong(one: Floats, other: Floats, labels: NDArray[np.bool_]) -> tuple[float, float]:
    """The difference and its variance as the paper writes them, pair by pair."""
    kernels = [
        (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])
        for scores in (one, other)
    ]
    by_positive = np.cov([kernel.mean(axis=1) for kernel in kernels])
    by_negative = np.cov([kernel.mean(axis=0) for kernel in kernels])
    covariance = by_positive / labels.sum() + by_negative / (~labels).sum()
    contrast = np.array([1, -1])
    return float(kernels[0].mean() - kernels[1].mean()), float(contrast @ covariance @ contrast)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_with_one_record_per_patient_it_is_delongs_test(seed: int, ties: bool) -> None:
    """Difference, interval and p-value, written out pair by pair; the areas are scikit-learn's."""
    one, other, labels = two_models(seed, ties=ties)

    found = difference(one, other, labels, np.arange(len(labels)))

    value, variance = delong(one, other, labels)
    half = norm.ppf(0.975) * np.sqrt(variance)
    assert found.value == pytest.approx(roc_auc_score(labels, one) - roc_auc_score(labels, other), abs=1e-12)
    assert (found.value, found.low, found.high) == pytest.approx((value, value - half, value + half), abs=1e-9)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(value) / np.sqrt(variance)) if variance else 1, abs=1e-9)


def test_a_record_that_is_copied_says_nothing_more() -> None:
    """Each patient's record three times over: the same difference, and the same interval."""
    one, other, labels = two_models(1)
    times = np.repeat(np.arange(len(labels)), 3)

    once = difference(one, other, labels, np.arange(len(labels)))
    thrice = difference(one[times], other[times], labels[times], times)

    assert vars(thrice) == pytest.approx(vars(once), abs=1e-12)


def test_intervals_cover_no_difference_with_records_that_hang_together() -> None:
    """Two equally good models, two to six alike records a patient: at 0.95, below 0.90 would fail once in a million.

    Taken for independent, the same records give intervals that are far too short: the claim has power.
    """
    rng = np.random.default_rng(2)
    hits = naive = 0
    draws = 300
    for _ in range(draws):
        patients = np.repeat(np.arange(60), rng.integers(2, 7, size=60))
        labels = np.arange(60)[patients] % 2 == 0
        one, other = (labels + 2 * rng.normal(size=60)[patients] + 0.1 * rng.normal(size=len(labels)) for _ in range(2))
        found = difference(one, other, labels, patients)
        hits += found.low <= 0 <= found.high
        apart = difference(one, other, labels, np.arange(len(labels)))
        naive += apart.low <= 0 <= apart.high

    least = binom.ppf(FALSE_ALARM, draws, 0.90)
    assert hits >= least
    assert naive < least


def test_the_same_model_does_not_differ_from_itself() -> None:
    """No difference, no width, and nothing to be surprised by."""
    one, _, labels = two_models(3)

    assert vars(difference(one, one, labels, np.arange(len(labels)))) == {
        "value": 0,
        "low": 0,
        "high": 0,
        "p_value": 1,
    }


def test_too_few_patients_of_a_class_are_not_compared() -> None:
    """One patient says nothing about how patients vary."""
    with pytest.raises(ConfigError, match="two patients"):
        difference(np.arange(4.0), np.arange(4.0), np.array([True, False, False, False]), np.arange(4))
