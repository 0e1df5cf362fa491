"""NIfTI volumes: a slice looks the same however the file stores it, and header fields that identify are refused."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared_models.tasks import PNEUMONIA, ImageInput
from tests.client.test_pictures import attempt, read, refusal, write

SHAPE = (6, 7, 5)  # to the right, to the front, to the head
FULL = {"window": [127.5, 255.0]}
ORIENTATIONS = [
    np.array(list(zip(axes, flips, strict=True)))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def task(rows: int, columns: int) -> Any:
    """A task whose images have the slice's own size."""
    return PNEUMONIA.model_copy(update={"input": ImageInput.model_construct(channels=1, height=rows, width=columns)})


def volume() -> NDArray[np.uint8]:
    """A head of random voxels, its axes to the right, to the front and to the top."""
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def save(path: Path, orientation: NDArray[np.int64]) -> None:
    """Store the same body with other axes: voxels and the affine that says how they lie."""
    plain = nibabel.Nifti1Image(volume(), np.diag([1.0, 2.0, 3.0, 1.0]))
    plain.as_reoriented(orientation).to_filename(path)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_slice_looks_the_same_however_it_is_stored(tmp_path: Path, axis: str) -> None:
    """All 48 ways to store a volume; the patient's right is on the left, the front or the head on top."""
    head = volume()
    expected = {
        # rows from the top, columns from the left
        "axial": [[head[x, y, 1] for x in reversed(range(6))] for y in reversed(range(7))],
        "coronal": [[head[x, 2, z] for x in reversed(range(6))] for z in reversed(range(5))],
        "sagittal": [[head[1, y, z] for y in reversed(range(7))] for z in reversed(range(5))],
    }[axis]
    for number, orientation in enumerate(ORIENTATIONS):
        save(tmp_path / f"{number}.nii", orientation)
    where = {"axial": 1 / 4, "coronal": 2 / 6, "sagittal": 1 / 5}[axis]
    images = FULL | {"axis": axis, "slice": where}
    write(tmp_path, *(f"{n}.nii" for n in range(48)), images=images)

    pixels = read(tmp_path, task(len(expected), len(expected[0])))

    assert (pixels[:, 0] == np.array(expected)).all()


def test_compressed_files_and_other_tools_files_are_read(tmp_path: Path) -> None:
    """A volume of nibabel's tests, in real units, stored as 16-bit integers with a slope."""
    source = Path(nibabel.__file__).parent / "tests" / "data" / "reoriented_anat_moved.nii"
    shutil.copy(source, tmp_path / "a.nii")
    image = nibabel.load(source)
    nibabel.save(image, tmp_path / "b.nii.gz")
    body = nibabel.as_closest_canonical(image).get_fdata()
    height, width = body.shape[1], body.shape[0]
    images = {"window": [float(body.max()) / 2, float(body.max())], "slice": 0.5}

    plain, packed = read(write(tmp_path, "a.nii", "b.nii.gz", images=images), task(height, width))[:, 0]

    middle = body[:, :, round(0.5 * (body.shape[2] - 1))][::-1, ::-1].T
    assert np.abs(plain - np.clip(middle / body.max(), 0, 1) * 255).max() <= 0.5
    np.testing.assert_array_equal(plain, packed)


def test_voxels_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    """Many tools write NaN outside the head."""
    body = np.full(SHAPE, np.nan, np.float32)
    body[2:4] = 255
    nibabel.Nifti1Image(body, np.eye(4)).to_filename(tmp_path / "a.nii")

    pixels = read(write(tmp_path, "a.nii", images=FULL | {"slice": 0.0}), task(7, 6))[0, 0]

    assert (pixels[:, 2:4] == 255).all()
    assert pixels.sum() == 7 * 2 * 255


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("projection", ["maximum", "mean"])
def test_a_volume_may_be_projected(tmp_path: Path, axis: str, name: str, projection: str) -> None:
    """The brightest, or the mean, of what the window shows of all slices, along an axis of the body."""
    rng = np.random.default_rng(0)
    body = rng.uniform(-50, 250, SHAPE)
    image = nibabel.Nifti1Image(body, np.eye(4))
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / name)
    body = nibabel.load(tmp_path / name).get_fdata()
    number = {"sagittal": 0, "coronal": 1, "axial": 2}[axis]
    shown = np.clip((body - 0) / 200, 0, 1)  # centre 100, width 200
    flat = shown.max(axis=number) if projection == "maximum" else shown.mean(axis=number)
    height, width = flat.shape[1], flat.shape[0]

    pixels = read(
        write(tmp_path, name, images={"window": [100.0, 200.0], "axis": axis, "projection": projection}),
        task(height, width),
    )[0, 0]

    assert np.abs(pixels - flat[::-1, ::-1].T * 255).max() <= 0.5 + 1e-9


def test_a_slice_and_a_projection_exclude_each_other(tmp_path: Path) -> None:
    """One of them."""
    save(tmp_path / "a.nii", ORIENTATIONS[0])

    said = refusal(write(tmp_path, "a.nii", images=FULL | {"slice": 0.5, "projection": "mean"}), task(7, 6))

    assert "slice, slice_column and projection exclude each other" in said


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """No window, no slice, four dimensions, no NIfTI."""
    save(tmp_path / "a.nii", ORIENTATIONS[0])
    nibabel.Nifti1Image(np.zeros((3, 3, 3, 2), np.uint8), np.eye(4)).to_filename(tmp_path / "4d.nii")
    (tmp_path / "no.nii").write_bytes(b"\0" * 400)
    mine = task(7, 6)

    assert "a.nii needs a window" in refusal(write(tmp_path, "a.nii"), mine)
    assert "a.nii has 5 slices" in refusal(write(tmp_path, "a.nii", images=FULL), mine)
    assert "4d.nii has 4 dimensions" in refusal(write(tmp_path, "4d.nii", images=FULL), mine)
    assert "no.nii cannot be read" in refusal(write(tmp_path, "no.nii", images=FULL), mine)


def test_header_fields_that_identify_somebody_are_refused_unless_dropped(tmp_path: Path) -> None:
    """The database's name of a subject, and DICOM tags that a converter kept."""
    image = nibabel.Nifti1Image(volume(), np.eye(4))
    image.header["db_name"] = b"MILLER^HANS"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"made by a test"))
    image.to_filename(tmp_path / "a.nii")
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(2, b"\x10\0\x10\0PN\4\0ABCD"))
    image.to_filename(tmp_path / "b.nii")
    images = FULL | {"slice": 0.5}

    text = refusal(write(tmp_path, "a.nii", images=images), task(7, 6))
    assert "a.nii holds what identifies patients: 'db_name'" in text
    assert "MILLER" not in text
    assert "'dicom-extension'" in refusal(write(tmp_path, "b.nii", drop=["db_name"], images=images), task(7, 6))
    write(tmp_path, "a.nii", "b.nii", drop=["db_name", "dicom-extension"], images=images)
    assert len(read(tmp_path, task(7, 6))) == 2


@examples(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flips=st.lists(st.floats(0, 1), max_size=3), packed=st.booleans())
def test_a_damaged_file_is_an_error_or_an_image(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cut: float, flips: list[float], packed: bool
) -> None:
    """Cut: an error. Changed bytes: in a compressed file an error or the same image, in a plain one an image."""
    name = "a.nii.gz" if packed else "a.nii"
    save(tmp_path / name, ORIENTATIONS[0])
    whole = (tmp_path / name).read_bytes()
    data = bytearray(whole)
    for flip in flips:
        data[int(flip * (len(data) - 1))] ^= 0x55
    (tmp_path / name).write_bytes(data if flips else data[: int(cut * (len(data) - 1))])

    pixels = attempt(write(tmp_path, name, images=FULL | {"slice": 0.5}), name, task(7, 6))

    if pixels is not None:
        assert flips
        assert pixels.shape == (1, 1, 7, 6)
        if packed:
            expected = volume()[:, :, 2][::-1, ::-1].T
            np.testing.assert_array_equal(pixels[0, 0], expected)
    assert capfd.readouterr() == ("", "")
