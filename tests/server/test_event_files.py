"""TensorBoard's event files, read back by TensorBoard's own reader."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'konsil[tensorboard]'")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.coordinator import coordinating
from server.event_files import EventFiles, last_step, writing
from server.journal import Journal
from server.store import Store
from server.studies import Studies
from shared_models.errors import ConfigError
from tests.link import Keys
from tests.server.conftest import Seen


def scalars(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Every tag's steps and values, as TensorBoard shows them."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


@pytest.fixture
def studies(seen: Seen, tmp_path: Path) -> Iterator[Studies]:
    """A study whose journal grows round by round, with what a real one told."""
    store = Store(f"sqlite:///{tmp_path / 'coordinator.sqlite'}")
    (tmp_path / "study").mkdir()
    store.submit(seen.federation.plan, by="a test", folder=tmp_path / "study")
    yield Studies(store, tmp_path, lambda *_: None)
    store.close()


def finish(seen: Seen, studies: Studies, number: int) -> None:
    """Tell of another round, in the order in which a coordinator does."""
    event = seen.federation.events("round")[number - 1]
    facts = {key: value for key, value in event.items() if key not in {"time", "event", "round", "rounds"}}
    row = studies.show("breast-cancer").row
    Journal(row.folder / "events.jsonl").write("round", round=number, rounds=4, **facts)
    studies._store.finish_round(row.name, number, facts)


def test_every_round_is_one_step(seen: Seen, tmp_path: Path) -> None:
    """Seconds, hospitals, epsilon of each, released metrics: what the journal holds, to single precision."""
    rounds = seen.federation.events("round")
    folder = seen.federation.folder / "study" / "tensorboard"

    with seen.studies() as studies, writing(seen.settings.model_copy(update={"tensorboard": True}), studies):
        pass

    found = scalars(folder)
    assert found["round/seconds"] == [(e["round"], pytest.approx(e["seconds"])) for e in rounds]
    assert found["round/answered"] == [(e["round"], len(e["answered"])) for e in rounds]
    for name in seen.federation.names:
        expected = [(e["round"], pytest.approx(e["epsilon_filter"][name])) for e in rounds]
        assert found[f"epsilon_enforced/{name}"] == expected
    released = [(e["round"], pytest.approx(e["metrics_released"]["auroc"])) for e in rounds if e["metrics_released"]]
    assert found["released/auroc"] == released
    assert {f"stage_seconds/{stage}" for stage in rounds[0]["stages"]} <= set(found)


def test_after_a_restart_no_step_is_there_twice_and_none_is_lost(seen: Seen, studies: Studies) -> None:
    """The next process reads what is there and goes on behind it; asked again, it writes nothing."""
    folder = studies.show("breast-cancer").row.folder / "tensorboard"
    for number in (1, 2):
        finish(seen, studies, number)
    first = EventFiles(studies)
    first.write()
    first.write()
    first.close()
    finish(seen, studies, 3)

    second = EventFiles(studies)
    second.write()
    finish(seen, studies, 4)
    second.write()
    second.close()

    assert [step for step, _ in scalars(folder)["round/seconds"]] == [1, 2, 3, 4]
    assert len(list(folder.iterdir())) == 2


def test_half_a_record_of_a_killed_process_counts_for_nothing(seen: Seen, studies: Studies) -> None:
    """The round whose record was cut is written again, whole."""
    folder = studies.show("breast-cancer").row.folder / "tensorboard"
    for number in (1, 2):
        finish(seen, studies, number)
    first = EventFiles(studies)
    first.write()
    first.close()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert last_step(folder) == 1

    second = EventFiles(studies)
    second.write()
    second.close()

    assert last_step(folder) == 2


def test_nothing_is_written_unless_asked_for(seen: Seen, studies: Studies) -> None:
    """The setting is off by default."""
    finish(seen, studies, 1)

    with writing(seen.settings, studies):
        pass

    assert not (studies.show("breast-cancer").row.folder / "tensorboard").exists()


def test_a_coordinator_writes_them_while_it_runs_and_only_then(tmp_path: Path) -> None:
    """The setting is all that it takes."""
    settings = Keys(tmp_path).coordinator().model_copy(update={"tensorboard": True})

    with coordinating(settings):
        running = {thread.name for thread in threading.enumerate()}

    assert "tensorboard" in running
    assert "tensorboard" not in {thread.name for thread in threading.enumerate()}


def test_a_missing_package_is_named(seen: Seen, studies: Studies, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install, before any study goes on."""
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)

    with pytest.raises(ConfigError, match="tensorboard is not installed") as caught:
        EventFiles(studies)

    assert "konsil[tensorboard]" in caught.value.hint
