"""Loss and scores of a task, one number or row per record: what is clipped per patient may not be averaged before."""

from torch import Tensor
from torch.nn import functional

from shared_models.tasks import Task


def loss_per_record(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of each record.

    Args:
        task: Names the loss.
        outputs: Logits, shape ``(n, task.outputs)``.
        targets: Labels, shape ``(n,)``: 0 or 1 for a binary task (any dtype), else class indices.

    Returns:
        Losses in nats, shape ``(n,)``.
    """
    if task.loss == "binary-cross-entropy":
        # squeeze(1), never squeeze(): a batch of one record must keep its batch dimension.
        logits = outputs.squeeze(1)
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return functional.cross_entropy(outputs, targets.long(), reduction="none")


def scores(task: Task, outputs: Tensor) -> Tensor:
    """Probabilities, as ``shared_models/metrics.py`` takes them.

    Args:
        task: Names the loss, and with it what the logits mean.
        outputs: Logits, shape ``(n, task.outputs)``.

    Returns:
        Two classes: probability of the positive one, shape ``(n,)``. More: of every class, shape ``(n, classes)``.
    """
    if task.loss == "binary-cross-entropy":
        return outputs.squeeze(1).sigmoid()
    probabilities = outputs.softmax(dim=1)
    return probabilities[:, 1] if len(task.classes) == 2 else probabilities
