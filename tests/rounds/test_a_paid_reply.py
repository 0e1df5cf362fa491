"""After a charge, neither the time of a reply nor its code says anything about a record."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from client.app import hospital_at
from shared_models.errors import RecordsError
from shared_models.messages import Refusal, Update
from tests.federation import Federation, make_federation
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


def _seconds(federation: Federation, coordinator: Coordinator) -> float:
    """How long the victim took over its last request."""
    started = [0.0]
    federation.wire.on_request = lambda _name, _request: started.__setitem__(0, time.monotonic())
    coordinator.train(round=1)
    return time.monotonic() - started[0]


def test_an_update_does_not_leave_before_the_grid(coordinator: Coordinator) -> None:
    """Training takes milliseconds here; the update leaves with the first cell."""
    assert _seconds(coordinator.federation, coordinator) >= GRID_S
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1)]


def test_a_failure_after_the_charge_leaves_on_the_grid_with_one_code(coordinator: Coordinator) -> None:
    """Records that can no longer be read are no different, for the coordinator, from a device that broke."""

    def unreadable() -> tuple[object, object]:
        raise RecordsError("row 5: 31337")

    hospital = hospital_at(str(coordinator.federation.settings_file(HOSPITAL)))
    study = hospital._studies[coordinator.federation.plan.study]
    hospital._studies[study.plan.study] = replace(study, read=unreadable)  # type: ignore[arg-type]  # it never returns

    seconds = _seconds(coordinator.federation, coordinator)
    answer = coordinator.train(round=2)

    assert isinstance(answer, Refusal)
    assert answer.code == "error"
    assert seconds >= GRID_S
    assert coordinator.federation.charges(HOSPITAL) == [(1, 1), (2, 1)]
    hospital._studies[study.plan.study] = study
    assert isinstance(coordinator.train(round=3), Update)
