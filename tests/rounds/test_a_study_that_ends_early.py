"""Early stopping and the best model: by released statistics only, and what was reserved for later is free again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

import client.app
from server.checkpoint import BEST, load_checkpoint
from server.journal import read_events
from server.progress import Progress
from shared_models.config import read_toml
from shared_models.model_file import read_about, read_model
from shared_models.update import parameters_to_vector
from tests.federation import Federation, make_federation

EVALUATION = {"every": 1, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}
NEVER_ENOUGH = {"metric": "auroc", "patience": 2, "minimum_improvement": 1.0}  # no AUROC beats another by 1


def _releasing(folder: Path, **changes: Any) -> Federation:
    """Five rounds, statistics after each; hospitals keep some of their patients for validation."""
    federation = make_federation(
        folder,
        rounds=5,
        privacy={"noise_multiplier": 40.0, "spare_charges": 0},
        evaluation=EVALUATION,
        **changes,
    )
    for hospital in federation.example.hospitals:
        manifest = hospital.folder / "manifest.toml"
        # Hospital-4 has ten patients of one class: one split in 35 puts none of them into the validation part.
        declared = {"validation_fraction": 0.3, "absent_classes": ["benign", "malignant"]}
        manifest.write_text(tomli_w.dumps(read_toml(manifest, "manifest") | declared), encoding="utf-8")
    return federation


def test_it_ends_when_the_plan_s_patience_is_used_up(tmp_path: Path) -> None:
    """Two releases after the first that improve too little: three rounds of five, a reason, and a model of round 3."""
    federation = _releasing(tmp_path, early_stopping=NEVER_ENOUGH)

    folder = federation.run()

    assert [event["round"] for event in federation.events("round")] == [1, 2, 3]
    (stopped,) = federation.events("stopped-early")
    assert (stopped["round"], stopped["rounds"]) == (3, 5)
    assert "2 releases in a row improved auroc by no more than 1 on" in stopped["reason"]
    assert read_about(folder / "model.safetensors")["round"] == "3"
    last, _ = load_checkpoint(folder / "checkpoints", federation.plan, 3)
    np.testing.assert_array_equal(parameters_to_vector(read_model(folder / "model.safetensors")[1]), last)
    assert "3 of 5 rounds" in (folder / "card.md").read_text(encoding="utf-8")
    assert len(federation.events("finished")) == 1


def test_what_was_reserved_for_the_rounds_that_were_not_run_is_free_again(tmp_path: Path) -> None:
    """Every hospital's ledger closes the study; what is left is what the charges left, and no reservation."""
    federation = _releasing(tmp_path, early_stopping=NEVER_ENOUGH)

    federation.run()

    for name in federation.names:
        entries = federation.ledger(name)
        assert entries[-1].kind == "study-closed"
        assert [e.round for e in entries if e.kind == "charge"] == [1, 1, 2, 2, 3, 3]
        budget = client.app._hospitals[str(federation.settings_file(name))].books.budget
        assert budget.left() == budget.terms.epsilon - budget.filter_spent()
        (approval,) = [e for e in entries if e.kind == "plan-approved"]
        assert sum(part.charges for part in approval.reservation or ()) == 10


def test_without_a_rule_it_runs_to_its_end_and_the_best_release_s_model_is_kept(tmp_path: Path) -> None:
    """The best of five noised AUROCs, by the journal; its model is that round's, named on the card beside the last."""
    federation = _releasing(tmp_path)
    seen: dict[int, bytes] = {}

    def look(_hospital: str, _request: object) -> None:
        for path in (tmp_path / "study" / "checkpoints").glob("round-*.safetensors"):
            seen.setdefault(int(path.stem.removeprefix("round-")), path.read_bytes())

    federation.wire.on_request = look

    folder = federation.run()

    rounds = federation.events("round")
    assert len(rounds) == 5
    values = [event["metrics_released"]["auroc"] for event in rounds]
    best = 1 + values.index(max(values))
    about = read_about(folder / BEST)
    assert (about["round"], about["metric"], float(about["value"])) == (str(best), "auroc", max(values))
    (tmp_path / "seen.safetensors").write_bytes(seen[best])
    expected = parameters_to_vector(read_model(tmp_path / "seen.safetensors")[1])
    np.testing.assert_array_equal(parameters_to_vector(read_model(folder / BEST)[1]), expected)
    assert read_about(folder / "model.safetensors")["round"] == "5"
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["best"] == {"file": BEST, "round": best, "metric": "auroc", "released": max(values)}
    assert card["stopped_early"] is None
    assert f"`{BEST}` is the model of round {best}" in (folder / "card.md").read_text(encoding="utf-8")


def test_the_journal_alone_says_which_was_best_and_when_to_stop(tmp_path: Path) -> None:
    """A coordinator that was killed comes to the same decisions from what it wrote down."""
    federation = _releasing(tmp_path, early_stopping=NEVER_ENOUGH)

    folder = federation.run()

    progress = Progress(federation.plan)
    verdicts = []
    for event in read_events(folder / "events.jsonl")[0]:
        if event["event"] == "round":
            progress.see(event["round"], event["metrics_released"])
            verdicts.append(progress.verdict())
    assert [verdict is not None for verdict in verdicts] == [False, False, True]
    assert verdicts[-1] == federation.events("stopped-early")[0]["reason"]
    assert progress.best is not None
    assert str(progress.best.round) == read_about(folder / BEST)["round"]


def test_a_study_that_releases_nothing_has_no_best_and_runs_to_its_end(federation: Federation) -> None:
    """Nothing else may choose a model."""
    folder = federation.run()

    assert not (folder / BEST).exists()
    assert json.loads((folder / "card.json").read_text(encoding="utf-8"))["best"] is None
    assert federation.events("stopped-early") == []
