"""What the transcript of a sum proves to somebody who was not there: every signature and list."""

from itertools import pairwise

from shared_models.errors import CohortGrownError, CommitmentError, IdentityError, RepeatedSignatureError
from shared_models.identity import verify
from shared_models.secagg.key_agreement import Roster, verify_advertisement
from shared_models.secagg.protocol import SignedDigest, Transcript, check_agreement, check_cohort_rule
from shared_models.secagg.secret_sharing import COMMITMENT_KIND, commitment_payload


def verify_transcript(transcript: Transcript, *, roster: Roster) -> None:
    """Check a transcript by itself.

    Guarantees:
        * Keys were advertised, commitments made and lists of uploaders signed by the hospitals that are named, for this
          attempt and no other.
        * U3 is part of U2, U2 of U1, U1 of those invited; nobody signed twice.

    Raises:
        FederationError: The first thing that does not hold.
    """
    announcement, context = transcript.announcement, transcript.context
    check_cohort_rule(announcement.invited, announcement.threshold)
    for member in transcript.cohort:
        verify_advertisement(member, roster=roster, context0=announcement.context0)
    cohort = [member.hospital for member in transcript.cohort]
    dealers = [signed.dealer for signed in transcript.commitments]
    signers = [agreement.hospital for agreement in transcript.agreements]
    lists = [announcement.invited, cohort, dealers, transcript.uploaders, signers]
    for before, after in pairwise(lists):
        if len(set(after)) != len(after):
            raise RepeatedSignatureError("a transcript names a hospital twice", hint="It was changed.")
        if not set(after) <= set(before):
            raise CohortGrownError("a transcript's later list names others than the one before", hint="It was changed.")
    if context is None:
        return
    for signed in transcript.commitments:
        _check_commitment(signed, roster=roster, context=context)
    for agreement in transcript.agreements:
        check_agreement(agreement, roster=roster, context=context, uploaders=transcript.uploaders)


def _check_commitment(signed: SignedDigest, *, roster: Roster, context: bytes) -> None:
    payload = commitment_payload(context=context, dealer=signed.dealer, digest=signed.digest)
    try:
        verify(roster.identities[signed.dealer], COMMITMENT_KIND, payload, signed.signature)
    except IdentityError:
        raise CommitmentError(
            f"{signed.dealer}'s commitment is not signed by it for this attempt", hint="It was changed."
        ) from None
