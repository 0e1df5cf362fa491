"""A study of pictures that tells for whom the model is good: by sex and age band, which no network sees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from client.books import Books
from client.disclosure import disclose, in_words
from client.evaluate import counted_once, scores_of
from client.records.population import Source
from client.round import Hospital
from server.examples import PLANS, Example, ExampleHospital
from server.released import read_released
from server.report import write_report
from shared_models.errors import RecordsError
from shared_models.messages import Proposal
from shared_models.model_file import read_model
from shared_models.plan import read_plan
from shared_models.privacy.mechanisms import study_mechanisms
from shared_models.subgroups import release_noise, split
from shared_models.tasks import task_of
from tests.federation import Federation, changed, make_federation

PATIENTS = 120
ROUNDS = 2
SUBGROUPS = [
    {"column": "sex", "categories": ["F", "M"]},
    {"column": "age", "low": 0, "high": 18, "unit": "year", "edges": [5]},
]
EVALUATION = {"every": ROUNDS, "clip": 1.0, "noise_multiplier": 0.3, "bins": 4, "subgroups": SUBGROUPS}


def write(folder: Path, rng: np.random.Generator) -> None:
    """Pneumonia is a bright spot, but in boys it cannot be seen; a third have no sex, hospital-3 records no age."""
    folder.mkdir(parents=True)
    labels, sex = np.arange(PATIENTS) % 2, np.array(["w", "m", ""])[np.arange(PATIENTS) // 2 % 3]
    pixels = rng.integers(0, 60, (PATIENTS, 28, 28))
    pixels[:, 8:20, 8:20] += 180 * (labels * (sex != "m"))[:, None, None]
    np.savez(
        folder / "pictures.npz",
        images=pixels.astype(np.uint8),
        patient=np.array([f"{folder.name}-{number}" for number in range(PATIENTS)]),
        finding=np.array(["normal", "pneumonia"])[labels],
        gender=sex,
        years=rng.integers(1, 18, PATIENTS).astype(np.float64),
    )
    manifest = {
        "task": "pneumonia", "file": "pictures.npz", "label": "finding", "patient": "patient",
        "validation_fraction": 0.5, "categories": {"sex": {"w": "F", "m": "M"}},
        "groups": {"sex": "gender", "age": "" if folder.name == "hospital-3" else "years"},
    }  # fmt: skip
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")


def lay_out(folder: Path) -> Federation:
    """Three hospitals and a plan with little noise: the data is nobody's."""
    names = ("hospital-1", "hospital-2", "hospital-3")
    for seed, name in enumerate(names):
        write(folder / "data" / name, np.random.default_rng(seed))
    hospitals = tuple(ExampleHospital(name=name, folder=folder / "data" / name, public_size=PATIENTS) for name in names)
    plan = read_plan(PLANS / "breast-cancer.toml")
    example = Example(plan=plan, hospitals=hospitals, pooled=folder, test=folder / "data" / names[0], split="made up")
    return make_federation(
        folder, example=example, task="pneumonia", study="pneumonia", rounds=ROUNDS,
        network={"name": "cnn", "channels": [4, 8]}, training={"learning_rate": 2.0, "steps": 4}, weight_cap=PATIENTS,
        privacy={"clip": 1.0, "noise_multiplier": 0.3, "sample_rate": 0.5, "epsilon": 1e5, "delta": 5e-4},
        evaluation=EVALUATION,
    )  # fmt: skip


def test_a_study_of_pictures_shows_for_whom_the_model_is_good(tmp_path: Path) -> None:
    """At the price of a release without groups: each group's counts are its patients', up to the noise."""
    federation = lay_out(tmp_path)
    assert study_mechanisms(federation.plan, PATIENTS) == study_mechanisms(
        changed(federation.plan, evaluation={**EVALUATION, "subgroups": []}), PATIENTS
    )

    folder = federation.run()

    (kept,) = read_released(folder)
    task, evaluation = task_of(federation.plan), federation.plan.evaluation
    assert evaluation is not None
    released, exact = split(task, evaluation, kept.statistics), dict[tuple[str, str], np.ndarray[Any, Any]]()
    model = read_model(folder / "model.safetensors")[1]
    for name in federation.names:
        records = Source(task).current(federation.settings(name)).validation
        found = scores_of(model, records, task)
        sex, age = records.groups.T
        groups = {
            ("", "everybody"): np.ones(len(sex), dtype=bool),
            ("sex", "F"): sex == 0,
            ("sex", "M"): sex == 1,
            ("age", "below 5 year"): age < 5,
            ("age", "from 5 year"): age >= 5,
        }
        for group, those in groups.items():
            counts = counted_once(found, records, task, bins=evaluation.bins, rows=np.flatnonzero(those))
            exact[group] = exact.get(group, 0) + counts
    assert exact["sex", "F"].sum() + exact["sex", "M"].sum() < exact["", "everybody"].sum()  # some are in neither
    for group, counts in exact.items():
        np.testing.assert_allclose(released[group], counts, atol=6 * release_noise(evaluation, 3))
    written = write_report(folder)
    told = json.loads((written.parent / "report.json").read_text())["groups"]
    assert [(group["column"] or "", group["group"]) for group in told] == list(exact)
    assert all(group["classes"]["pneumonia"]["auroc"]["low"] < 1 for group in told)
    for name in ("sex: F", "sex: M", "age: below 5 year", "age: from 5 year"):
        assert f'<th scope="row">{name}</th>' in written.read_text()
    assert (written.parent / "groups.svg").exists()


def test_a_steward_sees_which_columns_tell_patients_apart(tmp_path: Path) -> None:
    """Before deciding: the plan's names with the file's, and that groups are released."""
    federation = lay_out(tmp_path)
    settings = federation.settings("hospital-1")
    books = Books.open(settings)

    shown = dict(in_words(disclose(settings, federation.plan, books.budget)))
    books.close()

    assert "sex (in the file: gender), age (in the file: years)" in shown["columns"]
    assert "of each group by sex, age" in " ".join(shown.values())


def test_a_hospital_that_says_nothing_of_a_group_is_not_asked_for_it_silently(tmp_path: Path) -> None:
    """It refuses the plan with what to write; nothing is charged."""
    federation = lay_out(tmp_path)
    manifest = tmp_path / "data" / "hospital-1" / "manifest.toml"
    manifest.write_text(manifest.read_text().replace('age = "years"', ""), encoding="utf-8")
    hospital = Hospital.open(federation.settings_file("hospital-1"))

    with pytest.raises(RecordsError, match="tells patients apart by age") as caught:
        hospital.enrol(Proposal(plan=federation.plan.model_dump(mode="json")))
    hospital.close()

    assert 'age = ""' in caught.value.hint
    assert [entry.kind for entry in federation.ledger("hospital-1")] == ["budget-opened"]
