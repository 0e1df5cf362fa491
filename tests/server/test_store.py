"""The coordinator's database: states, attempts and rounds, on SQLite and, where there is a server, on PostgreSQL."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect, text

from server.examples import example_plan
from server.store import MIGRATIONS, OpenAttempt, State, Store, Wish
from shared_models.errors import ConfigError, StoreError, StudyStateError, UnknownStudyError
from shared_models.plan import StudyPlan
from tests.federation import changed

NEXT = """\
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None


def upgrade() -> None:
    op.add_column("studies", sa.Column("priority", sa.Integer, nullable=False, server_default="7"))
    op.execute("update studies set priority = number * 10{problem}")
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'coordinator.sqlite'}"
        return
    server: str = request.getfixturevalue("postgres")
    yield server
    engine = create_engine(server)
    with engine.begin() as connection:
        for table in ("studies", "attempts", "rounds", "alembic_version"):
            connection.execute(text(f"drop table if exists {table}"))
    engine.dispose()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """The store over it."""
    opened = Store(url)
    yield opened
    opened.close()


def _plan(name: str = "a-study") -> StudyPlan:
    return changed(example_plan("breast-cancer", 3), study=name)


def test_a_study_is_what_was_submitted_also_after_a_restart(url: str, store: Store, tmp_path: Path) -> None:
    """Name, plan and place in the queue survive; the same plan again is the same study."""
    store.submit(_plan("first"), by="ann", folder=tmp_path / "first")
    store.submit(_plan("second"), by="bob", folder=tmp_path / "second")
    store.submit(_plan("first"), by="eve", folder=tmp_path / "elsewhere")
    store.close()

    again = Store(url)

    first, second = again.all()
    assert (first.name, first.submitted_by, first.folder) == ("first", "ann", tmp_path / "first")
    assert first.number < second.number
    assert first.plan.digest() == _plan("first").digest()
    assert first.state is State.PENDING
    again.close()


def test_a_name_is_one_plan(store: Store, tmp_path: Path) -> None:
    """Hospitals approve a plan by its digest; a second plan of that name would be another study."""
    store.submit(_plan(), by="ann", folder=tmp_path)

    with pytest.raises(StudyStateError, match="with another plan"):
        store.submit(changed(_plan(), rounds=7), by="ann", folder=tmp_path)


@pytest.mark.parametrize("end", [State.FINISHED, State.FAILED, State.STOPPED])
def test_what_is_over_never_begins_again(store: Store, end: State, tmp_path: Path) -> None:
    """Neither by an operator's wish nor by a thread that is late."""
    store.submit(_plan(), by="ann", folder=tmp_path)
    store.enter("a-study", State.RUNNING)
    store.enter("a-study", end, "because")

    with pytest.raises(StudyStateError, match=f"is {end}: it never begins again"):
        store.wish("a-study", Wish.RUN)
    with pytest.raises(StudyStateError):
        store.enter("a-study", State.RUNNING)
    assert (store.study("a-study").state, store.study("a-study").reason) == (end, "because")


def test_an_unknown_study_is_named(store: Store) -> None:
    """With the command that lists those there are."""
    with pytest.raises(UnknownStudyError, match="there is no study nobody"):
        store.wish("nobody", Wish.STOP)


def test_no_number_of_an_attempt_is_used_twice(url: str, store: Store, tmp_path: Path) -> None:
    """Also when the process ended before anybody heard of the attempt: hospitals refuse numbers that they know."""
    store.submit(_plan(), by="ann", folder=tmp_path)
    assert store.begin_attempt("a-study", "train", 1) == 1
    store.close()

    again = Store(url)

    assert again.open_attempts("a-study") == [OpenAttempt("train", 1, 1, charged=False)]
    assert again.begin_attempt("a-study", "train", 1) == 2
    assert again.begin_attempt("a-study", "evaluate", 1) == 1
    assert again.begin_attempt("a-study", "train", 2) == 1
    assert again.attempts("a-study", "train", 1) == 2
    again.close()


def test_spare_charges_are_counted_by_what_was_charged_in_vain(store: Store, tmp_path: Path) -> None:
    """Uncharged attempts cost nothing; of a finished round one charged attempt was not in vain."""
    store.submit(_plan(), by="ann", folder=tmp_path)
    for number, charged in ((1, False), (1, True), (1, True), (2, True), (2, False)):
        attempt = store.begin_attempt("a-study", "train", number)
        if charged:
            store.charged("a-study", "train", number, attempt)
        store.end_attempt("a-study", "train", number, attempt, opened=False)
    store.charged("a-study", "evaluate", 1, store.begin_attempt("a-study", "evaluate", 1))

    assert store.paid_in_vain("a-study", rounds_done=1) == 1 + 1
    assert store.paid_in_vain("a-study", rounds_done=2) == 1
    assert [attempt.purpose for attempt in store.open_attempts("a-study")] == ["evaluate"]


def test_a_round_is_finished_once(store: Store, tmp_path: Path) -> None:
    """What was written first stays; a coordinator that was killed in between writes it again."""
    store.submit(_plan(), by="ann", folder=tmp_path)
    store.finish_round("a-study", 1, {"answered": ["ann"], "metrics_released": None})
    store.finish_round("a-study", 1, {"answered": []})
    store.finish_round("a-study", 2, {"answered": ["bob"]})

    assert [(row.round, row.facts["answered"]) for row in store.rounds("a-study")] == [(1, ["ann"]), (2, ["bob"])]
    assert [row.round for row in store.rounds("a-study", after=1)] == [2]
    assert store.study("a-study").rounds_done == 2


def test_a_database_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    """An older coordinator that wrote into it could destroy what it does not know."""
    path = tmp_path / "coordinator.sqlite"
    Store(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    connection.close()

    with pytest.raises(ConfigError, match="of a newer release: its schema is 9999"):
        Store(f"sqlite:///{path}")


def next_release(folder: Path, *, problem: str = "") -> Path:
    """The migrations of a release after this one, which has another column: there was no format before 0001."""
    migrations = folder / "migrations"
    shutil.copytree(MIGRATIONS, migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "0002_priority.py").write_text(NEXT.format(problem=problem), encoding="ascii")
    return migrations


def _schema_and_studies(url: str) -> tuple[str, list[str], list[Any]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        revision = str(connection.execute(text("select version_num from alembic_version")).scalar_one())
        columns = [column["name"] for column in inspect(connection).get_columns("studies")]
        studies = connection.execute(text("select * from studies order by number")).fetchall()
    engine.dispose()
    return revision, columns, [tuple(study) for study in studies]


def test_an_older_schema_is_migrated_when_it_is_opened_and_the_release_before_refuses_it(
    url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Studies stay what they were, the migration's work is done once; going back is refused, and changes nothing."""
    for name in ("first", "second"):
        store.submit(_plan(name), by="ann", folder=tmp_path / name)
    store.enter("first", State.RUNNING)
    store.close()
    revision, columns, studies = _schema_and_studies(url)

    with monkeypatch.context() as patch:
        patch.setattr("server.store.MIGRATIONS", next_release(tmp_path))
        for _ in range(2):
            later = Store(url)
            assert [(row.name, row.state) for row in later.all()] == [
                ("first", State.RUNNING),
                ("second", State.PENDING),
            ]
            later.close()
    migrated = _schema_and_studies(url)
    with pytest.raises(ConfigError, match="of a newer release: its schema is 0002"):
        Store(url)

    assert revision == "0001"
    assert migrated == ("0002", [*columns, "priority"], [(*study, study[0] * 10) for study in studies])
    assert _schema_and_studies(url) == migrated


def test_a_migration_that_fails_leaves_the_database_as_it_was(
    url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it or nothing: the release before opens it again, with every study."""
    store.submit(_plan("first"), by="ann", folder=tmp_path / "first")
    store.close()
    before = _schema_and_studies(url)

    monkeypatch.setattr("server.store.MIGRATIONS", next_release(tmp_path, problem=" from nowhere at all"))
    with pytest.raises(StoreError):
        Store(url)
    assert _schema_and_studies(url) == before
    monkeypatch.setattr("server.store.MIGRATIONS", MIGRATIONS)

    again = Store(url)
    assert [row.name for row in again.all()] == ["first"]
    again.close()


@pytest.mark.parametrize("wrong", ["not a url", "oracle+cx_nothing://x", "sqlite-nothing:///x"])
def test_a_url_that_names_no_database_is_explained(wrong: str) -> None:
    """With what a URL looks like."""
    with pytest.raises(ConfigError) as caught:
        Store(wrong)

    assert "sqlite:////path" in caught.value.hint


def test_a_full_disk_is_named_and_the_study_stays_as_it_was(tmp_path: Path) -> None:
    """What could not be written has not happened."""
    path = tmp_path / "coordinator.sqlite"
    store = Store(f"sqlite:///{path}")
    store.submit(_plan(), by="ann", folder=tmp_path)
    with store._read() as connection:  # the database may not grow any more
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        connection.rollback()

    def fill() -> None:
        for number in range(1, 10_000):
            store.finish_round("a-study", number, {"text": "x" * 4000})

    with pytest.raises(StoreError, match="full"):
        fill()

    done = store.study("a-study").rounds_done
    assert [row.round for row in store.rounds("a-study")] == list(range(1, done + 1))
    store.close()


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    """An error names the database, not the secret in its URL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install konsil[postgresql]")

    with pytest.raises(StoreError) as caught:
        Store("postgresql+psycopg://konsil:geheim@127.0.0.1:1/none?connect_timeout=2")

    assert "geheim" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
