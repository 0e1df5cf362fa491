"""What a study gives with noise and clipping off: training as the papers have it, in float64, on the same batches."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import client.app
import client.round
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
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import PrivacyPlan, TrainingPlan
from shared_models.tasks import Task, find_task
from shared_models.update import parameters_to_vector, vector_to_parameters
from tests.federation import Federation

KEYS = {f"hospital-{k}": bytes([k]) * 32 for k in range(1, 5)}

Step = Callable[[nn.Module, Tensor, Sequence[Tensor], float], None]
"""One local step: the network, the batch's loss, the round's global parameters, the learning rate."""


def switch_privacy_off(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hospital trains without noise and clipping, and draws batches that ``reference`` can draw again."""
    monkeypatch.setattr(client.round, "train", _without_privacy)
    for name in federation.names:
        random = SecureRandom.for_tests(KEYS[name])
        settings = federation.settings(name)
        hospital = Hospital(settings, Books.open(settings), test_random=lambda random=random: random)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        client.app._hospitals[str(federation.settings_file(name))] = hospital


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
    others: Sequence[torch.device],
    precision: torch.dtype,
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
        proximal=training.proximal,
        clip=np.inf,
        noise_multiplier=0.0,
        sample_rate=privacy.sample_rate,
        expected_batch=expected_batch,
        random=random,
        device=device,
        others=others,
        precision=precision,
        null=null,
    )


def reference(federation: Federation, rates: Sequence[float], step: Step) -> NDArray[np.float64]:
    """Federated averaging in two dozen lines: a round at each of these learning rates, with this local step."""
    plan, task = federation.plan, find_task(federation.plan.task)
    model = build_network(plan.network, task, seed=plan.seed)
    parameters = parameters_to_vector(model).astype(np.float64)
    randoms = {name: SecureRandom.for_tests(KEYS[name]) for name in federation.names}
    for rate in rates:
        total, weights = np.zeros_like(parameters), 0.0
        for name in federation.names:
            settings = federation.settings(name)
            records, _ = read_table(read_manifest(settings.records), task, split_key=split_key(settings.state))
            size = settings.population.public_size
            vector_to_parameters(parameters.astype(np.float32), model)
            origin = [parameter.detach().clone() for parameter in model.parameters()]
            loader = PoissonLoader(records, plan.privacy.sample_rate, randoms[name])
            for _ in range(plan.training.steps):
                drawn = torch.from_numpy(loader.draw())
                model.zero_grad()
                losses = loss_per_record(task, model(records.inputs[drawn]), records.targets[drawn])
                step(model, losses.sum() / (plan.privacy.sample_rate * size), origin, rate)
            local = parameters_to_vector(model).astype(np.float64)
            randoms[name].uniform(len(local) + NULL_COORDINATES)  # the coins of the hospital's own rounding
            total += public_weight(size, plan.weight_cap) * (local - parameters)
            weights += public_weight(size, plan.weight_cap)
        parameters = parameters + total / weights
    return parameters


def plain_sgd(model: nn.Module, loss: Tensor, _origin: Sequence[Tensor], rate: float) -> None:
    """A step against the gradient."""
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(rate * parameter.grad)


def fedprox(mu: float) -> Step:
    """The same with FedProx's term, by torch's own gradient of loss and term."""

    def step(model: nn.Module, loss: Tensor, origin: Sequence[Tensor], rate: float) -> None:
        distance = sum(((p - o) ** 2).sum() for p, o in zip(model.parameters(), origin, strict=True))
        plain_sgd(model, loss + mu / 2 * distance, origin, rate)

    return step
