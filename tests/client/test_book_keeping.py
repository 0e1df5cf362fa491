"""The book-keeping engine: equal to the loop over patients, and never more than C for anybody."""

import copy
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from client.clipping.book_keeping import BookKeeping, covers
from client.clipping.layers import Direct, Factored, Share, is_extreme, linear, patches
from client.dp_sgd import PatientGradients, gradients_for, made_up_records, self_check
from client.records.records import Records
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.plan import Cnn, LogisticRegression, Lstm, Mlp, Network, ProportionalHazards, Transformer, UNet
from shared_models.tasks import Head, ImageInput, SeriesInput, TokensInput
from tests.client.made_up import HEADS, OUTLINE, SURVIVAL, Input, numeric, table, table_records, task_of

TASK = task_of(table(5))  # only its loss matters here: one logit
SERIES = SeriesInput(variables=(numeric("pulse"), numeric("pressure")), steps=6, step_unit="h")
VOCABULARY = 7


class Mean(nn.Module):
    """Mean over all but the record and its features, which come second or last."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, values: Tensor) -> Tensor:
        """The mean."""
        places = [i for i in range(1, values.dim()) if i != self.features % values.dim()]
        return values.mean(dim=places) if places else values


class Twice(nn.Module):
    """Calls one layer twice, on different inputs and with different numbers of positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Both calls' sum."""
        first = self.layer(inputs).tanh()
        return first + self.layer(first[:, :1] * 0.7)


class Gru(nn.Module):
    """A GRU cell of linear layers over all positions; the last state comes out."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.from_input, self.from_state = nn.Linear(width, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape ``(n, hidden)``."""
        state = inputs.new_zeros(len(inputs), self.from_state.in_features)
        for driven in self.from_input(inputs).unbind(dim=1):
            reset, keep, new = driven.chunk(3, dim=1)
            old_reset, old_keep, old_new = self.from_state(state).chunk(3, dim=1)
            kept = (keep + old_keep).sigmoid()
            state = kept * state + (1 - kept) * (new + (reset + old_reset).sigmoid() * old_new).tanh()
        return state


class Attention(nn.Module):
    """Attention with heads, of linear layers; the first is frozen and has an adapter of low rank beside it."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections, self.out = (
            nn.Linear(width, 3 * width).requires_grad_(requires_grad=False),
            nn.Linear(width, width),
        )
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, 3 * width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape as it was."""
        made = self.projections(inputs) + self.up(self.down(inputs))
        queries, keys, values = made.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found


class Keyword(nn.Module):
    """Hands a plain layer its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """One logit."""
        return self.head(input=inputs)


Made = tuple[nn.Module, Callable[[int, torch.Generator], Tensor]]


def rows(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    """Makes that many records of this shape."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def tokens(length: int) -> Callable[[int, torch.Generator], Tensor]:
    """Makes that many records of tokens, with repetitions."""
    return lambda n, generator: torch.randint(0, VOCABULARY, (n, length), generator=generator)


@st.composite
def linear_networks(draw: st.DrawFn) -> Made:
    """Two linear layers over any number of positions: few and many for their width."""
    width, hidden = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    positions = draw(st.sampled_from([(), (1,), (2,), (3, 4), (60,)]))
    bias = draw(st.booleans())
    model = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.Tanh(), Mean(-1), nn.Linear(hidden, 1))
    return model, rows(*positions, width)


@st.composite
def convolutional_networks(draw: st.DrawFn) -> Made:
    """One to three dimensions of space, groups, stride, dilation, padding; large weights and small maps too."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    before, after = groups * draw(st.integers(1, 3)), groups * draw(st.sampled_from([1, 2, 3, 40]))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    # An even kernel of padding "same" pads its sides differently, and is not covered.
    same = dilation * (kernel - 1) % 2 == 0
    paddings: list[str | int] = [0, 1, "valid", *(["same"] if same else [])]
    padding = draw(st.sampled_from(paddings))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    size = 1 + dilation * (kernel - 1) + draw(st.integers(0, 3))
    layer: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    convolution = layer(
        before,
        after,
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        bias=draw(st.booleans()),
    )
    model = nn.Sequential(convolution, nn.Tanh(), Mean(1), nn.Linear(after, 1))
    return model, rows(before, *range(size, size + dims))


@st.composite
def normalised_networks(draw: st.DrawFn) -> Made:
    """Layer norm over one or two dimensions, group norm over any map; with and without scale and shift."""
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(6,), (4, 3)]))
        before = draw(st.sampled_from([(), (5,)]))
        norm: nn.Module = nn.LayerNorm(shape, bias=draw(st.booleans()))
        return nn.Sequential(norm, nn.Tanh(), nn.Flatten(), nn.Linear(math.prod([*before, *shape]), 1)), rows(
            *before, *shape
        )
    norm = nn.GroupNorm(draw(st.sampled_from([1, 2, 4])), 8)
    space = draw(st.sampled_from([(5,), (3, 4), (2, 3, 2)]))
    return nn.Sequential(norm, nn.Tanh(), Mean(1), nn.Linear(8, 1)), rows(8, *space)


@st.composite
def embedded_networks(draw: st.DrawFn) -> Made:
    """Tokens that repeat within a record and between a patient's records, with or without a padding row."""
    width, padding = draw(st.integers(1, 5)), draw(st.sampled_from([None, 0]))
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, width, padding_idx=padding), nn.Tanh(), Mean(-1), nn.Linear(width, 1)
    )
    return model, tokens(draw(st.integers(1, 8)))


@st.composite
def repeating_networks(draw: st.DrawFn) -> Made:
    """A layer called twice; a module under two names."""
    layers: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Linear(4, 4), (3, 4)),
        (nn.LayerNorm(4), (3, 4)),
        (nn.Conv1d(1, 1, 3, padding=1), (1, 6)),
    ]
    layer, shape = draw(st.sampled_from(layers))
    layer = copy.deepcopy(layer)
    twice = Twice(layer) if draw(st.booleans()) else nn.Sequential(layer, nn.Tanh(), layer)
    return nn.Sequential(twice, nn.Tanh(), nn.Flatten(), nn.Linear(math.prod(shape), 1)), rows(*shape)


@st.composite
def recurrent_networks(draw: st.DrawFn) -> Made:
    """A GRU cell that is called at each of a few steps."""
    width, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return nn.Sequential(Gru(width, hidden), nn.Linear(hidden, 1)), rows(draw(st.integers(1, 5)), width)


@st.composite
def attending_networks(draw: st.DrawFn) -> Made:
    """Attention with several heads, and an adapter on frozen weights."""
    heads, rank = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = 2 * heads
    model = nn.Sequential(Attention(width, heads, rank), nn.Tanh(), Mean(-1), nn.Linear(width, 1))
    return model, rows(draw(st.integers(1, 6)), width)


NETWORKS = st.one_of(
    linear_networks(),
    convolutional_networks(),
    normalised_networks(),
    embedded_networks(),
    repeating_networks(),
    recurrent_networks(),
    attending_networks(),
)


def scatter(model: nn.Module, generator: torch.Generator) -> None:
    """Parameters that nobody's initialisation would give: scales that are not one, shifts that are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def made_up(make: Callable[[int, torch.Generator], Tensor], owners: list[int], generator: torch.Generator) -> Records:
    """Records of these patients, who are numbered again."""
    _, patients = np.unique(owners, return_inverse=True)
    targets = torch.randint(2, (len(owners),), generator=generator).double()
    return Records(make(len(owners), generator), targets, patients, int(patients.max()) + 1)


def one_by_one(model: nn.Module, records: Records) -> Tensor:
    """Each patient's mean gradient by autograd in float64, one record at a time: shape ``(patients, d)``."""
    exact = copy.deepcopy(model).double()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    means = torch.zeros(records.patient_count, sum(p.numel() for p in parameters), dtype=torch.float64)
    inputs = records.inputs[:].double() if records.inputs[:].is_floating_point() else records.inputs[:]
    for row, patient in enumerate(records.patients):
        loss = loss_per_record(TASK, exact(inputs[row : row + 1]), records.targets[row : row + 1]).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        means[patient] += torch.cat([part.flatten() for part in found]) / records.record_counts[patient]
    return means


def engine(model: nn.Module, records: Records, micro_batch: int = 256) -> BookKeeping:
    """The engine on the CPU."""
    return BookKeeping(model, records, TASK, device="cpu", micro_batch=micro_batch)


def summed(
    model: nn.Module, records: Records, clip: float, micro_batch: int = 256, patients: NDArray[np.int64] | None = None
) -> Tensor:
    """The clipped sum over these patients, or all."""
    with engine(model, records, micro_batch) as gradients:
        everyone = np.arange(records.patient_count)
        return gradients.clipped_sum(everyone if patients is None else patients, clip=clip)


OWNERS = st.lists(st.integers(0, 5), min_size=1, max_size=12)


# Equal to the loop


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    made=NETWORKS,
    owners=OWNERS,
    micro_batch=st.sampled_from([1, 2, 5, 256]),
    seed=st.integers(0, 1000),
    double=st.booleans(),
)
def test_sums_and_norms_equal_those_of_the_loop_over_patients(
    made: Made, owners: list[int], micro_batch: int, seed: int, double: bool
) -> None:
    """To relative 1e-5 for every layer, shape, batch and layout of records; without a clip, and where it binds.

    The clip is 2**-18 of itself below C; the rest is the rounding of the network's own passes.
    """
    generator = torch.Generator().manual_seed(seed)
    model, make = copy.deepcopy(made[0]), made[1]
    scatter(model, generator)
    records = made_up(make, owners, generator)
    truth = one_by_one(model, records)
    if double:
        model = model.double()
    elif records.inputs[:].is_floating_point():
        records = Records(records.inputs[:].float(), records.targets, records.patients, records.patient_count)
        truth = one_by_one(model, records)
    norms = truth.norm(dim=1)
    assert covers(model)

    for clip in (math.inf, float(norms.median()) + 1e-3, 1e-3):
        total = summed(model, records, clip, micro_batch)

        clipped = truth * (clip / norms).clamp(max=1)[:, None]
        assert (total - clipped.sum(dim=0)).norm() <= 1e-5 * clipped.norm(dim=1).sum() + 1e-12

    first = summed(model, records, float(norms[0]) / 2 + 1e-9, micro_batch, np.arange(1))
    assert first.norm() == pytest.approx(min(float(norms[0]), float(norms[0]) / 2 + 1e-9), rel=1e-4)


SHARED: list[tuple[Network, Input, int | tuple[Head, ...]]] = [
    (LogisticRegression(name="logistic-regression"), table(5), 2),
    (Mlp(name="mlp", hidden=(6, 3)), table(5), 4),
    (Cnn(name="cnn", channels=(4, 8)), ImageInput(channels=1, height=28, width=30), 2),
    (Cnn(name="cnn", channels=(4, 20, 40)), ImageInput(channels=3, height=96, width=96), 3),
    (Lstm(name="lstm", hidden=5, layers=2), SERIES, 2),
    (Lstm(name="lstm", hidden=5, carry_forward=True), SERIES, 2),
    (Transformer(name="transformer", width=8, heads=2, layers=2), SERIES, 3),
    (Transformer(name="transformer", width=8, heads=2, layers=2), TokensInput(vocabulary=11, length=7), 2),
    (Mlp(name="mlp", hidden=(6,)), table(5), HEADS),
    (ProportionalHazards(name="proportional-hazards"), table(5), SURVIVAL),
    (UNet(name="unet", channels=(4, 6)), ImageInput(channels=1, height=28, width=31), OUTLINE),
]


@pytest.mark.parametrize(("network", "inputs", "classes"), SHARED)
def test_every_shared_network_is_covered_and_agrees_with_opacus(
    network: Network, inputs: Input, classes: int | tuple[Head, ...]
) -> None:
    """Two engines that share no arithmetic give the same sums, clipped and not, in whole and in parts."""
    task, generator = task_of(inputs, classes), torch.Generator().manual_seed(3)
    model = build_network(network, task, seed=1)
    assert covers(model)
    scatter(model, generator)
    owners = np.array([0, 1, 1, 2, 3, 3, 3, 4, 5])
    made = made_up_records(task, generator)
    shape = {"table": (5,), "series": (6, 6), "tokens": (7,)}.get(inputs.kind)
    if shape is None:
        assert isinstance(inputs, ImageInput)
        shape = (inputs.channels, inputs.height, inputs.width)
    data = torch.rand(len(owners), *shape, generator=generator)
    records = Records(
        (data * 11).long() if inputs.kind == "tokens" else data,
        made.targets[torch.arange(len(owners)) % len(made)],
        owners,
        6,
    )
    with PatientGradients(model, records, task, device="cpu", micro_batch=256) as opacus:
        lengths = [float(opacus.clipped_sum(np.array([i]), clip=math.inf).norm()) for i in range(6)]
        clips = (math.inf, sorted(lengths)[2], 1e-2)
        wanted = [opacus.clipped_sum(np.arange(6), clip=clip) for clip in clips]

    for micro_batch in (2, 256):
        with BookKeeping(model, records, task, device="cpu", micro_batch=micro_batch) as ours:
            for clip, total in zip(clips, wanted, strict=True):
                allowed = 2e-5 * sum(min(length, clip) for length in lengths)
                assert (ours.clipped_sum(np.arange(6), clip=clip) - total).norm() <= allowed


# Never more than C

HOSTILE = (0.0, 1e-30, 1e-12, 1.0, 1e12, 1e19, 1e30, 3e38, math.inf, -math.inf, math.nan)


def deep(seed: int) -> nn.Module:
    """Convolution, both normalisations, a layer called twice, and linear layers over one and many positions."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        Twice(nn.Linear(4, 4)),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 1),
    )
    scatter(model, torch.Generator().manual_seed(seed))
    return model


def plain_linear(seed: int) -> nn.Module:
    """Positions of a linear layer that meet nothing that would bound them."""
    model = nn.Sequential(nn.Linear(4, 6), Mean(-1), nn.Linear(6, 1))
    scatter(model, torch.Generator().manual_seed(seed))
    return model


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.lists(st.sampled_from(HOSTILE), min_size=8, max_size=8), min_size=2, max_size=6),
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    build=st.sampled_from([deep, plain_linear]),
    clip=st.sampled_from([1e-3, 1.0, 1e3]),
    micro_batch=st.sampled_from([1, 3, 256]),
    seed=st.integers(0, 100),
)
def test_no_input_moves_the_sum_by_more_than_the_clip(
    values: list[list[float]],
    owners: list[int],
    build: Callable[[int], nn.Module],
    clip: float,
    micro_batch: int,
    seed: int,
) -> None:
    """However large, small, infinite or no number at all, alone or beside others; nothing is raised either."""
    _, patients = np.unique(owners[: len(values)], return_inverse=True)
    count = int(patients.max()) + 1
    records = Records(torch.tensor(values).view(-1, 2, 4), torch.arange(len(values)).float() % 2, patients, count)
    model = build(seed)

    with engine(model, records, micro_batch) as gradients:
        everyone = np.arange(count)
        total = gradients.clipped_sum(everyone, clip=clip)
        without = [gradients.clipped_sum(np.delete(everyone, patient), clip=clip) for patient in everyone]
        alone = [gradients.clipped_sum(np.array([patient]), clip=clip) for patient in everyone]

    assert total.isfinite().all()
    # Beside the clip only the rounding, in float32, of who shares a batch: 1e-5 of what at most 3 patients are allowed.
    assert all((total - each).norm() <= clip * (1 + 1e-5) for each in without)
    assert all(each.norm() <= clip for each in alone)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [math.inf, 1.0, 1e-3])
@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Cnn(name="cnn", channels=(4, 8)), ImageInput(channels=1, height=28, width=28)),
        (Transformer(name="transformer", width=8, heads=2, layers=2), TokensInput(vocabulary=11, length=7)),
        (Lstm(name="lstm", hidden=5), SERIES),
    ],
)
def test_sixteen_bits_change_gradients_a_little_and_the_clip_not_at_all(
    network: Network, inputs: Input, clip: float, precision: torch.dtype
) -> None:
    """Under autocast each gradient is off by its rounding, and nobody's share is longer than C."""
    task = task_of(inputs, 2)
    model, records = build_network(network, task, seed=0), made_up_records(task, torch.Generator().manual_seed(0))
    everyone = np.arange(records.patient_count)

    with BookKeeping(model, records, task, device="cpu", micro_batch=256) as full:
        wanted = full.clipped_sum(everyone, clip=clip)
    with BookKeeping(model, records, task, device="cpu", micro_batch=256, precision=precision) as half:
        total = half.clipped_sum(everyone, clip=clip)
        alone = [half.clipped_sum(np.array([patient]), clip=clip) for patient in everyone]

    assert 0 < (total - wanted).norm() <= 0.05 * wanted.norm()  # 2**-8 a product, over some ten layers
    assert all(each.norm() <= clip for each in alone)


@pytest.mark.parametrize("size", [1.0, 1e10, 1e18])
def test_positions_that_cancel_are_never_found_too_short(size: float) -> None:
    """Huge positions of opposite sign leave a sum that is all rounding: its norm may be over-, never under-stated."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 4, 6, generator=generator) * size
    grads = torch.randn(5, 4, 3, generator=generator)
    inputs[:, 2:], grads[:, 2:] = inputs[:, :2], -grads[:, :2]
    share, factors = Factored(inputs, grads), torch.eye(5, dtype=torch.float64)

    norms = share.squares(exact=False).sqrt()

    for patient in range(5):
        total = torch.zeros(18, dtype=torch.float64)
        share.add_to(total, factors[patient])
        assert total.norm() <= norms[patient] * (1 + 2**-20)


@pytest.mark.parametrize("positions", [1, 60])
@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
def test_extreme_gradients_are_measured_and_clipped(size: float, positions: int) -> None:
    """Where squares would overflow or vanish in float32: the patient still counts, with C or with what there is."""
    layer = nn.Linear(4, 1)
    model = nn.Sequential(layer, Mean(-1))
    inputs = torch.ones(3, positions, 4) * torch.tensor([size, 1.0, -size])[:, None, None]
    records = Records(inputs, torch.ones(3), np.array([0, 1, 2]), 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # each gradient is half the input, and half for the bias

    for clip in (size, 1e-30):
        with engine(model, records) as gradients:
            lengths = [float(gradients.clipped_sum(np.array([i]), clip=clip).norm()) for i in range(3)]
            assert gradients.counts()[1] == 0

        for length, value in zip(lengths, (size, 1.0, size), strict=True):
            assert length == pytest.approx(min(clip, math.sqrt(value**2 + 0.25)), rel=1e-5)


@pytest.mark.parametrize(("inputs", "grads"), [(1e-21, 1e18), (1e25, 1e-25), (1e-30, 1e30)])
def test_extreme_factors_of_any_product_are_measured(inputs: float, grads: float) -> None:
    """One vanishes and the other is huge: the product is neither."""
    share = Factored(torch.full((1, 1, 300), inputs), torch.full((1, 1, 2), grads))

    wanted = math.sqrt(600) * inputs * grads
    assert float(share.squares(exact=True).sqrt()) == pytest.approx(wanted, rel=1e-5)
    quick = float(share.squares(exact=False).sqrt())
    assert quick == pytest.approx(wanted, rel=1e-5) or is_extreme(torch.tensor([quick**2])).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e20, 1e36])
@pytest.mark.parametrize("clip", [1e-8, 1.0])
def test_a_long_vector_is_never_added_with_more_than_the_clip(size: float, clip: float) -> None:
    """Where gradients are added in float32: also where a factor is too small for it."""
    gradients = torch.randn(9, 30_000, generator=torch.Generator().manual_seed(0)) * size
    share = Direct(gradients)
    norms = share.squares(exact=size > 1e15).sqrt()
    factors = (clip * BookKeeping.rounding / norms).clamp(max=1)

    for patient in range(9):
        total = torch.zeros(30_000, dtype=torch.float64)
        share.add_to(total, torch.eye(9, dtype=torch.float64)[patient] * factors)
        assert total.norm() <= clip
        assert total.norm() == pytest.approx(min(clip, float(norms[patient])), rel=1e-5)
    total = torch.zeros(30_000, dtype=torch.float64)
    share.add_to(total, factors)
    wanted = factors @ gradients.double()
    assert (total - wanted).norm() <= 1e-6 * wanted.norm()  # nine additions in float32: 9 * 2**-24


def test_broken_patients_change_nobody_elses_share() -> None:
    """One record that is no number, among good ones: its patient is left out, the rest is as it was, and counted."""
    records = table_records([0, 1, 1, 2, 3])
    model = build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=0)
    wanted = summed(model, records, 0.1, patients=np.array([0, 2, 3]))
    records.inputs[:][1] = math.nan

    with engine(model, records) as gradients:
        total = gradients.clipped_sum(np.arange(4), clip=0.1)
        counts = gradients.counts()

    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-7)
    assert counts == (3, 1)


def test_an_empty_draw_gives_zero() -> None:
    """Of the right length, and no network is asked."""
    model = build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=0)

    total = summed(model, table_records([0, 1]), 1.0, patients=np.array([], dtype=np.int64))

    assert total.shape == (sum(p.numel() for p in model.parameters()),)
    assert not total.any()


def test_a_half_used_layer_leaks_nothing_into_the_next_batch() -> None:
    """What one pass left unfinished, the next does not meet."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes, self.used = nn.Linear(5, 1), nn.Linear(5, 1), True

        def forward(self, inputs: Tensor) -> Tensor:
            extra = [self.sometimes(inputs * (i + 1)) for i in range(2)]
            return sum(extra if self.used else extra[1:], start=self.always(inputs))

    model, records, everyone = Fickle(), table_records(np.arange(4)), np.arange(4)
    with engine(model, records) as gradients:
        fresh = gradients.clipped_sum(everyone, clip=1.0)
        model.used = False
        half = gradients.clipped_sum(everyone, clip=math.inf)
        wanted = one_by_one(model, records).sum(dim=0)
        model.used = True
        again = gradients.clipped_sum(everyone, clip=1.0)

    assert torch.equal(again, fresh)
    torch.testing.assert_close(half, wanted, rtol=1e-5, atol=1e-6)


# What is covered, and what is not


def test_keyword_inputs_are_right() -> None:
    """Opacus is silently wrong about them, and its ghost mode lets one record contribute a hundred clips."""
    model, records = Keyword(), table_records([0, 1, 1])

    self_check(model, TASK, clip=0.5)

    truth = one_by_one(model, records)
    torch.testing.assert_close(summed(model, records, math.inf), truth.sum(dim=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight"])
def test_frozen_parameters_have_no_part(frozen: str) -> None:
    """The sum is over the trainable ones, in their order; others of the same layer train on."""
    model, records = build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=0), table_records([0, 0, 1])
    model.get_parameter(frozen).requires_grad_(False)

    total = summed(model, records, math.inf)

    torch.testing.assert_close(total, one_by_one(model, records).sum(dim=0), rtol=1e-5, atol=1e-7)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 1))
    model[2].weight = model[0].weight
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 1))
    model[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    return model


class _Odd(nn.Linear):
    """Computes something else than it says."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input * 2)


NOT_COVERED: list[Callable[[], nn.Module]] = [
    _tied,
    _hooked,
    lambda: nn.Sequential(_Odd(5, 1)),
    lambda: nn.Sequential(nn.RMSNorm(5), nn.Linear(5, 1)),
    lambda: nn.Sequential(nn.Embedding(3, 1, max_norm=1.0)),
    lambda: nn.Sequential(nn.Embedding(3, 1, scale_grad_by_freq=True)),
    lambda: nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")),
    lambda: nn.Sequential(nn.Conv1d(1, 1, 2, padding="same")),
    lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1)),
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 1))),
]


@pytest.mark.parametrize("build", NOT_COVERED)
def test_what_is_not_known_to_be_right_is_not_covered(
    build: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    """Shared parameters, foreign hooks, other types and settings go to Opacus, and the log says so."""
    model = build()

    assert not covers(model)
    with caplog.at_level(logging.INFO, logger="konsil.hospital"):
        chosen = gradients_for(model, table_records([0]), TASK, device="cpu", micro_batch=8)
    assert isinstance(chosen, PatientGradients)
    assert "Opacus" in caplog.text


def test_a_covered_network_goes_to_book_keeping() -> None:
    """The default."""
    model = build_network(Mlp(name="mlp"), TASK, seed=0)

    assert isinstance(gradients_for(model, table_records([0]), TASK, device="cpu", micro_batch=8), BookKeeping)


class _InPlace(nn.Module):
    """Changes a layer's input after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs * 1
        logits = self.head(values)
        values.mul_(2)
        return logits


class _Broadcast(nn.Module):
    """Positions looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(1, 5), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs + self.positions(torch.zeros(1, dtype=torch.int64)))


class _Functional(nn.Module):
    """Uses a layer's weight past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs) + (inputs**2) @ self.head.weight.T


class _Mixing(nn.Module):
    """Subtracts the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs - 0.5 * inputs.mean(dim=0))


def test_an_input_that_is_changed_after_its_use_is_refused() -> None:
    """The engine reads it again in the backward pass, and would take the wrong numbers."""
    with pytest.raises(ConfigError, match="in place"):
        summed(_InPlace(), table_records([0, 1]), 1.0)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_InPlace, "self-check"),
        (_Broadcast, "keep records apart"),
        (_Functional, "self-check"),
        (_Mixing, "self-check"),
    ],
)
def test_what_only_a_pass_can_show_is_refused_by_the_self_check(build: Callable[[], nn.Module], reason: str) -> None:
    """These networks are covered by their layers' types; the self-check runs this engine and finds them."""
    model = build()
    assert covers(model)

    with pytest.raises(ConfigError, match=reason):
        self_check(model, TASK, clip=0.5)


def test_no_trace_is_left_on_the_network() -> None:
    """Neither hooks nor attributes nor gradients, also where a pass breaks off; the mode is what it was."""
    model = build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=0).eval()
    attributes = [set(vars(module)) for module in model.modules()]
    summed(model, table_records([0, 1, 1]), 1.0)

    def half_way() -> None:
        with engine(model, table_records([0])):
            model(torch.zeros(1, 5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_way()
    assert not model.training
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(p.grad is None and not vars(p) for p in model.parameters())


# The two forms of a linear layer


@settings(max_examples=40, deadline=None, derandomize=True)
@given(positions=st.integers(1, 70), d=st.integers(1, 300), p=st.integers(1, 300), seed=st.integers(0, 99))
def test_both_forms_of_a_linear_layer_agree(positions: int, d: int, p: int, seed: int) -> None:
    """Written out or factored: the same norms to 1e-4, the same sums to 1e-5; which is cheaper decides nothing else."""
    generator = torch.Generator().manual_seed(seed)
    inputs, grads = torch.randn(3, positions, d, generator=generator), torch.randn(3, positions, p, generator=generator)
    factors = torch.rand(3, generator=generator, dtype=torch.float64)
    forms: list[Share] = [
        Direct(torch.bmm(grads.mT, inputs).flatten(1)),
        Factored(inputs, grads),
        linear(inputs, grads),
    ]

    norms = [form.squares(exact=False).sqrt() for form in forms]
    totals = [torch.zeros(p * d, dtype=torch.float64) for _ in forms]
    for form, total in zip(forms, totals, strict=True):
        form.add_to(total, factors)

    for norm, total in zip(norms[1:], totals[1:], strict=True):
        torch.testing.assert_close(norm, norms[0], rtol=1e-4, atol=1e-4)
        assert (total - totals[0]).norm() <= 1e-5 * (norms[0] * factors).sum()


def test_the_cheaper_form_is_chosen() -> None:
    """One position is never written out; many positions of a narrow layer are; a layer too large to store is not."""
    assert isinstance(linear(torch.ones(1, 1, 10), torch.ones(1, 1, 10)), Factored)
    assert isinstance(linear(torch.ones(1, 3, 784), torch.ones(1, 3, 256)), Factored)
    assert isinstance(linear(torch.ones(1, 128, 128), torch.ones(1, 128, 512)), Direct)
    assert isinstance(linear(torch.ones(1, 16, 4096), torch.ones(1, 16, 4096)), Factored)


def test_patches_are_what_a_convolution_multiplies() -> None:
    """Weight times patches is the convolution, with stride, dilation and padding, over several records a patient."""
    layer = nn.Conv2d(3, 5, (2, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2), bias=False)
    inputs = torch.randn(2, 4, 3, 7, 8, generator=torch.Generator().manual_seed(0))

    products = patches(layer, inputs) @ layer.weight.flatten(1).T

    outputs = layer(inputs.flatten(0, 1)).unflatten(0, (2, 4))
    torch.testing.assert_close(products, outputs.flatten(3).transpose(2, 3).flatten(1, 2), rtol=1e-4, atol=1e-5)
