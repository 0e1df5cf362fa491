"""The auditor's figures, against published ones and against the hospital's."""

from collections import Counter
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.recompute import filter_epsilon, recompute, report_budget
from client.budget import Budget
from shared_models.errors import LedgerError
from shared_models.privacy import mechanisms as ours
from shared_models.privacy.ledger import Ledger
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian
from tests.client.test_budget import TERMS, charge, plan

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def steps(q: float, sigma: float, count: int) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=q, noise_multiplier=sigma, steps=count, clip=1.0, expected_batch=10.0)


def test_the_golden_figure() -> None:
    """Rate .05, 400 steps, sigma 1, delta 1e-5: 6.70 by PLD; RDP and the filter above it, in this order."""
    figures = recompute(Counter([steps(0.05, 1.0, 400)]), delta=1e-5, order=4)

    assert figures.epsilon_pld == pytest.approx(6.70, abs=0.02)
    assert figures.epsilon_pld < figures.epsilon_rdp <= figures.epsilon_filter


@pytest.mark.parametrize("order", [2, 4, 20, 64])
def test_two_implementations_of_the_filter_agree(order: int) -> None:
    """Ours in closed form at the hospital, Google's at the auditor."""
    spent: list[PoissonGaussian | GaussianRelease] = [steps(0.2, 8.0, 5)] * 12
    spent += [steps(0.05, 2.0, 30), GaussianRelease(noise_multiplier=30.0, clip=1.0)]
    rho = ours.total_divergence(spent, order)

    assert filter_epsilon(Counter(spent), delta=1e-4, order=order) == pytest.approx(
        ours.filter_epsilon(rho, order=order, delta=1e-4), rel=1e-9
    )


def test_charges_one_by_one_cost_what_the_whole_costs() -> None:
    """Equal ones are grouped; their clip and batch do not enter the price."""
    whole = recompute(Counter([steps(0.05, 1.0, 400)]), delta=1e-5, order=4)
    parts = recompute(Counter([steps(0.05, 1.0, 40)] * 10), delta=1e-5, order=4)

    assert parts.model_dump(exclude={"charges"}) == whole.model_dump(exclude={"charges"})
    assert parts.charges == 10


def test_nothing_spent_costs_nothing() -> None:
    """By any accountant."""
    figures = recompute(Counter(), delta=1e-5, order=4)

    assert (figures.epsilon_filter, figures.epsilon_pld, figures.epsilon_rdp) == (0, 0, 0)


def test_the_report_agrees_with_the_hospital(tmp_path: Path) -> None:
    """Per study and in total, spent and left; every figure with what it holds for."""
    heart, lungs = plan("heart"), plan("lungs", noise_multiplier=20.0)
    with Ledger.create(tmp_path / "l", KEY, hospital="north") as ledger:
        budget = Budget.open(ledger, **TERMS)
        budget.approve(heart)
        budget.approve(lungs)
        for number in range(1, 6):
            charge(budget, heart, number)
        charge(budget, lungs, 1)
        budget.finish("heart")

        report = report_budget(ledger.entries())

        assert report.hospital == "north"
        assert report.spent.epsilon_filter == pytest.approx(budget.filter_spent(), rel=1e-9)
        assert report.left == pytest.approx(budget.left(), rel=1e-9)
        assert {study.study: study.open for study in report.studies} == {"heart": False, "lungs": True}
        for study in report.studies:
            assert study.spent.epsilon_filter == pytest.approx(budget.filter_spent(study.study), rel=1e-9)
            assert study.spent.delta == budget.studies()[study.study]
    assert report.spent.unit == "patient"
    assert report.spent.neighbouring == "add or remove one patient"


def test_a_ledger_without_a_budget_is_refused() -> None:
    """There is nothing to hold its charges against."""
    with pytest.raises(LedgerError, match="opens no budget"):
        report_budget([])
