"""FedAvg's relatives, FedProx and schedules behind the same masked sum: what is trained is what the papers say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.checkpoint import load_checkpoint
from server.fedavg import server_step
from shared_models.encoding import NULL_COORDINATES, encoding, public_weight
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.plan import Averaging
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector
from tests.federation import make_federation
from tests.rounds.plain_training import fedprox, reference, switch_privacy_off
from tests.rounds.test_an_encrypted_sum import Ears
from tests.server.plain_averaging import RULES, plain_averaging

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


def test_without_noise_and_clipping_it_is_fedprox_at_the_schedule_s_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds at rates 0.1, 0.05 and 0.025, with mu = 4: equal to 1e-5, and far from the same without either."""
    training = {"learning_rate": 0.1, "proximal": 4.0, "schedule": {"name": "exponential", "by": 0.5}}
    # The clip only sets how long an update may be; with privacy off it must not bind.
    federation = make_federation(tmp_path, rounds=3, training=training, privacy={"clip": 10.0})
    switch_privacy_off(federation, monkeypatch)

    _, model = read_model(federation.run() / "model.safetensors")

    trained = parameters_to_vector(model)
    np.testing.assert_allclose(trained, reference(federation, [0.1, 0.05, 0.025], fedprox(4.0)), atol=1e-5)
    assert np.abs(trained - reference(federation, [0.1, 0.1, 0.1], fedprox(4.0))).max() > 1e-3


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
