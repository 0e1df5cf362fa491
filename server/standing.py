"""Where a study stands, folded from its journal: for the live view, the page, metrics and TensorBoard's files alike.

It knows what the journal holds and nothing else: no update, key or record can be shown by what is built on it.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from sys import intern
from typing import Any, NamedTuple

RECENT = 50  # events that are kept in words
STAGES = ("advertise", "share", "train", "agree", "unmask")  # of a sum, in order; the journal numbers them from one
METRICS = ("auroc", "accuracy", "sensitivity", "specificity")  # shown first, where there are any
PACE = 20  # rounds that the estimate of the time left looks back on

Event = Mapping[str, Any]


class RoundSeen(NamedTuple):
    """A finished round, as the journal tells it.

    Attributes:
        at: When it was finished; Unix time, in seconds.
        epsilons: What each hospital's filter holds the study at, as the hospital states.
        released: Noised validation metrics, where plan and policy release them.
        stages: Seconds of each stage.
    """

    number: int
    at: float
    seconds: float
    answered: tuple[str, ...]
    missing: tuple[str, ...]
    epsilons: Mapping[str, float]
    released: Mapping[str, float] | None
    stages: Mapping[str, float]


@dataclass
class HospitalSeen:
    """One hospital's part in a study.

    Attributes:
        state: In a few words.
        epsilon: What its filter holds the study at, by its newest receipt.
        stated: Its privacy statement, once the study is over.
        dropped: How often it dropped out of a sum, by stage.
        trouble: The newest round in which its part failed; 0 if none.
        left_out: Answers of it that were refused, or were refusals.
        set_aside: How often it was not invited for a while because it kept failing.
    """

    state: str = "awaited"
    public_size: int | None = None
    last_round: int | None = None
    rounds: int = 0
    epsilon: float | None = None
    stated: Mapping[str, Any] | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    trouble: int = 0
    left_out: int = 0
    set_aside: int = 0


class Told(NamedTuple):
    """An event in words.

    Attributes:
        at: Unix time, in seconds.
        text: One line; what peers and people wrote is in it as they wrote it.
        minor: Whether another event tells it too.
    """

    at: float
    text: str
    minor: bool


@dataclass
class Standing:
    """A study's journal, folded event by event.

    Attributes:
        study: Its name.
        rounds: Rounds that are planned.
        state: As far as the journal tells.
        reason: Why it waits, paused or failed.
        early: Why the plan ends it before its last round.
        problem: Why there may be more than is known.
        measured: Metrics that somebody else measured and wants shown, such as the demo's.
        stages: Seconds spent in each stage of sums, and how many of them, by purpose and stage.
        bytes_up: Bytes of all vectors that arrived, without their envelopes.
        failed_attempts: Attempts that came to nothing, by whether they were charged.
        aborted: Sums that did not open, by purpose.
        events: How many have been seen.
        recent: The newest, in words.
    """

    study: str = ""
    rounds: int = 0
    state: str = "pending"
    reason: str | None = None
    hospitals: dict[str, HospitalSeen] = field(default_factory=dict)
    history: list[RoundSeen] = field(default_factory=list)
    early: str | None = None
    problem: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    finished: Event | None = None
    stages: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    bytes_up: int = 0
    failed_attempts: Counter[bool] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    events: int = 0
    recent: deque[Told] = field(default_factory=lambda: deque(maxlen=RECENT))

    def see(self, event: Event) -> Told:
        """Take in one event. One that this release does not know is told, and changes nothing.

        Fields may be absent: of other hospitals' part a hospital that watches does not hear.
        """
        event = _ABSENT | {key: _whole(key, value) for key, value in event.items()}
        fold = _FOLDS.get(event["event"])
        if fold is not None:
            fold(self, event)
        opened = event["event"] == "sum" and event["opened"] and not event["dropped"]
        told = Told(moment(event), _describe(event), opened or event["event"] == "released")
        self.events += 1
        self.recent.append(told)
        return told

    def hospital(self, name: str) -> HospitalSeen:
        """What is known of a hospital."""
        return self.hospitals.setdefault(name, HospitalSeen())

    @property
    def done(self) -> int:
        """Rounds that are finished."""
        return self.history[-1].number if self.history else 0

    @property
    def released(self) -> Mapping[str, float] | None:
        """The newest released metrics."""
        return next((seen.released for seen in reversed(self.history) if seen.released), None)

    @property
    def epsilon(self) -> float | None:
        """The highest epsilon that any hospital's filter holds the study at."""
        return max((seen.epsilon for seen in self.hospitals.values() if seen.epsilon is not None), default=None)

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining rounds will take at the pace of the last ones; pauses do not count."""
        if not self.history:
            return None
        if self.early is not None:
            return 0.0
        last = self.history[-PACE:]
        gaps = [after.at - before.at for before, after in pairwise(last)]
        return max(0.0, median(gaps or [last[0].seconds])) * (self.rounds - self.done)

    def line(self, *, metrics: bool = True) -> str:
        """One line on where the study is, with metrics or without."""
        if not self.history:
            return self.reason or "waiting for the hospitals to join …"
        last, left = self.history[-1], self.left_s or 0.0
        figures = {**(self.released or {}), **self.measured}
        shown = [f"{name} {figures[name]:.3f}" for name in METRICS[:2] if metrics and name in figures]
        parts = [
            f"round {last.number}/{self.rounds}: {len(last.answered)} of {len(last.answered) + len(last.missing)} "
            f"hospitals answered in {last.seconds:.2f} s",
            ", ".join(shown),
            f"epsilon up to {self.epsilon or 0.0:.3f}",
            f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left",
        ]
        return "; ".join(part for part in parts if part)


def first_metrics(figures: Mapping[str, float]) -> dict[str, float]:
    """The few that say most; where none of them is there, those that are."""
    return {name: figures[name] for name in METRICS if name in figures} or dict(figures)


_ABSENT: dict[str, Any] = {
    "answered": (),
    "missing": (),
    "dropped": {},
    "epsilon_filter": {},
    "stages": {},
    "metrics_released": None,
    "metrics": {},
    "hospitals": {},
    "public_size": None,
    "same_software": True,
    "parameters": 0,
    "bytes_up": 0,
    "threshold": 0,
    "study": "",
    "purpose": "train",
    "round": 0,
    "rounds": 0,
    "rounds_done": 0,
    "attempt": 0,
    "seconds": 0.0,
    "opened": False,
    "charged": False,
    "state": "pending",
    "stage": "",
    "code": "",
    "reason": "",
    "error": "",
    "hint": "",
}
_COUNTS = frozenset({"round", "rounds", "rounds_done", "attempt", "hospitals", "bytes_up", "parameters", "public_size"})


def _whole(key: str, value: Any) -> Any:
    """Counts are whole; some ways to travel know no whole numbers."""
    return int(value) if key in _COUNTS and isinstance(value, float) else value


def moment(event: Event) -> float:
    """When an event was written; Unix time, in seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def clock(at: float) -> str:
    """Time of day, UTC."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def _begun(progress: Standing, event: Event) -> None:
    progress.study, progress.rounds = event["study"] or progress.study, event["rounds"] or progress.rounds
    progress.state, progress.reason = "pending", None


def _enrolled(progress: Standing, event: Event) -> None:
    seen = progress.hospital(event["hospital"])
    seen.state, seen.public_size = "joined", event["public_size"]


def _pending(progress: Standing, event: Event) -> None:
    progress.hospital(event["hospital"]).state = "waits for its steward"


def _refused(progress: Standing, event: Event) -> None:
    progress.hospital(event["hospital"]).state = f"refused: {event['code']}"


def _left_out(progress: Standing, event: Event) -> None:
    seen = progress.hospital(event["hospital"])
    seen.state, seen.trouble = f"left out: {event['reason']}", event["round"]
    seen.left_out += 1


def _set_aside(progress: Standing, event: Event) -> None:
    seen = progress.hospital(event["hospital"])
    seen.state = f"set aside: {event['reason']}"
    seen.set_aside += 1


def _sum(progress: Standing, event: Event) -> None:
    progress.state, progress.reason = "running", None
    for stage, seconds in event["stages"].items():
        count, total = progress.stages.get((event["purpose"], stage), (0, 0.0))
        progress.stages[event["purpose"], stage] = (count + 1, total + seconds)
    progress.bytes_up += event["bytes_up"] * len(event["answered"])
    for name, epsilon in event["epsilon_filter"].items():  # a sum that did not open has cost something, too
        progress.hospital(name).epsilon = epsilon
    for hospital, stage in event["dropped"].items():
        seen = progress.hospital(hospital)
        seen.dropped[_stage(stage)] += 1
        seen.trouble = event["round"]
        if not seen.state.startswith(("left out", "set aside")):
            seen.state = f"dropped out at {_stage(stage)}"


def _round(progress: Standing, event: Event) -> None:
    if event["round"] <= progress.done:
        return  # a coordinator that was killed between the journal and the database tells a round again
    progress.state, progress.reason = "running", None
    progress.rounds = event["rounds"] or progress.rounds
    seen = RoundSeen(
        number=event["round"],
        at=moment(event),
        seconds=event["seconds"],
        answered=tuple(map(intern, event["answered"])),  # studies are long, and names repeat
        missing=tuple(map(intern, event["missing"])),
        epsilons={intern(name): epsilon for name, epsilon in event["epsilon_filter"].items()},
        released=event["metrics_released"],
        stages=event["stages"],
    )
    progress.history.append(seen)
    for name in seen.answered:
        hospital = progress.hospital(name)
        hospital.state, hospital.last_round, hospital.rounds = "answered", seen.number, hospital.rounds + 1
    for name in seen.missing:
        hospital = progress.hospital(name)
        if hospital.trouble < seen.number and not hospital.state.startswith(("refused", "waits", "set aside")):
            hospital.state = "missing"
    for name, epsilon in seen.epsilons.items():
        progress.hospital(name).epsilon = epsilon


def _aborted(progress: Standing, event: Event) -> None:
    progress.aborted[event["purpose"]] += 1


def _attempt_failed(progress: Standing, event: Event) -> None:
    progress.failed_attempts[event["charged"]] += 1


def _waiting(progress: Standing, event: Event) -> None:
    progress.state, progress.reason = "pending", event["reason"]


def _paused(progress: Standing, event: Event) -> None:
    progress.state, progress.reason = "paused", event["reason"]


def _interrupted(progress: Standing, event: Event) -> None:
    progress.state, progress.reason = "paused", event["error"]


def _quorum(progress: Standing, _: Event) -> None:
    progress.state, progress.reason = "running", None


def _stopped(progress: Standing, _: Event) -> None:
    progress.state, progress.reason = "stopped", "by an operator"


def _stopped_early(progress: Standing, event: Event) -> None:
    progress.early = event["reason"]


def _failed(progress: Standing, event: Event) -> None:
    progress.state, progress.reason = "failed", event["error"]


def _finished(progress: Standing, event: Event) -> None:
    progress.state, progress.reason, progress.finished = "finished", None, event
    for name, stated in event["hospitals"].items():
        hospital = progress.hospital(name)
        hospital.stated, hospital.epsilon, hospital.state = stated, stated["epsilon_filter"], "stated its cost"


def _state(progress: Standing, event: Event) -> None:
    """What the control service says of the study's state, between the journal's events."""
    progress.state, progress.reason = event["state"], event["reason"] or None
    progress.rounds = event["rounds"] or progress.rounds


_FOLDS: dict[str, Callable[[Standing, Event], None]] = {
    "state": _state,
    "started": _begun,
    "resumed": _begun,
    "enrolled": _enrolled,
    "pending": _pending,
    "refused": _refused,
    "waiting": _waiting,
    "left-out": _left_out,
    "set-aside": _set_aside,
    "sum": _sum,
    "round": _round,
    "aborted": _aborted,
    "attempt-failed": _attempt_failed,
    "paused": _paused,
    "interrupted": _interrupted,
    "quorum": _quorum,
    "stopped": _stopped,
    "stopped-early": _stopped_early,
    "failed": _failed,
    "finished": _finished,
}


def _describe(event: Event) -> str:
    words = _WORDS.get(event["event"])
    return words(event) if words is not None else str(event["event"])


def _names(names: Any) -> str:
    return ", ".join(names) or "nobody"


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in first_metrics(figures).items()) or "nothing"


def _round_words(event: Event) -> str:
    missing = f"; missing: {_names(event['missing'])}" if event["missing"] else ""
    highest = max(event["epsilon_filter"].values(), default=0.0)
    released = f"; {_figures(event['metrics_released'])}" if event["metrics_released"] else ""
    return (
        f"round {event['round']}/{event['rounds']}: {len(event['answered'])} hospitals answered in "
        f"{event['seconds']:.2f} s; epsilon up to {highest:.3f}{missing}{released}"
    )


def _stage(number: float) -> str:
    number = int(number)
    return STAGES[number - 1] if 0 < number <= len(STAGES) else str(number)


def _sum_words(event: Event) -> str:
    dropped = f"; dropped out: {', '.join(f'{name} at {_stage(at)}' for name, at in event['dropped'].items())}"
    opened = "opened" if event["opened"] else "did not open"
    return (
        f"round {event['round']}, attempt {event['attempt']} to {event['purpose']}: the sum {opened}, "
        f"{len(event.get('answered', ()))} of {event['hospitals'] or '?'} hospitals in it"
        + dropped
        * bool(event["dropped"])
    )


_WORDS: dict[str, Callable[[Event], str]] = {
    "state": lambda e: f"is {e['state']}" + (f": {e['reason']}" if e["reason"] else ""),
    "started": lambda e: f"started: {e['rounds']} rounds, {e['parameters']} parameters",
    "resumed": lambda e: f"taken up again after round {e['rounds_done']} of {e['rounds']}",
    "enrolled": lambda e: (
        f"{e['hospital']} takes part, public size {e['public_size']}"
        + ("" if e["same_software"] else ", with other software than here")
    ),
    "pending": lambda e: f"{e['hospital']} waits for its steward",
    "refused": lambda e: f"{e['hospital']} refused: {e['code']}",
    "waiting": lambda e: f"waits: {e['reason']}",
    "left-out": lambda e: f"round {e['round']}: {e['hospital']} left out at {e['stage']}: {e['reason']}",
    "set-aside": lambda e: f"round {e['round']}: {e['hospital']} set aside: {e['reason']}",
    "sum": _sum_words,
    "round": _round_words,
    "aborted": lambda e: f"round {e['round']}, attempt {e['attempt']} to {e['purpose']} aborted: {e['reason']}",
    "attempt-failed": lambda e: (
        f"round {e['round']}, attempt {e['attempt']} failed, {'charged' if e['charged'] else 'not charged'}"
    ),
    "paused": lambda e: f"paused: {e['reason']}",
    "interrupted": lambda e: f"interrupted, and tried again by itself: {e['error']}",
    "quorum": lambda e: f"goes on with {_names(e['hospitals'])}",
    "stopped": lambda _: "stopped by an operator",
    "stopped-early": lambda e: f"ends after round {e['round']} of {e['rounds']}: {e['reason']}",
    "released": lambda e: f"round {e['round']}: {_figures(e['metrics'])} released",
    "failed": lambda e: f"failed: {e['error']} ({e['hint']})",
    "finished": lambda e: f"finished: {len(e['hospitals'])} hospitals have stated what it cost",
}
