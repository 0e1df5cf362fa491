"""Recorded passes: the same sums as kernel by kernel, for batches of any size, and for nobody more than C."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.clipping.book_keeping import BookKeeping
from client.dp_sgd import made_up_records
from client.records.records import Records
from shared_models.nets.build import build_network
from shared_models.plan import Cnn, Lstm, Mlp, Network, Transformer, UNet
from shared_models.tasks import ImageInput, SeriesInput, Task, TokensInput
from tests.client.made_up import OUTLINE, Input, numeric, table, task_of

SERIES = SeriesInput(variables=(numeric("pulse"), numeric("pressure")), steps=6, step_unit="h")
IMAGE = ImageInput(channels=1, height=28, width=28)
CLIP = 0.5

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: graphs are CUDA's")
networks = pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Mlp(name="mlp", hidden=(8,)), table(5)),
        (Cnn(name="cnn", channels=(4, 8)), IMAGE),
        (UNet(name="unet"), IMAGE),
        (Transformer(name="transformer", width=8, heads=2, layers=2), TokensInput(vocabulary=11, length=7)),
        (Lstm(name="lstm", hidden=5), SERIES),
    ],
)


def many(network: Network, inputs: Input, each: int) -> tuple[nn.Module, Records, Task]:
    """A network, and 40 patients with so many records each."""
    task = task_of(inputs, OUTLINE if isinstance(network, UNet) else 3)
    generator = torch.Generator().manual_seed(0)
    parts = [made_up_records(task, generator) for _ in range(-(-40 * each // 7))]
    rows = slice(0, 40 * each)
    given, known = (torch.cat(found)[rows] for found in ([p.inputs[:] for p in parts], [p.targets[:] for p in parts]))
    records = Records(given, known, np.repeat(np.arange(40), each), 40)
    return build_network(network, task, seed=0), records, task


@networks
@pytest.mark.parametrize("each", [1, 2])
def test_rows_that_fill_a_pass_up_weigh_nothing(network: Network, inputs: Input, each: int) -> None:
    """A pass for sixteen patients, of whom eleven count, gives the clipped sum of eleven."""
    # given: eleven patients, and rows of zeros for five more
    model, records, task = many(network, inputs, each)
    eleven = np.arange(11)
    rows, targets, _ = records.select(eleven)
    more, other = (torch.cat([of, of.new_zeros(5 * each, *of.shape[1:])]) for of in (rows, targets))

    # when
    with BookKeeping(model, records, task, device="cpu", micro_batch=256) as gradients:
        wanted = gradients.clipped_sum(eleven, clip=CLIP)
        clipped, _ = gradients.counts()
        found = gradients._quick_pass(more, other, torch.tensor(11), np.full(16, each), CLIP)

    # then
    assert not found.doubtful
    assert found.clipped == clipped
    assert (found.total - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25, 0.0])
def test_a_pass_that_measures_the_quick_way_says_where_it_may_be_wrong(value: float) -> None:
    """Numbers that are none, that overflow, or that vanish: the sum is void, and is made the exact way."""
    model, records, task = many(Mlp(name="mlp", hidden=(8,)), table(5), 1)
    rows, targets, _ = records.select(np.arange(16))
    if value == 0.0:  # no gradient at all
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        targets = targets.float() * 0
    rows[3] = value

    with BookKeeping(model, records, task, device="cpu", micro_batch=256) as gradients:
        found = gradients._quick_pass(rows, targets, torch.tensor(16), np.full(16, 1), 1e-31)

    assert found.doubtful


@needs_cuda
@networks
@pytest.mark.parametrize("each", [1, 2])
def test_replays_give_the_sums_of_the_processor(
    network: Network,
    inputs: Input,
    each: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Draws of many sizes, between steps: each sum as on the processor, and the same counts."""
    caplog.set_level(logging.INFO, "konsil")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds convolutions to ten bits
    model, records, task = many(network, inputs, each)
    twin = build_network(network, task, seed=0)
    random = np.random.default_rng(0)
    with (
        BookKeeping(twin, records, task, device="cpu", micro_batch=256) as slow,
        BookKeeping(model, records, task, device="cuda", micro_batch=256) as quick,
    ):
        for _ in range(12):
            drawn = random.permutation(40)[: random.integers(1, 41)]
            wanted, found = slow.clipped_sum(drawn, clip=CLIP), quick.clipped_sum(drawn, clip=CLIP)
            assert (found.cpu() - wanted).norm() <= 1e-3 * wanted.norm()
            slow.descend(wanted, learning_rate=0.1)
            quick.descend(wanted.cuda(), learning_rate=0.1)
        assert slow.counts() == quick.counts()
    assert "kernel by kernel" not in caplog.text


@needs_cuda
def test_a_broken_record_counts_as_zero_in_a_replay_too() -> None:
    """The quick way is given up for that batch, and taken again for the next."""
    model, records, task = many(Mlp(name="mlp", hidden=(8,)), table(5), 1)
    broken = records.inputs[:].clone()
    broken[7] = float("nan")
    some = Records(broken, records.targets, records.patients, 40)
    everyone, others = np.arange(40), np.delete(np.arange(40), 7)

    with BookKeeping(model, some, task, device="cuda", micro_batch=256) as gradients:
        for _ in range(4):
            with_it = gradients.clipped_sum(everyone, clip=CLIP)
            without = gradients.clipped_sum(others, clip=CLIP)
            assert (with_it - without).norm() <= 1e-5 * without.norm()
        assert gradients.counts()[1] == 4


@needs_cuda
def test_parameters_that_moved_are_read_where_they_lie_now() -> None:
    """A graph holds addresses; when parameters get others, it is recorded anew."""
    model, records, task = many(Mlp(name="mlp", hidden=(8,)), table(5), 1)
    everyone = np.arange(40)

    def total() -> Tensor:
        with BookKeeping(model, records, task, device="cuda", micro_batch=256) as gradients:
            return [gradients.clipped_sum(everyone, clip=CLIP) for _ in range(3)][-1]

    before = total()
    kept = [parameter.data for parameter in model.parameters()]  # so that no address is used twice
    for parameter in model.parameters():
        parameter.data = parameter.data * 2

    twin = build_network(Mlp(name="mlp", hidden=(8,)), task, seed=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    with BookKeeping(twin, records, task, device="cpu", micro_batch=256) as slow:
        wanted = slow.clipped_sum(everyone, clip=CLIP)
    assert kept
    assert (total().cpu() - wanted).norm() <= 1e-3 * wanted.norm() < (before.cpu() - wanted).norm()


@needs_cuda
def test_a_network_that_waits_for_the_gpu_is_launched_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """Such a pass cannot be recorded; sums are right all the same, before and after the attempt."""
    caplog.set_level(logging.INFO, "konsil")
    plain, records, task = many(Mlp(name="mlp", hidden=(8,)), table(5), 1)

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain

        def forward(self, inputs: Tensor) -> Tensor:
            """The same, once the GPU has answered."""
            outputs: Tensor = self.inner(inputs)
            return outputs if outputs.sum().item() < 1e30 else outputs * 0

    everyone = np.arange(40)
    with BookKeeping(Waits(), records, task, device="cuda", micro_batch=256) as gradients:
        first, *later = [gradients.clipped_sum(everyone, clip=CLIP) for _ in range(4)]
    assert all((each - first).norm() <= 1e-6 * first.norm() for each in later)
    assert "kernel by kernel" in caplog.text
