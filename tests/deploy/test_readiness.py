"""Real daemons and a real notification socket: when they are ready, that they live, and that they end."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from server.demo import free_port
from tests.link import Keys

ROOT = Path(__file__).parents[2]
LOOKED_AT_EVERY_S = 0.5
Start = Callable[..., tuple["subprocess.Popen[str]", socket.socket]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command as systemd would, with a watchdog of two seconds; ends whatever was started."""
    started: list[subprocess.Popen[str]] = []
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = f"konsil-test-{os.getpid()}"
    inbox.bind(f"\0{address}")
    inbox.settimeout(60)

    def begin(*command: str | Path) -> tuple["subprocess.Popen[str]", socket.socket]:
        told = {"NOTIFY_SOCKET": f"@{address}", "WATCHDOG_USEC": str(int(4 * LOOKED_AT_EVERY_S * 1e6))}
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **told},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process, inbox

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    inbox.close()


def _until(inbox: socket.socket, line: str) -> list[str]:
    """What is told up to a line that begins so."""
    told: list[str] = []
    while not told or not any(each.startswith(line) for each in told[-1].splitlines()):
        told.append(inbox.recv(4096).decode())
    return told


def _drained(inbox: socket.socket) -> list[str]:
    told = []
    with _not_blocking(inbox):
        while True:
            try:
                told.append(inbox.recv(4096).decode())
            except BlockingIOError:
                return told


@contextmanager
def _not_blocking(inbox: socket.socket) -> Iterator[None]:
    patience_s = inbox.gettimeout()
    inbox.setblocking(False)
    yield
    inbox.settimeout(patience_s)


def test_a_hospital_is_ready_when_its_ledger_is_open_and_lives_while_it_waits(start: Start, tmp_path: Path) -> None:
    """A coordinator that is away for days keeps nobody from starting; SIGTERM ends it with status 0."""
    keys = Keys(tmp_path)

    process, inbox = start("client.cli", "start", keys.hospital_file("north"))
    until_ready = _until(inbox, "READY=1")
    ledger = (keys.hospital("north").state / "ledger.sqlite").exists()
    told = _until(inbox, "STATUS=no coordinator")
    for _ in range(4):
        told += _until(inbox, "WATCHDOG=1")
    process.send_signal(signal.SIGTERM)
    _until(inbox, "STOPPING=1")

    assert process.wait(30) == 0
    assert ledger
    assert len(until_ready) == 1


@contextmanager
def _never_finishing(keys: Keys, folder: Path) -> Iterator[threading.Event]:
    """A coordinator, by its certificate, that sends each byte of an endless header a little later."""
    keys.authority.issue(folder, "coordinator", hosts=["127.0.0.1"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    asked, over = threading.Event(), threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(1)
            asked.set()
            tls.sendall(b"HTTP/1.1 200 OK\r\nX-Endless: ")
            while not over.wait(0.2):
                tls.sendall(b"x")

    with socket.create_server(("127.0.0.1", keys.port)) as listener:
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        yield asked
        over.set()
        thread.join(10)


def test_a_hospital_whose_main_loop_hangs_gives_no_sign_of_life(start: Start, tmp_path: Path) -> None:
    """Here because of a coordinator that never finishes an answer: no timeout of a read ever ends that."""
    keys = Keys(tmp_path)

    with _never_finishing(keys, tmp_path / "impostor") as asked:
        process, inbox = start("client.cli", "start", keys.hospital_file("north"))
        _until(inbox, "READY=1")
        assert asked.wait(60)
        time.sleep(2 * LOOKED_AT_EVERY_S)  # the last sign may just have been given
        _drained(inbox)
        time.sleep(6 * LOOKED_AT_EVERY_S)
        told, status = _drained(inbox), process.poll()

    assert (told, status) == ([], None)


def test_a_coordinator_is_ready_when_it_serves_and_says_that_it_ends(start: Start, tmp_path: Path) -> None:
    """Both of its servers are looked after."""
    keys = Keys(tmp_path)
    file = keys.folder / "coordinator" / "coordinator.toml"
    settings = tomllib.loads(file.read_text(encoding="utf-8"))
    settings["control"] = {"port": free_port()}
    file.write_text(tomli_w.dumps(settings), encoding="utf-8")

    process, inbox = start("server.cli", "start", "--settings", file)
    _until(inbox, "READY=1")
    with socket.create_connection(("127.0.0.1", keys.port), timeout=10):
        pass
    for _ in range(3):
        _until(inbox, "WATCHDOG=1")
    process.send_signal(signal.SIGTERM)
    _until(inbox, "STOPPING=1")

    assert process.wait(30) == 0


CRASH = """
import threading
from client.process import keep_texts_of_crashes_out

keep_texts_of_crashes_out()
def fail():
    raise ValueError("patient P-0017")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""


def test_a_crash_leaves_no_patient_in_the_journal() -> None:
    """A journal keeps what is printed; an exception's text can hold a cell. Kind and place are enough to report it."""
    found = subprocess.run([sys.executable, "-c", CRASH], cwd=ROOT, capture_output=True, text=True, check=False)

    said = found.stdout + found.stderr
    assert found.returncode == 1
    assert said.count("a fault of this program: ValueError") == 2
    assert "in fail" in said
    assert "P-0017" not in said
