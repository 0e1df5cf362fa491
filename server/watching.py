"""Watching studies: each is looked at once, however many watch it, and no watcher holds a thread."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server.journal import read_positions
from server.studies import Studies, StudyStatus
from shared_models.errors import FederationError

LOOK_EVERY_S = 0.2
AT_LEAST_EVERY_S = 5.0  # a watcher is asked whether it may still watch
BATCH_BYTES = 65_536

Run = Callable[..., Awaitable[Any]]


class News(NamedTuple):
    """Events that came since the last news, each with the position behind it; and the study's state after them."""

    events: list[tuple[dict[str, Any], int]]
    position: int
    status: StudyStatus


class _Look(NamedTuple):
    status: StudyStatus
    journal_bytes: int


@dataclass
class _Watched:
    """A study that somebody watches."""

    watchers: int = 0
    look: _Look | None = None
    problem: FederationError | None = None
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    def ring(self) -> None:
        self.bell.set()
        self.bell = asyncio.Event()


class Watching:
    """All watchers of a service; belongs to one event loop.

    Args:
        studies: What is watched.
        run: Runs a function in one of few threads.
    """

    def __init__(self, studies: Studies, run: Run) -> None:
        self._studies, self._run = studies, run
        self._watched: dict[str, _Watched] = {}

    async def follow(self, study: str, after: int) -> AsyncGenerator[News, None]:
        """What happens in a study after a position, until it is over; now and then there is nothing new.

        Raises:
            UnknownStudyError: There is none of this name.
            MalformedCallError: The position is not one behind an event.
        """
        async with self._one(study) as watched:
            path = (await self._run(self._studies.show, study)).row.folder / "events.jsonl"
            while True:
                bell = watched.bell
                if watched.problem is not None:
                    raise watched.problem
                if watched.look is not None:
                    # The state is older than the events: when it says that the study is over, the events are all.
                    status = watched.look.status
                    events = await self._run(read_positions, path, after, BATCH_BYTES)
                    after = events[-1][1] if events else after
                    yield News(events, after, status)
                    if events:
                        continue
                    if status.row.state.over:
                        return
                with suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), AT_LEAST_EVERY_S)
                if watched.task is not None and watched.task.done():
                    await watched.task  # a fault of this program: its traceback belongs into the log

    def wake(self) -> None:
        """Give every watcher its news now, also where there is nothing new."""
        for watched in self._watched.values():
            watched.ring()

    @asynccontextmanager
    async def _one(self, study: str) -> AsyncIterator[_Watched]:
        watched = self._watched.setdefault(study, _Watched())
        watched.watchers += 1
        if watched.task is None:
            watched.task = asyncio.create_task(self._look(study, watched))
        try:
            yield watched
        finally:
            watched.watchers -= 1
            if not watched.watchers:
                watched.task.cancel()
                self._watched.pop(study, None)

    async def _look(self, study: str, watched: _Watched) -> None:
        while True:
            try:
                look, problem = await self._run(_look_at, self._studies, study), None
            except FederationError as error:
                look, problem = watched.look, error
            if (look, problem) != (watched.look, watched.problem):
                watched.look, watched.problem = look, problem
                watched.ring()
            await asyncio.sleep(LOOK_EVERY_S)


def _look_at(studies: Studies, study: str) -> _Look:
    status = studies.show(study)
    path = status.row.folder / "events.jsonl"
    return _Look(status, path.stat().st_size if path.exists() else 0)
