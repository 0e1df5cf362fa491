"""A study while it runs: what is known of it between two rounds, and who may take part now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.evidence import Evidence
from server.fedavg import server_step
from server.gather import Gather, Lease
from server.halt import Halt
from server.journal import Journal
from server.patience import ASIDE, Patience
from server.progress import Progress
from server.receipts import LastReceipts
from server.store import State, Store
from server.turns import Turns
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan
from shared_models.secagg.key_agreement import Roster
from shared_models.tasks import task_of
from shared_models.update import parameters_to_vector


@dataclass(frozen=True)
class Registered:
    """What the roster says of a hospital that may take part.

    Attributes:
        identity: Raw Ed25519 public key, under which its receipts must verify.
        public_size: The size that it declared to the consortium.
    """

    identity: bytes
    public_size: int


@dataclass
class Study:
    """A study while it runs.

    Attributes:
        plan: What every hospital approved.
        members: Who may take part, as of now: asked again before every attempt, because rosters change.
        gather: How hospitals are asked.
        folder: Where journal, evidence, checkpoints and the model go.
        receipts: Each hospital's newest receipt, over all studies.
        store: Where the study's state and its attempts are written down.
        turns: One study trains at a hospital at a time.
        halt: Ends the study where that loses nothing.
        number: Its place in the order of submission.
        patient: Whether to wait for hospitals for ever; otherwise ``deadline_s`` is enough.
        enrolled: Hospitals that approved the plan, with their public sizes.
        leases: The lease under which each of them did: a daemon that restarted is proposed the study again.
        epsilons: What each hospital's filter has held the study at so far, as its newest receipt states.
        failures: How often in a row each hospital's part of an attempt has failed.
        rounds_done: Rounds whose checkpoint is there.
        taken_up: The first round that was not recorded when this life of the study began.
    """

    plan: StudyPlan
    members: Callable[[], Mapping[str, Registered]]
    gather: Gather
    folder: Path
    receipts: LastReceipts
    store: Store
    turns: Turns
    halt: Halt
    number: int = 0
    patient: bool = True
    enrolled: dict[str, int] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    rounds_done: int = 0
    taken_up: int = 1

    def __post_init__(self) -> None:
        self.digest = self.plan.digest()
        self.task = task_of(self.plan)
        self.model = build_network(self.plan.network, self.task, seed=self.plan.seed)
        self.parameters: NDArray[np.float32] = parameters_to_vector(self.model)
        self.server_step = server_step(self.plan.averaging, len(self.parameters))
        self.progress = Progress(self.plan)
        self.journal = Journal(self.folder / "events.jsonl")
        self.evidence = Evidence(self.folder)
        self.refused: dict[str, str] = {}
        self.pending, self.away = Patience(), Patience()  # approvals that are waited for; hospitals outside their hours
        self.aside = Patience(ASIDE)  # hospitals that keep failing
        self._take_in(self.members())

    def refresh(self) -> None:
        """Take the roster as it is now; asked again and again, and mostly it is as it was."""
        members = self.members()
        if members != self.hospitals:
            self._take_in(members)

    def _take_in(self, members: Mapping[str, Registered]) -> None:
        self.hospitals = members
        self.roster = Roster.of({name: member.identity for name, member in self.hospitals.items()})
        invited = self.plan.hospitals
        self.names = frozenset(self.hospitals) if invited is None else frozenset(invited) & set(self.hospitals)
        self.gather.hospitals = self.names

    def enter(self, state: State, reason: str | None = None) -> None:
        """Write down where the study is."""
        self.store.enter(self.plan.study, state, reason)

    def missing(self) -> str:
        """Who does not take part now, and why, for people."""
        online = self.gather.online()
        absent = sorted(name for name in self.names if name not in self.enrolled or name not in online)
        return ", ".join(f"{name} ({self._absence(name)})" for name in absent)

    def _absence(self, hospital: str) -> str:
        if hospital in self.refused:
            return self.refused[hospital]
        return "pending" if hospital in self.pending else "not connected"
