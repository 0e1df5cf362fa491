"""A study runs to its end: every hospital answers every round, pays for it, and the model learns."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import client.app
import client.round
from client.alone import evaluate_folder
from client.books import Books
from client.dp_sgd import TrainingReport, local_steps
from client.keys import split_key
from client.loader import PoissonLoader
from client.randomness import SecureRandom
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from client.round import Hospital
from shared_models.encoding import NULL_COORDINATES, public_weight
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import PrivacyPlan, TrainingPlan
from shared_models.privacy.mechanisms import training_mechanism
from shared_models.tasks import Task, find_task
from shared_models.update import parameters_to_vector, vector_to_parameters
from tests.federation import Federation, make_federation


def test_every_round_is_answered_paid_for_and_recorded(federation: Federation) -> None:
    """Three rounds are three charges at each hospital, three events, and one model that explains itself."""
    folder = federation.run()

    assert [event["answered"] for event in federation.events("round")] == [federation.names] * 3
    for name in federation.names:
        assert federation.charges(name) == [(1, 1), (2, 1), (3, 1)]
    plan, _ = read_model(folder / "model.safetensors")
    assert plan == federation.plan
    (finished,) = federation.events("finished")
    assert set(finished["hospitals"]) == set(federation.names)
    assert "epsilon" in (folder / "card.md").read_text(encoding="utf-8")


def test_the_charge_is_on_disk_before_the_reply_is_made_and_the_receipt_names_it(federation: Federation) -> None:
    """Each receipt's hash is a charge in the hospital's own ledger, for the mechanism that its plan states."""
    folder = federation.run()

    receipts = [json.loads(line) for line in (folder / "receipts.jsonl").read_bytes().splitlines()]
    assert len(receipts) == 3 * len(federation.names)
    for kept in receipts:
        charges = {e.hash: e for e in federation.ledger(kept["hospital"]) if e.kind == "charge"}
        charge = charges[kept["upload"]["receipt"]["entry_hash"]]
        size = federation.settings(kept["hospital"]).population.public_size
        assert charge.mechanism == training_mechanism(federation.plan, size)
        assert charge.round == kept["upload"]["round"]


def test_the_model_learns_under_noise(tmp_path: Path) -> None:
    """The default study, whole, tells malignant from benign far better than chance: most noise draws give 0.98."""
    federation = make_federation(tmp_path)

    folder = federation.run()

    assert evaluate_folder(folder / "model.safetensors", federation.example.test)["auroc"] > 0.95


def test_epsilon_grows_with_every_round_and_stays_within_the_plan(federation: Federation) -> None:
    """What the hospitals state never falls and never passes what the plan promised."""
    federation.run()

    for before, after in pairwise(federation.events("round")):
        for name in federation.names:
            assert before["epsilon_filter"][name] < after["epsilon_filter"][name] <= federation.plan.privacy.epsilon


# Honesty: with noise and clipping off, the federation is plain FedAvg

KEYS = {f"hospital-{k}": bytes([k]) * 32 for k in range(1, 5)}


def _without_privacy(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    training: TrainingPlan,
    privacy: PrivacyPlan,
    expected_batch: float,
    random: SecureRandom,
    device: torch.device,
    null: NDArray[np.float64],
    allow_test_random: bool,
) -> TrainingReport:
    """The trainer's own steps with clip infinite and noise zero, which no plan can ask for."""
    assert allow_test_random
    return local_steps(
        model,
        records,
        task,
        steps=training.steps,
        learning_rate=training.learning_rate,
        clip=np.inf,
        noise_multiplier=0.0,
        sample_rate=privacy.sample_rate,
        expected_batch=expected_batch,
        random=random,
        device=device,
        null=null,
    )


def _reference(federation: Federation) -> NDArray[np.float64]:
    """FedAvg as the paper has it, in float64 and a dozen lines, on the same batches."""
    plan, task = federation.plan, find_task(federation.plan.task)
    model = build_network(plan.network, task, seed=plan.seed)
    parameters = parameters_to_vector(model).astype(np.float64)
    randoms = {name: SecureRandom.for_tests(KEYS[name]) for name in federation.names}
    for _ in range(plan.rounds):
        total, weights = np.zeros_like(parameters), 0.0
        for name in federation.names:
            settings = federation.settings(name)
            records, _ = read_table(read_manifest(settings.records), task, split_key=split_key(settings.state))
            size = settings.population.public_size
            local = _plain_sgd(model, parameters, records, task, federation, size, randoms[name])
            randoms[name].uniform(len(local) + NULL_COORDINATES)  # the coins of the hospital's own rounding
            total += public_weight(size, plan.weight_cap) * (local - parameters)
            weights += public_weight(size, plan.weight_cap)
        parameters = parameters + total / weights
    return parameters


def _plain_sgd(
    model: nn.Module,
    start: NDArray[np.float64],
    records: Records,
    task: Task,
    federation: Federation,
    size: int,
    random: SecureRandom,
) -> NDArray[np.float64]:
    plan = federation.plan
    vector_to_parameters(start.astype(np.float32), model)
    loader = PoissonLoader(records, plan.privacy.sample_rate, random)
    for _ in range(plan.training.steps):
        drawn = torch.from_numpy(loader.draw())
        model.zero_grad()
        losses: Tensor = loss_per_record(task, model(records.inputs[drawn]), records.targets[drawn])
        (losses.sum() / (plan.privacy.sample_rate * size)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(plan.training.learning_rate * parameter.grad)
    return parameters_to_vector(model).astype(np.float64)


@pytest.mark.parametrize("network", [{"name": "logistic-regression"}, {"name": "mlp", "hidden": [8]}])
def test_without_noise_and_clipping_it_is_plain_fedavg(
    tmp_path: Path, network: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Message passing, weighting, bounding and averaging add nothing of their own: equal to 1e-5."""
    # The clip only sets how long an update may be; with privacy off it must not bind.
    changes: dict[str, Any] = {"training": {"learning_rate": 0.05}, "privacy": {"clip": 10.0}}
    federation = make_federation(tmp_path, rounds=3, network=network, **changes)
    monkeypatch.setattr(client.round, "train", _without_privacy)
    for name in federation.names:
        random = SecureRandom.for_tests(KEYS[name])
        settings = federation.settings(name)
        hospital = Hospital(settings, Books.open(settings), test_random=lambda random=random: random)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        client.app._hospitals[str(federation.settings_file(name))] = hospital

    _, model = read_model(federation.run() / "model.safetensors")

    np.testing.assert_allclose(parameters_to_vector(model), _reference(federation), atol=1e-5)
