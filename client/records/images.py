"""Images in one ``.npz`` file -> validated arrays: one of pixels, one of labels, one of patients.

Pixels that are stored as they are (``numpy.savez``) stay on the disk and are read when a batch needs them; compressed
ones (``numpy.savez_compressed``), and masks, are read once, some at a time, and lie where there is room. Nothing is
ever unpickled: an array of objects is refused. The texts of errors are for the hospital's own terminal.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.lib import format as npy
from numpy.typing import NDArray

from client.records.groups import group_columns, read_groups
from client.records.identifiers import refuse_columns
from client.records.labels import Targets, label_columns, marks, packed, packed_bytes, read_labels
from client.records.manifest import IMAGES, Manifest
from client.records.on_disk import Content, OnDisk, digests
from client.records.scratch import Room, Stored
from client.records.stamps import Stamp, stamps
from shared_models.errors import FederationError, RecordsError
from shared_models.tasks import ImageInput, Outline, Task

_CHECK = "Mend the file or the manifest, then run konsil-hospital check-data again."
_CHUNK = 1 << 20


def read_images(
    manifest: Manifest, task: Task, schema: ImageInput, room: Room
) -> tuple[Content, Targets, list[str], NDArray[np.float64] | None]:
    """Read and check a file of images.

    Guarantees:
        * Every array that is used agrees with the archive's checksum of it.

    Args:
        manifest: Names the file and its arrays.
        task: Names the heads.
        schema: Channels, height and width that every image must have.
        room: Where compressed images and masks may lie once they were read.

    Returns:
        Pixels of shape ``(n, channels, height, width)``, targets as ``read_labels`` gives them, a patient id for each
        image, and what ``read_groups`` gives. Masks are an array of the images' shape, not 0 where a pixel belongs to
        the outline.

    Raises:
        RecordsError: The file is no such file; an array is missing or has another type or length; a label is unknown.
    """
    columns, groups = label_columns(manifest, task), group_columns(manifest, task)
    outlines = [columns[head.name] for head in task.heads if isinstance(head, Outline)]
    pixels, arrays, masks = _loaded(manifest, schema, columns.values(), room, outlines=outlines, groups=groups.values())
    labels = _targets(manifest, task, arrays, columns, len(pixels)) if masks is None else masks
    for name in groups.values():
        _texts(manifest, arrays, name, len(pixels), kinds="iufU")  # one for each image, or refused
    frame = pd.DataFrame({name: arrays[name] for name in groups.values()}, index=range(len(pixels)))
    beside = read_groups(manifest, task, frame)
    return pixels, labels, _patient_ids(manifest, task, arrays, pixels, labels), beside


def read_unlabelled(manifest: Manifest, task: Task, schema: ImageInput, room: Room) -> tuple[Content, list[str | None]]:
    """Read and check a file of images without looking at labels.

    Returns:
        Pixels as ``read_images`` has them, and a patient id for each image; None where no array says it.

    Raises:
        RecordsError: As for ``read_images``, but for labels.
    """
    pixels, arrays, _ = _loaded(manifest, schema, (), room, unused=label_columns(manifest, task).values())
    if manifest.patient is None:
        return pixels, [None] * len(pixels)
    return pixels, list(_patient_ids(manifest, task, arrays, pixels, np.zeros(len(pixels), dtype=np.int64)))


def _loaded(
    manifest: Manifest,
    schema: ImageInput,
    labels: Iterable[str],
    room: Room,
    *,
    outlines: Sequence[str] = (),
    groups: Iterable[str] = (),
    unused: Iterable[str] = (),
) -> tuple[Content, Mapping[str, NDArray[Any]], Stored | None]:
    """The images, arrays of labels, patients and groups, and masks; neither these nor any other identify somebody."""
    others = [*labels, *([manifest.patient] if manifest.patient else [])]
    mapped = [manifest.column(IMAGES), *others, *unused]
    with _opened(manifest) as (archive, before):
        refuse_columns(manifest.file, archive.files, drop=manifest.drop, mapped=mapped)
        pixels = _pixels(manifest, archive, schema, before, room)
        arrays = {name: _array(manifest, archive, name) for name in [*others, *groups] if name not in outlines}
        masks = (
            _masks(manifest, archive, outlines[0], (len(pixels), schema.height, schema.width), room)
            if outlines
            else None
        )
    if not len(pixels):
        raise RecordsError(f"{manifest.file} has no images", hint="Export the records again.")
    return pixels, arrays, masks


def scaled(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels from 0 to 255, encoded to [-1, 1]: the range is public, and nothing is computed from the records."""
    levels = pixels.astype(np.float32)
    levels /= np.float32(127.5)  # in place: large sets of images have no room for copies
    levels -= np.float32(1)
    return levels


@contextmanager
def _opened(manifest: Manifest) -> Iterator[tuple[Any, Mapping[Path, Stamp]]]:
    """The archive, whose arrays are read when they are asked for; and the file's stamp from before."""
    if not manifest.file.exists():
        raise RecordsError(f"{manifest.file} does not exist", hint="Check file = ... in the manifest.")
    try:
        before = stamps([manifest.file])
        with manifest.file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            yield archive, before
    except FederationError:
        raise
    except Exception as error:  # of a damaged archive: zlib's, zipfile's, numpy's, and more
        raise RecordsError(
            f"{manifest.file} cannot be read: {type(error).__name__}",
            hint="Save it with numpy.savez: numbers and texts, no objects.",
        ) from None


def _array(manifest: Manifest, archive: Any, name: str) -> NDArray[Any]:
    _refuse_absent(manifest, archive, name)
    array: NDArray[Any] = archive[name]
    return array


def _refuse_absent(manifest: Manifest, archive: Any, name: str) -> None:
    if name not in archive.files:
        raise RecordsError(f"{manifest.file} has no array {name!r}", hint=_CHECK)


def _pixels(manifest: Manifest, archive: Any, schema: ImageInput, before: Mapping[Path, Stamp], room: Room) -> Content:
    """The images: on the disk where they lie there as they are, else where there is room."""
    name = manifest.column(IMAGES)
    _refuse_absent(manifest, archive, name)
    stored = _stored(archive, name)
    if stored is None:
        dtype, found, parts = _in_parts(archive, name)
        shape = _shape(manifest, dtype, found, schema)
        pixels = Stored(shape[1:], np.uint8, room)
        for part in parts:
            pixels.append(part.reshape(-1, *shape[1:]))
        return pixels
    begin, found = stored
    shape = _shape(manifest, np.dtype(np.uint8), found, schema)
    return OnDisk(
        partial(_row, manifest.file, begin, shape[1:]),
        shape=shape,
        dtype=np.uint8,
        files_of=lambda _: [manifest.file],
        stamps=before,
    )


def _masks(manifest: Manifest, archive: Any, name: str, wanted: tuple[int, ...], room: Room) -> Stored:
    _refuse_absent(manifest, archive, name)
    dtype, shape, parts = _in_parts(archive, name)
    if dtype.kind not in "biu" or shape != wanted:
        raise RecordsError(
            f"{manifest.file}: masks are {dtype} of shape {shape}, not whole numbers of {wanted}", hint=_CHECK
        )
    masks = Stored((packed_bytes(math.prod(wanted[1:])),), np.uint8, room)
    for part in parts:
        masks.append(packed(part != 0))
    return masks


def _shape(manifest: Manifest, dtype: np.dtype[Any], found: tuple[int, ...], schema: ImageInput) -> tuple[int, ...]:
    """Shape of all images, with their channels; refuses those that are not the task's."""
    shape = (found[0], 1, *found[1:]) if len(found) == 3 and schema.channels == 1 else found
    wanted = (schema.channels, schema.height, schema.width)
    if dtype != np.uint8 or shape[1:] != wanted:
        raise RecordsError(
            f"{manifest.file}: images are {dtype} of shape {shape[1:]}, not uint8 of {wanted}", hint=_CHECK
        )
    return shape


def _stored(archive: Any, name: str) -> tuple[int, tuple[int, ...]] | None:
    """Where an array of bytes begins in the archive, and its shape; None where it does not lie there as it is.

    It is read to its end once, where ``zipfile`` compares the checksum; from the same place as rows will be.

    Source:
        PKWARE's APPNOTE.TXT 4.3.7, the local file header: lengths of name and extra field at 26 and 28.
    """
    info = _member(archive, name)
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with archive.zip.open(info) as member:
        found = _header(member)
        if found is None or found[0] != np.uint8 or len(found[1]) < 3:
            return None
        header = member.tell()
        while member.read(_CHUNK):
            pass
        if member.tell() - header != math.prod(found[1]):
            raise ValueError("another length")
    archive.zip.fp.seek(info.header_offset + 26)
    lengths = archive.zip.fp.read(4)
    begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return begin + header, found[1]


def _in_parts(archive: Any, name: str) -> tuple[np.dtype[Any], tuple[int, ...], Iterator[NDArray[Any]]]:
    """An array's type and shape, and its rows, some at a time; what does not lie there row by row is one part."""
    info = _member(archive, name)
    with archive.zip.open(info) as member:
        found = _header(member)
    if found is None:
        whole: NDArray[Any] = archive[name]
        return whole.dtype, whole.shape, iter([whole])
    return *found, _rows(archive, info, *found)


def _rows(archive: Any, info: zipfile.ZipInfo, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    size = math.prod(shape[1:]) * dtype.itemsize
    most = max(1, (_CHUNK << 4) // max(1, size))
    with archive.zip.open(info) as member:
        _header(member)
        for first in range(0, shape[0], most):
            count = min(most, shape[0] - first)
            yield np.frombuffer(member.read(count * size), dtype).reshape(count, *shape[1:])
        if member.read(1):  # at the end zipfile compares the checksum
            raise ValueError("another length")


def _member(archive: Any, name: str) -> zipfile.ZipInfo:
    found: zipfile.ZipInfo = archive.zip.getinfo(f"{name}.npy" if f"{name}.npy" in archive.zip.namelist() else name)
    return found


def _header(member: Any) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Type and shape of an array that lies row by row, behind which the member is left; None for any other."""
    version = npy.read_magic(member)
    if version not in {(1, 0), (2, 0)}:
        return None
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)
    return None if fortran or dtype.hasobject or not shape else (dtype, shape)


def _row(path: Path, begin: int, shape: tuple[int, ...], number: int) -> NDArray[np.uint8]:
    """One image: read, not mapped, because a file that is cut under a map takes the whole process with it."""
    size = math.prod(shape)
    with path.open("rb") as stream:
        stream.seek(begin + number * size)
        content = stream.read(size)
    if len(content) != size:
        raise RecordsError(f"{path} is shorter than it was", hint="Replace it by renaming.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _targets(
    manifest: Manifest, task: Task, arrays: Mapping[str, NDArray[Any]], columns: Mapping[str, str], images: int
) -> Targets:
    if task.choice is not None:
        return _labels(manifest, task, _texts(manifest, arrays, columns[task.choice.name], images))
    cells = {name: _texts(manifest, arrays, name, images, kinds="iufU") for name in columns.values()}
    return read_labels(manifest, task, pd.DataFrame(cells))


def _texts(
    manifest: Manifest, arrays: Mapping[str, NDArray[Any]], name: str, images: int, kinds: str = "iuU"
) -> list[str]:
    """An array of one text or number per image, as stripped texts."""
    found = arrays[name]
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
    manifest: Manifest, task: Task, arrays: Mapping[str, NDArray[Any]], pixels: Content, labels: Targets
) -> list[str]:
    """An id per image: the patient array; or where there is none the image's digest, with a number for equal ones."""
    if manifest.patient is None:
        seen: dict[str, int] = {}
        ids = []
        for content, label in zip(digests(pixels), marks(labels, task), strict=True):
            known = f"{content} {label}"
            seen[known] = seen.get(known, -1) + 1
            ids.append(f"{known} {seen[known]}")
        return ids
    ids = _texts(manifest, arrays, manifest.patient, len(pixels))
    if "" in ids:
        raise RecordsError(f"{manifest.file}, image {ids.index('')}: the patient id is missing", hint=_CHECK)
    if manifest.one_row_per_patient and len(set(ids)) < len(ids):
        raise RecordsError(
            f"{manifest.file}: a patient has two images, but the manifest declares one_row_per_patient", hint=_CHECK
        )
    return ids
