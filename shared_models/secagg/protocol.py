"""One attempt at a sum, both sides, as two pure state machines: no input or output, no clock, no network library.

The stages have the design's numbers: 1 advertise, 2 share, 3 train and upload, 4 agree on who uploaded, 5 unmask. Each
is one message out from the coordinator and one reply back. A ``Hospital`` lives as long as its process and has one
attempt at a time; a ``Coordinator`` is one attempt.

Every check comes before any change: a refused message leaves a party as it was. What ends an attempt is a dealer at
fault and, at the coordinator, fewer hospitals left than the threshold. Each refusal has its own class in ``errors.py``.

Source:
    Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, the variant
    against active adversaries (figure 4), on the complete graph.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Literal

import numpy as np
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from shared_models.config import ALWAYS_WRITTEN, Name
from shared_models.errors import (
    AttemptEndedError,
    BadShareError,
    CohortGrownError,
    CommitmentError,
    ComplaintError,
    ForeignSignatureError,
    ForkedSurvivorsError,
    IdentityError,
    InconsistentDealerError,
    LeftOutError,
    NotInvitedError,
    OwnKeyError,
    ParametersMismatchError,
    PlanNotApprovedError,
    RepeatedHospitalError,
    RepeatedKeyError,
    RepeatedReplyError,
    RepeatedSignatureError,
    RepeatedStageError,
    RepeatedUpdateError,
    RevealedShareError,
    RosterMismatchError,
    SkippedStageError,
    StaleAttemptError,
    SurvivorSignatureError,
    ThresholdError,
    TooFewHospitalsError,
    TooFewLeftError,
    TooFewSignaturesError,
    TooManyHospitalsError,
    UnknownContextError,
    UnknownHospitalError,
    VectorTooLongError,
    WrongSharesError,
)
from shared_models.identity import public_bytes, sign, verify
from shared_models.plan import LARGEST_COHORT, SMALLEST_COHORT
from shared_models.secagg.key_agreement import (
    Advertisement,
    Announcement,
    Bytes32,
    Bytes64,
    Entropy,
    KeyPairs,
    Roster,
    SecAggMessage,
    advertise,
    attempt_context,
    pairwise_mask_key,
    self_mask_key,
    share_key,
    verify_advertisement,
)
from shared_models.secagg.masks import Mask, apply_masks, check_lanes
from shared_models.secagg.secret_sharing import (
    Commitment,
    SealedShare,
    Secret,
    Shares,
    commit,
    recover,
    seal,
    seed_hash,
    share_hash,
    split,
    unseal,
    verify_commitment,
)

SURVIVORS_KIND = "secagg-survivors"
COMPLAINT_KIND = "secagg-complaint"

_HOSTILE = "The coordinator runs another version, or is hostile. Keep the message."


class Stage(IntEnum):
    """The design's stage numbers; as a hospital's state, the last stage that it answered."""

    BEGUN = 0
    ADVERTISE = 1
    SHARE = 2
    UPLOAD = 3
    AGREE = 4
    UNMASK = 5
    ENDED = 6


# The rule about thresholds


def smallest_threshold(hospitals: int) -> int:
    """The least t, max(3, floor(2n / 3) + 1): two lists of survivors with t signatures share an honest hospital.

    With exactly three hospitals that is three: no drop-out is tolerated.
    """
    return max(SMALLEST_COHORT, 2 * hospitals // 3 + 1)


def plan_threshold(minimum_hospitals: int, hospitals: int) -> int:
    """T of a study's sums: the rule's, or the plan's minimum where that is more."""
    return max(smallest_threshold(hospitals), minimum_hospitals)


def tolerated_colluders(hospitals: int, threshold: int) -> int:
    """How many hospitals on the coordinator's side change nothing about what is protected: min(2t - n - 1, t - 2)."""
    return min(2 * threshold - hospitals - 1, threshold - 2)


def who_could_learn_what(hospitals: int, threshold: int) -> str:
    """The promise of one sum in words, for people who decide whether to take part."""
    drop_outs = hospitals - threshold
    colluders = tolerated_colluders(hospitals, threshold)
    return (
        f"The coordinator learned one sum a round, of at least {threshold} of {hospitals} hospitals' updates, and no "
        "update by itself: they left the hospitals encrypted. Hospitals learned the new model. That holds even if the "
        f"coordinator lies and {colluders or 'no'} hospital{'' if colluders == 1 else 's'} "
        f"help{'s' if colluders == 1 else ''} it. A round needs {threshold} hospitals to the end: "
        f"{drop_outs or 'none'} of {hospitals} may drop out."
    )


def check_cohort_rule(invited: Collection[str], threshold: int) -> None:
    """Refuse cohorts and thresholds for which the protocol protects nothing, before anything is sent.

    Raises:
        TooFewHospitalsError: Fewer than three.
        TooManyHospitalsError: More than a hundred.
        ThresholdError: Outside ``smallest_threshold`` to the number invited.
        RepeatedHospitalError: One is invited twice.
    """
    hospitals = len(invited)
    if len(set(invited)) != hospitals:
        raise RepeatedHospitalError("a hospital is invited twice", hint="Invite each once.")
    if hospitals < SMALLEST_COHORT:
        raise TooFewHospitalsError(f"{hospitals} hospitals, 3 are needed", hint="A sum of two hides nothing.")
    if hospitals > LARGEST_COHORT:
        raise TooManyHospitalsError(f"{hospitals} hospitals, at most {LARGEST_COHORT}", hint="Sample a cohort.")
    if not smallest_threshold(hospitals) <= threshold <= hospitals:
        raise ThresholdError(
            f"threshold {threshold} of {hospitals} hospitals is outside {smallest_threshold(hospitals)}..{hospitals}",
            hint="Fewer would let a coordinator that lies about drop-outs open single updates.",
        )


# Messages: stage 1's are in key_agreement.py, what they carry of shares in secret_sharing.py


class Cohort(SecAggMessage):
    """Stage 2, out: all advertised keys, U1."""

    context0: Bytes32
    members: tuple[Advertisement, ...]


class Dealing(SecAggMessage):
    """Stage 2, back: a sealed share for every member (the dealer's own without ciphertext), and the commitment."""

    context: Bytes32
    sealed: dict[Name, SealedShare]
    commitment: Commitment


class Delivery(SecAggMessage):
    """Stage 3, out, with the global parameters: commitments of all dealers, U2, and their shares for the receiver."""

    context: Bytes32
    commitments: tuple[Commitment, ...]
    sealed: dict[Name, SealedShare]


class Survivors(SecAggMessage):
    """Stage 4, out: the uploaders, U3."""

    context: Bytes32
    uploaders: tuple[Name, ...]


class Agreement(SecAggMessage):
    """Stage 4, back: a hospital's signature on the context and U3."""

    hospital: Name
    signature: Bytes64


class Unmasking(SecAggMessage):
    """Stage 5, out: U3 again, and the signatures on it."""

    context: Bytes32
    uploaders: tuple[Name, ...]
    agreements: tuple[Agreement, ...]


class Revealed(SecAggMessage):
    """Stage 5, back: one share per member of U2; of its seed if it uploaded, of its masking key if it did not."""

    context: Bytes32
    of_seeds: dict[Name, bytes]
    of_keys: dict[Name, bytes]


class Complaint(SecAggMessage):
    """Instead of an upload: a hospital's signed word that a dealer's share is bad as the dealer signed it.

    It is one hospital's word: to prove it, the complainant would have to open its channel key, and with it every share
    that it holds. ``commitment`` is the digest that the dealer signed, so that both mean the same dealing.
    """

    context: Bytes32
    hospital: Name
    accused: Name
    commitment: Bytes32
    signature: Bytes64

    def payload(self) -> bytes:
        """The bytes that are signed."""
        fields = {"context": self.context.hex(), "commitment": self.commitment.hex()}
        return rfc8785.dumps({"hospital": self.hospital, "accused": self.accused, **fields})


class SignedDigest(SecAggMessage):
    """What remains of a commitment: whose it was, what was signed, and the signature."""

    dealer: Name
    digest: Bytes32
    signature: Bytes64


class Transcript(SecAggMessage):
    """What every party keeps of an attempt: it shows forks and differing cohorts, and no secret.

    Attributes:
        announcement: What ``context0`` was made of.
        cohort: U1 with its signatures.
        commitments: One per member of U2.
        uploaders: U3; empty where the attempt did not get there.
        agreements: Signatures on U3.
    """

    announcement: Announcement
    cohort: Annotated[tuple[Advertisement, ...], ALWAYS_WRITTEN] = ()
    commitments: Annotated[tuple[SignedDigest, ...], ALWAYS_WRITTEN] = ()
    uploaders: Annotated[tuple[Name, ...], ALWAYS_WRITTEN] = ()
    agreements: Annotated[tuple[Agreement, ...], ALWAYS_WRITTEN] = ()

    @property
    def context(self) -> bytes | None:
        """The attempt's context; None before stage 2."""
        return attempt_context(self.announcement.context0, self.cohort) if self.cohort else None


def survivors_payload(context: bytes, uploaders: Iterable[str]) -> bytes:
    """The bytes that are signed in stage 4."""
    return rfc8785.dumps({"context": context.hex(), "uploaders": sorted(uploaders)})


# A hospital


@dataclass(frozen=True, kw_only=True)
class CohortPolicy:
    """What a hospital asks for beyond the rule; the stricter of the two holds.

    Attributes:
        minimum_hospitals: Members of U1, itself included.
        minimum_threshold: t.
    """

    minimum_hospitals: int = SMALLEST_COHORT
    minimum_threshold: int = SMALLEST_COHORT


class Positions:
    """The highest (round, attempt) that a hospital has taken part in, per study and purpose; it only increases.

    Args:
        highest: As saved last.
        save: Makes a position durable before it returns; it is called before any key of the attempt leaves.
    """

    def __init__(
        self,
        highest: Mapping[tuple[str, str], tuple[int, int]] | None = None,
        save: Callable[[str, str, int, int], None] = lambda *_: None,
    ) -> None:
        self._highest = dict(highest or {})
        self._save = save

    def advance(self, announcement: Announcement) -> None:
        """Move on to an announcement's round and attempt.

        Raises:
            StaleAttemptError: It is not later than the highest so far.
        """
        key, position = (announcement.study, announcement.purpose), (announcement.round, announcement.attempt)
        if position <= self._highest.get(key, (0, 0)):
            raise StaleAttemptError(
                f"round {position[0]}, attempt {position[1]} of {key[0]} is not later than the last one", hint=_HOSTILE
            )
        self._highest[key] = position  # also if saving fails: then this attempt is lost, and none is repeated
        self._save(*key, *position)


@dataclass(repr=False)
class _Attempt:
    """A hospital's state in one attempt; what is secret in it is gone once ``erase`` was called."""

    announcement: Announcement
    pairs: KeyPairs | None
    seed: Secret
    advertisement: Advertisement
    stage: Stage = Stage.BEGUN
    context: bytes = b""
    cohort: dict[str, Advertisement] = field(default_factory=dict)  # U1, by name, sorted
    held: dict[str, Shares] = field(default_factory=dict)  # of U2, once accepted; before, only its own
    commitments: dict[str, Commitment] = field(default_factory=dict)  # U2
    accepted: bool = False  # stage 3's request was checked; its reply may come
    uploaders: tuple[str, ...] = ()  # U3
    agreements: tuple[Agreement, ...] = ()

    def erase(self) -> None:
        """Forget every secret."""
        self.pairs = None
        self.seed.erase()
        for shares in self.held.values():
            shares.erase()
        self.held.clear()


class Hospital:
    """A hospital's side of every attempt that its process takes part in, one at a time.

    Guarantees:
        * One reply per stage and context, ever; one upload per charge, ever. Whatever it is sent, it reveals exactly
          one of seed share and key share per peer.
        * Secrets live in memory only, from ``advertise`` until the reply of stage 5, the next attempt or ``abandon``.

    Args:
        name: Its own, as in the roster.
        identity: Its long-term signing key.
        roster: As pinned here; what a coordinator relays about keys counts only with a signature of a member.
        policy: What it asks for beyond the rule.
        positions: The highest attempt so far; durable.
        entropy: Secret random bytes. Anything but ``os.urandom`` is for tests and known answers.
    """

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        *,
        roster: Roster,
        positions: Positions,
        policy: CohortPolicy = CohortPolicy(),
        entropy: Entropy = os.urandom,
    ) -> None:
        if roster.identities.get(name) != public_bytes(identity):
            raise UnknownHospitalError(f"{name} is not on its own roster with this key", hint="Pin the roster anew.")
        self.name = name
        self._identity, self._roster, self.policy = identity, roster, policy
        self._pinned = roster
        self._positions, self._entropy = positions, entropy
        self._attempt: _Attempt | None = None
        self._charges: set[str] = set()  # that an upload was paid with
        self._earlier_keys: set[bytes] = set()  # of the attempt before: honest hospitals never show one again

    @property
    def announcement(self) -> Announcement:
        """What the attempt that is going on was announced as.

        Raises:
            UnknownContextError: This process has begun none.
        """
        if self._attempt is None:
            raise UnknownContextError("no attempt was begun by this process", hint="A restart drops out of an attempt.")
        return self._attempt.announcement

    @property
    def context(self) -> bytes:
        """The context of that attempt; empty before stage 2."""
        return self._attempt.context if self._attempt else b""

    def pin(self, roster: Roster) -> None:
        """Take another roster from the next attempt on; one that is going on keeps the one it began with."""
        self._pinned = roster

    # Stage 1

    def advertise(self, announcement: Announcement, *, plan_digest: str) -> Advertisement:
        """Check an announcement, end whatever attempt there was, and make fresh keys for this one.

        Args:
            announcement: From the coordinator.
            plan_digest: Of the plan that this hospital approved for the study.

        Raises:
            PlanNotApprovedError: It is for another plan.
            RosterMismatchError: It is over another roster.
            NotInvitedError: It invites others only.
            UnknownHospitalError: It invites somebody who is not on the roster.
            TooFewHospitalsError: Fewer are invited than rule or policy want.
            TooManyHospitalsError, ThresholdError, RepeatedHospitalError: See ``check_cohort_rule``.
            StaleAttemptError: It is replayed, or older than one that was answered.
        """
        if announcement.plan_digest != plan_digest:
            raise PlanNotApprovedError("the announcement is for another plan than the approved one", hint=_HOSTILE)
        if announcement.roster_digest != self._pinned.digest:
            raise RosterMismatchError("the announcement is over another roster", hint="Pin the current roster.")
        self._check_invited(announcement)
        self._positions.advance(announcement)
        self.abandon()
        self._roster = self._pinned
        if self._attempt is not None and self._attempt.cohort:
            self._earlier_keys = _public_keys(self._attempt.cohort.values())
        pairs, context0 = KeyPairs.generate(self._entropy), announcement.context0
        keys = advertise(pairs, self._identity, hospital=self.name, context0=context0)
        self._attempt = _Attempt(announcement, pairs, Secret(self._entropy(32)), keys, Stage.ADVERTISE)
        return keys

    def _check_invited(self, announcement: Announcement) -> None:
        invited, threshold = announcement.invited, announcement.threshold
        if self.name not in invited:
            raise NotInvitedError(f"{self.name} is not invited", hint=_HOSTILE)
        if unknown := set(invited) - self._pinned.identities.keys():
            raise UnknownHospitalError(f"invited, but not on the roster: {sorted(unknown)}", hint=_HOSTILE)
        check_cohort_rule(invited, threshold)
        if threshold < self.policy.minimum_threshold:
            raise ThresholdError(f"threshold {threshold} is below this hospital's policy", hint="Raise it.")
        self._check_enough_peers(len(invited))

    def _check_enough_peers(self, hospitals: int) -> None:
        if hospitals < self.policy.minimum_hospitals:
            raise TooFewHospitalsError(
                f"{hospitals} hospitals, this hospital's policy wants {self.policy.minimum_hospitals}",
                hint="Invite more, or ask the hospital.",
            )

    # Stage 2

    def share(self, cohort: Cohort) -> Dealing:
        """Check everybody's keys against the pinned roster, then share masking key and seed among them.

        Raises:
            UnknownContextError, RepeatedStageError, AttemptEndedError: See ``_expect``.
            RepeatedHospitalError, RepeatedKeyError: A hospital or a key is there twice.
            UnknownHospitalError: Somebody was not invited, or is not on the roster.
            KeySignatureError, WeakKeyError: See ``verify_advertisement``.
            OwnKeyError: Its own keys are missing, or others.
            TooFewLeftError: Fewer than the threshold.
            TooFewHospitalsError: Fewer than policy wants.
        """
        attempt = self._expect(Stage.SHARE, cohort.context0)
        self._check_cohort(attempt, cohort.members)
        attempt.cohort = {member.hospital: member for member in sorted(cohort.members, key=lambda m: m.hospital)}
        attempt.context = attempt_context(attempt.announcement.context0, cohort.members)
        attempt.stage = Stage.SHARE  # before anything of the reply exists
        return self._deal(attempt)

    def _check_cohort(self, attempt: _Attempt, members: tuple[Advertisement, ...]) -> None:
        names = [member.hospital for member in members]
        _check_distinct(names)
        keys = _public_keys(members)
        if len(keys) != 2 * len(members):
            raise RepeatedKeyError("one key is advertised twice", hint="Somebody copied a key, or plays two roles.")
        if keys & self._earlier_keys:
            raise RepeatedKeyError("a key of the attempt before is advertised again", hint="Its owner must restart.")
        if uninvited := set(names) - set(attempt.announcement.invited):
            raise UnknownHospitalError(f"in the cohort, but not invited: {sorted(uninvited)}", hint=_HOSTILE)
        if attempt.advertisement not in members:
            raise OwnKeyError("this hospital's own keys are missing from the cohort, or changed", hint=_HOSTILE)
        for member in members:
            verify_advertisement(member, roster=self._roster, context0=attempt.announcement.context0)
        _check_enough_left(len(members), attempt.announcement.threshold, "advertised keys")
        self._check_enough_peers(len(members))

    def _deal(self, attempt: _Attempt) -> Dealing:
        pairs, context, holders = _present(attempt.pairs), attempt.context, list(attempt.cohort)
        seed, key = attempt.seed.reveal(), pairs.masking.private_bytes_raw()
        threshold = attempt.announcement.threshold
        of_seed = split(seed, threshold=threshold, holders=len(holders), entropy=self._entropy)
        of_key = split(key, threshold=threshold, holders=len(holders), entropy=self._entropy)
        sealed = {}
        for holder, *pair in zip(holders, of_seed, of_key, strict=True):
            shares = Shares(*(Secret(share) for share in pair))
            own = holder == self.name
            peer = attempt.cohort[holder].channel_key
            secret = None if own else share_key(pairs.channel, peer, context=context, sender=self.name, receiver=holder)
            sealed[holder] = seal(shares, key=secret, context=context, dealer=self.name, holder=holder)
            if own:
                attempt.held[self.name] = shares
        commitment = commit(
            self._identity, context=context, dealer=self.name, seed=seed, sealed=[sealed[holder] for holder in holders]
        )
        attempt.commitments[self.name] = commitment
        return Dealing(context=context, sealed=sealed, commitment=commitment)

    # Stage 3

    def accept(self, delivery: Delivery, *, parameters_digest: str) -> Complaint | None:
        """Check everything that stage 3 brings, before anything is charged or trained.

        Args:
            delivery: From the coordinator.
            parameters_digest: Of the global parameters that came with it, computed here.

        Returns:
            None: go on, charge, train, encode and ``upload``. A signed complaint: a dealer is at fault, this attempt is
            over, and the complaint is the reply.

        Raises:
            UnknownContextError, RepeatedStageError, SkippedStageError, AttemptEndedError: See ``_expect``.
            CohortGrownError: A dealer is not of the cohort.
            LeftOutError: Its own dealing, as it was, is not among them.
            TooFewLeftError: Fewer than the threshold.
            ParametersMismatchError: Other parameters than were announced.
            CommitmentError: A commitment is forged, of the wrong size, or without its share.
            TamperedShareError: A share is not what its dealer signed; the coordinator is at fault.
        """
        attempt = self._expect(Stage.UPLOAD, delivery.context)
        if attempt.accepted:
            raise RepeatedStageError("stage 3 was answered already", hint=_HOSTILE)
        if parameters_digest != attempt.announcement.parameters_digest:
            raise ParametersMismatchError("the parameters are others than were announced", hint=_HOSTILE)
        self._check_dealers(attempt, delivery)
        held = {}
        for commitment in delivery.commitments:
            if commitment.dealer == self.name:
                continue
            try:
                held[commitment.dealer] = self._open(attempt, commitment, delivery.sealed[commitment.dealer])
            except BadShareError:
                return self._complain(attempt, commitment)
        attempt.held |= held
        attempt.commitments = {commitment.dealer: commitment for commitment in delivery.commitments}
        attempt.accepted = True
        return None

    def _check_dealers(self, attempt: _Attempt, delivery: Delivery) -> None:
        dealers = [commitment.dealer for commitment in delivery.commitments]
        _check_distinct(dealers)
        _check_subset(dealers, attempt.cohort, "dealers")
        if attempt.commitments[self.name] not in delivery.commitments:
            raise LeftOutError("this hospital's own dealing is missing from stage 3, or changed", hint=_HOSTILE)
        _check_enough_left(len(dealers), attempt.announcement.threshold, "dealers")
        if delivery.sealed.keys() != set(dealers) - {self.name}:
            raise CommitmentError("shares and commitments are not by the same dealers", hint=_HOSTILE)
        for commitment in delivery.commitments:
            _check_commitment(commitment, roster=self._roster, context=attempt.context, holders=len(attempt.cohort))

    def _open(self, attempt: _Attempt, commitment: Commitment, sealed: SealedShare) -> Shares:
        dealer, position = commitment.dealer, list(attempt.cohort).index(self.name)
        return unseal(
            sealed,
            key=share_key(
                _present(attempt.pairs).channel,
                attempt.cohort[dealer].channel_key,
                context=attempt.context,
                sender=dealer,
                receiver=self.name,
            ),
            leaf=commitment.leaves[32 * position : 32 * (position + 1)],
            context=attempt.context,
            dealer=dealer,
            holder=self.name,
        )

    def _complain(self, attempt: _Attempt, commitment: Commitment) -> Complaint:
        unsigned = Complaint(
            context=attempt.context,
            hospital=self.name,
            accused=commitment.dealer,
            commitment=commitment.digest(),
            signature=bytes(64),
        )
        self.abandon()
        return unsigned.model_copy(update={"signature": sign(self._identity, COMPLAINT_KIND, unsigned.payload())})

    def upload(self, encoded: NDArray[np.uint32], *, charge: str) -> NDArray[np.uint32]:
        """Mask an encoded update, in place: y = z + PRG(b) + sum over U2 of +-PRG(s_ij).

        Args:
            encoded: z, from ``quantize``; afterwards it holds y.
            charge: Hash of the ledger entry that paid for this update.

        Returns:
            ``encoded``.

        Raises:
            UnknownContextError: No attempt has been begun.
            RepeatedStageError, SkippedStageError, AttemptEndedError: See ``_expect``; or nothing was accepted yet.
            RepeatedUpdateError: This charge's update was uploaded before, in this attempt or in another one.
            MalformedVectorError: It is no flat writable uint32 vector.
        """
        attempt = self._expect(Stage.UPLOAD, self._attempt.context if self._attempt else b"")
        if not attempt.accepted:
            raise SkippedStageError("nothing was accepted in stage 3 yet", hint="This is a fault of the program.")
        if charge in self._charges:
            raise RepeatedUpdateError("this update was uploaded before", hint="Train again, under a new charge.")
        check_lanes(encoded, len(encoded))
        self._charges.add(charge)
        attempt.stage = Stage.UPLOAD
        pairs, context = _present(attempt.pairs), attempt.context
        masks = [Mask(self_mask_key(attempt.seed.reveal(), context=context), subtract=False)]
        peers = [attempt.cohort[peer] for peer in sorted(attempt.commitments.keys() - {self.name})]
        masks += [_pair_mask(pairs.masking, self.name, peer, context) for peer in peers]
        apply_masks(encoded, masks)
        attempt.seed.erase()  # its share, and everybody else's, is all that is still needed
        attempt.pairs = None
        return encoded

    # Stage 4

    def agree(self, survivors: Survivors) -> Agreement:
        """Sign the list of uploaders: one list per context, ever.

        Raises:
            UnknownContextError, RepeatedStageError, SkippedStageError, AttemptEndedError: See ``_expect``.
            RepeatedHospitalError, CohortGrownError, LeftOutError, TooFewLeftError: U3 names one twice, or somebody
                outside U2, or leaves this hospital out, or is smaller than the threshold.
        """
        attempt = self._expect(Stage.AGREE, survivors.context)
        _check_distinct(survivors.uploaders)
        _check_subset(survivors.uploaders, attempt.commitments, "uploaders")
        if self.name not in survivors.uploaders:
            raise LeftOutError("this hospital uploaded and is said to have dropped out", hint=_HOSTILE)
        _check_enough_left(len(survivors.uploaders), attempt.announcement.threshold, "uploaders")
        attempt.stage, attempt.uploaders = Stage.AGREE, tuple(sorted(survivors.uploaders))
        payload = survivors_payload(attempt.context, attempt.uploaders)
        return Agreement(hospital=self.name, signature=sign(self._identity, SURVIVORS_KIND, payload))

    # Stage 5

    def unmask(self, request: Unmasking) -> Revealed:
        """Once enough uploaders have signed the same list, reveal one share per peer, and forget everything.

        Raises:
            UnknownContextError, RepeatedStageError, SkippedStageError, AttemptEndedError: See ``_expect``.
            ForkedSurvivorsError: Another list than the one signed here.
            ForeignSignatureError, RepeatedSignatureError, SurvivorSignatureError: A signature by somebody outside U3,
                a second one by the same hospital, or one that is not valid.
            TooFewSignaturesError: Fewer than the threshold.
        """
        attempt = self._expect(Stage.UNMASK, request.context)
        if len(set(request.uploaders)) != len(request.uploaders) or set(request.uploaders) != set(attempt.uploaders):
            raise ForkedSurvivorsError("another list of uploaders than this hospital signed", hint=_HOSTILE)
        self._check_agreements(attempt, request.agreements)
        attempt.stage, attempt.agreements = Stage.UNMASK, request.agreements
        # Never both for one peer: of_seed where it uploaded, of_key where it did not.
        reply = Revealed(
            context=attempt.context,
            of_seeds={peer: attempt.held[peer].of_seed.reveal() for peer in attempt.uploaders},
            of_keys={
                peer: attempt.held[peer].of_key.reveal()
                for peer in sorted(attempt.commitments.keys() - set(attempt.uploaders))
            },
        )
        attempt.erase()
        return reply

    def _check_agreements(self, attempt: _Attempt, agreements: tuple[Agreement, ...]) -> None:
        signers = [agreement.hospital for agreement in agreements]
        if foreign := set(signers) - set(attempt.uploaders):
            raise ForeignSignatureError(f"signatures by others than uploaders: {sorted(foreign)}", hint=_HOSTILE)
        if len(set(signers)) != len(signers):
            raise RepeatedSignatureError("one hospital's signature is there twice", hint=_HOSTILE)
        if len(signers) < attempt.announcement.threshold:
            raise TooFewSignaturesError(f"{len(signers)} signatures are fewer than the threshold", hint=_HOSTILE)
        for agreement in agreements:
            check_agreement(agreement, roster=self._roster, context=attempt.context, uploaders=attempt.uploaders)

    def abandon(self) -> None:
        """End the attempt, if there is one: its secrets are forgotten, and whatever comes for it is refused."""
        if self._attempt is not None:
            self._attempt.erase()
            if self._attempt.stage < Stage.UNMASK:
                self._attempt.stage = Stage.ENDED

    def transcript(self) -> Transcript | None:
        """What this hospital saw of its last attempt; None before the first."""
        attempt = self._attempt
        if attempt is None:
            return None
        return _transcript(
            attempt.announcement, attempt.cohort, attempt.commitments, attempt.uploaders, attempt.agreements
        )

    def _expect(self, stage: Stage, context: bytes) -> _Attempt:
        """The attempt, if a message for this stage and context is what comes next.

        Raises:
            UnknownContextError: No attempt was begun by this process, or another one.
            RepeatedStageError: The stage was answered already.
            SkippedStageError: The one before was not.
            AttemptEndedError: The attempt was given up.
        """
        attempt = self._attempt
        if attempt is None:
            raise UnknownContextError("no attempt was begun by this process", hint="A restart drops out of an attempt.")
        # Stage 2 brings context0; everything later the context that stage 2 made.
        known = attempt.announcement.context0 if stage == Stage.SHARE else attempt.context
        if context != known and attempt.stage >= stage - 1:
            raise UnknownContextError("a message of another attempt", hint="It is late, replayed, or hostile.")
        if attempt.stage == Stage.ENDED:
            raise AttemptEndedError("this attempt was given up", hint="Wait for the next one.")
        if attempt.stage >= stage:
            raise RepeatedStageError(f"stage {stage.value} was answered already", hint=_HOSTILE)
        if attempt.stage < stage - 1:
            raise SkippedStageError(f"stage {stage.value} without the one before", hint=_HOSTILE)
        return attempt


# The coordinator


class Coordinator:
    """The coordinator's side of one attempt: takes replies as they come, and closes one stage after the other.

    ``receive_...`` take a reply and the name of whoever sent it, as the transport knows it; a reply that is refused
    excludes its sender from the stage and changes nothing else. Closing a stage (``cohort``, ``deliveries``,
    ``survivors``, ``unmasking``, ``total``) makes the next one's messages.

    Guarantees:
        * Uploads are added as they arrive: one vector of memory, however many hospitals.
        * The total is the exact sum modulo 2**32 of what the uploaders masked, or there is none.

    Args:
        announcement: Stage 1's message, the same for all invited.
        roster: Identity keys.
        length: d, entries of an update.

    Raises:
        TooFewHospitalsError, TooManyHospitalsError, ThresholdError, RepeatedHospitalError: See ``check_cohort_rule``.
        UnknownHospitalError: Somebody invited is not on the roster.
        VectorTooLongError: There is no memory for the sum.
    """

    def __init__(self, announcement: Announcement, *, roster: Roster, length: int) -> None:
        check_cohort_rule(announcement.invited, announcement.threshold)
        if unknown := set(announcement.invited) - roster.identities.keys():
            raise UnknownHospitalError(f"not on the roster: {sorted(unknown)}", hint="Enrol them first.")
        try:
            self._sum = np.zeros(length, np.uint32)
        except (MemoryError, ValueError):
            raise VectorTooLongError(f"no memory for a vector of {length}", hint="Use a smaller network.") from None
        self.announcement = announcement
        self.at_fault: str | None = None  # whom the next attempt goes without
        self.complaint: Complaint | None = None
        self._roster, self._context = roster, b""
        self._stage, self._closed = Stage.ADVERTISE, Stage.BEGUN  # what is open; what was closed last
        self._cohort: dict[str, Advertisement] = {}  # U1
        self._dealings: dict[str, Dealing] = {}  # U2
        self._uploaders: set[str] = set()  # U3
        self._agreements: dict[str, Agreement] = {}
        self._revealed: dict[str, Revealed] = {}

    @property
    def dropped(self) -> dict[str, int]:
        """Hospitals that were invited and have not done what a closed stage asked for, with the stage's number."""
        done: list[Iterable[str]] = [self._cohort, self._dealings, self._uploaders, self._agreements, self._revealed]
        names = [set(self.announcement.invited), *(set(names) for names in done[: self._closed])]
        return {name: stage for stage in range(1, len(names)) for name in sorted(names[stage - 1] - names[stage])}

    # Stage 1

    def receive_advertisement(self, sender: str, advertisement: Advertisement) -> None:
        """Take a hospital's keys.

        Raises:
            UnknownHospitalError: The sender was not invited, or the keys are another's.
            RepeatedReplyError: It has advertised already.
            RepeatedKeyError: Its keys are not its own.
            KeySignatureError, WeakKeyError: See ``verify_advertisement``.
        """
        self._receiving(Stage.ADVERTISE, sender, self.announcement.invited, self._cohort)
        if advertisement.hospital != sender:
            raise UnknownHospitalError(f"{sender} sent keys for {advertisement.hospital}", hint="It goes without.")
        verify_advertisement(advertisement, roster=self._roster, context0=self.announcement.context0)
        keys = _public_keys([advertisement])
        if len(keys) < 2 or keys & _public_keys(self._cohort.values()):
            raise RepeatedKeyError(f"{sender} advertised a key twice, or another's", hint="It goes without.")
        self._cohort[sender] = advertisement

    def cohort(self) -> Cohort:
        """Close stage 1: U1 is whoever has advertised.

        Raises:
            TooFewLeftError: Fewer than the threshold; the attempt is over.
        """
        self._close(Stage.ADVERTISE, self._cohort, "advertised keys")
        self._cohort = dict(sorted(self._cohort.items()))
        members = tuple(self._cohort.values())
        self._context = attempt_context(self.announcement.context0, members)
        return Cohort(context0=self.announcement.context0, members=members)

    # Stage 2

    def receive_dealing(self, sender: str, dealing: Dealing) -> None:
        """Take a hospital's sealed shares and commitment; what does not fit together excludes the dealer.

        Raises:
            UnknownHospitalError, RepeatedReplyError, UnknownContextError: See ``_receiving``.
            CommitmentError: It is not signed by the sender, or is not about these shares.
        """
        self._receiving(Stage.SHARE, sender, self._cohort, self._dealings, dealing.context)
        commitment = dealing.commitment
        if commitment.dealer != sender or dealing.sealed.keys() != self._cohort.keys():
            raise CommitmentError(f"{sender} did not deal one share to each member", hint="It goes without.")
        _check_commitment(commitment, roster=self._roster, context=self._context, holders=len(self._cohort))
        if commitment.leaves != b"".join(dealing.sealed[holder].leaf() for holder in self._cohort):
            raise CommitmentError(f"{sender}'s commitment is about other shares", hint="It goes without.")
        self._dealings[sender] = dealing

    def deliveries(self) -> dict[str, Delivery]:
        """Close stage 2: U2 is whoever has dealt. One message for each of them.

        Raises:
            TooFewLeftError: Fewer than the threshold; the attempt is over.
        """
        self._close(Stage.SHARE, self._dealings, "dealers")
        self._dealings = dict(sorted(self._dealings.items()))
        commitments = tuple(dealing.commitment for dealing in self._dealings.values())
        return {
            holder: Delivery(
                context=self._context,
                commitments=commitments,
                sealed={name: dealing.sealed[holder] for name, dealing in self._dealings.items() if name != holder},
            )
            for holder in self._dealings
        }

    # Stage 3

    def receive_upload(self, sender: str, context: bytes, vector: NDArray[np.uint32]) -> None:
        """Add a masked vector to the sum; it can be let go of afterwards.

        Raises:
            UnknownHospitalError, RepeatedReplyError, UnknownContextError: See ``_receiving``.
            MalformedVectorError: It has another type or length.
        """
        self._receiving(Stage.UPLOAD, sender, self._dealings, self._uploaders, context)
        check_lanes(vector, len(self._sum))
        np.add(self._sum, vector, out=self._sum)
        self._uploaders.add(sender)

    def receive_complaint(self, sender: str, complaint: Complaint) -> None:
        """Take a hospital's word against a dealer: the attempt is over, and ``at_fault`` says without whom to go on.

        Raises:
            UnknownHospitalError, RepeatedReplyError, UnknownContextError: See ``_receiving``.
            ComplaintError: It is not signed by the sender, or not about another's dealing of this attempt.
        """
        self._receiving(Stage.UPLOAD, sender, self._dealings, self._uploaders, complaint.context)
        accused = self._dealings.get(complaint.accused)
        hint = "The sender goes without."
        if complaint.hospital != sender or complaint.accused == sender or accused is None:
            raise ComplaintError(f"{sender} complains about nobody else of this attempt", hint=hint)
        if complaint.commitment != accused.commitment.digest():
            raise ComplaintError(f"{sender} complains about another dealing", hint=hint)
        try:
            verify(self._roster.identities[sender], COMPLAINT_KIND, complaint.payload(), complaint.signature)
        except IdentityError:
            raise ComplaintError(f"a complaint is not signed by {sender}", hint=hint) from None
        self.complaint, self.at_fault = complaint, complaint.accused
        self._end()

    def survivors(self) -> Survivors:
        """Close stage 3: U3 is whoever has uploaded.

        Raises:
            TooFewLeftError: Fewer than the threshold; the attempt is over, and nothing is unmasked.
        """
        self._close(Stage.UPLOAD, self._uploaders, "uploads")
        return Survivors(context=self._context, uploaders=tuple(sorted(self._uploaders)))

    # Stage 4

    def receive_agreement(self, sender: str, agreement: Agreement) -> None:
        """Take an uploader's signature on U3.

        Raises:
            UnknownHospitalError, RepeatedReplyError: See ``_receiving``.
            ForeignSignatureError, SurvivorSignatureError: It is another's, or not valid.
        """
        self._receiving(Stage.AGREE, sender, self._uploaders, self._agreements)
        if agreement.hospital != sender:
            raise ForeignSignatureError(f"{sender} sent a signature of {agreement.hospital}", hint="It goes without.")
        check_agreement(agreement, roster=self._roster, context=self._context, uploaders=self._uploaders)
        self._agreements[sender] = agreement

    def unmasking(self) -> Unmasking:
        """Close stage 4: the message for all that signed.

        Raises:
            TooFewLeftError: Fewer than the threshold; the attempt is over, and nothing is unmasked.
        """
        self._close(Stage.AGREE, self._agreements, "signatures")
        agreements = tuple(agreement for _, agreement in sorted(self._agreements.items()))
        return Unmasking(context=self._context, uploaders=tuple(sorted(self._uploaders)), agreements=agreements)

    # Stage 5

    def receive_revealed(self, sender: str, revealed: Revealed) -> None:
        """Take a hospital's shares; one that does not match its commitment discards the reply and names the sender.

        Raises:
            UnknownHospitalError, RepeatedReplyError, UnknownContextError: See ``_receiving``.
            WrongSharesError: Not exactly one share of the right kind per member of U2.
            RevealedShareError: A share is not the one that was committed to.
        """
        self._receiving(Stage.UNMASK, sender, self._agreements, self._revealed, revealed.context)
        dropped = self._dealings.keys() - self._uploaders
        if revealed.of_seeds.keys() != self._uploaders or revealed.of_keys.keys() != dropped:
            raise WrongSharesError(f"{sender} revealed other shares than were asked for", hint="It goes without.")
        kinds: tuple[Literal["seed", "key"], ...] = ("seed", "key")
        for of, shares in zip(kinds, (revealed.of_seeds, revealed.of_keys), strict=True):
            for dealer, share in shares.items():
                sealed = self._dealings[dealer].sealed[sender]
                expected = sealed.self_hash if of == "seed" else sealed.key_hash
                if share_hash(share, context=self._context, of=of, dealer=dealer, holder=sender) != expected:
                    raise RevealedShareError(f"{sender} revealed a changed share of {dealer}", hint="It goes without.")
        self._revealed[sender] = revealed

    def total(self) -> NDArray[np.uint32]:
        """Close stage 5: take every mask off the sum.

        Returns:
            The sum modulo 2**32 of the uploaders' encoded updates, shape ``(d,)``; ``dequantize`` it.

        Raises:
            TooFewLeftError: Fewer than the threshold; the attempt is over, and nothing is unmasked.
            InconsistentDealerError: A dealer's secret is not what it committed to; the attempt is over.
        """
        self._close(Stage.UNMASK, self._revealed, "unmasking replies")
        apply_masks(self._sum, self._masks_to_remove())
        total = self._sum
        self._end()
        return total

    def _masks_to_remove(self) -> list[Mask]:
        position = {name: index for index, name in enumerate(self._cohort, 1)}
        responders = sorted(self._revealed)[: self.announcement.threshold]  # all shares are genuine, so t are enough
        masks = []
        for name in sorted(self._uploaders):
            shares = {position[peer]: self._revealed[peer].of_seeds[name] for peer in responders}
            masks.append(Mask(self_mask_key(self._seed(name, shares), context=self._context), subtract=True))
        for name in sorted(self._dealings.keys() - self._uploaders):
            shares = {position[peer]: self._revealed[peer].of_keys[name] for peer in responders}
            key = self._masking_key(name, shares)
            # What the dropped hospital would have put on is the opposite of what each survivor did put on.
            masks += [_pair_mask(key, name, self._cohort[peer], self._context) for peer in sorted(self._uploaders)]
        return masks

    def _seed(self, dealer: str, shares: Mapping[int, bytes]) -> bytes:
        seed = self._recover(dealer, shares)
        if seed_hash(seed, context=self._context, dealer=dealer) != self._dealings[dealer].commitment.seed_hash:
            raise self._inconsistent(dealer)
        return seed

    def _masking_key(self, dealer: str, shares: Mapping[int, bytes]) -> X25519PrivateKey:
        key = X25519PrivateKey.from_private_bytes(self._recover(dealer, shares))
        if key.public_key().public_bytes_raw() != self._cohort[dealer].masking_key:
            raise self._inconsistent(dealer)
        return key

    def _recover(self, dealer: str, shares: Mapping[int, bytes]) -> bytes:
        try:
            return recover(shares)
        except WrongSharesError:
            raise self._inconsistent(dealer) from None

    def _inconsistent(self, dealer: str) -> InconsistentDealerError:
        self.at_fault = dealer
        self._end()
        return InconsistentDealerError(f"{dealer} dealt shares of something else", hint="Go on without it.")

    def transcript(self) -> Transcript:
        """What this party saw of the attempt so far."""
        commitments = {name: dealing.commitment for name, dealing in self._dealings.items()}
        agreements = tuple(agreement for _, agreement in sorted(self._agreements.items()))
        return _transcript(self.announcement, self._cohort, commitments, self._uploaders, agreements)

    def _receiving(
        self,
        stage: Stage,
        sender: str,
        expected: Collection[str],
        received: Collection[str],
        context: bytes | None = None,
    ) -> None:
        """Check that a reply of this stage is what may come from this sender now.

        Raises:
            AttemptEndedError: The attempt is over.
            SkippedStageError, RepeatedStageError: The stage is not open yet, or closed.
            UnknownHospitalError: The sender is not asked in this stage.
            RepeatedReplyError: It has replied.
            UnknownContextError: The reply is to another attempt.
        """
        self._check_stage(stage)
        if sender not in expected:
            raise UnknownHospitalError(f"{sender} is not asked in stage {stage.value}", hint="Its reply is dropped.")
        if sender in received:
            raise RepeatedReplyError(f"{sender} replied in stage {stage.value} already", hint="The first one counts.")
        if context is not None and context != self._context:
            raise UnknownContextError(f"{sender} replied to another attempt", hint="Its reply is dropped.")

    def _check_stage(self, stage: Stage) -> None:
        if self._stage == Stage.ENDED:
            raise AttemptEndedError("this attempt is over", hint="Begin the next one.")
        if self._stage < stage:
            raise SkippedStageError(f"stage {stage.value} is not open yet", hint="The reply is dropped.")
        if self._stage > stage:
            raise RepeatedStageError(f"stage {stage.value} is closed", hint="The reply is late; it is dropped.")

    def _close(self, stage: Stage, done: Collection[str], what: str) -> None:
        self._check_stage(stage)
        self._closed = stage
        try:
            _check_enough_left(len(done), self.announcement.threshold, what)
        except TooFewLeftError:
            self._end()
            raise
        self._stage = Stage(stage + 1)

    def _end(self) -> None:
        """The attempt is over: what could open single vectors is forgotten, and the sum with it."""
        self._stage = Stage.ENDED
        self._sum = np.zeros(0, np.uint32)
        self._revealed = {name: revealed.model_copy(update=_NOTHING) for name, revealed in self._revealed.items()}


_NOTHING: dict[str, dict[str, bytes]] = {"of_seeds": {}, "of_keys": {}}


# What both sides check


def _pair_mask(own: X25519PrivateKey, name: str, peer: Advertisement, context: bytes) -> Mask:
    """A hospital's mask with a peer: plus where its own name sorts first."""
    names = (name, peer.hospital)
    key = pairwise_mask_key(own, peer.masking_key, context=context, names=names)
    return Mask(key, subtract=name > peer.hospital)


def _public_keys(members: Iterable[Advertisement]) -> set[bytes]:
    return {key for member in members for key in (member.masking_key, member.channel_key)}


def _check_distinct(names: Collection[str]) -> None:
    if len(set(names)) != len(names):
        raise RepeatedHospitalError("one hospital is named twice", hint=_HOSTILE)


def _check_subset(names: Iterable[str], before: Collection[str], what: str) -> None:
    if grown := set(names) - set(before):
        raise CohortGrownError(f"{what} that were not in the stage before: {sorted(grown)}", hint=_HOSTILE)


def _check_enough_left(left: int, threshold: int, what: str) -> None:
    if left < threshold:
        raise TooFewLeftError(f"{left} {what}, {threshold} are needed", hint="The next attempt has fresh keys.")


def _check_commitment(commitment: Commitment, *, roster: Roster, context: bytes, holders: int) -> None:
    identity = roster.identities[commitment.dealer]
    verify_commitment(commitment, identity=identity, context=context, holders=holders)


def check_agreement(agreement: Agreement, *, roster: Roster, context: bytes, uploaders: Iterable[str]) -> None:
    """Check that a hospital signed this list of uploaders, for this attempt.

    Raises:
        SurvivorSignatureError: It did not.
    """
    name, payload = agreement.hospital, survivors_payload(context, uploaders)
    try:
        verify(roster.identities[name], SURVIVORS_KIND, payload, agreement.signature)
    except IdentityError:
        raise SurvivorSignatureError(f"{name}'s signature is not on this list of uploaders", hint=_HOSTILE) from None


def _present(pairs: KeyPairs | None) -> KeyPairs:
    if pairs is None:
        raise AttemptEndedError("the keys of this attempt are gone", hint="Wait for the next one.")
    return pairs


def _transcript(
    announcement: Announcement,
    cohort: Mapping[str, Advertisement],
    commitments: Mapping[str, Commitment],
    uploaders: Iterable[str],
    agreements: tuple[Agreement, ...],
) -> Transcript:
    digests = [SignedDigest(dealer=c.dealer, digest=c.digest(), signature=c.signature) for c in commitments.values()]
    return Transcript(
        announcement=announcement,
        cohort=tuple(member for _, member in sorted(cohort.items())),
        commitments=tuple(sorted(digests, key=lambda signed: signed.dealer)),
        uploaders=tuple(sorted(uploaders)),
        agreements=agreements,
    )
