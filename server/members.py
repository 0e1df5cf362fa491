"""Whom the coordinator lets in: the members of the signed roster that are valid at this moment."""

import time

from server.settings import Settings
from shared_models.errors import RosterError
from shared_models.identity import read_public
from shared_models.roster import Member, SignedRoster, verify_roster


def signed_roster(settings: Settings) -> SignedRoster:
    """The roster that the settings name, verified with the root key that they name.

    Raises:
        RosterError: It is missing, or not the consortium's.
    """
    try:
        content = settings.roster.read_bytes()
    except OSError as error:
        raise RosterError(
            f"roster {settings.roster} cannot be read: {error.strerror}",
            hint="Enrol hospitals, then sign the roster: konsil-coordinator sign.",
        ) from None
    return verify_roster(content, read_public(settings.root))


def registered(settings: Settings) -> tuple[Member, ...]:
    """The hospitals that may connect now: neither revoked nor outside their time.

    Raises:
        RosterError: The roster is refused.
    """
    now = time.time()
    return tuple(member for member in signed_roster(settings).members if member.valid(now))
