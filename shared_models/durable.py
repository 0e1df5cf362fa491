"""Files that survive a crash or a power cut: whole, and on the disk when the call returns."""

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, *content: bytes | memoryview) -> None:
    """Write a file anew, from one part or several. One writer per path: what a crash leaves beside it is overwritten.

    Guarantees:
        * At every moment the path holds the old file whole, or the new one whole.
        * When this returns, the new file is on the disk. When it raises, no temporary file is left behind.

    Raises:
        OSError: It could not be written.
    """
    temporary = path.with_name(f"{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append_whole(path: Path, content: bytes, *, size: int) -> None:
    """Append to a file, whole or not at all; one writer per path.

    Guarantees:
        * When this returns, the content is on the disk, from ``size`` on. When it raises, the file ends there.
        * What a crash has left behind ``size`` is dropped.

    Raises:
        OSError: It could not be written.
    """
    with path.open("ab", buffering=0) as file:
        file.truncate(size)
        try:
            while content:  # the disk may take a part only, and say why when it is given the rest
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def sync_file(path: Path) -> None:
    """Make a file that something else wrote durable.

    Raises:
        OSError: The disk does not take it.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_identity(path: Path) -> tuple[int, int]:
    """Which file a path names now: (device, inode), zeros for none. A file that was replaced while open keeps nothing.

    Raises:
        OSError: It cannot be asked.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return found.st_dev, found.st_ino


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written in place; empty for none: for whoever reads it again then.

    Raises:
        OSError: It cannot be asked.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def create_file(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that is not there yet.

    Guarantees:
        * An existing file is never replaced.
        * When this returns, the file is on the disk, with exactly this mode. When it raises, no half file is left.

    Raises:
        FileExistsError: There is one.
        OSError: It could not be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(file, "wb") as stream:
            os.fchmod(file, mode)  # the umask may have taken even our own bits
            stream.write(content)
            stream.flush()
            os.fsync(file)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make a folder's own entries durable: a new name must reach the disk too.

    Raises:
        OSError: The disk does not take it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_cut_line(path: Path) -> None:
    """Take away what a crash has left behind a file's last whole line; on the disk when it returns.

    Raises:
        OSError: It could not be done.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = whole = file.seek(0, os.SEEK_END)
        while whole and (file.seek(whole - 1), file.read(1))[1] != b"\n":
            whole -= 1
        if whole < end:
            file.truncate(whole)
            os.fsync(file.fileno())
