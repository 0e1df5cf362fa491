"""Loss and scores of a task, one number or row per record: what is clipped per patient may not be averaged before."""

import torch
from torch import Tensor
from torch.nn import functional

from shared_models.tasks import Choice, Head, Outline, Quantity, Survival, Task


def loss_per_record(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each record: the sum over the task's heads.

    A choice or a quantity whose target is NaN is not known of that record, and adds nothing to its loss.

    Args:
        task: Names the heads, and the weights of classes.
        outputs: Shape ``(n, task.outputs)``.
        targets: Shape ``(n, *task.target_shape)``. Of a task with one choice class indices (any dtype).

    Returns:
        Losses in nats, of a quantity in encoded units, shape ``(n,)``.
    """
    if task.choice is not None:
        return _choice_loss(task.choice, outputs, targets)
    parts = zip(task.heads, *_split(task, outputs, targets), strict=True)
    return torch.stack([_known_loss(head, own, target) for head, own, target in parts]).sum(dim=0)


def scores(task: Task, outputs: Tensor) -> Tensor:
    """What the outputs say, as ``shared_models/outcomes.py`` takes it: every head's columns beside each other.

    Args:
        task: Names the heads, and with them what the outputs mean.
        outputs: Shape ``(n, task.outputs)``.

    Returns:
        For each head, in order: of a choice between two the probability of the positive class, of a choice between more
        that of every class; of a quantity its encoded value; of survival the probability that the event has happened by
        the end of each interval; of an outline each pixel's probability. Shape ``(n, task.outputs)``, but ``(n,)`` for
        a task with one choice between two.
    """
    if task.choice is not None and len(task.choice.classes) == 2:
        return outputs.squeeze(1).sigmoid()
    parts = outputs.split([widths[0] for widths in task.widths], dim=1)
    return torch.cat([_scores(head, own) for head, own in zip(task.heads, parts, strict=True)], dim=1)


def _split(task: Task, outputs: Tensor, targets: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Each head's own outputs and targets."""
    own, known = zip(*task.widths, strict=True)
    return outputs.split(own, dim=1), targets.split(known, dim=1)


def _known_loss(head: Head, outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of a head among several; zero, with a gradient of zero, where the target is not known."""
    match head:
        case Survival():
            return _survival_loss(outputs, targets)
        case Outline():
            return _outline_loss(outputs, targets)
        case _:
            target = targets.squeeze(1)
            known = ~target.isnan()
            filled = torch.where(known, target, 0.0)
            losses = _choice_loss(head, outputs, filled) if isinstance(head, Choice) else _error(head, outputs, filled)
            return torch.where(known, losses, 0.0)


def _choice_loss(head: Choice, outputs: Tensor, targets: Tensor) -> Tensor:
    if len(head.classes) == 2:
        # squeeze(1), never squeeze(): a batch of one record must keep its batch dimension.
        logits = outputs.squeeze(1)
        losses = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    else:
        losses = functional.cross_entropy(outputs, targets.long(), reduction="none")
    if head.weights is None:
        return losses
    weights = torch.stack([losses.new_full((), weight) for weight in head.weights])
    return losses * weights[targets.long()]


def _error(head: Quantity, outputs: Tensor, targets: Tensor) -> Tensor:
    error = outputs.squeeze(1) - targets
    return error.abs() if head.loss == "absolute" else error.square() / 2


def _survival_loss(hazards: Tensor, targets: Tensor) -> Tensor:
    """Negative logarithm of the likelihood: no event in the intervals passed, and the event where it happened."""
    intervals = torch.arange(hazards.shape[1], device=hazards.device)
    passed, happened = targets[:, :1], targets[:, 1:]
    none = functional.softplus(hazards) * (intervals < passed)
    event = functional.softplus(-hazards) * ((intervals == passed) & (happened > 0))
    return (none + event).sum(dim=1)


def _outline_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels, and one minus the soft Dice coefficient (Milletari et al. 2016, section 3)."""
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype), reduction="none").mean(
        dim=1
    )
    shares = logits.sigmoid()
    overlap = 2 * (shares * mask).sum(dim=1) + 1
    return cross_entropy + 1 - overlap / (shares.square().sum(dim=1) + mask.sum(dim=1) + 1)


def _scores(head: Head, outputs: Tensor) -> Tensor:
    match head:
        case Choice(classes=classes):
            return outputs.sigmoid() if len(classes) == 2 else outputs.softmax(dim=1)
        case Quantity():
            return outputs
        case Survival():
            return 1 - functional.logsigmoid(-outputs).cumsum(dim=1).exp()
        case Outline():
            return outputs.sigmoid()
