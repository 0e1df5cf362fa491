"""A ledger against the checkpoints that its hospital signed: what is missing or replaced is found, nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.checkpoints import check_checkpoints, read_checkpoints
from auditor.record import HospitalRecord, Key, Line
from shared_models.errors import EvidenceError
from shared_models.identity import fingerprint, public_bytes, sign
from shared_models.privacy.checkpoint import SIGNED, Checkpoint, SignedCheckpoint
from shared_models.privacy.entries import BudgetTerms

KEY, NEXT, STRANGER = (Ed25519PrivateKey.generate() for _ in range(3))
ENTRIES, ROTATED, PACKED = 20, 12, "2026-01-01T00:30:00.000Z"  # NEXT signs behind entry 12; packed in minute 30


def record(**changes: object) -> HospitalRecord:
    """A ledger of twenty entries, one a minute, whose key changed once."""
    lines = tuple(
        Line(seq, f"2026-01-01T00:{seq:02}:00.000Z", "charge", f"{seq:064x}") for seq in range(1, ENTRIES + 1)
    )
    whole = HospitalRecord(
        source=Path("north.zip"),
        hospital="north",
        population="all",
        terms=BudgetTerms(epsilon=1.0, delta=1e-4, order=8, public_size=100),
        packed=PACKED,
        lines=lines,
        keys=(Key(name_of(KEY), 1), Key(name_of(NEXT), ROTATED)),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def name_of(key: Ed25519PrivateKey) -> str:
    return fingerprint(public_bytes(key))


def made(
    seq: int,
    *,
    minute: int | None = None,
    entry_hash: str | None = None,
    key: Ed25519PrivateKey | None = None,
    **who: str,
) -> SignedCheckpoint:
    """A checkpoint of that ledger, signed in the entry's minute by the key in force, unless told otherwise."""
    key = key or (KEY if seq < ROTATED else NEXT)
    unsigned = Checkpoint(
        format="konsil-checkpoint/1",
        hospital=who.get("hospital", "north"),
        population=who.get("population", "all"),
        seq=seq,
        entry_hash=entry_hash or f"{seq:064x}",
        time=f"2026-01-01T00:{seq if minute is None else minute:02}:00.000Z",
        public_key=public_bytes(key).hex(),
    )
    return SignedCheckpoint(**unsigned.model_dump(), signature=sign(key, SIGNED, unsigned.payload()).hex())


def codes(hospital: HospitalRecord, *checkpoints: SignedCheckpoint) -> list[tuple[str, int | None]]:
    return [(finding.code, finding.entry) for finding in check_checkpoints(hospital, checkpoints)]


def test_an_honest_ledger_has_everything_that_was_signed() -> None:
    """Of every entry a checkpoint, before and after the key changed, in any order: no finding."""
    everything = [made(seq) for seq in range(1, ENTRIES + 1)]

    assert codes(record(), *everything) == []
    assert codes(record(), *reversed(everything)) == []
    assert codes(record(packed=None), *everything) == []


def test_an_entry_that_was_replaced_is_found() -> None:
    """The ledger has another one in the place that was signed for."""
    assert codes(record(), made(5), made(7, entry_hash="f" * 64), made(9)) == [("checkpoint-fork", 7)]


def test_entries_that_were_cut_off_are_found() -> None:
    """Signed before the evidence was packed, and not in it."""
    short = record(lines=record().lines[:15])

    assert codes(short, made(14), made(18)) == [("checkpoint-cut", 18)]


def test_a_ledger_that_grew_since_is_only_noted() -> None:
    """Signed after the evidence was packed: the newest is named, once. A ledger file says nothing of when."""
    later = [made(seq, minute=seq + 20) for seq in (21, 22, 23)]

    assert codes(record(), made(20), *later) == [("checkpoint-newer", 23)]
    assert codes(record(packed=None), *later) == [("checkpoint-newer", 23)]


@pytest.mark.parametrize(
    ("checkpoint", "why"),
    [
        (made(5, key=STRANGER), "a stranger's"),
        (made(5, key=NEXT), "a key that came later"),
        (made(15, key=KEY), "a key that was given up"),
        (made(25, key=KEY, minute=40), "a key that was given up, for an entry to come"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_checkpoint_by_another_key_is_found(checkpoint: SignedCheckpoint, why: str) -> None:
    """Only the key in force behind an entry can have signed for it; it counts for nothing else."""
    assert codes(record(), checkpoint) == [("checkpoint-foreign", checkpoint.seq)], why


def test_a_key_that_the_evidence_cannot_know_is_no_stranger() -> None:
    """The ledger may have gone to another key since it was packed."""
    assert codes(record(), made(25, key=STRANGER, minute=40)) == [("checkpoint-newer", 25)]


def test_checkpoints_against_each_other_are_found_whatever_the_ledger_says() -> None:
    """A fork and a rollback beyond its end."""
    beyond = [made(25, minute=40), made(25, minute=41, entry_hash="f" * 64), made(22, minute=42)]

    found = codes(record(), *beyond)

    assert found == [("checkpoint-fork", 25), ("checkpoint-rollback", 22), ("checkpoint-newer", 25)]


def test_other_ledgers_are_left_out() -> None:
    """Of another hospital, or of another population of this one."""
    others = [made(5, hospital="south", entry_hash="f" * 64), made(5, population="children", entry_hash="f" * 64)]

    assert codes(record(), *others) == []


def test_a_file_of_checkpoints_is_read_line_by_line(tmp_path: Path) -> None:
    """What is no checkpoint is named by its line: damage, a cut, a line without an end."""
    path, lines = tmp_path / "checkpoints.jsonl", [made(seq).line() for seq in (1, 2, 3)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert [checkpoint.seq for checkpoint in read_checkpoints(path)] == [1, 2, 3]

    changed = json.loads(lines[1]) | {"seq": 9}
    for number, content in (
        (2, lines[0] + b"\n" + json.dumps(changed).encode() + b"\n"),
        (2, lines[0] + b"\n" + lines[1]),
        (1, b"x" * 10_000_000),
    ):
        path.write_bytes(content)
        with pytest.raises(EvidenceError, match=f"line {number}"):
            list(read_checkpoints(path))
    with pytest.raises(EvidenceError, match="cannot be read"):
        list(read_checkpoints(tmp_path / "nothing"))
