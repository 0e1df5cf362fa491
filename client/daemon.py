"""The hospital's long-lived process: dials out to the coordinator, keeps torch warm, runs the installed ClientApp.

It speaks Flower's Fleet API with mutual TLS and Flower's node authentication. It never asks for a bundle, opens no
port but that of the page on loopback, if there is one, and sends no exception text.
"""

import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

# Flower phones home unless told not to, before it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", str(1 << 20))  # what is sent again when a network fails

from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.beside import Beside, Nobody, beside
from client.deadline import Deadline
from client.deposit import Courier
from client.egress import EgressLog
from client.expiry import Reminder
from client.process import Ending
from client.settings import Settings
from client.tls import client_context
from shared_models.errors import ConnectionLostError, FederationError, IdentityError, ProtocolError
from shared_models.messages import REPLIES, StudyEnd, not_admitted
from shared_models.service import tell

log = logging.getLogger("konsil.hospital")
# Flower logs every call on a handler of its own.
logging.getLogger("flwr").setLevel(logging.ERROR)
logging.getLogger("flwr").handlers.clear()

HEARTBEAT_INTERVAL_S = 10.0  # Flower's minimum; a lease lasts two of them
HEARTBEAT_EVERY_S = 5.0
SHORTEST_POLL_S, LONGEST_POLL_S = 0.02, 2.0
SHORTEST_RETRY_S, LONGEST_RETRY_S = 0.5, 30.0
RETRY_FOR_S, LONGEST_TRANSFER_RETRY_S = 120.0, 8.0  # one object of a transfer
# One call, from its first byte to the last one of its answer. An object has 1 MiB, and two of them travel at a time.
LONGEST_CALL_S, LONGEST_TRANSFER_S = 60.0, 240.0
MAXIMUM_OBJECTS = 10_000  # in one message; a model of 2 GB is about 400

Handler = Callable[[Message, Context], Message]
Request = TypeVar("Request")
Response = TypeVar("Response")


class FleetConnection:
    """One activated node on the coordinator's Fleet API; a context manager.

    Messages travel as objects of at most 1 MiB, each named by its SHA-256. When the network fails in the middle, the
    object at hand is sent or fetched again, with growing pauses and jitter; those that arrived stay.

    Guarantees:
        * No call lasts longer than ``LONGEST_CALL_S``, or ``LONGEST_TRANSFER_S`` for an object, however slowly the
          other side speaks: it is a lost connection then.

    Args:
        settings: The hospital's own.
        until: Set when the process is to end; then nothing is tried again.

    Raises:
        IdentityError: A key or certificate is missing or has expired, or the other side does not accept it.
        ConnectionLostError: The coordinator cannot be reached; try again later.
    """

    def __init__(self, settings: Settings, until: Ending | None = None) -> None:
        self._until = until or Ending()
        private_key = _node_key(settings.keys.node)
        self._public_key = public_key_to_bytes(private_key.public_key())
        self._client = FleetHttpClient(
            f"https://{settings.coordinator}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private_key, private_key.public_key()),
            ],
            verify=client_context(settings),
        )
        self._over = threading.Event()
        # A coordinator that sends us elsewhere is not followed: what leaves would leave to somebody else.
        self._client._client.follow_redirects = False
        self.egress = EgressLog(settings)
        self._deadline = Deadline(self._client._client)
        self._client._client.event_hooks = {"request": [self._begin, self.egress.count]}

    def _begin(self, request: httpx.Request) -> None:
        self._deadline.begin(LONGEST_TRANSFER_S if request.url.path.endswith("-object") else LONGEST_CALL_S)

    def __enter__(self) -> "FleetConnection":
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_INTERVAL_S)
        try:
            self.node = Node(node_id=self._client.ActivateNode(request).node_id)
        except httpx.HTTPStatusError as error:
            self._client.close()
            raise _rejected(error) from None
        except (httpx.TransportError, ssl.SSLError) as error:
            self._client.close()
            raise _unreachable(error) from None
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()
        return self

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_INTERVAL_S)
        while not self._over.wait(HEARTBEAT_EVERY_S):
            with suppress(httpx.HTTPError):  # the main loop notices a lost connection by itself
                self._client.SendNodeHeartbeat(request)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(httpx.HTTPError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
        self._client.close()
        self.egress.write_counts()

    def receive(self) -> Message | None:
        """The next message with all its objects, or None. Objects are addressed by their SHA-256, which is checked.

        Raises:
            ProtocolError: The message refers to more objects than any model has, or to one that is not there.
        """
        response: PullMessagesResponse = self._client.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        message = message_from_proto(response.messages_list[0])
        return self._inflate(message, response.message_object_trees[0])

    def _inflate(self, message: Message, tree: ObjectTree) -> Message:
        run_id, message_id = message.metadata.run_id, message.metadata.message_id
        object_ids = [node.object_id for node in iterate_object_tree(tree)]
        if len(object_ids) > MAXIMUM_OBJECTS:
            raise ProtocolError(f"a message of {len(object_ids)} objects", hint="The coordinator is hostile or broken.")
        try:
            contents = pull_objects(
                object_ids, make_pull_object_fn_protobuf(self._again(self._client.PullObject), self.node, run_id)
            )
            confirm = self._again(self._client.ConfirmMessageReceived)
            make_confirm_message_received_fn_protobuf(confirm, self.node, run_id)(message_id)
            inflated = inflate_object_from_contents(message_id, contents)
        except (ObjectPullError, KeyError, ValueError, TypeError) as error:
            raise ProtocolError(f"a message could not be read: {error}", hint="It was dropped.") from None
        if not isinstance(inflated, Message):
            raise ProtocolError("a message's objects are no message", hint="It was dropped.")
        inflated.metadata.__dict__["_message_id"] = message_id
        return inflated

    def send(self, message: Message) -> None:
        """Push a reply and its objects.

        Raises:
            ProtocolError: The coordinator does not take it (its deadline has passed, or its study is over).
        """
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
            head = remove_content_from_message(message) if message.has_content() else message
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],  # how long a hospital computes is nobody else's business
            )
            try:
                response = self._again(self._client.PushMessages)(request)
                push = make_push_object_fn_protobuf(
                    self._again(self._client.PushObject), self.node, message.metadata.run_id, response.session_id
                )
                push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))
            except (httpx.HTTPStatusError, ObjectPushError) as error:
                raise ProtocolError(
                    f"the coordinator did not take the answer: {error}", hint="It was too late."
                ) from None
            finally:
                self.egress.write_counts()

    def _again(self, call: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """The same call, tried again while the network is away; only for calls that do no more twice than once."""

        def patient(request: Request) -> Response:
            pause_s, deadline = SHORTEST_RETRY_S, time.monotonic() + RETRY_FOR_S
            while True:
                try:
                    answer = call(request)
                except httpx.TransportError as error:
                    if self._until.is_set() or time.monotonic() > deadline:
                        raise
                    log.debug("the network failed in a transfer (%s); trying again", type(error).__name__)
                    self._until.wait(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
                    pause_s = min(2 * pause_s, LONGEST_TRANSFER_RETRY_S)
                else:
                    self._until.pulse.beat()  # a large model on a slow line takes long, and is no hang
                    return answer

        return patient


def serve(settings: Settings, settings_file: Path, handler: Handler, *, until: Ending) -> None:
    """Stay connected and answer messages, one at a time, until told to stop.

    A coordinator that isn't there is tried again with exponential back-off and jitter, and the log says so.

    Raises:
        IdentityError: A key or certificate is refused: trying again would not help.
        LedgerError: It cannot be written down what leaves.
        ConfigError: The page cannot be served.
    """
    with beside(settings, settings_file) as page, Courier(settings, settings_file) as courier:
        _stay_connected(settings, settings_file, handler, until, courier, page)


def _stay_connected(
    settings: Settings,
    settings_file: Path,
    handler: Handler,
    until: Ending,
    courier: Courier,
    page: Beside | Nobody,
) -> None:
    retry_s, reminder = SHORTEST_RETRY_S, Reminder(settings)
    while not until.is_set():
        reminder.remind()
        try:
            with FleetConnection(settings, until) as connection:
                log.info("connected to %s as %s", settings.coordinator, settings.name)
                page.tell("connected")
                tell(STATUS=f"connected to {settings.coordinator} as {settings.name}: waiting for studies")
                retry_s = SHORTEST_RETRY_S
                _answer_messages(connection, settings_file, handler, until, courier, reminder)
        except (ConnectionLostError, httpx.HTTPError) as error:
            pause_s = retry_s * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, not a secret
            page.tell("away")
            log.warning("no coordinator at %s (%s); trying again in %.1f s", settings.coordinator, error, pause_s)
            tell(STATUS=f"no coordinator at {settings.coordinator}; trying again")
            until.rest(pause_s)
            retry_s = min(2 * retry_s, LONGEST_RETRY_S)


def _answer_messages(
    connection: FleetConnection,
    settings_file: Path,
    handler: Handler,
    until: Ending,
    courier: Courier,
    reminder: Reminder,
) -> None:
    context = Context(0, connection.node.node_id, {"settings": str(settings_file)}, RecordDict(), {})
    poll_s = SHORTEST_POLL_S
    while not until.is_set():
        reminder.remind()
        until.pulse.beat()
        asked = time.monotonic()
        try:
            message = connection.receive()
            if message is not None:
                poll_s = SHORTEST_POLL_S
                with until.answering():
                    connection.send(_admit(message, context, handler, connection.egress))
                courier.notice(study_over=message.metadata.message_type == StudyEnd.action)
                continue
        except ProtocolError as error:
            log.warning("%s (%s)", error, error.hint)
        if time.monotonic() - asked < poll_s:  # the coordinator did not hold the request: do not hammer it
            until.wait(poll_s)
            poll_s = min(1.5 * poll_s, LONGEST_POLL_S)


def _admit(message: Message, context: Context, handler: Handler, egress: EgressLog) -> Message:
    """Hand a message of a known kind to the installed app; anything else gets a fixed refusal."""
    if message.metadata.message_type not in REPLIES or not message.has_content():
        log.warning("a message of an unknown kind was not admitted")
        egress.not_admitted()
        return not_admitted(message)
    return handler(message, context)


def _node_key(path: Path) -> EllipticCurvePrivateKey:
    """Flower's node key: an OpenSSH file, readable by its owner alone."""
    try:
        if path.stat().st_mode & 0o077:
            raise IdentityError(f"{path} can be read by others", hint=f"Run: chmod 600 {path}")
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"the node key {path} cannot be read: {error}", hint="Check [keys] in the settings."
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise IdentityError(f"{path} is no P-384 key", hint="Flower's node keys are ECDSA P-384 in OpenSSH format.")
    return key


def _rejected(error: httpx.HTTPStatusError) -> FederationError:
    if error.response.status_code >= 500:
        return ConnectionLostError(f"the coordinator answered {error.response.status_code}")
    return IdentityError(
        "the coordinator does not accept this hospital's node key, or not with this TLS certificate",
        hint="Are both clocks right (konsil-hospital doctor)? Signatures last minutes. Else this hospital is not "
        "enrolled with these keys, or was revoked: call the coordinator.",
    )


def _unreachable(error: Exception) -> FederationError:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return IdentityError(
            f"the coordinator's certificate is not trusted: {text}",
            hint="It expired, belongs to another host, or was signed by a foreign authority. Call the coordinator.",
        )
    return ConnectionLostError(
        text or type(error).__name__,
        hint="Check the address and the network. A coordinator that does not accept this hospital hangs up too.",
    )
