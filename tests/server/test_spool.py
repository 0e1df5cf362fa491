"""Arriving updates lie on the disk: what the SuperLink holds in memory does not grow with the number of hospitals."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from server.spool import LARGE_BYTES, SpooledObjectStore


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _arrived(store: SpooledObjectStore, record: ArrayRecord) -> dict[str, bytes]:
    contents = {key: nested.deflate() for key, nested in get_all_nested_objects(record).items()}
    store.preregister(1, get_object_tree(record))
    for key, content in contents.items():
        assert not store.has(key)
        store.put(key, content)
    return contents


def test_large_objects_are_files_and_small_ones_are_not(tmp_path: Path) -> None:
    """Read back they are the same; deleted with the message that referred to them, they are gone."""
    store = SpooledObjectStore(tmp_path)
    record = ArrayRecord({"vector": Array(np.arange(100_000, dtype="<u4"))})

    contents = _arrived(store, record)

    assert {key: store.get(key) for key in contents} == contents
    assert all(store.has(key) for key in contents)
    large = {key for key, content in contents.items() if len(content) >= LARGE_BYTES}
    assert large
    assert {path.name for path in _files(tmp_path)} == large
    assert sum(len(entry.content) for entry in store.store.values()) < LARGE_BYTES
    store.delete(record.object_id)
    assert _files(tmp_path) == []
    assert store.get(next(iter(large))) is None


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """By the next one; and a process that ends as it should leaves nothing."""
    left = SpooledObjectStore(tmp_path)
    _arrived(left, ArrayRecord({"vector": Array(np.zeros(100_000, dtype="<u4"))}))
    assert _files(tmp_path)

    again = SpooledObjectStore(tmp_path)
    assert _files(tmp_path) == []
    again.close()

    assert list(tmp_path.iterdir()) == []


def test_a_content_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    """Objects are named by their SHA-256; nothing of a forged one is kept."""
    store = SpooledObjectStore(tmp_path)
    record = ArrayRecord({"vector": Array(np.zeros(100_000, dtype="<u4"))})
    store.preregister(1, get_object_tree(record))
    name, content = max(
        ((key, nested.deflate()) for key, nested in get_all_nested_objects(record).items()),
        key=lambda pair: len(pair[1]),
    )

    with pytest.raises(ValueError, match="does not match"):
        store.put(name, content + b"x")

    assert not store.has(name)
    assert _files(tmp_path) == []
