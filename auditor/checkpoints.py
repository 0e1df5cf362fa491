"""Checkpoints against each other, and against the ledger that a hospital shows: nothing that was signed may be missing.

The rules are ``CheckpointHistory``'s; here they become findings.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from auditor.findings import Finding
from shared_models.errors import CheckpointError, EvidenceError, ForkedCheckpointError, RolledBackCheckpointError
from shared_models.identity import fingerprint
from shared_models.privacy.checkpoint import LONGEST_LINE, CheckpointHistory, SignedCheckpoint, read_checkpoint

if TYPE_CHECKING:
    from auditor.record import HospitalRecord  # brings dp-accounting, which takes seconds


def read_checkpoints(path: Path) -> Iterator[SignedCheckpoint]:
    """The checkpoints in a file of lines, each signed by the key that it names; in bounded memory.

    Raises:
        EvidenceError: The file cannot be read; the number of the line that is no checkpoint, and why.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 2):
                number += 1
                if not line.endswith(b"\n"):
                    raise EvidenceError(f"{path}, line {number} was cut, or is too long", hint="Fetch it again.")
                try:
                    yield read_checkpoint(line[:-1])
                except CheckpointError as error:
                    raise EvidenceError(f"{path}, line {number}: {error}", hint=error.hint) from None
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read: {error.strerror}", hint="Check the path.") from None


def contradiction(checkpoint: SignedCheckpoint, error: CheckpointError) -> Finding:
    """What a checkpoint was refused for by a history, as a finding."""
    codes = {ForkedCheckpointError: "checkpoint-fork", RolledBackCheckpointError: "checkpoint-rollback"}
    code = codes.get(type(error), "checkpoint-foreign")
    return Finding(code=code, party=checkpoint.hospital, what=str(error), entry=checkpoint.seq)


def check_checkpoints(hospital: "HospitalRecord", checkpoints: Iterable[SignedCheckpoint]) -> list[Finding]:
    """Compare a hospital's ledger with the checkpoints that it signed over time.

    Guarantees:
        * An entry that the hospital signed for is in the ledger, with this very hash, or there is a finding.
        * Two checkpoints that contradict each other are found, whatever the ledger says.
        * A checkpoint counts only if it is signed by the key that was in force behind its entry.

    Args:
        hospital: Its evidence, as far as it could be read.
        checkpoints: In any order; those about other ledgers are left out.
    """
    hashes = {line.seq: line.hash for line in hospital.lines}
    history, found = CheckpointHistory(), list[Finding]()
    newer: SignedCheckpoint | None = None
    for checkpoint in checkpoints:
        if checkpoint.ledger != (hospital.hospital, hospital.population):
            continue
        if (foreign := _foreign(hospital, checkpoint)) is not None:
            found.append(foreign)
            continue
        try:
            history.take(checkpoint)
        except CheckpointError as error:
            found.append(contradiction(checkpoint, error))
        ours = hashes.get(checkpoint.seq)
        if ours is None and hospital.packed is not None and checkpoint.time <= hospital.packed:
            text = f"the evidence of {hospital.packed} ends at entry {len(hashes)}; signed before: {checkpoint}"
            found.append(_finding("checkpoint-cut", checkpoint, text))
        elif ours is None:
            newer = checkpoint if newer is None or newer.seq < checkpoint.seq else newer
        elif ours != checkpoint.entry_hash:
            text = f"the ledger has {ours[:12]}… as entry {checkpoint.seq}; signed was {checkpoint}"
            found.append(_finding("checkpoint-fork", checkpoint, text))
    if newer is not None:
        text = f"the evidence ends at entry {len(hashes)}; signed since: {newer}"
        found.append(_finding("checkpoint-newer", newer, text))
    return found


def _foreign(hospital: "HospitalRecord", checkpoint: SignedCheckpoint) -> Finding | None:
    in_force = [key.fingerprint for key in hospital.keys if key.entry <= checkpoint.seq]
    named = fingerprint(bytes.fromhex(checkpoint.public_key))
    beyond = checkpoint.seq > len(hospital.lines)  # the ledger may have gone to another key since
    if named in in_force[-1:] or (beyond and named not in in_force[:-1]):
        return None
    text = f"{checkpoint} is signed by {named[:19]}…, which was not the ledger's key behind entry {checkpoint.seq}"
    return _finding("checkpoint-foreign", checkpoint, text)


def _finding(code: str, about: SignedCheckpoint, what: str) -> Finding:
    return Finding(code=code, party=about.hospital, what=what, entry=about.seq)
