"""What runs out at this hospital: TLS certificates, its membership, what opens its page; said 30 days ahead."""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

from client.membership import Membership
from client.settings import PageTls, Settings
from shared_models.certificates import EVERY_S, Expiry, certificate_end, warnings
from shared_models.errors import FederationError
from shared_models.phrase import Phrase

log = logging.getLogger("konsil.hospital")

_RENEW = Phrase("Run konsil-hospital rotate hospital.toml tls, and have it enrolled; see docs/operations.md.")
_RENEW_PAGE = Phrase("Run konsil-hospital page-certificate hospital.toml, and start the daemon again.")
_RENEW_STEWARD = Phrase("Revoke it, and make another: konsil-hospital page-revoke, page-steward.")
_AUTHORITY = Phrase("The coordinator renews it and sends a new kit; join that.")


def expiries(settings: Settings) -> list[Expiry]:
    """When each runs out, as far as the files can be read."""
    return list(_expiries(settings))


def _expiries(settings: Settings) -> Iterator[Expiry]:
    tls, name = settings.tls, settings.name
    with suppress(FederationError):
        yield Expiry(name, Phrase("this hospital's TLS certificate"), certificate_end(tls.certificate), _RENEW)
    with suppress(FederationError):
        yield Expiry("authority", Phrase("the authority's certificate"), certificate_end(tls.ca), _AUTHORITY)
    with suppress(FederationError):
        member = Membership(settings).signed().member(name)
        if member is not None:
            until = datetime.fromtimestamp(member.valid_until, UTC)
            yield Expiry(name, Phrase("this hospital's membership"), until, _RENEW)
    if settings.page is not None and settings.page.tls is not None:
        yield from _of_the_page(settings.page.tls)


def _of_the_page(files: PageTls) -> Iterator[Expiry]:
    with suppress(FederationError):
        until = certificate_end(files.certificate)
        yield Expiry("page", Phrase("the page's TLS certificate"), until, _RENEW_PAGE)
    for path in sorted(files.stewards.parent.glob("steward-*.pem")):
        what = Phrase("the certificate of steward {name}", name=path.stem.removeprefix("steward-"))
        with suppress(FederationError):
            until = certificate_end(path)
            yield Expiry("page", what, until, _RENEW_STEWARD)


class Reminder:
    """Writes into the daemon's log what runs out soon, at its start and once a day.

    Args:
        settings: The hospital's own; files are read again each time, because a kit may have been joined.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._next = settings, 0.0

    def remind(self) -> None:
        """Called often; does something once a day."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_S
        for line in warnings(expiries(self._settings)):
            log.warning("%s", line)
