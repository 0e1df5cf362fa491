"""Masks: AES-256 in counter mode, read as integers and added to a vector where it lies."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from shared_models.errors import MalformedVectorError

KEY_BYTES = 32
_CHUNK = 1 << 16  # entries of four bytes: keystream, zeros and the vector's part share the L2 cache
_ZEROS = bytes(4 * _CHUNK)


@dataclass(frozen=True, slots=True)
class Mask:
    """One keystream and its sign. The key has one use: the same (key, counter) twice would cancel out a mask.

    Attributes:
        key: 32 bytes; never shown.
        subtract: Whether the keystream is taken away instead of added.
    """

    key: bytes = field(repr=False)
    subtract: bool


def apply_masks(vector: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
    """Add or subtract keystreams modulo 2**32, in place.

    Guarantees:
        * Whatever the number of masks, no second vector of full length exists: the extra memory is two chunks.
        * Applying masks and then the same masks with opposite signs leaves the vector as it was, bit for bit.
        * The same on every machine: the keystream is read as little-endian integers.

    Args:
        vector: Changed, shape ``(d,)``.
        masks: Every key 32 bytes of HKDF output that is used for nothing else.

    Raises:
        MalformedVectorError: Not a flat contiguous uint32 vector that can be written to.

    Source:
        NIST SP 800-38A, counter mode, from counter block zero; Bonawitz et al., CCS 2017, section 4.
    """
    check_lanes(vector, len(vector))
    if not vector.flags.writeable:
        raise MalformedVectorError("a vector that cannot be written to cannot be masked", hint="Copy it first.")
    streams = [(_stream(mask.key), np.subtract if mask.subtract else np.add) for mask in masks]
    buffer = bytearray(4 * _CHUNK + 15)  # the library wants room for one more block
    words = np.frombuffer(buffer, dtype="<u4", count=_CHUNK)
    zeros = memoryview(_ZEROS)
    for first in range(0, len(vector), _CHUNK):
        part = vector[first : first + _CHUNK]
        for stream, combine in streams:
            stream.update_into(zeros[: 4 * len(part)], buffer)
            combine(part, words[: len(part)], out=part)


def check_lanes(vector: NDArray[np.uint32], length: int) -> None:
    """Refuse what is not a flat contiguous vector of ``length`` native uint32.

    Raises:
        MalformedVectorError: It is something else. The message holds no values.
    """
    if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.shape != (length,):
        found = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise MalformedVectorError(f"a masked vector is {found}, not uint32 ({length},)", hint="Another version?")
    if not vector.flags.c_contiguous or not vector.dtype.isnative:
        raise MalformedVectorError(f"a masked vector is not in {sys.byteorder}-endian order", hint="Copy it first.")


def keystream(key: bytes, length: int) -> NDArray[np.uint32]:
    """The first ``length`` integers of a mask; for tests and auditors."""
    vector = np.zeros(length, np.uint32)
    apply_masks(vector, [Mask(key, subtract=False)])
    return vector


def _stream(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask's key has {KEY_BYTES} bytes")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
