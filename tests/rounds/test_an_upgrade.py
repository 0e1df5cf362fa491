"""The software at a hospital changes while a study is under way: a yes to the old software is no yes to the new."""

import json
import logging
import sys
from collections.abc import Callable

import pytest
from flwr.app import Message

from auditor.verify import Rules, check_entries
from client.consent import Consents
from client.decide import list_studies
from shared_models.approval import sign_approval, verify_approval
from shared_models.errors import PolicyError
from shared_models.identity import load_key, public_bytes, sign
from shared_models.messages import Enrolment, TrainRequest
from shared_models.privacy.entries import GENESIS, Entry
from shared_models.software import software_digest
from tests.federation import Federation, change_policy, changed, restart
from tests.rounds.test_a_server_that_lies import Coordinator, _refused
from tests.rounds.test_a_study_that_waits import ASKED, approve, asked, command, kinds

__all__ = ["asked"]  # a fixture

OTHER, THIRD = "a" * 64, "b" * 64  # digests of other software
RULED = "hospital-1"  # a standing rule approves there


class Installed:
    """Which software is where, as far as its digest goes: in memory all hospitals share one installation.

    Attributes:
        at: Digest by hospital; the true one where it is not named.
        now: Where the code that asks is running.
    """

    def __init__(self) -> None:
        self.at: dict[str, str] = {}
        self.now = ASKED

    def digest(self) -> str:
        """What ``software_digest`` says."""
        return self.at.get(self.now, software_digest())

    def watch(
        self, federation: Federation, then: Callable[[str, Message], None] = lambda _hospital, _request: None
    ) -> None:
        """Know from every request where it is answered."""

        def arrive(hospital: str, request: Message) -> None:
            self.now = hospital
            then(hospital, request)

        federation.wire.on_request = arrive

    def upgrade(self, federation: Federation, hospital: str, software: str = OTHER) -> None:
        """Put other software in place, and restart the hospital."""
        restart(federation, hospital)
        self.at[hospital] = software


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, federation: Federation) -> Installed:
    """The same software everywhere, to begin with."""
    installed = Installed()
    for name, module in list(sys.modules.items()):
        if name.startswith(("client.", "server.")) and hasattr(module, "software_digest"):
            monkeypatch.setattr(module, "software_digest", installed.digest)
    installed.watch(federation)
    return installed


def test_a_study_under_way_waits_for_the_steward_and_goes_on_where_it_was(
    asked: Federation, installed: Installed, caplog: pytest.LogCaptureFixture
) -> None:
    """Approved, one round trained, upgraded: pending with the reason; approved again, trained; reserved once."""
    coordinator = Coordinator(asked)
    coordinator.propose(ASKED)
    approve(asked)
    coordinator.propose(ASKED)
    left = json.loads(command("budget", asked.settings_file(ASKED), "--json").output)["epsilon_left"]
    old = asked.ledger(ASKED)[-1].software_digest
    installed.upgrade(asked, ASKED)
    caplog.set_level(logging.DEBUG, "konsil")

    assert _refused(coordinator.propose(ASKED), "pending")

    assert old is not None
    assert f"was approved for software {old[:12]}, and software {OTHER[:12]} runs here" in caplog.text
    (listed,) = list_studies(asked.settings(ASKED))
    assert (listed.status, listed.by) == ("pending", "the steward: the software changed")
    shown = approve(asked)
    assert f"approved for software {old[:12]}" in " ".join(shown.split())
    assert list_studies(asked.settings(ASKED))[0].by == "the coordinator, to propose it again"

    assert isinstance(coordinator.propose(ASKED), Enrolment)

    assert kinds(asked) == ["budget-opened", "plan-approved", "plan-reapproved"]
    again = asked.ledger(ASKED)[-1]
    approval = Consents(asked.settings(ASKED).state).approved(asked.plan.study)
    assert approval is not None
    assert (again.approved_by, again.approval, again.software_digest) == ("steward", approval.signature, OTHER)
    public = public_bytes(load_key(asked.settings(ASKED).keys.identity))
    verify_approval(approval, public, study=asked.plan.study, plan_digest=asked.plan.digest())
    assert approval.software_digest == OTHER
    assert json.loads(command("budget", asked.settings_file(ASKED), "--json").output)["epsilon_left"] == left
    (kept,) = (asked.settings(ASKED).state / "studies").glob(f"*.approval.{old[:12]}.json")
    assert json.loads(kept.read_text("utf-8"))["software_digest"] == old
    assert [study.status for study in list_studies(asked.settings(ASKED))] == ["approved"]
    Consents(asked.settings(ASKED).state)._keep(asked.plan)
    with pytest.raises(PolicyError, match="is approved already"):
        approve(asked)


def test_asked_once_it_is_not_asked_again(asked: Federation, installed: Installed) -> None:
    """Restarted as the same software, also between the new approval and its entry; another upgrade asks once more."""
    coordinator = Coordinator(asked)
    coordinator.propose(ASKED)
    approve(asked)
    coordinator.propose(ASKED)
    for software in (OTHER, THIRD):
        installed.upgrade(asked, ASKED, software)
        assert _refused(coordinator.propose(ASKED), "pending")
        approve(asked)
        restart(asked, ASKED)
        assert isinstance(coordinator.propose(ASKED), Enrolment)
        restart(asked, ASKED)
        assert isinstance(coordinator.propose(ASKED), Enrolment)

    assert kinds(asked) == ["budget-opened", "plan-approved", "plan-reapproved", "plan-reapproved"]


def test_a_whole_study_goes_on_after_an_upgrade_in_the_middle(
    asked: Federation, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hospital is away while its steward is asked, the coordinator asks again, and every charge is approved for."""
    monkeypatch.setattr("server.patience.SHORTEST_PAUSE_S", 0.0)  # it is asked again in every round
    asked.plan = changed(asked.plan, rounds=5)
    for name in asked.names:
        change_policy(asked, name, maximum_rounds=6)
    upgraded: list[str] = []

    def watch(hospital: str, request: Message) -> None:
        if hospital != ASKED:
            return
        if request.metadata.message_type == "query.propose" and Consents(asked.settings(ASKED).state).waiting():
            approve(asked)
        if request.metadata.group_id == "2" and not upgraded:
            upgraded.append(hospital)
            installed.upgrade(asked, ASKED)

    installed.watch(asked, watch)

    asked.run()

    assert [event["missing"] for event in asked.events("round")] == [[], [ASKED], [ASKED], [], []]
    entries = asked.ledger(ASKED)
    software = [e.software_digest for e in entries if e.kind == "charge"]
    assert software == [software_digest()] + [OTHER] * 2
    rules = Rules()
    verified, _ = check_entries(entries, None, [], rules.follow)
    assert (verified.charges, rules.findings) == (len(software), [])


def test_a_standing_rule_asks_unless_it_says_that_it_follows(federation: Federation, installed: Installed) -> None:
    """Both kinds of rule approve a new study; only one of them approves the same study for other software."""
    rule = {"tasks": ["breast-cancer"]}
    change_policy(federation, RULED, standing_approvals=[{**rule, "upgrades": "follow"}])
    change_policy(federation, ASKED, standing_approvals=[rule])
    coordinator = Coordinator(federation)
    for name in (RULED, ASKED):
        assert isinstance(coordinator.propose(name), Enrolment)
        installed.upgrade(federation, name)

    assert isinstance(coordinator.propose(RULED), Enrolment)
    assert _refused(coordinator.propose(ASKED), "pending")

    assert kinds(federation, RULED) == ["budget-opened", "plan-approved", "plan-reapproved"]
    assert federation.ledger(RULED)[-1].approved_by == "standing-rule"
    assert kinds(federation, ASKED) == ["budget-opened", "plan-approved"]


def test_an_approval_that_names_no_software_asks_again(asked: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """Release 0.1.0 signed such ones. It still verifies; it is no yes to what is installed now."""
    Coordinator(asked).propose(ASKED)
    approve(asked)
    consents = Consents(asked.settings(ASKED).state)
    approval = consents.approved(asked.plan.study)
    assert approval is not None
    fields = {name: getattr(approval, name) for name in ("study", "plan_digest", "price", "time")}
    old = sign_approval(load_key(asked.settings(ASKED).keys.identity), **fields)
    assert b"software" not in old.payload()
    consents.approve(old)
    caplog.set_level(logging.DEBUG, "konsil")

    assert _refused(Coordinator(asked).propose(ASKED), "pending")

    assert "was approved for unknown software" in caplog.text
    assert kinds(asked) == ["budget-opened"]
    approve(asked)
    assert isinstance(Coordinator(asked).propose(ASKED), Enrolment)


def test_a_daemon_that_was_not_restarted_is_not_what_was_approved(asked: Federation, installed: Installed) -> None:
    """The steward's command runs the new software, the daemon still the old one: the yes is for the new one only."""
    coordinator = Coordinator(asked)
    coordinator.propose(ASKED)
    installed.at[ASKED] = OTHER
    approve(asked)
    del installed.at[ASKED]

    assert _refused(coordinator.propose(ASKED), "pending")

    installed.upgrade(asked, ASKED)
    assert isinstance(coordinator.propose(ASKED), Enrolment)


def test_nothing_is_charged_for_software_that_nobody_approved(federation: Federation, installed: Installed) -> None:
    """The last line, at the charge itself: a study that was enrolled before is not computed by anything else."""
    coordinator = Coordinator(federation)
    for name in federation.names:
        coordinator.propose(name)
    refusals = []

    def watch(hospital: str, request: Message) -> None:
        if hospital == RULED and request.metadata.message_type == TrainRequest.action:
            refusals.append(hospital)
            installed.at[RULED] = OTHER

    installed.watch(federation, watch)

    assert _refused(coordinator.train(), "not-enrolled")

    assert refusals == [RULED]
    assert federation.charges(RULED) == []


# What an auditor says


def _reapproved(federation: Federation, installed: Installed, **changes: object) -> list[Entry]:
    """A genuine ledger with an upgrade, a charge before and one after it; and the same with a changed entry."""
    change_policy(federation, RULED, standing_approvals=[{"tasks": ["breast-cancer"], "upgrades": "follow"}])
    coordinator = Coordinator(federation)
    for attempt in (1, 2):
        for name in federation.names:
            coordinator.propose(name)
        coordinator.train(attempt=attempt)
        installed.upgrade(federation, RULED)
    key = load_key(federation.settings(RULED).keys.identity)
    made: list[Entry] = []
    for entry in federation.ledger(RULED):
        fields = {"previous_hash": made[-1].hash if made else GENESIS}
        if entry.kind == "plan-reapproved":
            fields |= changes  # type: ignore[arg-type]
        unsigned = Entry.model_validate_json(entry.model_copy(update=fields).model_dump_json())
        signature = sign(key, "ledger-entry", unsigned.canonical).hex()
        made.append(unsigned.model_copy(update={"signature": signature}))
    return [Entry.model_validate_json(entry.model_dump_json()) for entry in made]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"software_digest": THIRD}, "by other software than was approved"),
        ({"plan_digest": "0" * 64}, "approves another plan of study"),
        ({"study": "another"}, "approves study another again, which was not approved"),
    ],
    ids=["honest", "other software", "another plan", "another study"],
)
def test_an_auditor_holds_every_charge_against_the_newest_approval(
    federation: Federation, installed: Installed, changes: dict[str, object], problem: str | None
) -> None:
    """The hospital's own key signs whatever it likes; what it did then contradicts what it says was approved."""
    entries = _reapproved(federation, installed, **changes)
    assert [e.kind for e in entries].count("plan-reapproved") == 1

    rules = Rules()

    assert check_entries(entries, None, [], rules.follow)[0].charges == 2

    if problem is None:
        assert rules.findings == []
    else:
        assert problem in rules.findings[0].what


def test_the_listing_is_one_a_script_can_read(asked: Federation, installed: Installed) -> None:
    """`studies --json` names the reason too."""
    coordinator = Coordinator(asked)
    coordinator.propose(ASKED)
    approve(asked)
    coordinator.propose(ASKED)
    installed.upgrade(asked, ASKED)
    coordinator.propose(ASKED)

    (study,) = json.loads(command("studies", asked.settings_file(ASKED), "--json").output)

    assert (study["status"], study["by"]) == ("pending", "the steward: the software changed")
