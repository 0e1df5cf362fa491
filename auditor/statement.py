"""Papers about one study, drafted from its evidence: every field names the entry it was read from, or is left open.

Three of them: a privacy statement in the order of NIST SP 800-226 (the guarantee, the algorithms, the deployment), a
record of processing (GDPR, Article 30), and an annex to an impact assessment (Article 35(7)). They are drafts of facts.
What the evidence does not show, a controller fills in; whether the papers suffice is for a lawyer to say.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal, NamedTuple

from auditor.record import Audit, HospitalRecord
from auditor.render import describe, epsilon, odds, plain
from auditor.report import HospitalStudy, Report, Study, UsedMechanism, anchors_of, make_report, recipe
from shared_models.config import Frozen
from shared_models.errors import EvidenceError
from shared_models.secagg.protocol import plan_threshold, who_could_learn_what
from shared_models.versions import RELEASE

FORMAT: Literal["konsil-statement/1"] = "konsil-statement/1"
OPEN = "to be filled in by the controller"
NO_ADVICE = "A draft of facts, and no legal advice."


class Trace(Frozen):
    """Where a fact was read.

    Attributes:
        party: A hospital, ``transcripts`` for records of sums that hospitals signed, or ``auditor`` for what was
            computed here from the entries that are named beside it.
        entry: Number of the ledger entry, of a hospital.
        what: Of other parties, which of their records.
    """

    party: str
    entry: int | None = None
    what: str | None = None

    def __str__(self) -> str:
        """In words."""
        return f"{self.party}, ledger entry {self.entry}" if self.entry else f"{self.party}: {self.what}"


class Item(Frozen):
    """One field of a paper.

    Attributes:
        value: What the evidence shows; None where a controller has to fill it in.
        traces: What ``value`` was read from: never empty, unless it is None.
        hint: For whoever fills it in, or reads it.
    """

    label: str
    value: str | None = None
    traces: tuple[Trace, ...] = ()
    hint: str = ""


class Section(Frozen):
    """Some fields under one heading."""

    title: str
    items: tuple[Item, ...]


class Paper(Frozen):
    """One document.

    Attributes:
        name: Of its files, without an ending.
    """

    name: str
    title: str
    intro: str
    sections: tuple[Section, ...]


class Statement(Frozen):
    """All papers about one study."""

    format: Literal["konsil-statement/1"] = FORMAT
    study: str
    made_at: str
    release: str
    verdict: str
    papers: tuple[Paper, ...]


class _Facts(NamedTuple):
    """What the papers are written from.

    Attributes:
        records: Each hospital's evidence, beside its part of the study.
    """

    report: Report
    study: Study
    records: Sequence[tuple[HospitalRecord, HospitalStudy]]
    audit: Audit


def make_statement(audit: Audit, study: str, *, now: datetime | None = None) -> Statement:
    """Draft the papers about one study.

    Args:
        audit: What was read and found.
        study: Its name.
        now: When they are made; the present, if left out.

    Raises:
        EvidenceError: No ledger in the evidence approved such a study.
    """
    report = make_report(audit, now=now or datetime.now(UTC))
    facts = _facts(audit, report, study)
    return Statement(
        study=study,
        made_at=report.made_at,
        release=RELEASE,
        verdict=report.verdict,
        papers=(_privacy_statement(facts), _record_of_processing(facts), _impact_annex(facts)),
    )


def _facts(audit: Audit, report: Report, study: str) -> _Facts:
    found = next((known for known in report.studies if known.study == study and known.hospitals), None)
    if found is None:
        names = ", ".join(known.study for known in report.studies if known.hospitals) or "none"
        raise EvidenceError(
            f"no ledger in this evidence approved a study {study}", hint=f"Studies that are in it: {names}."
        )
    anchors = anchors_of(audit.hospitals)
    parts = {part.anchor: part for part in found.hospitals}
    records = [(record, parts[anchors[id(record)]]) for record in audit.hospitals if anchors[id(record)] in parts]
    return _Facts(report, found, records, audit)


# The privacy statement


def _privacy_statement(facts: _Facts) -> Paper:
    return Paper(
        name="privacy-statement",
        title=f"Privacy statement: study {facts.study.study}",
        intro="In the order of NIST SP 800-226, Guidelines for Evaluating Differential Privacy Guarantees (2025). "
        + NO_ADVICE,
        sections=(
            Section(title="What this statement is about", items=tuple(_scope(facts))),
            Section(title="The guarantee", items=tuple(_guarantee(facts))),
            Section(title="The algorithms", items=tuple(_algorithms(facts))),
            Section(title="The deployment", items=tuple(_deployment(facts))),
            Section(title="What to know before quoting a figure", items=tuple(_limits(facts))),
        ),
    )


def _scope(facts: _Facts) -> Iterator[Item]:
    yield Item(label="Study", value=facts.study.study, traces=_approvals(facts))
    yield _purpose(facts)
    yield Item(
        label="Hospitals whose evidence this rests on",
        value=", ".join(part.anchor for _, part in facts.records),
        traces=_openings(facts),
    )
    yield _period(facts)
    yield Item(
        label="What the audit found",
        value=facts.report.verdict,
        traces=(Trace(party="auditor", what=f"konsil-audit {RELEASE}, {facts.report.made_at}"),),
    )


def _purpose(facts: _Facts) -> Item:
    plan = facts.study.plan
    if plan is None:
        return Item(label="Purpose", hint="The evidence has the plan's digest, and not the plan.")
    return Item(
        label="Purpose", value=plan.purpose, traces=_approvals(facts), hint="As approved, by the plan's digest."
    )


def _period(facts: _Facts) -> Item:
    ends = [
        (line.time, Trace(party=part.anchor, entry=line.seq))
        for record, part in facts.records
        for line in record.lines
        if line.study == facts.study.study and line.kind == "charge"
    ]
    if not ends:
        return Item(label="Period of processing", value="none: nothing was charged", traces=_approvals(facts))
    (first, began), (last, ended) = min(ends, key=_time_of), max(ends, key=_time_of)
    return Item(
        label="Period of processing",
        value=f"{first} to {last}, first and last charge",
        traces=(began, ended),
        hint="By the hospitals' own clocks.",
    )


def _time_of(found: tuple[str, Trace]) -> str:
    return found[0]


def _guarantee(facts: _Facts) -> Iterator[Item]:
    yield Item(
        label="Kind of guarantee",
        value="(epsilon, delta)-differential privacy",
        traces=_openings(facts),
        hint="Each budget is opened with both numbers.",
    )
    for record, part in facts.records:
        yield _cost(record, part)
    yield from _grouped(
        facts, "Unit of privacy", lambda record: f"one {record.terms.unit}, all records at one hospital"
    )
    yield from _grouped(facts, "Neighbouring relation", lambda record: record.terms.neighbouring)
    yield Item(
        label="Scope of composition",
        value="all charges of this study; a budget adds up every study of the same record set",
        traces=_openings(facts),
    )
    for record, part in facts.records:
        yield Item(
            label=f"Budget of {part.anchor}",
            value=f"epsilon {record.terms.epsilon:g} at delta {record.terms.delta:g}, for record set "
            f"{record.population}, "
            f"over all studies; public size {plain(record.terms.public_size)}, as declared",
            traces=(Trace(party=part.anchor, entry=1),),
        )


def _cost(record: HospitalRecord, part: HospitalStudy) -> Item:
    label = f"Epsilon and delta at {part.anchor}"
    figures = part.computed
    if figures is None or part.last is None:
        why = "Nothing was charged." if part.last is None and figures is not None else "The ledger does not hold."
        return Item(label=label, hint=why)
    return Item(
        label=label,
        value=f"epsilon {epsilon(figures.epsilon_filter)} (enforced; holds under adaptive choice), "
        f"{epsilon(figures.epsilon_pld)} (PLD; for the schedule as executed, valid if it was fixed in advance), at "
        "delta "
        f"{figures.delta:g}; {plain(figures.charges)} charges; limit of the study: epsilon {part.limit:g}",
        traces=(*_span(record, part), Trace(party="auditor", what="computed from these charges")),
    )


def _span(record: HospitalRecord, part: HospitalStudy) -> tuple[Trace, ...]:
    """The first and the last charge of a study."""
    charges = [line.seq for line in record.lines if line.kind == "charge" and line.study == _study(record, part)]
    return tuple(Trace(party=part.anchor, entry=seq) for seq in dict.fromkeys((charges[0], charges[-1])))


def _study(record: HospitalRecord, part: HospitalStudy) -> str | None:
    return next(line.study for line in record.lines if line.seq == part.approved)


def _algorithms(facts: _Facts) -> Iterator[Item]:
    for used in facts.report.mechanisms:
        users = {use.anchor for use in used.uses}
        firsts = [
            (part.anchor, _first_charge(record, facts.study.study, used))
            for record, part in facts.records
            if part.anchor in users
        ]
        traces = tuple(Trace(party=anchor, entry=seq) for anchor, seq in firsts if seq is not None)
        if traces:
            yield Item(label=f"Mechanism {used.label}", value=describe(used), traces=traces)
    yield from _grouped(
        facts,
        "Accountant that enforces",
        lambda record: f"a Renyi filter at order {record.terms.order}, fixed when the budget was opened",
    )
    yield Item(
        label="Accountant that computed the figures above",
        value=f"dp-accounting {version('dp-accounting')}: Renyi divergence at that order; privacy loss distributions",
        traces=(Trace(party="auditor", what=f"konsil-audit {RELEASE}"),),
    )
    yield _claims(facts)
    yield Item(
        label="Randomness",
        value="not recorded as such; the software that drew it has the digest "
        f"{', '.join(_digests(facts)) or 'unknown'}",
        traces=_software_traces(facts) or _openings(facts),
        hint="The documentation of the software with this digest says how it draws noise and samples.",
    )
    yield Item(label="Utility and bias", hint="How good the model is, and for which groups of patients it is worse.")


def _first_charge(record: HospitalRecord, study: str, used: UsedMechanism) -> int | None:
    wanted = recipe(used.mechanism)
    return next(
        (
            line.seq
            for line in record.lines
            if line.kind == "charge" and line.study == study and line.mechanism and recipe(line.mechanism) == wanted
        ),
        None,
    )


def _claims(facts: _Facts) -> Item:
    stated = [(part.anchor, part.claim, part.last) for _, part in facts.records if part.claim is not None and part.last]
    return Item(
        label="Accountant of the hospitals",
        value="; ".join(f"{name}: epsilon {epsilon(claim.epsilon)} by {claim.accountant}" for name, claim, _ in stated)
        or None,
        traces=tuple(
            Trace(party=name, what=f"claims in its bundle, up to ledger entry {last}") for name, _, last in stated
        ),
        hint="" if stated else "The evidence carries no statement by the hospitals.",
    )


def _digests(facts: _Facts) -> list[str]:
    return list(dict.fromkeys(digest for digest, _ in _software_places(facts)))


def _software_traces(facts: _Facts) -> tuple[Trace, ...]:
    return tuple(trace for _, trace in _software_places(facts))


def _software_places(facts: _Facts) -> Iterator[tuple[str, Trace]]:
    """Every digest of software at every hospital, with the first entry of the study that names it."""
    for record, part in facts.records:
        seen: set[str] = set()
        for line in record.lines:
            if line.study == facts.study.study and line.software_digest and line.software_digest not in seen:
                seen.add(line.software_digest)
                yield line.software_digest, Trace(party=part.anchor, entry=line.seq)


def _deployment(facts: _Facts) -> Iterator[Item]:
    yield _trust(facts)
    study = facts.study
    if study.attempts:
        yield Item(
            label="Queries answered",
            value=f"{plain(study.attempts)} attempts at a sum, {plain(len(study.summed))} rounds of training with a "
            "sum",
            traces=(_transcripts(study),),
        )
    releases = [(part.anchor, part.releases) for _, part in facts.records if part.releases]
    yield Item(
        label="Released besides the model",
        value="; ".join(f"{name}: {len(entries)} releases of statistics" for name, entries in releases)
        or "nothing: no ledger has an entry of a release",
        traces=tuple(Trace(party=name, entry=entries[0]) for name, entries in releases) or _all_entries(facts),
    )
    plan = study.plan
    yield Item(
        label="Side channels: time of replies",
        value=f"replies leave at multiples of {plan.reply_grid_s:g} s" if plan else None,
        traces=_approvals(facts) if plan else (),
        hint="By the approved plan." if plan else "The evidence has the plan's digest, and not the plan.",
    )
    yield from _noise(facts)
    tested = [
        Trace(party=part.anchor, entry=line.seq)
        for record, part in facts.records
        for line in [line for line in record.lines if line.kind == "conformance"][-1:]
    ]
    yield Item(
        label="Tests of the implementation",
        value=f"a conformance test is recorded by {len(tested)} of {len(facts.records)} hospitals"
        if tested
        else "none is recorded in the ledgers",
        traces=tuple(tested) or _all_entries(facts),
    )
    yield Item(label="Data security and access control", hint="Who can reach records, keys and models, and how.")
    yield Item(label="Exposure by data collection", hint="How the records came to the hospital, and who else has them.")


def _noise(facts: _Facts) -> Iterator[Item]:
    """What was measured of the noise in this study's sums."""
    for test in facts.report.noise:
        if test.study == facts.study.study and test.ratio is not None:
            yield Item(
                label="Noise, measured",
                value=f"{test.ratio:.3f} of the standard deviation that was charged, over {plain(test.sums)} sums; had "
                f"all hospitals added only {test.found:.3f} of it, that would have been noticed with probability 0.99",
                traces=(Trace(party="auditor", what="measured in coordinates of the sums that hold noise only"),),
            )


def _trust(facts: _Facts) -> Item:
    """Who would have had to work together to see one hospital's contribution: by the least protected sum."""
    study, plan = facts.study, facts.study.plan
    sums = [attempt for attempt in facts.audit.attempts if attempt.turn.study == study.study and attempt.uploaders]
    if not sums or plan is None:
        return Item(label="Trust model", hint="Who adds the noise, and who can see what before it is added.")
    least = min(sums, key=lambda attempt: len(attempt.invited))
    threshold = plan_threshold(plan.minimum_hospitals, len(least.invited))
    turn = least.turn
    return Item(
        label="Trust model",
        value="The noise is each hospital's own, recorded in its own ledger. "
        + who_could_learn_what(len(least.invited), threshold),
        traces=(
            Trace(party="transcripts", what=f"{turn.purpose}, round {turn.round}, attempt {turn.attempt}"),
            *_approvals(facts),
        ),
        hint="For the sum with the fewest hospitals; the threshold follows from their number and the approved plan.",
    )


def _limits(facts: _Facts) -> Iterator[Item]:
    here = {part.anchor for _, part in facts.records}
    for edge in facts.report.edges:
        rests = tuple(Trace(party=rests.anchor, entry=rests.entry) for rests in edge.rests if rests.anchor in here)
        yield Item(
            label=edge.topic,
            value=edge.says,
            traces=rests or (Trace(party="auditor", what="what the evidence as a whole holds and lacks"),),
            hint=edge.do,
        )


# Record of processing, and the annex


def _record_of_processing(facts: _Facts) -> Paper:
    return Paper(
        name="record-of-processing",
        title=f"Record of processing activities: study {facts.study.study}",
        intro="By the letters of Article 30(1) of Regulation (EU) 2016/679. Each controller keeps its own record: a "
        f"hospital makes this paper from its own evidence alone. {NO_ADVICE}",
        sections=(
            Section(title="(a) Controller and contacts", items=tuple(_contacts(facts))),
            Section(title="(b) Purposes", items=(_purpose(facts), _licence(facts))),
            Section(title="(c) Persons and data", items=tuple(_persons(facts))),
            Section(title="(d) Recipients", items=tuple(_recipients(facts))),
            Section(
                title="(e) Transfers to third countries",
                items=(Item(label="Transfers", hint="Where coordinator, other hospitals and users of the model are."),),
            ),
            Section(
                title="(f) Time limits for erasure",
                items=(
                    Item(label="Records, ledgers, models", hint="A ledger and the evidence hold no patient's data."),
                ),
            ),
            Section(title="(g) Technical and organisational measures", items=tuple(_measures(facts))),
        ),
    )


def _contacts(facts: _Facts) -> Iterator[Item]:
    for record, part in facts.records:
        yield Item(
            label=f"Controller known in the evidence as {part.anchor}",
            value=f"signs with key {record.keys[-1].fingerprint}" if record.keys else None,
            traces=(Trace(party=part.anchor, entry=record.keys[-1].entry),) if record.keys else (),
        )
    yield Item(label="Name and contact details of the controller")
    yield Item(label="Joint controllers", hint="Other hospitals and the coordinator, if they decide together.")
    yield Item(label="Representative")
    yield Item(label="Data protection officer")


def _licence(facts: _Facts) -> Item:
    plan = facts.study.plan
    return Item(
        label="Licence or agreement that the data is used under",
        value=plan.data_licence if plan else None,
        traces=_approvals(facts) if plan else (),
        hint="The legal basis is the controller's to name.",
    )


def _persons(facts: _Facts) -> Iterator[Item]:
    for record, part in facts.records:
        yield Item(
            label=f"Persons at {part.anchor}",
            value=f"{record.terms.unit}s of record set {record.population}; {plain(record.terms.public_size)} as "
            "declared, "
            "never counted",
            traces=(Trace(party=part.anchor, entry=1),),
        )
    plan = facts.study.plan
    yield Item(
        label="Task that fixes which columns are read",
        value=plan.task if plan else None,
        traces=_approvals(facts) if plan else (),
    )
    yield Item(
        label="Categories of personal data", hint="The columns of this task, as the hospital's records have them."
    )


def _recipients(facts: _Facts) -> Iterator[Item]:
    study = facts.study
    took_part = [seen.hospital for seen in study.attendance if seen.summed]
    if took_part:
        yield Item(
            label="Recipients of sums of noised contributions",
            value=f"the coordinator; sums over contributions of {', '.join(took_part)}",
            traces=(_transcripts(study),),
        )
    yield Item(label="Recipients of the model", hint="Whoever the coordinator or the hospitals give it to.")


def _measures(facts: _Facts) -> Iterator[Item]:
    for record, part in facts.records:
        approval = {"steward": "by a steward", "standing-rule": "by a standing rule of the hospital"}
        yield Item(
            label=f"Decision before processing at {part.anchor}",
            value=f"approved {approval.get(part.approved_by or '', 'without a note by whom')}, for epsilon "
            f"{part.limit:g} at "
            f"delta {part.delta:g} at most",
            traces=(Trace(party=part.anchor, entry=part.approved),),
        )
        yield _cost(record, part)
    yield from _algorithms_of_protection(facts)
    yield _trust(facts)
    yield Item(
        label="Records of processing",
        value="each hospital keeps a ledger that can only grow, each entry signed and chained to the one before",
        traces=_openings(facts),
    )
    yield Item(label="Other measures", hint="Access control, encryption at rest, training of staff, and so on.")


def _algorithms_of_protection(facts: _Facts) -> Iterator[Item]:
    for item in _algorithms(facts):
        if item.label.startswith("Mechanism"):
            yield item


def _impact_annex(facts: _Facts) -> Paper:
    plan = facts.study.plan
    approvals = _approvals(facts)
    return Paper(
        name="dpia-annex",
        title=f"Annex to a data protection impact assessment: study {facts.study.study}",
        intro=f"By the letters of Article 35(7) of Regulation (EU) 2016/679. {NO_ADVICE}",
        sections=(
            Section(
                title="(a) Description of the processing and its purposes",
                items=(
                    _purpose(facts),
                    Item(
                        label="What is computed",
                        value=f"a model ({plan.network.name}) for the task {plan.task}, in up to {plain(plan.rounds)} "
                        "rounds "
                        f"of {plain(plan.training.steps)} steps"
                        if plan
                        else None,
                        traces=approvals if plan else (),
                    ),
                    _period(facts),
                    *_persons(facts),
                    *_recipients(facts),
                    Item(label="Legitimate interest, where that is the basis"),
                ),
            ),
            Section(
                title="(b) Necessity and proportionality",
                items=(
                    Item(label="Why the purpose needs this processing"),
                    Item(label="Why less data, or none of patients, would not do"),
                    *_algorithms_of_protection(facts),
                ),
            ),
            Section(title="(c) Risks to patients", items=tuple(_risks(facts))),
            Section(title="(d) Measures against the risks", items=tuple(_measures(facts))),
        ),
    )


def _risks(facts: _Facts) -> Iterator[Item]:
    for record, part in facts.records:
        if part.computed is not None and part.last is not None:
            yield Item(
                label=f"What could be learned of one patient of {part.anchor}",
                value="whether the patient is in the data can be guessed right at most "
                f"{odds(part.computed.epsilon_filter)} of the time where tossing a coin gives 50 %, apart from a "
                "probability "
                f"of {part.delta:g}; from all that left the hospital for this study, whatever else is known",
                traces=(*_span(record, part), Trace(party="auditor", what="computed from these charges")),
            )
    yield from _limits(facts)
    yield Item(label="How likely and how severe these risks are for the patients concerned")
    yield Item(label="Views of patients or their representatives, where they were asked")


# Where facts come from


def _grouped(facts: _Facts, label: str, value: Callable[[HospitalRecord], str]) -> Iterator[Item]:
    """One field for each different value that hospitals' opening entries have."""
    found: dict[str, list[Trace]] = {}
    for record, part in facts.records:
        found.setdefault(value(record), []).append(Trace(party=part.anchor, entry=1))
    for text, traces in found.items():
        yield Item(label=label, value=text, traces=tuple(traces))


def _approvals(facts: _Facts) -> tuple[Trace, ...]:
    return tuple(Trace(party=part.anchor, entry=part.approved) for _, part in facts.records)


def _all_entries(facts: _Facts) -> tuple[Trace, ...]:
    """For what was looked for everywhere and is not there."""
    return tuple(
        Trace(party=part.anchor, what=f"none of ledger entries 1 to {len(record.lines)}")
        for record, part in facts.records
    )


def _openings(facts: _Facts) -> tuple[Trace, ...]:
    return tuple(Trace(party=part.anchor, entry=1) for _, part in facts.records)


def _transcripts(study: Study) -> Trace:
    return Trace(party="transcripts", what=f"{study.attempts} attempts of study {study.study}, signed by the hospitals")
