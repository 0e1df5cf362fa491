"""Hospitals' tests of their own trainers, as an auditor reads them."""

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.conformance import check_conformance
from shared_models.privacy.conformance import CanaryAudit, Check, Conformance
from shared_models.privacy.ledger import Ledger
from tests.auditor.test_verify import STUDY, approved, charged, opened

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SOFTWARE = "ef" * 32
GOOD = Check(name="null-noise", statistic=1.0, expected=1.0, p_value=0.5, verdict="holds")
BAD = Check(name="null-noise", statistic=0.5, expected=1.0, p_value=1e-30, verdict="failed")
ODD = Check(name="patient-share", statistic=0.7, expected=1.0, p_value=1e-9, verdict="warning")
CANARIES = CanaryAudit(
    canaries=1000,
    guesses=200,
    correct=110,
    epsilon_lower=0.0,
    confidence=0.95,
    epsilon_claimed=0.9,
    delta=1e-4,
    epsilon_expected=0.3,
    epsilon_most=3.0,
)


def recorded(ledger: Ledger, *checks: Check, **change: Any) -> None:
    """An entry of kind ``conformance``."""
    found = Conformance(
        rounds=25,
        steps=8,
        checks=checks,
        canaries=CANARIES,
        false_alarm=1e-6,
        noise_ratio_found=0.96,
        trainer_digest="12" * 32,
    )
    ledger.append("conformance", **STUDY | {"software_digest": SOFTWARE, "conformance": found} | change)


def found(folder: Path, *results: tuple[Check, ...], **change: Any) -> list[tuple[str, str, int | None]]:
    """Findings about a ledger with two charges and these tests: code, severity, entry."""
    with Ledger.create(folder / "ledger.sqlite", KEY, hospital="north") as ledger:
        opened(ledger)
        approved(ledger)
        charged(ledger, 1, software_digest=SOFTWARE)
        charged(ledger, 2, software_digest=SOFTWARE)
        for checks in results:
            recorded(ledger, *checks, **change)
        findings = check_conformance("north", ledger.stream())
    assert {finding.party for finding in findings} <= {"north"}
    return [(finding.code, finding.severity, finding.entry) for finding in findings]


def test_a_study_whose_trainer_conforms_has_no_finding(tmp_path: Path) -> None:
    """One test that holds is enough, also beside one that did not, which stays."""
    assert found(tmp_path, (GOOD, GOOD)) == []


def test_what_did_not_hold_is_named_and_covers_nothing(tmp_path: Path) -> None:
    """Critical where patients are hurt, a warning where they are not; and the study stays untested."""
    assert found(tmp_path, (GOOD, BAD, ODD)) == [
        ("conformance-failed", "critical", 5),
        ("conformance-warning", "warning", 5),
        ("conformance-missing", "note", 3),
    ]


def test_a_later_success_does_not_unmake_a_failure(tmp_path: Path) -> None:
    """Who repeats a test until it holds is seen."""
    assert found(tmp_path, (BAD,), (GOOD,)) == [("conformance-failed", "critical", 5)]


@pytest.mark.parametrize("change", [{"plan_digest": "cd" * 32}, {"software_digest": "cd" * 32}, {"conformance": None}])
def test_a_test_of_something_else_covers_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    """Another plan, other software, or an entry as release 0.1.0 could write it, without a result."""
    assert found(tmp_path, (GOOD,), **change) == [("conformance-missing", "note", 3)]


def test_an_untested_study_is_a_note_once(tmp_path: Path) -> None:
    """However many rounds it has charged."""
    assert found(tmp_path) == [("conformance-missing", "note", 3)]
