"""What runs out in the consortium: certificates and memberships; said 30 days ahead in log, metrics and `roster`."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from server.members import signed_roster
from server.settings import Settings
from shared_models.certificates import Expiry, certificate_end, warnings
from shared_models.errors import FederationError

log = logging.getLogger("konsil.coordinator")

EVERY_S = 24 * 3600.0
CERTIFICATES = "certificates"  # beside the roster: those that were issued to hospitals


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
