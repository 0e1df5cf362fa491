"""Libraries that only some hospitals need: imported where they are used, asked for by name where they are missing."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from shared_models.errors import RecordsError


@contextmanager
def needed(extra: str, library: str) -> Iterator[None]:
    """Around an import: say which extra brings the library.

    Raises:
        RecordsError: The library is not installed.
    """
    try:
        yield
    except ImportError:
        raise RecordsError(
            f"reading these records needs {library}, which is not installed",
            hint=f"pip install --constraint deploy/constraints.txt 'konsil[{extra}]'",
        ) from None


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Keep a library's warnings and log lines to itself: they quote what a file holds, and files hold patients."""
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.disabled for logger in found]
    try:
        for logger in found:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(found, before, strict=True):
            logger.disabled = disabled
