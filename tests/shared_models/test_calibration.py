"""Calibration intercept and slope: logistic regression's where counts are exact, and coverage where they are noised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom  # type: ignore[import-untyped]  # scipy ships no types
from sklearn.linear_model import LogisticRegression

from shared_models.calibration import INTERCEPTS, SLOPES, recalibration
from shared_models.evaluation import Evaluation, evaluate
from shared_models.metrics import nearest_counts

Floats = NDArray[np.float64]
FALSE_ALARM = 1e-6  # of every test of coverage, were coverage what it claims
SCORES = {"middling": (0.0, 1.5), "rare": (-3.0, 1.2), "extreme": (-1.0, 3.0)}  # mean and spread of their logits


def drawn(
    rng: np.random.Generator, kind: str, count: int, *, intercept: float, slope: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """Logits of scores, and what came true."""
    mean, spread = SCORES[kind]
    logits = rng.normal(mean, spread, count)
    return logits, rng.random(count) < 1 / (1 + np.exp(-intercept - slope * logits))


def table(logits: Floats, truth: NDArray[np.bool_], bins: int) -> Floats:
    """Counts of a choice between two."""
    places = np.maximum(np.ceil(bins / (1 + np.exp(-logits))).astype(int) - 1, 0)
    return np.stack([np.bincount(places[truth == c], minlength=bins) for c in (0, 1)]).astype(np.float64)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("slope", [0.5, 1.0, 1.5])
def test_of_exact_counts_the_slope_is_that_of_a_logistic_regression_on_the_scores(kind: str, slope: float) -> None:
    """Scikit-learn's, from the scores themselves, up to what a thousand bins hide."""
    logits, truth = drawn(np.random.default_rng(1), kind, 20_000, intercept=0.2, slope=slope)

    found = evaluate(table(logits, truth, 1000)).calibration_slope

    fitted = LogisticRegression(C=np.inf).fit(logits[:, None], truth)
    assert found.value == pytest.approx(fitted.coef_[0, 0], abs=0.02)
    assert found.low < fitted.coef_[0, 0] < found.high


@pytest.mark.parametrize(("intercept", "slope"), [(0.0, 1.0), (0.7, 1.0), (0.0, 0.5), (0.0, 1.8)])
@pytest.mark.parametrize(("kind", "bins", "count", "noise"), [("middling", 20, 400, 0.0), ("rare", 20, 3000, 6.0)])
def test_intervals_cover_the_scores_own_slope(
    kind: str, bins: int, count: int, noise: float, intercept: float, slope: float
) -> None:
    """Not that of the bins' middles: were coverage 0.90, each of these would fail once in a million seeds."""
    rng = np.random.default_rng(2)
    draws, hits, of_intercept = 60, 0, 0

    for _ in range(draws):
        counts = table(*drawn(rng, kind, count, intercept=intercept, slope=slope), bins)
        counts += noise * rng.normal(size=counts.shape)
        of_one, of_both = recalibration(counts, np.stack([nearest_counts(row) for row in counts]), noise)
        hits += of_both.low <= slope <= of_both.high
        of_intercept += of_one.low <= intercept <= of_one.high

    assert hits >= binom.ppf(FALSE_ALARM, draws, 0.90)
    assert slope != 1 or of_intercept >= binom.ppf(FALSE_ALARM, draws, 0.90)


def test_intervals_are_narrow_enough_to_tell_an_overfitted_model() -> None:
    """Four thousand patients, noise of ten a count: a slope of a half is not 1, and of 1 is not a half."""
    rng = np.random.default_rng(3)

    def slope_of(slope: float) -> Evaluation:
        counts = table(*drawn(rng, "middling", 4000, intercept=0.0, slope=slope), 20)
        return evaluate(counts + 10 * rng.normal(size=counts.shape), noise=10.0)

    overfitted, fitting = slope_of(0.5).calibration_slope, slope_of(1.0).calibration_slope

    assert overfitted.value == pytest.approx(0.5, abs=0.15)
    assert overfitted.high < 0.8
    assert fitting.low > 0.6


def test_where_the_end_bins_hold_nearly_everybody_no_slope_is_given() -> None:
    """Nobody knows how near to 0 the scores of a rare disease are within the lowest bin: only an interval is honest."""
    counts = table(*drawn(np.random.default_rng(4), "rare", 4000, intercept=0.0, slope=1.0), 10)

    found = evaluate(counts).calibration_slope

    assert found.value is None
    assert SLOPES[0] < found.low < 1 < found.high < SLOPES[1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([0.5, 20.0, 1e4]), bins=st.sampled_from([2, 10, 60]))
def test_any_noised_table_gives_figures_in_their_ranges(seed: int, noise: float, bins: int) -> None:
    """Noise that drowns the patients leaves the whole range, and never a number that is none."""
    counts = np.random.default_rng(seed).normal(scale=2 * noise, size=(2, bins))

    found = evaluate(counts, noise=noise)

    for one, (low, high) in ((found.calibration_intercept, INTERCEPTS), (found.calibration_slope, SLOPES)):
        assert low <= one.low <= (one.low if one.value is None else one.value) <= one.high <= high
        assert bins >= 10 or one == (None, low, high)


def test_nobody_has_no_slope() -> None:
    """Nor has a single class."""
    for counts in (np.zeros((2, 20)), np.stack([np.ones(20), np.zeros(20)])):
        assert evaluate(counts).calibration_slope == (None, *SLOPES)
