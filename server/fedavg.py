"""Federated averaging: global parameters plus the weighted mean of the hospitals' updates."""

import numpy as np
from numpy.typing import NDArray

from server.aggregate import WeightedSum


def average(parameters: NDArray[np.float32], updates: WeightedSum) -> NDArray[np.float32]:
    """Move the global parameters by the weighted mean of the updates.

    Args:
        parameters: Global parameters of the last round, shape ``(d,)``.
        updates: At least one hospital's update.

    Returns:
        Shape ``(d,)``; the mean is taken in float64 and rounded once.

    Source:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1, with public sizes in place of true counts.
    """
    return (parameters.astype(np.float64) + updates.total / updates.weight).astype(np.float32)
