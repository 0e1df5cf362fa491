"""One slice of a NIfTI volume, or a projection of it -> grey levels, turned as a radiologist looks at it.

Rows and columns follow the body, not the file: the front of an axial slice and the head of a coronal or sagittal one
are on top; the patient's right is on the left, and of a sagittal slice the front is. Only the slice is read; of a
compressed file everything before it too, and once all of it, for its checksum. A projection needs all slices.
"""

import gzip
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.records.extras import needed
from client.records.identifiers import refuse_found
from client.records.manifest import Manifest, Pictures
from client.records.pictures import Picture, Place, blanked, check_size, projected, to_bytes, windowed
from shared_models.errors import RecordsError

with needed("images", "nibabel"):
    import nibabel

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of the body: to the right, to the front, to the head
_DICOM_EXTENSION = 2  # a header extension that holds DICOM tags
_CHUNK = 1 << 20


def read_nifti(place: Place, manifest: Manifest, pictures: Pictures) -> Picture:
    """Read one slice, or all of them as a projection.

    Args:
        place: The file, and which slice.
        manifest: Names the header fields that are left aside.
        pictures: The window, which is needed, and the axis.

    Returns:
        Pixels of shape ``(height, width)``; 255 is white. Voxels are not made square: the task's size decides.

    Raises:
        RecordsError: The header names somebody and the manifest does not drop the field; there is no window; the volume
            is not of three dimensions, or has several slices and none is chosen.
        Exception: Whatever nibabel raises for a damaged file.
    """
    length = _length(place)
    image = _opened(place, manifest, pictures)
    _check_length(image, length)
    return blanked(to_bytes(_plane(place, image, pictures)), pictures)


def check_nifti(place: Place, manifest: Manifest, pictures: Pictures) -> tuple[int, int]:
    """Check the header, and the length of a file that is not compressed; arguments as above.

    Returns:
        The two sides of a slice.

    Raises:
        RecordsError, Exception: As ``read_nifti``.
    """
    image = _opened(place, manifest, pictures)
    if not place.path.name.lower().endswith(".gz"):
        _check_length(image, _length(place))
    cut, _, _ = _cut(place, image, pictures)
    first, second = (side for axis, side in enumerate(image.shape) if axis != cut)
    return first, second


def _opened(place: Place, manifest: Manifest, pictures: Pictures) -> Any:
    """The header, which may be refused; voxels are read later."""
    image: Any = nibabel.load(place.path)
    if not isinstance(image, nibabel.Nifti1Image):  # a class above NIfTI-2's too
        raise TypeError("no NIfTI")
    _refuse_identifiers(place, image, manifest)
    _window(place, pictures)
    shape = tuple(image.shape)
    if len(shape) != 3:
        raise RecordsError(f"{place.path} has {len(shape)} dimensions", hint="One volume per file.")
    check_size(place.path, *(shape if pictures.projection else shape[:2]))
    return image


def _window(place: Place, pictures: Pictures) -> tuple[float, float]:
    if pictures.window is None:
        raise RecordsError(f"{place.path} needs a window", hint="window = [centre, width] in [images]: public figures.")
    return pictures.window


def _check_length(image: Any, length: int) -> None:
    if length < image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize:
        raise ValueError("too short")


def _cut(place: Place, image: Any, pictures: Pictures) -> tuple[int, int, NDArray[np.float64]]:
    """Along which axis of the file is cut, at which number; and for each axis of the file the body's, and direction."""
    orientation = nibabel.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise RecordsError(f"{place.path} does not say how it lies in space", hint="Export it with an orientation.")
    cut = int(np.flatnonzero(orientation[:, 0] == _AXES[pictures.axis])[0])
    depth = image.shape[cut]
    if place.slice is None and pictures.projection is None and depth > 1:
        raise RecordsError(
            f"{place.path} has {depth} slices", hint="Say which: slice, slice_column or projection in [images]."
        )
    number = round((place.slice or 0) * (depth - 1))
    return cut, depth - 1 - number if orientation[cut, 1] < 0 else number, orientation


def _plane(place: Place, image: Any, pictures: Pictures) -> NDArray[np.float64]:
    """Levels of the slice or the projection, rows from the top and columns from the left."""
    cut, number, orientation = _cut(place, image, pictures)
    window, proxy = _window(place, pictures), image.dataobj

    def index(number: int) -> tuple[int | slice, ...]:
        return tuple(number if axis == cut else slice(None) for axis in range(3))

    if pictures.projection:
        stored = proxy.get_unscaled()  # mapped, where the file is not compressed
        slices = (
            stored[index(number)].astype(np.float64) * proxy.slope + proxy.inter for number in range(image.shape[cut])
        )
        plane = projected((windowed(values, *window) for values in slices), pictures)
    else:
        plane = windowed(np.asarray(proxy[index(number)], dtype=np.float64), *window)
    left = [axis for axis in range(3) if axis != cut]
    # Each axis of the plane runs against its axis of the body: from head, front or right, which are top and left.
    plane = plane[tuple(slice(None, None, -1 if orientation[axis, 1] > 0 else 1) for axis in left)]
    across_first = orientation[left[0], 0] < orientation[left[1], 0]  # columns are the lower of the body's axes
    return plane.T if across_first else plane


def _refuse_identifiers(place: Place, image: Any, manifest: Manifest) -> None:
    found = []
    if bytes(np.asarray(image.header["db_name"]).tobytes()).strip(b"\0 ") if "db_name" in image.header else b"":
        found.append("db_name")
    if any(extension.get_code() == _DICOM_EXTENSION for extension in image.header.extensions):
        found.append("dicom-extension")
    refuse_found(place.path, [name for name in found if name not in manifest.drop])


def _length(place: Place) -> int:
    """Bytes of the file; a compressed one is read to its end, where its checksum is."""
    if not place.path.name.lower().endswith(".gz"):
        return place.path.stat().st_size
    length = 0
    with gzip.open(place.path) as stream:
        while chunk := stream.read(_CHUNK):
            length += len(chunk)
    return length
