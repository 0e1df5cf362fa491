"""Flower's object store with its large objects on the disk: memory does not grow with the number of hospitals."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

LARGE_BYTES = 1 << 16


class SpooledObjectStore(InMemoryObjectStore):
    """Objects of at least ``LARGE_BYTES`` lie in files of a folder of this process's own.

    A slow or hostile hospital that leaves half of an update here costs disk, not memory, and does not keep others
    waiting. After a crash the folder is left behind; the next process removes it.

    Args:
        folder: Where the spool is made; masked updates are no secret, but they are nobody's business either.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("spool-*"):
            shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(mkdtemp(prefix="spool-", dir=folder))
        self._spooled: set[str] = set()

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Take an object that is expected; its content is checked against its name, which is its SHA-256."""
        super().put(object_id, object_content)
        if len(object_content) < LARGE_BYTES:
            return
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or object_id in self._spooled:
                return
            (self._folder / object_id).write_bytes(object_content)
            self._spooled.add(object_id)
            entry.content = b""

    def get(self, object_id: str) -> bytes | None:
        """An object's content; empty where it is expected and has not come."""
        with self.lock_store:
            if object_id in self._spooled and object_id in self.store:
                return (self._folder / object_id).read_bytes()
            return super().get(object_id)

    def has(self, object_id: str) -> bool:
        """Whether an object has come."""
        with self.lock_store:
            return object_id in self.store and self.store[object_id].is_available

    def delete(self, object_id: str) -> None:
        """Forget an object and what only it refers to."""
        with self.lock_store:
            super().delete(object_id)
            if object_id in self._spooled and object_id not in self.store:
                self._spooled.discard(object_id)
                (self._folder / object_id).unlink(missing_ok=True)
