"""Weighted sum of updates, one at a time: memory does not grow with the number of hospitals."""

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import ProtocolError
from shared_models.messages import Vector


def weight(public_size: int, cap: int) -> float:
    """A hospital's weight m in (0, 1]: its public size over the plan's cap, at most 1. It reveals nothing."""
    return min(1.0, public_size / cap)


class WeightedSum:
    """Sum of m * x over hospitals, and of m; shape ``(length,)``, float64."""

    def __init__(self, length: int) -> None:
        self.total: NDArray[np.float64] = np.zeros(length)
        self.weight = 0.0

    def add(self, vector: Vector, weight: float, *, limit: float = np.inf) -> None:
        """Add one hospital's vector.

        Args:
            vector: Shape ``(length,)``, finite.
            weight: m, positive.
            limit: Largest L2 norm that an honest hospital can send.

        Raises:
            ProtocolError: The vector has another length, or is longer than the limit (float32 rounding allowed for).
        """
        if vector.shape != self.total.shape:
            raise ProtocolError(
                f"a vector of {len(vector)} numbers instead of {len(self.total)}",
                hint="The hospital builds another network than the plan's.",
            )
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        if not norm <= limit * (1 + 1e-6):
            raise ProtocolError(
                f"an update of norm {norm:.3g}, above {limit:.3g}", hint="The hospital did not bound it."
            )
        self.total += weight * vector.astype(np.float64)
        self.weight += weight
