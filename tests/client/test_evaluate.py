"""Evaluation at a hospital."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from client.evaluate import released_statistics, statistics
from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.errors import ConfigError
from shared_models.metrics import compute_metrics
from shared_models.nets.build import build_network
from shared_models.plan import EvaluationPlan, Mlp, Subgroups
from shared_models.subgroups import EVERYBODY, split
from tests.client.made_up import chosen, numeric, repeatable, table, table_records, task_of

BINS = 100
PLAN = EvaluationPlan(every=1, clip=10.0, noise_multiplier=1e-9, bins=BINS)


def network(classes: int = 2) -> nn.Module:
    """A small untrained network."""
    return build_network(Mlp(name="mlp", hidden=(4,)), task_of(table(5), classes), seed=0)


def test_statistics_give_the_metrics_of_the_predictions() -> None:
    """Accuracy and number of records, recomputed from the logits; the network's mode is restored."""
    records, model, task = table_records(np.arange(3000)), network().train(), task_of(table(5))

    metrics = compute_metrics(2, statistics(model, records, task, bins=BINS), bins=BINS)

    right = (model(records.inputs).squeeze(1) > 0) == (records.targets[:] > 0)
    assert metrics["records"] == 3000
    assert metrics["accuracy"] == pytest.approx(right.double().mean().item())
    assert model.training


def test_statistics_of_parts_add_up() -> None:
    """Any split of the records gives the same sum."""
    records, task = table_records(np.arange(50)), task_of(table(5))
    parts = [chosen(records, np.arange(17)), chosen(records, np.arange(17, 50))]

    total = sum(statistics(network(), part, task, bins=BINS) for part in parts)

    np.testing.assert_allclose(total, statistics(network(), records, task, bins=BINS), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_release_with_hardly_any_noise_and_clipping_is_exact(classes: int) -> None:
    """With one record per patient and S above everybody's length, only noise separates both."""
    records, task = table_records(np.arange(700)), task_of(table(5), classes)
    if classes == 3:
        records.targets[:][:100] = 2

    released = released_statistics(
        network(classes), records, task, plan=PLAN, random=repeatable(), allow_test_random=True
    )

    np.testing.assert_allclose(released, statistics(network(classes), records, task, bins=BINS), atol=1e-5)


def test_an_exact_evaluation_refuses_a_broken_network_but_a_release_goes_on() -> None:
    """After a charge, no content decides whether a reply is sent; before one, an error helps."""
    records, task, model = table_records(np.arange(4)), task_of(table(5)), network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)

    with pytest.raises(ConfigError, match="not finite"):
        statistics(model, records, task, bins=BINS)
    released = released_statistics(model, records, task, plan=PLAN, random=SecureRandom.from_system())

    np.testing.assert_allclose(released, 0, atol=1e-6)


def test_production_refuses_a_repeatable_generator() -> None:
    """A release is noised from the operating system's entropy, too."""
    with pytest.raises(ConfigError, match="operating system"):
        released_statistics(network(), table_records([0]), task_of(table(5)), plan=PLAN, random=repeatable())


def test_a_release_holds_every_group_and_a_patient_is_clipped_whole() -> None:
    """One patient's records in both bands are one row of norm S at most; each block counts its own records."""
    records, task, model = table_records(np.arange(600)), task_of(table(5)), network()
    grouped = PLAN.model_copy(update={"subgroups": (Subgroups(column="column-2", edges=(0.25,)),)})
    above = np.flatnonzero(records.inputs[:][:, 2].numpy() >= task_scaled(0.25))

    released = released_statistics(model, records, task, plan=grouped, random=repeatable(), allow_test_random=True)

    found = split(task, grouped, released)
    np.testing.assert_allclose(found[EVERYBODY], statistics(model, records, task, bins=BINS), atol=1e-5)
    np.testing.assert_allclose(
        found["column-2", "from 0.25 1"], statistics(model, chosen(records, above), task, bins=BINS), atol=1e-5
    )
    lone = Records(records.inputs[:50], records.targets[:50], np.zeros(50, dtype=np.int64), 1)
    tight = grouped.model_copy(update={"clip": 0.05})
    moved = released_statistics(model, lone, task, plan=tight, random=repeatable(), allow_test_random=True)
    assert np.linalg.norm(moved) <= 0.05 + 1e-6


def task_scaled(value: float) -> float:
    """A value of one of the made-up columns as it is encoded."""
    return float(np.float32(numeric("x").scaled(np.array([value]))[0]))
