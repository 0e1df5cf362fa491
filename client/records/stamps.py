"""What changes when a file is written, replaced or restored: how a reader notices that it read half of an export."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from shared_models.errors import RecordsError

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Device, inode, length and both times; the inode's own time cannot be set back.

    Raises:
        RecordsError: The file is not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise RecordsError(
            f"{path} cannot be read: {error.strerror}", hint="Check file = ... in the manifest."
        ) from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamps(paths: Iterable[Path]) -> Mapping[Path, Stamp]:
    """The stamp of each.

    Raises:
        RecordsError: One is not there.
    """
    return {path: stamp(path) for path in paths}


def changed(before: Mapping[Path, Stamp]) -> Path | None:
    """The first of the files that is not what it was, or is gone; None where all are."""
    for path, known in before.items():
        try:
            if stamp(path) != known:
                return path
        except RecordsError:
            return path
    return None
