"""Several devices: the same sums and steps as on one, and every patient on one device only."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from client.clipping.book_keeping import BookKeeping
from client.clipping.several import SeveralDevices
from client.dp_sgd import local_steps, made_up_records
from client.records.records import Records
from shared_models.nets.build import build_network
from shared_models.plan import Mlp
from shared_models.tasks import Task
from shared_models.update import parameters_to_vector
from tests.client.made_up import repeatable, table, task_of

CLIP = 0.5
TASK = task_of(table(5), 3)
DEVICES = [
    ["cpu", "cpu"],
    ["cpu", "cpu", "cpu"],
    pytest.param(
        ["cuda:0", "cuda:0"],
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
    pytest.param(
        ["cuda:0", "cuda:1"],
        marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    ),
]


def some() -> tuple[nn.Module, Records]:
    """A network, and twenty patients with one to three records each."""
    parts = [made_up_records(TASK, torch.Generator().manual_seed(seed)) for seed in range(5)]
    patients = np.concatenate([part.patients + 4 * number for number, part in enumerate(parts)])
    inputs, targets = (torch.cat(each) for each in ([p.inputs[:] for p in parts], [p.targets[:] for p in parts]))
    return build_network(Mlp(name="mlp", hidden=(8,)), TASK, seed=0), Records(inputs, targets, patients, 20)


def engine(model: nn.Module, records: Records, device: torch.device, task: Task = TASK) -> BookKeeping:
    """Of one device."""
    return BookKeeping(model, records, task, device=device, micro_batch=8)


@pytest.mark.parametrize("names", DEVICES)
@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 20])
def test_the_sum_and_the_counts_are_those_of_one_device(names: list[str], drawn: int) -> None:
    """Also when there are fewer patients than devices, or none."""
    model, records = some()
    devices = [torch.device(name) for name in names]
    patients = np.random.default_rng(1).permutation(20)[:drawn]

    with engine(model, records, devices[0]) as one:
        wanted = one.clipped_sum(patients, clip=CLIP)
    with SeveralDevices(model, records, devices, engine) as all_of_them:
        found = all_of_them.clipped_sum(patients, clip=CLIP)

    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert all_of_them.counts() == one.counts()


@pytest.mark.parametrize("names", DEVICES)
def test_training_on_several_devices_goes_the_way_of_one(names: list[str]) -> None:
    """Sampling, noise, the proximal term and every step: the same network at the end, up to the order of sums."""
    (alone, records), (together, _) = some(), some()
    train = partial(
        local_steps,
        steps=6,
        learning_rate=0.3,
        clip=CLIP,
        noise_multiplier=0.7,
        sample_rate=0.5,
        expected_batch=10.0,
        proximal=0.1,
        micro_batch=8,
    )
    device, *others = map(torch.device, names)

    reports = [
        train(alone, records, TASK, random=repeatable(), device=device),
        train(together, records, TASK, random=repeatable(), device=device, others=others),
    ]
    again = train(together, records, TASK, random=repeatable(1), device=device, others=others)
    assert again.steps == 6
    train(alone, records, TASK, random=repeatable(1), device=device)

    assert reports[0] == reports[1]
    assert np.allclose(parameters_to_vector(alone), parameters_to_vector(together), rtol=0, atol=1e-5)


def test_an_error_on_one_device_reaches_the_caller_and_leaves_no_trace() -> None:
    """The hooks on every network are gone afterwards."""
    model, records = some()
    broken = Records(records.inputs[:][:, :3], records.targets, records.patients, 20)  # another width
    devices = [torch.device("cpu")] * 2

    with (
        pytest.raises(RuntimeError, match="shapes"),
        SeveralDevices(model, broken, devices, engine) as gradients,
    ):
        gradients.clipped_sum(np.arange(20), clip=CLIP)

    assert not any(module._forward_hooks for module in model.modules())
