"""``konsil-hospital evaluate`` with intervals, groups, differences and pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image
from typer.testing import CliRunner

from client.appraise import appraise, own_validation, records_of_folder
from client.cli import app
from client.evaluate import counted_once, scores_of, statistics
from client.records.records import Records
from server.examples import Example, write_example
from shared_models.config import read_toml
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network
from shared_models.outcomes import compute_metrics
from shared_models.plan import Mlp, Subgroups
from shared_models.tasks import BREAST_CANCER
from tests.client.made_up import table, table_records, task_of
from tests.federation import Federation, make_federation

BANDS = Subgroups(column="mean_radius", edges=(12.0, 16.0))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """The example's folders."""
    return write_example("breast-cancer", tmp_path_factory.mktemp("example"), hospitals=3, seed=0)


@pytest.fixture(scope="module")
def models(example: Example, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model of all patients, and one of the last hospital's alone."""
    folder = tmp_path_factory.mktemp("models")
    plan = folder / "plan.toml"
    plan.write_text(tomli_w.dumps(example.plan.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    files = [folder / "pooled.safetensors", folder / "alone.safetensors"]
    for file, records in zip(files, (example.pooled, example.hospitals[-1].folder), strict=True):
        run("train-alone", plan, "--records", records, "--out", file, "--steps", "40")
    return files


def run(*arguments: Any) -> Any:
    """One call of the command, which must not fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_figures_are_those_of_the_plain_evaluation(example: Example, models: list[Path]) -> None:
    """With one record per patient: the same counts, the same metrics; and each lies in its interval."""
    records, part = records_of_folder(BREAST_CANCER, example.test)

    found = appraise(models, records, part=part, specificity=0.9, subgroups=[BANDS])

    for name, file in zip(("pooled", "alone"), models, strict=True):
        told = json.loads(run("evaluate", file, "--records", example.test).output)
        measured = found.models[name]
        assert measured.metrics == pytest.approx(told)
        (one,) = measured.classes.values()
        assert one.auroc.value == pytest.approx(told["auroc"])
        assert one.at_half.sensitivity.value == pytest.approx(told["sensitivity"])
        assert one.auroc.low < told["auroc"] < one.auroc.high
        sizes = [those["malignant"].positives + those["malignant"].negatives for those in measured.groups.values()]
        assert sum(sizes) == found.patients == found.records == told["records"]
    (differences,) = found.differences.values()
    apart = found.models["alone"].metrics["auroc"] - found.models["pooled"].metrics["auroc"]
    assert differences["alone"].value == pytest.approx(apart, abs=1e-3)  # unbinned against a thousand bins


def test_a_patient_with_several_records_counts_once() -> None:
    """As in a release: the sum is the number of patients, whoever has how many records."""
    records, task = table_records([0, 0, 0, 1, 2, 2]), task_of(table(5))
    model = build_network(Mlp(name="mlp", hidden=(4,)), task, seed=0)

    total = counted_once(scores_of(model, records, task), records, task, bins=20, rows=np.arange(6))

    assert total.sum() == pytest.approx(3)
    lone = Records(records.inputs, records.targets, np.arange(6), 6)
    every = counted_once(scores_of(model, lone, task), lone, task, bins=20, rows=np.arange(6))
    np.testing.assert_allclose(every, statistics(model, lone, task, bins=20))
    assert compute_metrics(task, every, bins=20)["records"] == 6


def test_a_report_holds_every_figure_and_every_curve(example: Example, models: list[Path], tmp_path: Path) -> None:
    """Numbers as JSON without NaN, pictures as SVG and PNG with something on them; tables on the screen."""
    folder = tmp_path / "report"

    said = run(
        "evaluate", *models, "--records", example.test, "--report", folder, "--subgroup", "mean_radius:12,16"
    ).output

    told = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert told["format"] == "konsil-evaluation/1"
    assert list(told["models"]) == ["pooled", "alone"]
    assert list(told["differences"]["malignant"]) == ["alone"]
    area = told["models"]["pooled"]["classes"]["malignant"]["auroc"]
    assert f"{area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})" in said
    assert "mean_radius: 12 to below 16 pixel" in said
    names = {"roc", "precision-recall", "calibration", "decision", "groups-1", "groups-2"}
    assert {path.stem for path in folder.iterdir()} == names | {"evaluation"}
    for name in names:
        assert (folder / f"{name}.svg").read_bytes().startswith(b"<?xml")
        with Image.open(folder / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_hospital_measures_on_patients_that_no_study_trains_on(federation: Federation, models: list[Path]) -> None:
    """Its own validation part, with its own split; without one it is told what to do."""
    settings = federation.settings("hospital-1")
    with pytest.raises(ConfigError, match="no patient for validation"):
        own_validation(BREAST_CANCER, settings)
    manifest = settings.records / "manifest.toml"
    fields = read_toml(manifest, "manifest") | {"validation_fraction": 0.3}
    manifest.write_text(tomli_w.dumps(fields), encoding="utf-8")

    said = run("evaluate", models[0], "--settings", federation.settings_file("hospital-1")).output

    records, _ = own_validation(BREAST_CANCER, settings)
    assert 0 < len(records) < len(records_of_folder(BREAST_CANCER, settings.records)[0])
    assert f"{records.patient_count} patients" in said


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Hospitals with settings."""
    return make_federation(tmp_path, hospitals=3)


def test_without_matplotlib_a_report_is_refused_before_anything_is_measured(
    example: Example, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install; tables need no pictures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    failed = CliRunner().invoke(
        app, ["evaluate", str(models[0]), "--records", str(example.test), "--report", str(tmp_path / "x")]
    )
    run("evaluate", *models, "--records", example.test)

    assert isinstance(failed.exception, ConfigError)
    assert "konsil[explain]" in failed.exception.hint
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--subgroup", "mean_radius:16,12"], "ascend"),
        (["--subgroup", "mean_radius:small"], "could not convert"),
        (["--subgroup", "sex"], "no such column"),
    ],
)
def test_subgroups_that_are_none_are_refused(
    example: Example, models: list[Path], arguments: list[str], words: str
) -> None:
    """By the reason, in one line."""
    failed = CliRunner().invoke(app, ["evaluate", *map(str, models), "--records", str(example.test), *arguments])

    assert isinstance(failed.exception, ConfigError)
    assert words in str(failed.exception)
