"""Three hospitals as 0.1.0 left them in the middle of a study, opened by today's release; and the way back.

``tests/vectors/folders_0_1_0.tar.xz`` was written by 0.1.0 itself, with ``tests/vectors/record_folders.py``. It is the
only release before this one: what it wrote is the oldest format that there is of ledger, state and registry.
"""

import json
import shutil
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from auditor.cli import app as auditor_app
from client.books import LEDGER, Books
from client.bundle import RECEIPTS
from client.cli import app
from client.evidence import read_evidence
from server.examples import write_example
from shared_models.errors import PopulationError
from shared_models.messages import Proposal, Refusal, Update
from shared_models.plan import StudyPlan
from shared_models.privacy.head import head_path, read_head
from shared_models.receipts import Anchor, SignedReceipt
from tests.federation import Federation, change_policy, restart_hospitals
from tests.rounds.test_a_server_that_lies import Coordinator

ARCHIVE = Path(__file__).parents[1] / "vectors" / "folders_0_1_0.tar.xz"
HOSPITAL = "hospital-1"


class Before(Federation):
    """The federation of 0.1.0, on a machine that runs today's release.

    Attributes:
        said: What 0.1.0 said of every hospital's budget.
    """

    said: dict[str, Any]


def run(*arguments: object) -> Any:
    """A command of today's; its JSON."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in arguments else done.output


@pytest.fixture
def before(tmp_path: Path) -> Before:
    """Its folders, unpacked; nothing of the new release has looked at them yet."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    said = json.loads((tmp_path / "said.json").read_text("utf-8"))
    example = write_example("breast-cancer", tmp_path / "data", hospitals=3, seed=0)
    for name in said["budgets"]:
        file = tmp_path / "hospitals" / name / "hospital.toml"
        file.write_text(file.read_text("utf-8").replace(said["made_at"], str(tmp_path)), encoding="utf-8")
    made = Before(tmp_path, example, StudyPlan.model_validate_json(json.dumps(said["plans"][1])))
    made.said = said
    return made


def rows(ledger: Path) -> list[Any]:
    """Tables and contents of a ledger's file, as they are."""
    with sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True) as database:
        schema = database.execute("select type, name, sql from sqlite_master order by name").fetchall()
        about = database.execute("select * from about").fetchall()
        return [schema, about, database.execute("select * from entries").fetchall()]


def test_what_it_spent_and_reserved_is_the_same_to_the_digit(before: Before) -> None:
    """Every figure that 0.1.0 printed, read by today's commands; chain, signatures and head hold."""
    for name, said in before.said["budgets"].items():
        now = run("budget", before.settings_file(name), "--json")
        studies = [
            {key: value for key, value in one.items() if key in before.said["budgets"][name]["studies"][0]}
            for one in now.pop("studies")
        ]

        assert studies == said.pop("studies")
        assert now == said
        assert "holds: " in run("ledger", "verify", before.settings_file(name))


def test_opening_it_changes_nothing_of_it_so_that_the_way_back_is_open(before: Before) -> None:
    """A rollback before the first new entry finds the ledger of before, to the byte of every row."""
    settings = before.settings(HOSPITAL)
    ledger, head = settings.state / LEDGER, head_path(settings.state / LEDGER)
    kept, newest = rows(ledger), read_head(head)

    Books.open(settings).close()

    assert rows(ledger) == kept
    assert read_head(head) == newest


def test_the_study_goes_on_once_the_steward_agrees_to_the_new_software(before: Before) -> None:
    """It is asked for again, because an approval of 0.1.0 names no software; then it charges what was reserved."""
    coordinator, file = Coordinator(before), before.settings_file(HOSPITAL)
    old = [len(before.ledger(name)) for name in before.names]
    left = run("budget", file, "--json")["epsilon_left"]

    asked = coordinator.propose(HOSPITAL)
    assert isinstance(asked, Refusal)
    assert asked.code == "pending"
    (listed,) = [one for one in run("studies", file, "--json") if one["study"] == "second"]
    assert "the software changed" in listed["by"]
    for name in before.names:
        coordinator.propose(name)
        run("approve", before.settings_file(name), "second", "--yes", "--digest", before.plan.digest())
        assert not isinstance(coordinator.propose(name), Refusal)
    answer = coordinator.train(round=2)

    assert isinstance(answer, Update)
    restart_hospitals()
    for name, entries in zip(before.names, old, strict=True):
        kinds = [entry.kind for entry in before.ledger(name)[entries:]]
        assert kinds == ["plan-reapproved", *(["charge", "round-done"] if name == HOSPITAL else [])]
        ledger = before.settings(name).state / LEDGER
        assert CliRunner().invoke(auditor_app, ["verify", str(ledger)]).exit_code == 0
    now = run("budget", file, "--json")
    assert now["epsilon_left"] == left  # it was reserved
    assert [one["rounds"] for one in now["studies"]] == [3, 2]


def test_its_patients_have_no_second_budget_under_the_new_release(before: Before) -> None:
    """Registry and local key of 0.1.0 go on counting: a new ledger of the same patients is refused."""
    other = before.folder / "hospitals" / "other"
    shutil.copytree(before.folder / "hospitals" / HOSPITAL, other)
    shutil.rmtree(other / "state")
    text = (other / "hospital.toml").read_text("utf-8")
    text = text.replace('"state"', '"state"\nregistry = "../hospital-1/registry"').replace("all-patients", "again")
    (other / "hospital.toml").write_text(text, encoding="utf-8")

    with pytest.raises(PopulationError, match="a patient has one budget"):
        CliRunner().invoke(
            app, ["check-data", str(other / "hospital.toml")], catch_exceptions=False, standalone_mode=False
        )


def test_the_folder_of_before_the_upgrade_does_not_refund_what_was_charged_after_it(before: Before) -> None:
    """A plain copy of it, put back: the coordinator shows what this hospital has signed since, and it stops."""
    home, coordinator = before.folder / "hospitals" / HOSPITAL, Coordinator(before)
    shutil.copytree(home / "state", before.folder / "copy")
    for name in before.names:
        rule = {"tasks": ["breast-cancer"], "maximum_epsilon": 1.0, "upgrades": "follow"}
        change_policy(before, name, standing_approvals=[rule])
        assert not isinstance(coordinator.propose(name), Refusal)
    assert isinstance(coordinator.train(round=2), Update)
    restart_hospitals()
    signed = SignedReceipt.model_validate(list(read_evidence(home / "state" / RECEIPTS))[-1]["receipt"])
    shutil.rmtree(home / "state")
    shutil.copytree(before.folder / "copy", home / "state")

    answer = coordinator.ask(Proposal(plan=before.plan.model_dump(mode="json"), anchor=Anchor(last=signed)))

    assert isinstance(answer, Refusal)
    assert answer.code == "rolled-back"
