"""Heads: losses that are a record's own, and metrics from sums that equal those of the records."""

from typing import Any, Final

import lifelines.utils
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from shared_models.errors import ConfigError, ProtocolError, RecordsError
from shared_models.metrics import record_statistics as choice_statistics
from shared_models.nets.losses import loss_per_record, scores
from shared_models.outcomes import compute_metrics, concordance, record_statistics, row_norm, statistics_size
from shared_models.tasks import (
    Choice,
    Head,
    ImageInput,
    Numeric,
    Outline,
    Quantity,
    Survival,
    TableInput,
    Task,
    find_task,
)

BINS: Final = 20
DOSE = Quantity(measure=Numeric(name="dose", unit="mg", low=0, high=100))
DEATH = Survival(name="death", time="time", event="event", unit="year", edges=(1, 2, 5))
GRADE = Choice(name="grade", classes=("low", "middle", "high"))
ILL = Choice(name="ill", classes=("no", "yes"))
TABLE = TableInput(columns=(Numeric(name="age", unit="year", low=0, high=100),))


def task_with(*heads: Head, image: ImageInput | None = None) -> Task:
    """A task of these heads."""
    return Task(name="many", description="Made up.", input=image or TABLE, heads=heads)


MANY = task_with(GRADE, ILL, DOSE, DEATH)


def many_targets(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Targets of ``MANY``, a tenth of those that may be missing missing."""
    found = np.stack(
        [rng.integers(3, size=n), rng.integers(2, size=n), rng.uniform(-2, 2, n), rng.integers(4, size=n), np.zeros(n)],
        axis=1,
    ).astype(np.float64)
    found[:, 4] = (rng.random(n) < 0.5) & (found[:, 3] < 3)
    found[:, :3][rng.random((n, 3)) < 0.1] = np.nan
    return found


# the loss


def test_a_task_with_several_heads_adds_their_losses() -> None:
    """Each head's part of outputs and targets goes to it alone."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    outputs = torch.randn(30, MANY.outputs, generator=generator)
    targets = torch.from_numpy(many_targets(rng, 30)).float()

    total = loss_per_record(MANY, outputs, targets)

    alone = torch.zeros(30)
    parts = zip(MANY.heads, outputs.split([3, 1, 1, 3], dim=1), targets.split([1, 1, 1, 2], dim=1), strict=True)
    for head, own, target in parts:
        known = ~target.isnan().any(dim=1)
        single = task_with(head)
        given_target = target[known].squeeze(1) if single.choice else target[known]
        alone[known] += loss_per_record(single, own[known], given_target)
    torch.testing.assert_close(total, alone)


def test_a_label_that_is_not_known_moves_nothing() -> None:
    """Its head's outputs get a gradient of exactly zero, never NaN, which would wipe out the patient."""
    outputs = torch.randn(1, MANY.outputs, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.tensor([[torch.nan, 1.0, torch.nan, 2.0, 1.0]])

    loss_per_record(MANY, outputs, targets).sum().backward()

    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, [0, 1, 2, 4]].tolist() == [0, 0, 0, 0]
    assert (outputs.grad[0, [3, 5, 6, 7]] != 0).all()


def test_class_weights_multiply_the_loss_of_their_class() -> None:
    """Rare classes may count more; the loss of the others stays."""
    plain, weighed = task_with(ILL), task_with(ILL.model_copy(update={"weights": (1.0, 6.0)}))
    outputs, targets = torch.linspace(-2, 2, 6)[:, None], torch.tensor([0.0, 1, 0, 1, 0, 1])

    ratio = loss_per_record(weighed, outputs, targets) / loss_per_record(plain, outputs, targets)

    torch.testing.assert_close(ratio, torch.tensor([1.0, 6, 1, 6, 1, 6]))


def test_weights_for_other_classes_are_refused() -> None:
    """A weight too few would shift the rest."""
    with pytest.raises(ValidationError, match="2 classes, and 3 weights"):
        Choice(name="ill", classes=("no", "yes"), weights=(1, 1, 1))


def test_the_survival_loss_is_the_likelihood_of_what_was_seen() -> None:
    """Against the product over intervals, written out: survived those that passed, and died in the next."""
    task, rng = task_with(DEATH), np.random.default_rng(2)
    outputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    passed = rng.integers(4, size=40)
    died = (rng.random(40) < 0.5) & (passed < 3)

    found = loss_per_record(task, outputs, torch.from_numpy(np.stack([passed, died], axis=1).astype(np.float64)))

    hazards = outputs.sigmoid().numpy()
    likelihood = [
        np.prod(1 - hazard[:k]) * (hazard[k] if event else 1.0)
        for hazard, k, event in zip(hazards, passed, died, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), -np.log(likelihood), rtol=1e-10)


def test_scores_of_survival_are_probabilities_that_never_fall() -> None:
    """The chance that the event has happened by the end of each interval: one minus the product of survivals."""
    outputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 5

    found = scores(task_with(DEATH), outputs)

    torch.testing.assert_close(found, 1 - (1 - outputs.sigmoid()).cumprod(dim=1))
    assert (found.diff(dim=1) >= 0).all()


def test_times_become_intervals() -> None:
    """An interval holds its end; who was last seen past the middle of one has passed it; beyond the last is unseen."""
    times = np.array([0.0, 1.0, 1.0001, 2.0, 5.0, 5.0001, 0.4, 0.6, 1.0, 3.4, 3.6, 9.0])
    events = np.array([True] * 6 + [False] * 6)

    found = DEATH.intervals(times, events)

    assert found[:6].tolist() == [[0, 1], [0, 1], [1, 1], [1, 1], [2, 1], [3, 0]]
    assert found[6:, 0].tolist() == [0, 1, 1, 2, 3, 3]
    assert not found[6:, 1].any()


@pytest.mark.parametrize("edges", [(1.0,), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, float("nan"))])
def test_edges_that_do_not_ascend_are_refused(edges: tuple[float, ...]) -> None:
    """From above zero, at least two."""
    with pytest.raises(ValidationError):
        Survival(name="death", time="t", event="e", unit="year", edges=edges)


def test_an_outline_stands_alone_and_needs_an_image() -> None:
    """Its outputs are pixels; there is no last layer to share."""
    image = ImageInput(channels=1, height=28, width=30)
    assert task_with(Outline(name="mask"), image=image).outputs == 28 * 30

    for heads, given_image in (((Outline(name="mask"),), None), ((Outline(name="mask"), ILL), image)):
        with pytest.raises(ValidationError, match="outline"):
            task_with(*heads, image=given_image)


def test_two_heads_cannot_share_a_column() -> None:
    """One of them would be read under the other's name."""
    with pytest.raises(ValidationError, match="same name"):
        task_with(ILL, Quantity(measure=Numeric(name="ill", unit="1", low=0, high=1)))


def test_what_is_only_for_classes_says_so() -> None:
    """A task with several heads has no one list of classes."""
    with pytest.raises(ConfigError, match="more than one choice"):
        _ = MANY.classes


# statistics


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 40))
def test_no_record_s_row_is_longer_than_the_norm(seed: int, n: int) -> None:
    """Whatever scores are, also NaN and infinite ones: the clip of a release relies on it."""
    rng = np.random.default_rng(seed)
    given_scores = rng.choice([np.nan, np.inf, -np.inf, -1e9, 0.3, 1.0, 7.0], size=(n, MANY.outputs))

    rows = record_statistics(MANY, given_scores, many_targets(rng, n), bins=BINS)

    assert rows.shape == (n, statistics_size(MANY, BINS))
    assert ((rows >= 0) & (rows <= 1)).all()
    assert np.linalg.norm(rows, axis=1).max() <= row_norm(MANY) * (1 + 1e-12)


def test_a_task_with_one_choice_has_the_statistics_of_its_classes() -> None:
    """Nothing about the releases of 0.1.0 and 0.2.0 has changed."""
    rng, task = np.random.default_rng(0), find_task("heart-disease")
    given_scores, labels = rng.random(50), rng.integers(2, size=50)

    rows = record_statistics(task, given_scores, labels, bins=BINS)

    np.testing.assert_array_equal(rows, choice_statistics(2, given_scores, labels, bins=BINS))
    assert row_norm(task) == 1


def figures(task: Task, given_scores: Any, targets: Any, bins: int = BINS) -> dict[str, float]:
    """Metrics of the summed rows."""
    return compute_metrics(task, record_statistics(task, given_scores, targets, bins=bins).sum(axis=0), bins=bins)


def test_errors_of_a_quantity_are_those_of_the_values() -> None:
    """Shares of the range, WAPE and R squared, against the formulas on the values in their unit."""
    rng, task = np.random.default_rng(1), task_with(DOSE)
    truth, guess = rng.uniform(0, 100, 200), rng.uniform(0, 100, 200)

    found = figures(task, DOSE.measure.scaled(guess)[:, None], DOSE.measure.scaled(truth)[:, None])

    error = np.abs(truth - guess)
    assert found["mae"] == pytest.approx(error.mean() / 100)
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()) / 100)
    assert found["wape"] == pytest.approx(error.sum() / truth.sum())
    assert found["r2"] == pytest.approx(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert found["records"] == 200


def test_concordance_agrees_with_another_implementation() -> None:
    """Without ties of risk or time, and with every event's time its own, lifelines counts the same pairs."""
    rng = np.random.default_rng(4)
    risks = (rng.permutation(300) + 0.5) / 300
    passed, died = rng.integers(50, size=300), rng.random(300) < 0.4
    table = np.zeros((300, 51, 2))
    np.add.at(table, ((risks * 300).astype(int), passed, died.astype(int)), 1)

    found = concordance(table)

    # Who is censored in an interval has passed it here, so is later than an event in it; two events in one cannot be
    # compared, which lifelines scores as a half: so each pair of events at one time is taken out of its count.
    pairs = correct = 0.0
    for i in np.flatnonzero(died):
        later = passed > passed[i]
        pairs += later.sum()
        correct += (risks[later] < risks[i]).sum()
    assert found == pytest.approx(correct / pairs)
    distinct = np.unique(passed[died], return_index=True)[1]
    keep = np.concatenate([np.flatnonzero(died)[distinct], np.flatnonzero(~died)])
    alone = np.zeros((300, 51, 2))
    np.add.at(alone, ((risks[keep] * 300).astype(int), passed[keep], died[keep].astype(int)), 1)
    times = passed[keep] - 0.5 * ~died[keep]  # censored at k have been seen to pass k intervals, not the next
    assert concordance(alone) == pytest.approx(lifelines.utils.concordance_index(times, -risks[keep], died[keep]))


@pytest.mark.parametrize(("order", "wanted"), [(1, 1.0), (-1, 0.0)])
def test_a_perfect_order_of_risks_is_seen_as_one(order: int, wanted: float) -> None:
    """The sooner the event, the higher the risk: 1; the other way round: 0; all alike: a half."""
    targets = np.array([[0.0, 1], [1, 1], [2, 1], [3, 0]])
    risks = np.array([0.9, 0.6, 0.4, 0.1])[::order]

    assert figures(task_with(DEATH), np.repeat(risks[:, None], 3, axis=1), targets)["c_index"] == wanted
    assert figures(task_with(DEATH), np.full((4, 3), 0.5), targets)["c_index"] == 0.5


def test_outlines_are_compared_pixel_by_pixel() -> None:
    """Half of the mask found, and as much beside it; an empty mask that stays empty counts as right."""
    task = task_with(Outline(name="mask"), image=ImageInput(channels=1, height=28, width=28))
    mask, found = np.zeros((2, 784)), np.zeros((2, 784))
    mask[0, :100], found[0, 50:150] = 1, 1

    result = figures(task, found, mask)

    assert result == pytest.approx({"dice": 0.75, "sensitivity": 0.75, "precision": 0.75, "records": 2})


def test_several_heads_have_their_own_figures_and_means() -> None:
    """``head.metric`` for each, and under the metric's own name the mean over the heads that have it."""
    rng = np.random.default_rng(5)
    found = figures(MANY, rng.random((400, MANY.outputs)), many_targets(rng, 400))

    assert found["auroc"] == pytest.approx((found["grade.auroc"] + found["ill.auroc"]) / 2)
    assert found["c_index"] == found["death.c_index"]
    assert found["mae"] == found["dose.mae"]
    assert 0.8 * 400 < found["ill.records"] < 400  # a tenth is not known
    assert "records" not in found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1e-3, 1.0, 1e3, 1e12]))
def test_noise_alone_gives_finite_figures(seed: int, size: float) -> None:
    """A release may be nothing but noise; no figure becomes NaN or infinite, shares stay shares."""
    noise = np.random.default_rng(seed).normal(scale=size, size=statistics_size(MANY, BINS))

    found = compute_metrics(MANY, noise, bins=BINS)

    assert np.isfinite(list(found.values())).all()
    assert all(0 <= found[name] <= 1 for name in ("auroc", "accuracy", "c_index") if name in found)


def test_statistics_of_another_length_are_refused() -> None:
    """Whoever sent them runs another version or plan."""
    for wrong in (np.zeros(3), np.full(statistics_size(MANY, BINS), np.nan)):
        with pytest.raises(ProtocolError):
            compute_metrics(MANY, wrong, bins=BINS)
    with pytest.raises(RecordsError):
        record_statistics(MANY, np.zeros((2, 3)), np.zeros((2, 5)), bins=BINS)
