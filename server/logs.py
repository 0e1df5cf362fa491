"""Log lines for people, or as JSON for machines; each can say which request, study, round and attempt it is about.

A line holds counts, names, numbers of rounds, and texts of errors: never a tensor, a record id, a seed, a share or a
token.
"""

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]

_about: ContextVar[Mapping[str, str | int]] = ContextVar("about", default={})  # noqa: B039 - never changed in place


def about(**fields: str | int) -> None:
    """From here on, this thread's (or task's) lines are about this, too; the newest value of a field holds."""
    _about.set({**_about.get(), **fields})


@contextmanager
def request(request_id: str | None = None) -> Iterator[str]:
    """Within it, lines are about one request, of the page or of the control service. Gives its id."""
    chosen = request_id or secrets.token_hex(8)
    token = _about.set({**_about.get(), "request": chosen})
    try:
        yield chosen
    finally:
        _about.reset(token)


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, thread, message, what it is about, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Nothing of the record but these fields: what a library attaches to one is not known to be harmless."""
        line: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName or "",
            "message": record.getMessage(),
            **_about.get(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def to_terminal(name: str, form: Format = "text") -> None:
    """Write log lines to standard error: Konsil's own from INFO on, its libraries' from WARNING on.

    Args:
        name: Whose lines they are; in text only, because a machine knows whose log it reads.
        form: Text for people, or JSON lines.
    """
    handler = logging.StreamHandler()
    text = logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("konsil").setLevel(logging.INFO)
