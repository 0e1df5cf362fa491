"""Figures with intervals and curves: other people's formulas where counts are exact, honest where they are noised."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, norm  # type: ignore[import-untyped]  # scipy ships no types
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from shared_models import metrics, outcomes
from shared_models.errors import ConfigError
from shared_models.evaluation import Evaluation, average_precision, evaluate, evaluate_task
from shared_models.intervals import Estimate
from shared_models.metrics import nearest_counts
from shared_models.tasks import Choice, Numeric, Quantity
from tests.client.made_up import table as table_of
from tests.client.made_up import task_of

BINS = 20
FALSE_ALARM = 1e-6  # of every test of coverage, were coverage what it claims
Z = float(norm.ppf(0.975))


def records(seed: int, count: int = 400, positive: float = 0.3) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores that know something about the labels; both classes occur at least twice."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 0, 1, 1], rng.random(count) < positive]).astype(np.int64)
    return 1 / (1 + np.exp(-rng.normal(size=len(labels)) - 1.4 * labels + 0.8)), labels


def table(scores: NDArray[np.float64], labels: NDArray[np.int64], bins: int = BINS) -> NDArray[np.float64]:
    """Counts of a binary task."""
    return metrics.score_tables(2, metrics.total_statistics(2, scores, labels, bins=bins), bins=bins)[0]


# exact counts


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bins=st.sampled_from([2, 20, 1000]))
def test_figures_are_those_of_the_records_within_the_bins_error(seed: int, bins: int) -> None:
    """AUROC, average precision and Brier score as scikit-learn computes them from the scores themselves."""
    scores, labels = records(seed)
    total = metrics.total_statistics(2, scores, labels, bins=bins)

    found = evaluate(table(scores, labels, bins))

    errors = metrics.bin_errors(2, total, bins=bins)
    assert found.auroc.value == pytest.approx(roc_auc_score(labels, scores), abs=errors["auroc"] + 1e-9)
    assert found.auprc.value == pytest.approx(average_precision_score(labels, scores), abs=errors["auprc"] + 1e-9)
    assert found.brier.value == pytest.approx(brier_score_loss(labels, scores), abs=errors["brier"])
    assert found.calibration_in_the_large.value == pytest.approx(labels.mean() - scores.mean(), abs=0.5 / bins + 1e-9)
    assert (found.negatives, found.positives) == (np.sum(labels == 0), np.sum(labels == 1))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_decisions_are_counted_exactly_with_wilsons_interval(seed: int) -> None:
    """Every share at 1/2 is SciPy's proportion with its Wilson interval, to the last digits that matter."""
    scores, labels = records(seed, count=60)
    called = scores > 0.5

    found = evaluate(table(scores, labels)).at_half

    wanted = {
        "sensitivity": (called & (labels == 1), labels == 1),
        "specificity": (~called & (labels == 0), labels == 0),
        "positive_predictive_value": (called & (labels == 1), called),
        "negative_predictive_value": (~called & (labels == 0), ~called),
    }
    for name, (part, whole) in wanted.items():
        estimate: Estimate = getattr(found, name)
        if not whole.any():
            assert estimate == (None, 0.0, 1.0)
            continue
        wilson = binomtest(int(part.sum()), int(whole.sum())).proportion_ci(0.95, method="wilson")
        assert estimate == pytest.approx((part.sum() / whole.sum(), wilson.low, wilson.high), abs=1e-6)


@pytest.mark.parametrize("asked", [0.5, 0.9, 0.99])
def test_the_operating_point_is_the_lowest_edge_that_keeps_the_specificity(asked: float) -> None:
    """One bin lower, too few negatives would be left alone; there is no edge between."""
    scores, labels = records(3)

    point = evaluate(table(scores, labels), specificity=asked).at_specificity

    kept, lost = (np.mean(scores[labels == 0] <= edge) for edge in (point.threshold, point.threshold - 1 / BINS))
    assert lost < asked <= kept
    assert point.specificity.value == pytest.approx(kept)
    assert point.sensitivity.value == pytest.approx(np.mean(scores[labels == 1] > point.threshold))


def test_the_roc_curve_goes_through_scikit_learns_points() -> None:
    """Each point is an edge's shares of negatives and positives above it."""
    scores, labels = records(4)
    binned = np.ceil(scores * BINS)

    found = np.array(evaluate(table(scores, labels)).roc)

    false, true, _ = roc_curve(labels, binned, drop_intermediate=False)
    expected = np.column_stack([false, true])
    assert all(np.abs(found - point).sum(axis=1).min() < 1e-9 for point in expected)
    assert (found[0] == 0).all()
    assert found[-1] == pytest.approx([1, 1])


def test_the_calibration_curve_is_scikit_learns() -> None:
    """Observed shares in the same ten stretches; the mean score within half a bin."""
    scores, labels = records(5, count=3000)

    found = [one for one in evaluate(table(scores, labels)).calibration if one.patients]

    observed, predicted = calibration_curve(labels, scores, n_bins=10)
    assert [one.observed.value for one in found] == pytest.approx(list(observed))
    assert [one.predicted for one in found] == pytest.approx(list(predicted), abs=0.5 / BINS)


def test_the_decision_curve_counts_what_treating_brings() -> None:
    """Net benefit at every edge, written out; treating all is a model that calls everybody positive."""
    scores, labels = records(6)

    for point in evaluate(table(scores, labels)).decision:
        odds = point.threshold / (1 - point.threshold)
        called = scores > point.threshold
        benefit = np.mean(called & (labels == 1)) - odds * np.mean(called & (labels == 0))
        assert point.model.value == pytest.approx(benefit)
        assert point.treat_all == pytest.approx(labels.mean() - odds * (1 - labels.mean()))
        assert point.model.low <= benefit <= point.model.high


def test_the_interval_of_the_area_is_newcombes_for_exact_counts() -> None:
    """Its ends solve his equation with Hanley and McNeil's variance at the end, where DeLong's is the smaller one."""
    scores, labels = records(7, count=60)
    found = evaluate(table(scores, labels, 1000)).auroc
    m, n = labels.sum(), (1 - labels).sum()

    def variance(t: float) -> float:
        return float(t * (1 - t) * (1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n))

    assert found.value is not None
    for end in found[1:]:
        assert abs(found.value - end) >= Z * math.sqrt(variance(end)) * (1 - 1e-6)
    assert abs(found.value - found.low) == pytest.approx(Z * math.sqrt(variance(found.low)), rel=0.02)


def test_a_perfect_ranking_has_an_interval_all_the_same() -> None:
    """Twenty patients that are told apart say nothing about the next thousand: DeLong's variance is 0, ours is not."""
    found = evaluate(table(np.repeat([0.1, 0.9], 10), np.repeat([0, 1], 10)))

    assert found.auroc.value == found.auprc.value == 1
    assert found.auroc.low < 0.9
    assert found.auprc.low < 0.8
    assert found.auroc.high == found.auprc.high == 1


def test_the_derivative_of_average_precision_is_its_slope() -> None:
    """By central differences in every count."""
    counts = np.random.default_rng(8).uniform(1, 9, size=(2, BINS))

    _, derivative = average_precision(counts)

    for cell in np.ndindex(counts.shape):
        step = np.zeros_like(counts)
        step[cell] = 1e-4
        slope = (average_precision(counts + step)[0] - average_precision(counts - step)[0]) / 2e-4
        assert derivative[cell] == pytest.approx(slope, abs=1e-7)


def test_more_classes_have_an_evaluation_each() -> None:
    """Against the rest; the areas' mean is the metric of the whole."""
    rng = np.random.default_rng(9)
    labels = rng.integers(3, size=500)
    logits = rng.normal(size=(500, 3)) + 1.5 * np.eye(3)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total = metrics.total_statistics(3, scores, labels, bins=BINS)

    found = evaluate_task(task_of(table_of(5), 3), total, bins=BINS)

    areas = [one.auroc.value for one in found.values()]
    assert list(found) == ["class 0", "class 1", "class 2"]
    assert np.mean([area for area in areas if area is not None]) == pytest.approx(
        metrics.compute_metrics(3, total, bins=BINS)["auroc"]
    )


def test_every_finding_of_several_heads_is_evaluated_where_it_is_known() -> None:
    """Each head's area is scikit-learn's over the records whose label is known; a quantity beside them has none."""
    rng = np.random.default_rng(12)
    measure = Numeric(name="stay", unit="day", low=0, high=10)
    heads = (
        Choice(name="oedema", classes=("absent", "present")),
        Quantity(measure=measure),
        Choice(name="kind", classes=("a", "b", "c")),
    )
    task = task_of(table_of(5), heads)
    targets = np.stack([rng.integers(2, size=300), rng.uniform(-2, 2, size=300), rng.integers(3, size=300)], axis=1)
    targets = np.where(rng.random(targets.shape) < 0.2, np.nan, targets)
    logits = rng.normal(size=(300, 3)) + np.eye(3)[np.nan_to_num(targets[:, 2]).astype(int)]
    scores = np.column_stack(
        [
            1 / (1 + np.exp(-rng.normal(size=300) - np.nan_to_num(targets[:, 0]))),
            rng.normal(size=300),
            np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True),
        ]
    )

    total = outcomes.record_statistics(task, scores, targets, bins=1000).sum(axis=0)
    found = evaluate_task(task, total, bins=1000)
    ranked = outcomes.ranked_classes(task, scores, targets)

    assert list(found) == list(ranked) == ["oedema.present", "kind.a", "kind.b", "kind.c"]
    for name, column, label in [("oedema.present", 0, 1), ("kind.a", 2, 0), ("kind.c", 2, 2)]:
        known = ~np.isnan(targets[:, column])
        given, labels, told = ranked[name]
        assert (told == known).all()
        area = roc_auc_score(targets[known, column] == label, given[known])
        assert area == roc_auc_score(labels[known], given[known])
        assert found[name].auroc.value == pytest.approx(area, abs=2e-3)
        assert found[name].positives + found[name].negatives == known.sum()


# noised counts

KINDS = {"weak": (0.5, 1.0), "good": (1.5, 1.0), "excellent": (3.5, 1.0), "uneven": (1.5, 2.0)}  # shift and spread


def truth(kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities of the bins for negatives and positives: two normal distributions on the logit scale."""
    shift, spread = KINDS[kind]
    with np.errstate(divide="ignore"):
        edges = np.arange(BINS + 1) / BINS
        logits = np.log(edges) - np.log1p(-edges)
    return np.diff(norm.cdf(logits, -shift / 2)), np.diff(norm.cdf(logits, shift / 2, spread))


def figures(found: Evaluation) -> dict[str, Estimate]:
    """What coverage is tested of."""
    return {
        "auroc": found.auroc,
        "auprc": found.auprc,
        "brier": found.brier,
        "calibration_in_the_large": found.calibration_in_the_large,
        "sensitivity": found.at_half.sensitivity,
        "positive_predictive_value": found.at_half.positive_predictive_value,
        "observed": found.calibration[-1].observed,
        "net_benefit": found.decision[9].model,
    }


@pytest.mark.parametrize(
    ("kind", "negatives", "positives", "noise"),
    [
        ("weak", 300, 100, 8.0),
        ("good", 300, 100, 0.0),
        ("excellent", 300, 100, 8.0),
        ("uneven", 100, 100, 0.0),
    ],
)
def test_intervals_cover_the_truth(kind: str, negatives: int, positives: int, noise: float) -> None:
    """Nineteen times of twenty at least nearly: were coverage 0.90, each of these would fail once in a million seeds.

    Patients are drawn anew and the noise of a release is added, 150 times. Nominal coverage is 0.95; 0.90 is what is
    claimed of such small samples, as of Wilson's interval itself.
    """
    rng = np.random.default_rng(10)
    of_negatives, of_positives = truth(kind)
    expected = np.stack([of_negatives * negatives, of_positives * positives])
    true = {name: one.value for name, one in figures(evaluate(expected)).items()}
    draws = 150

    hits = dict.fromkeys(true, 0)
    for _ in range(draws):
        drawn = np.stack([rng.multinomial(negatives, of_negatives), rng.multinomial(positives, of_positives)])
        released = drawn + noise * rng.normal(size=drawn.shape)
        for name, one in figures(evaluate(released, noise=noise)).items():
            hits[name] += one.low <= (true[name] or 0.0) <= one.high

    least = binom.ppf(FALSE_ALARM, draws, 0.90)
    assert {name: count for name, count in hits.items() if count < least} == {}


def test_noise_that_is_left_out_of_account_would_be_noticed() -> None:
    """The same draws with intervals for exact counts cover far too seldom: the test above has power."""
    rng = np.random.default_rng(11)
    of_negatives, of_positives = truth("good")
    area = evaluate(np.stack([of_negatives, of_positives]) * 1e6).auroc.value

    hits = 0
    for _ in range(60):
        drawn = np.stack([rng.multinomial(300, of_negatives), rng.multinomial(100, of_positives)]).astype(np.float64)
        found = evaluate((drawn + 8 * rng.normal(size=drawn.shape)).clip(min=0))
        hits += found.auroc.low <= (area or 0.0) <= found.auroc.high

    assert hits < binom.ppf(FALSE_ALARM, 60, 0.90)


@settings(max_examples=40, deadline=None)
@given(
    counts=arrays(np.float64, (2, BINS), elements=st.floats(-1e6, 1e6)),
    noise=st.sampled_from([1e-3, 1.0, 1e5]),
)
def test_any_noised_table_gives_finite_figures_in_their_ranges(counts: NDArray[np.float64], noise: float) -> None:
    """Whatever the noise left, nothing is NaN or infinite, and an estimate lies in its interval."""
    found = evaluate(counts, noise=noise)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if {"value", "low", "high"} <= value.keys():
                assert value["low"] <= (value["low"] if value["value"] is None else value["value"]) <= value["high"]
            for one in value.values():
                check(one)
        elif isinstance(value, list):
            for one in value:
                check(one)
        else:
            assert value is None or math.isfinite(value)

    check(found.as_json())
    for one in (found.auroc, found.auprc, found.at_half.sensitivity, found.at_specificity.specificity):
        assert 0 <= one.low <= one.high <= 1


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_nobody_gives_no_figure_and_the_whole_range(noise: float) -> None:
    """An empty group is said to be one; nothing is divided by it."""
    found = evaluate(np.zeros((2, BINS)), noise=noise)

    assert found.auroc == found.auprc == found.at_half.sensitivity == (None, 0.0, 1.0)
    assert found.roc == found.precision_recall == ()


@settings(max_examples=40, deadline=None)
@given(noised=arrays(np.float64, BINS, elements=st.floats(-100, 100)))
def test_the_nearest_counts_are_the_nearest(noised: NDArray[np.float64]) -> None:
    """They meet the conditions of Karush, Kuhn and Tucker, which for this convex problem are sufficient."""
    found = nearest_counts(noised)

    assert (found >= 0).all()
    assert found.sum() == pytest.approx(max(noised.sum(), 0.0), abs=1e-9)
    if (inside := found > 1e-9).any():
        lowered_by = (noised - found)[inside]
        assert lowered_by == pytest.approx(np.full(inside.sum(), lowered_by[0]), abs=1e-9)
        assert (noised[~inside] <= lowered_by[0] + 1e-6).all()


@pytest.mark.parametrize(
    ("counts", "noise", "specificity"),
    [
        (np.zeros((2, 3)), 0.0, 0.9),
        (np.zeros(4), 0.0, 0.9),
        (np.full((2, 4), np.nan), 0.0, 0.9),
        (np.full((2, 4), -1.0), 0.0, 0.9),
        (np.zeros((2, 4)), math.nan, 0.9),
        (np.zeros((2, 4)), -1.0, 0.9),
        (np.zeros((2, 4)), 0.0, 1.0),
    ],
)
def test_what_cannot_be_evaluated_is_refused(counts: NDArray[np.float64], noise: float, specificity: float) -> None:
    """With the reason, and never with a number."""
    with pytest.raises(ConfigError):
        evaluate(counts, noise=noise, specificity=specificity)


def test_an_estimate_that_noise_carried_out_of_its_range_has_an_interval_with_width() -> None:
    """More found than there are says that the share is high, not that it is 1 for certain."""
    counts = np.zeros((2, BINS))
    counts[1, :10], counts[1, 10:], counts[0] = -6.0, 20.0, 10.0

    found = evaluate(counts, noise=2.0).at_half.sensitivity

    assert found.value == found.high == 1
    assert 0.5 < found.low < 0.99


def test_where_the_whole_range_is_possible_no_figure_is_given() -> None:
    """A number would be read as one."""
    found = evaluate(np.ones((2, BINS)), noise=50.0)

    assert found.auroc == found.auprc == found.at_half.sensitivity == (None, 0.0, 1.0)
