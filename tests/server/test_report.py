"""A study's report: what was released, with intervals; pictures; costs. And the summary of a cross-validation."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from server.cli import app
from server.demo import plan_text
from server.examples import Example, example_plan, write_example
from server.folds import cost_of_all, fold_plans, summarise
from server.journal import Journal
from server.released import FILE, Released, keep_released, read_released
from server.report import draw, noise_of, read_report, render, said, write_report
from server.simulate import Options, run_simulation
from shared_models.config import read_toml
from shared_models.errors import ConfigError
from shared_models.estimates import estimate_heads
from shared_models.evaluation import evaluate
from shared_models.model_file import write_model
from shared_models.nets.build import build_network
from shared_models.outcomes import compute_metrics, score_tables
from shared_models.plan import StudyPlan
from shared_models.privacy.mechanisms import filter_epsilon, study_mechanisms, total_divergence
from shared_models.subgroups import EVERYBODY, release_size, split
from shared_models.tasks import task_of
from tests.federation import changed

FOLDS = 2


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Three hospitals that keep a part for validation."""
    found = write_example("breast-cancer", tmp_path_factory.mktemp("example"), hospitals=3, seed=0)
    for hospital in found.hospitals:
        manifest = hospital.folder / "manifest.toml"
        fields = read_toml(manifest, "manifest")
        fields |= {"validation_fraction": 0.4, "absent_classes": ["benign", "malignant"]}
        manifest.write_text(tomli_w.dumps(fields), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    """Two rounds with a release after each, and little noise: something is to be seen."""
    return changed(
        example_plan("breast-cancer", 3),
        rounds=2,
        reply_grid_s=0.001,
        purpose="Tell <b>malignant</b> from benign breast masses.",
        privacy={"noise_multiplier": 0.7, "epsilon": 200.0, "spare_charges": 0},
        evaluation={
            "every": 1,
            "clip": 1.0,
            "noise_multiplier": 0.7,
            "subgroups": [{"column": "mean_radius", "edges": [14.0]}],
        },
    )


def simulate(folder: Path, example: Example, plan: StudyPlan, **changes: Any) -> dict[str, Any]:
    """Run a study, or its folds, in this process."""
    file = folder / "plan.toml"
    file.write_text(plan_text(plan), encoding="utf-8")
    fields: dict[str, Any] = {
        "plan": file,
        "folder": folder / "run",
        "records": example.hospitals[0].folder.parent,
        "hospitals": 3,
        "patients": 0,
        "public_size": None,
        "seed": 0,
        "threads": 1,
        "json_file": None,
    }
    return run_simulation(Options(**fields | changes), Console(quiet=True))


@pytest.fixture(scope="module")
def study(example: Example, plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished study."""
    folder = tmp_path_factory.mktemp("study")
    simulate(folder, example, plan)
    return folder / "run" / "study"


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of its report, as the command writes it."""
    folder = tmp_path_factory.mktemp("report") / "out"
    result = CliRunner().invoke(app, ["report", str(study), "--out", str(folder), "--specificity", "0.8"])
    assert result.exit_code == 0, result.output
    return folder


class _Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_report_says_what_was_released_with_its_noise(study: Path, written: Path, plan: StudyPlan) -> None:
    """The newest release, evaluated here once more by hand; groups beside everybody; every hospital's cost."""
    told = json.loads((written / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    newest, task, evaluation = read_released(study)[-1], task_of(plan), plan.evaluation
    assert evaluation is not None
    assert (told["released_after_round"], told["hospitals_in_release"]) == (2, 3)
    assert told["noise"] == pytest.approx(0.7 * np.sqrt(3) * np.sqrt(2))  # three hospitals, one grouping
    counts = split(task, evaluation, newest.statistics)
    names = [("", "everybody"), ("mean_radius", "below 14 pixel"), ("mean_radius", "from 14 pixel")]
    assert [(one["column"] or "", one["group"]) for one in told["groups"]] == names == list(counts)
    for one, group in zip(told["groups"], counts.values(), strict=True):
        (table,) = score_tables(task, group, bins=20).values()
        expected = evaluate(table, noise=told["noise"], specificity=0.8).as_json()
        assert one["classes"] == {"malignant": expected}
    assert [one["round"] for one in told["progress"]] == [1, 2]
    assert {one["hospital"] for one in told["costs"]} == {"hospital-1", "hospital-2", "hospital-3"}
    assert all(0 < one["stated"] < one["enforced"] <= one["budget"] for one in told["costs"])


def test_the_page_needs_nothing_from_elsewhere_and_shows_what_the_numbers_say(
    study: Path, written: Path, plan: StudyPlan
) -> None:
    """No script, no link, pictures inside; what people wrote is text and not markup."""
    report = read_report(study)

    page = _Page((written / "report.html").read_text(encoding="utf-8"))

    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    svgs = [base64.b64decode(source.partition(",")[2]) for source in page.sources]
    assert all(b"<svg" in svg and b"<script" not in svg for svg in svgs)
    words = " ".join(page.words)
    assert plan.purpose in words
    (whole,) = report.groups[EVERYBODY].values()
    assert f"{whole.auroc.low:.3f} to {whole.auroc.high:.3f}" in words
    for wanted in ("mean_radius: from 14 pixel", "hospital-2", plan.digest(), "standard deviation of 1.7 patients"):
        assert wanted in words


def test_all_pictures_lie_beside_the_page(written: Path) -> None:
    """Each as SVG and PNG, where --out says."""
    names = {"roc", "precision-recall", "calibration", "decision", "groups", "progress", "costs"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")} | {"report.html", "report.json"}
    assert {path.name for path in written.iterdir()} == files
    assert "specificity of 0.8" in (written / "report.html").read_text(encoding="utf-8").replace("\n", " ")


def test_an_earlier_release_can_be_shown_and_one_that_is_not_there_cannot(study: Path) -> None:
    """By its round; the error names those there are."""
    assert (read_report(study, round_number=1).release or read_released(study)[1]).round == 1
    with pytest.raises(ConfigError, match="after round 7") as caught:
        read_report(study, round_number=7)
    assert "1, 2" in caught.value.hint


def test_a_study_that_released_nothing_has_a_report_that_says_so(study: Path, tmp_path: Path) -> None:
    """Costs are shown all the same, and what each hospital can do."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("report"))
    (folder / FILE).unlink()

    html = write_report(folder).read_text(encoding="utf-8")

    assert "released no statistics" in html
    assert "konsil-hospital evaluate" in html
    assert {path.stem for path in (folder / "report").glob("*.svg")} == {"costs"}


def test_heads_that_are_no_choice_have_figures_with_intervals_by_group(plan: StudyPlan, tmp_path: Path) -> None:
    """Survival, by group: the concordance index with an interval that knows the noise, in words and in a picture."""
    survival = changed(
        plan,
        task="breast-cancer-survival",
        network={"name": "logistic-regression"},
        evaluation={"subgroups": [{"column": "age", "edges": [60.0]}]},
    )
    task, evaluation = task_of(survival), survival.evaluation
    assert evaluation is not None
    rng = np.random.default_rng(0)
    counts = (40 * rng.integers(9, size=release_size(task, evaluation))).astype(np.float64)
    write_model(tmp_path / "model.safetensors", build_network(survival.network, task, seed=0), survival)
    Journal(tmp_path / "events.jsonl").write("started", study=survival.study, rounds=2, plan_digest="", parameters=1)
    keep_released(tmp_path, Released(round=1, hospitals=3, statistics=counts))

    report = read_report(tmp_path)

    for group, part in split(task, evaluation, counts).items():
        assert report.plain[group] == pytest.approx(compute_metrics(task, part, bins=20))
    words = " ".join(_Page(render(report, draw(report))).words)
    assert "c_index" in words
    noise = noise_of(survival, task, Released(round=1, hospitals=3, statistics=counts))
    for group, part in split(task, evaluation, counts).items():
        assert report.estimates[group] == estimate_heads(task, part, bins=20, noise=noise)
        assert said(report.estimates[group]["c_index"]) in words
    assert noise > 0
    assert report.estimates["age", "from 60 year"]["c_index"].value is not None
    assert set(draw(report)) == {"groups-c_index", "progress"}


def test_figures_that_somebody_measured_stand_beside_each_other(study: Path, tmp_path: Path) -> None:
    """Local, federated, pooled: what the card has; a figure that a model lacks is left empty."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    card["metrics"] = {"federated": {"auroc": 0.9123, "f1": 0.5}, "hospital-1 alone": {"auroc": 0.8456}}
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")

    words = _Page(render(read_report(folder), {})).words

    assert {"0.912", "0.846", "hospital-1 alone"} <= set(words)


@pytest.mark.parametrize("spoil", ["nothing there", "no model", "broken statistics"])
def test_a_folder_without_a_study_is_refused(study: Path, tmp_path: Path, spoil: str) -> None:
    """With what is missing, and without a traceback."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    if spoil == "nothing there":
        (folder / "events.jsonl").unlink()
    elif spoil == "no model":
        (folder / "model.safetensors").unlink()
        shutil.rmtree(folder / "checkpoints")
    else:
        (folder / FILE).write_text('{"round": 1}\n', encoding="utf-8")

    with pytest.raises(ConfigError):
        write_report(folder)


def test_without_matplotlib_the_report_is_refused(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ConfigError, match="matplotlib") as caught:
        write_report(study)

    assert "konsil[explain]" in caught.value.hint


def test_only_a_report_imports_matplotlib() -> None:
    """A coordinator that draws nothing needs it not, and no command is slower for it."""
    code = "import sys, server.cli, client.cli, shared_models.pictures; print('matplotlib' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_releases_are_read_as_they_were_kept(tmp_path: Path) -> None:
    """To the bit; a line that a crash cut is not there, and a round that was told twice counts once."""
    first, again = np.random.default_rng(0).normal(size=(2, 5))
    keep_released(tmp_path, Released(round=4, hospitals=3, statistics=first))
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"round": 8, "hosp')
    keep_released(tmp_path, Released(round=2, hospitals=5, statistics=first))
    keep_released(tmp_path, Released(round=4, hospitals=4, statistics=again))

    found = read_released(tmp_path)

    assert [(one.round, one.hospitals) for one in found] == [(2, 5), (4, 4)]
    np.testing.assert_array_equal(found[1].statistics, again)
    assert read_released(tmp_path / "elsewhere") == []


def test_clipping_below_a_rows_length_is_taken_out_of_account(study: Path, plan: StudyPlan) -> None:
    """At half the length, every patient counts half: counts and noise are doubled, and patients are patients."""
    tight = changed(plan, evaluation={"clip": 0.5})
    released = read_released(study)[-1]

    assert noise_of(tight, task_of(tight), released) == pytest.approx(noise_of(plan, task_of(plan), released))


# cross-validation


def test_folds_are_the_same_plan_but_for_the_fold(plan: StudyPlan) -> None:
    """Each with a name of its own, because a name is used up once; a fold is not divided again."""
    found = fold_plans(plan, 3)

    assert [one.study for one in found] == [f"breast-cancer-fold-{index}" for index in (1, 2, 3)]
    assert len({one.digest() for one in found}) == 3
    assert all(one.model_copy(update={"study": plan.study, "fold": None}) == plan for one in found)
    with pytest.raises(ConfigError, match="fold already"):
        fold_plans(found[0], 3)
    with pytest.raises(ConfigError, match="last round"):
        fold_plans(changed(plan, rounds=3, evaluation={"every": 2}), 3)
    with pytest.raises(ConfigError, match="study"):
        fold_plans(plan.model_copy(update={"study": "a" * 60}), 3)


def test_the_cost_of_all_folds_is_that_of_all_their_charges(plan: StudyPlan) -> None:
    """At the order that is named; more than one fold's, and less than the sum of single figures."""
    cost = cost_of_all(plan, 5)

    every = study_mechanisms(plan, 1000) * 5
    composed = filter_epsilon(total_divergence(every, cost["order"]), order=cost["order"], delta=plan.privacy.delta)
    assert cost["epsilon_of_all"] == pytest.approx(composed)
    assert cost["epsilon_of_one"] < cost["epsilon_of_all"] < 5 * cost["epsilon_of_one"]


def test_a_cross_validation_charges_every_fold_and_says_mean_and_spread(
    example: Example, plan: StudyPlan, tmp_path: Path
) -> None:
    """Every hospital pays for all folds from one ledger; the summary is that of the folds' own releases."""
    found = simulate(tmp_path, example, plan, folds=FOLDS)

    ledger = CliRunner().invoke(
        _hospital_app(), ["budget", str(tmp_path / "run" / "hospitals" / "hospital-1" / "hospital.toml"), "--json"]
    )
    studies = json.loads(ledger.output)["studies"]
    assert [one["study"] for one in studies] == ["breast-cancer-fold-1", "breast-cancer-fold-2"]
    assert [one["rounds"] for one in studies] == [len(study_mechanisms(plan, 1))] * FOLDS
    folders = [tmp_path / "run" / f"fold-{index}" for index in (1, 2)]
    assert found == summarise(plan, folders)
    values = [next(iter(read_report(folder).groups[EVERYBODY].values())).auroc.value for folder in folders]
    told = found["figures"]["AUROC"]
    known = [value for value in values if value is not None]
    assert told["folds"] == len(known)
    assert told["mean"] == (pytest.approx(np.mean(known)) if known else None)
    patients = [
        sum(one.positives + one.negatives for one in read_report(f).groups[EVERYBODY].values()) for f in folders
    ]
    noise = 6 * 0.7 * np.sqrt(3) * np.sqrt(2) * np.sqrt(2 * 40)  # of both totals, six standard deviations
    assert sum(patients) == pytest.approx(_everybody(example), abs=noise)


def _everybody(example: Example) -> int:
    files = [hospital.folder / "data.csv" for hospital in example.hospitals]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) - 1 for file in files)


def _hospital_app() -> Any:
    from client.cli import app as hospital

    return hospital


def test_a_fold_that_released_nothing_is_named(plan: StudyPlan, tmp_path: Path) -> None:
    """There is nothing to take a mean of."""
    with pytest.raises(ConfigError, match=re.escape("breast-cancer-fold-1 has released nothing")):
        summarise(plan, [tmp_path, tmp_path])
