"""Intervals of the c-index, of errors and of Dice coefficients: other people's formulas, and coverage where noised."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, t  # type: ignore[import-untyped]  # scipy ships no types

from shared_models import outcomes
from shared_models.estimates import WORST_WAPE, estimate_heads
from shared_models.evaluation import evaluate
from shared_models.tasks import ATTENDANCES, ICU_OUTCOMES, LUNG_OUTLINE, LUNG_SURVIVAL, TASKS, Task

Floats = NDArray[np.float64]
Rows = Callable[[np.random.Generator, int], Floats]

BINS = 20
FALSE_ALARM = 1e-6  # of every test of coverage, were coverage what it claims
INTERVALS = 8  # of LUNG_SURVIVAL


def survival_rows(rng: np.random.Generator, count: int, *, strength: float = 1.0) -> Floats:
    """Exponential times whose rate grows with a score, some censored: what a hospital counts of each patient."""
    risk = rng.normal(size=count)
    times = rng.exponential(400 * np.exp(-strength * risk))
    censored = rng.uniform(50, 1500, count)
    head = LUNG_SURVIVAL.heads[0]
    assert head.kind == "survival"
    targets = head.intervals(np.minimum(times, censored), times <= censored)
    scores = np.repeat(1 / (1 + np.exp(-risk))[:, None], INTERVALS, axis=1)
    return outcomes.record_statistics(LUNG_SURVIVAL, scores, targets, bins=BINS)


def quantity_rows(rng: np.random.Generator, count: int) -> Floats:
    """Errors that are small for most and large for a few, and grow with the value."""
    level = rng.uniform(-1.5, 1.5, count)
    error = rng.normal(size=count) * np.where(rng.random(count) < 0.1, 0.6, 0.1) * (1 + 0.3 * level)
    return outcomes.record_statistics(ATTENDANCES, (level + error)[:, None], level[:, None], bins=BINS)


def outline_rows(rng: np.random.Generator, count: int) -> Floats:
    """Dice coefficients of most images are high, of a few low; what is summed is set as ``outcomes`` would."""
    dice = np.where(rng.random(count) < 0.1, rng.uniform(0, 0.5, count), rng.beta(20, 2, count))
    return np.stack([np.ones(count), dice, dice, dice], axis=1)


SAMPLES: dict[str, tuple[Task, Rows, tuple[str, ...]]] = {
    "survival": (LUNG_SURVIVAL, survival_rows, ("c_index",)),
    "steep": (LUNG_SURVIVAL, lambda rng, count: survival_rows(rng, count, strength=4.0), ("c_index",)),
    "quantity": (ATTENDANCES, quantity_rows, ("mae", "rmse", "wape")),
    "outline": (LUNG_OUTLINE, outline_rows, ("dice",)),
}


@pytest.mark.parametrize("noise", [0.0, 4.0])
@pytest.mark.parametrize("count", [100, 400])
@pytest.mark.parametrize("kind", SAMPLES)
def test_intervals_cover_the_truth(kind: str, count: int, noise: float) -> None:
    """As those of the AUROC: were coverage 0.90, each of these would fail once in a million seeds.

    Below a hundred patients the interval of a mean absolute error is too narrow where few errors are large, as any is
    that knows no more than the errors and their squares: the documents say so.
    """
    task, rows, names = SAMPLES[kind]
    rng = np.random.default_rng(20)
    true = estimate_heads(task, rows(rng, 100_000).sum(axis=0), bins=BINS)
    draws = 150

    hits = dict.fromkeys(names, 0)
    for _ in range(draws):
        released = rows(rng, count).sum(axis=0)
        released += noise * rng.normal(size=released.shape)
        found = estimate_heads(task, released, bins=BINS, noise=noise)
        for name in names:
            hits[name] += found[name].low <= (true[name].value or 0.0) <= found[name].high

    least = binom.ppf(FALSE_ALARM, draws, 0.90)
    assert {name: hit for name, hit in hits.items() if hit < least} == {}


@pytest.mark.parametrize(("kind", "name"), [("survival", "c_index"), ("quantity", "mae"), ("outline", "dice")])
def test_noise_that_is_left_out_of_account_would_be_noticed(kind: str, name: str) -> None:
    """The same draws with intervals for exact sums cover far too seldom: the test above has power."""
    task, rows, _ = SAMPLES[kind]
    rng = np.random.default_rng(21)
    true = estimate_heads(task, rows(rng, 100_000).sum(axis=0), bins=BINS)[name].value or 0.0

    hits = 0
    for _ in range(60):
        released = rows(rng, 400).sum(axis=0)
        found = estimate_heads(task, released + 20 * rng.normal(size=released.shape), bins=BINS)[name]
        hits += found.low <= true <= found.high

    assert hits < binom.ppf(FALSE_ALARM, 60, 0.90)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(sorted(SAMPLES)))
def test_without_noise_an_estimate_is_the_metric_with_room_on_both_sides(seed: int, kind: str) -> None:
    """The values are those of ``outcomes.compute_metrics``, by the same names."""
    task, rows, names = SAMPLES[kind]
    total = rows(np.random.default_rng(seed), 50).sum(axis=0)

    found, metrics = estimate_heads(task, total, bins=BINS), outcomes.compute_metrics(task, total, bins=BINS)

    for name in names:
        assert found[name].value == pytest.approx(metrics[name], abs=1e-9)
        assert found[name].low < metrics[name] < found[name].high


def test_a_share_of_images_has_wilsons_interval() -> None:
    """Dice coefficients of 0 and 1 only are a proportion; no mean in [0, 1] varies more."""
    found = estimate_heads(LUNG_OUTLINE, [50, 40, 50, 0], bins=BINS)

    for name, images in (("dice", 40), ("sensitivity", 50), ("precision", 0)):
        wilson = binomtest(images, 50).proportion_ci(0.95, method="wilson")
        assert found[name] == pytest.approx((images / 50, wilson.low, wilson.high), abs=1e-6)


def test_the_interval_of_many_errors_is_students() -> None:
    """Where the mean is normal, nothing else is left: SciPy's interval from the errors themselves."""
    rng = np.random.default_rng(22)
    errors = np.abs(rng.normal(size=2000)) / 10
    total = np.array([2000, errors.sum(), (errors**2).sum(), 1000, 600])

    found = estimate_heads(ATTENDANCES, total, bins=BINS)["mae"]

    low, high = t.interval(0.95, 1999, errors.mean(), errors.std(ddof=1) / math.sqrt(2000))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_c_index_of_one_early_event_time_is_an_area_under_the_curve(seed: int) -> None:
    """All events in the first interval, all others followed to the end: the same pairs, and their interval about it."""
    rng = np.random.default_rng(seed)
    cases, others = rng.multinomial(80, rng.dirichlet(np.ones(BINS))), rng.multinomial(90, rng.dirichlet(np.ones(BINS)))
    table = np.zeros((BINS, INTERVALS + 1, 2))
    table[:, 0, 1], table[:, -1, 0] = cases, others

    found, area = estimate_heads(LUNG_SURVIVAL, table.ravel(), bins=BINS)["c_index"], evaluate([others, cases]).auroc

    assert found == pytest.approx(area, abs=2e-2)
    assert found.value == pytest.approx(area.value)


def test_a_perfect_ranking_has_an_interval_all_the_same() -> None:
    """Ten events in the order of their risks say nothing of the next thousand."""
    table = np.zeros((BINS, INTERVALS + 1, 2))
    for place in range(INTERVALS):
        table[BINS - 1 - place, place, 1] = 1
    table[0, -1, 0] = 2

    found = estimate_heads(LUNG_SURVIVAL, table.ravel(), bins=BINS)["c_index"]

    assert found.value == found.high == 1
    assert 0.4 < found.low < 0.9


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(TASKS)), noise=st.sampled_from([1e-3, 1.0, 1e5]))
def test_any_noised_sums_give_finite_estimates_in_their_ranges(seed: int, name: str, noise: float) -> None:
    """Whatever the noise left, an estimate lies in its interval, and the interval in the figure's range."""
    rng = np.random.default_rng(seed)
    sums = rng.normal(scale=noise * 3, size=outcomes.statistics_size(TASKS[name], 4))

    found = estimate_heads(TASKS[name], sums, bins=4, noise=noise)

    for figure, one in found.items():
        high = WORST_WAPE if figure.endswith("wape") else 1
        assert 0 <= one.low <= (one.low if one.value is None else one.value) <= one.high <= high


def test_of_several_heads_a_figure_is_named_after_its_head() -> None:
    """As the metrics are; choices have evaluations instead."""
    total = np.zeros(outcomes.statistics_size(ICU_OUTCOMES, BINS))

    found = estimate_heads(ICU_OUTCOMES, total, bins=BINS)

    assert found == {
        "length_of_stay.mae": (None, 0, 1),
        "length_of_stay.rmse": (None, 0, 1),
        "length_of_stay.wape": (None, 0, WORST_WAPE),
    }
