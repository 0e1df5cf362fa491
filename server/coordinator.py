"""The long-lived process of the coordinator: Flower's SuperLink inside it, behind TLS and an admission layer.

Flower's Control and Runtime APIs are anonymous, so they are never served: this process calls their handlers directly.
The one port that hospitals reach speaks the eight Fleet calls of a registered node, and nothing else; it demands a
client certificate, and then Flower's node authentication decides which hospital is speaking.
"""

import asyncio
import fcntl
import hashlib
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificate
from uvicorn.protocols.http.auto import AutoHTTPProtocol

# Flower phones home and looks for updates unless told not to, before it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(1 << 20))  # what is sent again when a network fails

from flwr.app import Message
from flwr.common.constant import (
    ISOLATION_MODE_PROCESS,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    TRANSPORT_TYPE_GRPC_RERE,
    Status,
    SubStatus,
)
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.runtime import runtime_handlers

from server.expiry import reminding
from server.halt import Halt
from server.members import registered
from server.receipts import LastReceipts
from server.settings import Settings
from server.spool import SpooledObjectStore
from server.store import State, Store, StudyRow
from server.studies import Studies
from server.study import Registered
from server.turns import Turns
from shared_models.config import read_toml
from shared_models.durable import file_state
from shared_models.errors import AlreadyRunningError, ConfigError, IdentityError, RosterError, StudyStateError
from shared_models.listening import load_tls
from shared_models.plan import StudyPlan, parse_plan
from shared_models.roster import Member
from shared_models.service import Watchdog, turns

log = logging.getLogger("konsil.coordinator")
# Flower logs every call on a handler of its own; what matters is in the journal.
logging.getLogger("flwr").setLevel(logging.ERROR)
logging.getLogger("flwr").handlers.clear()

FLEET_CALLS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
TLS_KEY = "konsil.tls_key"  # in a request's scope
LONGEST_CALL_S = 300.0  # longer than a hospital takes for an object of 1 MiB
MOST_CONNECTIONS_EACH = 64  # a hospital makes a handful
LARGEST_PULL = 1 << 16  # bytes of a request for messages, which names a node and little else
LONG_POLL_S = 10.0  # well below the 30 s at which Flower's client gives up
TASK_HEARTBEAT_S = 10.0

Asgi = Callable[[dict[str, Any], Any, Any], Any]


class _LinkState(InMemoryLinkState):
    """Flower's own state with two of its delays removed."""

    object_store: SpooledObjectStore

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """End the node's stale lease first: a killed hospital is back at once, not after its lease has run out.

        Only an authenticated activation reaches this: the request is signed with the node's key and names that key.
        """
        self.deactivate_node(node_id)
        return super().activate_node(node_id, heartbeat_interval)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Hand out a reply once all its objects have arrived; stock Flower hands it out before, then waits a second."""
        with self.lock:
            ready = {message_id for message_id in message_ids if self._whole(message_id)}
        return super().get_message_res(ready, run_id) if ready else []

    def _whole(self, message_id: str) -> bool:
        reply_id = self.message_ins_id_to_message_res_id.get(message_id)
        if reply_id is None or reply_id not in self.object_store:
            return True  # nothing has come, or an error without objects: Flower knows what to say
        tree = self.object_store.get_object_tree(reply_id)
        return all(self.object_store.has(node.object_id) for node in iterate_object_tree(tree))


class _Doorbell:
    """Lets a hospital's pull wait until there is something to pull, instead of asking again and again."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bells: dict[bytes, asyncio.Event] = {}
        self._closed = False
        self.public_keys: dict[int, bytes] = {}  # node id -> the header by which its requests are recognised

    def begin(self) -> None:
        """Called once the server's event loop runs: a ring before a hospital's first pull must not be lost."""
        self._loop = asyncio.get_running_loop()

    def ring(self, node_ids: Iterable[int]) -> None:
        """Called from the study's thread when messages for these nodes have been stored."""
        if self._loop is not None:
            for node_id in set(node_ids):
                self._loop.call_soon_threadsafe(self._bell(self.public_keys.get(node_id, b"")).set)

    def close(self) -> None:
        """Let every waiting pull through, and hold none any more."""
        self._closed = True
        self.ring(self.public_keys)

    def turns(self) -> bool:
        """Whether the server's event loop comes round."""
        return self._loop is not None and turns(self._loop)

    def _bell(self, public_key: bytes) -> asyncio.Event:
        return self._bells.setdefault(public_key, asyncio.Event())

    async def wait(self, public_key: bytes) -> asyncio.Event | None:
        """Wait until the bell of this node rings, or long enough. A stranger's key has no bell and never waits."""
        if self._closed or public_key not in self.public_keys.values():
            return None
        bell = self._bell(public_key)
        with suppress(TimeoutError):
            await asyncio.wait_for(bell.wait(), LONG_POLL_S)
        bell.clear()
        return bell


class _WithCertificate(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # one of two, by what is installed
    """uvicorn's HTTP, telling the application whose TLS certificate the connection has.

    Guarantees:
        * A call that is not over after ``LONGEST_CALL_S``, and a connection on which none comes, is cut off, however
          slowly the other side speaks or listens.
        * One certificate has ``MOST_CONNECTIONS_EACH`` connections at most: a hospital takes no other one's place.
    """

    _key, _end = "", None  # of a connection whose certificate could not be read

    def connection_made(self, transport: Any) -> None:
        """Keep the digest of the certificate's key, as the roster has it."""
        super().connection_made(transport)
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        key = load_der_x509_certificate(certificate).public_key()
        digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
        app: Asgi = self.app  # type: ignore[has-type]

        async def with_key(scope: dict[str, Any], receive: Any, send: Any) -> None:
            scope[TLS_KEY] = digest
            await app(scope, receive, send)

        self.app, self._key = with_key, digest
        self._begin()
        if sum(other._key == digest for other in self.connections) > MOST_CONNECTIONS_EACH:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """A call begins with its first byte."""
        if self._end is None:
            self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """A call is over, and the next one may be here."""
        self._over()
        super().on_response_complete()
        if not self.cycle.response_complete:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._over()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._end = self.loop.call_later(LONGEST_CALL_S, self.transport.abort)

    def _over(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None


class Admission:
    """ASGI middleware: the Fleet calls of a registered node pass; everything else is refused before Flower sees it.

    Args:
        app: Flower's.
        doorbell: Holds pulls.
        tls_keys: Header by which a node's requests are recognised -> digest of the TLS key that its connection has.
    """

    def __init__(self, app: Asgi, doorbell: _Doorbell, tls_keys: Mapping[bytes, str]) -> None:
        self._app = app
        self._doorbell = doorbell
        self._tls_keys = tls_keys

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Admit by method, path and certificate; hold a pull until there is a message."""
        if scope["type"] == "lifespan":
            self._doorbell.begin()
            await self._app(scope, receive, send)
        elif (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"] not in FLEET_CALLS
            or not self._own_certificate(scope)
        ):
            await _forbid(scope, send)
        elif scope["path"] == "/v1/fleet/pull-messages":
            await self._hold(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _own_certificate(self, scope: dict[str, Any]) -> bool:
        """Whether a request that names a node comes over a connection of this very hospital.

        One that names none goes on to Flower, which refuses it.
        """
        named = [value for name, value in scope["headers"] if name == b"flwr-public-key"]
        return not named or (len(named) == 1 and self._tls_keys.get(named[0]) == scope[TLS_KEY])

    async def _hold(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Let a pull wait. Of a hospital that hung up meanwhile Flower hears nothing, and its message stays."""
        content, more = b"", True
        while more:
            event = await receive()
            if event["type"] != "http.request":
                return
            content, more = content + event["body"], event["more_body"]
            if len(content) > LARGEST_PULL:
                await _forbid(scope, send)
                return
        hung_up = asyncio.ensure_future(_hung_up(receive))
        ringing = asyncio.ensure_future(self._doorbell.wait(dict(scope["headers"]).get(b"flwr-public-key", b"")))
        try:
            await asyncio.wait({hung_up, ringing}, return_when=asyncio.FIRST_COMPLETED)
            if hung_up.done():
                log.debug("a hospital hung up while it waited for messages")
                if ringing.done() and (bell := ringing.result()) is not None:
                    bell.set()  # for its next pull
                return
            bell, body = ringing.result(), [{"type": "http.request", "body": content, "more_body": False}]

            async def again() -> dict[str, Any]:
                if not body:
                    await asyncio.shield(hung_up)
                return body.pop() if body else {"type": "http.disconnect"}

            async def note(event: dict[str, Any]) -> None:
                # A message went out, so another may be waiting behind it: let the next pull through at once.
                if bell is not None and event["type"] == "http.response.body" and event.get("body"):
                    bell.set()
                await send(event)

            await self._app(scope, again, note)
        finally:
            hung_up.cancel()
            ringing.cancel()


async def _hung_up(receive: Any) -> None:
    """Return once the other side is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _forbid(scope: dict[str, Any], send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"not served here\n"})


class _RuntimeCalls:
    """What ``HttpGrid`` asks of a Runtime API client, answered by Flower's own handlers in this process.

    The names are Flower's; each takes its protobuf request.
    """

    def __init__(self, state: LinkState, task: Any) -> None:
        for name, handler in {
            "GetNodes": runtime_handlers.get_nodes,
            "PushMessages": runtime_handlers.push_messages,
            "PullMessages": runtime_handlers.pull_messages,
            "PushObject": runtime_handlers.push_object,
            "PullObject": runtime_handlers.pull_object,
            "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
        }.items():
            setattr(self, name, partial(handler, state=state, task=task))

    def close(self) -> None:
        """Nothing to close: there is no connection."""


class InProcessGrid(HttpGrid):
    """Flower's Grid without its HTTP: the ServerApp and the SuperLink share this process."""

    def __init__(self, state: LinkState, task: Any, doorbell: _Doorbell) -> None:
        super().__init__(token="in-process")  # noqa: S106 - not a secret: no request ever carries it
        self._client = _RuntimeCalls(state, task)  # type: ignore[assignment]  # the calls HttpGrid makes, nothing else
        self._doorbell = doorbell

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store the messages and everything they refer to, then wake the hospitals they are for."""
        batch = list(messages)
        message_ids = super().push_messages(batch)
        self._doorbell.ring(message.metadata.dst_node_id for message in batch)
        return message_ids


class SuperLink:
    """Flower's SuperLink, served to registered hospitals only; a context manager.

    Raises:
        ConfigError: The port is in use, or a file of the settings cannot be read.
        IdentityError: The coordinator's certificate has expired, the roster is not the consortium's, or a hospital's
            node key is no P-384 public key.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._doorbell = _Doorbell()
        app = create_app(_lifespan_config(settings), SuperLinkLifespan)
        factory = app.state.linkstate_factory
        self._objects = SpooledObjectStore(settings.state / "spool")
        factory.objectstore_factory.store_instance = self._objects
        factory.state_instance = _LinkState(factory.federation_manager, self._objects)
        self.state: LinkState = factory.state_instance
        self._refreshing = threading.Lock()
        self._roster = file_state(settings.roster)
        self.members = registered(settings)
        self.node_ids = {member.name: self._register(member) for member in self.members}
        self._tls_keys: dict[bytes, str] = {}
        self._note_keys()
        admission = Admission(app, self._doorbell, self._tls_keys)
        self._server = uvicorn.Server(_uvicorn_config(admission, settings))
        self._thread = threading.Thread(target=self._serve, name="superlink", daemon=True)

    def _register(self, hospital: Member) -> int:
        try:
            key = load_ssh_public_key(hospital.node_key.encode("ascii"))
        except ValueError as error:
            raise IdentityError(
                f"the node key of {hospital.name} cannot be read: {error}", hint="Enrol the hospital again."
            ) from None
        if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
            raise IdentityError(
                f"the node key of {hospital.name} is no P-384 key", hint="Flower's node keys are P-384."
            )
        public_bytes = public_key_to_bytes(key)
        node_id = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_bytes, 0, name=hospital.name)
        self._doorbell.public_keys[node_id] = b64encode(public_bytes)
        return node_id

    def _note_keys(self) -> None:
        """Which TLS key each node's requests have to come with, as of the roster."""
        known = {self._doorbell.public_keys[self.node_ids[m.name]]: m.tls_key for m in self.members}
        self._tls_keys.update(known)
        for header in self._tls_keys.keys() - known.keys():
            del self._tls_keys[header]

    def refresh(self) -> tuple[Member, ...]:
        """Take in a roster that was signed meanwhile: newcomers and new keys are let in, who was turned out is not.

        Returns:
            The members that may connect now. A roster that is refused changes nothing; the log says why.
        """
        with self._refreshing:
            found = file_state(self._settings.roster)
            now = time.time()
            if found == self._roster and all(member.valid(now) for member in self.members):
                return self.members
            try:
                members = registered(self._settings)
                node_keys = {member.name: member.node_key for member in self.members}
                stay = {member.name for member in members if node_keys.get(member.name) == member.node_key}
                for name in node_keys.keys() - stay:
                    node_id = self.node_ids.pop(name)
                    self._doorbell.public_keys.pop(node_id, None)
                    self.state.delete_node(NOOP_FLWR_AID, node_id)
                for member in members:
                    if member.name not in stay:
                        self.node_ids[member.name] = self._register(member)
            except (RosterError, IdentityError) as error:
                log.warning("the roster of before stays in force: %s (%s)", error, error.hint)
            else:
                self.members = members
                self._note_keys()
            self._roster = found
            return self.members

    def __enter__(self) -> "SuperLink":
        host, port = self._settings.host, self._settings.port
        try:
            self._socket = socket.create_server((host, port), reuse_port=False)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}",
                hint="Stop what uses the port, or choose another.",
            ) from None
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise ConfigError("the SuperLink did not start", hint="See the log above.")
            time.sleep(0.01)
        return self

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])

    def __exit__(self, *_: object) -> None:
        self._doorbell.close()
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()
        self._objects.close()

    def answers(self) -> bool:
        """Whether its event loop comes round."""
        return self._doorbell.turns()

    def online(self) -> set[str]:
        """Names of the hospitals whose lease is alive."""
        infos = self.state.get_node_info(node_ids=list(self.node_ids.values()), statuses=[NodeStatus.ONLINE])
        return {info.name for info in infos}

    @contextmanager
    def run(self) -> Iterator[InProcessGrid]:
        """One Flower run: created, claimed and kept alive by this process, with no bundle that anyone could fetch."""
        state = self.state
        run_id = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (task,) = [task for task in state.get_tasks(statuses=[Status.PENDING]) if task.run_id == run_id]
        if state.claim_task(task.task_id) is None or not state.activate_task(task.task_id):
            raise ConfigError("Flower would not start the run", hint="This Flower version is not supported.")
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, task.task_id, SUPERLINK_NODE_ID
        grid = InProcessGrid(state, task, self._doorbell)
        grid.set_run(state.get_run_info(run_ids=[run_id])[0])
        done = threading.Event()
        heartbeat = threading.Thread(target=_keep_alive, args=(state, task.task_id, done), daemon=True)
        heartbeat.start()
        outcome = SubStatus.FAILED
        try:
            yield grid
            outcome = SubStatus.COMPLETED
        finally:
            done.set()
            heartbeat.join()
            state.finish_task(task.task_id, sub_status=outcome, details="")


def _keep_alive(state: LinkState, task_id: int, done: threading.Event) -> None:
    while not done.wait(TASK_HEARTBEAT_S):
        state.acknowledge_task_heartbeat(task_id)


def _lifespan_config(settings: Settings) -> SuperLinkLifespanConfig:
    """Flower's own settings: everything optional is off, and nothing is installed from a network."""
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=settings.host,
        port=settings.port,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secrets.token_bytes(32),
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )


def _uvicorn_config(app: Asgi, settings: Settings) -> uvicorn.Config:
    certificate = _valid_certificate(settings.tls.certificate)
    config = uvicorn.Config(
        app,
        http=_WithCertificate,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=120,  # longer than a hospital trains between two calls
        ssl_certfile=certificate,
        ssl_keyfile=settings.tls.key,
        ssl_ca_certs=str(settings.tls.ca),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
    return load_tls(config, hint="Check [tls] in the settings.")


def _valid_certificate(path: Path) -> Path:
    """The path of a certificate that is valid today."""
    try:
        certificate = load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"certificate {path} cannot be read: {error}", hint="Check [tls] in the settings."
        ) from None
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise IdentityError(
            f"certificate {path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}",
            hint="Have it renewed by the authority that hospitals trust, or mend this machine's clock.",
        )
    return path


@contextmanager
def coordinating(settings: Settings, watchdog: Watchdog | None = None) -> Iterator[Studies]:
    """A coordinator while it runs: hospitals are served, and every study that is not over goes on.

    Args:
        settings: The coordinator's.
        watchdog: Told to look after the server that hospitals reach.

    Raises:
        AlreadyRunningError: Another coordinator has this state folder.
        ConfigError, IdentityError, StoreError: It cannot start; see ``SuperLink`` and ``Store``.
    """
    from server.app import conduct  # noqa: PLC0415 - torch is only needed once studies really run
    from server.round import check_fits  # noqa: PLC0415
    from shared_models.pretrained import offer_bases  # noqa: PLC0415

    offer_bases(settings.pretrained)
    with _only_one(settings.state), closing(Store(settings.database_url)) as store, SuperLink(settings) as link:
        receipts = LastReceipts(settings.state / "last-receipts.json")
        if watchdog is not None:
            watchdog.watch(link.answers)

        def members() -> dict[str, Registered]:
            return {m.name: Registered(bytes.fromhex(m.identity), m.public_size) for m in link.refresh()}

        def run(row: StudyRow, turns: Turns, halt: Halt) -> None:
            conduct(row, grid, members, receipts, store, turns, halt, patient=True)

        def check(plan: StudyPlan) -> None:
            check_fits(plan, members())

        studies = Studies(store, settings.state / "studies", run, check=check)
        with link.run() as grid, _shown(settings, studies), reminding(settings), studies:
            yield studies


@contextmanager
def _shown(settings: Settings, studies: Studies) -> Iterator[None]:
    """The page and the event files, where the settings ask for them; nobody else pays for their imports."""
    with ExitStack() as stack:
        if settings.page is not None:
            from server.page import serving  # noqa: PLC0415

            stack.enter_context(serving(settings, studies))
        if settings.tensorboard:
            from server.event_files import writing  # noqa: PLC0415

            stack.enter_context(writing(settings, studies))
        yield


@contextmanager
def _only_one(state: Path) -> Iterator[None]:
    """Hold the lock on the state folder: two coordinators would use attempts' numbers twice."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "coordinator.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlreadyRunningError(
                f"another coordinator has {state}", hint="Stop it, or give this one a state folder of its own."
            ) from None
        yield


def run_study(settings: Settings, plan_file: Path, folder: Path | None) -> None:
    """Coordinate until one study is over; one that was begun before goes on where it was.

    Raises:
        ConfigError: The plan is invalid.
        StudyStateError: The study is over already, or it ends otherwise than finished; the last checkpoint stays valid.
    """
    fields = read_toml(plan_file, "plan")
    plan = parse_plan(fields, str(plan_file))
    with coordinating(settings) as studies:
        before = studies.submit(fields, by="the command line", folder=folder).row
        if before.state.over:
            raise StudyStateError(
                f"study {plan.study} is {before.state}: it has run here before",
                hint="Give the new study another name; its hospitals have charged this one already.",
            )
        studies.resume(plan.study)
        row = studies.wait(plan.study)
        if row.state is not State.FINISHED:
            raise StudyStateError(
                f"study {plan.study} is {row.state}: {row.reason}", hint=f"See {row.folder / 'events.jsonl'}."
            )
