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
