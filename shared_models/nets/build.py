"""From a plan's network to a torch module that per-patient clipping is known to be right for."""

import torch
from torch import nn

from shared_models import plan
from shared_models.errors import ConfigError
from shared_models.nets.cnn import Cnn
from shared_models.nets.lstm import Lstm
from shared_models.nets.pretrained import PretrainedCnn, PretrainedEncoder
from shared_models.nets.tabular import ProportionalHazards, logistic_regression, mlp
from shared_models.nets.transformer import Series, Tokens, Transformer
from shared_models.nets.unet import UNet
from shared_models.pretrained import find_body, find_encoder
from shared_models.tasks import ImageInput, Outline, SeriesInput, Survival, TableInput, Task, TokensInput
from shared_models.update import trainable

# Layers whose per-record gradients are tested against brute force, and parameter-free ones that work record by record.
# A frozen layer of the list gets no gradient of its own and passes on that of its input, record by record.
SUPPORTED_LAYERS = frozenset(
    {nn.Linear, nn.Conv2d, nn.Embedding, nn.GroupNorm, nn.LayerNorm, nn.ReLU, nn.GELU, nn.MaxPool2d, nn.Identity}
)
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict)


def build_network(network: plan.Network, task: Task, *, seed: int) -> nn.Module:
    """Build a plan's network for a task, on the CPU, with initial parameters drawn from a public seed.

    Guarantees:
        * The same plan, task and seed give the same parameters, bit for bit, on the same version of torch.
        * torch's global generators are left as they were.
        * The network maps ``n`` encoded inputs to logits of shape ``(n, task.outputs)``, and no record's logits depend
          on another record.

    Raises:
        ConfigError: The network does not take the task's kind of input, or the base that it starts from is not here.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs' generators too
        model = _construct(network, task)
    check_supported(model)
    return model


def count_parameters(network: plan.Network, task: Task) -> int:
    """Trainable parameters of a plan's network: those that travel; without the memory that they would take.

    Raises:
        ConfigError: The network does not take the task's kind of input, or the base that it starts from is not here.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in trainable(_construct(network, task)).values())


def _construct(network: plan.Network, task: Task) -> nn.Module:
    made = {
        "table": _for_tables,
        "image": _for_images,
        "series": _for_positions,
        "tokens": _for_positions,
    }[task.input.kind](network, task)
    if made is not None:
        return made
    raise ConfigError(
        f"network {network.name} cannot be built for task {task.name}, whose inputs are of kind {task.input.kind}",
        hint="Tables take logistic-regression, mlp or, for the time to an event, proportional-hazards; images a cnn of "
        "at least one block or, for an outline, a unet; series lstm or transformer; tokens transformer; "
        "a pretrained-cnn takes images, a pretrained-encoder texts.",
    )


def _for_tables(network: plan.Network, task: Task) -> nn.Module | None:
    match network, task.input:
        case plan.LogisticRegression(), TableInput(width=width):
            return logistic_regression(width, task.outputs)
        case plan.ProportionalHazards(), TableInput(width=width) if _is(Survival, task):
            return ProportionalHazards(width, task.outputs)
        case plan.Mlp(hidden=hidden), TableInput(width=width):
            return mlp(width, hidden, task.outputs)
    return None


def _for_images(network: plan.Network, task: Task) -> nn.Module | None:
    match network, task.input:
        case plan.UNet(channels=channels), ImageInput() as image if _is(Outline, task):
            return UNet(image.channels, channels)
        case plan.Cnn(channels=channels), ImageInput() as image if channels and not _is(Outline, task):
            return Cnn(image.channels, max(image.height, image.width), channels, task.outputs)
        case plan.PretrainedCnn(base=base) as shape, ImageInput() as image if not _is(Outline, task):
            return PretrainedCnn(find_body(base), shape, image, task.outputs)
    return None


def _for_positions(network: plan.Network, task: Task) -> nn.Module | None:
    match network, task.input:
        case plan.Lstm() as shape, SeriesInput(variables=variables):
            return Lstm(len(variables), shape.hidden, shape.layers, task.outputs, carry_forward=shape.carry_forward)
        case plan.Transformer() as shape, TokensInput(vocabulary=vocabulary, length=length):
            return Transformer(Tokens(vocabulary, shape.width), length, shape, task.outputs)
        case plan.Transformer() as shape, SeriesInput(variables=variables, steps=steps):
            series = Series(len(variables), shape.width, carry_forward=shape.carry_forward)
            return Transformer(series, steps, shape, task.outputs)
        case plan.PretrainedEncoder(base=base) as shape, TokensInput(base=tokens) if tokens == base:
            return PretrainedEncoder(find_encoder(base), shape, task.outputs)
    return None


def _is(kind: type[Outline | Survival], task: Task) -> bool:
    """Whether the task has one head, of this kind."""
    return len(task.heads) == 1 and isinstance(task.heads[0], kind)


def check_supported(model: nn.Module) -> None:
    """Refuse a model with a layer for which per-patient clipping has not been shown to be right.

    A layer is a module that has no children, or owns parameters or buffers itself. Its exact type must be on the tested
    list: a subclass may compute something else.

    Raises:
        ConfigError: A layer is not on the list; the message names it.
    """
    for name, module in model.named_modules():
        if _is_layer(module) and not _is_supported(module):
            raise ConfigError(
                f"layer {name or '(the whole model)'} is a {type(module).__name__}, which is not supported",
                hint="Batch normalisation mixes patients; use GroupNorm. Supported: "
                + ", ".join(sorted(layer.__name__ for layer in SUPPORTED_LAYERS)),
            )


def _is_supported(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p == 0  # it would draw from torch's global generator
    return type(module) in SUPPORTED_LAYERS


def _is_layer(module: nn.Module) -> bool:
    owned = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(owned) or (next(module.children(), None) is None and not isinstance(module, _CONTAINERS))
