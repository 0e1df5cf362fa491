"""Intervals: all figures that a test does not reject."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL: Final = 0.95  # of every interval
Z2: Final = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
_GRID: Final = np.linspace(0, 1, 257)  # where an interval's ends are looked for, again and again closer
_COARSE: Final = np.linspace(0, 1, 17)  # the same, where a test is dear and what it accepts has no gaps
_PRECISION: Final = 1e-7  # of the range


class Estimate(NamedTuple):
    """A figure with its interval at ``LEVEL``.

    Attributes:
        value: None where the noise leaves nothing that could be called one.
        low: Lower end.
        high: Upper end.
    """

    value: float | None
    low: float
    high: float


def accepted(
    value: float | None, distance: Callable[[Floats], Floats], *, low: float = 0.0, high: float = 1.0, gaps: bool = True
) -> Estimate:
    """All figures that a test does not reject, from the least to the greatest; where that is all, no figure.

    Noise can carry an estimate out of the range. Whoever calls moves what the test is of to the end of the range then:
    that only accepts more, and leaves an interval of some width.

    Args:
        value: The estimate, in the range; None accepts the whole range.
        distance: Of each candidate figure: squared distance from the data less z^2 times its variance there; rejected
            where that is positive.
        low: Least figure that is possible.
        high: Greatest.
        gaps: What is accepted may have gaps; without, fewer figures are tested.
    """
    steps = _GRID if gaps else _COARSE
    rounds = math.ceil(-math.log(_PRECISION) / math.log(len(steps) - 1))
    if value is None:
        return Estimate(None, low, high)
    ends = []
    for end in (low, high):
        inside, outside = value, end
        for _ in range(rounds):
            grid = inside + (outside - inside) * steps
            outermost = int(np.flatnonzero(distance(grid) <= 0).max(initial=0))
            if outermost == len(grid) - 1:
                inside = outside
                break
            inside, outside = float(grid[outermost]), float(grid[outermost + 1])
        ends.append(inside)
    return Estimate(None if ends == [low, high] else value, ends[0], ends[1])


def hanley(t: Floats, positives: float, negatives: float) -> Floats:
    """Hanley and McNeil's variance of a share t of pairs, in the symmetrical form of Newcombe's method 5."""
    pairs = max((positives + negatives) / 2 - 1, 0.0)
    return t * (1 - t) * (1 + pairs * ((1 - t) / (2 - t) + t / (1 + t))) / (positives * negatives)
