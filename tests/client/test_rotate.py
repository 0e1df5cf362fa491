"""Each of a hospital's keys is replaced by a new one, by the same commands that enrolled it; and what is refused."""

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509 import load_pem_x509_certificate

from auditor.audit import audit
from client.books import LEDGER, Books
from client.cli import app as hospital_app
from client.keyfiles import node_public_key, tls_key
from client.rotate import take_over, with_waiting_keys
from client.settings import Settings, read_settings
from server.cli import app as coordinator_app
from shared_models.enrolment import UnsignedRequest, key_digest, sign_request, written
from shared_models.errors import IdentityError, LedgerError, NotAMemberError, RequestError
from shared_models.identity import PASSPHRASE_FILE, load_key, public_bytes
from shared_models.privacy.ledger import Ledger, read_ledger, verify_entries
from shared_models.roster import Member, SignedRoster
from tests.client.test_enrol import ADDRESS, Consortium, run


@pytest.fixture
def joined(tmp_path: Path) -> Consortium:
    """A consortium with one hospital that has joined."""
    made = Consortium(tmp_path)
    run(coordinator_app, "init", made.centre, "--address", ADDRESS)
    made.init("north")
    enrol_again(made)
    return made


def enrol_again(consortium: Consortium) -> None:
    """Everything from the request to the pinned kit."""
    consortium.enrol("north")
    consortium.sign()
    consortium.join("north")


def settings_of(consortium: Consortium) -> Settings:
    """The hospital's settings."""
    return read_settings(consortium.hospital("north"))


def member_of(consortium: Consortium) -> Member:
    """The hospital on its pinned roster."""
    found = SignedRoster.model_validate_json(settings_of(consortium).roster.read_bytes()).member("north")
    assert found is not None
    return found


def keys_in_use(consortium: Consortium) -> dict[str, str]:
    """What the hospital's key files hold, as the roster would say it."""
    settings = settings_of(consortium)
    return {
        "identity": public_bytes(load_key(settings.keys.identity)).hex(),
        "node_key": node_public_key(settings.keys.node),
        "tls_key": key_digest(tls_key(settings.tls.key)),
    }


@pytest.mark.parametrize("which", ["identity", "node", "tls"])
def test_a_new_key_is_used_once_the_roster_names_it(joined: Consortium, which: str) -> None:
    """The old one is in use until join; afterwards the roster, the files and the certificate agree on the new one."""
    before = keys_in_use(joined)

    run(hospital_app, "rotate", joined.hospital("north"), which)
    waiting = keys_in_use(joined)
    enrol_again(joined)

    after, member = keys_in_use(joined), member_of(joined)
    assert waiting == before
    assert [name for name in before if before[name] != after[name]] == [
        which if which == "identity" else f"{which}_key"
    ]
    assert after == {name: getattr(member, name) for name in after}
    certificate = load_pem_x509_certificate(settings_of(joined).tls.certificate.read_bytes())
    assert certificate.public_key() == tls_key(settings_of(joined).tls.key)
    files = list((joined.folder / "north" / "keys").iterdir())
    assert not [file for file in files if file.name.endswith(".next")]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files if file.suffix == ".key"} == {0o600}
    assert json.loads(run(hospital_app, "status", joined.hospital("north"), "--json").output)["roster_version"] == 2


def test_the_ledger_goes_on_under_the_new_identity(joined: Consortium, tmp_path: Path) -> None:
    """Its chain holds under the first key that anybody knows of it; the evidence, under the newest."""
    settings, first = settings_of(joined), bytes.fromhex(member_of(joined).identity)
    run(hospital_app, "rotate", joined.hospital("north"), "identity")
    enrol_again(joined)

    Books.open(settings).close()
    entries = read_ledger(settings.state / LEDGER)
    verify_entries(entries, first)
    assert [entry.kind for entry in entries] == ["budget-opened", "key-rotated"]
    bundle = tmp_path / "evidence.zip"
    run(hospital_app, "ledger", "export", joined.hospital("north"), bundle)
    found = audit([bundle], keys=[bytes.fromhex(member_of(joined).identity)])
    assert [key.entry for key in found.hospitals[0].keys] == [1, 2]
    assert found.passed


def test_all_keys_can_be_replaced_at_once(joined: Consortium) -> None:
    """One request for all that wait; asking twice makes no second key."""
    before = keys_in_use(joined)
    for which in ("identity", "node", "tls", "node"):
        run(hospital_app, "rotate", joined.hospital("north"), which)
    enrol_again(joined)

    after = keys_in_use(joined)
    assert not [name for name in before if before[name] == after[name]]


def test_a_hand_over_that_was_cut_off_is_finished_by_the_next_join(joined: Consortium) -> None:
    """Between the ledger's new key and the key file's new name, both keys are there."""
    run(hospital_app, "rotate", joined.hospital("north"), "identity")
    joined.enrol("north")
    joined.sign()
    settings = settings_of(joined)
    with Ledger.open(settings.state / LEDGER, load_key(settings.keys.identity)) as ledger:
        ledger.rotate(load_key(with_waiting_keys(settings).keys.identity))  # and then the power went

    joined.join("north")

    Books.open(settings).close()
    assert keys_in_use(joined)["identity"] == member_of(joined).identity
    take_over(settings, with_waiting_keys(settings))  # nothing waits: nothing to do


def test_the_ledger_is_not_handed_over_beside_a_daemon(joined: Consortium) -> None:
    """Join says what to stop; afterwards the same kit does it."""
    run(hospital_app, "rotate", joined.hospital("north"), "identity")
    joined.enrol("north")
    joined.sign()
    books = Books.open(settings_of(joined))
    try:
        with pytest.raises(LedgerError, match="in use by another process"):
            joined.join("north")
    finally:
        books.close()

    joined.join("north")
    assert keys_in_use(joined)["identity"] == member_of(joined).identity


def test_a_stranger_cannot_ask_for_other_keys(joined: Consortium) -> None:
    """Neither with an identity of its own, nor with the old request's figures changed."""
    member, stranger = member_of(joined), Ed25519PrivateKey.generate()
    request = _asking(joined, identity=public_bytes(stranger).hex())
    joined.request("north").write_bytes(written(sign_request(stranger, request, before=stranger)))

    with pytest.raises(RequestError, match="its identity key did not sign this request"):
        joined.enrol("north")
    assert member_of(joined) == member


def test_a_member_cannot_change_its_size_or_ledger_by_a_rotation(joined: Consortium) -> None:
    """Both were fixed when its budget was opened."""
    own = load_key(settings_of(joined).keys.identity)
    for change in ({"public_size": 10}, {"ledger_genesis": "0" * 64}):
        request = sign_request(own, _asking(joined, **change), before=own)
        joined.request("north").write_bytes(written(request))
        with pytest.raises(RequestError, match="another ledger or public size"):
            joined.enrol("north")


def test_who_was_revoked_cannot_come_back_by_new_keys(joined: Consortium) -> None:
    """The name is used up."""
    run(hospital_app, "rotate", joined.hospital("north"), "identity")
    run(coordinator_app, "revoke", "north", "--settings", joined.settings)

    with pytest.raises(RequestError, match="north was revoked"):
        joined.enrol("north")


def test_the_replaced_key_is_worth_nothing(joined: Consortium) -> None:
    """A thief of the old identity file is not the hospital any more, not even at its own disk."""
    stolen = settings_of(joined).keys.identity.read_bytes()
    run(hospital_app, "rotate", joined.hospital("north"), "identity")
    enrol_again(joined)

    settings_of(joined).keys.identity.write_bytes(stolen)

    with pytest.raises(LedgerError, match="rotated"):
        Books.open(settings_of(joined))
    with pytest.raises(NotAMemberError, match="other keys than its own"):
        run(hospital_app, "status", joined.hospital("north"))


def test_a_passphrase_encrypts_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file of mode 0600; without it, or with another, the key opens nothing."""
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery staple\n", encoding="utf-8")
    secret.chmod(0o600)
    monkeypatch.setenv(PASSPHRASE_FILE, str(secret))
    made = Consortium(tmp_path)
    run(coordinator_app, "init", made.centre, "--address", ADDRESS)
    made.init("north")
    enrol_again(made)

    key = settings_of(made).keys.identity
    assert key.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert (made.centre / "root" / "root.key").read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    secret.write_text("another\n", encoding="utf-8")
    with pytest.raises(IdentityError, match="another passphrase"):
        load_key(key)
    secret.chmod(0o644)
    with pytest.raises(IdentityError, match="open to others"):
        load_key(key)
    secret.unlink()
    with pytest.raises(IdentityError, match="cannot be read"):
        load_key(key)
    monkeypatch.delenv(PASSPHRASE_FILE)
    with pytest.raises(IdentityError, match="another passphrase"):
        load_key(key)


def _asking(consortium: Consortium, **changes: object) -> UnsignedRequest:
    """The hospital's own request with some fields changed, not signed yet."""
    fields = json.loads(consortium.request("north").read_bytes())
    kept = {name: value for name, value in fields.items() if not name.startswith("signature")}
    return UnsignedRequest.model_validate({**kept, **changes})
