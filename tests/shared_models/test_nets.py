"""Networks: built from a plan, the same for everyone, free of batch normalisation, record by record, and they learn."""

import math
from pathlib import Path
from typing import Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared_models import plan
from shared_models.errors import ConfigError
from shared_models.nets.build import SUPPORTED_LAYERS, build_network, check_supported, count_parameters
from shared_models.nets.losses import loss_per_record, scores
from shared_models.nets.lstm import observe
from shared_models.pretrained import offer_bases
from shared_models.tasks import (
    Choice,
    Head,
    ImageInput,
    Numeric,
    Outline,
    SeriesInput,
    Survival,
    TableInput,
    Task,
    TokensInput,
    task_of,
)
from shared_models.update import parameters_to_vector
from tests.tiny_bases import text_plan, write_encoder

LENGTH: Final = 6
VARIABLES = tuple(Numeric(name=f"v{i}", unit="mmol/l", low=0, high=1) for i in range(3))
TABLE = TableInput(columns=VARIABLES)
SERIES = SeriesInput(variables=VARIABLES, steps=LENGTH, step_unit="hours")
TOKENS = TokensInput(vocabulary=11, length=LENGTH)


def _image(channels: int, size: int) -> ImageInput:
    return ImageInput.model_validate({"channels": channels, "height": size, "width": size})


def _task(inputs: TableInput | ImageInput | SeriesInput | TokensInput, classes: int = 2, *heads: Head) -> Task:
    return Task(
        name="test-task",
        description="for tests",
        input=inputs,
        heads=heads or (Choice(name="label", classes=tuple(f"class {i}" for i in range(classes))),),
    )


def _inputs(task: Task, count: int, seed: int = 0) -> Tensor:
    """Random encoded inputs. The first record of series or tokens holds nothing at all, the second ends early."""
    generator = torch.Generator().manual_seed(seed)
    match task.input:
        case TableInput(width=width):
            return torch.rand(count, width, generator=generator) * 2 - 1
        case ImageInput() as image:
            return torch.rand(count, image.channels, image.height, image.width, generator=generator) * 2 - 1
        case TokensInput(vocabulary=vocabulary):
            tokens = torch.randint(1, vocabulary, (count, LENGTH), generator=generator)
            tokens[0] = 0
            tokens[1:2, 3:] = 0
            return tokens
    values, elapsed = (torch.rand(count, LENGTH, 3, generator=generator) for _ in range(2))
    mask = (torch.rand(count, LENGTH, 3, generator=generator) < 0.6).float()
    mask[0] = 0
    mask[1:2, 3:] = 0
    return torch.cat([values.where(mask > 0, torch.nan), mask, 5 * elapsed], dim=2)


def _targets(task: Task, inputs: Tensor) -> Tensor:
    """Of a choice the first two classes in turn, of survival an early event and a late; of an outline bright pixels."""
    kind = torch.arange(len(inputs)) % 2
    if task.choice is not None:
        return kind
    if isinstance(task.heads[0], Survival):
        return torch.stack([2 - 2 * kind, torch.ones(len(kind))], dim=1)
    return (inputs.mean(dim=1) > 0.1).flatten(start_dim=1).float()


DEATH = Survival(name="death", time="time", event="event", unit="year", edges=(1, 2, 5))
OBLONG = ImageInput(channels=3, height=29, width=35)
CNN = plan.Cnn(name="cnn", channels=(4, 6, 8))
TRANSFORMER = plan.Transformer(name="transformer", width=8, heads=2, layers=2)
LSTM = plan.Lstm(name="lstm", hidden=6, layers=2)
CARRYING_LSTM = plan.Lstm(name="lstm", hidden=6, carry_forward=True)
CARRYING_TRANSFORMER = plan.Transformer(name="transformer", width=8, heads=2, layers=1, carry_forward=True)
NETWORKS: dict[str, tuple[plan.Network, Task]] = {
    "logistic regression": (plan.LogisticRegression(name="logistic-regression"), _task(TABLE)),
    "mlp": (plan.Mlp(name="mlp", hidden=(8, 4)), _task(TABLE, 3)),
    "mlp without hidden layers": (plan.Mlp(name="mlp", hidden=()), _task(TABLE)),
    "cnn, 28 pixels, 1 channel": (CNN, _task(_image(1, 28))),
    "cnn, 28 pixels, 3 channels": (CNN, _task(_image(3, 28), 5)),
    "cnn, 224 pixels, 1 channel": (CNN, _task(_image(1, 224), 3)),
    "cnn, 224 pixels, 3 channels": (CNN, _task(_image(3, 224))),
    "cnn, oblong": (CNN, _task(ImageInput(channels=1, height=28, width=70))),
    "cnn, deep and thin": (plan.Cnn(name="cnn", channels=(1, 2, 3, 5, 7, 8, 16)), _task(_image(1, 28))),
    "lstm, values carried forward": (CARRYING_LSTM, _task(SERIES)),
    "transformer, values carried forward": (CARRYING_TRANSFORMER, _task(SERIES)),
    "lstm": (LSTM, _task(SERIES)),
    "lstm, 3 classes": (plan.Lstm(name="lstm", hidden=5), _task(SERIES, 3)),
    "transformer, series": (TRANSFORMER, _task(SERIES, 3)),
    "transformer, tokens": (TRANSFORMER, _task(TOKENS)),
    "proportional hazards": (plan.ProportionalHazards(name="proportional-hazards"), _task(TABLE, 2, DEATH)),
    "unet, two levels": (plan.UNet(name="unet", channels=(4, 6)), _task(_image(1, 28), 2, Outline(name="mask"))),
    "unet, odd sizes": (plan.UNet(name="unet", channels=(4, 6, 8)), _task(OBLONG, 2, Outline(name="mask"))),
}
each_network = pytest.mark.parametrize("which", NETWORKS)
WITH_MISSING_VALUES: list[tuple[plan.Network, Task]] = [
    (network, _task(SERIES)) for network in (LSTM, TRANSFORMER, CARRYING_LSTM, CARRYING_TRANSFORMER)
]


@each_network
def test_parameters_can_be_counted_without_making_them(which: str) -> None:
    """A plan is judged by its size before its network exists; and counting draws no random number."""
    network, task = NETWORKS[which]
    before = torch.get_rng_state()

    counted = count_parameters(network, task)

    assert counted == sum(parameter.numel() for parameter in build_network(network, task, seed=0).parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_too_large_for_any_memory_can_be_counted() -> None:
    """A million times a million parameters, in no time."""
    wide = plan.Mlp(name="mlp", hidden=(10**6, 10**6))

    assert count_parameters(wide, _task(TABLE)) > 10**12


@each_network
def test_every_network_maps_a_batch_to_logits_and_probabilities(which: str) -> None:
    """Shapes are the seam: ``(n, outputs)`` logits, one loss per record, probabilities as the metrics take them."""
    network, task = NETWORKS[which]
    inputs = _inputs(task, 4)
    targets = _targets(task, inputs)

    logits = build_network(network, task, seed=1)(inputs)

    assert logits.shape == (4, task.outputs)
    assert loss_per_record(task, logits, targets).shape == (4,)
    probabilities = scores(task, logits)
    assert probabilities.shape == ((4,) if task.outputs == 1 else (4, task.outputs))
    assert bool(((probabilities >= 0) & (probabilities <= 1)).all())


@each_network
def test_no_record_changes_another_records_logits(which: str) -> None:
    """Alone or in a batch, in training mode, a record gives the same: what batch normalisation would break."""
    network, task = NETWORKS[which]
    model, inputs = build_network(network, task, seed=1).train(), _inputs(task, 5)

    together = model(inputs)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(5)])

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@each_network
def test_a_few_steps_of_training_lower_the_loss(which: str) -> None:
    """It learns to see stripes; empty records and missing values notwithstanding, every gradient is finite."""
    network, task = NETWORKS[which]
    model, inputs = build_network(network, task, seed=1), _inputs(task, 6)
    inputs[1::2, ..., ::3] = 1
    targets = _targets(task, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    losses = []
    for _ in range(20):
        loss = loss_per_record(task, model(inputs), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.9 * losses[0]


@each_network
def test_no_network_has_batch_normalisation_or_anything_untested(which: str) -> None:
    """Every layer is on the tested list, and no buffer could carry a running mean out of a hospital."""
    network, task = NETWORKS[which]

    model = build_network(network, task, seed=1)

    check_supported(model)
    assert not list(model.buffers())
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@settings(max_examples=20, deadline=None)
@given(which=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 2**31 - 1), disturbance=st.integers(0, 1000))
def test_the_seed_alone_decides_the_initial_parameters(which: str, seed: int, disturbance: int) -> None:
    """Coordinator and auditor build the same network whatever ran before, and building disturbs no one's randomness."""
    network, task = NETWORKS[which]
    torch.manual_seed(disturbance)
    expected_next = torch.rand(3)

    first = parameters_to_vector(build_network(network, task, seed=seed))
    torch.manual_seed(disturbance)
    second = parameters_to_vector(build_network(network, task, seed=seed))

    assert first.tobytes() == second.tobytes()
    assert torch.equal(torch.rand(3), expected_next)


@pytest.mark.parametrize("which", sorted(NETWORKS.keys() - {"logistic regression", "proportional hazards"}))
def test_another_seed_gives_other_parameters(which: str) -> None:
    """But for linear scores, which start at zero."""
    network, task = NETWORKS[which]

    one, two = (parameters_to_vector(build_network(network, task, seed=seed)) for seed in (1, 2))

    assert (one != two).any()


@settings(max_examples=25, deadline=None)
@given(
    which=st.sampled_from(WITH_MISSING_VALUES),
    seed=st.integers(0, 10_000),
    filler=st.sampled_from([0.0, -7.5, 1e30, float("inf"), float("nan")]),
)
def test_what_stands_in_a_missing_cell_changes_nothing(
    which: tuple[plan.Network, Task], seed: int, filler: float
) -> None:
    """A hospital that writes -1, 999 or NaN for "not measured" trains the same model."""
    model, series = build_network(*which, seed=1), _inputs(which[1], 4, seed)

    values, mask, elapsed = series.chunk(3, dim=2)
    refilled = torch.cat([values.where(mask > 0, filler), mask, elapsed], dim=2)

    assert torch.equal(model(series), model(refilled))


@settings(max_examples=25, deadline=None)
@given(which=st.sampled_from(WITH_MISSING_VALUES), seed=st.integers(0, 10_000), stay=st.integers(1, LENGTH - 1))
def test_steps_after_a_short_stay_change_nothing(which: tuple[plan.Network, Task], seed: int, stay: int) -> None:
    """Series are padded to one length; how the padding counts time must not matter."""
    model, series = build_network(*which, seed=1), _inputs(which[1], 4, seed)
    series[:, 0, 3:6] = 1  # something is seen, or there is nothing to compare
    series[:, 0, :3] = 0.5
    series[:, stay:, 3:6] = 0

    longer = series.clone()
    longer[:, stay:, 6:] = 99.0

    torch.testing.assert_close(model(series), model(longer))


def test_the_last_value_seen_stands_where_one_is_missing() -> None:
    """Of the same record and variable, never a later one; before the first there is nothing, and the mask stays."""
    missing = torch.nan
    values = torch.tensor([[[missing, 2.0], [3.0, missing], [missing, missing], [5.0, missing]]])
    mask = values.isfinite().float()
    elapsed = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 2.0], [2.0, 3.0]]])

    filled, seen = observe(torch.cat([values, mask, elapsed], dim=2), carry_forward=True)

    carried, kept, times = filled.chunk(3, dim=2)
    assert carried.tolist() == [[[0.0, 2.0], [3.0, 2.0], [3.0, 2.0], [5.0, 2.0]]]
    assert torch.equal(kept, mask)
    assert seen.tolist() == [[True, True, False, True]]
    torch.testing.assert_close(times, elapsed.log1p() / math.log(5))  # four steps: at most log(5) before


def test_a_series_that_carries_nothing_forward_keeps_its_plans_digest() -> None:
    """What a release before this one computed, to the bit; with the key it is another plan."""
    plain = plan.Lstm(name="lstm", hidden=6)

    assert plain.model_dump(mode="json") == {"name": "lstm", "hidden": 6, "layers": 1}
    assert CARRYING_LSTM.model_dump(mode="json") == {"name": "lstm", "hidden": 6, "layers": 1, "carry_forward": True}


@pytest.mark.parametrize("which", WITH_MISSING_VALUES)
def test_values_masks_and_times_all_matter(which: tuple[plan.Network, Task]) -> None:
    """A network that ignored one of the three would pass the two theorems above."""
    model = build_network(*which, seed=1)
    series = torch.cat([torch.zeros(1, LENGTH, 3), torch.ones(1, LENGTH, 3), torch.zeros(1, LENGTH, 3)], dim=2)

    for changed, value in (
        (0, 1.0),
        (4, 0.0),
        (8, 1.0),
    ):  # one value, one mask (of a zero, so the value stays), one time
        other = series.clone()
        other[:, :, changed] = value
        assert not torch.allclose(model(series), model(other))


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.integers(1, 10), min_size=1, max_size=LENGTH))
def test_padding_changes_no_text(words: list[int]) -> None:
    """The logits of a text are those of the same network over the words alone."""
    model = build_network(TRANSFORMER, _task(TOKENS), seed=1)
    padded = torch.tensor([words + [0] * (LENGTH - len(words))])

    torch.testing.assert_close(model(padded), model(torch.tensor([words])))


def test_the_order_of_words_matters() -> None:
    """Attention alone sees a bag of words: positions must be there."""
    model = build_network(TRANSFORMER, _task(TOKENS), seed=1)

    assert not torch.allclose(model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[4, 3, 2, 1]])))


@pytest.mark.parametrize(
    ("network", "task"),
    [
        (plan.Mlp(name="mlp"), _task(TOKENS)),
        (plan.LogisticRegression(name="logistic-regression"), _task(_image(1, 28))),
        (CNN, _task(TABLE)),
        (plan.Cnn(name="cnn", channels=()), _task(_image(1, 28))),
        (LSTM, _task(TOKENS)),
        (TRANSFORMER, _task(TABLE)),
    ],
)
def test_a_network_that_does_not_fit_the_task_is_refused(network: plan.Network, task: Task) -> None:
    """The plan's author reads which two things do not go together."""
    with pytest.raises(ConfigError, match=f"network {network.name} cannot be built for task test-task"):
        build_network(network, task, seed=0)


class _OwnsAParameter(nn.Module):
    """A layer written by hand, of which per-record gradients know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.child = nn.Linear(3, 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(3),
        nn.LSTM(3, 3),
        nn.MultiheadAttention(4, 2),
        nn.Dropout(0.1),
        _OwnsAParameter(),
        type("Linear", (nn.Linear,), {})(3, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_is_not_on_the_tested_list_is_refused(layer: nn.Module) -> None:
    """By exact type: a subclass of a tested layer may compute something else."""
    with pytest.raises(ConfigError, match=f"layer 1 is a {type(layer).__name__}"):
        check_supported(nn.Sequential(nn.Linear(3, 3), layer))


def test_the_tested_list_holds_no_layer_that_no_network_uses(tmp_path: Path) -> None:
    """A layer without a network here would be on the list untested."""
    used = {
        type(module) for network, task in NETWORKS.values() for module in build_network(network, task, seed=0).modules()
    }
    digest = write_encoder(tmp_path)
    offer_bases({digest: tmp_path})
    pretrained = text_plan(digest)
    used |= {type(m) for m in build_network(pretrained.network, task_of(pretrained), seed=0).modules()}

    assert used >= SUPPORTED_LAYERS
