"""A hospital by itself: train and measure a model locally, without privacy, for its own comparison."""

from pathlib import Path

import torch
from torch import Tensor, nn

from client.augment import augmented
from client.evaluate import statistics
from client.randomness import SecureRandom
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from shared_models.errors import ConfigError
from shared_models.model_file import read_model, write_model
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.outcomes import compute_metrics
from shared_models.plan import Augmentation, StudyPlan
from shared_models.tasks import Task, task_of, with_groups

NO_SECRET = bytes(32)  # nothing leaves: whoever reads this folder's results reads its records too
LOCAL_BINS = 1000  # of local evaluation; exact to 1/2000 in a score


def train_folder(
    plan: StudyPlan, folder: Path, out: Path, *, steps: int, learning_rate: float, batch_size: int
) -> None:
    """Train the plan's network on all records of a folder with plain SGD, and write the model.

    Raises:
        ConfigError, RecordsError: The folder's manifest or data does not fit the plan's task.
    """
    task = with_groups(task_of(plan), ())
    training, _ = read_table(read_manifest(folder), task, split_key=NO_SECRET)
    model = build_network(plan.network, task, seed=plan.seed)
    torch.set_num_threads(1)
    train_without_privacy(
        model, training, task, steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=plan.seed
    )
    write_model(out, model, plan, trained="alone, without privacy")


def evaluate_folder(model_file: Path, folder: Path) -> dict[str, float]:
    """Metrics of a model on all records of a folder, exact up to the bins; nothing is released.

    Raises:
        ConfigError: The file is no model of ours.
    """
    plan, model = read_model(model_file)
    task = with_groups(task_of(plan), ())
    records, _ = read_table(read_manifest(folder), task, split_key=NO_SECRET)
    return compute_metrics(task, statistics(model, records, task, bins=LOCAL_BINS), bins=LOCAL_BINS)


def train_without_privacy(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    augmentation: Augmentation | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Train in place with plain SGD on shuffled batches, without clipping or noise: a baseline that never leaves.

    Epochs of ``batch_size`` records follow each other until ``steps`` steps are done; the last batch of an epoch may be
    smaller. ``seed`` orders the records and, where there is augmentation, changes them.

    Raises:
        ConfigError: There are no records, or a number is not positive.
    """
    if not (len(records) and steps >= 1 and batch_size >= 1 and learning_rate > 0):
        raise ConfigError("a baseline needs records, steps, a batch size and a learning rate", hint="Mend the options.")
    if augmentation is not None:
        records = augmented(records, task, augmentation, SecureRandom.for_tests(seed.to_bytes(32)))
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    optimizer = torch.optim.SGD(model.to(device).train().parameters(), lr=learning_rate)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(len(records), generator=generator).split(batch_size))
        rows = batches.pop()
        outputs = model(records.inputs[rows].to(device))
        optimizer.zero_grad()
        loss_per_record(task, outputs, records.targets[rows].to(device)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    model.train(was_training)
