"""The queue at hospitals: one study trains at each at a time, and nobody is overtaken."""

import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.halt import Halt, HaltedError
from server.turns import Turns


def _later(turns: Turns, study: str, number: int, hospitals: set[str], halt: Halt | None = None) -> threading.Event:
    """Take a turn in a thread; the event says that it came."""
    came = threading.Event()

    def take() -> None:
        try:
            turns.take(study, number, hospitals, halt or Halt())
            came.set()
        except HaltedError:
            pass

    threading.Thread(target=take, daemon=True).start()
    deadline = time.monotonic() + 10
    while study not in turns._waiting and not came.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return came


def test_studies_that_share_no_hospital_run_side_by_side() -> None:
    """And a third that shares one with each waits for both."""
    turns = Turns()
    turns.take("first", 1, {"north", "south"}, Halt())
    turns.take("second", 2, {"east"}, Halt())
    third = _later(turns, "third", 3, {"south", "east"})

    assert turns.position("third") == 2
    turns.give_back("first")
    assert turns.position("third") == 1
    turns.give_back("second")

    assert third.wait(5)
    assert turns.position("third") == 0


def test_nobody_is_overtaken() -> None:
    """A later study does not slip in where an earlier one waits for another hospital: it would wait for ever."""
    turns = Turns()
    turns.take("long", 1, {"north"}, Halt())
    waits = _later(turns, "wide", 2, {"north", "south"})
    late = _later(turns, "late", 3, {"south"})

    assert not late.wait(0.5)
    assert turns.position("late") == 1
    turns.give_back("long")
    assert waits.wait(5)
    turns.give_back("wide")
    assert late.wait(5)


def test_a_study_that_comes_back_keeps_its_place() -> None:
    """One that paused below quorum is before those that were submitted after it."""
    turns = Turns()
    turns.take("second", 2, {"north"}, Halt())
    third = _later(turns, "third", 3, {"north"})
    first = _later(turns, "first", 1, {"north"})

    turns.give_back("second")

    assert first.wait(5)
    assert not third.is_set()


def test_a_study_that_is_halted_leaves_the_queue() -> None:
    """It holds nobody up."""
    turns, halt = Turns(), Halt()
    turns.take("first", 1, {"north"}, Halt())
    halted = _later(turns, "halted", 2, {"north"}, halt)
    last = _later(turns, "last", 3, {"north"})

    halt.pause()
    turns.give_back("first")

    assert last.wait(5)
    assert not halted.is_set()


def test_a_halt_that_is_taken_back_in_time_ends_nothing() -> None:
    """Paused and resumed before the round was over; a stop is never taken back."""
    halt = Halt()
    halt.pause()
    halt.go_on()
    halt.check()
    assert not halt.stopped

    halt.stop()
    halt.go_on()
    with pytest.raises(HaltedError):
        halt.check()
    assert halt.stopped


@settings(max_examples=15, deadline=None)
@given(wanted=st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=2, max_size=8))
def test_no_hospital_ever_trains_for_two(wanted: list[set[str]]) -> None:
    """Whatever studies want, each gets its turn, and no hospital is in two turns at once."""
    turns, busy, lock, most = Turns(), Counter[str](), threading.Lock(), 0

    def study(number: int, hospitals: set[str]) -> None:
        nonlocal most
        turns.take(str(number), number, hospitals, Halt())
        with lock:
            busy.update(hospitals)
            most = max(most, *busy.values())
        time.sleep(0.001)
        with lock:
            busy.subtract(hospitals)
        turns.give_back(str(number))

    threads = [threading.Thread(target=study, args=pair, daemon=True) for pair in enumerate(wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert not any(thread.is_alive() for thread in threads)
    assert most == 1
