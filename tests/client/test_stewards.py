"""Logging in to the page by client certificate, over real TLS: who gets in, who does not, and what each is told."""

import ipaddress
import logging
import shutil
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

from client.cli import app
from client.consent import Consents
from client.doctor import examine
from client.expiry import expiries
from client.password import set_password
from client.settings import read_settings
from shared_models.config import read_toml
from shared_models.errors import ConfigError, FederationError, IdentityError
from tests.client.steward import PASSWORD, Steward, serving, visiting
from tests.client.test_page import HOSPITAL, PAGES, STUDY, make_waiting
from tests.federation import restart_hospitals

PASSPHRASE = "four words for anna"  # noqa: S105 - a test's
BROWSER = b"x"
FILES = {
    "certificate": "page/localhost.pem",
    "key": "page/localhost.key",
    "stewards": "page/authority.pem",
    "revoked": "page/revoked.pem",
}


def run(*arguments: object, text: str = "") -> str:
    """One of the commands, which succeeds."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def tried(*arguments: object, text: str = "") -> FederationError:
    """One of the commands, which is refused."""
    with pytest.raises(FederationError) as caught:
        CliRunner().invoke(
            app, [str(one) for one in arguments], input=text, catch_exceptions=False, standalone_mode=False
        )
    return caught.value


class House:
    """A hospital whose page has TLS, and a steward, Anna, with a certificate that its own commands made.

    Attributes:
        federation: Whose first hospital it is.
        file: Its settings.
        folder: With the page's files.
    """

    def __init__(self, folder: Path) -> None:
        self.federation = make_waiting(folder)
        restart_hospitals()
        self.file = self.federation.settings_file(HOSPITAL)
        self.folder = self.file.parent / "page"
        self.said = run("page-certificate", self.file)
        self.change(**FILES)
        self.steward("anna")

    def change(self, **files: Any) -> None:
        """Other files in ``[page.tls]``; None takes one out."""
        settings = read_toml(self.file, "settings file")
        page = dict(settings["page"])
        page["tls"] = {name: file for name, file in {**page.get("tls", {}), **files}.items() if file is not None}
        self.file.write_text(tomli_w.dumps({**settings, "page": page}), encoding="utf-8")

    def steward(self, name: str) -> None:
        """Another steward, with the commands."""
        run("page-steward", self.file, name, self.folder / f"{name}.p12", text=f"{PASSPHRASE}\n")
        self.unpack(name)

    def unpack(self, name: str) -> None:
        """What a browser does with the file that it imports."""
        packed = load_pkcs12((self.folder / f"{name}.p12").read_bytes(), PASSPHRASE.encode())
        assert packed.key is not None
        assert packed.cert is not None
        self.keep(name, packed.cert.certificate, packed.key)

    def keep(self, name: str, certificate: x509.Certificate, key: Any) -> None:
        """A certificate and its key, where ``at_the_door`` finds them."""
        encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(BROWSER))
        content = encrypted + certificate.public_bytes(Encoding.PEM)
        (self.folder / f"{name}.browser").write_bytes(content)

    def tls(self, name: str | None) -> ssl.SSLContext:
        """A browser that trusts the hospital's authority, and shows somebody's certificate."""
        context = ssl.create_default_context(cafile=str(self.folder / "authority.pem"))
        if name is not None:
            context.load_cert_chain(self.folder / f"{name}.browser", password=BROWSER)
        return context

    def make(
        self,
        name: str,
        *,
        begins: timedelta = timedelta(hours=-2),
        ends: timedelta = timedelta(days=1),
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        signer: str = "authority",
        is_authority: bool = False,
    ) -> None:
        """A certificate that no command would make; signed by the authority, by another, or by itself."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer, signing = subject, key
        if signer == "authority":
            issuer = x509.load_pem_x509_certificate((self.folder / "authority.pem").read_bytes()).subject
            found = load_pem_private_key((self.folder / "authority.key").read_bytes(), None)
            assert isinstance(found, ec.EllipticCurvePrivateKey)
            signing = found
        elif signer != "itself":
            both = (self.folder / f"{signer}.browser").read_bytes()
            issuer = x509.load_pem_x509_certificate(both).subject
            found = load_pem_private_key(both, BROWSER)
            assert isinstance(found, ec.EllipticCurvePrivateKey)
            signing = found
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .sign(signing, hashes.SHA256())
        )
        self.keep(name, made, key)


@pytest.fixture(autouse=True, scope="module")
def _cheap_passwords() -> Iterator[None]:
    """As in test_page.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.password.COST", 16)
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> House:
    """One whose files nothing changes for good."""
    return House(tmp_path_factory.mktemp("house"))


@pytest.fixture
def house(kept: House) -> Iterator[House]:
    """The same, put back afterwards."""
    before = {path: path.read_bytes() for path in [kept.file, *kept.folder.iterdir()]}
    yield kept
    for path in kept.folder.iterdir():
        path.unlink()
    for path, content in before.items():
        path.write_bytes(content)
        if path.suffix in {".key", ".p12"}:
            path.chmod(0o600)


@contextmanager
def at_the_door(house: House, name: str | None) -> Iterator[Steward]:
    """Somebody at the page, not logged in yet, whose browser shows that certificate."""
    with serving(house.file) as address, visiting(address, house.tls(name)) as steward:
        yield steward


def enter(steward: Steward) -> httpx.Response:
    """The button of the login."""
    return steward.send("/login/certificate", {})


def test_the_steward_s_certificate_opens_the_page_and_approves(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Without a password; the log says by which certificate, and the cookie travels over TLS only."""
    caplog.set_level(logging.INFO, "konsil")
    anna = x509.load_pem_x509_certificate((house.folder / "steward-anna.pem").read_bytes())
    certificate = f"certificate {anna.fingerprint(hashes.SHA256()).hex()[:16]}"
    run("page-password", house.file, "--remove")
    with at_the_door(house, "anna") as steward:
        offered = steward.get("/login").text
        before = steward.get("/")
        entered = enter(steward)
        shown = [steward.get(path).status_code for path in PAGES]
        approved = steward.approve(STUDY)
    consents = Consents(house.federation.settings(HOSPITAL).state)
    given = consents.approved(STUDY)
    (house.federation.settings(HOSPITAL).state / "studies" / f"{STUDY}.approval.json").unlink()
    set_password(house.federation.settings(HOSPITAL).state, PASSWORD)

    assert "Your browser shows the certificate of anna, valid until" in offered
    assert "Password of this page" not in offered
    assert (before.status_code, before.headers["location"]) == (303, "/login")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert {"secure", "httponly", "samesite=strict"} <= {
        part.strip().lower() for part in entered.headers["set-cookie"].split(";")
    }
    assert shown == [200] * len(PAGES)
    assert approved.status_code == 303
    assert given is not None
    assert f"a login at the page by {certificate}" in caplog.text
    assert f"study {STUDY} was approved on the page by {certificate}" in caplog.text


def test_without_a_certificate_the_password_is_still_asked_for(house: House) -> None:
    """Where there is one; and where there is none, nobody without a certificate gets in."""
    with at_the_door(house, None) as steward:
        text = steward.get("/login").text
        refused = enter(steward)
        entered = steward.log_in()
        inside = steward.get("/").status_code
    run("page-password", house.file, "--remove")
    with at_the_door(house, None) as steward:
        bare = steward.get("/login").text
        tries = [steward.log_in(password).status_code for password in ("", PASSWORD)]
    set_password(house.federation.settings(HOSPITAL).state, PASSWORD)

    assert "Your browser has shown no certificate" in text
    assert (refused.status_code, entered.status_code, inside) == (403, 303, 200)
    assert "Password of this page" in text
    assert "Password of this page" not in bare
    assert "page-password" not in bare
    assert tries == [401, 401]


@pytest.mark.parametrize(
    ("why", "sentence"),
    [
        ("expired", "It has expired."),
        ("not-yet", "It is not valid yet."),
        ("revoked", "It was revoked."),
        ("stale-list", "The list of revoked certificates has run out"),
        ("no-list", "The files by which certificates are checked cannot be read."),
        ("damaged-list", "The files by which certificates are checked cannot be read."),
        ("foreign-list", "The list of revoked certificates has run out"),
        ("taken-out", "It is of no authority, and of no steward"),
    ],
)
def test_a_certificate_that_counts_no_more_is_refused_with_a_plain_page(house: House, why: str, sentence: str) -> None:
    """TLS lets it through, because a browser that is hung up on says nothing that a steward can use."""
    name = "anna"
    match why:
        case "expired":
            house.make(name, begins=timedelta(days=-2), ends=timedelta(hours=-1))
        case "not-yet":
            house.make(name, begins=timedelta(hours=1))
    with at_the_door(house, name) as steward:
        match why:
            case "revoked":
                run("page-revoke", house.file, name)
            case "stale-list":
                write_list(house, ends=timedelta(hours=-1))
            case "no-list":
                (house.folder / "revoked.pem").unlink()
            case "damaged-list":
                (house.folder / "revoked.pem").write_text("-----BEGIN X509 CRL-----\nAAAA\n", encoding="ascii")
            case "foreign-list":
                write_list(house, ends=timedelta(days=1), key=ec.generate_private_key(ec.SECP256R1()))
            case "taken-out":
                shutil.copy(house.folder / "localhost.pem", house.folder / "authority.pem")
        shown, refused, inside = steward.get("/login"), enter(steward), steward.get("/")

    for answer in (shown, refused):
        assert sentence in answer.text
        assert "Log in with the certificate" not in answer.text
    assert (shown.status_code, refused.status_code, inside.status_code) == (200, 403, 303)
    assert "set-cookie" not in refused.headers


def write_list(house: House, *, ends: timedelta, key: ec.EllipticCurvePrivateKey | None = None) -> None:
    """An empty revocation list in the authority's name, by another key if told so."""
    authority = x509.load_pem_x509_certificate((house.folder / "authority.pem").read_bytes())
    own = load_pem_private_key((house.folder / "authority.key").read_bytes(), None)
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject)
    builder = builder.last_update(now - timedelta(days=2)).next_update(now + ends)
    made = builder.sign(key or own, hashes.SHA256())
    (house.folder / "revoked.pem").write_bytes(made.public_bytes(Encoding.PEM))


@pytest.mark.parametrize("whose", ["another authority", "itself", "another steward", "the page"])
def test_a_certificate_of_somebody_else_s_making_is_refused_by_tls(house: House, whose: str) -> None:
    """No request is answered: neither one that a steward signed, nor the page's own, which is for servers."""
    match whose:
        case "another authority":
            house.make("mallory", signer="itself", is_authority=True)
            house.make("guest", signer="mallory")
        case "itself":
            house.make("guest", signer="itself")
        case "another steward":
            house.make("guest", signer="anna")
        case "the page":
            house.make("guest", purpose=ExtendedKeyUsageOID.SERVER_AUTH)
    with at_the_door(house, "guest") as steward, pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        steward.get("/login")


def test_a_single_certificate_can_be_named_and_nobody_else_of_its_authority_gets_in(house: House) -> None:
    """For a house whose authority gives certificates to everybody: the steward's own one is named."""
    house.steward("bert")
    shutil.copy(house.folder / "steward-anna.pem", house.folder / "stewards.pem")
    house.change(stewards="page/stewards.pem", revoked=None)
    house.make("guest", signer="anna")  # a steward who is named signs for nobody

    with serving(house.file) as address:
        with visiting(address, house.tls("anna")) as steward:
            entered = enter(steward).status_code
        for name in ("bert", "guest"):
            with visiting(address, house.tls(name)) as steward, pytest.raises(httpx.TransportError):
                steward.get("/login")

    assert entered == 303


@pytest.mark.parametrize("how", ["revoked", "expired", "another browser", "another steward"])
def test_a_session_ends_with_its_certificate(house: House, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The cookie alone opens nothing: every request shows the certificate that the session began with."""
    house.steward("bert")
    with serving(house.file) as address, visiting(address, house.tls("anna")) as steward:
        assert enter(steward).status_code == 303
        assert steward.get("/").status_code == 200
        cookies, who = dict(steward.client.cookies), "anna"
        match how:
            case "revoked":
                run("page-revoke", house.file, "anna")
            case "expired":
                late = datetime.now(UTC) + timedelta(days=400)
                monkeypatch.setattr("client.stewards.datetime", SimpleNamespace(now=lambda _: late))
            case "another browser":
                who = ""
            case "another steward":
                who = "bert"
        with visiting(address, house.tls(who or None)) as other:
            other.client.cookies.update(cookies)
            ended = other.get("/").status_code

    assert ended == 303


@pytest.mark.parametrize("origin", ["", "http://SAME", "https://evil.example", "null"])
def test_a_form_from_elsewhere_does_not_use_the_certificate(house: House, origin: str) -> None:
    """A browser shows its certificate to whoever is asked, also for another site's form."""
    with at_the_door(house, "anna") as steward:
        host = steward.origin.removeprefix("https://")
        login = steward.send("/login/certificate", {}, origin=origin.replace("SAME", host))
        enter(steward)
        fields = steward.fields(f"/studies/{STUDY}", f"/studies/{STUDY}/approve")
        approved = steward.send(f"/studies/{STUDY}/approve", fields, origin=origin.replace("SAME", host))
        rebound = steward.get("/", host="evil.example")

    assert (login.status_code, approved.status_code, rebound.status_code) == (403, 403, 421)
    assert "set-cookie" not in login.headers
    assert Consents(house.federation.settings(HOSPITAL).state).approved(STUDY) is None


def test_the_page_speaks_tls_1_3_for_this_machine_only(house: House) -> None:
    """Its authority can deceive no browser about another host, and no plain request is answered."""
    authority = x509.load_pem_x509_certificate((house.folder / "authority.pem").read_bytes())
    limits = authority.extensions.get_extension_for_class(x509.NameConstraints)
    page = x509.load_pem_x509_certificate((house.folder / "localhost.pem").read_bytes())
    names = page.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    old = house.tls("anna")
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    with serving(house.file) as address:
        with visiting(address.replace("127.0.0.1", "localhost"), house.tls("anna")) as steward:
            assert enter(steward).status_code == 303
        with visiting(address, old) as steward, pytest.raises(httpx.TransportError):
            steward.get("/login")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address.replace('https', 'http')}/login", trust_env=False)

    assert limits.critical
    assert [name.value for name in limits.value.permitted_subtrees or []] == [
        "localhost",
        ipaddress.ip_network("127.0.0.0/8"),
        ipaddress.ip_network("::1/128"),
    ]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_keys_are_their_owner_s_alone_and_a_page_whose_key_is_not_does_not_start(house: House) -> None:
    """The file for the browser too; no command prints a passphrase."""
    private = [path for path in house.folder.iterdir() if path.suffix in {".key", ".p12"}]
    assert {path.name for path in private} == {"authority.key", "localhost.key", "anna.p12"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE(house.folder.stat().st_mode) == 0o700
    for line in ('certificate = "page/localhost.pem"', 'stewards = "page/authority.pem"'):
        assert line in house.said

    (house.folder / "localhost.key").chmod(0o640)
    with pytest.raises(IdentityError, match="is open to others"), serving(house.file):
        pass
    (house.folder / "localhost.key").chmod(0o600)
    (house.folder / "localhost.pem").unlink()
    with pytest.raises(IdentityError, match="TLS files cannot be used"), serving(house.file):
        pass


def test_a_renewed_certificate_has_a_new_key_and_stewards_keep_theirs(house: House) -> None:
    """It is said 30 days ahead, where all that runs out is said."""
    before = (house.folder / "localhost.key").read_bytes()

    said = run("page-certificate", house.file)

    assert (house.folder / "localhost.key").read_bytes() != before
    assert "from its next start on" in said
    with at_the_door(house, "anna") as steward:
        assert enter(steward).status_code == 303
    ends = {expiry.what for expiry in expiries(read_settings(house.file))}
    assert {"the page's TLS certificate", "the certificate of steward anna"} <= ends


def test_the_doctor_looks_at_the_page_s_files(house: House) -> None:
    """What is missing is named before a steward stands in front of it."""
    settings = read_settings(house.file)
    well = [finding for finding in examine(settings) if finding.check == "page"]
    (house.folder / "revoked.pem").unlink()
    (house.folder / "authority.key").chmod(0o644)
    ill = {finding.check: finding for finding in examine(settings) if finding.status == "fail"}

    assert [finding.status for finding in well] == ["ok", "ok"]
    assert "1 certificates say whom it lets in" in well[1].text
    assert "revoked.pem" in ill["page"].text
    assert "authority.key is open to others" in ill["permissions"].text


def test_what_cannot_be_issued_or_revoked_is_refused_with_what_to_do(house: House, tmp_path: Path) -> None:
    """A name that is none, a weak passphrase, a second certificate, an authority that is not here."""
    out, typed = tmp_path / "out.p12", f"{PASSPHRASE}\n"
    for name, text, message, hint in (
        ("../anna", typed, "is no name for a steward", "a-z"),
        ("carl", "short\n", "a passphrase of 5 characters", "At least 12"),
        ("anna", typed, "anna has a certificate", "page-revoke hospital.toml anna"),
    ):
        error = tried("page-steward", house.file, name, out, text=text)
        assert isinstance(error, ConfigError)
        assert message in str(error)
        assert hint in error.hint
    assert not out.exists()
    assert "no certificate of carl can be revoked" in str(tried("page-revoke", house.file, "carl"))
    run("page-revoke", house.file, "anna")
    run("page-steward", house.file, "anna", out, text=typed)
    house.steward("bert")
    run("page-revoke", house.file, "bert")
    (revoked,) = [x509.load_pem_x509_crl((house.folder / "revoked.pem").read_bytes())]
    assert len(revoked) == 2
    (house.folder / "authority.pem").unlink()
    error = tried("page-steward", house.file, "dora", tmp_path / "dora.p12", text=typed)
    assert "there is no authority for stewards" in str(error)


def test_the_files_come_back_from_a_backup_and_who_was_revoked_stays_out(house: House, tmp_path: Path) -> None:
    """The page's key, the authority's, the list of what was revoked, and what may have to be revoked yet."""
    house.steward("bert")
    run("page-revoke", house.file, "anna")
    run("backup", house.file, tmp_path / "backup")
    for path in house.folder.iterdir():
        if not path.name.endswith(".browser"):
            path.unlink()

    run("restore", tmp_path / "backup", house.file, "--keys-only")

    entered = {}
    for name in ("anna", "bert"):
        with at_the_door(house, name) as steward:
            entered[name] = enter(steward).status_code
    run("page-revoke", house.file, "bert")
    with at_the_door(house, "bert") as steward:
        assert enter(steward).status_code == 403
    assert entered == {"anna": 403, "bert": 303}
    assert stat.S_IMODE((house.folder / "localhost.key").stat().st_mode) == 0o600
