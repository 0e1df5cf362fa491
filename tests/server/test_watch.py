"""The live view, drawn by the same terminal library as for a person, from a real journal."""

import io
import json
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from server.journal import read_events
from server.standing import _FOLDS, _WORDS, Standing
from server.watch import Watch, view
from tests.server.conftest import Seen


@pytest.fixture
def journal(seen: Seen) -> list[dict[str, Any]]:
    """The journal of a study in which hospital-4 vanished in the third round, and was back for the fourth."""
    return read_events(seen.federation.folder / "study" / "events.jsonl")[0]


def picture(events: Iterable[dict[str, Any]], *, width: int = 100, height: int = 40) -> str:
    """What a terminal shows after some events, as plain text."""
    progress = Standing("breast-cancer", 4)
    for event in events:
        progress.see(event)
    console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True)
    console.print(view(progress, width, height))
    return console.export_text()


def until(journal: list[dict[str, Any]], event: str, **fields: Any) -> list[dict[str, Any]]:
    """The journal up to an event."""
    last = next(i for i, e in enumerate(journal) if e["event"] == event and fields.items() <= e.items())
    return journal[: last + 1]


def test_a_running_study_is_shown_whole(journal: list[dict[str, Any]]) -> None:
    """Where it is, whose update is missing, what each epsilon is, what was released, how long stages took."""
    now = until(journal, "round", round=3)

    text = picture(now)

    assert "breast-cancer  running" in text
    assert "round 3/4: 3 of 4 hospitals answered in" in text
    assert "s left" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("hospital-")}
    assert set(rows) == {"hospital-1", "hospital-2", "hospital-3", "hospital-4"}
    for name, epsilon in now[-1]["epsilon_filter"].items():
        assert f"{epsilon:.3f}" in rows[name]
    assert rows["hospital-1"].split()[1] == "3"
    assert rows["hospital-4"].split()[1] == "2"
    assert "dropped out at train" in rows["hospital-4"]
    released = now[-1]["metrics_released"] or until(journal, "round", round=2)[-1]["metrics_released"]
    assert f"auroc {released['auroc']:.3f}" in text
    assert f"unmask {now[-1]['stages']['unmask']:.2f} s" in text
    assert "missing: hospital-4" in text


@pytest.mark.parametrize(
    ("event", "fields", "said"),
    [
        ("waiting", {"reason": "2 of 3; missing: north (pending)"}, "2 of 3; missing: north (pending)"),
        ("paused", {"reason": "below quorum: missing north"}, "below quorum: missing north"),
        ("interrupted", {"error": "the disk is full"}, "the disk is full"),
        ("stopped", {}, "by an operator"),
        ("stopped-early", {"round": 3, "rounds": 4, "reason": "no better"}, "ends after round 3 of 4: no better"),
        ("failed", {"error": "no sum opened", "hint": "see there"}, "no sum opened"),
        ("set-aside", {"hospital": "hospital-4", "round": 4, "reason": "its part has failed"}, "set aside: its part"),
        ("refused", {"hospital": "hospital-4", "code": "policy"}, "refused: policy"),
    ],
)
def test_whatever_stops_it_is_said(
    journal: list[dict[str, Any]], event: str, fields: dict[str, Any], said: str
) -> None:
    """In the middle of a study as before it has begun."""
    told = {"time": "2026-01-02T03:04:05.000+00:00", "event": event, **fields}

    assert said in picture([told])
    assert said in picture([*until(journal, "round", round=3), told])


@pytest.mark.parametrize(("width", "height"), [(40, 12), (60, 24), (80, 24), (200, 60)])
def test_it_fits_the_terminal(journal: list[dict[str, Any]], width: int, height: int) -> None:
    """No line is wider, and hospitals and their epsilons stay legible in a narrow window."""
    text = picture(until(journal, "round", round=3), width=width, height=height)

    assert max(map(len, text.splitlines())) <= width
    for name in ("hospital-1", "hospital-4"):
        assert any(line.startswith(name) and "0.1" in line for line in text.splitlines())
    if height >= 24:
        assert len(text.splitlines()) <= height


def test_without_a_terminal_every_event_is_one_line(journal: list[dict[str, Any]]) -> None:
    """For logs and pipes: no colour, no cursor, the time in front; what a round tells is told once."""
    file = io.StringIO()

    with Watch(Console(file=file, width=40), "breast-cancer") as watch:
        for event in journal:
            watch.see(event)

    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    minor = [e for e in journal if e["event"] == "released" or (e.get("opened") and not e["dropped"])]
    assert len(lines) == len(journal) - len(minor)
    assert all(line[2] == line[5] == ":" for line in lines)
    assert "started: 4 rounds" in lines[0]
    assert "finished: 4 hospitals have stated what it cost" in lines[-1]
    assert any("dropped out: hospital-4 at train" in line for line in lines)


@pytest.mark.parametrize("full_screen", [False, True])
def test_on_a_terminal_the_last_picture_stays(journal: list[dict[str, Any]], full_screen: bool) -> None:
    """Whoever comes back later still sees how it ended."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=90, height=30, legacy_windows=False)

    with Watch(console, "breast-cancer", hospitals=("hospital-1",), full_screen=full_screen) as watch:
        for event in journal:
            watch.see(event)

    written = file.getvalue()
    assert written.count("\x1b[?25h") == written.count("\x1b[?25l") == 1  # the cursor is back
    assert written.count("\x1b[?1049h") == written.count("\x1b[?1049l") == full_screen  # and so is the screen
    assert "round 4/4" in written.rpartition("\x1b[?1049l")[2]


def test_hostile_words_move_no_cursor(journal: list[dict[str, Any]]) -> None:
    """What a peer or a person wrote is shown as letters: no control sequence, no markup."""
    words = "\x1b[2J\x07[bold]gone[/bold]\r\n\x9b31m"
    told = {"time": "2026-01-02T03:04:05.000+00:00", "event": "paused", "reason": words}
    file = io.StringIO()

    text = picture([*until(journal, "round", round=1), told])
    with Watch(Console(file=file, width=40), "breast-cancer") as watch:
        watch.see(told)

    assert "[bold]gone[/bold]" in text
    assert not any(sign in text + file.getvalue() for sign in "\x1b\x07\r\x9b")


def test_an_event_that_is_not_known_is_told_and_changes_nothing() -> None:
    """A newer coordinator may have more to say."""
    progress = Standing("study", 3)

    told = progress.see({"time": "2026-01-02T03:04:05.000+00:00", "event": "eclipse", "of": "the sun"})

    assert told.text == "eclipse"
    assert (progress.state, progress.done) == ("pending", 0)


@pytest.mark.parametrize("kind", sorted(_FOLDS.keys() | _WORDS.keys()))
def test_an_event_may_lack_what_a_watcher_may_not_hear(journal: list[dict[str, Any]], kind: str) -> None:
    """A hospital that watches hears nothing of the others: a bare event is told, too."""
    bare = {"time": "2026-01-02T03:04:05.000+00:00", "event": kind}
    if kind in {"enrolled", "pending", "refused", "left-out", "set-aside"}:
        bare["hospital"] = "hospital-1"

    assert picture([bare])
    assert picture([*until(journal, "round", round=2), bare])


def test_counts_are_whole_however_they_have_travelled(journal: list[dict[str, Any]]) -> None:
    """A protobuf Struct knows floats only: round 3.0 is round 3."""
    travelled = json.loads(json.dumps(journal), parse_int=float)

    assert picture(travelled) == picture(journal)


def test_what_the_service_says_of_the_state_is_shown(journal: list[dict[str, Any]]) -> None:
    """Between two events of the journal a study can be queued, or be told to pause."""
    said = {"time": "2026-01-02T03:04:05.000+00:00", "event": "state", "state": "queued", "rounds": 4, "queue": 2}

    assert "breast-cancer  queued" in picture([*until(journal, "round", round=2), said])


def test_a_round_that_is_told_twice_counts_once(journal: list[dict[str, Any]]) -> None:
    """A coordinator that is killed between the journal and the database tells a round again."""
    once, twice = Standing(), Standing()
    for event in until(journal, "round", round=2):
        once.see(event)
        twice.see(event)

    twice.see(until(journal, "round", round=2)[-1])

    assert (twice.history, twice.hospitals) == (once.history, once.hospitals)


def test_the_time_left_does_not_count_pauses() -> None:
    """Ten rounds of two seconds and one night in between: the rest takes two seconds a round."""
    progress = Standing("study", 30)
    for number in range(1, 12):
        hour = "03" if number < 6 else "15"
        event = {"event": "round", "round": number, "rounds": 30, "answered": [], "missing": [], "stages": {}}
        event |= {"epsilon_filter": {}, "metrics_released": None, "seconds": 1.5}
        progress.see({"time": f"2026-01-02T{hour}:04:{2 * number:02d}.000+00:00", **event})

    assert progress.left_s == 2 * 19
