"""Pneumonia in chest X-rays (PneumoniaMNIST, 28 x 28 pixels): a CNN over five label-skewed hospitals.

The set has no hospitals. Five of equal size are made by a fixed seed: at the first half of the pictures show pneumonia,
at the last nearly all (``SHARES``). Every picture counts as a patient of its own, because the set does not say whose it
is. The official validation part served to choose the plans; the test part is read once per seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tomli_w
from numpy.typing import NDArray
from torch import nn

from client.records.images import scaled
from client.records.records import Records
from lines.training import (
    PLANS,
    federate,
    mean_and_sd,
    measure_model,
    pool,
    read_plain,
    run_study,
    single,
    train_in_one_place,
)
from shared_models.errors import ConfigError
from shared_models.tasks import PNEUMONIA

FILE = Path("pneumoniamnist") / "pneumoniamnist.npz"
SHARES = (0.50, 0.64, 0.76, 0.87, 0.94)  # of pneumonia at each hospital; their mean is the whole set's, 0.742
SPLIT_SEED = 0
PUBLIC_SIZE = 940  # each hospital has 941 to 943 pictures
EPSILONS = ("8", "3")
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]  # pictures (n, 28, 28), labels (n,)


def measure(data: Path, seeds: int) -> dict[str, float]:
    """AUROC and accuracy on the test part of every way to train, mean and sample standard deviation over the seeds.

    Raises:
        ConfigError: The data is not there.
        FederationError: What stopped a study.
    """
    training, test = read_part(data, "train"), read_part(data, "test")
    hospitals = split(training)
    records, whole = [encoded(part) for part in hospitals], encoded(test)
    figures = _without_privacy(records, whole, seeds)
    with TemporaryDirectory(prefix="konsil-bench-") as scratch:
        write_hospitals(hospitals, Path(scratch) / "hospitals")
        for epsilon in EPSILONS:
            figures |= _with_privacy(Path(scratch), whole, epsilon, seeds)
    return figures


def read_part(data: Path, name: str) -> Part:
    """The pictures and labels of ``train``, ``val`` or ``test``.

    Raises:
        ConfigError: The data is not there.
    """
    path = data / FILE
    if not path.is_file():
        raise ConfigError(f"there is no {path}", hint="Put MedMNIST's pneumoniamnist.npz there.")
    with np.load(path) as arrays:
        return arrays[f"{name}_images"], arrays[f"{name}_labels"][:, 0].astype(np.int64)


def split(part: Part) -> list[Part]:
    """Cut a part into hospitals of equal size, each with its own share of pneumonia; who goes where is drawn."""
    pictures, labels = part
    rng = np.random.default_rng(SPLIT_SEED)
    rows: list[list[NDArray[np.int64]]] = [[] for _ in SHARES]
    for label in (0, 1):
        shares = np.array(SHARES) if label else 1 - np.array(SHARES)
        found = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.round(np.cumsum(shares / shares.sum()) * len(found)).astype(np.int64)[:-1]
        for hospital, piece in zip(rows, np.split(found, cuts), strict=True):
            hospital.append(piece)
    chosen = [np.sort(np.concatenate(pieces)) for pieces in rows]
    return [(pictures[of], labels[of]) for of in chosen]


def encoded(part: Part) -> Records:
    """A part as the network takes it."""
    pictures, labels = part
    return single(scaled(pictures)[:, None], labels.astype(np.float32))


def write_hospitals(hospitals: Sequence[Part], folder: Path) -> None:
    """A folder for each hospital, as its steward would lay it out: pictures and labels in one file, and a manifest."""
    manifest = {
        "task": PNEUMONIA.name,
        "file": "data.npz",
        "label": "labels",
        "one_row_per_patient": True,
        "validation_fraction": 0.0,
    }
    for number, (pictures, labels) in enumerate(hospitals, start=1):
        home = folder / f"hospital-{number}"
        home.mkdir(parents=True)
        np.savez(home / "data.npz", images=pictures, labels=np.array(PNEUMONIA.classes)[labels])
        (home / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")


def _without_privacy(hospitals: Sequence[Records], test: Records, seeds: int) -> dict[str, float]:
    """Federated, pooled, and at each hospital alone: the same network, steps and seeds."""
    plain = read_plain("pneumonia")
    runs: dict[str, list[Mapping[str, float]]] = {}
    for seed in range(seeds):
        models = {
            "": federate(plain, hospitals, seed=seed),
            "_pooled": train_in_one_place(plain, pool(hospitals), seed=seed, hospitals=len(hospitals)),
        }
        for number, records in enumerate(hospitals, start=1):
            models[f"_hospital_{number}_alone"] = train_in_one_place(plain, records, seed=seed)
        for kind, model in models.items():
            runs.setdefault(kind, []).append(_figures(model, test))
    return {name: figure for kind, found in runs.items() for name, figure in _means(found, kind).items()}


def _with_privacy(scratch: Path, test: Records, epsilon: str, seeds: int) -> dict[str, float]:
    """So many studies of one plan, each with fresh noise; epsilon is the highest of any hospital."""
    plan = PLANS / f"pneumonia-eps{epsilon}.toml"
    runs = []
    for seed in range(seeds):
        folder = scratch / f"eps{epsilon}-{seed}"
        study = run_study(plan, scratch / "hospitals", folder, seed=seed, public_size=PUBLIC_SIZE)
        spent = {"epsilon": study.epsilon, "epsilon_filter": study.epsilon_filter, "delta": study.delta}
        runs.append({**_figures(study.model, test), **spent})
    return _means(runs, f"_eps{epsilon}")


def _figures(model: nn.Module, test: Records) -> dict[str, float]:
    found = measure_model(model, test, PNEUMONIA)
    return {"auroc": found["auroc"], "accuracy": found["accuracy"]}


def _means(runs: Sequence[Mapping[str, float]], kind: str) -> dict[str, float]:
    return {
        key: value
        for name in runs[0]
        for key, value in mean_and_sd(f"pneumonia_{name}{kind}", [run[name] for run in runs]).items()
    }
