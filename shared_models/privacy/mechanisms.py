"""What a hospital spends, as mechanisms; their Rényi divergence in closed form; and the filter that enforces a budget.

The ledger stores mechanisms, epsilon is derived. Everything here is arithmetic on public numbers: no torch, no Opacus,
so that a hospital's command line and the auditor start fast. ``accounting.py`` has the tight figure that is reported.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

from shared_models.config import ALWAYS_WRITTEN, Count, Evolving, Positive, Probability
from shared_models.errors import ConfigError
from shared_models.plan import StudyPlan

UNIT = "patient"
NEIGHBOURING = "add or remove one patient"

LARGEST_ORDER = 100_000  # of a committed order; a divergence takes one term per unit of it
_SEARCHED_ORDERS = (*range(2, 64), *(round(64 * 1.1**i) for i in range(45)))  # 2 to about 4200
_LARGEST_NOISE = 10_000  # no plan needs more; beyond it, epsilon is the conversion's floor and not the noise's


class PoissonGaussian(Evolving):
    """Steps that each Poisson-sample patients, clip each one's gradient, and add Gaussian noise to the sum.

    Attributes:
        sample_rate: q, each patient's probability to take part in a step, independently of all others.
        noise_multiplier: sigma; the noise's standard deviation is sigma * clip.
        steps: Steps of this charge, each with a fresh draw.
        clip: C, L2 norm of one patient's share. Does not enter the price.
        expected_batch: Denominator of the mean, public. Does not enter the price.
    """

    kind: Annotated[Literal["poisson-gaussian"], ALWAYS_WRITTEN] = "poisson-gaussian"
    sample_rate: Probability
    noise_multiplier: Positive
    steps: Count
    clip: Positive
    expected_batch: Positive


class GaussianRelease(Evolving):
    """Statistics of all validation patients, each clipped, the sum noised: every patient takes part.

    Attributes:
        noise_multiplier: sigma; the noise's standard deviation is sigma * clip.
        clip: S, L2 norm of one patient's statistics. Does not enter the price.
        releases: Releases of this charge, each with fresh noise.
    """

    kind: Annotated[Literal["gaussian-release"], ALWAYS_WRITTEN] = "gaussian-release"
    noise_multiplier: Positive
    clip: Positive
    releases: Annotated[Count, ALWAYS_WRITTEN] = 1


Mechanism = Annotated[PoissonGaussian | GaussianRelease, Field(discriminator="kind")]


def renyi_divergence(mechanism: PoissonGaussian | GaussianRelease, order: int) -> float:
    """Rényi divergence of the whole mechanism (all its steps or releases) at an integer order.

    Guarantees:
        * It bounds both directions, adding and removing a patient.
        * Relative error below 1e-10 at orders up to 1000 and 1e-8 at any order: terms that cancel are removed before
          summing, so that a small divergence is not lost beside 1.
        * Infinite, never NaN, where a noise multiplier is so small that a term overflows.

    Args:
        mechanism: What was or will be run.
        order: alpha, an integer of at least 2.

    Source:
        Mironov, Talwar and Zhang, arXiv:1908.10530, section 3.3; Mironov, arXiv:1702.07476, for the Gaussian.
    """
    if not 2 <= order <= LARGEST_ORDER:
        raise ConfigError(f"a Renyi order of {order} is not in 2..{LARGEST_ORDER}", hint="Most mechanisms want 4..64.")
    if isinstance(mechanism, GaussianRelease):
        return mechanism.releases * _sampled_gaussian(1.0, mechanism.noise_multiplier, order)
    return mechanism.steps * _sampled_gaussian(mechanism.sample_rate, mechanism.noise_multiplier, order)


@lru_cache(maxsize=4096)
def _sampled_gaussian(q: float, sigma: float, alpha: int) -> float:
    """One step: log(A) / (alpha - 1), with A = sum over k of C(alpha, k) (1-q)^(alpha-k) q^k exp(k(k-1) / (2 sigma^2)).

    The binomial weights alone sum to 1. So A - 1 is the same sum with exp(x) - 1 in place of exp(x): all its terms are
    positive, and those of k = 0 and 1 vanish.
    """
    if q == 1:
        return alpha / sigma / sigma / 2
    stay, go = math.log1p(-q), math.log(q)
    log_terms = [
        _log_binomial(alpha, k) + (alpha - k) * stay + k * go + _log_expm1(k / sigma * ((k - 1) / sigma) / 2)
        for k in range(2, alpha + 1)
    ]
    largest = max(log_terms)
    if math.isinf(largest):  # an overflow costs everything; an underflow of every term costs nothing
        return max(largest, 0.0)
    log_rest = largest + math.log(math.fsum(math.exp(term - largest) for term in log_terms))
    # log(1 + exp(log_rest)), whichever of the two is larger
    log_a = log_rest + math.log1p(math.exp(-log_rest)) if log_rest > 0 else math.log1p(math.exp(log_rest))
    return log_a / (alpha - 1)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_expm1(x: float) -> float:
    """log(exp(x) - 1) for x >= 0, without overflow and without cancellation."""
    if x < 1:
        return math.log(math.expm1(x)) if x > 0 else -math.inf
    return x + math.log1p(-math.exp(-x))


def total_divergence(mechanisms: Iterable[PoissonGaussian | GaussianRelease], order: int) -> float:
    """Rényi divergence of all mechanisms together: the sum, rounded once.

    Guarantees:
        * The same whatever the order or grouping of the same mechanisms: a study's charges one by one cost exactly what
          was reserved for them at once.
    """
    counts = Counter(mechanisms)
    return math.fsum(
        divergence for mechanism, count in counts.items() for divergence in [renyi_divergence(mechanism, order)] * count
    )


def filter_epsilon(rho: float, *, order: int, delta: float) -> float:
    """The epsilon that a total Rényi divergence of ``rho`` at one committed order stands for.

    Guarantees:
        * Sound when later mechanisms were chosen from earlier results, because the order was fixed beforehand and
          divergences at one order add up under adaptive choice.
        * 0 when nothing was spent; never negative.

    Args:
        rho: Sum of ``renyi_divergence`` at ``order``.
        order: alpha, committed when the budget was opened.
        delta: The delta the result holds at.

    Source:
        Conversion: Canonne, Kamath and Steinke, arXiv:2004.00010, proposition 12. Filter: Feldman and Zrnic,
        arXiv:2008.11193; Lécuyer, arXiv:2103.01379.
    """
    if rho == 0:
        return 0.0
    return max(0.0, rho + _conversion(order, delta))


def filter_limit(epsilon: float, *, order: int, delta: float) -> float:
    """The total Rényi divergence that a budget of (epsilon, delta) allows at its committed order.

    The inverse of ``filter_epsilon``. Negative where the order is too small for so strict a budget: nothing fits.
    """
    return epsilon - _conversion(order, delta)


def _conversion(order: int, delta: float) -> float:
    """ln(1 - 1/alpha) - ln(alpha delta) / (alpha - 1)."""
    return math.log1p(-1 / order) - (math.log(order) + math.log(delta)) / (order - 1)


def best_order(mechanisms: Sequence[PoissonGaussian | GaussianRelease], delta: float) -> int:
    """The integer order at which the filter is least strict for mechanisms that a hospital expects.

    A choice, not a promise: any order is sound. It depends on public numbers only, so committing to it reveals nothing.

    Raises:
        ConfigError: There is no mechanism to choose for.
    """
    if not mechanisms:
        raise ConfigError("no mechanism to choose a Renyi order for", hint="Name the study that you expect to run.")
    return _best_order(tuple(Counter(mechanisms).items()), delta)[0]


_Counted = tuple[tuple[PoissonGaussian | GaussianRelease, int], ...]


def _best_order(counted: _Counted, delta: float) -> tuple[int, float]:
    """Order and epsilon: a ladder of orders first, then the gap around its best rung, by halves."""
    best, least = 2, math.inf
    for order in _SEARCHED_ORDERS:
        rho, epsilon = _at_order(counted, order, delta)
        if epsilon < least:
            best, least = order, epsilon
        if (
            rho > least + 1
        ):  # divergence grows with the order, and the conversion takes back less than 1: no use going on
            break
    stride = best // 10
    while stride:
        for order in (best - stride, best + stride):
            epsilon = _at_order(counted, order, delta)[1] if order >= 2 else math.inf
            if epsilon < least:
                best, least = order, epsilon
        stride //= 2
    return best, least


def _at_order(counted: _Counted, order: int, delta: float) -> tuple[float, float]:
    rho = math.fsum(count * renyi_divergence(mechanism, order) for mechanism, count in counted)
    return rho, filter_epsilon(rho, order=order, delta=delta)


def calibrate_noise(*, sample_rate: float, steps: int, epsilon: float, delta: float) -> float:
    """The smallest noise multiplier, rounded up to three decimals, whose filter stays within (epsilon, delta).

    Args:
        sample_rate: q of every step.
        steps: Steps of the whole study: rounds and spare charges times steps per round.
        epsilon: The budget.
        delta: The delta it holds at.

    Returns:
        sigma, for the best integer order: commit to ``best_order`` of the same mechanism.

    Raises:
        ConfigError: No noise is enough for so small an epsilon.
    """

    def least_epsilon(thousandths: int) -> float:
        # Each step is a mechanism of one step here, because a whole study can have more steps than one charge may.
        step = PoissonGaussian(
            sample_rate=sample_rate, noise_multiplier=thousandths / 1000, steps=1, clip=1.0, expected_batch=1.0
        )
        return _best_order(((step, steps),), delta)[1]

    low, high = 0, 1000  # in thousandths; low is never enough
    while not least_epsilon(high) <= epsilon:
        if high >= 1000 * _LARGEST_NOISE:
            raise ConfigError(
                f"no noise multiplier up to {_LARGEST_NOISE} keeps {steps} steps at rate {sample_rate:g} within "
                f"epsilon {epsilon:g} at delta {delta:g}",
                hint="Allow a larger epsilon, or plan fewer steps.",
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if least_epsilon(middle) <= epsilon else (middle, high)
    return high / 1000


def training_mechanism(plan: StudyPlan, public_size: int) -> PoissonGaussian:
    """What one training round of a study charges at a hospital of that public size."""
    privacy = plan.privacy
    return PoissonGaussian(
        sample_rate=privacy.sample_rate,
        noise_multiplier=privacy.noise_multiplier,
        steps=plan.training.steps,
        clip=privacy.clip,
        expected_batch=privacy.sample_rate * public_size,
    )


def release_mechanism(plan: StudyPlan) -> GaussianRelease:
    """What one release of validation statistics charges.

    Raises:
        ConfigError: The plan releases none.
    """
    if plan.evaluation is None:
        raise ConfigError(f"study {plan.study} releases no statistics", hint="Add [evaluation] to the plan.")
    return GaussianRelease(noise_multiplier=plan.evaluation.noise_multiplier, clip=plan.evaluation.clip)


def study_mechanisms(plan: StudyPlan, public_size: int) -> list[PoissonGaussian | GaussianRelease]:
    """All that a study may ever charge at a hospital, one mechanism per charge: rounds, spare charges, releases."""
    charges: list[PoissonGaussian | GaussianRelease] = []
    charges += [training_mechanism(plan, public_size)] * (plan.rounds + plan.privacy.spare_charges)
    if plan.evaluation is not None:
        charges += [release_mechanism(plan)] * (plan.rounds // plan.evaluation.every)
    return charges
