"""The coordinator's own audit log: every call of the control service is in it before it has any effect."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from shared_models.audit_log import LONGEST_LINE, SIGNED, AuditChain, AuditEntry, read_log, wrong
from shared_models.config import explain
from shared_models.durable import sync_folder
from shared_models.errors import AuditError, LedgerError
from shared_models.identity import create_key, load_key, public_bytes, sign
from shared_models.privacy.entries import GENESIS
from shared_models.privacy.head import HeadWriter, Statement, create_head, head_path, read_head

LOG, KEY, PUBLIC = "audit.jsonl", "audit.key", "audit.pub"
Kind = Literal["opened", "started", "call", "done"]


class AuditLog:
    """The log, open for appending by this process alone: the coordinator holds the lock of its state folder.

    Guarantees:
        * ``append`` returns once the line and the head are on the disk.
        * A process killed at any point leaves a log that opens again, with every line that ``append`` returned, and at
          most one more.
        * A line that could not be written whole is taken back, or nothing more is written.
        * Memory does not grow with the number of lines.

    Args:
        folder: Holds ``audit.jsonl``, its head file, and the key, which is made the first time.

    Raises:
        AuditError: The log was changed or cut, is gone, or cannot be written.
        IdentityError: The key cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._head_path = folder / LOG, head_path(folder / LOG)
        self._turn, self._failed = threading.Lock(), False
        folder.mkdir(parents=True, exist_ok=True)
        with _explained(self.path):
            self._key = _key(folder)
            self.public_key = public_bytes(self._key)
            self._make()
            self._chain = AuditChain(self.public_key)
            self._size = self._follow()
            self._file = self.path.open("r+b", buffering=0)
            self._file.truncate(self._size)
            self._head = HeadWriter(self._head_path)
            # A process that was killed between the two files has left a head that is one line behind.
            self._head.write(self._key, seq=self._chain.seq, entry_hash=self._chain.hash)
        if not self._chain.seq:
            self.append("opened", public_key=self.public_key.hex())

    def _make(self) -> None:
        """Both files, where there is neither yet; killed in between, it is done again."""
        if self.path.exists():
            return
        if self._head_path.exists() and read_head(self._head_path).seq:
            raise AuditError(
                f"the audit log {self.path} is gone", hint="Restore it: its head file says that there was one."
            )
        create_head(self._head_path, self._key, genesis=GENESIS)
        self.path.touch(mode=0o600)
        sync_folder(self.path.parent)

    def _follow(self) -> int:
        """Follow the lines by their hashes, the last by its signature too. Returns their size on the disk."""
        size, last = 0, None
        for last in read_log(self.path):
            self._chain.follow(last, trusted=True)
            size += len(last) + 1
        if last is not None:
            self._chain.inspect(last, self._chain.seq)
        for statement in read_head(self._head_path).statements:
            self._chain.confirm(statement)
        return size

    def append(self, kind: Kind, **fields: Any) -> int:
        """Write one line; durable before this returns. Returns its number.

        Raises:
            AuditError: It could not be written: what it was to allow must not happen.
        """
        with self._turn:
            if self._failed:
                raise AuditError(f"the audit log {self.path} is closed, or failed before", hint="Restart; see the log.")
            line = self._sign(kind, fields)
            with _explained(self.path):
                self._write(line + b"\n")
            self._chain.follow(line, trusted=True)
            self._size += len(line) + 1
            self._failed = True  # until the head is safe too
            with _explained(self.path):
                self._head.write(self._key, seq=self._chain.seq, entry_hash=self._chain.hash)
            self._failed = False
            return self._chain.seq

    def _sign(self, kind: Kind, fields: dict[str, Any]) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fixed = {"seq": self._chain.seq + 1, "previous_hash": self._chain.hash, "time": now, "kind": kind}
        try:
            unsigned = AuditEntry.model_validate({**fields, **fixed, "signature": "0" * 128})
        except ValidationError as error:
            raise AuditError(f"no valid line of the audit log: {explain(error)}", hint="Nothing was written.") from None
        signature = sign(self._key, SIGNED, unsigned.payload()).hex()
        line = unsigned.model_copy(update={"signature": signature}).line()
        if len(line) >= LONGEST_LINE:
            raise wrong(self._chain.seq + 1, "it is too long")
        return line

    def _write(self, content: bytes) -> None:
        try:
            self._file.seek(self._size)
            while content:  # the disk may take a part only, and say why when it is given the rest
                content = content[self._file.write(content) or 0 :]
            os.fsync(self._file.fileno())
        except OSError:
            try:
                self._file.truncate(self._size)
            except OSError:
                self._failed = True
            raise

    def export(self) -> tuple[int, Statement]:
        """Size of the log at this moment, and its head: together they are an export."""
        with self._turn, _explained(self.path):
            return self._size, read_head(self._head_path).statements[0]

    def owns(self, statement: Statement) -> bool:
        """Whether a head's statement is by this log's key."""
        return statement.signed_by(self.public_key)

    def close(self) -> None:
        """Let go of the files; can be called twice."""
        with self._turn:
            self._failed = True
            with suppress(OSError):
                self._file.close()
            self._head.close()

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def export_lines(folder: Path) -> Iterator[bytes]:
    """The lines of an export of the log in a folder, also while a coordinator writes it.

    Raises:
        AuditError: There is none, or it cannot be read.
    """
    path = folder / LOG
    if not path.exists():
        raise AuditError(f"there is no audit log {path}", hint="It is made when konsil-coordinator start first runs.")
    with _explained(path):
        head = read_head(head_path(path)).statements[0]
    yield from read_log(path, head)


def _key(folder: Path) -> Ed25519PrivateKey:
    path = folder / KEY
    if not path.exists() and (folder / LOG).exists():
        raise AuditError(f"the audit log's key {path} is gone", hint="Restore it; a log has one key from end to end.")
    key = load_key(path) if path.exists() else create_key(path)
    (folder / PUBLIC).write_text(public_bytes(key).hex() + "\n", encoding="ascii")
    return key


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """The disk's and the head file's errors, as the log's."""
    try:
        yield
    except LedgerError as error:
        raise AuditError(f"the audit log {path}: {error}", hint=error.hint) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise AuditError(
            f"the audit log {path} cannot be used: {why}", hint="Check the folder and the space left on the disk."
        ) from None
