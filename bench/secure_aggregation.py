"""Time and memory of secure aggregation at a hospital and at the coordinator, beside Flower's SecAgg+ and plain AES.

All in one process and one run, one thread, no network. A hospital's work is to agree on its masks' keys, to encode its
update (float32, stochastic rounding from a generator keyed by the system), and to add all masks; Flower's is the same
by its own primitives, in the order of its ``secaggplus_mod``, on the same vector, with every hospital a neighbour of
every other. Set-up is stages 1 and 2 of one hospital: ours checks every signature and signs commitments, Flower's does
neither. The fraction of the AES rate counts all keystream used: the masks' and 8 bytes per entry for rounding's coins.
Times are the least of several runs; memory is the peak that Python and numpy allocate beyond the update itself.
"""

import argparse
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from client.randomness import SecureRandom
from shared_models.identity import public_bytes
from shared_models.secagg.key_agreement import Announcement, Roster, pairwise_mask_key, self_mask_key
from shared_models.secagg.masks import Mask, apply_masks
from shared_models.secagg.protocol import Coordinator, Delivery, Hospital, Positions, smallest_threshold
from shared_models.secagg.quantize import quantization_scale, quantize

LENGTHS = {"1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000, "1e8": 100_000_000}
COHORTS = (3, 10, 30, 100)
LARGEST, LARGEST_COHORTS, LARGEST_MEMORY = "1e8", (3, 10), 12 * 10**9  # bytes that must be free for it
BOUND = 1.0
CONTEXT = bytes(32)
AES_TARGET = 0.6
FLOWER_RANGE, FLOWER_MODULUS = 1 << 22, 1 << 32  # Flower's own defaults

Work = Callable[[], object]


def least_time(work: Work, runs: int) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def peak_memory(work: Work) -> int:
    """Bytes that were allocated at once, at most."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def aes_rate(runs: int) -> float:
    """Bytes of AES-256-CTR keystream per second: one stream, a buffer that stays in the cache."""
    size, times = 1 << 18, 1000
    stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(size), bytearray(size + 15)

    def work() -> None:
        for _ in range(times):
            stream.update_into(zeros, buffer)

    return size * times / least_time(work, runs)


# A hospital: encode and mask


def our_masking(update: NDArray[np.float32], hospitals: int) -> Work:
    """Ours, from private key and peers' public keys to the vector that is uploaded."""
    own, seed = X25519PrivateKey.generate(), os.urandom(32)
    peers = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(hospitals - 1)]
    scale = quantization_scale(bound=BOUND, hospitals=hospitals)

    def work() -> NDArray[np.uint32]:
        keys = [pairwise_mask_key(own, peer, context=CONTEXT, names=("a", "b")) for peer in peers]
        masks = [Mask(self_mask_key(seed, context=CONTEXT), subtract=False)]
        masks += [Mask(key, subtract=bool(number % 2)) for number, key in enumerate(keys)]
        uniform = SecureRandom.from_system().uniform
        vector = quantize(update, weight=0.7, bound=BOUND, scale=scale, uniform=uniform)
        apply_masks(vector, masks)
        return vector

    return work


def flower_masking(update: NDArray[np.float32], hospitals: int) -> Work:
    """Flower's, as in its ``_collect_masked_vectors``."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        factor_combine,
        parameters_addition,
        parameters_mod,
        parameters_multiply,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.quantization import quantize as flower_quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import generate_key_pairs

    own, seed = generate_key_pairs()[0], os.urandom(32)
    peers = [generate_key_pairs()[1] for _ in range(hospitals - 1)]

    def work() -> Any:
        weighed = parameters_multiply([update], 0.7)
        vector = factor_combine(1000, flower_quantize(weighed, BOUND, FLOWER_RANGE))
        shapes = [part.shape for part in vector]
        vector = parameters_addition(vector, pseudo_rand_gen(seed, FLOWER_MODULUS, shapes))
        for number, peer in enumerate(peers):
            mask = pseudo_rand_gen(generate_shared_key(own, peer), FLOWER_MODULUS, shapes)
            vector = (parameters_subtraction if number % 2 else parameters_addition)(vector, mask)
        return parameters_mod(vector, FLOWER_MODULUS)

    return work


def measure_masking(runs: int, rate: float) -> dict[str, float]:
    """Every length and cohort: seconds, and ratios of time and memory."""
    figures: dict[str, float] = {}
    print(f"{'d':>4} {'n':>4} {'ours':>10} {'Flower':>10} {'ratio':>7} {'memory':>8} {'of AES':>7}")
    for name, length in LENGTHS.items():
        if name == LARGEST and psutil.virtual_memory().available < LARGEST_MEMORY:
            print(f"{name}: skipped, it needs {LARGEST_MEMORY / 1e9:g} GB of free memory")
            continue
        update = np.random.default_rng(0).normal(size=length).astype(np.float32)
        update /= np.float32(np.linalg.norm(update) * 1.001)
        for hospitals in LARGEST_COHORTS if name == LARGEST else COHORTS:
            ours, flower = our_masking(update, hospitals), flower_masking(update, hospitals)
            large = length * hospitals > 50_000_000
            our_s, flower_s = least_time(ours, runs), least_time(flower, 1 if large else runs)
            # Flower's peak does not depend on n; for the largest, a smaller cohort says the same in less time.
            memory = peak_memory(flower_masking(update, min(hospitals, 10))) / peak_memory(ours)
            of_aes = (4 * hospitals + 8) * length / rate / our_s  # all keystream used: masks, and the coins of rounding
            case = f"{name}_n{hospitals}"
            figures |= {
                f"ours_s_{case}": our_s,
                f"flower_over_ours_time_{case}": flower_s / our_s,
                f"flower_over_ours_memory_{case}": memory,
                f"fraction_of_aes_{case}": of_aes,
                f"fraction_of_aes_masks_alone_{case}": 4 * hospitals * length / rate / our_s,
            }
            print(
                f"{name:>4} {hospitals:>4} {our_s:9.4f}s {flower_s:9.4f}s {flower_s / our_s:6.1f}x"
                f" {memory:7.1f}x {of_aes:6.0%}",
                flush=True,
            )
    return figures


# A hospital: set-up


class Federation:
    """Hospitals and a coordinator of one attempt, as far as a measurement needs them."""

    def __init__(self, hospitals: int, length: int) -> None:
        names = [f"hospital-{number:03}" for number in range(hospitals)]
        keys = {name: Ed25519PrivateKey.generate() for name in names}
        self.roster = Roster("b" * 64, {name: public_bytes(key) for name, key in keys.items()})
        self.announcement = Announcement(
            purpose="train",
            study="a-study",
            plan_digest="a" * 64,
            roster_digest="b" * 64,
            round=1,
            attempt=1,
            parameters_digest="c" * 64,
            invited=tuple(names),
            threshold=smallest_threshold(hospitals),
        )
        self.hospitals = {
            name: Hospital(name, key, roster=self.roster, positions=Positions()) for name, key in keys.items()
        }
        self.coordinator = Coordinator(self.announcement, roster=self.roster, length=length)

    def advertise(self) -> None:
        """Stage 1."""
        for name, hospital in self.hospitals.items():
            keys = hospital.advertise(self.announcement, plan_digest="a" * 64)
            self.coordinator.receive_advertisement(name, keys)
        self.cohort = self.coordinator.cohort()

    def share(self) -> dict[str, Delivery]:
        """Stage 2, and the checks of stage 3."""
        for name, hospital in self.hospitals.items():
            self.coordinator.receive_dealing(name, hospital.share(self.cohort))
        deliveries = self.coordinator.deliveries()
        for name, hospital in self.hospitals.items():
            hospital.accept(deliveries[name], parameters_digest="c" * 64)
        return deliveries


def our_setup(hospitals: int, runs: int) -> float:
    """Seconds of one hospital's stages 1 and 2; each hospital does them once, so each run takes another one."""
    federation = Federation(hospitals, 1)
    waiting = list(federation.hospitals.values())
    started = time.perf_counter()
    waiting[0].advertise(federation.announcement, plan_digest="a" * 64)
    first = time.perf_counter() - started
    federation.hospitals[waiting[0].name] = Hospital(
        waiting[0].name, waiting[0]._identity, roster=federation.roster, positions=Positions()
    )
    federation.advertise()
    return first + least_time(lambda: waiting.pop().share(federation.cohort), min(runs, hospitals - 1))


def flower_setup(hospitals: int, runs: int) -> float:
    """Seconds of one client's ``_setup`` and ``_share_keys``."""
    from flwr.common.secure_aggregation.crypto.shamir import create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

    peers = [generate_key_pairs()[1] for _ in range(hospitals - 1)]
    threshold = smallest_threshold(hospitals)

    def work() -> None:
        (masking, _), (channel, _) = generate_key_pairs(), generate_key_pairs()
        of_seed = create_shares(os.urandom(32), threshold, hospitals)
        of_key = create_shares(private_key_to_bytes(masking), threshold, hospitals)
        for number, peer in enumerate(peers):
            text = share_keys_plaintext_concat(hospitals, number, of_seed[number], of_key[number])
            encrypt(generate_shared_key(channel, peer), text)

    return least_time(work, runs)


def measure_setup(runs: int) -> dict[str, float]:
    """Every cohort."""
    figures: dict[str, float] = {}
    for hospitals in COHORTS:
        ours, flower = our_setup(hospitals, runs), flower_setup(hospitals, runs)
        figures |= {f"ours_setup_s_n{hospitals}": ours, f"flower_over_ours_setup_n{hospitals}": flower / ours}
        print(f"set-up, n {hospitals:>3}: ours {ours:.4f} s, Flower {flower:.4f} s, {flower / ours:.1f}x", flush=True)
    return figures


# The coordinator


def measure_coordinator(length: int) -> dict[str, float]:
    """Peak memory and seconds from the first upload to the sum, for 10 and 100 hospitals."""
    figures: dict[str, float] = {}
    for hospitals in (10, 100):
        federation = Federation(hospitals, length)
        federation.advertise()
        deliveries = federation.share()
        tracemalloc.start()
        for name, hospital in list(federation.hospitals.items())[1:]:  # one drops out: its masks are taken off too
            vector = hospital.upload(np.zeros(length, np.uint32), charge="a-charge")
            figures["upload_bytes_per_parameter"] = vector.nbytes / length
            federation.coordinator.receive_upload(name, deliveries[name].context, vector)
            del vector
        seconds = _unmask(federation)
        peak = 4 * length + tracemalloc.get_traced_memory()[1]  # the sum was there before
        tracemalloc.stop()
        figures |= {f"server_memory_bytes_n{hospitals}": peak, f"unmask_s_n{hospitals}": seconds}
        print(
            f"coordinator, d {length}, n {hospitals:>3}: {peak / length:.2f} bytes per parameter, one upload at a time"
            f" included; last stage {seconds:.3f} s",
            flush=True,
        )
    figures["server_memory_n100_over_n10"] = figures["server_memory_bytes_n100"] / figures["server_memory_bytes_n10"]
    return figures


def _unmask(federation: Federation) -> float:
    """Stages 4 and 5; the seconds of the last step."""
    coordinator = federation.coordinator
    survivors = coordinator.survivors()
    for name in survivors.uploaders:
        coordinator.receive_agreement(name, federation.hospitals[name].agree(survivors))
    unmasking = coordinator.unmasking()
    for name in survivors.uploaders:
        coordinator.receive_revealed(name, federation.hospitals[name].unmask(unmasking))
    started = time.perf_counter()
    total = coordinator.total()
    assert not total.any()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each measurement; the fastest counts (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    rate = aes_rate(options.runs)
    print(f"AES-256-CTR: {rate / 1e9:.2f} GB/s")
    figures = {"aes_bytes_per_s": rate, **measure_masking(options.runs, rate)}
    figures |= {**measure_setup(options.runs), **measure_coordinator(LENGTHS["1e6"])}
    fraction = figures["fraction_of_aes_1e7_n10"]
    met = "met" if fraction >= AES_TARGET else "missed"
    print(f"fraction of the AES rate, d = 1e7, n = 10: {fraction:.2f} (target >= {AES_TARGET:g}: {met})")
    print(f"upload: {figures['upload_bytes_per_parameter']:g} bytes per parameter")
    print(f"coordinator's memory, 100 hospitals over 10: {figures['server_memory_n100_over_n10']:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
