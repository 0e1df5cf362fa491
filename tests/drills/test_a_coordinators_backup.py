"""The coordinator's machine is lost, and comes back from a backup that was made while it ran."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from auditor.cli import app as auditor_app
from server.audit import AuditLog
from server.backup import backup, restore
from server.expiry import expiries
from server.settings import Settings, read_settings
from server.store import State, Store
from shared_models.errors import BackupError
from shared_models.privacy.head import head_path
from tests.centre import plan
from tests.client.test_enrol import Consortium
from tests.conftest import POSTGRES
from tests.drills.consortium import connects, found, say, serving


def with_two_studies(settings: Settings) -> Store:
    """The database with a study that is over and one that waits; open."""
    store = Store(settings.database_url)
    for name in ("first", "second"):
        store.submit(plan(name), by="the test", folder=settings.state / "studies" / name)
        (settings.state / "studies" / name).mkdir(parents=True)
        (settings.state / "studies" / name / "events.jsonl").write_text('{"event":"started"}\n', encoding="ascii")
    store.enter("first", State.FINISHED)
    return store


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """A coordinator with one hospital, two studies, and an audit log."""
    made = found(tmp_path, "north")
    settings = read_settings(made.settings)
    settings.state.mkdir(mode=0o700)
    store = with_two_studies(settings)
    store.close()
    (settings.state / "last-receipts.json").write_text("{}", encoding="ascii")
    return made


def test_a_coordinator_comes_back_with_its_studies_its_roster_and_its_audit_log(consortium: Consortium) -> None:
    """Backed up while both are open; hospitals connect to the restored one as if nothing had been."""
    settings, folder = read_settings(consortium.settings), consortium.folder / "backup"
    store = Store(settings.database_url)
    with AuditLog(settings.state) as audit:
        audit.append("started", code="0" * 64)
        made = say("konsil-coordinator", "backup", folder, "--settings", consortium.settings)
        audit.append("started", code="0" * 64)
    store.close()
    root = consortium.folder / "root.key"
    shutil.copy(consortium.centre / "root" / "root.key", root)
    shutil.rmtree(consortium.centre)

    said = say("konsil-coordinator", "restore", folder, "--settings", consortium.settings)

    assert made.code == said.code == 0, made.text + said.text
    assert "The root key is not in it" in made.text
    assert "Submit its plan under another name" in said.text
    assert not any(b"PRIVATE" in path.read_bytes() for path in folder.rglob("root.key"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}
    store = Store(settings.database_url)
    assert [(row.name, row.state) for row in store.all()] == [("first", State.FINISHED), ("second", State.PENDING)]
    store.close()
    with AuditLog(settings.state) as audit:
        assert audit.export()[1].seq == 2
    assert [expiry.holder for expiry in expiries(settings)] == ["coordinator", "authority", "hospital:north"]
    with serving(consortium):
        connects(consortium, "north")


def test_a_coordinator_that_is_there_is_not_rewound(consortium: Consortium) -> None:
    """The message says to move the state aside, and to keep it."""
    folder = consortium.folder / "backup"
    backup(read_settings(consortium.settings), consortium.settings, folder)

    said = say("konsil-coordinator", "restore", folder, "--settings", consortium.settings)

    assert said.code == 1
    assert "restoring would rewind its studies and its audit log" in said.last_words[0]
    assert "move it aside first" in said.last_words[1]


def test_a_database_elsewhere_is_not_in_the_backup_and_said_so(consortium: Consortium) -> None:
    """With what makes a copy of it, and without its password."""
    text = consortium.settings.read_text("utf-8")
    url = "postgresql+psycopg://konsil:secret@db.example.org/konsil"
    consortium.settings.write_text(f'database = "{url}"\n{text}', encoding="utf-8")

    said = say("konsil-coordinator", "backup", consortium.folder / "backup", "--settings", consortium.settings)

    assert said.code == 0, said.text
    assert "back it up with pg_dump" in said.text
    assert "secret" not in said.text
    assert not (consortium.folder / "backup" / "state" / "coordinator.sqlite").exists()


def test_a_coordinator_on_postgresql_comes_back_from_its_dump_and_its_backup(postgres: str, tmp_path: Path) -> None:
    """The database by PostgreSQL's own programs, as the runbook has it, and the rest by ours."""
    server = postgres.removeprefix("postgresql+psycopg://konsil@/postgres?host=")
    url, plain = (f"{scheme}://konsil@/centre?host={server}" for scheme in ("postgresql+psycopg", "postgresql"))
    tool(server, "createdb", "centre")
    made = found(tmp_path, "north")
    text = made.settings.read_text("utf-8")
    made.settings.write_text(f'database = "{url}"\n{text}', encoding="utf-8")
    settings, folder = read_settings(made.settings), tmp_path / "backup"
    store = with_two_studies(settings)
    store.finish_round("second", 1, {"answered": ["north"]})
    before = [(row.name, row.state, row.plan.digest(), row.rounds_done) for row in store.all()]
    tool(server, "pg_dump", "--format=custom", f"--file={tmp_path / 'konsil.dump'}", plain)
    kept = say("konsil-coordinator", "backup", folder, "--settings", made.settings)
    store.submit(plan("third"), by="the test", folder=settings.state / "studies" / "third")
    store.close()
    tool(server, "dropdb", "centre")
    shutil.rmtree(made.centre)

    tool(server, "createdb", "centre")
    tool(server, "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={plain}", tmp_path / "konsil.dump")
    said = say("konsil-coordinator", "restore", folder, "--settings", made.settings)

    assert kept.code == said.code == 0, kept.text + said.text
    store = Store(settings.database_url)
    assert [(row.name, row.state, row.plan.digest(), row.rounds_done) for row in store.all()] == before
    assert [row.facts for row in store.rounds("second")] == [{"answered": ["north"]}]
    assert store.submit(plan("third"), by="the test", folder=settings.state / "studies" / "third").number == 3
    store.close()
    assert all((settings.state / "studies" / name / "events.jsonl").exists() for name in ("first", "second"))
    with serving(made):
        connects(made, "north")
    tool(server, "dropdb", "--force", "centre")


def tool(server: str, name: str, *arguments: object) -> None:
    """One of PostgreSQL's programs."""
    command = [str(POSTGRES[-1] / name), *map(str, arguments)]
    environment = {**os.environ, "PGHOST": server, "PGUSER": "konsil"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_an_audit_log_is_ended_by_moving_it_away_and_a_new_one_begins(consortium: Consortium, tmp_path: Path) -> None:
    """As the runbook has it: the old chain still holds under its own key, and the new one has another."""
    settings, archive = read_settings(consortium.settings), tmp_path / "archive"
    with AuditLog(settings.state) as audit:
        audit.append("started", code="0" * 64)
        old = audit.public_key
    archive.mkdir()
    export = say("konsil-coordinator", "audit", "export", "--out", archive / "log", "--settings", consortium.settings)
    for path in settings.state.glob("audit.*"):
        path.rename(archive / path.name)

    with AuditLog(settings.state) as audit:
        assert audit.export()[1].seq == 1
        assert audit.public_key != old

    assert export.code == 0, export.text
    held = CliRunner().invoke(auditor_app, ["log", str(archive / "log"), "--key", str(archive / "audit.pub")])
    assert held.exit_code == 0, held.output


def test_a_damaged_backup_leaves_no_half_of_a_coordinator(consortium: Consortium) -> None:
    """Every file is checked before the first is written."""
    folder = consortium.folder / "backup"
    backup(read_settings(consortium.settings), consortium.settings, folder)
    (folder / "tls" / "tls.key").write_bytes(b"nothing")
    shutil.rmtree(consortium.centre)
    consortium.centre.mkdir()

    with pytest.raises(BackupError, match="is damaged"):
        restore(folder, consortium.settings)

    assert list(consortium.centre.iterdir()) == []
    assert head_path(Path("audit.jsonl")).name == "audit.jsonl.head"
