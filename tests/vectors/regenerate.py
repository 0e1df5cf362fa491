"""Regenerate the known answers: ``python -m tests.vectors.regenerate``.

A change here is a change of the wire, of the accounting or of the ledger. Everything is computed from fixed inputs by
the project's own code; a difference to the committed file means that older peers, older ledgers or an auditor with
another version would no longer agree.
"""

import hashlib
import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.randomness import SecureRandom
from server.examples import example_plan
from shared_models.approval import ApprovedPrice, sign_approval
from shared_models.encoding import encoding
from shared_models.identity import fingerprint, public_bytes, sign
from shared_models.messages import (
    Advertised,
    AdvertiseRequest,
    Agreed,
    AgreeRequest,
    Dealt,
    EvaluateRequest,
    PrivacyStatement,
    Proposal,
    ShareRequest,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    Update,
    encode,
    receipt_payload,
    signed_receipt,
)
from shared_models.metrics import compute_metrics, record_statistics
from shared_models.plan import StudyPlan
from shared_models.pretrained import ENCODER_FILES, digest_of
from shared_models.privacy.checkpoint import SIGNED, Checkpoint, SignedCheckpoint
from shared_models.privacy.conformance import CanaryAudit, Check, Conformance
from shared_models.privacy.entries import GENESIS, BudgetTerms, Chain, Entry, Reserved, StudyLimit, possession
from shared_models.privacy.evidence import PARTS, Manifest, Part
from shared_models.privacy.head import HeadWriter, create_head
from shared_models.privacy.mechanisms import (
    GaussianRelease,
    PoissonGaussian,
    calibrate_noise,
    filter_epsilon,
    renyi_divergence,
)
from shared_models.receipts import Anchor, Receipt, digest_of_all
from shared_models.roster import Coordinator, Member, UnsignedRoster, sign_roster
from shared_models.secagg.key_agreement import Roster
from shared_models.update import vector_digest
from tests.federation import changed
from tests.vectors.regenerate_secagg import ANNOUNCEMENT, play_round

FILE = Path(__file__).with_name("known_answers.json")
RELEASING = changed(
    example_plan("breast-cancer", 4), evaluation={"every": 1, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}
)


def _on_a_base(task: str, **network: Any) -> StudyPlan:
    """The example's plan for another task, on a pretrained base."""
    plan = example_plan("breast-cancer", 4)
    fields = plan.model_dump(mode="json") | {"task": task, "network": network}
    return StudyPlan.model_validate_json(json.dumps(fields))


# The first three use no field that was added after 0.1.0: their texts were recorded before there were any.
PLANS = {
    "breast-cancer": example_plan("breast-cancer", 4),
    "heart-disease": example_plan("heart-disease", 4),
    "releasing": RELEASING,
    "fedavgm": changed(RELEASING, averaging={"name": "fedavgm", "momentum": 0.9}),
    "weighed and augmented": changed(
        example_plan("breast-cancer", 4),
        task="pneumonia",
        network={"name": "cnn", "channels": [8, 16]},
        training={
            "learning_rate": 0.5,
            "steps": 5,
            "class_weights": {"finding": [1.0, 0.5]},
            "augmentation": {"copies": 4, "shift": 0.1, "rotate_degrees": 10.0, "contrast": 0.2},
        },
    ),
    "fedadam": changed(RELEASING, averaging={"name": "fedadam", "learning_rate": 0.1}),
    "fedyogi": changed(RELEASING, averaging={"name": "fedyogi", "learning_rate": 0.1, "beta_1": 0.8, "tau": 0.01}),
    "fedadagrad": changed(RELEASING, averaging={"name": "fedadagrad", "learning_rate": 0.1}),
    "proximal": changed(RELEASING, training={"proximal": 0.1}),
    "cosine": changed(RELEASING, training={"schedule": {"name": "cosine", "final": 0.05}}),
    "step": changed(RELEASING, training={"schedule": {"name": "step", "every": 10, "by": 0.5}}),
    "exponential": changed(RELEASING, training={"schedule": {"name": "exponential", "by": 0.9}}),
    "early stopping": changed(RELEASING, early_stopping={"metric": "auroc", "patience": 3}),
    "hospitals": changed(RELEASING, hospitals=["south", "north", "east"]),
    "subgroups": changed(RELEASING, evaluation={"subgroups": [{"column": "mean_radius", "edges": [12.0, 16.0]}]}),
    "subgroups beside the inputs": changed(
        RELEASING,
        evaluation={
            "subgroups": [
                {"column": "sex", "categories": ["F", "M"]},
                {"column": "age", "low": 0.0, "high": 120.0, "unit": "year", "edges": [40.0, 65.0]},
            ]
        },
    ),
    "carried forward": changed(
        example_plan("breast-cancer", 4),
        task="icu-mortality",
        network={"name": "lstm", "hidden": 8, "carry_forward": True},
    ),
    "fold": changed(RELEASING, fold={"index": 2, "count": 5}),
    "pretrained-encoder": _on_a_base("note-specialty", name="pretrained-encoder", base="a" * 64, rank=8, length=128),
    "pretrained-cnn": _on_a_base("pneumonia", name="pretrained-cnn", base="b" * 64),
}
STATEMENT = PrivacyStatement(
    study="a-study",
    rounds=25,
    epsilon=0.87,
    epsilon_filter=0.98,
    delta=3e-4,
    unit="patient",
    neighbouring="add or remove one patient",
    accountant="an accountant",
    budget_epsilon=1.0,
    public_size=160,
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NEW_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
ROSTER = UnsignedRoster(
    consortium="a-consortium",
    version=3,
    coordinator=Coordinator(name="centre", address="centre.example.org:9092", authority="d" * 64),
    members=(
        Member(
            name="ann",
            display_name="Ann\u2019s Hospital",
            identity="a" * 64,
            node_key="ecdsa-sha2-nistp384 AAAA",
            tls_key="b" * 64,
            public_size=200,
            ledger_genesis="c" * 64,
            valid_from=1_700_000_000,
            valid_until=1_800_000_000,
        ),
    ),
    root_fingerprint=fingerprint(public_bytes(KEY)),
)


def _base_digest() -> dict[str, str]:
    """Of files whose contents are their own names: an encoder's folder, and a model file."""
    with TemporaryDirectory() as folder:
        for name in ENCODER_FILES:
            (Path(folder) / name).write_text(name, encoding="utf-8")
        return {"encoder": digest_of(Path(folder)), "model": digest_of(Path(folder) / "model.safetensors")}


def known_answers() -> dict[str, Any]:
    """Every vector, by name."""
    vector = np.linspace(0, 1, 5, dtype=np.float32)
    step = PoissonGaussian(sample_rate=0.05, noise_multiplier=1.0, steps=400, clip=1.0, expected_batch=5.0)
    release = GaussianRelease(noise_multiplier=10.0, clip=1.0)
    receipt = Receipt(
        entry_hash="c" * 64,
        chain_head="d" * 64,
        mechanism=step.model_dump(mode="json"),
        charges=2,
        epsilon_filter=0.5,
        signature="0" * 128,
    )
    update = Update(study="a-study", round=2, attempt=1, context="e" * 64, receipt=receipt)
    last = {"ann": signed_receipt(update), "bob": signed_receipt(update.model_copy(update={"round": 3}))}
    anchor = Anchor(last=last["ann"], everybody=digest_of_all(last))
    price = ApprovedPrice(
        epsilon=0.9,
        limit=StudyLimit(epsilon=1.0, delta=5e-4),
        left_before=2.0,
        left_after=1.1,
        budget=BudgetTerms(epsilon=2.0, delta=1e-4, order=14, public_size=200),
    )
    agreed = {"study": "a-study", "plan_digest": "f" * 64, "price": price, "time": "2026-03-02T08:00:00.000Z"}
    approval = sign_approval(KEY, **agreed)
    of_software = sign_approval(KEY, **agreed, software_digest="a" * 64)
    played = play_round()
    delivery = next(iter(played.deliveries.values()))
    encodings = {purpose: encoding(RELEASING, purpose, parameters=31, hospitals=4) for purpose in ("train", "evaluate")}
    random = SecureRandom.for_tests(bytes(range(32)))
    scores, labels = np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 1, 0, 1])
    return {
        "plan_digest": {name: example_plan(name, 4).digest() for name in ("breast-cancer", "heart-disease")},
        "plan": {
            name: {"canonical": plan.canonical().decode(), "digest": plan.digest()} for name, plan in PLANS.items()
        },
        "base_digest": _base_digest(),
        "vector_digest": vector_digest(vector),
        "encoding": {purpose: asdict(code) for purpose, code in encodings.items()},
        "encoding_of_subgroups": asdict(encoding(PLANS["subgroups"], "evaluate", parameters=31, hospitals=4)),
        "roster_digest": Roster.of({"ann": bytes(32), "bob": bytes([1]) * 32}).digest,
        "signed_roster": sign_roster(KEY, ROSTER).model_dump(mode="json"),
        "signed_roster_digest": ROSTER.digest,
        "records": {
            "proposal": _records(encode(Proposal(plan={"a": 1}))),
            "advertise_request": _records(encode(AdvertiseRequest(announcement=ANNOUNCEMENT, anchor=anchor))),
            "advertised": _records(encode(Advertised(advertisement=played.advertisement))),
            "share_request": _records(encode(ShareRequest(cohort=played.cohort))),
            "dealt": _records(encode(Dealt(dealing=played.dealing))),
            "train_request": _records(encode(TrainRequest(delivery=delivery), vector)),
            "evaluate_request": _records(encode(EvaluateRequest(delivery=delivery), vector)),
            "update": _records(encode(update, next(iter(played.uploads.values())))),
            "agree_request": _records(encode(AgreeRequest(survivors=played.survivors))),
            "agreed": _records(encode(Agreed(agreement=played.agreement))),
            "statement": _records(encode(STATEMENT)),
            "statement_of_another_engine": _records(encode(STATEMENT.model_copy(update={"engine": "opacus-hooks"}))),
            "unmask_request": _records(encode(UnmaskRequest(unmasking=played.unmasking))),
            "unmasked": _records(encode(Unmasked(revealed=played.revealed))),
        },
        "receipt": {
            "payload": receipt_payload(update).hex(),
            "public_key": public_bytes(KEY).hex(),
            "signature": sign(KEY, "receipt", receipt_payload(update)).hex(),
        },
        "anchor": {"last": last["ann"].digest, "everybody": anchor.everybody},
        "evidence_manifest": _manifest().payload().hex(),
        "checkpoint": _checkpoint().line().decode(),
        "approval": {"json": approval.model_dump(mode="json"), "payload": approval.payload().hex()},
        "approval_of_software": {"json": of_software.model_dump(mode="json"), "payload": of_software.payload().hex()},
        "ledger": _ledger(),
        "ledger_after_an_upgrade": _upgraded(of_software.signature),
        "ledger_with_a_test_of_the_trainer": _tested(),
        "random": {"uniform": random.uniform(3).tolist(), "gaussian": random.gaussian(3).tolist()},
        "renyi_divergence": {
            "sampled, order 4": renyi_divergence(step, 4),
            "sampled, order 32": renyi_divergence(step, 32),
            "release, order 8": renyi_divergence(release, 8),
        },
        "filter_epsilon": filter_epsilon(renyi_divergence(step, 4), order=4, delta=1e-5),
        "calibrate_noise": calibrate_noise(sample_rate=0.5, steps=208, epsilon=1.0, delta=3e-4),
        "metrics": compute_metrics(2, record_statistics(2, scores, labels, bins=20).sum(axis=0), bins=20),
    }


def _checkpoint() -> SignedCheckpoint:
    unsigned = Checkpoint(
        format="konsil-checkpoint/1",
        hospital="ann",
        population="all-patients",
        seq=7,
        entry_hash="c" * 64,
        time="2026-01-02T03:04:05.678Z",
        public_key=public_bytes(KEY).hex(),
    )
    return SignedCheckpoint(**unsigned.model_dump(), signature=sign(KEY, SIGNED, unsigned.payload()).hex())


def _manifest() -> Manifest:
    """An empty bundle's, as it is signed."""
    empty = Part(bytes=0, sha256=hashlib.sha256(b"").hexdigest())
    return Manifest(
        hospital="ann",
        time="2026-01-01T00:00:00.000Z",
        public_key=public_bytes(KEY).hex(),
        software_digest="a" * 64,
        egress_digest="b" * 64,
        parts=dict.fromkeys(PARTS, empty),
    )


def _ledger() -> dict[str, Any]:
    """Two entries, the second of which rotates the key, and the head file after each."""
    new = public_bytes(NEW_KEY)
    terms = BudgetTerms(epsilon=1.0, delta=1e-4, order=20, public_size=100)
    chain, entries = Chain(), []
    opening = {"population": "all", "budget": terms, "public_key": public_bytes(KEY).hex()}
    entries.append(_entry(chain, "budget-opened", "2026-01-02T03:04:05.678Z", **opening))
    agreed = possession("north", seq=2, previous_hash=chain.hash, new_public_key=new)
    proof = sign(NEW_KEY, "ledger-key", agreed).hex()
    rotation = {"new_public_key": new.hex(), "new_key_signature": proof}
    entries.append(_entry(chain, "key-rotated", "2026-01-02T03:04:06.000Z", **rotation))
    return {
        "entries": [{"body": e.canonical.decode(), "signature": e.signature, "hash": e.hash} for e in entries],
        "head_file": [
            _head_file(),
            _head_file((KEY, entries[0])),
            _head_file((KEY, entries[0]), (NEW_KEY, entries[1])),
        ],
    }


def _upgraded(approval: str) -> list[dict[str, str]]:
    """A study that was approved, and approved again for other software."""
    terms, chain = BudgetTerms(epsilon=1.0, delta=1e-4, order=20, public_size=100), Chain()
    step = PoissonGaussian(sample_rate=0.05, noise_multiplier=1.0, steps=400, clip=1.0, expected_batch=5.0)
    opening = {"population": "all", "budget": terms, "public_key": public_bytes(KEY).hex()}
    study = {"population": "all", "study": "a-study", "plan_digest": "f" * 64}
    first = {
        **study,
        "limit": StudyLimit(epsilon=1.0, delta=5e-4),
        "reservation": (Reserved(mechanism=step, charges=3),),
        "approved_by": "standing-rule",
        "software_digest": "b" * 64,
    }
    again = {**study, "approved_by": "steward", "approval": approval, "software_digest": "a" * 64}
    kinds: dict[str, dict[str, Any]] = {"budget-opened": opening, "plan-approved": first, "plan-reapproved": again}
    entries = [_entry(chain, kind, "2026-01-02T03:04:05.678Z", **fields) for kind, fields in kinds.items()]
    return [{"body": e.canonical.decode(), "signature": e.signature, "hash": e.hash} for e in entries]


def _tested() -> dict[str, str]:
    """A hospital's test of its own trainer, with one check that failed."""
    chain, terms = Chain(), BudgetTerms(epsilon=1.0, delta=1e-4, order=20, public_size=100)
    opening = {"population": "all", "budget": terms, "public_key": public_bytes(KEY).hex()}
    _entry(chain, "budget-opened", "2026-01-02T03:04:05.678Z", **opening)
    canaries = CanaryAudit(
        canaries=1000,
        guesses=200,
        correct=120,
        epsilon_lower=0.125,
        confidence=0.95,
        epsilon_claimed=0.875,
        delta=3e-4,
        epsilon_expected=0.25,
        epsilon_most=3.2,
    )
    found = Conformance(
        rounds=25,
        steps=8,
        checks=(
            Check(name="null-noise", statistic=0.5, expected=1, p_value=1e-30, verdict="failed"),
            Check(name="clipping", statistic=0, expected=1, verdict="failed", reason="it mixes records"),
            Check(name="sample-rate", statistic=0.5, expected=0.5, p_value=1, verdict="holds"),
        ),
        canaries=canaries,
        false_alarm=1e-6,
        noise_ratio_found=0.967,
        trainer_digest="c" * 64,
    )
    study = {"population": "all", "study": "a-study", "plan_digest": "f" * 64, "software_digest": "b" * 64}
    entry = _entry(chain, "conformance", "2026-01-02T03:04:06.000Z", **study, conformance=found)
    return {"body": entry.canonical.decode(), "signature": entry.signature, "hash": entry.hash}


def _entry(chain: Chain, kind: str, time: str, **fields: Any) -> Entry:
    fixed = {"seq": chain.seq + 1, "previous_hash": chain.hash, "time": time, "hospital": "north"}
    unsigned = Entry.model_validate({"kind": kind, **fixed, **fields, "signature": "0" * 128})
    entry = unsigned.model_copy(update={"signature": sign(KEY, "ledger-entry", unsigned.canonical).hex()})
    chain.follow(entry)
    return entry


def _head_file(*written: tuple[Ed25519PrivateKey, Entry]) -> list[str]:
    """Both slots in hexadecimal, without the zeros that fill them up."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "head"
        create_head(path, KEY, genesis=GENESIS)
        with closing(HeadWriter(path)) as head:
            for key, entry in written:
                head.write(key, seq=entry.seq, entry_hash=entry.hash)
        content = path.read_bytes()
    return [content[start : start + 4096].rstrip(b"\0").hex() for start in (0, 4096)]


def _records(records: Any) -> dict[str, Any]:
    """Flower's records as plain values: keys, texts and bytes are the wire format."""
    config = records.config_records["konsil"]
    found = {"type": config["type"], "json": config["json"]}
    for array in records.array_records.values():
        inner = array["vector"]
        found["vector"] = {
            "dtype": inner.dtype,
            "shape": list(inner.shape),
            "stype": inner.stype,
            "data": inner.data.hex(),
        }
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(known_answers(), indent=1) + "\n", encoding="utf-8")
