"""Masks are AES-256 in counter mode, cancel exactly, depend on every bit of their key, and need no memory."""

import os
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.errors import MalformedVectorError
from shared_models.secagg.masks import Mask, apply_masks, keystream


def test_it_is_aes_256() -> None:
    """The published cipher of the zero block under the zero key, read as little-endian integers."""
    assert keystream(bytes(32), 4).astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@settings(deadline=None)
@given(length=st.integers(0, 200_000), count=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_masks_and_their_opposites_cancel(length: int, count: int, seed: int) -> None:
    """Over any number of chunks, bit for bit."""
    random = np.random.default_rng(seed)
    vector = random.integers(0, 2**32, length, np.uint32)
    masks = [Mask(random.bytes(32), subtract=bool(i % 2)) for i in range(count)]
    changed = vector.copy()

    apply_masks(changed, masks)
    apply_masks(changed, [Mask(mask.key, subtract=not mask.subtract) for mask in masks])

    np.testing.assert_array_equal(changed, vector)


def test_chunks_do_not_show() -> None:
    """A long mask begins with the short one, and is what was added."""
    key = os.urandom(32)
    vector = np.arange(150_000, dtype=np.uint32)

    apply_masks(vector, [Mask(key, subtract=True)])

    long = keystream(key, 150_000)
    np.testing.assert_array_equal(vector, np.arange(150_000, dtype=np.uint32) - long)
    np.testing.assert_array_equal(long[:99_999], keystream(key, 99_999))


def test_every_bit_of_the_key_counts() -> None:
    """All 256: a seed folded to 32 bits, or read as text, would give some of these the same mask."""
    key = os.urandom(32)
    flipped = [bytes(b ^ (1 << i % 8 if i // 8 == j else 0) for j, b in enumerate(key)) for i in range(256)]
    folded_alike = key[4:8] + key[:4] + key[8:]  # the same exclusive or of its eight words

    streams = {keystream(k, 8).tobytes() for k in [key, folded_alike, *flipped]}

    assert len(streams) == 258


def test_memory_does_not_grow_with_the_number_of_masks() -> None:
    """Far below a second vector, for two masks and for fifty."""
    vector = np.zeros(2_000_000, np.uint32)
    peaks = []
    for count in (2, 50):
        masks = [Mask(os.urandom(32), subtract=False) for _ in range(count)]
        tracemalloc.start()
        apply_masks(vector, masks)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert max(peaks) < vector.nbytes / 8


def test_a_key_is_not_shown() -> None:
    """Not even in hexadecimal."""
    mask = Mask(b"secret key that has 32 bytes....", subtract=True)

    assert "secret" not in repr(mask)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(3, np.int32),
        np.zeros(3, np.float32),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
        np.zeros(3, ">u4"),
        np.frombuffer(bytes(12), np.uint32),
    ],
    ids=["signed", "float", "matrix", "strided", "big-endian", "read-only"],
)
def test_other_vectors_are_refused(vector: Any) -> None:
    """They would be masked wrongly, or not at all."""
    with pytest.raises(MalformedVectorError):
        apply_masks(vector, [Mask(bytes(32), subtract=False)])


def test_a_short_key_is_refused() -> None:
    """AES-128 would accept it in silence."""
    with pytest.raises(ValueError, match="32 bytes"):
        keystream(bytes(16), 4)
