"""Consent: a study waits, a steward answers, and only that steward's key over exactly that plan is a yes."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from client.consent import LARGEST_PLAN_BYTES, MOST_WAITING, STUDIES, Consent, Consents
from shared_models.approval import Approval, ApprovedPrice, sign_approval, verify_approval
from shared_models.errors import ConfigError, ForgedApprovalError, PendingError, PolicyError
from shared_models.identity import public_bytes, sign
from shared_models.plan import StudyPlan
from shared_models.privacy.ledger import BudgetTerms, StudyLimit
from shared_models.terminal import printable
from tests.client.test_policy import plan

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = public_bytes(KEY)
HERE = "5" * 64  # digest of the software that is installed
PRICE = ApprovedPrice(
    epsilon=0.9,
    limit=StudyLimit(epsilon=1.0, delta=5e-4),
    left_before=2.0,
    left_after=1.1,
    budget=BudgetTerms(epsilon=2.0, delta=1e-4, order=14, public_size=200),
)


def approval_of(study: StudyPlan, key: Ed25519PrivateKey = KEY) -> Approval:
    """A steward's approval, with this key."""
    fields = {"study": study.study, "plan_digest": study.digest(), "time": "2026-03-02T08:00:00.000Z"}
    return sign_approval(key, price=PRICE, software_digest=HERE, **fields)


@pytest.fixture
def consents(tmp_path: Path) -> Consents:
    """An empty folder of proposals."""
    return Consents(tmp_path)


def propose(consents: Consents, study: StudyPlan) -> Consent:
    """As the daemon asks, without a standing rule."""
    return consents.of(study, PUBLIC, software=HERE, stands=False)


# waiting


def test_a_study_that_nobody_approved_waits_on_the_disk(consents: Consents, tmp_path: Path) -> None:
    """The plan whole, its digest and the time, under the study's name; proposing it again changes nothing."""
    with pytest.raises(PendingError, match="a-study waits for the steward"):
        propose(consents, plan())
    (file,) = (tmp_path / STUDIES).iterdir()
    before = file.read_bytes()
    with pytest.raises(PendingError):
        propose(consents, plan())

    (waiting,) = Consents(tmp_path).waiting()
    assert (file.name, file.read_bytes()) == ("a-study.json", before)
    assert (waiting.plan, waiting.plan_digest) == (plan(), plan().digest())


def test_a_standing_rule_leaves_nothing_on_the_disk(consents: Consents) -> None:
    """A coordinator that is trusted to propose as it likes must not fill the disk with it either."""
    assert consents.of(plan(), PUBLIC, software=HERE, stands=True) == Consent("standing-rule")

    assert consents.waiting() == []


def test_a_changed_plan_takes_the_place_of_the_one_that_waits(consents: Consents) -> None:
    """Nobody had approved the old one."""
    for rounds in (20, 10):
        with pytest.raises(PendingError):
            propose(consents, plan(rounds=rounds))

    assert [waiting.plan.rounds for waiting in consents.waiting()] == [10]


def test_only_so_many_studies_can_wait(consents: Consents, tmp_path: Path) -> None:
    """A hostile coordinator cannot fill the disk; those that wait already still do."""
    for number in range(MOST_WAITING):
        with pytest.raises(PendingError):
            propose(consents, plan(study=f"study-{number}"))

    with pytest.raises(PolicyError, match=f"{MOST_WAITING} studies wait for the steward already"):
        propose(consents, plan(study="one-more"))
    with pytest.raises(PendingError):
        propose(consents, plan(study="study-0", rounds=5))

    assert len(list((tmp_path / STUDIES).iterdir())) == MOST_WAITING
    consents.refuse(consents.find("study-0"))
    with pytest.raises(PendingError):
        propose(consents, plan(study="one-more"))


def test_a_plan_that_is_too_large_does_not_wait(consents: Consents, tmp_path: Path) -> None:
    """The bound is on what would be written."""
    layers = [1] * LARGEST_PLAN_BYTES

    with pytest.raises(PolicyError, match=r"a plan of \d+ bytes is too large"):
        propose(consents, plan(network={"name": "mlp", "hidden": layers}))

    assert not (tmp_path / STUDIES).exists()


@pytest.mark.parametrize("name", ["../identity", "a/b", "", "A", "a.b", "x" * 65])
def test_a_name_that_is_none_reaches_no_file(consents: Consents, name: str) -> None:
    """What a person types becomes a file's name only if it is a study's."""
    with pytest.raises(ConfigError, match="is no name of a study"):
        consents.find(name)


def test_a_proposal_that_was_edited_is_not_shown(consents: Consents, tmp_path: Path) -> None:
    """The digest that the steward confirms is the digest of the plan that the steward reads."""
    with pytest.raises(PendingError):
        propose(consents, plan())
    file = tmp_path / STUDIES / "a-study.json"
    file.write_text(file.read_text(encoding="utf-8").replace("To see what", "To hide what"), encoding="utf-8")

    with pytest.raises(ConfigError, match=r"a-study\.json is damaged"):
        consents.find("a-study")


# yes


def test_an_approval_by_this_key_for_this_plan_is_a_yes(consents: Consents, tmp_path: Path) -> None:
    """Its signature goes into the ledger; the plan and the approval stay as evidence, and nothing waits any more."""
    with pytest.raises(PendingError):
        propose(consents, plan())
    approval = approval_of(plan())
    consents.approve(approval)

    assert propose(consents, plan()) == Consent("steward", approval.signature)

    consents.settle(plan())
    assert consents.waiting() == []
    assert sorted(path.name for path in (tmp_path / STUDIES).iterdir()) == [
        "a-study.approval.json",
        "a-study.plan.json",
    ]


def with_another_key(_fields: dict[str, Any]) -> dict[str, Any]:
    return approval_of(plan(), OTHER_KEY).model_dump(mode="json")


def for_another_plan(_fields: dict[str, Any]) -> dict[str, Any]:
    return approval_of(plan(rounds=1)).model_dump(mode="json")


def for_another_plan_renamed(_fields: dict[str, Any]) -> dict[str, Any]:
    return approval_of(plan(rounds=1)).model_dump(mode="json") | {"plan_digest": plan().digest()}


def for_another_study(_fields: dict[str, Any]) -> dict[str, Any]:
    return approval_of(plan(study="another-study")).model_dump(mode="json")


def with_an_edited_price(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"price": fields["price"] | {"epsilon": 0.1}}


def with_an_edited_time(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"time": "2027-03-02T08:00:00.000Z"}


def signed_as_something_else(fields: dict[str, Any]) -> dict[str, Any]:
    payload = Approval.model_validate_json(json.dumps(fields)).payload()
    return fields | {"signature": sign(KEY, "ledger-entry", payload).hex()}


def with_an_unknown_key(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"surprise": 1}


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (with_another_key, "was not signed by this hospital's key"),
        (for_another_plan, "is for plan"),
        (for_another_plan_renamed, "was not signed by this hospital's key, or was changed since"),
        (for_another_study, "of study another-study"),
        (with_an_edited_price, "was changed since"),
        (with_an_edited_time, "was changed since"),
        (signed_as_something_else, "was not signed by this hospital's key"),
        (with_an_unknown_key, "is damaged"),
    ],
)
def test_any_other_approval_is_named_and_the_study_goes_on_waiting(
    consents: Consents, tmp_path: Path, forge: Any, reason: str
) -> None:
    """Even if a standing rule would cover the plan: somebody tampers here."""
    with pytest.raises(PendingError):
        propose(consents, plan())
    forged = forge(approval_of(plan()).model_dump(mode="json"))
    (tmp_path / STUDIES / "a-study.approval.json").write_text(json.dumps(forged), encoding="utf-8")

    for stands in (False, True):
        with pytest.raises(ForgedApprovalError, match=reason):
            consents.of(plan(), PUBLIC, software=HERE, stands=stands)

    assert [waiting.study for waiting in consents.waiting()] == ["a-study"]


@given(place=st.integers(0, 63), bit=st.integers(0, 7))
def test_no_bit_of_a_signature_can_be_changed(place: int, bit: int) -> None:
    """Ed25519 holds for every one of them."""
    approval = approval_of(plan())
    signature = bytearray.fromhex(approval.signature)
    signature[place] ^= 1 << bit
    changed = approval.model_copy(update={"signature": signature.hex()})

    with pytest.raises(ForgedApprovalError):
        verify_approval(changed, PUBLIC, study="a-study", plan_digest=plan().digest())


# no


def test_a_no_is_final_for_the_name(consents: Consents) -> None:
    """Whatever the plan, whatever rule stands, whoever signs afterwards: a name is used once."""
    with pytest.raises(PendingError):
        propose(consents, plan())
    consents.approve(approval_of(plan()))

    consents.refuse(consents.find("a-study"))

    assert (consents.waiting(), consents.approved("a-study")) == ([], None)
    consents.approve(approval_of(plan(rounds=2)))
    for study in (plan(), plan(rounds=2)):
        with pytest.raises(PolicyError, match="was refused by this hospital's steward"):
            consents.of(study, PUBLIC, software=HERE, stands=True)


def test_a_purpose_cannot_move_the_terminals_cursor() -> None:
    """What a coordinator wrote is shown to a steward who decides by it: no escape sequence, no reversed text."""
    shown = printable("Heart\x1b[2K\r disease,\nin \N{RIGHT-TO-LEFT OVERRIDE}lairt at Zürich")

    assert shown == "Heart�[2K disease, in �lairt at Zürich"
