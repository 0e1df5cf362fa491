"""The daemon's log file: set aside when it is full, and never in the way of anything."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from client.settings import Logs


class LogFile(RotatingFileHandler):
    """``hospital.log``, and beside it ``hospital.log.1`` and so on, the newest first.

    Guarantees:
        * A line that the disk does not take is lost, and nothing else happens: standard error has it too, and what must
          be written down (ledger, egress log) is not written here.

    Args:
        path: The file that grows.
        logs: How large it gets, and how many are kept.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, logs: Logs) -> None:
        super().__init__(path, maxBytes=logs.maximum_mb * 2**20, backupCount=logs.files, encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Stay silent: logging would print a traceback, of a full disk for every line."""
