"""Models as ONNX: another runtime gives the network's outputs, for any number of records."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from client import export
from client.export import OPSET, TOLERANCE, export_onnx, made_up_inputs
from client.usable import UsableModel
from shared_models import plan, tasks
from shared_models.errors import ConfigError, ConformanceError
from shared_models.model_file import INTENDED_USE
from shared_models.nets.build import build_network
from shared_models.nets.losses import scores
from shared_models.pretrained import digest_of, offer_files
from shared_models.tasks import Categorical, ImageInput, SeriesInput, Survival, TableInput, Task, TokensInput
from shared_models.update import trainable
from tests.client.made_up import HEADS, OUTLINE, numeric, table, task_of, usable
from tests.tiny_bases import image_plan, text_plan, write_body, write_encoder

SERIES = SeriesInput(variables=(numeric("a"), numeric("b")), steps=6, step_unit="hour")
TOKENS = TokensInput(vocabulary=30, length=7)
IMAGE = ImageInput(channels=1, height=28, width=28)
TRANSFORMER = plan.Transformer(name="transformer", width=8, heads=2, layers=1)
MODELS: dict[str, tuple[plan.Network, Task]] = {
    "logistic-regression": (plan.LogisticRegression(name="logistic-regression"), task_of(table(4))),
    "proportional-hazards": (
        plan.ProportionalHazards(name="proportional-hazards"),
        task_of(table(4), (Survival(name="death", time="time", event="event", unit="day", edges=(1, 2, 4)),)),
    ),
    "mlp": (plan.Mlp(name="mlp", hidden=(6, 5)), task_of(table(4), HEADS)),
    "cnn": (plan.Cnn(name="cnn", channels=(4, 8)), task_of(IMAGE, 3)),
    "unet": (plan.UNet(name="unet", channels=(2, 4)), task_of(IMAGE, OUTLINE)),
    "lstm": (plan.Lstm(name="lstm", hidden=5, layers=2), task_of(SERIES)),
    "transformer-series": (TRANSFORMER, task_of(SERIES)),
    "transformer-tokens": (TRANSFORMER, task_of(TOKENS, 4)),
}


def run(file: Path, inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Logits and scores by onnxruntime."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found: list[np.ndarray[Any, Any]] = session.run(["logits", "scores"], {"inputs": inputs.numpy()})
    return found


Exported = Callable[[str], tuple[UsableModel, Path, float]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports each model once: the model, its file, and the difference that was found. Its weights are large."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export_once(name: str) -> tuple[UsableModel, Path, float]:
        network, task = MODELS[name]
        model = usable(task, network, seed=3)
        with torch.no_grad():
            for parameter in model.network.parameters():
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        return model, folder / f"{name}.onnx", export_onnx(model, folder / f"{name}.onnx")

    return export_once


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.soak] * (n in {"unet", "proportional-hazards"})) for n in MODELS]
)
def test_another_runtime_gives_the_networks_outputs(exported: Exported, name: str) -> None:
    """Of one record and of eleven, with empty series and texts among them."""
    model, file, worst = exported(name)

    assert worst <= TOLERANCE
    for count in (1, 11):
        inputs = made_up_inputs(model.task, count, seed=99)
        with torch.no_grad():
            logits = model.network(inputs)
            expected = [logits.numpy(), scores(model.task, logits).numpy()]
        for own, found in zip(expected, run(file, inputs), strict=True):
            assert own.shape == found.shape
            np.testing.assert_allclose(found, own, atol=TOLERANCE * max(1.0, float(np.abs(own).max())))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder and a tiny body, offered to this process."""
    folder = tmp_path_factory.mktemp("bases")
    found = {"encoder": folder / "encoder", "body": folder / "body.safetensors"}
    write_encoder(found["encoder"])
    write_body(found["body"])
    offer_files(found.values())
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "adapters",
        "head-of-images",
        pytest.param("head-of-texts", marks=pytest.mark.soak),
        pytest.param("norms-of-images", marks=pytest.mark.soak),
    ],
)
def test_a_model_on_a_pretrained_base_is_exported_with_it(
    kind: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, adapters and head are one graph; which base it holds, and under which licence, is said in the file."""
    body, encoder = digest_of(bases["body"]), digest_of(bases["encoder"])
    study = {
        "adapters": lambda: text_plan(encoder),
        "head-of-texts": lambda: text_plan(encoder, top_layers=0),
        "head-of-images": lambda: image_plan(body),
        "norms-of-images": lambda: image_plan(body, train_norms=True),
    }[kind]()
    task = tasks.task_of(study)
    network = build_network(study.network, task, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # what was trained is no longer zero
        for parameter in trainable(network).values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    file = tmp_path / "model.onnx"

    worst = export_onnx(UsableModel(study, task, network, INTENDED_USE), file)

    assert worst <= TOLERANCE
    inputs = made_up_inputs(task, 11, seed=99)
    with torch.no_grad():
        logits = network(inputs).numpy()
    assert logits.std() > 100 * TOLERANCE
    np.testing.assert_allclose(run(file, inputs)[0], logits, atol=TOLERANCE * max(1.0, float(np.abs(logits).max())))
    about = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    assert about["base"] == study.network.base  # type: ignore[union-attr]  # it has one
    licence = "not known" if "texts" in kind or kind == "adapters" else study.data_licence
    assert about["base_licence"] == licence

    monkeypatch.setattr(export, "_LARGEST", 1000)
    with pytest.raises(ConfigError, match="too large"):
        export_onnx(UsableModel(study, task, network, INTENDED_USE), file)


def test_the_file_says_what_it_is(exported: Exported) -> None:
    """Task, plan, how inputs are encoded, what outputs mean, and the use; a recurrent layer is one node."""
    model, file, _ = exported("lstm")

    found = onnx.load(file)

    about = {prop.key: prop.value for prop in found.metadata_props}
    assert about["intended_use"] == INTENDED_USE
    assert (about["task"], about["plan_digest"]) == ("made-up", model.plan.digest())
    assert SeriesInput.model_validate_json(about["input"]) == model.task.input
    assert json.loads(about["heads"])[0]["classes"] == ["class 0", "class 1"]
    assert found.opset_import[0].version == OPSET
    assert sum(node.op_type == "LSTM" for node in found.graph.node) == 2
    assert found.producer_name == "konsil"


def test_made_up_inputs_are_what_a_task_says() -> None:
    """Numerics within the range, at most one indicator of a category, ids of the vocabulary, masks of 0 and 1."""
    schema = TableInput(columns=(numeric("a"), Categorical(name="b", categories=("x", "y", "z"))))
    rows = made_up_inputs(task_of(schema), 50).numpy()
    series = made_up_inputs(task_of(SERIES), 50).numpy()
    tokens = made_up_inputs(task_of(TOKENS), 50).numpy()

    assert rows.shape == (50, 3)
    assert set(rows[:, 1:].sum(axis=1)) == {0.0, 1.0}
    assert np.abs(rows[:, 0]).max() <= 2
    values, mask = series[:, :, :2], series[:, :, 2:4]
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert not values[mask == 0].any()
    assert not mask[0].any()
    assert not tokens[0].any()
    assert 0 < tokens.max() < 30


def test_another_networks_file_would_be_noticed(exported: Exported) -> None:
    """What is held against each other are outputs: other parameters, or no number, are a difference."""
    model, file, _ = exported("mlp")
    other = usable(model.task, MODELS["mlp"][0], seed=2)

    assert export._difference(_scored(model), file.read_bytes(), model.task) <= TOLERANCE
    assert export._difference(_scored(other), file.read_bytes(), model.task) > 100 * TOLERANCE
    assert export._difference(_Broken(_scored(model)), file.read_bytes(), model.task) == np.inf


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the earlier one lost."""
    network, task = MODELS["logistic-regression"]
    (tmp_path / "model.onnx").write_bytes(b"before")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # nothing is as near as that

    with pytest.raises(ConformanceError, match="nothing was written"):
        export_onnx(usable(task, network), tmp_path / "model.onnx")

    assert (tmp_path / "model.onnx").read_bytes() == b"before"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """In words."""
    network, task = MODELS["logistic-regression"]

    with pytest.raises(ConfigError, match="there is no folder"):
        export_onnx(usable(task, network), tmp_path / "nowhere" / "model.onnx")


def _scored(model: UsableModel) -> nn.Module:
    return export._Scored(model.network, model.task).eval()


class _Broken(nn.Module):
    """Gives no number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, found = self.network(inputs)
        return logits * torch.nan, found
