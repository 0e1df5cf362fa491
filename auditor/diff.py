"""Two pieces of evidence of the same hospitals, an older and a newer one: what came to it, and does the newer go on?

A ledger can only grow. So every entry that the older evidence shows must stand in the newer one, at the same place,
with the same hash. Bundles and ledgers are audited before they are compared; a report's JSON is taken as it is written.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from auditor.findings import Finding
from auditor.record import Audit, HospitalRecord
from auditor.report import FORMAT
from shared_models.config import Frozen, Name
from shared_models.errors import EvidenceError
from shared_models.privacy.entries import KINDS, Digest

LARGEST_REPORT = 2**28  # bytes


class Seen(NamedTuple):
    """An entry, as far as it matters here."""

    seq: int
    hash: str
    kind: str
    study: str | None
    time: str


class Spent(Frozen):
    """What something had cost by then, at its own delta, by the filter and by PLD."""

    charges: int
    epsilon_filter: float
    epsilon_pld: float


class History(NamedTuple):
    """One hospital's ledger at one time.

    Attributes:
        spent: By study, and in total under None.
    """

    hospital: str
    population: str
    entries: Sequence[Seen]
    spent: Mapping[str | None, Spent]
    left: float | None


class Change(Frozen):
    """How the cost of a study, or of all (None), has changed."""

    study: str | None
    before: Spent
    after: Spent


class Difference(Frozen):
    """What came to one hospital's ledger.

    Attributes:
        came: How many entries of each kind.
        since: Time of the newest entry that both have.
        until: Time of the newest entry.
    """

    hospital: str
    population: str
    entries_before: int
    entries_after: int
    came: dict[str, int]
    since: str | None
    until: str | None
    changes: tuple[Change, ...]
    left_before: float | None
    left_after: float | None


class Comparison(Frozen):
    """What came to all of them, and what does not fit; empty findings mean that the newer evidence goes on."""

    differences: tuple[Difference, ...]
    findings: tuple[Finding, ...]


def histories(audit: Audit) -> list[History]:
    """What an audit read of every ledger."""
    return [_history(record) for record in audit.hospitals]


def _history(record: HospitalRecord) -> History:
    spent: dict[str | None, Spent] = {}
    if record.budget is not None:
        figures = {None: record.budget.spent} | {study.study: study.spent for study in record.budget.studies}
        for study, found in figures.items():
            spent[study] = Spent(
                charges=found.charges, epsilon_filter=found.epsilon_filter, epsilon_pld=found.epsilon_pld
            )
    return History(
        hospital=record.hospital,
        population=record.population,
        entries=[Seen(line.seq, line.hash, line.kind, line.study, line.time) for line in record.lines],
        spent=spent,
        left=record.budget.left if record.budget else None,
    )


def compare(older: Iterable[History], newer: Iterable[History], *, partial: bool = False) -> Comparison:
    """Hold newer evidence against older.

    Guarantees:
        * An entry of the older evidence that the newer lacks, or has otherwise, is a finding with its number.

    Args:
        older: What was shown before.
        newer: What is shown now.
        partial: A ledger that only the older evidence has is no finding.
    """
    now = {(history.hospital, history.population): history for history in newer}
    differences, findings = [], []
    for before in older:
        after = now.get((before.hospital, before.population))
        if after is None and partial:
            continue
        if after is None:
            what = f"the newer evidence has no ledger of record set {before.population}"
            findings.append(Finding(code="history-missing", party=before.hospital, what=what))
            continue
        findings += _break(before, after)
        differences.append(_difference(before, after))
    return Comparison(differences=tuple(differences), findings=tuple(findings))


def _break(before: History, after: History) -> list[Finding]:
    hashes = {entry.seq: entry.hash for entry in after.entries}
    for entry in before.entries:
        other = hashes.get(entry.seq)
        if other is None:
            what = (
                f"the older evidence reaches to entry {before.entries[-1].seq}, the newer one lacks entry {entry.seq}"
            )
            return [_found("history-rolled-back", before, entry, what)]
        if other != entry.hash:
            what = f"entry {entry.seq} was {entry.hash[:16]}… in the older evidence, {other[:16]}… in the newer one"
            return [_found("history-forked", before, entry, what)]
    return []


def _found(code: str, history: History, entry: Seen, what: str) -> Finding:
    return Finding(code=code, party=history.hospital, what=what, study=entry.study, entry=entry.seq)


def _difference(before: History, after: History) -> Difference:
    known = {(entry.seq, entry.hash) for entry in before.entries}
    new = [entry for entry in after.entries if (entry.seq, entry.hash) not in known]
    both = [entry for entry in after.entries if (entry.seq, entry.hash) in known]
    nothing = Spent(charges=0, epsilon_filter=0.0, epsilon_pld=0.0)
    studies = list(dict.fromkeys([*after.spent, *before.spent]))
    pairs = [(study, before.spent.get(study, nothing), after.spent.get(study, nothing)) for study in studies]
    return Difference(
        hospital=after.hospital,
        population=after.population,
        entries_before=len(before.entries),
        entries_after=len(after.entries),
        came=dict(sorted(Counter(entry.kind for entry in new).items())),
        since=both[-1].time if both else None,
        until=after.entries[-1].time if after.entries else None,
        changes=tuple(Change(study=study, before=was, after=now) for study, was, now in pairs if was != now),
        left_before=before.left,
        left_after=after.left,
    )


# Reports as JSON


class _Read(BaseModel):
    """What is needed of a report's JSON; whatever else it has is not looked at."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _Figures(_Read):
    charges: int
    epsilon_filter: float
    epsilon_pld: float


class _Hospital(_Read):
    hospital: Name
    anchor: str = Field(max_length=80)
    population: Name
    computed: _Figures | None
    left: float | None


class _Part(_Read):
    anchor: str = Field(max_length=80)
    computed: _Figures | None


class _Study(_Read):
    study: Name
    hospitals: list[_Part]


class _Entry(_Read):
    seq: int = Field(ge=1)
    hash: Digest
    kind: str = Field(max_length=40)
    time: str = Field(max_length=40)
    study: Name | None = None


class _Report(_Read):
    format: str
    hospitals: list[_Hospital]
    studies: list[_Study]
    entries: dict[str, list[_Entry]]


def is_report(path: Path) -> bool:
    """Whether a file is JSON, rather than a bundle or a ledger; one that cannot be read is not."""
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


def read_report(path: Path) -> list[History]:
    """The ledgers in a report's JSON, as ``konsil-audit report --json`` wrote it.

    Raises:
        EvidenceError: It cannot be read, is too large, or is no such report.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_REPORT + 1)
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read: {error.strerror}", hint="Give a bundle or a report.") from None
    if len(data) > LARGEST_REPORT:
        raise EvidenceError(f"{path} is larger than any report", hint="Compare the bundles instead.")
    try:
        report = _Report.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:4])
        raise EvidenceError(
            f"{path} is no report of an audit: {where}: {first['msg'][:80]}",
            hint="Give the JSON file of konsil-audit report --json, or a bundle.",
        ) from None
    if report.format != FORMAT:
        raise EvidenceError(f"{path} is a report of another format", hint=f"This release reads {FORMAT}.")
    return [_read_history(report, hospital) for hospital in report.hospitals]


def _read_history(report: _Report, hospital: _Hospital) -> History:
    figures: dict[str | None, _Figures | None] = {None: hospital.computed}
    figures |= {
        study.study: part.computed
        for study in report.studies
        for part in study.hospitals
        if part.anchor == hospital.anchor
    }
    entries = [
        Seen(entry.seq, entry.hash, entry.kind if entry.kind in KINDS else "unknown", entry.study, entry.time)
        for entry in report.entries.get(hospital.anchor, [])
    ]
    return History(
        hospital=hospital.hospital,
        population=hospital.population,
        entries=entries,
        spent={study: _spent(found) for study, found in figures.items() if found is not None},
        left=hospital.left,
    )


def _spent(figures: _Figures) -> Spent:
    return Spent(charges=figures.charges, epsilon_filter=figures.epsilon_filter, epsilon_pld=figures.epsilon_pld)
