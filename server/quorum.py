"""Who takes part: studies are proposed, hospitals come and go, and a study below quorum waits for those it lacks."""

import time
from collections.abc import Collection

from server.cohort import choose
from server.gather import Answer, Lease
from server.patience import NOT_YET
from server.store import State
from server.study import Study
from shared_models.errors import DropoutError
from shared_models.messages import Enrolment, Proposal
from shared_models.software import software_digest

ENROL_EVERY_S = 0.1
FAILURES = 3  # in a row, after which a hospital is set aside for a while


def enrol_enough(study: Study) -> None:
    """Propose the study to every hospital as it comes online, until all have answered or the deadline has passed.

    Then, where too few take part, a patient study waits until enough do.
    """
    study.enter(State.PENDING)
    deadline = time.monotonic() + study.plan.deadline_s
    told: str | None = None
    while True:
        enrol(study)
        enough = len(study.enrolled) >= study.plan.minimum_hospitals
        settled = set(study.enrolled) | set(study.refused) >= study.names or time.monotonic() > deadline
        if enough and settled:
            return
        if settled:
            lacking = _too_few(study)
            if not study.patient:
                raise lacking
            if told != str(lacking):
                told = str(lacking)
                study.enter(State.PENDING, told)
                study.journal.write("waiting", reason=told)
        study.halt.wait(ENROL_EVERY_S)


def _too_few(study: Study) -> DropoutError:
    enrolled = len(study.enrolled)
    return DropoutError(
        f"{enrolled} of at least {study.plan.minimum_hospitals} hospitals take part; missing: {study.missing()}",
        hint="Start the missing daemons, or see the log of those that refused; "
        "then run the study again. At those that are pending a steward has to approve it.",
    )


def take_turn(study: Study) -> None:
    """Wait until no earlier study trains at any of this one's hospitals."""
    study.enter(State.QUEUED)
    study.turns.take(study.plan.study, study.number, study.names, study.halt)
    study.enter(State.RUNNING)


def enrol(study: Study) -> None:
    """Propose the plan to hospitals that are online and have not answered; late and returning ones join here.

    One whose steward has not approved the study yet is asked again, now and then; one that has restarted, at once.
    """
    study.refresh()
    leases = study.gather.online()
    known = study.enrolled.keys() | study.refused.keys()
    waiting = study.pending.due({n for n, lease in leases.items() if n not in known or study.leases[n] != lease})
    if not waiting:
        return
    plan, anchors = study.plan.model_dump(mode="json"), study.receipts.anchors()
    proposals = {name: (Proposal(plan=plan, anchor=anchors(name)), None) for name in waiting}
    for answer in study.gather.ask(proposals, group="propose", deadline_s=study.plan.deadline_s):
        _enrolled(study, answer, leases[answer.hospital])


def _enrolled(study: Study, answer: Answer, lease: Lease) -> None:
    """One hospital's answer to the proposal."""
    body, hospital = answer.body, answer.hospital
    registered = study.hospitals[hospital].public_size
    if isinstance(body, Enrolment) and body.plan_digest == study.digest and body.public_size == registered:
        first = hospital not in study.enrolled
        study.enrolled[hospital], study.leases[hospital] = body.public_size, lease
        study.pending.forget(hospital)
        study.refused.pop(hospital, None)
        same = body.software_digest == software_digest()
        if first:
            study.journal.write("enrolled", hospital=hospital, public_size=body.public_size, same_software=same)
        return
    study.enrolled.pop(hospital, None)
    if answer.problem in NOT_YET:
        if study.pending.wait_for(hospital):
            study.journal.write("pending", hospital=hospital)
        return
    same_plan = isinstance(body, Enrolment) and body.plan_digest == study.digest
    study.refused[hospital] = answer.problem or ("another-public-size" if same_plan else "another-plan")
    study.leases[hospital] = lease
    study.journal.write("refused", hospital=hospital, code=study.refused[hospital])


def gather_cohort(study: Study, without: set[str]) -> list[str]:
    """Whom to invite: enrolled, online, not at fault, and not set aside where enough others are there.

    Below quorum a patient study pauses: it says who is missing, gives up its turn, and goes on when enough are back,
    those that were at fault included.
    """
    deadline = time.monotonic() + study.plan.deadline_s
    paused = False
    while True:
        enrol(study)
        cohort = _candidates(study, without)
        enough = len(cohort) >= study.plan.minimum_hospitals
        if enough and not paused:
            return cohort
        if enough:
            take_turn(study)
            study.journal.write("quorum", hospitals=cohort)
            paused = False
            continue  # others may have gone meanwhile
        if time.monotonic() > deadline and not study.patient:
            return cohort
        if time.monotonic() > deadline and not paused:
            paused = True
            _pause(study, cohort)
            without.clear()
        study.halt.wait(ENROL_EVERY_S)


def _pause(study: Study, cohort: Collection[str]) -> None:
    study.turns.give_back(study.plan.study)
    reason = (
        f"below quorum: {len(cohort)} of at least {study.plan.minimum_hospitals} hospitals are there; "
        f"missing: {study.missing()}"
    )
    study.enter(State.PAUSED, reason)
    study.journal.write("paused", reason=reason)


def _candidates(study: Study, without: Collection[str]) -> list[str]:
    online = study.gather.online()
    there = study.away.due(set(study.enrolled) - set(without))
    steady = choose(study.aside.due(there), online)
    return steady if len(steady) >= study.plan.minimum_hospitals else choose(there, online)


def set_aside(study: Study, number: int, *, failed: Collection[str], steady: Collection[str]) -> None:
    """Count whose part of an attempt failed; whoever fails again and again is not invited for a while."""
    for hospital in steady:
        study.failures.pop(hospital, None)
        study.aside.forget(hospital)
    for hospital in failed:
        study.failures[hospital] = study.failures.get(hospital, 0) + 1
        if study.failures[hospital] >= FAILURES:
            study.aside.wait_for(hospital)
            reason = f"its part of {study.failures[hospital]} attempts in a row has failed"
            study.journal.write("set-aside", hospital=hospital, round=number, reason=reason)
