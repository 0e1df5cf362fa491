"""Every attack on an encrypted sum, through real messages: refused by a code of its own, and nothing opens."""

from collections.abc import Callable
from typing import Any

import pytest

from shared_models.encoding import encoding
from shared_models.messages import (
    Advertised,
    AdvertiseRequest,
    Agreed,
    AgreeRequest,
    Body,
    Dealt,
    Proposal,
    Refusal,
    ShareRequest,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    Update,
    read_reply,
    request,
)
from shared_models.nets.build import build_network
from shared_models.secagg.key_agreement import Advertisement, Announcement
from shared_models.secagg.protocol import Cohort, Coordinator, Delivery, Survivors, Unmasking
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector, vector_digest
from tests.federation import Federation, restart

VICTIM, OTHER, THIRD, LAST = NAMES = tuple(f"hospital-{k}" for k in range(1, 5))


class Liar:
    """A coordinator of one's own: each method is one honest stage, and says what it would send to the victim."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        plan = federation.plan
        self.parameters = parameters_to_vector(build_network(plan.network, find_task(plan.task), seed=plan.seed))
        self.roster = federation.roster()
        for name in NAMES:
            self.ask(name, Proposal(plan=plan.model_dump(mode="json")))

    def ask(self, name: str, body: Body, vector: Any = None) -> Body:
        """One message to one hospital, and its answer."""
        message = request(body, vector, node_id=100, group_id="1", ttl_s=60)
        answer = self.federation.wire.deliver(name, message)
        assert answer is not None
        body, self.vector = read_reply(answer)
        return body

    def announcement(self, **changes: Any) -> Announcement:
        """What an honest coordinator announces."""
        plan = self.federation.plan
        fields = {
            "purpose": "train",
            "study": plan.study,
            "plan_digest": plan.digest(),
            "roster_digest": self.roster.digest,
            "round": 1,
            "attempt": 1,
            "parameters_digest": vector_digest(self.parameters),
            "invited": NAMES,
            "threshold": 3,
        }
        return Announcement(**{**fields, **changes})

    def advertise(self, **changes: Any) -> Cohort:
        """Stage 1."""
        announcement = self.announcement(**changes)
        code = encoding(self.federation.plan, "train", parameters=len(self.parameters), hospitals=4)
        self.party = Coordinator(announcement, roster=self.roster, length=code.length)
        for name in NAMES:
            answer = self.ask(name, AdvertiseRequest(announcement=announcement))
            assert isinstance(answer, Advertised)
            self.party.receive_advertisement(name, answer.advertisement)
        return self.party.cohort()

    def share(self, cohort: Cohort) -> dict[str, Delivery]:
        """Stage 2."""
        for name in NAMES:
            answer = self.ask(name, ShareRequest(cohort=cohort))
            assert isinstance(answer, Dealt)
            self.party.receive_dealing(name, answer.dealing)
        return self.party.deliveries()

    def upload(self, deliveries: dict[str, Delivery], names: tuple[str, ...] = NAMES) -> Survivors:
        """Stage 3."""
        for name in names:
            answer = self.ask(name, TrainRequest(delivery=deliveries[name]), self.parameters)
            assert isinstance(answer, Update)
            assert self.vector is not None
            self.party.receive_upload(name, bytes.fromhex(answer.context), self.vector)  # type: ignore[arg-type]  # lanes
        return self.party.survivors()

    def agree(self, survivors: Survivors) -> Unmasking:
        """Stage 4."""
        for name in survivors.uploaders:
            answer = self.ask(name, AgreeRequest(survivors=survivors))
            assert isinstance(answer, Agreed)
            self.party.receive_agreement(name, answer.agreement)
        return self.party.unmasking()

    def to_agree(self) -> Survivors:
        """Stages 1 to 3."""
        return self.upload(self.share(self.advertise()))


@pytest.fixture
def liar(federation: Federation) -> Liar:
    """A coordinator whose study all four hospitals have approved."""
    return Liar(federation)


def code_of(answer: Body) -> str:
    """The refusal's code; an answer fails the test that wanted a refusal."""
    assert isinstance(answer, Refusal), f"answered with {type(answer).__name__}"
    return answer.code


def test_the_honest_stages_open_the_sum(liar: Liar) -> None:
    """Without this, every refusal below would prove nothing. Of each peer exactly one share is revealed."""
    deliveries = liar.share(liar.advertise())
    unmasking = liar.agree(liar.upload(deliveries, NAMES[:3]))  # the last one drops out after it dealt
    for name in NAMES[:3]:
        answer = liar.ask(name, UnmaskRequest(unmasking=unmasking))
        assert isinstance(answer, Unmasked)
        assert set(answer.revealed.of_seeds) == set(NAMES[:3])
        assert set(answer.revealed.of_keys) == {LAST}
        liar.party.receive_revealed(name, answer.revealed)

    code = encoding(liar.federation.plan, "train", parameters=len(liar.parameters), hospitals=4)
    assert code.decode(liar.party.total(), 3).shape == (code.length,)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"threshold": 2}, "threshold"),
        ({"threshold": 5}, "threshold"),
        ({"invited": NAMES[:2], "threshold": 2}, "threshold"),
        ({"invited": NAMES[1:]}, "not-invited"),
        ({"invited": (*NAMES, "stranger"), "threshold": 4}, "unknown-hospital"),
        ({"invited": (*NAMES, OTHER), "threshold": 4}, "repeated-hospital"),
        ({"roster_digest": "0" * 64}, "roster-mismatch"),
        ({"plan_digest": "0" * 64}, "not-enrolled"),
        ({"round": 99}, "protocol"),
        ({"attempt": 11}, "policy"),
        ({"purpose": "evaluate"}, "protocol"),
    ],
    ids=str,
)
def test_an_announcement_outside_the_rules_is_refused(liar: Liar, changes: dict[str, Any], code: str) -> None:
    """Before a key exists; the next honest one is still accepted."""
    assert code_of(liar.ask(VICTIM, AdvertiseRequest(announcement=liar.announcement(**changes)))) == code
    liar.advertise()


def test_a_replayed_or_older_announcement_is_refused_also_after_a_restart(liar: Liar) -> None:
    """The highest round and attempt is on the disk."""
    liar.advertise(round=2, attempt=2)
    restart(liar.federation, VICTIM)
    liar.ask(VICTIM, Proposal(plan=liar.federation.plan.model_dump(mode="json")))

    for position in ({"round": 2, "attempt": 2}, {"round": 2, "attempt": 1}, {"round": 1, "attempt": 3}):
        answer = liar.ask(VICTIM, AdvertiseRequest(announcement=liar.announcement(**position)))
        assert code_of(answer) == "stale-attempt"


def _with(cohort: Cohort, **changes: Any) -> Cohort:
    members = [m.model_copy(update=changes) if m.hospital == OTHER else m for m in cohort.members]
    return cohort.model_copy(update={"members": tuple(members)})


def _renamed(cohort: Cohort) -> Cohort:
    members: list[Advertisement] = list(cohort.members)
    return cohort.model_copy(update={"members": (*members[:3], members[3].model_copy(update={"hospital": "stranger"}))})


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda c: _with(c, masking_key=bytes([7]) * 32), "key-signature"),
        (lambda c: _with(c, signature=bytes(64)), "key-signature"),
        (lambda c: _with(c, channel_key=c.members[0].channel_key), "repeated-key"),
        (lambda c: c.model_copy(update={"members": (*c.members, c.members[1])}), "repeated-hospital"),
        (_renamed, "unknown-hospital"),
        (lambda c: c.model_copy(update={"members": c.members[1:]}), "own-key"),
        (lambda c: c.model_copy(update={"members": c.members[:2]}), "too-few-left"),
        (lambda c: c.model_copy(update={"context0": bytes(32)}), "unknown-context"),
    ],
    ids=["substituted", "unsigned", "repeated key", "twice", "stranger", "without it", "reduced", "context"],
)
def test_a_forged_cohort_is_refused(liar: Liar, spoil: Callable[[Cohort], Cohort], code: str) -> None:
    """Keys count only with the signature of a member of the pinned roster; nothing is charged."""
    cohort = liar.advertise()

    assert code_of(liar.ask(VICTIM, ShareRequest(cohort=spoil(cohort)))) == code
    liar.share(cohort)
    assert liar.federation.charges(VICTIM) == []


def test_keys_of_the_attempt_before_are_refused(liar: Liar) -> None:
    """Two attempts with one key would open what the first one hid."""
    old = liar.advertise()
    liar.share(old)
    new = liar.advertise(attempt=2)
    before = next(member for member in old.members if member.hospital == OTHER)
    members = tuple(before if member.hospital == OTHER else member for member in new.members)

    answer = liar.ask(VICTIM, ShareRequest(cohort=new.model_copy(update={"members": members})))

    assert code_of(answer) == "repeated-key"


def _reduced(delivery: Delivery) -> Delivery:
    own = tuple(commitment for commitment in delivery.commitments if commitment.dealer == VICTIM)
    return delivery.model_copy(update={"commitments": own, "sealed": {}})


def _without_own(delivery: Delivery) -> Delivery:
    others = tuple(commitment for commitment in delivery.commitments if commitment.dealer != VICTIM)
    return delivery.model_copy(update={"commitments": others})


def _corrupted(delivery: Delivery) -> Delivery:
    share = delivery.sealed[OTHER]
    text = bytes([share.ciphertext[0] ^ 1]) + share.ciphertext[1:]
    return delivery.model_copy(
        update={"sealed": {**delivery.sealed, OTHER: share.model_copy(update={"ciphertext": text})}}
    )


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_reduced, "too-few-left"),
        (_without_own, "left-out"),
        (_corrupted, "tampered-share"),
        (lambda d: d.model_copy(update={"context": bytes(32)}), "unknown-context"),
    ],
    ids=["U2 reduced to the victim", "without the victim", "corrupted to frame a dealer", "another context"],
)
def test_a_forged_delivery_is_refused_unpaid(liar: Liar, spoil: Callable[[Delivery], Delivery], code: str) -> None:
    """Before anything is charged or read; a coordinator that corrupts a ciphertext gets no complaint about a dealer."""
    deliveries = liar.share(liar.advertise())

    answer = liar.ask(VICTIM, TrainRequest(delivery=spoil(deliveries[VICTIM])), liar.parameters)

    assert code_of(answer) == code
    assert liar.federation.charges(VICTIM) == []


def test_other_parameters_than_announced_are_refused_unpaid(liar: Liar) -> None:
    """Different parameters for different hospitals would tell them apart."""
    deliveries = liar.share(liar.advertise())

    answer = liar.ask(VICTIM, TrainRequest(delivery=deliveries[VICTIM]), liar.parameters + 1)

    assert code_of(answer) == "parameters-mismatch"
    assert liar.federation.charges(VICTIM) == []


def test_no_stage_is_answered_twice(liar: Liar) -> None:
    """Whatever was answered once is refused from then on; one charge."""
    cohort = liar.advertise()
    deliveries = liar.share(cohort)
    assert code_of(liar.ask(VICTIM, ShareRequest(cohort=cohort))) == "repeated-stage"
    survivors = liar.upload(deliveries)
    again = liar.ask(VICTIM, TrainRequest(delivery=deliveries[VICTIM]), liar.parameters)
    assert code_of(again) == "repeated-stage"
    unmasking = liar.agree(survivors)
    assert code_of(liar.ask(VICTIM, AgreeRequest(survivors=survivors))) == "repeated-stage"
    assert isinstance(liar.ask(VICTIM, UnmaskRequest(unmasking=unmasking)), Unmasked)
    assert code_of(liar.ask(VICTIM, UnmaskRequest(unmasking=unmasking))) == "repeated-stage"
    assert liar.federation.charges(VICTIM) == [(1, 1)]


def test_both_shares_of_one_peer_are_never_revealed(liar: Liar) -> None:
    """After one list of uploaders, another one is neither signed nor unmasked."""
    survivors = liar.to_agree()
    unmasking = liar.agree(survivors)
    fork = unmasking.model_copy(update={"uploaders": NAMES[:3], "agreements": unmasking.agreements[:3]})

    signed_twice = liar.ask(VICTIM, AgreeRequest(survivors=survivors.model_copy(update={"uploaders": NAMES[:3]})))
    forked = liar.ask(VICTIM, UnmaskRequest(unmasking=fork))
    honest = liar.ask(VICTIM, UnmaskRequest(unmasking=unmasking))
    afterwards = liar.ask(VICTIM, UnmaskRequest(unmasking=fork))

    assert code_of(signed_twice) == "repeated-stage"
    assert code_of(forked) == "forked-survivors"
    assert isinstance(honest, Unmasked)
    assert code_of(afterwards) == "repeated-stage"


@pytest.mark.parametrize(
    ("uploaders", "code"),
    [
        (NAMES[:2], "too-few-left"),
        (NAMES[1:], "left-out"),
        ((*NAMES[:3], "stranger"), "cohort-grown"),
        ((*NAMES, OTHER), "repeated-hospital"),
    ],
    ids=["shrunk", "without it", "stranger", "twice"],
)
def test_a_false_list_of_uploaders_is_not_signed(liar: Liar, uploaders: tuple[str, ...], code: str) -> None:
    """A lie about who dropped out opens nothing."""
    survivors = liar.to_agree().model_copy(update={"uploaders": uploaders})

    assert code_of(liar.ask(VICTIM, AgreeRequest(survivors=survivors))) == code


def _signed(unmasking: Unmasking, position: int, **changes: Any) -> Unmasking:
    agreements = list(unmasking.agreements)
    agreements[position] = agreements[position].model_copy(update=changes)
    return unmasking.model_copy(update={"agreements": tuple(agreements)})


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda u: _signed(u, 3, hospital="stranger"), "foreign-signature"),
        (lambda u: _signed(u, 3, hospital=OTHER), "repeated-signature"),
        (lambda u: _signed(u, 3, signature=bytes(64)), "survivor-signature"),
        (lambda u: u.model_copy(update={"agreements": u.agreements[:2]}), "too-few-signatures"),
        (lambda u: u.model_copy(update={"context": bytes(32)}), "unknown-context"),
    ],
    ids=["non-member", "twice by one", "forged", "too few", "another context"],
)
def test_signatures_that_do_not_count_open_nothing(
    liar: Liar, spoil: Callable[[Unmasking], Unmasking], code: str
) -> None:
    """A hospital reveals shares for a list only when enough of it have signed it."""
    unmasking = liar.agree(liar.to_agree())

    assert code_of(liar.ask(VICTIM, UnmaskRequest(unmasking=spoil(unmasking)))) == code
    assert isinstance(liar.ask(VICTIM, UnmaskRequest(unmasking=unmasking)), Unmasked)


def test_no_stage_is_skipped(liar: Liar) -> None:
    """Each stage needs the one before."""
    cohort = liar.advertise()
    late = Survivors(context=bytes(32), uploaders=NAMES)
    assert code_of(liar.ask(VICTIM, AgreeRequest(survivors=late))) == "skipped-stage"
    deliveries = liar.share(cohort)
    unmasking = Unmasking(context=deliveries[VICTIM].context, uploaders=NAMES, agreements=())
    assert code_of(liar.ask(VICTIM, UnmaskRequest(unmasking=unmasking))) == "skipped-stage"


def test_the_same_update_is_never_uploaded_twice(liar: Liar) -> None:
    """After an abort the hospital trains again, under a new charge, and sends something else."""
    deliveries = liar.share(liar.advertise())
    liar.ask(VICTIM, TrainRequest(delivery=deliveries[VICTIM]), liar.parameters)
    first = liar.vector
    deliveries = liar.share(liar.advertise(attempt=2))
    liar.ask(VICTIM, TrainRequest(delivery=deliveries[VICTIM]), liar.parameters)

    assert first is not None
    assert liar.vector is not None
    assert (first != liar.vector).mean() > 0.99
    assert liar.federation.charges(VICTIM) == [(1, 1), (1, 2)]


def test_an_attempt_that_this_process_did_not_begin_is_refused(liar: Liar) -> None:
    """Nothing of an attempt survives a restart but its number."""
    deliveries = liar.share(liar.advertise())
    restart(liar.federation, VICTIM)
    liar.ask(VICTIM, Proposal(plan=liar.federation.plan.model_dump(mode="json")))

    answer = liar.ask(VICTIM, TrainRequest(delivery=deliveries[VICTIM]), liar.parameters)

    assert code_of(answer) == "unknown-context"
