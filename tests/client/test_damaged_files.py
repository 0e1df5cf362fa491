"""Files cut anywhere, or with bytes changed: an error that names the file, or what another decoder reads of that file.

Formats with a checksum of everything (PNG, compressed NIfTI, NPZ) are in the tests of their readers: there a damaged
file is an error or holds what was saved. Here are those in which a changed byte cannot be noticed: what passes must be
what the very same bytes say to another decoder: of another library, of the standard one, or the few lines below.
"""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet
import pydicom
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from client.records.on_disk import OnDisk
from client.records.tabular import Table
from shared_models.errors import RecordsError
from tests.client import test_dicom, test_nifti, test_pictures, test_rows, test_series, test_signals

few = examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Damage = Callable[[bytes], bytes]


def _cut(share: float) -> Damage:
    return lambda data: data[: int(share * len(data))]


def _flipped(places: list[tuple[float, int]]) -> Damage:
    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        for place, change in places:
            changed[int(place * (len(data) - 1))] ^= change
        return bytes(changed)

    return damage


damages = st.one_of(
    st.floats(0, 1, exclude_max=True).map(_cut),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3).map(_flipped),
)


def outcome(read: Callable[[], Any], path: Path) -> Any:
    """What was read; None where the file is refused with words that name it."""
    try:
        return read()
    except RecordsError as error:
        if path.name not in str(error):
            raise
        return None


# pictures


def decoded(path: Path) -> NDArray[np.uint8]:
    """By Pillow alone, with none of the checks."""
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    return upright if upright.ndim == 2 else upright[:, :, 0]


@few
@given(damage=damages, seed=st.integers(0, 9))
def test_a_damaged_jpeg_is_refused_or_what_pillow_makes_of_it(tmp_path: Path, damage: Damage, seed: int) -> None:
    """JPEG has no checksum."""
    stream, path = io.BytesIO(), tmp_path / "a.jpg"
    Image.fromarray(test_pictures.grey(seed)).save(stream, "JPEG")
    path.write_bytes(damage(stream.getvalue()))

    pixels = outcome(lambda: test_pictures.read(test_pictures.write(tmp_path, "a.jpg")), path)

    if pixels is not None:
        np.testing.assert_array_equal(pixels[0, 0], decoded(path))


def windowed(path: Path) -> NDArray[np.float64]:
    """Grey levels from 0 to 255, by the bytes where MR_small.dcm has its pixels, and its window.

    Explicit little endian, 64 x 64 of 16 bits at the end of the file; the window by the standard's pseudo-code.
    """
    data, header = path.read_bytes(), pydicom.dcmread(path, stop_before_pixels=True)
    at = data.rindex(b"\xe0\x7f\x10\x00OW") + 12
    kind = "<i2" if header.PixelRepresentation else "<u2"
    values = np.frombuffer(data[at : at + 8192], kind).reshape(64, 64).astype(float)
    centre, width = float(header.WindowCenter), float(header.WindowWidth)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


@few
@given(place=st.floats(0, 1), change=st.integers(1, 255), cut=st.booleans())
def test_damaged_pixels_of_dicom_are_refused_or_what_the_bytes_say(
    tmp_path: Path, place: float, change: int, cut: bool
) -> None:
    """DICOM has no checksum; its header is damaged in a test of its own, here are its pixels."""
    path, data = tmp_path / "a.dcm", test_dicom.source("MR_small.dcm").read_bytes()
    at = data.rindex(b"\xe0\x7f\x10\x00OW") + 12
    where = at + int(place * 8191)
    path.write_bytes(data[:where] if cut else _flipped([(where / (len(data) - 1) + 1e-12, change)])(data))
    task = test_dicom.task(64, 64)
    test_pictures.write(tmp_path, "a.dcm", drop=test_dicom.DROP)

    pixels = outcome(lambda: test_pictures.read(tmp_path, task), path)

    assert (pixels is None) is cut
    if pixels is not None:
        assert np.abs(pixels[0, 0] - windowed(path)).max() <= 0.5 + 1e-9


@few
@given(damage=damages)
def test_a_damaged_volume_is_refused_or_what_nibabel_makes_of_it(tmp_path: Path, damage: Damage) -> None:
    """A plain NIfTI file has no checksum: whatever header and voxels say now, seen from the front."""
    path = tmp_path / "a.nii"
    test_nifti.save(path, test_nifti.ORIENTATIONS[0])
    path.write_bytes(damage(path.read_bytes()))
    images = test_nifti.FULL | {"slice": 0.5, "resize": "refuse"}
    test_pictures.write(tmp_path, "a.nii", images=images)

    pixels = outcome(lambda: test_pictures.read(tmp_path, test_nifti.task(7, 6)), path)

    if pixels is not None:
        body = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        shown = body[::-1, ::-1, round(0.5 * (body.shape[2] - 1))].T
        expected = np.clip(np.nan_to_num(shown, nan=0, posinf=255, neginf=0), 0, 255)
        assert np.abs(pixels[0, 0] - expected).max() <= 0.5 + 1e-9


# recordings


def series(folder: Path) -> NDArray[np.float32]:
    """The one recording's series."""
    found = test_signals.read(folder).content
    assert isinstance(found, OnDisk)
    inputs: NDArray[np.float32] = found[:]
    return inputs


@few
@given(damage=damages)
def test_damaged_samples_of_wfdb_are_refused_or_what_the_bytes_say(tmp_path: Path, damage: Damage) -> None:
    """The header's checksum is a sum: two changes may cancel, and then the samples are those in the file."""
    test_signals.save_wfdb(tmp_path, test_signals.leads())
    path = tmp_path / "rec.dat"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    test_signals.write(tmp_path, "rec.hea")

    found = outcome(lambda: series(tmp_path), tmp_path / "rec")  # named by its header or by its samples

    if found is not None:
        samples = np.frombuffer(path.read_bytes(), "<i2").reshape(-1, 2) / 1000
        np.testing.assert_allclose(found[0, :, :2], test_signals.binned(samples), atol=1e-6)


def samples_of_edf(path: Path) -> NDArray[np.float64]:
    """The two leads in mV, by the format's description (Kemp et al. 1992): shape ``(samples, 2)``."""
    data = path.read_bytes()
    signals, records = int(data[252:256]), int(data[236:244])

    def field(start: int, width: int) -> list[str]:
        first = 256 + start * signals
        return [data[first + n * width : first + (n + 1) * width].decode("ascii").strip() for n in range(signals)]

    low, high = (np.array([float(x) for x in field(start, 8)]) for start in (104, 112))
    least, greatest = (np.array([float(x) for x in field(start, 8)]) for start in (120, 128))
    counts = [int(x) for x in field(216, 8)]
    values = np.frombuffer(data[256 * (signals + 1) :], "<i2").reshape(records, sum(counts))
    ends = np.cumsum([0, *counts])
    found = []
    for name in ("I", "II"):
        n = field(0, 16).index(name)
        digital = values[:, ends[n] : ends[n + 1]].ravel()
        factor = {"mV": 1.0, "uV": 1e-3, "V": 1e3, "nV": 1e-6}[field(96, 8)[n]]
        found.append(((digital - least[n]) * (high[n] - low[n]) / (greatest[n] - least[n]) + low[n]) * factor)
    return np.stack(found, axis=1)


@few
@given(damage=damages)
def test_a_damaged_edf_is_refused_or_what_the_bytes_say(tmp_path: Path, damage: Damage) -> None:
    """EDF has no checksum: ranges, units and lengths in the header may be other ones now, and hold for the samples."""
    test_signals.save_edf(tmp_path, test_signals.leads())
    path = tmp_path / "rec.edf"
    path.write_bytes(damage(path.read_bytes()))
    test_signals.write(tmp_path, "rec.edf")

    found = outcome(lambda: series(tmp_path), path)

    if found is not None:
        samples, mask = samples_of_edf(path), found[0, :, 2:4] == 1
        if len(samples) == 80 and mask.all():  # else the header says another frequency
            np.testing.assert_allclose(found[0, :, :2], test_signals.binned(samples), atol=1e-6)


# rows


def same_rows(table: Table, rows: list[dict[str, Any]]) -> None:
    """The table holds what another decoder has found in the file."""
    assert table.patients.ids == [str(row["id"]).strip() for row in rows]
    assert table.content[:]["age"].tolist() == [float(row["age"]) for row in rows]
    stages, outcomes = ("i", "ii", "iii"), ("well", "ill")
    assert table.content[:]["stage"].tolist() == [stages.index(str(row["stage"]).strip()) for row in rows]
    assert table.labels[:].tolist() == [outcomes.index(str(row["outcome"]).strip()) for row in rows]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """By the standard library, or for Parquet by Arrow without pandas."""
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(path).to_pylist())
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    return [dict(zip([name.strip() for name in header], row, strict=False)) for row in rows if any(row)]


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet"])
@few
@given(damage=damages)
def test_damaged_rows_are_refused_or_what_another_decoder_reads(tmp_path: Path, name: str, damage: Damage) -> None:
    """Text has no checksum, and Parquet's pages have none unless the writer was asked."""
    path, frame = tmp_path / name, pd.DataFrame(test_rows.ROWS)
    if name == "data.parquet":
        frame.to_parquet(path)
    elif name == "data.csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in test_rows.ROWS), encoding="utf-8")
    path.write_bytes(damage(path.read_bytes()))
    test_rows.write(tmp_path, file=name)

    table = outcome(lambda: test_rows.read(tmp_path), path)

    if table is not None:
        same_rows(table, rows_of(path))


@few
@given(damage=damages)
def test_damaged_measurements_are_refused_or_what_the_lines_say(tmp_path: Path, damage: Damage) -> None:
    """A series in long form, binned once more by a plain loop over the file's lines."""
    test_series.write(tmp_path)
    path = tmp_path / "measured.csv"
    path.write_bytes(damage(path.read_bytes()))

    table = outcome(lambda: test_series.read(tmp_path), tmp_path)  # or a row is without any now

    if table is None:
        return
    header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    cells: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for line in lines:
        row = dict(zip([name.strip() for name in header], (cell.strip() for cell in line), strict=False))
        if row.get("stay") in {"s1", "s2", "s3"} and row.get("name") in {"HR", "fluid", "warmth"} and row.get("value"):
            at, value = float(row["at"]), float(row["value"])
            if 0 <= at < 4:
                place = ("s1", "s2", "s3").index(row["stay"]), int(at), ("HR", "fluid", "warmth").index(row["name"])
                cells.setdefault(place, []).append((at, value))
    expected = np.zeros((3, 4, 3))
    for place, found in cells.items():
        values = [value for _, value in found]
        last = max(enumerate(found), key=lambda one: (one[1][0], one[0]))[1][1]
        joined = (last, sum(values), sum(values) / len(values))[place[2]]
        low, high = ((0, 200), (0, 1000), (20, 40))[place[2]]
        expected[place] = 4 * (joined - low) / (high - low) - 2
    np.testing.assert_allclose(table.content[:][:, :, :3], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["Patient.ndjson", "Observation.ndjson", "Condition.ndjson"])
@few
@given(damage=damages)
def test_a_damaged_export_is_refused_or_what_its_lines_say(tmp_path: Path, name: str, damage: Damage) -> None:
    """FHIR, by another reading of the lines: ages, the newest stage, and who has the condition."""
    test_rows.export(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))

    table = outcome(lambda: test_rows.read(tmp_path), tmp_path)  # an id that is nowhere is not one file's fault
    if table is None:
        return

    patients, observed, conditions = (
        [json.loads(line) for line in (tmp_path / f"{kind}.ndjson").read_text("utf-8-sig").split("\n") if line.strip()]
        for kind in ("Patient", "Observation", "Condition")
    )
    assert table.patients.ids == [p["id"] for p in patients if p.get("resourceType") == "Patient"]
    for row, (identity, number) in enumerate(zip(table.patients.ids, table.content[:]["stage"].tolist(), strict=True)):
        named = f"Patient/{identity}"
        stages = {
            coding.get("code")
            for o in observed
            if str(o.get("subject", {}).get("reference", "")).endswith(named) and "valueCodeableConcept" in o
            for coding in o["valueCodeableConcept"].get("coding", [])
        }
        assert ("i", "ii", "iii")[number] in stages
        if table.labels[row]:
            assert any(str(c.get("subject", {}).get("reference", "")).endswith(named) for c in conditions)


def test_damage_is_damage() -> None:
    """The strategies above do change what they are given."""
    data = random.Random(0).randbytes(100)

    assert len(_cut(0.999)(data)) == 99
    assert _flipped([(0.5, 1)])(data) != data
