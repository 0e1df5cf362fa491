"""A hospital's policy changes while a study runs: it holds for the next message, and nothing is charged against it."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from flwr.app import Message

from client.books import read_budget
from client.hours import DAYS
from shared_models.messages import AdvertiseRequest, TrainRequest, UnmaskRequest
from tests.federation import Federation, change_policy, make_federation, restart

CHANGED = "hospital-2"


def closed_now() -> list[str]:
    """Hours of a window that is open tomorrow only."""
    tomorrow = (datetime.now().astimezone() + timedelta(days=1)).weekday()
    return [f"{DAYS[tomorrow]} 12:00-13:00"]


def at(federation: Federation, action: str, number: int, change: Any) -> None:
    """Just before the hospital sees a message of some stage of some round, once, change something."""
    done: list[str] = []

    def watch(hospital: str, request: Message) -> None:
        here = (hospital, request.metadata.message_type, request.metadata.group_id) == (CHANGED, action, str(number))
        if here and not done:
            done.append(hospital)
            change()

    federation.wire.on_request = watch


@pytest.mark.parametrize("action", [AdvertiseRequest.action, TrainRequest.action])
@pytest.mark.parametrize(
    "policy",
    [
        {"maximum_epsilon_per_study": 0.01},
        {"minimum_noise_multiplier": 1000.0},
        {"tasks": ["heart-disease"]},
        {"coordinators": ["another.example:9092"]},
        {"devices": ["cuda"]},
        {"maximum_rounds": 1},
    ],
    ids=lambda policy: next(iter(policy)),
)
def test_what_it_forbids_is_not_charged_from_the_next_message_on(
    federation: Federation, action: str, policy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Also between the stages of a round, where the hospital has promised nothing yet; the others finish the study."""
    at(federation, action, 2, lambda: change_policy(federation, CHANGED, **policy))

    federation.run()

    assert federation.charges(CHANGED) == [(1, 1)]
    assert [event["missing"] for event in federation.events("round")] == [[], [CHANGED], [CHANGED]]
    assert {event["reason"] for event in federation.events("left-out")} == {"policy"}
    assert "the policy in hospital.toml changed" in caplog.text
    assert f"{next(iter(policy))}: " in caplog.text


def test_what_it_allows_again_is_computed_again(federation: Federation) -> None:
    """Hospitals that refuse a round stay in the study."""
    was = federation.settings(CHANGED).policy.maximum_epsilon_per_study

    def watch(hospital: str, request: Message) -> None:
        limits = {"2": 0.01, "3": was}
        if hospital == CHANGED and request.metadata.group_id in limits:
            change_policy(federation, CHANGED, maximum_epsilon_per_study=limits[request.metadata.group_id])

    federation.wire.on_request = watch

    federation.run()

    assert federation.charges(CHANGED) == [(1, 1), (3, 1)]


@pytest.mark.parametrize("action", [TrainRequest.action, UnmaskRequest.action])
def test_a_file_that_is_broken_stops_this_hospital_and_nobody_else(
    federation: Federation, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every message is refused, with the reason in the log; the daemon lives, and goes on when the file is mended."""
    path = federation.settings_file(CHANGED)
    whole = path.read_bytes()
    at(federation, action, 2, lambda: path.write_bytes(whole[:-30]))

    def mend(hospital: str, reply: Message) -> Message:
        if hospital == CHANGED and reply.metadata.group_id == "2" and path.read_bytes() != whole:
            broken.append(reply)
            path.write_bytes(whole)
        return reply

    broken: list[Message] = []
    federation.wire.tamper = mend

    federation.run()

    assert len(broken) == 1
    assert "hospital.toml" in caplog.text
    assert federation.charges(CHANGED)[-1] == (3, 1)
    assert len(federation.events("round")) == 3


def test_outside_its_hours_a_hospital_has_dropped_out_of_the_rounds_not_of_the_study(tmp_path: Any) -> None:
    """It is enrolled at any hour, refuses rounds with a code of their own, and is not charged."""
    federation = make_federation(tmp_path, rounds=3)
    change_policy(federation, CHANGED, hours=closed_now())

    federation.run()

    assert CHANGED in {event["hospital"] for event in federation.events("enrolled")}
    assert federation.events("refused") == []
    assert {event["reason"] for event in federation.events("left-out")} == {"outside-hours"}
    assert [event["missing"] for event in federation.events("round")] == [[CHANGED]] * 3
    assert federation.charges(CHANGED) == []


def test_inside_its_hours_it_takes_part(federation: Federation) -> None:
    """A week without a gap is open at any moment."""
    change_policy(federation, CHANGED, hours=["mon-sun 00:00-12:00", "mon-sun 12:00-24:00"])

    federation.run()

    assert len(federation.charges(CHANGED)) == 3


def test_hours_that_end_in_the_middle_of_a_round_end_it_here(federation: Federation) -> None:
    """Asked to train a minute too late, it is not charged; its peers' sum opens without it."""
    at(federation, TrainRequest.action, 2, lambda: change_policy(federation, CHANGED, hours=closed_now()))

    federation.run()

    assert federation.charges(CHANGED) == [(1, 1)]
    assert federation.events("left-out")[0]["reason"] == "outside-hours"
    assert len(federation.events("round")) == 3


def test_the_rounds_of_a_day_are_counted_in_the_ledger_so_that_a_restart_forgets_none(federation: Federation) -> None:
    """Two are permitted: the third is refused, also by a process that has answered none."""
    change_policy(federation, CHANGED, maximum_rounds_per_day=2)

    def crash(hospital: str, request: Message) -> None:
        if request.metadata.group_id == "2" and request.metadata.message_type == UnmaskRequest.action:
            crashed.add(hospital)
        if request.metadata.group_id == "3" and hospital == "hospital-1" and CHANGED in crashed:
            restart(federation, CHANGED)
            crashed.clear()

    crashed: set[str] = set()
    federation.wire.on_request = crash

    federation.run()

    assert federation.charges(CHANGED) == [(1, 1), (2, 1)]
    assert not crashed
    assert federation.events("round")[2]["missing"] == [CHANGED]


def test_the_day_is_the_last_24_hours_by_the_ledgers_times(federation: Federation) -> None:
    """The window slides: a charge counts until its own time lies behind."""
    federation.run()
    budget = read_budget(federation.settings(CHANGED))
    charges = [entry for entry in federation.ledger(CHANGED) if entry.kind == "charge"]
    first, *_, last = [datetime.fromisoformat(entry.time).timestamp() for entry in charges]

    assert [budget.trained_since(moment) for moment in (first - 1, first, last)] == [3, 2, 0]
