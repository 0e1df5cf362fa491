"""One audit: read everything that was shown, check each party by itself, then all of them side by side."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TypeVar, get_args

from auditor.approvals import check_approvals
from auditor.checkpoints import check_checkpoints, read_checkpoints
from auditor.claims import compare_claims
from auditor.conformance import check_conformance
from auditor.cross_check import attempts, cross_check, participants
from auditor.evidence import StudyFolder, Transcripts, Witness, read_bundle, read_ledger_file, read_study
from auditor.findings import COORDINATOR, Finding, Severity
from auditor.noise import check_noise
from auditor.recompute import report_facts
from auditor.record import Audit, HospitalRecord
from auditor.rosters import Rosters, check_members, read_rosters
from auditor.verify import Verified
from shared_models.audit_log import read_export, verify_export
from shared_models.control.deposits import CHECKPOINTS
from shared_models.errors import FederationError, UnsupportedVersionError
from shared_models.identity import fingerprint
from shared_models.privacy.checkpoint import SignedCheckpoint
from shared_models.privacy.evidence import Bundle, open_bundle

_SEVERITIES = get_args(Severity)  # the worst first
_OF_A_STUDY = ("receipts.jsonl", "sums.jsonl")
_CLOCK = timedelta(minutes=5)  # a ledger bears a clock that is set back by so much

Progress = Callable[[str], None]
Read = TypeVar("Read")


@dataclass
class _Sources:
    """Files by what they are."""

    bundles: list[Path] = field(default_factory=list)
    ledgers: list[Path] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)


@dataclass
class _Case:
    """What is known so far."""

    findings: list[Finding] = field(default_factory=list)
    witnesses: list[Witness] = field(default_factory=list)
    records: list[HospitalRecord] = field(default_factory=list)
    studies: list[StudyFolder] = field(default_factory=list)
    checkpoints: list[SignedCheckpoint] = field(default_factory=list)

    def broken(self, path: Path, error: FederationError, code: str) -> None:
        """Note that a file does not hold."""
        newer = isinstance(error, UnsupportedVersionError)
        what = str(error) if str(path) in str(error) else f"{path}: {error}"
        self.findings.append(Finding(code="newer-format" if newer else code, party=path.name, what=what))


def audit(
    sources: Sequence[Path],
    *,
    root: bytes | None = None,
    keys: Collection[bytes] = (),
    partial: bool = False,
    progress: Progress = lambda _: None,
) -> Audit:
    """Verify evidence, whoever it is from, and compute again what it cost.

    Guarantees:
        * Every file is looked at, whatever was wrong with those before; nothing raises because of what is in a file.
        * ``Audit.passed`` only if every chain, signature, charge, receipt and transcript holds, everybody's evidence
          agrees, hospitals' claims are what their ledgers add up to, the noise in decoded sums is what was charged, no
          trainer failed its hospital's own test, and everybody who took part is there.
        * No network; memory grows with the number of entries and attempts, about a kilobyte each, and is bounded.

    Args:
        sources: Evidence bundles, ledger files, study folders of the coordinator, exports of its audit log, files of
            checkpoints; or folders that hold such.
        root: The consortium's root public key. Without it nobody but the hospitals themselves says whose is a key.
        keys: Public keys of hospitals, as they came from elsewhere; each ledger must have one of them.
        partial: Hospitals that took part and are not here are a note only.
        progress: Is told what is being read.
    """
    files, case = _Sources(), _Case()
    for path in sources:
        _sort(path, files, case)
    bundles = list(_each(files.bundles, open_bundle, "bundle-broken", case))
    rosters = read_rosters(bundles, root)
    case.findings += rosters.findings
    transcripts = Transcripts(rosters.by_digest)
    for bundle in bundles:
        progress(f"{bundle.manifest.hospital}: {bundle.path}")
        _read_hospital(bundle, keys, transcripts, case)
    for path in files.ledgers:
        progress(str(path))
        _read_ledger(path, keys, case)
    case.studies += _each(files.studies, lambda path: read_study(path, transcripts), "study-broken", case, progress)
    list(_each(files.logs, lambda path: verify_export(read_export(path)), "log-broken", case, progress))
    lists = _each(files.checkpoints, lambda path: list(read_checkpoints(path)), "checkpoints-broken", case, progress)
    case.checkpoints += chain.from_iterable(lists)
    progress("comparing")
    case.findings += (found for record in case.records for found in check_checkpoints(record, case.checkpoints))
    case.findings += cross_check(case.witnesses, case.studies, rosters.by_digest)
    case.findings += check_members(case.witnesses, rosters)
    held = attempts(case.witnesses, case.studies)
    case.findings += check_noise(held, case.records)
    case.findings += _absent(case, partial=partial)
    case.findings += _unpinned(root, keys)
    return Audit(
        hospitals=tuple(sorted(case.records, key=lambda record: record.hospital)),
        attempts=held,
        findings=tuple(sorted(dict.fromkeys(case.findings), key=_rank)),
        root=fingerprint(root) if root else None,
        members=_members(rosters),
        sources=tuple(chain(files.bundles, files.ledgers, files.studies, files.logs, files.checkpoints)),
        passed_over=tuple(files.passed_over),
    )


def _rank(finding: Finding) -> tuple[int, str, str, int, int]:
    return (
        _SEVERITIES.index(finding.severity),
        finding.party,
        finding.study or "",
        finding.round or 0,
        finding.entry or 0,
    )


def _sort(path: Path, files: _Sources, case: _Case) -> None:
    """Tell what a file is by how it begins."""
    if path.is_dir():
        inside = [path, *sorted(path.rglob("*"))]
        studies = [child for child in inside if _is_study(child)]
        rest = [child for child in inside if not child.is_dir() and child.name not in _OF_A_STUDY]
        looked_at = [child for child in rest if _is_evidence(child)]
        files.studies += studies
        files.passed_over += [child for child in rest if not _is_evidence(child)]
        for child in looked_at:
            _sort(child, files, case)
        if not (studies or looked_at):
            what = f"{path} holds no evidence"
            case.findings.append(Finding(code="no-evidence", party=path.name, what=what))
        return
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        case.findings.append(Finding(code="no-evidence", party=path.name, what=what))
        return
    if start.startswith(b"PK"):
        files.bundles.append(path)
    elif start.startswith(b"SQLite format 3\0"):
        files.ledgers.append(path)
    elif start.startswith(b"{") and b'"format":"konsil-checkpoint/' in start:
        files.checkpoints.append(path)
    elif start.startswith(b"{"):
        files.logs.append(path)
    else:
        what = f"{path} is neither a bundle nor a ledger, a study's folder, an audit log or checkpoints"
        case.findings.append(Finding(code="no-evidence", party=path.name, what=what))


def _is_study(path: Path) -> bool:
    """Whether it is what a coordinator kept of a study."""
    return path.is_dir() and any((path / name).exists() for name in _OF_A_STUDY)


def _is_evidence(path: Path) -> bool:
    """Whether a file in a folder is worth a look by its name; what else lies there is passed over."""
    return path.suffix in {".zip", ".evidence", ".sqlite"} or path.name in {"audit-log.jsonl", CHECKPOINTS}


def _each(
    paths: Iterable[Path], read: Callable[[Path], Read], code: str, case: _Case, progress: Progress = lambda _: None
) -> Iterator[Read]:
    """What is in each file; one that does not hold is a finding."""
    for path in paths:
        progress(str(path))
        try:
            yield read(path)
        except FederationError as error:
            case.broken(path, error, code)


def _read_hospital(bundle: Bundle, keys: Collection[bytes], transcripts: Transcripts, case: _Case) -> None:
    try:
        witness, found = read_bundle(bundle, keys, transcripts)
    except FederationError as error:
        case.broken(bundle.path, error, "ledger-broken")
        return
    record = witness.record
    case.witnesses.append(witness)
    case.findings += found
    if bundle.manifest.format == "konsil-evidence/1":
        what = "the bundle is of an older format: plans, approvals and signed rosters are not in it"
        case.findings.append(Finding(code="older-bundle", party=record.hospital, what=what))
    else:
        case.findings += check_approvals(record, bundle.approvals, witness.keys)
    case.findings += _clock(record)
    if witness.unchecked:
        what = f"{witness.unchecked} transcripts were made under a roster that nobody shows: not checked"
        case.findings.append(Finding(code="not-checked", party=record.hospital, what=what))
    _take(record, witness.verified, case)


def _read_ledger(path: Path, keys: Collection[bytes], case: _Case) -> None:
    try:
        record, verified, found = read_ledger_file(path, keys)
    except FederationError as error:
        case.broken(path, error, "ledger-broken")
        return
    case.findings += found
    _take(record, verified, case)


def _take(record: HospitalRecord, verified: Verified, case: _Case) -> None:
    case.findings += check_conformance(record.hospital, record.lines)
    if not verified.head_was_checked:
        what = "there is no head file: entries may be missing at the end"
        case.findings.append(Finding(code="no-head", party=record.hospital, what=what))
    try:
        record = replace(record, budget=report_facts(record.hospital, record.population, record.terms, record.lines))
    except FederationError as error:
        case.findings.append(Finding(code="not-recomputed", party=record.hospital, what=str(error)))
    case.findings += compare_claims(record) if record.packed else []
    case.records.append(record)


def _clock(record: HospitalRecord) -> Iterator[Finding]:
    last = record.lines[-1]
    if record.packed and datetime.fromisoformat(last.time) > datetime.fromisoformat(record.packed) + _CLOCK:
        what = f"its newest entry is of {last.time}, after the bundle was packed, {record.packed}"
        yield Finding(code="clock", party=record.hospital, what=what, entry=last.seq)


def _absent(case: _Case, *, partial: bool) -> Iterator[Finding]:
    """Whose updates are in a sum, and whose ledger nobody shows."""
    here = {record.hospital for record in case.records}
    for name in sorted(participants(case.witnesses, case.studies) - here):
        code = "not-here" if partial else "bundle-missing"
        yield Finding(code=code, party=name, what=f"{name} took part, and its evidence is not here")


def _unpinned(root: bytes | None, keys: Collection[bytes]) -> Iterator[Finding]:
    if root is None:
        what = "no root key was given: " + ("hospitals' keys were" if keys else "every key is taken at its own word")
        yield Finding(code="no-root", party=COORDINATOR, what=what)


def _members(rosters: Rosters) -> dict[str, str]:
    members = rosters.newest.members if rosters.newest else ()
    return {member.name: fingerprint(bytes.fromhex(member.identity)) for member in members}
