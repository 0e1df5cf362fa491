"""A thousand ways to change a ledger, all found; ledgers that nobody changed, none suspected."""

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.verify import verify_ledger
from shared_models.errors import LedgerError
from shared_models.identity import public_bytes, sign
from shared_models.privacy.entries import Entry, parse_entry
from shared_models.privacy.head import SLOT_BYTES, HeadWriter, create_head, head_path
from shared_models.privacy.ledger import GENESIS, Ledger, Reserved, StudyLimit, read_ledger
from tests.privacy.test_ledger import MECHANISM, STUDY, charge, open_budget

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(8)]
NORTH, NORTH_NEXT, SOUTH, THIEF, *SPARE = KEYS
ROTATED_AT, LENGTH = 9, 16
EACH = 40  # mutations of each of 26 kinds


@dataclass(frozen=True)
class State:
    """All that lies on a hospital's disk: rows of (seq, body, signature, hash), and the head file."""

    rows: tuple[tuple[int, bytes, bytes, bytes], ...]
    head: bytes

    def entry(self, seq: int) -> Entry:
        """One entry, by its number."""
        return parse_entry(*self.rows[seq - 1][1:3])


@dataclass(frozen=True)
class World:
    """Two hospitals' disks, and what one of them looked like after each of its entries."""

    template: Path  # an empty ledger's file
    north: State
    south: State
    past: tuple[State, ...]


Mutation = Callable[[World, random.Random], State]


def state(path: Path) -> State:
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT seq, body, signature, hash FROM entries ORDER BY seq").fetchall()
    return State(tuple(rows), head_path(path).read_bytes())


def history(path: Path, hospital: str, keys: list[Ed25519PrivateKey]) -> list[State]:
    """A ledger of LENGTH entries whose key is rotated once; the disk after each of them."""
    states = []
    with Ledger.create(path, keys[0], hospital=hospital) as ledger:
        open_budget(ledger)
        states.append(state(path))
        ledger.append(
            "plan-approved",
            **STUDY,
            population="all",
            limit=StudyLimit(epsilon=1.0, delta=1e-4),
            reservation=(Reserved(mechanism=MECHANISM, charges=20),),
        )
        states.append(state(path))
        for number in range(3, LENGTH + 1):
            ledger.rotate(keys[1]) if number == ROTATED_AT else charge(ledger, number)
            states.append(state(path))
    return states


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    past = history(folder / "north", "north", [NORTH, NORTH_NEXT])
    south = history(folder / "south", "south", [SOUTH, SPARE[0]])[-1]
    Ledger.create(folder / "template", NORTH, hospital="north").close()
    return World(folder / "template", past[-1], south, tuple(past))


def row(entry: Entry) -> tuple[int, bytes, bytes, bytes]:
    return entry.seq, entry.canonical, bytes.fromhex(entry.signature), bytes.fromhex(entry.hash)


def signed(entry: Entry, key: Ed25519PrivateKey) -> Entry:
    """The entry's content under a new signature."""
    content = Entry.model_validate(entry.model_dump(exclude={"signature"}) | {"signature": "0" * 128})
    return content.model_copy(update={"signature": sign(key, "ledger-entry", content.canonical).hex()})


def chained(entries: list[Entry], key: Ed25519PrivateKey, start: int) -> tuple[tuple[int, bytes, bytes, bytes], ...]:
    """Entries from number ``start`` on made to follow each other again, signed by one key."""
    done = entries[: start - 1]
    for entry in entries[start - 1 :]:
        previous = done[-1].hash if done else GENESIS
        done.append(signed(entry.model_copy(update={"seq": len(done) + 1, "previous_hash": previous}), key))
    return tuple(row(entry) for entry in done)


def entries_of(world: World) -> list[Entry]:
    return [world.north.entry(seq) for seq in range(1, LENGTH + 1)]


def changed(entry: Entry, draw: random.Random) -> Entry:
    """Another content, of the kind that somebody would want."""
    field, value = draw.choice(
        [
            ("time", "2099-01-01T00:00:00.000Z"),
            ("hospital", "south"),
            ("study", "another"),
            ("round", 900_000 + draw.randrange(1000)),
            ("plan_digest", draw.randbytes(32).hex()),
            ("mechanism", MECHANISM.model_copy(update={"noise_multiplier": 9.0 + draw.random()})),
            ("population", "others"),
            ("software_digest", draw.randbytes(32).hex()),
        ]
    )
    return entry.model_copy(update={field: value})


def with_row(world: World, seq: int, new: tuple[int, bytes, bytes, bytes]) -> State:
    rows = list(world.north.rows)
    rows[seq - 1] = new
    return replace(world.north, rows=tuple(rows))


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def renumbered(rows: list[tuple[int, bytes, bytes, bytes]]) -> tuple[tuple[int, bytes, bytes, bytes], ...]:
    """Without a gap in the table, whatever the bodies say; hashes made unique, because the table wants that."""
    return tuple((seq, body, signature, bytes([seq]) * 32) for seq, (_, body, signature, _) in enumerate(rows, start=1))


def rewrite(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    entry = changed(world.north.entry(seq), draw)
    return with_row(world, seq, row(entry.model_copy(update={"software_digest": draw.randbytes(32).hex()})))


def rewrite_and_chain(world: World, draw: random.Random, key: Ed25519PrivateKey, first: int, last: int) -> State:
    """One entry changed, it and all later ones signed again by somebody who has this key."""
    entries, seq = entries_of(world), draw.randint(first, last)
    entries[seq - 1] = changed(entries[seq - 1], draw).model_copy(update={"software_digest": draw.randbytes(32).hex()})
    return replace(world.north, rows=chained(entries, key, seq))


def rewrite_with_own_key(world: World, draw: random.Random) -> State:
    """Even the hospital itself cannot change what its head file knows."""
    return rewrite_and_chain(world, draw, NORTH_NEXT, ROTATED_AT + 1, LENGTH)


def delete(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    return replace(world.north, rows=world.north.rows[: seq - 1] + world.north.rows[seq:])


def delete_and_renumber(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH - 1)
    return replace(world.north, rows=renumbered([*world.north.rows[: seq - 1], *world.north.rows[seq:]]))


def truncate(world: World, draw: random.Random) -> State:
    return replace(world.north, rows=world.north.rows[: draw.randrange(LENGTH)])


def truncate_and_damage_head(world: World, draw: random.Random) -> State:
    """The statement about the missing entry made unreadable too."""
    slot = LENGTH % 2
    head = bytearray(world.north.head)
    head[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = draw.randbytes(SLOT_BYTES)
    return State(world.north.rows[: draw.choice([LENGTH - 1, draw.randrange(LENGTH)])], bytes(head))


def insert(world: World, draw: random.Random) -> State:
    seq, copied = draw.randint(1, LENGTH), draw.randint(1, LENGTH)
    rows = list(world.north.rows)
    return replace(world.north, rows=renumbered([*rows[:seq], rows[copied - 1], *rows[seq:]]))


def insert_signed_by_a_thief(world: World, draw: random.Random) -> State:
    entries, seq = entries_of(world), draw.randint(2, LENGTH)
    entries.insert(seq - 1, changed(entries[draw.randint(3, 7)], draw))
    return replace(world.north, rows=chained(entries, THIEF, seq))


def append_replayed(world: World, draw: random.Random) -> State:
    old = draw.choice(world.north.rows)
    return replace(world.north, rows=renumbered([*world.north.rows, old]))


def reorder(world: World, draw: random.Random) -> State:
    rows, (one, other) = list(world.north.rows), draw.sample(range(LENGTH), 2)
    rows[one], rows[other] = rows[other], rows[one]
    return replace(world.north, rows=renumbered(rows))


def shuffle(world: World, draw: random.Random) -> State:
    rows = list(world.north.rows)
    while rows == list(world.north.rows):
        draw.shuffle(rows)
    return replace(world.north, rows=renumbered(rows))


def sign_with_another_key(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    return with_row(world, seq, row(signed(world.north.entry(seq), draw.choice([THIEF, SOUTH]))))


def sign_with_the_retired_key(world: World, draw: random.Random) -> State:
    seq = draw.randint(ROTATED_AT + 1, LENGTH)
    return with_row(world, seq, row(signed(world.north.entry(seq), NORTH)))


def sign_everything_with_another_key(world: World, draw: random.Random) -> State:
    """A whole forged ledger, with a head file to match, that names the forger's key."""
    entries = [entry for entry in entries_of(world) if entry.kind != "key-rotated"]
    entries[0] = entries[0].model_copy(update={"public_key": public_bytes(THIEF).hex()})
    entries = entries[: draw.randint(1, len(entries))]
    rows = chained(entries, THIEF, 1)
    return State(rows, head_for(world, THIEF, rows))


def forge_a_rotation(world: World, draw: random.Random) -> State:
    """The thief signs itself in as the next key, and goes on with a head file of its own."""
    entries, seq = entries_of(world), draw.randint(2, LENGTH)
    entries[seq - 1] = entries[ROTATED_AT - 1].model_copy(
        update={"new_public_key": public_bytes(THIEF).hex(), "new_key_signature": draw.randbytes(64).hex()}
    )
    rows = chained(entries, THIEF, seq)
    return State(rows, head_for(world, THIEF, rows))


def head_for(world: World, key: Ed25519PrivateKey, rows: tuple[tuple[int, bytes, bytes, bytes], ...]) -> bytes:
    path = world.template.with_name("forged.head")
    create_head(path, key, genesis=GENESIS)
    with closing(HeadWriter(path)) as head:
        for seq, _, _, entry_hash in rows[-2:]:
            head.write(key, seq=seq, entry_hash=entry_hash.hex())
    return path.read_bytes()


def swap_with_another_hospital(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    return with_row(world, seq, world.south.rows[seq - 1])


def continue_with_another_hospital(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH - 1)
    return State(world.north.rows[:seq] + world.south.rows[seq:], draw.choice([world.north.head, world.south.head]))


def swap_ledgers(world: World, draw: random.Random) -> State:
    """The whole of it, with or without its head file."""
    return replace(world.south, head=draw.choice([world.north.head, world.south.head]))


def flip_in_a_body(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    number, body, signature, entry_hash = world.north.rows[seq - 1]
    return with_row(world, seq, (number, flipped(body, draw), signature, entry_hash))


def flip_in_a_signature(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    number, body, signature, entry_hash = world.north.rows[seq - 1]
    return with_row(world, seq, (number, body, flipped(signature, draw), entry_hash))


def flip_in_a_hash(world: World, draw: random.Random) -> State:
    seq = draw.randint(1, LENGTH)
    number, body, signature, entry_hash = world.north.rows[seq - 1]
    return with_row(world, seq, (number, body, signature, flipped(entry_hash, draw)))


def flip_in_the_head(world: World, draw: random.Random) -> State:
    return replace(world.north, head=flipped(world.north.head, draw))


def restore_an_old_head(world: World, draw: random.Random) -> State:
    return replace(world.north, head=draw.choice(world.past[:-2]).head)


def restore_one_slot(world: World, draw: random.Random) -> State:
    """Half of an old head file, half of the new one; older than the one that a crash before the last write leaves."""
    old, slot = draw.choice(world.past[:-3]).head, draw.randrange(2)
    parts = [world.north.head[:SLOT_BYTES], world.north.head[SLOT_BYTES:]]
    parts[slot] = old[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
    return replace(world.north, head=b"".join(parts))


def restore_an_old_ledger(world: World, draw: random.Random) -> State:
    return replace(world.north, rows=draw.choice(world.past[:-1]).rows)


def notation(world: World, draw: random.Random) -> State:
    """The same content in other bytes."""
    seq = draw.randint(1, LENGTH)
    number, body, signature, entry_hash = world.north.rows[seq - 1]
    other = draw.choice([body + b" ", b" " + body, body.replace(b",", b", ", 1), body[:-1] + b',"x":null}'])
    return with_row(world, seq, (number, other, signature, entry_hash))


MUTATIONS: list[Mutation] = [
    rewrite,
    rewrite_with_own_key,
    delete,
    delete_and_renumber,
    truncate,
    truncate_and_damage_head,
    insert,
    insert_signed_by_a_thief,
    append_replayed,
    reorder,
    shuffle,
    sign_with_another_key,
    sign_with_the_retired_key,
    sign_everything_with_another_key,
    forge_a_rotation,
    swap_with_another_hospital,
    continue_with_another_hospital,
    swap_ledgers,
    flip_in_a_body,
    flip_in_a_signature,
    flip_in_a_hash,
    flip_in_the_head,
    restore_an_old_head,
    restore_one_slot,
    restore_an_old_ledger,
    notation,
]


def written(world: World, changed_state: State, folder: Path) -> Path:
    """A disk with this state on it."""
    path = folder / "ledger.sqlite"
    shutil.copyfile(world.template, path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA synchronous=OFF")
        database.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", changed_state.rows)
        database.commit()
    head_path(path).write_bytes(changed_state.head)
    return path


def holds(path: Path) -> bool:
    """Whether an auditor who knows the hospital's keys finds nothing."""
    try:
        verify_ledger(path, [public_bytes(NORTH), public_bytes(NORTH_NEXT)])
    except LedgerError:
        return False
    return True


def test_there_are_a_thousand_mutations() -> None:
    """As many as are promised."""
    assert len(MUTATIONS) * EACH >= 1000


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_is_found(world: World, tmp_path: Path, mutation: Mutation) -> None:
    """By an auditor who knows the hospital's key; and the hospital opens nothing that does not say what it said."""
    before = [world.north.entry(seq) for seq in range(1, LENGTH + 1)]
    for seed in range(EACH):
        changed_state = mutation(world, random.Random(f"{mutation.__name__} {seed}"))
        assert changed_state != world.north, f"seed {seed} changed nothing"
        path = written(world, changed_state, tmp_path)

        assert not holds(path), f"seed {seed} was not found"
        try:
            ledger = Ledger.open(path, NORTH_NEXT)
        except LedgerError:
            continue
        with ledger:  # half of the newest statement missing, as after a power cut: it is made again
            assert mutation is flip_in_the_head
            assert list(ledger.entries()) == before


def test_what_was_ever_on_the_disk_holds(world: World, tmp_path: Path) -> None:
    """After each entry, and between an entry and its head file, where a crash leaves it."""
    for before, after in pairwise(world.past):
        for on_disk in (after, replace(after, head=before.head)):
            path = written(world, on_disk, tmp_path)
            assert holds(path)
            shutil.copyfile(path, tmp_path / "copy")
            head_path(tmp_path / "copy").write_bytes(on_disk.head)
            key = NORTH if len(on_disk.rows) < ROTATED_AT else NORTH_NEXT
            with Ledger.open(tmp_path / "copy", key) as ledger:
                assert [row(entry) for entry in ledger.entries()] == list(on_disk.rows)


def test_no_untouched_ledger_is_suspected(tmp_path: Path) -> None:
    """Histories of other lengths, with restarts and rotations anywhere, read in use and at rest."""
    for seed in range(25):
        draw, path, keys = random.Random(seed), tmp_path / f"ledger-{seed}", list(KEYS)
        ledger = Ledger.create(path, keys[0], hospital="north")
        open_budget(ledger)
        ledger.append(
            "plan-approved",
            **STUDY,
            population="all",
            limit=StudyLimit(epsilon=1.0, delta=1e-4),
            reservation=(Reserved(mechanism=MECHANISM, charges=20),),
        )
        for number in range(1, draw.randrange(1, 16)):
            charge(ledger, number)
            if draw.random() < 0.2 and len(keys) > 1:
                ledger.rotate(keys[1])
                keys.pop(0)
            if draw.random() < 0.2:
                ledger.close()
                ledger = Ledger.open(path, keys[0])
        verify_ledger(path, [public_bytes(KEYS[0])])
        count = ledger.seq
        ledger.close()

        assert verify_ledger(path, [public_bytes(KEYS[0])]).entries == count
        Ledger.open(path, keys[0]).close()
        assert len(read_ledger(path)) == count
