"""What hospitals leave here for auditors: checkpoints and evidence bundles, whole or not at all.

The coordinator stores and hands out. It checks whose a deposit is, so that nobody speaks for another hospital; whether
the evidence holds is the auditor's question, and the auditor does not believe this file's answer.
"""

import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shared_models.control.deposits import BUNDLE, CHECKPOINTS, bundle_name
from shared_models.durable import append_whole, sync_folder
from shared_models.errors import CheckpointError, DepositError, DepositUnderWayError, EvidenceError, TransferError
from shared_models.privacy.checkpoint import LONGEST_LINE, CheckpointHistory, SignedCheckpoint, read_checkpoint
from shared_models.privacy.evidence import read_manifest

FOLDER = "deposits"
KEPT_BUNDLES = 3
KEPT_CONFLICTS = 100  # of one hospital: enough to prove it, and no way to fill a disk
LARGEST_CHECKPOINTS = 16 * 2**20  # of one hospital: some 30,000
PART = "bundle.part"
STALLED_S = 60.0


@dataclass
class _Hospital:
    """What is known of one hospital's checkpoints, once they have been read."""

    histories: defaultdict[tuple[str, str], CheckpointHistory] = field(
        default_factory=lambda: defaultdict(CheckpointHistory)
    )
    size: int = 0
    conflicts: int = 0


class Deposits:
    """The deposits in one folder, ``NAME/checkpoints.jsonl`` and ``NAME/bundle-DIGEST.zip``; safe to use from threads.

    Guarantees:
        * When a method that stores returns, what was stored is on the disk; when it raises because of the disk, what
          was there before is there, whole.
        * Checkpoints stay in the order in which they came. One that contradicts an earlier one is refused, and kept.

    Args:
        folder: Holds a folder for each hospital that has left something.
        largest: Bytes of a bundle.
    """

    def __init__(self, folder: Path, *, largest: int) -> None:
        self._folder, self._largest = folder, largest
        self._turn = threading.Lock()
        self._hospitals: dict[str, _Hospital] = {}
        self._bundling: dict[str, Incoming] = {}
        for left in folder.glob(f"*/{PART}"):  # by a process that was killed
            left.unlink(missing_ok=True)

    def largest(self, kind: str) -> int:
        """Most bytes of a deposit.

        Raises:
            DepositError: There are no deposits of this kind.
        """
        if kind not in {"checkpoint", "bundle"}:
            raise DepositError(f"{kind[:40]!r} is nothing that is taken", hint="checkpoint, or bundle.")
        return LONGEST_LINE if kind == "checkpoint" else self._largest

    def keep_checkpoint(self, line: bytes, *, hospital: str, identity: bytes) -> bool:
        """Store a checkpoint. One that states what is known already is not stored again.

        Args:
            line: As it came.
            hospital: Who sent it, by its certificate.
            identity: Its public identity key, by the roster.

        Returns:
            Whether it is new.

        Raises:
            DepositError: It is another hospital's or another key's; there are too many; the disk does not take it.
            ForkedCheckpointError, RolledBackCheckpointError: It contradicts an earlier one.
            CheckpointError: It is no checkpoint.
        """
        checkpoint = read_checkpoint(line)
        _check_owner("checkpoint", checkpoint.hospital, checkpoint.public_key, hospital, identity)
        with self._turn, _explained(hospital):
            known = self._known(hospital)
            try:
                new = known.histories[checkpoint.ledger].take(checkpoint)
            except CheckpointError:
                if known.conflicts < KEPT_CONFLICTS:
                    self._append(hospital, known, checkpoint)
                    known.conflicts += 1
                raise
            if new:
                try:
                    self._append(hospital, known, checkpoint)
                except BaseException:
                    del self._hospitals[hospital]  # what is on the disk counts
                    raise
            return new

    def receive(self, hospital: str) -> "Incoming":
        """A bundle that comes in parts, to be closed; one at a time of each hospital.

        One of which nothing has come for ``STALLED_S`` was broken off, and nobody noticed: the next takes its place.

        Raises:
            DepositUnderWayError: One is coming already.
            DepositError: The disk does not take it.
        """
        with self._turn:
            before = self._bundling.get(hospital)
            if before is not None:
                if time.monotonic() - before.newest < STALLED_S:
                    raise DepositUnderWayError(f"a bundle of {hospital} is coming already", hint="Wait for its end.")
                before.close()
            with _explained(hospital):
                incoming = Incoming(hospital, self._own(hospital), lambda: self._bundling.pop(hospital, None))
            self._bundling[hospital] = incoming
        return incoming

    def files(self) -> Iterator[tuple[str, Path]]:
        """All that is there, by hospital and then by name."""
        for folder in sorted(self._folder.iterdir()) if self._folder.exists() else ():
            for path in sorted(folder.iterdir()):
                if path.name == CHECKPOINTS or BUNDLE.fullmatch(path.name):
                    yield folder.name, path

    def path(self, hospital: str, name: str) -> Path:
        """Where a file lies.

        Raises:
            DepositError: It is not there, or no longer.
        """
        for whose, path in self.files():
            if (whose, path.name) == (hospital, name):
                return path
        raise DepositError(f"{hospital[:70]} has left no {name[:80]} here", hint="List them again; old bundles go.")

    def size(self, hospital: str) -> int:
        """Bytes of whole lines in a hospital's checkpoints."""
        with self._turn:
            return self._known(hospital).size

    def checkpoints(self, hospital: str, after: int, *, at_most: int) -> list[tuple[bytes, int]]:
        """A hospital's checkpoints after a position, each with the position behind it.

        Raises:
            TransferError: The position is not one behind a checkpoint.
        """
        size = self.size(hospital)
        if not 0 <= after <= size:
            raise TransferError("there is no checkpoint before this position", hint="Begin at 0.")
        if after == size:
            return []
        with (self._folder / hospital / CHECKPOINTS).open("rb") as file:
            if after and (file.seek(after - 1), file.read(1))[1] != b"\n":
                raise TransferError("there is no checkpoint before this position", hint="Begin at 0.")
            file.seek(after)
            data = file.read(min(at_most, size - after))
        found = []
        for line in data.splitlines(keepends=True):
            after += len(line)
            if line.endswith(b"\n"):
                found.append((line[:-1], after))
        return found

    def hospitals(self) -> list[str]:
        """Whose checkpoints there are."""
        return [hospital for hospital, path in self.files() if path.name == CHECKPOINTS]

    def _own(self, hospital: str) -> Path:
        folder = self._folder / hospital
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
            sync_folder(self._folder)
        return folder

    def _known(self, hospital: str) -> _Hospital:
        """What is on the disk of a hospital's checkpoints, read once; a last line that a crash cut never was."""
        if hospital not in self._hospitals:
            found, path = _Hospital(), self._folder / hospital / CHECKPOINTS
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                if not line.endswith(b"\n"):
                    break
                found.size += len(line)
                try:
                    checkpoint = read_checkpoint(line[:-1])
                    found.histories[checkpoint.ledger].take(checkpoint)
                except EvidenceError:
                    found.conflicts += 1
            self._hospitals[hospital] = found
        return self._hospitals[hospital]

    def _append(self, hospital: str, known: _Hospital, checkpoint: SignedCheckpoint) -> None:
        line = checkpoint.line() + b"\n"
        if known.size + len(line) > LARGEST_CHECKPOINTS:
            raise DepositError(
                f"there are too many checkpoints of {hospital}", hint="Ask the coordinator to set the old ones aside."
            )
        path = self._own(hospital) / CHECKPOINTS
        fresh = not path.exists()
        append_whole(path, line, size=known.size)
        if fresh:
            sync_folder(path.parent)
        known.size += len(line)


class Incoming:
    """A bundle on its way in: what is not kept when it is closed is gone.

    Args:
        hospital: Who sends it, by its certificate.
        folder: Its own.
        ended: Is told when it is closed.

    Attributes:
        newest: When something came last, on the monotonic clock.
    """

    def __init__(self, hospital: str, folder: Path, ended: Callable[[], object]) -> None:
        self.newest = time.monotonic()
        self._hospital, self._folder, self._ended = hospital, folder, ended
        self._turn, self._digest = threading.Lock(), hashlib.sha256()
        self._file = (folder / PART).open("wb")

    def write(self, data: bytes) -> None:
        """Take the next part.

        Raises:
            DepositError: The disk does not take it, or another bundle has taken its place.
        """
        with self._turn, _explained(self._hospital):
            self._refuse_late()
            self.newest = time.monotonic()
            self._digest.update(data)
            self._file.write(data)

    def keep(self, *, identity: bytes) -> tuple[str, bool]:
        """It is whole: check whose it is, and give it its name. Of a hospital's bundles the newest are kept.

        Args:
            identity: The hospital's public identity key, by the roster.

        Returns:
            Its SHA-256, and whether it is new.

        Raises:
            DepositError: It is another hospital's, or another key's; the disk does not take it; or another bundle has
                taken its place.
            EvidenceError: It is no bundle.
        """
        with self._turn, _explained(self._hospital):
            self._refuse_late()
            self._file.flush()
            os.fsync(self._file.fileno())
            digest = self._digest.hexdigest()
            part, target = self._folder / PART, self._folder / bundle_name(digest)
            manifest = read_manifest(part)
            _check_owner("bundle", manifest.hospital, manifest.public_key, self._hospital, identity)
            new = not target.exists()
            part.replace(target)
            sync_folder(self._folder)
            bundles = [path for path in self._folder.iterdir() if BUNDLE.fullmatch(path.name)]
            for old in sorted(bundles, key=lambda path: path.stat().st_mtime_ns)[:-KEPT_BUNDLES]:
                old.unlink()
            return digest, new

    def _refuse_late(self) -> None:
        if self._file.closed:
            raise DepositError(f"another bundle of {self._hospital} has taken this one's place", hint="Send it again.")

    def close(self) -> None:
        """Let go of it; can be called twice."""
        with self._turn:
            if self._file.closed:
                return
            with suppress(OSError):  # what the disk did not take is thrown away
                self._file.close()
            with suppress(OSError):
                (self._folder / PART).unlink(missing_ok=True)
            self._ended()


@contextmanager
def _explained(hospital: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DepositError(
            f"the deposit of {hospital} cannot be stored: {error.strerror}",
            hint="Nothing was changed. The coordinator's operators must look at its disk; then send it again.",
        ) from None


def _check_owner(what: str, named: str, key: str, hospital: str, identity: bytes) -> None:
    if named != hospital:
        raise DepositError(f"{hospital} cannot leave a {what} of {named}", hint="Each hospital leaves its own.")
    if key != identity.hex():
        raise DepositError(
            f"the {what} is signed by another key than the roster has for {hospital}",
            hint="Join the newest kit, and send it again.",
        )
