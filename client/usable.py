"""A released model with what is needed to use it: its task, its outputs in words and units, what it is for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shared_models.model_file import intended_use, read_about, read_model
from shared_models.nets.losses import scores
from shared_models.plan import StudyPlan
from shared_models.tasks import Choice, Head, Numeric, Outline, Quantity, Survival, Task, task_of


@dataclass(frozen=True, eq=False)
class UsableModel:
    """A model, ready to be asked.

    Attributes:
        plan: Of the study that trained it.
        task: What it predicts.
        network: In evaluation mode, on the CPU.
        intended_use: What it is for, by its file.
    """

    plan: StudyPlan
    task: Task
    network: nn.Module
    intended_use: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the outputs, in order.

        Of a choice ``probability_CLASS``; of a quantity its name; of survival ``NAME_by_EDGE`` for each interval: the
        probability that the event has happened by its end; of an outline ``NAME_share``: of the image, in probability.
        Of a task with several heads, probabilities have the head's name in front.
        """
        return tuple(name for head in self.task.heads for name in _names(head, self._prefix(head)))

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Heads of which a class is predicted."""
        return tuple(head for head in self.task.heads if isinstance(head, Choice))

    def predicted_column(self, head: Choice) -> str:
        """Where the predicted class of a head stands."""
        return f"{self._prefix(head)}predicted"

    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs of encoded records, shape ``(n, len(columns))``: probabilities, and quantities in their own unit."""
        return self.from_logits(self.network(inputs))

    def from_logits(self, logits: Tensor) -> Tensor:
        """The same, from what the network gives, shape ``(n, task.outputs)``."""
        found = scores(self.task, logits)
        parts = (found[:, None] if found.ndim == 1 else found).split([widths[0] for widths in self.task.widths], dim=1)
        return torch.cat([_in_words(head, part) for head, part in zip(self.task.heads, parts, strict=True)], dim=1)

    def predicted(self, outputs: Tensor) -> dict[str, list[str]]:
        """By column, the most probable class of each record; of two equally probable ones the first."""
        found, first = {}, 0
        for head in self.task.heads:
            width = len(_names(head, ""))
            if isinstance(head, Choice):
                best = outputs[:, first : first + width].argmax(dim=1).tolist()
                found[self.predicted_column(head)] = [head.classes[index] for index in best]
            first += width
        return found

    def masks(self, inputs: Tensor) -> Tensor | None:
        """Of an outline, which pixels more probably belong to it than not: shape ``(n, height, width)``; else None."""
        if not isinstance(self.task.heads[0], Outline):
            return None
        return (self.network(inputs) > 0).view(len(inputs), *inputs.shape[2:])

    def _prefix(self, head: Head) -> str:
        return "" if len(self.task.heads) == 1 else f"{head.name}_"


def load_model(path: Path) -> UsableModel:
    """Read a model file and build its network.

    Raises:
        ConfigError: The file is no model, or its task is not installed here.
    """
    plan, network = read_model(path)
    return UsableModel(plan, task_of(plan), network.eval(), intended_use(read_about(path)))


def _names(head: Head, prefix: str) -> Sequence[str]:
    match head:
        case Choice(classes=classes):
            return [f"{prefix}probability_{name}" for name in classes]
        case Quantity():
            return [head.name]
        case Survival(name=name, edges=edges):
            return [f"{name}_by_{edge:g}" for edge in edges]
        case Outline(name=name):
            return [f"{name}_share"]


def _in_words(head: Head, found: Tensor) -> Tensor:
    """A head's scores as its columns."""
    match head:
        case Choice(classes=classes):
            return torch.cat([1 - found, found], dim=1) if len(classes) == 2 else found
        case Quantity(measure=measure):
            return _in_unit(measure, found)
        case Survival():
            return found
        case Outline():
            return found.mean(dim=1, keepdim=True)


def _in_unit(measure: Numeric, encoded: Tensor) -> Tensor:
    """The inverse of ``Numeric.scaled``; what lies outside the public range is put at its end."""
    back: dict[str, Callable[[Tensor], Tensor]] = {"linear": torch.clone, "log": torch.exp, "sqrt": torch.square}
    there: dict[str, Callable[[Tensor], Tensor]] = {"linear": torch.clone, "log": torch.log, "sqrt": torch.sqrt}
    low, high = there[measure.scale](torch.tensor([measure.low, measure.high], dtype=torch.float64)).tolist()
    return back[measure.scale](low + (encoded.clamp(-2, 2) + 2) / 4 * (high - low))
