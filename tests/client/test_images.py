"""Images on disk: what is read, and what is refused with which words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.report import summarise
from client.records.tabular import read_table
from shared_models.errors import RecordsError
from shared_models.tasks import HEART_DISEASE, TRIAL_IMAGES

MANIFEST: dict[str, Any] = {
    "task": "trial-images",
    "file": "data.npz",
    "label": "labels",
    "patient": "patients",
    "validation_fraction": 0.0,
    "absent_classes": [f"kind-{number}" for number in range(3, 10)],
}


def arrays(**changes: Any) -> dict[str, Any]:
    """Four images of three patients."""
    images = np.arange(4 * 28 * 28, dtype=np.uint64).reshape(4, 28, 28) % 256
    found = {
        "images": images.astype(np.uint8),
        "labels": np.array(["kind-0", "kind-1", "kind-2", "kind-0"]),
        "patients": np.array(["a", "b", "c", "a"]),
    }
    return {name: value for name, value in (found | changes).items() if value is not None}


def write(folder: Path, content: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a records folder; a change to None leaves the key out of the manifest."""
    manifest = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    np.savez(folder / "data.npz", **(arrays() if content is None else content))
    return folder


def read(folder: Path) -> Records:
    """The training part."""
    return read_table(read_manifest(folder), TRIAL_IMAGES, split_key=b"the key of a test")[0]


def test_pixels_are_scaled_by_their_public_range(tmp_path: Path) -> None:
    """0 becomes -1 and 255 becomes 1, whatever the images hold; a patient may have several."""
    records = read(write(tmp_path))

    assert records.inputs.shape == (4, 1, 28, 28)
    assert records.inputs[:].dtype == torch.float32
    assert records.inputs[:][0, 0, 0, 0] == -1
    assert records.inputs[:][0, 0, 9, 3] == 1  # pixel 255
    assert records.targets[:].tolist() == [0, 1, 2, 0]
    assert records.patient_count == 3
    assert records.patients.tolist() == [0, 1, 2, 0]


def test_images_with_a_channel_axis_and_codes_for_labels_are_read(tmp_path: Path) -> None:
    """Either shape of grey images, and whole numbers that the manifest translates."""
    content = arrays(images=arrays()["images"][:, None], labels=np.array([0, 1, 2, 0]))
    codes = {"kind": {str(number): f"kind-{number}" for number in range(3)}}

    records = read(write(tmp_path, content, categories=codes))

    assert records.inputs.shape == (4, 1, 28, 28)
    assert records.targets[:].tolist() == [0, 1, 2, 0]


def test_without_a_patient_array_every_image_is_a_patient(tmp_path: Path) -> None:
    """Equal images too: each is one patient's, as the manifest declares."""
    images = arrays()["images"]
    content = arrays(images=images[[0, 1, 2, 0]], patients=None)

    assert read(write(tmp_path, content, patient=None, one_row_per_patient=True)).patient_count == 4


def test_a_summary_counts_repeated_images(tmp_path: Path) -> None:
    """``check-data`` shows range, repeats and classes."""
    summary = summarise(write(tmp_path, arrays(images=arrays()["images"][[0, 1, 2, 0]])))

    assert summary.repeated_rows == 1
    assert summary.columns[0].found == "0 to 255"
    assert summary.parts["training"][2]["kind-0"] == 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"images": None}, "has no array 'images'"),
        ({"labels": None}, "has no array 'labels'"),
        ({"patients": None}, "has no array 'patients'"),
        ({"images": np.zeros((4, 28, 27), np.uint8)}, r"not uint8 of \(1, 28, 28\)"),
        ({"images": np.zeros((4, 28, 28), np.float32)}, "images are float32"),
        ({"images": np.zeros((0, 28, 28), np.uint8)}, "has no images"),
        ({"labels": np.array(["kind-0", "kind-1", "kind-2"])}, r"'labels' is .* of shape \(3,\)"),
        ({"labels": np.array([0.0, 1.0, 2.0, 0.0])}, "'labels' is float64"),
        ({"labels": np.array(["kind-0", "dog", "cat", "kind-0"])}, r"image 1, label 'dog'.*and 1 more"),
        ({"patients": np.array(["a", "", "c", "a"])}, "image 1: the patient id is missing"),
        ({"patients": np.array(["a", None, "c", "a"], dtype=object)}, "cannot be read: ValueError"),
        ({"patient_name": np.array(["x"] * 4)}, "holds what identifies patients: 'patient_name'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    """With the array, the image and what was expected; an array of objects is never unpickled."""
    with pytest.raises(RecordsError, match=text):
        read(write(tmp_path, arrays(**content)))


def test_files_and_tasks_of_different_kinds_do_not_meet(tmp_path: Path) -> None:
    """Images for a table, and a file that is no archive, are errors of the records."""
    write(tmp_path, task="heart-disease", label="disease")
    with pytest.raises(RecordsError, match="no file of the kind"):
        read_table(read_manifest(tmp_path), HEART_DISEASE, split_key=b"the key of a test")
    write(tmp_path)
    (tmp_path / "data.npz").write_bytes(b"not a zip")
    with pytest.raises(RecordsError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "data.npz").unlink()
    with pytest.raises(RecordsError, match="does not exist"):
        read(tmp_path)


def test_one_image_per_patient_is_held_to_its_word(tmp_path: Path) -> None:
    """Declared so, a repeated id is an error."""
    with pytest.raises(RecordsError, match="two images"):
        read(write(tmp_path, one_row_per_patient=True))


@examples(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packed=st.booleans(),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3),
)
def test_a_damaged_archive_is_an_error_or_the_images_that_were_saved(
    tmp_path: Path, packed: bool, cut: float, flips: list[tuple[float, int]]
) -> None:
    """A zip archive has checksums: cut or changed anywhere, it is never other pixels, and never a traceback."""
    write(tmp_path)
    whole = read(tmp_path).inputs[:]
    path = tmp_path / "data.npz"
    (np.savez_compressed if packed else np.savez)(path, **arrays())
    data = bytearray(path.read_bytes())
    for place, change in flips:
        data[int(place * (len(data) - 1))] ^= change
    path.write_bytes(data if flips else data[: int(cut * len(data))])

    try:
        found: Tensor | None = read(tmp_path).inputs[:]
    except RecordsError as error:
        if "data.npz" not in str(error):
            raise
        found = None

    assert found is None or torch.equal(found, whole)
