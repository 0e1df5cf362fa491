"""The policy is read again before every message; what is wrong with the file permits nothing."""

import logging
from pathlib import Path

import pytest

from client.live import LiveSettings
from client.settings import read_settings
from shared_models.errors import ConfigError
from tests.client.test_settings import SETTINGS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A settings file."""
    file = tmp_path / "hospital.toml"
    file.write_text(SETTINGS, encoding="utf-8")
    return file


def edit(path: Path, old: str, new: str) -> None:
    """Change the file as an editor would, in place."""
    assert old in SETTINGS
    path.write_text(SETTINGS.replace(old, new), encoding="utf-8")


def test_a_changed_limit_holds_for_the_next_message(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also one of the same length, within the same tick of the file system's clock; the log says it once."""
    live = LiveSettings(path, read_settings(path))
    assert live.settings().policy.maximum_rounds == 100

    edit(path, "maximum_rounds = 100", "maximum_rounds = 101")

    assert [live.settings().policy.maximum_rounds for _ in range(3)] == [101] * 3
    assert caplog.text.count("the policy in hospital.toml changed") == 1


def test_nothing_is_said_about_a_file_that_did_not_change(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A comment or a blank line is no change either."""
    live = LiveSettings(path, read_settings(path))
    live.settings()
    edit(path, "[policy]", "[policy] # ours")
    live.settings()

    assert caplog.text == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [("minimum_hospitals = 3", "minimum_hospitals = 2"), ("[policy]", "[policy"), ("[policy]", "[policies]")],
)
def test_an_invalid_file_permits_nothing_until_it_is_mended(path: Path, old: str, new: str) -> None:
    """The reason comes with every message, and the policy before it is not used meanwhile."""
    live = LiveSettings(path, read_settings(path))
    edit(path, old, new)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"hospital\.toml"):
            live.settings()

    edit(path, "minimum_hospitals = 3", "minimum_hospitals = 4")

    assert live.settings().policy.minimum_hospitals == 4


def test_a_file_that_is_gone_permits_nothing(path: Path) -> None:
    """Nor does it bring the process down."""
    live = LiveSettings(path, read_settings(path))
    path.unlink()

    with pytest.raises(ConfigError, match="does not exist"):
        live.settings()


def test_other_sections_wait_for_a_restart_and_the_log_says_which(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The coordinator and the budget are what the process began with."""
    caplog.set_level(logging.WARNING)
    live = LiveSettings(path, read_settings(path))
    text = SETTINGS.replace("coordinator.example", "other.example").replace("epsilon = 2.0", "epsilon = 9.0")

    path.write_text(text.replace("maximum_rounds = 100", "maximum_rounds = 50"), encoding="utf-8")

    found = live.settings()
    assert (found.coordinator, found.population.epsilon) == ("coordinator.example:9092", 2.0)
    assert found.policy.maximum_rounds == 50
    assert "changes of coordinator, population need a restart" in caplog.text
