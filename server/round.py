"""A study at the coordinator, round by round: choose, announce, gather, sum, unmask, average, evaluate, save, record.

The coordinator is trusted to be present, not to be discreet: of hospitals' updates and statistics it can only see sums.
It checks every message before use, and keeps what hospitals sign.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server import logs
from server.aggregate import Attempt
from server.checkpoint import checkpoint_path, keep_best, last_round, load_checkpoint, save_checkpoint
from server.cohort import choose
from server.evaluate import released_metrics
from server.fedavg import server_step
from server.gather import Answer
from server.patience import NOT_NOW
from server.quorum import enrol_enough, gather_cohort, set_aside, take_turn
from server.study import Study
from shared_models.encoding import NULL_COORDINATES, encoding, public_weight
from shared_models.errors import ConfigError, DropoutError, FederationError, NotEnrolledError, ProtocolError
from shared_models.identity import verify
from shared_models.messages import (
    Body,
    PrivacyStatement,
    StudyEnd,
    Upload,
    Vector,
    receipt_payload,
    signed_receipt,
)
from shared_models.model_file import write_model
from shared_models.nets.build import count_parameters
from shared_models.plan import LARGEST_COHORT, StudyPlan
from shared_models.privacy.mechanisms import Mechanism, release_mechanism, training_mechanism
from shared_models.receipts import SignedReceipt
from shared_models.secagg.key_agreement import Announcement, Purpose
from shared_models.secagg.protocol import Coordinator, check_cohort_rule, plan_threshold
from shared_models.tasks import task_of
from shared_models.update import vector_digest, vector_to_parameters

log = logging.getLogger("konsil.coordinator")

CLOSED_AT_ONCE = 2
MOST_ATTEMPTS = 10  # at one round, those that cost nobody anything included
LONGEST_PAUSE_S = 30.0  # between two attempts at one round


@dataclass(frozen=True)
class Sum:
    """What one attempt at a sum came to.

    Attributes:
        attempt: Its number in the round.
        uploaders: Hospitals in the sum.
        total: Their weighted sum; None where the attempt failed.
        weight: Sum of their weights.
        charged: Whether hospitals were asked to compute: then those that answered have paid.
        at_fault: Whom the next attempt goes without.
        seconds: How long each stage took.
    """

    attempt: int
    uploaders: frozenset[str]
    total: NDArray[np.float64] | None
    weight: float
    charged: bool
    at_fault: str | None
    seconds: Mapping[str, float]


def run_study(study: Study) -> dict[str, PrivacyStatement]:
    """Run a study from where it is to its end.

    After a crash of the coordinator this goes on with the first round that has no checkpoint. An attempt that the crash
    interrupted is over: hospitals that had been asked to compute are charged anew for the next, from the spare charges.

    Guarantees:
        * A round whose checkpoint is there is never done again.
        * No number of an attempt is used twice.

    Returns:
        What each hospital states the study cost it.

    Raises:
        DropoutError: A round's attempts, or the spare charges, are used up; names who is missing.
        HaltedError: The study was told to pause or to stop.
    """
    plan = study.plan
    check_fits(plan, study.hospitals)
    first = take_up(study)
    if first <= plan.rounds:
        enrol_enough(study)
        take_turn(study)
    for number in range(first, plan.rounds + 1):
        study.halt.check()
        if study.rounds_done < number and (why := study.progress.verdict()):
            study.journal.write("stopped-early", round=study.rounds_done, rounds=plan.rounds, reason=why)
            break
        one_round(study, number)
    write_model(study.folder / "model.safetensors", study.model, plan, round=str(study.rounds_done))
    return close_study(study)


def one_round(study: Study, number: int) -> None:
    """Train, save, evaluate, record. A round that was saved before a crash is only recorded."""
    plan, started = study.plan, time.monotonic()
    if number > study.rounds_done:
        trained = train_round(study, number)
        answered, stages = sorted(trained.uploaders), dict(trained.seconds)
        state = study.server_step.state()
        save_checkpoint(study.folder / "checkpoints", study.model, study.parameters, plan, number, state)
        study.rounds_done = number
    else:
        told = study.journal.last("sum", purpose="train", round=number) or {"answered": [], "stages": {}}
        answered, stages = told["answered"], told["stages"]
    released = evaluate_round(study, number)
    facts = {
        "answered": answered,
        "missing": sorted(study.names - set(answered)),
        "epsilon_filter": dict(sorted(study.epsilons.items())),
        "metrics_released": released,
        "stages": stages,
        "seconds": round(time.monotonic() - started, 3),
        "checkpoint": str(checkpoint_path(study.folder / "checkpoints", number)),
    }
    # The database has the last word: where a crash came between the two, the event is there and is not told again.
    if not (number == study.taken_up and study.journal.last("round", round=number)):
        study.journal.write("round", round=number, rounds=plan.rounds, **facts)
    study.store.finish_round(plan.study, number, facts)
    study.progress.see(number, released)
    keep_best(study.folder, plan, study.progress.best)


def take_up(study: Study) -> int:
    """Begin, or go on where the process before this one was ended. Returns the first round that is not recorded."""
    plan, checkpoints = study.plan, study.folder / "checkpoints"
    study.rounds_done = last_round(checkpoints)
    if study.rounds_done:
        study.parameters, state = load_checkpoint(checkpoints, plan, study.rounds_done)
        study.server_step = server_step(plan.averaging, len(study.parameters), state)
        vector_to_parameters(study.parameters, study.model)
    known = {"study": plan.study, "plan_digest": study.digest, "rounds": plan.rounds}
    if study.journal.begun:
        told = study.journal.last("sum", purpose="train") or {"epsilon_filter": {}}
        study.epsilons = dict(told["epsilon_filter"])
        study.journal.write("resumed", **known, rounds_done=study.rounds_done)
    else:
        study.journal.write("started", **known, parameters=len(study.parameters))
    for purpose, number, attempt, charged in study.store.open_attempts(plan.study):
        saved = purpose == "train" and number <= study.rounds_done  # only the word of it was lost
        study.store.end_attempt(plan.study, purpose, number, attempt, opened=saved)
        if not saved:
            about = {"purpose": purpose, "round": number, "attempt": attempt, "charged": charged}
            study.journal.write("aborted", **about, reason="the coordinator ended in the middle of it")
    recorded = study.store.rounds(plan.study)
    for row in recorded:
        study.progress.see(row.round, row.facts["metrics_released"])
    keep_best(study.folder, plan, study.progress.best)  # while its checkpoint is still there
    study.taken_up = recorded[-1].round + 1 if recorded else 1
    return study.taken_up


def check_fits(plan: StudyPlan, registered: Collection[str]) -> None:
    """Check before anything is sent that the study's sums fit the modulus, with as many hospitals as may be invited.

    Raises:
        ConfigError: The plan names a hospital that is not on the roster.
        TooFewHospitalsError, ThresholdError: Fewer hospitals are registered than a sum needs, or than the plan wants.
        ScaleTooSmallError: Updates of this plan from so many hospitals would overflow the modulus.
    """
    names = sorted(set(registered) if plan.hospitals is None else plan.hospitals)
    unknown = sorted(set(names) - set(registered))
    if unknown:
        raise ConfigError(
            f"study {plan.study} is for hospitals that are not on the roster: {', '.join(unknown)}",
            hint="Enrol them first, or correct the plan's list of hospitals.",
        )
    hospitals = min(len(names), LARGEST_COHORT)
    check_cohort_rule(names[:hospitals], plan_threshold(plan.minimum_hospitals, hospitals))
    parameters = count_parameters(plan.network, task_of(plan))
    purposes: tuple[Purpose, ...] = ("train", "evaluate") if plan.evaluation else ("train",)
    for purpose in purposes:
        encoding(plan, purpose, parameters=parameters, hospitals=hospitals)


def train_round(study: Study, number: int) -> Sum:
    """One round: attempts until a sum opens; failed ones that hospitals have paid for use spare charges up."""
    without = set[str]()
    found: Sum | None = None
    spare = study.plan.privacy.spare_charges
    for tried in range(MOST_ATTEMPTS):
        spare = study.plan.privacy.spare_charges - study.store.paid_in_vain(study.plan.study, number - 1)
        if spare < 0:
            break
        if tried > 1 and study.patient:  # the second is made at once
            study.halt.wait(min(0.25 * 2**tried, LONGEST_PAUSE_S))
        cohort = gather_cohort(study, without)
        if len(cohort) < study.plan.minimum_hospitals:
            break
        found = secure_sum(study, "train", number, cohort)
        if found.total is not None:
            study.parameters = study.server_step.step(study.parameters, found.total[:-NULL_COORDINATES], found.weight)
            vector_to_parameters(study.parameters, study.model)
            return found
        study.halt.check()
        without |= {found.at_fault} if found.at_fault else set()
        answered = sorted(found.uploaders)
        study.journal.write(
            "attempt-failed", round=number, attempt=found.attempt, charged=found.charged, answered=answered
        )
    answered = sorted(found.uploaders) if found else []
    missing = sorted(study.names - set(answered))
    raise DropoutError(
        f"round {number}: no sum opened in {study.store.attempts(study.plan.study, 'train', number)} attempts of at "
        f"most {study.plan.deadline_s:g} s a stage; {len(answered)} hospitals answered the last; at least "
        f"{study.plan.minimum_hospitals} are needed, and {max(spare, 0)} spare charges are left; missing: "
        f"{', '.join(missing)}",
        hint="The last checkpoint is valid. Bring the missing hospitals back, or plan more spare charges.",
    )


def evaluate_round(study: Study, number: int) -> dict[str, float] | None:
    """Sum noised validation statistics where the plan says so; off by default, charged at every hospital."""
    evaluation = study.plan.evaluation
    if evaluation is None or number % evaluation.every:
        return None
    if study.store.attempts(study.plan.study, "evaluate", number):  # before a crash; it is not paid for twice
        told = study.journal.last("released", round=number)
        return told["metrics"] if told else None
    cohort = choose(study.away.due(study.enrolled), study.gather.online())
    if len(cohort) < study.plan.minimum_hospitals:
        return None
    found = secure_sum(study, "evaluate", number, cohort)
    if found.total is None:
        return None
    metrics = released_metrics(study.task, evaluation, found.total)
    study.journal.write("released", round=number, metrics=metrics)
    return metrics


def secure_sum(study: Study, purpose: Purpose, number: int, cohort: list[str]) -> Sum:
    """One attempt at one encrypted sum: announce, gather, sum, unmask, decode; and its evidence."""
    plan, attempt = study.plan, study.store.begin_attempt(study.plan.study, purpose, number)
    logs.about(study=plan.study, purpose=purpose, round=number, attempt=attempt)
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
    hospitals, sizes = study.hospitals, dict(study.enrolled)

    def ask(requests: Mapping[str, tuple[Body, Vector | None]]) -> Iterator[Answer]:
        return study.gather.ask(requests, group=str(number), deadline_s=plan.deadline_s)

    def check(hospital: str, upload: Upload) -> None:
        check_receipt(upload, hospitals[hospital].identity, mechanisms[hospital])

    def leave_out(hospital: str, stage: str, answer: Answer, error: FederationError) -> None:
        study.journal.write("left-out", hospital=hospital, round=number, stage=stage, reason=str(error))
        log.warning("round %d, %s: %s left out: %s", number, stage, hospital, error)
        if answer.problem == NotEnrolledError.code:  # its daemon restarted: propose the study again
            study.enrolled.pop(hospital, None)
        elif answer.problem in NOT_NOW:
            study.away.wait_for(hospital)

    def receipts() -> dict[str, SignedReceipt]:
        return {hospital: signed_receipt(upload) for hospital, upload in run.uploads.items()}

    def about_to(stage: str) -> None:
        if stage == "train":
            study.store.charged(plan.study, purpose, number, attempt)
        elif stage == "agree":  # what hospitals are about to sign must not be forgotten here
            study.evidence.hold(_evidence(party), receipts())

    run = Attempt(party, ask=ask, check=check, leave_out=leave_out, anchor=study.receipts.anchors(), about_to=about_to)
    total, weight = None, 0.0
    try:
        cells = run.run(study.parameters)
        total = code.decode(cells, len(run.uploads))
        weight = sum(_weight(plan, purpose, sizes[name]) for name in run.uploads)
    except FederationError as error:
        study.journal.write("aborted", purpose=purpose, round=number, attempt=attempt, reason=str(error))
        log.warning("round %d, attempt %d to %s: %s", number, attempt, purpose, error)
    opened = {"null_coordinates": total[-NULL_COORDINATES:].tolist(), "weight": weight} if total is not None else {}
    signed = receipts()
    study.evidence.hold(_evidence(party) | (opened if purpose == "train" else {}), signed)
    study.evidence.close()
    study.receipts.keep(signed)
    for hospital, kept in signed.items():
        study.away.forget(hospital)
        study.epsilons[hospital] = kept.receipt.epsilon_filter
    set_aside(study, number, failed=set(cohort) & (party.dropped.keys() | {party.at_fault}), steady=run.uploads)
    study.journal.write(
        "sum",
        purpose=purpose,
        round=number,
        attempt=attempt,
        opened=total is not None,
        answered=sorted(run.uploads),
        epsilon_filter=dict(sorted(study.epsilons.items())),
        threshold=announcement.threshold,
        hospitals=len(cohort),
        dropped=party.dropped,
        at_fault=party.at_fault,
        bytes_up=4 * code.length,
        stages=run.seconds,
    )
    study.store.end_attempt(plan.study, purpose, number, attempt, opened=total is not None)
    return Sum(attempt, frozenset(run.uploads), total, weight, run.charged, party.at_fault, run.seconds)


def _evidence(party: Coordinator) -> dict[str, Any]:
    """What an auditor needs of an attempt, as far as it has come; no single update."""
    evidence: dict[str, Any] = {"transcript": party.transcript().model_dump(mode="json")}
    if party.complaint is not None:
        evidence["complaint"] = party.complaint.model_dump(mode="json")
    return evidence


def close_study(study: Study) -> dict[str, PrivacyStatement]:
    """Tell every hospital that the study is over, so that it frees its reservation, and gather what it cost each.

    A few at a time: stating a tight epsilon forks a process and takes seconds, and trials have many hospitals on one
    machine.
    """
    statements: dict[str, PrivacyStatement] = {}
    request = StudyEnd(study=study.plan.study, plan_digest=study.digest)
    cohort = sorted(study.gather.online())
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
