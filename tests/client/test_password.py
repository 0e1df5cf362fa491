"""The page's password: nothing of it lies on the disk in the clear, and guessing is slow."""

import json
import logging
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.password import FREE_TRIES, LONGEST_PAUSE_S, PASSWORD, Door, read_password, set_password
from shared_models.errors import ConfigError, IdentityError
from tests.federation import Federation

WORDS = "correct horse battery"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder with a password; a try costs next to nothing."""
    monkeypatch.setattr("client.password.COST", 16)
    set_password(tmp_path, WORDS)
    return tmp_path


def test_what_is_kept_is_for_its_owner_alone_and_holds_no_password(state: Path) -> None:
    """Salted: the same password is kept otherwise the next time."""
    path = state / PASSWORD
    before = path.read_text("ascii")

    set_password(state, WORDS)

    assert path.stat().st_mode & 0o777 == 0o600
    assert WORDS not in before
    assert json.loads(before)["digest"] != json.loads(path.read_text("ascii"))["digest"]


def test_it_opens_with_the_password_and_with_nothing_else(state: Path) -> None:
    """Neither with a beginning of it, nor with more than it, nor with what is kept."""
    kept = read_password(state)
    assert kept is not None

    assert Door().opens(kept, WORDS)
    for wrong in ("", WORDS[:-1], WORDS + " ", WORDS.upper(), kept.digest, "x" * 100_000, "\ud800"):
        assert not Door().opens(kept, wrong)


def test_guessing_is_slow_and_the_password_opens_again_after_the_pause(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a pause even the right one does not open; no pause is longer than a minute."""
    kept, door, clock = read_password(state), Door(), [1000.0]
    assert kept is not None
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pauses = []

    for _ in range(FREE_TRIES + 7):
        clock[0] += door.wait_s()
        assert not door.opens(kept, "a wrong password")
        pauses.append(door.wait_s())

    assert pauses[: FREE_TRIES - 1] == [0.0] * (FREE_TRIES - 1)
    assert pauses[FREE_TRIES - 1 :] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert not door.opens(kept, WORDS)
    clock[0] += LONGEST_PAUSE_S
    assert door.opens(kept, WORDS)
    assert not door.opens(kept, "a wrong password")
    assert door.wait_s() == 0


@pytest.mark.parametrize("short", ["", "x" * 11, "x" * 1025])
def test_a_password_that_can_be_guessed_or_is_endless_is_refused(tmp_path: Path, short: str) -> None:
    """The error does not quote it."""
    with pytest.raises(ConfigError, match=f"a password of {len(short)} characters"):
        set_password(tmp_path, short)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"salt": "", "digest": ""}', '{"salt": "00", "digest": "00"}', "null"]
)
def test_a_damaged_file_opens_nothing(state: Path, content: str) -> None:
    """It is never taken for no password."""
    (state / PASSWORD).write_text(content, encoding="ascii")

    with pytest.raises(IdentityError, match="is damaged"):
        read_password(state)


def test_a_file_that_would_take_all_memory_is_damaged(state: Path) -> None:
    """What it costs to check is fixed here, and not by the file."""
    kept = json.loads((state / PASSWORD).read_bytes())
    (state / PASSWORD).write_text(json.dumps(kept | {"cost": 2**30}), encoding="ascii")

    with pytest.raises(IdentityError, match="is damaged"):
        read_password(state)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_a_file_that_others_can_read_is_refused(state: Path, mode: int) -> None:
    """With the command that mends it."""
    (state / PASSWORD).chmod(mode)

    with pytest.raises(IdentityError, match="open to others") as caught:
        read_password(state)

    assert "chmod 600" in caught.value.hint


def test_the_command_reads_it_from_standard_input_and_says_nothing_of_it(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Never from an argument, which every user of the machine could see."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")
    settings = federation.settings("hospital-1")

    said = CliRunner().invoke(app, ["page-password", str(federation.settings_file("hospital-1"))], input=f"{WORDS}\n")

    assert said.exit_code == 0
    assert WORDS not in said.output + caplog.text
    kept = read_password(settings.state)
    assert kept is not None
    assert Door().opens(kept, WORDS)
