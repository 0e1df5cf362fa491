"""Is this still the ledger that signed for what left? What the coordinator holds of us is compared with it.

A restored backup (ledger and head file both older) looks whole from the inside. But every upload carried a signed
receipt, and the coordinator shows the last one again before it asks for anything. A ledger that lacks what was signed
for was rolled back, and this hospital stops: a budget is never refunded.
"""

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from client.evidence import EvidenceFile
from shared_models.durable import replace_file
from shared_models.errors import ForeignReceiptError, LedgerError, RolledBackError
from shared_models.privacy.ledger import Ledger
from shared_models.receipts import Anchor, SignedReceipt
from shared_models.secagg.key_agreement import Announcement

ANCHORS = "anchors.jsonl"
ROLLED_BACK = "rolled-back.json"

_HINT = "An old backup was restored. Put the newest copy of the state folder back: a budget is never refunded."


class Anchors:
    """Compares anchors with the ledger; stops for good when one does not hold.

    Guarantees:
        * Once a receipt of ours was not found, nothing is approved or charged, also after a restart, until a ledger is
          restored that has it: the receipt is kept in the state folder, and looked for at every start.
        * A receipt that this hospital did not sign stops nothing: nobody else can bring it about.

    Raises:
        RolledBackError: A receipt was missing before, and still is.
        LedgerError: What was kept of it cannot be read.
    """

    def __init__(self, state: Path, ledger: Ledger) -> None:
        self._ledger, self._mark = ledger, state / ROLLED_BACK
        self._file = EvidenceFile(state / ANCHORS)
        if self._mark.exists():
            self._require(_read(self._mark))
            self._mark.unlink()  # the newest copy was put back

    def check(self, anchor: Anchor, *, study: str, announcement: Announcement | None = None) -> None:
        """Compare what the coordinator shows with the ledger, and note what it showed.

        Args:
            anchor: Our last receipt, and the digest of everybody's.
            study: What the coordinator is about to ask for.
            announcement: The attempt that it announces with this; None with a proposal.

        Raises:
            ForeignReceiptError: The receipt shown is not ours.
            RolledBackError: It is, and the ledger lacks what it was signed for.
            LedgerError: What was shown cannot be noted.
        """
        if anchor.last is not None:
            self._require_ours(anchor.last)
        shown = anchor.last.receipt.entry_hash if anchor.last else None
        asked = announcement.model_dump(mode="json", include={"purpose", "round", "attempt"}) if announcement else {}
        self._file.write(study=study, **asked, last=shown, everybody=anchor.everybody)
        if anchor.last is not None:
            self._require(anchor.last)
        self.hold()

    def hold(self) -> None:
        """Nothing is charged over a receipt that was not found.

        Raises:
            RolledBackError: One was not.
        """
        if self._mark.exists():
            raise _rolled_back(_read(self._mark))

    def _require_ours(self, kept: SignedReceipt) -> None:
        """Signed with our key, or with one that we had when we signed."""
        for key in set(self._ledger.keys) - {self._ledger.public_key}:
            with suppress(ForeignReceiptError):
                return kept.check(key)
        return kept.check(self._ledger.public_key)

    def _require(self, kept: SignedReceipt) -> None:
        if not all(self._ledger.find(digest) for digest in (kept.receipt.entry_hash, kept.receipt.chain_head)):
            error = _rolled_back(kept)
            try:
                replace_file(self._mark, kept.model_dump_json().encode())
            except OSError as full:
                raise LedgerError(f"{error}; and {self._mark} cannot be written: {full.strerror}", hint=_HINT) from None
            raise error


def _read(path: Path) -> SignedReceipt:
    try:
        return SignedReceipt.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise LedgerError(f"{path} says that the ledger was rolled back, and cannot be read", hint=_HINT) from None


def _rolled_back(kept: SignedReceipt) -> RolledBackError:
    return RolledBackError(
        f"this hospital signed for study {kept.study}, round {kept.round}, attempt {kept.attempt}, and its ledger does "
        f"not have the charge {kept.receipt.entry_hash[:12]}… or what came after it",
        hint=_HINT,
    )
