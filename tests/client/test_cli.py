"""The hospital's command as a steward uses it."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app
from server.examples import Example, write_example
from shared_models.errors import FederationError
from tests.federation import Federation, restart_hospitals


def run(*arguments: object) -> Result:
    """One command in this process; errors of ours are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, FederationError):
        raise result.exception
    return result


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """Data of four hospitals, and nothing else."""
    return write_example("breast-cancer", tmp_path, hospitals=4, seed=0)


def test_check_data_prints_what_it_read(example: Example) -> None:
    """Counts, classes and ranges of the hospital's own records, on its own terminal."""
    said = run("check-data", "--records", example.hospitals[0].folder).output

    assert "malignant" in said
    assert "worst_area" in said


def test_check_data_wants_one_of_two_things() -> None:
    """Neither or both is an error with an example."""
    with pytest.raises(FederationError, match="needs a settings file or --records"):
        run("check-data")


def test_check_data_names_file_row_column_and_value(example: Example) -> None:
    """The steward sees which cell to mend; this text is for this terminal alone."""
    data = example.hospitals[0].folder / "data.csv"
    lines = data.read_text(encoding="utf-8").splitlines()
    cells = lines[3].split(",")
    cells[2] = "999999"
    data.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]), encoding="utf-8")

    with pytest.raises(FederationError, match=r"data\.csv.*row 4.*999999"):
        run("check-data", "--records", example.hospitals[0].folder)


def test_budget_shows_what_was_spent_with_everything_an_epsilon_needs(federation: Federation) -> None:
    """Delta, unit, neighbouring relation and accountant beside every figure, for people and for machines."""
    federation.run()
    restart_hospitals()
    settings = federation.settings_file("hospital-1")

    said, found = run("budget", settings).output, json.loads(run("budget", settings, "--json").output)

    for word in ("delta", "per patient", "add or remove one patient", "PRV", "Renyi filter at order", "enforced"):
        assert word in said
    (study,) = found["studies"]
    assert study["rounds"] == 3
    assert 0 < study["epsilon"] <= study["epsilon_filter"] < 1
    assert found["epsilon_left"] == pytest.approx(1 - found["epsilon_filter"])


def test_budget_without_a_ledger_says_so(federation: Federation) -> None:
    """It never makes one: looking is not opening."""
    with pytest.raises(FederationError, match="there is no ledger"):
        run("budget", federation.settings_file("hospital-1"))


def test_withdraw_frees_what_was_reserved_and_keeps_what_was_charged(federation: Federation) -> None:
    """After a coordinator that never came back, the steward gets the reservation back, not the rounds."""
    federation.wire.tamper = lambda _hospital, reply: None if reply.metadata.group_id in {"2", "end"} else reply
    federation.plan = federation.plan.model_copy(update={"deadline_s": 0.3})
    with pytest.raises(FederationError):
        federation.run()
    restart_hospitals()
    settings = federation.settings_file("hospital-1")

    said = run("withdraw", settings, federation.plan.study).output

    found = json.loads(run("budget", settings, "--json").output)
    assert "is closed" in said
    assert found["studies"][0]["rounds"] == len(federation.charges("hospital-1")) > 0
    assert found["epsilon_left"] == pytest.approx(1 - found["epsilon_filter"])


def test_train_alone_and_evaluate_agree(example: Example, tmp_path: Path) -> None:
    """What training alone prints is what measuring its model prints; the model is far better than chance."""
    plan = Path(__file__).parents[2] / "server" / "plans" / "breast-cancer.toml"
    model = tmp_path / "alone.safetensors"

    trained = run("train-alone", plan, "--records", example.hospitals[0].folder, "--out", model, "--test", example.test)

    measured = run("evaluate", model, "--records", example.test)
    assert json.loads(trained.output) == json.loads(measured.output)
    assert json.loads(measured.output)["auroc"] > 0.95


def test_evaluate_reads_paths_from_standard_input(example: Example, tmp_path: Path) -> None:
    """One line of JSON per model that is there; a checkpoint that was dropped meanwhile is passed over."""
    plan = Path(__file__).parents[2] / "server" / "plans" / "breast-cancer.toml"
    model = tmp_path / "alone.safetensors"
    run("train-alone", plan, "--records", example.pooled, "--out", model, "--steps", "50")

    result = CliRunner().invoke(
        app, ["evaluate", "--records", str(example.test)], input=f"{model}\nnot-there\n{model}\n"
    )

    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["model"] for line in lines] == [str(model)] * 2


def test_a_file_that_is_no_model_is_refused(example: Example, tmp_path: Path) -> None:
    """Nothing is loaded from it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\x04pickle")

    with pytest.raises(FederationError, match="cannot be read"):
        run("evaluate", path, "--records", example.test)
