"""Membership inference on a released model: who was trained on? The only file of the auditor that needs torch.

Shadow models, trained on random halves of the records in question, show how a record's confidence differs with and
without it (LiRA). What the attack achieves on the released model bounds epsilon from below; what it achieves on a model
that was trained without privacy says how much it could have found.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from auditor.canaries import Candidates
from shared_models.config import Frozen
from shared_models.errors import ConfigError
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import StudyPlan
from shared_models.privacy.empirical import (
    CONFIDENCE,
    Guesses,
    best_number_of_guesses,
    guess,
    one_run_bound,
    rates_bound,
)
from shared_models.tasks import Task, TokensInput, task_of

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
_BATCH = 4096  # records at once when a model is asked


class Bound(Frozen):
    """A lower bound on epsilon.

    Attributes:
        epsilon_lower: At ``confidence``.
        epsilon_without_privacy: What the same attack shows on a model that was trained without privacy: its power.
        epsilon_most: What it would show if it were right about every record: more it cannot.
    """

    epsilon_lower: float
    epsilon_without_privacy: float
    epsilon_most: float
    confidence: float
    delta: float


class Membership(Frozen):
    """How well an attack tells members from others.

    Attributes:
        auc: Area under the ROC curve; 0.5 is guessing.
        true_positive_rates: At each of ``FALSE_POSITIVE_RATES``.
        auc_without_privacy: Of the same attack on a model that was trained without privacy.
        true_positive_rates_without_privacy: The same.
        by_rates: From true and false positives at one threshold, chosen on half of the records, counted on the other.
        by_guesses: From one run of fair coins; None where membership was not decided by coins.
    """

    members: int
    others: int
    shadows: int
    auc: float
    true_positive_rates: tuple[float, ...]
    auc_without_privacy: float
    true_positive_rates_without_privacy: tuple[float, ...]
    by_rates: Bound
    by_guesses: Bound | None = None

    @property
    def epsilon_lower(self) -> float:
        """The bound to hold a claim against: by coins where there were some, else by rates. One of the two, always."""
        return (self.by_guesses or self.by_rates).epsilon_lower


def attack_model(
    model_file: Path,
    candidates: Candidates,
    *,
    delta: float,
    coin_flips: bool,
    shadows: int,
    steps: int,
    learning_rate: float,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Membership:
    """Attack a released model.

    Guarantees:
        * If every record's membership was decided by a fair coin of its own (``coin_flips``), ``by_guesses`` is a valid
          lower bound with its confidence, whatever the records are.
        * ``by_rates`` is one if members and others are random samples of one population; records that differ in kind
          tell more than membership, and then neither is a statement about privacy.
        * Time is (shadows + 1) times ``steps`` gradient steps of the plan's network.

    Args:
        model_file: A model that carries its plan.
        candidates: Records with known membership, each of another patient.
        delta: What bounds hold at.
        coin_flips: Whether membership was decided by independent fair coins.
        shadows: An even number.
        steps: Of each shadow's training, plain SGD on batches of 32.
        learning_rate: The same.
        threads: Of torch; small networks are fastest with one.
        progress: Told how many models are trained, of how many.

    Raises:
        ConfigError: The file is no model, the records do not fit it, or there are too few shadows.

    Source:
        Carlini et al., arXiv:2112.03570: online LiRA, algorithm 1, with one variance for all records where shadows are
        few, and each record in half of the shadows.
    """
    plan, model = read_model(model_file)
    task = task_of(plan)
    if shadows < 4 or shadows % 2:
        raise ConfigError(f"{shadows} shadow models", hint="An even number of at least 4.")
    torch.set_num_threads(threads)
    data = _tensors(candidates, task)
    confidence = _checked(model, data, task)
    rng = np.random.default_rng(0)  # of shadows and of the split for the threshold; not of membership
    halves = list(_halves(len(candidates.members), shadows, rng))
    unprotected = rng.random(len(candidates.members)) < 0.5  # independent of who really is a member
    seen = []
    for number, included in enumerate((*halves, unprotected), start=1):
        seen.append(_shadow(plan, task, data, included, steps=steps, learning_rate=learning_rate, seed=number))
        progress(number, shadows + 1)
    score = _likelihood_ratio(np.array(seen[:-1]), np.array(halves))
    found, control = score(confidence), score(seen[-1])
    half = rng.permutation(len(found)) < len(found) // 2
    return Membership(
        members=int(candidates.members.sum()),
        others=int((~candidates.members).sum()),
        shadows=shadows,
        auc=_auc(found, candidates.members),
        true_positive_rates=_rates(found, candidates.members),
        auc_without_privacy=_auc(control, unprotected),
        true_positive_rates_without_privacy=_rates(control, unprotected),
        by_rates=_by_rates((found, candidates.members), (control, unprotected), half, delta),
        by_guesses=_by_guesses((found, candidates.members), (control, unprotected), delta) if coin_flips else None,
    )


_Run = tuple[NDArray[np.float64], NDArray[np.bool_]]  # scores, and who really was a member


def _tensors(candidates: Candidates, task: Task) -> tuple[Tensor, Tensor]:
    inputs = torch.from_numpy(candidates.inputs)
    targets = torch.from_numpy(candidates.targets)
    return (
        inputs.long() if isinstance(task.input, TokensInput) else inputs,
        targets.float() if task.outputs == 1 else targets,
    )


def _checked(model: nn.Module, data: tuple[Tensor, Tensor], task: Task) -> NDArray[np.float64]:
    try:
        return _confidence(model, data, task)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"the records do not fit the model: {error}", hint="Use its task's schema.") from None


def _confidence(model: nn.Module, data: tuple[Tensor, Tensor], task: Task) -> NDArray[np.float64]:
    """Of each record the logit of the probability that the model gives to its label: nearly Gaussian over models."""
    model.eval()
    with torch.no_grad():
        losses = torch.cat(
            [
                loss_per_record(task, model(inputs), targets).double()
                for inputs, targets in zip(data[0].split(_BATCH), data[1].split(_BATCH), strict=True)
            ]
        )
    losses = losses.clamp(1e-12, 50)
    found: NDArray[np.float64] = (-losses - torch.log(-torch.expm1(-losses))).numpy()
    return found


def _halves(records: int, shadows: int, rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    """A random half of the records, then the other half, and so on: each record is in half of the shadows."""
    for _ in range(shadows // 2):
        half = rng.permutation(records) < records // 2
        yield half
        yield ~half


def _shadow(
    plan: StudyPlan,
    task: Task,
    data: tuple[Tensor, Tensor],
    included: NDArray[np.bool_],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> NDArray[np.float64]:
    """Train the plan's network on some of the records without privacy; its confidence about all of them."""
    model = build_network(plan.network, task, seed=plan.seed)
    model.train()
    rows = torch.from_numpy(np.flatnonzero(included))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    batches: list[Tensor] = []
    for _ in range(steps):
        batches = batches or list(rows[torch.randperm(len(rows), generator=generator)].split(32))
        batch = batches.pop()
        optimizer.zero_grad()
        loss_per_record(task, model(data[0][batch]), data[1][batch]).mean().backward()
        optimizer.step()
    return _confidence(model, data, task)


def _likelihood_ratio(
    seen: NDArray[np.float64], included: NDArray[np.bool_]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """From the shadows: how much likelier a record's confidence is if it was trained on.

    Args:
        seen: Confidence of each shadow about each record, shape ``(shadows, records)``.
        included: Which records each was trained on.
    """
    with_it = np.where(included, seen, np.nan)
    without = np.where(included, np.nan, seen)
    mean_in, mean_out = np.nanmean(with_it, axis=0), np.nanmean(without, axis=0)
    deviation_in = max(float(np.sqrt(np.nanmean((with_it - mean_in) ** 2))), 1e-6)
    deviation_out = max(float(np.sqrt(np.nanmean((without - mean_out) ** 2))), 1e-6)

    def score(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
        far_in, far_out = (confidence - mean_in) / deviation_in, (confidence - mean_out) / deviation_out
        return np.asarray((far_out**2 - far_in**2) / 2)

    return score


def _auc(scores: NDArray[np.float64], members: NDArray[np.bool_]) -> float:
    """The probability that a member's score is above another's; ties count half."""
    order = np.sort(scores[~members])
    below = np.searchsorted(order, scores[members], "left") + np.searchsorted(order, scores[members], "right")
    return float(below.mean() / 2 / len(order))


def _rates(scores: NDArray[np.float64], members: NDArray[np.bool_]) -> tuple[float, ...]:
    """True positive rates at ``FALSE_POSITIVE_RATES``: with no more false positives than that."""
    others = np.sort(scores[~members])[::-1]
    return tuple(float((scores[members] > others[int(rate * len(others))]).mean()) for rate in FALSE_POSITIVE_RATES)


def _by_rates(run: _Run, control: _Run, half: NDArray[np.bool_], delta: float) -> Bound:
    members, others = int(run[1][~half].sum()), int((~run[1])[~half].sum())
    return Bound(
        epsilon_lower=_threshold_bound(*run, half, delta),
        epsilon_without_privacy=_threshold_bound(*control, half, delta),
        epsilon_most=rates_bound(members, members, 0, others, delta=delta),
        confidence=CONFIDENCE,
        delta=delta,
    )


def _threshold_bound(
    scores: NDArray[np.float64], members: NDArray[np.bool_], half: NDArray[np.bool_], delta: float
) -> float:
    """Choose the threshold that bounds most on one half of the records, and count on the other."""

    def bound(threshold: float, part: NDArray[np.bool_]) -> float:
        called, truth = scores[part] >= threshold, members[part]
        return rates_bound(
            int((called & truth).sum()),
            int(truth.sum()),
            int((called & ~truth).sum()),
            int((~truth).sum()),
            delta=delta,
        )

    thresholds = np.quantile(scores[half], np.linspace(0.01, 0.99, 99))
    best = max(thresholds, key=lambda threshold: bound(threshold, half))
    return bound(float(best), ~half)


def _by_guesses(run: _Run, control: _Run, delta: float) -> Bound:
    """How many guesses are made is chosen on the control, whose coins are others."""
    made, without_privacy = best_number_of_guesses([control], delta=delta)
    return Bound(
        epsilon_lower=one_run_bound(guess(*run, made=made), delta=delta),
        epsilon_without_privacy=without_privacy,
        epsilon_most=one_run_bound(Guesses(len(run[0]), made, made), delta=delta),
        confidence=CONFIDENCE,
        delta=delta,
    )
