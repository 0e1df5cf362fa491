"""What a hospital keeps to be shown later: JSON lines that only grow, up to a bound that no peer can lift."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared_models.durable import drop_cut_line
from shared_models.errors import LedgerError

REFUSALS = "refusals.jsonl"
LONGEST_BODY = 65_536  # characters of a refused message that are kept
LARGEST_FILE = 8 * 2**20


class EvidenceFile:
    """One file of JSON lines in the state folder, readable by its owner alone.

    Guarantees:
        * Lines are whole. One that a crash cut is dropped before the next is written: what it was about to say never
          happened. Lines that were written survive the process; a power cut can take the newest. Several threads and
          processes may write: each line waits for the one before.
        * A full file is set aside, and at most two are kept besides the one that grows: the very first, so that a
          flood cannot wash away how it began, and the newest. A peer can fill three times ``largest``, and no more.
        * With ``keep_s`` every file that is set aside is kept, until its newest line is older than that.

    Args:
        path: The file that grows; the others are called ``NAME.first`` and ``NAME.last``, or ``NAME.TIME``.
        largest: Bytes at which a file is set aside.
        keep_s: For how long files that were set aside are kept, in seconds; None: for ever, and no more than two.
    """

    def __init__(self, path: Path, *, largest: int = LARGEST_FILE, keep_s: float | None = None) -> None:
        self.path, self._largest, self._keep_s = path, largest, keep_s

    def write(self, **fields: Any) -> None:
        """Append one line, with its time (UTC).

        Raises:
            LedgerError: It could not be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.append(json.dumps({"time": now, **fields}, allow_nan=False).encode())

    def append(self, text: bytes) -> None:
        """Append one line of JSON as it is.

        Raises:
            LedgerError: It could not be written.
        """
        line = text + b"\n"
        try:
            with self._alone():
                drop_cut_line(self.path)
                self._make_room(len(line))
                file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    whole = os.write(file, line) == len(line)
                finally:
                    os.close(file)
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be written: {error.strerror}", hint="Check the disk.") from None
        if not whole:
            raise LedgerError(f"{self.path} cannot be written: the disk took a part only", hint="Check the disk.")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While nobody else writes to a file of this folder: a command may be running beside the daemon."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _make_room(self, more: int) -> None:
        if not self.path.exists() or self.path.stat().st_size + more <= self._largest:
            return
        if self._keep_s is not None:
            self.path.replace(self.path.with_name(f"{self.path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"))
            for part in evidence_files(self.path):
                if part.exists() and part.stat().st_mtime < time.time() - self._keep_s:
                    part.unlink()
        else:
            first, last = evidence_files(self.path)[0], self.path.with_name(f"{self.path.name}.last")
            self.path.replace(last if first.exists() else first)


def read_evidence(path: Path) -> Iterator[dict[str, Any]]:
    """All lines that were kept, oldest first; a last one that a crash cut is left out.

    Raises:
        LedgerError: Another line is damaged.
    """
    for part in evidence_files(path):
        lines = part.read_bytes().splitlines(keepends=True) if part.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                yield json.loads(line)
            except ValueError:
                raise LedgerError(f"{part}, line {number} is damaged", hint="Somebody else wrote to it.") from None


def evidence_files(path: Path) -> list[Path]:
    """Where the lines of an evidence file lie, oldest first, whether each file exists or not."""
    bounded = [path.with_name(f"{path.name}.first"), path.with_name(f"{path.name}.last")]
    return [*bounded, *sorted(path.parent.glob(f"{path.name}.[0-9]*Z")), path]


def refusal(action: str, code: str, message_id: str, body: object) -> dict[str, Any]:
    """What is kept of a message that was refused: the peer's own words and our code, nothing of ours.

    Args:
        action: Flower's message type.
        code: The code that the peer got.
        message_id: Flower's SHA-256 over the whole message, which covers a vector that is too long to keep.
        body: The message's JSON text, if it has one.
    """
    text = body if isinstance(body, str) else ""
    encoded = text.encode("utf-8", "surrogatepass")
    return {
        "action": action[:64],
        "code": code,
        "message": message_id[:64],
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "bytes": len(encoded),
        "body": text[:LONGEST_BODY],
    }
