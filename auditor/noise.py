"""Was noise added? The null coordinates of every decoded sum, against what each uploader's charge claims.

At the end of every update are coordinates that no gradient reaches. Their sum is the hospitals' noise and nothing else,
so its variance is known: it follows from the charges, the plan and the public sizes. This needs no torch.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from auditor.findings import COORDINATOR, Finding
from auditor.record import AttemptRecord, HospitalRecord
from shared_models.plan import StudyPlan
from shared_models.privacy.empirical import noise_repetition, noise_spread, null_variance, smallest_ratio_found
from shared_models.privacy.mechanisms import PoissonGaussian

FALSE_ALARM = 1e-6  # of one study, over all its rounds and tests


class NoiseReport(NamedTuple):
    """The noise in one study's sums.

    Attributes:
        attempts: Opened sums that were tested.
        unchecked: Opened sums whose noise is not known.
        ratio: Observed over claimed standard deviation, over all of them; None where none was tested.
        ratio_found: The largest ratio below 1 that is found with probability 0.99, where all hospitals fall short.
        share_found: The same where a single hospital does, the one that adds least: 0 means that not even a hospital
            without noise would surely be found.
        false_alarm: Of the study, where everything is as claimed.
        findings: What does not hold.
    """

    study: str
    attempts: int
    unchecked: int
    ratio: float | None
    ratio_found: float
    share_found: float
    false_alarm: float
    findings: tuple[Finding, ...]


def check_noise(attempts: Iterable[AttemptRecord], hospitals: Sequence[HospitalRecord]) -> list[Finding]:
    """Test the null coordinates of all studies' sums; see ``noise_reports``.

    Args:
        attempts: As the coordinator's and the hospitals' evidence shows them.
        hospitals: Whose charges and plans say how much noise there should be.
    """
    return [finding for report in noise_reports(attempts, hospitals) for finding in report.findings]


def noise_reports(attempts: Iterable[AttemptRecord], hospitals: Sequence[HospitalRecord]) -> list[NoiseReport]:
    """Test the null coordinates of every study's decoded sums against the charges of those that are in them.

    Guarantees:
        * Where every uploader added the noise that it charged, a study has a finding of noise with probability at most
          ``FALSE_ALARM``: half of it for the variance over all rounds and in each, on both sides, half for noise that
          comes back.
        * Rounding to integers only adds variance. It is allowed for against noise that is too large; to noise that is
          too small it gives nothing away.
        * An update that was shortened to the sum's bound would seem to hold less noise. It takes draws of more than
          1.1 times the expected batch, over a whole round, of patients who all pull the same way; the hospital's log
          counts it.

    Args:
        attempts: Those without null coordinates are passed over.
        hospitals: Whose charges and plans say how much noise there should be.

    Returns:
        One report for each study that has an opened sum.
    """
    known = _Known(hospitals)
    studies: defaultdict[str, list[AttemptRecord]] = defaultdict(list)
    for attempt in attempts:
        if attempt.null_coordinates and attempt.turn.purpose == "train":
            studies[attempt.turn.study].append(attempt)
    return [_report(study, opened, known) for study, opened in sorted(studies.items())]


class _Known:
    """What the hospitals' evidence says about the noise that should be there."""

    def __init__(self, hospitals: Sequence[HospitalRecord]) -> None:
        self._sizes = {hospital.hospital: hospital.terms.public_size for hospital in hospitals}
        self._plans: Mapping[str, StudyPlan] = {
            study: plan for hospital in hospitals for study, plan in hospital.plans.items()
        }
        self._charges = {
            (hospital.hospital, line.study, line.round, line.attempt): line.mechanism
            for hospital in hospitals
            for line in hospital.lines
            if line.kind == "charge" and isinstance(line.mechanism, PoissonGaussian)
        }

    def variances(self, attempt: AttemptRecord) -> list[float]:
        """What each uploader should add to the variance of a null coordinate; empty where it is not known of all."""
        study, _, number, turn = attempt.turn
        plan = self._plans.get(study)
        charges = [self._charges.get((name, study, number, turn)) for name in attempt.uploaders]
        known = [charge for charge in charges if charge is not None]
        if plan is None or len(known) < len(charges):
            return []
        training = plan.training_in(number)
        weights = [min(1.0, self._sizes[name] / plan.weight_cap) for name in attempt.uploaders]
        return [weight**2 * null_variance(training, charge) for weight, charge in zip(weights, known, strict=True)]


class _Tested(NamedTuple):
    """One sum: its noise over the claimed standard deviation, what rounding may add, and the least hospital's share."""

    attempt: AttemptRecord
    noise: NDArray[np.float64]
    rounding: float
    least_share: float

    @property
    def statistic(self) -> float:
        return float((self.noise**2).sum())


def _report(study: str, opened: Sequence[AttemptRecord], known: _Known) -> NoiseReport:
    tested = [found for attempt in opened if (found := _tested(attempt, known.variances(attempt))) is not None]
    unchecked = len(opened) - len(tested)
    findings = list(_findings(tested)) if tested else []
    if unchecked:
        what = f"the noise in {unchecked} of {len(opened)} sums could not be checked"
        findings.append(Finding(code="noise-unchecked", party=COORDINATOR, what=what, study=study))
    coordinates = sum(found.noise.size for found in tested)
    ratio = math.sqrt(sum(found.statistic for found in tested) / coordinates) if tested else None
    least = smallest_ratio_found(coordinates, false_alarm=FALSE_ALARM / 8) if tested else 0.0
    # A hospital that falls short to a ratio r moves the sum's variance by its share times (1 - r^2).
    share = float(np.mean([found.least_share for found in tested])) if tested else 1.0
    alone = math.sqrt(max(0.0, 1 - (1 - least**2) / share))
    return NoiseReport(study, len(tested), unchecked, ratio, least, alone, FALSE_ALARM, tuple(findings))


def _tested(attempt: AttemptRecord, variances: Sequence[float]) -> _Tested | None:
    """A sum over its claimed deviation; None where that is not known, or drowns in rounding."""
    total = math.fsum(variances)
    if not total > 0:
        return None
    noise = np.array(attempt.null_coordinates)
    # A decoded coordinate is a whole number of grid cells: no two of them differ by less than one. Each uploader's
    # rounding adds a quarter of a cell squared to the variance at most.
    gaps = np.diff(np.unique(noise))
    cell = float(gaps.min()) if len(gaps) else 0.0
    if cell**2 > total:
        return None
    rounding = len(variances) * cell**2 / 4 / total
    return _Tested(attempt, noise / math.sqrt(total), rounding, min(variances) / total)


def _findings(tested: Sequence[_Tested]) -> Iterator[Finding]:
    study = tested[0].attempt.turn.study
    coordinates = sum(found.noise.size for found in tested)
    level = FALSE_ALARM / 8  # an eighth for each side, of all rounds together and of single rounds; half is left
    together = noise_spread(
        math.fsum(found.statistic for found in tested), coordinates, rounding=max(found.rounding for found in tested)
    )
    of_all = f"of what was charged, over {len(tested)} rounds and {coordinates} null coordinates"
    if not together.too_small >= level:
        what = f"the noise is {together.ratio:.4f} {of_all} (p = {together.too_small:.1e})"
        yield Finding(code="noise-too-small", party=COORDINATOR, what=what, study=study)
    elif not together.too_large >= level:
        what = f"the noise is {together.ratio:.4f} {of_all} (p = {together.too_large:.1e})"
        yield Finding(code="noise-too-large", party=COORDINATOR, what=what, study=study)
    else:
        yield from _single_rounds(tested, level / len(tested))
    length = min(found.noise.size for found in tested)
    repeated = noise_repetition(np.stack([found.noise[:length] for found in tested]))
    if not repeated.p_value >= FALSE_ALARM / 2:
        what = (
            f"noise comes back in other rounds: correlation {repeated.correlation:.3f} of the most similar two of "
            f"{len(tested)} (p = {repeated.p_value:.1e})"
        )
        yield Finding(code="noise-repeated", party=COORDINATOR, what=what, study=study)


def _single_rounds(tested: Sequence[_Tested], level: float) -> Iterator[Finding]:
    """Rounds that stand out although all together have the noise they should."""
    for found in tested:
        spread = noise_spread(found.statistic, found.noise.size, rounding=found.rounding)
        code, p_value = "noise-too-small", spread.too_small
        if p_value >= level:
            code, p_value = "noise-too-large", spread.too_large
        if not p_value >= level:
            turn = found.attempt.turn
            what = f"the noise of this round is {spread.ratio:.4f} of what was charged (p = {p_value:.1e})"
            yield Finding(
                code=code, party=COORDINATOR, what=what, study=turn.study, round=turn.round, attempt=turn.attempt
            )
