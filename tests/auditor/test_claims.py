"""What a hospital says beside what is computed again: honest figures agree, and a wrong one is named."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from auditor.claims import FILTER_TOLERANCE, TIGHT_TOLERANCE, compare_claims, tolerance
from auditor.recompute import recompute
from auditor.record import HospitalRecord
from shared_models.privacy import mechanisms as ours
from shared_models.privacy.accounting import reported_epsilon
from shared_models.privacy.evidence import Claim
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian
from tests.auditor.made_up import TERMS, Writer, hospital

# Sample rate, noise multiplier, steps: little and much noise, few and many steps, epsilon from 0.3 to 25.
RUNS = [
    (0.1, 8.0, 125),
    (0.004, 0.7, 11_250),
    (0.05, 1.0, 400),
    (0.01, 1.0, 20_000),
    (0.05, 1.0, 3000),
    (1.0, 40.0, 99),
]


def claims(record: HospitalRecord) -> tuple[Claim, ...]:
    """What an honest hospital states: by Opacus, and by its own closed form."""
    made = []
    for study in [*dict.fromkeys(line.study for line in record.lines if line.study), None]:
        spent = [
            line.mechanism
            for line in record.lines
            if line.kind == "charge" and line.mechanism and study in {None, line.study}
        ]
        reported = reported_epsilon(spent, TERMS.delta)
        rho = ours.total_divergence(spent, TERMS.order)
        made.append(
            Claim(
                study=study,
                charges=len(spent),
                epsilon=reported.epsilon,
                epsilon_filter=ours.filter_epsilon(rho, order=TERMS.order, delta=TERMS.delta),
                delta=TERMS.delta,
                accountant=reported.accountant,
            )
        )
    return tuple(made)


@pytest.fixture(scope="module")
def honest() -> HospitalRecord:
    """Two studies, with releases, and what the hospital states of them."""
    writer = Writer("north")
    writer.add("budget-opened")
    writer.study("heart", 30, releases_every=10)
    writer.study("lungs", 5)
    record = hospital("north", writer)
    return replace(record, claims=claims(record))


def changed(record: HospitalRecord, at: int, **fields: object) -> HospitalRecord:
    """The record with one claim changed."""
    made = list(record.claims)
    made[at] = made[at].model_copy(update=fields)
    return replace(record, claims=tuple(made))


def test_an_honest_hospital_agrees(honest: HospitalRecord) -> None:
    """Three claims, by PRV, and nothing to say."""
    assert [claim.study for claim in honest.claims] == ["heart", "lungs", None]
    assert all(claim.accountant.startswith("PRV") for claim in honest.claims)
    assert compare_claims(honest) == []


@pytest.mark.parametrize(("q", "sigma", "steps"), RUNS)
def test_prv_and_pld_are_as_close_as_is_promised(q: float, sigma: float, steps: int) -> None:
    """Opacus's answer is the upper end of its interval: above PLD, by less than the tolerance."""
    mechanism = PoissonGaussian(sample_rate=q, noise_multiplier=sigma, steps=steps, clip=1.0, expected_batch=1.0)
    spent = Counter[PoissonGaussian | GaussianRelease]([mechanism])

    reported = reported_epsilon(spent, 1e-5)
    pld = recompute(spent, delta=1e-5, order=8).epsilon_pld

    assert reported.accountant.startswith("PRV")
    assert 0 < reported.epsilon - pld < TIGHT_TOLERANCE


@pytest.mark.parametrize("study", [0, 2])
@pytest.mark.parametrize(
    ("shift", "code"), [(-1.05, "claim-too-low"), (1.05, "claim-too-high"), (-0.95, None), (0.95, None)]
)
def test_a_claim_beyond_the_tolerance_is_named(honest: HospitalRecord, study: int, shift: float, code: str) -> None:
    """Just beyond it, on either side, with the study and the last charge; just within it, nothing."""
    assert honest.budget is not None
    spent = honest.budget.studies[0].spent if study == 0 else honest.budget.spent
    claimed = spent.epsilon_pld + shift * tolerance(spent.epsilon_pld)

    found = compare_claims(changed(honest, study, epsilon=claimed))

    assert [finding.code for finding in found] == ([code] if code else [])
    for finding in found:
        assert finding.study == honest.claims[study].study
        assert honest.lines[(finding.entry or 0) - 1].kind == "charge"
        assert f"{claimed:.4f}" in finding.what


@pytest.mark.parametrize("factor", [1 + 3 * FILTER_TOLERANCE, 1 - 3 * FILTER_TOLERANCE, 0.0])
def test_another_filter_is_named(honest: HospitalRecord, factor: float) -> None:
    """A part in a million is more than two implementations of one formula differ by."""
    wrong = honest.claims[1].epsilon_filter * factor

    (finding,) = compare_claims(changed(honest, 1, epsilon_filter=wrong))

    assert (finding.code, finding.severity, finding.study) == ("claim-filter-differs", "critical", "lungs")


def test_a_claim_by_rdp_is_compared_with_rdp(honest: HospitalRecord) -> None:
    """RDP is looser: its figure is no overstatement, half of it is an understatement, and more than it is one."""
    assert honest.budget is not None
    figures, said = honest.budget.spent, "RDP (Opacus 1.6.0); PRV would need a grid of more than 8000000 points"

    for epsilon, codes in [
        (figures.epsilon_rdp, []),
        (figures.epsilon_pld, []),
        (figures.epsilon_pld / 2, ["claim-too-low"]),
        (figures.epsilon_rdp + 0.1, ["claim-too-high"]),
    ]:
        found = compare_claims(changed(honest, 2, epsilon=epsilon, accountant=said))
        assert [finding.code for finding in found] == codes
    as_prv = compare_claims(changed(honest, 2, epsilon=figures.epsilon_rdp))
    assert [finding.code for finding in as_prv] == ["claim-too-high"]


@pytest.mark.parametrize("change", [{"charges": 32}, {"delta": 2e-4}, {"study": "kidneys"}])
def test_figures_of_another_ledger_are_named(honest: HospitalRecord, change: dict[str, object]) -> None:
    """Other counts, another delta, a study that is not there: whatever they say is not about this ledger."""
    found = compare_claims(changed(honest, 0, **change))

    assert [finding.code for finding in found] == ["claim-of-another-ledger"]


def test_nan_agrees_with_nothing(honest: HospitalRecord) -> None:
    """A bundle cannot hold it; if it came in another way, it would not pass."""
    found = compare_claims(changed(honest, 0, epsilon=math.nan, epsilon_filter=math.nan))

    assert [finding.code for finding in found] == ["claim-filter-differs", "claim-too-low"]


def test_a_bare_ledger_is_no_fault(honest: HospitalRecord) -> None:
    """There is nothing to compare, which is a note; and of a ledger that does not hold, nothing is said twice."""
    (finding,) = compare_claims(replace(honest, claims=()))

    assert (finding.code, finding.severity) == ("claim-missing", "note")
    assert compare_claims(replace(honest, budget=None)) == []
