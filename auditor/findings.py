"""What an audit finds: every finding has a code, a severity, a place, and a meaning for whoever is no engineer.

Codes are never given another meaning, so that a report of years ago can still be read.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydantic import computed_field, field_validator

from shared_models.config import Frozen

Severity = Literal["critical", "warning", "note"]

COORDINATOR = "coordinator"  # a party's name beside those of hospitals


class Meaning(NamedTuple):
    """What a code stands for.

    Attributes:
        severity: ``critical`` where the promise to patients cannot be shown to hold, ``warning`` where somebody has to
            explain something, ``note`` where there is something to know. Only notes leave an audit passed.
        title: In a few words.
        meaning: What it means and what to do, in sentences a data-protection officer understands.
    """

    severity: Severity
    title: str
    meaning: str


_FORGED = "Somebody changed this evidence after it was made. Ask both sides for fresh copies, and find out who did it."
_RULES = (
    "The entries are genuine: the hospital itself broke a rule that protects its patients. Training there should stop "
    "until it is explained."
)
_COORDINATOR = "The coordinator told hospitals different things, or did not keep what it must keep. Ask its operators."

CODES: dict[str, Meaning] = {
    # What can be read
    "no-evidence": Meaning("critical", "No evidence", "The file is not what an audit can read. Check the path."),
    "newer-format": Meaning(
        "critical", "Newer format", "A later release of Konsil wrote it. Audit it with that release, or a later one."
    ),
    "bundle-broken": Meaning(
        "critical", "Bundle does not hold", f"The bundle is not as a hospital packed and signed it. {_FORGED}"
    ),
    "ledger-broken": Meaning(
        "critical",
        "Ledger does not hold",
        f"The chain of signed entries is broken, or is another hospital's: what was spent cannot be shown. {_FORGED}",
    ),
    "study-broken": Meaning("critical", "Coordinator's evidence is damaged", f"It cannot be read. {_COORDINATOR}"),
    "log-broken": Meaning(
        "critical", "Audit log does not hold", "A line of the coordinator's log was changed, removed, added or cut off."
    ),
    "checkpoints-broken": Meaning(
        "critical", "Checkpoints do not hold", f"A line is no checkpoint that a hospital signed. {_FORGED}"
    ),
    "older-bundle": Meaning(
        "note", "Older bundle", "It holds less than a bundle of today. Ask the hospital to export it again."
    ),
    "no-head": Meaning(
        "note",
        "No head file",
        "Whether entries are missing at the end can only be told from others' evidence. A bundle brings its own.",
    ),
    "not-recomputed": Meaning("critical", "Not recomputed", "What was spent could not be computed from the entries."),
    "not-checked": Meaning(
        "warning",
        "Signatures not checked",
        "The list of members that these sums were made under is not here. Ask the hospitals for bundles of today.",
    ),
    # Whose it is
    "no-root": Meaning(
        "note",
        "Keys not pinned",
        "Without the consortium's root key nobody but the hospitals themselves says whose keys are whose. Give --root.",
    ),
    "roster-unsigned": Meaning(
        "critical", "List of members not signed", "The consortium's root key did not sign the list that was used there."
    ),
    "roster-fork": Meaning(
        "critical", "Two lists of members", "The root key signed two different lists of one version. Ask who holds it."
    ),
    "not-a-member": Meaning(
        "critical", "Not a member", "The consortium never admitted this hospital, as far as the lists here say."
    ),
    "foreign-key": Meaning(
        "critical", "Another key", f"The ledger is not signed by the key that this hospital is known by. {_FORGED}"
    ),
    "another-ledger": Meaning(
        "critical", "Another ledger", "The hospital was enrolled with another ledger: a budget was begun anew."
    ),
    "public-size-differs": Meaning(
        "warning", "Public size differs", "The consortium was told another number of patients than the budget counts."
    ),
    "revoked": Meaning("note", "Revoked", "The hospital is no member any more; what it did before still counts."),
    "two-bundles": Meaning(
        "warning", "Two bundles of one hospital", "Give the newer one only; compare the two with konsil-audit diff."
    ),
    "bundle-missing": Meaning(
        "warning",
        "A hospital is missing",
        "It took part, and its ledger was not shown: what its patients paid is not known. Ask for its bundle, or say "
        "--partial if it is not to be audited.",
    ),
    "not-here": Meaning("note", "A hospital is not here", "It took part; its own evidence was not part of this audit."),
    # The rules of the budget
    "budget-not-opened": Meaning("critical", "No budget", f"The first entry opens no budget. {_RULES}"),
    "delta-too-large": Meaning(
        "critical", "Delta too large", f"Delta must be at most a tenth of one over the number of patients. {_RULES}"
    ),
    "foreign-population": Meaning("critical", "Foreign population", f"An entry is about other patients. {_RULES}"),
    "approved-twice": Meaning("critical", "Approved twice", f"A study set its costs aside two times. {_RULES}"),
    "study-over-limit": Meaning("critical", "Study over its limit", f"It may cost more than its plan says. {_RULES}"),
    "budget-exceeded": Meaning(
        "critical", "Budget exceeded", f"All studies together may cost more than patients were promised. {_RULES}"
    ),
    "not-approved": Meaning("critical", "Not approved", f"Nobody approved the study. {_RULES}"),
    "another-plan": Meaning("critical", "Another plan", f"What was run is not the plan that was approved. {_RULES}"),
    "after-the-end": Meaning("critical", "After the end", f"A study went on after it was ended. {_RULES}"),
    "reserved-twice": Meaning("critical", "Reserved twice", f"A study set its costs aside two times. {_RULES}"),
    "other-software": Meaning(
        "critical", "Other software", f"A study was computed by software that nobody approved it for. {_RULES}"
    ),
    "charged-before": Meaning("critical", "Charged before", f"A round was charged out of order, or twice. {_RULES}"),
    "over-reservation": Meaning("critical", "Over the reservation", f"More was spent than was set aside. {_RULES}"),
    "not-paid": Meaning("critical", "Not paid for", f"Something was computed or released without a charge. {_RULES}"),
    "release-price": Meaning("critical", "Release at another price", f"Less was paid than the release costs. {_RULES}"),
    "used-twice": Meaning("critical", "Charge used twice", f"One charge paid for two computations. {_RULES}"),
    # Approvals and plans
    "plan-missing": Meaning(
        "warning", "Plan missing", "Without the plan nobody can say whether the study was run as it was approved."
    ),
    "plan-differs": Meaning("critical", "Plan differs", f"The plan shown is not the one that was approved. {_FORGED}"),
    "plan-unknown": Meaning("warning", "Unknown plan", "A plan is shown that the ledger does not know. Ask for why."),
    "price-differs": Meaning(
        "critical", "Price differs", f"The approval set aside another price than the plan's. {_RULES}"
    ),
    "approval-missing": Meaning(
        "warning", "Approval missing", "The ledger names a steward's signature, and what was signed is not shown."
    ),
    "forged-approval": Meaning("critical", "Forged approval", f"The steward did not sign what is shown. {_FORGED}"),
    # Side by side
    "foreign-receipt": Meaning("critical", "Foreign receipt", f"A receipt is not signed by its hospital. {_FORGED}"),
    "receipt-differs": Meaning(
        "critical", "Receipt differs", f"A receipt says something else than the ledger. {_FORGED}"
    ),
    "rolled-back": Meaning(
        "critical",
        "Rolled back",
        "The ledger lacks what its hospital once signed for: it was cut, rewritten, or an old copy took its place. "
        "What was spent since then is hidden.",
    ),
    "missing-receipt": Meaning("critical", "Missing receipt", "An update left, and the receipt for it is not shown."),
    "missing-sum": Meaning(
        "critical", "Missing sum", f"A sum was made that the coordinator does not show. {_COORDINATOR}"
    ),
    "bad-transcript": Meaning(
        "critical", "Bad transcript", f"The record of an encrypted sum does not hold by itself. {_FORGED}"
    ),
    "out-of-order": Meaning(
        "critical", "Out of order", f"Things do not stand in the order in which they happen. {_FORGED}"
    ),
    "fork": Meaning(
        "critical",
        "Fork",
        "Two parties hold different accounts of one sum: with such a trick a single update could be singled out. "
        f"{_COORDINATOR}",
    ),
    "digests-differ": Meaning("critical", "Digests differ", _COORDINATOR),
    "clock": Meaning("warning", "Clock ahead", "An entry is later than the bundle that holds it. Look at that clock."),
    "clocks-apart": Meaning(
        "note", "Clocks apart", "Hospitals charged for the same attempt long after each other; a clock may be wrong."
    ),
    "software-differs": Meaning(
        "note",
        "Different software",
        "Hospitals ran different versions. Each approved its own; look whether that was meant.",
    ),
    # Papers, claims and comparisons
    "claim-too-low": Meaning(
        "critical",
        "A hospital states less than it spent",
        "The hospital says that its studies cost a patient less than its own ledger shows. Do not quote its figure; "
        "use the one in this report, and ask the hospital how it came to its own.",
    ),
    "claim-too-high": Meaning(
        "warning",
        "A hospital states more than it spent",
        "The hospital says that its studies cost a patient more than its ledger shows. Patients are not harmed by "
        "that, but one of the two is wrong: ask which software computed the figure.",
    ),
    "claim-filter-differs": Meaning(
        "critical",
        "The hospital's limit computes something else",
        "The figure by which the hospital stops at its budget is not the one that follows from its ledger. Its limit "
        "may have let too much pass, or too little. Stop further studies there until this is explained.",
    ),
    "claim-of-another-ledger": Meaning(
        "critical",
        "A hospital's figures are not about this ledger",
        "The figures that came with the evidence count other charges, other studies, or another delta than the ledger "
        "has. Ask the hospital for a fresh bundle; if that differs as well, its books are wrong.",
    ),
    "claim-missing": Meaning(
        "note",
        "A hospital states no figures of its own",
        "The evidence is a bare ledger, or a bundle of an older release, which carries no statement. All figures in "
        "this report are the auditor's own; nothing could be compared.",
    ),
    "history-forked": Meaning(
        "critical",
        "A hospital has shown two histories",
        "The newer evidence has another entry where the older one had one already. A ledger can only grow; one of the "
        "two was made up, or an old backup was used again. What was spent in the part that is gone is not counted.",
    ),
    "history-rolled-back": Meaning(
        "critical",
        "A hospital's ledger has become shorter",
        "Entries that the older evidence showed are missing from the newer one. Spending that was recorded once is no "
        "longer counted. Ask the hospital which copy of its ledger it uses.",
    ),
    "history-missing": Meaning(
        "warning",
        "A hospital is missing from the newer evidence",
        "The older evidence had a ledger of this hospital, and the newer has none. Ask for it.",
    ),
    # Was the noise added?
    "noise-too-small": Meaning(
        "critical",
        "Less noise than was charged",
        "The sums that hospitals uploaded hold less random noise than their ledgers claim, so patients are less "
        "protected than the epsilon says. Stop the study, do not release its models, and have every hospital that "
        "took part run: konsil-hospital conformance.",
    ),
    "noise-too-large": Meaning(
        "warning",
        "More noise than was charged",
        "The sums hold more random noise than the ledgers claim. Patients are protected, but something is not as "
        "planned: a hospital computes otherwise than its plan says, or several add the same noise, which would "
        "cancel none of it for whoever knows one of them. Have the hospitals run: konsil-hospital conformance.",
    ),
    "noise-repeated": Meaning(
        "critical",
        "The same noise in several rounds",
        "Noise that comes back can be subtracted: whoever compares two rounds sees what patients contributed. A "
        "hospital's random generator repeats itself. Stop the study, and have every hospital that took part run: "
        "konsil-hospital conformance.",
    ),
    "noise-unchecked": Meaning(
        "note",
        "Noise that could not be checked",
        "For some sums it is not known how much noise they should hold, because the plan, or the evidence of a "
        "hospital that took part, is not here. Ask for the bundles of all hospitals that took part.",
    ),
    # Do trainers do what they claim?
    "conformance-failed": Meaning(
        "critical",
        "The trainer failed its own test",
        "The hospital tested the software that trains on its patients, and it did not do what the ledger claims: "
        "patients may have been protected less than the epsilon says. Stop its studies, and do not release what "
        "they trained until the cause is known.",
    ),
    "conformance-warning": Meaning(
        "warning",
        "The trainer adds more noise, or learns less, than claimed",
        "The hospital tested the software that trains on its patients. Patients are protected, but it does not do "
        "exactly what the ledger claims. Ask the hospital why.",
    ),
    "conformance-missing": Meaning(
        "note",
        "The trainer was not tested",
        "The hospital has charged a study and has no successful test of its trainer for this plan and software. "
        "Ask it to run: konsil-hospital conformance.",
    ),
}


class Finding(Frozen):
    """One thing that was found.

    Attributes:
        code: A key of ``CODES``.
        party: The hospital whose evidence it is about, ``coordinator``, or the name of a file that nobody could read.
        what: One sentence, with the numbers.
        entry: Number of the ledger entry.
    """

    code: str
    party: str
    what: str
    study: str | None = None
    round: int | None = None
    attempt: int | None = None
    entry: int | None = None

    @field_validator("code")
    @classmethod
    def _is_known(cls, code: str) -> str:
        if code not in CODES:
            raise ValueError(f"no finding has the code {code}")
        return code

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's documentation has it
    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return CODES[self.code].severity

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        """Its name, for people."""
        return CODES[self.code].title

    @computed_field  # type: ignore[prop-decorator]
    @property
    def meaning(self) -> str:
        """What it means, for people."""
        return CODES[self.code].meaning

    @property
    def place(self) -> str:
        """Where: party, study, round, attempt and ledger entry, as far as there are any."""
        parts = [
            self.party,
            f"study {self.study}" if self.study else "",
            f"round {self.round}" if self.round else "",
            f"attempt {self.attempt}" if self.attempt else "",
            f"ledger entry {self.entry}" if self.entry else "",
        ]
        return ", ".join(part for part in parts if part)


def passed(findings: Iterable[Finding]) -> bool:
    """Whether everything holds: there may be notes, and nothing else."""
    return all(finding.severity == "note" for finding in findings)


# checkpoints, and what is fetched from a coordinator

CODES.update(
    {
        "checkpoint-fork": Meaning(
            "critical",
            "Two histories of one ledger",
            "The hospital signed two different contents for the same entry of its ledger. At least one of them was "
            "shown to somebody and later replaced, so what patients' privacy really cost cannot be read from either. "
            "Ask the hospital for both, and do not rely on its figures until it is explained.",
        ),
        "checkpoint-rollback": Meaning(
            "critical",
            "A ledger that lost entries",
            "The hospital signed that its ledger had a number of entries, and later that it has fewer. A ledger never "
            "shrinks: it was cut, or an old backup of it is in use, and what was spent in between is missing from the "
            "budget. The hospital must stop and bring back the newest ledger.",
        ),
        "checkpoint-foreign": Meaning(
            "critical",
            "A checkpoint that is not the hospital's",
            "What was handed over as a hospital's statement about its ledger is not signed by that hospital's key. "
            "Either the coordinator or somebody on the way made it up, or the hospital changed its key and the "
            "auditor has not been told. Compare the key's fingerprint with the hospital by telephone.",
        ),
        "checkpoint-cut": Meaning(
            "critical",
            "Evidence that is shorter than what was signed before",
            "The hospital signed for an entry of its ledger, and packed this evidence afterwards without it. Entries "
            "at the end are missing, and with them what they cost. Ask for the whole ledger.",
        ),
        "checkpoint-newer": Meaning(
            "note",
            "The ledger has grown since this evidence was packed",
            "The hospital signed for a later entry than this evidence has. Nothing is wrong with that; only a fresh "
            "bundle shows what has been spent since.",
        ),
        "deposit-foreign": Meaning(
            "critical",
            "Evidence under another hospital's name",
            "A bundle that the coordinator hands out as one hospital's says that it is another's. The coordinator "
            "mixed them up, or wants it to be read as something that it is not.",
        ),
        "evidence-rewritten": Meaning(
            "critical",
            "The coordinator shows another past than before",
            "What was fetched earlier is not the beginning of what the coordinator hands out now, although its records "
            "only ever grow. Something was removed or changed since. Both versions were kept: ask the coordinator.",
        ),
    }
)
