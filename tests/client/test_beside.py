"""The page's process beside the daemon's: there while the daemon is busy, gone when it is gone, back if it falls."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from client.beside import Told, beside
from client.settings import read_settings
from shared_models.errors import ConfigError
from tests.client.steward import add_page
from tests.federation import Federation

# What the daemon does beside its work: it serves the page, and says how its connection is.
DAEMON = """
import sys, time
from pathlib import Path
from client.beside import beside
from client.settings import read_settings

file = Path(sys.argv[1])
with beside(read_settings(file), file) as page:
    page.tell("connected")
    print("serving", flush=True)
    sys.stdin.readline()
"""
Daemon = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def settings_file(federation: Federation) -> Path:
    """A hospital with a page."""
    file = federation.settings_file("hospital-1")
    add_page(file)
    return file


@pytest.fixture
def daemon(settings_file: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that serves the page and is busy with something else."""
    command = [sys.executable, "-c", textwrap.dedent(DAEMON), str(settings_file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "serving\n"
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def page_of(daemon: "subprocess.Popen[str]") -> psutil.Process:
    """The page's process."""
    return until(lambda: psutil.Process(daemon.pid).children()[0])


def until(found: Callable[[], psutil.Process]) -> psutil.Process:
    """Wait until there is one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return found()
        except IndexError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ask(settings_file: Path) -> int:
    """Ask for the login; the socket is there from the beginning, so it only may take a while."""
    page = read_settings(settings_file).page
    assert page is not None
    return httpx.get(f"http://127.0.0.1:{page.port}/login", trust_env=False, timeout=60).status_code


def test_it_is_there_while_the_daemon_is_busy_back_when_it_was_killed_and_gone_with_the_daemon(
    settings_file: Path, daemon: "subprocess.Popen[str]"
) -> None:
    """A stopped daemon is as busy as a process can be. Nobody else can take the port; and none approves for nobody."""
    first = page_of(daemon)
    daemon.send_signal(signal.SIGSTOP)
    assert ask(settings_file) == 200
    daemon.send_signal(signal.SIGCONT)

    first.kill()
    assert ask(settings_file) == 200
    with pytest.raises(ConfigError, match="cannot listen on"), beside(read_settings(settings_file), settings_file):
        pass

    second = page_of(daemon)
    daemon.kill()
    second.wait(timeout=60)
    assert second.pid != first.pid
    with pytest.raises(httpx.ConnectError):
        ask(settings_file)


def test_without_a_page_in_the_settings_nothing_is_served(federation: Federation) -> None:
    """It is off unless asked for: no process, no port, and whoever tells it something is not heard."""
    file, before = federation.settings_file("hospital-1"), psutil.Process().children()  # a fork server of other tests

    with beside(read_settings(file), file) as nobody:
        nobody.tell("connected")
        assert psutil.Process().children() == before


def test_what_the_daemon_says_is_taken_in_word_by_word(tmp_path: Path) -> None:
    """The newest counts, and since when: said again, it does not begin anew. What is not understood is passed over."""
    pipe, told = tmp_path / "pipe", Told()
    pipe.write_bytes(b"away 100\nhello\nconnected x\nconnected\n\xff 1\nconnected 200\nconnected 300\n")

    with pipe.open("rb") as said:
        told.listen(said)

    assert (told.connection, told.since) == ("connected", 200.0)
