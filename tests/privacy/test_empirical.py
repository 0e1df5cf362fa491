"""Tests of what was seen: no more false alarms than stated, exact where they say so, and bounds that hold."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]  # scipy ships no types

from shared_models.privacy.empirical import (
    DETECTED,
    Guesses,
    binomial_dispersion,
    binomial_rate,
    guess,
    noise_repetition,
    noise_shape,
    noise_spread,
    one_run_bound,
    one_run_p_value,
    rates_bound,
    smallest_ratio_found,
)

RUNS, LEVEL = 1000, 0.05
# Of 1000 honest runs at level 0.05, more than 90 are below it with probability 1e-7.
MOST_ALARMS = int(stats.binom.ppf(1 - 1e-7, RUNS, LEVEL))

Rng = np.random.Generator


def _spread(rng: Rng) -> float:
    found = noise_spread(float((rng.normal(size=64) ** 2).sum()), 64)
    return 2 * min(found.too_small, found.too_large)


HONEST: dict[str, Callable[[Rng], float]] = {
    "spread": _spread,
    "repetition": lambda rng: noise_repetition(rng.normal(size=(6, 64))).p_value,
    "shape": lambda rng: noise_shape(3 * rng.normal(size=200))[1],
    "rate": lambda rng: binomial_rate(int(rng.binomial(300, 0.02)), 300, 0.02),
    "dispersion of rare draws": lambda rng: binomial_dispersion(rng.binomial(50, 0.01, 40), 50, 0.01)[1],
    "dispersion": lambda rng: binomial_dispersion(rng.binomial(50, 0.4, 40), 50, 0.4)[1],
}


@pytest.mark.parametrize("name", HONEST)
def test_no_p_value_is_too_small(name: str) -> None:
    """Where everything is as claimed, p < 0.05 comes in at most 5 % of runs, also for small rates."""
    rng = np.random.default_rng(1)

    alarms = sum(HONEST[name](rng) < LEVEL for _ in range(RUNS))

    assert alarms <= MOST_ALARMS


@pytest.mark.parametrize("rate", [0.01, 0.4])
@pytest.mark.parametrize("kind", ["equal", "all or nothing"])
def test_dispersion_is_found_on_both_sides(rate: float, kind: str) -> None:
    """Counts that are all the same, and counts of draws that come together."""
    rng, trials = np.random.default_rng(2), 500
    equal = np.full(400, round(trials * rate))
    together = 20 * rng.binomial(trials // 20, rate, 400)

    _, p_value = binomial_dispersion(equal if kind == "equal" else together, trials, rate)

    assert p_value < 1e-12


def test_at_rate_one_everybody_is_drawn() -> None:
    """There is no variance to test, and no exception either."""
    assert binomial_dispersion(np.full(3, 7), 7, 1.0) == (1.0, 1.0)
    assert binomial_dispersion(np.array([7, 6, 7]), 7, 1.0) == (math.inf, 0.0)


def test_the_smallest_ratio_is_found_as_often_as_is_said() -> None:
    """Power: noise of that ratio raises the alarm in 99 % of runs."""
    coordinates, level = 500, 1e-6
    ratio = smallest_ratio_found(coordinates, false_alarm=level)
    rng = np.random.default_rng(3)

    found = [
        noise_spread(float(((ratio * rng.normal(size=coordinates)) ** 2).sum()), coordinates).too_small < level
        for _ in range(2000)
    ]

    assert abs(np.mean(found) - DETECTED) < 5 * math.sqrt(DETECTED * (1 - DETECTED) / 2000)


def test_rounding_excuses_too_much_noise_only() -> None:
    """A grid adds variance; it takes none away."""
    without, with_it = noise_spread(640.0, 512), noise_spread(640.0, 512, rounding=0.25)

    assert without.too_large < 1e-3 < with_it.too_large
    assert without.too_small == with_it.too_small


def _one_row_again(noise: NDArray[np.float64]) -> None:
    noise[20] = noise[3]


def _negated(noise: NDArray[np.float64]) -> None:
    noise[20] = -noise[3]


def _a_fifth_of_every_row(noise: NDArray[np.float64]) -> None:
    noise += 0.5 * np.random.default_rng(5).normal(size=noise.shape[1])
    noise /= math.sqrt(1.25)


@pytest.mark.parametrize("repeat", [_one_row_again, _negated, _a_fifth_of_every_row])
def test_repeated_noise_is_found(repeat: Callable[[NDArray[np.float64]], None]) -> None:
    """One row of forty, or one hospital of five in every row."""
    noise = np.random.default_rng(4).normal(size=(40, 1024))
    repeat(noise)

    assert noise_repetition(noise).p_value < 1e-12


@pytest.mark.parametrize("rows", [np.zeros((5, 8)), np.ones((1, 8))])
def test_rows_that_say_nothing_raise_no_alarm(rows: NDArray[np.float64]) -> None:
    """No noise at all is another test's to find."""
    assert noise_repetition(rows).p_value == 1


def test_uniform_noise_of_the_right_variance_has_another_shape() -> None:
    """And nothing at all has none."""
    assert noise_shape(np.random.default_rng(6).uniform(-1, 1, 10_000))[1] < 1e-12
    assert noise_shape(np.zeros(10)) == (1.0, 0.0)


def published_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """As the paper's appendix D has it, term by term."""
    right = 1 / (1 + math.exp(-epsilon))
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, right)
        alpha = max(alpha, total / i)
    return float(min(1.0, stats.binom.sf(v - 1, r, right) + alpha * delta * 2 * m))


@pytest.mark.parametrize("delta", [0.0, 1e-5, 3e-4])
@pytest.mark.parametrize(("m", "r", "v"), [(1000, 100, 80), (1000, 1000, 600), (10, 4, 0), (200, 200, 200)])
def test_the_one_run_p_value_is_the_published_one(m: int, r: int, v: int, delta: float) -> None:
    """Steinke, Nasr and Jagielski, appendix D, written twice."""
    for epsilon in (0.0, 0.5, 3.0):
        found = one_run_p_value(Guesses(m, r, v), epsilon=epsilon, delta=delta)

        assert found == pytest.approx(published_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_the_one_run_bound_holds_for_randomised_response(epsilon: float) -> None:
    """The mechanism that tells most at its epsilon: the bound exceeds it in 5 % of runs at most, and comes near it."""
    rng, m = np.random.default_rng(7), 1000
    right = 1 / (1 + math.exp(-epsilon))

    bounds = np.array([one_run_bound(Guesses(m, m, int(rng.binomial(m, right))), delta=0.0) for _ in range(300)])

    assert (bounds > epsilon).sum() <= stats.binom.ppf(1 - 1e-6, 300, 0.05)
    assert bounds.mean() > epsilon - 0.25


def test_the_bound_is_where_the_p_value_crosses() -> None:
    """No epsilon below it explains what was seen."""
    guesses = Guesses(500, 200, 160)

    bound = one_run_bound(guesses, delta=1e-5)

    assert one_run_p_value(guesses, epsilon=bound - 1e-6, delta=1e-5) <= 0.05
    assert one_run_p_value(guesses, epsilon=bound + 1e-6, delta=1e-5) > 0.05
    assert one_run_bound(Guesses(500, 200, 100), delta=1e-5) == 0


def test_guesses_are_made_from_both_ends() -> None:
    """The highest scores are called in, the lowest out, and nothing is said about the rest."""
    scores, included = np.arange(10.0), np.arange(10) >= 8

    assert guess(scores, included, made=4) == Guesses(10, 4, 4)
    assert guess(-scores, included, made=4) == Guesses(10, 4, 0)
    assert guess(scores, included, made=10) == Guesses(10, 10, 7)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_from_rates_holds_for_randomised_response(epsilon: float) -> None:
    """Clopper and Pearson's limits are conservative: it exceeds epsilon in 5 % of runs at most."""
    rng, n = np.random.default_rng(8), 2000
    truth, lie = math.exp(epsilon) / (1 + math.exp(epsilon)), 1 / (1 + math.exp(epsilon))

    bounds = np.array(
        [rates_bound(int(rng.binomial(n, truth)), n, int(rng.binomial(n, lie)), n, delta=0.0) for _ in range(300)]
    )

    assert (bounds > epsilon).sum() <= stats.binom.ppf(1 - 1e-6, 300, 0.05)
    assert bounds.mean() > 0.7 * epsilon


def test_rates_that_say_nothing_bound_nothing() -> None:
    """No members found, everybody found, nobody there to be found wrongly."""
    assert rates_bound(0, 50, 0, 50, delta=1e-5) == 0
    assert rates_bound(50, 50, 50, 50, delta=1e-5) == 0
    assert rates_bound(25, 50, 25, 50, delta=1e-5) == 0
    assert rates_bound(50, 50, 0, 50, delta=1e-5) > 2
