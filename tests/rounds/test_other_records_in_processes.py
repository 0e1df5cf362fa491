"""Studies on notes and pictures between real processes over TLS: a daemon for each hospital, and a coordinator."""

from pathlib import Path

import numpy as np
import pytest
import tomli_w

from client.alone import evaluate_folder
from server.demo import free_port, lay_out, start_coordinator, start_hospital
from server.examples import PLANS, Example, ExampleHospital
from server.journal import read_events
from server.processes import Children
from shared_models.config import read_toml
from shared_models.plan import read_plan
from shared_models.pretrained import offer_bases
from shared_models.privacy.ledger import read_ledger
from tests.federation import changed
from tests.rounds.test_other_records import write_manifest, write_notes, write_pictures
from tests.tiny_bases import write_encoder

PATIENTS, ROUNDS = 40, 3
HOSPITALS = ("hospital-1", "hospital-2", "hospital-3")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["note-specialty", "pneumonia"])
def test_hospitals_train_on_their_own_formats_in_processes_of_their_own(tmp_path: Path, task: str) -> None:
    """Notes on a pretrained encoder of which everybody has a copy; pictures in PNG, DICOM and NIfTI on a small CNN.

    The study ends, every hospital has paid for each round once, and the model tells the classes of a fourth folder.
    """
    writer = write_notes if task == "note-specialty" else write_pictures
    folders = {name: tmp_path / "data" / name for name in (*HOSPITALS, "test")}
    for seed, (name, folder) in enumerate(folders.items()):
        folder.mkdir(parents=True)
        write_manifest(folder, **writer(folder, name, np.arange(PATIENTS) // 2 % 2, np.random.default_rng(seed)))
    digest = write_encoder(tmp_path / "base")
    encoder = {"name": "pretrained-encoder", "base": digest, "length": 12, "rank": 2}
    plan = changed(
        read_plan(PLANS / "breast-cancer.toml"), task=task, study=task, rounds=ROUNDS, minimum_hospitals=3,
        network=encoder if task == "note-specialty" else {"name": "cnn", "channels": [4, 8]},
        training={"learning_rate": 0.2 if task == "note-specialty" else 1.0, "steps": 8},
        privacy={"clip": 2.0, "noise_multiplier": 0.2, "sample_rate": 0.5, "epsilon": 10_000.0, "delta": 1e-3},
    )  # fmt: skip
    hospitals = tuple(ExampleHospital(name=name, folder=folders[name], public_size=PATIENTS) for name in HOSPITALS)
    example = Example(plan=plan, hospitals=hospitals, pooled=tmp_path, test=folders["test"], split="made up")
    lay_out(tmp_path, example, plan, free_port())
    places = [tmp_path / "coordinator" / "coordinator.toml"]
    places += [tmp_path / "hospitals" / name / "hospital.toml" for name in HOSPITALS]
    for place in places:
        fields = read_toml(place, "settings") | {"pretrained": {digest: str(tmp_path / "base")}}
        place.write_text(tomli_w.dumps(fields), encoding="utf-8")

    with Children(tmp_path / "logs") as children:
        coordinator = start_coordinator(children, tmp_path)
        for name in HOSPITALS:
            start_hospital(children, tmp_path, name)
        coordinator.wait(timeout=600)

    events, _ = read_events(tmp_path / "study" / "events.jsonl")
    assert events[-1]["event"] == "finished"
    for name in HOSPITALS:
        entries = read_ledger(tmp_path / "hospitals" / name / "state" / "ledger.sqlite")
        charged = [(entry.round, entry.attempt) for entry in entries if entry.kind == "charge"]
        assert charged == [(number, 1) for number in range(1, ROUNDS + 1)]
    offer_bases({digest: tmp_path / "base"})
    assert evaluate_folder(tmp_path / "study" / "model.safetensors", folders["test"])["auroc"] > 0.8
