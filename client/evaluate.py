"""Evaluation at a hospital: additive statistics, exact for its own eyes, or noised and priced for release."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.randomness import SecureRandom, require_system_key
from client.records.records import Records
from shared_models.errors import ConfigError
from shared_models.nets.losses import scores
from shared_models.outcomes import record_statistics, statistics_size
from shared_models.plan import EvaluationPlan
from shared_models.subgroups import group_of_each, release_size, spread
from shared_models.tasks import Task

_BATCH = 256  # records at once in memory and on the device
_PATIENTS = 512  # patients at once in a release: bounds memory, changes no result beyond rounding
_ROUNDING = 1 - 2.0**-40  # clip this much below S, so that rounding in float64 cannot lift a patient above S


def statistics(model: nn.Module, records: Records, task: Task, *, bins: int) -> NDArray[np.float64]:
    """Exact additive statistics over all records: stays at the hospital, because it is not noised.

    Returns:
        Shape ``(statistics_size(task, bins),)``; ``compute_metrics`` turns it, or a sum of several, into metrics.

    Raises:
        ConfigError: The network's outputs are not finite.
    """
    total = np.zeros(statistics_size(task, bins))
    for first in range(0, len(records), _BATCH):
        part = slice(first, first + _BATCH)
        rows, finite = _rows(model, records.inputs[part], records.targets[part], task, bins)
        if not finite.all():
            raise ConfigError(
                "the network's outputs are not finite", hint="Lower the learning rate; this model cannot be used."
            )
        total += rows.sum(axis=0)
    return total


def released_statistics(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    plan: EvaluationPlan,
    random: SecureRandom,
    allow_test_random: bool = False,
) -> NDArray[np.float64]:
    """Statistics that may leave: clipped per patient, summed, noised. Charge them before calling, at sample rate 1.

    Guarantees:
        * Adding or removing one patient, with all records, moves the sum by at most ``plan.clip`` (S) in L2 norm;
          then Gaussian noise of standard deviation ``noise_multiplier * S`` is added to every entry, also to those
          that no record reaches and when there are no records.
        * No record's content raises an exception: a record without a finite score counts as zero.

    Args:
        model: Network; its device is used, its mode is restored.
        records: Validation records.
        task: Names the heads.
        plan: S, noise multiplier, bins and subgroups.
        random: Source of the noise, fresh for every charge.
        allow_test_random: Accept a repeatable generator. Tests only.

    Returns:
        Shape ``(release_size(task, plan),)``; entries may be negative.

    Raises:
        ConfigError: ``random`` is not keyed by the operating system.
    """
    require_system_key(random, allow_test_random=allow_test_random)
    total = np.zeros(release_size(task, plan))
    for first in range(0, records.patient_count, _PATIENTS):
        patients = np.arange(first, min(first + _PATIENTS, records.patient_count))
        found, whose = [np.empty((0, len(total)))], [np.empty(0, dtype=np.int64)]
        for part, owners in records.row_parts(patients, _BATCH):
            inputs, targets = records.inputs[torch.from_numpy(part)], records.targets[torch.from_numpy(part)]
            rows, finite = _rows(model, inputs, targets, task, plan.bins)
            groups = group_of_each(task, plan.subgroups, inputs.numpy(), records.groups[part])
            found.append(spread(task, plan, np.where(finite[:, None], rows, 0), groups))
            whose.append(owners)
        total += _clipped_sum(np.concatenate(found), np.concatenate(whose), clip=plan.clip)
    return total + plan.noise_multiplier * plan.clip * random.gaussian(len(total))


def _clipped_sum(rows: NDArray[np.float64], owners: NDArray[np.int64], *, clip: float) -> NDArray[np.float64]:
    """Sum over patients of the mean of their rows, each clipped to L2 norm ``clip``; ``owners`` ascends from 0."""
    counts = np.bincount(owners)
    means = np.add.reduceat(rows, np.cumsum(counts) - counts, axis=0) / counts[:, None]
    norms = np.linalg.norm(means, axis=1)
    factors = np.minimum(1, np.divide(clip * _ROUNDING, norms, out=np.full_like(norms, math.inf), where=norms > 0))
    return factors @ means


def scores_of(model: nn.Module, records: Records, task: Task) -> NDArray[np.float64]:
    """What the network says of each record; it stays at the hospital.

    Returns:
        As ``losses.scores`` gives them, first axis ``len(records)``.

    Raises:
        ConfigError: The network's outputs are not finite.
    """
    parts = range(0, max(1, len(records)), _BATCH)
    found = np.concatenate([_scores(model, records.inputs[first : first + _BATCH], task) for first in parts])
    if not np.isfinite(found).all():
        raise ConfigError(
            "the network's outputs are not finite", hint="Lower the learning rate; this model cannot be used."
        )
    return found


def counted_once(
    scores: NDArray[np.float64], records: Records, task: Task, *, bins: int, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Exact statistics in which every patient counts once, as in a release: with k records, each is 1 / k of one.

    Args:
        scores: As ``scores_of`` returned them.
        records: The records they are of.
        task: Names the heads.
        bins: Score bins.
        rows: Which records; of a group, a patient with records in two counts in part in each.
    """
    total = np.zeros(statistics_size(task, bins))
    weights = 1 / records.record_counts[records.patients]
    for first in range(0, len(rows), _BATCH):
        part = rows[first : first + _BATCH]
        targets = records.targets[torch.from_numpy(part)].double().numpy()
        total += weights[part] @ record_statistics(task, scores[part], targets, bins=bins)
    return total


@torch.no_grad()
def _scores(model: nn.Module, inputs: Tensor, task: Task) -> NDArray[np.float64]:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    score: NDArray[np.float64] = scores(task, model(inputs.to(device))).cpu().double().numpy()
    model.train(was_training)
    return score


def _rows(
    model: nn.Module, inputs: Tensor, targets: Tensor, task: Task, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Statistics of each record, and whether its score is finite (where not, its row means nothing)."""
    score = _scores(model, inputs, task)
    finite = np.asarray(np.isfinite(score.reshape(len(score), -1)).all(axis=1))
    score[~finite] = 0
    return record_statistics(task, score, targets.double().numpy(), bins=bins), finite
