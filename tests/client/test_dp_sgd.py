"""Local steps, and the self-check that guards them."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.alone import train_without_privacy
from client.dp_sgd import PatientGradients, local_steps, self_check, train
from client.randomness import SecureRandom
from client.records.records import Records
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import (
    Cnn,
    LogisticRegression,
    Lstm,
    Mlp,
    Network,
    PrivacyPlan,
    ProportionalHazards,
    TrainingPlan,
    Transformer,
    UNet,
)
from shared_models.tasks import Head, ImageInput, SeriesInput, TokensInput
from tests.client.made_up import (
    HEADS,
    OUTLINE,
    SURVIVAL,
    Input,
    chosen,
    numeric,
    repeatable,
    table,
    table_records,
    task_of,
)

TASK = task_of(table(5))
PRIVACY = PrivacyPlan(clip=0.5, noise_multiplier=1.0, sample_rate=0.5, epsilon=1.0, delta=1e-5)
TRAINING = TrainingPlan(learning_rate=0.1, steps=3)
SERIES = SeriesInput(variables=(numeric("pulse"), numeric("pressure")), steps=6, step_unit="h")


def small_network(seed: int = 0) -> nn.Module:
    """Two linear layers for five columns."""
    return build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=seed)


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def without_noise(
    model: nn.Module,
    records: Records,
    *,
    steps: int = 1,
    learning_rate: float = 1.0,
    clip: float = math.inf,
    noise_multiplier: float = 0.0,
    sample_rate: float = 1.0,
    expected_batch: float | None = None,
    micro_batch: int = 256,
) -> None:
    """Steps of learning rate 1 over everybody, without noise and clipping, unless told otherwise."""
    local_steps(
        model,
        records,
        TASK,
        steps=steps,
        learning_rate=learning_rate,
        clip=clip,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        expected_batch=records.patient_count if expected_batch is None else expected_batch,
        random=repeatable(),
        micro_batch=micro_batch,
    )


# The step


def test_without_clip_and_noise_a_step_is_plain_gradient_descent() -> None:
    """With everybody drawn, one record each, three steps equal torch's SGD on the mean loss."""
    records = table_records(np.arange(40))
    private, plain = small_network(), small_network()

    without_noise(private, records, steps=3)

    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_per_record(TASK, plain(records.inputs), records.targets[:]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(flat(private), flat(plain), rtol=0, atol=1e-6)


def test_a_patient_counts_once_however_many_records() -> None:
    """The gradient is the mean over patients of the mean over each patient's records."""
    records = table_records([0, 1, 1, 1, 2, 2])
    private, plain = small_network(), small_network()

    without_noise(private, records)

    weights = 1 / torch.from_numpy(records.record_counts)[torch.from_numpy(records.patients)] / 3
    (loss_per_record(TASK, plain(records.inputs), records.targets[:]) * weights).sum().backward()
    expected = torch.cat([(p - p.grad).flatten() for p in plain.parameters() if p.grad is not None])
    torch.testing.assert_close(flat(private), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 16])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    """A large draw runs in parts, also parts of one patient; nobody is cut."""
    owners = np.repeat(np.arange(8), [1, 5, 1, 1, 3, 9, 1, 2])
    records = table_records(np.random.default_rng(0).permutation(owners))
    whole, parts = small_network(), small_network()

    without_noise(whole, records, clip=0.3)
    without_noise(parts, records, clip=0.3, micro_batch=micro_batch)

    torch.testing.assert_close(flat(parts), flat(whole), rtol=0, atol=1e-6)


def test_the_denominator_is_the_expected_batch() -> None:
    """Doubling the public size halves the step; the number of patients drawn does not enter."""
    records, start = table_records(np.arange(10)), flat(small_network())
    once, half = small_network(), small_network()

    without_noise(once, records, expected_batch=10.0)
    without_noise(half, records, expected_batch=20.0)

    torch.testing.assert_close(2 * (flat(half) - start), flat(once) - start, rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", [Mlp(name="mlp"), Cnn(name="cnn", channels=(4,))])
def test_an_empty_draw_is_a_step_with_noise_only(network: Network) -> None:
    """Skipping it would reveal that nobody was drawn; some of Opacus's modes crash on it."""
    inputs: Input = table(5) if network.name == "mlp" else ImageInput(channels=1, height=28, width=28)
    task = task_of(inputs)
    shape = (5,) if network.name == "mlp" else (1, 28, 28)
    records = Records(torch.zeros(2, *shape), torch.zeros(2), np.arange(2), 2)
    model = build_network(network, task, seed=0)
    start = flat(model)
    rare = PRIVACY.model_copy(update={"sample_rate": 1e-9})

    report = train(
        model,
        records,
        task,
        training=TrainingPlan(learning_rate=0.1, steps=2),
        privacy=rare,
        expected_batch=4.0,
        random=repeatable(),
        allow_test_random=True,
    )

    assert (report.steps, report.drawn) == (2, 0)
    assert (flat(model) != start).all()


@pytest.mark.parametrize("patients", [0, 40])
def test_null_coordinates_move_by_the_mechanism_s_noise_and_by_nothing_else(patients: int) -> None:
    """Variance steps * (learning rate * sigma * C / expected batch)**2, whoever was drawn: what an auditor tests."""
    records, null = table_records(np.arange(max(patients, 1))), np.zeros(20_000)
    privacy = PRIVACY.model_copy(update={"sample_rate": 0.5 if patients else 1e-9})

    train(
        small_network(),
        records,
        TASK,
        training=TRAINING,
        privacy=privacy,
        expected_batch=20.0,
        random=repeatable(),
        allow_test_random=True,
        null=null,
    )

    expected = math.sqrt(TRAINING.steps) * TRAINING.learning_rate * privacy.noise_multiplier * privacy.clip / 20.0
    assert abs(null.mean()) < 5 * expected / math.sqrt(len(null))
    assert null.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * len(null)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_patient_whose_gradient_is_not_finite_counts_as_zero(value: float) -> None:
    """One broken record, also among a patient's good ones, changes nobody else's share and raises nothing."""
    records = table_records([0, 1, 1, 2])
    records.inputs[:][2] = value
    healthy = chosen(records, [0, 3])
    broken, expected = small_network(), small_network()

    with PatientGradients(broken, records, TASK, device="cpu", micro_batch=2) as gradients:
        total = gradients.clipped_sum(np.arange(3), clip=0.5)
        counts = gradients.counts()
    with PatientGradients(expected, healthy, TASK, device="cpu", micro_batch=2) as gradients:
        wanted = gradients.clipped_sum(np.arange(2), clip=0.5)

    assert counts[1] == 1
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_half_used_layer_leaks_nothing_into_the_next_batch(calls: int) -> None:
    """Opacus keeps what it found for a layer that had no full part in a loss, and adds it to the next batch's."""

    class Fickle(nn.Module):
        """Runs its second layer always, uses all of it only when told."""

        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes, self.used = nn.Linear(5, 1), nn.Linear(5, 1), True

        def forward(self, inputs: Tensor) -> Tensor:
            extra = [self.sometimes(inputs * (i + 1)) for i in range(calls)]
            return sum(extra if self.used else extra[1:], start=self.always(inputs))

    model, everyone = Fickle(), np.arange(4)
    with PatientGradients(model, table_records(everyone), TASK, device="cpu", micro_batch=8) as gradients:
        fresh = gradients.clipped_sum(everyone, clip=1.0)
        model.used = False
        gradients.clipped_sum(everyone, clip=1.0)
        model.used = True
        again = gradients.clipped_sum(everyone, clip=1.0)

    assert torch.equal(again, fresh)


def test_the_report_counts_what_happened() -> None:
    """Steps, patients drawn, clipped and not finite: for the local log."""
    records = table_records(np.arange(6))
    records.inputs[:][0] = math.nan

    report = local_steps(
        small_network(),
        records,
        TASK,
        steps=2,
        learning_rate=0.1,
        clip=1e-6,
        noise_multiplier=1.0,
        sample_rate=1.0,
        expected_batch=6.0,
        random=repeatable(),
    )

    assert (report.steps, report.drawn, report.clipped, report.not_finite) == (2, 12, 10, 2)


# What stays as it was


def leave_half_way(model: nn.Module) -> None:
    """Break off between forward and backward."""
    with PatientGradients(model, table_records([0]), TASK, device="cpu", micro_batch=1):
        model(torch.zeros(1, 5))
        raise KeyboardInterrupt


def test_the_network_is_plain_again_afterwards() -> None:
    """No hook, gradient or bookkeeping stays, whether steps end or break off; the mode and frozen layers stay."""
    model = small_network().eval()
    frozen = next(model.parameters()).requires_grad_(False)
    start, attributes = frozen.clone(), [set(vars(module)) for module in model.modules()]

    without_noise(model, table_records(np.arange(9)))
    with contextlib.suppress(KeyboardInterrupt):
        leave_half_way(model)

    assert not model.training
    assert torch.equal(frozen, start)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(p.grad is None and not vars(p) for p in model.parameters())


def test_torchs_generator_is_neither_read_nor_advanced() -> None:
    """``torch.manual_seed`` in somebody's code changes neither sampling nor noise."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state, model = torch.get_rng_state(), small_network()
        self_check(model, TASK, clip=0.5)
        train(
            model,
            table_records(np.arange(20)),
            TASK,
            training=TRAINING,
            privacy=PRIVACY,
            expected_batch=10.0,
            random=repeatable(),
            allow_test_random=True,
        )
        results.append(flat(model))
        assert torch.equal(torch.get_rng_state(), state)

    assert torch.equal(*results)


# Settings


def test_production_refuses_a_repeatable_generator() -> None:
    """Without the explicit word of a test, only a generator keyed by the operating system trains."""
    records, model = table_records(np.arange(4)), small_network()
    start = flat(model)

    with pytest.raises(ConfigError, match="operating system"):
        train(model, records, TASK, training=TRAINING, privacy=PRIVACY, expected_batch=2.0, random=repeatable())
    assert torch.equal(flat(model), start)

    random = SecureRandom.from_system()
    train(model, records, TASK, training=TRAINING, privacy=PRIVACY, expected_batch=2.0, random=random)
    assert not torch.equal(flat(model), start)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": math.nan},
        {"clip": 0.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": 1.0, "clip": math.inf},
        {"noise_multiplier": math.inf, "clip": 1.0},
        {"expected_batch": 0.0},
        {"expected_batch": math.nan},
        {"expected_batch": math.inf},
        {"sample_rate": math.nan},
        {"learning_rate": math.nan},
    ],
)
def test_numbers_outside_their_range_are_refused(changes: dict[str, Any]) -> None:
    """NaN included, before anything is computed."""
    with pytest.raises(ConfigError):
        without_noise(small_network(), table_records([0]), **changes)


# The self-check

NETWORKS: list[tuple[Network, Input, int | tuple[Head, ...]]] = [
    (LogisticRegression(name="logistic-regression"), table(5), 2),
    (Mlp(name="mlp", hidden=(6, 3)), table(5), 4),
    (Cnn(name="cnn", channels=(4, 8)), ImageInput(channels=1, height=28, width=30), 2),
    (Cnn(name="cnn", channels=(4, 8)), ImageInput(channels=3, height=96, width=96), 3),
    (Lstm(name="lstm", hidden=5, layers=2), SERIES, 2),
    (Lstm(name="lstm", hidden=5, carry_forward=True), SERIES, 2),
    (Transformer(name="transformer", width=8, heads=2, layers=2), SERIES, 3),
    (Transformer(name="transformer", width=8, heads=2, layers=2), TokensInput(vocabulary=11, length=7), 2),
    (Mlp(name="mlp", hidden=(6,)), table(5), HEADS),
    (ProportionalHazards(name="proportional-hazards"), table(5), SURVIVAL),
    (UNet(name="unet", channels=(4, 6)), ImageInput(channels=1, height=28, width=31), OUTLINE),
]


@pytest.mark.parametrize(("network", "inputs", "classes"), NETWORKS)
def test_every_shared_network_passes(network: Network, inputs: Input, classes: int | tuple[Head, ...]) -> None:
    """For each, clipped gradients per patient equal brute force, one record at a time; and it is left unchanged."""
    task = task_of(inputs, classes)
    model = build_network(network, task, seed=1)
    start = flat(model)

    self_check(model, task, clip=0.1)

    assert torch.equal(flat(model), start)


class _Scale(nn.Module):
    """Owns a parameter and is handed part of its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, inputs: Tensor, more: Tensor | None = None) -> Tensor:
        return self.weight * (inputs if more is None else inputs + more)


class _Keyword(nn.Module):
    """Opacus sees positional inputs only, and is silently wrong about the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = _Scale(), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.scale(inputs, more=inputs**2))


class _Broadcast(nn.Module):
    """Positions looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(1, 5), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs + self.positions(torch.zeros(1, dtype=torch.int64)))


class _Unused(nn.Module):
    """A layer that nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.head = nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        self.spare(inputs)
        return self.head(inputs)


class _Mixing(nn.Module):
    """Subtracts the batch's mean without any batch norm layer that a list could name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs - 0.5 * inputs.mean(dim=0))


class _HiddenByZero(_Keyword):
    """The same before a layer that starts at zero: at the start, the weight's gradient is zero both ways."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


class _Recurrent(nn.Module):
    """Torch's own recurrent layer passes Opacus's validator and fails in training."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.RNN(6, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.recurrent(series)[0][:, -1])


class _WholeBatchLogit(nn.Module):
    """One logit for everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs).mean(dim=0, keepdim=True)


class _Frozen(nn.Module):
    """Nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


@pytest.mark.parametrize(
    "build",
    [_Keyword, _Broadcast, _Unused, _Mixing, _HiddenByZero, _Recurrent, _WholeBatchLogit, _Frozen],
)
def test_a_network_with_wrong_gradients_is_refused(build: Callable[[], nn.Module]) -> None:
    """Each trap of Opacus, and each way of mixing patients, is found before a record is read."""
    torch.manual_seed(0)

    with pytest.raises(ConfigError, match=r"self-check|keep records apart"):
        self_check(build(), task_of(SERIES) if build is _Recurrent else TASK, clip=0.5)


def test_batch_norm_is_refused() -> None:
    """It mixes patients, and its running means would be an unpriced release."""
    with pytest.raises(ConfigError, match="self-check"):
        self_check(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), TASK, clip=0.5)


def test_a_layer_with_buffers_is_refused_in_training_too() -> None:
    """Opacus in strict mode; the hooks of a network that is refused half-way are gone."""
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))

    with pytest.raises(ConfigError, match="buffers"):
        without_noise(model, table_records([0, 1]))


# The baseline


def test_the_baseline_learns_and_repeats() -> None:
    """Plain SGD lowers the loss; the seed orders the records and torch's global generator has no part."""
    records = table_records(np.arange(50))
    records.targets[:].copy_((records.inputs[:][:, 0] > 0).float())
    models = [small_network(), small_network()]

    for model in models:
        torch.manual_seed(id(model) % 1000)
        train_without_privacy(model, records, TASK, steps=200, learning_rate=0.5, batch_size=16, seed=3)

    assert torch.equal(*[flat(model) for model in models])
    losses = [loss_per_record(TASK, m(records.inputs), records.targets[:]).mean() for m in (small_network(), models[0])]
    assert losses[1] < 0.5 * losses[0]


def test_a_baseline_without_records_is_refused() -> None:
    """An empty folder is an error, not a model."""
    nobody = Records(torch.empty(0, 5), torch.empty(0), np.empty(0, dtype=np.int64), 0)

    with pytest.raises(ConfigError):
        train_without_privacy(small_network(), nobody, TASK, steps=1, learning_rate=0.1, batch_size=4, seed=0)
