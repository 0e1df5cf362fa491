"""Does the evidence of several parties agree? Hospitals' bundles with each other, and with the coordinator's receipts.

Each bundle is checked by itself first: manifest, chain, rules, receipts against charges, transcripts. Then side by
side: a ledger that was cut or rewritten lacks what its hospital signed for, and a list that was shown to one is not the
list that was shown to another.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from auditor.verify import Verified, check_entries
from shared_models.config import Frozen, Name
from shared_models.errors import EvidenceError, FederationError, ForeignReceiptError, UnsupportedEvidenceError
from shared_models.privacy.entries import Entry
from shared_models.privacy.evidence import Bundle, unpack
from shared_models.receipts import SignedReceipt
from shared_models.secagg.key_agreement import Roster
from shared_models.secagg.protocol import Transcript
from shared_models.secagg.transcripts import verify_transcript
from shared_models.versions import refuse_version

_TYPES = {"poisson-gaussian": "Update", "gaussian-release": "ReleasedStatistics"}

Kept = TypeVar("Kept", bound=Frozen)
Attempt = tuple[str, str, int, int]  # study, purpose, round, attempt


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


@dataclass(frozen=True)
class Witness:
    """A bundle that holds by itself.

    Attributes:
        keys: All public keys of its hospital, oldest first.
        unchecked: Transcripts made under another roster than the one in the bundle.
    """

    bundle: Bundle
    verified: Verified
    keys: tuple[bytes, ...]
    unchecked: int

    @property
    def hospital(self) -> str:
        """Whose it is."""
        return self.verified.hospital


@dataclass(frozen=True)
class StudyFolder:
    """What a coordinator kept of one study: receipts and transcripts, in the order in which it kept them."""

    path: Path
    receipts: tuple[Receipted, ...]
    transcripts: tuple[Transcript, ...]


def verify_bundle(path: Path, keys: Collection[bytes] = ()) -> Witness:
    """Verify one bundle by itself.

    Guarantees:
        * It is as its hospital packed it, and its ledger holds as ``verify_ledger`` says.
        * Every receipt is signed by a key of this ledger, for a charge that is in it, once, in order, with the chain
          head and the number of charges of that moment.
        * Every transcript under the bundle's roster holds by itself.

    Raises:
        EvidenceError, LedgerError: What does not hold.
    """
    bundle = unpack(path)
    verified, chain_keys = check_entries(bundle.entries, bundle.head, keys)
    if bundle.manifest.public_key != chain_keys[-1].hex() or bundle.manifest.hospital != verified.hospital:
        raise EvidenceError(
            f"the bundle is signed by another key, or for another hospital, than {verified.hospital}'s ledger",
            hint="Whoever packed it is not who keeps this ledger.",
        )
    _refuse(next(_receipt_problems(bundle, chain_keys), None))
    if list(_out_of_order(bundle.transcripts)):
        raise EvidenceError("the transcripts are out of order, or one is there twice", hint="They were changed.")
    ours = [
        transcript for transcript in bundle.transcripts if transcript.announcement.roster_digest == bundle.roster.digest
    ]
    for transcript in ours:
        try:
            verify_transcript(transcript, roster=bundle.roster)
        except FederationError as error:
            raise EvidenceError(f"the transcript of {_named(transcript)}: {error}", hint=error.hint) from None
    return Witness(bundle, verified, tuple(chain_keys), len(bundle.transcripts) - len(ours))


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise EvidenceError(problem, hint="The evidence was changed, or its hospital did not follow the protocol.")


def _receipt_problems(bundle: Bundle, keys: Sequence[bytes]) -> Iterator[str]:
    places = {entry.hash: entry for entry in bundle.entries}
    charges: defaultdict[str, list[int]] = defaultdict(list)
    for entry in bundle.entries:
        if entry.kind == "charge":
            charges[entry.study or ""].append(entry.seq)
    last = 0
    for number, kept in enumerate(bundle.receipts, start=1):
        where = f"receipt {number} (study {kept.study}, round {kept.round}, attempt {kept.attempt})"
        charge, head = places.get(kept.receipt.entry_hash), places.get(kept.receipt.chain_head)
        if not _signed_by_any(kept, keys):
            yield f"{where} is not signed by this hospital"
        elif charge is None or head is None:
            yield f"{where}: the ledger lacks what it was signed for: it was rolled back, or rewritten"
        elif not _pays(charge, kept) or head.seq < charge.seq:
            yield f"{where} was signed for another computation than ledger entry {charge.seq} paid for"
        elif charge.seq <= last:
            yield f"{where} stands in the wrong place, or its charge was used before"
        elif bisect_right(charges[kept.study], head.seq) != kept.receipt.charges:
            yield f"{where} counts {kept.receipt.charges} charges; the ledger had another number then"
        last = charge.seq if charge else last


def _signed_by_any(kept: SignedReceipt, keys: Sequence[bytes]) -> bool:
    return any(_signed_by(kept, key) for key in keys)


def _signed_by(kept: SignedReceipt, key: bytes) -> bool:
    try:
        kept.check(key)
    except ForeignReceiptError:
        return False
    return True


def _pays(charge: Entry, kept: SignedReceipt) -> bool:
    mechanism = charge.mechanism
    return (
        charge.kind == "charge"
        and mechanism is not None
        and (charge.study, charge.round, charge.attempt) == (kept.study, kept.round, kept.attempt)
        and mechanism.model_dump(mode="json") == kept.receipt.mechanism
        and _TYPES[mechanism.kind] == kept.type
    )


def read_study(folder: Path) -> StudyFolder:
    """Read what a coordinator kept of a study.

    Raises:
        EvidenceError: A file is missing or damaged.
    """
    receipts = [_parse(line, Receipted, folder) for line in _lines(folder / "receipts.jsonl")]
    transcripts = [_parse(line, Summed, folder).transcript for line in _lines(folder / "sums.jsonl")]
    return StudyFolder(folder, tuple(receipts), tuple(transcripts))


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read: {error.strerror}", hint="Give the folder of a study.") from None


def _parse(line: bytes, kind: type[Kept], folder: Path) -> Kept:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        refuse_version(error, f"a line in {folder}", UnsupportedEvidenceError)
        raise EvidenceError(
            f"{folder} holds a line that is no evidence: {line[:60]!r}", hint="It was changed."
        ) from None


def cross_check(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> list[str]:
    """Compare everything that several parties hold of the same thing.

    Guarantees:
        * Every receipt that a coordinator holds of a bundled hospital is in its bundle, in the same order, and so paid
          for in its ledger; every upload that a signed list of uploaders names has its receipt on both sides.
        * Every receipt of a hospital whose bundle is not here is signed by the key that the others' roster has of it,
          and there is one for each of its uploads in the coordinator's signed lists.
        * Of one attempt nobody was told another announcement, U1 or U3, and of one moment no other digest over all
          receipts, than anybody else whose evidence is here.

    Returns:
        What does not agree, in words; empty if everything does.
    """
    problems = [*_doubles(witnesses), *_rosters(witnesses), *_forks(witnesses, studies), *_digests(witnesses)]
    rosters = {witness.bundle.roster.digest: witness.bundle.roster for witness in witnesses}
    for study in studies:
        problems += [*_order(study), *_unsound(study, rosters)]
        problems += [found for witness in witnesses for found in _both_sides(witness, study)]
        problems += _absent(study, rosters, {witness.hospital for witness in witnesses})
    problems += [found for witness in witnesses for found in _uploads(witness, witnesses, studies)]
    return list(dict.fromkeys(problems))


def _doubles(witnesses: Sequence[Witness]) -> Iterator[str]:
    names = [witness.hospital for witness in witnesses]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"there are two bundles of {name}"


def _rosters(witnesses: Sequence[Witness]) -> Iterator[str]:
    """A ledger signed by a key that other hospitals do not know its hospital by is a forgery of the whole chain."""
    for witness in witnesses:
        for other in witnesses:
            known = other.bundle.roster.identities.get(witness.hospital)
            if known is not None and known not in witness.keys:
                yield f"{witness.hospital}'s ledger has another key than {other.hospital} knows it by"


def _forks(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> Iterator[str]:
    seen: defaultdict[Attempt, list[tuple[str, Transcript]]] = defaultdict(list)
    for who, transcript in _all(witnesses, studies):
        seen[_attempt(transcript)].append((who, transcript))
    for views in seen.values():
        (first, reference), *others = views
        for who, transcript in others:
            what = _fork(reference, transcript)
            if what:
                yield f"{_named(transcript)}: {first} and {who} hold different {what}"


def _fork(one: Transcript, other: Transcript) -> str | None:
    if one.announcement != other.announcement:
        return "announcements"
    if one.cohort and other.cohort and one.context != other.context:
        return "cohorts (U1)"
    digests = {signed.dealer: signed.digest for signed in one.commitments}
    if any(digests.get(signed.dealer, signed.digest) != signed.digest for signed in other.commitments):
        return "commitments (U2)"
    if one.uploaders and other.uploaders and one.uploaders != other.uploaders:
        return "lists of uploaders (U3)"
    return None


def _digests(witnesses: Sequence[Witness]) -> Iterator[str]:
    told: dict[Attempt, tuple[str, str]] = {}
    for witness in witnesses:
        for shown in witness.bundle.shown:
            if shown.purpose and shown.round and shown.attempt:
                when = (shown.study, shown.purpose, shown.round, shown.attempt)
                who, digest = told.setdefault(when, (witness.hospital, shown.everybody))
                if digest != shown.everybody:
                    yield (
                        f"study {when[0]}, {when[1]}, round {when[2]}, attempt {when[3]}: {who} and {witness.hospital} "
                        "were shown different digests over all receipts"
                    )


def _out_of_order(transcripts: Sequence[Transcript]) -> Iterator[str]:
    """Studies whose attempts do not follow each other as attempts do."""
    attempts: defaultdict[str, list[tuple[int, bool, int]]] = defaultdict(list)
    for kept in transcripts:
        study, purpose, number, attempt = _attempt(kept)
        attempts[study].append((number, purpose == "evaluate", attempt))
    return (study for study, found in attempts.items() if found != sorted(set(found)))


def _order(study: StudyFolder) -> Iterator[str]:
    """A coordinator keeps things as they happen."""
    if list(_out_of_order(study.transcripts)):
        yield f"{study.path / 'sums.jsonl'} is out of order, or has an attempt twice"
    contexts = [kept.context.hex() for kept in study.transcripts if kept.context]
    places = [
        (contexts.index(kept.upload.context) if kept.upload.context in contexts else -1, kept.hospital)
        for kept in study.receipts
    ]
    if any(place < 0 for place, _ in places):
        yield f"{study.path}: a receipt belongs to no sum that the coordinator kept"
    if places != sorted(set(places)):
        yield f"{study.path / 'receipts.jsonl'} is out of order, or has a receipt twice"


def _unsound(study: StudyFolder, rosters: Mapping[str, Roster]) -> Iterator[str]:
    for kept in study.transcripts:
        roster = rosters.get(kept.announcement.roster_digest)
        try:
            if roster is not None:
                verify_transcript(kept, roster=roster)
        except FederationError as error:
            yield f"{_named(kept)}: the coordinator's transcript: {error}"


def _both_sides(witness: Witness, study: StudyFolder) -> Iterator[str]:
    name = witness.hospital
    own = [kept.digest for kept in witness.bundle.receipts]
    held = [kept.upload for kept in study.receipts if kept.hospital == name]
    for kept in held:
        where = f"study {kept.study}, {kept.type}, round {kept.round}, attempt {kept.attempt}"
        if not _signed_by_any(kept, witness.keys):
            yield f"{where}: the coordinator holds a receipt that {name} did not sign"
        elif kept.digest not in own:
            yield f"{where}: the coordinator holds a receipt that {name}'s evidence lacks: it was cut, or rolled back"


def _absent(study: StudyFolder, rosters: Mapping[str, Roster], present: Collection[str]) -> Iterator[str]:
    """Receipts of hospitals whose bundles are not here, as far as their signatures and the signed lists reach."""
    sums = {kept.context.hex(): kept for kept in study.transcripts if kept.context}
    held = {(kept.hospital, kept.upload.context) for kept in study.receipts}
    for kept in study.receipts:
        transcript = sums.get(kept.upload.context)
        roster = rosters.get(transcript.announcement.roster_digest) if transcript else None
        if transcript is None or roster is None or kept.hospital in present:
            continue
        key = roster.identities.get(kept.hospital)
        if key is None or not _signed_by(kept.upload, key):
            yield f"{_named(transcript)}: the coordinator holds a receipt that {kept.hospital} did not sign"
        elif (kept.upload.study, kept.upload.round, kept.upload.attempt) != _turn(transcript):
            yield f"{_named(transcript)}: the receipt of {kept.hospital} is for another attempt"
    for context, transcript in sums.items():
        for name in sorted(set(transcript.uploaders) - set(present)):
            if (name, context) not in held:
                yield f"{_named(transcript)}: {name} uploaded, and the coordinator's receipts lack it"


def _turn(transcript: Transcript) -> tuple[str, int, int]:
    announced = transcript.announcement
    return announced.study, announced.round, announced.attempt


def _uploads(witness: Witness, witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> Iterator[str]:
    """Every upload in a signed list was paid for, and its receipt and its sum are on both sides."""
    name = witness.hospital
    own = {kept.context for kept in witness.bundle.receipts}
    for who, transcript in _all(witnesses, studies):
        if name in transcript.uploaders and transcript.context and transcript.context.hex() not in own:
            yield f"{_named(transcript)}: {who} holds that {name} uploaded, and its own evidence lacks the receipt"
    for study in studies:
        held = {kept.upload.context for kept in study.receipts if kept.hospital == name}
        summed = {kept.context for kept in study.transcripts}
        names = {kept.announcement.study for kept in study.transcripts} | {kept.upload.study for kept in study.receipts}
        for transcript in witness.bundle.transcripts:
            if transcript.announcement.study not in names or not transcript.uploaders:
                continue  # what ended before the list of uploaders was signed, nobody need have kept
            if transcript.context not in summed:
                yield f"{_named(transcript)}: {name} took part, and the coordinator's sums lack it"
            elif name in transcript.uploaders and (transcript.context or b"").hex() not in held:
                yield f"{_named(transcript)}: {name} uploaded, and the coordinator's receipts lack it"


def _all(witnesses: Sequence[Witness], studies: Sequence[StudyFolder]) -> Iterator[tuple[str, Transcript]]:
    yield from (("the coordinator", transcript) for study in studies for transcript in study.transcripts)
    yield from ((witness.hospital, transcript) for witness in witnesses for transcript in witness.bundle.transcripts)


def _attempt(transcript: Transcript) -> Attempt:
    announced = transcript.announcement
    return announced.study, announced.purpose, announced.round, announced.attempt


def _named(transcript: Transcript) -> str:
    study, purpose, number, attempt = _attempt(transcript)
    return f"study {study}, {purpose}, round {number}, attempt {attempt}"
