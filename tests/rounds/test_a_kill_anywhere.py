"""SIGKILL at every write of the ledger and every stage of a round: what was spent is never forgotten, and all goes on.

The matrix is not a list of ours: a daemon that is left alone writes down every place that it passes
(``tests/kill.py``), and then a daemon dies at each of them.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from auditor.verify import verify_ledger
from client.books import LEDGER
from client.settings import read_settings
from server.demo import free_port, lay_out
from server.examples import write_example
from server.journal import read_events
from shared_models.config import read_toml
from shared_models.identity import read_public
from shared_models.messages import Refusal, Update
from shared_models.privacy.ledger import Entry, read_ledger
from shared_models.privacy.mechanisms import filter_epsilon, total_divergence
from tests.federation import changed, make_federation
from tests.kill import KILLED, Lives, points
from tests.rounds.test_a_server_that_lies import HOSPITAL, Coordinator

NAMES = ("hospital-1", "hospital-2", "hospital-3", "hospital-4")
VICTIM, *OTHERS = NAMES
ROUND = ("advertise", "share", "train", "evaluate", "agree", "unmask", "send-")
OPENING = ("before open/", "after open/", "after open")
ANYWHERE = "anywhere"
LOOK_EVERY_S = 0.01
PATIENCE_S = 60.0

# Every commit writes a page of entries and one of their index, each with a header. What it may write beside them
# depends on how full a page and the log are: such a place need not come again.
COMMIT_WRITES = tuple(f"before train/charge/COMMIT/write{number}" for number in ("", "#2", "#3", "#4"))

# Where the daemon dies in the short version, beside each step of the charge. The long one has every place.
BRIEF = (
    "before advertise/position/replace",
    "before share",
    "before train/select",
    "before train/noise#2",
    "before train/mask",
    "before train/round-done/COMMIT",
    "after train/sign",
    "before send-round/objects",
    "after send-round/objects",
    "before agree",
    "after unmask/transcript",
    "before evaluate/charge/pwrite",
    "before evaluate/parts",
    "after evaluate/sign",
)


@dataclass
class Watched:
    """One hospital, seen from outside: its ledger at every death, and all its lives.

    Attributes:
        plan: Places at which its lives are to end, the next one first.
        died: Places at which one ended, each with how many entries the ledger had then.
        life: The one that runs.
        entries: What its ledger held when it was looked at last.
    """

    folder: Path
    name: str
    lives: Lives
    plan: list[str] = field(default_factory=list)
    died: list[tuple[str, int]] = field(default_factory=list)
    life: ForkServerProcess | None = None
    entries: list[Entry] = field(default_factory=list)

    @property
    def settings(self) -> Path:
        """Its settings file."""
        return self.folder / "hospitals" / self.name / "hospital.toml"

    @property
    def ledger(self) -> Path:
        """Its ledger's file."""
        return read_settings(self.settings).state / LEDGER

    def run(self, *command: str, point: str | None = None) -> int | None:
        """Run a command of the hospital to its end, or to a point; how it ended."""
        life = self.lives.begin(self.name, "konsil-hospital", *command, point=point)
        life.join(PATIENCE_S)
        return life.exitcode

    def open(self, *, point: str | None = None) -> None:
        """Open the ledger for writing, or make it, and close it: nobody withdraws from a study that there is not."""
        code = self.run("withdraw", str(self.settings), "none", point=point)
        if point is not None:
            assert code == KILLED, point
            return
        said = self.lives.log(self.name).read_text("utf-8").splitlines()
        assert said[-2] == "error: study none was not approved here"
        assert code == 1

    def start(self) -> None:
        """Start the daemon, armed with the next place of the plan, if there is one."""
        point = self.plan[0] if self.plan and self.plan[0] != ANYWHERE else None
        self.life = self.lives.begin(self.name, "konsil-hospital", "start", str(self.settings), point=point)

    def tend(self) -> bool:
        """Where the daemon has died as planned, look at what it left and start it again; whether it had."""
        if self.life is None or self.life.exitcode is None:
            return False
        assert self.life.exitcode == KILLED, f"{self.name} ended with {self.life.exitcode}, see {self.folder}"
        point = self.plan.pop(0) if self.plan else ANYWHERE
        assert point in {ANYWHERE, self.lives.places(self.name)[-1]}
        self.look()
        self.died.append((point, len(self.entries)))
        self.start()
        return True

    def kill(self) -> None:
        """Kill the daemon wherever it happens to be."""
        assert self.life is not None
        assert self.life.pid is not None
        self.plan.insert(0, ANYWHERE)
        os.kill(self.life.pid, signal.SIGKILL)

    def look(self) -> None:
        """What was there is there, all of it holds, no less is spent, and whatever was computed was paid for."""
        before, self.entries = self.entries, read_ledger(self.ledger)
        assert self.entries[: len(before)] == before
        if self.entries:
            public = self.folder / "coordinator" / "hospitals" / f"{self.name}.identity.pub"
            assert verify_ledger(self.ledger, [read_public(public)]).head_was_checked
        assert self.spent(self.entries) >= self.spent(before)
        assert self.lives.computations(self.name) <= set(self.charged())

    def spent(self, entries: list[Entry]) -> float:
        """Epsilon that the entries have spent, by the filter."""
        terms = entries[0].budget if entries else None
        if terms is None:
            return 0.0
        mechanisms = [entry.mechanism for entry in entries if entry.kind == "charge" and entry.mechanism]
        return filter_epsilon(total_divergence(mechanisms, terms.order), order=terms.order, delta=terms.delta)

    def charged(self) -> dict[str, Entry]:
        """Each charge by what it paid for: purpose, round and attempt."""
        purposes = {"poisson-gaussian": "train", "gaussian-release": "evaluate"}
        found = [entry for entry in self.entries if entry.kind == "charge" and entry.mechanism]
        return {f"{purposes[e.mechanism.kind]} {e.round} {e.attempt}": e for e in found if e.mechanism}

    def check_the_end(self) -> None:
        """Every update that left was charged, and each death has cost one charge at most."""
        self.look()
        charges = [entry for entry in self.entries if entry.kind == "charge"]
        assert len(charges) == len(self.charged())
        uploads = _uploads(self.folder, self.name)
        assert len(set(uploads)) == len(uploads)
        assert set(uploads) <= {entry.hash for entry in charges}
        ends = [0, *(seq for _, seq in self.died)]
        for begin, end in pairwise(ends):
            assert len([e for e in charges if begin < e.seq <= end and e.hash not in uploads]) <= 1, (begin, end)
        assert [e for e in charges if e.seq > ends[-1] and e.hash not in uploads] == []


def _uploads(folder: Path, name: str) -> list[str]:
    """Hashes of the charges whose uploads the coordinator has received."""
    receipts = folder / "study" / "receipts.jsonl"
    kept = [json.loads(line) for line in receipts.read_text("utf-8").splitlines()] if receipts.exists() else []
    return [line["upload"]["receipt"]["entry_hash"] for line in kept if line["hospital"] == name]


def _federation(folder: Path, *, rounds: int) -> None:
    """Four hospitals, a third of whose patients are for validation, and a study of many short, noisy rounds."""
    example = write_example("breast-cancer", folder / "data", hospitals=len(NAMES), seed=0)
    changes: dict[str, Any] = {
        "training": {"steps": 2},
        "privacy": {"noise_multiplier": 300.0, "spare_charges": 3},
        "evaluation": {"every": 2, "clip": 1.0, "noise_multiplier": 300.0, "bins": 4},
    }
    lay_out(folder, example, changed(example.plan, rounds=rounds, deadline_s=60.0, **changes), free_port())
    for hospital in example.hospitals:
        manifest = hospital.folder / "manifest.toml"
        # Hospital-4 has ten patients of one class: one split in 35 puts none of them into the validation part.
        declared = {"validation_fraction": 0.3, "absent_classes": ["benign", "malignant"]}
        fields = read_toml(manifest, "manifest") | declared
        manifest.write_text(tomli_w.dumps(fields), encoding="utf-8")


@dataclass
class Play:
    """A study on the stage: a coordinator and four hospitals as processes, and who dies where."""

    folder: Path
    lives: Lives

    def __post_init__(self) -> None:
        self.hospitals = {name: Watched(self.folder, name, self.lives) for name in NAMES}
        self.victim = self.hospitals[VICTIM]

    def run(self, also: Callable[[], None]) -> None:
        """Start everybody, and start again who dies, until the study is over; ``also`` is done again and again."""
        settings = ("--settings", str(self.folder / "coordinator" / "coordinator.toml"))
        command = ("run", str(self.folder / "plan.toml"), *settings, "--folder", str(self.folder / "study"))
        coordinator = self.lives.begin("coordinator", "konsil-coordinator", *command)
        for hospital in self.hospitals.values():
            hospital.start()
        while coordinator.exitcode is None:
            for hospital in self.hospitals.values():
                hospital.tend()
            also()
            time.sleep(LOOK_EVERY_S)
        assert coordinator.exitcode == 0

    def check_the_end(self, *, rounds: int) -> None:
        """The study went on to its end, everybody died as planned, and nobody's ledger has lost anything."""
        events, _ = read_events(self.folder / "study" / "events.jsonl")
        assert events[-1]["event"] == "finished"
        assert sum(event["event"] == "round" for event in events) == rounds
        for hospital in self.hospitals.values():
            assert hospital.plan == [], f"{hospital.name} has not come there: plan more rounds"
            hospital.check_the_end()


def _has_released(places: list[str]) -> bool:
    """Whether a daemon has gone through a whole round and a whole release, so that its trace names every place."""
    return "after evaluate" in places and "after send-unmask" in places[places.index("after evaluate") :]


def _again(places: list[str]) -> list[str]:
    """What was passed after the first release: places that come again, where the first round also makes its files."""
    return places[places.index("after evaluate") + 1 :] if "after evaluate" in places else []


def _of_a_round(places: list[str], *, every: bool) -> list[str]:
    """Where to die in a round: each place once."""
    found = [place for place in points(places, every=True) if place.split(maxsplit=1)[1].startswith(ROUND)]
    found = [place for place in found if not _is_sqlites(place) or place in COMMIT_WRITES]
    if every:
        return found
    assert {*BRIEF, *COMMIT_WRITES} <= set(found), {*BRIEF, *COMMIT_WRITES} - set(found)
    of_the_charge = [place for place in points(places, every=False) if "train/charge" in place]
    return [place for place in found if place in BRIEF or place in of_the_charge]


def _is_sqlites(place: str) -> bool:
    """Whether it is a write within a statement: SQLite's, below Python."""
    return place.rpartition("/")[2].partition("#")[0] in {"write", "before write", "after write"}


def _steps(hospital: Watched) -> tuple[list[str], list[str]]:
    """What an append is made of: the places before its entry is in the ledger, and those from then on."""
    hospital.open()
    places = hospital.lives.places(hospital.name)
    places = [place for place in places if "budget-opened/" in place and not _is_sqlites(place)]
    found = [place.replace("budget-opened", "{}") for place in points(places, every=False)]
    durable = found.index("before {}/COMMIT") + 1
    return found[:durable], found[durable:]


def _die_everywhere(folder: Path, *, every: bool, rounds: int) -> list[str]:
    """One study in which hospital-1 dies at each place of a round, and all four where a study begins and ends.

    Before an approval, or the end of a study, is in the ledger, one hospital can die over and over; afterwards only
    once, and so there each hospital dies at another step.
    """
    _federation(folder, rounds=rounds)
    with Lives(folder / "lives") as lives:
        play = Play(folder, lives)
        victim, asked = play.victim, False
        before, since = _steps(victim)
        victim.plan = [place.format("enrol/plan-approved") for place in before]
        for name, place in zip(OTHERS, since, strict=True):
            play.hospitals[name].plan = [place.format("enrol/plan-approved")]
        for name, place in zip(OTHERS[:-1], since[:-1], strict=True):  # the last one lives to state what it cost
            play.hospitals[name].plan.append(place.format("finish/study-closed"))

        def arm() -> None:
            nonlocal asked
            places = lives.places(VICTIM)
            passed = _again(places) if every else places
            if not asked and _has_released(passed):
                asked = True
                opening = ["before open/pwrite"] * 2  # killed while it mends what the kill before has left, twice
                planned = _of_a_round(passed, every=every)
                after_entry = planned.index("before train/charge/pwrite") + 1
                victim.plan = [*planned[:after_entry], *opening, *planned[after_entry:]]
                victim.plan += [victim.plan[0], before[-1].format("finish/study-closed")]
                victim.kill()

        play.run(arm)
        play.check_the_end(rounds=rounds)
        _withdraw(victim, before, since)
        return [point for hospital in play.hospitals.values() for point, _ in hospital.died]


def _withdraw(victim: Watched, before: list[str], since: list[str]) -> None:
    """A study whose end was not written is ended by hand; killed meanwhile, by hand again. It ends once."""
    assert victim.life is not None
    victim.life.kill()
    victim.life.join()
    for step in (before[-1], since[0]):
        assert (
            victim.run("withdraw", str(victim.settings), "breast-cancer", point=step.format("study-closed")) == KILLED
        )
        victim.look()
    assert victim.run("withdraw", str(victim.settings), "breast-cancer") == 0
    victim.look()
    assert [entry.kind for entry in victim.entries].count("study-closed") == 1


@pytest.mark.timeout(900)
def test_a_study_survives_a_death_at_every_stage(tmp_path: Path) -> None:
    """One study, more than thirty deaths by SIGKILL: at every step of a charge, and in every stage of a round."""
    died = _die_everywhere(tmp_path, every=False, rounds=56)

    assert len(set(died)) >= 30


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_study_survives_a_death_at_every_place(tmp_path: Path) -> None:
    """The long version: before and after every call that the fault points know."""
    died = _die_everywhere(tmp_path, every=True, rounds=400)

    assert len(set(died)) >= 120


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_study_survives_deaths_at_random(tmp_path: Path) -> None:
    """By the clock, and so also inside of calls: in the middle of SQLite's commit, of a gradient, of a handshake."""
    rounds, rng = 400, random.Random(20261125)
    _federation(tmp_path, rounds=rounds)
    with Lives(tmp_path / "lives") as lives:
        play, next_death = Play(tmp_path, lives), time.monotonic() + 10

        def strike() -> None:
            nonlocal next_death
            if time.monotonic() > next_death and len(play.victim.died) < 200 and not play.victim.plan:
                next_death = time.monotonic() + rng.uniform(0.05, 3.0)
                play.victim.kill()

        play.run(strike)
        play.check_the_end(rounds=rounds)
        print(f"{len(play.victim.died)} deaths at random")  # noqa: T201 - shown by `make soak ARGS=-s`
        assert len(play.victim.died) >= 50


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_first_start_can_end_at_any_write(every: bool, tmp_path: Path) -> None:
    """Killed while it makes its ledger and opens its budget, a hospital makes and opens them the next time.

    The long version dies at SQLite's own writes too while there is no ledger yet; the short one, in the first commit.
    """
    _federation(tmp_path, rounds=3)
    with Lives(tmp_path / "lives") as lives:
        hospital = Watched(tmp_path, VICTIM, lives)
        state = hospital.ledger.parent
        hospital.open()
        found = points(lives.places(VICTIM), every=False)
        planned = [place for place in found if every or not _is_sqlites(place) or "budget-opened" in place]
        assert len(planned) >= 20
        assert any(map(_is_sqlites, planned))

        for point in planned:
            shutil.rmtree(state)
            hospital.entries = []
            hospital.open(point=point)
            if hospital.ledger.exists():
                hospital.look()
            hospital.open()
            hospital.look()
            assert [entry.kind for entry in hospital.entries] == ["budget-opened"]


def test_a_local_secret_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed while it makes the secret that keys its hashes, a hospital makes it the next time."""
    _federation(tmp_path, rounds=3)
    with Lives(tmp_path / "lives") as lives:
        hospital = Watched(tmp_path, VICTIM, lives)
        state, check = hospital.ledger.parent, ("check-data", str(hospital.settings))
        assert hospital.run(*check) == 0
        planned = points(lives.places(VICTIM), every=True)
        assert {"before urandom", "before fsync"} <= set(planned)

        for point in planned:
            shutil.rmtree(state)
            assert hospital.run(*check, point=point) == KILLED, point
            assert hospital.run(*check) == 0, point


def test_an_opening_can_end_at_any_write_and_again(tmp_path: Path) -> None:
    """A kill left the head file one entry behind; killed twice while that is mended, it is mended the third time."""
    _federation(tmp_path, rounds=3)
    with Lives(tmp_path / "lives") as lives:
        hospital = Watched(tmp_path, VICTIM, lives)
        state = hospital.ledger.parent
        hospital.open()
        hospital.open()
        planned = [place for place in points(lives.places(VICTIM), every=True) if place.startswith(OPENING)]
        planned = [place for place in planned if not _is_sqlites(place)]  # after a kill there are others
        assert len(planned) >= 10

        for point in planned:
            shutil.rmtree(state)
            hospital.entries = []
            for died in ("before budget-opened/pwrite", point, point):
                hospital.open(point=died)
                hospital.look()
            hospital.open()
            hospital.look()
            assert [entry.kind for entry in hospital.entries] == ["budget-opened"]


def test_a_round_that_killed_the_hospital_is_not_computed_again(tmp_path: Path) -> None:
    """The coordinator asks again for what was charged when the process died: refused, unpaid; the next attempt pays."""
    federation = make_federation(tmp_path, rounds=3)
    with Lives(tmp_path / "lives") as lives:
        life = lives.begin("all", "one-round", str(tmp_path), point="after train/charge")
        life.join(PATIENCE_S)
        assert life.exitcode == KILLED
    assert federation.charges(HOSPITAL) == [(1, 1)]
    coordinator = Coordinator(federation)
    for name in federation.names:
        coordinator.propose(name)

    again, next_attempt = coordinator.train(), coordinator.train(attempt=2)

    assert isinstance(again, Refusal)
    assert again.code == "stale-attempt"
    assert isinstance(next_attempt, Update)
    assert federation.charges(HOSPITAL) == [(1, 1), (1, 2)]
