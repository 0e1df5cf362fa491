"""What an audit says, for people and for tools: figures, findings and facts, each with the ledger entry it rests on.

Nothing here is drawn: ``render.py`` makes the page, ``write_json`` the file. Everything is computed from an ``Audit``.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel

from auditor.edges import Edge, sharp_edges
from auditor.findings import COORDINATOR, Finding
from auditor.noise import noise_reports
from auditor.recompute import Figures, filter_epsilon
from auditor.record import Audit, HospitalRecord, Line
from shared_models.config import Frozen
from shared_models.durable import replace_file
from shared_models.errors import ConfigError
from shared_models.plan import StudyPlan
from shared_models.privacy.conformance import Conformance
from shared_models.privacy.entries import BudgetTerms
from shared_models.privacy.evidence import Claim
from shared_models.privacy.mechanisms import GaussianRelease, Mechanism, PoissonGaussian
from shared_models.versions import RELEASE

FORMAT: Literal["konsil-report/1"] = "konsil-report/1"
MOST_POINTS = 24  # of a curve, and rows of the table behind it
MOST_ROUNDS = 100  # incomplete rounds that are listed for people; the JSON has all of them

_Counts = Counter[PoissonGaussian | GaussianRelease]


class Point(Frozen):
    """A place on a curve: what had been spent after so many charges.

    Attributes:
        charges: How many there were by then.
        entry: The newest of them.
        spent: Epsilon by the filter.
    """

    charges: int
    round: int
    time: str
    entry: int
    spent: float


class HospitalStudy(Frozen):
    """One study at one hospital.

    Attributes:
        approved: Entry that approved it.
        again: Entries that approved it again, for other software.
        closed: Entry that ended it.
        last: Entry of its newest charge.
        computed: By the auditor; None where the ledger does not hold.
        claim: What the hospital says.
        releases: Entries of kind ``release``.
        price: What the released statistics cost: epsilon by the filter with them, less without them.
        vain: Charges after which neither a computation nor a release was recorded: attempts that failed.
        curve: Epsilon over rounds.
    """

    hospital: str
    anchor: str
    approved: int
    approved_by: str | None
    again: tuple[int, ...]
    closed: int | None
    plan_digest: str | None
    limit: float
    delta: float
    last: int | None
    computed: Figures | None
    claim: Claim | None
    releases: tuple[int, ...]
    price: float
    vain: int
    curve: tuple[Point, ...]


class Attendance(Frozen):
    """How often one hospital took part in the sums of a study, as signed transcripts have it.

    Attributes:
        asked: Attempts that the coordinator invited it to.
        agreed: In how many it agreed on keys.
        summed: In how many its contribution is in the sum.
        dropped: In how many it agreed on keys and is not in the sum.
    """

    hospital: str
    asked: int
    agreed: int
    summed: int
    dropped: int


class Incomplete(Frozen):
    """An attempt that somebody dropped out of, or that came to nothing."""

    purpose: str
    round: int
    attempt: int
    summed: int
    invited: int
    dropped: tuple[str, ...]
    silent: tuple[str, ...]
    complaint: str | None


class Study(Frozen):
    """One study, over all hospitals.

    Attributes:
        plan: As approved; None where no evidence has it.
        plan_digests: More than one means that hospitals approved different plans.
        summed: Hospitals in the sum, by round, of training; the last attempt of a round counts.
    """

    study: str
    plan: StudyPlan | None
    plan_digests: tuple[str, ...]
    hospitals: tuple[HospitalStudy, ...]
    attendance: tuple[Attendance, ...]
    attempts: int
    summed: tuple[tuple[int, int], ...]
    incomplete: tuple[Incomplete, ...]


class Software(Frozen):
    """A digest of installed software, and from which entry to which it stands in the ledger."""

    digest: str
    first: int
    last: int


class HeldKey(Frozen):
    """A key of a ledger.

    Attributes:
        first: The first entry that it signed.
        vouched: Whether the consortium's signed roster names it for this hospital; None where there is no roster.
    """

    fingerprint: str
    first: int
    vouched: bool | None


class Hospital(Frozen):
    """One hospital's books.

    Attributes:
        anchor: Begins the names of its entries on the page; unique.
        left: Epsilon that is neither spent nor reserved.
        reserved: Epsilon that open studies may still take.
        kinds: How many entries there are of each kind.
        last: Entry of the newest charge.
        curve: Epsilon spent, over charges.
        software_now: Digest of what was installed when the bundle was packed.
    """

    hospital: str
    anchor: str
    population: str
    source: str
    packed: str | None
    terms: BudgetTerms
    computed: Figures | None
    claim: Claim | None
    left: float | None
    reserved: float | None
    entries: int
    kinds: dict[str, int]
    last: int | None
    receipts: int
    keys: tuple[HeldKey, ...]
    software: tuple[Software, ...]
    software_now: str | None
    egress_digest: str | None
    curve: tuple[Point, ...]


class MechanismUse(Frozen):
    """A mechanism at one hospital: how often it was charged, and where first and last."""

    hospital: str
    anchor: str
    charges: int
    first: int
    last: int


class UsedMechanism(Frozen):
    """A mechanism that somebody charged.

    Attributes:
        label: Names it on the page.
        mechanism: As first charged. Others of this label differ in ``expected_batch`` only, with a hospital's size.
        batches: The smallest and the largest expected batch; None of a release.
    """

    label: str
    mechanism: Mechanism
    batches: tuple[float, float] | None
    uses: tuple[MechanismUse, ...]


class NoiseTest(Frozen):
    """The noise in one study's sums, beside what was charged for; see ``noise.NoiseReport``.

    Attributes:
        sums: How many were tested.
        unchecked: How many could not be.
        ratio: Observed over claimed standard deviation.
        found: If all hospitals had added only so much of it, it would have been found (probability 0.99).
        found_alone: The same for the one hospital that adds least; 0 if even no noise at all might have been missed.
    """

    study: str
    sums: int
    unchecked: int
    ratio: float | None
    found: float
    found_alone: float
    false_alarm: float


class TrainerTest(Frozen):
    """A hospital's test of its own trainer: an entry of kind ``conformance``."""

    hospital: str
    anchor: str
    entry: int
    study: str | None
    result: Conformance


class Source(Frozen):
    """A file that was read."""

    path: str
    bytes: int
    sha256: str


class Report(Frozen):
    """Everything but the entries themselves, which ``write_json`` adds and ``render.py`` lists."""

    format: Literal["konsil-report/1"] = FORMAT
    made_at: str
    release: str
    passed: bool
    verdict: str
    root: str | None
    members: dict[str, str]
    findings: tuple[Finding, ...]
    hospitals: tuple[Hospital, ...]
    studies: tuple[Study, ...]
    mechanisms: tuple[UsedMechanism, ...]
    noise: tuple[NoiseTest, ...]
    tests: tuple[TrainerTest, ...]
    edges: tuple[Edge, ...]
    sources: tuple[Source, ...]


def make_report(audit: Audit, *, now: datetime | None = None) -> Report:
    """Turn an audit into a report.

    Args:
        audit: What was read and found.
        now: When it is made; the present, if left out.

    Raises:
        ConfigError: A source that was read before cannot be read any more.
    """
    anchors = anchors_of(audit.hospitals)
    hospitals = tuple(_hospital(record, anchors[id(record)], audit) for record in audit.hospitals)
    noise = [
        NoiseTest(
            study=found.study,
            sums=found.attempts,
            unchecked=found.unchecked,
            ratio=found.ratio,
            found=found.ratio_found,
            found_alone=found.share_found,
            false_alarm=found.false_alarm,
        )
        for found in noise_reports(audit.attempts, audit.hospitals)
    ]
    moment = (now or datetime.now(UTC)).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Report(
        made_at=moment,
        release=RELEASE,
        passed=audit.passed,
        verdict=verdict(audit),
        root=audit.root,
        members=dict(sorted(audit.members.items())),
        findings=audit.findings,
        hospitals=hospitals,
        studies=tuple(_studies(audit, anchors)),
        mechanisms=tuple(_mechanisms(audit, anchors)),
        noise=tuple(noise),
        tests=tuple(_tests(audit, anchors)),
        edges=tuple(sharp_edges(audit, anchors)),
        sources=tuple(source for path in audit.sources for source in _sources(path)),
    )


def anchors_of(records: Sequence[HospitalRecord]) -> dict[int, str]:
    """A name for each record on the page, by its ``id``: the hospital's, with a number where there are several."""
    names = Counter(record.hospital for record in records)
    numbers: Counter[str] = Counter()
    anchors = {}
    for record in records:
        numbers[record.hospital] += 1
        number = f"-{numbers[record.hospital]}" if names[record.hospital] > 1 else ""
        anchors[id(record)] = f"{record.hospital}{number}"
    return anchors


def verdict(audit: Audit) -> str:
    """The whole audit in one sentence, for whoever reads only one."""
    critical = [finding for finding in audit.findings if finding.severity == "critical"]
    warnings = [finding for finding in audit.findings if finding.severity == "warning"]
    if not audit.hospitals:
        return "Nothing was audited: there is no hospital's evidence among what was given."
    if critical:
        where = "at the coordinator" if critical[0].party == COORDINATOR else f"about {critical[0].party}"
        return (
            f"The promise to patients cannot be shown to hold: there {_are(len(critical), 'serious finding')}, "
            f"the first {where}."
        )
    if warnings:
        questions = _are(len(warnings), "open question")
        return f"The records hold together, but somebody has to explain something: there {questions}."
    names = len({record.hospital for record in audit.hospitals})
    start = "Everything that was checked holds"
    if audit.root is None:
        start = "Without the consortium's root key, everything that could be checked holds"
    return (
        f"{start}: what {_hospitals(names)} recorded is whole and signed, and stays within what patients were promised."
    )


def _are(number: int, thing: str) -> str:
    return f"is one {thing}" if number == 1 else f"are {number} {thing}s"


def _hospitals(number: int) -> str:
    return "one hospital" if number == 1 else f"{number} hospitals"


# Hospitals


def _hospital(record: HospitalRecord, anchor: str, audit: Audit) -> Hospital:
    charges = [line for line in record.lines if line.kind == "charge" and line.mechanism is not None]
    budget, terms = record.budget, record.terms
    spent = budget.spent.epsilon_filter if budget else None
    known = audit.members.get(record.hospital)
    return Hospital(
        hospital=record.hospital,
        anchor=anchor,
        population=record.population,
        source=str(record.source),
        packed=record.packed,
        terms=terms,
        computed=budget.spent if budget else None,
        claim=next((claim for claim in record.claims if claim.study is None), None),
        left=budget.left if budget else None,
        reserved=max(0.0, terms.epsilon - budget.left - spent) if budget and spent is not None else None,
        entries=len(record.lines),
        kinds=dict(sorted(Counter(line.kind for line in record.lines).items())),
        last=charges[-1].seq if charges else None,
        receipts=record.receipts,
        keys=tuple(
            HeldKey(
                fingerprint=key.fingerprint,
                first=1 if number == 0 else key.entry + 1,
                vouched=None if known is None else key.fingerprint == known,
            )
            for number, key in enumerate(record.keys)
        ),
        software=_software(record.lines),
        software_now=record.software_digest,
        egress_digest=record.egress_digest,
        curve=_curve(charges, delta=terms.delta, order=terms.order) if budget else (),
    )


def _software(lines: Iterable[Line]) -> tuple[Software, ...]:
    places: dict[str, tuple[int, int]] = {}
    for line in lines:
        if line.software_digest is not None:
            first, _ = places.get(line.software_digest, (line.seq, line.seq))
            places[line.software_digest] = (first, line.seq)
    return tuple(Software(digest=digest, first=first, last=last) for digest, (first, last) in places.items())


def _curve(charges: Sequence[Line], *, delta: float, order: int) -> tuple[Point, ...]:
    """What had been spent after some of the charges, evenly chosen, the first and the last among them."""
    wanted = {round(place * (len(charges) - 1) / (MOST_POINTS - 1)) for place in range(MOST_POINTS)}
    counts: _Counts = Counter()
    points = []
    for place, line in enumerate(charges):
        if line.mechanism is not None:
            counts[line.mechanism] += 1
        if place in wanted:
            points.append(
                Point(
                    charges=place + 1,
                    round=line.round or 0,
                    time=line.time,
                    entry=line.seq,
                    spent=filter_epsilon(counts, delta=delta, order=order),
                )
            )
    return tuple(points)


# Studies


def _studies(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Study]:
    for name in study_names(audit):
        plans = [record.plans[name] for record in audit.hospitals if name in record.plans]
        parts = [_at(record, anchors[id(record)], name) for record in audit.hospitals]
        there = tuple(part for part in parts if part is not None)
        attempts = [attempt for attempt in audit.attempts if attempt.turn.study == name]
        sums = {
            attempt.turn.round: len(attempt.uploaders)
            for attempt in attempts
            if attempt.turn.purpose == "train" and attempt.uploaders
        }
        yield Study(
            study=name,
            plan=plans[0] if plans else None,
            plan_digests=tuple(dict.fromkeys(part.plan_digest for part in there if part.plan_digest)),
            hospitals=there,
            attendance=tuple(_attendance(audit, name)),
            attempts=len(attempts),
            summed=tuple(sorted(sums.items())),
            incomplete=tuple(
                Incomplete(
                    purpose=attempt.turn.purpose,
                    round=attempt.turn.round,
                    attempt=attempt.turn.attempt,
                    summed=len(attempt.uploaders),
                    invited=len(attempt.invited),
                    dropped=attempt.dropped,
                    silent=tuple(sorted(set(attempt.invited) - set(attempt.cohort))) if attempt.cohort else (),
                    complaint=attempt.complaint,
                )
                for attempt in attempts
                if set(attempt.uploaders) != set(attempt.invited) or attempt.complaint
            ),
        )


def study_names(audit: Audit) -> list[str]:
    """Every study that any evidence speaks of, in the order in which it came up."""
    in_ledgers = (line.study for record in audit.hospitals for line in record.lines if line.kind == "plan-approved")
    in_sums = (attempt.turn.study for attempt in audit.attempts)
    return [name for name in dict.fromkeys(chain(in_ledgers, in_sums)) if name]


def _at(record: HospitalRecord, anchor: str, study: str) -> HospitalStudy | None:
    lines = [line for line in record.lines if line.study == study]
    approval = next((line for line in lines if line.kind == "plan-approved" and line.limit is not None), None)
    if approval is None or approval.limit is None:
        return None
    charges = [line for line in lines if line.kind == "charge" and line.mechanism is not None]
    done = {(line.kind, line.round, line.attempt) for line in lines if line.kind in {"round-done", "release"}}
    training: _Counts = Counter(line.mechanism for line in charges if isinstance(line.mechanism, PoissonGaussian))
    everything: _Counts = Counter(line.mechanism for line in charges if line.mechanism is not None)
    limit, order = approval.limit, record.terms.order
    budget = {found.study: found for found in record.budget.studies} if record.budget else {}
    return HospitalStudy(
        hospital=record.hospital,
        anchor=anchor,
        approved=approval.seq,
        approved_by=approval.approved_by,
        again=tuple(line.seq for line in lines if line.kind == "plan-reapproved"),
        closed=next((line.seq for line in lines if line.kind == "study-closed"), None),
        plan_digest=approval.plan_digest,
        limit=limit.epsilon,
        delta=limit.delta,
        last=charges[-1].seq if charges else None,
        computed=budget[study].spent if study in budget else None,
        claim=next((claim for claim in record.claims if claim.study == study), None),
        releases=tuple(line.seq for line in lines if line.kind == "release"),
        price=_price(everything, training, delta=limit.delta, order=order),
        vain=sum((_done_by(line), line.round, line.attempt) not in done for line in charges),
        curve=_curve(charges, delta=limit.delta, order=order) if record.budget else (),
    )


def _done_by(charge: Line) -> str:
    """The kind of entry that says that what was charged for has been done."""
    return "release" if isinstance(charge.mechanism, GaussianRelease) else "round-done"


def _price(everything: _Counts, training: _Counts, *, delta: float, order: int) -> float:
    """What is added to epsilon by whatever is no training."""
    if everything == training:
        return 0.0
    without = filter_epsilon(training, delta=delta, order=order)
    return filter_epsilon(everything, delta=delta, order=order) - without


def _attendance(audit: Audit, study: str) -> Iterator[Attendance]:
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for attempt in audit.attempts:
        if attempt.turn.study == study:
            for place, names in enumerate((attempt.invited, attempt.cohort, attempt.uploaders, attempt.dropped)):
                for name in names:
                    counts[name][place] += 1
    for name, (asked, agreed, summed, dropped) in sorted(counts.items()):
        yield Attendance(hospital=name, asked=asked, agreed=agreed, summed=summed, dropped=dropped)


def _mechanisms(audit: Audit, anchors: Mapping[int, str]) -> Iterator[UsedMechanism]:
    uses: dict[Hashable, list[tuple[PoissonGaussian | GaussianRelease, MechanismUse]]] = {}
    for record in audit.hospitals:
        places: defaultdict[PoissonGaussian | GaussianRelease, list[int]] = defaultdict(list)
        for line in record.lines:
            if line.kind == "charge" and line.mechanism is not None:
                places[line.mechanism].append(line.seq)
        for mechanism, found in places.items():
            use = MechanismUse(
                hospital=record.hospital,
                anchor=anchors[id(record)],
                charges=len(found),
                first=found[0],
                last=found[-1],
            )
            uses.setdefault(recipe(mechanism), []).append((mechanism, use))
    for number, same in enumerate(uses.values(), start=1):
        batches = [mechanism.expected_batch for mechanism, _ in same if isinstance(mechanism, PoissonGaussian)]
        yield UsedMechanism(
            label=f"M{number}",
            mechanism=same[0][0],
            batches=(min(batches), max(batches)) if batches else None,
            uses=tuple(use for _, use in same),
        )


def recipe(mechanism: PoissonGaussian | GaussianRelease) -> Hashable:
    """What is the same for mechanisms that differ in nothing but the hospital's size."""
    if isinstance(mechanism, GaussianRelease):
        return mechanism
    return mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps, mechanism.clip


def _tests(audit: Audit, anchors: Mapping[int, str]) -> Iterator[TrainerTest]:
    for record in audit.hospitals:
        for line in record.lines:
            if line.kind == "conformance" and line.conformance is not None:
                yield TrainerTest(
                    hospital=record.hospital,
                    anchor=anchors[id(record)],
                    entry=line.seq,
                    study=line.study,
                    result=line.conformance,
                )


# What was read, and what is written


def _sources(path: Path) -> Iterator[Source]:
    """A file with its digest; of a study's folder, the two files that are evidence."""
    inside = (path / name for name in ("receipts.jsonl", "sums.jsonl"))
    for file in filter(Path.exists, inside) if path.is_dir() else [path]:
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
                size = opened.tell()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}", hint="It was there a moment ago.") from None
        yield Source(path=str(file), bytes=size, sha256=digest)


class Span(NamedTuple):
    """Neighbouring entries of a ledger: shown one by one, or only counted."""

    lines: Sequence[Line]
    shown: bool


def spans(lines: Sequence[Line], wanted: Iterable[int], *, most: int) -> list[Span]:
    """Cut a ledger into what is shown and what is only counted.

    Args:
        lines: All entries, oldest first.
        wanted: Entries that something refers to; these are always shown, and so is a gap of one or two between them.
        most: A ledger of up to so many entries is shown whole.
    """
    if len(lines) <= most:
        return [Span(lines, shown=True)] if lines else []
    numbers = [line.seq for line in lines]
    places = sorted(
        {place for seq in wanted if (place := bisect_right(numbers, seq) - 1) >= 0 and numbers[place] == seq}
    )
    near = {
        other for one, two in pairwise([-1, *places, len(lines)]) if two - one <= 3 for other in range(one + 1, two)
    }
    found, after = list[Span](), 0
    for place in sorted({*places, *near}):
        if place > after:
            found.append(Span(lines[after:place], shown=False))
        found.append(Span(lines[place : place + 1], shown=True))
        after = place + 1
    if after < len(lines):
        found.append(Span(lines[after:], shown=False))
    return found


def write_json(path: Path, report: Report, audit: Audit) -> None:
    """Write the report and all entries of all ledgers, one entry a line, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    anchors = anchors_of(audit.hospitals)
    fields = report.model_dump(mode="json")
    head = json.dumps(fields, indent=1, allow_nan=False).removesuffix("\n}")
    parts = [head, ',\n "entries": {']
    for number, record in enumerate(audit.hospitals):
        parts.append(f"{',' if number else ''}\n  {json.dumps(anchors[id(record)])}: [")
        parts.append(",".join(f"\n   {json.dumps(line_fields(line))}" for line in record.lines))
        parts.append("\n  ]")
    parts.append("\n }\n}\n")
    write(path, "".join(parts))


def line_fields(line: Line) -> dict[str, object]:
    """An entry as JSON; what it does not have is left out."""
    fields = {name: value for name, value in line._asdict().items() if value is not None}
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        replace_file(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="Choose another file.") from None
