"""A ledger's key can be rotated within the chain: the old key signs the new one in, and the new one agrees."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.recompute import report_budget
from auditor.verify import verify_ledger
from client.budget import Budget
from shared_models.errors import LedgerError
from shared_models.identity import create_key, load_key, public_bytes, sign
from shared_models.privacy.entries import Chain, Entry, Kind, canonical_json, possession, verify_head
from shared_models.privacy.head import head_path, read_head
from shared_models.privacy.ledger import Ledger, read_ledger, verified, verify_entries
from tests.privacy.test_ledger import CHARGES, KEY, OTHER_KEY, PUBLIC, charge, filled

OTHER = public_bytes(OTHER_KEY)
THIRD_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(2, 34)))
LENGTH = CHARGES + 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return filled(tmp_path)


@pytest.fixture
def rotated(path: Path) -> Path:
    """Signed by KEY up to its rotation, entry 9, and by OTHER_KEY in entry 10."""
    with Ledger.open(path, KEY) as ledger:
        ledger.rotate(OTHER_KEY)
        charge(ledger, CHARGES + 1)
    return path


def test_the_new_key_signs_from_the_next_entry_on(rotated: Path) -> None:
    """And the chain is one: the auditor follows it from the first key to the last."""
    chain = verify_entries(read_ledger(rotated), PUBLIC)

    assert chain.keys == [PUBLIC, OTHER]
    assert [entry.kind for entry in read_ledger(rotated)[-2:]] == ["key-rotated", "charge"]
    verify_head(read_head(head_path(rotated)), chain)
    assert read_head(head_path(rotated)).statements[0].signed_by(OTHER)


@pytest.mark.parametrize("trusted", [PUBLIC, OTHER], ids=["old", "new"])
def test_an_auditor_who_trusts_either_key_can_verify(rotated: Path, trusted: bytes) -> None:
    """Old and new vouch for each other; a third vouches for nothing."""
    verified = verify_ledger(rotated, [trusted])

    assert (verified.entries, verified.rotations) == (LENGTH + 2, 1)
    with pytest.raises(LedgerError, match="another key"):
        verify_ledger(rotated, [public_bytes(THIRD_KEY)])


def test_the_old_key_opens_a_rotated_ledger_no_more(rotated: Path) -> None:
    """And is told why."""
    with pytest.raises(LedgerError, match="the ledger's key was rotated"):
        Ledger.open(rotated, KEY)
    with pytest.raises(LedgerError, match="entry 1: it is not signed by"):
        Ledger.open(rotated, THIRD_KEY)
    with pytest.raises(LedgerError, match="the ledger's key was rotated"):
        list(verified(rotated, PUBLIC))


def test_the_new_key_opens_it_and_goes_on(rotated: Path) -> None:
    """Again and again, with further rotations; what was spent stays spent."""
    with Ledger.open(rotated, OTHER_KEY) as ledger:
        assert ledger.public_key == OTHER
        assert Budget(ledger).spent("heart") == [ledger.entries()[2].mechanism] * (CHARGES + 1)
        ledger.rotate(THIRD_KEY)
    with Ledger.open(rotated, THIRD_KEY) as ledger:
        charge(ledger, CHARGES + 2)

    assert verify_ledger(rotated, [PUBLIC]).rotations == 2
    assert report_budget(read_ledger(rotated)).spent.charges == CHARGES + 2


def test_a_key_never_comes_back(rotated: Path) -> None:
    """It was retired for a reason. Nothing is written, and the ledger goes on."""
    with Ledger.open(rotated, OTHER_KEY) as ledger:
        for key in (KEY, OTHER_KEY):
            with pytest.raises(LedgerError, match="in use before"):
                ledger.rotate(key)
        charge(ledger, CHARGES + 2)


def test_no_entry_alone_rotates_a_key(path: Path) -> None:
    """Else a ledger could be handed to a key of somebody who never agreed."""
    with Ledger.open(path, KEY) as ledger:
        with pytest.raises(LedgerError, match="not rotated by an entry alone"):
            ledger.append("key-rotated", new_public_key=OTHER.hex(), new_key_signature="00" * 64)
        charge(ledger, CHARGES + 1)


def test_an_empty_ledger_has_no_key_to_rotate(tmp_path: Path) -> None:
    """Its first entry names the key that the chain starts with."""
    with (
        Ledger.create(tmp_path / "l", KEY, hospital="north") as ledger,
        pytest.raises(LedgerError, match="the ledger is empty"),
    ):
        ledger.rotate(OTHER_KEY)


def forged(after: Entry, kind: Kind, key: Ed25519PrivateKey, **fields: object) -> Entry:
    """An entry that follows another one, made without a ledger."""
    fixed = {"seq": after.seq + 1, "previous_hash": after.hash, "time": after.time, "hospital": after.hospital}
    unsigned = Entry.model_validate({"kind": kind, **fixed, **fields, "signature": "0" * 128})
    return unsigned.model_copy(update={"signature": sign(key, "ledger-entry", unsigned.canonical).hex()})


def handed_over(after: Entry, *, seq: int | None = None, proof_by: Ed25519PrivateKey = OTHER_KEY) -> Entry:
    statement = possession("north", seq=seq or after.seq + 1, previous_hash=after.hash, new_public_key=OTHER)
    proof = sign(proof_by, "ledger-key", statement)
    return forged(after, "key-rotated", KEY, new_public_key=OTHER.hex(), new_key_signature=proof.hex())


def test_what_rotate_writes_can_be_made_by_hand(path: Path) -> None:
    """So the refusals below are for what they differ in."""
    entries = read_ledger(path)

    verify_entries([*entries, handed_over(entries[-1])], PUBLIC)


def test_a_key_that_did_not_agree_or_agreed_elsewhere_is_refused(path: Path) -> None:
    """Its own signature, at this place of this chain."""
    entries = read_ledger(path)

    for entry in (handed_over(entries[-1], proof_by=THIRD_KEY), handed_over(entries[-1], seq=4)):
        with pytest.raises(LedgerError, match="entry 9: the new key did not agree"):
            verify_entries([*entries, entry], PUBLIC)


def test_after_a_rotation_the_old_key_signs_nothing(rotated: Path) -> None:
    """Whoever stole the retired key cannot continue, nor rewrite, the chain."""
    entries = read_ledger(rotated)
    late = forged(entries[-2], "checkpoint", KEY)

    with pytest.raises(LedgerError, match="entry 10: it is not signed by"):
        verify_entries([*entries[:-1], late], PUBLIC)


def test_a_rotation_that_was_cut_off_with_its_entry_is_noticed(path: Path) -> None:
    """The head file is signed by the new key, which the shorter chain does not know; we do."""
    backup = path.read_bytes()
    with Ledger.open(path, KEY) as ledger:
        ledger.rotate(OTHER_KEY)
    path.write_bytes(backup)

    for key in (KEY, OTHER_KEY):
        with pytest.raises(LedgerError, match=r"ends at entry 8, but its head|head file is not signed"):
            Ledger.open(path, key)
    with pytest.raises(LedgerError, match="head file is not signed"):
        verify_ledger(path, [PUBLIC])


ROTATOR = """
import os, signal, sys
from pathlib import Path
from shared_models.identity import load_key
from shared_models.privacy.head import HeadWriter
from shared_models.privacy.ledger import Ledger

def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

old, new = (load_key(Path(path)) for path in sys.argv[2:4])
ledger = Ledger.open(Path(sys.argv[1]), old)
match sys.argv[4]:
    case "before the commit":
        ledger._database.set_trace_callback(lambda statement: die() if statement.startswith("COMMIT") else None)
    case "before the head file":
        HeadWriter.write = die
    case "within the head file":
        pwrite = os.pwrite
        os.pwrite = lambda file, slot, place: (pwrite(file, slot[:80], place), die())
ledger.rotate(new)
"""


@pytest.mark.parametrize("moment", ["before the commit", "before the head file", "within the head file"])
def test_a_rotation_killed_at_each_step_leaves_exactly_one_key_in_force(tmp_path: Path, moment: str) -> None:
    """The old one before the commit, the new one after it."""
    old, new = create_key(tmp_path / "old"), create_key(tmp_path / "new")
    path = filled(tmp_path, old)
    arguments = [str(path), str(tmp_path / "old"), str(tmp_path / "new"), moment]
    child = subprocess.run([sys.executable, "-c", ROTATOR, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL

    right, wrong = (old, new) if moment == "before the commit" else (new, old)
    with pytest.raises(LedgerError):
        Ledger.open(path, wrong)
    with Ledger.open(path, load_key(tmp_path / ("old" if right is old else "new"))) as ledger:
        charge(ledger, CHARGES + 1)
    verify_ledger(path, [public_bytes(old)])


def test_entries_are_found_by_their_hash(rotated: Path) -> None:
    """Every one, and no other; also while the ledger is in use, and after it was reopened."""
    with Ledger.open(rotated, OTHER_KEY) as ledger:
        new = charge(ledger, CHARGES + 2)
        for entry in (*ledger.entries(), new):
            assert ledger.find(entry.hash) == entry
        assert ledger.find("ab" * 32) is None
        assert ledger.first == ledger.entries()[0]
        assert ledger.seq == new.seq


def test_an_entry_is_found_by_an_index(rotated: Path) -> None:
    """Asking for a receipt must not take longer with every round."""
    with closing(sqlite3.connect(rotated)) as database:
        (plan,) = database.execute(
            "EXPLAIN QUERY PLAN SELECT body FROM entries WHERE hash = ?", (bytes(32),)
        ).fetchall()

    assert "USING INDEX" in plan[3]


def test_an_index_that_was_changed_is_noticed(rotated: Path) -> None:
    """An entry that is not found any more would look like a rollback; or hide one."""
    entry = read_ledger(rotated)[4]
    content = bytearray(rotated.read_bytes())
    needle, body = bytes.fromhex(entry.hash), entry.canonical
    places = [at for at in range(len(content)) if content.startswith(needle, at)]
    in_index = next(at for at in places if body not in content[at - 2000 : at])
    content[in_index] ^= 255
    rotated.write_bytes(content)

    for look in (lambda: Ledger.open(rotated, OTHER_KEY), lambda: verify_ledger(rotated)):
        with pytest.raises(LedgerError, match="malformed"):
            look()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("population-changed", {"population": "all"}),
        ("population-changed", {"population_fingerprint": "ab" * 32}),
        ("plan-approved", {"approved_by": "somebody"}),
        ("checkpoint", {"evidence_digest": "no digest"}),
        ("checkpoint", {"approval": "ab" * 32}),
    ],
)
def test_fields_are_what_their_kind_needs(path: Path, kind: Kind, fields: dict[str, object]) -> None:
    """A population that changed says which one and how it looks now."""
    with Ledger.open(path, KEY) as ledger, pytest.raises(LedgerError, match="no valid entry"):
        ledger.append(kind, **fields)


def test_fields_that_are_left_out_change_no_hash(path: Path) -> None:
    """An older ledger's entries stay what they were."""
    with Ledger.open(path, KEY) as ledger:
        entry = ledger.append("checkpoint", evidence_digest="ab" * 32)

    assert b"approv" not in entry.canonical
    assert b'"evidence_digest":"abab' in entry.canonical
    assert read_ledger(path)[-1] == entry
    assert entry.canonical == canonical_json(
        {
            "evidence_digest": "ab" * 32,
            "hospital": "north",
            "kind": "checkpoint",
            "previous_hash": entry.previous_hash,
            "seq": LENGTH + 1,
            "time": entry.time,
        }
    )


def test_times_never_go_back_in_a_chain_that_holds(path: Path) -> None:
    """Genuinely signed, but earlier than the entry before."""
    entries = read_ledger(path)
    early = forged(entries[-1], "checkpoint", KEY, time="2020-01-01T00:00:00.000Z")

    with pytest.raises(LedgerError, match=r"entry 9: its time, 2020-01-01T00:00:00.000Z, is before"):
        verify_entries([*entries, early], PUBLIC)


def test_a_chain_remembers_its_tail_only(path: Path) -> None:
    """However many entries it has followed."""
    chain = Chain()
    for entry in read_ledger(path):
        chain.follow(entry)

    assert len(chain._tail) == 3
    assert chain.seq == LENGTH
