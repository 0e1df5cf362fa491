"""SIGKILL, for real: a hospital's daemon dies in the middle of a study and comes back."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.demo import free_port, lay_out, start_coordinator, start_hospital
from server.examples import write_example
from server.journal import read_events
from server.processes import Children
from shared_models.identity import read_public
from shared_models.privacy.ledger import read_ledger, verify_entries
from tests.federation import changed


def test_a_killed_hospital_rejoins_and_its_ledger_holds(tmp_path: Path) -> None:
    """Killed with SIGKILL and started again, it takes part again; every update that left was charged, once."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=5, seed=0)
    plan = changed(example.plan, rounds=40, privacy={"noise_multiplier": 40.0}, deadline_s=30.0)
    lay_out(tmp_path, example, plan, free_port())
    names = [hospital.name for hospital in example.hospitals]
    victim, journal = names[0], tmp_path / "study" / "events.jsonl"

    with Children(tmp_path / "logs") as children:
        coordinator = start_coordinator(children, tmp_path)
        hospitals = {name: start_hospital(children, tmp_path, name) for name in names}
        _wait_for(lambda: _rounds(journal) >= 2)
        os.kill(hospitals[victim].pid, signal.SIGKILL)
        hospitals[victim].wait()
        again = start_hospital(children, tmp_path, victim, log=f"{victim}-again")
        _wait_for(lambda: coordinator.poll() is not None or _answers(journal, victim) > _killed_at(journal, victim) + 2)
        assert again.poll() is None
        coordinator.wait(timeout=200)

    events, _ = read_events(journal)
    assert events[-1]["event"] == "finished"
    rounds = [event for event in events if event["event"] == "round"]
    assert len(rounds) == plan.rounds
    assert any(victim in event["missing"] for event in rounds)
    assert victim in rounds[-1]["answered"]
    for name in names:
        entries = read_ledger(tmp_path / "hospitals" / name / "state" / "ledger.sqlite")
        verify_entries(entries, read_public(tmp_path / "coordinator" / "hospitals" / f"{name}.identity.pub"))
        charged = [(entry.round, entry.attempt) for entry in entries if entry.kind == "charge"]
        answered = [(event["round"], 1) for event in rounds if name in event["answered"]]
        assert len(set(charged)) == len(charged)
        assert set(answered) <= set(charged)
        assert len(charged) <= len(answered) + 1


def test_a_hospital_killed_between_upload_and_unmasking_is_still_in_the_sum(tmp_path: Path) -> None:
    """Seven hospitals; the first that has uploaded in some round is killed while the others train, and comes back."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=7, seed=0)
    changes: dict[str, Any] = {
        "training": {"steps": 1000, "learning_rate": 0.01},
        "privacy": {"noise_multiplier": 300.0},
    }
    plan = changed(example.plan, rounds=5, deadline_s=30.0, **changes)
    lay_out(tmp_path, example, plan, free_port())
    names = [hospital.name for hospital in example.hospitals]
    journal = tmp_path / "study" / "events.jsonl"
    logs = {name: tmp_path / "hospitals" / name / "state" / "hospital.log" for name in names}

    with Children(tmp_path / "logs") as children:
        coordinator = start_coordinator(children, tmp_path)
        hospitals = {name: start_hospital(children, tmp_path, name) for name in names}
        _wait_for(lambda: any(_has_trained(log, 2) for log in logs.values()))
        victim = next(name for name, log in logs.items() if _has_trained(log, 2))
        late = next(name for name, log in reversed(logs.items()) if not _has_trained(log, 2))
        os.kill(hospitals[late].pid, signal.SIGSTOP)  # the stage stays open until it goes on
        time.sleep(2)  # the victim's upload arrives
        os.kill(hospitals[victim].pid, signal.SIGKILL)
        hospitals[victim].wait()
        os.kill(hospitals[late].pid, signal.SIGCONT)
        start_hospital(children, tmp_path, victim, log=f"{victim}-again")
        coordinator.wait(timeout=200)

    events, _ = read_events(journal)
    assert events[-1]["event"] == "finished"
    sums = [event for event in events if event["event"] == "sum"]
    assert sums[1]["opened"]
    assert sums[1]["dropped"] == {victim: 4}
    rounds = [event for event in events if event["event"] == "round"]
    assert len(rounds) == plan.rounds
    assert victim in rounds[1]["answered"]
    assert victim in rounds[-1]["answered"]


def _has_trained(log: Path, number: int) -> bool:
    return log.exists() and f"round {number}, attempt 1: trained" in log.read_text(encoding="utf-8")


def _rounds(journal: Path) -> int:
    return sum(event["event"] == "round" for event in read_events(journal)[0])


def _answers(journal: Path, name: str) -> int:
    return sum(event["event"] == "round" and name in event["answered"] for event in read_events(journal)[0])


def _killed_at(journal: Path, name: str) -> int:
    """How often it had answered when it was first missing; beyond any count until then."""
    count = 0
    for event in read_events(journal)[0]:
        if event["event"] == "round" and name in event["missing"]:
            return count
        count += event["event"] == "round"
    return sys.maxsize - 2


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
