"""What every engine for gradients per patient shares: micro-batches, the clip, counts, and the way down."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.records.records import Records
from shared_models.errors import ConfigError
from shared_models.nets.losses import loss_per_record
from shared_models.tasks import Task


class Gradients(ABC):
    """Gradients per patient of one network over one set of records; a context that hooks the network and frees it.

    Args:
        model: Network; stays usable as a plain module afterwards. Parameters that are frozen stay as they are.
        records: Training records.
        task: Names the loss.
        device: Where gradients are computed.
        micro_batch: Most records at once on the device.
        precision: ``torch.bfloat16`` or ``torch.float16`` lets torch's autocast compute what it holds for safe in 16
            bits; the loss, norms, the clip and sums stay in 32 or 64.

    Raises:
        ConfigError: ``micro_batch`` is below 1.
    """

    rounding: float
    """Clip to this part of C, below 1, so that the rounding of a computed norm cannot lift a patient above C."""

    def __init__(
        self,
        model: nn.Module,
        records: Records,
        task: Task,
        *,
        device: str | torch.device,
        micro_batch: int,
        precision: torch.dtype = torch.float32,
    ) -> None:
        if not micro_batch >= 1:
            raise ConfigError("micro_batch must be at least 1", hint="Mend the hospital's settings.")
        self._model = model.to(device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._records = records
        self._task = task
        self.device = torch.device(device)
        self._precision = precision
        self._micro_batch = micro_batch
        self._sizes = [p.numel() for p in self._parameters]
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._was_training = model.training

    def __enter__(self) -> Self:
        # Dropout and the like behave as in training; Opacus records nothing for a layer in evaluation mode.
        self._model.train()
        self._hook()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unhook()
        self._model.train(self._was_training)

    def clipped_sum(self, patients: NDArray[np.int64], *, clip: float) -> Tensor:
        """Sum over patients of their mean gradient, each clipped to L2 norm ``clip``.

        Guarantees:
            * With or without any one patient the result differs by at most ``clip`` in L2 norm, up to the rounding
              of sums over patients.
            * Nobody drawn is left out: a large draw runs in micro-batches; an empty draw gives zero.

        Args:
            patients: Distinct patient indices.
            clip: C; ``math.inf`` to leave gradients as they are.

        Returns:
            Shape ``(d,)``, float64, over the trainable parameters in their own order.
        """
        total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=self.device)
        for group in self._groups(patients):
            self._add_group(total, group, clip)
        return total

    def descend(self, gradient: Tensor, *, learning_rate: float) -> None:
        """One plain SGD step of all parameters at once, in their own precision."""
        rounded = gradient.to(self._parameters[0].dtype).split(self._sizes)
        parts = [part.view_as(parameter) for parameter, part in zip(self._parameters, rounded, strict=True)]
        with torch.no_grad():
            torch._foreach_sub_([*self._parameters], parts, alpha=learning_rate)

    def position(self) -> list[Tensor]:
        """A copy of the parameters as they are."""
        return [parameter.detach().clone() for parameter in self._parameters]

    def return_towards(self, start: list[Tensor], *, share: float) -> None:
        """Move the parameters this share of the way to ``start``: a step on the proximal term, by its gradient."""
        with torch.no_grad():
            for parameter, origin in zip(self._parameters, start, strict=True):
                parameter.lerp_(origin, share)

    def counts(self) -> tuple[int, int]:
        """Patients so far whose gradient was clipped, and whose gradient was not finite."""
        clipped, not_finite = self._counts.tolist()
        return clipped, not_finite

    def _losses(self, inputs: Tensor, targets: Tensor, *frozen: Tensor) -> Tensor:
        """One forward pass: the loss of each record, float32 or more."""
        with torch.autocast(self.device.type, self._precision, enabled=self._precision != torch.float32):
            outputs = self._model(inputs.to(self.device), *frozen)
        if self._precision != torch.float32:
            outputs = outputs.float()
        losses = loss_per_record(self._task, outputs, targets.to(self.device))
        if losses.shape != (len(inputs),):
            raise ConfigError("a network does not give one loss per record", hint="Mend the network.")
        return losses

    @abstractmethod
    def _hook(self) -> None:
        """Make the network ready."""

    @abstractmethod
    def _unhook(self) -> None:
        """Leave no trace on the network, also where ``_hook`` or a pass broke off."""

    @abstractmethod
    def _add_group(self, total: Tensor, patients: NDArray[np.int64], clip: float) -> None:
        """Add the clipped gradients of one of ``_groups`` to ``total``, shape ``(d,)``."""

    def _groups(self, patients: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Split patients, those with few records first, so that no group has more than ``_at_once`` records.

        A patient with more than that is a group alone.
        """
        counts = self._records.record_counts[patients]
        at_once = self._at_once() if len(patients) else 1
        at_once = -(-int(counts.sum()) // -(-int(counts.sum()) // at_once)) if len(patients) else 1
        order = np.argsort(counts, kind="stable")
        ends = np.cumsum(counts[order])
        cuts, first, before = [], 0, 0
        while first < len(ends):
            first = max(first + 1, int(np.searchsorted(ends, before + at_once, side="right")))
            before = ends[first - 1]
            cuts.append(first)
        return np.split(patients[order], cuts[:-1]) if cuts else []

    def _at_once(self) -> int:
        """Most records of one group; the engine may want fewer than there is memory for."""
        return self._micro_batch

    def _clip_factors(self, norms: Tensor, clip: float) -> Tensor:
        """For each patient, what to multiply the mean gradient with: at most 1, and 0 if its norm is not finite."""
        finite = norms.isfinite()
        self._counts += torch.stack([(finite & (norms > clip)).sum(), (~finite).sum()])
        return self._factors(norms, clip)

    def _factors(self, norms: Tensor, clip: float) -> Tensor:
        """The same, without counting them."""
        return torch.where(norms.isfinite(), (clip * self.rounding / norms).clamp(max=1), 0)
