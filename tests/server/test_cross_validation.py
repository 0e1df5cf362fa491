"""Cross-validation as the command does it: hospitals as processes over TLS, a study for each fold."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from client.books import LEDGER
from server.demo import free_port, lay_out
from server.examples import Example, write_example
from shared_models.config import read_toml
from shared_models.privacy.ledger import read_ledger
from tests.federation import changed

FOLDS = 3


@contextmanager
def hospitals(folder: Path, example: Example) -> Iterator[None]:
    """Their daemons, while the block runs."""
    started = []
    try:
        for hospital in example.hospitals:
            settings = folder / "hospitals" / hospital.name / "hospital.toml"
            with (folder / f"{hospital.name}.log").open("w", encoding="utf-8") as log:
                started.append(
                    subprocess.Popen([sys.executable, "-m", "client.cli", "start", str(settings)], stderr=log)
                )
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=60)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_all_folds_run_and_are_charged_and_a_second_call_only_tells(tmp_path: Path) -> None:
    """Three studies, each in every ledger; given again, the command finds them finished and charges nothing."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=3, seed=0)
    plan = changed(
        example.plan,
        rounds=2,
        privacy={"noise_multiplier": 2.0, "epsilon": 100.0},
        evaluation={"every": 2, "clip": 1.0, "noise_multiplier": 2.0},
    )
    lay_out(tmp_path, example, plan, port=free_port())
    for hospital in example.hospitals:
        manifest, settings = hospital.folder / "manifest.toml", tmp_path / "hospitals" / hospital.name / "hospital.toml"
        fields = read_toml(manifest, "manifest") | {"absent_classes": ["benign", "malignant"]}
        manifest.write_text(tomli_w.dumps(fields), encoding="utf-8")
        fields = read_toml(settings, "settings file")
        fields["population"]["epsilon"] *= FOLDS
        settings.write_text(tomli_w.dumps(fields), encoding="utf-8")
    coordinator = str(tmp_path / "coordinator" / "coordinator.toml")
    call = [sys.executable, "-m", "server.cli", "cross-validate", str(tmp_path / "plan.toml"), "--folds", str(FOLDS)]
    call += ["--settings", coordinator, "--json", str(tmp_path / "summary.json")]

    def run() -> tuple[dict[str, object], list[int]]:
        subprocess.run(call, check=True, timeout=600)
        ledgers = [tmp_path / "hospitals" / one.name / "state" / LEDGER for one in example.hospitals]
        return json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")), [
            sum(entry.kind == "charge" for entry in read_ledger(ledger)) for ledger in ledgers
        ]

    with hospitals(tmp_path, example):
        first, charges = run()
        again, charges_again = run()

    assert charges == charges_again == [FOLDS * 3] * 3
    assert first == again
    entries = read_ledger(tmp_path / "hospitals" / "hospital-1" / "state" / LEDGER)
    approved = [entry.study for entry in entries if entry.kind == "plan-approved"]
    assert sorted(filter(None, approved)) == [f"breast-cancer-fold-{index}" for index in range(1, FOLDS + 1)]
