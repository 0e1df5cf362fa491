"""Following hospitals' checkpoints, with a memory of its own: whoever forwards them is not believed.

The memory is a file of lines, the checkpoints as they were signed. What was seen once stays seen across restarts, so
that a history that was replaced contradicts it.
"""

import fcntl
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from auditor.checkpoints import contradiction, read_checkpoints
from auditor.findings import COORDINATOR, Finding
from shared_models.durable import append_whole, drop_cut_line, replace_file, sync_folder
from shared_models.errors import CheckpointError, ConfigError, EvidenceError
from shared_models.identity import fingerprint
from shared_models.privacy.checkpoint import CheckpointHistory, SignedCheckpoint, read_checkpoint
from shared_models.roster import Pin, SignedRoster, verify_roster
from shared_models.terminal import printable

Fetch = Callable[[Path], object]

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class Trust:
    """Whose key is whose: keys that the auditor was given, and those of the roster that the root key signed.

    Args:
        keys: Public keys that count for any hospital.
        root: The consortium's root key; None where there is no roster to go by.
        kept: Where the newest roster is kept, so that an older one is refused later.
    """

    def __init__(self, keys: Collection[bytes], root: bytes | None, kept: Path) -> None:
        self._keys, self._root, self._kept = frozenset(keys), root, kept
        self._roster: SignedRoster | None = None
        if root is not None and kept.exists():
            self._roster = verify_roster(kept.read_bytes(), root)

    def renew(self, fetch: Fetch) -> None:
        """Fetch the roster, and take it in if it is genuine and not older than the one before.

        Raises:
            RosterError: It is not.
            FederationError: It cannot be fetched.
        """
        if self._root is None:
            return
        fresh = self._kept.with_name(f"{self._kept.name}.fetched")
        fetch(fresh)
        try:
            content = fresh.read_bytes()
            before = self._roster
            pinned = Pin(before.version, before.digest) if before else None
            self._roster = verify_roster(content, self._root, pinned=pinned)
            replace_file(self._kept, content)
        except OSError as error:
            raise _unwritable(self._kept, error) from None
        finally:
            fresh.unlink(missing_ok=True)

    def is_key_of(self, hospital: str, key: bytes) -> bool:
        """Whether a public key is this hospital's."""
        member = self._roster.member(hospital) if self._roster else None
        return key in self._keys or (member is not None and not member.revoked and member.identity == key.hex())


class Seen(NamedTuple):
    """What became of a line.

    Attributes:
        checkpoint: None where it is none.
        new: Whether it was not seen before.
        finding: What is wrong with it.
    """

    checkpoint: SignedCheckpoint | None
    new: bool
    finding: Finding | None = None


class Memory:
    """All checkpoints that were ever seen, in a file with one user at a time.

    Guarantees:
        * What ``see`` returned as new is on the disk, also where it contradicts another: both are kept as evidence.
        * A line that a crash cut is dropped when the file is opened again; it was never returned.

    Args:
        path: The file; made where there is none.
        trust: Whose key is whose.

    Attributes:
        findings: What contradicts in the file already.

    Raises:
        EvidenceError: A line is no checkpoint: the file was changed.
        ConfigError: It cannot be written, or somebody else uses it.
    """

    def __init__(self, path: Path, trust: Trust) -> None:
        self._path, self._trust = path, trust
        self._histories = defaultdict[tuple[str, str], CheckpointHistory](CheckpointHistory)
        self._lines, self._asked = set[bytes](), set[tuple[str, bytes]]()
        self.findings = list[Finding]()
        try:
            path.touch(mode=0o600)
            self._lock = path.open("rb")
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            drop_cut_line(self._path)
            sync_folder(self._path.absolute().parent)
        except BlockingIOError:
            raise ConfigError(
                f"{self._path} is in use by another watch", hint="Give each a --known of its own."
            ) from None
        except OSError as error:
            raise _unwritable(self._path, error) from None
        for checkpoint in read_checkpoints(self._path):
            if (finding := self._take(checkpoint)) is not None:
                self.findings.append(finding)

    def see(self, hospital: str, line: bytes, *, unknown: Callable[[], None] = lambda: None) -> Seen:
        """Take a line in that somebody hands over as this hospital's.

        Args:
            hospital: Whose it is said to be.
            line: The checkpoint.
            unknown: Is called once for each key that is not known, which may make it known: keys change.

        Raises:
            ConfigError: It cannot be written down.
        """
        party = hospital if _NAME.fullmatch(hospital) else COORDINATOR
        try:
            checkpoint = read_checkpoint(line)
        except EvidenceError as error:
            return Seen(None, True, Finding(code="checkpoint-foreign", party=party, what=printable(str(error))))
        if _digest(checkpoint) in self._lines:
            return Seen(checkpoint, False)
        key = bytes.fromhex(checkpoint.public_key)
        if not self._trust.is_key_of(hospital, key) and (hospital, key) not in self._asked:
            self._asked.add((hospital, key))
            unknown()
        if checkpoint.hospital != hospital or not self._trust.is_key_of(hospital, key):
            text = f"{checkpoint}, handed over as {party}'s, is signed for {checkpoint.hospital} by the key "
            text += f"{fingerprint(key)[:19]}…, which is not known to be {party}'s"
            return Seen(checkpoint, True, Finding(code="checkpoint-foreign", party=party, what=text))
        self._write(checkpoint)
        return Seen(checkpoint, True, self._take(checkpoint))

    def close(self) -> None:
        """Let somebody else use the file."""
        self._lock.close()

    def _take(self, checkpoint: SignedCheckpoint) -> Finding | None:
        self._lines.add(_digest(checkpoint))
        try:
            self._histories[checkpoint.ledger].take(checkpoint)
        except CheckpointError as error:
            return contradiction(checkpoint, error)
        return None

    def _write(self, checkpoint: SignedCheckpoint) -> None:
        try:
            append_whole(self._path, checkpoint.line() + b"\n", size=self._path.stat().st_size)
        except OSError as error:
            raise _unwritable(self._path, error) from None


def _digest(checkpoint: SignedCheckpoint) -> bytes:
    return hashlib.sha256(checkpoint.line()).digest()


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error.strerror}", hint="Without a memory nothing is noticed: choose another file."
    )
