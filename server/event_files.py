"""Rounds as TensorBoard event files, in each study's folder ``tensorboard``; step = round.

They are written from the journals by TensorBoard's own writer, without TensorFlow. One event holds all that is known of
a round, so that a round is there whole or not at all, and what is there already is read back before more is written.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from server.follow import Follow
from server.settings import Settings
from server.standing import RoundSeen
from server.studies import Studies, StudyStatus
from shared_models.errors import ConfigError, FederationError

log = logging.getLogger("konsil.coordinator")

LOOK_EVERY_S = 1.0


class EventFiles:
    """Writes finished rounds that are not there yet.

    Args:
        studies: Whose rounds.

    Raises:
        ConfigError: The package ``tensorboard`` is not installed.
    """

    def __init__(self, studies: Studies) -> None:
        try:
            import tensorboard.summary.writer.event_file_writer  # noqa: F401, PLC0415 - an optional package
        except ImportError:
            raise ConfigError(
                "tensorboard = true, and the package tensorboard is not installed",
                hint="pip install 'konsil[tensorboard]', or remove the line.",
            ) from None
        self._studies, self._follow = studies, Follow(studies)
        self._written: dict[str, int] = {}
        self._writers: dict[str, Any] = {}

    def write(self) -> None:
        """Write what has been finished since."""
        for status in self._studies.all():
            row = status.row
            try:
                if row.rounds_done > self._written.get(row.name, -1):
                    self._written[row.name] = self._write(status)
                if row.state.over and row.name in self._writers:
                    self._writers.pop(row.name).close()
            except OSError as error:
                log.warning("study %s: TensorBoard's files cannot be written: %s", row.name, error)
                self._written.pop(row.name, None)  # the next try reads back what has come through
                self._writers.pop(row.name, None)

    def close(self) -> None:
        """Close every file."""
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()
        self._writers.clear()

    def _write(self, status: StudyStatus) -> int:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415 - see above

        name, folder = status.row.name, status.row.folder / "tensorboard"
        done = self._written[name] if name in self._written else last_step(folder)
        with self._follow.study(status) as progress:
            rounds = [seen for seen in progress.history if seen.number > done]
        if rounds:
            if name not in self._writers:
                self._writers[name] = EventFileWriter(str(folder))
            for seen in rounds:
                self._writers[name].add_event(_event(seen))
            self._writers[name].flush()
            done = rounds[-1].number
        return max(done, status.row.rounds_done)


def _event(seen: RoundSeen) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415 - an optional package
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

    figures = {"round/seconds": seen.seconds, "round/answered": len(seen.answered), "round/missing": len(seen.missing)}
    figures |= {f"stage_seconds/{stage}": seconds for stage, seconds in seen.stages.items()}
    figures |= {f"epsilon_enforced/{hospital}": epsilon for hospital, epsilon in seen.epsilons.items()}
    figures |= {f"released/{metric}": value for metric, value in (seen.released or {}).items()}
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
    return Event(wall_time=seen.at, step=seen.number, summary=Summary(value=values))


def last_step(folder: Path) -> int:
    """The newest round in a folder's event files; half a record, of a process that was killed, counts for nothing."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # noqa: PLC0415

    steps = [
        event.step
        for file in folder.glob("events.out.tfevents.*")
        for event in LegacyEventFileLoader(str(file)).Load()
        if event.HasField("summary")
    ]
    return max(steps, default=0)


@contextmanager
def writing(settings: Settings, studies: Studies) -> Iterator[None]:
    """Write event files while the context is open, and what is left at its end; only where the settings ask for it.

    Raises:
        ConfigError: The package ``tensorboard`` is not installed.
    """
    if not settings.tensorboard:
        yield
        return
    files, over = EventFiles(studies), threading.Event()

    def follow() -> None:
        while True:
            last = over.wait(LOOK_EVERY_S)
            try:
                files.write()
            except FederationError as error:
                log.warning("%s (%s)", error, error.hint)
            if last:
                files.close()
                return

    thread = threading.Thread(target=follow, name="tensorboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=30)
