"""Unpredictable numbers for sampling and noise: AES-256 in counter mode, keyed from the operating system.

Torch's global generator is never used for either: it is seeded by user code, so that two hospitals that both call
``torch.manual_seed(0)`` would add identical noise, and its Mersenne twister can be predicted from its output.
"""

import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from shared_models.errors import ConfigError

_KEY_BYTES = 32
_ZEROS = memoryview(bytes(1 << 18))
_CHUNK_PAIRS = 1 << 14  # 16,384 pairs of float64: one chunk and its temporaries stay in the L2 cache


class SecureRandom:
    """A stream of random numbers that nobody without its key can predict or repeat.

    Guarantees:
        * The stream is AES-256-CTR under a key that is used for this stream only and is not kept: neither ``repr``
          nor any attribute holds it, and it cannot be pickled or deep-copied.
        * ``from_system`` takes 256 fresh bits from the operating system; no seed of torch, numpy or Python enters.
        * A process that was forked from the owner is refused: both would draw the same noise.

    What this covers of the attacks on floating-point noise, and what not:
        * Covered: predicted, repeated or shared noise; bias (uniforms have 53 bits, noise is made and added in
          float64, every value up to 8.57 standard deviations can occur, P(beyond) < 1.1e-17).
        * Mitigated, not proven: Mironov's attack (CCS 2012; for Gaussians arXiv:2112.05307) reads the low-order bits
          of a noised float64. Here only float32 parameters leave, rounded *after* noise was added in float64: 29 of
          the 53 bits that the attack needs are gone. No theorem of ours bounds what is left; a discrete Gaussian would.
        * Not covered: the time that a logarithm or tangent takes; reply times are not rounded yet.

    Source:
        Box and Muller, Annals of Mathematical Statistics 29(2), 1958.
    """

    def __init__(self, key: bytes) -> None:
        """Start the stream of ``key`` (32 bytes); use ``from_system`` or ``for_tests``."""
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"a random key must have {_KEY_BYTES} bytes", hint="Use SecureRandom.from_system().")
        # Every key serves one stream only, so a constant first counter block never repeats a (key, counter) pair.
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()
        self._keyed_by_system = False

    @classmethod
    def from_system(cls) -> "SecureRandom":
        """A new stream under 256 fresh bits of the operating system: one for every charge."""
        random = cls(os.urandom(_KEY_BYTES))
        random._keyed_by_system = True
        return random

    @classmethod
    def for_tests(cls, key: bytes) -> "SecureRandom":
        """A stream that can be repeated, for tests; production refuses it (``require_system_key``)."""
        return cls(key)

    @property
    def keyed_by_system(self) -> bool:
        """Whether the key came from the operating system."""
        return self._keyed_by_system

    def __repr__(self) -> str:
        return f"SecureRandom(keyed_by_system={self._keyed_by_system})"

    def uniform(self, n: int) -> NDArray[np.float64]:
        """``n`` independent uniform numbers in [0, 1), each a multiple of 2**-53."""
        if os.getpid() != self._process:
            raise ConfigError("a random generator was carried into a forked process", hint="Make one per process.")
        zeros = _ZEROS[: 8 * n] if 8 * n <= len(_ZEROS) else bytes(8 * n)
        buffer = np.empty(n + 2, dtype="<u8")  # the library wants room for one more block
        self._stream.update_into(zeros, buffer.data.cast("B"))
        words = buffer[:n]
        words >>= np.uint64(11)
        numbers = words.view(np.float64)  # in the same place: no second buffer
        np.copyto(numbers, words.view("<i8"))  # below 2**53, and signed integers convert faster
        numbers *= 2**-53
        return numbers

    def gaussian(self, n: int) -> NDArray[np.float64]:
        """``n`` independent standard normal numbers, by Box-Muller in float64."""
        normal = np.zeros(n)
        self.add_gaussian(normal, standard_deviation=1.0)
        return normal

    def add_gaussian(self, to: NDArray[np.float64], *, standard_deviation: float) -> None:
        """Add independent normal numbers, by Box-Muller in float64, to all of a flat array, in place."""
        scratch = np.empty(min(_CHUNK_PAIRS, (len(to) + 1) // 2))
        for first in range(0, len(to), 2 * _CHUNK_PAIRS):
            chunk = to[first : first + 2 * _CHUNK_PAIRS]
            count = (len(chunk) + 1) // 2
            uniform = self.uniform(2 * count)
            # 1 - u lies in (0, 1], so that the logarithm is finite.
            radius = np.subtract(1, uniform[:count], out=uniform[:count])
            np.log(radius, out=radius)
            radius *= -2 * standard_deviation**2
            np.sqrt(radius, out=radius)
            # Cosine and sine of an angle from the tangent of its half: one function instead of two, and the faster one.
            half = uniform[count:]
            half *= math.pi
            np.tan(half, out=half)
            square = np.multiply(half, half, out=scratch[:count])
            half *= 2
            square += 1
            radius /= square
            half *= radius
            np.subtract(2, square, out=square)  # 1 minus the tangent's square
            radius *= square
            chunk[:count] += radius
            chunk[count:] += half[: len(chunk) - count]


def require_system_key(random: SecureRandom, *, allow_test_random: bool) -> None:
    """Refuse a repeatable generator where real patients are at stake.

    Raises:
        ConfigError: ``random`` is not keyed by the operating system, and no test said that this is intended.
    """
    if not (random.keyed_by_system or allow_test_random):
        raise ConfigError(
            "sampling and noise need a generator keyed by the operating system",
            hint="Use SecureRandom.from_system(); for_tests() is for tests only.",
        )
