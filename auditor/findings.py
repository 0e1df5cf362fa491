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


CODES: dict[str, Meaning] = {}


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


# What hospitals claim, beside what is computed again (claims.py), and two bundles of one hospital (diff.py)

CODES |= {
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
}
