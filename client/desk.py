"""What the hospital's page shows: read from the files that the daemon and the commands write, never from the daemon.

Nothing here names a patient, and no exception's text comes through: of what went wrong, only the code does.
"""

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from cryptography.x509 import load_pem_x509_certificate

from client.anchor import ANCHORS, ROLLED_BACK
from client.beside import Told
from client.books import LEDGER, read_budget, report
from client.budget import Budget
from client.bundle import verify_own
from client.consent import Consents
from client.decide import STEWARD, Listed, list_studies
from client.doctor import examine
from client.egress import EGRESS, FREE, summary
from client.evidence import evidence_files, read_evidence
from client.membership import Membership
from client.process import running
from client.records.opt_out import read_opt_outs
from client.records.report import Summary, summarise_own
from client.registry import check_records
from client.settings import Settings, read_settings
from client.words import Said, said
from shared_models.certificates import AHEAD
from shared_models.curves import Chart, chart
from shared_models.durable import file_state
from shared_models.errors import FederationError
from shared_models.health import Finding
from shared_models.privacy.entries import BudgetTerms, Entry
from shared_models.privacy.ledger import head_path
from shared_models.privacy.mechanisms import filter_epsilon, renyi_divergence

log = logging.getLogger("konsil.hospital")

NEWEST = 30  # lines of the egress log
DAY_S = 24 * 3600.0
PAUSE = 20  # times what reading took: a page that is left open does not read a growing file all the time
LITTLE_DISK, LEAST_DISK = 10 * 2**30, 2**30
AXIS = 1000  # of the burn-down, from its first moment to now

_divergence = lru_cache(maxsize=1000)(renyi_divergence)

Found = TypeVar("Found")
State = Literal["good", "wait", "bad"]


@dataclass
class Progress:
    """How far one study is, by the ledger.

    Attributes:
        done: The last round that was computed to its end.
        charged: The newest charge: its round, attempt and time.
        computing: Whether that is under way.
    """

    done: int = 0
    charged: tuple[int, int, str] | None = None
    computing: bool = False


@dataclass
class Burning:
    """Epsilon that is left, entry by entry.

    Attributes:
        points: Time, what is not spent, what is neither spent nor reserved.
        progress: Of every study.
        newest: Time of the last round that was computed to its end.
    """

    points: list[tuple[float, float, float]] = field(default_factory=list)
    progress: dict[str, Progress] = field(default_factory=dict)
    newest: str | None = None
    _terms: BudgetTerms | None = None
    _charged: dict[str, float] = field(default_factory=dict)
    _reserved: dict[str, float] = field(default_factory=dict)

    def take_in(self, entry: Entry) -> None:
        """The next entry of the ledger."""
        self._terms = self._terms or entry.budget
        if self._terms is None:  # no ledger of ours begins so; who reads it refuses it
            return
        study, order = entry.study or "", self._terms.order
        if entry.kind == "plan-approved":
            kept = entry.reservation or ()
            self._reserved[study] = sum(one.charges * _divergence(one.mechanism, order) for one in kept)
        elif entry.kind == "charge" and entry.mechanism is not None:
            self._charged[study] = self._charged.get(study, 0.0) + _divergence(entry.mechanism, order)
        elif entry.kind == "study-closed":
            self._reserved.pop(study, None)
        elif entry.kind != "budget-opened":
            self._follow(entry, study)
            return
        self._follow(entry, study)
        committed = self._charged | self._reserved  # what is reserved contains what was charged of it
        spent, taken = (self._epsilon(sum(rho.values()), self._terms) for rho in (self._charged, committed))
        self.points.append((seconds(entry.time), self._terms.epsilon - spent, self._terms.epsilon - taken))

    def _follow(self, entry: Entry, study: str) -> None:
        if not study:
            return
        progress = self.progress.setdefault(study, Progress())
        if entry.kind == "charge":
            progress.charged = (entry.round or 0, entry.attempt or 0, entry.time)
            progress.computing = True
        elif entry.kind in {"round-done", "release"}:
            progress.done, progress.computing = max(progress.done, entry.round or 0), False
            self.newest = entry.time
        elif entry.kind == "study-closed":
            progress.computing = False

    @staticmethod
    def _epsilon(rho: float, terms: BudgetTerms) -> float:
        return filter_epsilon(rho, order=terms.order, delta=terms.delta)


class Look(NamedTuple):
    """One reading of the ledger."""

    budget: Budget
    burning: Burning


class Check(NamedTuple):
    """One line of the hospital's health."""

    name: str
    state: State
    text: Said


@dataclass(frozen=True)
class Checked(Generic[Found]):
    """A check that was asked for.

    Attributes:
        began: When, Unix time.
        ended: None while it goes on.
        found: What it found; None while it goes on, and where it failed.
        code: Of the error where it failed.
    """

    began: float
    ended: float | None = None
    found: Found | None = None
    code: str = ""


class Errand(Generic[Found]):
    """A check that takes a while: one at a time, in a thread of its own.

    Args:
        what: For the log.

    Attributes:
        newest: The one that goes on, or was the last; None before the first.
    """

    def __init__(self, what: str) -> None:
        self._what, self._busy = what, threading.Lock()
        self.newest: Checked[Found] | None = None

    def begin(self, work: Callable[[], Found]) -> None:
        """Begin it, unless it goes on already."""
        if self._busy.acquire(blocking=False):
            self.newest = Checked(time.time())
            threading.Thread(target=self._run, args=(work,), name="check", daemon=True).start()

    def _run(self, work: Callable[[], Found]) -> None:
        began, found, code = time.time(), None, ""
        try:
            found = work()
        except FederationError as error:
            code = error.code
        except Exception as error:  # whatever it is, its text may quote a record
            log.error("%s failed: %s", self._what, type(error).__name__)  # noqa: TRY400 - no text
            code = "error"
        finally:
            self.newest = Checked(began, time.time(), found, code)
            self._busy.release()


class Desk:
    """One hospital, to be looked at.

    Args:
        settings_file: Read again for every page, as by every command.
        told: What the daemon says of its connection.
    """

    def __init__(self, settings_file: Path, told: Told | None = None) -> None:
        self._file, self._told = settings_file, told
        self._kept: dict[str, tuple[Any, Any, float]] = {}
        self._turn = threading.RLock()
        self._records: Errand[Summary] = Errand("the check of the records")
        self._doctor: Errand[list[Finding]] = Errand("the doctor")

    @property
    def checked(self) -> Checked[Summary] | None:
        """The newest check of the records."""
        return self._records.newest

    @property
    def examined(self) -> Checked[list[Finding]] | None:
        """The doctor's newest visit."""
        return self._doctor.newest

    def settings(self) -> Settings:
        """The settings as their file has them now.

        Raises:
            ConfigError: The file is missing or invalid.
        """
        return read_settings(self._file)

    def look(self, settings: Settings) -> Look:
        """The ledger, verified, and read again when it has changed.

        Raises:
            LedgerError: There is none, it cannot be read, or its chain is broken.
        """

        def read() -> Look:
            burning = Burning()
            return Look(read_budget(settings, burning.take_in), burning)

        return self._once("ledger", _ledger_files(settings), read)

    def studies(self, settings: Settings) -> dict[str, Any]:
        """Which studies wait for the steward, which run, and all of them."""
        look, consents = self.look(settings), Consents(settings.state)
        listed = list_studies(settings, look.budget)
        return {
            "waiting": [_waiting(study, consents, look) for study in listed if asks(study)],
            "running": [_running(study, consents, look) for study in listed if study.status == "approved"],
            "studies": listed,
        }

    def study(self, settings: Settings, name: str) -> Listed | None:
        """One study, as the list has it; None where there is no such name."""
        return next((one for one in list_studies(settings, self.look(settings).budget) if one.study == name), None)

    def budget(self, settings: Settings) -> dict[str, Any]:
        """What was spent, what is left, and the curve of it, as it is enforced; and the tighter figures as executed."""
        budget, burning = self.look(settings)
        begin, end = burning.points[0][0], time.time()
        form = "%Y-%m-%d" if end - begin > DAY_S else "%H:%M"
        found = self._once("report", _ledger_files(settings), partial(report, settings))
        studies = []
        for one in found["studies"]:
            made, reserved = budget.charges(one["study"])
            studies.append({**one, "made": made, "reserved": reserved, "promised": budget.limit(one["study"]).epsilon})
        return {
            "population": budget.population,
            "terms": budget.terms,
            "left": budget.left(),
            "unspent": burning.points[-1][1],
            "chart": _drawn(burning.points),
            "begin": f"{datetime.fromtimestamp(begin, UTC):{form}}",
            "end": f"{datetime.fromtimestamp(end, UTC):{form}}",
            "studies": studies,
            "accountants": sorted({one["accountant"] for one in studies}),
        }

    def egress(self, settings: Settings) -> dict[str, Any]:
        """What left, summed up by study, message and field; and the newest lines."""
        files = evidence_files(settings.state / EGRESS)
        return self._once("egress", files, partial(_egress, settings.state / EGRESS))

    def opt_outs(self, settings: Settings) -> tuple[int | None, str]:
        """How many ids are on the list, None where there is no list; and the code of what is wrong with it."""
        try:
            return (None if settings.opt_out is None else len(read_opt_outs(settings.opt_out))), ""
        except FederationError as error:
            return None, error.code

    def check_records(self, settings: Settings) -> None:
        """Begin to read the records as a study would; one check at a time."""

        def check() -> Summary:
            found = summarise_own(settings)
            check_records(settings)
            return found

        self._records.begin(check)

    def examine(self, settings: Settings) -> None:
        """Begin to look at all that the doctor looks at; one visit at a time."""
        self._doctor.begin(partial(examine, settings))

    def health(self, settings: Settings) -> list[Check]:
        """What the files say about the hospital itself."""
        return [
            _daemon(settings),
            self._connection(settings),
            _either("membership", lambda: _membership(settings)),
            _either("certificate", lambda: _certificate(settings)),
            _either("ledger", lambda: self._once("verified", _ledger_files(settings), lambda: _ledger(settings))),
            _either("anchor", lambda: _anchor(settings)),
            _either("round", lambda: _round(self.look(settings).burning.newest)),
            _disk(settings),
        ]

    def _connection(self, settings: Settings) -> Check:
        if self._told is None or self._told.connection is None:
            return Check("connection", "wait", said("health.unknown"))
        state: State = "good" if self._told.connection == "connected" else "wait"
        sentence = said(f"health.{self._told.connection}", address=settings.coordinator, time=minute(self._told.since))
        return Check("connection", state, sentence)

    def _once(self, what: str, files: list[Path], read: Callable[[], Found]) -> Found:
        """What was read of files, read again when one of them has changed, but for a pause; what fails is not kept."""
        with self._turn:
            state, began = [file_state(path) for path in files], time.monotonic()
            before, found, until = self._kept.get(what, (None, None, 0.0))
            if before is None or (before != state and began > until):
                found = read()
                ended = time.monotonic()
                self._kept[what] = (state, found, ended + PAUSE * (ended - began))
            return cast("Found", found)


def _ledger_files(settings: Settings) -> list[Path]:
    path = settings.state / LEDGER
    return [path, path.with_name(f"{path.name}-wal"), head_path(path), settings.keys.identity]


def asks(study: Listed) -> bool:
    """Whether a study waits for the steward, and not for the coordinator to propose it again."""
    return study.status == "pending" and study.by.startswith(STEWARD)


def _waiting(study: Listed, consents: Consents, look: Look) -> dict[str, Any]:
    plan = consents.find(study.study).plan
    return {"listed": study, "purpose": plan.purpose, "rounds": plan.rounds, "price": look.budget.price(plan)}


def _running(study: Listed, consents: Consents, look: Look) -> dict[str, Any]:
    kept = consents.proposed(study.study)
    made, reserved = look.budget.charges(study.study)
    return {
        "listed": study,
        "progress": look.burning.progress.get(study.study, Progress()),
        "rounds": kept.plan.rounds if kept else None,
        "made": made,
        "reserved": reserved,
        "spent": look.budget.filter_spent(study.study),
    }


def _drawn(points: list[tuple[float, float, float]]) -> Chart:
    """Two staircases from the first entry to now."""
    begin, now = points[0][0], max(time.time(), points[-1][0] + 1)

    def steps(which: int) -> Iterator[tuple[float, float]]:
        for number, point in enumerate(points):
            at = 1 + (point[0] - begin) / (now - begin) * (AXIS - 1)
            if number:
                yield at, points[number - 1][which]
            yield at, point[which]
        yield AXIS, points[-1][which]

    whole = points[0][1]
    return chart("", {"unspent": list(steps(1)), "free": list(steps(2))}, last=AXIS, full=whole)


def _egress(path: Path) -> dict[str, Any]:
    newest: deque[Mapping[str, Any]] = deque(maxlen=NEWEST)

    def passing() -> Iterator[dict[str, Any]]:
        for line in read_evidence(path):
            if line.get("what") != "calls":
                newest.append(line)
            yield line

    found = summary(passing())
    studies: dict[str, list[dict[str, Any]]] = {}
    for row in found["fields"]:
        charges = 0 if row["price"] == FREE else int(row["price"].split()[0])
        studies.setdefault(row["study"], []).append({**row, "charges": charges})
    return {"studies": studies, "calls": found["calls"], "newest": list(reversed(newest))}


def _either(name: str, check: Callable[[], tuple[State, Said]]) -> Check:
    """A check, or the code of why it could not be made."""
    try:
        return Check(name, *check())
    except FederationError as error:
        return Check(name, "bad", said("health.problem", why=said(f"code.{error.code}")))
    except (OSError, ValueError):
        return Check(name, "bad", said("health.unreadable"))


def _daemon(settings: Settings) -> Check:
    found = running(settings.state)
    if found is None:
        return Check("daemon", "bad", said("health.daemon-ended"))
    return Check("daemon", "good", said("health.daemon-runs", pid=found.pid))


def _membership(settings: Settings) -> tuple[State, Said]:
    membership, now = Membership(settings), time.time()
    membership.now()
    signed = membership.signed()
    member = signed.member(settings.name)
    assert member is not None  # noqa: S101 - membership.now() has refused a hospital that is none
    members = sum(one.valid(now) for one in signed.members)
    day = minute(member.valid_until)[:10]
    state: State = "good" if member.valid_until - now > AHEAD.total_seconds() else "wait"
    return state, said("health.member", version=signed.version, members=members, day=day)


def _certificate(settings: Settings) -> tuple[State, Said]:
    until = load_pem_x509_certificate(settings.tls.certificate.read_bytes()).not_valid_after_utc.timestamp()
    left = until - time.time()
    state: State = "good" if left > AHEAD.total_seconds() else "wait" if left > 0 else "bad"
    return state, said("health.valid", day=minute(until)[:10])


def _ledger(settings: Settings) -> tuple[State, Said]:
    found = verify_own(settings)
    counts = {"entries": found["entries"], "charges": found["charges"]}
    return (
        ("good", said("health.verified", **counts)) if found["head_file"] else ("bad", said("health.no-head", **counts))
    )


def _anchor(settings: Settings) -> tuple[State, Said]:
    if (settings.state / ROLLED_BACK).exists():
        return "bad", said("health.rolled-back")
    shown = [line["time"] for line in read_evidence(settings.state / ANCHORS) if line.get("last")]
    return "good", said("health.shown", time=minute(seconds(shown[-1]))) if shown else said("health.not-shown")


def _round(newest: str | None) -> tuple[State, Said]:
    return "good", said("health.last", time=minute(seconds(newest))) if newest else said("health.no-round")


def _disk(settings: Settings) -> Check:
    found = shutil.disk_usage(settings.state)
    state: State = "good" if found.free > LITTLE_DISK else "wait" if found.free > LEAST_DISK else "bad"
    return Check("disk", state, said("health.free", free=found.free // 10**9, total=found.total // 10**9))


def seconds(text: str) -> float:
    """Unix time of a time as the ledger writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def minute(at: float) -> str:
    """A time for people, UTC."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
