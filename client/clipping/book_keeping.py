"""Clipped sums without gradients per record: one forward, one backward pass, and books of what passed each layer.

Weight gradients are never asked for. The backward pass gives the gradient of each layer's output; with the layer's
input that is all that any patient's gradient is made of (``client/clipping/layers.py``). Norms come first, then the
clip, then one weighted sum per layer.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from client.clipping.gradients import Gradients
from client.clipping.layers import Call, Direct, Share, covered, is_extreme, shares
from shared_models.errors import ConfigError

_FEWEST_RECORDS = 32  # of a pass
_NUMBERS_AT_ONCE = 1 << 21  # numbers that the layers of a pass give: 8 MB of float32
_NUMBERS_PER_CALL = 1 << 16  # numbers that a layer should give in a call, lest Python take longer than the arithmetic
_SMALL = 256  # numbers of a parameter whose gradients are measured and weighed along with others
_TINY = 1e-30  # factors below lose digits in float32
_PASSES: WeakKeyDictionary[nn.Module, dict[torch.Size, tuple[int, int]]] = WeakKeyDictionary()


def covers(model: nn.Module) -> bool:
    """Whether the engine knows every layer that trains.

    A layer must be of a known type, with settings that are known, own its parameters alone, and have no hooks of
    somebody else's, which could change what the layer seems to give. What cannot be seen before a forward pass (layers
    that mix records, that broadcast over the batch, whose input is changed in place) the self-check finds.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False) if p.requires_grad)
    return all(
        covered(module) and not module._forward_hooks and all(owners[id(p)] == 1 for p in _own(module))
        for module in _layers(model)
    )


class Run(NamedTuple):
    """Patients who follow each other and have equally many records.

    Attributes:
        patients: Their positions in the group.
        records: Their rows in the batch.
        each: Records of each.
    """

    patients: slice
    records: slice
    each: int


class BookKeeping(Gradients):
    """Gradients per patient of a network that ``covers`` knows; see ``Gradients``.

    Guarantees, beside those of ``Gradients``:
        * A patient's part of the sum is at most C long, whatever the network computes: its norm and its part are made
          from the same stored numbers. A network that mixes records breaks this; the self-check refuses it.
        * Sums over patients are in float64, but for at most 1,024 records or positions of one micro-batch that are
          added in float32, as within the float32 gradient of one patient.
        * Memory is that of one micro-batch: its inputs of layers, gradients of outputs, and per layer whichever of
          gradients per patient or the former two costs less.

    Source:
        Bu, Wang, Zha and Karypis, arXiv:2210.00038, section 3.
    """

    # Norms are sums of 256 squares in float32: at most 40 additions follow each other, which is 20 * 2**-24 of a norm,
    # and a norm may be the product of two.
    rounding = 1 - 2.0**-18

    def _hook(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._passes: list[_Pass] = []
        self._records_of_pass = 0
        self._shares: list[tuple[slice | Tensor, slice, Share]] = []
        ends = np.cumsum(self._sizes)
        self._places = {
            parameter: slice(int(end) - parameter.numel(), int(end))
            for parameter, end in zip(self._parameters, ends, strict=True)
        }
        for module in _layers(self._model):
            self._hooks.append(module.register_forward_hook(self._passed, with_kwargs=True))

    def _unhook(self) -> None:
        self._forget()
        for handle in self._hooks:
            handle.remove()

    def _at_once(self) -> int:
        """As many records as keep the books near the processor's cache, but enough to make each call worth its while.

        The two numbers that this takes, of one record's forward pass, are asked for once per network. A GPU takes what
        it may.
        """
        if self._device.type != "cpu":
            return self._micro_batch
        shape = self._records.inputs.shape[1:]
        known = _PASSES.setdefault(self._model, {})
        if shape not in known:
            self._records_of_pass = 1
            self._model(self._records.inputs[:1].to(self._device))
            known[shape] = max(1, sum(each.numbers for each in self._passes)), len(self._passes)
            self._forget()
        numbers, calls = known[shape]
        wanted = max(_FEWEST_RECORDS, _NUMBERS_AT_ONCE // numbers, _NUMBERS_PER_CALL * calls // numbers)
        return min(self._micro_batch, wanted)

    def _add_group(self, total: Tensor, patients: NDArray[np.int64], clip: float) -> None:
        counts = self._records.record_counts[patients]
        if counts.sum() > self._micro_batch:
            self._add_large(total, patients, clip)
            return
        inputs, targets, _ = self._records.select(patients)
        self._keep_books(inputs, targets, counts)
        norms = self._norms(len(patients))
        factors = self._clip_factors(norms, clip)
        if not norms.isfinite().all():  # a NaN times zero is NaN
            for _, members, share in self._shares:
                share.silence(~norms[members].isfinite())
        # A factor that float32 holds with few digits only, or not at all, is not rounded to it.
        weights = factors if (factors < _TINY).any() else factors.to(self._parameters[0].dtype)
        for place, members, share in self._shares:
            part = total[place]  # a view, where the place is a slice
            share.add_to(part, weights[members])
            total[place] = part
        self._forget()

    def _norms(self, patients: int) -> Tensor:
        """Norm of each patient's gradient over all layers, float64; exact where it is extreme."""

        def squares(*, exact: bool) -> Tensor:
            found = torch.zeros(patients, dtype=torch.float64, device=self._device)
            for _, members, share in self._shares:
                found[members] += share.squares(exact=exact)
            return found

        quick = squares(exact=False)
        extreme = is_extreme(quick)
        return (torch.where(extreme, squares(exact=True), quick) if extreme.any() else quick).sqrt()

    def _add_large(self, total: Tensor, patients: NDArray[np.int64], clip: float) -> None:
        """One patient with more records than a micro-batch: their plain gradient, part by part."""
        mean, records = torch.zeros_like(total), int(self._records.record_counts[patients].sum())
        for inputs, targets, _ in self._records.parts(patients, self._micro_batch):
            losses = self._losses(inputs, targets)
            found = torch.autograd.grad(
                losses.sum() / records, self._parameters, allow_unused=True, materialize_grads=True
            )
            mean += torch.cat([gradient.flatten() for gradient in found])
        factor = self._clip_factors(mean.norm()[None], clip)
        total += factor * mean.nan_to_num_(0, 0, 0)

    def _keep_books(self, inputs: Tensor, targets: Tensor, counts: NDArray[np.int64]) -> None:
        """One forward and one backward pass over whole patients, ordered by their number of records."""
        self._forget()
        self._records_of_pass = len(inputs)
        losses = self._losses(inputs, targets)
        if counts[-1] > 1:
            share = torch.from_numpy(np.repeat(1 / counts, counts)).to(self._device, losses.dtype)
            losses = losses * share
        # Asked for the gradients of outputs alone, autograd computes none of a weight, and stops at the first layer.
        grads = torch.autograd.grad(losses.sum(), [each.edge for each in self._passes], allow_unused=True)
        calls: dict[nn.Module, list[Call]] = {}
        for each, grad in zip(self._passes, grads, strict=True):
            if each.input._version != each.version:
                raise ConfigError("a layer's input was changed in place after its use", hint="Mend the network.")
            if grad is not None:  # else the output was not used
                calls.setdefault(each.module, []).append(Call(each.input, grad))
        self._passes = []
        for run in _runs(counts):
            self._make_shares(calls, run)

    def _make_shares(self, calls: dict[nn.Module, list[Call]], run: Run) -> None:
        """What each layer leaves of the patients of a run; small gradients lie together, and cost as one."""
        small: dict[nn.Parameter, Tensor] = {}
        for module, several in calls.items():
            cut = [Call(_by_patient(call.input, run), _by_patient(call.grad, run)) for call in several]
            if self._precision != torch.float32:
                cut = [Call(_in_full(call.input), _in_full(call.grad)) for call in cut]
            for parameter, share in shares(module, cut):
                if isinstance(share, Direct) and parameter.numel() <= _SMALL:
                    small[parameter] = share.gradients
                else:
                    self._shares.append((self._places[parameter], run.patients, share))
        if small:
            places = torch.cat(
                [torch.arange(place.start, place.stop) for place in map(self._places.get, small) if place]
            )
            self._shares.append((places.to(self._device), run.patients, Direct(torch.cat(list(small.values()), dim=1))))

    def _passed(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """After each call of a layer: note its input, and where the gradient of its output will arrive."""
        if not self._records_of_pass:
            return
        inputs = given[0] if given else named["input"]
        if not len(inputs) == len(output) == self._records_of_pass or inputs.dim() < 2 - isinstance(
            module, nn.Embedding
        ):
            raise ConfigError(
                "a layer does not keep records apart: its input has another batch size than the network's",
                hint="Use a network from shared_models/nets; layers must not broadcast over the batch.",
            )
        edge = get_gradient_edge(output)
        self._passes.append(_Pass(module, inputs.detach(), inputs._version, edge, output.numel()))

    def _forget(self) -> None:
        """Drop the books of a pass."""
        self._records_of_pass = 0
        self._passes.clear()
        self._shares.clear()


class _Pass(NamedTuple):
    """One call of a layer: what went in, and where the gradient of what came out will arrive."""

    module: nn.Module
    input: Tensor
    version: int
    edge: GradientEdge
    numbers: int


def _own(module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the module itself."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def _layers(model: nn.Module) -> list[nn.Module]:
    """Modules that own a trainable parameter, each once."""
    return [module for module in model.modules() if _own(module)]


def _runs(counts: NDArray[np.int64]) -> Iterator[Run]:
    """Cut a group, ascending in records per patient, where that number changes."""
    cuts = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    row = 0
    for first, stop in pairwise(cuts):
        each = int(counts[first])
        rows = (stop - first) * each
        yield Run(slice(first, stop), slice(row, row + rows), each)
        row += rows


def _by_patient(values: Tensor, run: Run) -> Tensor:
    """Shape ``(m, k, ...)`` of a run's rows."""
    rows = values if run.records == slice(0, len(values)) else values[run.records]
    return rows.unflatten(0, (-1, run.each))


def _in_full(values: Tensor) -> Tensor:
    """Numbers of 16 bits as float32; tokens as they are."""
    return values.float() if values.is_floating_point() else values
