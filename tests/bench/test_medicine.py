"""Real medicine beside published figures: the frame, training without privacy, and what a line writes."""

import json
import math
import os
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import tomli_w
import torch
from lines import heart, pneumonia, training
from medicine import LINES, TARGETS, Target, main

from server.examples import write_example
from shared_models.plan import read_plan
from shared_models.privacy.mechanisms import (
    best_order,
    calibrate_noise,
    filter_epsilon,
    study_mechanisms,
    total_divergence,
)
from shared_models.tasks import CORONARY_DISEASE, HEART_DISEASE, find_task

DATA = Path(os.environ.get("KONSIL_DATA") or Path(__file__).parents[3] / "shared" / "data")
STUDIES = sorted(training.PLANS.glob("*-eps*.toml"))
PLAIN = {"task": "pneumonia", "rounds": 1, "steps": 1, "batch_size": 8, "learning_rate": 0.1}
PLAIN |= {"network": {"name": "cnn", "channels": [4]}}
STUDY = {
    "format": 1,
    "study": "tiny",
    "purpose": "To try the frame of a benchmark.",
    "task": "pneumonia",
    "data_licence": "made up",
    "rounds": 1,
    "minimum_hospitals": 3,
    "deadline_s": 60.0,
    "weight_cap": 20,
    "network": {"name": "cnn", "channels": [4]},
    "training": {"learning_rate": 0.1, "steps": 1},
    "privacy": {"clip": 1.0, "noise_multiplier": 20.0, "sample_rate": 0.5, "epsilon": 1.0, "delta": 1e-4},
}


def pictures(count: int, seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """So many made-up pictures, every fourth of them normal, and their labels, shape ``(count, 1)``."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count)[:, None] % 4 > 0).astype(np.uint8)
    return rng.integers(0, 256, size=(count, 28, 28), dtype=np.uint8), labels


# the frame


def test_a_target_is_met_by_its_own_rule_and_never_by_a_nan() -> None:
    """Lower and upper bounds, bounds that move with another figure, and NaN, which compares with nothing."""
    figures = {"a": 0.95, "b": 0.955, "c": math.nan}

    verdicts = [
        Target("a", 0.95).verdict(figures),
        Target("a", 0.94, most=True).verdict(figures),
        Target("a", -0.01, above="b").verdict(figures),
        Target("a", 0.0, above="b").verdict(figures),
        Target("c", 0.0).verdict(figures),
        Target("c", 1.0, most=True).verdict(figures),
    ]

    assert [verdict.rsplit(": ", 1)[1] for verdict in verdicts] == [
        "met",
        "MISSED",
        "met",
        "MISSED",
        "MISSED",
        "MISSED",
    ]


def test_every_line_has_a_target() -> None:
    """A line without one could not be judged; each figure begins with its line's name."""
    assert {target.figure.split("_")[0] for target in TARGETS} == set(LINES)


def test_a_line_runs_whole_on_a_tiny_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Federated, pooled, alone and in two private studies: every figure has its spread, and its target."""
    (tmp_path / "pneumoniamnist").mkdir()
    (images, labels), (unseen, truth) = pictures(100, 0), pictures(20, 1)
    np.savez(tmp_path / pneumonia.FILE, train_images=images, train_labels=labels, test_images=unseen, test_labels=truth)
    plans = tmp_path / "plans"
    plans.mkdir()
    for name, plan in (("pneumonia", PLAIN), ("pneumonia-eps8", STUDY), ("pneumonia-eps3", STUDY)):
        (plans / f"{name}.toml").write_text(tomli_w.dumps(plan), encoding="utf-8")
    for module in (training, pneumonia):
        monkeypatch.setattr(module, "PLANS", plans)
    monkeypatch.setattr(pneumonia, "PUBLIC_SIZE", 20)
    monkeypatch.setenv("KONSIL_DATA", str(tmp_path))
    file = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["medicine.py", "--only", "pneumonia", "--seeds", "1", "--json", str(file)])

    main()

    figures = json.loads(file.read_text(encoding="utf-8"))
    wanted = {target.figure for target in TARGETS if target.figure.startswith("pneumonia")}
    assert wanted <= set(figures)
    assert {f"{name}_sd" for name in figures if not name.endswith("_sd")} == {n for n in figures if n.endswith("_sd")}
    assert 0 < figures["pneumonia_epsilon_eps8"] <= STUDY["privacy"]["epsilon"]  # type: ignore[index]
    said = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{said}" for name in wanted)
    assert said.count("target ") == sum(target.figure in wanted for target in TARGETS)


def test_a_line_without_its_data_is_skipped_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured, nothing fails, and the figures are empty."""
    monkeypatch.setenv("KONSIL_DATA", str(tmp_path))
    file = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["medicine.py", "--only", "heart", "--json", str(file)])

    main()

    assert capsys.readouterr().out.startswith("heart skipped: ")
    assert json.loads(file.read_text(encoding="utf-8")) == {}


# plans


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_the_bench_has_the_least_noise_that_fits_its_budget(path: Path) -> None:
    """Its name says the epsilon; all rounds and spare charges stay within it by the filter that hospitals enforce."""
    plan = read_plan(path)
    privacy = plan.privacy

    mechanisms = study_mechanisms(plan, 100)
    order = best_order(mechanisms, privacy.delta)
    spent = filter_epsilon(total_divergence(mechanisms, order), order=order, delta=privacy.delta)

    assert path.stem.rsplit("-eps", 1)[1].replace("_", ".") == f"{privacy.epsilon:g}"
    assert spent <= privacy.epsilon
    assert privacy.noise_multiplier == calibrate_noise(
        sample_rate=privacy.sample_rate,
        steps=plan.training.steps * (plan.rounds + privacy.spare_charges),
        epsilon=privacy.epsilon,
        delta=privacy.delta,
    )


# training without privacy


def test_one_full_step_at_each_hospital_is_one_full_step_on_all_records() -> None:
    """A mean's gradient is the mean of gradients: FedAvg of whole-batch steps, weighed by records, is the pooled step.

    Both are float32 sums of the same 60 terms in another order; 1e-5 is a hundred roundings.
    """
    plain = training.read_plain("heart").model_copy(
        update={"rounds": 1, "steps": 1, "batch_size": 60, "weight_cap": None}
    )
    rng = np.random.default_rng(0)
    width = find_task(plain.task).input.width  # type: ignore[union-attr]
    hospitals = [
        training.single(rng.normal(size=(n, width)).astype(np.float32), rng.integers(2, size=n).astype(np.float32))
        for n in (10, 20, 30)
    ]

    federated = training.federate(plain, hospitals, seed=0)
    pooled = training.train_in_one_place(plain, training.pool(hospitals), seed=0)

    for ours, theirs in zip(federated.parameters(), pooled.parameters(), strict=True):
        assert float(ours.detach().abs().max()) > 0.001
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_pooled_training_passes_over_the_data_as_often_as_the_federation() -> None:
    """A round has the steps of all hospitals; and the patients of different hospitals stay different ones."""
    records = training.single(np.zeros((4, 3), dtype=np.float32), np.zeros(4, dtype=np.float32))

    pooled = training.pool([records, records])

    assert pooled.patient_count == 8
    assert pooled.patients.tolist() == list(range(8))
    assert training.mean_and_sd("f", [1.0, 2.0, 3.0]) == {"f": 2.0, "f_sd": 1.0}


# pneumonia


def test_the_made_hospitals_hold_every_picture_once_and_differ_in_pneumonia() -> None:
    """Sizes are equal and shares as announced, each up to one picture of either class."""
    images, labels = pictures(1000, 0)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(1000), 256)  # each names itself

    hospitals = pneumonia.split((images, labels[:, 0].astype(np.int64)))

    names = np.concatenate([p[:, 0, 0].astype(int) * 256 + p[:, 0, 1] for p, _ in hospitals])
    assert sorted(names) == list(range(1000))
    assert [float(found.mean()) for _, found in hospitals] == pytest.approx(list(pneumonia.SHARES), abs=0.02)


# heart disease


@pytest.mark.skipif(not (DATA / "heart_disease").is_dir(), reason="the four UCI files are not part of the project")
def test_flambys_protocol_gives_flambys_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 42 of the published tables: centres .760, .697, .688, .622, pooled .752. Only the batches' order differs."""
    monkeypatch.setenv("KONSIL_DATA", str(DATA))
    example = write_example("heart-disease", tmp_path / "heart", hospitals=4, seed=0)

    centres, pooled = heart.flamby_features(example)
    figures = heart.flamby_fedavg(example, 1)

    assert centres[0].training.inputs.shape[1] == pooled.inputs.shape[1] == HEART_DISEASE.input.width == 13  # type: ignore[union-attr]
    assert figures["heart_flamby_fedavg"] == pytest.approx(mean([0.7596, 0.6966, 0.6875, 0.6222]), abs=0.02)
    assert figures["heart_flamby_fedavg_pooled"] == pytest.approx(0.7520, abs=0.02)


@pytest.mark.skipif(not (DATA / "heart_disease").is_dir(), reason="the four UCI files are not part of the project")
def test_cholesterol_that_was_not_measured_is_a_finding_and_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody keeps a cholesterol of zero; whoever had one carries the indicator, and nobody else."""
    monkeypatch.setenv("KONSIL_DATA", str(DATA))
    example = write_example("heart-disease", tmp_path / "heart", hospitals=4, seed=0)
    zeros = [sum(line.split(",")[4] == "0" for line in _lines(h.folder)) for h in example.hospitals]

    heart.say_what_is_missing(example)
    centres = heart.read_centres(example)

    assert CORONARY_DISEASE.input.width == 14  # type: ignore[union-attr]
    assert [int(centre.training.inputs[:, -1].sum()) for centre in centres] == zeros
    assert sum(zeros) > 0
    assert min(float(centre.training.inputs[:, 6].min()) for centre in centres) > -2


def _lines(folder: Path) -> list[str]:
    return (folder / "data.csv").read_text(encoding="utf-8").splitlines()
