"""The coordinator's database: which studies there are, how far each is, and which attempts have been made.

It holds what must survive a crash whole: SQLite by default, PostgreSQL by URL. What is only told (the journal), what is
evidence, and parameters are files in the study's folder; a round is finished when its checkpoint is there.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    Engine,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from shared_models.errors import ConfigError, StoreError, StudyStateError, UnknownStudyError
from shared_models.plan import StudyPlan, parse_plan_json

MIGRATIONS = Path(__file__).with_name("migrations")


class State(StrEnum):
    """Where a study is. The last three are its end."""

    PENDING = "pending"
    """Proposed; waiting for hospitals to connect, and for their stewards."""
    QUEUED = "queued"
    """Enough hospitals take part; earlier studies have their turn there."""
    RUNNING = "running"
    PAUSED = "paused"
    """By an operator, until one resumes it; or below quorum, until enough hospitals are back."""
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self in {State.FINISHED, State.FAILED, State.STOPPED}


class Wish(StrEnum):
    """What an operator wants of a study; a coordinator that was killed still knows."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"


class StudyRow(NamedTuple):
    """A study as the database has it.

    Attributes:
        number: Studies are numbered in the order of their submission.
        reason: Why it is in its state, in words; None where that is plain.
        submitted_by: Who asked for it.
        submitted_at: Unix time, in seconds.
        changed_at: When its state last changed; Unix time, in seconds.
        rounds_done: Rounds that are finished.
        folder: Where its files are.
    """

    number: int
    name: str
    plan: StudyPlan
    state: State
    wish: Wish
    reason: str | None
    submitted_by: str
    submitted_at: float
    changed_at: float
    rounds_done: int
    folder: Path


class OpenAttempt(NamedTuple):
    """An attempt that a coordinator began and did not end."""

    purpose: str
    round: int
    attempt: int
    charged: bool


class RoundRow(NamedTuple):
    """A finished round.

    Attributes:
        finished_at: Unix time, in seconds.
        facts: As in the journal.
    """

    round: int
    finished_at: float
    facts: dict[str, Any]


_metadata = MetaData()

_studies = Table(
    "studies",
    _metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("plan", Text, nullable=False),
    Column("plan_digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("wish", String(8), nullable=False),
    Column("reason", Text),
    Column("submitted_by", String(200), nullable=False),
    Column("submitted_at", Double, nullable=False),
    Column("changed_at", Double, nullable=False),
    Column("folder", Text, nullable=False),
)

_attempts = Table(
    "attempts",
    _metadata,
    Column("study", String(64), primary_key=True),
    Column("purpose", String(16), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("charged", Boolean, nullable=False),
    Column("opened", Boolean),  # absent while the attempt goes on
)

_rounds = Table(
    "rounds",
    _metadata,
    Column("study", String(64), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("finished_at", Double, nullable=False),
    Column("facts", JSON, nullable=False),
)


class Store:
    """The database, migrated to this release's schema when it is opened. Safe to use from several threads.

    Guarantees:
        * What a method wrote is on the disk when it returns.

    Args:
        url: As SQLAlchemy takes it, such as ``sqlite:////var/lib/konsil/coordinator.sqlite`` or
            ``postgresql+psycopg://konsil@db/konsil``.

    Raises:
        ConfigError: The URL names no database that is installed, or the database is of a newer release.
        StoreError: The database cannot be reached or written.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine = create_engine(url, **_options(url))
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError(
                f"database {_without_password(url)}: {error}",
                hint="Give a URL such as sqlite:////path/coordinator.sqlite; PostgreSQL needs pip install psycopg.",
            ) from None
        event.listen(self._engine, "connect", _durable_sqlite)
        try:
            with self._said():
                _migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Name the cause when the database does not do what it is told."""
        try:
            yield
        except IntegrityError:
            raise  # what it means is the caller's to say
        except DBAPIError as error:
            raise StoreError(
                f"the coordinator's database {_without_password(str(self._engine.url))}: {error.orig}",
                hint="Check the disk, or the database server. Studies go on where they were when it is back.",
            ) from None

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._said(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._said(), self._engine.connect() as connection:
            yield connection

    def submit(self, plan: StudyPlan, *, by: str, folder: Path) -> StudyRow:
        """Enter a study. The same plan again changes nothing: whoever lost the answer may ask again.

        Raises:
            StudyStateError: There is a study of this name with another plan.
        """
        now = time.time()
        fields = {
            "name": plan.study,
            "plan": plan.canonical().decode(),
            "plan_digest": plan.digest(),
            "state": State.PENDING,
            "wish": Wish.RUN,
            "submitted_by": by,
            "submitted_at": now,
            "changed_at": now,
            "folder": str(folder),
        }
        try:
            with self._write() as connection:
                connection.execute(insert(_studies).values(fields))
        except IntegrityError:
            with self._read() as connection:
                query = select(_studies.c.plan_digest).where(_studies.c.name == plan.study)
                if connection.execute(query).scalar_one() != plan.digest():
                    raise StudyStateError(
                        f"there is a study {plan.study} already, with another plan",
                        hint="Give the new study a name of its own; names are never used again.",
                    ) from None
        return self.study(plan.study)

    def study(self, name: str) -> StudyRow:
        """One study.

        Raises:
            UnknownStudyError: There is none of this name.
        """
        with self._read() as connection:
            row = connection.execute(_query().where(_studies.c.name == name)).one_or_none()
        if row is None:
            raise UnknownStudyError(f"there is no study {name}", hint="See konsil-coordinator list.")
        return _study(row)

    def all(self) -> list[StudyRow]:
        """All studies, in the order of their submission."""
        with self._read() as connection:
            return [_study(row) for row in connection.execute(_query().order_by(_studies.c.number))]

    def wish(self, name: str, wish: Wish) -> StudyRow:
        """Write down what an operator wants.

        Raises:
            UnknownStudyError: There is no such study.
            StudyStateError: It is over.
        """
        self._change(name, {"wish": wish})
        return self.study(name)

    def enter(self, name: str, state: State, reason: str | None = None) -> None:
        """Move a study to another state.

        Raises:
            StudyStateError: It is over; what is over never begins again.
        """
        self._change(name, {"state": state, "reason": reason, "changed_at": time.time()})

    def _change(self, name: str, values: Mapping[str, Any]) -> None:
        over = [state for state in State if state.over]
        with self._write() as connection:
            query = update(_studies).where(_studies.c.name == name, _studies.c.state.not_in(over)).values(values)
            changed = connection.execute(query).rowcount
        if not changed:
            state = self.study(name).state
            raise StudyStateError(
                f"study {name} is {state}: it never begins again",
                hint="Submit the plan under another name for a new study; it is approved and charged anew.",
            )

    def begin_attempt(self, study: str, purpose: str, round_number: int) -> int:
        """The next attempt at a sum: on the disk before anybody hears of it, so that no number is used twice."""
        where = (_attempts.c.study == study, _attempts.c.purpose == purpose, _attempts.c.round == round_number)
        with self._write() as connection:
            last = connection.execute(select(func.max(_attempts.c.attempt)).where(*where)).scalar() or 0
            values = {"study": study, "purpose": purpose, "round": round_number, "attempt": last + 1, "charged": False}
            connection.execute(insert(_attempts).values(values))
        return int(last) + 1

    def charged(self, study: str, purpose: str, round_number: int, attempt: int) -> None:
        """Hospitals are about to be asked to compute: from here on this attempt has cost them."""
        self._update_attempt(study, purpose, round_number, attempt, {"charged": True})

    def end_attempt(self, study: str, purpose: str, round_number: int, attempt: int, *, opened: bool) -> None:
        """An attempt is over: its sum opened, or it did not."""
        self._update_attempt(study, purpose, round_number, attempt, {"opened": opened})

    def _update_attempt(
        self, study: str, purpose: str, round_number: int, attempt: int, values: Mapping[str, Any]
    ) -> None:
        key = (study, purpose, round_number, attempt)
        columns = (_attempts.c.study, _attempts.c.purpose, _attempts.c.round, _attempts.c.attempt)
        where = [column == value for column, value in zip(columns, key, strict=True)]
        with self._write() as connection:
            connection.execute(update(_attempts).where(*where).values(values))

    def open_attempts(self, study: str) -> list[OpenAttempt]:
        """Attempts that were begun and not ended: after a crash, those that the crash ended."""
        query = select(_attempts.c.purpose, _attempts.c.round, _attempts.c.attempt, _attempts.c.charged).where(
            _attempts.c.study == study, _attempts.c.opened.is_(None)
        )
        with self._read() as connection:
            return [OpenAttempt(*row) for row in connection.execute(query)]

    def attempts(self, study: str, purpose: str, round_number: int) -> int:
        """How many attempts at a sum have been begun."""
        where = (_attempts.c.study == study, _attempts.c.purpose == purpose, _attempts.c.round == round_number)
        with self._read() as connection:
            return int(connection.execute(select(func.count()).select_from(_attempts).where(*where)).scalar_one())

    def paid_in_vain(self, study: str, rounds_done: int) -> int:
        """Charged attempts at rounds that came to nothing: as many spare charges are used.

        Of a round that has been finished one attempt was not in vain, even where its sum opened and the coordinator
        was killed before it had saved what came of it.
        """
        query = (
            select(_attempts.c.round, func.count())
            .where(_attempts.c.study == study, _attempts.c.purpose == "train", _attempts.c.charged)
            .group_by(_attempts.c.round)
        )
        with self._read() as connection:
            return sum(count - (number <= rounds_done) for number, count in connection.execute(query))

    def finish_round(self, study: str, round_number: int, facts: Mapping[str, Any]) -> None:
        """Write down what is known of a finished round; once, whatever happens in between."""
        values = {
            "study": study,
            "round": round_number,
            "finished_at": time.time(),
            "facts": json.loads(json.dumps(facts)),
        }
        try:
            with self._write() as connection:
                connection.execute(insert(_rounds).values(values))
        except IntegrityError:
            pass

    def rounds(self, study: str, after: int = 0) -> list[RoundRow]:
        """Finished rounds after one, oldest first."""
        query = (
            select(_rounds.c.round, _rounds.c.finished_at, _rounds.c.facts)
            .where(_rounds.c.study == study, _rounds.c.round > after)
            .order_by(_rounds.c.round)
        )
        with self._read() as connection:
            return [RoundRow(*row) for row in connection.execute(query)]


def _query() -> Any:
    done = select(func.count()).where(_rounds.c.study == _studies.c.name).scalar_subquery()
    return select(_studies, done.label("rounds_done"))


def _study(row: Row[Any]) -> StudyRow:
    return StudyRow(
        number=row.number,
        name=row.name,
        plan=parse_plan_json(row.plan, f"the plan of study {row.name}"),
        state=State(row.state),
        wish=Wish(row.wish),
        reason=row.reason,
        submitted_by=row.submitted_by,
        submitted_at=row.submitted_at,
        changed_at=row.changed_at,
        rounds_done=row.rounds_done,
        folder=Path(row.folder),
    )


def _options(url: str) -> dict[str, Any]:
    if make_url(url).get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 30}}
    return {"pool_pre_ping": True, "pool_size": 5, "max_overflow": 15}


def _durable_sqlite(connection: Any, _record: Any) -> None:
    """Every commit is on the disk; readers do not block the writer."""
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")


def _migrate(engine: Engine) -> None:
    """Bring the schema to this release's, all of it or nothing; a database of a newer one is left alone."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        if connection.dialect.name == "sqlite":  # Python's driver begins nothing for a change of the schema
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        found = MigrationContext.configure(connection).get_current_revision()
        scripts = ScriptDirectory.from_config(config)
        try:
            scripts.get_revision(found or "base")
        except CommandError:
            raise ConfigError(
                f"the coordinator's database is of a newer release: its schema is {found}",
                hint="Install that release, or name another database. Nothing was changed.",
            ) from None
        if found != scripts.get_current_head():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "of the settings"
