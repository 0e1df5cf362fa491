"""Calibration as medicine reports it: Cox's recalibration, logit(P) = intercept + slope * logit(score).

A slope below 1 says that scores are too extreme (an overfitted model), above 1 that they are not extreme enough; the
intercept, with the slope held at 1, is above 0 where more fall ill than were predicted.

Both are what score tests do not reject. The score equations of logistic regression are linear in the counts, so noise
leaves them unbiased, and their variance has two parts: that of the patients and that of the noise, both known.

Source:
    Cox, Biometrika 1958;45:562-565; Van Calster et al., Journal of Clinical Epidemiology 2016;74:167-176 (weak
    calibration); Rao's score test with the nuisance parameter at its root.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models.intervals import Z2, Estimate, accepted

Floats = NDArray[np.float64]

SLOPES: Final = (-1.0, 5.0)  # where slopes are looked for
INTERCEPTS: Final = (-5.0, 5.0)
FEWEST_BINS: Final = 10  # of fewer, middles are too far from their scores for a slope
_MOST_STRETCHES: Final = 50  # more are merged, with the mean of their middles
_NEARER: Final = 10.0  # scores of the end bins are taken as their middle, and as so much nearer to 0 or 1
_ROOM: Final = 0.25  # more than that between both is not one figure
_STEPS: Final = 15  # of Newton's method
_LARGEST: Final = 30.0  # a logit


class _Points(NamedTuple):
    """Scores in stretches.

    Attributes:
        logits: Of each stretch's mean score, shape ``(k,)``.
        raw: Counts as they came, shape ``(2, k)``.
        table: The nearest ones without a negative count.
        noise: Variance of the noise on the counts of each stretch, shape ``(k,)``.
    """

    logits: Floats
    raw: Floats
    table: Floats
    noise: Floats


def recalibration(raw: Floats, table: Floats, noise: float) -> tuple[Estimate, Estimate]:
    """Calibration intercept and slope.

    Scores are taken as the middles of their bins. In the two end bins, where logits have no end, that may be far off:
    each figure is computed once more with these scores ten times nearer to 0 or 1. The interval covers both, and where
    they are apart there is no figure. Nor is there one, or an interval, of fewer than ``FEWEST_BINS`` bins.

    Args:
        raw: Counts as they came, shape ``(2, bins)``: negatives, then positives.
        table: The nearest ones without a negative count.
        noise: Standard deviation of the noise on every entry of ``raw``.
    """
    if raw.shape[1] < FEWEST_BINS:
        return Estimate(None, *INTERCEPTS), Estimate(None, *SLOPES)
    found = [_recalibrated(_stretches(raw, table, noise, nearer)) for nearer in (1.0, _NEARER)]
    intercept, slope = (_both(*estimates) for estimates in zip(*found, strict=True))
    return intercept, slope


def _stretches(raw: Floats, table: Floats, noise: float, nearer: float) -> _Points:
    bins = raw.shape[1]
    middles = (np.arange(bins) + 0.5) / bins
    middles[0], middles[-1] = 0.5 / bins / nearer, 1 - 0.5 / bins / nearer
    first = np.arange(0, bins, -(-bins // _MOST_STRETCHES))
    weights = table.sum(axis=0) + 1e-9  # a stretch without patients has its middle
    mean = np.add.reduceat(weights * middles, first) / np.add.reduceat(weights, first)
    return _Points(
        logits=np.log(mean) - np.log1p(-mean),
        raw=np.add.reduceat(raw, first, axis=1),
        table=np.add.reduceat(table, first, axis=1),
        noise=noise**2 * np.diff(first, append=bins),
    )


def _both(one: Estimate, other: Estimate) -> Estimate:
    low, high = min(one.low, other.low), max(one.high, other.high)
    apart = one.value is None or other.value is None or abs(one.value - other.value) > _ROOM
    return Estimate(None if apart else one.value, low, high)


def _recalibrated(points: _Points) -> tuple[Estimate, Estimate]:
    if not (points.raw.sum(axis=1) > 0).all():
        return Estimate(None, *INTERCEPTS), Estimate(None, *SLOPES)

    def of_intercept(a: Floats) -> tuple[Floats, Floats]:
        return _score(points, np.ones_like(points.logits), _shares(a, np.ones_like(a), points))

    def of_slope(b: Floats) -> tuple[Floats, Floats]:
        shares, solved = _with_intercept(b, points)
        weights = points.table.sum(axis=0) * shares * (1 - shares)
        total = weights.sum(axis=1, keepdims=True)
        centre = (weights @ points.logits)[:, None] / np.maximum(total, 1e-9)
        score, variance = _score(points, points.logits - centre, shares)
        return np.where(solved, score, 0.0), variance  # what cannot be tested is not rejected

    return _accepted(of_intercept, *INTERCEPTS), _accepted(of_slope, *SLOPES)


def _shares(intercepts: Floats, slopes: Floats, points: _Points) -> Floats:
    """Predicted shares, shape ``(candidates, k)``."""
    logits = (intercepts[:, None] + slopes[:, None] * points.logits).clip(-_LARGEST, _LARGEST)
    shares: Floats = 1 / (1 + np.exp(-logits))
    return shares


def _score(points: _Points, direction: Floats, shares: Floats) -> tuple[Floats, Floats]:
    """The score in a direction, at every candidate, and its variance: of patients, as they are, and of the noise."""
    (negatives, positives), table = points.raw, points.table
    score = (direction * (positives * (1 - shares) - negatives * shares)).sum(axis=1)
    of_patients = table[1] * (1 - shares) ** 2 + table[0] * shares**2
    of_noise = points.noise * ((1 - shares) ** 2 + shares**2)
    return score, (direction**2 * (of_patients + of_noise)).sum(axis=1)


def _with_intercept(slopes: Floats, points: _Points) -> tuple[Floats, Floats]:
    """Shares at each slope with the intercept that makes the first score equation hold; and where one was found."""
    intercepts, everybody = np.zeros_like(slopes), points.raw.sum(axis=0)
    for _ in range(_STEPS):
        shares = _shares(intercepts, slopes, points)
        missed = points.raw[1].sum() - shares @ everybody
        slope = (shares * (1 - shares)) @ points.table.sum(axis=0)
        intercepts = (intercepts + (missed / np.maximum(slope, 1e-9)).clip(-1, 1)).clip(-_LARGEST, _LARGEST)
    return shares, np.abs(missed) <= 1e-3 * np.sqrt(points.table.sum())


def _accepted(score: Callable[[Floats], tuple[Floats, Floats]], low: float, high: float) -> Estimate:
    """The root of a score, and all that its test does not reject."""

    def distance(candidates: Floats) -> Floats:
        found, variance = score(candidates)
        result: Floats = found**2 - Z2 * variance
        return result

    value, width = (low + high) / 2, high - low
    for _ in range(6):
        grid = np.linspace(max(value - width / 2, low), min(value + width / 2, high), 33)
        found, variance = score(grid)
        value, width = float(grid[np.argmin(found**2 / np.maximum(variance, 1e-9))]), width / 8
    if not distance(np.array([value]))[0] <= 0:
        return Estimate(None, low, high)  # the root is outside
    return accepted(value, distance, low=low, high=high, gaps=False)
