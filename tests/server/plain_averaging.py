"""Every averaging as its paper has it, one parameter at a time, in Python's own numbers: to compare with."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared_models.plan import Averaging, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

RULES: tuple[Averaging, ...] = (
    FedAvg(name="fedavg"),
    FedAvgM(name="fedavgm", learning_rate=0.7, momentum=0.9),
    FedAdam(name="fedadam", learning_rate=0.05, beta_1=0.8, beta_2=0.95, tau=0.01),
    FedYogi(name="fedyogi", learning_rate=0.05, beta_1=0.8, beta_2=0.95, tau=0.01),
    FedAdagrad(name="fedadagrad", learning_rate=0.05, beta_1=0.3, tau=0.01),
)


def plain_averaging(
    rule: Averaging, start: NDArray[np.float64], means: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Global parameters after each of several rounds, whose weighted means of the updates are given."""
    columns = [_one(rule, float(x), [float(mean[i]) for mean in means]) for i, x in enumerate(start)]
    return [np.array(row) for row in zip(*columns, strict=True)]


def _one(rule: Averaging, x: float, deltas: Sequence[float]) -> list[float]:
    """The course of one parameter."""
    course = []
    m, v = 0.0, 0.0 if isinstance(rule, FedAvg | FedAvgM) else rule.tau**2
    for delta in deltas:
        match rule:
            case FedAvg():
                x = x + delta
            case FedAvgM():
                m = rule.momentum * m + delta
                x = x + rule.learning_rate * m
            case _:
                m = rule.beta_1 * m + (1 - rule.beta_1) * delta
                v = _next_square(rule, v, delta)
                x = x + rule.learning_rate * m / (math.sqrt(v) + rule.tau)
        course.append(x)
    return course


def _next_square(rule: FedAdam | FedYogi | FedAdagrad, v: float, delta: float) -> float:
    if isinstance(rule, FedAdagrad):
        return v + delta**2
    if isinstance(rule, FedAdam):
        return rule.beta_2 * v + (1 - rule.beta_2) * delta**2
    sign = (v > delta**2) - (v < delta**2)
    return v - (1 - rule.beta_2) * delta**2 * sign
