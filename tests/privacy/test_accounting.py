"""The reported figure: against published values, and against dp-accounting's PLD."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
MANY = steps(0.001, 1.0, 1_000_000)  # a grid of seven million points


def test_the_golden_figure() -> None:
    """Rate .05, 400 steps, sigma 1, delta 1e-5: epsilon 6.70, by PRV and by PLD; the filter is dearer."""
    reported = reported_epsilon([GOLDEN], DELTA)
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
    reported = reported_epsilon(mechanisms, DELTA)
    figures = recompute(Counter(mechanisms), delta=DELTA, order=8)

    assert reported.accountant == "PRV (Opacus 1.6.0)"
    assert reported.epsilon == pytest.approx(figures.epsilon_pld, abs=TWO_ACCOUNTANTS)
    assert reported.epsilon <= figures.epsilon_rdp + TWO_ACCOUNTANTS


def test_an_epsilon_says_what_it_holds_for() -> None:
    """Never a bare number."""
    reported = reported_epsilon([GOLDEN], DELTA).model_dump()

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
    whole = reported_epsilon([steps(0.05, 1.0, 400)], DELTA)
    rounds = reported_epsilon([steps(0.05, 1.0, 40)] * 10, DELTA)
    one = reported_epsilon([steps(0.05, 1.0, 40)], DELTA)

    assert rounds == whole
    assert one.epsilon < whole.epsilon


def test_the_same_question_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order and grouping of the mechanisms; another delta is another question."""
    first = reported_epsilon([steps(0.05, 1.0, 40)] * 10, DELTA)
    asked = []

    def instead(_history: object, delta: float) -> tuple[float, str]:
        asked.append(delta)
        return 1.0, ""

    monkeypatch.setattr(accounting, "_prv", instead)

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
        f"print(reported_epsilon([{GOLDEN!r}], {DELTA}).epsilon)\n"
        "print([name for name in sys.modules if name.startswith(('opacus', 'torch.distributed.tensor'))])\n"
        "from opacus.grad_sample import GradSampleModule\n"
    )

    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    epsilon, of_opacus = found.stdout.splitlines()
    assert float(epsilon) == whole.get_epsilon(DELTA)
    assert of_opacus == "[]"


def test_a_grid_that_is_too_large_gives_way_to_rdp_and_says_so() -> None:
    """Three million steps would take a quarter of a minute: counted in points before anything is computed on them."""
    reported = reported_epsilon([MANY] * 3, DELTA)

    assert reported.accountant == "RDP (Opacus 1.6.0); PRV would need a grid of more than 8000000 points"
    assert reported.epsilon == pytest.approx(recompute(Counter([MANY] * 3), delta=DELTA, order=8).epsilon_rdp, rel=0.01)


def test_a_busy_machine_does_not_change_the_accountant() -> None:
    """A child that had to wait for longer than it computes answers all the same, by PRV and with the same figure."""
    alone = reported_epsilon([GOLDEN], DELTA)
    accounting._known.clear()

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(reported_epsilon, [GOLDEN], DELTA)
        child = _child()
        os.kill(child, signal.SIGSTOP)
        time.sleep(2)
        os.kill(child, signal.SIGCONT)
        delayed = asked.result(timeout=60)

    assert delayed == alone
    assert delayed.accountant == "PRV (Opacus 1.6.0)"


def test_a_child_that_never_computes_gives_way_to_rdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have inherited a lock that nobody gives back; it is ended, and the answer says so."""
    monkeypatch.setattr(accounting, "_STILL_S", 0.3)

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(reported_epsilon, [MANY], DELTA)
        child = _child()
        os.kill(child, signal.SIGSTOP)
        reported = asked.result(timeout=60)

    assert reported.accountant == "RDP (Opacus 1.6.0); PRV stood still"
    assert not Path(f"/proc/{child}").exists()


def _child() -> int:
    """The process that computes, once there is one."""
    while not (children := multiprocessing.active_children()):
        time.sleep(0.001)
    return children[0].pid or 0


def test_a_prv_that_fails_gives_way_to_rdp() -> None:
    """So small a delta is below what adding up so many cells rounds away: Opacus says so, and gives no figure."""
    assert reported_epsilon([steps(0.2, 8.7, 5)], 1e-16).accountant == "RDP (Opacus 1.6.0); PRV failed"


def test_the_child_holds_no_file_of_its_parent() -> None:
    """Above all not the ledger's lock: a child that outlived its hospital would keep the next one out."""
    reader, writer = os.pipe()
    child_would_keep_it = os.dup(writer)
    os.set_inheritable(child_would_keep_it, True)

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(reported_epsilon, [MANY], DELTA)
        child = _child()
        os.close(writer)
        os.close(child_would_keep_it)
        assert os.read(reader, 1) == b""  # end of file: nobody has the other end
        assert Path(f"/proc/{child}").exists()
        asked.result(timeout=60)

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
