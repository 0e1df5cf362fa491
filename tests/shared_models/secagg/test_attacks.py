"""Every attack of the design is refused with an error of its own, and what was honest before still works after it."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rfc8785
from numpy.typing import NDArray

from shared_models import errors
from shared_models.identity import sign
from shared_models.secagg import protocol
from shared_models.secagg.key_agreement import Advertisement, KeyPairs, advertise
from shared_models.secagg.protocol import (
    Agreement,
    Cohort,
    CohortPolicy,
    Complaint,
    Coordinator,
    Hospital,
    Positions,
    Revealed,
    Survivors,
    Unmasking,
    survivors_payload,
)
from shared_models.secagg.secret_sharing import SealedShare, Secret, Shares
from shared_models.secagg.secret_sharing import seal as genuine_seal
from shared_models.secagg.secret_sharing import split as genuine_split
from tests.shared_models.secagg.attempts import PARAMETERS, PLAN, Attempt, announcement, identity, names

COUNT = 5  # t is 4: one may drop out
NAMES = names(COUNT)
VICTIM, OTHER, THIRD = sorted(NAMES)[:3]


def finish(attempt: Attempt, stage: int) -> None:
    """From a stage on to the end, and the sum is exact: the attack has changed nothing."""
    for step in (attempt.advertise, attempt.share, attempt.upload, attempt.agree)[stage - 1 :]:
        step()
    np.testing.assert_array_equal(attempt.unmask(), attempt.plain_sum({}))


# stage 1, at the hospital


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"threshold": 3}, errors.ThresholdError),
        ({"threshold": 6}, errors.ThresholdError),
        ({"threshold": 0}, errors.ThresholdError),
        ({"plan_digest": "0" * 64}, errors.PlanNotApprovedError),
        ({"roster_digest": "0" * 64}, errors.RosterMismatchError),
        ({"invited": tuple(NAMES[1:])}, errors.NotInvitedError),
        ({"invited": (*NAMES, "stranger")}, errors.UnknownHospitalError),
        ({"invited": (*NAMES, NAMES[1])}, errors.RepeatedHospitalError),
        ({"invited": tuple(NAMES[:2]), "threshold": 2}, errors.TooFewHospitalsError),
        ({"invited": (NAMES[0],), "threshold": 1}, errors.TooFewHospitalsError),
    ],
)
def test_an_announcement_outside_the_rules_is_refused(
    changes: dict[str, Any], error: type[errors.FederationError]
) -> None:
    """Before a key exists; and the next announcement, an honest one, is still accepted."""
    attempt = Attempt(COUNT)

    with pytest.raises(error):
        attempt.hospitals[NAMES[0]].advertise(announcement(NAMES, **changes), plan_digest=PLAN)

    finish(attempt, 1)


def test_more_than_a_hundred_hospitals_are_refused() -> None:
    """By both sides."""
    with pytest.raises(errors.TooManyHospitalsError):
        Attempt(101)
    attempt = Attempt(100)
    more = announcement([*attempt.names, "uninvited"])
    with pytest.raises(errors.TooManyHospitalsError):
        attempt.hospitals[attempt.names[0]].advertise(more, plan_digest=PLAN)


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (CohortPolicy(minimum_threshold=5), errors.ThresholdError),
        (CohortPolicy(minimum_hospitals=6), errors.TooFewHospitalsError),
    ],
)
def test_the_hospitals_own_policy_may_be_stricter(policy: CohortPolicy, error: type[errors.PolicyError]) -> None:
    """A legal threshold, and a legal number of hospitals, but not enough for this one."""
    attempt = Attempt(COUNT)
    strict = attempt.hospital(NAMES[0], policy=policy)

    with pytest.raises(error):
        strict.advertise(attempt.announcement, plan_digest=PLAN)


@pytest.mark.parametrize("position", [(3, 2), (3, 1), (2, 9), (1, 1)])
def test_a_replayed_or_older_attempt_is_refused(position: tuple[int, int]) -> None:
    """The highest (round, attempt) counts, also after a restart; another purpose has its own."""
    saved: dict[tuple[str, str], tuple[int, int]] = {}
    attempt = Attempt(COUNT)
    save = lambda study, purpose, *at: saved.update({(study, purpose): at})  # noqa: E731 - a callback of one line
    positions = Positions(save=save)
    hospital = attempt.hospital(NAMES[0], positions=positions)
    hospital.advertise(announcement(NAMES, round=3, attempt=2), plan_digest=PLAN)
    replayed = announcement(NAMES, round=position[0], attempt=position[1])

    restarted = attempt.hospital(NAMES[0], positions=Positions(saved))

    for refusing in (hospital, restarted):
        with pytest.raises(errors.StaleAttemptError):
            refusing.advertise(replayed, plan_digest=PLAN)
    restarted.advertise(announcement(NAMES, round=3, attempt=2, purpose="evaluate"), plan_digest=PLAN)
    restarted.advertise(announcement(NAMES, round=3, attempt=3), plan_digest=PLAN)


def test_no_key_leaves_before_its_position_is_durable() -> None:
    """If it cannot be saved there is no reply, and the attempt is not offered again."""
    attempt = Attempt(COUNT)

    def broken(*_: object) -> None:
        raise errors.LedgerError("disk full")

    hospital = attempt.hospital(NAMES[0], positions=Positions(save=broken))

    with pytest.raises(errors.LedgerError):
        hospital.advertise(attempt.announcement, plan_digest=PLAN)
    with pytest.raises(errors.StaleAttemptError):
        hospital.advertise(attempt.announcement, plan_digest=PLAN)
    with pytest.raises(errors.UnknownContextError):
        hospital.share(Cohort(context0=attempt.announcement.context0, members=()))


def test_a_hospital_is_itself_on_its_roster() -> None:
    """With its own key: otherwise nobody would accept what it signs."""
    attempt = Attempt(COUNT)

    with pytest.raises(errors.UnknownHospitalError):
        Hospital(NAMES[0], identity(NAMES[1]), roster=attempt.roster, positions=Positions())


# stage 2, at the hospital


def fresh_keys(attempt: Attempt, name: str, signer: str | None = None) -> Advertisement:
    pairs = KeyPairs.generate(np.random.default_rng().bytes)
    return advertise(pairs, identity(signer or name), hospital=name, context0=attempt.announcement.context0)


def substituted(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members[OTHER] = fresh_keys(attempt, OTHER, signer="uninvited")


def replaced_key(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members[OTHER] = members[OTHER].model_copy(update={"masking_key": fresh_keys(attempt, OTHER).masking_key})


def unsigned(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members[OTHER] = members[OTHER].model_copy(update={"signature": bytes(64)})


def another_attempts(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    context0 = announcement(NAMES, attempt=2).context0
    pairs = KeyPairs.generate(np.random.default_rng().bytes)
    members[OTHER] = advertise(pairs, identity(OTHER), hospital=OTHER, context0=context0)


def copied(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members[OTHER] = members[OTHER].model_copy(update={"masking_key": members[THIRD].masking_key})


def copied_role(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members[OTHER] = members[OTHER].model_copy(update={"masking_key": members[OTHER].channel_key})


def twice(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members["again"] = members[OTHER]


def stranger(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members["stranger"] = fresh_keys(attempt, "stranger")


def uninvited(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members["uninvited"] = fresh_keys(attempt, "uninvited")


def own_key_replaced(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    members[VICTIM] = fresh_keys(attempt, VICTIM)


def own_key_missing(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    del members[VICTIM]


def victim_alone(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    for name in set(members) - {VICTIM}:
        del members[name]


def weak(attempt: Attempt, members: dict[str, Advertisement]) -> None:
    fields = {"context0": attempt.announcement.context0.hex(), "masking_key": "00" * 32}
    honest = members[OTHER]
    payload = rfc8785.dumps({**fields, "channel_key": honest.channel_key.hex(), "hospital": OTHER})
    signature = sign(identity(OTHER), "secagg-keys", payload)
    members[OTHER] = honest.model_copy(update={"masking_key": bytes(32), "signature": signature})


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (substituted, errors.KeySignatureError),
        (replaced_key, errors.KeySignatureError),
        (unsigned, errors.KeySignatureError),
        (another_attempts, errors.KeySignatureError),
        (copied, errors.RepeatedKeyError),
        (copied_role, errors.RepeatedKeyError),
        (twice, errors.RepeatedHospitalError),
        (stranger, errors.UnknownHospitalError),
        (uninvited, errors.UnknownHospitalError),
        (own_key_replaced, errors.OwnKeyError),
        (own_key_missing, errors.OwnKeyError),
        (victim_alone, errors.TooFewLeftError),
        (weak, errors.WeakKeyError),
    ],
)
def test_a_forged_cohort_is_refused(
    attack: Callable[[Attempt, dict[str, Advertisement]], None], error: type[errors.FederationError]
) -> None:
    """Before a share exists; the honest cohort is accepted afterwards."""
    attempt = Attempt(COUNT).up_to(2)
    members = {member.hospital: member for member in attempt.cohort.members}
    attack(attempt, members)

    with pytest.raises(error):
        attempt.hospitals[VICTIM].share(Cohort(context0=attempt.cohort.context0, members=tuple(members.values())))

    finish(attempt, 2)


def test_a_key_of_the_attempt_before_is_refused() -> None:
    """A member that keeps its keys for two attempts would have them opened by the first drop-out."""
    first = Attempt(COUNT).up_to(3)
    second = Attempt(COUNT, hospitals=first.hospitals, attempt=2)
    second.advertise()
    old = next(member for member in first.cohort.members if member.hospital == OTHER)
    payload = {"context0": second.announcement.context0.hex(), "hospital": OTHER}
    keys = {"masking_key": old.masking_key.hex(), "channel_key": old.channel_key.hex()}
    signature = sign(identity(OTHER), "secagg-keys", rfc8785.dumps(payload | keys))
    reused = old.model_copy(update={"signature": signature})
    members = tuple(reused if member.hospital == OTHER else member for member in second.cohort.members)

    with pytest.raises(errors.RepeatedKeyError, match="attempt before"):
        second.hospitals[VICTIM].share(Cohort(context0=second.cohort.context0, members=members))

    finish(second, 2)


def test_policy_counts_who_is_there_and_not_who_was_invited() -> None:
    """Enough were invited, enough for the threshold came, too few for this hospital."""
    attempt = Attempt(COUNT)
    attempt.hospitals[VICTIM] = attempt.hospital(VICTIM, policy=CohortPolicy(minimum_hospitals=5))
    attempt.advertise(silent=[OTHER])

    with pytest.raises(errors.TooFewHospitalsError):
        attempt.hospitals[VICTIM].share(attempt.cohort)


# one reply per stage and context


def test_no_stage_is_answered_twice() -> None:
    """Not with the same request, and not with another cohort, list of uploaders, or set of signatures."""
    attempt = Attempt(COUNT).up_to(2)
    victim = attempt.hospitals[VICTIM]
    smaller = Cohort(context0=attempt.cohort.context0, members=attempt.cohort.members[:4])
    attempt.share()
    for cohort in (attempt.cohort, smaller):
        with pytest.raises(errors.RepeatedStageError):
            victim.share(cohort)
    attempt.upload()
    with pytest.raises(errors.RepeatedStageError):
        victim.accept(attempt.deliveries[VICTIM], parameters_digest=PARAMETERS)
    with pytest.raises(errors.RepeatedStageError):
        victim.upload(np.zeros(8, np.uint32), charge="another")
    attempt.agree()
    shrunk = Survivors(context=attempt.survivors.context, uploaders=attempt.survivors.uploaders[:4])
    for survivors in (attempt.survivors, shrunk):
        with pytest.raises(errors.RepeatedStageError):
            victim.agree(survivors)
    attempt.unmask()
    with pytest.raises(errors.RepeatedStageError):
        victim.unmask(attempt.unmasking)


def test_stage_3_is_accepted_once_also_before_the_upload() -> None:
    """While it trains, no second list of dealers gets in."""
    attempt = Attempt(COUNT).up_to(3)
    victim, delivery = attempt.hospitals[VICTIM], attempt.deliveries[VICTIM]
    victim.accept(delivery, parameters_digest=PARAMETERS)

    with pytest.raises(errors.RepeatedStageError):
        victim.accept(delivery, parameters_digest=PARAMETERS)


@pytest.mark.parametrize("reached", [1, 2, 3, 4])
def test_no_stage_is_skipped(reached: int) -> None:
    """Whatever is asked too early is refused."""
    whole = Attempt(COUNT).up_to(5)
    attempt = Attempt(COUNT, hospitals=None).up_to(reached)
    victim = attempt.hospitals[VICTIM]
    later = [
        lambda: victim.share(whole.cohort),
        lambda: victim.accept(whole.deliveries[VICTIM], parameters_digest=PARAMETERS),
        lambda: victim.agree(whole.survivors),
        lambda: victim.unmask(whole.unmasking),
    ]

    for ask in later[reached - 1 :]:
        with pytest.raises((errors.SkippedStageError, errors.UnknownContextError)):
            ask()
    if reached > 1:
        finish(attempt, reached)


def test_an_upload_comes_after_stage_3s_checks() -> None:
    """A fault of the program, and not of a peer; refused all the same."""
    attempt = Attempt(COUNT).up_to(3)

    with pytest.raises(errors.SkippedStageError):
        attempt.hospitals[VICTIM].upload(np.zeros(8, np.uint32), charge="a-charge")


def test_messages_of_another_attempt_are_refused() -> None:
    """Replayed from before, or for a process that has restarted meanwhile."""
    first = Attempt(COUNT).up_to(5)
    second = Attempt(COUNT, hospitals=first.hospitals, attempt=2).up_to(2)
    victim = second.hospitals[VICTIM]
    restarted = second.hospital(VICTIM)

    for hospital in (victim, restarted):
        with pytest.raises(errors.UnknownContextError):
            hospital.share(first.cohort)
    second.share()
    with pytest.raises(errors.UnknownContextError):
        victim.accept(first.deliveries[VICTIM], parameters_digest=PARAMETERS)
    second.upload()
    with pytest.raises(errors.UnknownContextError):
        victim.agree(first.survivors)
    second.agree()
    with pytest.raises(errors.UnknownContextError):
        victim.unmask(first.unmasking)
    np.testing.assert_array_equal(second.unmask(), second.plain_sum({}))


def test_an_abandoned_attempt_cannot_go_on() -> None:
    """Its secrets are gone."""
    attempt = Attempt(COUNT).up_to(3)
    victim = attempt.hospitals[VICTIM]

    victim.abandon()

    with pytest.raises(errors.AttemptEndedError):
        victim.accept(attempt.deliveries[VICTIM], parameters_digest=PARAMETERS)


# stage 3, at the hospital


def test_a_cohort_reduced_to_the_victim_is_refused() -> None:
    """Its masks would be the coordinator's own, or none."""
    attempt = Attempt(COUNT).up_to(3)
    delivery = attempt.deliveries[VICTIM]
    for keep in (1, 2, 3):
        dealers = [VICTIM, OTHER, THIRD][:keep]
        reduced = delivery.model_copy(
            update={
                "commitments": tuple(c for c in delivery.commitments if c.dealer in dealers),
                "sealed": {name: sealed for name, sealed in delivery.sealed.items() if name in dealers},
            }
        )
        with pytest.raises(errors.TooFewLeftError):
            attempt.hospitals[VICTIM].accept(reduced, parameters_digest=PARAMETERS)

    finish(attempt, 3)


def change_delivery(attempt: Attempt, **changes: Any) -> Any:
    return attempt.deliveries[VICTIM].model_copy(update=changes)


def test_other_parameters_than_announced_are_refused() -> None:
    """A gradient at parameters of the attacker's choice says more."""
    attempt = Attempt(COUNT).up_to(3)

    with pytest.raises(errors.ParametersMismatchError):
        attempt.hospitals[VICTIM].accept(attempt.deliveries[VICTIM], parameters_digest="0" * 64)

    finish(attempt, 3)


def test_a_changed_list_of_dealers_is_refused() -> None:
    """Grown, doubled, without the receiver, without a share, forged, or of the wrong size."""
    attempt = Attempt(COUNT)
    attempt.advertise(silent=[THIRD])
    attempt.share()
    delivery = attempt.deliveries[VICTIM]
    own = next(c for c in delivery.commitments if c.dealer == VICTIM)
    other = next(c for c in delivery.commitments if c.dealer == OTHER)
    rest = tuple(c for c in delivery.commitments if c not in (own, other))
    outsider = other.model_copy(update={"dealer": THIRD})
    lists: dict[type[Exception], tuple[Any, ...]] = {
        errors.CohortGrownError: (own, other, *rest, outsider),
        errors.RepeatedHospitalError: (own, other, other, *rest),
        errors.LeftOutError: (other.model_copy(update={"dealer": VICTIM}), other, *rest),
    }
    refused: list[tuple[type[Exception], dict[str, Any]]] = [(e, {"commitments": c}) for e, c in lists.items()]
    forged: list[dict[str, Any]] = [
        {"commitments": (own, other.model_copy(update={"signature": bytes(64)}), *rest)},
        {"commitments": (own, other.model_copy(update={"leaves": bytes(32 * 4)}), *rest)},
        {"commitments": (own, other.model_copy(update={"leaves": other.leaves[:-32]}), *rest)},
        {"sealed": {name: sealed for name, sealed in delivery.sealed.items() if name != OTHER}},
        {"sealed": {**delivery.sealed, THIRD: delivery.sealed[OTHER]}},
    ]

    refused += [(errors.CommitmentError, changes) for changes in forged]

    for error, changes in refused:
        with pytest.raises(error):
            attempt.hospitals[VICTIM].accept(change_delivery(attempt, **changes), parameters_digest=PARAMETERS)

    assert attempt.hospitals[VICTIM].accept(delivery, parameters_digest=PARAMETERS) is None


def test_a_coordinator_that_corrupts_a_ciphertext_frames_nobody() -> None:
    """The dealer signed every ciphertext: no complaint, and the genuine message is accepted afterwards."""
    attempt = Attempt(COUNT).up_to(3)
    honest = attempt.deliveries[VICTIM].sealed
    corrupted = bytes([honest[OTHER].ciphertext[0] ^ 1]) + honest[OTHER].ciphertext[1:]
    frames = [
        honest[OTHER].model_copy(update={"ciphertext": corrupted}),
        honest[OTHER].model_copy(update={"ciphertext": b""}),
        honest[OTHER].model_copy(update={"key_hash": bytes(32)}),
        honest[THIRD],
    ]

    for frame in frames:
        with pytest.raises(errors.TamperedShareError):
            attempt.hospitals[VICTIM].accept(
                change_delivery(attempt, sealed={**honest, OTHER: frame}), parameters_digest=PARAMETERS
            )

    finish(attempt, 3)


def garbage(shares: Shares, **options: Any) -> SealedShare:
    """Signed as it is, and it does not decrypt."""
    sealed = genuine_seal(shares, **options)
    return sealed.model_copy(update={"ciphertext": bytes(len(sealed.ciphertext))})


def another_share(shares: Shares, **options: Any) -> SealedShare:
    """Decrypts, and is not what the dealer committed to."""
    sealed = genuine_seal(shares, **options)
    wrong = genuine_seal(Shares(Secret(bytes(33)), shares.of_key), **options)
    return sealed.model_copy(update={"ciphertext": wrong.ciphertext})


def short_share(shares: Shares, **options: Any) -> SealedShare:
    """Decrypts, matches its commitment, and is no share."""
    return genuine_seal(Shares(Secret(b"short"), shares.of_key), **options)


def deal_badly(attempt: Attempt, name: str, monkeypatch: pytest.MonkeyPatch, function: str, replacement: Any) -> None:
    """Stages 1 and 2, with one dealer whose program was changed."""
    attempt.advertise()
    for member in attempt.names:
        with monkeypatch.context() as patch:
            if member == name:
                patch.setattr(protocol, function, replacement)
            dealing = attempt.hospitals[member].share(attempt.cohort)
        attempt.coordinator.receive_dealing(member, dealing)
    attempt.deliveries = attempt.coordinator.deliveries()


@pytest.mark.parametrize("bad", [garbage, another_share, short_share])
def test_a_bad_share_ends_the_attempt_with_a_signed_complaint(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator goes on without the dealer; the complainant's secrets of this attempt are gone."""
    attempt = Attempt(COUNT)
    deal_badly(attempt, OTHER, monkeypatch, "seal", bad)
    victim = attempt.hospitals[VICTIM]

    complaint = victim.accept(attempt.deliveries[VICTIM], parameters_digest=PARAMETERS)

    assert complaint is not None
    assert (complaint.hospital, complaint.accused) == (VICTIM, OTHER)
    with pytest.raises(errors.AttemptEndedError):
        victim.upload(np.zeros(8, np.uint32), charge="a-charge")
    attempt.coordinator.receive_complaint(VICTIM, complaint)
    assert attempt.coordinator.at_fault == OTHER
    with pytest.raises(errors.AttemptEndedError):
        attempt.coordinator.survivors()


def test_a_complaint_counts_only_with_its_senders_signature_about_another() -> None:
    """Neither the coordinator's friends nor a stranger can exclude a hospital in somebody else's name."""
    attempt = Attempt(COUNT).up_to(3)
    commitment = next(c for c in attempt.deliveries[VICTIM].commitments if c.dealer == OTHER)
    honest = Complaint(
        context=attempt.deliveries[VICTIM].context,
        hospital=VICTIM,
        accused=OTHER,
        commitment=commitment.digest(),
        signature=bytes(64),
    )

    def signed(**changes: Any) -> Complaint:
        complaint = honest.model_copy(update=changes)
        return complaint.model_copy(
            update={"signature": sign(identity(VICTIM), "secagg-complaint", complaint.payload())}
        )

    for wrong in (
        honest,
        signed(hospital=THIRD),
        signed(accused=VICTIM),
        signed(accused="uninvited"),
        signed(commitment=bytes(32)),
    ):
        with pytest.raises(errors.ComplaintError):
            attempt.coordinator.receive_complaint(VICTIM, wrong)
    with pytest.raises(errors.UnknownContextError):
        attempt.coordinator.receive_complaint(VICTIM, signed(context=bytes(32)))

    finish(attempt, 3)


# what is uploaded


def test_the_same_update_is_not_uploaded_after_an_abort() -> None:
    """Two uploads of one update under two masks: their difference, with both sums, would say something about it."""
    first = Attempt(COUNT).up_to(3)
    victim = first.hospitals[VICTIM]
    victim.accept(first.deliveries[VICTIM], parameters_digest=PARAMETERS)
    victim.upload(first.encoded[VICTIM].copy(), charge="charge-7")
    second = Attempt(COUNT, hospitals=first.hospitals, attempt=2).up_to(3)
    victim.accept(second.deliveries[VICTIM], parameters_digest=PARAMETERS)

    with pytest.raises(errors.RepeatedUpdateError):
        victim.upload(first.encoded[VICTIM].copy(), charge="charge-7")

    masked = victim.upload(second.encoded[VICTIM].copy(), charge="charge-8")
    assert not np.array_equal(masked, second.encoded[VICTIM])


def test_a_vector_that_cannot_be_masked_is_not_uploaded() -> None:
    """And its charge is not used up."""
    attempt = Attempt(COUNT).up_to(3)
    victim = attempt.hospitals[VICTIM]
    victim.accept(attempt.deliveries[VICTIM], parameters_digest=PARAMETERS)
    floats: Any = np.zeros(8)

    with pytest.raises(errors.MalformedVectorError):
        victim.upload(floats, charge="a-charge")

    victim.upload(np.zeros(8, np.uint32), charge="a-charge")


# stage 4, at the hospital


@pytest.mark.parametrize(
    ("uploaders", "error"),
    [
        ((*NAMES, "uninvited"), errors.CohortGrownError),
        ((*NAMES, NAMES[0]), errors.RepeatedHospitalError),
        (tuple(set(NAMES) - {VICTIM}), errors.LeftOutError),
        ((VICTIM, OTHER, THIRD), errors.TooFewLeftError),
        ((VICTIM,), errors.TooFewLeftError),
    ],
)
def test_a_false_list_of_uploaders_is_not_signed(uploaders: tuple[str, ...], error: type[Exception]) -> None:
    """The honest one is, afterwards."""
    attempt = Attempt(COUNT).up_to(4)

    with pytest.raises(error):
        attempt.hospitals[VICTIM].agree(Survivors(context=attempt.survivors.context, uploaders=uploaders))

    finish(attempt, 4)


# stage 5, at the hospital


def agreement(name: str, context: bytes, uploaders: tuple[str, ...], signer: str | None = None) -> Agreement:
    payload = survivors_payload(context, uploaders)
    return Agreement(hospital=name, signature=sign(identity(signer or name), "secagg-survivors", payload))


def test_a_forked_or_shrinking_list_opens_nothing() -> None:
    """However many signatures it has: this hospital signed another one, so it reveals no key of an uploader."""
    attempt = Attempt(COUNT).up_to(5)
    context = attempt.survivors.context
    for uploaders in (tuple(attempt.others(OTHER)), (*NAMES, "uninvited"), (*NAMES, VICTIM)):
        agreements = tuple(agreement(name, context, uploaders) for name in attempt.others(OTHER))
        with pytest.raises(errors.ForkedSurvivorsError):
            attempt.hospitals[VICTIM].unmask(Unmasking(context=context, uploaders=uploaders, agreements=agreements))

    finish(attempt, 5)


def test_signatures_that_do_not_count_open_nothing() -> None:
    """Too few, by a stranger, twice by one, in another's name, on another list, of another kind or context."""
    attempt = Attempt(COUNT).up_to(5)
    context, uploaders = attempt.survivors.context, attempt.survivors.uploaders
    genuine = attempt.unmasking.agreements[:4]
    without_other = [signed for signed in genuine if signed.hospital != OTHER][:3]
    another_kind = sign(identity(OTHER), "secagg-complaint", survivors_payload(context, uploaders))
    signed_sets: list[tuple[type[Exception], tuple[Agreement, ...]]] = [
        (errors.TooFewSignaturesError, ()),
        (errors.TooFewSignaturesError, genuine[:3]),
        (errors.ForeignSignatureError, (*genuine, agreement("uninvited", context, uploaders))),
        (errors.RepeatedSignatureError, (*genuine[:3], genuine[0])),
        (errors.SurvivorSignatureError, (*genuine[:3], agreement(NAMES[4], context, uploaders, signer="uninvited"))),
        (errors.SurvivorSignatureError, (*genuine[:3], agreement(genuine[3].hospital, context, uploaders[:4]))),
        (errors.SurvivorSignatureError, (*genuine[:3], agreement(genuine[3].hospital, bytes(32), uploaders))),
        (errors.SurvivorSignatureError, (*without_other, Agreement(hospital=OTHER, signature=another_kind))),
    ]

    for error, agreements in signed_sets:
        with pytest.raises(error):
            attempt.hospitals[VICTIM].unmask(Unmasking(context=context, uploaders=uploaders, agreements=agreements))

    finish(attempt, 5)


def test_both_shares_of_one_peer_are_never_revealed() -> None:
    """A peer that uploaded and is said to have dropped out afterwards: its masking key stays closed."""
    attempt = Attempt(COUNT)
    attempt.advertise()
    attempt.share()
    attempt.upload(silent=[OTHER])
    attempt.agree()
    victim = attempt.hospitals[VICTIM]

    revealed = victim.unmask(attempt.unmasking)

    assert revealed.of_seeds.keys() == set(attempt.others(OTHER))
    assert revealed.of_keys.keys() == {OTHER}
    context = attempt.survivors.context
    everybody = tuple(sorted(NAMES))
    agreements = tuple(agreement(name, context, everybody) for name in NAMES)
    with pytest.raises(errors.RepeatedStageError):
        victim.unmask(Unmasking(context=context, uploaders=everybody, agreements=agreements))


# at the coordinator


def test_a_dealer_of_another_seed_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shares match their commitments, but what they give is not the seed that was committed to."""
    attempt = Attempt(COUNT)

    def split(secret: bytes, **options: Any) -> list[bytes]:
        return genuine_split(bytes(32), **options)

    deal_badly(attempt, OTHER, monkeypatch, "split", split)
    attempt.upload()
    attempt.agree()

    with pytest.raises(errors.InconsistentDealerError, match=OTHER):
        attempt.unmask()

    assert attempt.coordinator.at_fault == OTHER


def test_a_dealer_of_another_key_is_found_and_named_when_it_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shares give a key that is not the one it advertised."""
    attempt = Attempt(COUNT)

    def split(secret: bytes, **options: Any) -> list[bytes]:
        return genuine_split(bytes(32), **options)

    deal_badly(attempt, OTHER, monkeypatch, "split", split)
    attempt.upload(silent=[OTHER])
    attempt.agree()

    with pytest.raises(errors.InconsistentDealerError, match=OTHER):
        attempt.unmask()


def test_a_dealer_whose_shares_lie_on_no_polynomial_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random field elements give bytes that match nothing, or no secret at all."""
    attempt = Attempt(COUNT)

    def split(secret: bytes, *, holders: int, **_: Any) -> list[bytes]:
        return [b"\0" + np.random.default_rng().bytes(32) for _ in range(holders)]

    deal_badly(attempt, OTHER, monkeypatch, "split", split)
    attempt.upload()
    attempt.agree()

    with pytest.raises(errors.InconsistentDealerError, match=OTHER):
        attempt.unmask()


def test_a_corrupted_share_names_its_sender_and_the_others_are_enough() -> None:
    """One changed share is discarded; t genuine replies are left, and the sum is exact."""
    attempt = Attempt(COUNT).up_to(5)
    revealed = attempt.hospitals[VICTIM].unmask(attempt.unmasking)
    changed = bytes([revealed.of_seeds[OTHER][0] ^ 1]) + revealed.of_seeds[OTHER][1:]
    corrupted = revealed.model_copy(update={"of_seeds": {**revealed.of_seeds, OTHER: changed}})

    with pytest.raises(errors.RevealedShareError, match=VICTIM):
        attempt.coordinator.receive_revealed(VICTIM, corrupted)

    np.testing.assert_array_equal(attempt.unmask(silent=[VICTIM]), attempt.plain_sum({}))


def test_a_reply_with_other_shares_is_refused() -> None:
    """Both of one peer, none of one, or the wrong kind."""
    attempt = Attempt(COUNT).up_to(5)
    honest = attempt.hospitals[VICTIM].unmask(attempt.unmasking)
    share = honest.of_seeds[OTHER]
    without = {name: share for name, share in honest.of_seeds.items() if name != OTHER}
    wrong: list[tuple[dict[str, bytes], dict[str, bytes]]] = [
        (honest.of_seeds, {OTHER: share}),
        (without, {OTHER: share}),
        (without, {}),
        ({**honest.of_seeds, "uninvited": share}, {}),
    ]

    for of_seeds, of_keys in wrong:
        with pytest.raises(errors.WrongSharesError):
            attempt.coordinator.receive_revealed(
                VICTIM, Revealed(context=honest.context, of_seeds=of_seeds, of_keys=of_keys)
            )

    attempt.coordinator.receive_revealed(VICTIM, honest)
    np.testing.assert_array_equal(attempt.unmask(silent=[VICTIM]), attempt.plain_sum({}))


def test_bad_keys_exclude_only_their_sender() -> None:
    """Stage 1: unsigned, another's, copied; the others go on."""
    attempt = Attempt(COUNT)
    theirs = {name: h.advertise(attempt.announcement, plan_digest=PLAN) for name, h in attempt.hospitals.items()}
    coordinator = attempt.coordinator
    coordinator.receive_advertisement(OTHER, theirs[OTHER])
    copied = theirs[OTHER].model_copy(update={"hospital": VICTIM})
    payload = {"context0": attempt.announcement.context0.hex(), "hospital": VICTIM}
    keys = {"masking_key": copied.masking_key.hex(), "channel_key": copied.channel_key.hex()}
    signature = sign(identity(VICTIM), "secagg-keys", rfc8785.dumps(payload | keys))
    wrong: list[tuple[type[Exception], str, Advertisement]] = [
        (errors.KeySignatureError, VICTIM, theirs[VICTIM].model_copy(update={"signature": bytes(64)})),
        (errors.UnknownHospitalError, VICTIM, theirs[THIRD]),
        (errors.UnknownHospitalError, "uninvited", fresh_keys(attempt, "uninvited")),
        (errors.RepeatedKeyError, VICTIM, copied.model_copy(update={"signature": signature})),
        (errors.RepeatedReplyError, OTHER, theirs[OTHER]),
    ]

    for error, sender, advertisement in wrong:
        with pytest.raises(error):
            coordinator.receive_advertisement(sender, advertisement)
    for name in attempt.others(VICTIM):
        if name != OTHER:
            coordinator.receive_advertisement(name, theirs[name])

    attempt.cohort = coordinator.cohort()
    attempt.share()
    finish_without(attempt, VICTIM)


def finish_without(attempt: Attempt, name: str) -> None:
    attempt.upload()
    attempt.agree()
    np.testing.assert_array_equal(attempt.unmask(), attempt.plain_sum({name: 1}))


def test_bad_dealings_exclude_only_their_sender() -> None:
    """Stage 2: a share missing or changed after signing, another's commitment, another attempt."""
    attempt = Attempt(COUNT).up_to(2)
    honest = attempt.hospitals[VICTIM].share(attempt.cohort)
    others = attempt.hospitals[OTHER].share(attempt.cohort)
    missing = {name: sealed for name, sealed in honest.sealed.items() if name != OTHER}
    changed = {**honest.sealed, OTHER: honest.sealed[THIRD]}
    unsigned = honest.commitment.model_copy(update={"signature": bytes(64)})
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (errors.CommitmentError, {"sealed": missing}),
        (errors.CommitmentError, {"sealed": changed}),
        (errors.CommitmentError, {"commitment": unsigned}),
        (errors.CommitmentError, {"commitment": others.commitment}),
        (errors.UnknownContextError, {"context": bytes(32)}),
    ]

    for error, changes in wrong:
        with pytest.raises(error):
            attempt.coordinator.receive_dealing(VICTIM, honest.model_copy(update=changes))
    attempt.coordinator.receive_dealing(OTHER, others)
    attempt.share(silent=[VICTIM, OTHER])

    finish_without(attempt, VICTIM)


@pytest.mark.parametrize(
    "vector",
    [np.zeros(7, np.uint32), np.zeros(9, np.uint32), np.zeros(8), np.zeros((8, 1), np.uint32), np.zeros(8, np.int64)],
    ids=["short", "long", "float", "matrix", "wide"],
)
def test_a_malformed_upload_is_not_added(vector: NDArray[Any]) -> None:
    """Its sender counts as dropped out; the sum of the others is exact."""
    attempt = Attempt(COUNT).up_to(3)
    coordinator, context = attempt.coordinator, attempt.deliveries[VICTIM].context

    with pytest.raises(errors.MalformedVectorError):
        coordinator.receive_upload(VICTIM, context, vector)

    attempt.upload(silent=[VICTIM])
    attempt.agree()
    np.testing.assert_array_equal(attempt.unmask(), attempt.plain_sum({VICTIM: 3}))


def test_replies_out_of_place_are_refused() -> None:
    """Too early, too late, twice, by somebody who is not asked, or to another attempt."""
    attempt = Attempt(COUNT).up_to(3)
    coordinator, context, zeros = attempt.coordinator, attempt.deliveries[VICTIM].context, np.zeros(8, np.uint32)
    nobody = Agreement(hospital=VICTIM, signature=bytes(64))

    with pytest.raises(errors.SkippedStageError):
        coordinator.receive_agreement(VICTIM, nobody)
    with pytest.raises(errors.RepeatedStageError):
        coordinator.receive_advertisement(VICTIM, attempt.cohort.members[0])
    with pytest.raises(errors.UnknownHospitalError):
        coordinator.receive_upload("uninvited", context, zeros)
    with pytest.raises(errors.UnknownContextError):
        coordinator.receive_upload(VICTIM, bytes(32), zeros)
    attempt.upload()
    with pytest.raises(errors.RepeatedStageError):
        coordinator.receive_upload(VICTIM, context, zeros)
    with pytest.raises(errors.SurvivorSignatureError):
        coordinator.receive_agreement(VICTIM, nobody)
    with pytest.raises(errors.ForeignSignatureError):
        coordinator.receive_agreement(OTHER, nobody)

    finish(attempt, 4)
    with pytest.raises(errors.AttemptEndedError):
        coordinator.total()


def test_a_second_upload_is_not_added() -> None:
    """The first one counts."""
    attempt = Attempt(COUNT).up_to(3)
    context = attempt.deliveries[VICTIM].context
    attempt.coordinator.receive_upload(VICTIM, context, np.zeros(8, np.uint32))

    with pytest.raises(errors.RepeatedReplyError):
        attempt.coordinator.receive_upload(VICTIM, context, np.zeros(8, np.uint32))


@pytest.mark.parametrize(
    ("count", "changes", "error"),
    [
        (1, {"threshold": 1}, errors.TooFewHospitalsError),
        (2, {"threshold": 2}, errors.TooFewHospitalsError),
        (5, {"threshold": 3}, errors.ThresholdError),
        (5, {"threshold": 6}, errors.ThresholdError),
        (3, {"invited": (*names(3), "stranger")}, errors.UnknownHospitalError),
        (3, {"invited": (*names(3), names(3)[0])}, errors.RepeatedHospitalError),
    ],
)
def test_the_coordinator_refuses_to_begin_what_protects_nothing(
    count: int, changes: dict[str, Any], error: type[Exception]
) -> None:
    """Before anything is sent."""
    with pytest.raises(error):
        Attempt(count, **changes)


def test_a_vector_too_long_for_memory_is_refused_before_anything_is_sent() -> None:
    """Four exabytes."""
    attempt = Attempt(3)

    with pytest.raises(errors.VectorTooLongError):
        Coordinator(attempt.announcement, roster=attempt.roster, length=10**18)


def test_every_refusal_has_a_code_of_its_own() -> None:
    """It is all that crosses the wire; where a record may have been the cause, several causes have one code.

    So have things of another version, whatever they are; an approval of another version is just one that is not there.
    """
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = [kind.code for kind in kinds if issubclass(kind, errors.FederationError)]

    assert len(codes) == len(kinds)
    shared = [code for code, times in Counter(codes).items() if times > 1]
    assert shared == ["error", "pending", "records", "unsupported-version"]
    other_versions = {kind for kind in kinds if kind.__name__.startswith("Unsupported")}
    assert {kind for kind in kinds if getattr(kind, "code", "") == "unsupported-version"} < other_versions
    assert errors.UnsupportedApprovalError.code == errors.PendingError.code == "pending"
    assert errors.PopulationError.code == errors.RecordsError.code == "records"
    assert errors.ComputationError.code == errors.FederationError.code == "error"
    assert [code for code in codes if not re.fullmatch(r"[a-z-]{1,32}", code)] == []
