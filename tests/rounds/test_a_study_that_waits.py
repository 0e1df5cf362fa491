"""A study that no standing rule covers waits for the steward, and begins when the steward has said yes."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from typer.testing import CliRunner

from client.cli import app
from client.consent import STUDIES, Consents
from shared_models.approval import sign_approval, verify_approval
from shared_models.errors import BudgetExhaustedError, DropoutError, FederationError, ForgedApprovalError, PolicyError
from shared_models.identity import load_key, public_bytes
from shared_models.messages import Proposal
from shared_models.plan import StudyPlan
from tests.federation import Federation, change_policy, changed, make_federation, restart
from tests.rounds.test_a_server_that_lies import Coordinator, _refused

ASKED = "hospital-2"  # its steward wants to be asked


def command(*arguments: object) -> Result:
    """One command of the steward's, in this process; errors of ours are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, FederationError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def approve(federation: Federation, hospital: str = ASKED, plan: StudyPlan | None = None) -> str:
    """The steward approves by script, having checked the digest."""
    digest = (plan or federation.plan).digest()
    arguments = (federation.settings_file(hospital), federation.plan.study, "--yes", "--digest", digest[:12])
    return command("approve", *arguments).output


@pytest.fixture
def asked(federation: Federation) -> Federation:
    """A federation in which one hospital gives no approval in advance."""
    change_policy(federation, ASKED, standing_approvals=[])
    return federation


def answered_at_proposal(federation: Federation, number: int, answer: object) -> None:
    """Let the steward act just before the hospital sees the study for the n-th time."""
    seen = []

    def watch(hospital: str, request: Message) -> None:
        if hospital == ASKED and request.metadata.message_type == Proposal.action:
            seen.append(hospital)
            if len(seen) == number:
                answer()  # type: ignore[operator]  # a function of no arguments

    federation.wire.on_request = watch


def kinds(federation: Federation, hospital: str = ASKED) -> list[str]:
    """What is in a hospital's ledger."""
    return [entry.kind for entry in federation.ledger(hospital)]


def test_the_steward_approves_while_the_study_waits_and_it_runs(asked: Federation) -> None:
    """The coordinator asks again; the journal says once that it waits; the ledger says who approved, and by what."""
    answered_at_proposal(asked, 2, lambda: approve(asked))

    asked.run()

    assert [event["hospital"] for event in asked.events("pending")] == [ASKED]
    assert asked.events("refused") == []
    assert [event["missing"] for event in asked.events("round")] == [[]] * 3
    for name in asked.names:
        (entry,) = [entry for entry in asked.ledger(name) if entry.kind == "plan-approved"]
        if name != ASKED:
            assert (entry.approved_by, entry.approval) == ("standing-rule", None)
            continue
        approval = Consents(asked.settings(name).state).approved(asked.plan.study)
        assert approval is not None
        assert (entry.approved_by, entry.approval) == ("steward", approval.signature)
        public = public_bytes(load_key(asked.settings(name).keys.identity))
        verify_approval(approval, public, study=asked.plan.study, plan_digest=asked.plan.digest())


def test_a_hospital_that_was_approved_late_joins_the_next_round(asked: Federation) -> None:
    """Three others are enough to begin with; the study does not wait for the fourth beyond its deadline."""
    asked.plan = asked.plan.model_copy(update={"deadline_s": 0.6})

    def watch(hospital: str, request: Message) -> None:
        if hospital == "hospital-1" and request.metadata.group_id == "1" and "train" in request.metadata.message_type:
            approve(asked)
        if hospital == "hospital-1" and request.metadata.group_id == "2":
            asked.wire.on_request = lambda _hospital, _request: None

    asked.wire.on_request = watch

    asked.run()

    missing = [event["missing"] for event in asked.events("round")]
    assert missing[0] == [ASKED]
    assert kinds(asked).count("charge") == missing.count([])


def test_what_nobody_approves_never_runs(asked: Federation) -> None:
    """Too few hospitals, and the coordinator can tell that it is not their daemons that are missing."""
    for name in asked.names:
        change_policy(asked, name, standing_approvals=[])
    asked.plan = asked.plan.model_copy(update={"deadline_s": 0.3})

    with pytest.raises(DropoutError, match=r"0 of at least 3 .* hospital-1 \(pending\)"):
        asked.run()

    assert [kinds(asked, name) for name in asked.names] == [["budget-opened"]] * 4


def test_an_approved_study_needs_no_second_approval_after_a_restart(asked: Federation) -> None:
    """It is in the ledger. Neither does one that a standing rule approved, which the policy no longer has."""
    coordinator = Coordinator(asked)
    coordinator.propose(ASKED)
    approve(asked)
    for name in (ASKED, "hospital-1"):
        coordinator.propose(name)
        change_policy(asked, name, standing_approvals=[])
        restart(asked, name)

        coordinator.propose(name)

        assert kinds(asked, name) == ["budget-opened", "plan-approved"]


def test_no_record_is_read_before_the_yes(asked: Federation) -> None:
    """The records are not even there while the study waits; once approved, they are what is missing."""
    shutil.rmtree(asked.settings(ASKED).records)
    coordinator = Coordinator(asked)

    assert _refused(coordinator.propose(ASKED), "pending")

    consents = Consents(asked.settings(ASKED).state)
    assert [waiting.study for waiting in consents.waiting()] == [asked.plan.study]
    with pytest.raises(FederationError, match="manifest"):
        approve(asked)
    assert consents.approved(asked.plan.study) is None


# approvals that do not hold


def test_a_forged_approval_is_told_from_a_missing_one_and_the_study_goes_on_waiting(
    asked: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Another key signed it. The coordinator asks again, and a true approval is still taken."""
    consents = Consents(asked.settings(ASKED).state)

    def forge() -> None:
        approve(asked)
        approval = consents.approved(asked.plan.study)
        assert approval is not None
        fields = {
            name: getattr(approval, name) for name in ("study", "plan_digest", "price", "time", "software_digest")
        }
        consents.approve(sign_approval(Ed25519PrivateKey.generate(), **fields))

    answered_at_proposal(asked, 2, forge)
    asked.plan = asked.plan.model_copy(update={"deadline_s": 1.0})
    asked.run()
    assert "was not signed by this hospital's key" in caplog.text
    assert kinds(asked) == ["budget-opened"]

    approve(asked)
    Coordinator(asked).propose(ASKED)

    assert kinds(asked) == ["budget-opened", "plan-approved"]


def test_an_approval_is_for_one_plan(asked: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """A plan that changes after the yes, before it was taken up, waits for a yes of its own."""
    Coordinator(asked).propose(ASKED)
    approve(asked)
    asked.plan = changed(asked.plan, rounds=2)
    coordinator = Coordinator(asked)

    assert _refused(coordinator.propose(ASKED), ForgedApprovalError.code)

    assert f"proposed is plan {asked.plan.digest()[:12]}" in caplog.text
    assert kinds(asked) == ["budget-opened"]
    approve(asked)
    coordinator.propose(ASKED)
    assert kinds(asked) == ["budget-opened", "plan-approved"]


def test_a_name_is_used_once(asked: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """Once approved, another plan of that name is refused: it needs a new name, and so a new approval."""
    Coordinator(asked).propose(ASKED)
    approve(asked)
    Coordinator(asked).propose(ASKED)
    asked.plan = changed(asked.plan, rounds=2)

    assert _refused(Coordinator(asked).propose(ASKED), "policy")

    assert "was approved with another plan" in caplog.text


def test_a_digest_that_was_not_checked_approves_nothing(asked: Federation) -> None:
    """A script says which plan it means; too few digits mean none."""
    Coordinator(asked).propose(ASKED)
    settings, study = asked.settings_file(ASKED), asked.plan.study

    for arguments in (["--yes"], ["--yes", "--digest", "0" * 64], ["--yes", "--digest", asked.plan.digest()[:7]]):
        with pytest.raises(FederationError, match="does not begin with"):
            command("approve", settings, study, *arguments)

    assert Consents(asked.settings(ASKED).state).approved(study) is None


def test_a_steward_who_says_no_at_the_question_has_said_nothing(asked: Federation) -> None:
    """The study still waits."""
    Coordinator(asked).propose(ASKED)

    result = CliRunner().invoke(app, ["approve", str(asked.settings_file(ASKED)), asked.plan.study], input="n\n")

    assert result.exit_code == 1
    assert _refused(Coordinator(asked).propose(ASKED), "pending")


def test_a_refusal_is_for_good(asked: Federation) -> None:
    """The coordinator gets the policy's no and stops asking; the others run the study."""
    answered_at_proposal(asked, 2, lambda: command("refuse", asked.settings_file(ASKED), asked.plan.study, "--yes"))

    asked.run()

    assert [(event["hospital"], event["code"]) for event in asked.events("refused")] == [(ASKED, "policy")]
    assert [event["missing"] for event in asked.events("round")] == [[ASKED]] * 3
    with pytest.raises(FederationError, match="was refused here"):
        approve(asked)


# what never waits


@pytest.mark.parametrize(
    ("policy", "refusal"),
    [
        ({"minimum_noise_multiplier": 1000.0}, "minimum_noise_multiplier: "),
        ({"minimum_hospitals": 4}, "minimum_hospitals: 3 < 4"),
        ({"coordinators": ["another.example:9092"]}, "coordinators: 127.0.0.1:9443 is not among another.example:9092"),
        ({"devices": ["cuda"]}, "devices: this process computes on cpu, permitted: cuda"),
        ({"networks": ["cnn"]}, "networks: "),
        ({"maximum_memory_mb": 1, "networks": ["mlp", "logistic-regression"]}, "maximum_memory_mb: "),
    ],
    ids=["sigma below policy", "too few peers", "wrong coordinator", "wrong device", "wrong network", "too large"],
)
def test_what_policy_forbids_is_refused_at_once_and_nothing_is_read_or_kept(
    tmp_path: Path, policy: dict[str, object], refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each clause by its name and with its numbers, without a record in the house, and it never waits."""
    federation = make_federation(tmp_path, network={"name": "mlp", "hidden": [16]}, rounds=3)
    change_policy(federation, ASKED, standing_approvals=[], **policy)
    settings = federation.settings(ASKED)
    shutil.rmtree(settings.records)

    answer = Coordinator(federation).propose(ASKED)

    assert _refused(answer, PolicyError.code)
    assert refusal in caplog.text
    assert not (settings.state / STUDIES).exists()
    assert kinds(federation) == ["budget-opened"]


def test_a_study_beyond_the_budget_is_refused_with_the_numbers_before_a_record_is_read(
    asked: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """The first study costs most of the budget. Before the second comes, every record is taken away: nobody notices."""
    answered_at_proposal(asked, 2, lambda: approve(asked))
    asked.run()
    left = json.loads(command("budget", asked.settings_file(ASKED), "--json").output)["epsilon_left"]
    shutil.rmtree(asked.settings(ASKED).records)
    asked.plan = changed(asked.plan, study="one-too-many", rounds=15)
    change_policy(asked, ASKED, maximum_rounds=16)
    restart(asked, ASKED)
    caplog.set_level(logging.INFO)

    answer = Coordinator(asked).propose(ASKED)

    assert _refused(answer, BudgetExhaustedError.code)
    assert f"has epsilon {left:.4g} of 1 left, and -" in caplog.text
    assert [waiting.study for waiting in Consents(asked.settings(ASKED).state).waiting()] == []
