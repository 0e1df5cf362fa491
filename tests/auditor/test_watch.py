"""Watching with a memory of its own: forks and rollbacks are noticed across restarts, and nothing is believed."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.watch import Memory, Seen, Trust
from shared_models.errors import ConfigError, EvidenceError, ForeignRosterError, OlderRosterError
from shared_models.identity import load_key, public_bytes, read_public
from shared_models.privacy.checkpoint import SignedCheckpoint
from tests.link import Keys, made_checkpoint, signed_checkpoint


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Of three hospitals, and the roster."""
    return Keys(tmp_path_factory.mktemp("keys"))


def trust(keys: Keys, folder: Path) -> Trust:
    """By the roster that the root key signed, as somebody hands it over."""
    found = Trust((), read_public(keys.folder / "coordinator" / "root.pub"), folder / "known.roster.json")
    found.renew(lambda path: path.write_bytes((keys.folder / "coordinator" / "roster.json").read_bytes()))
    return found


def remember(keys: Keys, folder: Path, checkpoints: Iterable[SignedCheckpoint]) -> tuple[Memory, list[Seen]]:
    """A memory in this folder that is shown these, too."""
    with closing(Memory(folder / "known.jsonl", trust(keys, folder))) as memory:
        return memory, [memory.see(one.hospital, one.line()) for one in checkpoints]


def found(seen: Iterable[Seen]) -> list[str | None]:
    return [one.finding.code if one.finding else None for one in seen]


def test_what_was_seen_once_is_not_new_again(keys: Keys, tmp_path: Path) -> None:
    """Also after a restart."""
    made = [made_checkpoint(keys, name, seq) for name in ("north", "south") for seq in (1, 2)]

    _, first = remember(keys, tmp_path, made)
    memory, second = remember(keys, tmp_path, made)

    assert [one.new for one in first] == [True] * 4
    assert [one.new for one in second] == [False] * 4
    assert found(first + second) == [None] * 8
    assert memory.findings == []


@pytest.mark.parametrize(
    ("seq", "fork", "code"), [(4, "b", "checkpoint-fork"), (2, "a", "checkpoint-rollback")], ids=["fork", "rollback"]
)
def test_a_history_that_is_replaced_after_a_restart_is_noticed(
    keys: Keys, tmp_path: Path, seq: int, fork: str, code: str
) -> None:
    """The coordinator has forgotten what it handed out before; the memory has not, and does not forget the finding."""
    remember(keys, tmp_path, [made_checkpoint(keys, "north", 4)])
    against = made_checkpoint(keys, "north", seq, minute=9, fork=fork)

    _, seen = remember(keys, tmp_path, [against])
    again, once_more = remember(keys, tmp_path, [against])

    assert found(seen) == [code]
    assert seen[0].finding is not None
    assert (seen[0].finding.party, seen[0].finding.entry) == ("north", seq)
    assert [finding.code for finding in again.findings] == [code]
    assert found(once_more) == [None]  # it was said at the start


def test_nobody_speaks_for_a_hospital_but_its_key(keys: Keys, tmp_path: Path) -> None:
    """Another hospital's, handed over as this one's; a stranger's; what is no checkpoint. None of it is remembered."""
    memory = Memory(tmp_path / "known.jsonl", trust(keys, tmp_path))
    souths = made_checkpoint(keys, "south", 1)
    strangers = signed_checkpoint(Ed25519PrivateKey.generate(), "north", 1)

    with closing(memory):
        seen = [memory.see("north", souths.line()), memory.see("north", strangers.line()), memory.see("../x", b"{}")]
        remembered = (tmp_path / "known.jsonl").read_bytes()
        right = memory.see("south", souths.line())

    assert found(seen) == ["checkpoint-foreign"] * 3
    assert [one.finding.party for one in seen if one.finding] == ["north", "north", "coordinator"]
    assert remembered == b""
    assert found([right]) == [None]


def test_what_a_coordinator_sends_moves_no_cursor(keys: Keys, tmp_path: Path) -> None:
    """A finding quotes what is wrong, on one line, without a terminal's control sequences."""
    hostile = b'{"\\u001b[2J\\nFINDING note": 1, "format": "konsil-checkpoint/1"}'

    with closing(Memory(tmp_path / "known.jsonl", trust(keys, tmp_path))) as memory:
        (seen,) = [memory.see("north\x1b[2J", hostile)]

    assert seen.finding is not None
    assert (seen.finding.code, seen.finding.party) == ("checkpoint-foreign", "coordinator")
    assert "[2J" in seen.finding.what
    assert seen.finding.what.isprintable()


def test_keys_that_were_given_count_without_a_roster(keys: Keys, tmp_path: Path) -> None:
    """For whoever got them from the hospitals; no roster is asked for."""
    norths = public_bytes(load_key(keys.folder / "north" / "keys" / "identity.key"))
    given = Trust([norths], None, tmp_path / "roster.json")
    given.renew(lambda _: pytest.fail("there is no root key to check a roster with"))
    with closing(Memory(tmp_path / "known.jsonl", given)) as memory:
        seen = [memory.see(name, made_checkpoint(keys, name, 1).line()) for name in ("north", "south")]

    assert found(seen) == [None, "checkpoint-foreign"]


def test_a_new_key_is_looked_for_on_the_newest_roster(tmp_path: Path) -> None:
    """A hospital that rotated is no stranger; whoever is on no roster is asked for once."""
    own, key, asked = Keys(tmp_path / "keys", names=("north", "south")), Ed25519PrivateKey.generate(), list[int]()
    trusted = trust(own, tmp_path)
    memory = Memory(tmp_path / "known.jsonl", trusted)
    memory.see("north", made_checkpoint(own, "north", 1).line())
    public = own.folder / "coordinator" / "hospitals" / "north.identity.pub"
    public.write_text(public_bytes(key).hex() + "\n", encoding="ascii")
    own.sign_roster(version=2)

    def ask() -> None:
        asked.append(1)
        trusted.renew(lambda path: path.write_bytes((own.folder / "coordinator" / "roster.json").read_bytes()))

    with closing(memory):
        rotated = memory.see("north", signed_checkpoint(key, "north", 2).line(), unknown=ask)
        strangers = Ed25519PrivateKey.generate()
        strange = [memory.see("north", signed_checkpoint(strangers, "north", n).line(), unknown=ask) for n in (3, 4)]

    assert found([rotated, *strange]) == [None, "checkpoint-foreign", "checkpoint-foreign"]
    assert len(asked) == 2


def test_an_older_or_a_foreign_roster_is_refused(tmp_path: Path) -> None:
    """Whoever hands it over cannot bring back a key that was given up; also not after a restart."""
    own = Keys(tmp_path / "keys", names=("north", "south"))
    first = (own.folder / "coordinator" / "roster.json").read_bytes()
    own.sign_roster(version=2, revoked=["south"])
    newest = trust(own, tmp_path)
    root = read_public(own.folder / "coordinator" / "root.pub")
    restarted = Trust((), root, tmp_path / "known.roster.json")

    for trusted in (newest, restarted):
        with pytest.raises(OlderRosterError):
            trusted.renew(lambda path: path.write_bytes(first))
        south = load_key(own.folder / "south" / "keys" / "identity.key")
        assert not trusted.is_key_of("south", public_bytes(south))
    foreign = Trust((), public_bytes(Ed25519PrivateKey.generate()), tmp_path / "other.json")
    with pytest.raises(ForeignRosterError):
        foreign.renew(lambda path: path.write_bytes(first))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "known.roster.json"]


def test_a_crash_costs_the_memory_a_line_and_no_more(keys: Keys, tmp_path: Path) -> None:
    """A line that was cut is heard again; one in the middle that was changed is a reason to stop."""
    made = [made_checkpoint(keys, "north", seq) for seq in (1, 2, 3)]
    path = tmp_path / "known.jsonl"
    remember(keys, tmp_path, made)
    whole = path.read_bytes()

    path.write_bytes(whole[:-50])
    assert [one.new for one in remember(keys, tmp_path, made)[1]] == [False, False, True]
    assert path.read_bytes() == whole

    path.write_bytes(whole.replace(b'"seq":2', b'"seq":7'))
    with pytest.raises(EvidenceError, match="line 2"):
        remember(keys, tmp_path, [])


def test_without_a_memory_nothing_is_watched(keys: Keys, tmp_path: Path) -> None:
    """A file that cannot be written is an error, before anything is looked at."""
    with pytest.raises(ConfigError, match="cannot be written"):
        Memory(tmp_path / "nowhere" / "known.jsonl", trust(keys, tmp_path))


def test_two_watchers_do_not_share_a_memory(keys: Keys, tmp_path: Path) -> None:
    """Each would miss what the other has seen."""
    with closing(Memory(tmp_path / "known.jsonl", trust(keys, tmp_path))), pytest.raises(ConfigError, match="in use"):
        Memory(tmp_path / "known.jsonl", trust(keys, tmp_path))

    Memory(tmp_path / "known.jsonl", trust(keys, tmp_path)).close()
