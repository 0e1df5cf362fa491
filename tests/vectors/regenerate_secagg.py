"""Regenerate the known answers of secure aggregation: ``python -m tests.vectors.regenerate_secagg``.

A change here is a change of the protocol: hospitals with the one and the other version would not agree on a mask, and
must not be asked to. Everything comes from fixed inputs; what a hospital draws at random comes from a fixed stream.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from shared_models.identity import public_bytes
from shared_models.secagg.key_agreement import (
    Advertisement,
    Announcement,
    Entropy,
    Roster,
    pairwise_mask_key,
    self_mask_key,
    share_key,
)
from shared_models.secagg.masks import keystream
from shared_models.secagg.protocol import (
    Agreement,
    Cohort,
    Coordinator,
    Dealing,
    Delivery,
    Hospital,
    Positions,
    Revealed,
    Survivors,
    Transcript,
    Unmasking,
)
from shared_models.secagg.quantize import dequantize, quantization_scale, quantize
from shared_models.secagg.secret_sharing import Secret, Shares, recover, seal, seed_hash, share_hash, split

FILE = Path(__file__).with_name("secagg_vectors.json")
CONTEXT = bytes(range(32))
NAMES = ("north", "east", "south", "west")  # not in the order in which they sort
DROPPED = "east"  # after it has dealt its shares
ANNOUNCEMENT = Announcement(
    purpose="train",
    study="a-study",
    plan_digest="a" * 64,
    roster_digest="b" * 64,
    round=2,
    attempt=1,
    parameters_digest="c" * 64,
    invited=NAMES,
    threshold=3,
)


def stream(seed: str) -> Entropy:
    """Bytes that are the same in every run: SHAKE-256 of the seed and a counter."""
    counter = count()
    return lambda length: hashlib.shake_256(f"{seed} {next(counter)}".encode()).digest(length)


def coins(seed: str) -> Any:
    """Uniform numbers that are the same in every run."""
    entropy = stream(seed)
    return lambda length: (np.frombuffer(entropy(8 * length), "<u8") >> np.uint64(11)) * 2.0**-53


def known_answers() -> dict[str, Any]:
    """Every vector, by name."""
    return {"quantize": _quantize(), "keys": _keys(), "masks": _masks(), "shares": _shares(), "round": _round()}


def _quantize() -> dict[str, Any]:
    update = np.array([0.5, -0.25, 1e-9, 0.0, -0.7071])
    scale = quantization_scale(bound=1.0, hospitals=4)
    cells = quantize(update, weight=0.3, bound=1.0, scale=scale, uniform=coins("coins"))
    return {
        "scale": scale,
        "scale, 100 hospitals, bound 300": quantization_scale(bound=300.0, hospitals=100),
        "cells": cells.tolist(),
        "decoded": dequantize(cells, scale=scale, total_weight=0.3).tolist(),
    }


def _keys() -> dict[str, Any]:
    ann, bob = (X25519PrivateKey.from_private_bytes(bytes([byte]) * 32) for byte in (1, 2))
    public = bob.public_key().public_bytes_raw()
    return {
        "pairwise mask": pairwise_mask_key(ann, public, context=CONTEXT, names=("bob", "ann")).hex(),
        "self mask": self_mask_key(bytes(range(32, 64)), context=CONTEXT).hex(),
        "share": share_key(ann, public, context=CONTEXT, sender="ann", receiver="bob").hex(),
        "context0": ANNOUNCEMENT.context0.hex(),
    }


def _masks() -> dict[str, Any]:
    return {"first": keystream(CONTEXT, 8).tolist(), "digest of 100000": _digest(keystream(CONTEXT, 100_000))}


def _shares() -> dict[str, Any]:
    secret = bytes(range(64, 96))
    shares = split(secret, threshold=3, holders=5, entropy=stream("polynomial"))
    pair = Shares(Secret(shares[0]), Secret(shares[1]))
    sealed = seal(pair, key=bytes(range(96, 128)), context=CONTEXT, dealer="ann", holder="bob")
    return {
        "shares": [share.hex() for share in shares],
        "recovered": recover({1: shares[0], 3: shares[2], 5: shares[4]}).hex(),
        "seed hash": seed_hash(secret, context=CONTEXT, dealer="ann").hex(),
        "share hash": share_hash(shares[0], context=CONTEXT, of="seed", dealer="ann", holder="bob").hex(),
        "sealed": sealed.model_dump(mode="json"),
        "leaf": sealed.leaf().hex(),
    }


@dataclass(frozen=True)
class Round:
    """One whole attempt: its messages, of one hospital where each has its own, and what came of it."""

    advertisement: Advertisement
    cohort: Cohort
    dealing: Dealing
    deliveries: dict[str, Delivery]
    uploads: dict[str, NDArray[np.uint32]]
    survivors: Survivors
    agreement: Agreement
    unmasking: Unmasking
    revealed: Revealed
    total: NDArray[np.uint32]
    transcript: Transcript


def play_round() -> Round:
    """One whole attempt of four hospitals, one of which drops out before it uploads."""
    identities = {name: Ed25519PrivateKey.from_private_bytes(stream(name)(32)) for name in NAMES}
    roster = Roster("b" * 64, {name: public_bytes(key) for name, key in identities.items()})
    hospitals = {
        name: Hospital(name, key, roster=roster, positions=Positions(), entropy=stream(f"{name} entropy"))
        for name, key in identities.items()
    }
    coordinator = Coordinator(ANNOUNCEMENT, roster=roster, length=6)
    advertised = {name: hospital.advertise(ANNOUNCEMENT, plan_digest="a" * 64) for name, hospital in hospitals.items()}
    for name, advertisement in advertised.items():
        coordinator.receive_advertisement(name, advertisement)
    cohort = coordinator.cohort()
    dealt = {name: hospital.share(cohort) for name, hospital in hospitals.items()}
    for name, dealing in dealt.items():
        coordinator.receive_dealing(name, dealing)
    deliveries = coordinator.deliveries()
    uploads = {}
    for name in NAMES:
        if name == DROPPED:
            continue
        hospitals[name].accept(deliveries[name], parameters_digest="c" * 64)
        encoded = np.arange(6, dtype=np.uint32) * np.uint32(len(name))
        uploads[name] = hospitals[name].upload(encoded, charge="a-charge")
        coordinator.receive_upload(name, deliveries[name].context, uploads[name])
    survivors = coordinator.survivors()
    agreed = {name: hospitals[name].agree(survivors) for name in uploads}
    for name, agreement in agreed.items():
        coordinator.receive_agreement(name, agreement)
    unmasking = coordinator.unmasking()
    revealed = {name: hospitals[name].unmask(unmasking) for name in uploads}
    for name, shares in revealed.items():
        coordinator.receive_revealed(name, shares)
    total = coordinator.total()
    first = next(iter(uploads))
    return Round(
        advertised[first],
        cohort,
        dealt[first],
        deliveries,
        uploads,
        survivors,
        agreed[first],
        unmasking,
        revealed[first],
        total,
        coordinator.transcript(),
    )


def _round() -> dict[str, Any]:
    played = play_round()
    return {
        "context": played.survivors.context.hex(),
        "deliveries": {name: _text_digest(delivery.model_dump_json()) for name, delivery in played.deliveries.items()},
        "uploads": {name: upload.tolist() for name, upload in played.uploads.items()},
        "total": played.total.tolist(),
        "transcript": played.transcript.model_dump(mode="json"),
    }


def _digest(vector: NDArray[np.uint32]) -> str:
    return hashlib.sha256(vector.astype("<u4").tobytes()).hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    FILE.write_text(json.dumps(known_answers(), indent=1) + "\n", encoding="utf-8")
