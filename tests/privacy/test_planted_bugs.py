"""Privacy bugs, planted in the code that runs: each is found within one study, and named."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from opacus import grad_sample
from torch import Tensor, nn

from client import cli, dp_sgd
from client.clipping.book_keeping import BookKeeping
from client.clipping.gradients import Gradients
from client.conformance import conform
from client.loader import PoissonLoader
from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.errors import ConformanceError
from shared_models.nets import build, tabular
from shared_models.plan import StudyPlan, read_plan
from tests.federation import changed, make_federation, restart_hospitals

PLAN = read_plan(Path(__file__).parents[2] / "server" / "plans" / "breast-cancer.toml")
PUBLIC_SIZE = 140

Patch = pytest.MonkeyPatch


def failed(plan: StudyPlan = PLAN) -> set[str]:
    """Which checks of the hospital's conformance run fail."""
    found = conform(plan, PUBLIC_SIZE)
    assert not found.holds
    return {check.name for check in found.checks if check.verdict == "failed"}


# In the trainer: found by the hospital's own conformance run


def without_noise(patch: Patch) -> None:
    patch.setattr(dp_sgd, "add_noise", lambda total, **_: total)


def half_the_noise(patch: Patch) -> None:
    right = dp_sgd.local_steps
    patch.setattr(
        dp_sgd, "local_steps", lambda *a, noise_multiplier, **k: right(*a, noise_multiplier=noise_multiplier / 2, **k)
    )


def noise_divided_twice(patch: Patch) -> None:
    """The noise is added to the mean as if it had been divided by the batch already, and divided with it again."""
    right = dp_sgd.add_noise

    def wrong(total: Tensor, *, standard_deviation: float, **rest: Any) -> Tensor:
        expected_batch = PLAN.privacy.sample_rate * PUBLIC_SIZE
        return right(total, standard_deviation=standard_deviation / expected_batch, **rest)

    patch.setattr(dp_sgd, "add_noise", wrong)


def clipped_after_averaging(patch: Patch) -> None:
    right = Gradients.clipped_sum

    def wrong(self: Gradients, patients: NDArray[np.int64], *, clip: float) -> Tensor:
        mean = right(self, patients, clip=float("inf")) / max(len(patients), 1)
        return len(patients) * mean * min(1.0, clip / float(mean.norm()) if len(patients) else 1.0)

    patch.setattr(Gradients, "clipped_sum", wrong)


def clipped_per_record(patch: Patch) -> None:
    """Each record's gradient is clipped, not each patient's: who has three records counts three times."""

    def wrong(self: BookKeeping, total: Tensor, patients: NDArray[np.int64], clip: float) -> None:
        inputs, targets, owners = self._records.select(patients)
        self._keep_books((inputs, targets), np.ones(len(owners), dtype=np.int64))
        factors = self._clip_factors(self._norms(len(owners)), clip)
        for place, records, share in self._shares:
            share.add_to(total[place], factors[records])
        self._forget()

    patch.setattr(BookKeeping, "_add_group", wrong)


class ShuffledLoader(PoissonLoader):
    """Batches of one size, cut from the patients in a random order, epoch after epoch."""

    def __init__(self, records: Records, sample_rate: float, random: SecureRandom) -> None:
        super().__init__(records, sample_rate, random)
        self._left = np.empty(0, dtype=np.int64)

    def draw(self) -> NDArray[np.int64]:
        """The next batch."""
        size = math.ceil(self._patients * self._sample_rate)
        if not len(self._left):
            self._left = np.argsort(self._random.uniform(self._patients))
        batch, self._left = self._left[:size], self._left[size:]
        return np.sort(batch)


def shuffled_batches(patch: Patch) -> None:
    patch.setattr(dp_sgd, "PoissonLoader", ShuffledLoader)


def a_repeated_seed(patch: Patch) -> None:
    """The operating system's entropy is asked for once, when the process begins."""
    key = os.urandom(32)

    def wrong() -> SecureRandom:
        random = SecureRandom(key)
        random._keyed_by_system = True
        return random

    patch.setattr(SecureRandom, "from_system", wrong)


def noise_that_is_not_gaussian(patch: Patch) -> None:
    """Of the right variance, and within bounds: whoever sees a value near the bound knows who was there."""

    def uniform(self: SecureRandom, to: NDArray[np.float64], *, standard_deviation: float) -> None:
        to += standard_deviation * (self.uniform(len(to)) - 0.5) * 12**0.5

    patch.setattr(SecureRandom, "add_gaussian", uniform)


def noise_that_overflows(patch: Patch) -> None:
    patch.setattr(SecureRandom, "add_gaussian", lambda _self, to, **_: to.fill(np.nan))


def a_larger_rate(patch: Patch) -> None:
    class Loader(PoissonLoader):
        def __init__(self, records: Records, sample_rate: float, random: SecureRandom) -> None:
            super().__init__(records, min(1.0, 1.2 * sample_rate), random)

    patch.setattr(dp_sgd, "PoissonLoader", Loader)


IN_THE_TRAINER: dict[Callable[[Patch], None], set[str]] = {
    without_noise: {"parameter-noise"},
    half_the_noise: {"parameter-noise", "null-noise"},
    noise_divided_twice: {"parameter-noise"},
    clipped_after_averaging: {"clipping", "patient-share"},
    clipped_per_record: {"clipping"},
    shuffled_batches: {"draws-per-patient", "patients-per-draw"},
    a_repeated_seed: {"fresh-noise"},
    noise_that_is_not_gaussian: {"noise-shape"},
    a_larger_rate: {"sample-rate"},
    noise_that_overflows: {"parameter-noise", "null-noise", "noise-shape"},
}


@pytest.mark.parametrize(("plant", "found"), IN_THE_TRAINER.items(), ids=lambda it: getattr(it, "__name__", ""))
def test_conformance_finds_a_bug_in_the_trainer(
    plant: Callable[[Patch], None], found: set[str], monkeypatch: Patch
) -> None:
    """By the check that is about it; other checks may fail too."""
    plant(monkeypatch)

    assert found <= failed()


def with_batch_norm(patch: Patch) -> None:
    """Somebody adds BatchNorm to the networks, to the list of tested layers, and quietens Opacus."""
    right, wrap = tabular.mlp, grad_sample.GradSampleModule

    def mlp(width: int, hidden: Any, outputs: int) -> nn.Sequential:
        first, *rest = right(width, hidden, outputs)
        return nn.Sequential(first, nn.BatchNorm1d(hidden[0]), *rest)

    patch.setattr(build, "mlp", mlp)
    patch.setattr(build, "SUPPORTED_LAYERS", build.SUPPORTED_LAYERS | {nn.BatchNorm1d})
    patch.setattr(grad_sample, "GradSampleModule", lambda model, **k: wrap(model, **k | {"strict": False}))


def test_conformance_finds_batch_norm(monkeypatch: Patch) -> None:
    """Gradients per patient are not a patient's own there."""
    with_batch_norm(monkeypatch)

    assert failed(changed(PLAN, network={"name": "mlp", "hidden": [8]})) == {"clipping"}


def test_conformance_finds_batch_norm_without_the_self_check(monkeypatch: Patch) -> None:
    """Also where the self-check was switched off with it: one patient moves a step by more than the clip."""
    with_batch_norm(monkeypatch)
    monkeypatch.setattr(dp_sgd, "self_check", lambda *_, **__: None)

    assert failed(changed(PLAN, network={"name": "mlp", "hidden": [8]})) == {"clipping"}


def test_the_command_refuses_a_trainer_that_fails(tmp_path: Path, monkeypatch: Patch) -> None:
    """It names what is wrong, signs it all the same, and ends with an error."""
    federation = make_federation(tmp_path, hospitals=3, rounds=1)
    federation.run()
    restart_hospitals()
    without_noise(monkeypatch)

    with pytest.raises(ConformanceError, match="parameter-noise"):
        cli.app(
            ["conformance", str(federation.settings_file("hospital-1")), "--plan", str(tmp_path / "study.toml")],
            standalone_mode=False,
        )

    entry = federation.ledger("hospital-1")[-1]
    assert entry.conformance is not None
    assert "parameter-noise" in {check.name for check in entry.conformance.checks if check.verdict == "failed"}
