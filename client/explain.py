"""What a prediction rests on: attributions to columns, measurements, pixels or words, as columns and as pictures.

They say what moved this network's output for this record. They say nothing about causes, and nothing about whether the
prediction is right. What is written here is about single patients and stays in the house.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.records.extras import needed
from client.usable import UsableModel
from shared_models.errors import ConfigError
from shared_models.nets.transformer import Transformer
from shared_models.tasks import Categorical, ImageInput, SeriesInput, TableInput, TokensInput

FEWEST_STEPS, MOST_STEPS = 32, 1024  # of the path from the baseline to the record
UNEXPLAINED = 1e-3  # of the output, below which a path has enough steps
_WINDOWS = 7  # along each side of an image; they overlap by half
_AT_ONCE = 256  # records, or points of paths, at once on the device

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Attributions:
    """What an output rests on, for some records.

    Attributes:
        values: One attribution for each entry of the input, in units of the output: of a table's encoded columns, shape
            ``(n, width)``; of the values of a series, ``(n, steps, variables)``; of an image's pixels, ``(n, height,
            width)``; of a text's positions, ``(n, length)``.
        output: The output that is explained, shape ``(n,)``.
        baseline: The same output of the baseline, shape ``(n,)``.
    """

    values: Floats
    output: Floats
    baseline: Floats

    @property
    def unexplained(self) -> Floats:
        """By how much the attributions of each record miss the difference to the baseline, shape ``(n,)``.

        Of integrated gradients it is the error of the sum along the path. Of occlusion it has no such meaning.
        """
        return self.output - self.baseline - self.values.reshape(len(self.values), -1).sum(axis=1)


def explain(model: UsableModel, inputs: Tensor, column: Tensor, *, method: str = "") -> Attributions:
    """Attribute one output of each record to its input.

    Integrated gradients for tables, series and texts: the output's gradient, summed along the straight path from a
    baseline to the record. The baselines are public: the middle of every public range and the first of every set of
    categories; the same for the values of a series, of which the times of measurement stay as they are; for a text,
    vectors of zeros in place of its words. For images, occlusion: how much lower the output is with a patch grey; or
    integrated gradients from a grey image.

    Guarantees:
        * Of integrated gradients the attributions of a record sum up to its output less its baseline's, but for
          ``unexplained``; steps are added until that is below 0.001, or there are 1,024.
        * Records are explained one by one: none changes another's attributions.

    Args:
        model: With its task.
        inputs: Encoded records, shape ``(n, ...)``.
        column: Which of the model's outputs, for each record; shape ``(n,)``.
        method: ``occlusion`` or ``integrated-gradients``; for other inputs than images there is only the latter.

    Raises:
        RecordsError: The extra ``explain`` is not installed.
        ConfigError: There is no such method for these inputs, or the network is of an unknown kind.
    """
    kind = model.task.input.kind
    method = method or ("occlusion" if kind == "image" else "integrated-gradients")
    if method not in {"integrated-gradients", "occlusion"} or (method == "occlusion" and kind != "image"):
        raise ConfigError(
            f"{method} does not explain inputs of kind {kind}",
            hint="Images: occlusion or integrated-gradients; all others: integrated-gradients.",
        )
    with needed("explain", "captum"):
        import captum.attr  # noqa: F401, PLC0415  # an extra
    parts = [
        _occluded(model, part, of) if method == "occlusion" else _integrated(model, part, of)
        for part, of in zip(inputs.split(_AT_ONCE), column.split(_AT_ONCE), strict=True)
    ]
    return Attributions(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("values", "output", "baseline"))
    )


def by_column(schema: TableInput, attributions: Attributions) -> Mapping[str, Floats]:
    """Attributions of a table by the schema's names: the indicators of a category belong together."""
    found, place = {}, 0
    for column in schema.columns:
        width = len(column.categories) - 1 if isinstance(column, Categorical) else 1
        found[column.name] = attributions.values[:, place : place + width].sum(axis=1)
        place += width
    return found


# integrated gradients


@dataclass(frozen=True)
class _Route:
    """How records are reached from their baseline.

    Attributes:
        moved: What is moved from zero to where it is, shape ``(n, ...)``.
        beside: What the network is given besides, and stays.
        outputs: From both to the outputs, shape ``(n, columns)``.
        together: The axis of ``moved`` whose entries are one thing: colours of a pixel, entries of a word's vector.
    """

    moved: Tensor
    beside: tuple[Tensor, ...]
    outputs: Callable[..., Tensor]
    together: int | None = None

    def take(self, rows: Tensor) -> "_Route":
        """The same for some of the records."""
        return replace(self, moved=self.moved[rows], beside=tuple(part[rows] for part in self.beside))


def _integrated(model: UsableModel, inputs: Tensor, column: Tensor) -> Attributions:
    """Along the route, again with more steps for those records whose sum does not agree yet."""
    route, steps = _route(model, inputs), FEWEST_STEPS
    found = _along(route, column, steps)
    while steps < MOST_STEPS and len(again := np.flatnonzero(~(np.abs(found.unexplained) <= UNEXPLAINED))):
        steps = min(4 * steps, MOST_STEPS)
        rows = torch.from_numpy(again)
        found.values[again] = _along(route.take(rows), column[rows], steps).values
    return found


def _along(route: _Route, column: Tensor, steps: int) -> Attributions:
    """Integrated gradients with so many steps.

    Source:
        Sundararajan, Taly and Yan, arXiv:1703.01365, equation 3; by Captum, at Gauss-Legendre's points.
    """
    from captum.attr import IntegratedGradients  # noqa: PLC0415  # an extra

    moved = IntegratedGradients(route.outputs).attribute(
        route.moved,
        target=column,
        additional_forward_args=route.beside or None,
        n_steps=steps,
        internal_batch_size=max(_AT_ONCE, len(column)),
    )
    values = moved.detach().double()
    with torch.no_grad():
        ends = [
            route.outputs(end, *route.beside).gather(1, column[:, None])[:, 0]
            for end in (route.moved, torch.zeros_like(route.moved))
        ]
    return Attributions(
        (values if route.together is None else values.sum(dim=route.together)).numpy(),
        *(end.double().numpy() for end in ends),
    )


def _route(model: UsableModel, inputs: Tensor) -> _Route:
    match model.task.input:
        case TokensInput():
            return _through_vectors(model, inputs)
        case SeriesInput(variables=variables):
            # The mask is a yes or no: there is no path from one to the other. So it stays, and only values move.
            values, beside = inputs.split([len(variables), 2 * len(variables)], dim=2)
            return _Route(values, (beside,), lambda moved, rest: model.outputs(torch.cat([moved, rest], dim=2)))
        case ImageInput():
            return _Route(inputs, (), model.outputs, together=1)
        case TableInput():
            return _Route(inputs, (), model.outputs)


class _Given(nn.Module):
    """In place of an embedding: vectors that are given, and which positions are there."""

    def __init__(self) -> None:
        super().__init__()
        self.present = torch.empty(0)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return vectors, self.present


def _through_vectors(model: UsableModel, tokens: Tensor) -> _Route:
    """Between two words there is no word: what moves is their vectors, while the positions that are there stay."""
    network = model.network
    if not isinstance(network, Transformer):
        raise ConfigError(
            f"a network of kind {type(network).__name__} on texts is not explained",
            hint="Networks named transformer are.",
        )
    with torch.no_grad():
        vectors, present = network.embedding(tokens)
    given, behind = _Given(), copy.copy(network)
    behind._modules = {**network._modules, "embedding": given}

    def outputs(moved: Tensor, there: Tensor) -> Tensor:
        given.present = there
        return model.from_logits(behind(moved))

    return _Route(vectors, (present,), outputs, together=2)


# occlusion


def _occluded(model: UsableModel, images: Tensor, column: Tensor) -> Attributions:
    """How much lower the output is with a patch of the image grey; a pixel gets the mean over its patches.

    Source:
        Zeiler and Fergus, arXiv:1311.2901, section 4.2; by Captum.
    """
    from captum.attr import Occlusion  # noqa: PLC0415  # an extra

    channels, height, width = images.shape[1:]
    window = (channels, -(-height // _WINDOWS), -(-width // _WINDOWS))
    with torch.no_grad():
        values = Occlusion(model.outputs).attribute(
            images,
            sliding_window_shapes=window,
            strides=(channels, max(1, window[1] // 2), max(1, window[2] // 2)),
            target=column,
            baselines=0,
        )
        output = model.outputs(images).gather(1, column[:, None])[:, 0].double().numpy()
        baseline = model.outputs(torch.zeros_like(images)).gather(1, column[:, None])[:, 0].double().numpy()
    return Attributions(values[:, 0].double().numpy(), output, baseline)
