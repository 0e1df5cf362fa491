"""The demo, as a newcomer runs it: real processes, real TLS; and how it ends when something is wrong."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.demo import fit_plan
from server.examples import Example, write_example
from server.processes import find_command
from shared_models.model_file import read_model
from shared_models.privacy.ledger import read_ledger
from shared_models.privacy.mechanisms import best_order, filter_epsilon, study_mechanisms, total_divergence

DEMO = [sys.executable, "-m", "server.cli", "demo"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short demo with three hospitals; what it wrote for machines."""
    folder = tmp_path_factory.mktemp("demo")
    command = [*DEMO, "--rounds", "4", "--hospitals", "3", "--folder", str(folder / "run"), "--json", str(folder / "r")]
    subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    return dict(json.loads((folder / "r").read_text(encoding="utf-8")))


def test_it_writes_every_promised_field(result: dict[str, Any]) -> None:
    """Machines read this file; later versions add fields and remove none."""
    assert result["study"] == "breast-cancer"
    assert result["rounds_completed"] == 4
    assert {"accuracy", "auroc", "auprc", "sensitivity", "specificity", "brier"} <= set(result["metrics"])
    assert set(result["baselines"]) == {"pooled", "local"}
    assert set(result["baselines"]["local"]) == set(result["hospitals"]) == set(result["ledgers"])
    assert result["secure_aggregation"] == {
        "enabled": True,
        "threshold": 3,
        "hospitals": 3,
        "dropped": [],
        "bytes_up_per_round": 4 * (31 + 1024),
        "modulus_bits": 32,
    }
    assert result["metrics_released"] is None
    assert result["seconds"] > 0
    assert result["peak_memory_mb"] > 100


def test_every_hospital_states_what_it_cost(result: dict[str, Any]) -> None:
    """Epsilon comes with delta and unit, the enforced figure beside it, both within the budget."""
    for stated in result["hospitals"].values():
        assert 0 < stated["epsilon"] <= stated["epsilon_filter"] <= stated["budget_epsilon"] == 1
        assert stated["delta"] <= 1 / (10 * stated["public_size"])
        assert stated["unit"] == "patient"
        assert stated["rounds"] == 4


def test_what_it_names_is_there(result: dict[str, Any]) -> None:
    """Model, card and ledgers lie where it says, and say what it says."""
    plan, _ = read_model(Path(result["model"]))
    assert plan.rounds == 4
    card = Path(result["card"]).read_text(encoding="utf-8")
    assert "all data pooled" in card
    assert plan.digest() in card
    for name, path in result["ledgers"].items():
        charges = [entry for entry in read_ledger(Path(path)) if entry.kind == "charge"]
        assert len(charges) == result["hospitals"][name]["rounds"]


def test_it_ends_with_an_audit_of_what_it_did(result: dict[str, Any]) -> None:
    """Everything holds, but nobody tested a trainer; another accountant agrees; the report is there."""
    audited = result["audit"]

    assert audited["verified"] is True
    assert {finding["code"] for finding in audited["findings"]} == {"conformance-missing"}
    assert {finding["severity"] for finding in audited["findings"]} == {"note"}
    assert audited["entries"] == sum(len(read_ledger(Path(path))) for path in result["ledgers"].values())
    assert set(audited["epsilon_recomputed"]) == set(result["hospitals"])
    for name, epsilon in audited["epsilon_recomputed"].items():
        assert epsilon == pytest.approx(result["hospitals"][name]["epsilon"], abs=0.02)
    page = Path(audited["report"]).read_text(encoding="utf-8")
    assert "Everything that was checked holds" in page


@pytest.fixture
def started(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A demo that has begun to train."""
    command = [*DEMO, "--folder", str(tmp_path / "run")]
    # A shell starts what runs in the background with Ctrl-C ignored, and whatever that starts inherits it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "study" / "checkpoints").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_stopped_nothing_stays_behind(started: "subprocess.Popen[str]", number: int) -> None:
    """Ctrl-C or a termination ends every child process, and the exit status is not zero."""
    children = psutil.Process(started.pid).children(recursive=True)
    assert len(children) >= 6

    started.send_signal(number)
    _, said = started.communicate(timeout=30)

    assert started.returncode > 0
    assert "Traceback" not in said
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert (len(gone), alive) == (len(children), [])


def _fails(*arguments: str) -> tuple[str, str]:
    """Run a demo that must fail; its error and hint lines."""
    done = subprocess.run([*DEMO, *arguments], check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 1
    error, hint = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    return error, hint


def test_a_port_in_use_is_said_so(tmp_path: Path) -> None:
    """The coordinator's own words, not the demo's guess."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        error, hint = _fails("--port", str(port), "--folder", str(tmp_path / "run"))

    assert error == f"error: coordinator: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert hint.startswith("hint: ")


def test_a_folder_that_exists_is_not_written_into(tmp_path: Path) -> None:
    """Results of an earlier run are never mixed with a new one's."""
    error, _ = _fails("--folder", str(tmp_path))

    assert "exists already" in error
    assert not list(tmp_path.iterdir())


def test_an_unknown_study_is_named(tmp_path: Path) -> None:
    """With the ones there are; nothing is left half-done."""
    error, hint = _fails("--study", "moon-landing", "--folder", str(tmp_path / "run"))

    assert "moon-landing" in error
    assert "breast-cancer" in hint


@pytest.mark.parametrize("rounds", [1, 5, 60])
def test_another_number_of_rounds_costs_the_same(tmp_path: Path, rounds: int) -> None:
    """The noise is fitted to the rounds: the plan stays within its epsilon, and wastes less than a hundredth of it."""
    example: Example = write_example("breast-cancer", tmp_path, hospitals=3, seed=0)

    plan = fit_plan(example, rounds)

    mechanisms = study_mechanisms(plan, 100)
    order = best_order(mechanisms, plan.privacy.delta)
    cost = filter_epsilon(total_divergence(mechanisms, order), order=order, delta=plan.privacy.delta)
    assert 0.99 * plan.privacy.epsilon < cost <= plan.privacy.epsilon


def test_a_command_that_is_not_installed_is_named() -> None:
    """With what to do about it."""
    from shared_models.errors import ConfigError

    with pytest.raises(ConfigError, match="konsil-nothing is not installed"):
        find_command("konsil-nothing")
