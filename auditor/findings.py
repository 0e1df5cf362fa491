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
