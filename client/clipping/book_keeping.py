"""Clipped sums without gradients per record: one forward, one backward pass, and books of what passed each layer.

Weight gradients are never asked for. The backward pass gives the gradient of each layer's output; with the layer's
input that is all that any patient's gradient is made of (``client/clipping/layers.py``). Norms come first, then the
clip, then one weighted sum per layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
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
from client.clipping.replay import Pass, Replays, rounded_up
from shared_models.errors import ConfigError
from shared_models.nets.pretrained import PretrainedCnn, PretrainedEncoder

_FEWEST_RECORDS = 32  # of a pass
_NUMBERS_AT_ONCE = 1 << 22  # numbers that the layers of a pass give: 16 MB of float32
_NUMBERS_PER_CALL = 1 << 16  # numbers that a layer should give in a call, lest Python take longer than the arithmetic
_SMALL = 256  # numbers of a parameter whose gradients are measured and weighed along with others
_LOSS_SCALE = 1024.0  # of float16, whose smallest number is 6e-8; fixed, so that it depends on no record
_TINY = 1e-30  # factors below lose digits in float32
_PASSES: WeakKeyDictionary[nn.Module, dict[torch.Size, tuple[int, int]]] = WeakKeyDictionary()
_REPLAYS: WeakKeyDictionary[nn.Module, Replays] = WeakKeyDictionary()


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
        self._scale = _LOSS_SCALE if self._precision == torch.float16 else 1.0
        self._runs: list[Run] = []
        self._made: Counter[nn.Module] = Counter()
        self._numbers = 0
        self._first: list[tuple[GradientEdge, Callable[[Tensor | None], None]]] = []
        self._calls: dict[nn.Module, list[Call]] = {}
        self._small: list[dict[nn.Parameter, Tensor]] = []
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
        if self.device.type != "cpu":
            return self._micro_batch
        shape = self._records.inputs.shape[1:]
        known = _PASSES.setdefault(self._model, {})
        if shape not in known:
            self._runs = list(_runs(np.ones(1, dtype=np.int64)))
            self._model(self._records.inputs[:1].to(self.device))
            known[shape] = max(1, self._numbers), self._made.total()
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
        batch = (inputs.to(self.device), targets.to(self.device))
        if self.device.type == "cuda" and counts[0] == counts[-1]:
            self._add_recorded(total, batch, counts, clip)
        else:
            self._add_pass(total, batch, counts, clip)

    def _add_pass(self, total: Tensor, batch: tuple[Tensor, ...], counts: NDArray[np.int64], clip: float) -> None:
        """Add one pass over whole patients: their inputs, targets, and what the network's frozen part gave, if kept."""
        self._keep_books(batch, counts)
        norms = self._norms(len(counts))
        factors = self._clip_factors(norms, clip)
        broken, tiny = torch.stack([(~norms.isfinite()).any(), (factors < _TINY).any()]).tolist()
        if broken:  # a NaN times zero is NaN
            for _, members, share in self._shares:
                share.silence(~norms[members].isfinite())
        # A factor that float32 holds with few digits only, or not at all, is not rounded to it.
        self._add_weighted(total, factors if tiny else factors.to(self._parameters[0].dtype))
        self._forget()

    def _add_recorded(self, total: Tensor, batch: tuple[Tensor, ...], counts: NDArray[np.int64], clip: float) -> None:
        """The same on a GPU, for patients with equally many records: by a replay, once a pass was recorded."""
        if isinstance(self._model, PretrainedEncoder | PretrainedCnn):  # it is looked up by content, not by launches
            frozen = self._model.frozen_part(batch[0])
            batch = batch if frozen is None else (*batch, frozen)
        patients, each = len(counts), int(counts[0])
        replays = _REPLAYS.setdefault(self._model, Replays())
        key = (
            rounded_up(patients),
            each,
            clip,
            self._precision,
            id(self._task),
            *((part.shape[1:], part.dtype) for part in batch),
        )
        weights = (*self._model.parameters(), *self._model.buffers())
        new = replays.wants(key, tuple(weight.data_ptr() for weight in weights))
        replay = replays.find(key)
        if replay is not None:
            found = replay(batch, patients)
            if not found.doubtful.item():
                total += found.total
                self._counts[0] += found.clipped
                return
        before = total.clone() if new else total
        self._add_pass(total, batch, counts, clip)
        if new:
            size = rounded_up(patients)
            replays.record(
                key,
                partial(self._quick_pass, counts=np.full(size, each), clip=clip),
                batch,
                rows=size * each,
                patients=patients,
                expected=total - before,
            )

    def _quick_pass(self, batch: tuple[Tensor, ...], patients: Tensor, counts: NDArray[np.int64], clip: float) -> Pass:
        """A pass that waits for no answer, of whose patients the first so many count; said where it is of no use."""
        self._keep_books(batch, counts)
        counted = torch.arange(len(counts), device=self.device) < patients
        squares = self._squares(len(counts), exact=False)
        norms = squares.sqrt()
        factors = self._factors(norms, clip)
        total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=self.device)
        self._add_weighted(total, torch.where(counted, factors, 0).to(self._parameters[0].dtype))
        self._forget()
        doubtful = (counted & (is_extreme(squares) | (factors < _TINY))).any() | ~total.isfinite().all()
        return Pass(total, (counted & (norms > clip)).sum(), doubtful)

    def _add_weighted(self, total: Tensor, weights: Tensor) -> None:
        for place, members, share in self._shares:
            part = total[place]
            share.add_to(part, weights[members])
            if not isinstance(place, slice):  # then it was a copy
                total[place] = part

    def _norms(self, patients: int) -> Tensor:
        """Norm of each patient's gradient over all layers, float64; exact where it is extreme."""
        quick = self._squares(patients, exact=False)
        extreme = is_extreme(quick)
        if not extreme.any():
            return quick.sqrt()
        return torch.where(extreme, self._squares(patients, exact=True), quick).sqrt()

    def _squares(self, patients: int, *, exact: bool) -> Tensor:
        found = torch.zeros(patients, dtype=torch.float64, device=self.device)
        for _, members, share in self._shares:
            found[members] += share.squares(exact=exact)
        return found

    def _add_large(self, total: Tensor, patients: NDArray[np.int64], clip: float) -> None:
        """One patient with more records than a micro-batch: their plain gradient, part by part."""
        mean, records = torch.zeros_like(total), int(self._records.record_counts[patients].sum())
        for inputs, targets, _ in self._records.parts(patients, self._micro_batch):
            losses = self._losses(inputs, targets)
            found = torch.autograd.grad(
                losses.sum() * (self._scale / records), self._parameters, allow_unused=True, materialize_grads=True
            )
            mean += torch.cat([gradient.flatten() for gradient in found]) / self._scale
        factor = self._clip_factors(mean.norm()[None], clip)
        total += factor * mean.nan_to_num_(0, 0, 0)

    def _keep_books(self, batch: tuple[Tensor, ...], counts: NDArray[np.int64]) -> None:
        """One forward and one backward pass over whole patients, ordered by their number of records."""
        self._forget()
        self._runs = list(_runs(counts))
        self._small = [{} for _ in self._runs]
        losses = self._losses(*batch)
        if counts[-1] > 1:
            losses = losses * torch.cat(
                [losses.new_full((run.records.stop - run.records.start,), 1 / run.each) for run in self._runs]
            )
        # Asked for the gradients of the first layers' outputs alone, autograd computes none of a weight, passes all
        # other layers on its way, and stops there.
        edges = [edge for edge, _ in self._first]
        for (_, arrive), grad in zip(
            self._first, torch.autograd.grad(losses.sum() * self._scale, edges, allow_unused=True), strict=True
        ):
            arrive(grad)
        for module in list(self._calls):  # a layer one of whose outputs was not used: what was used counts
            self._close(module)
        for run, small in zip(self._runs, self._small, strict=True):
            if not small:
                continue
            # Made anew in each pass: a recorded one may read nothing that is gone when it is replayed.
            places = torch.cat(
                [
                    torch.arange(place.start, place.stop, device=self.device)
                    for place in map(self._places.__getitem__, small)
                ]
            )
            self._shares.append((places, run.patients, Direct(torch.cat(list(small.values()), dim=1))))

    def _passed(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """After each call of a layer: note its input, and ask for the gradient of its output."""
        if not self._runs:
            return
        inputs, records = given[0] if given else named["input"], self._runs[-1].records.stop
        if len(inputs) != records or len(output) != records or inputs.dim() < 2 - isinstance(module, nn.Embedding):
            raise ConfigError(
                "a layer does not keep records apart: its input has another batch size than the network's",
                hint="Use a network from shared_models/nets; layers must not broadcast over the batch.",
            )
        self._made[module] += 1
        self._numbers += output.numel()
        edge, version = get_gradient_edge(output), inputs._version

        def arrive(grad: Tensor | None) -> None:
            if inputs._version != version:
                raise ConfigError("a layer's input was changed in place after its use", hint="Mend the network.")
            if grad is None:  # its output was not used
                return
            calls = self._calls.setdefault(module, [])
            calls.append(Call(inputs.detach(), grad))
            if len(calls) == self._made[module]:
                self._close(module)

        if inputs.requires_grad:  # there is a layer before it, so that autograd comes this way
            number = edge.output_nr
            edge.node.register_prehook(lambda grads: arrive(grads[number]))
        else:
            self._first.append((edge, arrive))

    def _close(self, module: nn.Module) -> None:
        """All calls of a layer are in: make the shares, and let go of what is not needed for them.

        Small gradients are kept, to lie together and cost as one.
        """
        calls = self._calls.pop(module)
        for run, small in zip(self._runs, self._small, strict=True):
            cut = [Call(_by_patient(call.input, run), _by_patient(call.grad, run)) for call in calls]
            if self._precision != torch.float32:
                cut = [Call(_in_full(call.input), _in_full(call.grad) / self._scale) for call in cut]
            for parameter, share in shares(module, cut):
                if isinstance(share, Direct) and parameter.numel() <= _SMALL:
                    small[parameter] = share.gradients
                else:
                    self._shares.append((self._places[parameter], run.patients, share))

    def _forget(self) -> None:
        """Drop the books of a pass."""
        self._runs = []
        self._made.clear()
        self._numbers = 0
        self._first.clear()
        self._calls.clear()
        self._small.clear()
        self._shares.clear()


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
