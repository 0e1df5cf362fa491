"""Files that are fetched in chunks: what they hold at one moment, from any offset, with a digest over all of it."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.evidence import OPEN, RECEIPTS, SUMS
from shared_models.audit_log import head_line
from shared_models.errors import TransferError
from shared_models.privacy.head import Statement

CHUNK_BYTES = 524_288


@dataclass(frozen=True)
class Stretch:
    """The beginning of a file."""

    path: Path
    size: int


@dataclass(frozen=True)
class Content:
    """What is fetched.

    Attributes:
        name: What to call the file.
        parts: Its bytes, in order; those in files are read when they are sent.
        snapshot: Names this content among those that the same call gives at other times.
    """

    name: str
    parts: tuple[bytes | Stretch, ...]
    snapshot: str

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(part.size if isinstance(part, Stretch) else len(part) for part in self.parts)

    def chunks(self, offset: int, digest: "hashlib._Hash") -> Iterator[bytes]:
        """The bytes from an offset on, in chunks of at most ``CHUNK_BYTES``; empty ones where nothing is sent yet.

        Args:
            offset: Bytes that are there already.
            digest: Is fed with all the bytes, those before the offset too.

        Raises:
            TransferError: A file is shorter than it was, or cannot be read.
        """
        place = 0
        for part in self.parts:
            for data in _read(part):
                digest.update(data)
                skipped = min(max(offset - place, 0), len(data))
                place += len(data)
                yield data[skipped:]


def file_content(path: Path, name: str) -> Content:
    """A file that is written once.

    Raises:
        TransferError: It cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise TransferError(
            f"{path.name} cannot be read: {error.strerror}", hint="See the coordinator's log."
        ) from None
    return Content(name, (Stretch(path, found.st_size),), f"{found.st_size}-{found.st_mtime_ns}")


def growing_content(path: Path, name: str, size: int, snapshot: str = "") -> Content:
    """A file that only grows, as it is now.

    Args:
        path: The file.
        name: What to call it.
        size: Of what is whole in it now.
        snapshot: Of a transfer that is gone on with: the file as it was then.

    Raises:
        TransferError: The snapshot is none of this file.
    """
    if snapshot:
        if not (snapshot.isascii() and snapshot.isdecimal() and len(snapshot) < 19 and int(snapshot) <= size):
            raise _changed()
        size = int(snapshot)
    return Content(name, (Stretch(path, size),), str(size))


def evidence_content(study: str, folder: Path, snapshot: str = "") -> Content:
    """A study's evidence as a tar, the same bytes for the same evidence: receipts and sums of whole attempts only.

    Args:
        study: Its name, and the name of the folder in the tar.
        folder: The study's.
        snapshot: Of a transfer that is gone on with: the evidence as it was then.

    Raises:
        TransferError: The snapshot is none of this evidence.
    """
    now = _sizes(folder)
    sizes = _of_snapshot(snapshot, now) if snapshot else now
    parts: list[bytes | Stretch] = []
    for name, size in sizes.items():
        about = tarfile.TarInfo(f"{study}/{name}")
        about.size, about.mode = size, 0o644
        parts += [about.tobuf(tarfile.USTAR_FORMAT), Stretch(folder / name, size), bytes(-size % tarfile.BLOCKSIZE)]
    parts.append(bytes(2 * tarfile.BLOCKSIZE))
    return Content(f"{study}.evidence.tar", tuple(parts), "-".join(str(size) for size in sizes.values()))


def audit_content(path: Path, size: int, head: Statement) -> Content:
    """An export of the audit log."""
    line = head_line(head) + b"\n"
    return Content("audit.export.jsonl", (Stretch(path, size), line), f"{size} {line.decode('ascii')}")


def audit_head(snapshot: str, size: int) -> tuple[int, Statement]:
    """What an export's snapshot says; whether the head is the log's own, its caller asks.

    Raises:
        TransferError: It is none.
    """
    try:
        told, line = snapshot.split(" ", 1)
        head, end = json.loads(line)["head"], int(told)
        statement = Statement(int(head["seq"]), str(head["hash"]), bytes.fromhex(head["signature"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _changed() from None
    if not 0 < end <= size:
        raise _changed()
    return end, statement


def _sizes(folder: Path) -> dict[str, int]:
    """How much of each file is of attempts that are over, both as of one moment."""
    for _ in range(100):
        before = _open_attempt(folder)
        sizes = {name: _size(folder / name) for name in (RECEIPTS, SUMS)}
        if before is None and _open_attempt(folder) is None and sizes == {n: _size(folder / n) for n in sizes}:
            return sizes
        if before is not None:
            return before
    raise TransferError("the evidence changes all the time", hint="Try again.")


def _open_attempt(folder: Path) -> dict[str, int] | None:
    try:
        held = json.loads((folder / OPEN).read_bytes())["sizes"]
    except FileNotFoundError:
        return None
    return {name: int(held[name]) for name in (RECEIPTS, SUMS)}


def _of_snapshot(snapshot: str, now: dict[str, int]) -> dict[str, int]:
    told = snapshot.split("-")
    if len(told) != len(now) or not all(size.isascii() and size.isdecimal() and len(size) < 19 for size in told):
        raise _changed()
    sizes = dict(zip(now, map(int, told), strict=True))
    if any(sizes[name] > now[name] for name in sizes):
        raise _changed()
    return sizes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(part: bytes | Stretch) -> Iterator[bytes]:
    if isinstance(part, bytes):
        yield part
        return
    left = part.size
    if not left:
        return
    try:
        with part.path.open("rb") as file:
            while left:
                data = file.read(min(left, CHUNK_BYTES))
                if not data:
                    raise _changed()
                left -= len(data)
                yield data
    except OSError as error:
        raise TransferError(
            f"{part.path.name} cannot be read: {error.strerror}", hint="See the coordinator's log."
        ) from None


def _changed() -> TransferError:
    return TransferError("it is not what it was when the transfer began", hint="Begin again, without an offset.")
