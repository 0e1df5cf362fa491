"""One daemon per hospital: told to end, it ends after its message; and nobody else is ever told."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.process import PROCESS, Ending, Process, announced, refuse_second, running, stop
from shared_models.errors import AlreadyRunningError

Start = Callable[[str], "subprocess.Popen[str]"]

# A daemon that answers one message for ever so long, or for as long as it is told.
DAEMON = """
import signal, sys, time
from pathlib import Path
from client.process import Ending, announced

until = Ending()
signal.signal(signal.SIGTERM, until.on_signal)
with announced(Path(sys.argv[1])):
    if sys.argv[2] == "idle":
        time.sleep(60)
    with until.answering():
        print("answering", flush=True)
        end = time.monotonic() + float(sys.argv[2])
        while time.monotonic() < end:
            time.sleep(0.01)
        print("answered", flush=True)
    sys.exit(7 if until.is_set() else 8)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that announces itself in the test's folder; ends whatever was started."""
    started: list[subprocess.Popen[str]] = []

    def begin(how: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", textwrap.dedent(DAEMON), str(tmp_path), how]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        started.append(process)
        end = time.monotonic() + 30
        while running(tmp_path) is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_an_idle_daemon_ends_at_once(start: Start, tmp_path: Path) -> None:
    """Status 0; nothing is left that says it runs."""
    process = start("idle")

    ended = stop(tmp_path, patience_s=20)

    assert ended is not None
    assert (ended.pid, process.wait(timeout=5)) == (process.pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_answers_a_message_answers_it_first(start: Start, tmp_path: Path) -> None:
    """What was charged is not thrown away. ``stop`` returns when it is gone."""
    process = start("1.0")
    assert process.stdout is not None
    assert process.stdout.readline() == "answering\n"

    stop(tmp_path, patience_s=20)

    assert process.stdout.read() == "answered\n"
    assert process.wait(timeout=5) == 7


def test_a_daemon_that_takes_too_long_is_named_and_not_killed(start: Start, tmp_path: Path) -> None:
    """Whether to kill it is a person's decision: it may be training under a charge."""
    process = start("60")
    assert process.stdout is not None
    process.stdout.readline()

    with pytest.raises(AlreadyRunningError, match=f"process {process.pid} is still at its message after 0.2 s"):
        stop(tmp_path, patience_s=0.2)

    assert process.poll() is None


def test_stopping_what_does_not_run_says_so(start: Start, tmp_path: Path) -> None:
    """Without a file, and with one that a killed daemon left behind."""
    assert stop(tmp_path, patience_s=1) is None
    process = start("idle")
    process.kill()
    process.wait()

    assert (tmp_path / PROCESS).exists()
    assert stop(tmp_path, patience_s=1) is None
    refuse_second(tmp_path)


def test_a_number_that_was_given_away_again_is_not_told_to_end(tmp_path: Path) -> None:
    """This very process has the number in the file, and began at another time: it lives to see the end of the test."""
    for began in ("1@" + "0" * 36, "", "1"):
        (tmp_path / PROCESS).write_text(json.dumps(Process(os.getpid(), began)._asdict()), encoding="utf-8")

        assert running(tmp_path) is None
        assert stop(tmp_path, patience_s=1) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": -1, "began": "1"}', '{"pid": 1}', "null"])
def test_a_damaged_file_names_nobody(tmp_path: Path, content: str) -> None:
    """The ledger's lock is what keeps two from writing; this file only helps people."""
    (tmp_path / PROCESS).write_text(content, encoding="utf-8")

    assert running(tmp_path) is None


def test_a_daemon_that_died_and_was_not_noticed_by_its_parent_does_not_run(start: Start, tmp_path: Path) -> None:
    """A zombie has a number and a beginning, and is nobody."""
    process = start("idle")
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert running(tmp_path) is None


def test_a_second_one_is_told_who_runs(tmp_path: Path) -> None:
    """The first is this process."""
    with announced(tmp_path), pytest.raises(AlreadyRunningError, match=f"process {os.getpid()}$"):
        refuse_second(tmp_path)

    refuse_second(tmp_path)


def test_a_signal_between_messages_ends_the_process_and_during_one_it_waits() -> None:
    """In both cases no further message is taken."""
    until = Ending()
    with until.answering():
        until.on_signal(signal.SIGTERM, None)
    assert until.is_set()

    with pytest.raises(SystemExit):
        Ending().on_signal(signal.SIGTERM, None)


def test_a_signal_on_the_way_into_a_wait_does_not_wait_for_itself() -> None:
    """It may come while this thread holds the lock that setting the event needs."""
    until = Ending()

    with until.answering(), until._cond:
        until.on_signal(signal.SIGTERM, None)

    assert until.wait(0)
