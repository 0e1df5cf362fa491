"""Files of pictures, named by the rows of a table -> images of the task's size.

PNG and JPEG are decoded here; DICOM and NIfTI have files of their own. Before a study every file's header is checked;
pixels are decoded when a batch needs them, one picture at a time.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.extras import needed, silenced
from client.records.frames import CHECK, check_header, missing, refuse, texts
from client.records.manifest import IMAGES, Manifest, Pictures
from client.records.on_disk import OnDisk, announced, refuse_changed
from client.records.stamps import stamps
from shared_models.errors import FederationError, RecordsError
from shared_models.tasks import ImageInput

MOST_PIXELS = 100_000_000  # of one picture; whole-slide scans have more, and are no task's input
_PLAIN = (".png", ".jpg", ".jpeg")
_DICOM = (".dcm", ".dicom")
_NIFTI = (".nii", ".nii.gz")
_HEADER = 1 << 15  # bytes of a file that its header seldom exceeds
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16L", "I;16B", "I;16N"}
Picture = NDArray[np.uint8]  # (height, width) or (height, width, 3)


@dataclass(frozen=True)
class Place:
    """One picture to be read.

    Attributes:
        path: The file.
        patient: Whose it is, as the row says; None where every row is a patient.
        slice: Which slice of a volume, 0 to 1; None where nothing says so.
    """

    path: Path
    patient: str | None
    slice: float | None


def open_pictures(manifest: Manifest, schema: ImageInput, frame: pd.DataFrame) -> OnDisk:
    """Check the headers of all pictures, and say how each is decoded.

    Guarantees:
        * Of every file is known: it is there, inside the folder, of a known kind, of a size that fits, and names
          nobody. Whether its pixels can be decoded is known when they are: ``OnDisk.whole`` decodes all.
        * Nothing is computed from several pictures, and nothing from one that is not public but its own pixels.
        * No metadata of a picture (PNG texts, EXIF, DICOM tags) goes anywhere.

    Args:
        manifest: Names the column of paths, which begin at the file's folder, and says how pictures are fitted.
        schema: Channels, height and width of the images.
        frame: A row per image.

    Returns:
        Pixels of shape ``(n, channels, height, width)``, uint8.

    Raises:
        RecordsError: A path leads out of the folder or to nothing; a file is damaged, of no known kind, identifies
            somebody, or does not fit; names row or file, and quotes nothing of its content.
    """
    pictures = manifest.images or Pictures()
    places = _places(manifest, pictures, frame)
    before = stamps(dict.fromkeys(place.path for place in places))
    for place in announced(places, lambda place: [place.path], length=_HEADER):
        with decoding(place.path):
            height, width = _check(place, manifest, pictures)
            _check_fit(place.path, height, width, schema, pictures)
    refuse_changed(before)

    def read(number: int) -> NDArray[np.uint8]:
        path = places[number].path
        with decoding(path):
            return _fitted(path, _decode(places[number], manifest, pictures), schema, pictures)

    return OnDisk(
        read,
        shape=(len(places), schema.channels, schema.height, schema.width),
        dtype=np.uint8,
        files_of=lambda number: [places[number].path],
        stamps=before,
    )


def inside(manifest: Manifest, frame: pd.DataFrame, column: str) -> list[Path]:
    """Paths in a column, each below the folder of the manifest's file.

    Raises:
        RecordsError: A cell is empty, or leads out of the folder.
    """
    refuse(manifest, frame, column, missing(frame[column], manifest), "names no file", quoted=False)
    folder = manifest.file.parent
    root = os.path.join(os.path.realpath(folder), "")  # noqa: PTH118 - ends in a separator
    paths = [folder / text for text in texts(frame[column])]
    # Of ten thousands of files Path.resolve takes longer than their headers.
    outside = np.array(["\0" in (p := str(path)) or not os.path.realpath(p).startswith(root) for path in paths])
    refuse(manifest, frame, column, outside, "leads out of the folder", quoted=False)
    return paths


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Around a decoder: whatever it does with a damaged file becomes an error of the records that names the file."""
    try:
        with silenced("pydicom", "pydicom.pixels.decoders.base", "nibabel.global", "PIL"):
            yield
    except FederationError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise RecordsError(
            f"{path} cannot be read: {type(error).__name__}",
            hint="The file is damaged, or of another kind. Export it again.",
        ) from None


def windowed(values: NDArray[np.float64], centre: float, width: float) -> NDArray[np.float64]:
    """Grey values to levels from 0 to 1: linear from ``centre - width / 2`` to ``centre + width / 2``, flat beyond.

    What is not a number (the background of some volumes) is black.
    """
    return np.nan_to_num(np.clip((values - (centre - width / 2)) / width, 0, 1), nan=0.0)


def projected(planes: Iterable[NDArray[np.float64]], pictures: Pictures) -> NDArray[np.float64]:
    """Levels of all slices or frames, one at a time, to one: the brightest at each place, or the mean."""
    whole, count = np.zeros(()), 0
    for levels in planes:
        whole = np.maximum(whole, levels) if pictures.projection == "maximum" else whole + levels
        count += 1
    return whole if pictures.projection == "maximum" else whole / count


def to_bytes(levels: NDArray[np.float64]) -> Picture:
    """Levels from 0 to 1, rounded to 0 ... 255."""
    return np.rint(levels * 255).astype(np.uint8)


def _places(manifest: Manifest, pictures: Pictures, frame: pd.DataFrame) -> list[Place]:
    column = manifest.column(IMAGES)
    wanted = [column, *([pictures.slice_column] if pictures.slice_column else [])]
    check_header(manifest.file, list(frame.columns), wanted)
    paths = inside(manifest, frame, column)
    patients = texts(frame[manifest.patient]) if manifest.patient else [None] * len(paths)
    slices: list[float | None] = [pictures.slice] * len(paths)
    if pictures.slice_column:
        found = pd.to_numeric(texts(frame[pictures.slice_column]), errors="coerce").to_numpy(dtype=np.float64)
        refuse(manifest, frame, pictures.slice_column, ~((found >= 0) & (found <= 1)), "is not from 0 to 1")
        slices = list(found)
    return [Place(*fields) for fields in zip(paths, patients, slices, strict=True)]


def _check(place: Place, manifest: Manifest, pictures: Pictures) -> tuple[int, int]:
    """Height and width as the header has them, after all that a header can be refused for."""
    match _kind(place.path):
        case "dicom":
            from client.records.dicom import check_dicom  # noqa: PLC0415  # it imports an extra

            return check_dicom(place, manifest, pictures)
        case "nifti":
            from client.records.nifti import check_nifti  # noqa: PLC0415  # it imports an extra

            return check_nifti(place, manifest, pictures)
        case _:
            return _check_plain(place.path)


def _decode(place: Place, manifest: Manifest, pictures: Pictures) -> Picture:
    match _kind(place.path):
        case "dicom":
            from client.records.dicom import read_dicom  # noqa: PLC0415  # it imports an extra

            return read_dicom(place, manifest, pictures)
        case "nifti":
            from client.records.nifti import read_nifti  # noqa: PLC0415  # it imports an extra

            return read_nifti(place, manifest, pictures)
        case _:
            return _plain(place.path, pictures)


def _kind(path: Path) -> Literal["plain", "dicom", "nifti"]:
    name = path.name.lower()
    if name.endswith(_PLAIN):
        return "plain"
    if name.endswith(_NIFTI):
        return "nifti"
    if name.endswith(_DICOM) or _is_dicom(path):
        return "dicom"
    raise RecordsError(
        f"{path} is of no kind that is read", hint=f"Pictures end in {', '.join((*_PLAIN, *_DICOM, *_NIFTI))}."
    )


def _is_dicom(path: Path) -> bool:
    """Whether a file of any name begins as DICOM files do: archives name them by numbers."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def blanked(picture: Picture, pictures: Pictures) -> Picture:
    """Black rectangles where the manifest says that something is written."""
    picture = picture.copy()
    for top, left, bottom, right in pictures.blank:
        picture[top:bottom, left:right] = 0
    return picture


def _check_plain(path: Path) -> tuple[int, int]:
    with needed("images", "pillow"):
        from PIL import Image  # noqa: PLC0415  # an extra
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        _refuse_plain(path, image)
        return image.height, image.width


def _refuse_plain(path: Path, image: Any) -> None:
    """All that a header can be refused for."""
    check_size(path, image.height, image.width)
    if getattr(image, "n_frames", 1) != 1:
        raise RecordsError(f"{path} holds several pictures", hint="One picture per file.")
    if image.mode not in _MODES:
        raise RecordsError(f"{path} has pixels of kind {image.mode}", hint="Grey (8 or 16 bits) or RGB.")


def _plain(path: Path, pictures: Pictures) -> Picture:
    with needed("images", "pillow"):
        from PIL import Image, ImageOps  # noqa: PLC0415  # an extra
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        _refuse_plain(path, image)
        image.verify()  # of PNG every chunk's checksum, which decoding skips
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        upright = ImageOps.exif_transpose(image)
        mode = upright.mode
        if mode.startswith("I;16"):
            levels = np.asarray(upright).astype(np.float64)
            centre, width = pictures.window or (65535 / 2, 65535)
            return blanked(to_bytes(windowed(levels, centre, width)), pictures)
        if mode in {"LA", "PA", "RGBA"} and np.asarray(upright.getchannel("A")).min() < 255:
            raise RecordsError(f"{path} is transparent in places", hint="Save it without an alpha channel.")
        if mode in {"1", "L", "LA"}:
            grey = np.asarray(upright.convert("L"))
            if pictures.window:
                grey = to_bytes(windowed(grey.astype(np.float64), *pictures.window))
            return blanked(grey, pictures)
        return blanked(np.asarray(upright.convert("RGB")), pictures)


def check_size(path: Path, *lengths: int) -> None:
    """Refuse a picture, or volume, so large that decoding it would take the machine's memory.

    Raises:
        RecordsError: It is, or has no pixels.
    """
    if min(lengths) < 1 or math.prod(lengths) > MOST_PIXELS:
        raise RecordsError(f"{path} has {' x '.join(map(str, lengths))} pixels", hint=f"At most {MOST_PIXELS}.")


def _fitted(path: Path, picture: Picture, schema: ImageInput, pictures: Pictures) -> NDArray[np.uint8]:
    """A picture as the task wants it, shape ``(channels, height, width)``."""
    if picture.ndim == 2 and schema.channels == 3:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    elif picture.ndim == 3 and schema.channels == 1:
        if (picture != picture[:, :, :1]).any():
            raise RecordsError(f"{path} is in colour, and the task's images are grey", hint=CHECK)
        picture = picture[:, :, 0]
    if picture.shape[:2] != (schema.height, schema.width):
        picture = _resized(path, picture, schema, pictures)
    return picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)


def _check_fit(path: Path, height: int, width: int, schema: ImageInput, pictures: Pictures) -> None:
    """Refuse another size than the task's; what may yet be turned (by EXIF, or a volume's axes) either way."""
    if pictures.resize == "refuse" and sorted((height, width)) != sorted((schema.height, schema.width)):
        raise _does_not_fit(path, height, width, schema)


def _does_not_fit(path: Path, height: int, width: int, schema: ImageInput) -> RecordsError:
    return RecordsError(
        f"{path} has {height} x {width} pixels, not {schema.height} x {schema.width}",
        hint='Say how it is to be fitted: resize = "pad" or "stretch" in [images].',
    )


def _resized(path: Path, picture: Picture, schema: ImageInput, pictures: Pictures) -> Picture:
    if pictures.resize == "refuse":
        raise _does_not_fit(path, picture.shape[0], picture.shape[1], schema)
    with needed("images", "pillow"):
        from PIL import Image  # noqa: PLC0415  # an extra
    height, width = picture.shape[:2]
    if pictures.resize == "pad":
        scale = min(schema.height / height, schema.width / width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        height, width = schema.height, schema.width
    small = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    whole = np.zeros((schema.height, schema.width, *picture.shape[2:]), dtype=np.uint8)
    top, left = (schema.height - height) // 2, (schema.width - width) // 2
    whole[top : top + height, left : left + width] = small
    return whole
