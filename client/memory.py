"""Freed memory that is kept for the next step, where glibc would hand it back to the kernel between any two of them."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_NEVER = 1 << 30  # bytes


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed inside for what is allocated next; hand it all back at the end.

    By itself glibc hands large blocks back at once, and the kernel clears each page anew: a third of the time of a
    small network's step. The two thresholds stay as set here afterwards. Where the C library has none, nothing changes.

    Source:
        mallopt(3), malloc_trim(3).
    """
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if known:
        libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        if known:
            libc.malloc_trim(0)
