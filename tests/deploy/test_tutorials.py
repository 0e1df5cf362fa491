"""The tutorials: every command in them is run, as it is printed, in both languages the same."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import auditor.cli
import client.cli
import server.cli
from tests.deploy.tools import ROOT, tool

DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ROLES = ("hospital", "coordinator", "auditor", "data-scientist")

# What a block's language means. Readers see shell in all three.
RUN, FAILS, LONG = "sh", "shell", "bash"  # is run; is run, and has to fail; is run by `make soak` only


def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a document with commands in them: language and text."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(kind, text) for kind, text in found if kind in {RUN, FAILS, LONG, "console"}]


def follow(folder: Path, *roles: str, long: bool = False, timeout_s: float = 200) -> str:
    """Do what tutorials say, one after the other in one folder, and say yes to every question.

    Returns:
        What was printed.
    """
    script = ["set -euo pipefail"]
    for role in roles:
        for number, (kind, text) in enumerate(blocks(DOCS / "tutorials" / f"{role}.md")):
            if kind == RUN or (kind == LONG and long):
                script.append(text)
            elif kind == FAILS:
                file = folder / f".{role}-{number}.sh"
                file.write_text(text, encoding="utf-8")
                script.append(f"bash -euo pipefail {file} && {{ echo 'did not fail'; exit 1; }} || true")
    path = folder / ".tutorial.sh"
    path.write_text("\n".join(script), encoding="utf-8")
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = folder / ".tutorial.log"
    with output.open("w") as log, subprocess.Popen([tool("yes", where="coreutils")], stdout=subprocess.PIPE) as asked:
        reader = subprocess.Popen(
            [tool("bash", where="bash"), str(path)],
            cwd=folder,
            env={**os.environ, "PATH": search, "OMP_NUM_THREADS": "1"},
            stdin=asked.stdout,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it leaves behind is ended with it
        )
        try:
            status = reader.wait(timeout_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(reader.pid, signal.SIGKILL)
            asked.kill()
    said = output.read_text(encoding="utf-8")
    assert status == 0, said[-3000:]
    return said


def test_a_study_is_planned_and_audited_as_the_tutorials_say(tmp_path: Path) -> None:
    """Refused, mended, run; then verified, and refused again where evidence is withheld or changed."""
    said = follow(tmp_path, "data-scientist", "auditor")

    assert said.count("refused Proposal: study first-trial would cost epsilon 1.63, more than the 1") == 3
    assert "\n12.2\n" in said
    assert "verified 3 hospitals, 45 entries, 6 attempts; everything holds and agrees" in said
    assert "hospital-3 took part, and its evidence is not here [bundle-missing]" in said


@pytest.mark.soak
def test_a_study_is_measured_and_papers_are_written_as_the_tutorials_say(tmp_path: Path) -> None:
    """The same with what takes longer: the model measured, epsilon computed again, report and papers."""
    said = follow(tmp_path, "data-scientist", "auditor", long=True)

    assert '"auroc"' in said
    assert "by PLD" in said
    assert {"report.html", "papers", "trial.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.soak
def test_a_hospital_can_do_what_its_tutorial_says(tmp_path: Path) -> None:
    """Keys, budget, kit, records, opt-out; the patient on the list is found in the records."""
    said = follow(tmp_path, "hospital", long=True)

    assert "joined heart: roster version 1" in said
    assert re.search(r"opt.out.*\b1\b", said), said
    assert "minimum_noise_multiplier" in said


@pytest.mark.soak
def test_a_coordinator_can_do_all_that_its_tutorial_says(tmp_path: Path) -> None:
    """Founded, three hospitals enrolled, four daemons over TLS, a study, its model and its evidence.

    Needs the ports 9092 and 9093.
    """
    said = follow(tmp_path, "coordinator", long=True, timeout_s=280)

    assert said.count("joined heart: roster version 1, 3 hospitals") == 3
    assert not (tmp_path / "centre" / "root").exists()
    assert "is finished" in said
    assert (tmp_path / "model.safetensors").stat().st_size > 100
    assert (tmp_path / "evidence.tar").stat().st_size > 100


APPS = {"konsil-hospital": client.cli.app, "konsil-coordinator": server.cli.app, "konsil-audit": auditor.cli.app}


def calls(path: Path) -> Iterator[list[str]]:
    """Every call of one of our commands in the blocks of a document, as words."""
    for _, text in blocks(path):
        for line in text.replace("\\\n", " ").splitlines():
            found = re.search(r"(konsil-(?:hospital|coordinator|audit)\b.*)", line)
            if found and not re.search(r"\bcat |systemctl |/etc/systemd/", line):  # a unit is no command
                words = re.split(r";|\s(?:\d?>|[|&#\[])", found[1])[0].rstrip(")")
                yield shlex.split(re.sub(r"[«»…]", "", words))


def refused(call: list[str]) -> str | None:
    """Why the code would not take a call; None if it would."""
    name, *words = call
    try:
        command: Any = typer.main.get_command(APPS[name])
        while hasattr(command, "commands") and words:
            command = command.commands[words.pop(0)]
        command.make_context(name, words)
    except (click.UsageError, KeyError) as error:
        return f"{' '.join(call)}: {error}"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_the_documents_exists(path: Path) -> None:
    """Command, arguments and options are those of the code, also where nothing runs them."""
    assert [why for call in calls(path) if (why := refused(call))] == []


def test_a_command_that_does_not_exist_is_found() -> None:
    """A command, an option, an argument too few; and the documents have many calls to look at."""
    wrong = ("konsil-hospital begin", "konsil-audit verify --rot k evidence", "konsil-coordinator enrol")

    assert [bool(refused(call.split())) for call in wrong] == [True, True, True]
    assert sum(len(list(calls(path))) for path in DOCUMENTS) > 80


@pytest.mark.parametrize("role", ROLES)
def test_both_languages_have_the_same_commands(role: str) -> None:
    """A tutorial's commands are the same, to the letter and in the same order, in English and in Chinese."""
    english, chinese = blocks(DOCS / "tutorials" / f"{role}.md"), blocks(DOCS / "zh" / "tutorials" / f"{role}.md")

    assert chinese == english
    assert len(english) > 3


def test_the_readme_has_the_same_commands_in_both_languages() -> None:
    """Every block of commands of the Chinese README is one of the English README, in the same order."""
    english, chinese = blocks(ROOT / "README.md"), blocks(DOCS / "zh" / "README.md")

    assert [block for block in english if block in chinese] == chinese
    assert len(chinese) >= 5
