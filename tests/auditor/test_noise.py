"""The noise in decoded sums: what hospitals charged is there, or the auditor says so."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from auditor.noise import FALSE_ALARM, NoiseReport, check_noise, noise_reports
from auditor.record import AttemptRecord, HospitalRecord, Line, Turn
from shared_models.plan import StudyPlan, read_plan
from shared_models.privacy.entries import BudgetTerms
from shared_models.privacy.mechanisms import training_mechanism
from tests.federation import changed

PLAN = changed(read_plan(Path(__file__).parents[2] / "server" / "plans" / "breast-cancer.toml"), rounds=40)
SIZES = {"north": 140, "south": 300, "west": 800}  # the last is beyond the plan's weight_cap
D = 1024


def hospital(name: str, plan: StudyPlan = PLAN, *, knows_plan: bool = True) -> HospitalRecord:
    """A hospital that charged every round of the plan once."""
    size, digest = SIZES[name], plan.digest()
    charge = training_mechanism(plan, size)
    lines = [
        Line(n, "2026-11-26T00:00:00.000Z", "charge", "0" * 64, plan.study, n, 1, digest, mechanism=charge)
        for n in range(1, plan.rounds + 1)
    ]
    terms = BudgetTerms(epsilon=1.0, delta=1e-4, order=12, public_size=size)
    plans = {plan.study: plan} if knows_plan else {}
    return HospitalRecord(Path(name), name, "all", terms, None, tuple(lines), (), plans)


def deviation(name: str, plan: StudyPlan, number: int) -> float:
    """What a hospital's null coordinates should have in a round, by simulating its variance step by step."""
    training, privacy, size = plan.training_in(number), plan.privacy, SIZES[name]
    variance = 0.0
    for _ in range(training.steps):
        variance *= (1 - training.learning_rate * training.proximal) ** 2
        step = training.learning_rate * privacy.noise_multiplier * privacy.clip / (privacy.sample_rate * size)
        variance += step**2
    return math.sqrt(variance) * min(1.0, size / plan.weight_cap)


def sums(
    rng: np.random.Generator,
    plan: StudyPlan = PLAN,
    *,
    ratios: dict[str, float] | None = None,
    cell: float = 0.0,
    repeated: dict[str, NDArray[np.float64]] | None = None,
) -> list[AttemptRecord]:
    """Every round's null coordinates; hospitals scale their noise, round to a grid, or repeat themselves."""
    found = []
    for number in range(1, plan.rounds + 1):
        total = np.zeros(D)
        for name in SIZES:
            noise = (repeated or {}).get(name, rng.normal(size=D)) * deviation(name, plan, number)
            noise = noise * (ratios or {}).get(name, 1.0)
            total += np.floor(noise / cell + rng.random(D)) * cell if cell else noise
        names = tuple(SIZES)
        turn = Turn(plan.study, "train", number, 1)
        found.append(AttemptRecord(turn, names, names, names, frozenset({"coordinator"}), tuple(total), 1.0))
    return found


def report(attempts: list[AttemptRecord], plan: StudyPlan = PLAN) -> NoiseReport:
    """Of the only study."""
    (found,) = noise_reports(attempts, [hospital(name, plan) for name in SIZES])
    return found


PLANS = {
    "plain": PLAN,
    "proximal": changed(PLAN, training={"proximal": 0.3}),
    "schedule": changed(PLAN, training={"schedule": {"name": "cosine", "final": 0.1}}),
    "one round": changed(PLAN, rounds=1),
}


@pytest.mark.parametrize("name", PLANS)
def test_noise_as_charged_raises_no_alarm(name: str) -> None:
    """Weights, caps, proximal pull and schedule are all accounted for: a ratio of 1 within five standard errors."""
    plan = PLANS[name]

    found = report(sums(np.random.default_rng(1), plan), plan)

    assert found.findings == ()
    assert found.attempts == plan.rounds
    assert found.ratio is not None
    assert abs(found.ratio - 1) < 5 / math.sqrt(2 * D * plan.rounds)


def test_a_hundred_honest_studies_raise_no_alarm() -> None:
    """The probability of any is below 1e-4."""
    rng, plan = np.random.default_rng(2), changed(PLAN, rounds=5)
    hospitals = [hospital(name, plan) for name in SIZES]

    assert [check_noise(sums(rng, plan), hospitals) for _ in range(100)] == [[]] * 100


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9])
def test_rounding_to_the_grid_is_no_noise_too_much(share: float) -> None:
    """Grid cells up to nine tenths of the noise's deviation only add what rounding adds."""
    least = min(deviation(name, PLAN, 1) for name in SIZES)

    assert report(sums(np.random.default_rng(3), cell=share * least)).findings == ()


def test_noise_that_drowns_in_rounding_is_not_checked() -> None:
    """It is said, and no alarm is raised either way."""
    largest = max(deviation(name, PLAN, 1) for name in SIZES)

    found = report(sums(np.random.default_rng(4), cell=20 * largest))

    assert [finding.code for finding in found.findings] == ["noise-unchecked"]
    assert (found.attempts, found.unchecked) == (0, PLAN.rounds)
    assert found.ratio is None


ALL = dict.fromkeys(SIZES, 1.0)


@pytest.mark.parametrize(
    ("ratios", "code"),
    [
        (dict.fromkeys(SIZES, 0.0), "noise-too-small"),
        (dict.fromkeys(SIZES, 0.5), "noise-too-small"),
        ({"north": 0.0}, "noise-too-small"),
        ({"south": 0.5}, "noise-too-small"),
        (dict.fromkeys(SIZES, 1 / 70), "noise-too-small"),  # divided by the expected batch twice
        ({"north": 2.0}, "noise-too-large"),
    ],
)
def test_other_noise_than_was_charged_is_found(ratios: dict[str, float], code: str) -> None:
    """At every hospital, or at one of three."""
    found = report(sums(np.random.default_rng(5), ratios=ratios))

    assert [(finding.code, finding.study) for finding in found.findings] == [(code, PLAN.study)]


def test_the_smallest_ratio_is_found_as_often_as_is_said() -> None:
    """Noise of the stated ratio, at all hospitals or at the one that adds least, is found in 99 of 100 studies."""
    rng, plan = np.random.default_rng(6), changed(PLAN, rounds=20)
    stated = report(sums(rng, plan), plan)
    least = min(SIZES, key=lambda name: deviation(name, plan, 1))
    assert 0 < stated.share_found < stated.ratio_found < 1

    for ratios in (dict.fromkeys(SIZES, stated.ratio_found), {least: stated.share_found}):
        found = sum(bool(report(sums(rng, plan, ratios=ratios), plan).findings) for _ in range(100))
        assert found >= 94  # fewer than 94 of 100 at probability 0.99: below 1e-4


def test_one_round_without_noise_is_named() -> None:
    """A single bad round of forty hides in the whole, and is found by itself."""
    attempts = sums(np.random.default_rng(7))
    quiet = tuple(0.8 * x for x in attempts[12].null_coordinates)
    attempts[12] = replace(attempts[12], null_coordinates=quiet)

    (found,) = report(attempts).findings

    assert (found.code, found.round, found.attempt) == ("noise-too-small", 13, 1)
    assert found.severity == "critical"


def test_noise_that_comes_back_is_found() -> None:
    """One hospital of three has one seed for all rounds; its variance is right."""
    rng = np.random.default_rng(8)

    found = report(sums(rng, repeated={"north": rng.normal(size=D)}))

    assert "noise-repeated" in {finding.code for finding in found.findings}


@pytest.mark.parametrize("missing", ["bundle", "plan"])
def test_what_is_not_known_is_not_guessed(missing: str) -> None:
    """Without a plan, or a bundle of somebody who uploaded, nothing is tested, and a note says so."""
    attempts = sums(np.random.default_rng(9), ratios=dict.fromkeys(SIZES, 0.0))
    names = list(SIZES)[1:] if missing == "bundle" else list(SIZES)

    found = check_noise(attempts, [hospital(name, knows_plan=missing != "plan") for name in names])

    assert [(finding.code, finding.severity) for finding in found] == [("noise-unchecked", "note")]
    assert f"{PLAN.rounds} of {PLAN.rounds} sums" in found[0].what


def test_only_opened_sums_of_updates_are_looked_at() -> None:
    """Attempts that failed, and released statistics, have no null coordinates."""
    attempt = sums(np.random.default_rng(10))[0]

    closed = replace(attempt, null_coordinates=())
    released = replace(attempt, turn=attempt.turn._replace(purpose="evaluate"))

    assert noise_reports([closed, released], [hospital(name) for name in SIZES]) == []
    assert FALSE_ALARM <= 1e-6
