"""Every benchmark can be asked what it does, and can write its figures for a machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted(BENCH.glob("*.py"))


def run(script: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a script as ``make bench`` does."""
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )


def test_there_are_benchmarks() -> None:
    """An empty folder would let every other claim here hold for nothing."""
    known = {
        "attack.py",
        "demo.py",
        "dp_sgd.py",
        "ledger.py",
        "medicine.py",
        "peers.py",
        "round_latency.py",
        "round_overhead.py",
        "scale.py",
        "secure_aggregation.py",
    }
    assert known <= {script.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_benchmark_explains_itself_and_its_json(script: Path) -> None:
    """``--help`` measures nothing, and names ``--json FILE``."""
    said = run(script, "--help")

    assert said.returncode == 0, said.stderr
    assert "--json FILE" in said.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_unknown_option_is_refused_before_anything_is_measured(script: Path, tmp_path: Path) -> None:
    """A typing error costs no minutes and leaves no file."""
    said = run(script, "--json", str(tmp_path / "figures.json"), "--no-such-option")

    assert said.returncode == 2
    assert "--no-such-option" in said.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("attack", "--runs"),
        ("demo", "--runs"),
        ("dp_sgd", "--runs"),
        ("ledger", "--entries"),
        ("medicine", "--seeds"),
        ("peers", "--runs"),
        ("round_latency", "--rounds"),
        ("round_overhead", "--rounds"),
        ("scale", "--rounds"),
        ("secure_aggregation", "--runs"),
    ],
)
def test_nothing_is_measured_zero_times(script: str, option: str) -> None:
    """A median of nothing is an error, and said to be one."""
    said = run(BENCH / f"{script}.py", option, "0")

    assert said.returncode == 2
    assert "at least 1" in said.stderr
