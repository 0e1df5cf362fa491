"""What a sum is made of, to the bit: its length, each hospital's weight, and integers in place of real numbers.

Both sides compute it from the plan and the number of hospitals invited, and from nothing that only one of them knows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import ProtocolError
from shared_models.outcomes import statistics_size
from shared_models.plan import StudyPlan
from shared_models.secagg.key_agreement import Purpose
from shared_models.secagg.quantize import Uniform, dequantize, quantization_scale, quantize, rounding_error
from shared_models.tasks import task_of
from shared_models.update import bound_update, update_bound

NULL_COORDINATES = 1024  # at the end of every update: no gradient, the same noise; the auditor tests their sum
_CLIP_ROUNDING = 1e-9  # of the norm: the hospitals' own clipping in float64


def public_weight(public_size: int, cap: int) -> float:
    """A hospital's weight m in (0, 1]: its public size over the plan's cap, at most 1. It reveals nothing."""
    return min(1.0, public_size / cap)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How one sum is encoded.

    Attributes:
        length: d, entries of the vector, null coordinates included.
        unit: What 1 stands for in the encoded vector.
        bound: L2 norm, in units, that every hospital's *weighed* vector is clipped to.
        hospitals: n, hospitals invited.
        scale: Integer steps per unit.
    """

    length: int
    unit: float
    bound: float
    hospitals: int
    scale: int

    def encode(self, vector: NDArray[np.float64], weight: float, *, uniform: Uniform) -> NDArray[np.uint32]:
        """Weigh, clip to the bound, round to integers modulo 2**32.

        Args:
            vector: Shape ``(length,)``, finite.
            weight: m, in (0, 1].
            uniform: Source of the rounding's coins.
        """
        weighed = bound_update(vector * (weight / self.unit), self.bound)
        return quantize(weighed, weight=1.0, bound=self.bound, scale=self.scale, uniform=uniform)

    def clips(self, vector: NDArray[np.float64], weight: float) -> bool:
        """Whether ``encode`` shortens this vector to the bound: a hospital counts it, for its own eyes."""
        return float(np.linalg.norm(vector)) * weight / self.unit > self.bound

    def decode(self, total: NDArray[np.uint32], hospitals: int) -> NDArray[np.float64]:
        """The weighted sum that ``hospitals`` of those invited uploaded.

        Guarantees:
            * Every entry is within ``rounding`` of the exact sum.

        Raises:
            ProtocolError: The sum is longer than honest hospitals' vectors can make it. Who is at fault cannot be told.
        """
        decoded = dequantize(total, scale=self.scale, total_weight=1.0)
        norm = float(np.linalg.norm(decoded))
        limit = hospitals * (self.bound * (1 + _CLIP_ROUNDING) + math.sqrt(self.length) / self.scale)
        if not norm <= limit:
            raise ProtocolError(
                f"the sum has norm {norm * self.unit:.3g}, above {limit * self.unit:.3g} of {hospitals} hospitals",
                hint="A hospital did not bound what it sent. Secure aggregation hides which one.",
            )
        return decoded * self.unit

    @property
    def rounding(self) -> float:
        """The most by which rounding moves one entry of the decoded sum."""
        return rounding_error(scale=self.scale, hospitals=self.hospitals, total_weight=1.0) * self.unit


def encoding(plan: StudyPlan, purpose: Purpose, *, parameters: int, hospitals: int) -> Encoding:
    """How this study's sums are encoded.

    Updates: a hospital of public size s has weight m = min(1, s / cap) and an expected batch of q * s. So m times
    its update's norm is at most the ``update_bound`` at an expected batch of q * cap, whatever s is: one bound for all,
    from the plan alone. Statistics: S times the weight cap, and room for the noise; a larger hospital is scaled down
    to that, noise and all, as its updates are.

    Args:
        plan: As approved.
        purpose: ``train`` or ``evaluate``.
        parameters: Of the network.
        hospitals: n, hospitals invited.

    Raises:
        ScaleTooSmallError: So many hospitals and such long updates would overflow the modulus.
        ProtocolError: The plan releases no statistics.
    """
    privacy = plan.privacy
    if purpose == "train":
        length, unit = parameters + NULL_COORDINATES, 1.0
        bound = update_bound(
            training=plan.training,
            privacy=privacy,
            parameters=length,
            expected_batch=privacy.sample_rate * plan.weight_cap,
        )
    else:
        evaluation = plan.evaluation
        if evaluation is None:
            raise ProtocolError(f"study {plan.study} releases no statistics", hint="Its plan has no [evaluation].")
        length, bound = statistics_size(task_of(plan), evaluation.bins), 1.0
        noise = evaluation.noise_multiplier * math.sqrt(length)
        unit = 1.5 * evaluation.clip * (plan.weight_cap + noise)
    scale = quantization_scale(bound=bound, hospitals=hospitals)
    return Encoding(length=length, unit=unit, bound=bound, hospitals=hospitals, scale=scale)
