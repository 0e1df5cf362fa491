"""Measurements in long form: binned and masked as the schema says, and refused with which words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from client.records import series
from client.records.manifest import read_manifest
from client.records.report import describe, summarise
from client.records.series import elapsed
from client.records.tabular import Table, checked_table, read_table
from shared_models.errors import RecordsError
from shared_models.tasks import ICU_MORTALITY, Choice, Numeric, SeriesInput, Task

TASK = Task(
    name="stays",
    description="Small enough to read.",
    input=SeriesInput(
        variables=(
            Numeric(name="pulse", unit="1/min", low=0, high=200),
            Numeric(name="fluid", unit="mL", low=0, high=1000, within_step="sum"),
            Numeric(name="warmth", unit="degC", low=20, high=40, within_step="mean"),
        ),
        steps=4,
        step_unit="hour",
    ),
    heads=(Choice(name="outcome", classes=("well", "ill")),),
)
MANIFEST: dict[str, Any] = {
    "task": "stays",
    "file": "stays.csv",
    "label": "outcome",
    "patient": "person",
    "validation_fraction": 0.0,
    "columns": {"pulse": "HR"},
}
LONG: dict[str, Any] = {"file": "measured.csv", "record": "stay", "time": "at", "variable": "name", "value": "value"}
STAYS = ["stay,person,outcome", "s1,a,well", "s2,b,ill", "s3,a,ill"]
MEASURED = [
    "stay,at,name,value",
    "s1,0.5,HR,50",
    "s1,0.2,HR,150",  # earlier in the same step: the last counts
    "s1,2,HR,100",
    "s2,1,fluid,100",
    "s2,1.9,fluid,150",
    "s3,3,warmth,30",
    "s3,3.5,warmth,40",
]


def write(
    folder: Path, measured: Sequence[str] = MEASURED, stays: Sequence[str] = STAYS, long: Any = None, **changes: Any
) -> Path:
    """Write manifest, stays and measurements."""
    manifest = {
        key: value for key, value in (MANIFEST | {"series": LONG | (long or {})} | changes).items() if value is not None
    }
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    (folder / "stays.csv").write_text("\n".join([*stays, ""]), encoding="utf-8")
    (folder / "measured.csv").write_text("\n".join([*measured, ""]), encoding="utf-8")
    return folder


def read(folder: Path) -> Table:
    """The checked table."""
    return checked_table(read_manifest(folder), TASK)


def refusal(folder: Path) -> str:
    """The words with which a folder is refused, on one line."""
    with pytest.raises(RecordsError) as caught:
        read(folder)
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return str(caught.value)


def test_measurements_become_values_mask_and_time_since_last_seen(tmp_path: Path) -> None:
    """The last, the sum, the mean of a step, encoded on the public range; times as the schema says."""
    write(tmp_path)

    records, _ = read_table(read_manifest(tmp_path), TASK, split_key=b"key")

    values, mask, since = records.inputs[:].numpy().reshape(3, 4, 3, 3).transpose(2, 0, 3, 1)  # record, variable, step
    assert values[0].tolist() == [[-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]  # 50 of 0..200, then 100: the middle
    assert mask[0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert values[1, 1].tolist() == [0, -1, 0, 0]  # 100 + 150 of 0..1000
    assert values[2, 2].tolist() == [0, 0, 0, 1]  # mean 35 of 20..40 is 1
    assert since[0].tolist() == [[0, 1, 2, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert records.patients.tolist() == [0, 1, 0]
    assert records.targets[:].tolist() == [0, 1, 1]


@examples(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 9), parquet=st.booleans())
def test_the_parts_in_which_a_file_is_read_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, at_once: int, parquet: bool
) -> None:
    """Against one plain loop over all measurements: whatever the order of rows, ties, and sizes of parts."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(seed)
    count = 30
    frame = pd.DataFrame(
        {
            "stay": rng.choice(["s1", "s2", "s3", "s9"], count),
            "at": rng.integers(-2, 10, count) / 2,
            "name": rng.choice(["HR", "fluid", "warmth", "other"], count),
            "value": rng.integers(20, 41, count),
        }
    )
    write(folder, long={"file": "measured.parquet" if parquet else "measured.csv"}, incomplete_rows="leave-out")
    frame.to_parquet(folder / "measured.parquet")
    frame.to_csv(folder / "measured.csv", index=False)
    manifest = read_manifest(folder)
    assert manifest.series is not None
    manifest = manifest.model_copy(
        update={"series": manifest.series.model_copy(update={"absent_variables": ("pulse", "fluid", "warmth")})}
    )
    expected: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for row in frame.itertuples():
        if row.stay != "s9" and row.name != "other" and 0 <= row.at < 4:
            cell = ("s1", "s2", "s3").index(row.stay), int(row.at), ("HR", "fluid", "warmth").index(row.name)
            expected.setdefault(cell, []).append((row.at, row.value))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(series, "_AT_ONCE", at_once)
        stays = pd.read_csv(folder / "stays.csv", dtype=str)
        _, found = series.read_long_form(manifest, TASK.input, stays)  # type: ignore[arg-type]

    values, mask = found[:][:, :, :3], found[:][:, :, 3:6]
    assert {tuple(cell) for cell in np.argwhere(mask).tolist()} == set(expected)
    for cell, measured in expected.items():
        what = (
            max(enumerate(measured), key=lambda m: (m[1][0], m[0]))[1][1],
            sum(value for _, value in measured),
            sum(value for _, value in measured) / len(measured),
        )[cell[2]]
        variable = TASK.input.variables[cell[2]]  # type: ignore[union-attr]
        np.testing.assert_allclose(values[cell], variable.scaled(np.array(what)), rtol=1e-6, atol=1e-6)


def test_times_of_day_count_from_the_rows_start(tmp_path: Path) -> None:
    """ISO 8601, with and without zones; a measurement before the start or after the last step is left aside."""
    stays = ["stay,person,outcome,in", "s1,a,well,2020-01-01T22:30:00+01:00", "s2,b,ill,2020-06-01 00:00"]
    measured = [
        "stay,at,name,value",
        "s1,2020-01-01T21:30:00Z,HR,50",  # at the very start
        "s1,2020-01-02 01:29:59Z,HR,60",  # in the last second of the last step
        "s1,2020-01-02 01:30:00Z,HR,70",
        "s2,2020-05-31T23:59,HR,80",
        "s2,2020-06-01T01:00,HR,90",
    ]
    write(tmp_path, measured, stays, long={"start": "in", "absent_variables": ["fluid", "warmth"]})

    table = read(tmp_path)

    assert table.content[:][:, :, 3].tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]
    assert table.set_aside["at other times"] == 2


def test_what_is_left_aside_is_counted_and_shown(tmp_path: Path) -> None:
    """Other records, other variables, empty values, out of range where the manifest says so; and empty stays."""
    more = ["s9,1,HR,50", "s1,1,shoe size,42", "s1,1,HR,", "s1,1,HR,?", "s1,9,HR,50", "s1,1,HR,735", "s2,1,fluid,900"]
    stays = [*STAYS, "s4,c,well"]
    write(
        tmp_path, [*MEASURED, *more], stays, missing_values=["?"], out_of_range="leave-out", incomplete_rows="leave-out"
    )

    table = read(tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("client.records.report.find_task", lambda _name: TASK)
        summary = summarise(tmp_path)
        describe(summarise(tmp_path))

    assert table.set_aside == {
        "of other records": 1,
        "of other variables": 1,
        "missing": 2,
        "at other times": 1,
        "out of range": 2,  # a pulse of 735; and a sum of 1150 mL, whose step is masked
    }
    assert table.left_out == 2  # s4, and s2, whose only value was that sum
    assert table.patients.ids == ["a", "a"]
    pulse = summary.columns[0]
    assert (pulse.missing, pulse.found, pulse.public) == (4 * 2 - 2, "50 to 150", "0 to 200 1/min")


@pytest.mark.parametrize(
    ("measured", "stays", "changes", "words"),
    [
        ([*MEASURED, "s1,1,HR,735"], STAYS, {}, "measured.csv, row 9, column 'value': pulse is outside the public"),
        ([*MEASURED, "s1,1,HR,fast"], STAYS, {}, "row 9, column 'value': is not a number (1/min expected)"),
        ([*MEASURED, "s1,1,HR,nan"], STAYS, {}, "row 9, column 'value': is not a number"),
        ([*MEASURED, "s1,noon,HR,1"], STAYS, {}, "row 9, column 'at': is not a time (hour expected)"),
        ([*MEASURED, "s1,inf,HR,1"], STAYS, {}, "row 9, column 'at': is not a time"),
        ([*MEASURED, "", "s2,1,fluid,900"], STAYS, {}, "the sum of fluid in one step is outside the public range"),
        (MEASURED[:-2], STAYS, {}, "has no measurement of warmth"),
        (MEASURED, [*STAYS, "s1,c,ill"], {}, "stays.csv, row 5, column 'stay': an earlier row has this key"),
        (MEASURED, [*STAYS, "s4,c,ill"], {}, "row 5, column 'stay': the record has no measurement that can be used"),
        (MEASURED, STAYS, {"long": {"time": "when"}}, "measured.csv has no column 'when'"),
        (MEASURED, STAYS, {"long": {"record": "visit"}}, "stays.csv has no column 'visit'"),
        (MEASURED, STAYS, {"long": {"start": "stay"}}, "row 2, column 'stay': is no ISO 8601 time"),
        (MEASURED, STAYS, {"columns": {"puls": "HR"}}, "not in the schema of stays: columns.puls"),
        (MEASURED, STAYS, {"long": {"absent_variables": ["x"]}}, "series.absent_variables: x"),
        (["stay,at,name,value,Patient Name", "s1,1,HR,50,Hans"], STAYS, {}, "identifies patients: 'Patient Name'"),
        (MEASURED, ["stay,person,outcome,MRN", "s1,a,well,17"], {}, "stays.csv holds what identifies patients: 'MRN'"),
        ([], STAYS, {}, "measured.csv"),
        (["stay,at,name,value"], STAYS, {}, "measured.csv"),
        ([*MEASURED, "s1,1,HR,50,5"], STAYS, {}, "measured.csv cannot be read: "),  # a decimal comma
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tmp_path: Path, measured: list[str], stays: list[str], changes: dict[str, Any], words: str
) -> None:
    """File, row and column; never a value."""
    text = refusal(write(tmp_path, measured, stays, **changes))

    assert words in text
    assert "735" not in text
    assert "Hans" not in text


def test_time_since_last_seen_is_that_of_its_source() -> None:
    """Che et al. 2018, figure 2: observed at the steps 1, 2 and 4 of four."""
    mask = np.array([1, 1, 0, 1], dtype=bool)[None, :, None]

    assert elapsed(mask).ravel().tolist() == [0, 1, 1, 2]


def test_intensive_care_has_public_ranges_for_every_variable() -> None:
    """37 variables of the challenge and the age, over 48 hours; ordinary values are inside, unit errors outside."""
    assert isinstance(ICU_MORTALITY.input, SeriesInput)
    ranges = {variable.name: (variable.low, variable.high) for variable in ICU_MORTALITY.input.variables}

    assert (len(ranges), ICU_MORTALITY.input.steps) == (38, 48)
    for name, usual, error in (("ph", 7.4, 735), ("temperature", 36.6, -17.8), ("inspired_oxygen", 0.4, 40)):
        low, high = ranges[name]
        assert low < usual < high
        assert not low <= error <= high


@examples(max_examples=100, deadline=None)
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4))
def test_a_damaged_file_is_an_error_or_inside_the_public_ranges(
    tmp_path_factory: pytest.TempPathFactory, cut: float, flips: list[tuple[float, int]]
) -> None:
    """Text has no checksum: what passes has known variables and values that are possible."""
    folder = write(tmp_path_factory.mktemp("records"))
    data = bytearray((folder / "measured.csv").read_bytes())
    for place, change in flips:
        data[int(place * (len(data) - 1))] ^= change
    (folder / "measured.csv").write_bytes(data if flips else data[: int(cut * len(data))])

    try:
        table: Table | None = read(folder)
    except RecordsError as error:
        if str(folder) not in str(error):
            raise
        table = None

    assert table is None or np.abs(table.content[:][:, :, :3]).max() <= 2


def test_dates_far_apart_do_not_wrap_around(tmp_path: Path) -> None:
    """584 years are 2**64 nanoseconds: a birthday given as 1677 must not become an hour of the stay."""
    stays = ["stay,person,outcome,in", "s1,a,well,2262-01-01T00:00:00"]
    measured = ["stay,at,name,value", "s1,1677-09-22T00:00:00,HR,50", "s1,2262-01-01T01:00:00,HR,60"]
    write(tmp_path, measured, stays, long={"start": "in", "absent_variables": ["fluid", "warmth"]})

    assert read(tmp_path).content[:][0, :, 3].tolist() == [0, 1, 0, 0]
