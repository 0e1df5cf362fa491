"""Whether two models rank the same patients differently well: the difference of their areas under the ROC curve.

Exact, from the scores themselves: it is computed at the hospital, where they are, and stays there.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import ConfigError
from shared_models.intervals import LEVEL

Floats = NDArray[np.float64]
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One model's area less another's, on the same patients.

    Attributes:
        value: The difference.
        low: Lower end of its interval.
        high: Upper end.
        p_value: Of no difference, two-sided; 1 where the models rank alike.
    """

    value: float
    low: float
    high: float
    p_value: float


def difference(scores: Floats, others: Floats, labels: NDArray[np.bool_], patients: NDArray[np.int64]) -> Difference:
    """The difference of two areas, with an interval that knows that the patients are the same.

    The areas are sums over patients of how each one's records are placed among those of the other class; so is their
    difference, and its variance is that of the patients' parts. With one record per patient that is DeLong's; with
    several, a patient's records are one part and need not be independent, and each patient counts once.

    Args:
        scores: Of the one model, higher for the class; shape ``(n,)``.
        others: Of the other model.
        labels: Whether a record is of the class.
        patients: Whose record it is: indices ``0, 1, ...``.

    Raises:
        ConfigError: Fewer than two patients have records of the class, or none of it.

    Source:
        DeLong, DeLong and Clarke-Pearson, Biometrics 1988;44:837-845; Obuchowski, Biometrics 1997;53:567-578.
    """
    weights = 1 / np.bincount(patients)[patients]
    area, part = _area(scores, labels, patients, weights)
    other, its_part = _area(others, labels, patients, weights)
    value = area - other
    half = _Z * math.sqrt(float(((part - its_part) ** 2).sum()))
    p = 2 * NormalDist().cdf(-_Z * abs(value) / half) if half > 0 else float(value == 0)
    return Difference(value=value, low=max(value - half, -1.0), high=min(value + half, 1.0), p_value=p)


def _area(
    scores: Floats, labels: NDArray[np.bool_], patients: NDArray[np.int64], weights: Floats
) -> tuple[float, Floats]:
    """An area, and by how much each patient moves it, shape ``(patients,)``."""
    area, moved = 0.0, np.zeros(int(patients.max(initial=0)) + 1)
    for of_class in (True, False):
        mine = labels == of_class
        clusters = len(np.unique(patients[mine]))
        if clusters < 2:
            raise ConfigError(
                "areas of fewer than two patients of a class are not compared", hint="Measure on more patients."
            )
        placed = _placements(scores[mine], scores[~mine], weights[~mine])
        placed = placed if of_class else 1 - placed
        mine_weights = weights[mine] / weights[mine].sum()
        area = float(mine_weights @ placed)
        parts = mine_weights * (placed - area) * math.sqrt(clusters / (clusters - 1))
        moved += np.bincount(patients[mine], parts, minlength=len(moved))
    return area, moved


def _placements(scores: Floats, others: Floats, weights: Floats) -> Floats:
    """Of each score, the weight of the others that lie below it, those that are equal by half; as a share of all."""
    order = np.argsort(others)
    ordered, up_to = others[order], np.concatenate([[0.0], weights[order].cumsum()])
    below, not_above = (up_to[np.searchsorted(ordered, scores, side=side)] for side in ("left", "right"))
    return np.asarray((below + not_above) / 2 / up_to[-1])
