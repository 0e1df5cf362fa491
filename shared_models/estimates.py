"""Figures of heads that are no choice, with intervals: time to an event, a quantity, an outline.

From the same sums as ``outcomes.compute_metrics``, which may carry noise. An interval is all figures t that a test does
not reject, as in ``evaluation.py``: a figure is a ratio x / y of two sums, and t is rejected if |x - t y| is above z
standard deviations, those of the patients and those of the noise, in y too (Fieller 1954). So without noise it is the
interval of Wilson's kind, and where the noise drowns the patients it is the figure's whole range.

Sums say nothing of how patients vary but what was summed: where the square of a figure was not, the largest variance
stands that its mean allows. Such intervals are wider than they need to be, never narrower.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_models.intervals import Z2, Estimate, accepted, hanley
from shared_models.metrics import LARGEST_COUNT, nearest_counts
from shared_models.outcomes import compared, named_figure, of_heads
from shared_models.tasks import Choice, Head, Outline, Quantity, Survival, Task

Floats = NDArray[np.float64]

WORST_WAPE: Final = 10.0  # where its interval ends; predicting the lower end of the range always has 1


def estimate_heads(task: Task, statistics: ArrayLike, *, bins: int, noise: float = 0.0) -> dict[str, Estimate]:
    """Figures of all heads that are no choice, each with its interval at ``LEVEL``.

    Names are those of ``outcomes.compute_metrics``: ``c_index``; ``mae``, ``rmse``, ``wape``; ``dice``,
    ``sensitivity``, ``precision``; of several heads, after the head's name and a dot.

    Guarantees:
        * Every number is finite; a figure is None where the noise leaves nothing that could be called one.

    Args:
        task: Names the heads.
        statistics: Summed statistics of ``outcomes.record_statistics``, with noise or without.
        bins: Score bins.
        noise: Standard deviation of independent Gaussian noise on every entry; 0 where they are exact.

    Raises:
        ProtocolError: Wrong length, or numbers that cannot be counted.
    """
    return {
        named_figure(task, head, name): estimate
        for head, sums in of_heads(task, statistics, bins)
        if not isinstance(head, Choice)
        for name, estimate in _estimates(head, sums, bins, min(noise, LARGEST_COUNT)).items()
    }


def leading_figures(task: Task) -> list[str]:
    """Of each head that is no choice the figure that stands for it, by its name among the task's."""
    leading = {"quantity": "mae", "survival": "c_index", "outline": "dice"}
    return [named_figure(task, head, leading[head.kind]) for head in task.heads if head.kind in leading]


def _estimates(head: Head, sums: Floats, bins: int, noise: float) -> Mapping[str, Estimate]:
    match head:
        case Quantity():
            return _of_quantity(sums, noise)
        case Survival(edges=edges):
            return {"c_index": _concordance(sums.reshape(bins, len(edges) + 1, 2), noise)}
        case Outline():
            images, *totals = sums.tolist()
            return {
                name: _mean(total, images, noise, lambda t: images * t * (1 - t))
                for name, total in zip(("dice", "sensitivity", "precision"), totals, strict=True)
            }
        case Choice():
            return {}


def _mean(
    total: float, count: float, noise: float, variance: Callable[[Floats], Floats], *, high: float = 1.0
) -> Estimate:
    """A ratio of two noised sums, tested as above.

    Args:
        total: x.
        count: y.
        noise: Standard deviation of the noise on each.
        variance: Of x - t y by the chance of which patients there are, at every t.
        high: The largest ratio that is looked at.
    """
    if not count > 0:
        return Estimate(None, 0.0, high)
    total = min(max(total, 0.0), high * count)

    def distance(t: Floats) -> Floats:
        result: Floats = (total - t * count) ** 2 - Z2 * (variance(t) + noise**2 * (1 + t**2))
        return result

    return accepted(total / count, distance, high=high)


def _of_quantity(sums: Floats, noise: float) -> dict[str, Estimate]:
    """Absolute errors have their squares beside them; squared ones, and what relates errors to values, do not.

    Source:
        Bhatia and Davis, American Mathematical Monthly 2000;107:353-357: numbers in [0, 1] of mean m have a variance of
        m (1 - m) at most. Of |error| - t value, whose covariance was not summed, Cauchy and Schwarz's bound stands.
    """
    count, absolute, squared, level, level_squared = sums.tolist()
    unbiased = count / max(count - 1, 1.0)  # of a variance about an estimated mean

    def of_errors(t: Floats) -> Floats:
        return unbiased * np.maximum(squared - 2 * t * absolute + t**2 * count, 0.0)

    def of_shares(t: Floats) -> Floats:
        errors, levels = (
            max(second - first**2 / max(count, 1.0), 0.0) ** 0.5
            for first, second in ((absolute, squared), (level, level_squared))
        )
        return unbiased * (errors + t * levels) ** 2

    squares = _mean(squared, count, noise, lambda t: count * t * (1 - t))
    return {
        "mae": _mean(absolute, count, noise, of_errors),
        "rmse": Estimate(*(None if end is None else end**0.5 for end in squares)),  # type: ignore[arg-type]  # ends are none
        "wape": _mean(absolute, level, noise, of_shares, high=WORST_WAPE),
    }


def _concordance(raw: Floats, noise: float) -> Estimate:
    """Harrell's index: concordant pairs over pairs; one of both kinds of record in a pair is from another cell.

    Both counts of pairs are sums of products of two different cells, so noise leaves them unbiased. The variance of
    their difference is the delta method's, of the patients from the nearest counts without a negative one, of the noise
    from the counts as they came. Where the ranking is perfect, or nearly, the delta method finds next to no variance:
    Hanley and McNeil's stands where it is larger, of as many patients as had the event and as many as are compared with
    one of them.

    Args:
        raw: Shape ``(bins, intervals + 1, 2)``, as ``outcomes.concordance``.
        noise: Standard deviation of the noise on every count.

    Source:
        Newson, "Confidence intervals for rank statistics", Stata Journal 2006;6:309-334, for the delta method; Hanley
        and McNeil, Radiology 1982;143:29-36; their test at t as in Newcombe, Statistics in Medicine 2006;25:559-573.
    """
    table = nearest_counts(raw.ravel()).reshape(raw.shape)
    concordant, pairs, by_concordant, by_pairs = _pairs(raw)
    events, others = float(raw[:, :-1, 1].sum()), float(raw[:, 1:].sum())
    if not (pairs > 0 and events > 0 and others > 0 and table.any()):
        return Estimate(None, 0.0, 1.0)
    concordant = min(max(concordant, 0.0), pairs)
    of_noise = _quadratic(by_concordant, by_pairs, np.full_like(raw, noise**2))
    # Of as many patients, whoever they are.
    of_concordant, of_pairs = (one - (table * one).sum() / table.sum() for one in _pairs(table)[2:])
    of_patients = _quadratic(of_concordant, of_pairs, table)

    def distance(t: Floats) -> Floats:
        variance = np.maximum(pairs**2 * hanley(t, events, others), of_patients(t)) + of_noise(t)
        result: Floats = (concordant - t * pairs) ** 2 - Z2 * variance
        return result

    return accepted(concordant / pairs, distance)


def _pairs(counts: Floats) -> tuple[float, float, Floats, Floats]:
    """Concordant pairs and pairs that can be compared, and the derivatives of both by every count."""
    events, later, lower = compared(counts)
    earlier = events.cumsum(axis=1) - events
    higher = earlier[::-1].cumsum(axis=0)[::-1] - earlier / 2
    anybody_later, anybody_earlier = (np.broadcast_to(one.sum(axis=0), events.shape) for one in (later, earlier))
    by_concordant = np.stack([higher, higher + lower], axis=2)
    by_pairs = np.stack([anybody_earlier, anybody_earlier + anybody_later], axis=2)
    return float((events * lower).sum()), float((events * anybody_later).sum()), by_concordant, by_pairs


def _quadratic(first: Floats, second: Floats, weights: Floats) -> Callable[[Floats], Floats]:
    """The function of t that is the weighted sum of (first - t * second)^2, in three sums."""
    squares, mixed, others = (float((weights * one).sum()) for one in (first**2, first * second, second**2))

    def at(t: Floats) -> Floats:
        return np.maximum(squares - 2 * t * mixed + t**2 * others, 0.0)

    return at
