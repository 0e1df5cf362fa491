"""Recordings in WFDB and EDF, written by their own libraries: resampled, checked, and refused with which words."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyedflib
import pytest
import tomli_w
import wfdb
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.records.manifest import read_manifest
from client.records.population import Source
from client.records.tabular import Table, checked_table
from shared_models.errors import RecordsError
from shared_models.tasks import Choice, Numeric, SeriesInput, Task
from tests.client.test_population import settings

TASK = Task(
    name="beats",
    description="Small enough to read.",
    input=SeriesInput(
        variables=(
            Numeric(name="lead_i", unit="mV", low=-5, high=5, within_step="mean"),
            Numeric(name="lead_ii", unit="mV", low=-5, high=5),
        ),
        steps=10,
        step_unit="second",
    ),
    heads=(Choice(name="rhythm", classes=("sinus", "other")),),
)
MANIFEST: dict[str, Any] = {
    "task": "beats",
    "file": "index.csv",
    "label": "rhythm",
    "patient": "patient",
    "validation_fraction": 0.0,
    "columns": {"signals": "path", "lead_i": "I", "lead_ii": "II"},
}
FREQUENCY = 8


def write(folder: Path, *paths: str, **changes: Any) -> Path:
    """Write index and manifest; the patients are p0, p1, ..."""
    manifest = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    rows = [f"p{number},{path},sinus" for number, path in enumerate(paths)]
    (folder / "index.csv").write_text("\n".join(["patient,path,rhythm", *rows, ""]), encoding="utf-8")
    return folder


def read(folder: Path) -> Table:
    """The checked table."""
    return checked_table(read_manifest(folder), TASK)


def series(folder: Path) -> NDArray[np.float32]:
    """All series, read on demand, shape ``(n, steps, 6)``."""
    found = read(folder).content
    assert found is not None
    inputs: NDArray[np.float32] = found[:]
    return inputs


def refusal(folder: Path) -> str:
    """The words with which a folder is refused, on one line."""
    with pytest.raises(RecordsError) as caught:
        read(folder)
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return f"{caught.value} | {caught.value.hint}"


def leads(seconds: int = 10) -> NDArray[np.float64]:
    """Two leads in mV, shape ``(samples, 2)``, of values that 16 bits at 1000 per mV hold exactly."""
    return np.random.default_rng(0).integers(-2000, 2000, (seconds * FREQUENCY, 2)) / 1000


def save_wfdb(folder: Path, signals: NDArray[np.float64], comments: Any = None, units: Any = None) -> str:
    """Save as ``rec.hea`` and ``rec.dat``."""
    wfdb.wrsamp(
        "rec", fs=FREQUENCY, units=units or ["mV", "mV"], sig_name=["I", "II"], p_signal=signals, fmt=["16", "16"],
        adc_gain=[1000, 1000], baseline=[0, 0], comments=comments, write_dir=str(folder),
    )  # fmt: skip
    return "rec.hea"


def save_edf(
    folder: Path,
    signals: NDArray[np.float64],
    unit: str = "mV",
    file_type: int = pyedflib.FILETYPE_EDFPLUS,
    **header: Any,
) -> str:
    """Save as ``rec.edf``, one record of a second after the other."""
    with pyedflib.EdfWriter(str(folder / "rec.edf"), 2, file_type=file_type) as file:
        file.setHeader(
            {
                "technician": "", "recording_additional": "", "patientname": "", "patient_additional": "",
                "patientcode": "", "equipment": "", "admincode": "", "sex": "", "startdate": None, "birthdate": "",
            } | {"startdate": __import__("datetime").datetime(2020, 1, 1)} | header
        )  # fmt: skip
        for number, name in enumerate(("I", "II")):
            file.setSignalHeader(
                number,
                {
                    "label": name, "dimension": unit, "sample_frequency": FREQUENCY, "physical_max": 32.767,
                    "physical_min": -32.768, "digital_max": 32767, "digital_min": -32768, "transducer": "",
                    "prefilter": "",
                },
            )  # fmt: skip
        file.writeSamples([np.ascontiguousarray(signals[:, 0]), np.ascontiguousarray(signals[:, 1])])
    return "rec.edf"


def binned(signals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of lead I and the last of lead II in each second, on the public range, shape ``(10, 2)``."""
    seconds = signals.reshape(-1, FREQUENCY, 2)[:10]
    return np.stack([seconds[:, :, 0].mean(axis=1), seconds[:, -1, 1]], axis=1) * 4 / 10


def test_both_formats_hold_the_same_series(tmp_path: Path) -> None:
    """What was written, in both; 12 seconds of which the task takes ten."""
    signals = leads(12)
    write(tmp_path, save_wfdb(tmp_path, signals), save_edf(tmp_path, signals))

    table = read(tmp_path)

    inputs = series(tmp_path)
    np.testing.assert_allclose(inputs[0, :, :2], binned(signals), atol=1e-6)
    np.testing.assert_allclose(inputs[1, :, :2], binned(signals), atol=1e-3)  # one digital step is 0.001 mV
    assert (inputs[:, :, 2:4] == 1).all()
    assert table.set_aside["at other times"] == 2 * 2 * 2 * FREQUENCY
    assert {path.name for path in table.files} == {"rec.hea", "rec.dat", "rec.edf"}


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    """A test file of pyedflib's: eleven channels at 200 samples per second, in microvolts."""
    shutil.copy(Path(pyedflib.__file__).parent / "tests" / "data" / "test_generator.edf", tmp_path / "a.edf")
    drop = ["patientname", "patientcode", "birthdate", "patient_additional", "admincode"]
    columns = {"signals": "path", "lead_i": "squarewave", "lead_ii": "ramp"}

    table = read(write(tmp_path, "a.edf", columns=columns, drop=drop))

    assert series(tmp_path).shape == (1, 10, 6)
    assert table.seen["lead_i"][1:] == pytest.approx((-0.1, 0.1), abs=1e-4)  # +-100 uV, in mV


def test_channels_may_have_frequencies_of_their_own(tmp_path: Path) -> None:
    """Two samples per frame of one, one of the other; a channel slower than a step leaves steps masked."""
    quick, slow = np.arange(20) / 10, np.arange(5) / 10
    for name, samples, frequency in (("quick", quick, 2), ("slow", slow, 0.5)):
        wfdb.wrsamp(
            name, fs=frequency, units=["mV"], sig_name=["I"], p_signal=samples[:, None], fmt=["16"],
            adc_gain=[1000], baseline=[0], write_dir=str(tmp_path),
        )  # fmt: skip
    one = TASK.input.model_copy(update={"variables": TASK.input.variables[:1]})  # type: ignore[union-attr]
    task = TASK.model_copy(update={"input": one})
    write(tmp_path, "quick.hea", "slow.hea", columns={"signals": "path", "lead_i": "I"})

    found = checked_table(read_manifest(tmp_path), task).content
    assert found is not None
    values, mask = found[:].transpose(2, 0, 1)[:2]

    np.testing.assert_allclose(values[0], quick.reshape(10, 2).mean(axis=1) * 0.4, atol=1e-6)
    assert mask.tolist() == [[1] * 10, [1, 0] * 5]
    np.testing.assert_allclose(values[1, ::2], slow * 0.4, atol=1e-6)


def test_samples_that_are_missing_or_out_of_range_are_masked_and_counted(tmp_path: Path) -> None:
    """WFDB marks invalid samples; an electrode that fell off is out of range."""
    signals = leads()
    signals[:FREQUENCY, 0] = np.nan
    signals[FREQUENCY : 2 * FREQUENCY, 0] = 30
    write(tmp_path, save_wfdb(tmp_path, signals))
    assert "rec.hea, sample 8 of channel 'I': is outside the public range -5 to 5 mV (and 7 more" in refusal(tmp_path)

    table = read(write(tmp_path, "rec.hea", out_of_range="leave-out"))

    assert series(tmp_path)[0, :, 2].tolist() == [0, 0] + [1] * 8
    assert (table.set_aside["missing"], table.set_aside["out of range"]) == (FREQUENCY, FREQUENCY)


def test_volts_are_converted_and_other_units_refused(tmp_path: Path) -> None:
    """A file in microvolts is a thousand times larger; one in mmHg is something else."""
    signals = leads() / 1000
    write(tmp_path, save_edf(tmp_path, leads(), unit="uV"))
    np.testing.assert_allclose(series(tmp_path)[0, :, :2], binned(signals), atol=1e-6)

    write(tmp_path, save_wfdb(tmp_path, leads(), units=["mmHg", "mV"]))
    assert "channel 'I' is in mmHg, the task in mV" in refusal(tmp_path)


def test_headers_that_identify_a_patient_are_refused_unless_dropped(tmp_path: Path) -> None:
    """WFDB's comments and EDF's patient field; a patient code that is the row's own is a pseudonym, and a check."""
    save_wfdb(tmp_path, leads(), comments=["<age>: 60  <sex>: M", "Patient name: Hans Miller"])
    text = refusal(write(tmp_path, "rec.hea"))
    assert "rec.hea holds what identifies patients: 'Patient name'" in text
    assert "Miller" not in text
    assert len(read(write(tmp_path, "rec.hea", drop=["Patient name", "name"])).patients.ids) == 1

    save_edf(tmp_path, leads(), patientname="Hans Miller", patientcode="p0", birthdate=None or "")
    text = refusal(write(tmp_path, "rec.edf"))
    assert "rec.edf holds what identifies patients: 'patientname'" in text
    assert "Miller" not in text
    assert len(read(write(tmp_path, "rec.edf", drop=["patientname"])).patients.ids) == 1
    (tmp_path / "index.csv").write_text("patient,path,rhythm\np9,rec.edf,sinus\n", encoding="utf-8")
    assert "rec.edf: the patient code is not the patient that the row names" in refusal(tmp_path)

    legacy = Path(pyedflib.__file__).parent / "tests" / "data" / "test_legacy.edf"
    shutil.copy(legacy, tmp_path / "old.edf")
    assert "old.edf holds what identifies patients: 'patient'" in refusal(write(tmp_path, "old.edf"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Missing, elsewhere, of another kind, without the channel, or not the samples that the header was made for."""
    save_wfdb(tmp_path, leads())
    header = (tmp_path / "rec.hea").read_text(encoding="ascii")
    assert "none.hea cannot be read" in refusal(write(tmp_path, "none.hea"))
    assert "leads out of the folder" in refusal(write(tmp_path, "../rec.hea"))
    assert "rec.dat is of no kind that is read" in refusal(write(tmp_path, "rec.dat"))
    assert "has no channel 'V1'" in refusal(
        write(tmp_path, "rec.hea", columns={"signals": "path", "lead_i": "V1", "lead_ii": "II"})
    )
    write(tmp_path, "rec.hea")
    (tmp_path / "rec.hea").write_text(header.replace("rec.dat", "../rec.dat"), encoding="ascii")
    assert "rec.hea cannot be read" in refusal(tmp_path)
    (tmp_path / "rec.hea").write_text(header, encoding="ascii")
    samples = bytearray((tmp_path / "rec.dat").read_bytes())
    samples[0] ^= 1
    (tmp_path / "rec.dat").write_bytes(samples)
    assert "do not agree with the header's checksum" in refusal(tmp_path)
    (tmp_path / "rec.dat").unlink()
    assert "rec.dat cannot be read: No such file" in refusal(tmp_path)


def test_a_recording_is_read_again_when_it_is_drawn(tmp_path: Path) -> None:
    """Nothing of it stays in memory where the settings say so; one that is gone by then is NaN, and raises nothing."""
    own = settings(tmp_path).model_copy(update={"records_memory_mb": 0})
    names = save_wfdb(own.records, leads()), save_edf(own.records, leads())
    write(own.records, *names, absent_classes=["other"])
    expected = series(own.records)

    records = Source(TASK).current(own).training
    before = records.inputs[:]
    (own.records / "rec.dat").unlink()
    after = records.inputs[:]

    np.testing.assert_array_equal(before, expected)
    assert after[0].isnan().all()
    np.testing.assert_array_equal(after[1], expected[1])


@examples(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["rec.hea", "rec.dat", "rec.edf"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.floats(0, 1), max_size=3),
)
def test_a_damaged_recording_is_an_error_or_inside_its_public_range(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, cut: float, flips: list[float]
) -> None:
    """Cut samples are an error, a changed byte of them too where there is a checksum; no traceback, nothing is printed.

    The checksum is a sum modulo 2**16: what two changed bytes add and take away may cancel.
    """
    save_wfdb(tmp_path, leads())
    save_edf(tmp_path, leads())
    data = bytearray((tmp_path / name).read_bytes())
    whole = bytes(data)
    for flip in flips:
        data[int(flip * (len(data) - 1))] ^= 0x15
    (tmp_path / name).write_bytes(data if flips else data[: int(cut * (len(data) - 1))])
    write(tmp_path, "rec.edf" if name == "rec.edf" else "rec.hea")

    try:
        found: NDArray[np.float32] | None = series(tmp_path)
    except RecordsError as error:
        if str(tmp_path) not in str(error):
            raise
        found = None

    if found is not None:
        values = found[:, :, :2]
        assert np.isfinite(values).all()
        assert np.abs(values).max() <= 2
        if name != "rec.edf" and sum(now != then for now, then in zip(data, whole, strict=True)) == 1:
            assert name == "rec.hea"  # its names, comments and times can change; its samples can not
        if not flips:
            assert name == "rec.hea"  # a header cut into its last comment or checksum
    assert capfd.readouterr() == ("", "")
