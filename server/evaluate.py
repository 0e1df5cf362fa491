"""Metrics from the additive statistics that hospitals release: noised there, charged there, summed here."""

import numpy as np
from numpy.typing import NDArray

from shared_models.outcomes import compute_metrics
from shared_models.plan import EvaluationPlan
from shared_models.tasks import Task


def released_metrics(task: Task, evaluation: EvaluationPlan, statistics: NDArray[np.float64]) -> dict[str, float]:
    """Metrics of the summed, noised statistics; those that the noise leaves undefined are absent."""
    return compute_metrics(task, statistics, bins=evaluation.bins)
