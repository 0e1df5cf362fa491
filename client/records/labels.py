"""Label columns of a frame -> targets of a task's heads. Masks of outlines are kept as one bit per pixel."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.columns import categories, finite_numbers, numbers
from client.records.extras import needed
from client.records.frames import Flags, missing, refuse
from client.records.manifest import Manifest
from client.records.on_disk import digest, digests
from client.records.pictures import decoding, inside
from client.records.scratch import Stored
from shared_models.errors import RecordsError
from shared_models.tasks import Categorical, Choice, Head, ImageInput, Outline, Quantity, Survival, Task

Labels = NDArray[np.int64] | NDArray[np.float64] | NDArray[np.uint8]
Targets = Labels | Stored  # masks are as many as pictures, and lie where there is room


def label_columns(manifest: Manifest, task: Task) -> dict[str, str]:
    """Each label column's name in the task, and in the file."""
    if task.choice is not None and manifest.label is not None:
        return {task.choice.name: manifest.label}
    return {name: manifest.column(name) for name in task.label_columns}


def absent_labels(manifest: Manifest, task: Task, frame: pd.DataFrame) -> dict[str, Flags]:
    """Which rows lack a label that they need, by label column.

    Of several heads a row may lack some: nothing is learnt from it for those. It needs one at least, and both columns
    of a survival.
    """
    empty = {name: missing(frame[column], manifest) for name, column in label_columns(manifest, task).items()}
    spared = [head.name for head in task.heads if isinstance(head, Choice | Quantity)] if len(task.heads) > 1 else []
    nowhere = np.logical_and.reduce([empty[name] for name in spared or empty]) & (len(spared) == len(task.heads))
    return {name: nowhere if name in spared else flags for name, flags in empty.items()}


def read_labels(manifest: Manifest, task: Task, frame: pd.DataFrame) -> Labels:
    """Targets of the rows.

    Returns:
        Of a task with one choice class indices, shape ``(n,)``, int64. Else shape ``(n, *task.target_shape)``, float64:
        class indices, quantities as ``Numeric.scaled`` encodes them, what ``Survival.intervals`` gives; NaN where a
        label of one among several heads is missing. Of an outline ``packed`` masks.

    Raises:
        RecordsError: A label is none; with file, row and column.
    """
    if task.choice is not None:
        column = label_columns(manifest, task)[task.choice.name]
        return categories(frame, manifest, _categorical(task.choice), column=column)
    if isinstance(head := task.heads[0], Outline):
        return _masks(manifest, task, head, frame)
    return np.concatenate([_head(manifest, head, frame) for head in task.heads], axis=1)


def packed_bytes(pixels: int) -> int:
    """Bytes of a packed mask."""
    return -(-pixels // 8)


def packed(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Masks of shape ``(n, height, width)``, eight pixels in a byte, shape ``(n, bytes)``."""
    return np.packbits(masks.reshape(len(masks), -1), axis=1)


def unpacked(masks: NDArray[Any], pixels: int) -> NDArray[np.uint8]:
    """``packed`` masks as 0 and 1, shape ``(n, pixels)``."""
    return np.unpackbits(masks, axis=1, count=pixels)


def marks(labels: Targets, task: Task) -> Iterator[int | str]:
    """What stands for each row's label where its content is its id: the class's index, or a digest of all numbers."""
    if isinstance(labels, Stored):
        (pixels,) = task.target_shape
        return digests(labels, lambda masks: unpacked(masks, pixels).astype(np.float64))
    return iter(labels.tolist()) if labels.ndim == 1 else (digest(row) for row in labels)


def _head(manifest: Manifest, head: Head, frame: pd.DataFrame) -> NDArray[np.float64]:
    match head:
        case Survival():
            return _survival(manifest, head, frame)
        case _:
            known = ~missing(frame[manifest.column(head.name)], manifest)
            found = np.full((len(frame), 1), np.nan)
            rows = frame[known]
            found[known, 0] = (
                categories(rows, manifest, _categorical(head))
                if isinstance(head, Choice)
                else head.measure.scaled(numbers(rows, manifest, head.measure))  # type: ignore[union-attr]
            )
            return found


def _categorical(head: Choice) -> Categorical:
    return Categorical(name=head.name, categories=head.classes)


def _survival(manifest: Manifest, head: Survival, frame: pd.DataFrame) -> NDArray[np.float64]:
    column = manifest.column(head.time)
    times = finite_numbers(frame, manifest, column, head.unit)
    refuse(manifest, frame, column, times < 0, "is before the beginning")
    happened = categories(frame, manifest, Categorical(name=head.event, categories=("no", "yes"))) == 1
    return head.intervals(times, happened)


def _masks(manifest: Manifest, task: Task, head: Outline, frame: pd.DataFrame) -> NDArray[np.uint8]:
    """Pictures of the task's size; a pixel that is not black belongs to the outline."""
    schema = task.input
    assert isinstance(schema, ImageInput)  # noqa: S101 - the task has checked it
    with needed("images", "pillow"):
        from PIL import Image  # noqa: PLC0415  # an extra
    masks = np.empty((len(frame), packed_bytes(schema.height * schema.width)), dtype=np.uint8)
    for number, path in enumerate(inside(manifest, frame, manifest.column(head.name))):
        with decoding(path), Image.open(path, formats=("PNG",)) as picture:
            if (picture.height, picture.width) != (schema.height, schema.width):
                raise RecordsError(
                    f"{path}: the mask has {picture.width} x {picture.height} pixels, not {schema.width} x "
                    f"{schema.height}",
                    hint="Export masks and pictures at the task's size: fitting one of them would move the other.",
                )
            masks[number] = packed(np.asarray(picture.convert("L"))[None] > 0)[0]
    return masks
