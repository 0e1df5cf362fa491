"""What an audit has read, compact: the facts of every hospital's ledger and of every attempt, each with its entry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from auditor.findings import Finding, passed
from auditor.recompute import BudgetReport
from shared_models.plan import StudyPlan
from shared_models.privacy.conformance import Conformance
from shared_models.privacy.entries import BudgetTerms, Reserved, StudyLimit
from shared_models.privacy.evidence import Claim
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian


class Line(NamedTuple):
    """A ledger entry, without what only matters for its signature.

    Attributes:
        mechanism: Of a charge or a release; equal ones are one object.
        approved_by: Of an approval: ``steward`` or ``standing-rule``.
        reservation: Of an approval: what it set aside.
        approval: Of an approval by the steward: the steward's own signature.
        digest: Of a checkpoint: what it stands for.
        conformance: What the hospital found when it tested its own trainer.
    """

    seq: int
    time: str
    kind: str
    hash: str
    study: str | None = None
    round: int | None = None
    attempt: int | None = None
    plan_digest: str | None = None
    software_digest: str | None = None
    mechanism: PoissonGaussian | GaussianRelease | None = None
    limit: StudyLimit | None = None
    reservation: tuple[Reserved, ...] | None = None
    approved_by: str | None = None
    approval: str | None = None
    digest: str | None = None
    conformance: Conformance | None = None


class Key(NamedTuple):
    """A key of a hospital's ledger.

    Attributes:
        fingerprint: Of the public key.
        entry: The ledger entry that brought it in; it signs from the next one on (the first one signs itself).
    """

    fingerprint: str
    entry: int


@dataclass(frozen=True)
class HospitalRecord:
    """One hospital's evidence, as far as it could be read.

    Attributes:
        source: The bundle or the ledger file.
        packed: When the bundle was packed, UTC; None of a ledger file.
        lines: All entries, oldest first.
        keys: Oldest first.
        plans: Approved plans by study; those of a ledger file, or of an older bundle, are not known.
        claims: What the hospital itself says its studies cost, by its own accountant.
        budget: Computed again; None where the ledger does not hold.
        software_digest: Of what is installed there now.
        receipts: How many uploads it signed for.
    """

    source: Path
    hospital: str
    population: str
    terms: BudgetTerms
    packed: str | None
    lines: tuple[Line, ...]
    keys: tuple[Key, ...]
    plans: Mapping[str, StudyPlan] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    budget: BudgetReport | None = None
    software_digest: str | None = None
    egress_digest: str | None = None
    receipts: int = 0


class Turn(NamedTuple):
    """Names an attempt."""

    study: str
    purpose: str
    round: int
    attempt: int


@dataclass(frozen=True)
class AttemptRecord:
    """An attempt at an encrypted sum, as its signed transcripts show it.

    Attributes:
        invited: Whom the coordinator asked.
        cohort: U1: who agreed on keys; empty where it did not get there.
        uploaders: U3: whose updates are in the sum; empty where it did not get there.
        known_to: Whose evidence holds it: hospitals, and ``coordinator``.
        null_coordinates: Of the decoded sum, where the coordinator kept them; pure noise, in model units.
        weight: Sum of the uploaders' weights in it.
        complaint: Why the coordinator gave it up.
    """

    turn: Turn
    invited: tuple[str, ...]
    cohort: tuple[str, ...]
    uploaders: tuple[str, ...]
    known_to: frozenset[str]
    null_coordinates: tuple[float, ...] = ()
    weight: float | None = None
    complaint: str | None = None

    @property
    def dropped(self) -> tuple[str, ...]:
        """Who agreed on keys and is not in the sum."""
        return tuple(name for name in self.cohort if name not in self.uploaders)


@dataclass(frozen=True)
class Audit:
    """Everything an audit has read, computed and found.

    Attributes:
        root: Fingerprint of the consortium's root key that rosters were checked with; None where none was given.
        members: Whom the newest signed roster names, with the fingerprint of each one's identity key.
        findings: The worst first.
        sources: What was read.
        passed_over: Files in folders that were shown, at which nobody looked: by their names they are no evidence.
    """

    hospitals: tuple[HospitalRecord, ...]
    attempts: tuple[AttemptRecord, ...]
    findings: tuple[Finding, ...]
    root: str | None = None
    members: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()
    passed_over: tuple[Path, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return passed(self.findings)
