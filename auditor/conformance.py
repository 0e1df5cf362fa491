"""What hospitals' own tests of their trainers say: entries of kind ``conformance``, beside the studies they charged."""

from collections.abc import Iterable, Iterator

from auditor.findings import CODES, Finding, Meaning
from shared_models.privacy.entries import Entry

CODES.update(
    {
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
)


def check_conformance(hospital: str, entries: Iterable[Entry]) -> list[Finding]:
    """Every test that a hospital recorded and that did not hold, and every charged study without one that did.

    A test covers a study where it names the same plan and ran the software that was charged for. It shows what the
    hospital says that it saw: whoever keeps a ledger could write down a test that never ran.

    Args:
        hospital: Whose ledger it is.
        entries: Its entries, oldest first, once they are known to be a chain; read once.
    """
    charged: dict[tuple[str | None, str | None, str | None], Entry] = {}
    covered = set()
    findings: list[Finding] = []
    for entry in entries:
        turn = (entry.study, entry.plan_digest, entry.software_digest)
        if entry.kind == "charge":
            charged.setdefault(turn, entry)
        elif entry.kind == "conformance" and entry.conformance is not None:
            findings += _broken(hospital, entry)
            if entry.conformance.holds:
                covered.add(turn)
    for turn, first in charged.items():
        if turn not in covered:
            what = f"study {first.study} was charged by software {(first.software_digest or 'unknown')[:12]}, untested"
            findings.append(
                Finding(code="conformance-missing", party=hospital, what=what, study=first.study, entry=first.seq)
            )
    return findings


def _broken(hospital: str, entry: Entry) -> Iterator[Finding]:
    for check in entry.conformance.checks if entry.conformance else ():
        if check.verdict != "holds":
            code = "conformance-failed" if check.verdict == "failed" else "conformance-warning"
            chance = "" if check.p_value is None else f" (p = {check.p_value:.1e})"
            what = f"{check.name}: {check.statistic:.4g} instead of {check.expected:.4g}{chance}"
            what += f": {check.reason}" if check.reason else ""
            yield Finding(code=code, party=hospital, what=what, study=entry.study, entry=entry.seq)
