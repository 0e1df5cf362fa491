"""Recordings with gaps: WFDB of several segments, and EDF+D; read as other readers do, refused, never guessed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyedflib
import pytest
import wfdb
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.client.test_damaged_files import Damage, damages, few, outcome, samples_of_edf
from tests.client.test_signals import FREQUENCY, leads, read, refusal, save_edf, series, write

SECONDS = 10


def segment(
    folder: Path, name: str, signals: NDArray[np.float64], names: tuple[str, ...] = ("I", "II"), **more: Any
) -> int:
    """One segment by wfdb's own writer; its samples per channel."""
    count = len(names)
    wfdb.wrsamp(
        name, fs=FREQUENCY, units=more.pop("units", ["mV"] * count), sig_name=list(names), p_signal=signals,
        fmt=["16"] * count, adc_gain=[1000] * count, baseline=[0] * count, write_dir=str(folder), **more,
    )  # fmt: skip
    return len(signals)


def master(folder: Path, *segments: tuple[str, int], signals: int = 2, total: int | None = None) -> str:
    """The header of the whole, as header(5) describes it."""
    length = sum(count for _, count in segments) if total is None else total
    lines = [f"rec/{len(segments)} {signals} {FREQUENCY} {length}", *(f"{name} {count}" for name, count in segments)]
    (folder / "rec.hea").write_text("\n".join([*lines, ""]), encoding="ascii")
    return "rec.hea"


def three(folder: Path) -> str:
    """Three seconds, a null segment of two, and five more."""
    signals = leads()
    first = segment(folder, "rec_1", signals[: 3 * FREQUENCY])
    last = segment(folder, "rec_2", signals[5 * FREQUENCY :])
    return master(folder, ("rec_1", first), ("~", 2 * FREQUENCY), ("rec_2", last))


def varying(folder: Path) -> str:
    """A layout first; then a segment of both channels, one of the second only, a null one, and one turned round."""
    signals = leads()
    layout = [f"rec_layout 2 {FREQUENCY} 0", *(f"~ 0 1000(0)/mV 16 0 0 0 0 {name}" for name in ("I", "II")), ""]
    (folder / "rec_layout.hea").write_text("\n".join(layout), encoding="ascii")
    first = segment(folder, "rec_1", signals[: 3 * FREQUENCY])
    second = segment(folder, "rec_2", signals[3 * FREQUENCY : 5 * FREQUENCY, 1:], ("II",))
    third = segment(folder, "rec_3", signals[6 * FREQUENCY :, ::-1], ("II", "I"))
    return master(folder, ("rec_layout", 0), ("rec_1", first), ("rec_2", second), ("~", FREQUENCY), ("rec_3", third))


def with_gaps(samples: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Mean and last of each second, on the public range, and which seconds have any; NaN stands for no sample."""
    seconds = samples[: SECONDS * FREQUENCY].reshape(-1, FREQUENCY, 2)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(seconds).any(axis=1))
    values = np.zeros((len(seconds), 2))
    for number, second in enumerate(seconds):
        for lead in (0, 1):
            there = second[np.isfinite(second[:, lead]), lead]
            if len(there):
                values[number, lead] = there.mean() if lead == 0 else there[-1]
    return values * 4 / 10, known


def same(found: NDArray[np.float32], samples: NDArray[np.float64], tolerance: float = 1e-6) -> None:
    """A series holds these samples, and masks what is not there."""
    values, known = with_gaps(samples)
    np.testing.assert_array_equal(found[: len(known), 2:4] == 1, known)
    np.testing.assert_allclose(found[: len(known), :2][known], values[known], atol=tolerance)


def test_segments_are_read_as_wfdb_reads_them(tmp_path: Path) -> None:
    """Of a layout that varies: null segments and absent channels are masked, and every file is known."""
    write(tmp_path, varying(tmp_path))

    found = series(tmp_path)

    own = wfdb.rdrecord(str(tmp_path / "rec"))
    order = [own.sig_name.index(name) for name in ("I", "II")]
    assert np.isnan(own.p_signal).any()
    same(found[0], own.p_signal[:, order])
    named = {path.name for path in read(tmp_path).files}
    assert named == {path.name for path in tmp_path.iterdir() if path.suffix in {".hea", ".dat"}}


def test_a_null_segment_of_one_layout_is_a_gap(tmp_path: Path) -> None:
    """The format has them there too, though wfdb reads none: two seconds are masked, and the rest is in place."""
    write(tmp_path, three(tmp_path))

    expected = leads()
    expected[3 * FREQUENCY : 5 * FREQUENCY] = np.nan
    same(series(tmp_path)[0], expected)


def test_segments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Another length, frequency or unit, a segment of segments, a name in a part, a part that is not there."""
    three(tmp_path)
    write(tmp_path, "rec.hea")
    whole = (tmp_path / "rec.hea").read_text(encoding="ascii")

    def changed(before: str, after: str) -> str:
        (tmp_path / "rec.hea").write_text(whole.replace(before, after), encoding="ascii")
        return refusal(tmp_path)

    assert "is longer or shorter than its segments" in changed("8 80", "8 81")
    assert "rec_1.hea is not the segment that rec.hea says" in changed("rec_1 24", "rec_1 25")
    assert "rec_1.hea is not the segment that rec.hea says" in changed("2 8 80", "2 9 80")
    assert "rec_9.hea cannot be read" in changed("rec_2", "rec_9")
    assert "rec.hea is a segment and has segments" in changed("rec_2", "rec")
    assert "rec.hea cannot be read" in changed("rec_2", "../rec_2")
    (tmp_path / "rec.hea").write_text(whole, encoding="ascii")
    segment(tmp_path, "rec_2", leads()[5 * FREQUENCY :] * 1e-3, units=["V", "V"])
    assert "channel 'I' changes its unit" in refusal(tmp_path)
    segment(tmp_path, "rec_2", leads()[5 * FREQUENCY :], comments=["patient_name: Doe"])
    assert "rec_2.hea holds what identifies patients" in refusal(tmp_path)
    (tmp_path / "rec_2.hea").unlink()
    assert "rec_2.hea cannot be read" in refusal(tmp_path)


@few
@given(damage=damages, name=st.sampled_from(["rec_1.dat", "rec_2.dat", "rec_3.dat", "rec.hea", "rec_3.hea"]))
def test_damaged_segments_are_refused_or_what_wfdb_makes_of_them(tmp_path: Path, damage: Damage, name: str) -> None:
    """Checksums and lengths hold for every segment; what passes them is what the library reads of the same files."""
    varying(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    write(tmp_path, "rec.hea")

    found = outcome(lambda: series(tmp_path), tmp_path)  # it may name another segment now

    if found is not None:
        assert np.isfinite(found).all()
        if name.endswith(".dat"):  # of a header names, units and times may be other ones now
            own = wfdb.rdrecord(str(tmp_path / "rec"))
            same(found[0], own.p_signal[:, [own.sig_name.index(name) for name in ("I", "II")]])


# EDF+D


def discontinuous(path: Path, begins: list[str]) -> None:
    """Make a recording of pyedflib's one whose records of a second begin at these times, as section 2.2.4 describes."""
    data = bytearray(path.read_bytes())
    wide, data[192:197] = (3, b"BDF+D") if path.suffix == ".bdf" else (2, b"EDF+D")
    signals = int(data[252:256])
    counts = [int(data[256 + 216 * signals + 8 * n :][:8]) for n in range(signals)]
    each, place = wide * sum(counts), int(data[184:192]) + wide * sum(counts[:-1])
    for number, begin in enumerate(begins):
        told = f"{begin}\x14\x14".encode() + b"\0"
        slot = place + number * each
        data[slot : slot + wide * counts[-1]] = told.ljust(wide * counts[-1], b"\0")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("begins", "first"),
    [
        (["+0", "+1", "+2", "+6", "+7", "+8", "+9"], [0, 1, 2, 6, 7, 8, 9]),
        (["+0.25", "+1.25", "+4.25", "+5.25", "+30.25", "+31.25", "+3600"], [0, 1, 4, 5]),
        (["+0", "+1", "+2", "+3", "+4", "+5", "+6"], [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=["a gap", "from within a second, and beyond the task's steps", "no gap at all"],
)
def test_gaps_of_a_discontinuous_recording_are_masked(tmp_path: Path, begins: list[str], first: list[int]) -> None:
    """Every sample is in the second that its record says, counted from the first record's begin."""
    signals = leads(7)
    write(tmp_path, save_edf(tmp_path, signals))
    discontinuous(tmp_path / "rec.edf", begins)

    found = series(tmp_path)

    expected = np.full((SECONDS * FREQUENCY, 2), np.nan)
    for number, second in enumerate(first):
        expected[second * FREQUENCY : (second + 1) * FREQUENCY] = signals[number * FREQUENCY : (number + 1) * FREQUENCY]
    same(found[0], expected, 1e-3)


def test_gaps_of_24_bits_are_masked_too(tmp_path: Path) -> None:
    """BDF+D, with samples of three bytes."""
    signals = leads(4)
    save_edf(tmp_path, signals, file_type=pyedflib.FILETYPE_BDFPLUS)
    (tmp_path / "rec.edf").rename(tmp_path / "rec.bdf")
    write(tmp_path, "rec.bdf")
    discontinuous(tmp_path / "rec.bdf", ["+0", "+1", "+5", "+6"])

    expected = np.full((SECONDS * FREQUENCY, 2), np.nan)
    expected[: 2 * FREQUENCY] = signals[: 2 * FREQUENCY]
    expected[5 * FREQUENCY : 7 * FREQUENCY] = signals[2 * FREQUENCY :]
    same(series(tmp_path)[0], expected, 1e-3)


def test_a_gap_may_begin_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Half a second late: the records' samples fall into two steps each."""
    signals = leads(3)
    write(tmp_path, save_edf(tmp_path, signals))
    discontinuous(tmp_path / "rec.edf", ["+0", "+4.5", "+5.5"])

    expected = np.full((SECONDS * FREQUENCY, 2), np.nan)
    expected[:FREQUENCY] = signals[:FREQUENCY]
    expected[4 * FREQUENCY + FREQUENCY // 2 :][: 2 * FREQUENCY] = signals[FREQUENCY:]
    same(series(tmp_path)[0], expected, 1e-3)


@pytest.mark.parametrize(
    ("begins", "said"),
    [
        (["+0", "+0.5", "+2"], "record 1 begins before the one before is over"),
        (["+5", "+6", "+1"], "record 2 begins before the one before is over"),
        (["+0", "", "+2"], "record 1 does not say when it begins"),
        (["+0", "1", "+2"], "record 1 does not say when it begins"),
    ],
)
def test_times_that_cannot_be_are_refused(tmp_path: Path, begins: list[str], said: str) -> None:
    """Overlapping, backwards, or not there."""
    write(tmp_path, save_edf(tmp_path, leads(3)))
    discontinuous(tmp_path / "rec.edf", begins)

    assert said in refusal(tmp_path)


def test_a_recording_with_gaps_has_its_patient_looked_at_too(tmp_path: Path) -> None:
    """The header that pyedflib gets is the file's own but for the one letter."""
    write(tmp_path, save_edf(tmp_path, leads(3), patientname="Doe"))
    discontinuous(tmp_path / "rec.edf", ["+0", "+1", "+4"])

    assert "holds what identifies patients: 'patientname'" in refusal(tmp_path)


@few
@given(damage=damages)
def test_a_damaged_recording_with_gaps_is_refused_or_what_the_bytes_say(tmp_path: Path, damage: Damage) -> None:
    """Times are read from the records, whatever became of them; a file that is cut is refused."""
    path = tmp_path / save_edf(tmp_path, leads(5))
    discontinuous(path, ["+0", "+1", "+4", "+6", "+9"])
    path.write_bytes(damage(path.read_bytes()))
    write(tmp_path, path.name)

    found = outcome(lambda: series(tmp_path), path)

    if found is not None:
        data = path.read_bytes()
        told = [float(begin) for begin in re.findall(rb"([+-]\d+(?:\.\d+)?)\x14\x14\0", data[256 * 4 :])]
        samples = samples_of_edf(path)
        if len(told) != 5 or len(samples) != 5 * FREQUENCY or data[192:197] != b"EDF+D" or float(data[244:252]) != 1:
            return  # the header describes another recording now
        expected = np.full((SECONDS * FREQUENCY, 2), np.nan)
        for number, begin in enumerate(told):
            place = round((begin - told[0]) * FREQUENCY)
            part = expected[place : place + FREQUENCY]
            part[:] = samples[number * FREQUENCY :][: len(part)]
        same(found[0], expected)
