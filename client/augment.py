"""Records that are changed a little each time they are trained on, at the hospital, as the plan says."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from client.randomness import SecureRandom
from client.records.records import Records, Rows
from client.records.series import elapsed
from shared_models.plan import Augmentation
from shared_models.tasks import SeriesInput, Task


def augmented(records: Records, task: Task, augmentation: Augmentation, random: SecureRandom) -> Records:
    """The same patients with changed copies of their records, changed anew each time that they are asked for.

    Guarantees:
        * Each copy depends on its own record and on chance alone; nothing of it is kept.
        * A patient stays one patient: the copies' gradients are averaged before the clip.
        * What is missing stays missing.

    Args:
        records: Of images or series.
        task: Their task; ``tasks.task_of`` has checked that the changes fit it.
        augmentation: Of the plan.
        random: Seeds the changes, which are no secret: they need only be independent of other patients.
    """
    generator = torch.Generator().manual_seed(int(random.uniform(1)[0] * 2**53))
    change = _change_series if isinstance(task.input, SeriesInput) else _change_images
    copies = augmentation.copies
    inputs = _Changed(records.inputs, copies, lambda inputs: change(inputs, augmentation, generator))
    targets = records.targets
    if isinstance(targets, Tensor):
        targets = targets.repeat_interleave(copies, dim=0)
    else:
        targets = _Changed(targets, copies, lambda unchanged: unchanged)
    return replace(
        records,
        inputs=inputs,
        targets=targets,
        patients=np.repeat(records.patients, copies),
    )


class _Changed:
    """Rows of inputs, each as often as there are copies, changed when they are asked for."""

    def __init__(self, inputs: Tensor | Rows, copies: int, change: Callable[[Tensor], Tensor]) -> None:
        self._inputs, self._copies, self._change = inputs, copies, change

    @property
    def shape(self) -> torch.Size:
        """Of all copies together."""
        return torch.Size((len(self), *self._inputs.shape[1:]))

    def __len__(self) -> int:
        return len(self._inputs) * self._copies

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        chosen = torch.arange(len(self))[rows]
        inputs = self._inputs[chosen.div(self._copies, rounding_mode="floor")]
        changed = self._change(inputs)
        changed[inputs.isnan().flatten(1).all(dim=1)] = torch.nan  # what could not be read is not made of zeros now
        return changed


def _change_images(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Moved, turned and mirrored in one step of resampling; what moves in at an edge repeats the edge."""
    if augmentation.shift or augmentation.rotate_degrees or augmentation.flip:
        images = _moved(images, augmentation, generator)
    return _revalued(images, augmentation, generator).clamp(-1, 1)  # the range that encoded pixels have


def _moved(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    count, size = len(images), torch.tensor(images.shape[2:])
    angle = torch.deg2rad(_between(count, augmentation.rotate_degrees, generator))
    pixels = _between(2 * count, 1.0, generator).view(count, 2) * (augmentation.shift * size)
    down, right = (pixels.round() * 2 / size).unbind(dim=1)  # the grid's edges are at -1 and 1
    side = torch.ones(count)
    if augmentation.flip:
        side = 1.0 - 2.0 * torch.randint(2, (count,), generator=generator)
    # An oblong image is turned in pixels, not in the grid's units.
    aspect = float(size[0] / size[1])
    theta = torch.stack(
        [
            torch.stack([angle.cos() * side, -angle.sin() * aspect, right], dim=1),
            torch.stack([angle.sin() * side / aspect, angle.cos(), down], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _revalued(values: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    if augmentation.contrast:
        factors = 1 + _between(len(values), augmentation.contrast, generator)
        values = values * factors.view(-1, *[1] * (values.ndim - 1))
    if augmentation.noise:
        values = values + augmentation.noise * torch.randn(values.shape, generator=generator)
    return values


def _change_series(series: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Values revalued where there are any; of what is dropped, the time since it was last seen goes on."""
    values, mask, since = series.chunk(3, dim=2)
    if augmentation.drop:
        mask = mask * (torch.rand(mask.shape, generator=generator) >= augmentation.drop)
        since = torch.from_numpy(elapsed(mask.numpy() > 0))
    values = torch.where(mask > 0, _revalued(values, augmentation, generator), 0.0)
    return torch.cat([values, mask, since], dim=2)


def _between(count: int, extent: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(count, generator=generator) - 1) * extent
