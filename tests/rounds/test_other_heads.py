"""Studies of what is no single class: time to an event, a quantity, many findings, an outline; from folder to model.

The data is made up and easy. What is shown is the whole path: labels, losses clipped per patient, masks, releases.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
from PIL import Image

from client.alone import evaluate_folder
from server.examples import PLANS, Example, ExampleHospital
from shared_models.outcomes import row_norm
from shared_models.plan import read_plan
from shared_models.tasks import ATTENDANCES, BREAST_CANCER_SURVIVAL, CHEST_FINDINGS, TableInput, find_task
from tests.federation import Federation, make_federation

PATIENTS = 40
ROUNDS = 3
FOLDERS = ("hospital-1", "hospital-2", "hospital-3", "test")
Manifest = dict[str, Any]
Writer = Callable[[Path, np.random.Generator], Manifest]


def write_survival(folder: Path, rng: np.random.Generator) -> Manifest:
    """Those with metastases die in the second year, the others are followed for nine."""
    assert isinstance(BREAST_CANCER_SURVIVAL.input, TableInput)
    spread = np.arange(PATIENTS) % 2
    rows = pd.DataFrame({"patient": np.arange(PATIENTS), "age": rng.integers(30, 80, PATIENTS)})
    names = [column.name for column in BREAST_CANCER_SURVIVAL.input.columns][1:]
    rows = rows.assign(**dict.fromkeys(names, "no"))
    rows["metastasis_mx"] = np.array(["no", "yes"])[spread]
    rows["days"] = np.where(spread, 500, 3300) + rng.integers(100, size=PATIENTS)
    rows["died"] = np.array(["no", "yes"])[spread]
    rows.to_csv(folder / "rows.csv", index=False)
    return {"file": "rows.csv"}


def write_quantities(folder: Path, rng: np.random.Generator) -> Manifest:
    """The next month is as the last one was."""
    assert isinstance(ATTENDANCES.input, TableInput)
    names = [column.name for column in ATTENDANCES.input.columns]
    rows = pd.DataFrame(rng.uniform(0.5, 2, (PATIENTS, len(names))), columns=names)
    rows.insert(0, "patient", np.arange(PATIENTS))
    rows["next_month"] = rows["months_ago_1"]
    rows.to_csv(folder / "rows.csv", index=False)
    return {"file": "rows.csv"}


def write_findings(folder: Path, rng: np.random.Generator) -> Manifest:
    """Pictures in one file; each finding brightens the picture, and one in ten is not known."""
    names = [head.name for head in CHEST_FINDINGS.heads]
    present = np.repeat(np.arange(PATIENTS) % 2, len(names)).reshape(PATIENTS, -1)
    labels = np.array(["absent", "present"], dtype="<U7")[present]
    labels[rng.random(labels.shape) < 0.1] = ""
    pixels = rng.integers(0, 60, (PATIENTS, 28, 28)) + 150 * present[:, :1, None]
    columns = {name: labels[:, place] for place, name in enumerate(names)}
    patients = np.arange(PATIENTS).astype(str)
    np.savez(folder / "pictures.npz", images=pixels.astype(np.uint8), patient=patients, **columns)  # type: ignore[arg-type]  # numpy's stub takes a flag for an array
    # Of forty patients, halves lack a class of a finding in less than one study of a thousand.
    return {"file": "pictures.npz"} | ({} if folder.name == "test" else {"validation_fraction": 0.5})


def write_outlines(folder: Path, rng: np.random.Generator) -> Manifest:
    """A bright rectangle somewhere, and its mask."""
    paths = []
    for number in range(PATIENTS):
        mask = np.zeros((64, 64), dtype=np.uint8)
        top, left = rng.integers(4, 28, 2)
        mask[top : top + 28, left : left + 28] = 255
        picture = rng.integers(0, 60, (64, 64)) + mask // 2
        for name, pixels in ((f"{number}.png", picture), (f"{number}-mask.png", mask)):
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        paths.append((str(number), f"{number}.png", f"{number}-mask.png"))
    pd.DataFrame(paths, columns=["patient", "images", "lungs"]).to_csv(folder / "rows.csv", index=False)
    return {"file": "rows.csv"}


STUDIES: dict[str, tuple[Writer, Manifest, float, str, float]] = {
    "breast-cancer-survival": (write_survival, {"name": "proportional-hazards"}, 1.0, "c_index", 0.9),
    "attendances": (write_quantities, {"name": "logistic-regression"}, 1.0, "wape", 0.15),
    "chest-findings": (write_findings, {"name": "cnn", "channels": [4]}, 0.5, "auroc", 0.9),
    "lung-outline": (write_outlines, {"name": "unet", "channels": [4, 8]}, 2.0, "dice", 0.8),
}


def lay_out(folder: Path, task: str) -> Federation:
    """Three hospitals, a test part, and a plan of few rounds with little noise: the data is nobody's."""
    writer, network, rate, _, _ = STUDIES[task]
    for seed, name in enumerate(FOLDERS):
        place = folder / "data" / name
        place.mkdir(parents=True)
        share = 0.0 if name == "test" else 0.25
        fields = {"task": task, "patient": "patient", "validation_fraction": share}
        manifest = fields | writer(place, np.random.default_rng(seed))
        (place / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    hospitals = tuple(
        ExampleHospital(name=name, folder=folder / "data" / name, public_size=PATIENTS) for name in FOLDERS[:3]
    )
    plan = read_plan(PLANS / "breast-cancer.toml")
    example = Example(plan=plan, hospitals=hospitals, pooled=folder, test=folder / "data" / "test", split="made up")
    return make_federation(
        folder, example=example, task=task, study=task, network=network, rounds=ROUNDS,
        training={"learning_rate": rate, "steps": 10},
        privacy={"clip": 1.0, "noise_multiplier": 0.2, "sample_rate": 0.5, "epsilon": 1e5, "delta": 1e-3},
        evaluation={"every": ROUNDS, "clip": row_norm(find_task(task)), "noise_multiplier": 0.2, "bins": 20},
    )  # fmt: skip


@pytest.mark.parametrize("task", STUDIES)
def test_a_study_of_other_heads_learns_and_releases(tmp_path: Path, task: str) -> None:
    """Every hospital pays for every round, the model knows a fourth folder, and a figure of its kind is released."""
    metric, limit = STUDIES[task][3:]
    federation = lay_out(tmp_path, task)

    folder = federation.run()

    assert [event["answered"] for event in federation.events("round")] == [federation.names] * ROUNDS
    found = evaluate_folder(folder / "model.safetensors", federation.example.test)[metric]
    assert found <= limit if metric == "wape" else found >= limit
    assert np.isfinite(federation.events("released")[-1]["metrics"][metric])
