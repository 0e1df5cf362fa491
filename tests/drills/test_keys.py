"""Keys are rotated, revoked, lost, outlived; the root key is replaced. What each side sees, and that budgets stay."""

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from auditor.audit import audit
from client.books import LEDGER, Books
from client.cli import app as hospital_app
from client.records.population import Source
from client.registry import check_records, open_registry
from client.settings import Settings
from client.settings import read_settings as read_hospital
from server.cli import app as coordinator_app
from server.examples import write_example
from server.pki import Authority
from server.settings import read_settings as read_coordinator
from shared_models.enrolment import read_request
from shared_models.errors import ConfigError, IdentityError, PopulationError, RequestError
from shared_models.identity import fingerprint
from shared_models.privacy.ledger import read_ledger
from shared_models.tasks import find_task
from tests.client.test_enrol import Consortium, run
from tests.drills.consortium import connects, found, read, say, serving


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """Two hospitals that have joined."""
    return found(tmp_path, "north", "south")


def hospital(consortium: Consortium, name: str = "north") -> Settings:
    """A hospital's settings."""
    return read_hospital(consortium.hospital(name))


def expired(consortium: Consortium) -> None:
    """North's certificate ran out half an hour ago."""
    tls = read_coordinator(consortium.settings).tls
    assert tls.authority_key is not None
    old = Authority.load(tls.ca, tls.authority_key, valid_for=timedelta(minutes=30))
    request = read_request(consortium.request("north").read_bytes())
    hospital(consortium).tls.certificate.write_bytes(old.certify(request.tls_key(), "north"))


def test_an_expired_certificate_is_said_at_the_start_and_renewed_by_a_rotation(consortium: Consortium) -> None:
    """Two lines, the dates and the command; the same steps as at enrolment, and the ledger stays."""
    expired(consortium)
    entries = read_ledger(hospital(consortium).state / LEDGER)

    with serving(consortium):
        start = say("konsil-hospital", "start", consortium.hospital("north"))
    status = say("konsil-hospital", "status", consortium.hospital("north"))
    rotated = say("konsil-hospital", "rotate", consortium.hospital("north"), "tls")
    consortium.enrol("north")
    consortium.sign()
    consortium.join("north")

    assert start.code == 1
    error, hint = start.last_words
    assert "is valid from" in error
    assert read(error, "UTC, not now")
    assert "konsil-hospital rotate hospital.toml tls" in hint
    assert read(status.text, "this hospital's TLS certificate expired on")
    assert rotated.code == 0, rotated.text
    with serving(consortium):
        connects(consortium, "north")
    assert read_ledger(hospital(consortium).state / LEDGER) == entries


def test_a_membership_that_ran_out_is_renewed_in_the_same_way(consortium: Consortium) -> None:
    """A member no more is told since when; the request is taken because its old key signed it."""

    def end(roster: dict[str, Any]) -> None:
        roster["version"] += 1
        (north,) = [member for member in roster["members"] if member["name"] == "north"]
        north.update(valid_from=north["valid_from"] - 7200, valid_until=int(time.time()) - 60)

    ended = json.dumps(consortium.signed_with(end))
    for roster in (consortium.centre / "roster.json", hospital(consortium).roster):
        roster.write_text(ended, encoding="utf-8")

    status = say("konsil-hospital", "status", consortium.hospital("north"))
    with serving(consortium), pytest.raises(IdentityError, match="does not accept this hospital's node key"):
        connects(consortium, "north")
    run(hospital_app, "rotate", consortium.hospital("north"), "tls")
    consortium.enrol("north")
    consortium.sign()
    consortium.join("north")

    assert status.code == 1
    assert "north is a member from" in status.last_words[0]
    assert "konsil-hospital rotate hospital.toml tls" in status.last_words[1]
    with serving(consortium):
        connects(consortium, "north")


@pytest.mark.parametrize("which", ["node", "tls"])
def test_a_rotated_key_connects_and_the_old_one_no_more(consortium: Consortium, which: str) -> None:
    """Until the kit is joined the old key does; afterwards a thief of the old one gets nowhere."""
    thief = consortium.folder / "thief"
    run(hospital_app, "rotate", consortium.hospital("north"), which)
    with serving(consortium):
        connects(consortium, "north")
    shutil.copytree(consortium.folder / "north", thief)
    consortium.enrol("north")
    consortium.sign()
    consortium.join("north")

    with serving(consortium):
        connects(consortium, "north")
        with pytest.raises(IdentityError) as refused:
            connects(consortium, "thief")
    assert read(str(refused.value), "does not accept this hospital's node key")


def test_a_revoked_hospital_is_refused_and_the_others_are_told(consortium: Consortium) -> None:
    """Its connection says why; it gets no kit; its name is used up; and the roster shows it."""
    revoked = say("konsil-coordinator", "revoke", "north", "--settings", consortium.settings)
    consortium.kit("north").unlink()
    consortium.sign()
    consortium.join("south")

    assert "staged: roster version 2 without north; now sign it" in revoked.text
    with serving(consortium):
        with pytest.raises(IdentityError, match="does not accept this hospital's node key") as refused:
            connects(consortium, "north")
        connects(consortium, "south")
    assert read(refused.value.hint, "was revoked: call the coordinator")
    assert not consortium.kit("north").exists()
    assert "revoked" in say("konsil-coordinator", "roster", "--settings", consortium.settings).text
    assert json.loads(run(hospital_app, "status", consortium.hospital("south"), "--json").output)["members"] == [
        "south"
    ]
    with pytest.raises(RequestError, match="north was revoked"):
        consortium.enrol("north")


def used(consortium: Consortium, name: str) -> None:
    """Put records at a hospital, and note in its registry that a study used their patients."""
    example = write_example("breast-cancer", consortium.folder / "data", hospitals=3, seed=0)
    settings = hospital(consortium, name)
    shutil.copytree(example.hospitals[0].folder, settings.records)
    books = Books.open(settings)
    population = Source(find_task("breast-cancer")).current(settings)
    open_registry(settings, books).claim(population.members, has_spent=False)
    books.close()


def test_a_lost_key_ends_the_ledger_and_nobody_gets_a_second_budget(consortium: Consortium) -> None:
    """Revoke, enrol anew under another name with the same registry: patients of before stay refused."""
    used(consortium, "north")
    settings, home = hospital(consortium), consortium.folder / "north-2"
    settings.keys.identity.unlink()
    lost = say("konsil-hospital", "budget", consortium.hospital("north"))
    run(coordinator_app, "revoke", "north", "--settings", consortium.settings)
    figures = ("--public-size", 50, "--epsilon", 2, "--delta", 0.0005, "--order", 8)
    options = ("--name", "north-2", "--coordinator", consortium.address, *figures)
    again = say("konsil-hospital", "init", home, *options, "--registry", settings.registry_folder)
    consortium.enrol("north-2")
    consortium.sign()
    consortium.join("north-2")
    shutil.copytree(settings.records, home / "records")

    refused = say("konsil-hospital", "check-data", consortium.hospital("north-2"))

    assert lost.code == 1
    assert read(lost.last_words[0], "identity.key cannot be read")
    assert again.code == 0, again.text
    assert refused.code == 1
    error, hint = refused.last_words
    assert read(error, "a patient has one budget, however often the records are exported")
    assert "opt_out" in hint
    text = (
        consortium.hospital("north-2")
        .read_text("utf-8")
        .replace('device = "auto"', 'device = "cpu"\nopt_out = "used.txt"')
    )
    consortium.hospital("north-2").write_text(text, encoding="utf-8")
    ids = [line.split(",")[0] for line in (home / "records" / "data.csv").read_text("utf-8").splitlines()[1:]]
    (home / "used.txt").write_text("\n".join(ids[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(PopulationError, match="hold patients whom the budget"):
        check_records(hospital(consortium, "north-2"))  # one of before is left
    (home / "used.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    check_records(hospital(consortium, "north-2"))
    with serving(consortium):
        connects(consortium, "north-2")


def test_a_registry_that_is_none_is_refused_before_anything_is_made(consortium: Consortium) -> None:
    """A new, empty one would let every patient in again."""
    options = ("--name", "west", "--coordinator", consortium.address, "--public-size", 50, "--epsilon", 2)
    more = ("--delta", 0.0005, "--order", 8, "--registry", consortium.folder / "nothing")

    with pytest.raises(ConfigError, match="is no registry"):
        run(hospital_app, "init", consortium.folder / "west", *options, *more)

    assert not (consortium.folder / "west").exists()


def test_a_consortium_moves_to_another_root_key_and_ledgers_go_on(consortium: Consortium) -> None:
    """The telephone again, for each hospital; its ledger, budget and name are what they were."""
    old_state = hospital(consortium).state
    entries = read_ledger(old_state / LEDGER)
    moved = Consortium(consortium.folder / "moved", consortium.address)
    run(coordinator_app, "init", moved.centre, "--address", consortium.address)
    root = fingerprint(bytes.fromhex((moved.centre / "root.pub").read_text("ascii")))
    run(hospital_app, "rotate", consortium.hospital("north"), "tls")
    shutil.copytree(consortium.folder / "north", consortium.folder / "moved" / "north")
    moved.enrol("north")
    moved.sign()

    plain = say("konsil-hospital", "join", consortium.hospital("north"), moved.kit("north"), "--root-fingerprint", root)
    wrong = say(
        "konsil-hospital",
        "join",
        consortium.hospital("north"),
        moved.kit("north"),
        "--new-root",
        "--root-fingerprint",
        "0" * 64,
    )
    options = ("--new-root", "--root-fingerprint", root)
    joined = say("konsil-hospital", "join", consortium.hospital("north"), moved.kit("north"), *options)

    assert read(plain.last_words[0], "another root key than the one this hospital pinned")
    assert "join --new-root" in plain.last_words[1]
    assert "was not confirmed; nothing was changed" in wrong.last_words[0]
    assert joined.code == 0, joined.text
    assert read_ledger(old_state / LEDGER) == entries
    assert len(list(old_state.glob("rosters-of-*"))) == 1
    with serving(moved):
        connects(consortium, "north")
    bundle = consortium.folder / "north.evidence"
    run(hospital_app, "ledger", "export", consortium.hospital("north"), bundle)
    found_by_auditor = audit([bundle], root=bytes.fromhex((moved.centre / "root.pub").read_text("ascii")))
    assert found_by_auditor.passed
    back = say("konsil-hospital", "join", consortium.hospital("north"), consortium.kit("north"))
    assert "another root key" in back.last_words[0]
