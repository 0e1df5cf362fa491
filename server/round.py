"""A study at the coordinator, round by round: choose, announce, gather, sum, unmask, average, evaluate, save, record.

The coordinator is trusted to be present, not to be discreet: of hospitals' updates and statistics it can only see sums.
It checks every message before use, and keeps what hospitals sign.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rfc8785
from numpy.typing import NDArray

from server.aggregate import Attempt
from server.checkpoint import keep_best, save_checkpoint
from server.cohort import choose
from server.evaluate import released_metrics
from server.fedavg import server_step
from server.gather import Answer, Gather
from server.journal import Journal
from server.patience import NOT_NOW, NOT_YET, Patience
from server.progress import Progress
from server.receipts import LastReceipts
from shared_models.encoding import NULL_COORDINATES, encoding, public_weight
from shared_models.errors import DropoutError, FederationError, NotEnrolledError, ProtocolError
from shared_models.identity import verify
from shared_models.messages import (
    Body,
    Enrolment,
    PrivacyStatement,
    Proposal,
    StudyEnd,
    Upload,
    Vector,
    receipt_payload,
    signed_receipt,
)
from shared_models.model_file import write_model
from shared_models.nets.build import build_network
from shared_models.plan import LARGEST_COHORT, StudyPlan
from shared_models.privacy.mechanisms import Mechanism, release_mechanism, training_mechanism
from shared_models.secagg.key_agreement import Announcement, Purpose, Roster
from shared_models.secagg.protocol import Coordinator, check_cohort_rule, plan_threshold
from shared_models.software import software_digest
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector, vector_digest, vector_to_parameters

log = logging.getLogger("konsil.coordinator")

ENROL_EVERY_S = 0.1
CLOSED_AT_ONCE = 2
MOST_ATTEMPTS = 10  # at one round, those that cost nobody anything included


@dataclass
class Study:
    """A study while it runs.

    Attributes:
        plan: What every hospital approved.
        hospitals: Registered names with the raw Ed25519 identity keys that their receipts must verify under.
        gather: How hospitals are asked.
        folder: Where journal, receipts, checkpoints and the model go.
        receipts: Each hospital's newest receipt, over all studies.
        enrolled: Hospitals that approved the plan, with their public sizes.
        epsilons: What each hospital's filter has held the study at so far, as its newest receipt states.
    """

    plan: StudyPlan
    hospitals: Mapping[str, bytes]
    gather: Gather
    folder: Path
    receipts: LastReceipts
    enrolled: dict[str, int] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = self.plan.digest()
        self.task = find_task(self.plan.task)
        self.model = build_network(self.plan.network, self.task, seed=self.plan.seed)
        self.parameters: NDArray[np.float32] = parameters_to_vector(self.model)
        self.server_step = server_step(self.plan.averaging, len(self.parameters))
        self.progress = Progress(self.plan)
        self.journal = Journal(self.folder / "events.jsonl")
        self.refused: dict[str, str] = {}
        self.pending, self.away = Patience(), Patience()  # approvals that are waited for; hospitals outside their hours
        self.roster = Roster.of(self.hospitals)


@dataclass(frozen=True)
class Sum:
    """What one attempt at a sum came to.

    Attributes:
        uploaders: Hospitals in the sum.
        total: Their weighted sum; None where the attempt failed.
        weight: Sum of their weights.
        charged: Whether hospitals were asked to compute: then those that answered have paid.
        at_fault: Whom the next attempt goes without.
        seconds: How long each stage took.
    """

    uploaders: frozenset[str]
    total: NDArray[np.float64] | None
    weight: float
    charged: bool
    at_fault: str | None
    seconds: Mapping[str, float]


def run_study(study: Study) -> dict[str, PrivacyStatement]:
    """Run a study to its end.

    Returns:
        What each hospital states the study cost it.

    Raises:
        DropoutError: Too few hospitals, at the start or in a round whose attempts are used up; names who is missing.
    """
    plan, journal = study.plan, study.journal
    check_fits(study)
    journal.write(
        "started", study=plan.study, plan_digest=study.digest, rounds=plan.rounds, parameters=len(study.parameters)
    )
    enrol_enough(study)
    spare = plan.privacy.spare_charges
    finished = 0
    for number in range(1, plan.rounds + 1):
        if why := study.progress.verdict():
            journal.write("stopped-early", round=finished, rounds=plan.rounds, reason=why)
            break
        started = time.monotonic()
        trained, failed = train_round(study, number, spare)
        spare -= failed
        answered = trained.uploaders
        released = evaluate_round(study, number)
        checkpoint = save_checkpoint(
            study.folder / "checkpoints", study.model, study.parameters, plan, number, study.server_step.state()
        )
        journal.write(
            "round",
            round=number,
            rounds=plan.rounds,
            answered=sorted(answered),
            missing=sorted(set(study.hospitals) - answered),
            epsilon_filter=dict(sorted(study.epsilons.items())),
            metrics_released=released,
            stages=dict(trained.seconds),
            seconds=round(time.monotonic() - started, 3),
            checkpoint=str(checkpoint),
        )
        finished = number
        study.progress.see(number, released)
        keep_best(study.folder, plan, study.progress.best)
    statements = close_study(study)
    write_model(study.folder / "model.safetensors", study.model, plan, round=str(finished))
    return statements


def check_fits(study: Study) -> None:
    """Check before anything is sent that the study's sums fit the modulus, with as many hospitals as may be invited.

    Raises:
        TooFewHospitalsError, ThresholdError: Fewer hospitals are registered than a sum needs, or than the plan wants.
        ScaleTooSmallError: Updates of this plan from so many hospitals would overflow the modulus.
    """
    hospitals = min(len(study.hospitals), LARGEST_COHORT)
    check_cohort_rule(sorted(study.hospitals)[:hospitals], plan_threshold(study.plan.minimum_hospitals, hospitals))
    purposes: tuple[Purpose, ...] = ("train", "evaluate") if study.plan.evaluation else ("train",)
    for purpose in purposes:
        encoding(study.plan, purpose, parameters=len(study.parameters), hospitals=hospitals)


def enrol_enough(study: Study) -> None:
    """Propose the study to every hospital as it comes online, until all have answered or the deadline has passed."""
    deadline = time.monotonic() + study.plan.deadline_s
    while time.monotonic() < deadline:
        enrol(study)
        if set(study.enrolled) | set(study.refused) >= set(study.hospitals):
            break
        time.sleep(ENROL_EVERY_S)
    missing = sorted(set(study.hospitals) - set(study.enrolled))
    if len(study.enrolled) < study.plan.minimum_hospitals:
        reasons = ", ".join(f"{name} ({_absence(study, name)})" for name in missing)
        raise DropoutError(
            f"{len(study.enrolled)} of at least {study.plan.minimum_hospitals} hospitals take part; missing: {reasons}",
            hint="Start the missing daemons, or see the log of those that refused; "
            "then run the study again. At those that are pending a steward has to approve it.",
        )


def _absence(study: Study, hospital: str) -> str:
    return study.refused.get(hospital) or ("pending" if hospital in study.pending else "not connected")


def enrol(study: Study) -> None:
    """Propose the plan to hospitals that are online and have not answered; late and returning ones join here.

    One whose steward has not approved the study yet is asked again, now and then.
    """
    waiting = study.pending.due(set(study.gather.online()) - set(study.enrolled) - set(study.refused))
    plan = study.plan.model_dump(mode="json")
    proposals = {name: (Proposal(plan=plan, anchor=study.receipts.anchor(name)), None) for name in waiting}
    for answer in study.gather.ask(proposals, group="propose", deadline_s=study.plan.deadline_s):
        body = answer.body
        if isinstance(body, Enrolment) and body.plan_digest == study.digest:
            study.enrolled[answer.hospital] = body.public_size
            study.pending.forget(answer.hospital)
            same = body.software_digest == software_digest()
            study.journal.write("enrolled", hospital=answer.hospital, public_size=body.public_size, same_software=same)
        elif answer.problem in NOT_YET:
            if study.pending.wait_for(answer.hospital):
                study.journal.write("pending", hospital=answer.hospital)
        else:
            study.refused[answer.hospital] = answer.problem or "another plan"
            study.journal.write("refused", hospital=answer.hospital, code=study.refused[answer.hospital])


def train_round(study: Study, number: int, spare: int) -> tuple[Sum, int]:
    """One round: attempts until a sum opens. Returns it, and how many failed attempts hospitals have paid for."""
    charged, without, attempt = 0, set[str](), 0
    found: Sum | None = None
    while charged <= spare and attempt < MOST_ATTEMPTS:
        attempt += 1
        cohort = gather_cohort(study, without)
        if len(cohort) < study.plan.minimum_hospitals:
            break
        found = secure_sum(study, "train", number, attempt, cohort)
        if found.total is not None:
            study.parameters = study.server_step.step(study.parameters, found.total[:-NULL_COORDINATES], found.weight)
            vector_to_parameters(study.parameters, study.model)
            return found, charged
        charged += found.charged
        without |= {found.at_fault} if found.at_fault else set()
        answered = sorted(found.uploaders)
        study.journal.write("attempt-failed", round=number, attempt=attempt, charged=found.charged, answered=answered)
    answered = sorted(found.uploaders) if found else []
    missing = sorted(set(study.hospitals) - set(answered))
    raise DropoutError(
        f"round {number}: no sum opened in {attempt} attempts of at most {study.plan.deadline_s:g} s a stage; "
        f"{len(answered)} hospitals answered the last; at least {study.plan.minimum_hospitals} are needed, and "
        f"{spare - charged if spare > charged else 0} spare charges are left; missing: {', '.join(missing)}",
        hint="The last checkpoint is valid. Bring the missing hospitals back, or plan more spare charges.",
    )


def evaluate_round(study: Study, number: int) -> dict[str, float] | None:
    """Sum noised validation statistics where the plan says so; off by default, charged at every hospital."""
    evaluation = study.plan.evaluation
    if evaluation is None or number % evaluation.every:
        return None
    cohort = choose(study.away.due(study.enrolled), study.gather.online())
    if len(cohort) < study.plan.minimum_hospitals:
        return None
    found = secure_sum(study, "evaluate", number, 1, cohort)
    return released_metrics(study.task, evaluation, found.total) if found.total is not None else None


def gather_cohort(study: Study, without: Collection[str]) -> list[str]:
    """Whom to invite: enrolled, online, not at fault. Waits for newcomers while there are too few."""
    deadline = time.monotonic() + study.plan.deadline_s
    while True:
        enrol(study)
        cohort = choose(study.away.due(set(study.enrolled) - set(without)), study.gather.online())
        if len(cohort) >= study.plan.minimum_hospitals or time.monotonic() > deadline:
            return cohort
        time.sleep(ENROL_EVERY_S)


def secure_sum(study: Study, purpose: Purpose, number: int, attempt: int, cohort: list[str]) -> Sum:
    """One attempt at one encrypted sum: announce, gather, sum, unmask, decode; and its evidence."""
    plan = study.plan
    announcement = Announcement(
        purpose=purpose,
        study=plan.study,
        plan_digest=study.digest,
        roster_digest=study.roster.digest,
        round=number,
        attempt=attempt,
        parameters_digest=vector_digest(study.parameters),
        invited=tuple(cohort),
        threshold=plan_threshold(plan.minimum_hospitals, len(cohort)),
    )
    code = encoding(plan, purpose, parameters=len(study.parameters), hospitals=len(cohort))
    party = Coordinator(announcement, roster=study.roster, length=code.length)
    mechanisms = {name: _mechanism(study, name, purpose) for name in cohort}

    def ask(requests: Mapping[str, tuple[Body, Vector | None]]) -> Iterator[Answer]:
        return study.gather.ask(requests, group=str(number), deadline_s=plan.deadline_s)

    def check(hospital: str, upload: Upload) -> None:
        check_receipt(upload, study.hospitals[hospital], mechanisms[hospital])

    def leave_out(hospital: str, stage: str, answer: Answer, error: FederationError) -> None:
        study.journal.write("left-out", hospital=hospital, round=number, stage=stage, reason=str(error))
        log.warning("round %d, %s: %s left out: %s", number, stage, hospital, error)
        if answer.problem == NotEnrolledError.code:  # its daemon restarted: propose the study again
            study.enrolled.pop(hospital, None)
        elif answer.problem in NOT_NOW:
            study.away.wait_for(hospital)

    sizes = dict(study.enrolled)
    run = Attempt(party, ask=ask, check=check, leave_out=leave_out, anchor=study.receipts.anchor)
    total, weight = None, 0.0
    try:
        cells = run.run(study.parameters)
        total = code.decode(cells, len(run.uploads))
        weight = sum(_weight(plan, purpose, sizes[name]) for name in run.uploads)
    except FederationError as error:
        study.journal.write("aborted", purpose=purpose, round=number, attempt=attempt, reason=str(error))
        log.warning("round %d, attempt %d to %s: %s", number, attempt, purpose, error)
    receipts = {hospital: signed_receipt(upload) for hospital, upload in run.uploads.items()}
    study.receipts.keep(receipts)
    for hospital, kept in sorted(receipts.items()):  # an order that an auditor can check
        study.away.forget(hospital)
        study.epsilons[hospital] = kept.receipt.epsilon_filter
        _keep(study.folder / "receipts.jsonl", {"hospital": hospital, "upload": kept.model_dump(mode="json")})
    evidence: dict[str, Any] = {"transcript": party.transcript().model_dump(mode="json")}
    if party.complaint is not None:
        evidence["complaint"] = party.complaint.model_dump(mode="json")
    if total is not None and purpose == "train":
        evidence |= {"null_coordinates": total[-NULL_COORDINATES:].tolist(), "weight": weight}
    _keep(study.folder / "sums.jsonl", evidence)
    study.journal.write(
        "sum",
        purpose=purpose,
        round=number,
        attempt=attempt,
        opened=total is not None,
        threshold=announcement.threshold,
        hospitals=len(cohort),
        dropped=party.dropped,
        at_fault=party.at_fault,
        bytes_up=4 * code.length,
        stages=run.seconds,
    )
    return Sum(frozenset(run.uploads), total, weight, run.charged, party.at_fault, run.seconds)


def close_study(study: Study) -> dict[str, PrivacyStatement]:
    """Tell every hospital that the study is over, so that it frees its reservation, and gather what it cost each.

    A few at a time: stating a tight epsilon forks a process and takes seconds, and trials have many hospitals on one
    machine.
    """
    statements: dict[str, PrivacyStatement] = {}
    request = StudyEnd(study=study.plan.study, plan_digest=study.digest)
    cohort = sorted(set(study.enrolled) & set(study.gather.online()))
    for first in range(0, len(cohort), CLOSED_AT_ONCE):
        for answer in _ask(study, cohort[first : first + CLOSED_AT_ONCE], request, None):
            if isinstance(answer.body, PrivacyStatement):
                statements[answer.hospital] = answer.body
    return statements


def _weight(plan: StudyPlan, purpose: Purpose, public_size: int) -> float:
    """M of an update; statistics are summed as they are."""
    return public_weight(public_size, plan.weight_cap) if purpose == "train" else 1.0


def _ask(study: Study, cohort: Collection[str], body: Body, vector: Vector | None) -> Iterator[Answer]:
    group = getattr(body, "round", None)
    requests = dict.fromkeys(cohort, (body, vector))
    return study.gather.ask(requests, group=str(group or "end"), deadline_s=study.plan.deadline_s)


def check_receipt(upload: Upload, identity: bytes, mechanism: Mechanism) -> None:
    """A receipt must be signed by this hospital for this round, and be for the mechanism that its plan states.

    Raises:
        IdentityError: The signature is not the hospital's.
        ProtocolError: It paid for something else.
    """
    verify(identity, "receipt", receipt_payload(upload), bytes.fromhex(upload.receipt.signature))
    if upload.receipt.mechanism != mechanism.model_dump(mode="json"):
        raise ProtocolError("a receipt for another mechanism than the plan's", hint="Compare software versions.")


def _mechanism(study: Study, hospital: str, purpose: Purpose) -> Mechanism:
    if purpose == "train":
        return training_mechanism(study.plan, study.enrolled[hospital])
    return release_mechanism(study.plan)


def _keep(path: Path, evidence: Mapping[str, Any]) -> None:
    """Append to the evidence that an auditor cross-checks with the hospitals' ledgers and transcripts."""
    with path.open("ab") as file:
        file.write(rfc8785.dumps(evidence) + b"\n")
