"""The studies' journals, followed: each event is read once, whoever asks, and however often."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.journal import read_events
from server.standing import Standing
from server.studies import Studies, StudyStatus

log = logging.getLogger("konsil.coordinator")

PIECE = 2**20  # bytes of a journal that are held at a time; no event is as long


@dataclass
class _Followed:
    progress: Standing
    offset: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Follow:
    """Keeps what each study's journal has told so far; safe to use from several threads.

    Args:
        studies: Whose journals.
    """

    def __init__(self, studies: Studies) -> None:
        self.studies = studies
        self._followed: dict[str, _Followed] = {}
        self._lock = threading.Lock()

    @contextmanager
    def study(self, status: StudyStatus) -> Iterator[Standing]:
        """A study as of now; nobody changes it while it is looked at.

        Where its journal cannot be read, what is known of it, and the problem: the other studies are still to be seen.
        """
        row = status.row
        with self._lock:
            followed = self._followed.setdefault(row.name, _Followed(Standing(row.name, row.plan.rounds)))
        with followed.lock:
            before = followed.progress.problem
            if before is not None:  # from the start: nobody knows how far it can be believed
                followed.progress, followed.offset = Standing(row.name, row.plan.rounds), 0
            try:
                self._read(row.folder / "events.jsonl", followed)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                followed.progress.problem = f"its journal cannot be read: {error}"
                if before is None:  # it is looked at every few seconds
                    log.warning("study %s: %s", row.name, followed.progress.problem)
            yield followed.progress

    def _read(self, journal: Path, followed: _Followed) -> None:
        events, offset = read_events(journal, followed.offset, most=PIECE)
        while events:
            for event in events:
                followed.progress.see(event)
            followed.offset = offset
            events, offset = read_events(journal, followed.offset, most=PIECE)

    def events(self, name: str, after: int) -> tuple[list[dict[str, Any]], int]:
        """A piece of a study's journal from a byte offset on, and the offset behind it.

        Raises:
            UnknownStudyError: There is no such study.
            ValueError: No event begins at this offset.
        """
        return read_events(self.studies.show(name).row.folder / "events.jsonl", after, most=PIECE)
