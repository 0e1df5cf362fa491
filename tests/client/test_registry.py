"""The registry: no patient has two budgets, and what would show it is never lost in silence."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.books import LEDGER
from client.keys import local_key
from client.records.patient_ids import MEMBER_BYTES, members
from client.registry import SUFFIX, Registry
from client.settings import Settings
from shared_models.errors import IdentityError, PopulationError
from tests.client.test_settings import SETTINGS, read

KEY = b"k" * 32


def settings_of(folder: Path, population: str) -> Settings:
    """A population's settings; all of one folder share its registry."""
    text = SETTINGS.replace("/var/lib/konsil", population).replace('"all-patients"', f'"{population}"')
    return read(folder, text)


def registry(folder: Path, population: str) -> Registry:
    """As a population's daemon opens it. Its ledger is there, and tests name its first entry after it."""
    found = settings_of(folder, population)
    found.state.mkdir(exist_ok=True)
    (found.state / LEDGER).touch()
    return Registry(found, population)


def some(*patients: str) -> frozenset[bytes]:
    """Patients as the registry knows them."""
    return members(patients, KEY)


def refusal(registry: Registry, *patients: str, has_spent: bool = False) -> str:
    """The words with which patients are refused, to look at and to use."""
    with pytest.raises(PopulationError) as looked:
        registry.check(some(*patients), has_spent=has_spent)
    with pytest.raises(PopulationError) as claimed:
        registry.claim(some(*patients), has_spent=has_spent)
    assert str(looked.value) == str(claimed.value)
    return str(looked.value)


def test_a_patient_of_one_budget_is_refused_to_every_other(tmp_path: Path) -> None:
    """One shared patient is enough; the message names whose budget it is, and no patient."""
    registry(tmp_path, "heart").claim(some("a", "b"), has_spent=False)

    said = refusal(registry(tmp_path, "lung"), "b", "c")

    assert "population heart" in said
    assert str(tmp_path / "heart") in said
    registry(tmp_path, "lung").claim(some("c", "d"), has_spent=False)
    assert "population lung" in refusal(registry(tmp_path, "heart"), "a", "d", has_spent=True)


def test_looking_claims_nothing(tmp_path: Path) -> None:
    """A proposal that comes to nothing must not take patients away from the population they belong to."""
    registry(tmp_path, "heart").check(some("a"), has_spent=False)

    registry(tmp_path, "lung").claim(some("a"), has_spent=False)


@settings(max_examples=40, deadline=None)
@given(rounds=st.lists(st.sets(st.integers(0, 9).map(str)), min_size=1, max_size=5), late=st.integers(0, 9).map(str))
def test_a_set_only_ever_grows(tmp_path_factory: pytest.TempPathFactory, rounds: list[set[str]], late: str) -> None:
    """Whoever was ever used is refused elsewhere, also after saying no, after a new export, and after a restart."""
    folder = tmp_path_factory.mktemp("registry")
    warm = registry(folder, "heart")
    for number, patients in enumerate(rounds):
        warm.claim(some(*patients), has_spent=number > 0)
        if number % 2:
            warm = registry(folder, "heart")

    if late in set().union(*rounds):
        assert "population heart" in refusal(registry(folder, "lung"), late)
    else:
        registry(folder, "lung").claim(some(late), has_spent=False)


def test_what_was_claimed_before_is_not_written_again(tmp_path: Path) -> None:
    """Every round claims; only a newcomer costs a write."""
    heart = registry(tmp_path, "heart")
    heart.claim(some("a", "b"), has_spent=False)
    file = tmp_path / "registry" / f"heart{SUFFIX}"
    before = file.stat().st_mtime_ns, file.stat().st_ino

    heart.claim(some("b"), has_spent=True)
    registry(tmp_path, "heart").claim(some("a"), has_spent=True)

    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    heart.claim(some("c"), has_spent=True)
    assert file.stat().st_ino != before[1]


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    """However they interleave: looking and writing are one step."""
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def begin(name: str) -> None:
        mine = registries[name]
        start.wait()
        try:
            mine.claim(some("shared", name), has_spent=False)
            outcomes.append("claimed")
        except PopulationError:
            outcomes.append("refused")

    registries = {name: registry(tmp_path, name) for name in (f"population-{k}" for k in range(8))}
    threads = [threading.Thread(target=begin, args=(name,)) for name in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["claimed", *["refused"] * 7]


def test_a_registry_that_forgot_a_ledger_with_charges_stops_it(tmp_path: Path) -> None:
    """Deleted, on another disk, or a setting that points elsewhere: nothing begins anew."""
    heart = registry(tmp_path, "heart")
    heart.claim(some("a"), has_spent=False)
    (tmp_path / "registry" / f"heart{SUFFIX}").unlink()

    said = refusal(registry(tmp_path, "heart"), "a", has_spent=True)

    assert "does not know population heart" in said


def test_a_registry_with_another_key_is_refused(tmp_path: Path) -> None:
    """With a new key nobody would ever be recognised."""
    registry(tmp_path, "heart").claim(some("a"), has_spent=False)
    (tmp_path / "registry" / "local.key").unlink()

    assert "key is another one" in refusal(registry(tmp_path, "lung"), "a")
    assert "key is another one" in refusal(registry(tmp_path, "heart"), "a", has_spent=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_of_a_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A flipped bit, a file cut short or grown could hide a patient; none passes."""
    folder = tmp_path_factory.mktemp("registry")
    registry(folder, "heart").claim(some("a", "b"), has_spent=False)
    file = folder / "registry" / f"heart{SUFFIX}"
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    short = whole[: -MEMBER_BYTES * data.draw(st.integers(1, 4))]
    file.write_bytes(data.draw(st.sampled_from([flipped, short, whole[:at], whole + b"\0", whole + whole])))

    assert "is damaged" in refusal(registry(folder, "lung"), "z")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """What a killed process leaves beside it is neither read nor in the way."""
    registry(tmp_path, "heart").claim(some("a"), has_spent=False)
    (tmp_path / "registry" / f"heart{SUFFIX}.new").write_bytes(b"half")

    registry(tmp_path, "heart").claim(some("a", "b"), has_spent=True)

    assert "population heart" in refusal(registry(tmp_path, "lung"), "b")


def test_a_disk_that_does_not_take_it_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is used that could not be noted."""
    heart = registry(tmp_path, "heart")
    heart.claim(some("a"), has_spent=False)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(PopulationError, match="No space left on device"):
            heart.claim(some("b"), has_spent=True)

    registry(tmp_path, "lung").claim(some("b"), has_spent=False)
    assert "population lung" in refusal(heart, "b", has_spent=True)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    """The setting points at a file: nothing can be looked at, nothing noted, no key made."""
    (tmp_path / "registry").write_text("", encoding="utf-8")

    with pytest.raises(PopulationError, match="cannot be used"):
        registry(tmp_path, "heart").check(some("a"), has_spent=False)
    with pytest.raises(PopulationError, match="cannot be used"):
        registry(tmp_path, "heart").claim(some("a"), has_spent=False)
    with pytest.raises(IdentityError, match="cannot be used"):
        local_key(tmp_path / "registry", "patients")


def test_a_state_folder_may_move_and_must_not_be_copied(tmp_path: Path) -> None:
    """A copied ledger would pay once more out of the same budget; a moved one is the only one there is."""
    registry(tmp_path, "heart").claim(some("a"), has_spent=False)
    copy = settings_of(tmp_path, "elsewhere")
    copy.state.mkdir()
    (copy.state / LEDGER).touch()

    assert "is a copy of" in refusal(Registry(copy, "heart"), "a", has_spent=True)

    (tmp_path / "heart" / LEDGER).unlink()
    Registry(copy, "heart").claim(some("a"), has_spent=True)
    registry(tmp_path, "heart")  # put back
    assert "is a copy of" in refusal(registry(tmp_path, "heart"), "a", has_spent=True)


def test_the_registry_holds_hashes_with_a_key_and_no_ids(tmp_path: Path) -> None:
    """Sorted, so that not even the order of rows is in it; key and folder are the hospital's alone."""
    registry(tmp_path, "heart").claim(some("patient-one", "patient-two"), has_spent=False)

    file = (tmp_path / "registry" / f"heart{SUFFIX}").read_bytes()
    assert b"patient-" not in file
    assert b"".join(sorted(some("patient-one", "patient-two"))) in file
    assert (tmp_path / "registry").stat().st_mode & 0o077 == 0
    assert (tmp_path / "registry" / "local.key").stat().st_mode & 0o077 == 0
