"""Studies on pictures, series and notes: from each hospital's own format to one private model.

The data is made up and easy. What is shown is the whole path: formats, encodings, clipping per patient, masks, ledgers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import tomli_w
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file

from client.alone import evaluate_folder
from client.books import Books
from client.disclosure import disclose, in_words
from server.examples import PLANS, Example, ExampleHospital
from shared_models.plan import read_plan
from shared_models.tasks import ICU_MORTALITY, NOTE_SPECIALTY, SeriesInput
from tests.federation import Federation, make_federation

PATIENTS = 48
ROUNDS = 3
FORMATS = ("hospital-1", "hospital-2", "hospital-3", "test")
Writer = Callable[[Path, str, NDArray[np.int64], np.random.Generator], dict[str, Any]]


def write_manifest(folder: Path, **fields: Any) -> None:
    """One manifest; every folder has patients, and keeps nobody for validation."""
    fields = {"validation_fraction": 0.0, "patient": "patient"} | fields
    (folder / "manifest.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")


# pictures: PNG, DICOM or NIfTI; pneumonia is a bright spot


def write_pictures(folder: Path, name: str, labels: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Any]:
    """Pictures of 28 x 28 pixels, in each hospital's format."""
    suffix, paths = {"hospital-2": ".dcm", "hospital-3": ".nii.gz"}.get(name, ".png"), []
    for number, label in enumerate(labels):
        picture = rng.integers(0, 60, (28, 28)).astype(np.uint8)
        picture[8:20, 8:20] += np.uint8(180 * label)
        paths.append(f"{number}{suffix}")
        if suffix == ".dcm":
            template = get_testdata_file("MR_small.dcm", read=True)
            assert isinstance(template, pydicom.Dataset)
            template.PatientID = f"{name}-{number}"
            template.Rows, template.Columns, template.PixelData = 28, 28, picture.astype("<i2").tobytes()
            template.save_as(folder / paths[-1])
        elif suffix == ".nii.gz":
            upright = picture.T[::-1, ::-1, None]
            nibabel.Nifti1Image(np.ascontiguousarray(upright), np.eye(4)).to_filename(folder / paths[-1])
        else:
            Image.fromarray(picture).save(folder / paths[-1])
    ids = [f"{name}-{number}" for number in range(len(labels))]
    findings = np.array(["normal", "pneumonia"])[labels]
    pd.DataFrame({"patient": ids, "images": paths, "finding": findings}).to_csv(folder / "index.csv", index=False)
    images = {} if suffix == ".png" else {"images": {"window": [127.5, 255.0]}}
    return {"task": "pneumonia", "file": "index.csv", "label": "finding", "drop": ["PatientName"], **images}


# series: CSV with times as numbers, or Parquet with times of day; who dies has a fast pulse


def write_series(folder: Path, name: str, labels: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Any]:
    """Twelve pulses and one temperature per stay; two stays of each patient."""
    stays, rows = [], []
    begin = pd.Timestamp("2024-03-01T12:00:00Z")
    for number, label in enumerate(labels):
        stays.append((f"{number}", f"{name}-{number // 2}", ("survived", "died")[label], begin))
        hours = rng.choice(480, 12, replace=False) / 10
        rows += [(f"{number}", hour, "heart_rate", 50 + 120 * label + rng.integers(20)) for hour in hours]
        rows.append((f"{number}", 1.0, "temperature", 37.0))
    index = pd.DataFrame(stays, columns=["stay", "patient", "outcome", "begin"])
    long = pd.DataFrame(rows, columns=["stay", "time", "variable", "value"])
    assert isinstance(ICU_MORTALITY.input, SeriesInput)
    measured = {"heart_rate", "temperature"}
    absent = [v.name for v in ICU_MORTALITY.input.variables if v.name not in measured]
    series = {"record": "stay", "time": "time", "variable": "variable", "value": "value", "absent_variables": absent}
    index.to_csv(folder / "stays.csv", index=False)
    if name == "hospital-2":
        long["time"] = [(begin + pd.Timedelta(hours=hour)).isoformat() for hour in long["time"]]
        long.to_parquet(folder / "long.parquet")
        series |= {"file": "long.parquet", "start": "begin"}
    else:
        long.to_csv(folder / "long.csv", index=False)
        series |= {"file": "long.csv"}
    return {"task": "icu-mortality", "file": "stays.csv", "label": "outcome", "series": series}


# notes: JSON lines, CSV or Parquet; two specialties, a few words of each


WORDS = {
    "urology": "kidney stone bladder urine prostate catheter",
    "ophthalmology": "eye cataract lens retina vision cornea",
}


def write_notes(folder: Path, name: str, labels: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Any]:
    """Notes of eight words of their specialty."""
    specialties = [list(WORDS)[label] for label in labels]
    notes = [" ".join(rng.choice(WORDS[s].split(), 8)).capitalize() + "." for s in specialties]
    ids = [f"{name}-{number}" for number in range(len(labels))]
    frame = pd.DataFrame({"patient": ids, "text": notes, "specialty": specialties})
    file = {"hospital-1": "notes.jsonl", "hospital-2": "notes.parquet"}.get(name, "notes.csv")
    if file == "notes.jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in frame.to_dict("records"))
        (folder / file).write_text(lines, encoding="utf-8")
    elif file == "notes.parquet":
        frame.to_parquet(folder / file)
    else:
        frame.to_csv(folder / file, index=False)
    absent = [c for c in NOTE_SPECIALTY.classes if c not in WORDS]
    return {"task": "note-specialty", "file": file, "label": "specialty", "absent_classes": absent}


STUDIES: dict[str, tuple[Writer, dict[str, Any], float]] = {
    "pneumonia": (write_pictures, {"name": "cnn", "channels": [4, 8]}, 1.0),
    "icu-mortality": (write_series, {"name": "transformer", "width": 8, "heads": 2, "layers": 1}, 2.0),
    "note-specialty": (write_notes, {"name": "transformer", "width": 8, "heads": 2, "layers": 1}, 2.0),
}


def lay_out(folder: Path, task: str) -> Federation:
    """Three hospitals, a test part, and a plan of few rounds with little noise: the data is nobody's."""
    writer, network, rate = STUDIES[task]
    folders = {name: folder / "data" / name for name in FORMATS}
    for seed, (name, place) in enumerate(folders.items()):
        place.mkdir(parents=True)
        labels = np.arange(PATIENTS) // 2 % 2
        write_manifest(place, **writer(place, name, labels, np.random.default_rng(seed)))
    hospitals = tuple(
        ExampleHospital(name=name, folder=folders[name], public_size=PATIENTS) for name in FORMATS if name != "test"
    )
    plan = read_plan(PLANS / "breast-cancer.toml")
    example = Example(plan=plan, hospitals=hospitals, pooled=folder, test=folders["test"], split="made up")
    return make_federation(
        folder, example=example, task=task, study=task, network=network, rounds=ROUNDS,
        training={"learning_rate": rate, "steps": 8},
        privacy={"clip": 1.0, "noise_multiplier": 0.4, "sample_rate": 0.5, "epsilon": 1000.0, "delta": 1e-3},
    )  # fmt: skip


@pytest.mark.parametrize("task", STUDIES)
def test_a_study_on_other_records_runs_to_its_end(tmp_path: Path, task: str) -> None:
    """Every hospital answers and pays for every round, and the model tells the classes of a fourth folder apart."""
    federation = lay_out(tmp_path, task)

    folder = federation.run()

    assert [event["answered"] for event in federation.events("round")] == [federation.names] * ROUNDS
    for name in federation.names:
        assert federation.charges(name) == [(number, 1) for number in range(1, ROUNDS + 1)]
    assert evaluate_folder(folder / "model.safetensors", federation.example.test)["auroc"] > 0.8


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("pneumonia", "images, finding; the last is the label; patient column: patient"),
        ("note-specialty", "text, specialty; the last is the label; patient column: patient"),
        ("icu-mortality", "albumin, alkaline_phosphatase, "),
    ],
)
def test_the_steward_is_shown_what_a_record_holds(tmp_path: Path, task: str, columns: str) -> None:
    """Before deciding: the picture, the text, or every variable of a series, and how many patients there are."""
    federation = lay_out(tmp_path, task)
    settings = federation.settings(federation.names[1])
    books = Books.open(settings)

    shown = dict(in_words(disclose(settings, federation.plan, books.budget)))
    books.close()

    assert shown["columns"].startswith(columns)
    patients = PATIENTS // 2 if task == "icu-mortality" else PATIENTS
    assert shown["patients"].startswith(f"{patients} to train with, 0 to validate with")
