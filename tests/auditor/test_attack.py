"""Attacks on a released model: what was learnt by heart is found, what was trained privately is not."""

import csv
import json
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from auditor.attack import Membership, attack_model
from auditor.canaries import Candidates, read_candidates, write_canaries
from auditor.cli import app
from client.alone import train_without_privacy
from client.dp_sgd import train
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from server.made_up import write_made_up
from shared_models.errors import ConfigError, ConformanceError
from shared_models.model_file import write_model
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan, read_plan
from shared_models.privacy.mechanisms import training_mechanism
from shared_models.tasks import BREAST_CANCER, HEART_DISEASE, TRIAL_IMAGES
from tests.client.made_up import repeatable
from tests.federation import changed

PLAN = changed(
    read_plan(Path(__file__).parents[2] / "server" / "plans" / "heart-disease.toml"),
    network={"name": "mlp", "hidden": [128]},
)
SEED = 1  # of the canaries and their coins: what is random in the attack itself has fixed seeds already
COUNT, SHADOWS, STEPS = 400, 8, 400


def run(*arguments: object) -> None:
    """The command, as its user types it."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def records_of(candidates: Candidates) -> Records:
    """Those that are in, as a hospital would have them; one patient each."""
    rows = np.flatnonzero(candidates.members)
    inputs, targets = torch.from_numpy(candidates.inputs[rows]), torch.from_numpy(candidates.targets[rows]).float()
    return Records(inputs, targets, np.arange(len(rows)), len(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Canaries, a model that learnt them by heart, and one that was trained on them under the plan's mechanism."""
    home = tmp_path_factory.mktemp("attack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "randbits", lambda _: SEED)
        write_canaries(HEART_DISEASE, home / "canaries", count=COUNT)
    candidates = read_candidates(home / "canaries" / "canaries.csv", HEART_DISEASE)
    records = records_of(candidates)
    model = build_network(PLAN.network, HEART_DISEASE, seed=0)
    train_without_privacy(model, records, HEART_DISEASE, steps=1500, learning_rate=0.5, batch_size=32, seed=0)
    write_model(home / "by-heart.safetensors", model, PLAN)
    private = build_network(PLAN.network, HEART_DISEASE, seed=0)
    for number in range(1, PLAN.rounds + 1):
        train(
            private,
            records,
            HEART_DISEASE,
            training=PLAN.training_in(number),
            privacy=PLAN.privacy,
            expected_batch=training_mechanism(PLAN, 100).expected_batch,
            random=repeatable(number),
            allow_test_random=True,
        )
    write_model(home / "private.safetensors", private, PLAN)
    return home


def attacked(folder: Path, model: str, **changes: Any) -> Membership:
    """The attack, as the command makes it."""
    candidates = read_candidates(folder / "canaries" / "canaries.csv", HEART_DISEASE)
    options = {"coin_flips": True, "shadows": SHADOWS, "steps": STEPS, "learning_rate": 0.5, "delta": 1e-4}
    return attack_model(folder / f"{model}.safetensors", candidates, **options | changes)


def test_what_was_learnt_by_heart_is_found(folder: Path) -> None:
    """Far more epsilon than any plan of ours claims, by coins and by rates; and the power says that it could be."""
    found = attacked(folder, "by-heart")

    assert found.auc > 0.7
    assert found.by_guesses is not None
    assert 1 < found.epsilon_lower <= found.by_guesses.epsilon_most
    assert 0.5 < found.by_rates.epsilon_lower <= found.by_rates.epsilon_most
    assert found.auc_without_privacy > 0.6
    assert found.by_guesses.epsilon_without_privacy > 0.5
    assert found.members + found.others == COUNT


def test_what_was_trained_privately_is_not(folder: Path) -> None:
    """The bound exceeds the claimed epsilon of 0.89 with probability 0.05 at most, and in truth hardly ever."""
    found = attacked(folder, "private")

    assert found.epsilon_lower < 0.89
    assert abs(found.auc - 0.5) < 5 * 0.5 / np.sqrt(COUNT)  # five standard errors, and more


def test_without_coins_only_rates_are_said(folder: Path) -> None:
    """Membership that nobody flipped for allows no bound from one run."""
    found = attacked(folder, "by-heart", coin_flips=False)

    assert found.by_guesses is None
    assert found.epsilon_lower == found.by_rates.epsilon_lower


def test_the_command_is_a_release_gate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It refuses the one model, also without --fail-above, and passes the other; everything is in the JSON file."""
    records = ["--records", folder / "canaries" / "canaries.csv", "--coin-flips", "--shadows", SHADOWS]
    options = [*records, "--shadow-steps", STEPS, "--json", folder / "found.json"]

    with pytest.raises(ConformanceError, match=r"above 1$"):
        run("attack", "--model", folder / "by-heart.safetensors", *options)
    said = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    with pytest.raises(ConformanceError, match=r"above 0\.5$"):
        run("attack", "--model", folder / "by-heart.safetensors", *options, "--fail-above", "0.5")
    run("attack", "--model", folder / "private.safetensors", *options, "--fail-above", "0.89")

    assert said["claim"] == {"epsilon": 1.0, "delta": 1e-4, "whose": "promised by the plan"}
    assert said["membership"]["by_guesses"]["epsilon_lower"] > 1
    assert said["noise"] == []
    out = capsys.readouterr()
    assert "without privacy the attack shows" in out.out
    assert f"trained {SHADOWS + 1} of {SHADOWS + 1} models" in out.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "model.safetensors"],
        ["--records", "canaries.csv"],
        ["bundle.zip"],
        ["--model", "no-such-model", "--records", "no-such-file"],
    ],
)
def test_half_of_what_is_needed_is_refused(arguments: list[str]) -> None:
    """With a hint, and before anything is computed."""
    with pytest.raises(ConfigError):
        run("attack", *arguments)


def test_without_torch_the_hint_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An auditor's base installation has none."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())

    with pytest.raises(ConfigError, match="needs torch") as caught:
        run("attack", "--model", folder / "private.safetensors", "--records", folder / "canaries" / "canaries.csv")

    assert "konsil[attack]" in caught.value.hint


@pytest.mark.parametrize("shadows", [0, 2, 5])
def test_too_few_or_odd_shadows_are_refused(folder: Path, shadows: int) -> None:
    """Every record is in half of them, and a variance needs two."""
    with pytest.raises(ConfigError, match="shadow"):
        attacked(folder, "private", shadows=shadows)


# Canaries, written and read


def test_hospitals_read_canaries_as_the_auditor_does(tmp_path: Path) -> None:
    """Both encode a table to the same inputs, and a hospital takes every canary."""
    for task in (HEART_DISEASE, BREAST_CANCER):
        home = tmp_path / task.name
        (hospital,) = write_made_up(task, home / "hospitals", hospitals=1, patients=20, seed=0)
        included = write_canaries(task, home / "canaries", count=40)
        data = hospital.folder / "data.csv"
        lines = (home / "canaries" / "insert.csv").read_text(encoding="utf-8").splitlines()
        assert data.read_text(encoding="utf-8").splitlines()[0] == f"patient,{lines[0]}"
        rows = [f"canary-{number},{line}" for number, line in enumerate(lines[1:])]
        data.write_text("\n".join([f"patient,{lines[0]}", *rows]) + "\n", encoding="utf-8")

        read, _ = read_table(read_manifest(hospital.folder), task, split_key=bytes(32))
        candidates = read_candidates(home / "canaries" / "canaries.csv", task)

        assert len(read) == included == candidates.members.sum()
        np.testing.assert_allclose(read.inputs[:].numpy(), candidates.inputs[candidates.members], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(read.targets[:].numpy(), candidates.targets[candidates.members])


def test_coins_are_fair_and_nobody_elses(tmp_path: Path) -> None:
    """Two sets of canaries differ, and neither has a count of heads beyond six standard deviations."""
    included = [write_canaries(HEART_DISEASE, tmp_path / name, count=1000) for name in ("one", "two")]

    one, two = ((tmp_path / name / "canaries.csv").read_bytes() for name in ("one", "two"))
    assert one != two
    assert all(abs(count - 500) < 6 * np.sqrt(250) for count in included)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Coins that are gone cannot be flipped again."""
    run("canaries", Path(__file__).parents[2] / "server/plans/heart-disease.toml", "--out", tmp_path, "--count", "10")

    with pytest.raises(ConfigError):
        write_canaries(HEART_DISEASE, tmp_path, count=10)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("age", "400", "age is not from 18 to 100 year"),
        ("age", "nan", "age is not"),
        ("age", "old", "age is not"),
        ("sex", "other", "sex is 'other'"),
        ("disease", "", "disease is ''"),
        ("member", "2", "member is '2'"),
    ],
)
def test_a_cell_that_no_hospital_would_take_is_refused(tmp_path: Path, column: str, cell: str, said: str) -> None:
    """With its column."""
    write_canaries(HEART_DISEASE, tmp_path, count=20)
    rows = rows_of(tmp_path / "canaries.csv")
    rows[3][column] = cell
    with (tmp_path / "bad.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    with pytest.raises(ConfigError, match=said):
        read_candidates(tmp_path / "bad.csv", HEART_DISEASE)


@pytest.mark.parametrize("content", ["", "age,member\n50,1\n", "\xff\xfe", '"'])
def test_a_file_that_holds_no_candidates_is_refused(tmp_path: Path, content: str) -> None:
    """An error that says what is missing, never a traceback."""
    (tmp_path / "file.csv").write_bytes(content.encode("latin-1"))

    with pytest.raises(ConfigError):
        read_candidates(tmp_path / "file.csv", HEART_DISEASE)


def test_images_come_as_tensors(tmp_path: Path) -> None:
    """Inputs as the network takes them; a file without membership, or with one kind only, is refused."""
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "inputs": rng.random((6, 1, 28, 28)).astype(np.float32),
        "targets": rng.integers(10, size=6),
        "member": np.array([1, 0, 1, 0, 1, 0]),
    }
    save_file(arrays, tmp_path / "good.safetensors")
    save_file({"inputs": arrays["inputs"]}, tmp_path / "bare.safetensors")
    save_file(arrays | {"member": np.ones(6)}, tmp_path / "all.safetensors")
    save_file(arrays | {"targets": np.full(6, 10)}, tmp_path / "class.safetensors")

    assert read_candidates(tmp_path / "good.safetensors", TRIAL_IMAGES).members.sum() == 3
    for name in ("bare", "all", "class", "absent"):
        with pytest.raises(ConfigError):
            read_candidates(tmp_path / f"{name}.safetensors", TRIAL_IMAGES)
    with pytest.raises(ConfigError, match="no table"):
        write_canaries(TRIAL_IMAGES, tmp_path / "images", count=10)


def test_records_of_another_task_do_not_fit(folder: Path, tmp_path: Path) -> None:
    """The model is asked before any shadow is trained."""
    plan: StudyPlan = PLAN
    assert plan.task == HEART_DISEASE.name
    wrong = Candidates(np.zeros((4, 3), np.float32), np.zeros(4, np.int64), np.array([True, False, True, False]))

    with pytest.raises(ConfigError, match="do not fit the model"):
        attack_model(
            folder / "private.safetensors",
            wrong,
            delta=1e-4,
            coin_flips=True,
            shadows=4,
            steps=1,
            learning_rate=0.1,
        )
