"""Hospitals that said "not now" are asked again, after pauses that grow and end."""

import time

import pytest

from server.patience import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Patience


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in a list, so that a test of half a minute takes none."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_who_said_nothing_is_always_due() -> None:
    """Nobody waits for a pause that was never asked for."""
    assert Patience().due({"north", "south"}) == {"north", "south"}


def test_who_said_not_now_is_due_after_a_pause_that_doubles_to_a_limit(clock: list[float]) -> None:
    """A steward sleeps for hours: nobody is asked ten times a second meanwhile."""
    patience, pauses = Patience(), []

    for attempt in range(10):
        assert patience.wait_for("north") == (attempt == 0)
        began = clock[0]
        while not patience.due({"north"}):
            clock[0] += SHORTEST_PAUSE_S
        pauses.append(clock[0] - began)

    assert pauses == [min(SHORTEST_PAUSE_S * 2**i, LONGEST_PAUSE_S) for i in range(10)]
    assert patience.due({"north", "south"}) == {"north", "south"}


def test_who_answered_is_forgotten(clock: list[float]) -> None:
    """The next pause is a short one again."""
    patience = Patience()
    patience.wait_for("north")
    patience.wait_for("north")
    assert "north" in patience

    patience.forget("north")

    assert "north" not in patience
    assert patience.wait_for("north")
    clock[0] += SHORTEST_PAUSE_S
    assert patience.due({"north"}) == {"north"}
