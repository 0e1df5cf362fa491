"""What one party shows: a hospital's bundle or ledger, and what a coordinator kept of a study. Each checked by itself.

Everything is read a line at a time, and only what is compared later is kept: twenty hospitals' thousand rounds fit into
memory. Hospitals that took part in one attempt hold the same transcript, so each different one is verified once.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from sys import intern
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from auditor.findings import COORDINATOR, Finding
from auditor.record import AttemptRecord, HospitalRecord, Key, Line, Turn
from auditor.verify import MOST_FINDINGS, Rules, Verified, check_entries
from shared_models.config import Frozen, Name, explain
from shared_models.errors import EvidenceError, FederationError, ForeignReceiptError, UnsupportedEvidenceError
from shared_models.identity import fingerprint
from shared_models.privacy.entries import Entry
from shared_models.privacy.evidence import Bundle, parse_line, split_lines
from shared_models.privacy.head import head_path
from shared_models.privacy.ledger import snapshot
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian
from shared_models.receipts import SignedReceipt
from shared_models.secagg.key_agreement import Roster
from shared_models.secagg.protocol import Transcript
from shared_models.secagg.transcripts import verify_transcript
from shared_models.versions import refuse_version

_TYPES = {"poisson-gaussian": "Update", "gaussian-release": "ReleasedStatistics"}
MOST_ENTRIES = 500_000  # of one ledger; what is kept of each takes half a kilobyte
MOST_LINES = 500_000  # of any other part

Kept = TypeVar("Kept", bound=Frozen)
Item = TypeVar("Item")


class Receipted(Frozen):
    """A line of the coordinator's ``receipts.jsonl``."""

    hospital: Name
    upload: SignedReceipt


class Summed(Frozen):
    """A line of the coordinator's ``sums.jsonl``."""

    transcript: Transcript
    complaint: dict[str, object] | None = None
    null_coordinates: list[float] | None = None
    weight: float | None = None


class View(NamedTuple):
    """What one party holds of an attempt, as far as it is compared with others.

    Attributes:
        announced: Digest of the announcement.
        roster: Digest of the roster that it was made under.
        context: Digest of announcement and U1; None where it did not get to U1.
        commitments: Digest that each member of U2 committed to.
        problem: Why the transcript does not hold by itself; None if it does, or nobody knows its roster.
    """

    turn: Turn
    announced: str
    roster: str
    invited: tuple[str, ...]
    cohort: tuple[str, ...]
    uploaders: tuple[str, ...]
    context: str | None
    commitments: Mapping[str, str]
    problem: str | None


class Upload(NamedTuple):
    """A receipt, as far as it is compared with others."""

    hospital: str
    digest: str
    context: str
    type: str
    study: str
    round: int
    attempt: int


@dataclass(frozen=True)
class Witness:
    """A hospital's evidence that holds by itself, or breaks rules that it was not forged to break.

    Attributes:
        keys: All public keys of its ledger, oldest first.
        identities: Whom it knows by which key.
        shown: What coordinators showed it: attempt, and digest over everybody's receipts.
        unchecked: Transcripts made under a roster that nobody showed.
    """

    record: HospitalRecord
    verified: Verified
    keys: tuple[bytes, ...]
    identities: Mapping[str, bytes]
    views: tuple[View, ...]
    uploads: tuple[Upload, ...]
    shown: tuple[tuple[Turn, str], ...]
    unchecked: int

    @property
    def hospital(self) -> str:
        """Whose it is."""
        return self.verified.hospital


@dataclass(frozen=True)
class StudyFolder:
    """What a coordinator kept of one study: receipts and transcripts, in the order in which it kept them.

    Attributes:
        uploads: Each with the receipt itself, whose signature can only be checked beside a roster or a ledger.
        sums: Each attempt, with what the coordinator alone knows of it.
    """

    path: Path
    uploads: tuple[tuple[Upload, SignedReceipt], ...]
    views: tuple[View, ...]
    sums: tuple[AttemptRecord, ...]


class Transcripts:
    """Reads transcripts, and verifies each different one once.

    Args:
        rosters: By digest; transcripts under another one are not verified.
    """

    def __init__(self, rosters: Mapping[str, Roster]) -> None:
        self._rosters = rosters
        self._known: dict[bytes, View] = {}
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def read(self, line: bytes, where: str) -> View:
        """What a line of ``transcripts.jsonl`` says.

        Raises:
            EvidenceError: It is no transcript.
        """
        digest = hashlib.sha256(line).digest()
        if digest not in self._known:
            self._known[digest] = self.view(parse_line(line, Transcript, where))
        return self._known[digest]

    def view(self, transcript: Transcript) -> View:
        """What is compared of a transcript."""
        announcement, context = transcript.announcement, transcript.context
        return View(
            turn=_turn(transcript),
            announced=announcement.context0.hex(),
            roster=intern(announcement.roster_digest),
            invited=self._one(announcement.invited),
            cohort=self._one(tuple(member.hospital for member in transcript.cohort)),
            uploaders=self._one(transcript.uploaders),
            context=context.hex() if context else None,
            commitments={intern(signed.dealer): signed.digest.hex() for signed in transcript.commitments},
            problem=self._problem(transcript),
        )

    def knows(self, view: View) -> bool:
        """Whether a view's transcript was verified: its roster is known."""
        return view.roster in self._rosters

    def _one(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return self._names.setdefault(names, names)

    def _problem(self, transcript: Transcript) -> str | None:
        roster = self._rosters.get(transcript.announcement.roster_digest)
        try:
            if roster is not None:
                verify_transcript(transcript, roster=roster)
        except FederationError as error:
            return str(error)
        return None


def read_bundle(bundle: Bundle, keys: Collection[bytes], transcripts: Transcripts) -> tuple[Witness, list[Finding]]:
    """Verify one bundle by itself.

    Guarantees:
        * Its chain holds, and its manifest is signed by the ledger's newest key.
        * Found is: every rule of the budget that is broken; every receipt that is not signed by a key of this ledger,
          for a charge that is in it, once, in order, with the chain head and the number of charges of that moment;
          every transcript that does not hold by itself.

    Args:
        bundle: As ``open_bundle`` opened it.
        keys: Public keys that the auditor trusts, as for ``verify_ledger``.
        transcripts: What all parties' transcripts are read by.

    Raises:
        EvidenceError, LedgerError: It cannot be read, or the chain does not hold.
    """
    reading = _Reading()
    verified, chain_keys = check_entries(bundle.entries(), bundle.head, keys, reading.follow)
    manifest = bundle.manifest
    if manifest.public_key != chain_keys[-1].hex() or manifest.hospital != verified.hospital:
        raise EvidenceError(
            f"the bundle is signed by another key, or for another hospital, than {verified.hospital}'s ledger",
            hint="Whoever packed it is not who keeps this ledger.",
        )
    findings = reading.findings()
    uploads = tuple(_read_receipts(bundle, reading, chain_keys, findings))
    views = tuple(_few(transcripts.read(line, "a transcript") for line in bundle.lines("transcripts.jsonl")))
    if list(out_of_order(views)):
        findings.append(
            Finding(code="out-of-order", party=verified.hospital, what="transcripts are out of order, or there twice")
        )
    findings += [about(view, "bad-transcript", verified.hospital, view.problem) for view in views if view.problem]
    record = replace(
        reading.record(bundle.path, verified, chain_keys),
        packed=manifest.time,
        plans={plan.study: plan for plan in bundle.plans},
        claims=bundle.claims,
        software_digest=manifest.software_digest,
        egress_digest=manifest.egress_digest,
        receipts=len(uploads),
    )
    witness = Witness(
        record=record,
        verified=verified,
        keys=tuple(chain_keys),
        identities=bundle.roster.identities,
        views=views,
        uploads=uploads,
        shown=tuple(_read_shown(bundle)),
        unchecked=sum(not transcripts.knows(view) for view in views),
    )
    return witness, findings


def read_ledger_file(path: Path, keys: Collection[bytes]) -> tuple[HospitalRecord, Verified, list[Finding]]:
    """Verify a ledger as it lies at a hospital, with its head file where there is one.

    Raises:
        LedgerError: It cannot be read, or the chain does not hold.
    """
    reading = _Reading()
    with snapshot(path, head_path(path)) as (head, entries):
        verified, chain_keys = check_entries(entries, head, keys, reading.follow)
    return reading.record(path, verified, chain_keys), verified, reading.findings()


class _Reading:
    """Follows a ledger's entries, and keeps what is needed of them."""

    def __init__(self) -> None:
        self.rules, self.lines, self.places = Rules(), list[Line](), dict[str, int]()
        self.charges: defaultdict[str, list[int]] = defaultdict(list)
        self._first: Entry | None = None
        self._rotations: list[int] = []
        self._mechanisms: dict[PoissonGaussian | GaussianRelease, PoissonGaussian | GaussianRelease] = {}

    def follow(self, entry: Entry) -> None:
        if len(self.lines) >= MOST_ENTRIES:
            raise EvidenceError(
                f"the ledger has more than {MOST_ENTRIES} entries", hint="Verify it as a file: it is read in pieces."
            )
        self.rules.follow(entry)
        self._first = self._first or entry
        if entry.kind == "charge":
            self.charges[entry.study or ""].append(entry.seq)
        if entry.kind == "key-rotated":
            self._rotations.append(entry.seq)
        self.places[entry.hash] = entry.seq
        mechanism = entry.mechanism and self._mechanisms.setdefault(entry.mechanism, entry.mechanism)
        self.lines.append(
            Line(
                seq=entry.seq,
                time=entry.time,
                kind=intern(entry.kind),
                hash=entry.hash,
                study=_interned(entry.study),
                round=entry.round,
                attempt=entry.attempt,
                plan_digest=_interned(entry.plan_digest),
                software_digest=_interned(entry.software_digest),
                mechanism=mechanism,
                limit=entry.limit,
                reservation=entry.reservation,
                approved_by=entry.approved_by,
                approval=entry.approval,
                digest=entry.evidence_digest,
                conformance=entry.conformance,
            )
        )

    def findings(self) -> list[Finding]:
        return list(self.rules.findings)

    def record(self, path: Path, verified: Verified, keys: Sequence[bytes]) -> HospitalRecord:
        if self._first is None or self._first.budget is None:
            raise EvidenceError("the ledger opens no budget", hint="It is empty, or not a hospital's.")
        return HospitalRecord(
            source=path,
            hospital=verified.hospital,
            population=verified.population,
            terms=self._first.budget,
            packed=None,
            lines=tuple(self.lines),
            keys=tuple(Key(fingerprint(key), seq) for key, seq in zip(keys, [1, *self._rotations], strict=True)),
        )


def _interned(text: str | None) -> str | None:
    return None if text is None else intern(text)


def _few(items: Iterator[Item]) -> Iterator[Item]:
    """At most ``MOST_LINES`` of them.

    Raises:
        EvidenceError: There are more.
    """
    yield from islice(items, MOST_LINES)
    if next(items, None) is not None:
        raise EvidenceError(f"a part has more than {MOST_LINES} lines", hint="No study makes so many.")


def _read_receipts(
    bundle: Bundle, reading: _Reading, keys: Sequence[bytes], findings: list[Finding]
) -> Iterator[Upload]:
    last = 0
    for number, kept in enumerate(_few(bundle.receipts()), start=1):
        place = reading.places.get(kept.receipt.entry_hash)
        charge = reading.lines[place - 1] if place else None
        problem = _receipt_problem(kept, charge, reading, keys, last)
        if problem and len(findings) < MOST_FINDINGS:
            code, what = problem
            findings.append(
                Finding(
                    code=code,
                    party=bundle.manifest.hospital,
                    what=f"receipt {number} {what}",
                    study=kept.study,
                    round=kept.round,
                    attempt=kept.attempt,
                    entry=place,
                )
            )
        last = place or last
        yield _upload(bundle.manifest.hospital, kept)


def _receipt_problem(
    kept: SignedReceipt, charge: Line | None, reading: _Reading, keys: Sequence[bytes], last: int
) -> tuple[str, str] | None:
    head = reading.places.get(kept.receipt.chain_head)
    if not signed_by_any(kept, keys):
        return "foreign-receipt", "is not signed by this hospital"
    if charge is None or head is None:
        return "rolled-back", "was signed for something that the ledger lacks: it was rolled back, or rewritten"
    if not _pays(charge, kept) or head < charge.seq:
        return "receipt-differs", f"was signed for another computation than ledger entry {charge.seq} paid for"
    if charge.seq <= last:
        return "out-of-order", "stands in the wrong place, or its charge was used before"
    if bisect_right(reading.charges[kept.study], head) != kept.receipt.charges:
        return "receipt-differs", f"counts {kept.receipt.charges} charges; the ledger had another number then"
    return None


def signed_by_any(kept: SignedReceipt, keys: Collection[bytes]) -> bool:
    """Whether one of these keys signed a receipt."""
    return any(_signed_by(kept, key) for key in keys)


def _signed_by(kept: SignedReceipt, key: bytes) -> bool:
    try:
        kept.check(key)
    except ForeignReceiptError:
        return False
    return True


def _pays(charge: Line, kept: SignedReceipt) -> bool:
    mechanism = charge.mechanism
    return (
        charge.kind == "charge"
        and mechanism is not None
        and (charge.study, charge.round, charge.attempt) == (kept.study, kept.round, kept.attempt)
        and mechanism.model_dump(mode="json") == kept.receipt.mechanism
        and _TYPES[mechanism.kind] == kept.type
    )


def _upload(hospital: str, kept: SignedReceipt) -> Upload:
    return Upload(
        hospital=intern(hospital),
        digest=kept.digest,
        context=kept.context,
        type=kept.type,
        study=intern(kept.study),
        round=kept.round,
        attempt=kept.attempt,
    )


def _read_shown(bundle: Bundle) -> Iterator[tuple[Turn, str]]:
    for shown in _few(bundle.shown()):
        if shown.purpose and shown.round and shown.attempt:
            yield Turn(intern(shown.study), shown.purpose, shown.round, shown.attempt), shown.everybody


def read_study(folder: Path, transcripts: Transcripts) -> StudyFolder:
    """Read what a coordinator kept of a study; whether it agrees with anything is not asked here.

    Raises:
        EvidenceError: A file is missing or damaged.
    """
    uploads = []
    for line in _few(_study_lines(folder / "receipts.jsonl")):
        kept = _parse(line, Receipted, folder)
        uploads.append((_upload(kept.hospital, kept.upload), kept.upload))
    views, sums = [], []
    for line in _few(_study_lines(folder / "sums.jsonl")):
        summed = _parse(line, Summed, folder)
        view = transcripts.view(summed.transcript)
        views.append(view)
        sums.append(
            AttemptRecord(
                turn=view.turn,
                invited=view.invited,
                cohort=view.cohort,
                uploaders=view.uploaders,
                known_to=frozenset({COORDINATOR}),
                null_coordinates=tuple(summed.null_coordinates or ()),
                weight=summed.weight,
                complaint=str(summed.complaint) if summed.complaint else None,
            )
        )
    return StudyFolder(folder, tuple(uploads), tuple(views), tuple(sums))


def _study_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from split_lines(file, str(path))
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read: {error.strerror}", hint="Give the folder of a study.") from None


def _parse(line: bytes, kind: type[Kept], folder: Path) -> Kept:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        refuse_version(error, f"a line in {folder}", UnsupportedEvidenceError)
        raise EvidenceError(
            f"{folder} holds a line that is no evidence: {explain(error)[:200]}", hint="It was changed."
        ) from None
    except (ValueError, RecursionError):
        raise EvidenceError(f"{folder} holds a line that is no evidence", hint="It was changed.") from None


def about(view: View | Upload, code: str, party: str, what: str | None) -> Finding:
    """A finding about an attempt, or an upload in one."""
    turn = view.turn if isinstance(view, View) else view
    where = f"{turn.purpose}: " if isinstance(turn, Turn) else ""
    return Finding(
        code=code, party=party, what=f"{where}{what}", study=turn.study, round=turn.round, attempt=turn.attempt
    )


def _turn(transcript: Transcript) -> Turn:
    announced = transcript.announcement
    return Turn(intern(announced.study), announced.purpose, announced.round, announced.attempt)


def out_of_order(views: Sequence[View]) -> Iterator[str]:
    """Studies whose attempts do not follow each other as attempts do."""
    attempts: defaultdict[str, list[tuple[int, bool, int]]] = defaultdict(list)
    for view in views:
        study, purpose, number, attempt = view.turn
        attempts[study].append((number, purpose == "evaluate", attempt))
    return (study for study, found in attempts.items() if found != sorted(set(found)))
