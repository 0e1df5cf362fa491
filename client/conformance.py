"""Does the installed trainer do what the ledger says? A rehearsal on made-up records, and tests of what it did.

No patient's record is read, no budget is spent. The records are canaries: each patient's gradient points along one
coordinate that no other patient moves, so that what one patient contributed to a round, and the noise beside it, can be
told apart exactly. The real ``train`` runs for the plan's rounds; records that note who was drawn stand in its place
for records, and nothing else is replaced.
"""

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy  # type: ignore[import-untyped]  # ships no types; loads its parts when they are used
import torch
from numpy.typing import NDArray

from client import dp_sgd
from client.own_noise import Noted
from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.encoding import NULL_COORDINATES
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network
from shared_models.plan import LogisticRegression, StudyPlan, TrainingPlan
from shared_models.privacy.accounting import reported_epsilon
from shared_models.privacy.conformance import CanaryAudit, Check, Conformance, Verdict
from shared_models.privacy.empirical import (
    CONFIDENCE,
    Guesses,
    best_number_of_guesses,
    binomial_dispersion,
    binomial_rate,
    guess,
    noise_repetition,
    noise_shape,
    noise_spread,
    one_run_bound,
    one_run_p_value,
    smallest_ratio_found,
)
from shared_models.privacy.mechanisms import PoissonGaussian, training_mechanism
from shared_models.software import folder_digest
from shared_models.tasks import Choice, Numeric, TableInput, Task, task_of
from shared_models.update import trainable

CANARIES = 800  # a multiple of 8
LONGEST = 2000  # steps that are rehearsed at most, over all rounds
FALSE_ALARM = 1e-6  # of a whole run, over all its tests
_TESTS = 14  # p-values that are held against a share of it; those with a harmless side count twice
_RECORDS = (1, 1, 1, 1, 1, 1, 1, 3)  # of the first, second, ... canary, over and over: who has several counts once
_LENGTH = 30.0  # of a canary's input at least: what is lost to the bias is 1 / 1800 of its gradient
_ONE_STEP = 5  # rounds of a single step, for the shape of its noise: sums over steps look Gaussian whatever it is
_SIMULATIONS = 8  # of what the plan claims, for the power
_TOLERANCE = 1e-4  # of clipping, relative: float32


@dataclass(frozen=True, eq=False)
class WatchedRecords(Records):
    """Records that note which patients were asked for: one entry for each draw that was not empty."""

    draws: list[NDArray[np.int64]] = field(default_factory=list)

    def select(self, patients: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
        """As of any records."""
        self.draws.append(patients.copy())
        return super().select(patients)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a rehearsal did, in units of the clip C: of the sum before it was divided and scaled.

    Attributes:
        mechanism: Of one round, as it would be charged.
        included: Which canaries were among the records, shape ``(canaries,)``.
        sums: What each round summed up on each canary's coordinate, noise and all, shape ``(rounds, canaries)``.
        null: The same on the null coordinates, shape ``(rounds, NULL_COORDINATES)``.
        drawn: How often each canary was drawn in each round, shape ``(rounds, canaries)``.
        sizes: How many patients each step drew, shape ``(rounds * steps,)``.
        share: What a patient that is drawn once adds to its coordinate where clipping is right; a little below 1.
    """

    mechanism: PoissonGaussian
    included: NDArray[np.bool_]
    sums: NDArray[np.float64]
    null: NDArray[np.float64]
    drawn: NDArray[np.int64]
    sizes: NDArray[np.int64]
    share: float

    @property
    def deviation(self) -> float:
        """Claimed standard deviation of a round's noise, in units of C."""
        return self.mechanism.noise_multiplier * math.sqrt(self.mechanism.steps)

    @property
    def noise(self) -> NDArray[np.float64]:
        """What is left of ``sums`` without the patients' shares, over the claimed deviation: standard normal."""
        return (self.sums - self.share * self.drawn) / self.deviation


def conform(
    plan: StudyPlan, public_size: int, *, device: str | torch.device = "cpu", noted: Noted | None = None
) -> Conformance:
    """Test the installed trainer against a plan.

    Guarantees:
        * Where the trainer does what its charges say, all checks hold with probability at least 1 - ``FALSE_ALARM``.
        * No record of a patient is read; ledger and budget are not touched.

    Args:
        plan: Its mechanism and steps are rehearsed for its rounds: two at least, and ``LONGEST`` steps in all at most.
        public_size: The hospital's, declared; with the sample rate it is the denominator.
        device: Where gradients are computed.
        noted: The noise of this plan's real rounds here, if there were any.

    Raises:
        ConfigError: The plan's task is not installed, or its network cannot be built for it.
    """
    steps = min(plan.training.steps, LONGEST // 2)
    rounds = max(2, min(plan.rounds, LONGEST // steps))
    mechanism = training_mechanism(plan, public_size).model_copy(update={"steps": steps})
    seen = rehearse(plan, mechanism, rounds, device=device)
    one_step = rehearse(plan, mechanism.model_copy(update={"steps": 1}), _ONE_STEP, device=device)
    canaries, claim = _audited(seen, plan.privacy.delta)
    return Conformance(
        rounds=rounds,
        steps=steps,
        checks=(*_draws(seen), _clipping(plan, device), *_noise(seen), _shape(one_step), claim, *_real_rounds(noted)),
        canaries=canaries,
        false_alarm=FALSE_ALARM,
        noise_ratio_found=smallest_ratio_found(seen.sums.size, false_alarm=FALSE_ALARM / _TESTS),
        trainer_digest=folder_digest(Path(__file__).parent),
    )


def rehearse(plan: StudyPlan, mechanism: PoissonGaussian, rounds: int, *, device: str | torch.device) -> Rehearsal:
    """Train on canaries with the plan's mechanism, each round from zero and with a generator of its own."""
    coins = np.frombuffer(os.urandom(CANARIES // 8), np.uint8)  # not from the generator that is under test
    included = np.unpackbits(coins).astype(np.bool_)
    records, length, signs = _canary_records(included, mechanism.clip)
    task = _canary_task()
    training = _canary_training(plan, mechanism, length)
    model = build_network(LogisticRegression(name="logistic-regression"), task, seed=0)
    unit = -mechanism.expected_batch / (training.learning_rate * mechanism.clip)  # a step goes down the gradient
    sums, null = np.empty((rounds, CANARIES)), np.zeros((rounds, NULL_COORDINATES))
    drawn, sizes = np.zeros((rounds, CANARIES), dtype=np.int64), np.zeros((rounds, mechanism.steps), dtype=np.int64)
    for number in range(rounds):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        records.draws.clear()
        dp_sgd.train(
            model,
            records,
            task,
            training=training,
            privacy=plan.privacy,
            expected_batch=mechanism.expected_batch,
            random=SecureRandom.from_system(),
            device=device,
            micro_batch=len(records) + 1,  # so that one draw is asked for at once
            null=null[number],
        )
        weight, _ = model.parameters()
        sums[number] = weight.detach().cpu().double().numpy()[0] * unit * signs
        for step, patients in enumerate(records.draws[: mechanism.steps]):
            sizes[number, step] = len(patients)
        drawn[number, included] = np.bincount(
            np.concatenate([*records.draws, np.empty(0, np.int64)]), minlength=records.patient_count
        )
    share = length / math.sqrt(length**2 + 1)
    return Rehearsal(
        mechanism=mechanism,
        included=included,
        sums=_sent(sums),
        null=_sent(null * unit),
        drawn=drawn,
        sizes=sizes.ravel(),
        share=share,
    )


def _sent(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What would leave: a number that is not finite leaves as zero."""
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _canary_records(included: NDArray[np.bool_], clip: float) -> tuple[WatchedRecords, float, NDArray[np.float64]]:
    """Records of the canaries that are in: inputs along one coordinate each, so long that every gradient is clipped.

    Returns:
        The records, the inputs' length, and the sign with which each canary's gradient enters its coordinate.
    """
    length = max(_LENGTH, 8 * clip)  # at a network of zeros the gradient is half as long, and a little more is lost
    inside = np.flatnonzero(included)
    counts = np.resize(_RECORDS, len(inside))
    patients = np.repeat(np.arange(len(inside)), counts)
    targets = np.arange(CANARIES) % 2  # half of them pull the bias the other way
    inputs = torch.zeros(len(patients), CANARIES)
    inputs[torch.arange(len(patients)), torch.from_numpy(inside[patients])] = length
    labels = torch.from_numpy(targets[inside[patients]]).float()
    return WatchedRecords(inputs, labels, patients, len(inside)), length, (1 - 2 * targets).astype(np.float64)


def _canary_task() -> Task:
    """A table with one column for each canary."""
    columns = tuple(Numeric(name=f"canary-{i}", unit="1", low=-1, high=1) for i in range(CANARIES))
    return Task(
        name="canaries",
        description="Made up: no patient stands behind any of it.",
        input=TableInput(columns=columns),
        heads=(Choice(name="label", classes=("out", "in")),),
    )


def _canary_training(plan: StudyPlan, mechanism: PoissonGaussian, length: float) -> TrainingPlan:
    """The plan's training at a learning rate so small that no canary is learnt within a round.

    The learning rate scales what leaves and costs nothing; it must not change what is tested. The proximal term, which
    depends on no record, is left out for the same reason.
    """
    reach = mechanism.clip * (mechanism.steps + 8 * mechanism.noise_multiplier * math.sqrt(mechanism.steps))
    rate = min(plan.training.learning_rate, 0.5 * mechanism.expected_batch / (length * reach))
    return TrainingPlan(learning_rate=rate, steps=mechanism.steps)


def _draws(seen: Rehearsal) -> Iterator[Check]:
    """Poisson sampling: the rate, how counts vary from patient to patient, and how sizes do from step to step.

    Fixed sizes make sizes vary too little, epochs make counts do; patients who are drawn together make sizes vary too
    much, draws that come back make counts do.
    """
    q, steps, patients = seen.mechanism.sample_rate, len(seen.sizes), int(seen.included.sum())
    total = int(seen.drawn.sum())
    rate = binomial_rate(total, steps * patients, q) if total <= steps * patients else 0.0
    yield _check("sample-rate", total / (steps * patients), rate, expected=q)
    ratio, p_value = binomial_dispersion(seen.drawn.sum(axis=0)[seen.included], steps, q)
    yield _check("draws-per-patient", ratio, p_value, expected=1)
    ratio, p_value = binomial_dispersion(seen.sizes, patients, q)
    yield _check("patients-per-draw", ratio, p_value, expected=1)


def _noise(seen: Rehearsal) -> Iterator[Check]:
    """What one patient adds, and what is left of every coordinate without it: noise of the claimed variance, fresh."""
    deviation = seen.deviation
    weight = float((seen.drawn**2).sum())
    if weight:
        share = float((seen.sums * seen.drawn).sum()) / weight
        score = (share - seen.share) * math.sqrt(weight) / deviation
        too_much, too_little = float(scipy.stats.norm.sf(score)), float(scipy.stats.norm.cdf(score))
        yield _sided("patient-share", share, seen.share, critical=too_much, harmless=too_little)
    left, null = seen.noise, seen.null / deviation
    for name, noise in (("parameter-noise", left), ("null-noise", null)):
        found = noise_spread(float((noise**2).sum()), noise.size)
        yield _sided(name, found.ratio, 1, critical=found.too_small, harmless=found.too_large)
    width = min(left.shape[1], null.shape[1])
    repeated = noise_repetition(np.concatenate([left[:, :width], null[:, :width]]))
    yield _check("fresh-noise", repeated.correlation, repeated.p_value)


def _real_rounds(noted: Noted | None) -> Iterator[Check]:
    """The null coordinates of the plan's real rounds, before they were masked."""
    if noted and noted.coordinates:
        found = noise_spread(noted.statistic, noted.coordinates)
        yield _sided("real-rounds-noise", found.ratio, 1, critical=found.too_small, harmless=found.too_large)


def _shape(one_step: Rehearsal) -> Check:
    """The distribution of the noise of one step, on parameters and null coordinates."""
    noise = np.concatenate([one_step.noise.ravel(), one_step.null.ravel() / one_step.deviation])
    return _check("noise-shape", *noise_shape(noise))


def _clipping(plan: StudyPlan, device: str | torch.device) -> Check:
    """The plan's own network: gradients by brute force, and a real step with and without each patient.

    Made-up records of four patients, some with several; once at C, once where the clip binds for everybody.
    """
    task, clip = task_of(plan), plan.privacy.clip
    try:
        model = build_network(plan.network, task, seed=plan.seed)
        dp_sgd.self_check(model, task, clip=clip)
        largest = max(_largest_share(model, task, limit, device) for limit in (clip, clip * 1e-3))
    except ConfigError as error:
        return Check(name="clipping", statistic=0, expected=1, verdict="failed", reason=str(error)[:200])
    verdict: Verdict = "holds" if largest <= 1 + _TOLERANCE else "failed"
    return Check(name="clipping", statistic=largest, expected=1, verdict=verdict)


def _largest_share(model: torch.nn.Module, task: Task, clip: float, device: str | torch.device) -> float:
    """The most by which leaving out one patient moves a step's sum, over the clip."""
    records = dp_sgd.made_up_records(task, torch.Generator().manual_seed(1))
    everybody = _step(model, records, task, clip, device)
    moved = (everybody - _step(model, _without(records, p), task, clip, device) for p in range(records.patient_count))
    return max(float(np.linalg.norm(difference)) for difference in moved)


def _step(
    model: torch.nn.Module, records: Records, task: Task, clip: float, device: str | torch.device
) -> NDArray[np.float64]:
    """Where one step without noise, with everybody drawn, takes a copy of a network, in units of the clip."""
    trial = copy.deepcopy(model).to(device)
    before = torch.nn.utils.parameters_to_vector(trainable(trial).values()).detach().double()
    dp_sgd.local_steps(
        trial,
        records,
        task,
        steps=1,
        learning_rate=1 / clip,
        clip=clip,
        noise_multiplier=0.0,
        sample_rate=1.0,
        expected_batch=1.0,
        random=SecureRandom.from_system(),
        device=device,
        micro_batch=2,
    )
    after = torch.nn.utils.parameters_to_vector(trainable(trial).values()).detach().double()
    return (after - before).cpu().numpy()


def _without(records: Records, patient: int) -> Records:
    """Everybody's records but one patient's."""
    rows = np.flatnonzero(records.patients != patient)
    _, patients = np.unique(records.patients[rows], return_inverse=True)
    chosen = torch.from_numpy(rows)
    return Records(records.inputs[chosen], records.targets[chosen], patients, records.patient_count - 1)


def _audited(seen: Rehearsal, delta: float) -> tuple[CanaryAudit, Check]:
    """Guess from what left each round which canaries were in; how often that is right bounds epsilon from below."""
    rounds = len(seen.sums)
    claimed = reported_epsilon([seen.mechanism] * rounds, delta).epsilon
    made, expected = best_number_of_guesses(list(_simulated(seen)), delta=delta)
    guesses = guess(_scores(seen, seen.sums), seen.included, made=made)
    p_value = one_run_p_value(guesses, epsilon=claimed, delta=delta)
    lower = one_run_bound(guesses, delta=delta)
    audit = CanaryAudit(
        canaries=guesses.canaries,
        guesses=guesses.made,
        correct=guesses.correct,
        epsilon_lower=lower,
        confidence=CONFIDENCE,
        epsilon_claimed=claimed,
        delta=delta,
        epsilon_expected=expected,
        epsilon_most=one_run_bound(Guesses(guesses.canaries, made, made), delta=delta),
    )
    return audit, _check("canaries", lower, p_value, expected=expected)


def _simulated(seen: Rehearsal) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Runs of what the plan claims, without a trainer: binomial draws of the canaries that are in, and noise."""
    rng = np.random.default_rng(0)  # of a figure for people to read, and of how many guesses are made
    mechanism = seen.mechanism
    for _ in range(_SIMULATIONS):
        included = rng.random(CANARIES) < 0.5
        drawn = rng.binomial(mechanism.steps, mechanism.sample_rate, seen.sums.shape) * included
        yield _scores(seen, seen.share * drawn + rng.normal(scale=seen.deviation, size=seen.sums.shape)), included


def _scores(seen: Rehearsal, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each canary the log-likelihood ratio of being in, given all rounds: no other score tells more.

    Of a round that drew it k times of T, its coordinate is k plus noise; k is binomial.
    """
    steps, q = seen.mechanism.steps, seen.mechanism.sample_rate
    few, many = scipy.stats.binom.ppf([1e-9, 1 - 1e-9], steps, q)
    scores = np.zeros(sums.shape)
    times = np.arange(few, many + 1)
    chance = scipy.stats.binom.logpmf(times, steps, q)
    for k, log_chance in zip(seen.share * times, chance, strict=True):
        term = log_chance + k * (2 * sums - k) / (2 * seen.deviation**2)
        scores = np.logaddexp(scores, term) if k > seen.share * few else term
    return scores.sum(axis=0)


def _check(name: str, statistic: float, p_value: float, *, expected: float = 0.0) -> Check:
    """Failed where the p-value is below its share of the false-alarm rate."""
    verdict: Verdict = "holds" if p_value >= FALSE_ALARM / _TESTS else "failed"
    return _written(name, statistic, expected, p_value, verdict)


def _sided(name: str, statistic: float, expected: float, *, critical: float, harmless: float) -> Check:
    """Failed on the side where patients are hurt, a warning on the other."""
    verdict: Verdict = "holds"
    if not harmless >= FALSE_ALARM / _TESTS:
        verdict = "warning"
    if not critical >= FALSE_ALARM / _TESTS:
        verdict = "failed"
    return _written(name, statistic, expected, min(1.0, 2 * min(critical, harmless)), verdict)


def _written(name: str, statistic: float, expected: float, p_value: float, verdict: Verdict) -> Check:
    """A check as the ledger can hold it: without NaN and infinity."""
    finite = float(np.nan_to_num(max(statistic, 0.0), nan=0.0, posinf=1e300))
    return Check(name=name, statistic=finite, expected=expected, p_value=float(np.nan_to_num(p_value)), verdict=verdict)
