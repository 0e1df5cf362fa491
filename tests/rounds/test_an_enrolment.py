"""From empty folders to a model: every step is a command in a process of its own, as people would type it."""

import json
import shutil
import time
from pathlib import Path

import pytest

from server.demo import fit_plan, free_port, plan_text
from server.examples import write_example
from server.journal import read_events
from server.processes import Children
from shared_models.identity import fingerprint
from shared_models.privacy.mechanisms import best_order, study_mechanisms
from tests.federation import changed

PATIENCE_S = 240


def after(word: str, text: str) -> str:
    """What a command printed after a word."""
    return next(line.removeprefix(word).strip() for line in text.splitlines() if line.startswith(word))


@pytest.mark.timeout(PATIENCE_S + 60)
def test_three_hospitals_enrol_and_train(tmp_path: Path) -> None:
    """Init, enrol, sign, join, start: a study runs to its end, paid for by ledgers that init opened."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=3, seed=0)
    address, centre = f"127.0.0.1:{free_port()}", tmp_path / "centre"
    plan_file, settings = tmp_path / "plan.toml", str(centre / "coordinator.toml")
    plan = changed(fit_plan(example, 2), deadline_s=PATIENCE_S / 2)
    plan_file.write_text(plan_text(plan), encoding="utf-8")
    names = [hospital.name for hospital in example.hospitals]
    with Children(tmp_path / "logs") as children:
        said = children.run("init", "konsil-coordinator", "init", str(centre), "--address", address)
        root = after("root key", said)
        for hospital in example.hospitals:
            home = tmp_path / hospital.name
            size, delta = hospital.public_size, plan.privacy.delta
            order = best_order(study_mechanisms(plan, size), delta)
            figures = ("--epsilon", "4", "--delta", f"{delta}", "--order", f"{order}", "--public-size", f"{size}")
            options = ("--name", hospital.name, "--coordinator", address, *figures)
            said = children.run("init-hospital", "konsil-hospital", "init", str(home), *options)
            shown, request = after("fingerprint", said), after("request", said)
            heard = ("--settings", settings, "--fingerprint", shown)
            children.run("enrol", "konsil-coordinator", "enrol", request, *heard)
            shutil.copytree(hospital.folder, home / "records")
            file = home / "hospital.toml"
            text = file.read_text("utf-8").replace(
                "# standing_approvals = [{tasks", 'standing_approvals = [{tasks = ["breast-cancer"]}]  # [{tasks'
            )
            file.write_text(text, encoding="utf-8")
        key = ("--root-key", str(centre / "root" / "root.key"), "--settings", settings)
        children.run("sign", "konsil-coordinator", "sign", str(centre / "roster.next.json"), *key)
        for name in names:
            own, kit = str(tmp_path / name / "hospital.toml"), str(centre / "kits" / f"{name}.kit.json")
            children.run("join", "konsil-hospital", "join", own, kit, "--root-fingerprint", root)
        children.start("run", "konsil-coordinator", "run", str(plan_file), "--settings", settings)
        for name in names:
            children.start(name, "konsil-hospital", "start", str(tmp_path / name / "hospital.toml"))
        deadline = time.monotonic() + PATIENCE_S
        while children.check("run") and time.monotonic() < deadline:
            time.sleep(0.2)
        status = json.loads(
            children.run("status", "konsil-hospital", "status", str(tmp_path / names[0] / "hospital.toml"), "--json")
        )
    events = read_events(next((centre / "state" / "studies").iterdir()) / "events.jsonl")[0]

    assert [event["answered"] for event in events if event["event"] == "round"] == [names] * 2
    assert events[-1]["event"] == "finished"
    assert Path(events[-1]["model"]).exists()
    assert status["members"] == names
    assert status["ledger_entries"] > 1
    assert status["epsilon_left"] < 4
    assert root == fingerprint(bytes.fromhex((centre / "root.pub").read_text("ascii")))
