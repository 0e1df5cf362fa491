"""SIGKILL of the coordinator, wherever it passes: the study finishes, exactly once, and nothing is charged in secret.

As with hospitals, the matrix is not a list of ours: a coordinator that is left alone writes down every place that its
study passes (``tests/kill.py``), and then a coordinator dies at each of them. Hospitals are real daemons that live on.
"""

import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from sqlalchemy import create_engine, text

from auditor.audit import audit
from client.books import LEDGER
from client.bundle import export
from client.keys import split_key
from client.settings import read_settings
from server.demo import free_port, lay_out
from server.examples import write_example
from server.journal import read_events
from shared_models.config import read_toml
from shared_models.identity import read_public
from shared_models.privacy.ledger import Entry, read_ledger
from tests.federation import changed
from tests.kill import KILLED, Lives, points

NAMES = ("hospital-1", "hospital-2", "hospital-3")
LOOK_EVERY_S = 0.02

# Where it dies in the short version; the long one has every place.
BRIEF = (
    "before enrol_enough/enrolled",
    "after enrol_enough",
    "before train_round/begin_attempt",
    "before train_round/share",
    "after train_round/train/charged",
    "before train_round/agree/hold/fsync",
    "before train_round/agree/hold/replace",
    "after train_round/agree",
    "before train_round/hold/replace",
    "before train_round/close/fsync#2",
    "before train_round/close/unlink",
    "before train_round/receipts/replace",
    "after train_round/end_attempt",
    "before train_round/vector_to_parameters",
    "before save_checkpoint/replace",
    "after save_checkpoint",
    "after evaluate_round/train/charged",
    "before round/fsync",
    "before finish_round",
)
AT_THE_END = (
    "after write_model",
    "before close_study",
    "before card/replace",
    "before enter-finished",
)


@dataclass
class Stage:
    """A coordinator that dies again and again, and hospitals that live on.

    Attributes:
        died: Places at which a coordinator's life has ended.
        looked: What each hospital's ledger held when it was looked at last.
    """

    folder: Path
    lives: Lives
    hospitals: str = "konsil-hospital"
    died: list[str] = field(default_factory=list)
    looked: dict[str, list[Entry]] = field(default_factory=dict)

    def start_hospitals(self) -> None:
        """Start every hospital's daemon."""
        for name in NAMES:
            self.lives.begin(name, self.hospitals, "start", str(self.settings(name)))

    def coordinate(self, point: str | None = None) -> ForkServerProcess:
        """Start a coordinator that dies at a place, or does not."""
        settings = ("--settings", str(self.folder / "coordinator" / "coordinator.toml"))
        command = ("run", str(self.folder / "plan.toml"), *settings, "--folder", str(self.folder / "study"))
        return self.lives.begin("coordinator", "konsil-coordinator", *command, point=point)

    def die_at(self, place: str) -> None:
        """One life of a coordinator that ends at a place; then look at what it left."""
        life = self.coordinate(place)
        life.join(120)
        self.lives.ask_where(life)
        assert life.exitcode == KILLED, f"{place}: ended with {life.exitcode}; see {self.lives.log('coordinator')}"
        assert self.lives.places("coordinator")[-1] == place
        self.died.append(place)
        self.look()

    def look(self) -> None:
        """No hospital's ledger has lost anything."""
        for name in NAMES:
            before, self.looked[name] = self.looked.get(name, []), read_ledger(self.ledger(name))
            assert self.looked[name][: len(before)] == before

    def finish(self) -> None:
        """A coordinator that lives to the end."""
        life = self.coordinate()
        life.join(240)
        assert life.exitcode == 0, self.lives.log("coordinator")
        self.look()

    def settings(self, name: str) -> Path:
        """A hospital's settings file."""
        return self.folder / "hospitals" / name / "hospital.toml"

    def ledger(self, name: str) -> Path:
        """A hospital's ledger."""
        return read_settings(self.settings(name)).state / LEDGER

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The journal's events of some kinds."""
        return [e for e in read_events(self.folder / "study" / "events.jsonl")[0] if e["event"] in kinds]

    def charges(self, name: str) -> list[tuple[int | None, int | None]]:
        """What a hospital has paid for training: (round, attempt)."""
        found = [e for e in self.looked[name] if e.kind == "charge" and e.mechanism]
        return [(e.round, e.attempt) for e in found if e.mechanism and e.mechanism.kind == "poisson-gaussian"]

    def check_evidence(self) -> None:
        """Every hospital's bundle and the coordinator's evidence agree, as an auditor sees it."""
        for life in self.lives.begun:
            life.kill()
            life.join()
        bundles = [self.folder / f"{name}.bundle" for name in NAMES]
        for name, bundle in zip(NAMES, bundles, strict=True):
            export(read_settings(self.settings(name)), bundle)
        found = audit([*bundles, self.folder / "study"], root=read_public(self.folder / "coordinator" / "root.pub"))
        assert [finding for finding in found.findings if finding.severity != "note"] == []


def _lay_out(folder: Path, *, rounds: int, evaluate: bool, **changes: Any) -> None:
    """Three hospitals and a study of short, noisy rounds."""
    example = write_example("breast-cancer", folder / "data", hospitals=len(NAMES), seed=0)
    fields: dict[str, Any] = {
        "training": {"steps": 2},
        "privacy": {"noise_multiplier": 300.0, "spare_charges": 60},
        "deadline_s": 30.0,
        **changes,
    }
    if evaluate:
        fields["evaluation"] = {"every": 1, "clip": 1.0, "noise_multiplier": 300.0, "bins": 4}
    lay_out(folder, example, changed(example.plan, rounds=rounds, **fields), free_port())
    for hospital in example.hospitals:
        settings = folder / "hospitals" / hospital.name / "hospital.toml"
        fields = read_toml(settings, "settings")
        fields["policy"]["maximum_attempts"] = 100  # each death in a round is one
        settings.write_text(tomli_w.dumps(fields), encoding="utf-8")
        manifest = hospital.folder / "manifest.toml"
        declared = {"validation_fraction": 0.3, "absent_classes": ["benign", "malignant"]}
        manifest.write_text(tomli_w.dumps(read_toml(manifest, "manifest") | declared), encoding="utf-8")


def _learn_places(stage: Stage) -> list[str]:
    """Let a coordinator alone for three rounds, then kill it from outside: every place that a study passes."""
    life = stage.coordinate()
    deadline = time.monotonic() + 120
    while len(stage.events("round")) < 3:
        assert time.monotonic() < deadline, "no rounds came"
        time.sleep(LOOK_EVERY_S)
    assert life.pid is not None
    os.kill(life.pid, signal.SIGKILL)
    life.join()
    return points(stage.lives.places("coordinator"), every=True)


def _die_everywhere(folder: Path, *, every: bool, rounds: int) -> Stage:
    """One study in which the coordinator dies at every place of a round, and then wherever the study ends."""
    _lay_out(folder, rounds=rounds, evaluate=True)
    with Lives(folder / "lives") as lives:
        stage = Stage(folder, lives)
        stage.start_hospitals()
        found = _learn_places(stage)
        assert set(BRIEF) <= set(found), set(BRIEF) - set(found)
        again = [place for place in found if "/started" not in place]  # a study is started once
        for place in again if every else BRIEF:
            stage.die_at(place)
        life = stage.coordinate()  # the last rounds, until the study is about to end
        deadline = time.monotonic() + 600
        while len(stage.events("round")) < rounds - 1:
            assert time.monotonic() < deadline, "no rounds came"
            time.sleep(LOOK_EVERY_S)
        life.kill()
        life.join()
        for place in AT_THE_END:
            stage.die_at(place)
        life = stage.coordinate()
        life.join(60)
        _check_the_end(stage, rounds)
        stage.check_evidence()
    return stage


def _check_the_end(stage: Stage, rounds: int) -> None:
    """Every round once, every update that came was paid for, and every failed attempt is in the ledgers too."""
    assert [event["round"] for event in stage.events("round")] == list(range(1, rounds + 1))
    stage.look()
    paid_in_vain = {(e["round"], e["attempt"]) for e in stage.events("aborted") if e["purpose"] == "train"}
    opened = {(e["round"], e["attempt"]) for e in stage.events("sum") if e["purpose"] == "train" and e["opened"]}
    for name in NAMES:
        charged = stage.charges(name)
        assert len(set(charged)) == len(charged)
        assert set(charged) <= paid_in_vain | opened
        extra = len(charged) - rounds
        assert 0 <= extra <= len(stage.died)
    database = create_engine(f"sqlite:///{stage.folder / 'coordinator' / 'state' / 'coordinator.sqlite'}")
    with database.connect() as connection:
        assert connection.execute(text("select state from studies")).scalars().all() == ["finished"]
    database.dispose()


@pytest.mark.timeout(600)
def test_a_study_survives_its_coordinators_deaths(tmp_path: Path) -> None:
    """More than twenty deaths in one study; the last life finds it finished, and every party's evidence agrees."""
    stage = _die_everywhere(tmp_path, every=False, rounds=16)

    assert len(set(stage.died)) >= 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_study_survives_its_coordinators_deaths_at_every_place(tmp_path: Path) -> None:
    """The long version: before and after every call that the fault points know."""
    stage = _die_everywhere(tmp_path, every=True, rounds=150)

    assert len(set(stage.died)) >= 100


@pytest.mark.timeout(600)
def test_a_coordinator_killed_between_rounds_gives_the_same_bits(tmp_path: Path) -> None:
    """With noise that is known, a study with three deaths ends in the parameters of one that nobody disturbed."""
    _lay_out(tmp_path / "alone", rounds=6, evaluate=False)
    for name in NAMES:
        split_key(tmp_path / "alone" / "hospitals" / name / "state")
    shutil.copytree(tmp_path / "alone", tmp_path / "killed")  # the same hospitals, with the same keys and patients
    deaths = ("after finish_round", "before round/fsync", "after save_checkpoint")
    models = []
    for folder, places in ((tmp_path / "alone", ()), (tmp_path / "killed", deaths)):
        with Lives(folder / "lives") as lives:
            stage = Stage(folder, lives, hospitals="konsil-hospital-with-known-noise")
            stage.start_hospitals()
            for place in places:
                stage.die_at(place)
            stage.finish()
            models.append((folder / "study" / "model.safetensors").read_bytes())
            assert stage.charges("hospital-1") == [(number, 1) for number in range(1, 7)]

    assert models[0] == models[1]
