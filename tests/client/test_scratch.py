"""Encoded rows beyond memory: the same bytes back, unreadable on the disk, nameless, an error where they don't fit."""

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.records.on_disk import OnDemand
from client.records.scratch import Room, Scratch, Stored
from shared_models.errors import RecordsError

few = examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROW = np.dtype([("age", "f8"), ("stage", "u1")])


def nameless(folder: Path) -> list[int]:
    """This process's files without a name in a folder: their descriptors."""
    found = [(path, str(path.readlink())) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [int(p.name) for p, name in found if name.startswith(f"{folder}/") and name.endswith(" (deleted)")]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond a size: a disk that is full, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # the interpreter ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@few
@given(
    parts=st.lists(st.binary(max_size=70), min_size=1, max_size=6),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5),
)
def test_what_is_read_is_what_was_written(
    tmp_path: Path, parts: list[bytes], places: list[tuple[float, float]]
) -> None:
    """From any place, of any length, whatever the blocks of the cipher."""
    scratch, whole = Scratch(tmp_path), b"".join(parts)
    for part in parts:
        scratch.append(part)

    for place, share in places:
        begin = int(place * len(whole))
        size = int(share * (len(whole) - begin))
        assert scratch.read(begin, size) == whole[begin : begin + size]
    assert list(tmp_path.iterdir()) == []


def test_the_disk_has_neither_a_name_nor_the_content(tmp_path: Path) -> None:
    """Owner's alone, gone with its object, and bytes that another key would give as well; each file has its own key."""
    secret = b"patient 17 has a fever. " * 100
    one, other = Scratch(tmp_path), Scratch(tmp_path)
    for scratch in (one, other):
        scratch.append(secret)

    files = nameless(tmp_path)
    raw = [os.pread(file, 1 << 20, 0) for file in files]
    assert [len(content) for content in raw] == [len(secret)] * 2
    assert raw[0] != raw[1]
    assert all(secret[i : i + 8] not in content for content in raw for i in range(len(secret) - 8))
    assert {os.fstat(file).st_mode & 0o777 for file in files} == {0o600}
    assert {os.fstat(file).st_nlink for file in files} == {0}
    del one, other, scratch
    gc.collect()
    assert nameless(tmp_path) == []


def test_the_cipher_is_the_standards(tmp_path: Path) -> None:
    """AES-256 in counter mode from counter 0, as the library does it in one go: no block of the key stream twice."""
    scratch, whole = Scratch(tmp_path), bytes(1000)
    for begin in range(0, 1000, 37):
        scratch.append(whole[begin : begin + 37])

    (file,) = nameless(tmp_path)
    plain = Cipher(algorithms.AES(scratch._key.key), modes.CTR(bytes(16))).encryptor().update(whole)
    assert len(scratch._key.key) == 32
    assert os.pread(file, 2000, 0) == plain
    blocks = [plain[i : i + 16] for i in range(0, 992, 16)]
    assert len(set(blocks)) == len(blocks)


def test_a_file_that_is_cut_is_an_error(tmp_path: Path) -> None:
    """Never zeros, and never less than was asked for."""
    rows = Stored((3,), np.float32, Room(0, tmp_path))
    rows.append(np.ones((5, 3), dtype=np.float32))
    os.ftruncate(nameless(tmp_path)[0], 50)

    assert rows[:4].tolist() == [[1, 1, 1]] * 4
    with pytest.raises(RecordsError, match="is shorter than it was"):
        rows[:5]
    with pytest.raises(RecordsError, match="is shorter than it was"):
        OnDemand(rows, np.arange(5), np.asarray).forgiving()[4:]


def test_a_full_disk_is_told_and_no_place_is_written_twice(tmp_path: Path) -> None:
    """With the folder and what to do; what was written before is still there, and the key stream goes on."""
    scratch = Scratch(tmp_path)
    scratch.append(b"a" * 600)
    with disk_of(1000), pytest.raises(RecordsError, match=f"not into {tmp_path} either: File too large") as caught:
        scratch.append(b"b" * 600)

    scratch.append(b"c" * 600)

    assert "records_memory_mb" in str(caught.value.hint)
    assert scratch.read(0, 600) == b"a" * 600
    assert scratch.read(1200, 600) == b"c" * 600


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "state").write_text("", encoding="utf-8")

    with pytest.raises(RecordsError, match=r"not into .*state either"):
        Scratch(tmp_path / "state").append(b"a")


@few
@given(
    parts=st.lists(st.integers(0, 9), max_size=5),
    memory=st.integers(0, 400),
    numbers=st.lists(st.floats(0, 0.999), max_size=12),
    ends=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    flags=st.integers(0, 2**45),
)
def test_stored_rows_are_an_array(
    tmp_path: Path, parts: list[int], memory: int, numbers: list[float], ends: tuple[int, int], flags: int
) -> None:
    """Any choice of rows, in any order and repetition, however many of them are in memory, and of a selection too."""
    rng, rows, arrays = np.random.default_rng(0), Stored((), ROW, Room(memory, tmp_path)), [np.empty(0, dtype=ROW)]
    for count in parts:
        part = np.empty(count, dtype=ROW)
        part["age"], part["stage"] = rng.random(count), rng.integers(0, 9, count)
        rows.append(part)
        arrays.append(part)
    whole: NDArray[Any] = np.concatenate(arrays)
    left = np.array([flags >> place & 1 for place in range(len(whole))], dtype=np.bool_)

    for stored, array in ((rows, whole), (rows.only(left), whole[left])):
        chosen = np.array([int(share * len(array)) for share in numbers if len(array)], dtype=np.int64)
        assert (len(stored), stored.shape) == (len(array), array.shape)
        np.testing.assert_array_equal(stored.take(chosen), array[chosen])
        np.testing.assert_array_equal(stored[slice(*ends)], array[slice(*ends)])
    assert bool(nameless(tmp_path)) == (len(whole) * ROW.itemsize > memory // ROW.itemsize * ROW.itemsize)
    assert "age" not in repr(rows)
