"""Quantize, both halves: a clipped update to integers modulo 2**32, and the sum of such integers back to a mean."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import ConfigError, EncodingError, ScaleTooSmallError, VectorTooLongError

MODULUS_BITS = 32
SMALLEST_SCALE = 1 << 16

# Uniform numbers in [0, 1) that nobody can predict; at a hospital, ``SecureRandom.uniform``.
Uniform = Callable[[int], NDArray[np.float64]]

_CLIP_SLACK = 1e-9  # of the norm: the clip's own rounding
_CHUNK = 1 << 13  # entries; a chunk and its temporaries stay in the L2 cache


def quantization_scale(*, bound: float, hospitals: int) -> int:
    """Integer steps per unit: as fine as no sum of so many hospitals can wrap.

    Guarantees:
        * ``hospitals * ceil(bound * scale) <= 2**31 - 1``: no sum of encoded updates leaves the signed half-range.

    Args:
        bound: B, the L2 norm that every update is clipped to.
        hospitals: n, hospitals invited; not only those that stay.

    Raises:
        ConfigError: The bound is not a positive number, or there is no hospital.
        ScaleTooSmallError: Fewer than 2**16 steps per unit are left.
    """
    if not 0 < bound < math.inf or not hospitals >= 1:
        raise ConfigError(f"bound {bound} or {hospitals} hospitals is not positive", hint="See update_bound.")
    scale = math.floor((2**31 - 1) / (hospitals * (bound + 1)))
    if scale < SMALLEST_SCALE:
        raise ScaleTooSmallError(
            f"{hospitals} hospitals with updates up to {bound:g} leave {scale} steps per unit, below {SMALLEST_SCALE}",
            hint="Lower the plan's steps, learning rate or clip, or invite fewer hospitals.",
        )
    return scale


def rounding_error(*, scale: int, hospitals: int, total_weight: float) -> float:
    """The most by which one coordinate of a decoded mean can differ from the exact weighted mean.

    Each hospital's rounding moves a coordinate by at most one step, so ``n`` of them by at most ``n / scale``.
    Arithmetic in float64 adds less than a millionth of that.

    Args:
        scale: Steps per unit.
        hospitals: n, hospitals invited; the bound is the tighter the more of them survive.
        total_weight: Sum of m over those that survived.
    """
    return hospitals / (scale * total_weight)


def quantize(
    update: NDArray[np.float32] | NDArray[np.float64],
    *,
    weight: float,
    bound: float,
    scale: int,
    uniform: Uniform,
) -> NDArray[np.uint32]:
    """Weigh an update and round it to integers, at random and without bias.

    Guarantees:
        * Every entry is ``floor(m * x * scale)`` or the integer above it, the nearer one more often: the expected value
          is unchanged but for float64 arithmetic (below 2**-21 of a step).
        * Every entry, read as two's complement, lies within ``ceil(bound * scale)`` of zero.
        * Rounding is post-processing of noise that was added before: it spends no privacy.
        * Memory is the result's 4 bytes per entry and chunks that stay in the cache.

    Args:
        update: x, clipped to L2 norm ``bound``, shape ``(d,)``.
        weight: m, in (0, 1], public.
        bound: B.
        scale: From ``quantization_scale`` with the same bound.
        uniform: Source of the rounding coins; one number per entry.

    Returns:
        z modulo 2**32, shape ``(d,)``.

    Raises:
        ConfigError: The weight is not in (0, 1].
        EncodingError: An entry is NaN or infinite, or the norm is beyond the bound. The message holds no values.
        VectorTooLongError: There is no memory for the result.
    """
    if not 0 < weight <= 1:
        raise ConfigError(f"weight {weight} is not in (0, 1]", hint="It is the public size over the plan's weight_cap.")
    if update.ndim != 1 or update.dtype not in (np.float32, np.float64):
        raise EncodingError(
            f"an update of type {update.dtype} and shape {update.shape}", hint="It must be flat floats."
        )
    cells = _allocate(len(update))
    signed = cells.view(np.int32)
    largest = math.ceil(bound * scale)
    norm, limit = 0.0, (weight * bound * scale * (1 + _CLIP_SLACK)) ** 2  # squared
    values = np.empty(min(_CHUNK, len(update)), np.float64)
    for first in range(0, len(update), _CHUNK):
        part = update[first : first + _CHUNK]
        moved = values[: len(part)]
        np.multiply(part, weight * scale, out=moved, dtype=np.float64)
        square = float(moved @ moved)
        norm += square
        if not norm <= limit:  # NaN fails every comparison
            raise EncodingError("the update holds NaN or is beyond its bound", hint="Clip it first; see bound_update.")
        moved += uniform(len(part))  # floor(v + u) is v's upper neighbour with probability v - floor(v)
        np.floor(moved, out=moved)
        if square >= (largest - 1) ** 2:  # else no entry comes near it
            np.clip(moved, -largest, largest, out=moved)
        signed[first : first + len(part)] = moved
    return cells


def dequantize(total: NDArray[np.uint32], *, scale: int, total_weight: float) -> NDArray[np.float64]:
    """Turn a sum of quantized updates back into their weighted mean.

    Guarantees:
        * Within ``rounding_error`` of the exact mean of the updates that were summed.

    Args:
        total: Sum modulo 2**32, shape ``(d,)``.
        scale: The scale that all were quantized with.
        total_weight: Sum of m over the hospitals in the sum; public, so computed and not sent.

    Raises:
        ConfigError: The total weight or the scale is not positive.
    """
    if not 0 < total_weight < math.inf or not scale >= 1:
        raise ConfigError(f"total weight {total_weight} or scale {scale} is not positive", hint="Sum public weights.")
    return total.view(np.int32) / (scale * total_weight)


def _allocate(length: int) -> NDArray[np.uint32]:
    try:
        return np.empty(length, np.uint32)
    except (MemoryError, ValueError):
        raise VectorTooLongError(f"no memory for a vector of {length}", hint="Use a smaller network.") from None
