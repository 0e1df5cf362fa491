"""What hospitals' own tests of their trainers say: entries of kind ``conformance``, beside the studies they charged."""

from collections.abc import Iterable, Iterator

from auditor.findings import Finding
from auditor.record import Line
from shared_models.privacy.entries import Entry


def check_conformance(hospital: str, entries: Iterable[Entry | Line]) -> list[Finding]:
    """Every test that a hospital recorded and that did not hold, and every charged study without one that did.

    A test covers a study where it names the same plan and ran the software that was charged for. It shows what the
    hospital says that it saw: whoever keeps a ledger could write down a test that never ran.

    Args:
        hospital: Whose ledger it is.
        entries: Its entries, oldest first, once they are known to be a chain; read once.
    """
    charged: dict[tuple[str | None, str | None, str | None], Entry | Line] = {}
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


def _broken(hospital: str, entry: Entry | Line) -> Iterator[Finding]:
    for check in entry.conformance.checks if entry.conformance else ():
        if check.verdict != "holds":
            code = "conformance-failed" if check.verdict == "failed" else "conformance-warning"
            chance = "" if check.p_value is None else f" (p = {check.p_value:.1e})"
            what = f"{check.name}: {check.statistic:.4g} instead of {check.expected:.4g}{chance}"
            what += f": {check.reason}" if check.reason else ""
            yield Finding(code=code, party=hospital, what=what, study=entry.study, entry=entry.seq)
