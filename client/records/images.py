"""Images in one ``.npz`` file -> validated arrays: one of pixels, one of labels, one of patients.

Nothing is ever unpickled: an array of objects is refused. The texts of errors are for the hospital's own terminal.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.identifiers import refuse_columns
from client.records.labels import Targets, label_columns, read_labels
from client.records.manifest import IMAGES, Manifest
from shared_models.errors import RecordsError
from shared_models.tasks import ImageInput, Outline, Task

_CHECK = "Mend the file or the manifest, then run konsil-hospital check-data again."


def read_images(manifest: Manifest, task: Task, schema: ImageInput) -> tuple[NDArray[np.uint8], Targets, list[str]]:
    """Read and check a file of images.

    Args:
        manifest: Names the file and its arrays.
        task: Names the heads.
        schema: Channels, height and width that every image must have.

    Returns:
        Pixels of shape ``(n, channels, height, width)``, targets as ``read_labels`` gives them, and a patient id for
        each image. Masks are an array of the images' shape, not 0 where a pixel belongs to the outline.

    Raises:
        RecordsError: The file is no such file; an array is missing or has another type or length; a label is unknown.
    """
    arrays = _load(manifest)
    columns = label_columns(manifest, task)
    used = [manifest.column(IMAGES), *columns.values(), *([manifest.patient] if manifest.patient else [])]
    refuse_columns(manifest.file, arrays, drop=manifest.drop, mapped=used)
    pixels = _array(manifest, arrays, manifest.column(IMAGES))
    if pixels.ndim == 3 and schema.channels == 1:
        pixels = pixels[:, None]
    wanted = (schema.channels, schema.height, schema.width)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != wanted:
        raise RecordsError(
            f"{manifest.file}: images are {pixels.dtype} of shape {pixels.shape[1:]}, not uint8 of {wanted}",
            hint=_CHECK,
        )
    if not len(pixels):
        raise RecordsError(f"{manifest.file} has no images", hint="Export the records again.")
    labels = _targets(manifest, task, arrays, columns, len(pixels))
    return pixels, labels, _patient_ids(manifest, arrays, pixels, labels)


def scaled(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels from 0 to 255, encoded to [-1, 1]: the range is public, and nothing is computed from the records."""
    levels = pixels.astype(np.float32)
    levels /= np.float32(127.5)  # in place: large sets of images have no room for copies
    levels -= np.float32(1)
    return levels


def repeated(records: NDArray[Any]) -> int:
    """How many records of an array equal an earlier one."""
    return len(records) - len({_digest(record) for record in records})


def _load(manifest: Manifest) -> Mapping[str, NDArray[Any]]:
    try:
        with manifest.file.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise RecordsError(f"{manifest.file} does not exist", hint="Check file = ... in the manifest.") from None
    except Exception as error:  # of a damaged archive: zlib's, zipfile's, numpy's, and more
        raise RecordsError(
            f"{manifest.file} cannot be read: {type(error).__name__}",
            hint="Save it with numpy.savez: numbers and texts, no objects.",
        ) from None


def _array(manifest: Manifest, arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in arrays:
        raise RecordsError(f"{manifest.file} has no array {name!r}", hint=_CHECK)
    return arrays[name]


def _targets(
    manifest: Manifest, task: Task, arrays: Mapping[str, NDArray[Any]], columns: Mapping[str, str], images: int
) -> Targets:
    if task.choice is not None:
        return _labels(manifest, task, _texts(manifest, arrays, columns[task.choice.name], images))
    if isinstance(head := task.heads[0], Outline):
        return _masks(manifest, task, _array(manifest, arrays, columns[head.name]), images)
    cells = {name: _texts(manifest, arrays, name, images, kinds="iufU") for name in columns.values()}
    return read_labels(manifest, task, pd.DataFrame(cells))


def _masks(manifest: Manifest, task: Task, masks: NDArray[Any], images: int) -> NDArray[np.float64]:
    assert isinstance(task.input, ImageInput)  # noqa: S101 - the task has checked it
    wanted = (images, task.input.height, task.input.width)
    if masks.dtype.kind not in "biu" or masks.shape != wanted:
        raise RecordsError(
            f"{manifest.file}: masks are {masks.dtype} of shape {masks.shape}, not whole numbers of {wanted}",
            hint=_CHECK,
        )
    return (masks != 0).reshape(images, -1).astype(np.float64)


def _texts(
    manifest: Manifest, arrays: Mapping[str, NDArray[Any]], name: str, images: int, kinds: str = "iuU"
) -> list[str]:
    """An array of one text or number per image, as stripped texts."""
    found = _array(manifest, arrays, name)
    if found.dtype.kind not in kinds or found.shape != (images,):
        raise RecordsError(
            f"{manifest.file}: {name!r} is {found.dtype} of shape {found.shape}, not one text or whole number for each "
            f"of {images} images",
            hint=_CHECK,
        )
    return [str(value).strip() for value in found]


def _labels(manifest: Manifest, task: Task, texts: list[str]) -> NDArray[np.int64]:
    codes = manifest.categories.get(task.label, {})
    index = {name: number for number, name in enumerate(task.classes)}
    found = np.array([index.get(codes.get(text, text), -1) for text in texts], dtype=np.int64)
    wrong = np.flatnonzero(found < 0)
    if len(wrong):
        raise RecordsError(
            f"{manifest.file}, image {wrong[0]}, label {texts[wrong[0]]!r}: is none of {', '.join(task.classes)}"
            + (f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""),
            hint=_CHECK,
        )
    return found


def _patient_ids(
    manifest: Manifest, arrays: Mapping[str, NDArray[Any]], pixels: NDArray[np.uint8], labels: Targets
) -> list[str]:
    """An id per image: the patient array; or where there is none the image's digest, with a number for equal ones."""
    if manifest.patient is None:
        seen: dict[str, int] = {}
        ids = []
        for image, label in zip(pixels, labels, strict=True):
            digest = f"{_digest(image)} {label if label.ndim == 0 else _digest(label)}"
            seen[digest] = seen.get(digest, -1) + 1
            ids.append(f"{digest} {seen[digest]}")
        return ids
    ids = _texts(manifest, arrays, manifest.patient, len(pixels))
    if "" in ids:
        raise RecordsError(f"{manifest.file}, image {ids.index('')}: the patient id is missing", hint=_CHECK)
    if manifest.one_row_per_patient and len(set(ids)) < len(ids):
        raise RecordsError(
            f"{manifest.file}: a patient has two images, but the manifest declares one_row_per_patient", hint=_CHECK
        )
    return ids


def _digest(image: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
