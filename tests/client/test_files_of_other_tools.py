"""Every file that pydicom, nibabel and pyedflib ship for their own tests: read as they read it, or refused by name.

wfdb ships none; its files here are written by wfdb, in each format that it writes, and read once more by wfdb.
"""

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pyedflib
import pytest
import wfdb
from numpy.typing import NDArray
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from client.records.extras import silenced
from client.records.manifest import read_manifest
from client.records.on_disk import OnDisk
from client.records.tabular import checked_table
from shared_models.errors import RecordsError
from shared_models.tasks import Numeric, SeriesInput, Task
from tests.client import test_dicom, test_nifti, test_pictures, test_signals

DICOM = Path(pydicom.__file__).parent / "data" / "test_files"
NIFTI = Path(nibabel.__file__).parent / "tests" / "data"
EDF = Path(pyedflib.__file__).parent / "tests" / "data"
NAMES = ["PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "OtherPatientIDsSequence"]
DROP = [
    *NAMES, "OtherPatientIDs", "PatientComments", "PatientAddress", "PatientTelephoneNumbers", "AdmissionID",
    "PatientMotherBirthName", "MedicalRecordLocator", "IssuerOfPatientID", "PatientBirthTime", "ResponsiblePerson",
]  # fmt: skip


def as_pydicom_has_it(path: Path) -> NDArray[np.float64] | None:
    """Levels from 0 to 255 by pydicom's own functions; None for what is not one frame in grey or colours it decodes."""
    try:
        data = pydicom.dcmread(path)
        if int(data.get("NumberOfFrames") or 1) > 1 or data.PhotometricInterpretation == "PALETTE COLOR":
            return None
        stored = pixel_array(data)
    except Exception:
        return None
    if data.SamplesPerPixel == 3:
        return stored / (2 ** int(data.BitsStored) - 1) * 255
    values = apply_voi_lut(apply_modality_lut(stored, data), data, prefer_lut=False).astype(float)
    bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], dtype=float)
    if data.get("ModalityLUTSequence"):
        ends = np.array([0.0, 2 ** int(data.ModalityLUTSequence[0].LUTDescriptor[2]) - 1])
    elif "WindowCenter" not in data and data.get("VOILUTSequence"):
        ends = np.array([0.0, 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1])
    else:
        ends = np.sort(ends * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0)))
    levels = (values - ends[0]) / (ends[1] - ends[0])
    levels = 1 - levels if data.PhotometricInterpretation == "MONOCHROME1" else levels
    if "PixelPaddingValue" in data:
        levels[stored == data.PixelPaddingValue] = 0
    return np.clip(levels, 0, 1) * 255


def read_or_refused(folder: Path, name: str, task: Task, **changes: Any) -> NDArray[np.uint8] | None:
    """Pixels of the one picture, or None where it is refused by name."""
    return test_pictures.attempt(test_pictures.write(folder, name, **changes), name, task)


def test_every_file_of_pydicom_is_read_as_pydicom_reads_it_or_refused(tmp_path: Path) -> None:
    """Other byte orders, compressions, windows and tables; truncated and broken files, and some that are none."""
    same, refused = [], []
    for path in sorted(path for path in DICOM.rglob("*.dcm") if path.stat().st_size < 1e6):
        with silenced("pydicom", "pydicom.pixels.decoders.base"):
            expected = as_pydicom_has_it(path)
        rows, columns, *colours = expected.shape if expected is not None else (64, 64)
        task = test_dicom.task(rows, columns, 3 if colours else 1)
        shutil.copy(path, tmp_path / "a.dcm")

        pixels = read_or_refused(tmp_path, "a.dcm", task, drop=DROP, images={"pixels_checked": True})

        if pixels is None:
            refused.append(path.name)
        elif expected is not None:
            found = pixels[0].transpose(1, 2, 0) if colours else pixels[0, 0]
            assert np.abs(found - expected).max() <= 0.5 + 1e-6, path.name
            same.append(path.name)
    assert len(same) >= 40
    assert {"MR_truncated.dcm", "rtplan.dcm", "DICOMDIR-empty.dcm", "no_meta.dcm"} <= set(refused)


def test_every_volume_of_nibabel_is_read_as_nibabel_reads_it_or_refused(tmp_path: Path) -> None:
    """Seen from the head: the front on top, the patient's right on the left."""
    same, refused = [], []
    for path in sorted(p for p in NIFTI.iterdir() if p.name.endswith((".nii", ".nii.gz"))):
        shutil.copy(path, tmp_path / path.name)
        image: Any = nibabel.load(path)
        if len(image.shape) != 3 or not isinstance(image, nibabel.Nifti1Image):
            with pytest.raises(RecordsError, match=path.name.replace(".", r"\.")):
                test_pictures.read(test_pictures.write(tmp_path, path.name, images=test_nifti.FULL | {"slice": 0.5}))
            refused.append(path.name)
            continue
        body = np.nan_to_num(nibabel.as_closest_canonical(image).get_fdata())
        images = {"window": [float(body.max()) / 2, float(body.max())], "slice": 0.5}

        pixels = read_or_refused(
            tmp_path, path.name, test_nifti.task(body.shape[1], body.shape[0]), images=images, drop=["db_name"]
        )

        assert pixels is not None, path.name
        middle = body[::-1, ::-1, round(0.5 * (body.shape[2] - 1))].T
        assert np.abs(pixels[0, 0] - np.clip(middle / body.max(), 0, 1) * 255).max() <= 0.5 + 1e-6
        same.append(path.name)
    assert len(same) >= 4
    assert refused


def series_task(names: list[str], units: list[str], steps: int) -> Task:
    """One variable per channel, joined by the mean of each second."""
    variables = tuple(
        Numeric(name=name, unit=unit, low=-1e6, high=1e6, within_step="mean")
        for name, unit in zip(names, units, strict=True)
    )
    schema = SeriesInput(variables=variables, steps=steps, step_unit="second")
    return test_signals.TASK.model_copy(update={"input": schema})


@pytest.mark.parametrize("name", ["test_generator.edf", "test_generator.bdf", "test_subsecond.edf", "test_utf8.edf"])
def test_recordings_of_pyedflib_are_read_as_pyedflib_reads_them(tmp_path: Path, name: str) -> None:
    """Every channel: the means of its seconds, from the library's own physical values."""
    shutil.copy(EDF / name, tmp_path / name)
    with pyedflib.EdfReader(str(EDF / name)) as file:
        labels, units = file.getSignalLabels(), [file.getPhysicalDimension(n) for n in range(file.signals_in_file)]
        samples = [file.readSignal(n) for n in range(file.signals_in_file)]
        rates = file.getSampleFrequencies()
    chosen = [n for n, label in enumerate(labels) if labels.count(label) == 1 and len(samples[n]) >= rates[n] >= 1]
    steps = min(8, *(int(len(samples[n]) / rates[n]) for n in chosen))
    names = [f"channel-{n}" for n in chosen]
    task = series_task(names, [units[n] or "1" for n in chosen], steps)
    columns = {"signals": "path"} | {f"channel-{n}": labels[n] for n in chosen}
    drop = ["patientname", "patientcode", "birthdate", "patient_additional", "admincode"]
    test_signals.write(tmp_path, name, columns=columns, drop=drop, patient=None, one_row_per_patient=True)

    found = checked_table(read_manifest(tmp_path), task).content

    assert isinstance(found, OnDisk)
    for place, n in enumerate(chosen):
        each = int(rates[n])
        assert rates[n] == each
        means = samples[n][: steps * each].reshape(steps, each).mean(axis=1)
        np.testing.assert_allclose(found[:][0, :, place], 4 * (means + 1e6) / 2e6 - 2, atol=1e-6)


@pytest.mark.parametrize("form", ["80", "212", "16", "24", "32"])
def test_every_format_that_wfdb_writes_is_read_as_wfdb_reads_it(tmp_path: Path, form: str) -> None:
    """8, 12, 16, 24 and 32 bits, with a gain and a baseline."""
    rng, gain = np.random.default_rng(0), 20.0
    wfdb.wrsamp(
        "rec", fs=8, units=["mV", "mV"], sig_name=["I", "II"], p_signal=rng.integers(-80, 80, (80, 2)) / gain,
        fmt=[form, form], adc_gain=[gain, gain], baseline=[3, -3], write_dir=str(tmp_path),
    )  # fmt: skip
    test_signals.write(tmp_path, "rec.hea")

    found = test_signals.series(tmp_path)

    own = wfdb.rdrecord(str(tmp_path / "rec")).p_signal
    np.testing.assert_allclose(found[0, :, :2], test_signals.binned(own), atol=1e-6)
