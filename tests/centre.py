"""A coordinator's control service in this process, over real studies whose rounds are played by the test."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from server.audit import AuditLog, export_lines
from server.control_client import ControlClient
from server.control_server import ControlServer
from server.demo import free_port
from server.evidence import RECEIPTS, SUMS
from server.examples import example_plan
from server.halt import Halt
from server.journal import Journal
from server.pki import Authority
from server.settings import Control, Settings
from server.store import State, Store, StudyRow, Wish
from server.studies import Studies
from server.turns import Turns
from shared_models.audit_log import AuditEntry, follow_export
from shared_models.control.access import Access
from shared_models.plan import StudyPlan
from tests.link import Keys

ROLES = ("operator", "auditor", "viewer", "hospital")
MODEL = bytes(range(256)) * 6000  # three chunks


def plan(study: str, **changes: Any) -> StudyPlan:
    """A plan of this name."""
    return example_plan("breast-cancer", 3).model_copy(update={"study": study, **changes})


@dataclass
class Centre:
    """A control service over real studies, in which a study's rounds are played by the test.

    Attributes:
        keys: Everybody's keys and certificates.
        limits: Of the service.
        rounds: Lets a study called ``long`` go on by a round.
    """

    keys: Keys
    limits: dict[str, Any] = field(default_factory=dict)
    rounds: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.folder = self.keys.folder / "coordinator"
        control = Control(port=free_port(), **self.limits)
        self.settings: Settings = self.keys.coordinator().model_copy(update={"control": control})
        self.settings.state.mkdir(exist_ok=True)
        for role in ROLES[:3]:
            self.keys.authority.issue(self.folder.parent / role, f"{role}-anna", role=role)

    def conduct(self, row: StudyRow, _turns: Turns, halt: Halt) -> None:
        """A study as the journal tells it: ``long`` lasts until it is stopped, every other one finishes at once."""
        row.folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(row.folder / "events.jsonl")
        if not journal.begun:
            journal.write(
                "started", study=row.name, plan_digest=row.plan.digest(), rounds=row.plan.rounds, parameters=31
            )
            for name in self.keys.names:
                journal.write("enrolled", hospital=name, public_size=100, same_software=True)
        self.store.enter(row.name, State.RUNNING)
        for number in range(row.rounds_done + 1, row.plan.rounds + 1):
            while row.name == "long" and not self.rounds.acquire(timeout=0.01):
                if self.store.study(row.name).wish is Wish.STOP:
                    journal.write("stopped")
                    self.store.enter(row.name, State.STOPPED, "by an operator")
                    return
                if halt._pause.is_set():
                    self.store.enter(row.name, State.PAUSED, "by an operator")
                    return
            journal.write("round", **round_facts(number, row.plan.rounds))
            self.store.finish_round(row.name, number, {})
        (row.folder / "model.safetensors").write_bytes(MODEL)
        (row.folder / RECEIPTS).write_text('{"hospital":"north"}\n', encoding="ascii")
        (row.folder / SUMS).write_text('{"transcript":1}\n', encoding="ascii")
        self.store.enter(row.name, State.FINISHED)

    @contextlib.contextmanager
    def serving(self) -> Iterator["Centre"]:
        """While it is served."""
        with (
            contextlib.closing(Store(self.settings.database_url)) as self.store,
            Studies(self.store, self.settings.state / "studies", self.conduct) as self.studies,
            AuditLog(self.settings.state) as self.audit,
            ControlServer(self.settings, self.studies, self.audit),
        ):
            yield self

    @property
    def address(self) -> str:
        """Where it is served."""
        return f"127.0.0.1:{self.settings.control.port}"

    def operator(self, role: str, authority: Authority | None = None) -> Access:
        """Where to call, and as whom."""
        home = self.keys.folder / "north" / "keys" if role == "hospital" else self.keys.folder / role
        ca = (authority or self.keys.authority).certificate
        return Access(connect=self.address, ca=ca, certificate=home / "tls.pem", key=home / "tls.key")

    def client(self, role: str) -> ControlClient:
        """A client of a role."""
        return ControlClient(self.operator(role))

    def channel(self, role: str) -> grpc.Channel:
        """A bare channel of a role."""
        who = self.operator(role)
        credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in (who.ca, who.key, who.certificate)))
        return grpc.secure_channel(self.address, credentials)

    def log(self) -> list[AuditEntry]:
        """The audit log, verified; every test of it is of a log that holds."""
        return list(follow_export(export_lines(self.settings.state), self.audit.public_key))

    def finished(self, name: str) -> str:
        """Submit a study that finishes at once, and wait for it."""
        self.studies.submit(plan(name).model_dump(mode="json"), by="the test")
        self.studies.wait(name)
        return name


def round_facts(number: int, rounds: int) -> dict[str, Any]:
    return {
        "round": number,
        "rounds": rounds,
        "answered": ["east", "north"],
        "missing": ["south"],
        "epsilon_filter": {"east": 0.5, "north": 0.25},
        "metrics_released": {},
        "stages": {"train": 0.5},
        "seconds": 1.5,
        "checkpoint": "round.safetensors",
    }
