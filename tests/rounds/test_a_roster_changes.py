"""The roster while a federation lives: whatever is not the consortium's newest word stops a hospital, with a reason."""

import json
from pathlib import Path

import pytest

from auditor.audit import audit
from client.bundle import export
from client.membership import PIN, Membership
from server.trial import trial_root
from shared_models.errors import (
    ForeignRosterError,
    GenesisError,
    NotAMemberError,
    OlderRosterError,
    RosterError,
    RosterSignatureError,
)
from shared_models.identity import public_bytes
from shared_models.messages import Enrolment, Proposal, read_reply, request
from tests.federation import Federation, make_federation, restart

HOSPITAL = "hospital-1"


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Three hospitals with roster version 1."""
    return make_federation(tmp_path, hospitals=3, rounds=2)


def propose(federation: Federation, hospital: str = HOSPITAL) -> str:
    """Propose the plan; "approved", or the code of the refusal."""
    message = request(Proposal(plan=federation.plan.model_dump(mode="json")), None, node_id=100, group_id="1", ttl_s=60)
    answer = federation.wire.deliver(hospital, message)
    assert answer is not None
    body = read_reply(answer)[0]
    return "approved" if isinstance(body, Enrolment) else str(getattr(body, "code", body))


def test_a_new_roster_counts_from_the_next_message_and_the_old_one_never_again(federation: Federation) -> None:
    """A revocation reaches a running hospital; putting the old file back is refused, also after a restart."""
    settings = federation.settings(HOSPITAL)
    old = settings.roster.read_bytes()
    assert propose(federation) == "approved"

    federation.sign_roster(version=2, revoked=["hospital-3"])
    assert propose(federation) == "approved"
    assert propose(federation, "hospital-3") == "not-a-member"
    settings.roster.write_bytes(old)

    assert propose(federation) == "roster-older"
    restart(federation, HOSPITAL)
    with pytest.raises(OlderRosterError, match="version 1 is older than version 2"):
        Membership(settings)


def test_an_unsigned_roster_stops_a_running_hospital_until_it_is_mended(federation: Federation) -> None:
    """What was pinned before is not used in its place."""
    settings = federation.settings(HOSPITAL)
    good = settings.roster.read_bytes()
    assert propose(federation) == "approved"
    settings.roster.write_text(json.dumps({**json.loads(good), "signature": ""}), encoding="utf-8")

    assert propose(federation) == "roster-signature"
    with pytest.raises(RosterSignatureError, match="is not signed"):
        Membership(settings)

    settings.roster.write_bytes(good)
    assert propose(federation) == "approved"


def test_a_roster_that_is_gone_permits_nothing(federation: Federation) -> None:
    """A missing file is no answer."""
    federation.settings(HOSPITAL).roster.unlink()

    with pytest.raises(RosterError, match="cannot be read"):
        Membership(federation.settings(HOSPITAL))


def test_another_consortiums_roster_is_refused(federation: Federation) -> None:
    """Signed in due form, by somebody else."""
    settings = federation.settings(HOSPITAL)
    settings.keys.root.write_text(public_bytes(trial_root(federation.folder / "other")).hex(), encoding="ascii")

    with pytest.raises(ForeignRosterError, match="another root key"):
        Membership(settings)


def test_a_hospital_that_was_revoked_still_shows_its_evidence(federation: Federation, tmp_path: Path) -> None:
    """What it spent does not go away with it; the auditor is told that it was turned out."""
    study = federation.run()
    federation.sign_roster(version=2, revoked=[HOSPITAL])
    restart(federation, HOSPITAL)
    bundles = [tmp_path / f"{name}.evidence" for name in federation.names]

    for name, bundle in zip(federation.names, bundles, strict=True):
        export(federation.settings(name), bundle)

    found = audit([*bundles, study], root=public_bytes(trial_root(federation.folder / "root")))
    assert found.passed, found.findings
    assert (HOSPITAL, "revoked") in {(finding.party, finding.code) for finding in found.findings}


def test_a_hospital_that_was_revoked_knows_it(federation: Federation) -> None:
    """It does not start, and says since which version."""
    federation.sign_roster(version=2, revoked=[HOSPITAL])

    with pytest.raises(NotAMemberError, match="was revoked in roster version 2"):
        Membership(federation.settings(HOSPITAL)).now()


def test_a_hospital_with_another_key_than_the_rosters_does_not_start(federation: Federation) -> None:
    """A roster on which somebody exchanged a key is noticed by whose key it is."""
    settings, other = federation.settings(HOSPITAL), federation.settings("hospital-2")
    swapped = settings.model_copy(update={"keys": other.keys.model_copy(update={"root": settings.keys.root})})

    with pytest.raises(NotAMemberError, match="other keys than its own"):
        Membership(swapped).now()


def test_a_ledger_that_begins_otherwise_than_the_roster_says_is_refused(federation: Federation) -> None:
    """A budget cannot be started anew: the first entry's hash is on the roster."""
    settings = federation.settings(HOSPITAL)
    federation.sign_roster(version=2, genesis={HOSPITAL: "a" * 64})

    membership = Membership(settings)
    membership.check_genesis("a" * 64)
    with pytest.raises(GenesisError, match="begins with bbbb"):
        membership.check_genesis("b" * 64)
    assert propose(federation) == "genesis"


def test_a_damaged_pin_is_not_guessed(federation: Federation) -> None:
    """Without it, an old roster would pass for new."""
    settings = federation.settings(HOSPITAL)
    Membership(settings)
    (settings.state / PIN).write_text("{", encoding="ascii")

    with pytest.raises(RosterError, match="is damaged"):
        Membership(settings)
