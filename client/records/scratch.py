"""Encoded rows that may be more than memory holds: the first in memory, the rest in a nameless, encrypted file.

What a record's own files hold is read again from them when it is needed (``on_disk.py``). A row of a table, a text, a
series in long form cannot be: it is checked and encoded once, and the result is kept here.
"""

import copy
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from client.records.stamps import Stamp
from shared_models.errors import RecordsError

KEPT_MB = 512  # of records' content that stays in memory where no settings say otherwise
_BLOCK = 16  # bytes of AES


@dataclass(frozen=True)
class Room:
    """Where the content of records may lie.

    Attributes:
        memory: Bytes of it that may stay in memory.
        folder: Of the file for the rest; the system's own for temporary files where there are no settings.
    """

    memory: int = KEPT_MB << 20
    folder: Path | None = None


ROOM = Room()  # where there are no settings


class Scratch:
    """Bytes in a file that has no name, encrypted under a key that no disk sees.

    Guarantees:
        * AES-256 in counter mode, under a key that is drawn for this file and is in this process's memory alone. Each
          place is written once, so no part of the key stream is used twice. However the process ends, what is left on
          the disk says nothing but its length.
        * The file has no name from the beginning on (``O_TMPFILE``, or removed at once), so no other process finds it,
          no backup copies it, and the kernel frees it with the process.
        * What is read is what was written, or an error; except for a change by somebody who can already read this
          process's memory: there is no authentication.

    Args:
        folder: Where; the system's own folder for temporary files if None. Nothing is opened before something is
            written.

    Source:
        NIST SP 800-38A, 6.5: the counter of a block is its number.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._key = algorithms.AES(os.urandom(32))
        self._file: int | None = None
        self._size = 0

    def append(self, content: bytes) -> None:
        """Write behind all that was written.

        Raises:
            RecordsError: The disk is full, or the folder cannot be written to.
        """
        begin, self._size = self._size, self._size + len(content)  # even if it fails: no place is written twice
        with self._explained():
            if self._file is None:
                self._file = self._open()
            left = memoryview(self._keyed(begin).update(content))
            while left:
                written = os.pwrite(self._file, left, begin)
                left, begin = left[written:], begin + written

    def read(self, begin: int, size: int) -> bytes:
        """Content at a place.

        Raises:
            RecordsError: The disk does not give it back.
        """
        found = b""
        with self._explained():
            while len(found) < size and self._file is not None:
                part = os.pread(self._file, size - len(found), begin + len(found))
                if not part:
                    break
                found += part
        if len(found) != size:
            raise RecordsError(f"the file for encoded records in {self._where} is shorter than it was", hint=_HINT)
        return self._keyed(begin).update(found)

    def _open(self) -> int:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _keyed(self, begin: int) -> CipherContext:
        """The key stream from a place on; the same in both directions."""
        blocks, within = divmod(begin, _BLOCK)
        stream = Cipher(self._key, modes.CTR(blocks.to_bytes(_BLOCK, "big"))).encryptor()
        stream.update(bytes(within))
        return stream

    @property
    def _where(self) -> object:
        return "the folder for temporary files" if self._folder is None else self._folder

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordsError(
                f"encoded records do not fit into memory, and not into {self._where} either: {error.strerror}",
                hint=_HINT,
            ) from None


_HINT = "Make room on that disk, or raise records_memory_mb in the hospital's settings."


class Stored:
    """One array per record, appended once and then read: in memory as far as there is room, else in a ``Scratch``.

    Args:
        shape: Of one row.
        dtype: Of its elements; no objects.
        room: What may be in memory, and where the rest goes.
    """

    stamps: Mapping[Path, Stamp] = {}  # no file of the hospital's is read again

    def __init__(self, shape: tuple[int, ...], dtype: Any, room: Room) -> None:
        self._row, self.dtype = shape, np.dtype(dtype)
        self.width = math.prod(shape) * self.dtype.itemsize
        self._most = room.memory // max(1, self.width)
        self._memory: NDArray[Any] = np.empty((0, *shape), dtype=self.dtype)
        self._scratch = Scratch(room.folder)
        self._count = 0
        self._chosen: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows together."""
        return (self._count, *self._row)

    def __len__(self) -> int:
        """Number of rows."""
        return self._count

    def __repr__(self) -> str:
        """Shape only: a log line must not hold a patient's values."""
        return f"Stored(shape={self.shape})"

    def append(self, rows: NDArray[Any]) -> None:
        """Rows behind all others, shape ``(k, *shape)``.

        Raises:
            RecordsError: There is neither memory nor room on the disk for them.
        """
        begin = len(self._memory)
        fit = min(len(rows), self._most - begin) if self._count == begin else 0
        if fit:
            self._memory.resize((begin + fit, *self._row), refcheck=False)  # in place: a copy would need twice the room
            self._memory[begin:] = rows[:fit]
        if fit < len(rows):
            self._scratch.append(np.ascontiguousarray(rows[fit:], dtype=self.dtype).tobytes())
        self._count += len(rows)

    def only(self, flags: NDArray[np.bool_]) -> "Stored":
        """The rows that are flagged, numbered anew; nothing is appended to it, nor to these any more."""
        left = copy.copy(self)
        left._chosen = np.flatnonzero(flags) if self._chosen is None else self._chosen[flags]
        left._count = len(left._chosen)
        return left

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Content of some rows."""
        return self.take(np.arange(len(self))[rows])

    def take(self, numbers: NDArray[np.int64], *, failed: Callable[[int], None] | None = None) -> NDArray[Any]:  # noqa: ARG002
        """Content of rows by their numbers, in any order and any repetition, shape ``(k, *shape)``.

        Args:
            numbers: Shape ``(k,)``.
            failed: Is told of nothing: no record's content fails, and what a disk does is no record's content.

        Raises:
            RecordsError: The disk does not give them back.
        """
        if self._chosen is not None:
            numbers = self._chosen[numbers]
        here = numbers < len(self._memory)
        if here.all():
            return self._memory[numbers]
        content = np.empty((len(numbers), *self._row), dtype=self.dtype)
        content[here] = self._memory[numbers[here]]
        wanted, places = np.unique(numbers[~here] - len(self._memory), return_inverse=True)
        content[~here] = self._read(wanted)[places]
        return content

    def _read(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of the scratch file, ascending and distinct: neighbours are read together."""
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        parts = [self._scratch.read(int(run[0]) * self.width, len(run) * self.width) for run in runs]
        return np.frombuffer(b"".join(parts), dtype=self.dtype).reshape(-1, *self._row)
