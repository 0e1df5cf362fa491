"""A coordinator that lies, replays or asks for too much gets a code, no update, and costs the hospital nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from shared_models.messages import (
    Body,
    Enrolment,
    EvaluateRequest,
    Proposal,
    Refusal,
    StudyEnd,
    TrainRequest,
    Update,
    read_reply,
    request,
)
from shared_models.nets.build import build_network
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

    def ask(self, body: Body, vector: Any = None) -> Body:
        """Send one message to the hospital and read its answer."""
        message = request(body, vector, node_id=100, group_id="1", ttl_s=60)
        answer = self.federation.wire.deliver(HOSPITAL, message)
        assert answer is not None
        return read_reply(answer)[0]

    def propose(self) -> Body:
        """Propose the federation's plan."""
        return self.ask(Proposal(plan=self.federation.plan.model_dump(mode="json")))

    def train_request(self, **changes: Any) -> TrainRequest:
        """What an honest coordinator would ask in the first round, but for the changes."""
        fields = {
            "study": self.federation.plan.study,
            "plan_digest": self.federation.plan.digest(),
            "round": 1,
            "attempt": 1,
            "parameters_digest": vector_digest(self.parameters),
        }
        return TrainRequest(**{**fields, **changes})


@pytest.fixture
def coordinator(federation: Federation) -> Coordinator:
    """A coordinator whose study the hospital has approved."""
    coordinator = Coordinator(federation)
    coordinator.propose()
    return coordinator


def _refused(answer: Body, code: str) -> bool:
    return isinstance(answer, Refusal) and answer.code == code


def test_an_honest_request_is_answered(coordinator: Coordinator) -> None:
    """The helper above does what a coordinator does; without this, every refusal below would prove nothing."""
    answer = coordinator.ask(coordinator.train_request(), coordinator.parameters)

    assert isinstance(answer, Update)
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1)]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"parameters_digest": "0" * 64}, "protocol"),
        ({"plan_digest": "0" * 64}, "not-enrolled"),
        ({"study": "another-study"}, "not-enrolled"),
        ({"round": 4}, "protocol"),
    ],
    ids=["other parameters than announced", "another plan", "another study", "a round beyond the plan"],
)
def test_a_request_that_was_not_approved_is_refused_unpaid(
    coordinator: Coordinator, changes: dict[str, Any], code: str
) -> None:
    """Refused before anything is charged or read."""
    answer = coordinator.ask(coordinator.train_request(**changes), coordinator.parameters)

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

    answer = coordinator.ask(coordinator.train_request(parameters_digest=vector_digest(parameters)), parameters)

    assert _refused(answer, "protocol")
    assert coordinator.federation.charges(HOSPITAL) == []


def test_a_replayed_request_is_refused_and_charged_once(coordinator: Coordinator) -> None:
    """The same round and attempt never buys a second update, also after a restart."""
    coordinator.ask(coordinator.train_request(), coordinator.parameters)

    again = coordinator.ask(coordinator.train_request(), coordinator.parameters)
    restart(coordinator.federation, HOSPITAL)
    coordinator.propose()
    after_restart = coordinator.ask(coordinator.train_request(), coordinator.parameters)

    assert _refused(again, "protocol")
    assert _refused(after_restart, "protocol")
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1)]


def test_an_older_round_is_refused(coordinator: Coordinator) -> None:
    """Rounds and attempts only go up."""
    coordinator.ask(coordinator.train_request(round=2), coordinator.parameters)

    answer = coordinator.ask(coordinator.train_request(round=1, attempt=9), coordinator.parameters)

    assert _refused(answer, "protocol")


def test_attempts_stop_when_the_reservation_is_used_up(coordinator: Coordinator) -> None:
    """A hostile coordinator cannot drain the budget by failing attempts: rounds and spare charges, not one more."""
    plan = coordinator.federation.plan
    reserved = plan.rounds + plan.privacy.spare_charges

    answers = [
        coordinator.ask(coordinator.train_request(attempt=attempt), coordinator.parameters)
        for attempt in range(1, reserved + 3)
    ]

    assert [isinstance(answer, Update) for answer in answers] == [True] * reserved + [False] * 2
    assert _refused(answers[-1], "budget-exhausted")


def test_statistics_that_the_plan_does_not_release_are_refused(coordinator: Coordinator) -> None:
    """Validation statistics are off unless the approved plan says so."""
    body = EvaluateRequest(**coordinator.train_request().model_dump())

    assert _refused(coordinator.ask(body, coordinator.parameters), "protocol")


def test_a_closed_study_stays_closed(coordinator: Coordinator) -> None:
    """After the end no round runs, and the same name cannot be opened again with a fresh reservation."""
    plan = coordinator.federation.plan
    coordinator.ask(StudyEnd(study=plan.study, plan_digest=plan.digest()))

    late = coordinator.ask(coordinator.train_request(), coordinator.parameters)
    again = coordinator.propose()

    assert _refused(late, "not-enrolled")
    assert _refused(again, "policy")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"privacy": {"noise_multiplier": 0.1}}, "policy"),
        ({"privacy": {"epsilon": 50.0}}, "policy"),
        ({"privacy": {"delta": 0.4}}, "policy"),
        ({"minimum_hospitals": 1}, "policy"),
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
