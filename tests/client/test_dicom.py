"""DICOM files, pydicom's own and changed ones: grey levels as the standard says, and identifiers refused."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.pixels import get_decoder

import client.records.dicom
from shared_models.tasks import PNEUMONIA, ImageInput
from tests.client.test_pictures import attempt, read, refusal, write

DROP = ["PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "OtherPatientIDsSequence"]


def source(name: str) -> Path:
    """One of pydicom's test files."""
    found = get_testdata_file(name)
    assert isinstance(found, str)
    return Path(found)


def task(rows: int, columns: int, channels: Literal[1, 3] = 1) -> Any:
    """A task whose images have the file's own size."""
    return PNEUMONIA.model_copy(
        update={"input": ImageInput.model_construct(channels=channels, height=rows, width=columns)}
    )


def change(folder: Path, name: str, edit: Callable[[pydicom.Dataset], None]) -> str:
    """Save one of pydicom's files as ``a.dcm``, edited."""
    data = pydicom.dcmread(source(name))
    edit(data)
    data.save_as(folder / "a.dcm")
    return "a.dcm"


def stored(name: str) -> NDArray[np.int64]:
    """The stored pixels, unpacked by hand: these files are little-endian and not compressed."""
    data = pydicom.dcmread(source(name))
    kind = "<i2" if data.PixelRepresentation else "<u2"
    return np.frombuffer(data.PixelData, dtype=kind).reshape(data.Rows, data.Columns).astype(np.int64)


def linear(x: float, centre: float, width: float) -> float:
    """Pseudo-code of PS3.3 C.11.2.1.2.1, with an output range from 0 to 1."""
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0
    if x > centre - 0.5 + (width - 1) / 2:
        return 1
    return (x - (centre - 0.5)) / (width - 1) + 0.5


def test_a_window_of_the_manifest_is_in_hounsfield_units(tmp_path: Path) -> None:
    """The modality's rescale comes first; a window of 1000 around 0 is black at -500 and white at 500."""
    shutil.copy(source("CT_small.dcm"), tmp_path / "a.dcm")
    write(tmp_path, "a.dcm", drop=DROP, images={"window": [0.0, 1000.0]})

    pixels = read(tmp_path, task(128, 128))[0, 0]

    hounsfield = stored("CT_small.dcm") - 1024  # the file's intercept; its slope is 1
    expected = np.clip((hounsfield + 500) / 1000, 0, 1) * 255
    expected[stored("CT_small.dcm") == -2000] = 0  # its padding
    assert np.abs(pixels - expected).max() <= 0.5


def test_the_files_own_window_is_used_where_the_manifest_names_none(tmp_path: Path) -> None:
    """By the standard's pseudo-code, at every pixel."""
    shutil.copy(source("MR_small.dcm"), tmp_path / "a.dcm")

    pixels = read(write(tmp_path, "a.dcm", drop=DROP), task(64, 64))[0, 0]

    data = pydicom.dcmread(source("MR_small.dcm"))
    expected = [
        linear(x, float(data.WindowCenter), float(data.WindowWidth)) for x in stored("MR_small.dcm").ravel().tolist()
    ]
    assert np.abs(pixels.ravel() - np.array(expected) * 255).max() <= 0.5


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("LINEAR_EXACT", lambda x, c, w: min(max((x - (c - w / 2)) / w, 0), 1)),
        ("SIGMOID", lambda x, c, w: 1 / (1 + math.exp(-4 * (x - c) / w))),
    ],
)
def test_other_window_functions_are_those_of_the_standard(
    tmp_path: Path, function: str, formula: Callable[[float, float, float], float]
) -> None:
    """PS3.3 C.11.2.1.3.2 and C.11.2.1.3.1."""

    def edit(data: pydicom.Dataset) -> None:
        data.WindowCenter, data.WindowWidth, data.VOILUTFunction = [600, 1], [400, 2], function

    write(tmp_path, change(tmp_path, "MR_small.dcm", edit), drop=DROP)

    pixels = read(tmp_path, task(64, 64))[0, 0]

    expected = [255 * formula(x, 600, 400) for x in stored("MR_small.dcm").ravel().tolist()]
    assert np.abs(pixels.ravel() - expected).max() <= 0.5


def test_without_a_window_the_range_of_the_format_is_shown(tmp_path: Path) -> None:
    """12 bits are 0 to 4095, whatever this picture holds: public, and the same for every file of its kind."""

    def edit(data: pydicom.Dataset) -> None:
        del data.WindowCenter, data.WindowWidth
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 0

    write(tmp_path, change(tmp_path, "MR_small.dcm", edit), drop=DROP)

    pixels = read(tmp_path, task(64, 64))[0, 0]

    assert np.abs(pixels - stored("MR_small.dcm") / 4095 * 255).max() <= 0.5


def test_monochrome1_is_turned_so_that_255_is_white(tmp_path: Path) -> None:
    """Its lowest value is white: the picture is the other way round."""
    shutil.copy(source("MR_small.dcm"), tmp_path / "plain.dcm")

    def edit(data: pydicom.Dataset) -> None:
        data.PhotometricInterpretation = "MONOCHROME1"

    write(tmp_path, "plain.dcm", change(tmp_path, "MR_small.dcm", edit), drop=DROP)

    plain, turned = read(tmp_path, task(64, 64))[:, 0].astype(int)

    assert np.abs(plain + turned - 255).max() <= 1


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
    ],
)
def test_lossless_encodings_of_one_picture_are_one_picture(tmp_path: Path, name: str) -> None:
    """RLE, JPEG 2000, JPEG-LS, the other byte order, implicit types: as other tools wrote them."""
    shutil.copy(source("MR_small.dcm"), tmp_path / "plain.dcm")
    shutil.copy(source(name), tmp_path / "a.dcm")

    plain, other = read(write(tmp_path, "plain.dcm", "a.dcm", drop=DROP), task(64, 64))

    np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize("name", ["JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm"])
def test_lossy_jpeg_ls_is_as_near_as_it_says(tmp_path: Path, name: str) -> None:
    """Files of pydicom's own, by the CharLS library: within the error that was allowed of what it decodes itself."""
    import jpeg_ls

    shutil.copy(source(name), tmp_path / "a.dcm")
    data = pydicom.dcmread(source(name))
    frame = next(pydicom.encaps.generate_frames(data.PixelData, number_of_frames=1))
    own = jpeg_ls.decode(np.frombuffer(frame, dtype=np.uint8)).astype(float)
    most = 2.0**data.BitsStored - 1

    found = read(
        write(tmp_path, "a.dcm", drop=DROP, images={"pixels_checked": True, "window": [most / 2, most]}),
        task(data.Rows, data.Columns),
    )

    np.testing.assert_allclose(found[0, 0], np.clip(own / most, 0, 1) * 255, atol=0.51)


def test_what_decodes_a_picture_does_not_depend_on_what_else_is_installed() -> None:
    """For each compression one decoder, of those that pydicom has for it."""
    for syntax, (plugin, _) in client.records.dicom._DECODERS.items():
        known = get_decoder(syntax)
        assert plugin in {*known.available_plugins, *known._unavailable}, syntax.name


def test_a_file_without_a_suffix_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    """Archives name files by numbers and unique identifiers."""
    for name in ("IM0001", "1.2.840.113619.2.5", "plain.dcm"):
        shutil.copy(source("MR_small.dcm"), tmp_path / name)
    (tmp_path / "IM0002").write_bytes(bytes(200))

    pixels = read(write(tmp_path, "IM0001", "1.2.840.113619.2.5", "plain.dcm", drop=DROP), task(64, 64))

    assert (pixels == pixels[2]).all()
    assert "IM0002 is of no kind that is read" in refusal(write(tmp_path, "IM0002"), task(64, 64))


def test_colours_come_out_as_red_green_and_blue(tmp_path: Path) -> None:
    """One picture of coloured bars: saved as RGB, as YBR in JPEG, as JPEG of subsampled YBR."""
    names = ["SC_rgb_rle.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cr.dcm"]
    for number, name in enumerate(names):
        shutil.copy(source(name), tmp_path / f"{number}.dcm")
    write(tmp_path, *(f"{n}.dcm" for n in range(3)), drop=DROP, images={"pixels_checked": True})

    pixels = read(tmp_path, task(100, 100, 3)).astype(int)

    middles = pixels[:, :, 5::10, 50]  # of the ten bars
    assert middles[0].T.tolist()[:3] == [[255, 0, 0], [255, 128, 128], [0, 255, 0]]
    assert np.abs(middles - middles[0]).max() <= 8  # what JPEG loses


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    """Each pixel is a row of the file's table of 16-bit colours."""
    shutil.copy(source("examples_palette.dcm"), tmp_path / "a.dcm")
    write(tmp_path, "a.dcm", drop=DROP, images={"pixels_checked": True})

    pixels = read(tmp_path, task(350, 800, 3))[0]

    data = pydicom.dcmread(source("examples_palette.dcm"))
    indices = np.frombuffer(data.PixelData, np.uint8).reshape(350, 800)
    red = np.frombuffer(data.RedPaletteColorLookupTableData, "<u2")
    assert np.abs(pixels[0] - red[indices] / 65535 * 255).max() <= 0.5


def test_a_frame_is_chosen_by_the_manifest_or_by_the_row(tmp_path: Path) -> None:
    """0 is the first and 1 the last; without a choice several frames are refused."""
    shutil.copy(source("SC_rgb_rle_2frame.dcm"), tmp_path / "a.dcm")
    images: dict[str, Any] = {"pixels_checked": True}
    bars = task(100, 100, 3)

    assert "has 2 frames" in refusal(write(tmp_path, "a.dcm", drop=DROP, images=images), bars)
    first = read(write(tmp_path, "a.dcm", drop=DROP, images=images | {"slice": 0.0}), bars)
    last = read(write(tmp_path, "a.dcm", drop=DROP, images=images | {"slice": 1.0}), bars)
    write(tmp_path, "a.dcm", "a.dcm", drop=DROP, images=images | {"slice_column": "at"})
    index = tmp_path / "index.csv"
    index.write_text("patient,path,finding,at\np0,a.dcm,normal,0\np1,a.dcm,pneumonia,1\n", encoding="utf-8")
    both = read(tmp_path, bars)
    index.write_text("patient,path,finding,at\np0,a.dcm,normal,2\n", encoding="utf-8")

    assert not np.array_equal(first, last)
    np.testing.assert_array_equal(both, np.concatenate([first, last]))
    assert "row 2, column 'at', value '2': is not from 0 to 1" in refusal(tmp_path, bars)


# identifiers


@pytest.mark.parametrize("name", ["rtdose.dcm", "rtdose_rle.dcm"])
@pytest.mark.parametrize("projection", ["maximum", "mean"])
def test_frames_may_be_projected_onto_one(tmp_path: Path, projection: str, name: str) -> None:
    """Fifteen planes of a dose, plain and compressed; colours have no brightest."""
    shutil.copy(source(name), tmp_path / "a.dcm")
    shutil.copy(source("SC_rgb_rle_2frame.dcm"), tmp_path / "colours.dcm")
    frames = np.frombuffer(pydicom.dcmread(source("rtdose.dcm")).PixelData, "<u4").reshape(15, 10, 10)
    most = float(frames.max())
    shown = np.clip((frames - 0.1 * most) / (0.8 * most), 0, 1)
    flat = shown.max(axis=0) if projection == "maximum" else shown.mean(axis=0)
    images = {"pixels_checked": True, "window": [0.5 * most, 0.8 * most], "projection": projection}

    found = read(write(tmp_path, "a.dcm", drop=DROP, images=images), task(10, 10))

    assert len(np.unique(found)) > 10
    assert np.abs(found[0, 0] - flat * 255).max() <= 0.5 + 1e-6
    assert "colours.dcm has colours" in refusal(
        write(tmp_path, "colours.dcm", drop=DROP, images=images), task(100, 100, 3)
    )


def test_tags_that_identify_a_patient_are_refused_unless_dropped(tmp_path: Path) -> None:
    """All are named at once, none is quoted; with the names in the manifest the file is read."""
    data = pydicom.dcmread(source("CT_small.dcm"))
    shutil.copy(source("CT_small.dcm"), tmp_path / "a.dcm")

    text = refusal(write(tmp_path, "a.dcm", patient=None, one_row_per_patient=True), task(128, 128))
    hint = text.partition("drop = [")[2].partition("]")[0]
    write(tmp_path, "a.dcm", drop=[name.strip(' "') for name in hint.split(",")])

    assert "'PatientName', 'PatientID'" in text
    assert str(data.PatientName) not in text
    assert str(data.PatientID) not in text
    assert read(tmp_path, task(128, 128)).shape == (1, 1, 128, 128)


def test_a_patient_id_that_is_the_rows_patient_is_a_pseudonym_and_a_check(tmp_path: Path) -> None:
    """It needs no drop; a file of another patient under this row is found."""

    def edit(data: pydicom.Dataset) -> None:
        for name in DROP:
            if name in data:
                delattr(data, name)
        data.PatientID = "P0 "

    write(tmp_path, change(tmp_path, "CT_small.dcm", edit), drop=None)
    assert read(tmp_path, task(128, 128)).shape == (1, 1, 128, 128)

    (tmp_path / "index.csv").write_text("patient,path,finding\nother,a.dcm,normal\n", encoding="utf-8")
    text = refusal(tmp_path, task(128, 128))
    assert "a.dcm: PatientID is not the patient that the row names" in text
    assert "P0" not in text


@pytest.mark.parametrize(
    ("flag", "modality", "images", "words"),
    [
        ("YES", "DX", {}, "an annotation is burned into the pixels"),
        ("YES", "DX", {"pixels_checked": True}, "an annotation is burned into the pixels"),
        ("YES", "DX", {"blank": [[0, 0, 9, 9]]}, None),
        (None, "US", {}, "images of modality US often have one"),
        (None, "US", {"pixels_checked": True}, None),
        ("NO", "US", {}, None),
        (None, "CT", {}, None),
    ],
)
def test_text_in_the_pixels_is_refused_unless_blanked(
    tmp_path: Path, flag: str | None, modality: str, images: dict[str, Any], words: str | None
) -> None:
    """By the file's flag; where there is none, by how such images are usually made, unless somebody has looked."""

    def edit(data: pydicom.Dataset) -> None:
        data.Modality = modality
        if flag:
            data.BurnedInAnnotation = flag

    write(tmp_path, change(tmp_path, "MR_small.dcm", edit), drop=DROP, images=images)

    if words:
        assert words in refusal(tmp_path, task(64, 64))
    else:
        pixels = read(tmp_path, task(64, 64))[0, 0]
        assert not images.get("blank") or (pixels[:9, :9] == 0).all()


def test_objects_without_pixels_and_without_a_decoder_are_refused(tmp_path: Path) -> None:
    """A report is no image; lossless JPEG needs a decoder that is not installed, and the words name it."""
    shutil.copy(source("reportsi.dcm"), tmp_path / "report.dcm")
    shutil.copy(source("SC_rgb_jpeg_gdcm.dcm"), tmp_path / "lossless.dcm")

    assert "report.dcm has no pixels" in refusal(write(tmp_path, "report.dcm", drop=DROP), task(64, 64))
    shutil.copy(source("JPEG-lossy.dcm"), tmp_path / "twelve.dcm")
    assert "twelve.dcm is compressed in a way that nothing here decodes: JPEG Extended" in refusal(
        write(tmp_path, "twelve.dcm", drop=DROP, images={"pixels_checked": True}), task(256, 1024)
    )
    said = refusal(write(tmp_path, "lossless.dcm", drop=DROP, images={"pixels_checked": True}), task(100, 100, 3))
    assert "lossless.dcm is compressed in a way that nothing here decodes: JPEG Lossless" in said
    assert "pip install python-gdcm" in said


# damage


@examples(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flips=st.lists(st.floats(0, 1), max_size=4), seed=st.integers(0, 255))
def test_a_damaged_file_is_an_error_or_an_image(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cut: float, flips: list[float], seed: int
) -> None:
    """Cut: an error, or the very picture. Changed bytes: an error, or an image of the task's size. Silent, always."""
    data = bytearray(source("MR_small.dcm").read_bytes())
    for flip in flips:
        # Mostly in the header, where more can go wrong than a pixel's value.
        data[int(flip**4 * (len(data) - 1))] ^= random.Random(seed).randrange(1, 256)
    (tmp_path / "a.dcm").write_bytes(data if flips else data[: int(cut * len(data))])
    shutil.copy(source("MR_small.dcm"), tmp_path / "whole.dcm")
    mine = task(64, 64)

    pixels = attempt(write(tmp_path, "a.dcm", drop=DROP, images={"pixels_checked": True}), "a.dcm", mine)

    if pixels is not None:
        assert pixels.shape == (1, 1, 64, 64)
        if not flips:
            np.testing.assert_array_equal(pixels, read(write(tmp_path, "whole.dcm", drop=DROP), mine))
    assert capfd.readouterr() == ("", "")
