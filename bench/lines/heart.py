"""Heart disease: four real hospitals, FLamby's training and test parts, and FLamby's protocol beside ours.

Its published figures come from plain FedAvg on features that each centre scales by its own patients. Ours are scaled by
public ranges; a cholesterol of zero, which stands for "not measured", becomes a finding of its own. The network is the
same, logistic regression, with and without privacy.
"""

import csv
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
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
from server.examples import HEART_COLUMNS, Example, write_example
from shared_models.nets.losses import loss_per_record
from shared_models.tasks import CORONARY_DISEASE, HEART_DISEASE
from shared_models.update import parameters_to_vector, vector_to_parameters

EPSILONS = ("0_5", "1", "2", "4", "8")  # as in the figures' names; bench/plans/heart-eps*.toml
NOT_MEASURED, TYPICAL = "0", "240"  # mg/dl, of cholesterol
FLAMBY_INDICATORS = {2: (2, 3, 4), 6: (1, 2)}  # column: its codes but the first
FLAMBY_SEED, FLAMBY_ROUNDS, FLAMBY_UPDATES, FLAMBY_BATCH, FLAMBY_RATE = 42, 15, 100, 4, 0.001


@dataclass(frozen=True)
class Centre:
    """A hospital's two parts."""

    name: str
    training: Records
    test: Records


def measure(data: Path, seeds: int) -> dict[str, float]:
    """Accuracies and AUROCs of every way to train, mean and sample standard deviation over the seeds.

    Raises:
        ConfigError: The data is not there.
        FederationError: What stopped a study.
    """
    os.environ["KONSIL_DATA"] = str(data)  # the example's own setting
    with TemporaryDirectory(prefix="konsil-bench-") as scratch:
        example = write_example("heart-disease", Path(scratch) / "heart", hospitals=4, seed=0)
        figures = flamby_fedavg(example, seeds)
        say_what_is_missing(example)
        centres = read_centres(example)
        figures |= _without_privacy(centres, seeds)
        for epsilon in EPSILONS:
            figures |= _with_privacy(centres, Path(scratch), epsilon, seeds)
    return figures


# ours


def say_what_is_missing(example: Example) -> None:
    """Rewrite the example's tables for the task that knows whether cholesterol was measured."""
    for home in (*(hospital.folder for hospital in example.hospitals), *example.tests.values()):
        rows = _rows(home)
        for row in rows:
            measured = row["chol"] != NOT_MEASURED
            row |= {"chol_measured": "yes" if measured else "no", "chol": row["chol"] if measured else TYPICAL}
        with (home / "data.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        manifest = tomllib.loads((home / "manifest.toml").read_text(encoding="utf-8"))
        manifest["task"] = CORONARY_DISEASE.name
        manifest["columns"]["cholesterol_measured"] = "chol_measured"
        (home / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")


def read_centres(example: Example) -> list[Centre]:
    """Both parts of every centre, encoded by the task's public ranges."""
    return [
        Centre(hospital.name, _records(hospital.folder), _records(example.tests[hospital.name]))
        for hospital in example.hospitals
    ]


def _rows(home: Path) -> list[dict[str, str]]:
    with (home / "data.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _records(home: Path) -> Records:
    records, _ = read_table(read_manifest(home), CORONARY_DISEASE, split_key=bytes(32))
    return records


def figures_of(model: nn.Module, centres: Sequence[Centre]) -> dict[str, float]:
    """Accuracy on the pooled test parts, as mean of the centres' own, and on each; AUROC on the pooled ones."""
    pooled = measure_model(model, pool([centre.test for centre in centres]), CORONARY_DISEASE)
    own = [measure_model(model, centre.test, CORONARY_DISEASE)["accuracy"] for centre in centres]
    named = {f"accuracy_{centre.name.replace('-', '_')}": value for centre, value in zip(centres, own, strict=True)}
    return {"pooled_accuracy": pooled["accuracy"], "centre_accuracy": mean(own), "auroc": pooled["auroc"], **named}


def _without_privacy(centres: Sequence[Centre], seeds: int) -> dict[str, float]:
    """Federated, pooled, and at each hospital alone: the same network, steps and seeds."""
    plain = read_plain("heart")
    training = [centre.training for centre in centres]
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        models = {
            "": federate(plain, training, seed=seed),
            "_all_in_one_place": train_in_one_place(plain, pool(training), seed=seed, hospitals=len(training)),
        }
        for centre in centres:
            models[f"_{centre.name.replace('-', '_')}_alone"] = train_in_one_place(plain, centre.training, seed=seed)
        for kind, model in models.items():
            runs.setdefault(kind, []).append(figures_of(model, centres))
    return {name: figure for kind, found in runs.items() for name, figure in _means(found, kind).items()}


def _with_privacy(centres: Sequence[Centre], scratch: Path, epsilon: str, seeds: int) -> dict[str, float]:
    """So many studies of one plan, each with fresh noise; epsilon is the highest of any hospital and run."""
    runs = []
    for seed in range(seeds):
        folder = scratch / f"eps{epsilon}-{seed}"
        study = run_study(PLANS / f"heart-eps{epsilon}.toml", scratch / "heart", folder, seed=seed)
        spent = {"epsilon": study.epsilon, "epsilon_filter": study.epsilon_filter, "delta": study.delta}
        runs.append({**figures_of(study.model, centres), **spent})
    return _means(runs, f"_eps{epsilon}")


def _means(runs: Sequence[Mapping[str, float]], kind: str) -> dict[str, float]:
    return {
        key: value
        for name in runs[0]
        for key, value in mean_and_sd(f"heart_{name}{kind}", [run[name] for run in runs]).items()
    }


# theirs


def flamby_features(example: Example) -> tuple[list[Centre], Records]:
    """Thirteen features as FLamby makes them: (the centres, scaled each by its own patients; all test parts pooled).

    Indicators of columns 2 and 6 over all centres, the first category of each dropped; then each centre's mean and
    standard deviation over its training part. The pooled test part is scaled by the pooled training part, as there.

    Source:
        FLamby, ``fed_heart_disease/dataset.py``.
    """
    parts = [(h.name, _raw(_rows(h.folder)), _raw(_rows(example.tests[h.name]))) for h in example.hospitals]
    centres = []
    for name, training, test in parts:
        scale = _scale(training[0])
        centres.append(Centre(name, single(scale(training[0]), training[1]), single(scale(test[0]), test[1])))
    whole = _scale(np.concatenate([training[0] for _, training, _ in parts]))
    tests = [test for _, _, test in parts]
    return centres, single(whole(np.concatenate([x for x, _ in tests])), np.concatenate([y for _, y in tests]))


def _raw(rows: Sequence[Mapping[str, str]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    values = np.array([[float(row[name]) for name in HEART_COLUMNS.values()] for row in rows])
    indicators = [values[:, column] == code for column, codes in FLAMBY_INDICATORS.items() for code in codes]
    kept = np.delete(values, list(FLAMBY_INDICATORS), axis=1)
    labels = np.array([row["num"] != "0" for row in rows], dtype=np.float32)
    return np.column_stack([kept, *indicators]).astype(np.float32), labels


def _scale(training: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    centre, width = training.mean(axis=0), training.std(axis=0, ddof=1) + 1e-9

    def scaled(features: NDArray[np.float32]) -> NDArray[np.float32]:
        moved: NDArray[np.float32] = (features - centre) / width
        return moved

    return scaled


def flamby_fedavg(example: Example, seeds: int) -> dict[str, float]:
    """FedAvg at FLamby's learning rate, batch size and rounds, on FLamby's features; its own seeds, from 42.

    Each hospital goes on where its shuffled records were when the last round ended, as there; weights are true sizes.

    Source:
        FLamby, ``strategies/fed_avg.py``; its figures: .6850 as mean of the centres, .7480 on the pooled test part.
    """
    centres, pooled = flamby_features(example)
    runs = []
    for seed in range(FLAMBY_SEED, FLAMBY_SEED + seeds):
        model = _flamby_train([centre.training for centre in centres], seed)
        own = [measure_model(model, centre.test, HEART_DISEASE)["accuracy"] for centre in centres]
        runs.append({"": mean(own), "_pooled": measure_model(model, pooled, HEART_DISEASE)["accuracy"]})
    return {
        key: value
        for name in ("", "_pooled")
        for key, value in mean_and_sd(f"heart_flamby_fedavg{name}", [run[name] for run in runs]).items()
    }


def _flamby_train(hospitals: Sequence[Records], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Linear(hospitals[0].inputs.shape[1], 1)  # torch's own random start
    generator = torch.Generator().manual_seed(seed)
    orders = [_batches(len(records), generator) for records in hospitals]
    share = np.array([len(records) for records in hospitals]) / sum(len(records) for records in hospitals)
    parameters = parameters_to_vector(model)
    for _ in range(FLAMBY_ROUNDS):
        moved = np.zeros(len(parameters))
        for records, order, weight in zip(hospitals, orders, share, strict=True):
            vector_to_parameters(parameters, model)
            _flamby_updates(model, records, order)
            moved += weight * (parameters_to_vector(model).astype(np.float64) - parameters)
        parameters = (parameters + moved).astype(np.float32)
    vector_to_parameters(parameters, model)
    return model


def _batches(records: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(records, generator=generator).split(FLAMBY_BATCH)


def _flamby_updates(model: nn.Module, records: Records, order: Iterator[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=FLAMBY_RATE)
    for rows in islice(order, FLAMBY_UPDATES):
        optimizer.zero_grad()
        loss_per_record(HEART_DISEASE, model(records.inputs[rows]), records.targets[rows]).mean().backward()
        optimizer.step()
