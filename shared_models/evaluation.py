"""Evaluation as medicine reports it: figures with intervals, and curves, from counts of scores that may carry noise.

``metrics.py`` gives the figures by which a study is steered. This file says how far each can be trusted: intervals
cover the chance of which patients were there *and* the noise that a release added. Where the noise drowns the
patients, an interval is as wide as the figure's range, and the figure itself is left out.

Two statements hold for all of it. A patient counts once: with several records, each is a part of one, which is what
released statistics are made of; such patients vary less than single records, so intervals err on the wide side. And
whatever is computed here is computed from released statistics, or stays in the house: it spends nothing more.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_models.calibration import recalibration
from shared_models.errors import ConfigError
from shared_models.intervals import Z2, Estimate, accepted, hanley
from shared_models.metrics import LARGEST_COUNT, calibration_bins, nearest_counts
from shared_models.outcomes import score_tables
from shared_models.tasks import Task

Floats = NDArray[np.float64]

SPECIFICITY: Final = 0.90  # at which a sensitivity is reported
FINEST_THRESHOLDS: Final = 99  # of the decision curve: at most so many
_NOBODY: Final = 1e-9  # nearer to zero than any part of a patient
_ROOM: Final = 0.05  # more than that between two ends is not one figure
_CLEAR: Final = 3.0  # standard deviations of noise above which a count can be divided by


class Point(NamedTuple):
    """One point of a curve."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class AtThreshold:
    """Decisions at one threshold: positive if the score is above it.

    Attributes:
        threshold: An edge of the score bins.
        sensitivity: Share of the positive that are found.
        specificity: Share of the negative that are left alone.
        positive_predictive_value: Share of the found that are positive.
        negative_predictive_value: Share of the left alone that are negative.
    """

    threshold: float
    sensitivity: Estimate
    specificity: Estimate
    positive_predictive_value: Estimate
    negative_predictive_value: Estimate


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Scores of one stretch against what came true.

    Attributes:
        low: Lower edge of the scores.
        high: Upper edge.
        predicted: Mean score, each taken as its bin's middle.
        observed: Share of positives.
        patients: How many, as far as the noise lets one say; never below zero.
    """

    low: float
    high: float
    predicted: float
    observed: Estimate
    patients: float


@dataclass(frozen=True, kw_only=True)
class NetBenefit:
    """What acting on the model is worth at one threshold probability, in true positives per patient.

    Attributes:
        threshold: The probability of disease at which a patient would want to be treated.
        model: Treating those above it.
        treat_all: Treating everybody; treating nobody is worth 0.
    """

    threshold: float
    model: Estimate
    treat_all: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All of it for one class against the rest, in one group of patients.

    Attributes:
        positives: Patients of the class, as far as the noise lets one say.
        negatives: All others.
        auroc: See ``auroc``.
        auprc: See ``auprc``.
        brier: Mean squared distance of the score from 0 or 1.
        calibration_in_the_large: Share of positives less the mean score: 0 if as many fall ill as were predicted.
        calibration_intercept: The same on the logit scale: 0 if as many fall ill as were predicted.
        calibration_slope: 1 if scores are as extreme as they should be; below, they are too extreme.
        at_half: Decisions at 1/2, which every other figure of the project is about.
        at_specificity: Decisions at the lowest threshold that keeps the specificity asked for.
        roc: False positive rate and sensitivity, from (0, 0) to (1, 1).
        precision_recall: Sensitivity and positive predictive value.
        calibration: The calibration curve.
        decision: The decision curve.
        noise: Standard deviation of the noise on every count.
    """

    positives: float
    negatives: float
    auroc: Estimate
    auprc: Estimate
    brier: Estimate
    calibration_in_the_large: Estimate
    calibration_intercept: Estimate
    calibration_slope: Estimate
    at_half: AtThreshold
    at_specificity: AtThreshold
    roc: tuple[Point, ...]
    precision_recall: tuple[Point, ...]
    calibration: tuple[CalibrationBin, ...]
    decision: tuple[NetBenefit, ...]
    noise: float

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries; an estimate is its three numbers by name."""
        found = _plain(asdict(self))
        assert isinstance(found, dict)  # noqa: S101 - a dataclass
        return found


def evaluate(table: ArrayLike, *, noise: float = 0.0, specificity: float = SPECIFICITY) -> Evaluation:
    """Everything that one table of scores tells.

    Guarantees:
        * Every number is finite for any finite table, negative counts included.
        * Without noise every figure is that of the unbinned scores within ``metrics.bin_errors``; those at a threshold
          are exact.

    Args:
        table: Counts of patients by score, shape ``(2, bins)``: negatives, then positives.
        noise: Standard deviation of independent Gaussian noise on every count; 0 where they are exact.
        specificity: What ``at_specificity`` keeps, in (0, 1).

    Raises:
        ConfigError: The table is none, the noise is negative or the specificity is out of range.
    """
    counts = _Counts.of(table, noise)
    intercept, slope = recalibration(counts.raw, counts.table, counts.noise)
    if not 0 < specificity < 1:
        raise ConfigError(f"a specificity of {specificity} is not in (0, 1)", hint="The custom is 0.9.")
    return Evaluation(
        positives=max(counts.totals[1], 0.0),
        negatives=max(counts.totals[0], 0.0),
        auroc=_auroc(counts),
        auprc=_auprc(counts),
        brier=_mean(counts, _squared_errors(counts.bins)),
        calibration_in_the_large=_mean(
            counts, np.stack([np.zeros(counts.bins), np.ones(counts.bins)]) - counts.middles
        ),
        calibration_intercept=intercept,
        calibration_slope=slope,
        at_half=_at(counts, counts.bins // 2),
        at_specificity=_at(counts, _cut_for(counts, specificity)),
        roc=_roc(counts),
        precision_recall=_precision_recall(counts),
        calibration=_calibration(counts),
        decision=_decision(counts),
        noise=float(noise),
    )


def evaluate_task(
    task: Task, statistics: ArrayLike, *, bins: int, noise: float = 0.0, specificity: float = SPECIFICITY
) -> dict[str, Evaluation]:
    """One evaluation per class against the rest; of two classes, the positive one's only.

    Args:
        task: Heads that are no choice have no such evaluation.
        statistics: Summed statistics of ``outcomes.record_statistics``, with noise or without.
        bins: Score bins.
        noise: Standard deviation of the noise on every entry.
        specificity: As for ``evaluate``.

    Raises:
        ProtocolError: Wrong length, or numbers that cannot be counts.
    """
    tables = score_tables(task, statistics, bins=bins)
    return {name: evaluate(table, noise=noise, specificity=specificity) for name, table in tables.items()}


# the counts


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """A table as it came, and as counts can be.

    Attributes:
        raw: As it came, shape ``(2, bins)``; unbiased, and with noise perhaps below zero.
        table: The nearest table without negative counts that has the same totals.
        noise: Standard deviation of the noise on every entry of ``raw``.
    """

    raw: Floats
    table: Floats
    noise: float

    @classmethod
    def of(cls, table: ArrayLike, noise: float) -> "_Counts":
        raw = np.asarray(table, dtype=np.float64)
        if raw.ndim != 2 or raw.shape[0] != 2 or not raw.shape[1] or raw.shape[1] % 2:
            raise ConfigError(f"a table of scores has shape (2, bins), not {raw.shape}", hint="Bins are even.")
        if not ((np.abs(raw) <= LARGEST_COUNT).all() and 0 <= noise <= LARGEST_COUNT):  # NaN fails, too
            raise ConfigError("counts and noise have to be finite", hint="The statistics are broken.")
        if not noise and (raw < 0).any():
            raise ConfigError("counts without noise are not negative", hint="Say how much noise there is.")
        raw = np.where(np.abs(raw) < _NOBODY, 0.0, raw)
        return cls(raw=raw, table=np.stack([nearest_counts(row) for row in raw]), noise=float(noise))

    @property
    def bins(self) -> int:
        return self.raw.shape[1]

    @property
    def totals(self) -> tuple[float, float]:
        """Negatives and positives, unbiased."""
        return float(self.raw[0].sum()), float(self.raw[1].sum())

    @property
    def middles(self) -> Floats:
        return (np.arange(self.bins) + 0.5) / self.bins


# intervals


def _share(part: Floats, rest: Floats, noise: float) -> Estimate:
    """A share of a count: Wilson's interval, widened by the noise.

    A share t is rejected if |x - t n| is above z standard deviations: n t (1 - t) of the patients, and s^2 times
    (1 - t)^2 for every noised count in x and t^2 for every other. Without noise that is Wilson's interval (1927); with
    noise the denominator is uncertain too, as in Fieller's (1954), and the interval may be all of [0, 1].

    Args:
        part: Counts that add up to x.
        rest: Counts that add up to n - x.
        noise: s, on every count.
    """
    n = float(part.sum() + rest.sum())
    x = min(max(float(part.sum()), 0.0), n)
    cells = len(part), len(rest)
    value = x / n if n > 0 else None

    def distance(t: Floats) -> Floats:
        variance = n * t * (1 - t) + noise**2 * (cells[0] * (1 - t) ** 2 + cells[1] * t**2)
        result: Floats = (x - t * n) ** 2 - Z2 * variance
        return result

    return accepted(value, distance)


def _mean(counts: _Counts, values: Floats) -> Estimate:
    """Mean of a figure that is the same for all patients of a cell, by the same test: the delta method, and noise.

    Args:
        counts: How many there are of each cell.
        values: The figure, shape ``(2, bins)``.
    """
    n, low, high = float(counts.raw.sum()), float(values.min()), float(values.max())
    total = min(max(float((counts.raw * values).sum()), low * n), high * n)
    squares = _squares(values, counts.table + counts.noise**2)

    def distance(t: Floats) -> Floats:
        result: Floats = (total - t * n) ** 2 - Z2 * squares(t)
        return result

    return accepted(min(max(total / n, low), high) if n > 0 else None, distance, low=low, high=high)


def _squares(values: Floats, weights: Floats | float, times: float = 1.0) -> Callable[[Floats], Floats]:
    """The function of t that is the weighted sum of (value - times * t)^2, in three sums."""
    weights = np.broadcast_to(weights, values.shape)
    second, first, none = ((weights * values**power).sum() for power in (2, 1, 0))

    def at(t: Floats) -> Floats:
        result: Floats = np.maximum(second - 2 * times * t * first + (times * t) ** 2 * none, 0.0)
        return result

    return at


def _auroc(counts: _Counts) -> Estimate:
    """Area under the ROC curve: the share of pairs in which the positive has the higher score, ties counting half.

    The estimate is U / (m n), all three unbiased under noise. An area t is rejected if |U - t m n| is above z standard
    deviations. Its variance is that of the patients, the larger one of Hanley and McNeil's at t, whose exponential
    model needs no placement and so does not vanish at t = 1, and DeLong's from the table; and that of the noise, by the
    delta method, with m and n noised too (Fieller).

    Source:
        Newcombe, Statistics in Medicine 2006;25:559-573, method 5 (the test at t instead of at the estimate);
        Hanley and McNeil, Radiology 1982;143:29-36; DeLong et al., Biometrics 1988;44:837-845.
    """
    (n, m), noise = counts.totals, counts.noise
    if not (m > 0 and n > 0):
        return Estimate(None, 0.0, 1.0)
    below, above = _won(counts.raw)
    u = min(max(float(counts.raw[1] @ below), 0.0), m * n)
    delong = _delong(counts.table)
    of_positives, of_negatives = _squares(below, noise**2, n), _squares(above, noise**2, m)

    def distance(t: Floats) -> Floats:
        variance = (m * n) ** 2 * np.maximum(hanley(t, m, n), delong) + of_positives(t) + of_negatives(t)
        result: Floats = (u - t * m * n) ** 2 - Z2 * variance
        return result

    return accepted(u / (m * n), distance)


def _won(table: Floats) -> tuple[Floats, Floats]:
    """Of each bin: the negatives that a positive there beats, and the positives that a negative there loses to."""
    negatives, positives = table
    return negatives.cumsum() - negatives / 2, positives[::-1].cumsum()[::-1] - positives / 2


def _delong(table: Floats) -> float:
    """DeLong's variance of the area, from the spread of the placements."""
    n, m = table.sum(axis=1)
    if not (n > 1 and m > 1):
        return 0.25
    below, above = (won / total for won, total in zip(_won(table), (n, m), strict=True))
    spread_of_positives = _spread(below, table[1]) / (m - 1)
    return float(spread_of_positives + _spread(above, table[0]) / (n - 1))


def _spread(values: Floats, weights: Floats) -> float:
    mean = weights @ values / weights.sum()
    return float(weights @ (values - mean) ** 2 / weights.sum())


def _auprc(counts: _Counts) -> Estimate:
    """Average precision, with the test of a share (``_share``) in which the patients' variance may be larger.

    Precision at the top is a ratio of few patients. Under noise, bins are merged from the top until there are enough to
    divide by: ``_CLEAR`` standard deviations of their noise. Average precision is computed from the counts as they
    came, which leaves hardly any bias. It lies higher if the model ranks well within what was merged: the upper end has
    room for the best order there, and where that is more than ``_ROOM`` there is no figure. The lower end holds as long
    as the model ranks there no worse than at random.

    An average precision t is rejected if it is above z standard deviations away. The variance is that of the patients,
    the larger one of a share's of m positives, t (1 - t) / m (Boyd et al.), and of the delta method's from the table;
    and s^2 times the squared derivatives by all counts. It does not change when all counts grow alike, so nothing else
    is left of the delta method for a multinomial sample.

    Source:
        Boyd, Eng and Page, ECML PKDD 2013, for the share of m; the merging is our own, held to simulations.
    """
    m, noise = counts.totals[1], counts.noise
    merged = _bins_to_merge(counts)
    if not (m > 0 and counts.totals[0] > 0) or merged > counts.bins:
        return Estimate(None, 0.0, 1.0)
    kept, top = counts.raw[:, : counts.bins - merged], counts.raw[:, counts.bins - merged :]
    found, by_count = average_precision(np.concatenate([kept, top.sum(axis=1, keepdims=True)], axis=1))
    value = min(max(found, 0.0), 1.0)
    by_count = np.concatenate([by_count[:, :-1], np.repeat(by_count[:, -1:], merged, axis=1)], axis=1)
    of_patients, of_noise = float((by_count**2 * counts.table).sum()), noise**2 * float((by_count**2).sum())

    def distance(t: Floats) -> Floats:
        result: Floats = (value - t) ** 2 - Z2 * (np.maximum(t * (1 - t) / m, of_patients) + of_noise)
        return result

    whole = accepted(value, distance)
    if merged == 1:
        return whole
    negatives, positives = top.sum(axis=1)
    room = min(max(positives / m, 0.0), 1.0) * (1 - min(max(positives / (positives + negatives), 0.0), 1.0))
    return Estimate(whole.value if room <= _ROOM else None, whole.low, min(whole.high + float(room), 1.0))


def _bins_to_merge(counts: _Counts) -> int:
    """How many bins from the top hold enough to divide by, there and at every edge below; more than all if none do."""
    above = counts.raw[:, ::-1].sum(axis=0).cumsum()
    unclear = above <= _CLEAR * counts.noise * np.sqrt(2 * np.arange(1, counts.bins + 1))
    return int(np.flatnonzero(unclear).max(initial=-1)) + 2 if counts.noise else 1


def average_precision(table: Floats) -> tuple[float, Floats]:
    """Average precision, and its derivative by every count.

    Args:
        table: Shape ``(2, bins)``; the positives do not add up to 0.

    Returns:
        The average precision, outside of [0, 1] only if counts are below zero; the derivatives, shape ``(2, bins)``.
    """
    negatives, positives = table[:, ::-1]
    m = positives.sum()
    found, false = positives.cumsum(), negatives.cumsum()
    whole = found + false
    there = whole != 0
    precision = np.divide(found, whole, out=np.zeros_like(whole), where=there)
    value = float(positives @ precision / m)
    weights = np.divide(positives / m, whole**2, out=np.zeros_like(whole), where=there)

    def of_this_bin_and_below(terms: Floats) -> Floats:
        return terms[::-1].cumsum()[::-1]

    by_negative = -of_this_bin_and_below(weights * found)
    by_positive = (precision - value) / m + of_this_bin_and_below(weights * false)
    return value, np.stack([by_negative, by_positive])[:, ::-1]


# decisions


def _at(counts: _Counts, cut: int) -> AtThreshold:
    """Decisions at the edge below bin ``cut``."""
    (true_negative, false_positive), (false_negative, true_positive) = ((row[:cut], row[cut:]) for row in counts.raw)
    return AtThreshold(
        threshold=cut / counts.bins,
        sensitivity=_share(true_positive, false_negative, counts.noise),
        specificity=_share(true_negative, false_positive, counts.noise),
        positive_predictive_value=_share(true_positive, false_positive, counts.noise),
        negative_predictive_value=_share(true_negative, false_negative, counts.noise),
    )


def _cut_for(counts: _Counts, specificity: float) -> int:
    """The lowest threshold from which on the estimated specificity stays at or above what is asked.

    It depends on the negatives only, so that the interval of the sensitivity there holds as it stands; the specificity
    was chosen, and its estimate flatters a little.
    """
    negatives = counts.table[0]
    total = negatives.sum()
    if not total > 0:
        return counts.bins
    left_alone = np.concatenate([[0.0], negatives.cumsum()])
    return int(np.flatnonzero(left_alone >= specificity * total * (1 - 1e-12))[0])


def _roc(counts: _Counts) -> tuple[Point, ...]:
    shares = _from_the_top(counts.table)
    return () if shares is None else tuple(Point(float(x), float(y)) for x, y in zip(*shares, strict=True))


def _from_the_top(table: Floats) -> tuple[Floats, Floats] | None:
    """Shares of negatives and of positives above each edge, from none to all; None without a class."""
    totals = table.sum(axis=1, keepdims=True)
    if not (totals > 0).all():
        return None
    above = np.concatenate([np.zeros((2, 1)), (table / totals)[:, ::-1].cumsum(axis=1)], axis=1).clip(max=1.0)
    return above[0], above[1]


def _precision_recall(counts: _Counts) -> tuple[Point, ...]:
    shares = _from_the_top(counts.table)
    if shares is None:
        return ()
    false, found = (share * total for share, total in zip(shares, counts.table.sum(axis=1), strict=True))
    some = found + false > 0
    precision = found[some] / (found + false)[some]
    return tuple(Point(float(x), float(y)) for x, y in zip(shares[1][some], precision, strict=True))


# calibration, and what decisions are worth


def _squared_errors(bins: int) -> Floats:
    middles = (np.arange(bins) + 0.5) / bins
    return np.stack([middles**2, (1 - middles) ** 2])


def _calibration(counts: _Counts) -> tuple[CalibrationBin, ...]:
    wide = calibration_bins(counts.bins)
    each = counts.bins // wide
    found = []
    for first in range(0, counts.bins, each):
        part = slice(first, first + each)
        weights = counts.table[:, part].sum(axis=0)
        middles = counts.middles[part]
        found.append(
            CalibrationBin(
                low=first / counts.bins,
                high=(first + each) / counts.bins,
                predicted=float(weights @ middles / weights.sum() if weights.sum() > 0 else middles.mean()),
                observed=_share(counts.raw[1, part], counts.raw[0, part], counts.noise),
                patients=max(float(counts.raw[:, part].sum()), 0.0),
            )
        )
    return tuple(found)


def _decision(counts: _Counts) -> tuple[NetBenefit, ...]:
    """Net benefit over thresholds that are edges of the bins.

    Source:
        Vickers and Elkin, Medical Decision Making 2006;26:565-574: (TP - FP * p / (1 - p)) / n.
    """
    bins = counts.bins
    step = math.ceil(bins / (FINEST_THRESHOLDS + 1))
    n = counts.totals[0] + counts.totals[1]
    prevalence = min(max(counts.totals[1] / n, 0.0), 1.0) if n > 0 else 0.0
    curve = []
    for cut in range(step, bins, step):
        threshold = cut / bins
        odds = threshold / (1 - threshold)
        treated = np.arange(bins) >= cut
        curve.append(
            NetBenefit(
                threshold=threshold,
                model=_mean(counts, np.stack([-odds * treated, treated.astype(np.float64)])),
                treat_all=prevalence - (1 - prevalence) * odds,
            )
        )
    return tuple(curve)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
