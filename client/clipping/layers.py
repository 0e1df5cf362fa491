"""From a layer's inputs and output gradients to each patient's norm and to the clipped sum, layer by layer.

A layer's gradient for one patient is a short formula of what went in and of the gradient of what came out. A ``Share``
keeps the smallest form of it that answers two questions: how long is each patient's gradient, and what is their
weighted sum. Both answers are made from the same stored numbers, so that no rounding before them, and no mistake in a
network, can make a patient's part of the sum longer than its norm says.

Shapes: ``m`` patients with ``k`` records each; ``T`` positions of a patient, over all its records; a linear layer from
``d`` to ``p``.

Source:
    Goodfellow, arXiv:1510.01799 (one position); Li et al., arXiv:2110.05679 (ghost norm over positions); Bu et al.,
    arXiv:2210.00038 (book-keeping: one backward pass, and the choice between both forms per layer). Convolutions as
    grouped convolutions: Rochette et al., arXiv:1912.06015.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_BLOCK = 256  # numbers whose squares are added in the gradients' own precision, before float64 takes over
_TERMS = 1024  # gradients, or positions, that are added in their own precision, before float64 takes over
_MOVED = 48  # multiplications that cost as much as writing, measuring and weighing one number of a gradient
_LARGEST_DIRECT = 4  # a stored gradient takes at most this many times the memory of what it is made from
_NARROW = 32  # inputs of an output pixel of a convolution, up to which patches beat a grouped convolution
_FEW_PIXELS = 512  # numbers of a convolution's weight per output pixel, above which patches beat a grouped convolution


class Share(Protocol):
    """The gradients of one parameter, for some patients."""

    def squares(self, *, exact: bool) -> Tensor:
        """Squared L2 norm of each patient's gradient, shape ``(m,)``, float64.

        It is never under-stated by more than 2**-18 of itself and 2**-100. Not exact, it may overflow, or be NaN, where
        numbers are large or small; exact, it is not finite only where a number of the gradient is not.
        """
        ...

    def silence(self, patients: Tensor) -> None:
        """Make the gradients of these patients zero; a mask, shape ``(m,)``."""
        ...

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """Add the sum of all gradients, each times its factor, to the parameter's part of the sum, float64, flat.

        Factors in float64, where some are too small for float32, make all arithmetic float64.
        """
        ...


class Direct:
    """Gradients written out: shape ``(m, size)``."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def squares(self, *, exact: bool) -> Tensor:
        """See ``Share``."""
        return self.gradients.double().square().sum(dim=1) if exact else _squares(self.gradients)

    def silence(self, patients: Tensor) -> None:
        """See ``Share``."""
        self.gradients[patients] = 0

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """See ``Share``."""
        gradients = self.gradients.to(factors.dtype)
        for some, weights in zip(gradients.split(_TERMS), factors.split(_TERMS), strict=True):
            total += weights @ some


class Factored:
    """Gradients of a linear layer as what they are products of: ``sum over t of outer(grads[t], inputs[t])``.

    Args:
        inputs: Shape ``(m, T, d)``.
        grads: Gradient of the output, shape ``(m, T, p)``.
    """

    def __init__(self, inputs: Tensor, grads: Tensor) -> None:
        self._inputs, self._grads = inputs, grads

    def squares(self, *, exact: bool) -> Tensor:
        """See ``Share``: the ghost norm, in float64.

        Positions of opposite sign may cancel, down to a sum that is all rounding. The bound on that rounding, relative
        to the positions' norms, is added: a norm is over-stated there, never under-stated.
        """
        if self._inputs.shape[1] == 1:  # a product of two vectors is as long as the product of their lengths
            inputs, grads = self._inputs[:, 0], self._grads[:, 0]
            if exact:
                return inputs.double().square().sum(dim=1) * grads.double().square().sum(dim=1)
            squares = torch.stack([_squares(inputs), _squares(grads)])
            # Where one of them is extreme, their product may be of any size: it is to be measured again.
            return squares.masked_fill_(is_extreme(squares), torch.nan).prod(dim=0)
        inputs, grads = self._inputs.double(), self._grads.double()
        lengths = inputs.square().sum(dim=2) * grads.square().sum(dim=2)
        gram = (inputs @ inputs.mT).mul_(grads @ grads.mT).sum(dim=(1, 2))
        return gram.clamp(min=0) + 2.0**-40 * lengths.sqrt().sum(dim=1).square()

    def silence(self, patients: Tensor) -> None:
        """See ``Share``."""
        self._inputs, self._grads = self._inputs.clone(), self._grads.clone()  # they may be the network's own
        self._inputs[patients] = 0
        self._grads[patients] = 0

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """See ``Share``."""
        inputs = self._inputs.to(factors.dtype).flatten(0, 1)
        weighted = (self._grads * factors[:, None, None]).flatten(0, 1)
        matrix = total.view(weighted.shape[1], inputs.shape[1])
        for some, others in zip(inputs.split(_TERMS), weighted.split(_TERMS), strict=True):
            matrix += others.T @ some


class Rows:
    """Gradients of an embedding: a few rows for each patient, the rest zero.

    Args:
        rows: Shape ``(m, T, d)``; no patient has two of the same token, but rows of zeros.
        tokens: Which row of the table each is, shape ``(m, T)``.
    """

    def __init__(self, rows: Tensor, tokens: Tensor) -> None:
        self._rows, self._tokens = rows, tokens

    def squares(self, *, exact: bool) -> Tensor:
        """See ``Share``."""
        return Direct(self._rows.flatten(1)).squares(exact=exact)

    def silence(self, patients: Tensor) -> None:
        """See ``Share``."""
        self._rows[patients] = 0

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """See ``Share``."""
        weighted = self._rows * factors[:, None, None].double()
        total.view(-1, weighted.shape[2]).index_add_(0, self._tokens.flatten(), weighted.flatten(0, 1))


def _squares(values: Tensor) -> Tensor:
    """Squared L2 norm of each row, float64: blocks of squares keep their own precision, sums of blocks do not."""
    if values.shape[1] <= _BLOCK:
        return torch.linalg.vector_norm(values, dim=1).double().square()
    whole = values.shape[1] // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(values[:, :whole].unflatten(1, (-1, _BLOCK)), dim=2)
    rest = torch.linalg.vector_norm(values[:, whole:], dim=1, keepdim=True)
    return torch.cat([blocks, rest], dim=1).double().square().sum(dim=1)


def is_extreme(squares: Tensor) -> Tensor:
    """Where squares are so far from one that some may have overflowed or vanished in float32; NaN too."""
    return ~((squares > 1e-24) & (squares < 1e30))


class Call(NamedTuple):
    """What one call of a layer leaves: input and gradient of the output, both of shape ``(m, k, ...)``."""

    input: Tensor
    grad: Tensor


def shares(module: nn.Module, calls: Sequence[Call]) -> Iterator[tuple[nn.Parameter, Share]]:
    """Each trainable parameter of a layer, and its gradients over all calls of the layer in one forward pass."""
    weight, bias = module.weight, module.bias if not isinstance(module, nn.Embedding) else None
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        yield weight, _weight_share(module, calls)
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        yield bias, Direct(sum_of([_over_positions(call.grad, _places(module, call.grad)) for call in calls]))


def covered(module: nn.Module) -> bool:
    """Whether the shares of this layer are known: its exact type, because a subclass may compute something else."""
    if isinstance(module, CONVOLUTIONS) and type(module) in CONVOLUTIONS:
        return module.padding_mode == "zeros" and _padding(module) is not None
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return type(module) in {nn.Linear, nn.LayerNorm, nn.GroupNorm}


def sum_of(parts: list[Tensor]) -> Tensor:
    """Their sum, by itself where there is one."""
    first, *rest = parts
    return sum(rest, start=first)


def _weight_share(module: nn.Module, calls: Sequence[Call]) -> Share:
    if isinstance(module, nn.Linear):
        return linear(_joined([call.input for call in calls]), _joined([call.grad for call in calls]))
    if isinstance(module, CONVOLUTIONS):
        if len(calls) == 1 and module.groups == 1:
            return _convolution(module, calls[0])
        return Direct(sum_of([_by_groups(module, call) for call in calls]))
    if isinstance(module, nn.Embedding):
        return _embedding(module, calls)
    return Direct(sum_of([_scale(module, call) for call in calls]))


def linear(inputs: Tensor, grads: Tensor) -> Share:
    """The gradients ``sum over t of outer(grads[t], inputs[t])``, in the form that costs less.

    Written out, a patient's gradient takes T p d multiplications, and p d numbers are stored, measured and weighed.
    Factored, the norm takes T^2 (p + d) multiplications in float64, which costs twice as much, and the sum T p d.

    Args:
        inputs: Shape ``(m, T, d)``.
        grads: Shape ``(m, T, p)``.
    """
    positions, d, p = inputs.shape[1], inputs.shape[2], grads.shape[2]
    direct = positions * p * d + _MOVED * p * d
    factored = 2 * positions * positions * (p + d) + positions * p * d
    if positions > 1 and direct <= factored and p * d <= _LARGEST_DIRECT * positions * (p + d):
        product = torch.bmm(inputs.mT, grads).mT if d > p else torch.bmm(grads.mT, inputs)  # the longer side first
        return Direct(product.flatten(1))
    return Factored(inputs, grads)


def _joined(parts: list[Tensor]) -> Tensor:
    """Shape ``(m, T, width)``: all positions of a patient, of all its records and all calls."""
    flat = [part.reshape(len(part), -1, part.shape[-1]) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _convolution(module: Convolution, call: Call) -> Share:
    """One call without channel groups: by patches where they are narrow, or the map small for the weight."""
    pixels = math.prod(call.grad.shape[3:])
    if module.weight[0].numel() > _NARROW and module.weight.numel() <= _FEW_PIXELS * pixels:
        return Direct(_by_groups(module, call))
    return linear(patches(module, call.input), call.grad.transpose(1, 2).flatten(2).mT)


def _by_groups(module: Convolution, call: Call) -> Tensor:
    """Shape ``(m, size)``: one convolution whose channel groups are the patients, and whose batch is their records."""
    m, k = call.input.shape[:2]
    inputs = call.input.transpose(0, 1).reshape(k, m * module.in_channels, *call.input.shape[3:])
    grads = call.grad.transpose(0, 1).reshape(k, m * module.out_channels, *call.grad.shape[3:])
    weight = grads.new_empty(1).expand(m * module.out_channels, *module.weight.shape[1:])
    dims = len(module.kernel_size)
    _, found, _ = torch.ops.aten.convolution_backward(
        grads,
        inputs,
        weight,
        None,
        list(module.stride),
        list(_padding(module) or ()),
        list(module.dilation),
        False,
        [0] * dims,
        m * module.groups,
        [False, True, False],
    )
    return found.reshape(m, -1)


def patches(module: Convolution, inputs: Tensor) -> Tensor:
    """What each output pixel of a convolution without channel groups is made from.

    Args:
        module: The convolution.
        inputs: Shape ``(m, k, channels, ...)``, one to three dimensions of space.

    Returns:
        Shape ``(m, k * pixels, channels * kernel)``, in the order of the weight's own numbers.
    """
    m, k = inputs.shape[:2]
    margins = [margin for padding in reversed(_padding(module) or ()) for margin in (padding, padding)]
    padded = functional.pad(inputs.flatten(0, 1), margins)
    space = zip(padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    pixels = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in space]
    record, channel, *steps = padded.stride()
    windows = padded.as_strided(
        (m * k, padded.shape[1], *module.kernel_size, *pixels),
        (
            record,
            channel,
            *(step * dilation for step, dilation in zip(steps, module.dilation, strict=True)),
            *(step * stride for step, stride in zip(steps, module.stride, strict=True)),
        ),
    )
    # Pixels last, as they lie in memory: copying is fastest so.
    flat = windows.reshape(m, k, module.weight[0].numel(), math.prod(pixels))
    return flat.transpose(1, 2).flatten(2).mT


def _padding(module: Convolution) -> tuple[int, ...] | None:
    """Zeros on either side, per dimension of space; None where the sides differ."""
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    both = [dilation * (kernel - 1) for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    return tuple(zeros // 2 for zeros in both) if all(zeros % 2 == 0 for zeros in both) else None


def _embedding(module: nn.Embedding, calls: Sequence[Call]) -> Share:
    """Rows of one patient and token are added up first: the norm of a sum is not the sum of norms."""
    tokens = torch.cat([call.input.flatten(1) for call in calls], dim=1)
    grads = _joined([call.grad for call in calls])
    if module.padding_idx is not None:
        grads = grads.masked_fill((tokens == module.padding_idx).unsqueeze(2), 0)
    found, order = tokens.sort(dim=1)
    place = functional.pad(found[:, 1:] != found[:, :-1], (1, 0)).cumsum(dim=1)  # of each in its patient's rows
    first_row = found.shape[1] * torch.arange(len(found), device=found.device)[:, None]
    row = torch.empty_like(order).scatter_(1, order, place + first_row)
    rows = torch.zeros_like(grads).flatten(0, 1).index_add_(0, row.flatten(), grads.flatten(0, 1))
    return Rows(rows.view_as(grads), torch.zeros_like(found).scatter_(1, place, found))


def _scale(module: nn.Module, call: Call) -> Tensor:
    """Gradients of a normalisation's scale, shape ``(m, size)``: the normalised input, weighed by the gradient."""
    if isinstance(module, nn.LayerNorm):
        normal = functional.layer_norm(call.input, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.GroupNorm):
        flat = functional.group_norm(call.input.flatten(0, 1), module.num_groups, eps=module.eps)
        normal = flat.view(call.input.shape)
    else:
        raise TypeError(f"{type(module).__name__} is not a layer that is covered")
    return _over_positions(normal.mul_(call.grad), _places(module, call.grad))


def _places(module: nn.Module, grad: Tensor) -> list[int]:
    """Dimensions of an output gradient ``(m, k, ...)`` that are records or positions, not parameters."""
    if isinstance(module, nn.LayerNorm):
        return list(range(1, grad.dim() - len(module.normalized_shape)))
    if isinstance(module, nn.Linear):
        return list(range(1, grad.dim() - 1))
    return [1, *range(3, grad.dim())]  # channels come third


def _over_positions(values: Tensor, places: list[int]) -> Tensor:
    """Sum over these dimensions, the rest flat: shape ``(m, size)``."""
    crowded = [place for place in places if values.shape[place] > 1]
    return (values.sum(dim=crowded) if crowded else values).reshape(len(values), -1)
