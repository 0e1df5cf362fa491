"""Whole studies under secure aggregation: who may drop out when, what the wire shows, and that the sum is the sum."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray

from client.bundle import TRANSCRIPTS
from client.randomness import SecureRandom
from client.round import Hospital, Study
from shared_models.encoding import NULL_COORDINATES, encoding, public_weight
from shared_models.messages import (
    Advertised,
    Dealt,
    Lanes,
    Unmasked,
    Update,
    decode,
    encode,
)
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.secagg import protocol
from shared_models.secagg.secret_sharing import SealedShare, Secret, Shares
from shared_models.secagg.secret_sharing import seal as genuine_seal
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector
from tests.federation import Federation, make_federation

BAD = "hospital-2"
STAGES = ("query.advertise", "query.share", "train.round", "query.agree", "query.unmask")


@pytest.mark.parametrize("stage", STAGES)
def test_a_hospital_may_drop_out_at_any_stage(tmp_path: Path, stage: str) -> None:
    """With four hospitals three are enough, at every stage; the report names who was lost, and it is back after."""
    federation = make_federation(tmp_path, rounds=3, deadline_s=2.0)

    def lose(hospital: str, reply: Message) -> Message | None:
        lost = hospital == BAD and reply.metadata.group_id == "2" and reply.metadata.message_type == stage
        return None if lost else reply

    federation.wire.tamper = lose

    federation.run()

    sums = federation.events("sum")
    assert [event["opened"] for event in sums] == [True] * 3
    assert [event["dropped"] for event in sums] == [{}, {BAD: STAGES.index(stage) + 1}, {}]
    uploaded = STAGES.index(stage) > 2
    assert [event["missing"] for event in federation.events("round")] == [[], [] if uploaded else [BAD], []]


def test_with_three_hospitals_no_drop_out_is_tolerated(tmp_path: Path) -> None:
    """The round is tried again and succeeds; nobody was charged for the attempt that ended early."""
    federation = make_federation(tmp_path, hospitals=3, rounds=2, deadline_s=2.0)
    lost: list[str] = []

    def lose(hospital: str, reply: Message) -> Message | None:
        if hospital == BAD and reply.metadata.message_type == STAGES[1] and not lost:
            lost.append(hospital)
            return None
        return reply

    federation.wire.tamper = lose

    federation.run()

    (failed,) = federation.events("attempt-failed")
    assert not failed["charged"]
    assert federation.charges(BAD) == [(1, 2), (2, 1)]


def _spoil_keys(reply: Message) -> None:
    body, _ = decode(reply.content, Advertised)
    worse = body.advertisement.model_copy(update={"signature": bytes(64)})
    reply.content = encode(Advertised(advertisement=worse))


def _spoil_dealing(reply: Message) -> None:
    body, _ = decode(reply.content, Dealt)
    worse = body.dealing.commitment.model_copy(update={"signature": bytes(64)})
    reply.content = encode(Dealt(dealing=body.dealing.model_copy(update={"commitment": worse})))


def _spoil_share(reply: Message) -> None:
    body, _ = decode(reply.content, Unmasked)
    shares = dict(body.revealed.of_seeds)
    shares["hospital-1"] = bytes([shares["hospital-1"][0] ^ 1]) + shares["hospital-1"][1:]
    reply.content = encode(Unmasked(revealed=body.revealed.model_copy(update={"of_seeds": shares})))


@pytest.mark.parametrize(
    ("stage", "spoil", "reason"),
    [
        (STAGES[0], _spoil_keys, "not signed by it"),
        (STAGES[1], _spoil_dealing, "signature|commitment"),
        (STAGES[4], _spoil_share, "changed share of hospital-1"),
    ],
    ids=["keys", "dealing", "revealed share"],
)
def test_a_bad_message_excludes_its_sender_only(federation: Federation, stage: str, spoil: Any, reason: str) -> None:
    """The journal names it, the round's sum opens in the first attempt, the next round has it back."""

    def tamper(hospital: str, reply: Message) -> Message:
        if hospital == BAD and reply.metadata.group_id == "1" and reply.metadata.message_type == stage:
            spoil(reply)
        return reply

    federation.wire.tamper = tamper

    federation.run()

    (left_out,) = federation.events("left-out")
    assert left_out["hospital"] == BAD
    assert any(word in left_out["reason"] for word in reason.split("|"))
    assert [event["opened"] for event in federation.events("sum")] == [True] * 3
    assert federation.events("round")[1]["missing"] == []


def test_a_dealer_of_a_bad_share_ends_the_attempt_and_is_left_out_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its victim complains under signature; the complaint is kept, and the second attempt opens without the dealer."""
    federation = make_federation(tmp_path, rounds=2, privacy={"spare_charges": 1})
    cheated: list[str] = []

    def cheat(shares: Shares, *, key: bytes | None, context: bytes, dealer: str, holder: str) -> SealedShare:
        if dealer == BAD and holder == "hospital-1" and not cheated:
            cheated.append(dealer)
            shares = Shares(Secret(bytes(len(shares.of_seed.reveal()))), shares.of_key)
            return genuine_seal(shares, key=bytes(32), context=context, dealer=dealer, holder=holder)
        return genuine_seal(shares, key=key, context=context, dealer=dealer, holder=holder)

    monkeypatch.setattr(protocol, "seal", cheat)

    federation.run()

    first, second, third = federation.events("sum")
    assert (first["opened"], first["at_fault"]) == (False, BAD)
    assert (second["opened"], second["hospitals"]) == (True, 3)
    assert (third["opened"], third["hospitals"]) == (True, 4)
    evidence = [json.loads(line) for line in (tmp_path / "study" / "sums.jsonl").read_text().splitlines()]
    assert evidence[0]["complaint"]["accused"] == BAD
    assert "complaint" not in evidence[1]


class Ears:
    """What each hospital was about to encode, and what it sent instead: heard inside the hospital, for the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.true: list[tuple[str, NDArray[np.float64], float]] = []
        self.sent: list[NDArray[np.uint32]] = []
        genuine = Hospital._masked

        def listen(
            hospital: Hospital,
            study: Study,
            vector: NDArray[np.float64],
            weight: float,
            charge: Any,
            random: SecureRandom,
        ) -> Lanes:
            self.true.append((hospital.settings.name, vector.copy(), weight))
            masked = genuine(hospital, study, vector, weight, charge, random)
            self.sent.append(masked.copy())
            return masked

        monkeypatch.setattr(Hospital, "_masked", listen)


def test_the_model_is_plain_fedavg_of_the_updates_to_the_stated_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round, beside the average in float64 of what the hospitals had before they encrypted it."""
    ears = Ears(monkeypatch)
    federation = make_federation(tmp_path, rounds=1)
    plan = federation.plan

    _, model = read_model(federation.run() / "model.safetensors")

    start = parameters_to_vector(build_network(plan.network, find_task(plan.task), seed=plan.seed)).astype(np.float64)
    weights = [weight for _, _, weight in ears.true]
    assert sorted(weights) == sorted(
        public_weight(hospital.public_size, plan.weight_cap) for hospital in federation.example.hospitals
    )
    mean = np.average([vector[:-NULL_COORDINATES] for _, vector, _ in ears.true], axis=0, weights=weights)
    code = encoding(plan, "train", parameters=len(start), hospitals=4)
    allowed = code.rounding / sum(weights) + np.abs(start + mean).max() * 2.0**-23
    np.testing.assert_allclose(parameters_to_vector(model), start + mean, rtol=0, atol=allowed)


def test_the_wire_of_a_whole_run_shows_no_update(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one window of any update, as floats or as integers; and what was sent looks like uniform noise."""
    ears = Ears(monkeypatch)

    federation.run()

    wire = b"".join(sent for sender, _, sent in federation.wire.trace if sender != "coordinator")
    code = encoding(federation.plan, "train", parameters=31, hospitals=4)
    assert len(ears.true) == 12
    for (_, vector, weight), sent in zip(ears.true, ears.sent, strict=True):
        assert sent.astype("<u4").tobytes() in wire  # else the search below could not fail
        integers = np.floor(vector * weight * code.scale).astype(np.int64).astype("<u4")
        for plain in (vector.astype("<f4"), vector.astype("<f8"), integers, integers + np.uint32(1)):
            text = plain.tobytes()
            assert not any(text[first : first + 16] in wire for first in range(0, len(text) - 16, 16))
        lanes = sent.view(np.int32).astype(np.float64)
        assert abs(np.corrcoef(lanes, vector)[0, 1]) < 5 / np.sqrt(len(vector))
    _looks_uniform(np.concatenate(ears.sent))


def _looks_uniform(lanes: NDArray[np.uint32]) -> None:
    """Chi-squared over bytes and over the high byte of lanes, against 6 standard deviations of its distribution."""
    for values in (lanes.view(np.uint8), (lanes >> 24).astype(np.uint8)):
        counts = np.bincount(values, minlength=256)
        expected = len(values) / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - 255) < 6 * np.sqrt(2 * 255)


def test_null_coordinates_hold_the_noise_that_the_plan_states(tmp_path: Path) -> None:
    """The sum of 1,024 coordinates without a gradient has the spread that four hospitals' noise has, and no other."""
    federation = make_federation(tmp_path, rounds=1)
    plan = federation.plan

    federation.run()

    (evidence,) = [json.loads(line) for line in (tmp_path / "study" / "sums.jsonl").read_text().splitlines()]
    nulls = np.array(evidence["null_coordinates"])
    step = plan.training.learning_rate * plan.privacy.noise_multiplier * plan.privacy.clip / plan.privacy.sample_rate
    variance = sum(
        (public_weight(hospital.public_size, plan.weight_cap) * step / hospital.public_size) ** 2 * plan.training.steps
        for hospital in federation.example.hospitals
    )
    assert nulls.shape == (NULL_COORDINATES,)
    assert 0.85 < nulls.std() / np.sqrt(variance) < 1.15  # 1,024 draws: 6 standard deviations
    assert abs(nulls.mean()) < 6 * np.sqrt(variance / NULL_COORDINATES)


def test_both_sides_keep_the_same_transcript(federation: Federation) -> None:
    """Who was in the cohort, who uploaded, and the signatures on it: the auditor compares them."""
    federation.run()

    lines = (federation.folder / "study" / "sums.jsonl").read_text().splitlines()
    at_coordinator = [json.loads(line)["transcript"] for line in lines]
    for name in federation.names:
        kept = (federation.settings(name).state / TRANSCRIPTS).read_text().splitlines()
        assert [json.loads(line) for line in kept] == at_coordinator


def test_a_hospital_whose_training_diverges_spoils_nothing(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN cannot be encoded: where training gave none, the update has zeros, and the charge stays."""
    genuine = Hospital._masked

    def diverge(hospital: Hospital, study: Study, vector: NDArray[np.float64], *rest: Any) -> Lanes:
        return genuine(hospital, study, np.where(np.arange(len(vector)) % 2, np.nan, vector), *rest)

    monkeypatch.setattr(Hospital, "_masked", diverge)

    _, model = read_model(federation.run() / "model.safetensors")

    assert np.isfinite(parameters_to_vector(model)).all()
    assert len(federation.charges(BAD)) == 3
    assert Update.action == STAGES[2]
