"""The noise in this hospital's own updates, before they are weighed and masked: one line per round, for its own eyes.

Sums show the noise of all hospitals together. Here the null coordinates of every real round are held against the charge
while they are still this hospital's alone, and ``konsil-hospital conformance`` tests all of them together.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.evidence import EvidenceFile, read_evidence
from shared_models.errors import LedgerError
from shared_models.plan import TrainingPlan
from shared_models.privacy.empirical import null_variance
from shared_models.privacy.entries import Entry
from shared_models.privacy.mechanisms import PoissonGaussian

log = logging.getLogger("konsil.hospital")

NOISE = "noise.jsonl"


class Noted(NamedTuple):
    """The noise of a study's rounds so far.

    Attributes:
        statistic: Sum over all null coordinates of (noise / claimed standard deviation) squared.
        coordinates: How many there were.
    """

    statistic: float
    coordinates: int


def note_noise(
    state: Path, charge: Entry, mechanism: PoissonGaussian, training: TrainingPlan, null: NDArray[np.float64]
) -> None:
    """Note how large the noise of a round was. It depends on no record, and whether it can be written changes nothing.

    Args:
        state: The hospital's state folder.
        charge: Of this round.
        mechanism: What was charged.
        training: Of this round.
        null: Null coordinates of the update, in model units.
    """
    sent = np.nan_to_num(null, nan=0.0, posinf=0.0, neginf=0.0)  # as it will be before it is masked
    statistic = float((sent**2).sum() / null_variance(training, mechanism))
    try:
        EvidenceFile(state / NOISE, largest=2**63).write(
            study=charge.study, plan_digest=charge.plan_digest, statistic=statistic, coordinates=len(null)
        )
    except LedgerError as error:
        log.warning("the noise of round %s was not noted: %s", charge.round, error)


def noted_noise(state: Path, plan_digest: str) -> Noted:
    """The noise of all rounds that were trained here for a plan.

    Raises:
        LedgerError: The file is damaged.
    """
    lines = [line for line in read_evidence(state / NOISE) if line.get("plan_digest") == plan_digest]
    return Noted(sum(line["statistic"] for line in lines), sum(line["coordinates"] for line in lines))
