"""Do a hospital's own figures agree with those computed again? Its claims, beside the auditor's accountants.

The hospital enforces with its own closed form, and reports by Opacus; the auditor has dp-accounting. So two
implementations stand side by side for every figure, and a disagreement beyond what they promise is a finding.
"""

from collections.abc import Iterator

from auditor.findings import Finding
from auditor.recompute import Figures
from auditor.record import HospitalRecord
from shared_models.privacy.evidence import Claim

# PRV (Opacus) answers with the upper end of an interval of half-width 0.01; PLD rounds every cell of its distribution
# up. Together 0.02 apart at most, and a thousandth of a large epsilon for what thousands of rounded cells add up to.
# Measured on 39 runs up to epsilon 25 and 20,000 steps: 0.004 to 0.011.
TIGHT_TOLERANCE, TIGHT_SLACK = 0.02, 1e-3
FILTER_TOLERANCE = 1e-6  # relative: two implementations of one formula
FILTER_FLOOR = 1e-9  # beside an epsilon of next to nothing


def compare_claims(hospital: HospitalRecord) -> list[Finding]:
    """Hold every claim of a hospital against what its ledger adds up to.

    Guarantees:
        * A claim by PRV is compared with PLD: neither may be ``TIGHT_TOLERANCE`` and ``TIGHT_SLACK`` times epsilon
          beyond the other.
        * A claim by another accountant, such as RDP, is only an upper bound: it must not lie below PLD, nor above the
          RDP figure computed here, by more than that.
        * What the filter enforced must agree within ``FILTER_TOLERANCE``.
        * NaN passes no comparison.

    Returns:
        What does not agree; empty if everything does, and where the ledger does not hold, which is a finding already.
    """
    budget = hospital.budget
    if budget is None:
        return []
    if not hospital.claims:
        return [Finding(code="claim-missing", party=hospital.hospital, what="no figures came with the evidence")]
    computed: dict[str | None, Figures] = {None: budget.spent, **{study.study: study.spent for study in budget.studies}}
    return [found for claim in hospital.claims for found in _compare(hospital, claim, computed.get(claim.study))]


def _compare(hospital: HospitalRecord, claim: Claim, figures: Figures | None) -> Iterator[Finding]:
    if figures is None:
        yield _found(hospital, claim, "claim-of-another-ledger", "it claims a cost for a study that its ledger lacks")
        return
    if claim.charges != figures.charges or claim.delta != figures.delta:
        what = (
            f"it claims {claim.charges} charges at delta {claim.delta:g}; its ledger has {figures.charges} at delta "
            f"{figures.delta:g}"
        )
        yield _found(hospital, claim, "claim-of-another-ledger", what)
        return
    if (
        not abs(claim.epsilon_filter - figures.epsilon_filter)
        <= FILTER_TOLERANCE * figures.epsilon_filter + FILTER_FLOOR
    ):
        what = f"its filter says epsilon {claim.epsilon_filter:.6f}; its ledger gives {figures.epsilon_filter:.6f}"
        yield _found(hospital, claim, "claim-filter-differs", what)
    low, high = figures.epsilon_pld, figures.epsilon_pld if by_prv(claim) else figures.epsilon_rdp
    stated = f"it claims epsilon {claim.epsilon:.4f} by {claim.accountant}"
    if not claim.epsilon >= low - tolerance(low):
        yield _found(hospital, claim, "claim-too-low", f"{stated}; PLD gives {low:.4f}")
    elif not claim.epsilon <= high + tolerance(high):
        other = "PLD" if by_prv(claim) else "RDP"
        yield _found(hospital, claim, "claim-too-high", f"{stated}; {other} gives {high:.4f}")


def by_prv(claim: Claim) -> bool:
    """Whether a claim is by the accountant that is as tight as PLD; any other is taken for RDP."""
    return claim.accountant.startswith("PRV")


def tolerance(epsilon: float) -> float:
    """How far two tight accountants may be apart."""
    return TIGHT_TOLERANCE + TIGHT_SLACK * epsilon


def _found(hospital: HospitalRecord, claim: Claim, code: str, what: str) -> Finding:
    entry = next(
        (
            line.seq
            for line in reversed(hospital.lines)
            if line.kind == "charge" and (claim.study is None or line.study == claim.study)
        ),
        None,
    )
    return Finding(code=code, party=hospital.hospital, what=what, study=claim.study, entry=entry)
