"""Folders of picture files: what is read from each format, how it is fitted, and what is refused with which words."""

import io
import random
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from client.records.manifest import read_manifest
from client.records.on_disk import OnDisk
from client.records.population import Source
from client.records.report import summarise
from client.records.tabular import checked_table
from shared_models.errors import RecordsError
from shared_models.tasks import PNEUMONIA, ImageInput, Task
from tests.client.test_population import settings

SIZE = 28
MANIFEST: dict[str, Any] = {
    "task": "pneumonia",
    "file": "index.csv",
    "label": "finding",
    "patient": "patient",
    "validation_fraction": 0.0,
    "columns": {"images": "path"},
}
COLOUR = PNEUMONIA.model_copy(update={"input": ImageInput(channels=3, height=SIZE, width=SIZE)})


def grey(seed: int = 0, height: int = SIZE, width: int = SIZE) -> NDArray[np.uint8]:
    """A picture that is not symmetric in any way."""
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def write(folder: Path, *paths: str, **changes: Any) -> Path:
    """Write index and manifest for files of these paths; the patients are p0, p1, ... and the labels alternate."""
    manifest = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    rows = [f"p{n},{path},{PNEUMONIA.classes[n % 2]}" for n, path in enumerate(paths)]
    (folder / "index.csv").write_text("\n".join(["patient,path,finding", *rows, ""]), encoding="utf-8")
    return folder


def read(folder: Path, task: Task = PNEUMONIA) -> NDArray[np.uint8]:
    """Pixels, shape ``(n, channels, height, width)``."""
    pixels: NDArray[np.uint8] = opened(folder, task)[:]
    return pixels


def opened(folder: Path, task: Task = PNEUMONIA) -> OnDisk:
    """The pictures after their headers were checked, not decoded yet."""
    found = checked_table(read_manifest(folder), task).content
    assert isinstance(found, OnDisk)
    return found


def refusal(folder: Path, task: Task = PNEUMONIA) -> str:
    """The words with which a folder is refused, on one line."""
    with pytest.raises(RecordsError) as caught:
        read(folder, task)
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return f"{caught.value} | {caught.value.hint}"


def attempt(folder: Path, name: str, task: Task = PNEUMONIA) -> NDArray[np.uint8] | None:
    """Pixels, or None where the folder is refused with words that name the file."""
    try:
        return read(folder, task)
    except RecordsError as error:
        if name not in str(error):
            raise
        return None


def save(folder: Path, name: str, pixels: NDArray[Any], **options: Any) -> str:
    """Save a picture; the name says the format."""
    Image.fromarray(pixels).save(folder / name, **options)
    return name


def test_png_files_are_read_to_the_pixel(tmp_path: Path) -> None:
    """8 and 16 bits, grey or saved as RGB with equal channels, in a folder below; in the order of the rows."""
    (tmp_path / "below").mkdir()
    first, second = grey(1), grey(2)
    names = [
        save(tmp_path, "below/a.png", first),
        save(tmp_path, "b.png", second.astype(np.uint16) * 257),
        save(tmp_path, "c.PNG", np.repeat(first[:, :, None], 3, axis=2)),
    ]

    pixels = read(write(tmp_path, *names))

    assert pixels.shape == (3, 1, SIZE, SIZE)
    np.testing.assert_array_equal(pixels[:, 0], np.stack([first, second, first]))


def test_a_jpeg_is_turned_upright_and_nearly_what_was_saved(tmp_path: Path) -> None:
    """EXIF says how a camera was held; a smooth picture loses a few grey levels."""
    ramp = np.tile(np.linspace(0, 255, SIZE).astype(np.uint8), (SIZE, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save(tmp_path, "a.jpg", ramp, quality=95)
    save(tmp_path, "b.jpeg", ramp, quality=95, exif=exif)

    plain, turned = read(write(tmp_path, "a.jpg", "b.jpeg"))[:, 0].astype(int)

    assert np.abs(plain - ramp).max() <= 8
    assert np.abs(turned - np.rot90(ramp, -1)).max() <= 8


def test_colours_are_read_for_a_task_in_colour_only(tmp_path: Path) -> None:
    """Channels come first; a grey picture has three equal ones; nothing is turned grey in silence."""
    colours = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    write(tmp_path, save(tmp_path, "a.png", colours), save(tmp_path, "b.png", grey()))

    pixels = read(tmp_path, COLOUR)

    np.testing.assert_array_equal(pixels[0], colours.transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels[1], np.stack([grey()] * 3))
    assert "a.png is in colour" in refusal(tmp_path)


def test_another_size_is_refused_padded_or_stretched_as_the_manifest_says(tmp_path: Path) -> None:
    """Padding keeps the shape of what is shown; a constant stays constant, so nothing rings or drifts."""
    write(tmp_path, save(tmp_path, "a.png", np.full((2 * SIZE, 4 * SIZE), 200, np.uint8)))
    assert "56 x 112 pixels, not 28 x 28" in refusal(tmp_path)

    write(tmp_path, "a.png", images={"resize": "pad"})
    padded = read(tmp_path)[0, 0]
    write(tmp_path, "a.png", images={"resize": "stretch"})
    stretched = read(tmp_path)[0, 0]

    assert (padded[7:21] == 200).all()
    assert (padded[:7] == 0).all()
    assert (padded[21:] == 0).all()
    assert (stretched == 200).all()


def test_a_window_shows_a_part_of_the_grey_values(tmp_path: Path) -> None:
    """Linear from centre - width/2 to centre + width/2, black below and white above."""
    ramp = np.tile(np.arange(SIZE, dtype=np.uint16) * 1000, (SIZE, 1))
    write(tmp_path, save(tmp_path, "a.png", ramp), images={"window": [10_000.0, 8_000.0]})

    row = read(tmp_path)[0, 0, 0].tolist()

    expected = [min(max((1000 * x - 6000) / 8000, 0), 1) * 255 for x in range(SIZE)]
    assert row == [round(value) for value in expected]


def test_blanked_rectangles_are_black_before_anything_is_resized(tmp_path: Path) -> None:
    """In the file's own pixels: top, left, bottom, right."""
    picture = np.full((2 * SIZE, 2 * SIZE), 255, np.uint8)
    images = {"blank": [[0, 0, 14, 2 * SIZE]], "resize": "stretch"}
    write(tmp_path, save(tmp_path, "a.png", picture), images=images)

    pixels = read(tmp_path)[0, 0]

    assert (pixels[:6] == 0).all()
    assert (pixels[8:] == 255).all()


def test_without_a_patient_column_every_picture_is_a_patient(tmp_path: Path) -> None:
    """Known by its pixels and its label, equal ones by number."""
    save(tmp_path, "a.png", grey())
    write(tmp_path, "a.png", "a.png", "a.png", patient=None, one_row_per_patient=True)

    ids = checked_table(read_manifest(tmp_path), PNEUMONIA).patients.ids

    assert len(set(ids)) == 3


def test_a_summary_shows_images_of_a_folder(tmp_path: Path) -> None:
    """``check-data`` counts repeats, and shows the range found."""
    save(tmp_path, "a.png", np.full((SIZE, SIZE), 7, np.uint8))
    save(tmp_path, "b.png", np.full((SIZE, SIZE), 9, np.uint8))

    summary = summarise(write(tmp_path, "a.png", "b.png", "a.png"))

    assert (summary.repeated_rows, summary.columns[0].found) == (1, "7 to 9")
    assert summary.parts["training"][:2] == (3, 3)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    """Row or file, and what is wrong; never a pixel, and never a way out of the folder."""
    clear = np.zeros((SIZE, SIZE, 4), np.uint8)
    save(tmp_path, "clear.png", clear)
    Image.fromarray(clear).convert("CMYK").save(tmp_path / "print.jpg")
    save(tmp_path, "moving.png", grey(), save_all=True, append_images=[Image.fromarray(grey(1))])
    (tmp_path / "not.png").write_bytes(b"GIF89a")
    (tmp_path / "slide.svs").write_bytes(b"")
    (tmp_path / "out.png").symlink_to(tmp_path.parent / "elsewhere.png")
    save(tmp_path.parent, "elsewhere.png", grey())

    words = {
        "": "row 2, column 'path': the value is missing",
        "none.png": "none.png cannot be read: No such file",
        "../elsewhere.png": "row 2, column 'path': leads out of the folder",
        "out.png": "row 2, column 'path': leads out of the folder",
        "clear.png": "clear.png is transparent",
        "print.jpg": "print.jpg has pixels of kind CMYK",
        "moving.png": "moving.png holds several pictures",
        "not.png": "not.png cannot be read: UnidentifiedImageError",
        "slide.svs": "slide.svs is of no kind that is read",
    }

    for path, expected in words.items():
        assert expected in refusal(write(tmp_path, path)).replace(", value ''", "")


def test_a_picture_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A few bytes of PNG can claim billions of pixels."""
    stream = io.BytesIO()
    Image.fromarray(grey()).save(stream, "PNG")
    claimed = bytearray(stream.getvalue())
    claimed[16:24] = (60_000).to_bytes(4) + (60_000).to_bytes(4)
    claimed[29:33] = zlib.crc32(claimed[12:29]).to_bytes(4)
    (tmp_path / "a.png").write_bytes(claimed)

    assert "a.png cannot be read: DecompressionBombError" in refusal(write(tmp_path, "a.png"))


def test_one_picture_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Forty pictures of a megapixel, of which the task keeps 784 pixels each: a few megabytes at the peak, not 40."""
    save(tmp_path, "a.png", np.zeros((1000, 1000), np.uint8))
    write(tmp_path, *(["a.png"] * 40), images={"resize": "stretch"})
    read(tmp_path)  # what is imported on the way is not counted

    tracemalloc.start()
    read(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 10e6


@examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flips=st.lists(st.floats(0, 1), max_size=3), seed=st.integers(0, 255))
def test_a_damaged_png_is_an_error_or_the_picture_that_was_saved(
    tmp_path: Path, cut: float, flips: list[float], seed: int
) -> None:
    """Cut anywhere, or with bytes changed anywhere: never other pixels, and never a traceback."""
    stream = io.BytesIO()
    Image.fromarray(grey(5)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    for flip in flips:
        data[int(flip * (len(data) - 1))] ^= random.Random(seed).randrange(1, 256)
    (tmp_path / "a.png").write_bytes(data[: int(cut * len(data)) if not flips else None])

    pixels = attempt(write(tmp_path, "a.png"), "a.png")

    if pixels is not None:
        np.testing.assert_array_equal(pixels[0, 0], grey(5))


@examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flips=st.lists(st.floats(0, 1), max_size=3), seed=st.integers(0, 255))
def test_a_damaged_jpeg_is_an_error_or_a_picture(tmp_path: Path, cut: float, flips: list[float], seed: int) -> None:
    """JPEG has no checksum, so a changed byte can change pixels; a cut file is refused, and nothing is a traceback."""
    stream = io.BytesIO()
    Image.fromarray(grey(5)).save(stream, "JPEG")
    data = bytearray(stream.getvalue())
    for flip in flips:
        data[int(flip * (len(data) - 1))] ^= random.Random(seed).randrange(1, 256)
    kept = int(cut * (len(data) - 3)) if not flips else len(data)  # cut into the end marker, a decoder is done already
    (tmp_path / "a.jpg").write_bytes(data[:kept])

    pixels = attempt(write(tmp_path, "a.jpg", images={"resize": "stretch"}), "a.jpg", COLOUR)

    if pixels is not None:
        assert flips
        assert pixels.shape == (1, 3, SIZE, SIZE)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hospitals with tables need no decoder; who has pictures is told what to install."""
    save(tmp_path, "a.png", grey())
    write(tmp_path, "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)

    text = refusal(tmp_path)

    assert "needs pillow, which is not installed" in text
    assert "konsil[images]" in text


def test_a_picture_that_is_replaced_is_noticed_by_the_next_round(tmp_path: Path) -> None:
    """Nothing is read again while nothing changed; a new file under the same name is."""
    own = settings(tmp_path)
    folder = own.records
    for path in folder.iterdir():
        path.unlink()
    for name in ("a.png", "b.png"):
        save(folder, name, grey())
    write(folder, "a.png", "b.png")
    source = Source(PNEUMONIA)

    before = source.current(own)
    first = before.training.inputs[:]
    again = source.current(own)
    save(folder, "new.png", grey(1))
    (folder / "new.png").replace(folder / "b.png")
    after = source.current(own).training.inputs[:]

    assert again is before
    assert not torch.equal(after[1], first[1])
    assert torch.equal(after[0], first[0])


def test_a_picture_that_changes_while_others_are_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an export must not pass for all of it: not while headers are checked, and not while all are decoded."""
    from client.records import pictures

    for name in ("a.png", "b.png"):
        save(tmp_path, name, grey())
    write(tmp_path, "a.png", "b.png")
    check, fitted = pictures._check, pictures._fitted
    changes = iter(range(1, 100))

    def slow_check(place: pictures.Place, *arguments: Any) -> tuple[int, int]:
        if place.path.name == "b.png":
            save(tmp_path, "a.png", grey(next(changes)))
        return check(place, *arguments)

    def slow(path: Path, *arguments: Any) -> NDArray[np.uint8]:
        if path.name == "b.png":
            save(tmp_path, "a.png", grey(next(changes)))
        return fitted(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_check", slow_check)
        assert "a.png changed while it was read" in refusal(tmp_path)
    monkeypatch.setattr(pictures, "_fitted", slow)
    with pytest.raises(RecordsError, match=r"a\.png changed while it was read"):
        summarise(tmp_path)
