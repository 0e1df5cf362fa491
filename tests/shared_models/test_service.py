"""What a daemon tells systemd: datagrams that it understands, and signs of life that stop when life does."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_models.service import Pulse, Watchdog, tell, turns, watchdog_period_s

Listener = socket.socket


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A service manager's socket, as systemd makes it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind("\0konsil-test-service")
        inbox.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@konsil-test-service")
        yield inbox


def test_what_is_told_is_what_sd_notify_says(listener: Listener) -> None:
    """One datagram; a value cannot smuggle in a line of its own."""
    tell(READY=1, STATUS="waiting\nMAINPID=1")

    assert listener.recv(4096) == b"READY=1\nSTATUS=waiting MAINPID=1"


def test_a_socket_in_the_file_system_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that systemd makes is a path."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind("s")
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
        tell(WATCHDOG=1)

        assert inbox.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", [None, "", "relative", "/nobody/listens/here", "@nobody-listens-here"])
def test_where_nobody_listens_nothing_happens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemons run by hand as well."""
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)

    tell(READY=1)


@pytest.mark.parametrize(
    ("period", "process", "expected"),
    [("2500000", "", 2.5), ("2500000", "1", None), ("", "", None), ("0", "", None), ("soon", "", None)],
)
def test_the_period_is_that_of_this_process(
    period: str, process: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that inherits the environment is not the one that is watched."""
    monkeypatch.setenv("WATCHDOG_USEC", period)
    monkeypatch.setenv("WATCHDOG_PID", process)

    assert watchdog_period_s() == expected


def test_a_loop_lives_when_it_comes_round() -> None:
    """One that has not come round since it was asked last does not, whatever it computed."""
    pulse = Pulse()

    pulse.beat()
    alive = [pulse.went_on(), pulse.went_on()]
    sum(range(100_000))
    alive.append(pulse.went_on())
    pulse.beat()

    assert [*alive, pulse.went_on()] == [True, False, False, True]


def test_work_lives_while_it_computes() -> None:
    """Training may take an hour; a thread that waits for a dead file system computes nothing."""
    begin, release = threading.Event(), threading.Event()
    made: list[Pulse] = []

    def work() -> None:
        made.append(Pulse())
        with made[0].working():
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                begin.set()
            begin.clear()
            release.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    begin.wait(30)
    computing = []
    for _ in range(3):
        computing.append(made[0].went_on())
        time.sleep(0.05)
    while begin.is_set():
        time.sleep(0.01)
    time.sleep(0.2)  # until it waits
    made[0].went_on()
    time.sleep(0.2)
    waiting = made[0].went_on()
    release.set()
    thread.join()

    assert (computing, waiting) == ([True, True, True], False)


def test_an_event_loop_that_is_held_up_does_not_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed one neither."""
    monkeypatch.setattr("shared_models.service.TURN_WITHIN_S", 0.2)
    loop, release = asyncio.new_event_loop(), threading.Event()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    free = turns(loop)
    loop.call_soon_threadsafe(release.wait)
    held = turns(loop)
    release.set()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

    assert (free, held, turns(loop)) == (True, False, False)


def test_signs_of_life_stop_when_a_check_fails(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was added later."""
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    alive = threading.Event()
    alive.set()

    with Watchdog(lambda: True) as watchdog:
        watchdog.watch(alive.is_set)
        first = listener.recv(4096)
        alive.clear()
        time.sleep(0.5)
        listener.setblocking(False)
        while True:  # what was sent before
            try:
                listener.recv(4096)
            except BlockingIOError:
                break
        time.sleep(0.5)
        with pytest.raises(BlockingIOError):
            listener.recv(4096)

    assert first == b"WATCHDOG=1"


def test_without_a_watchdog_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for it."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)

    before = set(threading.enumerate())

    with Watchdog(lambda: True):
        assert set(threading.enumerate()) <= before
