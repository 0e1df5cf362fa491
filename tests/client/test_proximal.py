"""FedProx: a pull towards the global parameters that depends on no record, outside of clip and noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from client.dp_sgd import local_steps, train
from shared_models.encoding import NULL_COORDINATES
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import Mlp, PrivacyPlan, TrainingPlan
from shared_models.update import parameters_to_vector, update_bound
from tests.client.made_up import repeatable, table, table_records, task_of

TASK = task_of(table(5))
PATIENTS, RATE, MU, STEPS = 40, 0.5, 0.6, 6


def _network() -> nn.Module:
    return build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=0)


def _trained(
    *, proximal: float, clip: float = math.inf, noise: float = 0.0, null: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Where the parameters are after some steps over everybody."""
    model = _network()
    local_steps(
        model,
        table_records(np.arange(PATIENTS)),
        TASK,
        steps=STEPS,
        learning_rate=RATE,
        proximal=proximal,
        clip=clip,
        noise_multiplier=noise,
        sample_rate=1.0,
        expected_batch=float(PATIENTS),
        random=repeatable(),
        null=null,
    )
    return parameters_to_vector(model).astype(np.float64)


def test_without_clip_and_noise_a_step_is_the_gradient_of_loss_and_proximal_term() -> None:
    """Torch's own SGD on the mean loss plus mu/2 ||w - w_0||^2, differentiated by autograd."""
    plain, records = _network(), table_records(np.arange(PATIENTS))
    start: list[Tensor] = [parameter.detach().clone() for parameter in plain.parameters()]
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        distance = sum(((p - s) ** 2).sum() for p, s in zip(plain.parameters(), start, strict=True))
        (loss_per_record(TASK, plain(records.inputs), records.targets[:]).mean() + MU / 2 * distance).backward()
        optimizer.step()

    np.testing.assert_allclose(_trained(proximal=MU), parameters_to_vector(plain), rtol=0, atol=1e-6)
    assert np.abs(_trained(proximal=0.0) - _trained(proximal=MU)).max() > 1e-3  # else the above could not fail


def test_mu_zero_is_bit_for_bit_the_plain_step() -> None:
    """With noise and a clip that binds: a plan without a proximal term trains what it always trained."""
    model = _network()
    train(
        model,
        table_records(np.arange(PATIENTS)),
        TASK,
        training=TrainingPlan(learning_rate=RATE, steps=STEPS),
        privacy=PrivacyPlan(clip=0.1, noise_multiplier=1.0, sample_rate=1.0, epsilon=1.0, delta=1e-5),
        expected_batch=float(PATIENTS),
        random=repeatable(),
        allow_test_random=True,
    )

    assert (
        parameters_to_vector(model).astype(np.float64).tobytes()
        == _trained(proximal=0.0, clip=0.1, noise=1.0).tobytes()
    )


def test_the_pull_is_not_clipped_with_a_patient_s_gradient() -> None:
    """However short the clip, every step shrinks what was there before by 1 - rate * mu, and adds its noise whole."""
    noise_only, pulled = np.zeros(50_000), np.zeros(50_000)
    _trained(proximal=0.0, clip=1e-9, noise=1e9, null=noise_only)
    _trained(proximal=MU, clip=1e-9, noise=1e9, null=pulled)
    shrink = 1 - RATE * MU
    expected = math.sqrt(sum(shrink ** (2 * k) for k in range(STEPS)) / STEPS)
    assert pulled.std() / noise_only.std() == pytest.approx(expected, rel=10 / math.sqrt(2 * len(pulled)))
    assert expected < 0.6  # far from 1, which would be no pull


def test_null_coordinates_move_as_parameters_without_a_gradient_do() -> None:
    """Same noise, same pull: the spread of parameters that no patient moves is the spread of the null coordinates."""
    model, null = nn.Sequential(nn.Linear(5, 4000), nn.Linear(4000, 1)), np.zeros(50_000)
    before = parameters_to_vector(model)
    local_steps(
        model,
        table_records(np.arange(PATIENTS)),
        TASK,
        steps=STEPS,
        learning_rate=RATE,
        proximal=MU,
        clip=1e-6,  # so short that patients move nothing that the noise does not drown
        noise_multiplier=1e3,
        sample_rate=1.0,
        expected_batch=1.0,
        random=repeatable(),
        null=null,
    )

    moved = parameters_to_vector(model).astype(np.float64) - before
    assert moved.std() == pytest.approx(null.std(), rel=10 / math.sqrt(2 * len(moved)))


@settings(max_examples=25, deadline=None)
@given(rate=st.floats(0.01, 2), share=st.floats(0, 1), noise=st.floats(0.1, 5), seed=st.integers(0, 1000))
def test_the_pull_keeps_an_update_within_its_bound(rate: float, share: float, noise: float, seed: int) -> None:
    """The bound that is computed from the plan without mu holds with any mu that a plan may have."""
    model, null = _network(), np.zeros(NULL_COORDINATES)
    before = parameters_to_vector(model).astype(np.float64)
    training = TrainingPlan(learning_rate=rate, steps=4, proximal=share / rate * (1 - 1e-12))
    privacy = PrivacyPlan(clip=0.5, noise_multiplier=noise, sample_rate=1.0, epsilon=1.0, delta=1e-5)
    train(
        model,
        table_records(np.arange(PATIENTS)),
        TASK,
        training=training,
        privacy=privacy,
        expected_batch=float(PATIENTS),
        random=repeatable(seed),
        null=null,
        allow_test_random=True,
    )

    update = np.concatenate([parameters_to_vector(model).astype(np.float64) - before, null])
    bound = update_bound(training=training, privacy=privacy, parameters=len(update), expected_batch=float(PATIENTS))
    assert np.linalg.norm(update) < bound


@pytest.mark.parametrize("proximal", [-0.1, 2.1, math.nan, math.inf])
def test_a_pull_that_overshoots_is_refused(proximal: float) -> None:
    """As the plan refuses it; here too, because a diverging update would be found after the charge only."""
    with pytest.raises(ConfigError, match="learning rate times proximal"):
        _trained(proximal=proximal)
