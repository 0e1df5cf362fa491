"""What was promised against what was seen: tests whose p-values are never too small, and lower bounds on epsilon.

A p-value here is the probability, at most, of a statistic like this or worse where everything is as claimed. So whoever
divides a false-alarm rate by the number of tests (Bonferroni) has that rate. Arithmetic only: no torch, no records.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # type: ignore[import-untyped]  # ships no types; loads its parts when they are used: half a second
from numpy.typing import NDArray

from shared_models.plan import TrainingPlan
from shared_models.privacy.mechanisms import PoissonGaussian

CONFIDENCE = 0.95  # of every lower bound on epsilon
DETECTED = 0.99  # how often what is called the smallest deviation that is found is found
_ROWS_AT_ONCE = 1000  # of noise that is compared in pairs; bounds memory
_SEARCH = 32  # halvings of an interval of 50: to 1e-8


class Spread(NamedTuple):
    """Gaussian noise against its claimed variance.

    Attributes:
        ratio: Observed over claimed *standard deviation*.
        too_small: p-value against less noise than claimed.
        too_large: p-value against more.
    """

    ratio: float
    too_small: float
    too_large: float


class Repetition(NamedTuple):
    """Rows of noise against each other.

    Attributes:
        correlation: The largest of any two rows, without its sign.
        p_value: Against noise of one row that comes back in another.
    """

    correlation: float
    p_value: float


def null_variance(training: TrainingPlan, mechanism: PoissonGaussian) -> float:
    """Variance of a null coordinate of an update after one round, in model units, before it is weighed.

    A step adds noise of standard deviation sigma C over the expected batch, times the learning rate. A proximal term
    takes a share of what is there back before each step.

    Args:
        training: Of this round.
        mechanism: As it was charged.
    """
    kept = (1 - training.learning_rate * training.proximal) ** 2  # of the variance, from step to step
    steps = mechanism.steps if kept == 1 else (1 - kept**mechanism.steps) / (1 - kept)
    deviation = training.learning_rate * mechanism.noise_multiplier * mechanism.clip / mechanism.expected_batch
    return float(steps * deviation**2)


def noise_spread(statistic: float, coordinates: int, *, rounding: float = 0.0) -> Spread:
    """Chi-squared test, both sides, of the sum of squares of noise that was divided by its claimed deviation.

    Exact for Gaussian noise.

    Args:
        statistic: Sum over all coordinates of (noise / claimed standard deviation) squared.
        coordinates: How many; the degrees of freedom.
        rounding: What else may have added to the variance, as a share of the claimed one. It excuses noise that is too
            large, and never noise that is too small.
    """
    return Spread(
        math.sqrt(statistic / coordinates),
        float(scipy.stats.chi2.cdf(statistic, coordinates)),
        float(scipy.stats.chi2.sf(statistic / (1 + rounding), coordinates)),
    )


def smallest_ratio_found(coordinates: int, *, false_alarm: float) -> float:
    """The largest ratio below 1 of standard deviations that ``noise_spread`` finds with probability ``DETECTED``."""
    limit = scipy.stats.chi2.ppf(false_alarm, coordinates)
    return float(math.sqrt(limit / scipy.stats.chi2.ppf(DETECTED, coordinates)))


def noise_repetition(noise: NDArray[np.float64]) -> Repetition:
    """Whether rows of independent standard normal noise share anything.

    Two tests, each at half the level: the most correlated pair (exact, by the Beta distribution of a squared
    correlation, times the number of pairs), and the length of the rows' sum beside the rows' own (exact, by the F
    distribution), which grows where a small share of every row is the same. Pairs further apart than 1,000 rows are
    left to the second.

    Args:
        noise: Shape ``(rows, d)``, of one variance, whichever it is.
    """
    lengths = np.linalg.norm(noise, axis=1)
    rows = noise[lengths > 0]
    if len(rows) < 2:
        return Repetition(0.0, 1.0)
    d, pairs, largest = rows.shape[1], 0, 0.0
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[first : first + _ROWS_AT_ONCE]
        block = block / np.linalg.norm(block, axis=1, keepdims=True)
        cosines = np.abs(block @ block.T)[np.triu_indices(len(block), 1)]
        pairs += len(cosines)
        largest = max(largest, float(cosines.max(initial=0.0)))
    squared = min(largest, 1.0) ** 2
    pair = pairs * scipy.stats.beta.sf(squared, 0.5, (d - 1) / 2)
    along = float((rows.sum(axis=0) ** 2).sum()) / len(rows)
    across = (float((rows**2).sum()) - along) / (len(rows) - 1)
    total = scipy.stats.f.sf(along / across, d, d * (len(rows) - 1)) if across > 0 else 0.0
    return Repetition(largest, float(min(1.0, 2 * min(pair, total))))


def noise_shape(noise: NDArray[np.float64]) -> tuple[float, float]:
    """Kolmogorov and Smirnov's distance from a Gaussian, and its p-value, whatever the noise's variance.

    The variance is taken from the noise itself, which only makes the p-value larger than it need be.

    Args:
        noise: Shape ``(n,)``.
    """
    scale = float(np.sqrt((noise**2).mean()))
    if not scale > 0:
        return 1.0, 0.0
    found = scipy.stats.kstest(noise / scale, "norm")
    return float(found.statistic), float(found.pvalue)


def binomial_rate(successes: int, trials: int, rate: float) -> float:
    """p-value, exact and two-sided, of so many successes."""
    return float(scipy.stats.binomtest(successes, trials, rate).pvalue)


def binomial_dispersion(counts: NDArray[np.int64], trials: int, rate: float) -> tuple[float, float]:
    """Whether independent counts vary as binomial ones do; too little (as in shuffled batches) and too much.

    The chi-squared statistic, with Chernoff's bound over the exact binomial distribution in place of the chi-squared
    one, which is wrong in its tails for small rates.

    Args:
        counts: Each of ``trials`` draws at ``rate``.
        trials: Draws behind each count.
        rate: Probability of each.

    Returns:
        The statistic over its expected value (1 for binomial counts), and the p-value, two-sided.
    """
    variance = trials * rate * (1 - rate)
    if variance == 0:
        right = bool((counts == trials * rate).all())
        return (1.0 if right else math.inf), float(right)
    statistic = float(((counts - trials * rate) ** 2).sum() / variance)
    possible = np.arange(trials + 1)
    log_chance = scipy.stats.binom.logpmf(possible, trials, rate)
    squares = (possible - trials * rate) ** 2 / variance

    def log_bound(t: float) -> float:
        return float(len(counts) * scipy.special.logsumexp(log_chance + t * squares) - t * statistic)

    # Any t gives a bound; the search only finds a good one. Beyond these limits nothing is gained.
    side = (0.0, 5.0) if statistic > len(counts) else (-5.0 * len(counts), 0.0)
    best = scipy.optimize.minimize_scalar(log_bound, bounds=side, method="bounded").fun
    return statistic / len(counts), min(1.0, 2 * math.exp(min(0.0, best)))


class Guesses(NamedTuple):
    """What somebody guessed about canaries that were each in or out by a fair coin.

    Attributes:
        canaries: m, all that were flipped for.
        made: r, on how many a guess was made; chosen before anything was seen.
        correct: v.
    """

    canaries: int
    made: int
    correct: int


def guess(scores: NDArray[np.float64], included: NDArray[np.bool_], *, made: int) -> Guesses:
    """Guess "in" for the highest scores and "out" for the lowest, half of ``made`` each."""
    half, order = made // 2, np.argsort(scores, kind="stable")
    lowest, highest = order[:half], order[len(order) - half :]
    return Guesses(len(scores), 2 * half, int((~included[lowest]).sum() + included[highest].sum()))


def one_run_p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """The probability, at most, of so many correct guesses in one run of anything that is (epsilon, delta)-private.

    Source:
        Steinke, Nasr and Jagielski, arXiv:2305.08846, theorem 5.2 and appendix D.
    """
    canaries, made, correct = guesses
    right = scipy.special.expit(epsilon)
    at_least = scipy.stats.binom.sf(correct - 1, made, right)
    sums = np.cumsum(scipy.stats.binom.pmf(correct - np.arange(1, correct + 1), made, right))
    worst = float((sums / np.arange(1, correct + 1)).max(initial=0.0))
    return float(min(1.0, at_least + 2 * canaries * delta * worst))


def one_run_bound(guesses: Guesses, *, delta: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound on epsilon: what is private with less gives so many correct guesses with at most 1 - confidence."""
    low, high = 0.0, 50.0
    if one_run_p_value(guesses, epsilon=low, delta=delta) > 1 - confidence:
        return 0.0
    for _ in range(_SEARCH):
        middle = (low + high) / 2
        if one_run_p_value(guesses, epsilon=middle, delta=delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def best_number_of_guesses(
    runs: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]], *, delta: float
) -> tuple[int, float]:
    """How many guesses to make, from runs that were only simulated: the most telling number, and its mean bound.

    Args:
        runs: Scores and inclusions of each simulated run, all of as many canaries.
        delta: What the bound holds at.
    """
    m = len(runs[0][0])
    choices = sorted({2 * max(1, round(m * share / 2)) for share in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)})

    def bounds(made: int, corrects: Iterable[int]) -> list[float]:
        return [one_run_bound(Guesses(m, made, correct), delta=delta) for correct in corrects]

    correct = {made: [guess(*run, made=made).correct for run in runs] for made in choices}
    best = max(choices, key=lambda made: (bounds(made, [round(float(np.mean(correct[made])))]), made))
    return best, float(np.mean(bounds(best, correct[best])))


def rates_bound(
    true_positives: int,
    members: int,
    false_positives: int,
    others: int,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
) -> float:
    """Lower bound on epsilon from how often an attack was right, by Clopper and Pearson; never below 0.

    A private mechanism has TPR <= exp(epsilon) FPR + delta, and the same with members and others exchanged. Four
    limits enter, two for each direction, so that each has a fourth of what is missing from certainty.

    Args:
        true_positives: Members that were called members.
        members: How many there were.
        false_positives: Others that were called members.
        others: How many there were.
        delta: What the bound holds at.
        confidence: Of the bound.

    Source:
        Kairouz, Oh and Viswanath, arXiv:1311.0776; Jagielski, Ullman and Oprea, arXiv:2006.07709, section 5.
    """
    level = (1 - confidence) / 4
    epsilon = 0.0
    for hits, of, alarms, among in (
        (true_positives, members, false_positives, others),
        (others - false_positives, others, members - true_positives, members),
    ):
        least = float(scipy.stats.beta.ppf(level, hits, of - hits + 1)) if hits else 0.0
        most = float(scipy.stats.beta.ppf(1 - level, alarms + 1, among - alarms)) if alarms < among else 1.0
        if least > delta:
            epsilon = max(epsilon, math.log((least - delta) / most))
    return epsilon
