"""FedAvg's relatives, FedProx and schedules behind the same masked sum: what is trained is what the papers say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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
from server.checkpoint import load_checkpoint
from server.fedavg import server_step
from shared_models.encoding import NULL_COORDINATES, encoding, public_weight
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import Averaging, PrivacyPlan, TrainingPlan
from shared_models.tasks import Task, find_task
from shared_models.update import parameters_to_vector, vector_to_parameters
from tests.federation import Federation, make_federation
from tests.rounds.test_an_encrypted_sum import Ears
from tests.server.plain_averaging import RULES, plain_averaging

KEYS = {f"hospital-{k}": bytes([k]) * 32 for k in range(1, 5)}
RELATIVES = RULES[1:]


@pytest.mark.parametrize("rule", RELATIVES, ids=[rule.name for rule in RELATIVES])
def test_a_study_under_masks_is_the_formula_over_the_hospitals_own_updates(
    tmp_path: Path, rule: Averaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds with noise and masks, beside the formula applied to what the hospitals had before they encrypted it.

    Rounding of a sum moves a mean by at most ``rounding / weight``, and a step multiplies that by at most the rate over
    tau (adaptive) or by rate / (1 - momentum): both below 10 here. Float32 adds its own, once a round.
    """
    ears = Ears(monkeypatch)
    federation = make_federation(tmp_path, rounds=3, averaging=rule.model_dump(mode="json"))
    plan = federation.plan

    folder = federation.run()

    start = parameters_to_vector(build_network(plan.network, find_task(plan.task), seed=plan.seed)).astype(np.float64)
    means = []
    for number in range(3):
        heard = ears.true[4 * number : 4 * number + 4]
        updates, weights = [vector[:-NULL_COORDINATES] for _, vector, _ in heard], [weight for _, _, weight in heard]
        means.append(np.average(updates, axis=0, weights=weights))
    course = plain_averaging(rule, start, means)
    code = encoding(plan, "train", parameters=len(start), hospitals=4)
    allowed = 3 * (10 * code.rounding / sum(weights) + np.abs(course).max() * 2.0**-23)
    assert allowed < 1e-3 * np.abs(course[-1] - start).max()
    for number in (1, 2, 3):
        parameters, _ = load_checkpoint(folder / "checkpoints", plan, number)
        np.testing.assert_allclose(parameters, course[number - 1], rtol=0, atol=allowed)
    _, model = read_model(folder / "model.safetensors")
    np.testing.assert_array_equal(parameters_to_vector(model), parameters)


def test_a_study_s_checkpoint_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 2's checkpoint and round 3's sum give round 3's checkpoint: parameters and memory, to the last bit."""
    sums: list[tuple[NDArray[np.float64], float]] = []
    rule = RELATIVES[1]
    federation = make_federation(tmp_path, rounds=3, averaging=rule.model_dump(mode="json"))
    genuine = type(server_step(rule, 1)).step

    def listen(self: Any, parameters: Any, total: NDArray[np.float64], weight: float) -> Any:
        sums.append((total.copy(), weight))
        return genuine(self, parameters, total, weight)

    monkeypatch.setattr(type(server_step(rule, 1)), "step", listen)

    checkpoints = federation.run() / "checkpoints"

    parameters, state = load_checkpoint(checkpoints, federation.plan, 2)
    step = server_step(rule, len(parameters), state)
    after, remembered = load_checkpoint(checkpoints, federation.plan, 3)
    assert step.step(parameters, *sums[2]).tobytes() == after.tobytes()
    assert {k: v.tobytes() for k, v in step.state().items()} == {k: v.tobytes() for k, v in remembered.items()}


# FedProx and a schedule, with noise and clipping off


def _without_privacy(
    model: torch.nn.Module,
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
        proximal=training.proximal,
        clip=np.inf,
        noise_multiplier=0.0,
        sample_rate=privacy.sample_rate,
        expected_batch=expected_batch,
        random=random,
        device=device,
        null=null,
    )


def _reference(federation: Federation, rates: list[float]) -> NDArray[np.float64]:
    """FedProx as the paper has it, by torch's own gradients of loss and proximal term, on the same batches."""
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
            local = _fedprox(federation, model, parameters, records, task, size, rate, randoms[name])
            randoms[name].uniform(len(local) + NULL_COORDINATES)  # the coins of the hospital's own rounding
            total += public_weight(size, plan.weight_cap) * (local - parameters)
            weights += public_weight(size, plan.weight_cap)
        parameters = parameters + total / weights
    return parameters


def _fedprox(
    federation: Federation,
    model: torch.nn.Module,
    start: NDArray[np.float64],
    records: Records,
    task: Task,
    size: int,
    rate: float,
    random: SecureRandom,
) -> NDArray[np.float64]:
    plan = federation.plan
    vector_to_parameters(start.astype(np.float32), model)
    origin = [parameter.detach().clone() for parameter in model.parameters()]
    loader = PoissonLoader(records, plan.privacy.sample_rate, random)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(plan.training.steps):
        drawn = torch.from_numpy(loader.draw())
        optimizer.zero_grad()
        losses = loss_per_record(task, model(records.inputs[drawn]), records.targets[drawn])
        distance = sum(((p - o) ** 2).sum() for p, o in zip(model.parameters(), origin, strict=True))
        (losses.sum() / (plan.privacy.sample_rate * size) + plan.training.proximal / 2 * distance).backward()
        optimizer.step()
    return parameters_to_vector(model).astype(np.float64)


def test_without_noise_and_clipping_it_is_fedprox_at_the_schedule_s_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds at rates 0.1, 0.05 and 0.025, with mu = 4: equal to 1e-5, and far from the same without either."""
    training = {"learning_rate": 0.1, "proximal": 4.0, "schedule": {"name": "exponential", "by": 0.5}}
    # The clip only sets how long an update may be; with privacy off it must not bind.
    federation = make_federation(tmp_path, rounds=3, training=training, privacy={"clip": 10.0})
    monkeypatch.setattr(client.round, "train", _without_privacy)
    for name in federation.names:
        random = SecureRandom.for_tests(KEYS[name])
        settings = federation.settings(name)
        hospital = Hospital(settings, Books.open(settings), test_random=lambda random=random: random)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        client.app._hospitals[str(federation.settings_file(name))] = hospital

    _, model = read_model(federation.run() / "model.safetensors")

    trained = parameters_to_vector(model)
    np.testing.assert_allclose(trained, _reference(federation, [0.1, 0.05, 0.025]), atol=1e-5)
    assert np.abs(trained - _reference(federation, [0.1, 0.1, 0.1])).max() > 1e-3


def test_null_coordinates_hold_the_noise_of_the_round_s_rate_and_pull(tmp_path: Path) -> None:
    """An auditor computes their spread from the plan and the round: each step's noise, shrunk by every later pull."""
    training = {"proximal": 0.3, "schedule": {"name": "exponential", "by": 0.25}}
    federation = make_federation(tmp_path, rounds=2, training=training)
    plan = federation.plan

    folder = federation.run()

    for number, line in enumerate((folder / "sums.jsonl").read_text().splitlines(), 1):
        nulls = np.array(json.loads(line)["null_coordinates"])
        rate = plan.training.learning_rate * 0.25 ** (number - 1)
        shrink = 1 - rate * 0.3
        steps = sum(shrink ** (2 * k) for k in range(plan.training.steps))
        step = rate * plan.privacy.noise_multiplier * plan.privacy.clip / plan.privacy.sample_rate
        sizes = [hospital.public_size for hospital in federation.example.hospitals]
        variance = sum((public_weight(size, plan.weight_cap) * step / size) ** 2 * steps for size in sizes)
        assert 0.85 < nulls.std() / np.sqrt(variance) < 1.15  # 1,024 draws: 6 standard deviations


def test_a_prox_study_with_noise_stays_below_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a hospital sends is shortened: the bound from the plan is no tighter than the training."""
    ears = Ears(monkeypatch)
    training = {"proximal": 0.5, "schedule": {"name": "cosine", "final": 0.1}}
    federation = make_federation(tmp_path, rounds=2, training=training)

    federation.run()

    code = encoding(federation.plan, "train", parameters=31, hospitals=4)
    assert len(ears.true) == 8
    assert not any(code.clips(vector, weight) for _, vector, weight in ears.true)
