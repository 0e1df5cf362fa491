"""Is everything as it must be at the coordinator? One look at each thing; it changes nothing."""

import ssl
import time
from collections.abc import Iterator

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from server.enrol import STAGED, read_staged
from server.expiry import expiries
from server.members import signed_roster
from server.settings import Settings
from shared_models.health import Finding, entropy, expiring, listening, look, private, room, versions

PACKAGES = ("konsil", "torch", "flwr", "grpcio", "sqlalchemy", "cryptography")


def examine(settings: Settings) -> list[Finding]:
    """All checks, in the order in which to mend what they find; the coordinator may be running."""
    return look(_CHECKS, settings)


def _versions(_: Settings) -> Iterator[Finding]:
    yield versions(PACKAGES)


def _entropy(_: Settings) -> Iterator[Finding]:
    yield entropy()


def _disk(settings: Settings) -> Iterator[Finding]:
    yield room(settings.state)


def _permissions(settings: Settings) -> Iterator[Finding]:
    secrets = [settings.tls.key, settings.tls.authority_key, settings.state / "audit.key"]
    secrets.append(settings.page.token_file if settings.page else None)
    yield private(path for path in secrets if path is not None)


def _root(settings: Settings) -> Iterator[Finding]:
    key = settings.roster.with_name("root") / "root.key"
    if key.exists():
        yield Finding("root", "warn", f"the consortium's root key is here: {key}", "Move it to a machine offline.")
    else:
        yield Finding("root", "ok", "the consortium's root key is not on this machine")


def _roster(settings: Settings) -> Iterator[Finding]:
    signed, staged = signed_roster(settings), settings.roster.with_name(STAGED)
    there = sum(member.valid(time.time()) for member in signed.members)
    yield Finding("roster", "ok", f"version {signed.version} of {signed.consortium}, {there} members now")
    if staged.exists() and (waits := read_staged(staged)).version > signed.version:
        yield Finding("roster", "warn", f"version {waits.version} waits to be signed", "konsil-coordinator sign")


def _expiry(settings: Settings) -> Iterator[Finding]:
    yield from expiring(expiries(settings))


def _tls(settings: Settings) -> Iterator[Finding]:
    files = settings.tls
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(files.ca.read_bytes()))
    except (OSError, ValueError, TypeError, ssl.SSLError, InvalidSignature) as error:
        advice = "konsil-coordinator renew certificate --new-key"
        yield Finding("TLS", "fail", f"certificate, key and authority do not fit: {type(error).__name__}", advice)
        return
    yield Finding("TLS", "ok", "certificate, key and authority fit")


def _database(settings: Settings) -> Iterator[Finding]:
    if settings.database is None and not (settings.state / "coordinator.sqlite").exists():
        yield Finding("database", "ok", "made at the first start")
        return
    try:
        engine = create_engine(settings.database_url)
        with engine.connect() as connection:
            studies = connection.execute(text("SELECT count(*) FROM studies")).scalar_one()
        engine.dispose()
    except (SQLAlchemyError, ImportError) as error:  # its text may hold the password
        what = type(error).__name__
        yield Finding(
            "database", "fail", f"cannot be read: {what}", "Check the database server, or the file; and its URL."
        )
        return
    yield Finding("database", "ok", f"{studies} studies")


def _ports(settings: Settings) -> Iterator[Finding]:
    yield listening("hospitals", settings.host, settings.port)
    yield listening("control", settings.control.host, settings.control.port)
    if settings.page is not None:
        yield listening("page", settings.page.host, settings.page.port)


_CHECKS = (
    _versions,
    _entropy,
    _disk,
    _permissions,
    _root,
    _roster,
    _expiry,
    _tls,
    _database,
    _ports,
)
