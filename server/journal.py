"""What happened in a study, one JSON object per line: read by people, by the demo and by whoever watches."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared_models.errors import MalformedCallError


class Journal:
    """Appends events to a file; each line is complete or absent.

    No update, parameter, key or record enters it: counts, names, digests, public sizes and stated epsilons.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():  # a process that was killed may have left half a line
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)

    @property
    def begun(self) -> bool:
        """Whether there is any event."""
        return self._path.exists() and self._path.stat().st_size > 0

    def last(self, event: str, **fields: Any) -> dict[str, Any] | None:
        """The newest event of a kind with these fields; None where there is none."""
        for found in reversed(read_events(self._path)[0]):
            if found["event"] == event and all(found.get(key) == value for key, value in fields.items()):
                return found
        return None

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with its time (UTC)."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_events(path: Path, offset: int = 0, *, most: int = -1) -> tuple[list[dict[str, Any]], int]:
    """The complete events of a journal from a byte offset on, and the offset behind them; ``most`` bytes at a time."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(most)
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], offset + end


def read_positions(path: Path, after: int, most_bytes: int) -> list[tuple[dict[str, Any], int]]:
    """The next complete events behind a position, each with the position behind it: some ``most_bytes`` of them.

    Raises:
        MalformedCallError: The position is not one behind an event.
    """
    found: list[tuple[dict[str, Any], int]] = []
    try:
        with path.open("rb") as file:
            if after:
                file.seek(min(after - 1, path.stat().st_size))
                if file.read(1) != b"\n":
                    raise MalformedCallError(
                        f"there is no event before position {after}", hint="Watch from 0, or from the last position."
                    )
            place = after
            while place - after < most_bytes and (line := file.readline()).endswith(b"\n"):
                place += len(line)
                found.append((json.loads(line), place))
    except FileNotFoundError:
        if after:
            raise MalformedCallError("the study has no events yet", hint="Watch from 0.") from None
    return found
