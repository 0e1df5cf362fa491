"""A study at the coordinator, round by round: choose, announce, gather, sum, average, evaluate, save, record.

The coordinator is trusted to be present, not to be discreet: it sees noised updates and public sizes, checks every
message before use, and keeps what hospitals sign.
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

from server.aggregate import WeightedSum, weight
from server.checkpoint import save_checkpoint
from server.cohort import choose
from server.evaluate import released_metrics, statistics_length
from server.fedavg import average
from server.gather import Answer, Gather
from server.journal import Journal
from shared_models.errors import DropoutError, FederationError, NotEnrolledError, ProtocolError
from shared_models.identity import verify
from shared_models.messages import (
    Body,
    Enrolment,
    EvaluateRequest,
    PrivacyStatement,
    Proposal,
    ReleasedStatistics,
    RoundRequest,
    StudyEnd,
    TrainRequest,
    Update,
    Upload,
    Vector,
    receipt_payload,
)
from shared_models.model_file import write_model
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan
from shared_models.privacy.mechanisms import Mechanism, release_mechanism, training_mechanism
from shared_models.software import software_digest
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector, update_bound, vector_digest, vector_to_parameters

log = logging.getLogger("konsil.coordinator")

ENROL_EVERY_S = 0.1
CLOSED_AT_ONCE = 2


@dataclass
class Study:
    """A study while it runs.

    Attributes:
        plan: What every hospital approved.
        hospitals: Registered names with the raw Ed25519 identity keys that their receipts must verify under.
        gather: How hospitals are asked.
        folder: Where journal, receipts, checkpoints and the model go.
        enrolled: Hospitals that approved the plan, with their public sizes.
        epsilons: What each hospital's filter has held the study at so far, as its newest receipt states.
    """

    plan: StudyPlan
    hospitals: Mapping[str, bytes]
    gather: Gather
    folder: Path
    enrolled: dict[str, int] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = self.plan.digest()
        self.task = find_task(self.plan.task)
        self.model = build_network(self.plan.network, self.task, seed=self.plan.seed)
        self.parameters: NDArray[np.float32] = parameters_to_vector(self.model)
        self.journal = Journal(self.folder / "events.jsonl")
        self.refused: dict[str, str] = {}


def run_study(study: Study) -> dict[str, PrivacyStatement]:
    """Run a study to its end.

    Returns:
        What each hospital states the study cost it.

    Raises:
        DropoutError: Too few hospitals, at the start or in a round whose attempts are used up; names who is missing.
    """
    plan, journal = study.plan, study.journal
    journal.write(
        "started", study=plan.study, plan_digest=study.digest, rounds=plan.rounds, parameters=len(study.parameters)
    )
    enrol_enough(study)
    spare = plan.privacy.spare_charges
    for number in range(1, plan.rounds + 1):
        started = time.monotonic()
        answered, failed = train_round(study, number, spare)
        spare -= failed
        released = evaluate_round(study, number)
        checkpoint = save_checkpoint(study.folder / "checkpoints", study.model, study.parameters, plan, number)
        journal.write(
            "round",
            round=number,
            rounds=plan.rounds,
            answered=sorted(answered),
            missing=sorted(set(study.hospitals) - answered),
            epsilon_filter=dict(sorted(study.epsilons.items())),
            metrics_released=released,
            seconds=round(time.monotonic() - started, 3),
            checkpoint=str(checkpoint),
        )
    statements = close_study(study)
    write_model(study.folder / "model.safetensors", study.model, plan, round=str(plan.rounds))
    return statements


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
        reasons = ", ".join(f"{name} ({study.refused.get(name, 'not connected')})" for name in missing)
        raise DropoutError(
            f"{len(study.enrolled)} of at least {study.plan.minimum_hospitals} hospitals take part; missing: {reasons}",
            hint="Start the missing daemons, or see the log of those that refused; then run the study again.",
        )


def enrol(study: Study) -> None:
    """Propose the plan to hospitals that are online and have not answered; late and returning ones join here."""
    waiting = set(study.gather.online()) - set(study.enrolled) - set(study.refused)
    proposal = Proposal(plan=study.plan.model_dump(mode="json"))
    for answer in study.gather.ask(
        dict.fromkeys(waiting, (proposal, None)), group="propose", deadline_s=study.plan.deadline_s
    ):
        body = answer.body
        if isinstance(body, Enrolment) and body.plan_digest == study.digest:
            study.enrolled[answer.hospital] = body.public_size
            same = body.software_digest == software_digest()
            study.journal.write("enrolled", hospital=answer.hospital, public_size=body.public_size, same_software=same)
        else:
            study.refused[answer.hospital] = answer.problem or "another plan"
            study.journal.write("refused", hospital=answer.hospital, code=study.refused[answer.hospital])


def train_round(study: Study, number: int, spare: int) -> tuple[set[str], int]:
    """One round: attempts until enough hospitals answered. Returns who did, and how many attempts failed."""
    for attempt in range(1, spare + 2):
        if attempt > 1 or number > 1:
            enrol(study)
        cohort = choose(study.enrolled, study.gather.online())
        total = WeightedSum(len(study.parameters))
        request = TrainRequest(**_address(study, number, attempt))
        answered: set[str] = set()
        for answer in _ask(study, cohort, request, study.parameters):
            if _accept(study, answer, request, Update, total):
                answered.add(answer.hospital)
        if len(answered) >= study.plan.minimum_hospitals:
            study.parameters = average(study.parameters, total)
            vector_to_parameters(study.parameters, study.model)
            return answered, attempt - 1
        study.journal.write("attempt-failed", round=number, attempt=attempt, answered=sorted(answered))
    missing = sorted(set(study.hospitals) - answered)
    raise DropoutError(
        f"round {number}: {len(answered)} of at least {study.plan.minimum_hospitals} hospitals answered within "
        f"{study.plan.deadline_s:g} s, and no spare charge is left; missing: {', '.join(missing)}",
        hint="The last checkpoint is valid. Bring the missing hospitals back, or plan more spare charges.",
    )


def evaluate_round(study: Study, number: int) -> dict[str, float] | None:
    """Gather noised validation statistics where the plan says so; off by default, charged at every hospital."""
    evaluation = study.plan.evaluation
    if evaluation is None or number % evaluation.every:
        return None
    total = WeightedSum(statistics_length(study.task, evaluation))
    request = EvaluateRequest(**_address(study, number, 1))
    cohort = choose(study.enrolled, study.gather.online())
    for answer in _ask(study, cohort, request, study.parameters):
        _accept(study, answer, request, ReleasedStatistics, total)
    return released_metrics(study.task, evaluation, total.total) if total.weight else None


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


def _address(study: Study, number: int, attempt: int) -> dict[str, Any]:
    return {
        "study": study.plan.study,
        "plan_digest": study.digest,
        "round": number,
        "attempt": attempt,
        "parameters_digest": vector_digest(study.parameters),
    }


def _ask(study: Study, cohort: Collection[str], body: Body, vector: Vector | None) -> Iterator[Answer]:
    group = getattr(body, "round", None)
    requests = dict.fromkeys(cohort, (body, vector))
    return study.gather.ask(requests, group=str(group or "end"), deadline_s=study.plan.deadline_s)


def _accept(study: Study, answer: Answer, request: RoundRequest, expected: type[Upload], total: WeightedSum) -> bool:
    """Check one upload whole, then add it. A hospital at fault is left out of this attempt; the journal says why."""
    hospital, body = answer.hospital, answer.body
    try:
        if not isinstance(body, expected) or answer.vector is None:
            raise ProtocolError(answer.problem or "another message than asked for")
        if (body.study, body.round, body.attempt) != (request.study, request.round, request.attempt):
            raise ProtocolError("an answer to another round")
        check_receipt(body, study.hospitals[hospital], _mechanism(study, hospital, expected))
        public_size = study.enrolled[hospital]
        if expected is Update:
            total.add(answer.vector, weight(public_size, study.plan.weight_cap), limit=_bound(study, public_size))
        else:
            total.add(answer.vector, 1.0)
    except FederationError as error:
        study.journal.write("left-out", hospital=hospital, round=request.round, reason=str(error))
        log.warning("round %d: %s left out: %s", request.round, hospital, error)
        if answer.problem == NotEnrolledError.code:  # its daemon restarted: propose the study again
            del study.enrolled[hospital]
        return False
    study.epsilons[hospital] = body.receipt.epsilon_filter
    _keep(study.folder / "receipts.jsonl", hospital, body)
    return True


def check_receipt(upload: Upload, identity: bytes, mechanism: Mechanism) -> None:
    """A receipt must be signed by this hospital for this round, and be for the mechanism that its plan states.

    Raises:
        IdentityError: The signature is not the hospital's.
        ProtocolError: It paid for something else.
    """
    verify(identity, "receipt", receipt_payload(upload), bytes.fromhex(upload.receipt.signature))
    if upload.receipt.mechanism != mechanism.model_dump(mode="json"):
        raise ProtocolError("a receipt for another mechanism than the plan's", hint="Compare software versions.")


def _mechanism(study: Study, hospital: str, expected: type[Upload]) -> Mechanism:
    if expected is Update:
        return training_mechanism(study.plan, study.enrolled[hospital])
    return release_mechanism(study.plan)


def _bound(study: Study, public_size: int) -> float:
    plan = study.plan
    return update_bound(
        training=plan.training,
        privacy=plan.privacy,
        parameters=len(study.parameters),
        expected_batch=plan.privacy.sample_rate * public_size,
    )


def _keep(path: Path, hospital: str, upload: Upload) -> None:
    """Append a receipt to the evidence that an auditor cross-checks with the hospital's ledger."""
    with path.open("ab") as file:
        file.write(rfc8785.dumps({"hospital": hospital, "upload": upload.model_dump(mode="json")}) + b"\n")
