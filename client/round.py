"""One round at a hospital: allow, charge, load, train, bound, answer.

Each line of ``Hospital.train`` is one file of this folder. Everything that leaves the hospital is a return value here.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from client.books import Books
from client.dp_sgd import self_check, train
from client.evaluate import released_statistics
from client.keys import split_key
from client.policy import admit
from client.randomness import SecureRandom
from client.records.manifest import read_manifest
from client.records.tabular import read_table
from client.settings import Settings, read_settings
from shared_models.errors import ConfigError, NotEnrolledError, PolicyError, ProtocolError
from shared_models.identity import load_key, sign
from shared_models.messages import (
    Enrolment,
    EvaluateRequest,
    PrivacyStatement,
    Proposal,
    Receipt,
    ReleasedStatistics,
    RoundRequest,
    StudyEnd,
    TrainRequest,
    Update,
    Upload,
    Vector,
    receipt_payload,
)
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan, parse_plan
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian, release_mechanism, training_mechanism
from shared_models.software import software_digest
from shared_models.tasks import Task, find_task
from shared_models.update import (
    bound_update,
    check_vector,
    parameters_to_vector,
    update_bound,
    vector_digest,
    vector_to_parameters,
)

log = logging.getLogger("konsil.hospital")

UploadType = TypeVar("UploadType", bound=Upload)

if TYPE_CHECKING:
    from client.records.records import Records
    from shared_models.privacy.ledger import Entry


@dataclass
class Study:
    """A study that this hospital approved, with everything its rounds need, kept warm."""

    plan: StudyPlan
    digest: str
    task: Task
    model: torch.nn.Module
    read: Callable[[], tuple["Records", "Records"]]

    @property
    def training(self) -> "Records":
        """Training part of the records."""
        return self.read()[0]

    @property
    def validation(self) -> "Records":
        """Validation part of the records."""
        return self.read()[1]


class Hospital:
    """One hospital's side of every round; holds the lock on its ledger while it lives.

    Args:
        settings: The hospital's own.
        books: Its ledger and the privacy budget over it.
        test_random: Makes a repeatable generator for each charge. Tests only: without it every charge gets a generator
            freshly keyed by the operating system, and the trainer refuses any other.
    """

    def __init__(
        self, settings: Settings, books: Books, *, test_random: Callable[[], SecureRandom] | None = None
    ) -> None:
        self.settings = settings
        self.books = books
        self.device = _device(settings.device)
        self._identity = load_key(settings.keys.identity)
        self._random = test_random or SecureRandom.from_system
        self._allow_test_random = test_random is not None
        self._studies: dict[str, Study] = {}

    @classmethod
    def open(cls, settings_file: Path) -> "Hospital":
        """Read the settings and open the ledger; fails closed.

        Raises:
            ConfigError, IdentityError, LedgerError: With the reason.
        """
        settings = read_settings(settings_file)
        return cls(settings, Books.open(settings))

    def close(self) -> None:
        """Let go of the ledger."""
        self.books.close()

    def enrol(self, proposal: Proposal) -> Enrolment:
        """A study is proposed: allow it by policy, check data and network, reserve its price; or refuse.

        Approving again what was approved before, after a restart, reserves nothing twice.

        Raises:
            FederationError: The plan is malformed, not permitted, too dear, or does not fit the records.
        """
        plan = parse_plan(proposal.plan, "the proposed plan")
        admit(plan, self.settings.policy, self.settings.population)
        if not self.settings.policy.standing_approval:
            raise PolicyError(
                f"study {plan.study} needs an approval that this hospital gives nobody in advance",
                hint="Set standing_approval = true in [policy] if the policy's limits say all there is to say.",
            )
        study = self._prepare(plan)
        self.books.budget.approve(plan)
        self._studies[plan.study] = study
        log.info("study %s approved: plan %s", plan.study, study.digest)
        return Enrolment(
            plan_digest=study.digest,
            public_size=self.settings.population.public_size,
            software_digest=software_digest(),
        )

    def _prepare(self, plan: StudyPlan) -> Study:
        """Validate the records and check the network before anything is approved, let alone charged."""
        task = find_task(plan.task)
        parts = read_table(read_manifest(self.settings.records), task, split_key=split_key(self.settings.state))
        model = build_network(plan.network, task, seed=plan.seed).to(self.device)
        self_check(model, task, clip=plan.privacy.clip)
        return Study(plan, plan.digest(), task, model, lambda: parts)

    def train(self, request: TrainRequest, parameters: Vector) -> tuple[Update, Vector]:
        """One round: allow, charge, load, train, bound, answer."""
        study = self._allow(request, parameters)
        mechanism = training_mechanism(study.plan, self.settings.population.public_size)
        charge = self._charge(request, mechanism)
        records = study.training  # from here on records are used: the charge is on the disk
        vector_to_parameters(parameters, study.model)
        train(
            study.model,
            records,
            study.task,
            training=study.plan.training,
            privacy=study.plan.privacy,
            expected_batch=mechanism.expected_batch,
            random=self._random(),
            device=self.device,
            allow_test_random=self._allow_test_random,
        )
        update = self._bounded(study, parameters, mechanism.expected_batch)
        self.books.round_done(charge)
        self._log(request, "trained")
        return self._signed(Update, request, charge), update

    def evaluate(self, request: EvaluateRequest, parameters: Vector) -> tuple[ReleasedStatistics, Vector]:
        """One release of validation statistics: allow, charge, load, evaluate with noise, answer."""
        study = self._allow(request, parameters)
        evaluation = study.plan.evaluation
        if evaluation is None:
            raise ProtocolError(f"study {request.study} releases no statistics", hint="Its plan has no [evaluation].")
        mechanism = release_mechanism(study.plan)
        charge = self._charge(request, mechanism)
        vector_to_parameters(parameters, study.model)
        released = released_statistics(
            study.model,
            study.validation,
            study.task,
            plan=evaluation,
            random=self._random(),
            allow_test_random=self._allow_test_random,
        )
        self.books.released(charge)
        self._log(request, "released statistics")
        return self._signed(ReleasedStatistics, request, charge), released.astype(np.float32)

    def finish(self, request: StudyEnd) -> PrivacyStatement:
        """The study is over: release what was reserved and never charged, and state what it cost."""
        study = self._known(request)
        self.books.budget.finish(request.study)
        del self._studies[request.study]
        log.info("study %s is over", request.study)
        return self.books.statement(request.study, study.plan.privacy.delta)

    def _log(self, request: RoundRequest, what: str) -> None:
        spent = self.books.budget.filter_spent(request.study)
        text = "study %s, round %d, attempt %d: %s; epsilon %.4f so far (enforced)"
        log.info(text, request.study, request.round, request.attempt, what, spent)

    def _charge(self, request: RoundRequest, mechanism: PoissonGaussian | GaussianRelease) -> "Entry":
        """Pay for one computation; when this returns, the charge is on the disk."""
        return self.books.budget.charge(
            request.study,
            request.plan_digest,
            round=request.round,
            attempt=request.attempt,
            mechanism=mechanism,
            parameters_digest=request.parameters_digest,
        )

    def _known(self, request: RoundRequest | StudyEnd) -> Study:
        study = self._studies.get(request.study)
        if study is None or study.digest != request.plan_digest:
            raise NotEnrolledError(f"study {request.study} with this plan is not enrolled here", hint="Propose it.")
        return study

    def _allow(self, request: RoundRequest, parameters: Vector) -> Study:
        """Check a round against what was approved, before anything is charged."""
        study = self._known(request)
        admit(study.plan, self.settings.policy, self.settings.population)
        if request.round > study.plan.rounds:
            raise ProtocolError(f"round {request.round} of {study.plan.rounds}", hint="The approved plan has fewer.")
        check_vector(parameters, sum(p.numel() for p in study.model.parameters()))
        if vector_digest(parameters) != request.parameters_digest:
            raise ProtocolError("the parameters are not the announced ones", hint="The coordinator is broken or lies.")
        return study

    def _bounded(self, study: Study, parameters: Vector, expected_batch: float) -> Vector:
        """Local minus global parameters, within the norm that every honest update has. Never fails: it was charged."""
        update = parameters_to_vector(study.model).astype(np.float64) - parameters
        limit = update_bound(
            training=study.plan.training,
            privacy=study.plan.privacy,
            parameters=len(update),
            expected_batch=expected_batch,
        )
        return bound_update(np.nan_to_num(update, nan=0.0, posinf=0.0, neginf=0.0), limit).astype(np.float32)

    def _signed(self, kind: type[UploadType], request: RoundRequest, charge: "Entry") -> UploadType:
        """An upload's body with the receipt that its charge is in the ledger."""
        receipt = Receipt(
            entry_hash=charge.hash,
            chain_head=self.books.ledger.head,
            mechanism=charge.mechanism.model_dump(mode="json") if charge.mechanism else {},
            charges=len(self.books.budget.spent(request.study)),
            epsilon_filter=self.books.budget.filter_spent(request.study),
            signature="0" * 128,
        )
        body = kind(study=request.study, round=request.round, attempt=request.attempt, receipt=receipt)
        signature = sign(self._identity, "receipt", receipt_payload(body)).hex()
        return body.model_copy(update={"receipt": receipt.model_copy(update={"signature": signature})})


def _device(setting: str) -> torch.device:
    """CUDA when it is there, else the CPU; the setting decides.

    Raises:
        ConfigError: ``cuda`` is demanded and not there.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the settings demand cuda, which is not available", hint='Set device = "auto" or "cpu".')
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")
