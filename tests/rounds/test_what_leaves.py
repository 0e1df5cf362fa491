"""Real processes and a proxy that sees every byte a hospital sends: the egress log lists all of it."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client.egress import EGRESS, FREE
from client.evidence import read_evidence
from server.demo import free_port, lay_out, start_coordinator, start_hospital
from server.examples import write_example
from server.processes import Children
from shared_models.errors import LedgerError
from shared_models.messages import body_text
from shared_models.privacy.ledger import read_ledger
from tests.federation import changed, make_federation
from tests.proxy import RecordingProxy, Sent
from tests.rounds.test_a_server_that_lies import HOSPITAL, Coordinator

NAMES = {
    "Enrolment": {"version", "plan_digest", "public_size", "software_digest"},
    "Advertised": {"version", "advertisement"},
    "Dealt": {"version", "dealing"},
    "Update": {"version", "study", "round", "attempt", "context", "receipt"},
    "ReleasedStatistics": {"version", "study", "round", "attempt", "context", "receipt"},
    "Agreed": {"version", "agreement"},
    "Unmasked": {"version", "revealed"},
    "PrivacyStatement": {
        *("version", "study", "rounds", "epsilon", "epsilon_filter", "delta", "unit"),
        *("neighbouring", "accountant", "budget_epsilon", "public_size", "engine"),
    },
}


@dataclass
class Watched:
    """One hospital of a whole study: what it says that it sent, and what it sent."""

    state: Path
    records: Path
    listed: list[dict[str, Any]]
    sent: list[Sent]

    def replies(self) -> list[tuple[str, bytes, int]]:
        """What crossed, as a reader of the wire sees it: name, JSON and vector together, bytes of what wraps them.

        Sorted, because Flower pushes over several connections at once.
        """
        pushed = [PushObjectRequest.FromString(s.body) for s in self.sent if s.path.endswith("push-object")]
        heads = [PushMessagesRequest.FromString(s.body) for s in self.sent if s.path.endswith("push-messages")]
        everything = {one.object_id: one.object_content for one in pushed}
        trees = [[node.object_id for node in iterate_object_tree(head.message_object_trees[0])] for head in heads]
        assert {object_id for tree in trees for object_id in tree} == set(everything)
        return sorted(_read({object_id: everything[object_id] for object_id in tree}, tree) for tree in trees)


def _read(contents: dict[str, bytes], tree: list[str]) -> tuple[str, bytes, int]:
    size = sum(map(len, contents.values()))
    (message,) = [
        found
        for object_id in tree
        if isinstance(found := inflate_object_from_contents(object_id, contents, keep_object_contents=True), Message)
    ]
    vectors = [array.data for record in message.content.array_records.values() for array in record.values()]
    payload = str(body_text(message)).encode() + b"".join(vectors)
    return str(message.content.config_records["konsil"]["type"]), payload, size - len(payload)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Three hospitals; one of them talks through the proxy. Three rounds, and a release of statistics in each."""
    folder = tmp_path_factory.mktemp("watched")
    example = write_example("breast-cancer", folder / "data", hospitals=3, seed=0)
    release = {"every": 1, "clip": 1.0, "noise_multiplier": 60.0, "bins": 20}
    plan = changed(example.plan, rounds=3, evaluation=release, privacy={"noise_multiplier": 60.0})
    port = free_port()
    lay_out(folder, example, plan, port)
    victim = example.hospitals[0].name
    home = folder / "hospitals" / victim
    settings = tomllib.loads((home / "hospital.toml").read_text(encoding="utf-8"))
    ca = home / settings["tls"]["ca"]
    with (
        RecordingProxy(port, folder / "coordinator", home / "keys", ca) as proxy,
        Children(folder / "logs") as children,
    ):
        settings["coordinator"] = proxy.address
        (home / "hospital.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        coordinator = start_coordinator(children, folder)
        hospitals = {h.name: start_hospital(children, folder, h.name) for h in example.hospitals}
        assert coordinator.wait(timeout=200) == 0
        hospitals[victim].send_signal(signal.SIGTERM)
        hospitals[victim].wait(timeout=30)
        sent = proxy.requests()
    return Watched(home / "state", example.hospitals[0].folder, list(read_evidence(home / "state" / EGRESS)), sent)


def test_every_byte_on_the_connection_is_counted(watched: Watched) -> None:
    """Request lines, headers and bodies of every call: the log's totals are the socket's totals."""
    counted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    headers = Counter[str]()
    for line in watched.listed:
        for call, counts in line.get("calls", {}).items():
            counted[call].update(counts)
        headers.update(line.get("headers", {}))
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sent in watched.sent:
        sizes = {"count": 1, "line": sent.line, "headers": sent.headers, "body": len(sent.body)}
        seen[sent.path.rpartition("/")[2]].update(sizes)

    # The coordinator ends first. What a hospital then tries in vain is counted, and never crosses.
    del counted["activate-node"], seen["activate-node"]
    tried = {call: counted[call]["count"] - seen[call]["count"] for call in counted}
    assert {call for call, more in tried.items() if more} <= {"deactivate-node", "pull-messages", "send-node-heartbeat"}
    exact = [call for call, more in tried.items() if not more]
    assert {"push-messages", "push-object", "pull-object", "confirm-message-received"} <= set(exact)
    assert {call: counted[call] for call in exact} == {call: seen[call] for call in exact}
    assert all(more in {0, 1, 2} for more in tried.values())
    assert sum(headers.values()) > 0


def test_every_reply_is_listed_by_field_as_it_crossed(watched: Watched) -> None:
    """Same replies, same bytes: each digest is of what was on the wire, and its fields add up to it."""
    listed = {line["sha256"]: line for line in watched.listed if line["what"] == "reply"}
    crossed = watched.replies()

    assert len(listed) == len(crossed)
    for name, payload, _ in crossed:
        line = listed[hashlib.sha256(payload).hexdigest()]
        assert line["message"] == name
        assert line["bytes"] == len(payload) == sum(field["bytes"] for field in line["fields"].values())
        assert set(line["fields"]) - {"JSON punctuation", "vector"} == NAMES[name]
    assert {name for name, _, _ in crossed} == set(NAMES)


def test_what_wraps_a_reply_is_small_and_says_nothing_more(watched: Watched) -> None:
    """Flower's own metadata around the listed fields: no message has room for a hidden one."""
    assert all(wrapping < 2_000 for _, _, wrapping in watched.replies())


def test_what_costs_privacy_names_its_charge(watched: Watched) -> None:
    """Vectors are paid for by an entry of the ledger, one each; everything else is free, and public or protocol."""
    charges = {f"charge {e.hash}" for e in read_ledger(watched.state / "ledger.sqlite") if e.kind == "charge"}
    prices = [
        (name, field["price"])
        for line in watched.listed
        for name, field in line.get("fields", {}).items()
        if field["price"] != FREE
    ]

    assert {name for name, _ in prices} == {"vector"}
    assert len(prices) == len(charges) == 6
    assert {price for _, price in prices} == charges


def test_nothing_of_a_record_crosses_in_clear(watched: Watched) -> None:
    """No cell of the hospital's file that is long enough not to be a piece of some epsilon."""
    with next(watched.records.glob("*.csv")).open(encoding="utf-8") as file:
        cells = {cell for row in list(csv.reader(file))[1:] for cell in row if len(cell) >= 8}
    wire = b"\n".join(sent.body for sent in watched.sent)

    assert len(cells) > 100
    assert [cell for cell in cells if cell.encode() in wire] == []


def test_the_command_prints_a_table(watched: Watched) -> None:
    """For the data steward: every study and field, how often, how many bytes, at what price."""
    command = [sys.executable, "-m", "client.cli", "egress", str(watched.state.parent / "hospital.toml")]

    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)

    assert "public_size" in shown
    (vectors,) = [row for row in found["fields"] if (row["message"], row["field"]) == ("Update", "vector")]
    assert (vectors["study"], vectors["times"], vectors["price"]) == ("breast-cancer", 3, "3 charges")


def test_what_cannot_be_listed_does_not_leave(tmp_path: Path) -> None:
    """A log that cannot be written stops the hospital; not even a refusal goes out."""
    federation = make_federation(tmp_path, rounds=1)
    coordinator = Coordinator(federation)
    coordinator.propose()
    log = federation.settings(HOSPITAL).state / EGRESS
    log.unlink()
    log.mkdir()

    with pytest.raises(LedgerError, match=r"egress\.jsonl cannot be written"):
        coordinator.announce()

    assert [sender for sender, _, _ in federation.wire.trace] == ["coordinator", HOSPITAL, "coordinator"]
