"""Certificates: what their keys may do; when they, and memberships, run out, and since when everybody should know."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography.x509 import KeyUsage, load_pem_x509_certificate

from shared_models.errors import IdentityError
from shared_models.phrase import Phrase

AHEAD = timedelta(days=30)
EVERY_S = 24 * 3600.0  # how often a daemon's log says what runs out


class Expiry(NamedTuple):
    """The end of a certificate or a membership.

    Attributes:
        holder: Whose; in metrics, the label ``holder``.
        what: What runs out, for people.
        until: The first moment at which it is worth nothing.
        renewal: What to do about it, on one line.
    """

    holder: str
    what: str
    until: datetime
    renewal: str

    def over(self, now: datetime) -> bool:
        """Whether it has run out."""
        return not now < self.until

    def soon(self, now: datetime) -> bool:
        """Whether it runs out within 30 days, or has."""
        return not now < self.until - AHEAD

    def text(self, now: datetime) -> Phrase:
        """What there is to say, on one line."""
        if self.over(now):
            return Phrase("{what} expired on {time} UTC", what=self.what, time=f"{self.until:%Y-%m-%d %H:%M}")
        days, day = (self.until - now).days, f"{self.until:%Y-%m-%d}"
        if days == 1:
            return Phrase("{what} expires on {day}, in 1 day", what=self.what, day=day)
        return Phrase("{what} expires on {day}, in {days} days", what=self.what, day=day, days=days)


def key_usage(*, authority: bool) -> KeyUsage:
    """What the key of a certificate may do: sign certificates and revocation lists, or prove who speaks in TLS."""
    return KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def certificate_end(path: Path) -> datetime:
    """When a certificate file expires.

    Raises:
        IdentityError: It is missing or holds something else.
    """
    try:
        return load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"certificate {path} cannot be read: {error}", hint="Check [tls] in the settings."
        ) from None


def warnings(expiries: Iterable[Expiry]) -> list[str]:
    """A line for each that runs out within 30 days, or has: for ``status`` and logs."""
    now = datetime.now(UTC)
    return [f"{expiry.text(now)}. {expiry.renewal}" for expiry in expiries if expiry.soon(now)]
