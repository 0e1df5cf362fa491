"""Which hospitals a round asks: those that are enrolled, online, and not more than a round can hold."""

import secrets
from collections.abc import Collection

from shared_models.plan import LARGEST_COHORT


def choose(enrolled: Collection[str], online: Collection[str]) -> list[str]:
    """The round's cohort, sorted by name; sampled without replacement where the federation is larger than a cohort.

    The choice is not part of the privacy accounting: it gives no amplification, because the coordinator makes it.
    """
    candidates = sorted(set(enrolled) & set(online))
    if len(candidates) > LARGEST_COHORT:
        candidates = sorted(secrets.SystemRandom().sample(candidates, LARGEST_COHORT))
    return candidates
