"""The hospital's daemon against real servers: whom it trusts, what it never does, what it sends when it fails."""

import asyncio
import io
import logging
import os
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab

import client.daemon
import client.tls
import server.coordinator
from client import app as client_app
from client.daemon import FleetConnection, serve
from client.process import Ending
from server.coordinator import InProcessGrid, SuperLink
from server.gather import Gather
from shared_models.errors import ConnectionLostError, IdentityError
from shared_models.messages import Proposal, Refusal
from tests.client.test_cli import run
from tests.federation import make_federation
from tests.link import Keys
from tests.network import Relay, running_loop


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Keys, certificates and settings of a coordinator and three hospitals."""
    return Keys(tmp_path)


def test_a_coordinator_with_a_foreign_certificate_is_not_trusted(keys: Keys) -> None:
    """Signed by another authority: the hospital does not say a word to it, and says what is wrong."""
    from server.pki import Authority

    keys.coordinator_certificate(Authority(keys.folder / "foreign"))

    with SuperLink(keys.coordinator()), pytest.raises(IdentityError, match="certificate is not trusted"):
        FleetConnection(keys.hospital("north")).__enter__()


def test_a_foreign_certificate_of_the_hospital_is_noticed_before_it_connects(keys: Keys) -> None:
    """The error is the certificate's, not a lost connection that would be tried again for ever."""
    from server.pki import Authority

    keys.hospital_certificate("north", Authority(keys.folder / "foreign"))

    with pytest.raises(IdentityError, match="was not issued by the authority"):
        FleetConnection(keys.hospital("north"))


def test_a_foreign_certificate_does_not_get_past_the_coordinator(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hospital that skips its own check is hung up on: the coordinator does not rely on anybody's manners."""
    from server.pki import Authority

    keys.hospital_certificate("north", Authority(keys.folder / "foreign"))
    monkeypatch.setattr(client.tls, "issued_by", lambda *_: True)

    with SuperLink(keys.coordinator()) as link, pytest.raises(ConnectionLostError):
        FleetConnection(keys.hospital("north")).__enter__()

    assert link.online() == set()


def test_an_expired_certificate_of_the_hospital_is_noticed_before_it_connects(keys: Keys) -> None:
    """The dates are in the message."""
    keys.hospital_certificate("north", keys.expired("old-authority"))

    with pytest.raises(IdentityError, match=r"is valid from .* UTC, not now"):
        FleetConnection(keys.hospital("north"))


def test_a_node_key_that_others_can_read_is_refused(keys: Keys) -> None:
    """0600 or nothing; the hint is the command that mends it."""
    key = keys.hospital("north").keys.node
    key.chmod(0o644)

    with pytest.raises(IdentityError, match="can be read by others") as caught:
        FleetConnection(keys.hospital("north"))

    assert "chmod 600" in caught.value.hint


def test_private_keys_are_written_for_their_owner_alone(keys: Keys) -> None:
    """Every private key that is made has mode 0600."""
    made = [*keys.folder.rglob("*.key")]

    assert len(made) == 2 + 3 * 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}


def test_nobody_there_is_a_lost_connection(keys: Keys) -> None:
    """Refused connections are worth trying again."""
    with pytest.raises(ConnectionLostError):
        FleetConnection(keys.hospital("north")).__enter__()


def test_a_coordinator_that_comes_late_is_found(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    """It tries again with growing pauses, says so, and connects when the coordinator is there."""
    caplog.set_level(logging.INFO, "konsil.hospital")
    with keys.connected("north", client_app.app):
        time.sleep(1.2)
        with SuperLink(keys.coordinator()) as link:
            _wait_for(link.online, 20)

    assert "trying again in" in caplog.text
    assert f"no coordinator at 127.0.0.1:{keys.port}" in caplog.text


# A hostile coordinator


class _Recorder:
    """In place of the admission layer: lets everything through, and writes down what hospitals ask and send."""

    calls: list[str]
    bodies: list[bytes]

    def __init__(self, app: Callable[..., Any], *_: object) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        _Recorder.calls.append(scope.get("path", ""))

        async def listening() -> Any:
            event = await receive()
            _Recorder.bodies.append(event.get("body", b""))
            return event

        await self._app(scope, listening, send)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve Flower whole, as a coordinator that ignores our admission layer would."""
    monkeypatch.setattr(_Recorder, "calls", [], raising=False)
    monkeypatch.setattr(_Recorder, "bodies", [], raising=False)
    monkeypatch.setattr(server.coordinator, "Admission", _Recorder)


def _bundle(marker: Path) -> bytes:
    """A Flower bundle whose client app leaves a mark when it is so much as imported."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("evil.py", f"open({str(marker)!r}, 'w').write('ran')\n")
        archive.writestr(
            "pyproject.toml",
            '[project]\nname = "evil"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "evil"\n'
            '[tool.flwr.app.components]\nserverapp = "evil:app"\nclientapp = "evil:app"\n',
        )
    return content.getvalue()


@pytest.mark.usefixtures("hostile")
def test_foreign_code_is_neither_fetched_nor_run(keys: Keys, tmp_path: Path) -> None:
    """A run with a hostile bundle, and every kind of message: the daemon answers no, and asks for no bundle."""
    marker = tmp_path / "marker"
    bundle = _bundle(marker)
    with keys.connected("north", client_app.app), SuperLink(keys.coordinator()) as link:
        state, fab = link.state, Fab("", bundle, {})
        fab_hash = state.store_fab(fab)
        run_id = state.create_run(
            "evil/evil", "1.0.0", fab_hash, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        grid = _grid_of(link, run_id)
        _wait_for(link.online, 20)
        replies = [_send(grid, link, kind) for kind in ("train", "evaluate", "query", "train.evil", "query.propose")]

    assert [message.has_error() for message in replies[:4]] == [True] * 4
    assert {message.error.reason for message in replies[:4]} == {"not admitted"}
    assert replies[4].content.config_records["konsil"]["type"] == Refusal.__name__
    assert not marker.exists()
    assert not [call for call in _Recorder.calls if "fab" in call or "run" in call]


def _grid_of(link: SuperLink, run_id: int) -> InProcessGrid:
    from flwr.common.constant import SUPERLINK_NODE_ID, Status
    from flwr.supercore.task_identity import TaskIdentity

    state = link.state
    (task,) = [task for task in state.get_tasks(statuses=[Status.PENDING]) if task.run_id == run_id]
    assert state.claim_task(task.task_id)
    assert state.activate_task(task.task_id)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, task.task_id, SUPERLINK_NODE_ID
    grid = InProcessGrid(state, task, link._doorbell)
    grid.set_run(state.get_run_info(run_ids=[run_id])[0])
    return grid


def _send(grid: InProcessGrid, link: SuperLink, kind: str) -> Message:
    content = RecordDict({"code": ConfigRecord({"code": "import os; os.system('true')"})})
    (message_id,) = grid.push_messages([Message(content, dst_node_id=link.node_ids["north"], message_type=kind)])
    answers: list[Message] = []

    def arrived() -> bool:
        answers.extend(grid.pull_messages([message_id]))
        return bool(answers)

    _wait_for(arrived, 20)
    return answers[0]


@pytest.mark.usefixtures("hostile")
def test_the_text_of_an_exception_never_reaches_the_wire(
    keys: Keys, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug deep in the hospital raises with a patient's value in its text: the wire has a code, the log the place."""
    value = "systolic-31337"

    def broken(*_: object) -> None:
        raise RuntimeError(f"cannot digest {value}")

    monkeypatch.setattr(client_app, "hospital_at", broken)
    with keys.connected("north", client_app.app), SuperLink(keys.coordinator()) as link, link.run() as grid:
        gather = Gather(grid, frozenset({"north"}))
        _wait_for(gather.online, 20)
        (answer,) = gather.ask({"north": (Proposal(plan={}), None)}, group="1", deadline_s=20)

    assert answer.problem == "error"
    assert "in broken" in caplog.text
    assert value not in caplog.text
    sent = b"".join(_Recorder.bodies)
    assert b"Refusal" in sent
    assert value.encode() not in sent
    assert b"RuntimeError" not in sent


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_transfer_that_breaks_goes_on_where_it_was(keys: Keys, direction: str) -> None:
    """Five connections die in the middle of 8 MB; what had arrived is not sent again, and the message is whole."""
    vector = np.arange(2_000_000, dtype="<u4")
    big, small = (RecordDict({"vector": ArrayRecord({"vector": Array(v)})}) for v in (vector, vector[:1]))
    seen: list[Message] = []

    def answer(message: Message, _context: Context) -> Message:
        seen.append(message)
        return Message(big if direction == "up" else small, reply_to=message)

    over, answers = Ending(), list[Message]()
    with running_loop() as loop, SuperLink(keys.coordinator()) as link, link.run() as grid:
        relay = Relay("127.0.0.1", keys.port, loop, breaks={direction: [2_500_000] * 5})
        settings = keys.hospital("north").model_copy(update={"coordinator": relay.address})
        arguments = (settings, keys.hospital_file("north"), answer)
        thread = threading.Thread(target=serve, args=arguments, kwargs={"until": over}, daemon=True)
        thread.start()
        _wait_for(link.online, 20)
        content = small if direction == "up" else big
        request = Message(content, dst_node_id=link.node_ids["north"], message_type="query.propose")
        (message_id,) = grid.push_messages([request])

        def arrived() -> bool:
            answers.extend(grid.pull_messages([message_id]))
            return bool(answers)

        _wait_for(arrived, 100)
        over.set()
        thread.join(20)
        relay.close()

    whole = answers[0] if direction == "up" else seen[0]
    np.testing.assert_array_equal(whole.content.array_records["vector"]["vector"].numpy(), vector)
    assert len(seen) == 1  # one message, whatever happened to connections
    assert relay.breaks[direction] == []
    assert relay.passed[direction] < 2 * vector.nbytes + 5 * (1 << 20)


class _Trickle(Relay):
    """A relay that can be told to let a byte through now and then."""

    trickling = threading.Event()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str, both: set[asyncio.StreamWriter]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                for place in range(len(data)):
                    if way == "up" or not self.trickling.is_set():
                        writer.write(data[place:])
                        break
                    writer.write(data[place : place + 1])
                    await asyncio.sleep(0.2)
                await writer.drain()
        with suppress(OSError):
            writer.close()


def test_a_coordinator_that_sends_byte_by_byte_is_a_lost_connection(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each byte comes well before a read would time out; the call is over all the same, and the next one goes well."""
    caplog.set_level(logging.INFO, "konsil.hospital")
    monkeypatch.setattr(client.daemon, "LONGEST_CALL_S", 3.0)
    monkeypatch.setattr(server.coordinator, "LONG_POLL_S", 0.3)
    over = Ending()
    with running_loop() as loop, SuperLink(keys.coordinator()) as link:
        relay = _Trickle("127.0.0.1", keys.port, loop)
        settings = keys.hospital("north").model_copy(update={"coordinator": relay.address})
        arguments = (settings, keys.hospital_file("north"), client_app.app)
        thread = threading.Thread(target=serve, args=arguments, kwargs={"until": over}, daemon=True)
        thread.start()
        _wait_for(link.online, 20)

        relay.trickling.set()
        _wait_for(lambda: "not over after 3 s: the line or the other side is too slow" in caplog.text, 60)
        relay.trickling.clear()
        _wait_for(lambda: "connected to" in caplog.text.rpartition("not over after")[2], 60)

        over.set()
        thread.join(20)
        relay.close()
    assert "trying again in" in caplog.text


def test_headers_that_never_end_are_not_waited_for(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with a right certificate that answers with one letter of a header after the other."""
    monkeypatch.setattr(client.daemon, "LONGEST_CALL_S", 1.0)
    home = keys.folder / "coordinator"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "tls.pem", home / "tls.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(keys.authority.certificate)

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            for letter in chain(b"HTTP/1.1 200 OK\r\nx-letters: ", repeat(ord("a"))):
                writer.write(bytes([letter]))
                await writer.drain()
                await asyncio.sleep(0.1)

    with running_loop() as loop:
        serving = asyncio.start_server(answer, "127.0.0.1", keys.port, ssl=context)
        listener = asyncio.run_coroutine_threadsafe(serving, loop).result()
        with pytest.raises(ConnectionLostError, match="not over after 1 s") as caught:
            FleetConnection(keys.hospital("north")).__enter__()
        time.sleep(0.3)  # the server notices
        loop.call_soon_threadsafe(listener.close)

    assert "Check the address and the network" in caught.value.hint


def test_every_part_of_a_transfer_is_a_sign_of_life(keys: Keys) -> None:
    """A large model on a slow line takes longer than a watchdog waits; a call that does not return is none."""
    until = Ending()
    call = FleetConnection(keys.hospital("north"), until)._again(lambda request: request)

    alive = [until.pulse.went_on(), until.pulse.went_on()]
    call("object")

    assert [*alive, until.pulse.went_on()] == [True, False, True]


# Real processes


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Starts the hospital's own command on a federation's first hospital; ends whatever was started."""
    federation = make_federation(tmp_path, rounds=3)
    from server.pki import Authority

    authority = Authority(tmp_path)
    authority.issue(tmp_path / "hospitals" / "hospital-1" / "keys", "hospital-1")
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "client.cli", "start", str(federation.settings_file("hospital-1"))]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_daemon_on_the_same_ledger_is_refused(daemon: Callable[[], "subprocess.Popen[str]"]) -> None:
    """One error line, one hint line, exit status 1; the first daemon goes on."""
    first = daemon()
    assert first.stderr is not None
    assert "trying again" in first.stderr.readline()

    second = daemon()
    _, said = second.communicate(timeout=60)

    assert second.returncode == 1
    error, hint = said.strip().splitlines()[-2:]
    assert error == f"error: a daemon of this hospital runs already: process {first.pid}"
    assert hint.startswith("hint: ")
    assert first.poll() is None


def test_a_daemon_ends_when_it_is_told_to(daemon: Callable[[], "subprocess.Popen[str]"]) -> None:
    """SIGTERM is a clean end: status 0, no traceback."""
    process = daemon()
    assert process.stderr is not None
    assert "trying again" in process.stderr.readline()

    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=30)

    assert process.returncode == 0
    assert "Traceback" not in said


def test_a_daemon_ends_when_the_command_stop_tells_it_to(
    daemon: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """The command returns when it is gone; told again, it says that none runs."""
    process = daemon()
    assert process.stderr is not None
    assert "trying again" in process.stderr.readline()
    settings = tmp_path / "hospitals" / "hospital-1" / "hospital.toml"

    said = [run("stop", settings).output for _ in range(2)]

    assert said == [f"the daemon, process {process.pid}, has ended\n", "no daemon of this hospital runs\n"]
    assert process.wait(timeout=5) == 0


def test_serve_stops_when_the_event_is_set(keys: Keys) -> None:
    """An embedding process can end the loop while nobody is there."""
    over = Ending()
    arguments = (keys.hospital("north"), keys.hospital_file("north"), _never)
    thread = threading.Thread(target=serve, args=arguments, kwargs={"until": over})
    thread.start()

    over.set()
    thread.join(timeout=20)

    assert not thread.is_alive()


def _never(_message: Message, _context: Context) -> Message:
    raise AssertionError("no message ever came")


def _wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
