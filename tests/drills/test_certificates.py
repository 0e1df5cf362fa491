"""Certificates run out, are warned of, renewed and replaced; hospitals stay connected as far as that is possible."""

import json
import logging
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.books import Books
from client.expiry import Reminder
from client.settings import read_settings as read_hospital
from server.cli import app as coordinator_app
from server.coordinator import coordinating
from server.expiry import expiries, reminding
from server.pki import Authority
from server.renew import _hosts, _public
from server.settings import Settings
from server.settings import read_settings as read_coordinator
from shared_models.certificates import Expiry
from shared_models.enrolment import key_digest
from shared_models.errors import IdentityError
from tests.client.test_enrol import Consortium, run
from tests.drills.consortium import connects, found, read, say, serving
from tests.link import Keys


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """Two hospitals that have joined."""
    return found(tmp_path, "north", "south")


def coordinator(consortium: Consortium) -> Settings:
    """The coordinator's settings."""
    return read_coordinator(consortium.settings)


def key_of(path: Path) -> str:
    """Digest of the key that a certificate is for."""
    return key_digest(_public(path))


def short_lived(keys: Keys, days: int) -> None:
    """Give the hospital and the coordinator certificates that end soon."""
    authority = Authority(keys.folder / "short", valid_for=timedelta(days=days))
    keys.authority.certificate.write_bytes(authority.certificate.read_bytes())
    keys.coordinator_certificate(authority)
    keys.hospital_certificate("north", authority)


@pytest.mark.parametrize(("days", "warned"), [(29, True), (32, False)])
def test_everybody_is_told_thirty_days_ahead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: int, warned: bool
) -> None:
    """Status, the daemon's log and the coordinator's log say the day and what to do; before that they are silent."""
    keys = Keys(tmp_path)
    short_lived(keys, days)
    Books.open(keys.hospital("north")).close()

    with caplog.at_level(logging.WARNING):
        reminder = Reminder(keys.hospital("north"))
        reminder.remind()
        reminder.remind()
        with reminding(keys.coordinator()):
            pass
    status = say("konsil-hospital", "status", keys.hospital_file("north"))

    told = [record.getMessage() for record in caplog.records]
    assert sum("this hospital's TLS certificate expires on" in line for line in told) == warned
    assert sum("the coordinator's certificate expires on" in line for line in told) == warned
    assert (("warning" in status.text) and ("konsil-hospital rotate hospital.toml tls" in status.text)) == warned
    assert read(status.text, "this hospital's TLS certificate expires on") == warned
    assert status.code == 0
    assert "expires" in status.text


def test_daemon_and_coordinator_begin_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not only where somebody asks: both say it in their own logs when they start."""
    keys = Keys(tmp_path)
    short_lived(keys, 29)

    with caplog.at_level(logging.WARNING), keys.connected("north", lambda *_: pytest.fail("nobody asks")):
        with coordinating(keys.coordinator()):
            pass
        deadline = time.monotonic() + 20
        while "this hospital's TLS certificate" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)

    assert "this hospital's TLS certificate expires on" in caplog.text
    assert "the coordinator's certificate expires on" in caplog.text


def test_a_moment_is_soon_or_over_at_its_very_edge() -> None:
    """Thirty days before is soon; the moment itself is over, as TLS has it."""
    until = datetime(2027, 1, 31, tzinfo=UTC)
    expiry = Expiry("north", "a certificate", until, "Renew it.")

    assert expiry.soon(until - timedelta(days=30))
    assert not expiry.soon(until - timedelta(days=30, seconds=1))
    assert expiry.over(until)
    assert not expiry.over(until - timedelta(seconds=1))


def test_the_coordinator_knows_everybodys_last_day(consortium: Consortium) -> None:
    """Its own, the authority's, and each hospital's; a hospital that was revoked is not waited for."""
    run(coordinator_app, "revoke", "south", "--settings", consortium.settings)
    consortium.sign()

    assert [expiry.holder for expiry in expiries(coordinator(consortium))] == [
        "coordinator",
        "authority",
        "hospital:north",
    ]


def test_people_are_warned_of_too_until_they_are_withdrawn(consortium: Consortium) -> None:
    """An operator whose certificate ended cannot submit, and nobody else would know why; the kept copy withdraws it."""
    options = ("--role", "operator", "--settings", consortium.settings, "--folder", consortium.folder / "anna")
    issued = say("konsil-coordinator", "issue", "anna", *options, "--days", 20)
    shown = say("konsil-coordinator", "roster", "--settings", consortium.settings)
    holders = [expiry.holder for expiry in expiries(coordinator(consortium))]
    kept = consortium.centre / "issued" / "operator-anna.pem"
    withdrawn = say("konsil-coordinator", "withdraw", kept, "--settings", consortium.settings)

    assert issued.code == withdrawn.code == 0, issued.text + withdrawn.text
    assert "warning: the certificate of operator anna expires on" in shown.text
    assert "konsil-coordinator issue anna --role operator again" in shown.text
    assert holders[-1] == "operator:anna"
    assert "operator:anna" not in [expiry.holder for expiry in expiries(coordinator(consortium))]
    assert "PRIVATE" not in kept.read_text("ascii")


@pytest.mark.parametrize("options", [(), ("--new-key",), ("--host", "127.0.0.1", "--host", "elsewhere.example.org")])
def test_the_coordinators_own_certificate_is_renewed_by_one_command(
    consortium: Consortium, options: tuple[str, ...]
) -> None:
    """Hospitals trust the new one as it is: they have pinned the authority."""
    tls = coordinator(consortium).tls
    before = key_of(tls.certificate)

    said = say("konsil-coordinator", "renew", "certificate", "--settings", consortium.settings, *options)

    assert said.code == 0, said.text
    assert read(said.text, "restart the coordinator")
    assert (key_of(tls.certificate) == before) == ("--new-key" not in options)
    assert tls.key.stat().st_mode & 0o777 == 0o600
    assert ("elsewhere.example.org" in _hosts(tls.certificate)) == ("--host" in options)
    with serving(consortium):
        connects(consortium, "north")


def test_nothing_is_issued_by_an_authority_that_has_expired(consortium: Consortium) -> None:
    """A certificate that outlives its authority is worth nothing; the authority itself can still be renewed."""
    tls = coordinator(consortium).tls
    tls.ca.write_bytes(Authority(consortium.folder / "old", valid_for=timedelta(minutes=30)).certificate.read_bytes())

    said = say("konsil-coordinator", "renew", "certificate", "--settings", consortium.settings)
    again = say("konsil-coordinator", "renew", "authority", "--settings", consortium.settings)

    assert said.code == 1
    assert "renew authority" in said.last_words[1]
    assert again.code == 0, again.text


def test_a_renewed_authority_is_taken_over_one_hospital_after_the_other(consortium: Consortium) -> None:
    """Who has joined the new kit connects, and who has not yet, too; the root key has signed which authority it is."""
    say("konsil-coordinator", "renew", "authority", "--settings", consortium.settings)
    old = coordinator(consortium).tls.ca.read_bytes()
    with serving(consortium):
        connects(consortium, "north")  # nothing has changed yet
    consortium.sign()
    consortium.join("north")

    assert coordinator(consortium).tls.ca.read_bytes() != old
    assert read_hospital(consortium.hospital("north")).tls.ca.read_bytes() != old
    assert read_hospital(consortium.hospital("south")).tls.ca.read_bytes() == old
    with serving(consortium):
        connects(consortium, "north")
        connects(consortium, "south")


def test_an_authority_whose_key_is_known_is_replaced_on_one_day(consortium: Consortium) -> None:
    """Everything is issued anew; who has not joined yet is told why there is no connection, and then connects."""
    say("konsil-coordinator", "renew", "authority", "--new-key", "--settings", consortium.settings)
    consortium.sign()
    consortium.join("north")

    with serving(consortium):
        connects(consortium, "north")
        with pytest.raises(IdentityError) as refused:
            connects(consortium, "south")
        assert read(str(refused.value), "the coordinator's certificate is not trusted")
        consortium.join("south")
        connects(consortium, "south")
    authority_key = coordinator(consortium).tls.authority_key
    assert authority_key is not None
    assert authority_key.stat().st_mode & 0o777 == 0o600
    consortium.init("east")
    consortium.enrol("east")  # by the new authority
    consortium.sign()
    consortium.join("east")


def test_an_authority_that_the_root_key_did_not_sign_is_not_used(consortium: Consortium) -> None:
    """Whoever has the coordinator's machine alone cannot give hospitals another authority."""
    say("konsil-coordinator", "renew", "authority", "--new-key", "--settings", consortium.settings)
    old = coordinator(consortium).tls.ca.read_bytes()

    said = say("konsil-coordinator", "kits", "--settings", consortium.settings)

    assert said.code == 0
    assert coordinator(consortium).tls.ca.read_bytes() == old
    consortium.join("north")


def test_the_coordinators_doctor_says_what_waits(consortium: Consortium) -> None:
    """The root key that should be elsewhere, a roster that waits for its signature, a certificate that does not fit."""
    healthy = say("konsil-coordinator", "doctor", "--settings", consortium.settings)
    run(coordinator_app, "revoke", "south", "--settings", consortium.settings)
    (consortium.centre / "tls.key").chmod(0o644)
    sick = say("konsil-coordinator", "doctor", "--settings", consortium.settings, "--json")

    assert healthy.code == 0, healthy.text
    assert "the consortium's root key is here" in healthy.text
    assert sick.code == 1
    found = {(f["check"], f["status"]): f["text"] for f in json.loads(sick.text)}
    assert "version 2 waits to be signed" in found["roster", "warn"]
    assert "tls.key is open to others" in found["permissions", "fail"]


def test_the_doctor_keeps_the_databases_password(consortium: Consortium) -> None:
    """What cannot be reached is named by its kind alone."""
    url = "postgresql+psycopg://konsil:hunter2@127.0.0.1:9/konsil"
    text = consortium.settings.read_text("utf-8")
    consortium.settings.write_text(f'database = "{url}"\n{text}', encoding="utf-8")

    said = say("konsil-coordinator", "doctor", "--settings", consortium.settings)

    assert said.code == 1
    assert "fail  database      cannot be read" in said.text
    assert "hunter2" not in said.text
