"""Ask hospitals and gather their answers as they come, over Flower's Grid; the one file that sends messages."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from server.halt import Halt
from shared_models.errors import ProtocolError, UnsupportedVersionError
from shared_models.messages import Body, Lanes, Refusal, Vector, let_go, read_reply, request_all

log = logging.getLogger("konsil.coordinator")

PULL_EVERY_S = 0.01  # the SuperLink is in this process: looking costs microseconds
ONLINE_EVERY_S = 1.0
GRACE_S = 2.0  # Flower forgets a request this long after we stop waiting for it, never before


@dataclass(frozen=True)
class Answer:
    """One hospital's answer: a body and perhaps a vector; or, where it refused or broke the protocol, why."""

    hospital: str
    body: Body | None
    vector: Vector | Lanes | None = None
    problem: str | None = None


class Lease(NamedTuple):
    """One daemon's presence: its Flower node, and when that node connected."""

    node_id: int
    since: str


class Gather:
    """The hospitals of one study behind a Flower Grid, addressed by their registered names.

    Args:
        grid: Flower's Grid of the running ServerApp.

    Attributes:
        hospitals: Names that may take part; a node of any other name is never asked.
        halt: Ends a stage when the study is stopped.
    """

    def __init__(self, grid: Grid, hospitals: frozenset[str], halt: Halt | None = None) -> None:
        self._grid = grid
        self.hospitals, self.halt = hospitals, halt or Halt()

    def online(self) -> dict[str, Lease]:
        """Registered hospitals whose lease is alive, each with that lease: a daemon that restarts gets another."""
        nodes = [node for node in self._grid.get_nodes() if node.name in self.hospitals]
        return {node.name: Lease(node.node_id, node.last_activated_at) for node in nodes}

    def ask(
        self, requests: Mapping[str, tuple[Body, Vector | None]], *, group: str, deadline_s: float
    ) -> Iterator[Answer]:
        """Send every hospital its request and yield the answers in the order in which they come.

        Ends when all have answered, when the deadline has passed, when the study is stopped, or when those who are left
        have gone offline or come back since: what a daemon that died was asked, the next one does not know.
        Each answer is dropped from Flower's store as it is pulled, so that memory holds one vector at a time.
        """
        nodes = self.online()
        asked = {name: nodes[name] for name in requests if name in nodes}
        messages = request_all(
            {lease.node_id: requests[name] for name, lease in asked.items()}, group_id=group, ttl_s=deadline_s + GRACE_S
        )
        if not messages:
            return
        waiting = dict(zip(self._grid.push_messages(messages), asked, strict=True))
        deadline = time.monotonic() + deadline_s
        look_again = time.monotonic() + ONLINE_EVERY_S
        while waiting and time.monotonic() < deadline and not self.halt.stopped:
            alive = asked
            if time.monotonic() > look_again:  # before the answers are pulled, so that none is lost with its sender
                alive, look_again = self.online(), time.monotonic() + ONLINE_EVERY_S
            # One at a time: pulling all at once would hold as many vectors as hospitals.
            for message_id in list(waiting):
                for message in self._grid.pull_messages([message_id]):
                    yield _read(waiting.pop(message_id), message)
            waiting = {key: name for key, name in waiting.items() if alive.get(name) == asked[name]}
            if waiting:
                time.sleep(PULL_EVERY_S)


def _read(hospital: str, message: Message) -> Answer:
    """Validate one answer; what a peer does wrong costs that peer its place in the round, nobody else."""
    try:
        body, vector = read_reply(message)
    except UnsupportedVersionError as error:
        log.warning("%s: %s (%s)", hospital, error, error.hint)
        return Answer(hospital, None, problem=error.code)
    except ProtocolError as error:
        log.warning("%s: %s", hospital, error)
        return Answer(hospital, None, problem=str(error))
    finally:
        let_go(message)
    if isinstance(body, Refusal):
        return Answer(hospital, body, problem=body.code)
    return Answer(hospital, body, vector)
