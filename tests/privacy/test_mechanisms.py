"""The closed form, the filter and the calibration, against exact arithmetic and two independent libraries."""

import json
import math
import subprocess
import sys
from decimal import Decimal, localcontext
from math import comb
from random import Random

import pytest
from dp_accounting import dp_event, privacy_accountant
from dp_accounting.rdp import rdp_privacy_accountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus_rdp

from shared_models.errors import ConfigError
from shared_models.plan import StudyPlan, parse_plan
from shared_models.privacy.mechanisms import (
    GaussianRelease,
    PoissonGaussian,
    best_order,
    calibrate_noise,
    filter_epsilon,
    filter_limit,
    release_mechanism,
    renyi_divergence,
    study_mechanisms,
    total_divergence,
    training_mechanism,
)

RATES = (1e-6, 1e-3, 0.05, 0.3, 0.9, 0.999)
NOISES = (0.3, 0.7, 1.0, 2.0, 8.7, 100.0)
ORDERS = (2, 3, 7, 32, 128)
DELTA = 1e-5


def steps(q: float, sigma: float, count: int = 1) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=q, noise_multiplier=sigma, steps=count, clip=1.0, expected_batch=10.0)


def release(sigma: float, count: int = 1) -> GaussianRelease:
    return GaussianRelease(noise_multiplier=sigma, clip=1.0, releases=count)


def filter_by_dp_accounting(mechanism: PoissonGaussian, order: int, delta: float) -> float:
    accountant = rdp_privacy_accountant.RdpAccountant([order], privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_event.PoissonSampledDpEvent(mechanism.sample_rate, dp_event.GaussianDpEvent(mechanism.noise_multiplier))
    return float(accountant.compose(step, mechanism.steps).get_epsilon(delta))


def exact_divergence(q: float, sigma: float, order: int) -> float:
    """The sum as it stands in the paper, in 120 decimal digits."""
    with localcontext() as context:
        context.prec, context.Emax = 120, 10**9
        rate, noise = Decimal(q), Decimal(sigma)
        total = sum(
            comb(order, k) * (1 - rate) ** (order - k) * rate**k * (Decimal(k * (k - 1)) / (2 * noise * noise)).exp()
            for k in range(order + 1)
        )
        return float(Decimal(total).ln() / (order - 1))


@pytest.mark.parametrize("q", RATES)
@pytest.mark.parametrize("sigma", NOISES)
def test_the_divergence_is_exact(q: float, sigma: float) -> None:
    """To ten digits, also where the divergence is far smaller than the 1 it is added to inside the logarithm."""
    for order in ORDERS:
        assert renyi_divergence(steps(q, sigma), order) == pytest.approx(exact_divergence(q, sigma, order), rel=1e-10)


def test_the_divergence_is_exact_at_high_orders() -> None:
    """As documented: 1e-10 up to order 1000, 1e-8 beyond."""
    assert renyi_divergence(steps(0.01, 3.0), 1000) == pytest.approx(exact_divergence(0.01, 3.0, 1000), rel=1e-10)
    assert renyi_divergence(steps(1e-4, 50.0), 4000) == pytest.approx(exact_divergence(1e-4, 50.0, 4000), rel=1e-8)


@pytest.mark.parametrize("q", [0.001, 0.05, 0.2, 0.9])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0, 8.7])
def test_the_divergence_equals_opacus(q: float, sigma: float) -> None:
    """Opacus subtracts nothing to keep small figures, hence the absolute tolerance."""
    for order in ORDERS:
        theirs = float(opacus_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=7, orders=[order])[0])
        assert renyi_divergence(steps(q, sigma, 7), order) == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("q", [0.001, 0.05, 0.2, 0.9])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0, 8.7])
@pytest.mark.parametrize("delta", [1e-4, 1e-9])
def test_the_filter_equals_dp_accounting(q: float, sigma: float, delta: float) -> None:
    """The whole way from mechanism to epsilon, at one order."""
    for order in ORDERS:
        ours = filter_epsilon(renyi_divergence(steps(q, sigma, 100), order), order=order, delta=delta)
        assert ours == pytest.approx(filter_by_dp_accounting(steps(q, sigma, 100), order, delta), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_a_release_is_the_plain_gaussian(order: int) -> None:
    """It costs order / (2 sigma^2) each; and sampling everybody is no sampling."""
    assert renyi_divergence(release(2.0, 3), order) == pytest.approx(3 * order / 8, rel=1e-12)
    assert renyi_divergence(steps(1.0, 2.0, 3), order) == renyi_divergence(release(2.0, 3), order)
    assert renyi_divergence(steps(1 - 1e-12, 2.0), order) == pytest.approx(order / 8, rel=1e-9)


@given(q=st.floats(1e-6, 1), sigma=st.floats(0.2, 50), order=st.integers(2, 200))
def test_more_noise_or_rarer_sampling_never_costs_more(q: float, sigma: float, order: int) -> None:
    """Monotone in every argument, up to the last digits of floating point."""
    rho = renyi_divergence(steps(q, sigma), order)

    assert 0 <= rho <= order / (2 * sigma * sigma) * (1 + 1e-9)
    assert renyi_divergence(steps(q, 1.1 * sigma), order) <= rho * (1 + 1e-9)
    assert renyi_divergence(steps(q / 2, sigma), order) <= rho * (1 + 1e-9)
    assert renyi_divergence(steps(q, sigma), order + 1) >= rho * (1 - 1e-9)


@pytest.mark.parametrize("sigma", [5e-324, 1e-200, 1e-160, 1e-5])
@pytest.mark.parametrize("q", [5e-324, 1e-300, 0.5, 1.0])
def test_absurdly_little_noise_is_never_free(q: float, sigma: float) -> None:
    """It overflows to infinity, or to a huge figure, and never to NaN or zero, which a filter might let through."""
    for order in (2, 50):
        rho = renyi_divergence(steps(q, sigma), order)
        assert rho > 1000
        assert not rho <= filter_limit(100.0, order=order, delta=DELTA)


@given(q=st.floats(0, 1, exclude_min=True), sigma=st.floats(0, 1e300, exclude_min=True), order=st.integers(2, 40))
@settings(max_examples=300)
def test_the_divergence_is_never_nan_or_negative(q: float, sigma: float, order: int) -> None:
    """For anything that a plan can hold."""
    assert renyi_divergence(steps(q, sigma), order) >= 0


@pytest.mark.parametrize("order", [-1, 0, 1, 100_001])
def test_only_orders_that_the_closed_form_covers(order: int) -> None:
    """An order of 1 would divide by zero."""
    with pytest.raises(ConfigError, match="Renyi order"):
        renyi_divergence(steps(0.1, 1.0), order)


@given(epsilon=st.floats(0.01, 50), order=st.integers(2, 1000), delta=st.floats(1e-12, 0.1))
def test_limit_and_epsilon_are_inverse(epsilon: float, order: int, delta: float) -> None:
    """What the limit allows costs exactly epsilon."""
    limit = filter_limit(epsilon, order=order, delta=delta)

    if limit > 0:
        assert filter_epsilon(limit, order=order, delta=delta) == pytest.approx(epsilon, rel=1e-9)


def test_the_limit_is_the_one_of_the_design() -> None:
    """The limit epsilon - ln(1 - 1/alpha) + ln(alpha delta) / (alpha - 1), by hand."""
    assert filter_limit(1.0, order=10, delta=1e-5) == pytest.approx(1 - math.log(0.9) + math.log(1e-4) / 9)


def test_nothing_spent_costs_nothing() -> None:
    """Though the conversion alone is positive."""
    assert filter_epsilon(0.0, order=10, delta=DELTA) == 0


@given(
    parts=st.lists(st.tuples(st.sampled_from(RATES), st.sampled_from(NOISES), st.integers(1, 50)), max_size=8),
    order=st.integers(2, 64),
    random=st.randoms(),
)
def test_the_sum_does_not_depend_on_order_or_grouping(
    parts: list[tuple[float, float, int]],
    order: int,
    random: Random,
) -> None:
    """To the last bit: a study that charges round by round must end exactly at what was reserved."""
    mechanisms = [steps(q, sigma, 5) for q, sigma, count in parts for _ in range(count)]
    shuffled = random.sample(mechanisms, len(mechanisms))

    assert total_divergence(shuffled, order) == total_divergence(mechanisms, order)
    assert total_divergence(mechanisms, order) == pytest.approx(sum(renyi_divergence(m, order) for m in mechanisms))


@pytest.mark.parametrize(
    "mechanisms",
    [
        [steps(0.05, 1.0, 400)],
        [steps(0.2, 8.7, 5)] * 30,
        [release(20.0)] * 3,
        [steps(0.001, 0.8, 100), release(5.0)],
        [steps(1e-4, 200.0)],
        [steps(0.5, 0.3, 10)],
    ],
    ids=["golden", "small study", "releases", "mixed", "tiny", "dear"],
)
def test_the_best_order_is_the_best(mechanisms: list[PoissonGaussian | GaussianRelease]) -> None:
    """No order up to 600 is better by more than a thousandth."""

    def epsilon(order: int) -> float:
        return filter_epsilon(total_divergence(mechanisms, order), order=order, delta=DELTA)

    assert epsilon(best_order(mechanisms, DELTA)) <= min(map(epsilon, range(2, 600))) * 1.001


def test_there_is_no_best_order_for_nothing() -> None:
    """A hospital must say what it expects."""
    with pytest.raises(ConfigError, match="no mechanism"):
        best_order([], DELTA)


@pytest.mark.parametrize(
    ("q", "count", "epsilon", "delta"),
    [(0.2, 150, 1.0, 1e-4), (0.05, 400, 8.0, 1e-5), (1.0, 3, 0.5, 1e-6), (0.001, 1_000_000, 2.0, 1e-7)],
)
def test_calibrated_noise_is_enough_and_not_too_much(q: float, count: int, epsilon: float, delta: float) -> None:
    """It keeps the budget at the best order; a thousandth less would not."""
    sigma = calibrate_noise(sample_rate=q, steps=count, epsilon=epsilon, delta=delta)

    assert round(sigma, 3) == sigma
    assert least_epsilon(q, sigma, count, delta) <= epsilon
    assert least_epsilon(q, round(sigma - 0.001, 3), count, delta) > epsilon


def least_epsilon(q: float, sigma: float, count: int, delta: float) -> float:
    order = best_order([steps(q, sigma, count)], delta)
    return filter_epsilon(renyi_divergence(steps(q, sigma, count), order), order=order, delta=delta)


def test_an_epsilon_below_every_conversion_is_refused() -> None:
    """The error carries the figures; the search does not run for ever."""
    with pytest.raises(ConfigError, match="epsilon 1e-05"):
        calibrate_noise(sample_rate=0.1, steps=10, epsilon=1e-5, delta=1e-9)


PLAN: StudyPlan = parse_plan(
    {
        "format": 1,
        "study": "heart",
        "purpose": "Tests of the privacy budget",
        "task": "heart-disease",
        "data_licence": "CC BY 4.0",
        "rounds": 30,
        "minimum_hospitals": 3,
        "deadline_s": 10,
        "weight_cap": 200,
        "network": {"name": "logistic-regression"},
        "training": {"learning_rate": 0.1, "steps": 5},
        "privacy": {
            "clip": 1.0,
            "noise_multiplier": 8.8,
            "sample_rate": 0.2,
            "epsilon": 1.0,
            "delta": 1e-4,
            "spare_charges": 2,
        },
    }
)


def test_a_round_charges_its_steps() -> None:
    """The denominator comes from the public size, never from a count."""
    assert training_mechanism(PLAN, 90) == PoissonGaussian(
        sample_rate=0.2, noise_multiplier=8.8, steps=5, clip=1.0, expected_batch=0.2 * 90
    )


def test_a_study_is_its_rounds_spares_and_releases() -> None:
    """Releases come every so many rounds, and only if the plan has them."""
    evaluated = parse_plan(
        PLAN.model_dump(mode="json", exclude_none=True)
        | {"evaluation": {"every": 7, "clip": 2.0, "noise_multiplier": 20.0}}
    )

    assert study_mechanisms(PLAN, 90) == [training_mechanism(PLAN, 90)] * 32
    assert study_mechanisms(evaluated, 90) == [training_mechanism(PLAN, 90)] * 32 + [release_mechanism(evaluated)] * 4
    with pytest.raises(ConfigError, match="releases no statistics"):
        release_mechanism(PLAN)


def test_mechanisms_load_without_torch_or_opacus() -> None:
    """A hospital's command line shows a price at once, and the auditor installs without either."""
    code = (
        "import json, sys, shared_models.privacy.mechanisms, shared_models.privacy.ledger; "
        "print(json.dumps(sorted({'torch', 'opacus', 'numpy', 'flwr', 'scipy'} & set(sys.modules))))"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert json.loads(loaded.stdout) == []
