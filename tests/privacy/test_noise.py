"""Noise: as much as was charged, fresh every time, and nobody else's."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]  # scipy ships no types
from torch import nn

from client.dp_sgd import train
from client.evaluate import released_statistics
from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.nets.build import build_network
from shared_models.plan import EvaluationPlan, LogisticRegression, PrivacyPlan, TrainingPlan
from tests.client.made_up import repeatable, table, table_records, task_of

WIDTH = 20_000
TASK = task_of(table(WIDTH))
CLIP, NOISE_MULTIPLIER, LEARNING_RATE, EXPECTED_BATCH = 0.5, 3.0, 0.1, 8.0
STEP_NOISE = LEARNING_RATE * NOISE_MULTIPLIER * CLIP / EXPECTED_BATCH  # standard deviation of one step


def noise_of(
    random: SecureRandom, *, steps: int = 1, sample_rate: float = 1e-12, records: Records | None = None
) -> NDArray[np.float64]:
    """How far a network moves: by noise alone, because at this rate nobody is drawn, unless told otherwise."""
    nobody = Records(torch.zeros(1, WIDTH), torch.zeros(1), np.zeros(1, dtype=np.int64), 1)
    model = build_network(LogisticRegression(name="logistic-regression"), TASK, seed=0)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    train(
        model,
        records or nobody,
        TASK,
        training=TrainingPlan(learning_rate=LEARNING_RATE, steps=steps),
        privacy=PrivacyPlan(
            clip=CLIP, noise_multiplier=NOISE_MULTIPLIER, sample_rate=sample_rate, epsilon=1.0, delta=1e-5
        ),
        expected_batch=EXPECTED_BATCH,
        random=random,
        allow_test_random=True,
    )
    return (nn.utils.parameters_to_vector(model.parameters()).detach().double() - start).numpy()


def assert_normal(noise: NDArray[np.float64], standard_deviation: float) -> None:
    """Variance by a chi-squared test from both sides, shape by Kolmogorov-Smirnov, each at 0.001."""
    statistic = (noise**2).sum() / standard_deviation**2
    assert 0.001 < stats.chi2.sf(statistic, len(noise)) < 0.999
    assert stats.kstest(noise / standard_deviation, "norm").pvalue > 0.001


def assert_uncorrelated(first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    """The correlation of n independent pairs has standard deviation 1/sqrt(n); 6 of them is beyond 1e-8."""
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(len(first))


def test_a_step_adds_noise_of_the_variance_that_is_charged() -> None:
    """Standard deviation sigma * C per coordinate of the sum, divided by the expected batch, at the learning rate."""
    assert_normal(noise_of(repeatable(1)), STEP_NOISE)


def test_every_step_adds_fresh_noise() -> None:
    """Variances add up over steps: repeated noise would add up in amplitude, sixteen times the variance of one."""
    assert_normal(noise_of(repeatable(2), steps=16), 4 * STEP_NOISE)


def test_noise_does_not_depend_on_who_is_drawn() -> None:
    """With everybody drawn, what the clipped sum does not explain has the same variance."""
    records = table_records(np.arange(10), width=WIDTH)
    quiet = repeatable(3)
    quiet.uniform(10)  # what the loader takes before the noise
    moved = noise_of(repeatable(3), sample_rate=1.0, records=records)

    unexplained = moved + STEP_NOISE * quiet.gaussian(WIDTH + 1)

    # Ten patients at most C long each, at the learning rate over the expected batch.
    assert np.linalg.norm(unexplained) <= 10 * CLIP * LEARNING_RATE / EXPECTED_BATCH + 1e-5
    assert np.linalg.norm(moved) > 10 * np.linalg.norm(unexplained)


def test_hospitals_and_charges_have_independent_noise_whatever_torch_is_seeded_with() -> None:
    """Two hospitals, or two charges of one, that run the same code with the same torch seed share nothing."""
    noise = []
    for _ in range(3):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  # the global generator on purpose: it must not matter
        noise.append(noise_of(SecureRandom.from_system()))

    assert_uncorrelated(noise[0], noise[1])
    assert_uncorrelated(noise[1], noise[2])


def test_a_release_adds_noise_of_the_variance_that_is_charged() -> None:
    """Sigma * S on every entry of the statistics, also on those that no record reaches and without any record."""
    nobody = Records(torch.empty(0, WIDTH), torch.empty(0), np.empty(0, dtype=np.int64), 0)
    model = build_network(LogisticRegression(name="logistic-regression"), TASK, seed=0)
    plan = EvaluationPlan(every=1, clip=2.0, noise_multiplier=4.0, bins=1000)

    released = released_statistics(model, nobody, TASK, plan=plan, random=repeatable(4), allow_test_random=True)

    assert_normal(released, 8.0)
