"""Checkpoints: signed by the key that they name, and what two of them prove."""

import itertools
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from client.budget import Budget
from shared_models.errors import (
    CheckpointError,
    EvidenceError,
    ForkedCheckpointError,
    RolledBackCheckpointError,
    UnsupportedEvidenceError,
)
from shared_models.identity import public_bytes, sign
from shared_models.privacy.checkpoint import (
    SIGNED,
    Checkpoint,
    CheckpointHistory,
    SignedCheckpoint,
    read_checkpoint,
    sign_checkpoint,
)
from shared_models.privacy.head import head_path, read_head
from shared_models.privacy.ledger import Ledger
from tests.client.test_budget import TERMS

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def made(seq: int, minute: int, fork: int = 0, key: Ed25519PrivateKey = KEY) -> SignedCheckpoint:
    """A checkpoint of a ledger that need not be."""
    unsigned = Checkpoint(
        format="konsil-checkpoint/1",
        hospital="north",
        population="all",
        seq=seq,
        entry_hash=f"{fork:02x}{seq:062x}",
        time=f"2026-01-01T00:{minute:02}:00.000Z",
        public_key=public_bytes(key).hex(),
    )
    return SignedCheckpoint(**unsigned.model_dump(), signature=sign(key, SIGNED, unsigned.payload()).hex())


def test_a_checkpoint_states_the_newest_entry(tmp_path: Path) -> None:
    """As the head file of a real ledger has it; it reads back as it was signed."""
    with Ledger.create(tmp_path / "ledger.sqlite", KEY, hospital="north") as ledger:
        Budget.open(ledger, **TERMS)
        head = ledger.head

    found = sign_checkpoint(
        KEY, read_head(head_path(tmp_path / "ledger.sqlite")).statements[0], hospital="north", population="all"
    )

    assert (found.seq, found.entry_hash, found.ledger) == (1, head, ("north", "all"))
    assert read_checkpoint(found.line()) == found


def test_nothing_is_signed_for_that_the_head_file_does_not_state(tmp_path: Path) -> None:
    """Neither an empty ledger, nor one under another key."""
    with Ledger.create(tmp_path / "ledger.sqlite", KEY, hospital="north") as ledger:
        empty = read_head(head_path(tmp_path / "ledger.sqlite")).statements[0]
        Budget.open(ledger, **TERMS)
    newest = read_head(head_path(tmp_path / "ledger.sqlite")).statements[0]

    for key, statement in ((KEY, empty), (OTHER, newest)):
        with pytest.raises(CheckpointError, match="states no entry under this hospital's key"):
            sign_checkpoint(key, statement, hospital="north", population="all")


@pytest.mark.parametrize("field", sorted(SignedCheckpoint.model_fields))
def test_every_changed_field_is_found(field: str) -> None:
    """One character of each field, the signature's own too; and a field that is missing, or one too many."""
    fields = json.loads(made(7, 3).line())
    value = fields[field]
    changes = [value + 1] if isinstance(value, int) else [value[:-1] + c for c in "0abZ" if not value.endswith(c)]
    without = {name: value for name, value in fields.items() if name != field}

    for broken in [*({**fields, field: change} for change in changes), without, {**fields, "more": 1}]:
        with pytest.raises(EvidenceError):
            read_checkpoint(json.dumps(broken).encode())


@pytest.mark.parametrize("line", [b"", b"{}", b"[" * 4000, b"\xff", b"x" * 5000, b'{"seq": 1e400}'], ids=repr)
def test_what_is_no_checkpoint_is_said_so(line: bytes) -> None:
    """Whatever a stranger sends: a named error."""
    with pytest.raises(CheckpointError):
        read_checkpoint(line)


def test_a_later_format_is_refused_by_name() -> None:
    """Not taken for damage."""
    later = made(7, 3).line().replace(b"konsil-checkpoint/1", b"konsil-checkpoint/2")

    with pytest.raises(UnsupportedEvidenceError, match="konsil-checkpoint/2"):
        read_checkpoint(later)


# what two of them prove


def test_two_hashes_of_one_entry_are_a_fork() -> None:
    """In either order."""
    for first, second in itertools.permutations([made(5, 1), made(5, 2, fork=1)]):
        history = CheckpointHistory()
        assert history.take(first)
        with pytest.raises(ForkedCheckpointError, match="two hashes for all's ledger entry 5"):
            history.take(second)


def test_fewer_entries_later_are_a_rollback() -> None:
    """In either order: what counts is when they were signed, not when they came."""
    for first, second in itertools.permutations([made(9, 1), made(4, 2)]):
        history = CheckpointHistory()
        assert history.take(first)
        with pytest.raises(RolledBackCheckpointError, match=r"00:01:00.* has 9 entries, and on .*00:02:00.* it has 4"):
            history.take(second)


def test_a_checkpoint_that_comes_late_accuses_nobody() -> None:
    """Whoever forwards checkpoints can delay them, and cannot make a rollback of it."""
    history = CheckpointHistory()

    assert [history.take(made(seq, seq)) for seq in (9, 4, 6, 9)] == [True, True, True, False]


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_an_honest_history_never_contradicts_itself(lengths: list[int], order: object) -> None:
    """A ledger that only grows, whatever is stated twice, in whatever order its checkpoints arrive: no false alarm."""
    seqs = list(itertools.accumulate(lengths, initial=1))
    checkpoints = [_unsigned(seq, minute) for minute, seq in enumerate(seqs)]
    order.shuffle(checkpoints)  # type: ignore[attr-defined]
    history = CheckpointHistory()

    assert sum(history.take(checkpoint) for checkpoint in checkpoints) == len(set(seqs))


@given(
    lengths=st.lists(st.integers(1, 3), min_size=2, max_size=10),
    back=st.integers(1, 30),
    order=st.randoms(use_true_random=False),
)
def test_a_ledger_that_lost_entries_is_found_in_any_order(lengths: list[int], back: int, order: object) -> None:
    """After the restored backup at least one more is signed; in whatever order they come, something is refused."""
    seqs = list(itertools.accumulate(lengths, initial=1))
    restored = max(1, seqs[-1] - back)
    checkpoints = [_unsigned(seq, minute) for minute, seq in enumerate([*seqs, restored])]
    order.shuffle(checkpoints)  # type: ignore[attr-defined]
    history, refused = CheckpointHistory(), 0

    for checkpoint in checkpoints:
        try:
            history.take(checkpoint)
        except RolledBackCheckpointError:
            refused += 1

    assert refused >= 1


def _unsigned(seq: int, minute: int) -> SignedCheckpoint:
    """A checkpoint whose signature nobody asks for: histories are told of verified ones only."""
    return made(1, 0).model_copy(
        update={"seq": seq, "entry_hash": f"{seq:064x}", "time": f"2026-01-01T00:{minute:02}:00.000Z"}
    )
