"""What runs out in the consortium: certificates and memberships; said 30 days ahead in log, metrics and `roster`."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.x509 import load_pem_x509_certificate

from server.members import signed_roster
from server.roles import WITHDRAWN, withdrawn_keys
from server.settings import Settings
from shared_models.certificates import EVERY_S, Expiry, certificate_end, warnings
from shared_models.enrolment import key_digest
from shared_models.errors import FederationError

log = logging.getLogger("konsil.coordinator")

CERTIFICATES, ISSUED = "certificates", "issued"  # beside the roster: of hospitals; of people and programs


def expiries(settings: Settings) -> list[Expiry]:
    """When each runs out, as far as the files can be read; of a hospital that was revoked nothing."""
    return list(_expiries(settings))


def _expiries(settings: Settings) -> Iterator[Expiry]:
    own = "Run konsil-coordinator renew certificate, then restart; see docs/operations.md."
    authority = "Run konsil-coordinator renew authority, sign, and hand out the kits; see docs/operations.md."
    with suppress(FederationError):
        yield Expiry("coordinator", "the coordinator's certificate", certificate_end(settings.tls.certificate), own)
    with suppress(FederationError):
        yield Expiry("authority", "the authority's certificate", certificate_end(settings.tls.ca), authority)
    with suppress(FederationError):
        for member in signed_roster(settings).members:
            if not member.revoked:
                yield _of_hospital(settings, member.name, datetime.fromtimestamp(member.valid_until, UTC))
    yield from _of_people(settings)


def _of_people(settings: Settings) -> Iterator[Expiry]:
    """Operators, auditors and viewers; of whom a certificate was withdrawn nothing."""
    withdrawn = set(withdrawn_keys(settings.roster.with_name(WITHDRAWN)))
    for path in sorted(settings.roster.with_name(ISSUED).glob("*.pem")):
        with suppress(FederationError):
            role, _, name = path.stem.partition("-")
            until = certificate_end(path)
            key = load_pem_x509_certificate(path.read_bytes()).public_key()
            if isinstance(key, EllipticCurvePublicKey) and key_digest(key) not in withdrawn:
                renewal = f"konsil-coordinator issue {name} --role {role} again, into another folder."
                yield Expiry(f"{role}:{name}", f"the certificate of {role} {name}", until, renewal)


def _of_hospital(settings: Settings, name: str, until: datetime) -> Expiry:
    """Membership or certificate, whichever ends first; both are renewed together."""
    with suppress(FederationError):
        until = min(until, certificate_end(settings.roster.with_name(CERTIFICATES) / f"{name}.pem"))
    renewal = "Have it run konsil-hospital rotate hospital.toml tls, and enrol it; or revoke it."
    return Expiry(f"hospital:{name}", f"the membership of {name}", until, renewal)


@contextmanager
def reminding(settings: Settings) -> Iterator[None]:
    """While the coordinator runs, write into its log what runs out soon: at its start and once a day."""
    over = threading.Event()

    def remind() -> None:
        while True:
            for line in warnings(expiries(settings)):
                log.warning("%s", line)
            if over.wait(EVERY_S):
                return

    thread = threading.Thread(target=remind, name="expiry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
