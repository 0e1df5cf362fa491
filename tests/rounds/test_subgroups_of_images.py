"""A study of pictures that tells for whom the model is good: by sex and age band, which no network sees."""

import json
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from client.books import Books
from client.disclosure import disclose, in_words
from client.round import Hospital
from server.examples import PLANS, Example, ExampleHospital
from server.released import read_released
from server.report import write_report
from shared_models.errors import RecordsError
from shared_models.messages import Proposal
from shared_models.plan import read_plan
from shared_models.privacy.mechanisms import study_mechanisms
from shared_models.subgroups import release_noise, split
from shared_models.tasks import task_of
from tests.federation import Federation, changed, make_federation

PATIENTS = 120
ROUNDS = 4
SUBGROUPS = [
    {"column": "sex", "categories": ["F", "M"]},
    {"column": "age", "low": 0, "high": 18, "unit": "year", "edges": [5]},
]
EVALUATION = {"every": ROUNDS, "clip": 1.0, "noise_multiplier": 0.3, "bins": 4, "subgroups": SUBGROUPS}


def write(folder: Path, rng: np.random.Generator) -> None:
    """Pneumonia is a bright spot, but in boys it cannot be seen; hospital-3 does not record the age."""
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
        network={"name": "cnn", "channels": [4, 8]}, training={"learning_rate": 2.0, "steps": 16}, weight_cap=PATIENTS,
        privacy={"clip": 1.0, "noise_multiplier": 0.3, "sample_rate": 0.5, "epsilon": 1e5, "delta": 5e-4},
        evaluation=EVALUATION,
    )  # fmt: skip


def test_a_study_of_pictures_shows_for_whom_the_model_is_good(tmp_path: Path) -> None:
    """At the price of a release without groups; the report and its picture have a row for every group."""
    federation = lay_out(tmp_path)
    assert study_mechanisms(federation.plan, PATIENTS) == study_mechanisms(
        changed(federation.plan, evaluation={**EVALUATION, "subgroups": []}), PATIENTS
    )

    folder = federation.run()

    (kept,) = read_released(folder)
    task, evaluation = task_of(federation.plan), federation.plan.evaluation
    assert evaluation is not None
    counts = {group: table.sum() for group, table in split(task, evaluation, kept.statistics).items()}
    six_deviations = 6 * release_noise(evaluation, 3) * np.sqrt(2 * evaluation.bins)
    whole = counts["", "everybody"]
    assert abs(whole - 1.5 * PATIENTS) < 30 + six_deviations
    assert abs(counts["sex", "F"] + counts["sex", "M"] - 2 / 3 * whole) < 30 + 3 * six_deviations  # a third is unknown
    assert abs(counts["age", "below 5 year"] + counts["age", "from 5 year"] - 2 / 3 * whole) < 30 + 3 * six_deviations
    written = write_report(folder)
    found = {
        (group["column"], group["group"]): group["classes"]["pneumonia"]["auroc"]
        for group in json.loads((written.parent / "report.json").read_text())["groups"]
    }
    assert found["sex", "F"]["low"] > 0.8
    assert found["sex", "M"]["low"] < 0.6
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
