"""Hospitals come and go; the study goes on with those who are there, or says who is missing."""

from pathlib import Path

import pytest
from flwr.app import Message

from shared_models.errors import DropoutError
from shared_models.messages import Update
from tests.federation import Federation, make_federation, restart


def test_the_study_goes_on_without_one(federation: Federation) -> None:
    """A hospital that loses its network after the first round is missing from then on, and the model is made."""

    def lose(hospital: str, reply: Message) -> Message | None:
        if hospital == "hospital-2" and len(federation.charges(hospital)) == 2:
            federation.wire.offline.add(hospital)
        return reply

    federation.wire.tamper = lose

    federation.run()

    assert [event["missing"] for event in federation.events("round")] == [[], ["hospital-2"], ["hospital-2"]]


def test_a_hospital_that_comes_late_joins_the_next_round(federation: Federation) -> None:
    """Proposals are made again before each round, to whoever has not answered yet."""
    federation.wire.offline.add("hospital-4")
    federation.plan = federation.plan.model_copy(update={"deadline_s": 0.5})

    def arrive(hospital: str, request: Message) -> None:
        if request.metadata.group_id == "1" and hospital == "hospital-1":
            federation.wire.offline.discard("hospital-4")

    federation.wire.on_request = arrive

    federation.run()

    assert [event["missing"] for event in federation.events("round")] == [["hospital-4"], [], []]


def test_a_hospital_that_restarts_is_asked_again_and_reserves_nothing_twice(federation: Federation) -> None:
    """A restarted daemon has forgotten the study; it refuses one round, is proposed the plan again, and goes on."""

    def crash(hospital: str, request: Message) -> None:
        if request.metadata.group_id == "2" and hospital == "hospital-1":
            restart(federation, hospital)

    federation.wire.on_request = crash

    federation.run()

    assert [event["reason"] for event in federation.events("left-out")] == ["not-enrolled"]
    assert [event["missing"] for event in federation.events("round")] == [[], ["hospital-1"], []]
    assert [entry.kind for entry in federation.ledger("hospital-1")].count("plan-approved") == 1


def test_too_few_hospitals_at_the_start_are_named(tmp_path: Path) -> None:
    """It waits until the deadline, then says who is missing, and nothing has been charged."""
    federation = make_federation(tmp_path, rounds=2, deadline_s=0.3)
    federation.wire.offline |= {"hospital-1", "hospital-3"}

    with pytest.raises(DropoutError, match=r"2 of at least 3 .* hospital-1 \(not connected\), hospital-3"):
        federation.run()

    assert federation.events("failed")
    assert federation.charges("hospital-2") == []


def test_a_failed_attempt_is_charged_and_the_next_one_uses_a_spare_charge(tmp_path: Path) -> None:
    """Bad luck costs: an update that was computed is paid for although it was never averaged."""
    federation = make_federation(tmp_path, rounds=2, privacy={"spare_charges": 1, "noise_multiplier": 40.0})
    lost = {"hospital-1", "hospital-2"}

    def lose(hospital: str, reply: Message) -> Message | None:
        first = reply.metadata.message_type == Update.action and federation.charges(hospital) == [(1, 1)]
        return None if first and hospital in lost else reply

    federation.wire.tamper = lose
    federation.plan = federation.plan.model_copy(update={"deadline_s": 0.5})

    federation.run()

    (failed,) = federation.events("attempt-failed")
    assert failed["charged"]
    assert failed["answered"] == ["hospital-3", "hospital-4"]
    for name in federation.names:
        assert federation.charges(name) == [(1, 1), (1, 2), (2, 1)]


def test_when_the_spare_charges_are_used_up_the_study_ends_and_the_checkpoint_stays(tmp_path: Path) -> None:
    """No hospital is drained by a coordinator that tries for ever."""
    federation = make_federation(tmp_path, rounds=3, deadline_s=0.5, privacy={"spare_charges": 0})

    def lose(hospital: str, reply: Message) -> Message | None:
        gone = reply.metadata.group_id == "2" and hospital in {"hospital-1", "hospital-2"}
        return None if gone else reply

    federation.wire.tamper = lose

    with pytest.raises(DropoutError, match="round 2: no sum opened"):
        federation.run()

    assert (federation.folder / "study" / "checkpoints" / "round-000001.safetensors").exists()
    assert not (federation.folder / "study" / "model.safetensors").exists()
