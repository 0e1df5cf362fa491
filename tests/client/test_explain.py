"""What a prediction rests on: attributions that add up, that are known where they can be, and pictures of them."""

import copy
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from client.draw import draw_image, draw_series
from client.explain import UNEXPLAINED, by_column, explain
from client.explained import Chosen, explain_folder
from client.export import made_up_inputs
from client.usable import UsableModel
from shared_models import plan
from shared_models.errors import ConfigError
from shared_models.model_file import INTENDED_USE
from shared_models.tasks import Categorical, Head, ImageInput, SeriesInput, TableInput, Task, TokensInput
from shared_models.tokens import words
from tests.client.made_up import HEADS, numeric, table, task_of, usable
from tests.client.test_predict import arrays, folder_of, notes, series, tables

IMAGE = ImageInput(channels=1, height=28, width=28)
SERIES = SeriesInput(variables=(numeric("a"), numeric("b")), steps=6, step_unit="hour")
TRANSFORMER = plan.Transformer(name="transformer", width=8, heads=2, layers=1)
MODELS: dict[str, tuple[plan.Network, Task]] = {
    "mlp": (plan.Mlp(name="mlp", hidden=(8,)), task_of(table(4), 3)),
    "cnn": (plan.Cnn(name="cnn", channels=(4, 8)), task_of(IMAGE)),
    "lstm": (plan.Lstm(name="lstm", hidden=5), task_of(SERIES)),
    "transformer-series": (TRANSFORMER, task_of(SERIES)),
    "transformer-tokens": (TRANSFORMER, task_of(TokensInput(vocabulary=30, length=7), 4)),
}


def rough(model: UsableModel) -> UsableModel:
    """With parameters that are far from their beginning, so that outputs differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_attributions_add_up_to_the_difference_from_the_baseline(name: str) -> None:
    """For every kind of network, and for every output; the ends are computed here, without the code under test."""
    network, task = MODELS[name]
    model = rough(usable(task, network))
    inputs = made_up_inputs(task, 6, seed=1)

    for column in range(len(model.columns)):
        found = explain(model, inputs, torch.full((6,), column), method="integrated-gradients")

        with torch.no_grad():
            output = model.outputs(inputs)[:, column].numpy()
            baseline = _at_baseline(model, inputs)[:, column].numpy()
        sums = found.values.reshape(6, -1).sum(axis=1)
        np.testing.assert_allclose(sums, output - baseline, atol=UNEXPLAINED)
        np.testing.assert_allclose(found.unexplained, output - baseline - sums, atol=1e-6)
        assert np.abs(output - baseline).max() > 10 * UNEXPLAINED  # so that there was something to explain


def _at_baseline(model: UsableModel, inputs: Tensor) -> Tensor:
    """Outputs of records at their baseline. Texts have none of words: there, all words' vectors are emptied."""
    if isinstance(model.task.input, TokensInput):
        emptied = copy.deepcopy(model)
        emptied.network.get_parameter("embedding.embedding.weight").zero_()
        return emptied.outputs(inputs)
    if isinstance(model.task.input, SeriesInput):
        variables = len(model.task.input.variables)
        values = torch.zeros_like(inputs[:, :, :variables])
        return model.outputs(torch.cat([values, inputs[:, :, variables:]], dim=2))
    return model.outputs(torch.zeros_like(inputs))


def test_of_a_linear_model_attributions_are_known() -> None:
    """Each column's share of the logit, of the difference that it makes: a closed form for any sigmoid of a sum."""
    task = task_of(table(4))
    model = rough(usable(task, plan.LogisticRegression(name="logistic-regression")))
    inputs = made_up_inputs(task, 20, seed=2)

    found = explain(model, inputs, torch.ones(20, dtype=torch.int64))

    (weights, bias) = (parameter.detach().double().numpy() for parameter in model.network.parameters())
    terms = inputs.double().numpy() * weights
    logits = terms.sum(axis=1)
    gained = 1 / (1 + np.exp(-(logits + bias))) - 1 / (1 + np.exp(-bias))
    np.testing.assert_allclose(found.values, terms / logits[:, None] * gained[:, None], atol=2e-4)


def test_the_indicators_of_a_category_are_one_column() -> None:
    """Columns are the task's, in its order, and lose nothing."""
    schema = TableInput(columns=(Categorical(name="stage", categories=("i", "ii", "iii", "iv")), numeric("age")))
    model = rough(usable(task_of(schema), plan.LogisticRegression(name="logistic-regression")))
    found = explain(model, made_up_inputs(model.task, 5), torch.ones(5, dtype=torch.int64))

    columns = by_column(schema, found)

    assert list(columns) == ["stage", "age"]
    np.testing.assert_allclose(columns["stage"], found.values[:, :3].sum(axis=1))
    np.testing.assert_allclose(columns["age"], found.values[:, 3])


def test_what_was_not_measured_and_what_is_padding_explains_nothing() -> None:
    """A network cannot rest on what it does not see."""
    for name in ("lstm", "transformer-series", "transformer-tokens"):
        network, task = MODELS[name]
        inputs = made_up_inputs(task, 6, seed=4)
        unseen = inputs == 0 if isinstance(task.input, TokensInput) else inputs[:, :, 2:4] == 0

        found = explain(rough(usable(task, network)), inputs, torch.zeros(6, dtype=torch.int64))

        assert not found.values[unseen.numpy()].any()
        assert found.values.any()


def test_records_are_explained_one_by_one() -> None:
    """Together with others a record's attributions are what they are alone, to float32's last digits."""
    network, task = MODELS["cnn"]
    model, inputs = rough(usable(task, network)), made_up_inputs(task, 5)
    for method in ("occlusion", "integrated-gradients"):
        together = explain(model, inputs, torch.ones(5, dtype=torch.int64), method=method)

        alone = explain(model, inputs[3:4], torch.ones(1, dtype=torch.int64), method=method)

        np.testing.assert_allclose(alone.values[0], together.values[3], atol=1e-5)


class Corner(nn.Module):
    """Sees the upper left eight by eight pixels, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, images: Tensor) -> Tensor:
        """One logit."""
        return self.scale * images[:, :, :8, :8].sum(dim=(1, 2, 3))[:, None]


def test_occlusion_finds_where_a_network_looks() -> None:
    """Patches away from the corner make no difference; a bright corner raises the output everywhere in it."""
    images = torch.full((1, 1, 28, 28), 0.5)

    found = explain(usable(task_of(IMAGE), Corner()), images, torch.ones(1, dtype=torch.int64)).values[0]

    patch = 28 // 7
    assert not found[8 + patch :].any()
    assert not found[:, 8 + patch :].any()
    assert (found[:8, :8] > 0).all()


def test_a_pixel_is_all_of_its_colours(tmp_path: Path) -> None:
    """By both methods one attribution for each pixel, and a picture in colour beside it."""
    task = task_of(ImageInput(channels=3, height=28, width=32))
    model, inputs = rough(usable(task, plan.Cnn(name="cnn", channels=(4,)))), made_up_inputs(task, 2)

    for method in ("occlusion", "integrated-gradients"):
        found = explain(model, inputs, torch.ones(2, dtype=torch.int64), method=method)
        assert found.values.shape == (2, 28, 32)
        assert found.values.any()
    np.testing.assert_allclose(found.unexplained, 0, atol=UNEXPLAINED)
    draw_image(tmp_path / "row.png", inputs[0].double().numpy(), found.values[0], title="", foot="")

    with Image.open(tmp_path / "row.png") as picture:
        left = np.asarray(picture.convert("RGB")).astype(int)[:, : int(0.4 * picture.width)]
    assert (np.abs(left[..., 0] - left[..., 2]) > 40).mean() > 0.2


@pytest.mark.parametrize(("name", "method"), [("mlp", "occlusion"), ("lstm", "occlusion"), ("cnn", "guessing")])
def test_a_method_that_does_not_fit_is_refused(name: str, method: str) -> None:
    """Occlusion is for images."""
    network, task = MODELS[name]

    with pytest.raises(ConfigError, match="does not explain inputs of kind"):
        explain(usable(task, network), made_up_inputs(task, 2), torch.zeros(2, dtype=torch.int64), method=method)


# folders


def explained(
    tmp_path: Path, kind: Any, chosen: Chosen | None = None
) -> tuple[list[dict[str, str]], Path, UsableModel]:
    """A folder of that kind, explained: the lines, where they are, and the model."""
    task, network = kind(tmp_path / "records", np.random.default_rng(0))
    model = rough(usable(task, network))
    explain_folder(model, tmp_path / "records", tmp_path / "out", chosen or Chosen())
    with (tmp_path / "out" / "attributions.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream)), tmp_path / "out", model


def test_a_table_gets_a_column_for_each_of_its_own(tmp_path: Path) -> None:
    """Attributions and the output stand in one line, which adds up; nobody else can read it."""
    lines, out, model = explained(tmp_path, tables)

    assert [line["row"] for line in lines] == [str(row) for row in range(2, 11)]
    assert {line["explained"] for line in lines} == {"probability_class 1"}
    for line in lines:
        total = sum(float(line[f"column-{i}"]) for i in range(3)) + float(line["unexplained"])
        assert total == pytest.approx(float(line["output"]) - float(line["baseline"]), abs=1e-5)
    assert out.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in out.iterdir())
    assert model.columns == ("probability_class 0", "probability_class 1")


def test_rows_and_outputs_can_be_chosen(tmp_path: Path) -> None:
    """By the numbers and names that predictions have; one that is not there is an error."""
    lines, _, model = explained(tmp_path, tables, Chosen(rows={3, 10}, column="probability_class 0"))
    first = explained(tmp_path / "again", _made(tables), Chosen(most=2))[0]

    assert [line["row"] for line in lines] == ["3", "10"]
    assert {line["explained"] for line in lines} == {"probability_class 0"}
    assert [line["row"] for line in first] == ["2", "3"]
    for chosen, words_ in ((Chosen(rows={99}), "rows 99 are not there"), (Chosen(column="x"), "has no output 'x'")):
        with pytest.raises(ConfigError, match=words_):
            explain_folder(model, tmp_path / "records", tmp_path / "out", chosen)


def _made(kind: Any) -> Any:
    """The kind, in a folder whose parents may be missing."""

    def make(folder: Path, rng: np.random.Generator) -> Any:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return kind(folder, rng)

    return make


def test_the_predicted_class_is_explained_unless_told_otherwise(tmp_path: Path) -> None:
    """Of more than two classes each record's own; of several heads the first one's most telling."""
    lines, _, model = explained(tmp_path, arrays)
    _made(tables)(tmp_path / "several", np.random.default_rng(0))

    def first(heads: tuple[Head, ...]) -> set[str]:
        several = rough(usable(task_of(table(3), heads), plan.Mlp(name="mlp", hidden=(4,))))
        explain_folder(several, tmp_path / "several", tmp_path / "heads", Chosen(), parquet=True)
        return set(pd.read_parquet(tmp_path / "heads" / "attributions.parquet")["explained"])

    assert {line["explained"] for line in lines} <= set(model.columns)
    assert all(float(line["output"]) >= 1 / 3 for line in lines)
    assert first(HEADS) == {"grade_probability_low"}
    assert first(HEADS[1:]) == {"ill_probability_yes"}
    assert first(HEADS[2:]) == {"dose"}
    assert first(HEADS[4:]) == {"death_by_5"}


def test_words_stand_beside_what_they_add(tmp_path: Path) -> None:
    """One line per word that the network read, up to the task's length, in the text's order."""
    lines, out, _ = explained(tmp_path, notes)

    texts = pd.read_csv(tmp_path / "records" / "data.csv")["text"]
    for row, text in enumerate(texts, start=2):
        own = [line for line in lines if line["row"] == str(row)]
        assert [line["word"] for line in own] == words(text)[:6]
        assert [line["position"] for line in own] == [str(i) for i in range(len(own))]
        total = sum(float(line["attribution"]) for line in own) + float(own[0]["unexplained"])
        assert total == pytest.approx(float(own[0]["output"]) - float(own[0]["baseline"]), abs=1e-5)
    assert [file.name for file in out.iterdir()] == ["attributions.csv"]


def test_a_series_is_summed_over_time_and_drawn(tmp_path: Path) -> None:
    """A row without a measurement is passed over, as in predictions."""
    lines, out, _ = explained(tmp_path, series)

    assert [line["row"] for line in lines] == ["2", "3", "5", "6", "7", "8", "9", "10"]
    assert sorted(file.name for file in out.glob("*.png")) == sorted(f"row-{line['row']}.png" for line in lines)
    for line in lines:
        total = float(line["a"]) + float(line["b"]) + float(line["unexplained"])
        assert total == pytest.approx(float(line["output"]) - float(line["baseline"]), abs=1e-5)


# pictures


def test_the_picture_of_an_image_is_red_where_it_raises_the_output(tmp_path: Path) -> None:
    """And blue where it lowers it; the image beside it stays grey."""
    attributions = np.zeros((28, 28))
    attributions[:, :14], attributions[:, 14:] = 1.0, -1.0

    draw_image(tmp_path / "row.png", np.zeros((1, 28, 28)), attributions, title="row 2", foot=INTENDED_USE)

    with Image.open(tmp_path / "row.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = pixels[pixels.shape[0] // 2]
    redder = middle[:, 0] - middle[:, 2]
    width = len(middle)
    assert not redder[: int(0.4 * width)].any()
    heat = redder[int(0.46 * width) : int(0.87 * width)]
    assert (heat[: len(heat) // 2 - 15] > 40).all()
    assert (heat[len(heat) // 2 + 15 :] < -40).all()


def test_the_picture_of_a_series_is_grey_where_nothing_was_measured(tmp_path: Path) -> None:
    """A variable without any measurement has no line; one without any at all has a picture all the same."""
    seen = np.zeros((4, 3), dtype=np.bool_)
    seen[:2, 0] = True

    for name, mask in (("some", seen), ("none", np.zeros_like(seen))):
        draw_series(
            tmp_path / f"{name}.png", np.ones((4, 3)), mask, ["a", "b", "c"], step_unit="hour", title="row", foot=""
        )

    with Image.open(tmp_path / "some.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    colours = {tuple(colour) for colour in pixels[pixels.shape[0] // 2, 100 : int(0.8 * pixels.shape[1]) : 20].tolist()}
    assert any(red - blue > 60 for red, _, blue in colours)
    assert (217, 217, 217) in colours  # matplotlib's 0.85
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """In words."""
    model = usable(task_of(table(3)), plan.LogisticRegression(name="logistic-regression"))
    folder_of(tmp_path / "records", [dict.fromkeys(("column-0", "column-1", "column-2"), "0.5")])
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(ConfigError, match="cannot be made"):
        explain_folder(model, tmp_path / "records", tmp_path / "file", Chosen())
