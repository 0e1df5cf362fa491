"""What runs out at this hospital: its TLS certificate, the authority's, and its membership; said 30 days ahead."""

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

from client.membership import Membership
from client.settings import Settings
from shared_models.certificates import EVERY_S, Expiry, certificate_end, warnings
from shared_models.errors import FederationError

log = logging.getLogger("konsil.hospital")

_RENEW = "Run konsil-hospital rotate hospital.toml tls, and have it enrolled; see docs/operations.md."
_AUTHORITY = "The coordinator renews it and sends a new kit; join that."


def expiries(settings: Settings) -> list[Expiry]:
    """When each runs out, as far as the files can be read."""
    return list(_expiries(settings))


def _expiries(settings: Settings) -> Iterator[Expiry]:
    tls, name = settings.tls, settings.name
    with suppress(FederationError):
        yield Expiry(name, "this hospital's TLS certificate", certificate_end(tls.certificate), _RENEW)
    with suppress(FederationError):
        yield Expiry("authority", "the authority's certificate", certificate_end(tls.ca), _AUTHORITY)
    with suppress(FederationError):
        member = Membership(settings).signed().member(name)
        if member is not None:
            until = datetime.fromtimestamp(member.valid_until, UTC)
            yield Expiry(name, "this hospital's membership", until, _RENEW)


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
