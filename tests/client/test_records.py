"""Tables on disk: what is read, how patients are kept apart, and what is refused with which words."""

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.report import describe, summarise
from client.records.tabular import checked_table, read_table, split_table
from shared_models.errors import FederationError, RecordsError
from shared_models.plan import Fold
from shared_models.tasks import HEART_DISEASE, Categorical, Choice, Numeric, TableInput, Task, TokensInput

KEY = b"the key of a test"
TASK = Task(
    name="small",
    description="Small enough to read.",
    input=TableInput(
        columns=(
            Numeric(name="age", unit="year", low=0, high=100),
            Categorical(name="stage", categories=("i", "ii", "iii")),
        )
    ),
    heads=(Choice(name="outcome", classes=("well", "ill")),),
)
MANIFEST: dict[str, Any] = {
    "task": "small",
    "file": "data.csv",
    "label": "outcome",
    "patient": "id",
    "validation_fraction": 0.0,
    "categories": {"stage": {"1": "i", "2": "ii", "3": "iii"}},
}
ROWS = ["id,age,stage,outcome", "a,0,1,well", "b,50,2,ill", "a,100,3,ill"]


def write(folder: Path, rows: list[str] | None = None, **changes: Any) -> Path:
    """Write a records folder; a change to None leaves the key out of the manifest."""
    manifest = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    (folder / "data.csv").write_text("\n".join(ROWS if rows is None else rows) + "\n", encoding="utf-8")
    return folder


def read(folder: Path, task: Task = TASK) -> tuple[Records, Records]:
    """Training and validation part of a records folder."""
    return read_table(read_manifest(folder), task, split_key=KEY)


def refusal(folder: Path, task: Task = TASK) -> str:
    """The words with which a records folder is refused."""
    with pytest.raises(RecordsError) as caught:
        read(folder, task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_table_becomes_the_tensors_that_the_schema_says(tmp_path: Path) -> None:
    """Numbers on the public range, indicators without the reference, targets as class index, patients by id."""
    records, validation = read(write(tmp_path))

    assert records.inputs[:].tolist() == [[-2, 0, 0], [0, 1, 0], [2, 0, 1]]
    assert records.inputs[:].dtype == records.targets[:].dtype == torch.float32
    assert records.targets[:].tolist() == [0, 1, 1]
    assert records.patients.tolist() == [0, 1, 0]
    assert (records.patient_count, len(validation)) == (2, 0)


def test_more_than_two_classes_become_class_numbers(tmp_path: Path) -> None:
    """Cross-entropy wants int64 targets."""
    task = TASK.model_copy(update={"heads": (Choice(name="outcome", classes=("well", "ill", "dead")),)})

    records, _ = read(write(tmp_path, [*ROWS, "c,1,1,dead"]), task)

    assert records.targets[:].tolist() == [0, 1, 1, 2]
    assert records.targets[:].dtype == torch.int64


def test_a_parquet_file_reads_like_the_csv(tmp_path: Path) -> None:
    """Typed columns, codes as whole numbers or as floats, and a file's own column names give the same tensors."""
    write(tmp_path, file="data.parquet", columns={"age": "Age (years)", "stage": "Stage"})
    frame = pd.DataFrame(
        {"id": [7, 8, 7], "Age (years)": [0, 50, 100], "Stage": [1.0, 2.0, 3.0], "outcome": ["well", "ill", "ill"]}
    )
    frame.to_parquet(tmp_path / "data.parquet")
    parquet, _ = read(tmp_path)

    csv, _ = read(write(tmp_path))

    assert torch.equal(parquet.inputs[:], csv.inputs[:])
    assert torch.equal(parquet.targets[:], csv.targets[:])
    assert parquet.patients.tolist() == csv.patients.tolist()


# patients


@given(
    fraction=st.floats(0.1, 0.9),
    patients=st.sets(st.integers(0, 10**6), min_size=30, max_size=60),
    newcomer=st.integers(10**6 + 1, 10**7),
)
def test_adding_a_patient_moves_nobody_else(
    tmp_path_factory: pytest.TempPathFactory, fraction: float, patients: set[int], newcomer: int
) -> None:
    """The part that a patient is in depends on the id and the key alone, and all rows of a patient are in one part."""
    folder = tmp_path_factory.mktemp("records")

    def ages(part: Records) -> set[float]:
        return set(part.inputs[:][:, 0].tolist())

    def split(ids: list[int]) -> tuple[set[float], set[float]]:
        # The age stands for the patient, so that we see who went where; each patient has a well and an ill record.
        lines = [f"{i},{i / 1e5:.5f},1,{outcome}" for i in ids for outcome in ("well", "ill")]
        training, validation = read(write(folder, [ROWS[0], *lines], validation_fraction=fraction))
        return ages(training), ages(validation)

    try:
        before, after = split(sorted(patients)), split([newcomer, *sorted(patients, reverse=True)])
    except RecordsError:
        return  # so few patients that one part is empty, and so without a class: refused, rightly

    assert not before[0] & before[1]
    assert before[0] <= after[0]
    assert before[1] <= after[1]


def test_the_split_depends_on_the_key_and_keeps_its_proportion(tmp_path: Path) -> None:
    """Two hospitals hold out different patients; of 2000 about a third (five standard deviations: 105)."""
    lines = [f"p{i},{i % 100},1,{('well', 'ill')[i % 2]}" for i in range(2000)]
    manifest = read_manifest(write(tmp_path, [ROWS[0], *lines], validation_fraction=1 / 3))

    one, other = (read_table(manifest, TASK, split_key=key)[1] for key in (b"one", b"other"))

    assert abs(len(one) - 667) < 105
    assert one.inputs[:].tolist() != other.inputs[:].tolist()


def test_folds_share_out_the_patients(tmp_path: Path) -> None:
    """Each patient validates in one fold and trains in all others; a fold keeps its size (five deviations: 90)."""
    lines = [f"p{i},{i / 20},1,{('well', 'ill')[i % 2]}" for i in range(2000)]
    manifest = read_manifest(write(tmp_path, [ROWS[0], *lines], validation_fraction=0.9))
    table = checked_table(manifest, TASK)

    def ages(records: Records) -> set[float]:
        return set(records.inputs[:][:, 0].tolist())

    parts = [
        tuple(map(ages, split_table(table, manifest, TASK, split_key=KEY, fold=Fold(index=i, count=5))))
        for i in range(1, 6)
    ]

    assert sum(len(validation) for _, validation in parts) == 2000
    assert set.union(*(validation for _, validation in parts)) == set.union(*(training for training, _ in parts))
    for training, validation in parts:
        assert training.isdisjoint(validation)
        assert len(training) + len(validation) == 2000
        assert abs(len(validation) - 400) < 90


@pytest.mark.parametrize("alike", ["validation", "training"])
def test_a_fold_may_lack_a_class_but_training_may_not(tmp_path: Path, alike: str) -> None:
    """Nobody chose who is in a fold; a hospital whose training part lacks a class has to declare that, as ever."""
    fold = Fold(index=1, count=2)
    inside = {f"p{i}": hmac.digest(KEY, f"p{i}".encode(), "sha256")[0] < 128 for i in range(40)}
    classes = {i: "well" if held_out == (alike == "validation") else "ill" for i, held_out in inside.items()}
    others = [i for i, held_out in inside.items() if held_out != (alike == "validation")]
    classes[others[0]] = "well"
    manifest = read_manifest(write(tmp_path, [ROWS[0], *(f"{i},1,1,{name}" for i, name in classes.items())]))
    table = checked_table(manifest, TASK)

    if alike == "training":
        with pytest.raises(RecordsError, match="'ill' in the training part"):
            split_table(table, manifest, TASK, split_key=KEY, fold=fold)
        return
    _, validation = split_table(table, manifest, TASK, split_key=KEY, fold=fold)

    assert len(validation) == sum(inside.values())
    assert validation.targets[:].sum() == 0


def test_without_a_patient_column_every_row_is_declared_a_patient(tmp_path: Path) -> None:
    """Also rows that are equal: the declaration is explicit, and check-data counts such rows."""
    rows = ["age,stage,outcome", "1,1,well", "1,1,well", "2,2,ill"]
    folder = write(tmp_path, rows, patient=None, one_row_per_patient=True)

    records, _ = read(folder)

    assert records.patients.tolist() == [0, 1, 2]


def test_a_repeated_id_breaks_the_promise_of_one_row_per_patient(tmp_path: Path) -> None:
    """With an id column the promise is checked; the later row is named."""
    text = refusal(write(tmp_path, one_row_per_patient=True))

    assert "row 4, column 'id', value 'a': the patient has an earlier row" in text


# refusals: file, row, column, value, and how many more


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c,101,1,well", "row 5, column 'age', value '101': is outside the public range 0 to 100 year"),
        ("c,-0.1,1,well", "value '-0.1': is outside the public range"),
        ("c,old,1,well", "row 5, column 'age', value 'old': is not a number (year expected)"),
        ("c,True,1,well", "value 'True': is not a number"),
        ('c,"1,5",1,well', "value '1,5': is not a number"),
        ("c,NaN,1,well", "value 'NaN': is not a finite number"),
        ("c,-inf,1,well", "value '-inf': is not a finite number"),
        ("c,1e999,1,well", "value '1e999': is not a finite number"),
        ("c,,1,well", "row 5, column 'age', value '': the value is missing"),
        ("c,1,4,well", "row 5, column 'stage', value '4': is none of i, ii, iii"),
        ("c,1,1,unwell", "row 5, column 'outcome', value 'unwell': is none of well, ill"),
        ("c,1,1,", "column 'outcome', value '': the value is missing"),
        (",1,1,well", "row 5, column 'id', value '': the patient id is missing"),
        ("c,1", "column 'stage', value '': the value is missing"),
    ],
)
def test_a_bad_cell_is_named_with_a_count_of_the_rest(tmp_path: Path, line: str, words: str) -> None:
    """The first one with file, row, column and value; of three there are two more."""
    one = refusal(write(tmp_path, [*ROWS, line]))
    three = refusal(write(tmp_path, [*ROWS, line, ROWS[1], line, line]))

    assert words in one
    assert str(tmp_path / "data.csv") in one
    assert "more like it" not in one
    if not line.startswith(","):
        assert three == f"{one} (and 2 more like it)"


def test_rows_are_counted_as_a_spreadsheet_does(tmp_path: Path) -> None:
    """The header is row 1, and a blank line is a row without a record."""
    rows = [ROWS[0], "", *ROWS[1:], "c,101,1,well"]

    assert "row 6, column 'age'" in refusal(write(tmp_path, rows))


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    """A whole free-text note does not end up in a terminal's scroll-back."""
    assert "value 'xxxx" in (text := refusal(write(tmp_path, [*ROWS, f"c,{'x' * 500},1,well"])))
    assert len(text) < len(str(tmp_path)) + 150


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([True, False, True], "is a truth value"),
        ([1.0, float("inf"), 2.0], "value 'inf': is not a finite number"),
        ([1.0, float("nan"), 2.0], "the value is missing"),
        (pd.to_datetime(["2020-01-01"] * 3), "is not a number"),
    ],
)
def test_a_typed_column_of_the_wrong_type_is_refused(tmp_path: Path, values: Any, words: str) -> None:
    """Parquet columns carry types of their own."""
    write(tmp_path, file="data.parquet")
    frame = pd.DataFrame({"id": ["a", "b", "c"], "age": values, "stage": "i", "outcome": ["well", "ill", "ill"]})
    frame.to_parquet(tmp_path / "data.parquet")

    assert words in refusal(tmp_path)


def test_missing_values_are_left_out_only_where_the_manifest_says_so(tmp_path: Path) -> None:
    """The hospital's own words for "not known" count as missing, and rows that are left out are counted."""
    rows = [*ROWS, "c,unknown,1,well", "d,5,,ill", "e,5,1,ill"]
    changes: dict[str, Any] = {"missing_values": ["unknown"]}
    assert "value 'unknown': the value is missing" in refusal(write(tmp_path, rows, **changes))

    folder = write(tmp_path, rows, **changes, incomplete_rows="leave-out")
    records, _ = read(folder)

    assert (len(records), records.patient_count) == (4, 3)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "data.csv is empty"),
        ([ROWS[0]], "has a header but no records"),
        (["id,age,outcome", "a,1,well"], "has no column 'stage'"),
        (["a;b", "1;2"], "has no column 'age', 'stage', 'outcome', 'id'"),
        (["id,age,age,stage,outcome", "a,1,1,1,well"], "has column 'age' more than once"),
        ([*ROWS, "c,1,1,well,surplus"], "cannot be read: "),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused(tmp_path: Path, rows: list[str], words: str) -> None:
    """Empty, without records, without a column, with one twice, or not a table at all."""
    folder = write(tmp_path, rows)
    if not rows:
        (folder / "data.csv").write_bytes(b"")

    assert words in refusal(folder)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\x01 not UTF-8"])
@pytest.mark.parametrize("file", ["data.csv", "data.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: str, content: bytes | None) -> None:
    """Missing, or no CSV and no Parquet inside."""
    folder = write(tmp_path, file=file)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)

    assert f"{file} {'does not exist' if content is None else 'cannot be read'}" in refusal(folder)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_class_missing_from_a_part_is_refused_unless_declared(tmp_path: Path, part: str) -> None:
    """A hospital that never sees a class says so in its manifest; otherwise it is taken for a mistake."""
    lines = [f"p{i},{i},1,well" for i in range(100)]
    changes = {"validation_fraction": 0.0 if part == "training" else 0.5}
    rows = [ROWS[0], *lines]
    if part == "validation":  # one ill patient whom the key puts into the training part
        name = next(n for n in "abcdefgh" if _in_training(tmp_path, n))
        rows.append(f"{name},1,1,ill")

    assert f"no record of class 'ill' in the {part} part" in refusal(write(tmp_path, rows, **changes))

    training, _ = read(write(tmp_path, rows, **changes, absent_classes=["ill"]))
    assert len(training) > 0


def _in_training(folder: Path, patient: str) -> bool:
    """Whether the test's key puts a patient into the training half."""
    changes = {"validation_fraction": 0.5, "absent_classes": ["well", "ill"]}
    training, _ = read(write(folder, [ROWS[0], f"{patient},1,1,ill"], **changes))
    return len(training) == 1


# the manifest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patient": None}, 'name the patient column (patient = "...") or declare one_row_per_patient = true'),
        ({"file": "../data.csv"}, "file: must be a relative path to a file inside"),
        ({"file": "/etc/passwd.csv"}, "file: must be a relative path to a file inside"),
        ({"file": "data.xlsx"}, "must end in .npz, .csv, .parquet, .jsonl, .sql or .ndjson"),
        ({"file": None}, "file: Field required"),
        ({"validation_fraction": 0.95}, "validation_fraction: "),
        ({"validation_fraction": float("nan")}, "validation_fraction: "),
        ({"pateint": "id"}, "pateint: unknown key"),
        ({"task": "heart-disease"}, "is for task heart-disease, not small"),
        ({"columns": {"agee": "age"}}, "not in the schema of small: columns.agee"),
        ({"categories": {"agee": {"1": "i"}}}, "not in the schema of small: categories.agee"),
        ({"absent_classes": ["dead"]}, "not in the schema of small: absent_classes: dead"),
        ({"drop": ["id"]}, "drop: id is used by label, patient, [columns] or [groups]"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """The manifest's file and key are named."""
    text = refusal(write(tmp_path, **changes))

    assert words in text
    assert "manifest.toml" in text


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    """A records folder that was copied from elsewhere cannot make us read another folder's file."""
    (tmp_path / "records").mkdir()
    (tmp_path / "elsewhere.csv").write_text("\n".join(ROWS), encoding="utf-8")
    folder = write(tmp_path / "records", file="link.csv")
    (folder / "link.csv").symlink_to(tmp_path / "elsewhere.csv")

    assert "inside the manifest's folder" in refusal(folder)


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_text("task = "), lambda path: path.write_bytes(b"\xff")]
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    """Missing, not TOML, not UTF-8."""
    folder = write(tmp_path)
    spoil(folder / "manifest.toml")

    assert "manifest.toml" in refusal(folder)


def test_a_manifest_for_another_kind_of_input_is_refused(tmp_path: Path) -> None:
    """A table's columns cannot answer a task on tokens."""
    tokens = TASK.model_copy(update={"input": TokensInput(vocabulary=10, length=4)})

    assert "not in the schema of small: columns.age" in refusal(write(tmp_path, columns={"age": "years"}), tokens)
    assert "has no column 'text'" in refusal(write(tmp_path, categories=None), tokens)


# check-data


def heart_records(folder: Path) -> Path:
    """Three made-up rows for an installed task, one of them twice and one incomplete."""
    columns = [c.name for c in HEART_DISEASE.input.columns] if isinstance(HEART_DISEASE.input, TableInput) else []
    ill = "60,male,asymptomatic,140,250,normal,normal,150,yes,2.5,present"
    well = "50,female,typical-angina,120,200,normal,normal,170,no,0,absent"
    changes = {"task": "heart-disease", "label": "disease", "patient": None, "one_row_per_patient": True}
    rows = [",".join([*columns, "disease"]), ill, well, ill, ill.replace("250", "")]
    return write(folder, rows, **changes, categories=None, incomplete_rows="leave-out")


def test_check_data_shows_counts_ranges_and_missing_values(tmp_path: Path) -> None:
    """What a data steward compares with the hospital's own figures."""
    summary = summarise(heart_records(tmp_path))

    columns = {column.name: column for column in summary.columns}
    assert (summary.left_out, summary.repeated_rows) == (1, 1)
    assert summary.parts["training"] == (3, 3, {"absent": 1, "present": 2})
    assert (columns["age"].found, columns["age"].public) == ("50 to 60", "18 to 100 year")
    assert (columns["cholesterol"].missing, columns["sex"].found) == (1, "1 female, 2 male")


def test_check_data_prints_every_column(tmp_path: Path) -> None:
    """The terminal's version has one line per column of the schema."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(describe(summarise(heart_records(tmp_path))))

    assert isinstance(HEART_DISEASE.input, TableInput)
    for column in HEART_DISEASE.input.columns:
        assert column.name in capture.get()
    assert "3 records of 3 patients" in capture.get()


def test_what_crosses_the_wire_is_a_code_alone() -> None:
    """The texts above hold values of patients; an error's code never does."""
    assert RecordsError.code == "records"
    assert issubclass(RecordsError, FederationError)


def test_the_patients_of_records_are_numbers_without_meaning(tmp_path: Path) -> None:
    """Ids stay in the reader: neither tensors nor their text form show one."""
    records, _ = read(write(tmp_path, [ROWS[0], "AB-1234,1,1,well", "CD-5678,2,1,ill"]))

    assert "1234" not in repr(records)
    np.testing.assert_array_equal(records.patients, [0, 1])
