"""The SuperLink inside our process: who gets in, what is served, how soon a hospital is back."""

import asyncio
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

import server.coordinator
from client.daemon import FleetConnection
from client.tls import client_context
from server.coordinator import FLEET_CALLS, LONG_POLL_S, SuperLink, _Doorbell
from server.gather import Gather
from server.pki import publish_tls_key
from server.processes import Children
from server.trial import hand_out
from shared_models.errors import ConfigError, IdentityError, RosterSignatureError
from shared_models.messages import Enrolment, Proposal, reply
from tests.link import Keys, ready_hospital

PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Keys, certificates and settings of a coordinator and three hospitals."""
    return Keys(tmp_path)


@pytest.fixture
def link(keys: Keys) -> Iterator[SuperLink]:
    """The SuperLink, listening."""
    with SuperLink(keys.coordinator()) as link:
        yield link


def answering(message: Message, _context: Context) -> Message:
    """A hospital that enrols in anything."""
    return reply(Enrolment(plan_digest="0" * 64, public_size=10, software_digest="0" * 64), None, message)


def post(keys: Keys, path: str, body: bytes = b"", **headers: str) -> int:
    """One request with a hospital's TLS certificate but no node signature; the status that comes back."""
    context = client_context(keys.hospital("north"))
    with httpx.Client(verify=context) as client:
        url = f"https://127.0.0.1:{keys.port}{path}"
        return client.post(url, content=body, headers={**PROTOBUF, **headers}).status_code


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/control/start-run", StartRunRequest().SerializeToString()),
        ("/v1/control/register-node", RegisterNodeRequest(public_key=b"x").SerializeToString()),
        ("/v1/fleet/register-node", RegisterNodeFleetRequest(public_key=b"x").SerializeToString()),
        ("/v1/fleet/unregister-node", b""),
        ("/v1/fleet/get-fab", b""),
        ("/v1/fleet/get-run", b""),
        ("/v1/runtime/acquire-task", b""),
        ("/v1/runtime/pull-task-input", b""),
        ("/docs", b""),
        ("/openapi.json", b""),
        ("/v1/fleet/pull-messages/", b""),
        ("/v1/fleet/../control/start-run", b""),
    ],
)
@pytest.mark.usefixtures("link")
def test_whatever_is_no_fleet_call_of_a_node_is_refused(keys: Keys, path: str, body: bytes) -> None:
    """Control, Runtime, registration, bundles and documentation are not served, not even to a hospital."""
    assert post(keys, path, body) == 403


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/", "/health", *sorted(FLEET_CALLS)])
@pytest.mark.usefixtures("link")
def test_nothing_can_be_read_with_get(keys: Keys, path: str) -> None:
    """Only POST, and only to the Fleet calls."""
    with httpx.Client(verify=client_context(keys.hospital("north"))) as client:
        assert client.get(f"https://127.0.0.1:{keys.port}{path}").status_code == 403


@pytest.mark.parametrize("call", sorted(FLEET_CALLS))
@pytest.mark.usefixtures("link")
def test_a_fleet_call_without_a_node_signature_is_refused(keys: Keys, call: str) -> None:
    """A TLS certificate alone is no node: Flower's own authentication stays on behind the admission layer."""
    assert post(keys, call, ActivateNodeRequest(public_key=b"x", heartbeat_interval=30).SerializeToString()) in (
        400,
        401,
    )


@pytest.mark.usefixtures("link")
def test_without_a_client_certificate_there_is_no_connection(keys: Keys) -> None:
    """An anonymous peer gets a TLS failure and not one byte of HTTP."""
    context = ssl.create_default_context(cafile=keys.authority.certificate)

    with httpx.Client(verify=context) as client, pytest.raises(httpx.TransportError):
        client.post(f"https://127.0.0.1:{keys.port}/v1/fleet/activate-node")


def test_a_message_reaches_a_hospital_and_comes_back(keys: Keys, link: SuperLink) -> None:
    """The contract with Flower's internals: register, activate, push, pull, answer, all through the real thing."""
    with keys.connected("north", answering), link.run() as grid:
        gather = Gather(grid, frozenset({"north"}))
        _wait_for(gather.online, 10)

        (answer,) = gather.ask({"north": (Proposal(plan={}), None)}, group="1", deadline_s=10)

    assert isinstance(answer.body, Enrolment)


def test_nobody_waits_for_a_daemon_that_came_back_as_another_process(keys: Keys, link: SuperLink) -> None:
    """What a killed daemon was asked is lost: its successor has the same node, but another lease."""
    with link.run() as grid, FleetConnection(keys.hospital("north")):
        gather = Gather(grid, frozenset({"north"}))
        before, successor = gather.online()["north"], FleetConnection(keys.hospital("north"))
        restart = threading.Timer(0.5, successor.__enter__)
        restart.start()
        started = time.monotonic()

        answers = list(gather.ask({"north": (Proposal(plan={}), None)}, group="1", deadline_s=60))
        waited = time.monotonic() - started
        restart.join()
        after = gather.online()["north"]
        successor.__exit__()

    assert answers == []
    assert waited < 30
    assert (after.node_id, after.since > before.since) == (before.node_id, True)


def test_an_exchange_does_not_wait_for_a_poll(keys: Keys, link: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make it wait does not happen, in ten exchanges with pauses between them.

    An idle hospital's pull is held: none comes back empty but the one that may follow each message at once, and the
    hospital is not backing off when a message comes. No object of a reply is asked for before it is there, after which
    Flower would pause for a second. Benchmarks measure the time.
    """
    pulled: list[bool] = []
    available: list[bool] = []
    receive = FleetConnection.receive

    def watched(connection: FleetConnection) -> Message | None:
        message = receive(connection)
        pulled.append(message is not None)
        return message

    def pull(request: PullObjectRequest) -> PullObjectResponse:
        response = pull_object(request)
        available.append(response.object_available)
        return response

    monkeypatch.setattr(FleetConnection, "receive", watched)
    with keys.connected("north", answering), link.run() as grid:
        assert grid._client is not None
        pull_object = grid._client.PullObject
        monkeypatch.setattr(grid._client, "PullObject", pull)
        gather = Gather(grid, frozenset({"north"}))
        _wait_for(gather.online, 10)
        for number in range(10):
            (answer,) = gather.ask({"north": (Proposal(plan={}), None)}, group=str(number), deadline_s=20)
            assert isinstance(answer.body, Enrolment)
            threading.Event().wait(0.3)  # a hospital that polls would do so several times

    assert pulled.count(True) == 10
    assert pulled.count(False) <= 12  # one after each message, one at each end
    assert len(available) >= 10
    assert all(available)


def test_a_ring_before_the_first_pull_is_not_lost() -> None:
    """A hospital is asked something as soon as it is online, which is before it has pulled for the first time."""

    async def ring_then_wait() -> bool:
        doorbell = _Doorbell()
        doorbell.public_keys[7] = b"north"
        doorbell.begin()
        await asyncio.to_thread(doorbell.ring, [7])
        bell = await asyncio.wait_for(doorbell.wait(b"north"), LONG_POLL_S / 2)
        return bell is not None

    assert asyncio.run(ring_then_wait())


def test_a_killed_hospital_is_back_at_once(keys: Keys, link: SuperLink) -> None:
    """A second activation by the same key ends the stale lease; stock Flower refuses it until the lease has run out."""
    first = FleetConnection(keys.hospital("north"))
    first.__enter__()
    first._over.set()  # it dies without saying goodbye: no deactivation, no more heartbeats
    first._client.close()
    assert link.online() == {"north"}

    started = time.monotonic()
    with FleetConnection(keys.hospital("north")):
        elapsed = time.monotonic() - started

    assert elapsed < 5


def test_a_node_of_another_key_is_not_admitted(keys: Keys, link: SuperLink) -> None:
    """A valid certificate with a node key that nobody registered gets an error that says what to do."""
    assert link.online() == set()
    keys.add_hospital("stranger", public="elsewhere")

    with pytest.raises(IdentityError, match="does not accept this hospital's node key") as caught:
        FleetConnection(keys.hospital("stranger")).__enter__()

    assert "not enrolled with these keys" in caught.value.hint


def test_a_node_key_counts_with_its_own_certificate_only(keys: Keys, link: SuperLink) -> None:
    """North's certificate and south's node key: whoever stole one of the two gets nowhere with it."""
    stolen = keys.hospital("south").model_copy(update={"tls": keys.hospital("north").tls})

    with pytest.raises(IdentityError, match="or not with this TLS certificate"):
        FleetConnection(stolen).__enter__()
    with FleetConnection(keys.hospital("south")):
        assert link.online() == {"south"}


def test_a_certificate_that_is_not_on_the_roster_counts_no_longer(keys: Keys, link: SuperLink) -> None:
    """The authority signed both; the roster has the first. A new roster is taken in while the coordinator runs."""
    keys.hospital_certificate("north", keys.authority)
    with pytest.raises(IdentityError, match="or not with this TLS certificate"):
        FleetConnection(keys.hospital("north")).__enter__()

    publish = keys.folder / "coordinator" / "hospitals" / "north.tls.pub"
    publish_tls_key(keys.folder / "north" / "keys" / "tls.pem", publish)
    keys.sign_roster(version=2)
    link.refresh()

    with FleetConnection(keys.hospital("north")):
        assert link.online() == {"north"}


@pytest.mark.usefixtures("link")
def test_a_node_is_named_once(keys: Keys) -> None:
    """Two names in one request could be read differently by the admission layer and by Flower."""
    keys_of = [(keys.folder / name / "keys" / "node.key").read_bytes() for name in ("north", "south")]
    public = [b64encode(public_key_to_bytes(load_key(key).public_key())).decode() for key in keys_of]
    headers = [("flwr-public-key", key) for key in public]
    url = f"https://127.0.0.1:{keys.port}/v1/fleet/send-node-heartbeat"

    with httpx.Client(verify=client_context(keys.hospital("north"))) as client:
        codes = [
            client.post(url, headers=[*PROTOBUF.items(), *named]).status_code
            for named in (headers[1:], headers, headers[:1])
        ]

    assert codes[:2] == [403, 403]
    assert codes[2] in {400, 401}  # Flower's own refusal: there is no signature


def load_key(content: bytes) -> EllipticCurvePrivateKey:
    """A node key."""
    key = load_ssh_private_key(content, password=None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return key


@pytest.mark.parametrize("said", ["nothing", "a head", "a head and half a body"])
def test_a_hospital_that_speaks_byte_by_byte_is_cut_off(keys: Keys, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """With a good certificate: neither silence nor a call that never ends keeps a connection; others are served."""
    monkeypatch.setattr(server.coordinator, "LONGEST_CALL_S", 1.0)
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n"
    began = {"nothing": b"", "a head": head, "a head and half a body": head + b"\r\n"}[said]
    with SuperLink(keys.coordinator()) as link, _connection(keys, "north") as stream:
        stream.settimeout(20)
        stream.sendall(began)
        cut_off = False
        for _ in range(100):
            try:
                stream.sendall(b"x" if began else b"")
                stream.settimeout(0.05)
                cut_off = stream.recv(1000) == b""
            except TimeoutError:
                continue
            except OSError:
                cut_off = True
            if cut_off:
                break
        with FleetConnection(keys.hospital("south")):
            assert link.online() == {"south"}

    assert cut_off


def test_a_hospital_does_not_take_all_connections(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many for one certificate; another hospital finds its place."""
    monkeypatch.setattr(server.coordinator, "MOST_CONNECTIONS_EACH", 3)
    with SuperLink(keys.coordinator()) as link, ExitStack() as open_ones:
        streams = [open_ones.enter_context(_connection(keys, "north")) for _ in range(5)]
        time.sleep(0.5)
        for stream in streams:
            stream.settimeout(0.2)
        left = [_alive(stream) for stream in streams]
        with FleetConnection(keys.hospital("south")):
            assert link.online() == {"south"}

    assert left == [True, True, True, False, False]


def _connection(keys: Keys, name: str) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", keys.port))
    return client_context(keys.hospital(name)).wrap_socket(raw, server_hostname="127.0.0.1")


def _alive(stream: ssl.SSLSocket) -> bool:
    try:
        return stream.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


@pytest.mark.parametrize("first", ["hospital", "coordinator"])
def test_who_ends_while_a_call_waits_leaves_no_traceback(tmp_path: Path, first: str) -> None:
    """Real processes: a hospital is killed while its call waits, or the coordinator ends: nobody's fault."""
    keys = ready_hospital(tmp_path)
    settings = tmp_path / "coordinator" / "coordinator.toml"
    with Children(tmp_path / "logs") as children:
        coordinator = children.start("coordinator", "konsil-coordinator", "start", "--settings", str(settings))
        hospital = children.start("north", "konsil-hospital", "start", str(keys.hospital_file("north")))
        log, north = (tmp_path / "logs" / f"{name}.log" for name in ("coordinator", "north"))
        _wait_for(lambda: "connected to" in north.read_text(encoding="utf-8"), 60)
        time.sleep(0.5)  # it asks for messages, and waits
        if first == "hospital":
            hospital.kill()
            hospital.wait(20)
        coordinator.terminate()
        assert coordinator.wait(30) == 0
    said = log.read_text(encoding="utf-8")

    assert "Traceback" not in said
    assert "ClientDisconnect" not in said


def test_a_revoked_hospital_is_turned_away(keys: Keys) -> None:
    """Its certificate is still valid and its key is what it was; the signed roster counts, over real TLS."""
    keys.sign_roster(version=2, revoked=["north"])

    with SuperLink(keys.coordinator()) as link:
        with pytest.raises(IdentityError, match="does not accept this hospital's node key"):
            FleetConnection(keys.hospital("north")).__enter__()
        with FleetConnection(keys.hospital("south")):
            assert link.online() == {"south"}


def test_a_roster_that_the_root_key_did_not_sign_admits_nobody(keys: Keys) -> None:
    """The coordinator's own copy is checked too."""
    file = keys.coordinator().roster
    file.write_text(file.read_text("utf-8").replace('"public_size": 100', '"public_size": 101'), encoding="utf-8")

    with pytest.raises(RosterSignatureError, match="not the consortium's"):
        SuperLink(keys.coordinator())


def test_a_port_in_use_is_said_so(keys: Keys, link: SuperLink) -> None:
    """The second coordinator names the address and leaves the first one alone."""
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{keys.port}"):
        SuperLink(keys.coordinator()).__enter__()

    assert link.online() == set()


def test_an_expired_certificate_of_the_coordinator_is_refused_at_start(keys: Keys) -> None:
    """It says from when to when it was valid, before it listens."""
    keys.coordinator_certificate(keys.expired("old-authority"))

    with pytest.raises(IdentityError, match="is valid from"):
        SuperLink(keys.coordinator())


def test_a_node_key_that_is_none_is_refused_at_start(keys: Keys) -> None:
    """The hospital and the file are named."""
    roster = keys.roster(version=2)
    broken = roster.members[0].model_copy(update={"node_key": "ecdsa-sha2-nistp384 AAAA"})
    changed = roster.model_copy(update={"members": (broken, *roster.members[1:])})
    hand_out(keys.root, changed, [keys.folder / "coordinator"])

    with pytest.raises(IdentityError, match=r"the node key of north"):
        SuperLink(keys.coordinator())


def test_memory_is_given_back_when_answers_have_been_pulled(keys: Keys, link: SuperLink) -> None:
    """Flower's store holds nothing of an exchange once its answers are here."""
    with keys.connected("north", answering), link.run() as grid:
        gather = Gather(grid, frozenset({"north"}))
        _wait_for(gather.online, 10)
        assert len(list(gather.ask({"north": (Proposal(plan={}), None)}, group="1", deadline_s=60))) == 1

        assert link.state.num_message_ins() == 0
        assert link.state.num_message_res() == 0
        assert len(link.state.object_store) == 0


def _wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.02)
