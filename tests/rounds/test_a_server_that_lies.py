"""A coordinator that lies, replays or asks for too much gets a code, no update, and costs the hospital nothing."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.evidence import REFUSALS
from shared_models.messages import (
    Advertised,
    AdvertiseRequest,
    Body,
    Dealt,
    Enrolment,
    Proposal,
    Refusal,
    ShareRequest,
    StudyEnd,
    TrainRequest,
    Update,
    read_reply,
    request,
)
from shared_models.nets.build import build_network
from shared_models.secagg.key_agreement import Announcement
from shared_models.secagg.protocol import Coordinator as Party
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector, vector_digest
from tests.federation import Federation, changed, restart

HOSPITAL = "hospital-1"


class Coordinator:
    """A coordinator of one's own, to lie with."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        plan = federation.plan
        model = build_network(plan.network, find_task(plan.task), seed=plan.seed)
        self.parameters = parameters_to_vector(model)

    def ask(self, body: Body, vector: Any = None, hospital: str = HOSPITAL) -> Body:
        """Send one message to a hospital and read its answer."""
        message = request(body, vector, node_id=100, group_id="1", ttl_s=60)
        answer = self.federation.wire.deliver(hospital, message)
        assert answer is not None
        return read_reply(answer)[0]

    def propose(self, hospital: str = HOSPITAL) -> Body:
        """Propose the federation's plan."""
        return self.ask(Proposal(plan=self.federation.plan.model_dump(mode="json")), hospital=hospital)

    def announcement(self, **changes: Any) -> Announcement:
        """What an honest coordinator would announce in the first round, but for the changes."""
        fields = {
            "purpose": "train",
            "study": self.federation.plan.study,
            "plan_digest": self.federation.plan.digest(),
            "roster_digest": self.federation.roster().digest,
            "round": 1,
            "attempt": 1,
            "parameters_digest": vector_digest(self.parameters),
            "invited": tuple(self.federation.names),
            "threshold": 3,
        }
        return Announcement(**{**fields, **changes})

    def announce(self, **changes: Any) -> Body:
        """Stage 1 with the victim alone."""
        return self.ask(AdvertiseRequest(announcement=self.announcement(**changes)))

    def train(self, parameters: Any = None, **changes: Any) -> Body:
        """Stages 1 to 3 with all hospitals, as honest as the changes; the victim's first refusal, or its upload."""
        announcement = self.announcement(**changes)
        roster = self.federation.roster()
        party = Party(announcement, roster=roster, length=1)
        for name in self.federation.names:
            answer = self.ask(AdvertiseRequest(announcement=announcement), hospital=name)
            if not isinstance(answer, Advertised):
                return answer
            party.receive_advertisement(name, answer.advertisement)
        cohort = party.cohort()
        for name in self.federation.names:
            answer = self.ask(ShareRequest(cohort=cohort), hospital=name)
            if not isinstance(answer, Dealt):
                return answer
            party.receive_dealing(name, answer.dealing)
        self.last = TrainRequest(delivery=party.deliveries()[HOSPITAL])
        return self.ask(self.last, self.parameters if parameters is None else parameters)


@pytest.fixture
def coordinator(federation: Federation) -> Coordinator:
    """A coordinator whose study the hospital has approved."""
    coordinator = Coordinator(federation)
    for name in federation.names:
        coordinator.propose(name)
    return coordinator


def _refused(answer: Body, code: str) -> bool:
    return isinstance(answer, Refusal) and answer.code == code


def _refusals(federation: Federation) -> list[dict[str, Any]]:
    path = federation.settings(HOSPITAL).state / REFUSALS
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def test_what_was_refused_is_kept(coordinator: Coordinator) -> None:
    """The peer's own words, their digest and the code it got: what a hospital shows when it complains."""
    coordinator.announce(study="another-study")

    (kept,) = _refusals(coordinator.federation)
    assert (kept["action"], kept["code"]) == ("query.advertise", "not-enrolled")
    assert json.loads(kept["body"])["announcement"]["study"] == "another-study"
    assert kept["sha256"] == hashlib.sha256(kept["body"].encode()).hexdigest()
    assert kept["body"].encode() in b"".join(
        sent for _, to, sent in coordinator.federation.wire.trace if to == HOSPITAL
    )


def test_an_honest_request_is_answered(coordinator: Coordinator) -> None:
    """The helper above does what a coordinator does; without this, every refusal below would prove nothing."""
    answer = coordinator.train()

    assert isinstance(answer, Update)
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1)]
    assert _refusals(coordinator.federation) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"parameters_digest": "0" * 64}, "parameters-mismatch"),
        ({"attempt": 11}, "policy"),
        ({"purpose": "evaluate"}, "protocol"),
        ({"plan_digest": "0" * 64}, "not-enrolled"),
        ({"study": "another-study"}, "not-enrolled"),
        ({"round": 4}, "protocol"),
    ],
    ids=[
        "other parameters than announced",
        "too many attempts",
        "no evaluation",
        "another plan",
        "another study",
        "a round beyond the plan",
    ],
)
def test_a_request_that_was_not_approved_is_refused_unpaid(
    coordinator: Coordinator, changes: dict[str, Any], code: str
) -> None:
    """Refused before anything is charged or read."""
    answer = coordinator.train(**changes)

    assert _refused(answer, code)
    assert coordinator.federation.charges(HOSPITAL) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: np.append(p, np.float32(0)),
        lambda p: p[:-1],
        lambda p: np.where(np.arange(len(p)) == 5, np.float32("nan"), p),
        lambda p: np.where(np.arange(len(p)) == 5, np.float32("inf"), p),
    ],
    ids=["too long", "too short", "NaN", "infinity"],
)
def test_parameters_that_are_none_are_refused_unpaid(
    coordinator: Coordinator, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Wrong lengths and non-finite numbers never reach the network."""
    parameters = spoil(coordinator.parameters)

    answer = coordinator.train(parameters, parameters_digest=vector_digest(parameters))

    assert _refused(answer, "protocol")
    assert coordinator.federation.charges(HOSPITAL) == []


def test_a_replayed_request_is_refused_and_charged_once(coordinator: Coordinator) -> None:
    """The same round and attempt never buys a second update, also after a restart."""
    coordinator.train()

    again = coordinator.ask(coordinator.last, coordinator.parameters)
    restart(coordinator.federation, HOSPITAL)
    coordinator.propose()
    after_restart = coordinator.ask(coordinator.last, coordinator.parameters)
    anew = coordinator.announce()

    assert _refused(again, "repeated-stage")
    assert _refused(after_restart, "unknown-context")
    assert _refused(anew, "stale-attempt")
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1)]


def test_an_older_round_is_refused(coordinator: Coordinator) -> None:
    """Rounds and attempts only go up."""
    coordinator.train(round=2)

    answer = coordinator.announce(round=1, attempt=9)

    assert _refused(answer, "stale-attempt")


def test_attempts_stop_when_the_reservation_is_used_up(coordinator: Coordinator) -> None:
    """A hostile coordinator cannot drain the budget by failing attempts: rounds and spare charges, not one more."""
    plan = coordinator.federation.plan
    reserved = plan.rounds + plan.privacy.spare_charges

    answers = [coordinator.train(attempt=attempt) for attempt in range(1, reserved + 3)]

    assert [isinstance(answer, Update) for answer in answers] == [True] * reserved + [False] * 2
    assert _refused(answers[-1], "budget-exhausted")


def test_a_closed_study_stays_closed(coordinator: Coordinator) -> None:
    """After the end no round runs, and the same name cannot be opened again with a fresh reservation."""
    plan = coordinator.federation.plan
    coordinator.ask(StudyEnd(study=plan.study, plan_digest=plan.digest()))

    late = coordinator.announce()
    again = coordinator.propose()

    assert _refused(late, "not-enrolled")
    assert _refused(again, "policy")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"privacy": {"noise_multiplier": 0.1}}, "policy"),
        ({"privacy": {"epsilon": 50.0}}, "policy"),
        ({"privacy": {"delta": 0.4}}, "policy"),
        ({"rounds": 1000}, "policy"),
        ({"network": {"name": "mlp"}}, "policy"),
        ({"task": "heart-disease"}, "policy"),
        ({"training": {"steps": 4000}}, "budget-exhausted"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_plan_that_the_hospital_does_not_permit_is_refused(
    federation: Federation, changes: dict[str, Any], code: str
) -> None:
    """The stricter of plan and policy wins, and a plan that cannot be paid for reserves nothing."""
    federation.plan = changed(federation.plan, **changes)

    answer = Coordinator(federation).propose()

    assert _refused(answer, code)
    assert [entry.kind for entry in federation.ledger(HOSPITAL)] == ["budget-opened"]


def test_a_plan_with_an_unknown_key_is_refused(federation: Federation) -> None:
    """A typo must not mean a default."""
    plan = federation.plan.model_dump(mode="json") | {"noise_multipler": 0}

    assert _refused(Coordinator(federation).ask(Proposal(plan=plan)), "config")


def test_a_second_study_that_would_pass_the_budget_is_refused(federation: Federation) -> None:
    """The budget belongs to the patients, not to a study: what one has reserved or spent, the next cannot have."""
    answers = []
    for number in range(50):
        federation.plan = changed(federation.plan, study=f"study-{number}")
        answers.append(Coordinator(federation).propose())

    approved = [isinstance(answer, Enrolment) for answer in answers]
    assert 1 < sum(approved) < 50
    assert approved == sorted(approved, reverse=True)
    assert _refused(answers[-1], "budget-exhausted")
    assert federation.charges(HOSPITAL) == []


def test_what_a_record_says_never_crosses_the_wire(federation: Federation) -> None:
    """A value out of range stops the hospital with a message that names it; the coordinator gets a code."""
    value = "31337.4242"
    data = federation.settings(HOSPITAL).records / "data.csv"
    lines = data.read_text(encoding="utf-8").splitlines()
    cells = lines[5].split(",")
    cells[1] = value
    lines[5] = ",".join(cells)
    data.write_text("\n".join(lines), encoding="utf-8")

    answer = Coordinator(federation).propose()

    assert _refused(answer, "records")
    assert all(value.encode() not in sent for _, _, sent in federation.wire.trace)
    (kept,) = _refusals(federation)
    assert kept["code"] == "records"
    assert value not in json.dumps(kept)


def test_a_message_of_an_unknown_type_reaches_no_code_of_ours(federation: Federation) -> None:
    """Flower's app routes by message type; what is not registered raises there, and the daemon never gets so far."""
    message = request(coordinator_body(), None, node_id=100, group_id="1", ttl_s=60)
    message.metadata.message_type = "train.anything"

    with pytest.raises(ValueError, match="No train function registered"):
        federation.wire.deliver(HOSPITAL, message)


def coordinator_body() -> Proposal:
    """Any message at all."""
    return Proposal(plan={})


def test_garbage_records_are_refused(federation: Federation) -> None:
    """Flower records that are no message of ours get a code."""
    message: Message = request(coordinator_body(), None, node_id=100, group_id="1", ttl_s=60)
    del message.content["konsil"]

    answer = federation.wire.deliver(HOSPITAL, message)

    assert answer is not None
    assert _refused(read_reply(answer)[0], "protocol")
    (kept,) = _refusals(federation)
    assert (kept["code"], kept["body"]) == ("protocol", "")
