"""An auditor believes signatures and arithmetic, not hospitals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.verify import verify_ledger
from client.budget import Budget
from shared_models.errors import LedgerError
from shared_models.identity import fingerprint, public_bytes
from shared_models.privacy.ledger import BudgetTerms, Ledger, Reserved, StudyLimit, head_path
from shared_models.privacy.mechanisms import PoissonGaussian

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_bytes(KEY)
TERMS = BudgetTerms(epsilon=1.5, delta=1e-4, order=20, public_size=100)
MECHANISM = PoissonGaussian(sample_rate=0.2, noise_multiplier=8.0, steps=5, clip=1.0, expected_batch=20.0)
STUDY: dict[str, Any] = {"study": "heart", "plan_digest": "ab" * 32, "population": "all"}


def opened(ledger: Ledger, terms: BudgetTerms = TERMS) -> None:
    ledger.append("budget-opened", population="all", budget=terms, public_key=ledger.public_key.hex())


def approved(ledger: Ledger, *, charges: int = 3, epsilon: float = 1.0, **change: Any) -> None:
    ledger.append(
        "plan-approved",
        **STUDY
        | {
            "limit": StudyLimit(epsilon=epsilon, delta=1e-4),
            "reservation": (Reserved(mechanism=MECHANISM, charges=charges),),
        }
        | change,
    )


def charged(ledger: Ledger, number: int, **change: Any) -> None:
    fields = STUDY | {"round": number, "attempt": 1, "mechanism": MECHANISM, "parameters_digest": "cd" * 32}
    ledger.append("charge", **fields | change)


def closed(ledger: Ledger) -> None:
    ledger.append("study-closed", **STUDY)


def written(folder: Path, *steps: Callable[[Ledger], None]) -> Path:
    path = folder / "ledger.sqlite"
    with Ledger.create(path, KEY, hospital="north") as ledger:
        for step in steps:
            step(ledger)
    return path


def test_a_good_ledger_holds(tmp_path: Path) -> None:
    """The answer says how far the checking went."""
    path = written(tmp_path, opened, approved, lambda it: charged(it, 1), lambda it: charged(it, 2), closed)

    verified = verify_ledger(path, [PUBLIC])

    assert verified.hospital == "north"
    assert (verified.entries, verified.charges) == (5, 2)
    assert verified.key == fingerprint(PUBLIC)
    assert verified.key_was_given
    assert verified.head_was_checked


def test_what_was_not_checked_is_said(tmp_path: Path) -> None:
    """Without a key or a head file the ledger vouches for itself."""
    path = written(tmp_path, opened)
    head_path(path).unlink()

    verified = verify_ledger(path)

    assert not verified.key_was_given
    assert not verified.head_was_checked


def test_the_hospitals_budget_writes_ledgers_that_hold(tmp_path: Path) -> None:
    """Two implementations of the rules agree on an honest history."""
    from tests.client.test_budget import TERMS as THEIRS
    from tests.client.test_budget import charge, plan

    with Ledger.create(tmp_path / "l", KEY, hospital="north") as ledger:
        budget = Budget.open(ledger, **THEIRS)
        for name in ("heart", "lungs"):
            budget.approve(plan(name, noise_multiplier=10.0))
            for number in range(1, 11):
                charge(budget, plan(name, noise_multiplier=10.0), number)
            budget.finish(name)

    assert verify_ledger(tmp_path / "l", [PUBLIC]).charges == 20


def test_a_foreign_key_is_refused(tmp_path: Path) -> None:
    """However well the ledger is signed by it."""
    other = public_bytes(Ed25519PrivateKey.generate())

    with pytest.raises(LedgerError, match="another key"):
        verify_ledger(written(tmp_path, opened), [other])


def test_an_empty_ledger_shows_nothing(tmp_path: Path) -> None:
    """It may never have been used, or everything was cut off."""
    with pytest.raises(LedgerError, match="no entries"):
        verify_ledger(written(tmp_path))


def test_a_cut_ledger_is_noticed(tmp_path: Path) -> None:
    """The head file of the longer one lies beside the shorter one."""
    (tmp_path / "long").mkdir()
    short = written(tmp_path, opened, approved)
    long = written(tmp_path / "long", opened, approved, lambda it: charged(it, 1))
    head_path(long).replace(head_path(short))

    with pytest.raises(LedgerError, match="ends at entry 2, but its head file knows entry 3"):
        verify_ledger(short, [PUBLIC])


RULES: dict[str, tuple[str, list[Callable[[Ledger], None]]]] = {
    "a charge nobody approved": (r"entry 2: it charges study heart, which was not", [lambda it: charged(it, 1)]),
    "a charge for another plan": (
        r"entry 3: .* another plan",
        [approved, lambda it: charged(it, 1, plan_digest="ee" * 32)],
    ),
    "one charge too many": (
        r"entry 4: .* more than was reserved",
        [lambda it: approved(it, charges=1), lambda it: charged(it, 1), lambda it: charged(it, 2)],
    ),
    "another mechanism": (
        r"entry 3: .* more than was reserved",
        [approved, lambda it: charged(it, 1, mechanism=MECHANISM.model_copy(update={"noise_multiplier": 4.0}))],
    ),
    "the same charge twice": (
        r"entry 4: round 1, attempt 1 of study heart was charged before",
        [approved, lambda it: charged(it, 1), lambda it: charged(it, 1)],
    ),
    "rounds backwards": (
        r"entry 4: round 1, attempt 1 of study heart was charged before",
        [approved, lambda it: charged(it, 2), lambda it: charged(it, 1)],
    ),
    "a charge after the end": (r"entry 4: .* after its end", [approved, closed, lambda it: charged(it, 1)]),
    "a second approval": (r"entry 3: it approves study heart a second time", [approved, approved]),
    "a study beyond its promise": (
        r"entry 2: study heart costs epsilon 0\.\d+, promised 0\.3",
        [lambda it: approved(it, epsilon=0.3)],
    ),
    "studies beyond the budget": (
        r"entry 3: epsilon \d\.\d+ is spent or reserved, of a budget of 1\.5",
        [lambda it: approved(it, charges=30, epsilon=9.0), lambda it: approved(it, charges=30, epsilon=9.0, study="b")],
    ),
    "another population": (
        r"entry 3: it belongs to population others",
        [approved, lambda it: charged(it, 1, population="others")],
    ),
}


@pytest.mark.parametrize(("problem", "steps"), RULES.values(), ids=RULES.keys())
def test_a_broken_rule_is_found_though_every_signature_is_right(
    tmp_path: Path, problem: str, steps: list[Callable[[Ledger], None]]
) -> None:
    """A hospital that changed its own software still cannot hide what it recorded."""
    path = written(tmp_path, opened, *steps)

    with pytest.raises(LedgerError, match=problem):
        verify_ledger(path, [PUBLIC])


def test_a_delta_too_large_for_the_population_is_found(tmp_path: Path) -> None:
    """1 / (10 * 100) is 0.001."""
    large = TERMS.model_copy(update={"delta": 0.002})

    with pytest.raises(LedgerError, match=r"delta 0\.002 is above"):
        verify_ledger(written(tmp_path, lambda it: opened(it, large)), [PUBLIC])


def test_a_finished_study_frees_what_it_did_not_charge(tmp_path: Path) -> None:
    """So a second one fits that would not have fitted beside the first's reservation."""
    path = written(
        tmp_path,
        opened,
        lambda it: approved(it, charges=30, epsilon=9.0),
        closed,
        lambda it: approved(it, charges=30, epsilon=9.0, study="b"),
    )

    assert verify_ledger(path, [PUBLIC]).entries == 4
