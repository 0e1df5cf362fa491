"""After a charge, neither the time of a reply nor its code says anything about a record."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from client.app import hospital_at
from shared_models.messages import Refusal, TrainRequest, Update
from tests.federation import make_federation
from tests.rounds.test_a_server_that_lies import HOSPITAL, Coordinator

GRID_S = 0.7


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    """A coordinator whose study all hospitals approved, and whose plan has a coarse grid."""
    federation = make_federation(tmp_path, rounds=3, reply_grid_s=GRID_S)
    coordinator = Coordinator(federation)
    for name in federation.names:
        coordinator.propose(name)
    return coordinator


def test_an_update_does_not_leave_before_the_grid(coordinator: Coordinator) -> None:
    """Training takes milliseconds here; the update leaves with the first cell."""
    started = [0.0]
    coordinator.federation.wire.on_request = lambda _name, _request: started.__setitem__(0, time.monotonic())

    answer = coordinator.train()

    assert isinstance(answer, Update)
    assert time.monotonic() - started[0] >= GRID_S
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1)]


def test_a_failure_after_the_charge_leaves_on_the_grid_with_one_code(coordinator: Coordinator) -> None:
    """Records that cannot be read any more are no different, for the coordinator, from a device that broke."""
    federation, started = coordinator.federation, [0.0]
    study = hospital_at(str(federation.settings_file(HOSPITAL)))._studies[federation.plan.study]

    def lose_the_records(_name: str, request: Message) -> None:
        started[0] = time.monotonic()
        if request.metadata.message_type == TrainRequest.action:
            # Until stage 1 reads them again.
            study.population = replace(study.population, training=None)  # type: ignore[arg-type]

    federation.wire.on_request = lose_the_records
    answer = coordinator.train(round=1)
    seconds = time.monotonic() - started[0]
    federation.wire.on_request = lambda _name, _request: None

    assert isinstance(answer, Refusal)
    assert answer.code == "error"
    assert seconds >= GRID_S
    assert isinstance(coordinator.train(round=2), Update)
    assert federation.charges(HOSPITAL) == [(1, 1), (2, 1)]
