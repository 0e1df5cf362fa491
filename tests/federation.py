"""A whole federation in memory: the real ClientApp and ServerApp, real ledgers, real data, Flower's own wire encoding.

Only the transport is missing: each message is deflated to the bytes that would travel, and inflated on the other side.
Tests look at these bytes, change them, lose them, or send their own.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from client.app import close_hospital, close_hospitals
from client.books import LEDGER
from client.settings import Settings, read_settings
from server.demo import hospital_settings, plan_text
from server.examples import Example, write_example
from server.journal import read_events
from server.pki import create_hospital_keys
from server.simulate import COORDINATOR_NODE, RUN, CallGrid, run_server_app
from server.trial import hand_out, trial_root, trial_roster
from shared_models.config import read_toml
from shared_models.identity import public_bytes, read_public
from shared_models.plan import StudyPlan
from shared_models.privacy.ledger import Entry, read_ledger
from shared_models.roster import members_now, verify_roster
from shared_models.secagg.key_agreement import Roster


def travel(message: Message) -> tuple[Message, bytes]:
    """Deflate a message to the bytes that cross the wire, and inflate it again on the other side."""
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {key: nested.deflate() for key, nested in get_all_nested_objects(message).items()}
    wire = b"".join(contents.values())
    inflated = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(inflated, Message)
    inflated.metadata.__dict__["_message_id"] = message.metadata.message_id
    return inflated, wire


Tamper = Callable[[str, Message], Message | None]


class Wire(CallGrid):
    """A ``CallGrid`` over which every message travels as bytes.

    Attributes:
        tamper: Looks at, changes or loses a hospital's reply on its way: (hospital, reply) -> reply or None.
        on_request: Looks at a request before its hospital does: (hospital, request).
        trace: Every byte that crossed, by direction: (from, to, bytes).
    """

    def __init__(self, settings_files: dict[str, Path]) -> None:
        super().__init__(settings_files)
        self.tamper: Tamper = lambda _hospital, reply: reply
        self.on_request: Callable[[str, Message], None] = lambda _hospital, _request: None
        self.trace: list[tuple[str, str, bytes]] = []

    def deliver(self, name: str, message: Message) -> Message | None:
        """One request to one hospital, and its answer; both as bytes on the way."""
        request, wire = travel(message)
        self.trace.append(("coordinator", name, wire))
        self.on_request(name, request)
        tampered = self.tamper(name, self.call(name, request))
        if tampered is None or name in self.offline:
            return None
        reply, wire = travel(tampered)
        self.trace.append((name, "coordinator", wire))
        return reply


@dataclass
class Federation:
    """A coordinator and its hospitals in one process.

    Attributes:
        folder: Where everything lies.
        example: The data, laid out as hospitals have it.
        plan: What is run.
    """

    folder: Path
    example: Example
    plan: StudyPlan

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, RUN, COORDINATOR_NODE
        self.names = [hospital.name for hospital in self.example.hospitals]
        self.wire = Wire({name: self.settings_file(name) for name in self.names})

    def settings_file(self, hospital: str) -> Path:
        """Where a hospital's settings lie."""
        return self.folder / "hospitals" / hospital / "hospital.toml"

    def settings(self, hospital: str) -> Settings:
        """A hospital's settings."""
        return read_settings(self.settings_file(hospital))

    def sign_roster(self, *, version: int, revoked: Iterable[str] = (), genesis: dict[str, str] | None = None) -> None:
        """Sign a roster of all hospitals and give it to each."""
        root, sizes = trial_root(self.folder / "root"), {h.name: h.public_size for h in self.example.hospitals}
        roster = trial_roster(root, self.folder / "public", sizes, version=version, revoked=revoked)
        members = [m.model_copy(update={"ledger_genesis": (genesis or {}).get(m.name)}) for m in roster.members]
        roster = roster.model_copy(update={"members": tuple(members)})
        hand_out(root, roster, [self.settings_file(name).parent for name in sizes])

    def roster(self) -> Roster:
        """Everybody's identity keys, as the hospitals have pinned them."""
        signed = verify_roster(
            self.settings(self.names[0]).roster.read_bytes(), public_bytes(trial_root(self.folder / "root"))
        )
        return members_now(signed, time.time())

    def ledger(self, hospital: str) -> list[Entry]:
        """A hospital's ledger as it is on disk."""
        return read_ledger(self.settings(hospital).state / LEDGER)

    def charges(self, hospital: str) -> list[tuple[int | None, int | None]]:
        """What a hospital has paid for: (round, attempt) of each charge, oldest first."""
        return [(entry.round, entry.attempt) for entry in self.ledger(hospital) if entry.kind == "charge"]

    def run(self, name: str = "study") -> Path:
        """Run the ServerApp to its end, as the coordinator does. Returns the study's folder."""
        folder = self.folder / name
        plan_file = self.folder / f"{name}.toml"
        plan_file.write_text(plan_text(self.plan), encoding="utf-8")
        run_server_app(
            self.wire,
            plan_file=plan_file,
            folder=folder,
            state=self.folder,
            public_sizes={hospital.name: hospital.public_size for hospital in self.example.hospitals},
            identities={name: read_public(self.folder / "public" / f"{name}.identity.pub") for name in self.names},
        )
        return folder

    def events(self, kind: str, name: str = "study") -> list[dict[str, Any]]:
        """The journal's events of one kind."""
        return [e for e in read_events(self.folder / name / "events.jsonl")[0] if e["event"] == kind]


def make_federation(
    folder: Path,
    plan: StudyPlan | None = None,
    *,
    hospitals: int = 4,
    example: Example | None = None,
    **changes: Any,
) -> Federation:
    """Lay out a federation: keys, settings, data, ledgers of its own; on the breast-cancer example, or on another one.

    ``changes`` are fields of the plan to replace; those of ``privacy`` and ``training`` by a nested dictionary.
    """
    example = example or write_example("breast-cancer", folder / "data", hospitals=hospitals, seed=0)
    plan = changed(plan or example.plan, **changes)
    for hospital in example.hospitals:
        home = folder / "hospitals" / hospital.name
        create_hospital_keys(home / "keys", folder / "public", hospital.name)
        settings = hospital_settings(
            hospital.name, hospital.folder, hospital.public_size, plan, 9443, folder / "ca.pem"
        )
        (home / "hospital.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    federation = Federation(folder, example, plan)
    federation.sign_roster(version=1)
    return federation


def changed(plan: StudyPlan, **changes: Any) -> StudyPlan:
    """A plan with some fields replaced, validated again."""
    fields = plan.model_dump(mode="json")
    for name, value in changes.items():
        fields[name] = {**(fields.get(name) or {}), **value} if isinstance(value, dict) else value
    return StudyPlan.model_validate_json(json.dumps(fields))


def change_policy(federation: Federation, hospital: str, **changes: Any) -> None:
    """Edit ``[policy]`` in a hospital's settings file, as its steward would, also while it runs."""
    path = federation.settings_file(hospital)
    fields = read_toml(path, "settings file")
    fields["policy"] |= changes
    path.write_text(tomli_w.dumps(fields), encoding="utf-8")


def restart_hospitals() -> None:
    """Forget every hospital that this process holds open, as if their processes had ended."""
    close_hospitals()


def restart(federation: Federation, hospital: str) -> None:
    """Forget one hospital, as if its process had ended."""
    close_hospital(str(federation.settings_file(hospital)))
