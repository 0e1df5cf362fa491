"""A plan that names its hospitals is for them: no other one enrols, and nobody takes part in a sum with another one."""

from pathlib import Path

from shared_models.messages import Advertised, Refusal
from tests.federation import Federation, changed, make_federation
from tests.rounds.test_a_server_that_lies import Coordinator

NAMED = ["hospital-1", "hospital-2", "hospital-3"]


def _for_three(folder: Path) -> Federation:
    federation = make_federation(folder, rounds=2, hospitals=4)
    federation.plan = changed(federation.plan, hospitals=NAMED)
    return federation


def test_a_hospital_that_the_plan_does_not_name_refuses(tmp_path: Path) -> None:
    """It is not asked, and if it is, it pays nothing and approves nothing; the three that are named finish."""
    federation = _for_three(tmp_path)

    federation.run()
    asked = {to for _, to, _ in federation.wire.trace if to != "coordinator"}
    answer = Coordinator(federation).propose("hospital-4")

    assert [(event["answered"], event["missing"]) for event in federation.events("round")] == [(NAMED, [])] * 2
    assert asked == set(NAMED)
    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert [entry.kind for entry in federation.ledger("hospital-4")] == ["budget-opened"]


def test_a_coordinator_that_invites_another_hospital_is_refused(tmp_path: Path) -> None:
    """The steward approved a sum with two others; who else would be in it was not asked."""
    federation = _for_three(tmp_path)
    coordinator = Coordinator(federation)
    coordinator.propose()

    with_another = coordinator.announce(invited=(*NAMED, "hospital-4"))
    as_approved = coordinator.announce(invited=tuple(NAMED))

    assert isinstance(with_another, Refusal)
    assert with_another.code == "protocol"
    assert isinstance(as_approved, Advertised)
    assert federation.charges("hospital-1") == []
