"""The reported figure: against published values, and against dp-accounting's PLD."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from opacus.accountants import PRVAccountant

from auditor.recompute import recompute
from shared_models.errors import ConfigError
from shared_models.privacy import accounting
from shared_models.privacy.accounting import reported_epsilon
from shared_models.privacy.mechanisms import (
    GaussianRelease,
    PoissonGaussian,
    best_order,
    filter_epsilon,
    renyi_divergence,
)

DELTA = 1e-5
TWO_ACCOUNTANTS = 0.02  # PRV reports an upper bound with an error of 0.01; PLD rounds up to a grid of 0.001


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have asked is forgotten."""
    monkeypatch.setattr(accounting, "_known", {})


def steps(q: float, sigma: float, count: int) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=q, noise_multiplier=sigma, steps=count, clip=1.0, expected_batch=10.0)


GOLDEN = steps(0.05, 1.0, 400)


def test_the_golden_figure() -> None:
    """Rate .05, 400 steps, sigma 1, delta 1e-5: epsilon 6.70, by PRV and by PLD; the filter is dearer."""
    reported = reported_epsilon([GOLDEN], DELTA, seconds=60)
    order = best_order([GOLDEN], DELTA)

    assert reported.epsilon == pytest.approx(6.70, abs=TWO_ACCOUNTANTS)
    assert recompute(Counter([GOLDEN]), delta=DELTA, order=order).epsilon_pld == pytest.approx(
        6.70, abs=TWO_ACCOUNTANTS
    )
    assert filter_epsilon(renyi_divergence(GOLDEN, order), order=order, delta=DELTA) > reported.epsilon


@pytest.mark.parametrize(
    "mechanisms",
    [
        [steps(0.2, 8.7, 5)] * 30,
        [steps(0.01, 0.8, 1000)],
        [GaussianRelease(noise_multiplier=2.0, clip=1.0)],
        [steps(0.2, 8.7, 5)] * 20 + [GaussianRelease(noise_multiplier=20.0, clip=1.0)] * 3,
        [steps(0.1, 2.0, 50), steps(0.05, 1.5, 50), steps(0.2, 4.0, 10)],
    ],
    ids=["a study", "little noise", "a release", "a study with releases", "three studies"],
)
def test_prv_and_pld_agree(mechanisms: list[PoissonGaussian | GaussianRelease]) -> None:
    """Two implementations of two methods, and both below RDP's bound."""
    reported = reported_epsilon(mechanisms, DELTA, seconds=60)
    figures = recompute(Counter(mechanisms), delta=DELTA, order=8)

    assert reported.accountant == "PRV (Opacus 1.6.0)"
    assert reported.epsilon == pytest.approx(figures.epsilon_pld, abs=TWO_ACCOUNTANTS)
    assert reported.epsilon <= figures.epsilon_rdp + TWO_ACCOUNTANTS


def test_an_epsilon_says_what_it_holds_for() -> None:
    """Never a bare number."""
    reported = reported_epsilon([GOLDEN], DELTA, seconds=60).model_dump()

    assert reported.pop("epsilon") > 0
    assert reported == {
        "delta": DELTA,
        "unit": "patient",
        "neighbouring": "add or remove one patient",
        "accountant": "PRV (Opacus 1.6.0)",
        "note": "for the schedule as executed, valid if it was fixed in advance",
    }


def test_charging_round_by_round_reports_what_the_whole_costs() -> None:
    """The trap of an engine rebuilt every round: ten rounds' epsilon is not one round's."""
    whole = reported_epsilon([steps(0.05, 1.0, 400)], DELTA, seconds=60)
    rounds = reported_epsilon([steps(0.05, 1.0, 40)] * 10, DELTA, seconds=60)
    one = reported_epsilon([steps(0.05, 1.0, 40)], DELTA, seconds=60)

    assert rounds == whole
    assert one.epsilon < whole.epsilon


def test_the_same_question_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order and grouping of the mechanisms; another delta is another question."""
    first = reported_epsilon([steps(0.05, 1.0, 40)] * 10, DELTA, seconds=60)
    asked = []

    def instead(_history: object, delta: float, _seconds: float) -> tuple[float, str]:
        asked.append(delta)
        return 1.0, ""

    monkeypatch.setattr(accounting, "_prv_within", instead)

    assert reported_epsilon([GOLDEN], DELTA) == first
    assert asked == []
    assert reported_epsilon([GOLDEN], 2 * DELTA).epsilon == 1.0
    assert asked == [2 * DELTA]


def test_of_opacus_an_epsilon_needs_the_accountants_alone(tmp_path: Path) -> None:
    """A hospital that has reported holds no more of Opacus; the figure is Opacus's own; the rest still loads."""
    whole = PRVAccountant()
    whole.history = [(1.0, 0.05, 400)]
    code = (
        "import sys, client.app\n"
        "from shared_models.privacy.accounting import reported_epsilon\n"
        "from shared_models.privacy.mechanisms import PoissonGaussian\n"
        f"print(reported_epsilon([{GOLDEN!r}], {DELTA}, seconds=60).epsilon)\n"
        "print([name for name in sys.modules if name.startswith(('opacus', 'torch.distributed.tensor'))])\n"
        "from opacus.grad_sample import GradSampleModule\n"
    )

    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    epsilon, of_opacus = found.stdout.splitlines()
    assert float(epsilon) == whole.get_epsilon(DELTA)
    assert of_opacus == "[]"


def test_a_slow_prv_gives_way_to_rdp_and_says_so() -> None:
    """A million different steps would take minutes; the answer comes in time, larger, and labelled."""
    started = time.monotonic()

    reported = reported_epsilon([steps(0.001, 1.0, 1_000_000)] * 3, DELTA, seconds=0.2)

    assert time.monotonic() - started < 5
    assert reported.accountant == "RDP (Opacus 1.6.0); PRV took longer than 0.2 s"
    assert reported.epsilon == pytest.approx(
        recompute(Counter([steps(0.001, 1.0, 1_000_000)] * 3), delta=DELTA, order=8).epsilon_rdp, rel=0.01
    )


def test_a_prv_that_fails_gives_way_to_rdp() -> None:
    """Opacus's grid cannot hold so large a loss."""
    assert reported_epsilon([steps(0.05, 0.03, 400)], DELTA).accountant == "RDP (Opacus 1.6.0); PRV failed"


def test_the_child_holds_no_file_of_its_parent() -> None:
    """Above all not the ledger's lock: a child that outlived its hospital would keep the next one out."""
    reader, writer = os.pipe()
    child_would_keep_it = os.dup(writer)
    os.set_inheritable(child_would_keep_it, True)
    try:
        reported_epsilon([steps(0.001, 1.0, 1_000_000)] * 3, DELTA, seconds=0.3)
    finally:
        os.close(writer)
        os.close(child_would_keep_it)
    assert os.read(reader, 1) == b""  # end of file: nobody has the other end
    os.close(reader)


def test_nothing_charged_costs_nothing() -> None:
    """Before the first round."""
    assert reported_epsilon([], DELTA).epsilon == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_that_means_nothing_is_refused(delta: float) -> None:
    """NaN compares with nothing, and so fails."""
    with pytest.raises(ConfigError, match="delta"):
        reported_epsilon([GOLDEN], delta)


def test_noise_too_small_for_any_epsilon_is_refused() -> None:
    """Rather than reported as infinity, or as something finite."""
    with pytest.raises(ConfigError, match="no finite epsilon"):
        reported_epsilon([steps(0.5, 1e-160, 1)], DELTA)
