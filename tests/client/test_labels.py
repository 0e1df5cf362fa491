"""Label columns of tasks with other heads than one choice: read, encoded, refused with which words."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
from PIL import Image
from rich.console import Console

from client.records.labels import unpacked
from client.records.manifest import read_manifest
from client.records.report import describe, summarise
from client.records.tabular import Table, checked_table, read_table
from shared_models import tasks
from shared_models.errors import RecordsError
from shared_models.tasks import Choice, Head, ImageInput, Numeric, Outline, Quantity, Survival, TableInput, Task

AGE = TableInput(columns=(Numeric(name="age", unit="year", low=0, high=100),))
PICTURE = ImageInput(channels=1, height=28, width=30)
GRADE = Choice(name="grade", classes=("low", "middle", "high"))
ILL = Choice(name="ill", classes=("no", "yes"))
DOSE = Quantity(measure=Numeric(name="dose", unit="mg", low=0, high=100))
DEATH = Survival(name="death", time="days", event="died", unit="day", edges=(10, 20, 50))
ROWS = pd.DataFrame(
    {
        "id": ["a", "b", "c", "a"],
        "age": [0, 50, 100, 20],
        "grade": ["low", "high", "middle", ""],
        "ill": ["no", "yes", "", ""],
        "dose": [0, 100, 25, ""],
        "followed": [5, 12, 60, 20],
        "died": [1, 0, 1, 0],
    }
)
MANIFEST: dict[str, Any] = {
    "task": "many",
    "file": "data.csv",
    "patient": "id",
    "validation_fraction": 0.0,
    "columns": {"days": "followed"},
    "categories": {"died": {"0": "no", "1": "yes"}},
}


def task_with(*heads: Head, image: bool = False) -> Task:
    """A task of these heads, over one column or a picture."""
    return Task(name="many", description="Made up.", input=PICTURE if image else AGE, heads=heads)


MANY = task_with(GRADE, ILL, DOSE, DEATH)


def write(folder: Path, rows: pd.DataFrame = ROWS, **changes: Any) -> Path:
    """Write rows and a manifest; a change to None leaves the key out."""
    rows.to_csv(folder / "data.csv", index=False)
    manifest = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    return folder


def read(folder: Path, task: Task = MANY) -> Table:
    """The checked table."""
    return checked_table(read_manifest(folder), task)


def refusal(folder: Path, task: Task = MANY) -> str:
    """The words with which a folder is refused."""
    with pytest.raises(RecordsError) as caught:
        read(folder, task)
    return f"{caught.value} | {caught.value.hint}"


def test_every_head_reads_its_own_columns(tmp_path: Path) -> None:
    """Classes as indices, quantities on their scale, times as intervals, and NaN where one of several is not known."""
    targets = read(write(tmp_path)).labels

    np.testing.assert_array_equal(
        targets, [[0, 0, -2, 0, 1], [2, 1, 2, 1, 0], [1, np.nan, -1, 3, 0], [np.nan, np.nan, np.nan, 2, 0]]
    )
    records, _ = read_table(read_manifest(tmp_path), MANY, split_key=bytes(32))
    assert records.targets.shape == (4, 5)
    assert str(records.targets[:].dtype) == "torch.float32"


def test_a_quantity_alone_must_be_known(tmp_path: Path) -> None:
    """Nothing else is learnt from its row."""
    own: dict[str, Any] = {"columns": {}, "categories": {}}
    words = "row 5, column 'dose', value '': the value is missing"
    assert words in refusal(write(tmp_path, **own), task_with(DOSE))

    targets = read(write(tmp_path, incomplete_rows="leave-out", **own), task_with(DOSE)).labels
    np.testing.assert_array_equal(targets, [[-2], [2], [-1]])


def test_a_row_without_any_label_is_incomplete(tmp_path: Path) -> None:
    """Of several findings one is enough, none is too few."""
    task = task_with(GRADE, ILL, DOSE)
    own: dict[str, Any] = {"columns": {}, "categories": {}}
    assert "row 5" in refusal(write(tmp_path, **own), task)

    assert read(write(tmp_path, incomplete_rows="leave-out", **own), task).left_out == 1


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("grade", 1, "vast", "column 'grade', value 'vast': is none of low, middle, high"),
        ("dose", 1, "101", "column 'dose', value '101': is outside the public range 0 to 100 mg"),
        ("dose", 1, "much", "column 'dose', value 'much': is not a number (mg expected)"),
        ("followed", 1, "-1", "column 'followed', value '-1': is before the beginning"),
        ("followed", 1, "inf", "column 'followed', value 'inf': is not a finite number"),
        ("followed", 1, "", "column 'followed', value '': the value is missing"),
        ("died", 1, "2", "column 'died', value '2': is none of no, yes"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path: Path, column: str, row: int, value: str, words: str) -> None:
    """With row, column and value."""
    rows = ROWS.astype(str)
    rows.loc[row, column] = value

    assert f"row {row + 2}, {words}" in refusal(write(tmp_path, rows))


def test_a_manifest_with_a_label_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    """One choice has a label column; others have names of their own."""
    assert "task many has no one label" in refusal(write(tmp_path, label="grade"))
    assert "names no label column for ill" in refusal(write(tmp_path, columns={}, categories={}), task_with(ILL))
    assert "columns.hours" in refusal(write(tmp_path, columns={"hours": "followed"}))


def test_a_class_that_nobody_has_is_named_with_its_head(tmp_path: Path) -> None:
    """Two heads may both have a class called yes."""
    rows = ROWS.assign(ill=["no", "no", "", ""])
    write(tmp_path, rows)
    with pytest.raises(RecordsError, match="no record of class 'ill: yes' in the training part"):
        read_table(read_manifest(tmp_path), MANY, split_key=bytes(32))

    write(tmp_path, rows, absent_classes=["ill: yes"])
    assert read_table(read_manifest(tmp_path), MANY, split_key=bytes(32))[0].patient_count == 3


def test_check_data_counts_the_classes_of_every_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows that repeat are found by all of their labels."""
    monkeypatch.setattr(tasks, "TASKS", {"many": MANY})
    rows = pd.concat([ROWS, ROWS.iloc[:1], ROWS.iloc[:1].assign(followed=30)])

    found = summarise(write(tmp_path, rows))

    assert found.parts["training"][2] == {
        "grade: low": 3,
        "grade: middle": 1,
        "grade: high": 1,
        "ill: no": 3,
        "ill: yes": 1,
    }
    assert found.repeated_rows == 1


def test_check_data_of_a_task_without_classes_counts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands in empty brackets."""
    monkeypatch.setattr(tasks, "TASKS", {"many": task_with(DEATH)})

    shown = io.StringIO()
    Console(file=shown, width=200).print(describe(summarise(write(tmp_path))))

    assert "training: 4 records of 3 patients\n" in "\n".join(line.rstrip() for line in shown.getvalue().splitlines())


def test_rows_without_ids_are_told_apart_by_every_label(tmp_path: Path) -> None:
    """Two patients of one age who were followed for different times are two."""
    rows = pd.DataFrame({"age": [5, 5, 5], "followed": [5, 15, 15], "died": [1, 1, 1]})

    ids = read(write(tmp_path, rows, patient=None, one_row_per_patient=True), task_with(DEATH)).patients.ids

    assert len(set(ids)) == 3


# outlines


def write_outlines(folder: Path, *, size: tuple[int, int] = (28, 30)) -> tuple[Path, np.ndarray[Any, Any]]:
    """Three pictures and their masks."""
    rng = np.random.default_rng(0)
    masks = rng.integers(2, size=(3, *size)).astype(np.uint8)
    for number, mask in enumerate(masks):
        Image.fromarray(rng.integers(256, size=(28, 30)).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask * 255).save(folder / f"{number}-mask.png")
    rows = pd.DataFrame({"id": list("abc"), "images": [f"{i}.png" for i in range(3)]})
    rows["organ"] = [f"{i}-mask.png" for i in range(3)]
    return write(folder, rows, columns={"mask": "organ"}, categories={}), masks


def test_masks_are_pictures_that_rows_name(tmp_path: Path) -> None:
    """A pixel that is not black belongs to the outline."""
    folder, masks = write_outlines(tmp_path)

    targets = read(folder, task_with(Outline(name="mask"), image=True)).labels[:]

    np.testing.assert_array_equal(unpacked(targets, masks[0].size), masks.reshape(3, -1))


def test_a_mask_of_another_size_or_kind_is_refused(tmp_path: Path) -> None:
    """Fitting one and not the other would move it."""
    task = task_with(Outline(name="mask"), image=True)
    folder, _ = write_outlines(tmp_path, size=(28, 28))
    assert "0-mask.png: the mask has 28 x 28 pixels, not 30 x 28" in refusal(folder, task)

    folder, _ = write_outlines(tmp_path)
    (folder / "1-mask.png").write_bytes(b"no picture")
    assert "1-mask.png cannot be read" in refusal(folder, task)


def test_arrays_hold_targets_too(tmp_path: Path) -> None:
    """In a file of arrays: one of masks, or one for each label."""
    rng = np.random.default_rng(1)
    images, masks = (rng.integers(256, size=(3, 28, 30)).astype(np.uint8) for _ in range(2))
    arrays: dict[str, Any] = {
        "images": images,
        "id": np.array(list("abc")),
        "ill": np.array(["no", "yes", ""]),
        "dose": [1.5, 3, 2],
    }
    np.savez(tmp_path / "data.npz", masks=masks, **arrays)

    write(tmp_path, file="data.npz", columns={"mask": "masks"}, categories={})
    found = read(tmp_path, task_with(Outline(name="mask"), image=True)).labels[:]
    np.testing.assert_array_equal(unpacked(found, masks[0].size), (masks > 0).reshape(3, -1))

    write(tmp_path, file="data.npz", columns={}, categories={})
    found = read(tmp_path, task_with(ILL, DOSE, image=True)).labels[:]
    np.testing.assert_allclose(found, [[0, -1.94], [1, -1.88], [np.nan, -1.92]])
