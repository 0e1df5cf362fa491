"""One round at a hospital: agree on keys, allow, charge, load, train, encode, mask, answer; sign who uploaded, unmask.

Each line of ``Hospital.train`` is one file of this folder. Everything that leaves the hospital is a return value here.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from client.books import Books
from client.budget import holds
from client.bundle import keep_receipt, keep_transcript
from client.consent import Consents
from client.device import choose_device, other_devices
from client.dp_sgd import self_check, train
from client.egress import EgressLog
from client.evaluate import released_statistics
from client.live import LiveSettings
from client.membership import Membership
from client.memory import freed_memory_kept
from client.own_noise import note_noise
from client.pace import OnTheGrid
from client.policy import Policy, Site, admit, permit_now
from client.positions import open_positions
from client.randomness import SecureRandom
from client.records.population import Population, Source
from client.registry import open_registry
from client.settings import Settings, read_settings
from shared_models.encoding import NULL_COORDINATES, Encoding, encoding, public_weight
from shared_models.errors import (
    FederationError,
    NotEnrolledError,
    PolicyError,
    ProtocolError,
    ThresholdError,
)
from shared_models.identity import load_key, public_bytes, sign
from shared_models.messages import (
    Advertised,
    AdvertiseRequest,
    Agreed,
    AgreeRequest,
    Complained,
    Dealt,
    Enrolment,
    EvaluateRequest,
    Lanes,
    PrivacyStatement,
    Proposal,
    ReleasedStatistics,
    ShareRequest,
    StudyEnd,
    SumRequest,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    Update,
    Upload,
    Vector,
    receipt_payload,
    signed_receipt,
)
from shared_models.nets.build import build_network, count_parameters
from shared_models.nets.pretrained import forget
from shared_models.plan import Network, StudyPlan, parse_plan
from shared_models.pretrained import check_copy, offer_bases
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian, release_mechanism, training_mechanism
from shared_models.receipts import Receipt
from shared_models.secagg import protocol
from shared_models.secagg.key_agreement import Announcement, Purpose
from shared_models.software import software_digest
from shared_models.subgroups import release_size
from shared_models.tasks import Task, task_of
from shared_models.update import check_vector, parameters_to_vector, trainable, vector_digest, vector_to_parameters

log = logging.getLogger("konsil.hospital")

DAY_S = 24 * 60 * 60

UploadType = TypeVar("UploadType", bound=Upload)

if TYPE_CHECKING:
    from client.records.records import Records
    from shared_models.privacy.ledger import Entry


@dataclass
class Study:
    """A study that this hospital approved, with everything its rounds need, kept warm.

    Attributes:
        source: Where its patients' records come from.
        population: Who is used, as of stage 1 of the attempt under way; never changed in the middle of one.
        clipped: How often what it uploads was shortened to the sum's bound since the process began.
    """

    plan: StudyPlan
    digest: str
    task: Task
    model: torch.nn.Module
    source: Source
    population: Population
    clipped: int = 0

    @property
    def training(self) -> "Records":
        """Training part of the records."""
        return self.population.training

    @property
    def validation(self) -> "Records":
        """Validation part of the records."""
        return self.population.validation

    @property
    def parameters(self) -> int:
        """Trainable parameters of the network."""
        return sum(parameter.numel() for parameter in trainable(self.model).values())


class Hospital:
    """One hospital's side of every round; holds the lock on its ledger while it lives.

    Args:
        settings: The hospital's own.
        books: Its ledger and the privacy budget over it.
        live: Where the policy is read again before every message; without it the policy stays as it is.
        test_random: Makes a repeatable generator for each charge. Tests only: without it every charge gets a generator
            freshly keyed by the operating system, and the trainer refuses any other.
    """

    def __init__(
        self,
        settings: Settings,
        books: Books,
        *,
        live: LiveSettings | None = None,
        test_random: Callable[[], SecureRandom] | None = None,
    ) -> None:
        software_digest()  # of the code that was loaded, not of what an update puts in its place later
        offer_bases(settings.pretrained)
        self.settings = settings
        self.books = books
        self.egress = EgressLog(settings)
        self._live = live
        self.device = choose_device(settings)
        self._other_devices = other_devices(settings, self.device)
        self._consents = Consents(settings.state)
        self._identity = load_key(settings.keys.identity)
        self._membership = Membership(settings)
        if books.ledger.first is not None:
            self._membership.check_genesis(books.ledger.first.hash)
        self._random = test_random or SecureRandom.from_system
        self._allow_test_random = test_random is not None
        self._registry = open_registry(settings, books)
        self._studies: dict[str, Study] = {}
        self._unfinished = False  # an attempt whose transcript is not kept yet
        self._party = protocol.Hospital(
            settings.name,
            self._identity,
            roster=self._membership.now(),
            policy=_cohort_policy(settings.policy),
            positions=open_positions(settings.state),
        )

    @classmethod
    def open(cls, settings_file: Path) -> "Hospital":
        """Read the settings and open the ledger; fails closed.

        Raises:
            ConfigError, IdentityError, LedgerError: With the reason.
        """
        settings = read_settings(settings_file)
        return cls(settings, Books.open(settings), live=LiveSettings(settings_file, settings))

    def refresh(self) -> None:
        """Before every message: the policy and the roster as their files have them now.

        Raises:
            ConfigError: The settings file is gone or invalid; then no message is answered.
            RosterError: The roster is refused, or this hospital is a member no longer.
        """
        self._party.pin(self._membership.now())
        if self._live is not None:
            self.settings = self._live.settings()
            self._party.policy = _cohort_policy(self.settings.policy)

    def close(self) -> None:
        """Let go of the ledger."""
        self.books.close()

    @property
    def announcement(self) -> Announcement | None:
        """The attempt at hand, or the last one; None before the first."""
        with suppress(FederationError):
            return self._party.announcement
        return None

    def enrol(self, proposal: Proposal) -> Enrolment:
        """A study is proposed: permitted by policy, affordable, approved by somebody, fit for the records; or refused.

        Approving again what was approved before, after a restart or for other software, reserves nothing twice. No
        record is read before all of the rest holds.

        Raises:
            RolledBackError: This hospital's ledger lacks what it signed for.
            PendingError: Nobody has approved it yet, or not for the software that runs here.
            FederationError: The plan is malformed, not permitted, too dear, or does not fit the records.
        """
        plan = parse_plan(proposal.plan, "the proposed plan")
        self.books.anchors.check(proposal.anchor, study=plan.study)
        policy, coordinator = self.settings.policy, self.settings.coordinator
        if self.settings.name not in (plan.hospitals or {self.settings.name}):
            raise PolicyError(f"study {plan.study} is for other hospitals", hint="Its plan names those that it is for.")
        check_copy(plan.network, self.settings.pretrained)
        self._admit(plan, count_parameters(plan.network, task_of(plan)))
        known = self.books.budget.check(plan)
        if known is None or not holds(known):
            stands = policy.stands(plan, coordinator, upgrade=known is not None)
            consent = self._consents.of(
                plan, public_bytes(self._identity), software=software_digest(), stands=stands, before=known
            )
            study = self._prepare(plan)
            self.books.budget.approve(
                plan,
                population_fingerprint=study.population.fingerprint,
                approved_by=consent.approved_by,
                approval=consent.approval,
            )
        else:
            study = self._prepare(plan)
        self._consents.settle(plan)
        study = self._studies.setdefault(plan.study, study)  # proposed again, it keeps its patients until stage 1
        log.info("study %s approved: plan %s", plan.study, study.digest)
        return Enrolment(
            plan_digest=study.digest,
            public_size=self.settings.population.public_size,
            software_digest=software_digest(),
        )

    def _admit(self, plan: StudyPlan, parameters: int) -> None:
        site = Site(self.settings.coordinator, self.device.type, parameters)
        admit(plan, self.settings.policy, self.settings.population, site)

    def _permit(self, study: Study, purpose: Purpose) -> None:
        """Ask the policy of this moment whether a computation may go on."""
        self._admit(study.plan, study.parameters)
        now = datetime.now().astimezone()
        charged = self.books.budget.trained_since(now.timestamp() - DAY_S) if purpose == "train" else 0
        permit_now(self.settings.policy, moment=now, charged_today=charged)

    def _prepare(self, plan: StudyPlan) -> Study:
        """Validate the records and check the network before anything is approved, let alone charged."""
        task = task_of(plan)
        if plan.evaluation is not None:
            release_size(task, plan.evaluation)
        source = Source(task, fold=plan.fold)
        population = source.current(self.settings)
        self._registry.check(population.members, has_spent=self.books.budget.has_spent)
        model = _checked_network(plan.network, task, plan.seed, plan.privacy.clip, self.device)
        return Study(plan, plan.digest(), task, model, source, population)

    def advertise(self, request: AdvertiseRequest) -> Advertised:
        """Stage 1: allow the round before it begins, and make fresh keys for this attempt at it."""
        announcement = request.announcement
        study = self._known(announcement)
        self.books.anchors.check(request.anchor, study=announcement.study, announcement=announcement)
        self._permit(study, announcement.purpose)
        if announcement.round > study.plan.rounds:
            raise ProtocolError(
                f"round {announcement.round} of {study.plan.rounds}", hint="The approved plan has fewer."
            )
        if announcement.attempt > self.settings.policy.maximum_attempts:
            raise PolicyError(
                f"attempt {announcement.attempt} at round {announcement.round}: policy permits no more than "
                f"{self.settings.policy.maximum_attempts}",
                hint="See maximum_attempts in the hospital's settings.",
            )
        if announcement.threshold < study.plan.minimum_hospitals:
            raise ThresholdError(
                f"threshold {announcement.threshold} is below the plan's {study.plan.minimum_hospitals} hospitals",
                hint="The coordinator is broken or lies.",
            )
        if strangers := set(announcement.invited) - set(study.plan.hospitals or announcement.invited):
            raise ProtocolError(
                f"{', '.join(sorted(strangers))} invited, whom the plan does not name",
                hint="The coordinator is broken or lies.",
            )
        self._encoding(study, announcement)  # what could not be encoded is refused before anything is computed
        population = study.source.current(self.settings)  # less who said no by now; refused here, not after a charge
        self._registry.claim(population.members, has_spent=self.books.budget.has_spent)
        if self._unfinished:  # of an attempt that never came to stage 5
            self._keep_transcript()
        self._unfinished = True
        advertisement = self._party.advertise(announcement, plan_digest=study.digest)
        self.books.budget.population_is(population.fingerprint)
        if population.fingerprint != study.population.fingerprint:
            forget(study.model)  # somebody has left
        study.population = population
        return Advertised(advertisement=advertisement)

    def share(self, request: ShareRequest) -> Dealt:
        """Stage 2: check everybody's keys against the pinned roster, and deal shares of this attempt's secrets."""
        return Dealt(dealing=self._party.share(request.cohort))

    def train(self, request: TrainRequest, parameters: Vector) -> tuple[Update | Complained, Lanes | None]:
        """Stage 3 of a round: accept, charge, load, train, encode, mask, answer."""
        received = time.monotonic()
        study, complaint = self._accept(request, parameters, "train")
        if complaint is not None:
            return complaint, None
        mechanism = training_mechanism(study.plan, self.settings.population.public_size)
        charge = self._charge(mechanism)
        with OnTheGrid(received, study.plan.reply_grid_s), freed_memory_kept():
            records = study.training  # from here on records are used: the charge is on the disk
            vector_to_parameters(parameters, study.model)
            training, null = study.plan.training_in(self._party.announcement.round), np.zeros(NULL_COORDINATES)
            random = self._random()
            train(
                study.model,
                records,
                study.task,
                training=training,
                privacy=study.plan.privacy,
                expected_batch=mechanism.expected_batch,
                random=random,
                device=self.device,
                others=self._other_devices,
                precision=getattr(torch, self.settings.precision),
                null=null,
                allow_test_random=self._allow_test_random,
            )
            note_noise(self.settings.state, charge, mechanism, training, null)
            update = np.concatenate([parameters_to_vector(study.model).astype(np.float64) - parameters, null])
            weight = public_weight(self.settings.population.public_size, study.plan.weight_cap)
            masked = self._masked(study, update, weight, charge, random)
            self.books.round_done(charge)
            self._log("trained")
            return self._signed(Update, charge), masked

    def evaluate(
        self, request: EvaluateRequest, parameters: Vector
    ) -> tuple[ReleasedStatistics | Complained, Lanes | None]:
        """Stage 3 of a release of validation statistics: accept, charge, load, evaluate with noise, mask, answer."""
        received = time.monotonic()
        study, complaint = self._accept(request, parameters, "evaluate")
        if complaint is not None:
            return complaint, None
        evaluation = study.plan.evaluation
        if evaluation is None:
            raise ProtocolError(f"study {study.plan.study} releases no statistics", hint="See [evaluation].")
        charge = self._charge(release_mechanism(study.plan))
        with OnTheGrid(received, study.plan.reply_grid_s):
            vector_to_parameters(parameters, study.model)
            random = self._random()
            released = released_statistics(
                study.model,
                study.validation,
                study.task,
                plan=evaluation,
                random=random,
                allow_test_random=self._allow_test_random,
            )
            masked = self._masked(study, released, 1.0, charge, random)
            self.books.released(charge)
            self._log("released statistics")
            return self._signed(ReleasedStatistics, charge), masked

    def agree(self, request: AgreeRequest) -> Agreed:
        """Stage 4: sign the list of those who uploaded; one list per attempt, ever."""
        return Agreed(agreement=self._party.agree(request.survivors))

    def unmask(self, request: UnmaskRequest) -> Unmasked:
        """Stage 5: once enough have signed that list, reveal one share per peer, and forget this attempt's secrets."""
        revealed = self._party.unmask(request.unmasking)
        self._keep_transcript()
        return Unmasked(revealed=revealed)

    def finish(self, request: StudyEnd) -> PrivacyStatement:
        """The study is over: release what was reserved and never charged, and state what it cost.

        A coordinator that was killed before it had the statement asks again, perhaps another process of this hospital.
        """
        delta = self.books.budget.finish(request.study, request.plan_digest)
        if (study := self._studies.pop(request.study, None)) is not None:
            forget(study.model)
        log.info("study %s is over", request.study)
        return self.books.statement(request.study, delta)

    def _log(self, what: str) -> None:
        now = self._party.announcement
        spent = self.books.budget.filter_spent(now.study)
        text = "study %s, round %d, attempt %d: %s; epsilon %.4f so far (enforced)"
        log.info(text, now.study, now.round, now.attempt, what, spent)

    def _keep_transcript(self) -> None:
        """Append what this hospital saw of an attempt to its evidence; it holds no secret."""
        transcript = self._party.transcript()
        self._unfinished = False
        if transcript is not None:
            keep_transcript(self.settings.state, transcript)

    def _known(self, request: Announcement) -> Study:
        study = self._studies.get(request.study)
        if study is None or study.digest != request.plan_digest:
            raise NotEnrolledError(f"study {request.study} with this plan is not enrolled here", hint="Propose it.")
        return study

    def _accept(self, request: SumRequest, parameters: Vector, purpose: Purpose) -> tuple[Study, Complained | None]:
        """Check everything that stage 3 brings, before anything is charged."""
        announcement = self._party.announcement
        study = self._known(announcement)
        if announcement.purpose != purpose:
            raise ProtocolError(f"a request to {purpose} in an attempt to {announcement.purpose}")
        self._permit(study, purpose)
        check_vector(parameters, study.parameters)
        complaint = self._party.accept(request.delivery, parameters_digest=vector_digest(parameters))
        if complaint is None:
            return study, None
        self._keep_transcript()
        log.warning("study %s: %s dealt a bad share; the attempt is over", announcement.study, complaint.accused)
        return study, Complained(complaint=complaint)

    def _charge(self, mechanism: PoissonGaussian | GaussianRelease) -> "Entry":
        """Pay for one computation; when this returns, the charge is on the disk. Refused, the attempt is over here."""
        now = self._party.announcement
        try:
            self.books.anchors.hold()
            return self.books.budget.charge(
                now.study,
                now.plan_digest,
                round=now.round,
                attempt=now.attempt,
                mechanism=mechanism,
                parameters_digest=now.parameters_digest,
            )
        except BaseException:
            self._party.abandon()
            raise

    def _encoding(self, study: Study, announcement: Announcement) -> Encoding:
        hospitals = len(announcement.invited)
        return encoding(study.plan, announcement.purpose, parameters=study.parameters, hospitals=hospitals)

    def _masked(
        self, study: Study, vector: NDArray[np.float64], weight: float, charge: "Entry", random: SecureRandom
    ) -> Lanes:
        """Weigh, bound, quantize and mask. Never fails over what training gave: it was charged."""
        finite = np.nan_to_num(vector, nan=0.0, posinf=0.0, neginf=0.0)
        code = self._encoding(study, self._party.announcement)
        if code.clips(finite, weight):
            study.clipped += 1
            log.warning("study %s: shortened to the sum's bound, %d times so far", study.plan.study, study.clipped)
        encoded = code.encode(finite, weight, uniform=random.uniform)
        return self._party.upload(encoded, charge=charge.hash)

    def _signed(self, kind: type[UploadType], charge: "Entry") -> UploadType:
        """An upload's body with the receipt that its charge is in the ledger."""
        now = self._party.announcement
        receipt = Receipt(
            entry_hash=charge.hash,
            chain_head=self.books.ledger.head,
            mechanism=charge.mechanism.model_dump(mode="json") if charge.mechanism else {},
            charges=len(self.books.budget.spent(now.study)),
            epsilon_filter=self.books.budget.filter_spent(now.study),
            signature="0" * 128,
        )
        context = self._party.context.hex()
        body = kind(study=now.study, round=now.round, attempt=now.attempt, context=context, receipt=receipt)
        signature = sign(self._identity, "receipt", receipt_payload(body)).hex()
        signed = body.model_copy(update={"receipt": receipt.model_copy(update={"signature": signature})})
        keep_receipt(self.settings.state, signed_receipt(signed))
        return signed


@lru_cache(maxsize=4)
def _checked_network(network: Network, task: Task, seed: int, clip: float, device: torch.device) -> torch.nn.Module:
    """The network of a plan, checked. Kept: a study that is proposed again pays for no second check.

    Hospitals in one process share it, as they do where a study is simulated: one trains at a time, and each writes the
    global parameters into it before it reads a record.
    """
    model = build_network(network, task, seed=seed).to(device)
    self_check(model, task, clip=clip)
    return model


def _cohort_policy(policy: Policy) -> protocol.CohortPolicy:
    return protocol.CohortPolicy(minimum_hospitals=policy.minimum_hospitals, minimum_threshold=policy.least_threshold)
