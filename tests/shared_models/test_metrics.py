"""Additive statistics: any split merges to the same result, equal to torchmetrics within the stated bin error."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import norm  # type: ignore[import-untyped]  # scipy ships no types
from torchmetrics import classification as reference

from shared_models import metrics
from shared_models.errors import ConfigError, ProtocolError, RecordsError

ROUNDING = 1e-5  # torchmetrics computes in float32
BINS = st.sampled_from([2, 20, 62, 1000])
SEEDS = st.integers(0, 2**32 - 1)


def _records(seed: int, classes: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Float32 scores, as networks give them, that know something about the labels; every class occurs."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=count)])
    logits = rng.normal(scale=2, size=(len(labels), classes)) + 1.5 * np.eye(classes)[labels]
    scores = torch.from_numpy(logits).softmax(dim=1).float().numpy().astype(np.float64)
    return (scores[:, 1] if classes == 2 else scores), labels


def _torchmetrics(classes: int, bins: int) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    calibration = metrics.calibration_bins(bins)
    if classes == 2:
        return {
            "accuracy": reference.BinaryAccuracy(),
            "balanced_accuracy": lambda s, y: reference.MulticlassAccuracy(2, average="macro")((s > 0.5).long(), y),
            "sensitivity": reference.BinaryRecall(),
            "specificity": reference.BinarySpecificity(),
            "f1": reference.BinaryF1Score(),
            "auroc": reference.BinaryAUROC(),
            "auprc": reference.BinaryAveragePrecision(),
            "brier": lambda s, y: ((s - y) ** 2).mean(),
            "calibration_error": reference.BinaryCalibrationError(n_bins=calibration, norm="l1"),
        }
    return {
        "accuracy": reference.MulticlassAccuracy(classes, average="micro"),
        "balanced_accuracy": reference.MulticlassAccuracy(classes, average="macro"),
        "f1": reference.MulticlassF1Score(classes, average="macro"),
        "auroc": reference.MulticlassAUROC(classes),
        "auprc": reference.MulticlassAveragePrecision(classes),
        "brier": lambda s, y: ((s - torch.nn.functional.one_hot(y, classes)) ** 2).sum(dim=1).mean(),
        "calibration_error": reference.MulticlassCalibrationError(classes, n_bins=calibration, norm="l1"),
    }


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, classes=st.sampled_from([2, 3, 5]), count=st.integers(0, 300), bins=BINS)
def test_figures_equal_torchmetrics_within_the_stated_bin_error(seed: int, classes: int, count: int, bins: int) -> None:
    """Every figure, on the same records, is as far from torchmetrics as ``bin_errors`` allows, and no farther."""
    scores, labels = _records(seed, classes, count)

    statistics = metrics.total_statistics(classes, scores, labels, bins=bins)
    figures = metrics.compute_metrics(classes, statistics, bins=bins)
    allowed = metrics.bin_errors(classes, statistics, bins=bins)

    assert figures.pop("records") == len(labels)
    expected = _torchmetrics(classes, bins)
    assert figures.keys() == expected.keys()
    for name, metric in expected.items():
        exact = float(metric(torch.from_numpy(scores).float(), torch.from_numpy(labels)))
        assert abs(figures[name] - exact) <= allowed[name] + ROUNDING, name


@pytest.mark.parametrize("classes", [2, 4])
def test_a_thousand_bins_are_close_to_exact(classes: int) -> None:
    """The stated error itself is small on an ordinary test part, and the true one smaller: the theorem is not empty."""
    scores, labels = _records(7, classes, 2000)

    statistics = metrics.total_statistics(classes, scores, labels, bins=metrics.EXACT_BINS)
    figures = metrics.compute_metrics(classes, statistics, bins=metrics.EXACT_BINS)
    allowed = metrics.bin_errors(classes, statistics, bins=metrics.EXACT_BINS)

    assert allowed["accuracy"] == allowed["balanced_accuracy"] == allowed["f1"] == 0
    assert allowed["calibration_error"] == 0.0005
    assert allowed["auroc"] < 0.002
    assert allowed["brier"] < 0.0021
    assert allowed["auprc"] < 0.02
    for name, metric in _torchmetrics(classes, metrics.EXACT_BINS).items():
        exact = float(metric(torch.from_numpy(scores).float(), torch.from_numpy(labels)))
        assert abs(figures[name] - exact) < 0.005, name


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, classes=st.sampled_from([2, 3]), cuts=st.lists(st.integers(0, 60), max_size=6), bins=BINS)
def test_any_split_merges_to_the_same_result(seed: int, classes: int, cuts: list[int], bins: int) -> None:
    """However records are spread over hospitals, some of them empty, the sum is the same to the bit."""
    scores, labels = _records(seed, classes, 60 - classes)

    parts = zip(np.split(scores, sorted(cuts)), np.split(labels, sorted(cuts)), strict=True)
    merged = sum(metrics.total_statistics(classes, *part, bins=bins) for part in parts)

    np.testing.assert_array_equal(merged, metrics.total_statistics(classes, scores, labels, bins=bins))


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, classes=st.sampled_from([2, 3, 6]), bins=BINS)
def test_rows_sum_to_the_statistics_and_have_the_stated_norm(seed: int, classes: int, bins: int) -> None:
    """What a release clips and sums are these rows, so neither their sum nor their norm may surprise."""
    scores, labels = _records(seed, classes, 20)

    rows = metrics.record_statistics(classes, scores, labels, bins=bins)

    assert rows.shape == (len(labels), metrics.statistics_size(classes, bins))
    assert set(np.unique(rows)) == {0.0, 1.0}
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), metrics.row_norm(classes), rtol=1e-12)
    np.testing.assert_array_equal(rows.sum(axis=0), metrics.total_statistics(classes, scores, labels, bins=bins))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), classes=st.sampled_from([2, 3]), bins=st.sampled_from([2, 6, 20]))
def test_noise_never_crashes_and_never_yields_nan(data: st.DataObject, classes: int, bins: int) -> None:
    """Released statistics carry noise: negative, fractional, tiny and huge counts all give finite figures in range."""
    size = metrics.statistics_size(classes, bins)
    limit = metrics.LARGEST_COUNT
    statistics = data.draw(arrays(np.float64, size, elements=st.floats(-limit, limit)))

    figures = metrics.compute_metrics(classes, statistics, bins=bins)

    records = figures.pop("records")
    assert records >= 0
    assert all(0 <= figure <= (classes if name == "brier" else 1) for name, figure in figures.items())
    assert ("accuracy" in figures) == (records > 0)


def test_small_noise_moves_figures_a_little() -> None:
    """With a thousand records and unit noise the released AUROC still tells what it should."""
    rng = np.random.default_rng(1)
    scores, labels = _records(1, 2, 1000)
    statistics = metrics.total_statistics(2, scores, labels, bins=20)

    exact = metrics.compute_metrics(2, statistics, bins=20)
    noised = metrics.compute_metrics(2, statistics + rng.normal(size=statistics.shape), bins=20)

    assert abs(exact["auroc"] - noised["auroc"]) < 0.02
    assert abs(exact["accuracy"] - noised["accuracy"]) < 0.02


def test_a_figure_that_is_not_defined_is_left_out() -> None:
    """One class only has no AUROC; printing 0 or 0.5 for it would be a lie."""
    only_positive = metrics.total_statistics(2, [0.9, 0.2], [1, 1], bins=20)

    figures = metrics.compute_metrics(2, only_positive, bins=20)

    assert figures.keys() == {
        "accuracy", "balanced_accuracy", "sensitivity", "f1", "brier", "calibration_error", "records"
    }  # fmt: skip
    assert figures["sensitivity"] == figures["balanced_accuracy"] == 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_no_records_have_no_figures(classes: int) -> None:
    """An empty validation part is counted as such, and nothing is divided by zero."""
    empty = np.zeros(metrics.statistics_size(classes, 20))

    assert metrics.compute_metrics(classes, empty, bins=20) == {"records": 0.0}
    assert metrics.bin_errors(classes, empty, bins=20) == {"records": 0.0}


@pytest.mark.parametrize(("negatives", "positives", "noise"), [(300, 100, 8.0), (3000, 1000, 18.0)])
def test_noise_does_not_draw_a_releases_figures_towards_chance(negatives: int, positives: int, noise: float) -> None:
    """Means over 300 releases; cut off at zero, counts this small would lose a tenth of an AUROC of 0.85.

    AUPRC and calibration error are computed from such counts: what is documented of them is seen here, too.
    """
    rng, draws = np.random.default_rng(30), 300
    edges = np.arange(21) / 20
    with np.errstate(divide="ignore"):
        logits = np.log(edges) - np.log1p(-edges)
    shares = [np.diff(norm.cdf(logits, shift)) for shift in (-0.75, 0.75)]
    true = metrics.compute_metrics(2, np.concatenate([shares[0] * negatives, shares[1] * positives]), bins=20)

    found, cut_off = [], []
    for _ in range(draws):
        counts = np.concatenate([rng.multinomial(negatives, shares[0]), rng.multinomial(positives, shares[1])])
        released = counts + noise * rng.normal(size=40)
        found.append(metrics.compute_metrics(2, released, bins=20))
        cut_off.append(metrics.compute_metrics(2, released.clip(min=0), bins=20))
    bias, before = (
        {name: float(np.mean([one[name] for one in those])) - true[name] for name in true} for those in (found, cut_off)
    )

    scale = 1.0 if noise == 8 else 0.25  # of what noise is to counts
    for name in ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "auroc", "brier"):
        assert abs(bias[name]) < 0.03 * scale
    assert before["auroc"] < -0.08 * scale
    assert before["sensitivity"] < -0.05 * scale
    assert bias["auprc"] == before["auprc"] < -0.08 * scale


def test_a_score_of_one_half_is_negative_and_the_next_larger_one_is_not() -> None:
    """The decision must not depend on how a score is binned: these are torchmetrics' own comparisons."""
    scores = np.array([0.5, np.nextafter(0.5, 1)])

    for bins in (2, 20, 62, 1000):
        figures = metrics.compute_metrics(2, metrics.total_statistics(2, scores, [0, 1], bins=bins), bins=bins)
        assert figures["accuracy"] == 1.0


def test_a_diverged_models_scores_count_as_the_nearest_score() -> None:
    """After a charge no content may decide whether statistics are sent: NaN and infinity must not raise."""
    broken = metrics.record_statistics(2, [np.nan, np.inf, -np.inf, 2.0], [1, 1, 1, 1], bins=20)

    np.testing.assert_array_equal(broken, metrics.record_statistics(2, [0.0, 1.0, 0.0, 1.0], [1, 1, 1, 1], bins=20))


@settings(max_examples=30, deadline=None)
@given(bins=st.integers(1, 500).map(lambda half: 2 * half))
def test_calibration_bins_are_whole_numbers_of_score_bins(bins: int) -> None:
    """Only then is a record in the same calibration bin whether it was binned before or not."""
    assert bins % metrics.calibration_bins(bins) == 0
    assert 2 <= metrics.calibration_bins(bins) <= 15


@pytest.mark.parametrize(
    ("classes", "scores", "labels"),
    [
        (2, [0.1, 0.2], [0]),
        (2, [[0.1, 0.9]], [0]),
        (3, [0.1], [0]),
        (3, [[0.1, 0.9]], [0]),
        (2, [0.1], [2]),
        (2, [0.1], [0.5]),
        (2, [0.1], [np.nan]),
        (2, [0.1], [-1]),
    ],
)
def test_scores_and_labels_that_do_not_fit_are_refused(classes: int, scores: object, labels: object) -> None:
    """A silent broadcast would count records that do not exist."""
    with pytest.raises(RecordsError, match=f"do not fit {classes} classes"):
        metrics.record_statistics(classes, np.array(scores), np.array(labels), bins=20)


@pytest.mark.parametrize("sent", [np.zeros(39), np.zeros((2, 20)), np.full(40, np.nan), np.full(40, np.inf)])
def test_statistics_from_a_peer_that_are_no_counts_are_refused(sent: NDArray[np.float64]) -> None:
    """One hospital's NaN must not become everyone's."""
    with pytest.raises(ProtocolError, match="are not 40 counts"):
        metrics.compute_metrics(2, sent, bins=20)


@pytest.mark.parametrize(("classes", "bins"), [(1, 20), (2, 0), (2, 7), (2, -2)])
def test_shapes_without_meaning_are_refused(classes: int, bins: int) -> None:
    """With an odd number of bins one half would lie inside a bin, and accuracy would be a guess."""
    with pytest.raises(ConfigError, match="make no statistics"):
        metrics.statistics_size(classes, bins)
