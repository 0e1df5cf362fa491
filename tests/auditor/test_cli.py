"""The auditor's command as a person uses it: as a process, on files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.budget import Budget
from shared_models.identity import public_bytes
from shared_models.privacy.ledger import Ledger
from tests.client.test_budget import TERMS, charge, plan

KEYS = {"north": Ed25519PrivateKey.generate(), "south": Ed25519PrivateKey.generate()}


def audit(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "auditor.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def ledgers(tmp_path: Path) -> dict[str, Path]:
    """Two hospitals' ledgers, and beside each its public key."""
    paths = {}
    for name, key in KEYS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "key.pub").write_text(public_bytes(key).hex() + "\n", encoding="ascii")
        paths[name] = folder / "ledger.sqlite"
        with Ledger.create(paths[name], key, hospital=name) as ledger:
            budget = Budget.open(ledger, **TERMS)
            budget.approve(plan())
            charge(budget, plan(), 1)
    return paths


def test_good_ledgers_hold(ledgers: dict[str, Path]) -> None:
    """Each is named, with whose key it is signed by; the exit status is 0."""
    keys = [option for path in ledgers.values() for option in ("--key", path.with_name("key.pub"))]

    done = audit("verify", *ledgers.values(), *keys)

    assert done.returncode == 0, done.stderr
    for name, path in ledgers.items():
        assert f"holds    {path}: {name}, population all, 3 entries, 1 charges" in done.stdout
    assert done.stderr == ""


def test_one_broken_ledger_fails_the_audit_and_hides_no_other(ledgers: dict[str, Path]) -> None:
    """Two lines on standard error, no traceback; the good ledger is still reported."""
    content = ledgers["north"].read_bytes()
    place = content.index(b'"round":1')
    ledgers["north"].write_bytes(content[: place + 8] + b"2" + content[place + 9 :])

    done = audit("verify", *ledgers.values())

    assert done.returncode == 1
    assert f"CRITICAL ledger.sqlite: {ledgers['north']}: ledger entry 3: it is not signed" in done.stdout
    assert f"holds    {ledgers['south']}" in done.stdout
    assert done.stderr.splitlines()[0].startswith("error: not verified: ledger.sqlite: ")
    assert done.stderr.splitlines()[1].startswith("hint: ")
    assert len(done.stderr.splitlines()) == 2


def test_a_swapped_key_fails_the_audit(ledgers: dict[str, Path]) -> None:
    """North's ledger, south's key."""
    done = audit("verify", ledgers["north"], "--key", ledgers["south"].with_name("key.pub"))

    assert done.returncode == 1
    assert "has another key" in done.stderr


@pytest.mark.parametrize("command", ["verify", "budget"])
def test_what_is_not_there_is_one_error_and_one_hint(tmp_path: Path, command: str) -> None:
    """A path that was mistyped."""
    done = audit(command, tmp_path / "absent.sqlite")

    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert "absent.sqlite" in done.stderr


def test_a_budget_is_never_shown_without_what_it_holds_for(ledgers: dict[str, Path], tmp_path: Path) -> None:
    """Delta, unit, neighbouring relation and accountant, beside every epsilon; the file has the same figures."""
    done = audit("budget", *ledgers.values(), "--json", tmp_path / "report.json")

    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if "epsilon" in line and "budget " not in line:
            for part in ("delta 0.0001", "per patient", "add or remove one patient", "dp-accounting: PLD, RDP"):
                assert part in line
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [ledger["hospital"] for ledger in report["ledgers"]] == ["north", "south"]
    spent = report["ledgers"][0]["studies"][0]["spent"]
    assert 0 < spent["epsilon_pld"] < spent["epsilon_filter"] < 1
    assert (spent["delta"], spent["unit"], spent["order"]) == (1e-4, "patient", 20)


def test_a_budget_is_not_computed_from_a_ledger_that_does_not_hold(ledgers: dict[str, Path], tmp_path: Path) -> None:
    """And no half report is written."""
    content = ledgers["north"].read_bytes()
    ledgers["north"].write_bytes(content.replace(b'"noise_multiplier":8', b'"noise_multiplier":9'))

    done = audit("budget", ledgers["north"], "--json", tmp_path / "report.json")

    assert done.returncode == 1
    assert "not signed" in done.stderr
    assert not (tmp_path / "report.json").exists()


def test_the_auditor_imports_nothing_heavy() -> None:
    """It installs without the hospital's software."""
    code = (
        "import json, sys, auditor.cli, auditor.verify, auditor.recompute; "
        "print(json.dumps(sorted({'torch', 'flwr', 'opacus', 'pandas', 'client', 'server'} & set(sys.modules))))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert json.loads(done.stdout) == []
