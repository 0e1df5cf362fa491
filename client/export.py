"""A model as an ONNX file, for runtimes without torch: exported, then held against the network before it is written."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.records.extras import needed
from client.usable import UsableModel
from shared_models.durable import replace_file
from shared_models.errors import ConfigError, ConformanceError
from shared_models.nets.losses import scores
from shared_models.nets.lstm import Lstm
from shared_models.nets.pretrained import Kept
from shared_models.pretrained import Origin, base_of, origin_of
from shared_models.tasks import ImageInput, Numeric, SeriesInput, TableInput, Task, TokensInput

FORMAT = "konsil-onnx/1"
OPSET = 18
TOLERANCE = 1e-5  # of scores, absolute; of logits, of the largest where it is above 1
_LARGEST = 2**31 - 2**24  # bytes of parameters: protobuf's limit, less room for everything else
_CHECKED = (1, 2, 33)  # records at once, none of which the export was traced with


def export_onnx(found: UsableModel, out: Path) -> float:
    """Write a model as ONNX.

    The input is ``inputs``, encoded as the task says (its ``input`` is in the file's metadata); the first dimension is
    free. The outputs are ``logits`` and ``scores``, as ``shared_models/nets/losses.py`` has them.

    Guarantees:
        * The file was run by onnxruntime on made-up inputs before it was put in place, and its outputs are the
          network's to 1e-5.
        * It holds the parameters of the model and no record. Of a model that starts from a pretrained base, it holds
          the base too, and says which one and under which licence, as far as that is known.

    Returns:
        The largest difference that was found.

    Raises:
        ConfigError: The file cannot be written, or would be larger than ONNX allows.
        RecordsError: The extra ``onnx`` is not installed.
        ConformanceError: The exported network computes something else.
    """
    task, model = found.task, found.network
    if sum(parameter.nbytes for parameter in model.parameters()) > _LARGEST:
        raise ConfigError(
            "the model is too large for one ONNX file, which ends at 2 GB",
            hint="Use it with konsil-hospital predict or serve, and --base.",
        )
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}", hint="Make it first.")
    with needed("onnx", "onnx, onnxscript and onnxruntime"):
        import onnx  # noqa: PLC0415  # an extra
        import onnxruntime  # noqa: F401, PLC0415  # an extra
        import onnxscript  # noqa: F401, PLC0415  # an extra
    network = _Scored(model, task).eval()
    with _silent():
        program = torch.onnx.export(
            _Scored(_for_export(model), task).eval(),
            (made_up_inputs(task, 3),),
            input_names=["inputs"],
            output_names=["logits", "scores"],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101 - torch's answer where it is not told to write
    exported = program.model_proto
    exported.producer_name = "konsil"
    about = {
        "format": FORMAT,
        "task": task.name,
        "study": found.plan.study,
        "plan_digest": found.plan.digest(),
        "input": task.input.model_dump_json(),
        "heads": json.dumps([head.model_dump(mode="json") for head in task.heads]),
        "intended_use": found.intended_use,
        **_about_base(found),
    }
    onnx.helper.set_model_props(exported, about)
    onnx.checker.check_model(exported)
    content = exported.SerializeToString()
    worst = _difference(network, content, task)
    if not worst <= TOLERANCE:
        raise ConformanceError(
            f"the exported network differs from the model by {worst:.2g}; nothing was written",
            hint="Report it, with the network and the versions of torch, onnx and onnxruntime.",
        )
    try:
        replace_file(out, content)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", hint="Check the folder and the disk.") from None
    return worst


def made_up_inputs(task: Task, count: int, *, seed: int = 0) -> Tensor:
    """Encoded inputs that no patient stands behind, shape ``(count, ...)``; of series and texts the first is empty."""
    rng = np.random.default_rng(seed)
    match task.input:
        case TableInput(columns=columns):
            blocks: list[NDArray[Any]] = []
            for column in columns:
                if isinstance(column, Numeric):
                    blocks.append(rng.uniform(-2, 2, (count, 1)))
                else:
                    chosen = rng.integers(0, len(column.categories), (count, 1))
                    blocks.append(chosen == np.arange(1, len(column.categories)))
            return torch.from_numpy(np.concatenate(blocks, axis=1, dtype=np.float32))
        case ImageInput() as image:
            shape = (count, image.channels, image.height, image.width)
            return torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))
        case SeriesInput(variables=variables, steps=steps):
            mask = rng.random((count, steps, len(variables))) < 0.3
            mask[0] = False
            values = np.where(mask, rng.uniform(-2, 2, mask.shape), 0)
            since = rng.integers(0, steps, mask.shape)
            return torch.from_numpy(np.concatenate([values, mask, since], axis=2, dtype=np.float32))
        case TokensInput(vocabulary=vocabulary, length=length):
            ids = rng.integers(1, vocabulary, (count, length))
            ends = rng.integers(1, length + 1, (count, 1))
            ends[0] = 0
            return torch.from_numpy(np.where(np.arange(length) < ends, ids, 0))


class _Scored(nn.Module):
    """A network with its scores beside its logits."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        return logits, scores(self._task, logits)


class _WholeLayer(nn.Module):
    """A layer of the shared LSTM as torch's own, which ONNX has an operator for: unrolled, 48 steps are 700 nodes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        from_input, from_state = layer.get_submodule("from_input"), layer.get_submodule("from_state")
        assert isinstance(from_input, nn.Linear)  # noqa: S101 - as lstm.py has it
        assert isinstance(from_state, nn.Linear)  # noqa: S101 - as lstm.py has it
        self.lstm = nn.LSTM(from_input.in_features, from_state.in_features, batch_first=True)
        with torch.no_grad():  # both have their gates in the order enter, forget, candidate, leave
            self.lstm.get_parameter("weight_ih_l0").copy_(from_input.weight)
            self.lstm.get_parameter("bias_ih_l0").copy_(from_input.bias)
            self.lstm.get_parameter("weight_hh_l0").copy_(from_state.weight)
            self.lstm.get_parameter("bias_hh_l0").zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = self.lstm(inputs)[0]
        return states


def _about_base(found: UsableModel) -> dict[str, str]:
    digest = base_of(found.plan.network)
    if digest is None:
        return {}
    origin = origin_of(digest) or Origin("not known", "not known")
    return {"base": digest, "base_name": origin.name, "base_licence": origin.licence}


def _for_export(model: nn.Module) -> nn.Module:
    """A copy of the model with torch's own LSTM layers in it, which keeps nothing of what passes a frozen part."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(kept := part.__dict__.get("kept"), Kept):
            kept.limit = 0
        if isinstance(part, Lstm):
            part.layers = nn.ModuleList(_WholeLayer(layer) for layer in part.layers)
    return model


def _difference(network: nn.Module, content: bytes, task: Task) -> float:
    """Largest difference between the network's outputs and the exported one's; infinite where one is no number."""
    import onnxruntime  # noqa: PLC0415  # an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in _CHECKED:
        inputs = made_up_inputs(task, count, seed=count)
        with torch.no_grad():
            expected = [output.numpy() for output in network(inputs)]
        found = session.run(["logits", "scores"], {"inputs": inputs.numpy()})
        for own, other in zip(expected, found, strict=True):
            scale = max(1.0, float(np.abs(own).max(initial=0)))
            gap = float(np.abs(own - other).max(initial=0)) / scale
            worst = max(worst, gap if own.shape == other.shape and np.isfinite(gap) else np.inf)
    return worst


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's exporter from telling what it did not find; none of it is about this network."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
