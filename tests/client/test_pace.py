"""When a paid reply leaves, and what it says when something failed."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.pace import OnTheGrid
from shared_models.errors import ComputationError, FederationError, LedgerError, RecordsError


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        """Seconds since some time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let seconds pass."""
        assert seconds >= 0
        self.now += seconds


@given(st.floats(0, 1e6), st.floats(0.001, 60), st.floats(0, 300))
def test_a_reply_leaves_at_a_multiple_of_the_grid(received: float, grid_s: float, work_s: float) -> None:
    """Whatever the computation took; and never more than one cell later than it was ready."""
    clock = Clock(received)
    with OnTheGrid(received, grid_s, clock=clock, sleep=clock.sleep):
        clock.now += work_s
        ready = clock.now

    cells = (clock.now - received) / grid_s
    assert cells == pytest.approx(round(cells), abs=1e-6 / grid_s)
    assert round(cells) >= 1
    assert ready <= clock.now <= ready + grid_s * (1 + 1e-6)


@pytest.mark.parametrize(
    "error", [RecordsError("31337"), ValueError("31337"), MemoryError("31337"), FederationError("31337")]
)
def test_every_failure_waits_and_has_one_code(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the time nor the code says what it was; nor does the log, whose readers may not see records."""
    clock = Clock(0.0)
    clock.now = 0.25
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ComputationError) as raised,
        OnTheGrid(0.0, 1.0, clock=clock, sleep=clock.sleep),
    ):
        raise error

    assert clock.now == 1.0
    assert raised.value.code == FederationError.code
    assert "31337" not in str(raised.value) + caplog.text
    assert "test_pace.py" in caplog.text


def test_a_ledger_that_fails_still_says_so() -> None:
    """A full disk depends on no record, and its own code tells the coordinator that this hospital is out."""
    with pytest.raises(LedgerError, match="disk"), OnTheGrid(0.0, 0.001):
        raise LedgerError("the disk is full")


def test_a_process_that_is_told_to_stop_does_not_wait() -> None:
    """SIGTERM ends a hospital at once."""
    clock = Clock(0.0)
    with pytest.raises(SystemExit), OnTheGrid(0.0, 60.0, clock=clock, sleep=clock.sleep):
        raise SystemExit(0)

    assert clock.now == 0.0
