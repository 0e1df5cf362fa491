"""Audits of ledgers that nobody kept: as many hospitals and rounds as a test wants, without signing anything."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from auditor.findings import Finding
from auditor.recompute import report_facts
from auditor.record import AttemptRecord, Audit, HospitalRecord, Key, Line, Turn
from shared_models.plan import StudyPlan
from shared_models.privacy.entries import BudgetTerms, Reserved, StudyLimit
from shared_models.privacy.evidence import Claim
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian

TERMS = BudgetTerms(epsilon=8.0, delta=1e-4, order=12, public_size=1000)
START = datetime(2026, 3, 1, tzinfo=UTC)
RELEASE = GaussianRelease(noise_multiplier=60.0, clip=1.0)


def training(size: int = 1000, *, steps: int = 2) -> PoissonGaussian:
    """What one round charges."""
    return PoissonGaussian(sample_rate=0.02, noise_multiplier=2.0, steps=steps, clip=0.5, expected_batch=0.02 * size)


class Writer:
    """Lines of one ledger, numbered."""

    def __init__(self, name: str) -> None:
        self.name, self.lines = name, list[Line]()

    def add(self, kind: str, **fields: Any) -> Line:
        """One more entry, a minute after the one before."""
        seq = len(self.lines) + 1
        time = (START + timedelta(minutes=seq)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = Line(seq, time, kind, hashlib.sha256(f"{self.name} {seq}".encode()).hexdigest(), **fields)
        self.lines.append(line)
        return line

    def study(self, name: str, rounds: int, *, releases_every: int = 0, size: int = 1000, vain: int = 0) -> None:
        """Approve a study, run it, and end it; the first ``vain`` rounds need two attempts."""
        mechanism, about = training(size), {"study": name, "plan_digest": "ab" * 32}
        reservation: tuple[Reserved, ...] = (Reserved(mechanism=mechanism, charges=rounds + vain),)
        if releases_every and rounds >= releases_every:
            reservation += (Reserved(mechanism=RELEASE, charges=rounds // releases_every),)
        limit = StudyLimit(epsilon=TERMS.epsilon, delta=TERMS.delta)
        self.add(
            "plan-approved",
            **about,
            software_digest="cd" * 32,
            limit=limit,
            reservation=reservation,
            approved_by="steward",
        )
        for number in range(1, rounds + 1):
            attempts = 2 if number <= vain else 1
            for attempt in range(1, attempts + 1):
                self.add(
                    "charge", **about, round=number, attempt=attempt, mechanism=mechanism, software_digest="cd" * 32
                )
            self.add("round-done", **about, round=number, attempt=attempts)
            if releases_every and number % releases_every == 0:
                self.add("charge", **about, round=number, attempt=1, mechanism=RELEASE, software_digest="cd" * 32)
                self.add("release", **about, round=number, attempt=1, mechanism=RELEASE)
        self.add("study-closed", **about)


def hospital(
    name: str,
    writer: Writer,
    *,
    plans: dict[str, StudyPlan] | None = None,
    claims: Sequence[Claim] = (),
    terms: BudgetTerms = TERMS,
) -> HospitalRecord:
    """A hospital's record from its lines."""
    lines = tuple(writer.lines)
    return HospitalRecord(
        source=Path(f"/evidence/{name}.zip"),
        hospital=name,
        population="all",
        terms=terms,
        packed="2026-06-01T00:00:00.000Z",
        lines=lines,
        keys=(Key(f"{name}-fingerprint", 1),),
        plans=plans or {},
        claims=tuple(claims),
        budget=report_facts(name, "all", terms, lines),
        software_digest="cd" * 32,
        receipts=sum(line.kind == "charge" for line in lines),
    )


def large(hospitals: int, rounds: int, *, findings: Sequence[Finding] = ()) -> Audit:
    """One study at many hospitals, a release every ten rounds, one hospital missing in every tenth sum."""
    names = [f"hospital-{number}" for number in range(1, hospitals + 1)]
    records = []
    for number, name in enumerate(names):
        writer = Writer(name)
        writer.add("budget-opened")
        writer.study("heart", rounds, releases_every=10, size=1000 + 10 * number)
        records.append(hospital(name, writer))
    attempts = tuple(
        AttemptRecord(
            turn=Turn("heart", "train", number, 1),
            invited=tuple(names),
            cohort=tuple(names),
            uploaders=tuple(names[: -1 if number % 10 == 0 else None]),
            known_to=frozenset({"coordinator"}),
        )
        for number in range(1, rounds + 1)
    )
    return Audit(
        hospitals=tuple(records), attempts=attempts, findings=tuple(findings), members=dict.fromkeys(names, "x")
    )
