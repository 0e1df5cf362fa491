"""Federated averaging: global parameters plus the weighted mean of the hospitals' updates."""

import numpy as np
from numpy.typing import NDArray


def average(parameters: NDArray[np.float32], total: NDArray[np.float64], total_weight: float) -> NDArray[np.float32]:
    """Move the global parameters by the weighted mean of the updates.

    Args:
        parameters: Global parameters of the last round, shape ``(d,)``.
        total: Sum of m * x over the hospitals that uploaded, shape ``(d,)``.
        total_weight: Sum of m over them; public.

    Returns:
        Shape ``(d,)``; the mean is taken in float64 and rounded once.

    Source:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1, with public sizes in place of true counts.
    """
    return (parameters.astype(np.float64) + total / total_weight).astype(np.float32)
