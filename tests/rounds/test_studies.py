"""Studies as durable objects: paused, resumed and stopped by an operator, below quorum, queued, interrupted."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from server.app import conduct
from server.halt import Halt
from server.receipts import LastReceipts
from server.round import check_fits
from server.store import State, Store, StudyRow
from server.studies import Studies, StudyStatus
from server.study import Registered
from server.turns import Turns
from shared_models.errors import ConfigError, StudyStateError, ThresholdError, UnknownStudyError
from shared_models.identity import read_public
from shared_models.plan import StudyPlan
from tests.federation import Federation, changed, make_federation

PATIENCE_S = 60.0


@pytest.fixture
def quick(tmp_path: Path) -> Federation:
    """Six hospitals with much budget, short deadlines, and a wire that several studies may use."""
    federation = make_federation(tmp_path, rounds=60, hospitals=6, deadline_s=1.0, privacy={"noise_multiplier": 200.0})
    federation.plan = changed(federation.plan, rounds=4)
    deliver, one_at_a_time = federation.wire.deliver, threading.Lock()

    def deliver_one(name: str, message: Message) -> Message | None:
        with one_at_a_time:  # this process plays all hospitals
            return deliver(name, message)

    federation.wire.deliver = deliver_one  # type: ignore[method-assign]
    return federation


@contextmanager
def coordinating(federation: Federation) -> Iterator[Studies]:
    """The coordinator's studies over the federation's wire; leaving ends them as the end of its process would."""
    sizes = {hospital.name: hospital.public_size for hospital in federation.example.hospitals}
    keys = {name: read_public(federation.folder / "public" / f"{name}.identity.pub") for name in federation.names}
    members = {name: Registered(keys[name], sizes[name]) for name in federation.names}
    receipts = LastReceipts(federation.folder / "last-receipts.json")

    def run(row: StudyRow, turns: Turns, halt: Halt) -> None:
        conduct(row, federation.wire, lambda: members, receipts, store, turns, halt, patient=True)

    def check(plan: StudyPlan) -> None:
        check_fits(plan, members)

    with (
        closing(Store(f"sqlite:///{federation.folder / 'coordinator.sqlite'}")) as store,
        Studies(store, federation.folder / "studies", run, check=check) as studies,
    ):
        yield studies


def _submit(studies: Studies, federation: Federation, **changes: Any) -> str:
    plan = changed(federation.plan, **changes)
    return studies.submit(plan.model_dump(mode="json", exclude_none=True), by="ann").row.name


def _until(studies: Studies, study: str, holds: Callable[[StudyStatus], bool]) -> StudyStatus:
    deadline = time.monotonic() + PATIENCE_S
    while not holds(status := studies.show(study)):
        assert time.monotonic() < deadline, f"it never happened: {status}"
        time.sleep(0.02)
    return status


def _rounds(studies: Studies, study: str) -> list[int]:
    return [event["round"] for event in studies.events(study)[0] if event["event"] == "round"]


def test_a_study_is_paused_between_rounds_and_goes_on(quick: Federation) -> None:
    """Also by the next process: an operator's wish survives the coordinator."""
    with coordinating(quick) as studies:
        study = _submit(studies, quick)
        _until(studies, study, lambda status: status.row.rounds_done >= 1)
        studies.pause(study)
        paused = _until(studies, study, lambda status: status.row.state is State.PAUSED)
        assert paused.row.reason == "by an operator"
        assert paused.row.rounds_done < 4

    with coordinating(quick) as studies:
        assert studies.show(study).row.state is State.PAUSED
        studies.resume(study)
        studies.wait(study)

        assert studies.show(study).row.state is State.FINISHED
        assert _rounds(studies, study) == [1, 2, 3, 4]
        assert studies.model(study).exists()
        assert [path.name for path in studies.evidence(study)] == ["receipts.jsonl", "sums.jsonl"]
    for name in quick.names:
        assert quick.charges(name) == [(number, 1) for number in range(1, 5)]


def test_a_stopped_study_frees_what_hospitals_reserved(quick: Federation) -> None:
    """What was charged stays charged; the study never begins again."""
    with coordinating(quick) as studies:
        study = _submit(studies, quick, rounds=60)
        _until(studies, study, lambda status: status.row.rounds_done >= 1)
        studies.stop(study)
        _until(studies, study, lambda status: status.row.state is State.STOPPED)
        _until(studies, study, lambda _: all("study-closed" in [e.kind for e in quick.ledger(n)] for n in quick.names))

        with pytest.raises(StudyStateError, match="is stopped: it never begins again"):
            studies.resume(study)
        with pytest.raises(StudyStateError, match="there is no model yet"):
            studies.model(study)


def test_a_paused_study_can_be_stopped(quick: Federation) -> None:
    """Its hospitals hear of it although nothing runs."""
    with coordinating(quick) as studies:
        study = _submit(studies, quick, rounds=60)
        _until(studies, study, lambda status: status.row.rounds_done >= 1)
        studies.pause(study)
        _until(studies, study, lambda status: status.row.state is State.PAUSED)
        studies.stop(study)
        _until(studies, study, lambda status: status.row.state is State.STOPPED)
        _until(studies, study, lambda _: all("study-closed" in [e.kind for e in quick.ledger(n)] for n in quick.names))


def test_below_quorum_a_study_says_who_is_missing_and_goes_on_by_itself(quick: Federation) -> None:
    """Nobody has to do anything but bring the hospitals back."""
    gone = {"hospital-1", "hospital-3", "hospital-5", "hospital-6"}
    with coordinating(quick) as studies:
        study = _submit(studies, quick)
        _until(studies, study, lambda status: status.row.rounds_done >= 1)
        quick.wire.offline |= gone
        paused = _until(studies, study, lambda status: status.row.state is State.PAUSED)
        quick.wire.offline -= gone
        studies.wait(study)

        assert paused.row.reason is not None
        assert "2 of at least 3 hospitals are there" in paused.row.reason
        assert "hospital-1 (not connected), hospital-3 (not connected)" in paused.row.reason
        assert studies.show(study).row.state is State.FINISHED
        assert _rounds(studies, study) == [1, 2, 3, 4]
        assert [e for e in studies.events(study)[0] if e["event"] == "quorum"]


def test_a_study_waits_for_hospitals_that_have_not_come_yet(quick: Federation) -> None:
    """Submitted on Friday, hospitals start on Monday."""
    quick.wire.offline |= set(quick.names)
    with coordinating(quick) as studies:
        study = _submit(studies, quick, rounds=1)
        waiting = _until(studies, study, lambda status: status.row.reason is not None)
        quick.wire.offline.clear()
        studies.wait(study)

        assert waiting.row.state is State.PENDING
        assert "0 of at least 3 hospitals take part; missing: hospital-1 (not connected)" in str(waiting.row.reason)
        assert studies.show(study).row.state is State.FINISHED


def test_studies_queue_at_hospitals_that_they_share(quick: Federation) -> None:
    """One trains there at a time, in the order of submission; the others show their place."""
    with coordinating(quick) as studies:
        first = _submit(studies, quick, study="first", rounds=8)
        _until(studies, first, lambda status: status.row.state is State.RUNNING)
        second = _submit(studies, quick, study="second", rounds=2)
        third = _submit(studies, quick, study="third", rounds=1)
        queued = _until(studies, third, lambda status: status.position == 2)
        assert queued.row.state is State.QUEUED
        assert studies.show(second).position == 1
        for study in (first, second, third):
            studies.wait(study)

        assert [status.row.state for status in studies.all()] == [State.FINISHED] * 3
        began = {name: _time_of_first_sum(studies, name) for name in (first, second, third)}
        assert began[first] < began[second] < began[third]
        assert _last_time(studies, first) < began[second]


def test_studies_of_other_hospitals_run_side_by_side(quick: Federation) -> None:
    """A study that names its hospitals leaves the others to somebody else; the third waits for one that it shares."""
    names = quick.names
    with coordinating(quick) as studies:
        first = _submit(studies, quick, study="first", rounds=40, hospitals=names[:3])
        second = _submit(studies, quick, study="second", rounds=40, hospitals=names[3:])
        third = _submit(studies, quick, study="third", rounds=1)
        _until(studies, second, lambda status: status.row.rounds_done >= 1)
        _until(studies, first, lambda status: status.row.rounds_done >= 1)
        assert {studies.show(study).row.state for study in (first, second)} == {State.RUNNING}
        assert studies.show(third).row.state in {State.PENDING, State.QUEUED}
        for study in (first, second):
            studies.stop(study)
        studies.wait(third)

        assert studies.show(third).row.state is State.FINISHED


def test_a_plan_for_a_stranger_is_refused(quick: Federation) -> None:
    """Before it is entered, with the name."""
    with coordinating(quick) as studies, pytest.raises(ConfigError, match="not on the roster: nowhere"):
        _submit(studies, quick, hospitals=[*quick.names, "nowhere"])


def _time_of_first_sum(studies: Studies, study: str) -> str:
    return str(next(event["time"] for event in studies.events(study)[0] if event["event"] == "sum"))


def _last_time(studies: Studies, study: str) -> str:
    return str([event["time"] for event in studies.events(study)[0] if event["event"] == "sum"][-1])


def test_a_hospital_that_keeps_failing_is_set_aside_and_invited_again(quick: Federation) -> None:
    """Enough others are there, so that rounds do not wait for it; the journal says why."""

    def lose(hospital: str, reply: Message) -> Message | None:
        share = reply.metadata.message_type == "query.share"
        return None if hospital == "hospital-2" and share else reply

    quick.wire.tamper = lose
    with coordinating(quick) as studies:
        study = _submit(studies, quick, rounds=5)
        studies.wait(study)

        (aside,) = [e for e in studies.events(study)[0] if e["event"] == "set-aside"]
        assert (aside["hospital"], aside["round"]) == ("hospital-2", 3)
        invited = [e["hospitals"] for e in studies.events(study)[0] if e["event"] == "sum"]
        assert invited == [6, 6, 6, 5, 5]


def test_a_full_disk_interrupts_a_study_and_its_last_checkpoint_stays_valid(
    quick: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again by itself; nothing is lost but the attempt whose result found no place."""
    from server import studies as module
    from tests.privacy.test_ledger_faults import mounted

    monkeypatch.setattr(module, "RETRY_EVERY_S", 0.5)
    tmpfs = mounted(tmp_path / "studies", "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    with tmpfs as disk, coordinating(quick) as studies:
        study = _submit(studies, quick)
        _until(studies, study, lambda status: status.row.rounds_done >= 1)
        ballast = disk / "ballast"
        _fill(ballast)
        paused = _until(studies, study, lambda status: status.row.state is State.PAUSED)
        done = paused.row.rounds_done
        assert (disk / study / "checkpoints" / f"round-{done:06d}.safetensors").exists()
        ballast.unlink()
        studies.wait(study)

        assert "No space left on device" in str(paused.row.reason)
        assert studies.show(study).row.state is State.FINISHED
        assert _rounds(studies, study) == [1, 2, 3, 4]


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_what_can_never_run_is_refused_before_it_is_entered(quick: Federation) -> None:
    """Every error of a plan at once; too few hospitals; an unknown study."""
    with coordinating(quick) as studies:
        fields = quick.plan.model_dump(mode="json", exclude_none=True)
        with pytest.raises(ConfigError, match=r"rounds: .*network") as caught:
            studies.submit(fields | {"rounds": 0, "network": {"name": "oracle"}}, by="ann")
        assert "docs/plan.md" in caught.value.hint
        with pytest.raises(ConfigError, match="task"):
            studies.submit(fields | {"task": "no-such-task"}, by="ann")
        with pytest.raises(ThresholdError):
            studies.submit(fields | {"minimum_hospitals": 7}, by="ann")
        assert studies.all() == []
        for order in (studies.show, studies.pause, studies.resume, studies.stop, studies.model, studies.events):
            with pytest.raises(UnknownStudyError):
                order("nobody")


def test_a_coordinator_that_ends_lets_the_round_at_hand_come_to_its_end(quick: Federation) -> None:
    """Hospitals have paid for it: it is not thrown away, and no spare charge is used. The study goes on later."""
    deliver, training = quick.wire.deliver, threading.Event()

    def deliver_slowly(name: str, message: Message) -> Message | None:
        if message.metadata.message_type == "train.round" and _rounds(studies, study) == [1]:
            training.set()
            time.sleep(0.1)
        return deliver(name, message)

    with coordinating(quick) as studies:
        quick.wire.deliver = deliver_slowly  # type: ignore[method-assign]
        study = _submit(studies, quick)
        assert training.wait(PATIENCE_S)

        studies.finish_rounds(patience_s=PATIENCE_S, hurry=threading.Event())

        assert _rounds(studies, study) == [1, 2]
    with coordinating(quick) as studies:
        status = _until(studies, study, lambda status: status.row.state.over)
        assert status.row.state is State.FINISHED
        assert _rounds(studies, study) == [1, 2, 3, 4]
        assert not [event for event in studies.events(study)[0] if event["event"] in {"aborted", "attempt-failed"}]


def test_a_coordinator_that_ends_waits_for_no_study_that_waits_itself(quick: Federation) -> None:
    """For hospitals or stewards, whose days are not its own; the study waits on when it is back."""
    quick.wire.offline |= set(quick.names)
    with coordinating(quick) as studies:
        study = _submit(studies, quick)
        _until(studies, study, lambda status: bool(status.row.reason))

        began = time.monotonic()
        studies.finish_rounds(patience_s=1000, hurry=threading.Event())

        assert time.monotonic() - began < 100
        assert studies.show(study).row.state is State.PENDING


def test_a_coordinator_that_is_told_to_hurry_does_not_wait(quick: Federation) -> None:
    """A second SIGTERM; or patience that has run out."""
    with coordinating(quick) as studies:
        study = _submit(studies, quick, minimum_hospitals=6)
        _until(studies, study, lambda status: status.row.state is State.RUNNING)
        hurry = threading.Event()
        hurry.set()

        began = time.monotonic()
        studies.finish_rounds(patience_s=1000, hurry=hurry)
        studies.finish_rounds(patience_s=0, hurry=threading.Event())

        assert time.monotonic() - began < 100
