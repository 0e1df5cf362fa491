"""Training on top of a pretrained base: clipped per patient, exactly; the base stays what it is."""

import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from client.cli import app
from client.clipping.book_keeping import BookKeeping, covers
from client.dp_sgd import PatientGradients, local_steps, made_up_records, self_check
from client.evaluate import statistics
from client.records.records import Records
from shared_models.errors import PretrainedError
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.nets.pretrained import Kept
from shared_models.plan import StudyPlan
from shared_models.pretrained import find_base, offer_bases
from shared_models.tasks import Task, task_of
from shared_models.update import parameters_to_vector, trainable
from tests.client.made_up import repeatable
from tests.tiny_bases import image_plan, text_plan, write_body, write_encoder

KINDS = ("head", "one layer", "all layers", "cnn", "cnn with norms")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StudyPlan]:
    """Plans over a tiny encoder and a tiny CNN, which this process knows."""
    folder = tmp_path_factory.mktemp("bases")
    encoder, body = write_encoder(folder / "encoder"), write_body(folder / "body.safetensors")
    offer_bases({encoder: folder / "encoder", body: folder / "body.safetensors"})
    return {
        "head": text_plan(encoder, top_layers=0),
        "one layer": text_plan(encoder, top_layers=1),
        "all layers": text_plan(encoder, top_layers=3),
        "cnn": image_plan(body),
        "cnn with norms": image_plan(body, train_norms=True),
    }


def scattered(plan: StudyPlan, seed: int = 3) -> tuple[Any, Task]:
    """A plan's network in the middle of training: no adapter and no head is zero."""
    task = task_of(plan)
    model = build_network(plan.network, task, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model, task


def patients_of(task: Task, seed: int = 5) -> Records:
    """Made-up records: four patients, seven records."""
    return made_up_records(task, torch.Generator().manual_seed(seed))


def one_by_one(model: nn.Module, records: Records, task: Task) -> Tensor:
    """Each patient's mean gradient by autograd alone, one record at a time, shape ``(patients, d)``."""
    means = [torch.zeros(len(parameters_to_vector(model)), dtype=torch.float64) for _ in range(records.patient_count)]
    for row, patient in enumerate(records.patients):
        model.zero_grad()
        loss_per_record(task, model(records.inputs[row : row + 1]), records.targets[row : row + 1]).sum().backward()
        found = [parameter.grad for parameter in trainable(model).values()]
        flat = torch.cat([gradient.flatten() for gradient in found if gradient is not None]).double()
        means[patient] += flat / records.record_counts[patient]
    model.zero_grad()
    return torch.stack(means)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_sums_are_those_of_single_records(plans: dict[str, StudyPlan], kind: str) -> None:
    """Book-keeping covers it; its sums equal brute force, with clipping off, for some, and for everybody; in parts.

    Opacus's hooks, the second opinion, find the same.
    """
    model, task = scattered(plans[kind])
    records = patients_of(task)
    truth = one_by_one(model, records, task)
    norms = truth.norm(dim=1)
    assert covers(model)

    for engine in (BookKeeping, PatientGradients):
        for micro_batch in (2, 256):
            with engine(model, records, task, device="cpu", micro_batch=micro_batch) as gradients:
                for clip in (math.inf, float(norms.median()), float(norms.min()) / 2):
                    total = gradients.clipped_sum(np.arange(4), clip=clip)
                    wanted = truth * (clip / norms).clamp(max=1)[:, None]
                    assert (total - wanted.sum(dim=0)).norm() <= 2e-5 * wanted.norm(dim=1).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_passes_and_leaves_no_trace(plans: dict[str, StudyPlan], kind: str) -> None:
    """As a plan builds it, with adapters and head still zero."""
    task = task_of(plans[kind])
    model = build_network(plans[kind].network, task, seed=0)
    before = parameters_to_vector(model)

    self_check(model, task, clip=0.5)

    np.testing.assert_array_equal(parameters_to_vector(model), before)
    assert len(model.kept) == 0  # type: ignore[arg-type]  # torch knows no attribute's type


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_what_is_on_top_and_not_the_base(plans: dict[str, StudyPlan], kind: str) -> None:
    """Every trainable parameter moves; no tensor of the base changes by a bit, in the network or outside of it."""
    model, task = scattered(plans[kind])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    base = find_base(plans[kind].network.base).tensors  # type: ignore[union-attr]  # these networks have one
    copies = {name: tensor.clone() for name, tensor in base.items()}
    before = {name: p.detach().clone() for name, p in trainable(model).items()}

    _train(model, patients_of(task), task, noise=0.5)

    assert all((trainable(model)[name] != old).any() for name, old in before.items())
    assert all(torch.equal(dict(model.named_parameters())[name], old) for name, old in frozen.items())
    assert all(torch.equal(base[name], old) for name, old in copies.items())


@pytest.mark.parametrize("kind", ["head", "one layer", "cnn"])
def test_training_and_measuring_on_what_is_kept_give_the_same(plans: dict[str, StudyPlan], kind: str) -> None:
    """With and without it, the same draws and noise end at the same parameters and statistics, up to rounding."""
    results = []
    for limit in (0, 1 << 20):
        model, task = scattered(plans[kind])
        model.kept = Kept(limit)
        records = patients_of(task)
        _train(model, records, task, noise=0.5)
        results.append((parameters_to_vector(model), statistics(model, records, task, bins=10), len(model.kept)))

    (bare, counted, nothing), (kept, counted_too, all_of_them) = results
    assert (nothing, all_of_them) == (0, 7)
    np.testing.assert_allclose(kept, bare, rtol=0, atol=1e-5)
    np.testing.assert_allclose(counted_too, counted, rtol=0, atol=1e-3)


def test_a_command_prints_the_line_for_the_settings(tmp_path: Path) -> None:
    """A digest and a path that read_settings takes; what is no base is refused with a hint."""
    digest = write_body(tmp_path / "body.safetensors")

    printed = CliRunner().invoke(app, ["pretrained", str(tmp_path / "body.safetensors")])
    refused = CliRunner().invoke(app, ["pretrained", str(tmp_path)])

    assert printed.exit_code == 0
    assert tomllib.loads(f"[pretrained]\n{printed.output}") == {
        "pretrained": {digest: str(tmp_path / "body.safetensors")}
    }
    assert isinstance(refused.exception, PretrainedError)


def _train(model: nn.Module, records: Records, task: Task, *, noise: float) -> None:
    local_steps(
        model,
        records,
        task,
        steps=5,
        learning_rate=0.1,
        clip=1.0,
        noise_multiplier=noise,
        sample_rate=0.7,
        expected_batch=3.0,
        random=repeatable(1),
    )
