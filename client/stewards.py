"""Which client certificates open the hospital's page; and the hospital's own small authority, which makes them.

The authority can sign for this machine's loopback and for stewards, and for no other host: a browser that trusts it
can be deceived about nothing else.
"""

import fcntl
import hashlib
import hmac
import ipaddress
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.keyfiles import create_new, create_tls_key, load_tls_key
from client.settings import PageTls
from client.tls import issued_by
from shared_models.certificates import key_usage
from shared_models.durable import create_file, replace_file
from shared_models.errors import ConfigError, IdentityError

FOLDER = "page"  # beside hospital.toml
AUTHORITY, PAGE, REVOKED = "authority", "localhost", "revoked.pem"
TEN_YEARS, PAGE_DAYS = timedelta(days=3652), timedelta(days=824)  # browsers take no server's certificate for longer
SHORTEST = 12  # characters of the passphrase of a steward's file
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
_LOOPBACK = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)
_ONLY_HERE = x509.NameConstraints(
    permitted_subtrees=[
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_network("127.0.0.0/8")),
        x509.IPAddress(ipaddress.ip_network("::1/128")),
    ],
    excluded_subtrees=None,
)

Problem = Literal["", "foreign", "not-yet", "expired", "revoked", "stale-list", "unreadable"]


class Shown(NamedTuple):
    """A client certificate that a browser showed, whose key it has.

    Attributes:
        proof: SHA-256 of it.
        name: Whose it says it is; the part for people.
        until: When it ends, Unix time.
        problem: Why it opens nothing; empty where it opens the page.
    """

    proof: bytes
    name: str
    until: float
    problem: Problem


def look_at(certificate: bytes, files: PageTls) -> Shown:
    """Whether a certificate opens the page now; the files are read anew, so that a revocation holds at once.

    Args:
        certificate: DER, of a TLS connection whose other side has proven that it has the key.
        files: The page's.
    """
    proof = hashlib.sha256(certificate).digest()
    try:
        found = x509.load_der_x509_certificate(certificate)
        until = found.not_valid_after_utc.timestamp()
        return Shown(proof, _common_name(found), until, _problem(found, files, datetime.now(UTC)))
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension):  # what OpenSSL has let through
        return Shown(proof, "?", 0.0, "foreign")


def _problem(found: x509.Certificate, files: PageTls, now: datetime) -> Problem:
    try:
        accepted = x509.load_pem_x509_certificates(files.stewards.read_bytes())
        lists = [] if files.revoked is None else _lists(files.revoked)
    except (OSError, ValueError):
        return "unreadable"
    fingerprint = found.fingerprint(hashes.SHA256())
    own = any(hmac.compare_digest(fingerprint, one.fingerprint(hashes.SHA256())) for one in accepted)
    issuers = [one for one in accepted if _signs(one) and issued_by(one, found)]
    if not (own or issuers) or not _for_clients(found):
        return "foreign"
    if not found.not_valid_before_utc <= now:
        return "not-yet"
    if not now < found.not_valid_after_utc:
        return "expired"
    revoked = (_revoked(found, issuer, lists, now) for issuer in issuers if files.revoked is not None)
    return next((problem for problem in revoked if problem), "")


def _revoked(
    found: x509.Certificate, issuer: x509.Certificate, lists: list[x509.CertificateRevocationList], now: datetime
) -> Problem:
    """What the issuer's lists say; one that has run out, or is not there, lets nobody in."""
    theirs = [one for one in lists if one.issuer == issuer.subject and one.is_signature_valid(_key_of(issuer))]
    if any(one.get_revoked_certificate_by_serial_number(found.serial_number) is not None for one in theirs):
        return "revoked"
    ends = [one.next_update_utc for one in theirs]
    return "" if any(end is not None and now < end for end in ends) else "stale-list"


def _lists(path: Path) -> list[x509.CertificateRevocationList]:
    """The revocation lists of a PEM file, which may hold several."""
    parts = path.read_bytes().split(b"-----BEGIN X509 CRL-----")[1:]
    return [x509.load_pem_x509_crl(b"-----BEGIN X509 CRL-----" + part) for part in parts]


def _signs(certificate: x509.Certificate) -> bool:
    """Whether it is an authority's: a steward lets nobody else in."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _for_clients(certificate: x509.Certificate) -> bool:
    """Whether it may prove a client, as TLS asks; OpenSSL has looked before, for what is not in the list itself."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage


def _key_of(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    return certificate.public_key()  # type: ignore[return-value]  # a wrong kind of key fails where it is used


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


def make_page_certificate(folder: Path, hospital: str) -> datetime:
    """Make the page's certificate and, the first time, the authority that signs it and stewards' certificates.

    Doing it again renews the page's certificate, with a new key; the authority and its stewards stay.

    Args:
        folder: Beside the settings; made if missing.
        hospital: Its name.

    Returns:
        When the page's certificate ends.

    Raises:
        ConfigError: It cannot be written.
        IdentityError: The authority's files cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / f"{AUTHORITY}.pem").exists():
            _make_authority(folder, hospital)
        key, temporary = folder / f"{PAGE}.key", folder / f"{PAGE}.key.next"
        temporary.unlink(missing_ok=True)
        create_tls_key(temporary)
        builder = _builder(
            folder, _named(f"Konsil, page of {hospital}"), load_tls_key(temporary).public_key(), PAGE_DAYS
        )
        builder = builder.add_extension(x509.SubjectAlternativeName(_LOOPBACK), critical=False)
        made = _signed(folder, builder, ExtendedKeyUsageOID.SERVER_AUTH)
        temporary.replace(key)
        replace_file(folder / f"{PAGE}.pem", made.public_bytes(Encoding.PEM))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}", hint="Check the disk.") from None
    return made.not_valid_after_utc


def issue(folder: Path, name: str, out: Path, *, passphrase: str, days: int) -> datetime:
    """Make a steward's key and certificate, as one file for a browser (PKCS 12, encrypted, 0600).

    The certificate without its key is kept in the folder, for the day on which it has to be revoked.

    Returns:
        When it ends.

    Raises:
        ConfigError: The name is none, the passphrase is too short, a file is there already or cannot be written.
        IdentityError: There is no authority here, or it ends before.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a steward", hint="Use a-z, 0-9 and -, at most 41 of them.")
    if not len(passphrase) >= SHORTEST:
        raise ConfigError(
            f"a passphrase of {len(passphrase)} characters", hint=f"At least {SHORTEST}: whoever has both is let in."
        )
    kept = _kept(folder, name)
    if kept.exists():
        raise ConfigError(
            f"{name} has a certificate: {kept}",
            hint=f"Revoke it first: konsil-hospital page-revoke hospital.toml {name}",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(folder, _named(name), key.public_key(), timedelta(days=days))
    made = _signed(folder, builder, ExtendedKeyUsageOID.CLIENT_AUTH)
    packed = serialize_key_and_certificates(
        name.encode("ascii"), key, made, [_authority(folder)], BestAvailableEncryption(passphrase.encode("utf-8"))
    )
    try:
        create_new(out, packed, mode=0o600)
        create_new(kept, made.public_bytes(Encoding.PEM), mode=0o600)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}", hint="Check the disk.") from None
    return made.not_valid_after_utc


def revoke(folder: Path, name: str) -> None:
    """Let a steward's certificate open the page no more; whoever is logged in by it is logged out.

    Raises:
        ConfigError: No such certificate was made here, or the list cannot be written.
        IdentityError: The authority's files cannot be used.
    """
    kept, now = _kept(folder, name), datetime.now(UTC)
    try:
        with _alone(folder):
            found = x509.load_pem_x509_certificate(kept.read_bytes())
            (before,) = _lists(folder / REVOKED)
            entry = x509.RevokedCertificateBuilder().serial_number(found.serial_number).revocation_date(now).build()
            _write_list(folder, [*before, entry])
            kept.replace(kept.with_suffix(f".{int(time.time())}.revoked"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no certificate of {name} can be revoked: {error}", hint=f"Names of stewards: ls {folder}/steward-*.pem"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it is open, no other command changes the list: none of two revocations is lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _kept(folder: Path, name: str) -> Path:
    return folder / f"steward-{name}.pem"


def _make_authority(folder: Path, hospital: str) -> None:
    """The key first, the certificate last: what a crash leaves behind is made anew."""
    key_file = folder / f"{AUTHORITY}.key"
    key_file.unlink(missing_ok=True)
    create_tls_key(key_file)
    key, name = load_tls_key(key_file), _named(f"Konsil, stewards of {hospital}")
    builder = _dated(name, name, key.public_key(), TEN_YEARS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(key_usage(authority=True), critical=True).add_extension(_ONLY_HERE, critical=True)
    made = builder.sign(key, hashes.SHA256())
    _write_list(folder, [], made)
    create_file(folder / f"{AUTHORITY}.pem", made.public_bytes(Encoding.PEM), mode=0o644)


def _write_list(
    folder: Path, revoked: Sequence[x509.RevokedCertificate], authority: x509.Certificate | None = None
) -> None:
    authority, now = authority or _authority(folder), datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.subject).last_update(now)
    builder = builder.next_update(authority.not_valid_after_utc)
    for one in revoked:
        builder = builder.add_revoked_certificate(one)
    made = builder.sign(load_tls_key(folder / f"{AUTHORITY}.key"), hashes.SHA256())
    replace_file(folder / REVOKED, made.public_bytes(Encoding.PEM))


def _authority(folder: Path) -> x509.Certificate:
    path = folder / f"{AUTHORITY}.pem"
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise IdentityError(
            f"there is no authority for stewards: {path}",
            hint="Make one: konsil-hospital page-certificate hospital.toml. With certificates of another authority, "
            "issue and revoke them there.",
        ) from None


def _builder(
    folder: Path, name: x509.Name, key: ec.EllipticCurvePublicKey, lasts: timedelta
) -> x509.CertificateBuilder:
    authority = _authority(folder)
    if not datetime.now(UTC) + lasts < authority.not_valid_after_utc:
        raise IdentityError(
            f"the authority in {folder} ends on {authority.not_valid_after_utc:%Y-%m-%d}, before that",
            hint=f"Move {folder} away, run page-certificate, and give every steward a new certificate.",
        )
    builder = _dated(name, authority.subject, key, lasts)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    return builder.add_extension(key_usage(authority=False), critical=True)


def _dated(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lasts: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed(folder: Path, builder: x509.CertificateBuilder, purpose: x509.ObjectIdentifier) -> x509.Certificate:
    key = load_tls_key(folder / f"{AUTHORITY}.key")
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
