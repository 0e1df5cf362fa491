"""Columns beside the inputs: what hospitals record of their groups, read and checked, and seen by no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from client.evaluate import released_statistics
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.report import ColumnSummary, summarise
from client.records.tabular import read_table
from server.examples import example_plan
from shared_models.errors import RecordsError
from shared_models.nets.build import build_network
from shared_models.outcomes import row_norm
from shared_models.plan import EvaluationPlan, LogisticRegression, Subgroups, parse_plan
from shared_models.tasks import HEART_DISEASE, NOTE_SPECIALTY, TRIAL_IMAGES, Task, with_groups
from tests.client.made_up import repeatable, table, table_records, task_of

SEX = Subgroups(column="sex", categories=("F", "M"))
AGE = Subgroups(column="age", low=0, high=120, unit="year", edges=(40.0, 65.0))
NOTES = with_groups(NOTE_SPECIALTY, (SEX, AGE))
ROWS = [
    "patient,text,specialty,gender,years",
    "p1,an eye,ophthalmology,w,40",
    "p2,a kidney,urology,m,",
    "p3,a lens,ophthalmology,,64.5",
    "p4,a bladder,urology,n/a,120",
]
MANIFEST: dict[str, Any] = {
    "task": "note-specialty",
    "file": "notes.csv",
    "label": "specialty",
    "patient": "patient",
    "validation_fraction": 0.0,
    "absent_classes": [name for name in NOTE_SPECIALTY.classes if name not in {"urology", "ophthalmology"}],
    "missing_values": ["n/a"],
    "groups": {"sex": "gender", "age": "years"},
    "categories": {"sex": {"w": "F", "m": "M"}},
}


def write(folder: Path, rows: list[str] | None = None, **changes: Any) -> Path:
    """A folder of notes."""
    (folder / "manifest.toml").write_text(tomli_w.dumps(MANIFEST | changes), encoding="utf-8")
    (folder / "notes.csv").write_text("\n".join(ROWS if rows is None else rows) + "\n", encoding="utf-8")
    return folder


def read(folder: Path, task: Task = NOTES) -> Records:
    """Its training part."""
    return read_table(read_manifest(folder), task, split_key=b"a key")[0]


def refusal(folder: Path, task: Task = NOTES) -> RecordsError:
    """Why it is refused."""
    with pytest.raises(RecordsError) as caught:
        read(folder, task)
    return caught.value


def test_groups_are_read_beside_texts_and_what_is_missing_is_not_known(tmp_path: Path) -> None:
    """A row without a group stays a row: nobody is left out of training for how a study is evaluated."""
    records = read(write(tmp_path))

    np.testing.assert_array_equal(records.groups, [[0, 40], [1, np.nan], [np.nan, 64.5], [np.nan, 120]])


def test_a_plan_without_subgroups_reads_the_same_records(tmp_path: Path) -> None:
    """Inputs, labels and patients do not depend on the groups; a manifest may name more groups than a plan has."""
    grouped, plain = read(write(tmp_path)), read(tmp_path, NOTE_SPECIALTY)

    assert plain.beside is None
    assert plain.groups.shape == (4, 0)
    np.testing.assert_array_equal(grouped.inputs[:], plain.inputs[:])
    np.testing.assert_array_equal(grouped.targets, plain.targets)
    np.testing.assert_array_equal(grouped.patients, plain.patients)


def test_check_data_shows_the_groups_of_a_plan(tmp_path: Path) -> None:
    """How many fall in each, and of how many nothing is known: counts for the hospital's own eyes."""
    fields = example_plan("breast-cancer", 4).model_dump(mode="json")
    evaluation = {"every": 1, "clip": 1.0, "noise_multiplier": 9.0, "subgroups": [
        {"column": "sex", "categories": ["F", "M"]},
        {"column": "age", "low": 0, "high": 120, "unit": "year", "edges": [65]},
    ]}  # fmt: skip
    network = {"name": "transformer", "width": 8, "heads": 2, "layers": 1}
    plan = parse_plan(fields | {"task": "note-specialty", "network": network, "evaluation": evaluation})

    summary = summarise(write(tmp_path), plan=plan)

    assert [column.name for column in summarise(tmp_path).columns] == ["text"]
    assert summary.columns[1:] == (
        ColumnSummary("sex", 2, "1 F, 1 M", ""),
        ColumnSummary("age", 1, "40 to 120", "0 to 120 year"),
    )


def test_what_a_hospital_does_not_record_is_known_of_nobody(tmp_path: Path) -> None:
    """It says so with an empty name, and takes part."""
    records = read(write(tmp_path, groups={"sex": "gender", "age": ""}))

    np.testing.assert_array_equal(np.isnan(records.groups[:, 1]), [True] * 4)
    np.testing.assert_array_equal(records.groups[:2, 0], [0, 1])


def test_groups_of_images_are_arrays_of_their_file(tmp_path: Path) -> None:
    """Texts or numbers, one per image; NaN and an empty text are not known."""
    manifest = {
        "task": "trial-images", "file": "data.npz", "label": "labels", "one_row_per_patient": True,
        "validation_fraction": 0.0, "absent_classes": [f"kind-{number}" for number in range(1, 10)],
        "groups": {"sex": "sex", "age": "years"},
    }  # fmt: skip
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    pixels, labels = np.zeros((3, 28, 28), dtype=np.uint8), np.array(["kind-0"] * 3)
    task = with_groups(TRIAL_IMAGES, (SEX, AGE))

    for years in (np.array([17, 65, np.nan]), np.array(["17", "65", ""])):
        np.savez(tmp_path / "data.npz", images=pixels, labels=labels, sex=np.array(["M", "", "F"]), years=years)
        np.testing.assert_array_equal(read(tmp_path, task).groups, [[1, 17], [np.nan, 65], [0, np.nan]])

    np.savez(tmp_path / "data.npz", images=pixels, labels=labels, sex=np.array(["M", "F"]), years=years)
    assert "one text or whole number for each of 3 images" in str(refusal(tmp_path, task))


@pytest.mark.parametrize(
    ("changes", "old", "new", "words"),
    [
        ({"groups": {"sex": "gender"}}, "", "", "tells patients apart by age, which [groups] does not name"),
        ({}, "w,40", "w,140", "row 2, column 'years', value '140': is outside the public range 0 to 120 year"),
        ({}, "w,40", "w,old", "column 'years', value 'old': is not a number"),
        ({}, ",w,", ",x,", "column 'gender', value 'x': is none of F, M"),
        ({"groups": {"sex": "geslacht", "age": ""}}, "", "", "geslacht"),
        ({"groups": {"sex": "gender", "age": "", "text": "x"}}, "", "", "groups.text is a column of note-specialty"),
        ({"groups": {"sex": "gender", "age": "years"}, "drop": ["years"]}, "", "", "drop: years is used"),
        ({"groups": {"sex": "zip", "age": ""}}, "gender", "zip", "holds what identifies patients: 'zip'"),
    ],
)
def test_groups_that_cannot_be_read_or_identify_somebody_are_refused(
    tmp_path: Path, changes: dict[str, Any], old: str, new: str, words: str
) -> None:
    """With file, row, column and value; to be named as a group is no excuse for an identifier."""
    rows = [row.replace(old, new) for row in ROWS] if old else ROWS

    with pytest.raises(RecordsError) as caught:
        read(write(tmp_path, rows, **changes))

    assert words in str(caught.value)


def test_a_table_has_groups_beside_its_columns_too(tmp_path: Path) -> None:
    """A task's own column keeps its name for itself."""
    task = with_groups(HEART_DISEASE, (Subgroups(column="ward", categories=("a", "b")),))
    manifest = {"task": task.name, "file": "data.csv", "label": "disease", "one_row_per_patient": True}
    cells = "50,male,asymptomatic,120,200,normal,normal,150,no,1,present,b"
    header = "age,sex,chest_pain,resting_blood_pressure,cholesterol,fasting_blood_sugar,resting_ecg,maximum_heart_rate,"
    (tmp_path / "data.csv").write_text(f"{header}exercise_angina,st_depression,disease,ward\n{cells}\n")
    fields = manifest | {"validation_fraction": 0.0, "absent_classes": ["absent"], "groups": {"ward": "ward"}}
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")

    records = read(tmp_path, task)

    assert records.groups.tolist() == [[1.0]]
    assert records.inputs[:].shape == read(tmp_path, HEART_DISEASE).inputs[:].shape


@given(seed=st.integers(0, 2**32 - 1), clip=st.floats(0.05, 3))
def test_a_patient_moves_a_release_by_at_most_the_clip_whatever_the_groups(seed: int, clip: float) -> None:
    """With records in several groups, and in none: what the charge at sensitivity S says holds for any assignment."""
    rng = np.random.default_rng(seed)
    subgroups = (SEX, AGE, Subgroups(column="column-2", edges=(0.25,)))
    task = with_groups(task_of(table(5)), subgroups)
    owners = rng.integers(0, 4, 12)
    owners[:4] = range(4)
    records = table_records(owners)
    beside = np.stack([rng.choice([0, 1, np.nan], 12), rng.choice([3, 40, 80, np.nan], 12)], axis=1)
    plan = EvaluationPlan(every=1, clip=clip * row_norm(task), noise_multiplier=1e-9, bins=20, subgroups=subgroups)
    rest, model = owners < 3, build_network(LogisticRegression(name="logistic-regression"), task, seed=seed % 100)

    everybody, without = (
        released_statistics(model, one, task, plan=plan, random=repeatable(), allow_test_random=True)
        for one in (
            Records(records.inputs, records.targets, owners, 4, beside),
            Records(records.inputs[:][rest], records.targets[:][rest], owners[rest], 3, beside[rest]),
        )
    )

    assert np.linalg.norm(everybody - without) <= plan.clip * (1 + 1e-6)
