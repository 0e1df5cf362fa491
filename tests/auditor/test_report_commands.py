"""``report``, ``statement`` and ``diff`` as a person uses them: as processes, on files."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.auditor.conftest import Told


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """One command."""
    return subprocess.run(
        [sys.executable, "-m", "auditor.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_report_is_written(told: Told, tmp_path: Path) -> None:
    """Page and JSON, the verdict on the terminal, exit status 0, nothing on standard error."""
    page, data = tmp_path / "report.html", tmp_path / "report.json"

    done = run("report", *told.everything, "--root", told.root, "-o", page, "--json", data)

    assert (done.returncode, done.stderr) == (0, "")
    assert "Everything that was checked holds" in done.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    fields = json.loads(data.read_bytes())
    assert fields["passed"]
    assert sorted(fields["entries"]) == sorted(told.late)


def test_a_report_is_written_of_what_does_not_hold_as_well(told: Told, tmp_path: Path) -> None:
    """A bundle that was changed and one that is missing: named on the page, exit status 1, two lines."""
    broken, page = tmp_path / "hospital-1.zip", tmp_path / "report.html"
    with zipfile.ZipFile(told.late["hospital-1"]) as archive, zipfile.ZipFile(broken, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name).replace(b'"round":2', b'"round":3'))

    done = run("report", broken, told.late["hospital-2"], *told.studies, "--root", told.root, "-o", page)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    text = page.read_text(encoding="utf-8")
    assert "cannot be shown to hold" in text
    assert "hospital-1.zip" in text


def test_a_folder_of_everything_is_read_whole(told: Told, tmp_path: Path) -> None:
    """Bundles that lie in a study's own folder, or deeper, are verified too; what nobody looked at is named."""
    folder, data = tmp_path / "study", tmp_path / "found.json"
    shutil.copytree(told.studies[0], folder)
    shutil.copytree(told.studies[1], folder / "more" / "study")
    for place, (name, bundle) in zip(["", "more", "more/study", "deep/down"], told.late.items(), strict=True):
        (folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle, folder / place / f"{name}.zip")
    (folder / "notes.txt").write_text("by hand", encoding="utf-8")

    done = run("verify", folder, "--root", told.root, "--json", data)

    assert (done.returncode, done.stderr) == (0, "")
    assert "verified 4 hospitals" in done.stdout
    assert "everything holds and agrees" in done.stdout
    assert f"not looked at: {folder}/" in done.stdout
    fields = json.loads(data.read_bytes())
    assert str(folder / "notes.txt") in fields["not_looked_at"]
    assert not [path for path in fields["not_looked_at"] if path.endswith((".zip", "receipts.jsonl", "sums.jsonl"))]


def test_papers_are_written_to_a_folder_or_a_file(told: Told, tmp_path: Path) -> None:
    """All of them with their data and the export; or one file by its ending."""
    done = run("statement", *told.everything, "--root", told.root, "--study", "lungs", "-o", tmp_path / "papers")
    files = ["dpia-annex.md", "log.jsonl", "privacy-statement.md", "record-of-processing.md"]

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "papers").iterdir()) == [
        *files,
        "statement.html",
        "statement.json",
    ]
    for ending, start in [("md", "# Privacy statement"), ("json", "{"), ("html", "<!doctype html>")]:
        path = tmp_path / f"one.{ending}"
        done = run("statement", *told.everything, "--root", told.root, "--study", "lungs", "-o", path)
        assert done.returncode == 0, done.stderr
        assert path.read_text(encoding="utf-8").startswith(start)


def test_evidence_is_compared(told: Told, tmp_path: Path) -> None:
    """Forwards it goes on; backwards it is a rollback, exit status 1 and two lines; as JSON too."""
    early, late, data = told.early["hospital-2"], told.late["hospital-2"], tmp_path / "diff.json"

    forwards = run("diff", early, late, "--root", told.root, "--json", data)
    backwards = run("diff", late, early)

    assert (forwards.returncode, forwards.stderr) == (0, "")
    assert "study lungs: 0 charges, then 2; epsilon 0.0000, then 0." in forwards.stdout
    assert "goes on" in forwards.stdout
    assert json.loads(data.read_bytes())["findings"] == []
    assert backwards.returncode == 1
    assert "[history-rolled-back]" in backwards.stdout
    assert len(backwards.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nothing.zip", "-o", "{folder}/r.html"], "cannot be read"),
        (["report", "{bundle}", "--partial", "-o", "{folder}/no/such/folder/r.html"], "cannot be written"),
        (["statement", "{bundle}", "--partial", "--study", "kidneys", "-o", "{folder}/p"], "approved a study kidneys"),
        (["report", "{bundle}", "-o", "{bundle}"], "would be written over"),
        (["report", "{bundle}", "-o", "{folder}/r.html", "--json", "{bundle}"], "would be written over"),
        (["statement", "{bundle}", "--study", "lungs", "-o", "{bundle}"], "would be written over"),
        (["diff", "{bundle}", "{bundle}", "--json", "{bundle}"], "would be written over"),
        (["diff", "{bundle}", "nothing.zip"], "cannot be read"),
        (["diff", "{root}", "{root}"], "neither a bundle"),
        (["report", "{bundle}", "--root", "nothing.pub", "-o", "{folder}/r.html"], "nothing.pub"),
    ],
)
def test_a_mistake_ends_in_two_lines(told: Told, tmp_path: Path, arguments: list[str], words: str) -> None:
    """An error and a hint, no traceback, a status that is not 0."""
    places = {"folder": tmp_path, "bundle": told.late["hospital-3"], "root": told.root}

    done = run(*(argument.format(**places) for argument in arguments))

    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert words in done.stderr


def test_the_commands_load_nothing_heavy() -> None:
    """Their help needs neither the accountant nor templates, and a report needs no torch, Flower or Opacus."""
    code = "import sys, auditor.cli; print([n for n in ('jinja2', 'dp_accounting', 'scipy') if n in sys.modules])"
    more = "import sys, auditor.cli, auditor.render, auditor.papers, auditor.audit, auditor.diff, auditor.claims"
    heavy = "print([n for n in ('torch', 'flwr', 'opacus', 'grpc', 'pandas') if n in sys.modules])"

    found = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=60).stdout
        for text in (code, f"{more}; {heavy}")
    ]

    assert found == ["[]\n", "[]\n"]
