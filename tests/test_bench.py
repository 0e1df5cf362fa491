"""Every benchmark can be asked what it does, and can write its figures for a machine."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted(BENCH.glob("*.py"))


# Several command lines to one process: importing torch takes seconds, and it is the same script each time.
ASKING = """
import contextlib, io, json, runpy, sys
script, lines = json.loads(sys.argv[1])
answers = []
for line in lines:
    sys.argv = [script, *line]
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
    answers.append((status, out.getvalue(), error.getvalue()))
print(json.dumps(answers))
"""
MEASURED_AT_LEAST_ONCE = {
    "attack": "--runs",
    "demo": "--runs",
    "dp_sgd": "--runs",
    "ledger": "--entries",
    "medicine": "--seeds",
    "peers": "--runs",
    "private_study": "--runs",
    "round_latency": "--rounds",
    "round_overhead": "--rounds",
    "scale": "--rounds",
    "secure_aggregation": "--runs",
}


class Answer(NamedTuple):
    """How a script ended, and what it said."""

    status: int
    out: str
    error: str


class Answers(NamedTuple):
    """Of a script that was asked for help, given an unknown option, and told to measure zero times."""

    help: Answer
    unknown: Answer
    zero: Answer
    files: list[str]


@cache
def asked(script: Path) -> Answers:
    """Ask a script, as ``make bench`` would run it; files are those that it left where ``--json`` pointed."""
    with TemporaryDirectory() as folder:
        unknown = ["--json", str(Path(folder) / "figures.json"), "--no-such-option"]
        lines = (["--help"], unknown, [MEASURED_AT_LEAST_ONCE.get(script.stem, "--help"), "0"])
        environment = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(script.parent)}
        said = subprocess.run(
            [sys.executable, "-c", ASKING, json.dumps([str(script), lines])],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
        assert said.returncode == 0, said.stderr
        left = [file.name for file in Path(folder).iterdir()]
        answers = [Answer(*answer) for answer in json.loads(said.stdout)]
        return Answers(help=answers[0], unknown=answers[1], zero=answers[2], files=left)


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
    said = asked(script).help

    assert said.status == 0, said.error
    assert "--json FILE" in said.out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_unknown_option_is_refused_before_anything_is_measured(script: Path) -> None:
    """A typing error costs no minutes and leaves no file."""
    said = asked(script).unknown

    assert said.status == 2
    assert "--no-such-option" in said.error
    assert asked(script).files == []


@pytest.mark.parametrize("script", MEASURED_AT_LEAST_ONCE)
def test_nothing_is_measured_zero_times(script: str) -> None:
    """A median of nothing is an error, and said to be one."""
    said = asked(BENCH / f"{script}.py").zero

    assert said.status == 2
    assert "at least 1" in said.error
