"""What records are made of, read from the hospital's files when a batch needs it, and not before.

So a data set may be larger than memory. Nothing of it is written to any disk: what was decoded stays in memory, as far
as the hospital's settings allow, and is gone with the process. What has no file of its own is in ``scratch.py``.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.records.scratch import KEPT_MB, Stored
from client.records.stamps import Stamp, changed
from shared_models.errors import RecordsError

log = logging.getLogger("konsil.hospital")

_AT_ONCE = 64  # rows of a walk through everything that has to be decoded
_WALK = 1 << 24  # bytes of a walk through what is encoded already
_AHEAD = 32  # items whose files are on their way while one is read
Numbers = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Whole:
    """What a walk through every row found.

    Attributes:
        digests: SHA-256 of each row's content, in hexadecimal.
        least: Of all numbers in all rows.
        greatest: Likewise.
    """

    digests: list[str]
    least: float
    greatest: float


class OnDisk:
    """One array per record, each read from its files when it is asked for.

    Guarantees:
        * Content comes from the files that were checked: where a file's stamp is another one, before or after it is
          read, there is an error and no content.
        * At most ``keep`` bytes stay in memory, beside what was asked for.

    Args:
        read: Reads one row, of ``shape[1:]`` and ``dtype``; RecordsError names the file.
        shape: Of all rows together.
        dtype: Of the content.
        files_of: Files that a row is read from.
        stamps: Of each file, from before it was checked.
        whole: What a walk through every row found, where there was one already.
    """

    def __init__(
        self,
        read: Callable[[int], NDArray[Any]],
        *,
        shape: tuple[int, ...],
        dtype: Any,
        files_of: Callable[[int], Sequence[Path]],
        stamps: Mapping[Path, Stamp],
        whole: Whole | None = None,
    ) -> None:
        self.shape, self.stamps = shape, stamps
        self._read, self._files_of, self.dtype, self._whole = read, files_of, np.dtype(dtype), whole
        self.keep(KEPT_MB << 20)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __repr__(self) -> str:
        """Shape only: a log line must not hold a patient's values."""
        return f"OnDisk(shape={self.shape})"

    def keep(self, size: int) -> None:
        """How many bytes of content may stay in memory once they were read: the first rows, as many as fit."""
        row = max(1, int(np.prod(self.shape[1:])) * self.dtype.itemsize)
        rows = min(len(self), size // row)
        self._kept = np.empty((rows, *self.shape[1:]), dtype=self.dtype)  # the kernel gives pages as they are filled
        self._is_kept = np.zeros(rows, dtype=np.bool_)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Content of some rows.

        Raises:
            RecordsError: A file cannot be read, or has changed since it was checked.
        """
        return self.take(np.arange(len(self))[rows])

    def take(self, numbers: Numbers, *, failed: Callable[[int], None] | None = None) -> NDArray[Any]:
        """Content of rows by their numbers, shape ``(k, ...)``.

        Args:
            numbers: Any order, any repetition; shape ``(k,)``.
            failed: Told the position among ``numbers`` of each row that cannot be had, whose content is then zeros.

        Raises:
            RecordsError: A row cannot be had, and nobody is told instead.
        """
        content = np.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        to_read = announced(numbers.tolist(), lambda number: () if self._has(number) else self._files_of(number))
        for position, number in enumerate(to_read):
            try:
                content[position] = self._one(number)
            except Exception:  # whatever it is: with somebody to tell, no record's content raises
                if failed is None:
                    raise
                content[position] = 0
                failed(position)
        return content

    def only(self, flags: NDArray[np.bool_]) -> "OnDisk":
        """The rows that are flagged, numbered anew."""
        numbers, whole = np.flatnonzero(flags), self._whole
        if whole is not None:
            digests = [whole.digests[number] for number in numbers]
            whole = Whole(digests, whole.least, whole.greatest)
        return OnDisk(
            lambda number: self._read(int(numbers[number])),
            shape=(len(numbers), *self.shape[1:]),
            dtype=self.dtype,
            files_of=lambda number: self._files_of(int(numbers[number])),
            stamps=self.stamps,
            whole=whole,
        )

    @property
    def whole(self) -> Whole:
        """Everything, read through once: the whole check of every file.

        Raises:
            RecordsError: A file cannot be read, or has changed since it was checked.
        """
        if self._whole is None:
            digests, least, greatest = [], np.inf, -np.inf
            for rows in walk(self):
                digests += [digest(row) for row in rows]
                least, greatest = min(least, rows.min()), max(greatest, rows.max())
            refuse_changed(self.stamps)
            self._whole = Whole(digests, float(least), float(greatest))
        return self._whole

    def _has(self, number: int) -> bool:
        return number < len(self._kept) and bool(self._is_kept[number])

    def _one(self, number: int) -> NDArray[Any]:
        if self._has(number):
            return self._kept[number]
        files = self._files_of(number)
        before = {path: self.stamps[path] for path in files}
        refuse_changed(before)
        row = self._read(number)
        refuse_changed(before)
        if number < len(self._kept):
            self._kept[number] = row
            self._is_kept[number] = True
        return row


class OnDemand:
    """Inputs or targets of records as a task wants them, made from their content when a batch needs them; ``Rows``.

    Args:
        content: Of all records of a table.
        numbers: Which of them these are.
        encode: From content, shape ``(k, ...)``, to float32 or int64; public figures only.
        forgiving: Give NaN for a record whose content cannot be had, instead of an error.
    """

    def __init__(
        self,
        content: "Content",
        numbers: Numbers,
        encode: Callable[[NDArray[Any]], NDArray[Any]],
        *,
        forgiving: bool = False,
    ) -> None:
        self._content, self._numbers, self._encode, self._forgiving = content, numbers, encode, forgiving
        self._failed: set[int] = set()

    @property
    def shape(self) -> torch.Size:
        """Of all inputs together."""
        return torch.Size((len(self._numbers), *self._none.shape[1:]))

    @property
    def width(self) -> int:
        """Bytes of one record's inputs, where they are in memory."""
        return self._none.itemsize * math.prod(self._none.shape[1:])

    @property
    def _none(self) -> NDArray[Any]:
        """What no record at all is encoded to."""
        return self._encode(np.empty((0, *self._content.shape[1:]), dtype=self._content.dtype))

    def __len__(self) -> int:
        """Number of records."""
        return len(self._numbers)

    def __repr__(self) -> str:
        """Shape only: a log line must not hold a patient's values."""
        return f"OnDemand(shape={tuple(self.shape)})"

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Inputs of some records.

        Raises:
            RecordsError: A file cannot be read, or has changed since it was checked; where ``forgiving`` only if it is
                one of encoded records, on a disk that fails.
        """
        numbers = self._numbers[rows if isinstance(rows, slice) else rows.numpy()]
        failed: list[int] = []
        inputs = self._encode(self._content.take(numbers, failed=failed.append if self._forgiving else None))
        if failed:
            inputs[failed] = np.nan
            self._note(numbers[failed])
        return torch.from_numpy(inputs)

    def in_memory(self) -> Tensor:
        """All of them, with no copy of all beside it.

        Raises:
            RecordsError: As for some.
        """
        inputs = torch.from_numpy(np.empty(self.shape, dtype=self._none.dtype))
        most = _rows_at_once(self.width)
        for first in range(0, len(self), most):
            inputs[first : first + most] = self[first : first + most]
        return inputs

    def forgiving(self) -> "OnDemand":
        """The same, for use after a charge: no content of a record raises.

        What cannot be had is NaN, so its patient's gradient is not finite and counts as zero, as does its part of a
        release. How many records that were is logged; which ones, ``check-data`` says.
        """
        return OnDemand(self._content, self._numbers, self._encode, forgiving=True)

    def _note(self, failed: Numbers) -> None:
        before = len(self._failed)
        self._failed.update(failed.tolist())
        if len(self._failed) > before:
            log.warning(
                "%d records cannot be read, or their files changed: they count as zero. Run konsil-hospital check-data",
                len(self._failed),
            )


def announced(items: Sequence[T], files_of: Callable[[T], Iterable[Path]], *, length: int = 0) -> Iterator[T]:
    """The items, one by one, while the kernel already fetches the files of those that come next into its own memory.

    Args:
        items: In the order in which they will be read.
        files_of: Which files an item is read from.
        length: Bytes at the beginning of each file that will be read; 0 for all of it.
    """
    for number, item in enumerate(items):
        coming = items[: _AHEAD + 1] if number == 0 else items[number + _AHEAD : number + _AHEAD + 1]
        for path in {path for one in coming for path in files_of(one)}:
            _fetch(path, length)
        yield item


def _fetch(path: Path, length: int) -> None:
    """A hint, which may be ignored, and does not wait."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


Content = OnDisk | Stored


def walk(content: Content) -> Iterator[NDArray[Any]]:
    """All rows, some at once."""
    row = int(np.prod(content.shape[1:])) * content.dtype.itemsize
    most = _AT_ONCE if isinstance(content, OnDisk) else _rows_at_once(row)
    for first in range(0, len(content), most):
        yield content[first : first + most]


def _rows_at_once(size: int) -> int:
    return max(1, _WALK // max(1, size))


def digests(content: Content, encode: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray) -> Iterator[str]:
    """SHA-256 of each row's content, in hexadecimal; what has files of its own is read through at most once."""
    if isinstance(content, OnDisk):
        yield from content.whole.digests
    else:
        yield from (digest(row) for rows in walk(content) for row in encode(rows))


def digest(row: NDArray[Any]) -> str:
    """SHA-256 of one row's content, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()


def refuse_changed(before: Mapping[Path, Stamp]) -> None:
    """Refuse files that are not what they were.

    Raises:
        RecordsError: Names the first one.
    """
    if (path := changed(before)) is not None:
        raise RecordsError(f"{path} changed while it was read", hint="Replace it by renaming.")
