"""Poisson sampling of patients."""

import math

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # scipy ships no types

from client.loader import PoissonLoader
from shared_models.errors import ConfigError
from tests.client.made_up import repeatable, table_records

STEPS, PATIENTS, RATE = 2000, 50, 0.1


def test_every_patient_is_drawn_at_the_rate_independently() -> None:
    """Counts per patient are binomial, also for a patient with many records; sizes of draws are binomial too."""
    owners = np.concatenate([np.arange(PATIENTS), np.zeros(200, dtype=np.int64)])
    loader = PoissonLoader(table_records(owners), RATE, repeatable())

    draws = np.zeros((STEPS, PATIENTS))
    for row in draws:
        row[loader.draw()] = 1

    variance = RATE * (1 - RATE)
    assert abs(draws.sum() - RATE * draws.size) < 4 * math.sqrt(draws.size * variance)
    for counts, trials in ((draws.sum(axis=0), STEPS), (draws.sum(axis=1), PATIENTS)):
        # Chi-squared over cells that are nearly normal: too large means other rates, too small means dependence.
        statistic = ((counts - RATE * trials) ** 2).sum() / (trials * variance)
        assert 0.001 < stats.chi2.sf(statistic, len(counts)) < 0.999


def test_draws_may_be_empty_and_are_never_filled_up() -> None:
    """At a small rate most draws are empty; a loader that redraws them is not Poisson."""
    loader = PoissonLoader(table_records([0, 1, 2]), 0.01, repeatable())

    sizes = [len(loader.draw()) for _ in range(1000)]

    expected = (1 - 0.01) ** 3 * 1000
    assert abs(sizes.count(0) - expected) < 5 * math.sqrt(expected * (1 - expected / 1000))


def test_rate_one_draws_everybody() -> None:
    """No draw is cut, however large."""
    loader = PoissonLoader(table_records(np.arange(5000)), 1.0, repeatable())

    np.testing.assert_array_equal(loader.draw(), np.arange(5000))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    """NaN compares false with everything; the check is written so that it fails."""
    with pytest.raises(ConfigError, match="sample rate"):
        PoissonLoader(table_records([0]), rate, repeatable())
