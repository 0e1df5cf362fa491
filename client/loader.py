"""Poisson sampling of patients: the only loader there is, because it is what the accountant assumes."""

import numpy as np
from numpy.typing import NDArray

from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.errors import ConfigError


class PoissonLoader:
    """Draws the patients of one step.

    Guarantees:
        * Each patient takes part in each step with probability ``sample_rate``, independently of every other patient
          and step. One patient more or less changes nobody else's chance.
        * A draw may be empty and may be everybody. It is never filled up, cut, shuffled into epochs or weighted:
          such loaders are not Poisson, and accounting them as Poisson under-states epsilon up to 4.2 times.

    Args:
        records: The training records.
        sample_rate: q in (0, 1], from the study plan.
        random: Source of the coin flips.

    Raises:
        ConfigError: ``sample_rate`` is not in (0, 1].
    """

    def __init__(self, records: Records, sample_rate: float, random: SecureRandom) -> None:
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"sample rate {sample_rate} is not in (0, 1]", hint="Mend the plan's sample_rate.")
        self._patients = records.patient_count
        self._sample_rate = sample_rate
        self._random = random

    def draw(self) -> NDArray[np.int64]:
        """Indices of the patients who take part in one step, ascending; possibly none."""
        return np.flatnonzero(self._random.uniform(self._patients) < self._sample_rate)
