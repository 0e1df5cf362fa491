"""The hospital's own evidence: verified, and packed for an auditor. It reads files; the daemon may be running."""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.anchor import ANCHORS
from client.books import LEDGER, claims, report
from client.consent import Consents
from client.egress import EGRESS
from client.evidence import EvidenceFile, evidence_files, read_evidence
from client.membership import accepted, read_roster
from client.settings import Settings
from shared_models.identity import load_key, public_bytes
from shared_models.privacy.entries import Chain, Entry, following, verify_head
from shared_models.privacy.evidence import Manifest, Shown, encode_parts, pack
from shared_models.privacy.ledger import head_path, snapshot, verified
from shared_models.receipts import SignedReceipt
from shared_models.secagg.protocol import Transcript
from shared_models.software import software_digest

RECEIPTS, TRANSCRIPTS = "receipts.jsonl", "transcripts.jsonl"


def keep_receipt(state: Path, receipt: SignedReceipt) -> None:
    """Keep what was signed, before it leaves; never set aside, because an auditor wants all of it.

    Raises:
        LedgerError: It could not be written.
    """
    EvidenceFile(state / RECEIPTS, largest=2**63).write(receipt=receipt.model_dump(mode="json"))


def keep_transcript(state: Path, transcript: Transcript) -> None:
    """Keep what was seen of a sum; never set aside either.

    Raises:
        LedgerError: It could not be written.
    """
    EvidenceFile(state / TRANSCRIPTS, largest=2**63).append(transcript.model_dump_json().encode())


def entries_of(settings: Settings, study: str | None = None) -> Iterator[Entry]:
    """The ledger's entries, oldest first, each once it is known to follow; of one study, or all.

    Raises:
        LedgerError: There is no ledger, it cannot be read, or its chain is broken.
    """
    key = public_bytes(load_key(settings.keys.identity))
    entries = verified(settings.state / LEDGER, key)
    return (entry for entry in entries if study is None or entry.study == study)


def verify_own(settings: Settings) -> dict[str, Any]:
    """Check chain, signatures, head file and the rules of the budget.

    Returns:
        ``entries``, ``charges``, and the budget's ``epsilon_filter`` and ``epsilon_left``.

    Raises:
        LedgerError: What does not hold.
    """
    path, chain, charges = settings.state / LEDGER, Chain(), 0
    with snapshot(path, head_path(path)) as (head, entries):
        for entry in following(entries, chain):
            charges += entry.kind == "charge"
        if head is not None:
            verify_head(head, chain)
    found = report(settings)  # follows the budget's rules, and refuses a ledger that breaks one
    figures = {name: found[name] for name in ("epsilon_filter", "epsilon_left")}
    return {"entries": chain.seq, "charges": charges, "head_file": head is not None, **figures}


def export(settings: Settings, path: Path) -> Manifest:
    """Pack everything an auditor needs into one file, signed with the hospital's identity key.

    Raises:
        LedgerError: Something that must be in it is damaged.
        EvidenceError: The file cannot be written.
    """
    ledger, state = settings.state / LEDGER, settings.state
    with snapshot(ledger, head_path(ledger)) as (head, entries):
        kept = list(entries)
    parts = encode_parts(
        entries=kept,
        head=head,
        receipts=[_receipt(line) for line in read_evidence(state / RECEIPTS)],
        transcripts=[Transcript.model_validate_json(json.dumps(line)) for line in read_evidence(state / TRANSCRIPTS)],
        shown=[Shown.model_validate(line) for line in read_evidence(state / ANCHORS)],
        roster=read_roster(settings),
        claims=claims(settings),
        plans=Consents(state).plans(),
        approvals=Consents(state).approvals(),
        rosters=accepted(settings),
    )
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return pack(
        path,
        load_key(settings.keys.identity),
        parts,
        hospital=settings.name,
        time=now,
        software_digest=software_digest(),
        egress_digest=_digest(state / EGRESS),
    )


def _receipt(line: dict[str, Any]) -> SignedReceipt:
    return SignedReceipt.model_validate(line["receipt"])


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for part in evidence_files(path):
        if part.exists():
            digest.update(part.read_bytes())
    return digest.hexdigest()
