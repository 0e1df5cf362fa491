"""Predictions for a folder: one line per record, with its outputs in words and units, and without looking at labels."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from client.examples import EXAMPLES
from client.predict import LEFT_OUT, Counted, predict_folder
from client.records.images import scaled
from client.records.manifest import read_manifest
from client.records.tabular import read_inputs, read_table
from client.usable import UsableModel, load_model
from shared_models import plan
from shared_models.errors import ConfigError, FederationError, RecordsError
from shared_models.model_file import INTENDED_USE, read_about
from shared_models.tasks import Choice, ImageInput, Numeric, Quantity, SeriesInput, Task, TokensInput
from shared_models.update import save_model
from tests.client.made_up import HEADS, OUTLINE, numeric, table, task_of, usable, written_model

LOGISTIC = plan.LogisticRegression(name="logistic-regression")
ROW = dict.fromkeys(("column-0", "column-1", "column-2"), "0.5")


def command(*arguments: object) -> Result:
    """One command; errors of ours are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, FederationError):
        raise result.exception
    return result


def folder_of(path: Path, rows: list[dict[str, Any]], **manifest: Any) -> Path:
    """A records folder for a made-up task."""
    path.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(path / "data.csv", index=False)
    fields = {"task": "made-up", "file": "data.csv", "validation_fraction": 0.0, "one_row_per_patient": True}
    (path / "manifest.toml").write_text(tomli_w.dumps(fields | manifest), encoding="utf-8")
    return path


def lines(file: Path) -> list[dict[str, str]]:
    """The lines of a CSV file of predictions."""
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A folder with the breast-cancer set's records and test part."""
    EXAMPLES["breast-cancer"].write(tmp_path, "", None)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An untrained model of that task."""
    return written_model(tmp_path / "model.safetensors", "breast-cancer", plan.Mlp(name="mlp", hidden=(4,)))


def test_every_record_gets_the_networks_own_probabilities(hospital: Path, model: Path) -> None:
    """In the file's order, with its rows and patients as the hospital has them; what the model is for is said."""
    said = command("predict", "--model", model, "--records", hospital / "test", "--out", hospital / "out.csv").output

    found, rows = lines(hospital / "out.csv"), lines(hospital / "test" / "data.csv")
    usable_model = load_model(model)
    records, _ = read_table(read_manifest(hospital / "test"), usable_model.task, split_key=b"")
    with torch.no_grad():
        expected = usable_model.network(records.inputs).sigmoid()[:, 0].numpy()
    np.testing.assert_allclose([float(line["probability_malignant"]) for line in found], expected, atol=1e-6)
    np.testing.assert_allclose([float(line["probability_benign"]) for line in found], 1 - expected, atol=1e-6)
    assert [line["predicted"] for line in found] == ["malignant" if p > 0.5 else "benign" for p in expected]
    assert [line["patient"] for line in found] == [row["patient"] for row in rows]
    assert [int(line["row"]) for line in found] == list(range(2, len(rows) + 2))  # a header is row 1
    assert INTENDED_USE in said
    assert "keep it in the house" in said
    assert (hospital / "out.csv").stat().st_mode & 0o777 == 0o600


def test_the_command_is_a_process_like_any_other(hospital: Path, model: Path) -> None:
    """Its own words on standard output, no more than an error and a hint on the other, and a file that is whole."""
    command_line = [
        sys.executable,
        "-m",
        "client.cli",
        "predict",
        "--model",
        str(model),
        "--out",
        str(hospital / "out.csv"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    found = subprocess.run(
        [*command_line, "--records", str(hospital / "test")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (found.returncode, found.stderr) == (0, "")
    assert f"use       {INTENDED_USE}" in found.stdout.splitlines()
    assert len(lines(hospital / "out.csv")) == 142


def test_labels_are_not_needed(hospital: Path, model: Path) -> None:
    """Neither in the file nor in the manifest; with them nothing else is predicted."""
    with_labels = hospital / "test"
    without = hospital / "without"
    without.mkdir()
    pd.read_csv(with_labels / "data.csv", dtype=str).drop(columns="diagnosis").to_csv(without / "data.csv", index=False)
    fields = {"task": "breast-cancer", "file": "data.csv", "validation_fraction": 0.0, "patient": "patient"}
    (without / "manifest.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")

    for name, folder in (("a.csv", with_labels), ("b.csv", without)):
        predict_folder(load_model(model), folder, hospital / name)

    assert (hospital / "a.csv").read_bytes() == (hospital / "b.csv").read_bytes()


def test_parquet_says_what_csv_says(hospital: Path, model: Path) -> None:
    """The same columns and rows, to the six digits of the one."""
    for name in ("out.csv", "out.parquet"):
        predict_folder(load_model(model), hospital / "test", hospital / name)

    one = pd.read_csv(hospital / "out.csv", dtype={"left_out": str})
    two = pd.read_parquet(hospital / "out.parquet").astype({"left_out": str}).fillna({"left_out": "None"})
    assert list(one.columns) == list(two.columns)
    for column in ("row", "patient", "predicted"):
        assert list(one[column]) == list(two[column])
    np.testing.assert_allclose(one["probability_benign"], two["probability_benign"], rtol=1e-5)


def test_a_row_that_lacks_a_value_has_a_line_without_a_prediction(tmp_path: Path) -> None:
    """Where the manifest leaves such rows out; where it refuses them, nothing is written."""
    rows = [ROW, ROW | {"column-1": ""}, ROW | {"column-2": "0.25"}]
    task = task_of(table(3))
    found = usable(task, plan.Mlp(name="mlp", hidden=(4,)))

    counted = predict_folder(
        found, folder_of(tmp_path / "out", rows, incomplete_rows="leave-out"), tmp_path / "out.csv", batch=2
    )
    with pytest.raises(RecordsError, match=r"row 3, column 'column-1'"):
        predict_folder(found, folder_of(tmp_path / "refuse", rows), tmp_path / "refused.csv")

    said = lines(tmp_path / "out.csv")
    assert counted == Counted(predicted=2, left_out=1)
    assert [line["left_out"] for line in said] == ["", LEFT_OUT, ""]
    assert said[1]["probability_class 1"] == said[1]["predicted"] == ""
    assert said[0]["probability_class 1"] != said[2]["probability_class 1"] != ""
    assert not (tmp_path / "refused.csv").exists()
    assert not list(tmp_path.glob("*.new"))


def test_a_value_outside_the_public_range_is_refused_as_in_training(tmp_path: Path) -> None:
    """Nobody predicts from what no study would take; an earlier file stays as it was."""
    (tmp_path / "out.csv").write_text("before", encoding="utf-8")
    folder = folder_of(tmp_path / "records", [ROW] * 5 + [ROW | {"column-0": "7"}])

    with pytest.raises(RecordsError, match=r"row 7, column 'column-0', value '7'"):
        predict_folder(usable(task_of(table(3)), LOGISTIC), folder, tmp_path / "out.csv", batch=2)

    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == "before"


def tables(folder: Path, rng: np.random.Generator) -> tuple[Task, plan.Network]:
    """Rows of three numbers."""
    folder_of(folder, [{name: f"{rng.uniform(-1, 1):.3f}" for name in ROW} for _ in range(9)])
    return task_of(table(3)), plan.Mlp(name="mlp", hidden=(4,))


def arrays(folder: Path, rng: np.random.Generator) -> tuple[Task, plan.Network]:
    """Images in one file of numpy."""
    folder.mkdir()
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (9, 28, 28), dtype=np.uint8), ids=np.arange(9))
    fields = {"task": "made-up", "file": "images.npz", "validation_fraction": 0.0, "patient": "ids"}
    (folder / "manifest.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
    return task_of(ImageInput(channels=1, height=28, width=28), 3), plan.Cnn(name="cnn", channels=(4,))


def pictures(folder: Path, rng: np.random.Generator) -> tuple[Task, plan.Network]:
    """Images in files of their own."""
    folder.mkdir()
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    folder_of(folder, [{"images": f"{number}.png"} for number in range(9)])
    return task_of(ImageInput(channels=1, height=28, width=28), 3), plan.Cnn(name="cnn", channels=(4,))


def series(folder: Path, rng: np.random.Generator) -> tuple[Task, plan.Network]:
    """Measurements in long form; the third stay has none that can be used."""
    folder_of(
        folder,
        [{"stay": number, "who": f"p{number}"} for number in range(9)],
        patient="who",
        incomplete_rows="leave-out",
        out_of_range="leave-out",
        series={"file": "long.csv", "record": "stay", "time": "hour", "variable": "name", "value": "value"},
    )
    rows = [
        {"stay": stay, "hour": hour, "name": name, "value": 9 if stay == 2 else f"{rng.uniform(-1, 1):.3f}"}
        for stay in range(9)
        for hour in range(4)
        for name in ("a", "b")
    ]
    pd.DataFrame(rows).to_csv(folder / "long.csv", index=False)
    inputs = SeriesInput(variables=(numeric("a"), numeric("b")), steps=4, step_unit="hour")
    return task_of(inputs), plan.Lstm(name="lstm", hidden=3)


def notes(folder: Path, rng: np.random.Generator) -> tuple[Task, plan.Network]:
    """Texts of different lengths."""
    words = ["fever", "cough", "knee", "heart", "normal"]
    folder_of(folder, [{"text": " ".join(rng.choice(words, rng.integers(1, 9)))} for _ in range(9)])
    return task_of(TokensInput(vocabulary=50, length=6), 3), plan.Transformer(
        name="transformer", width=4, heads=2, layers=1
    )


KINDS = pytest.mark.parametrize("kind", [tables, arrays, pictures, series, notes], ids=lambda kind: kind.__name__)


@KINDS
def test_a_batch_changes_no_prediction(tmp_path: Path, kind: Any) -> None:
    """Of every kind of record: one at a time, four, or all together; and every row has its line."""
    task, network = kind(tmp_path / "records", np.random.default_rng(0))
    model = usable(task, network)

    for batch in (1, 4, 100):
        predict_folder(model, tmp_path / "records", tmp_path / f"{batch}.csv", batch=batch)

    one, four, all_ = (lines(tmp_path / f"{batch}.csv") for batch in (1, 4, 100))
    assert [line["row"] for line in one] == [line["row"] for line in four] == [line["row"] for line in all_]
    assert [line["predicted"] for line in one] == [line["predicted"] for line in four]
    assert len(one) == 9
    assert [bool(line["left_out"]) for line in one] == [kind is series and i == 2 for i in range(9)]
    for column in model.columns:
        values = [[float(line[column] or 0) for line in found] for found in (one, four, all_)]
        np.testing.assert_allclose(values[0], values[1], atol=2e-6)
        np.testing.assert_allclose(values[0], values[2], atol=2e-6)


def test_pictures_are_decoded_when_their_batch_comes(tmp_path: Path) -> None:
    """A folder larger than memory works: what is wrong with the last file is found with the last batch."""
    task, _ = pictures(tmp_path / "records", np.random.default_rng(0))
    (tmp_path / "records" / "8.png").write_bytes(b"no picture")

    parts = read_inputs(read_manifest(tmp_path / "records"), task, at_once=4)

    assert [next(parts).rows, next(parts).rows] == [[2, 3, 4, 5], [6, 7, 8, 9]]
    with pytest.raises(RecordsError, match=r"8\.png cannot be read"):
        next(parts)


def test_images_are_seen_as_in_training(tmp_path: Path) -> None:
    """The array's bytes, scaled by the public range."""
    task, _ = arrays(tmp_path / "records", np.random.default_rng(0))

    found = torch.cat([part.inputs for part in read_inputs(read_manifest(tmp_path / "records"), task, at_once=4)])

    with np.load(tmp_path / "records" / "images.npz") as file:
        np.testing.assert_array_equal(found.numpy(), scaled(file["images"][:, None]))


# heads


@pytest.fixture
def several(tmp_path: Path) -> Iterator[tuple[UsableModel, list[dict[str, str]], np.ndarray[Any, Any]]]:
    """A model with a head of every kind, what it predicts of six rows, and what its network gives."""
    rng = np.random.default_rng(1)
    rows = [{name: f"{rng.uniform(-1, 1):.3f}" for name in ROW} for _ in range(6)]
    model = usable(task_of(table(3), HEADS), plan.Mlp(name="mlp", hidden=(8,)))
    predict_folder(model, folder_of(tmp_path / "records", rows), tmp_path / "out.csv")
    (part,) = read_inputs(read_manifest(tmp_path / "records"), model.task, at_once=10)
    with torch.no_grad():
        yield model, lines(tmp_path / "out.csv"), model.network(part.inputs).double().numpy()


def test_every_head_has_its_columns(several: Any) -> None:
    """Probabilities of classes, quantities in their unit, and by when an event happens; each by hand."""
    model, found, logits = several

    def column(name: str) -> list[float]:
        return [float(line[name]) for line in found]

    grades = np.exp(logits[:, :3]) / np.exp(logits[:, :3]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(column("grade_probability_high"), grades[:, 2], rtol=1e-4)
    np.testing.assert_allclose(column("ill_probability_yes"), 1 / (1 + np.exp(-logits[:, 3])), rtol=1e-4)
    np.testing.assert_allclose(column("dose"), np.clip(logits[:, 4], -2, 2) / 2, rtol=1e-4)  # its range is -1 to 1
    left = np.cumprod(1 / (1 + np.exp(logits[:, 6:])), axis=1)
    for number, edge in enumerate(("1", "2", "5")):
        np.testing.assert_allclose(column(f"death_by_{edge}"), 1 - left[:, number], rtol=1e-4)
    assert [line["grade_predicted"] for line in found] == [("low", "middle", "high")[i] for i in grades.argmax(axis=1)]
    assert [line["ill_predicted"] for line in found] == ["yes" if v > 0 else "no" for v in logits[:, 3]]
    assert list(found[0]) == ["row", "patient", *model.columns, "grade_predicted", "ill_predicted", "left_out"]


@pytest.mark.parametrize(("scale", "low", "high"), [("linear", -5, 40), ("log", 0.1, 900), ("sqrt", 0, 120)])
def test_a_quantity_comes_back_in_its_unit(scale: Any, low: float, high: float) -> None:
    """What was encoded for training is decoded to what it was; beyond the public range is its end."""
    measure = Numeric(name="stay", unit="day", low=low, high=high, scale=scale)
    model = usable(task_of(table(1), (Quantity(measure=measure),)), torch.nn.Identity())
    values = np.linspace(low, high, 50)

    back = model.outputs(torch.from_numpy(measure.scaled(values))[:, None])
    beyond = model.outputs(torch.tensor([[-9.0], [9.0]], dtype=torch.float64))

    np.testing.assert_allclose(back[:, 0], values, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(beyond[:, 0], [low, high], rtol=1e-9, atol=1e-12)


def test_outlines_become_pictures(tmp_path: Path) -> None:
    """A mask per record, white where the network gives more than even odds, beside the file of shares."""
    _, _ = arrays(tmp_path / "records", np.random.default_rng(0))
    model = usable(
        task_of(ImageInput(channels=1, height=28, width=28), OUTLINE), plan.UNet(name="unet", channels=(4, 8))
    )

    predict_folder(model, tmp_path / "records", tmp_path / "out.csv", batch=4)

    (part,) = read_inputs(read_manifest(tmp_path / "records"), model.task, at_once=10)
    with torch.no_grad():
        logits = model.network(part.inputs).view(-1, 28, 28)
    for number, line in enumerate(lines(tmp_path / "out.csv")):
        mask = np.asarray(Image.open(tmp_path / "out" / f"row-{line['row']}.png"))
        np.testing.assert_array_equal(mask > 0, logits[number].numpy() > 0)
        assert float(line["mask_share"]) == pytest.approx(float(logits[number].sigmoid().mean()), rel=1e-4)
    assert 0 < np.mean(mask > 0) < 1


# refusals


def test_a_model_of_a_task_that_is_not_installed_is_refused(hospital: Path, model: Path) -> None:
    """By name, with those that are."""
    found = load_model(model)
    other = found.plan.model_copy(update={"task": "sepsis"})
    save_model(
        model, found.network, {"format": "konsil-model/1", "plan": other.canonical().decode(), "plan_digest": ""}
    )

    with pytest.raises(ConfigError, match="task 'sepsis' is not installed") as caught:
        command("predict", "--model", model, "--records", hospital / "test", "--out", hospital / "out.csv")

    assert "breast-cancer" in caught.value.hint


def test_what_is_not_a_model_a_folder_or_a_file_name_is_refused(hospital: Path, model: Path) -> None:
    """With what to do."""
    cases = [
        (hospital / "test" / "data.csv", hospital / "test", "out.csv", "cannot be read"),
        (model, hospital, "out.csv", "manifest"),
        (model, hospital / "test", "out.xlsx", "ends in .xlsx"),
        (model, hospital / "test", "nowhere/out.csv", "cannot be written"),
    ]

    for file, folder, out, words in cases:
        with pytest.raises(FederationError, match=words):
            command("predict", "--model", file, "--records", folder, "--out", hospital / out)


def test_a_file_of_the_first_release_has_the_same_use(model: Path) -> None:
    """It does not say what it is for; the card of its study did."""
    found, before = load_model(model), read_about(model)
    save_model(
        model, found.network, {"format": "konsil-model/1", "plan": found.plan.canonical().decode(), "plan_digest": ""}
    )

    assert before["intended_use"] == INTENDED_USE
    assert "intended_use" not in read_about(model)
    assert load_model(model).intended_use == INTENDED_USE == found.intended_use


def test_names_of_outputs_follow_the_task(model: Path) -> None:
    """A task with one choice has plain names; they are the classes'."""
    assert load_model(model).columns == ("probability_benign", "probability_malignant")
    assert load_model(model).choices == (Choice(name="diagnosis", classes=("benign", "malignant")),)
