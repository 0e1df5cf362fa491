"""Charges per second, and time and memory to verify 100,000 entries; beside what the disk and the signatures allow.

A tenth of the entries is charged through the hospital's budget into its ledger on a disk, one durable transaction each.
In turn with them, in the same folder, a plain file gets what a charge writes: as many bytes appended and synced, one
head-file slot overwritten and synced; that is the disk's limit. The whole length is then written by the same code in
memory, if there is a /dev/shm, and verified by the auditor's code in a process of its own, beside as many Ed25519
verifications and nothing else. Memory is the highest resident set of that process, with all that it imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.budget import Budget
from shared_models.identity import public_bytes, sign, verify
from shared_models.privacy.entries import Entry, Reserved, StudyLimit
from shared_models.privacy.head import SLOT_BYTES
from shared_models.privacy.ledger import Ledger
from shared_models.privacy.mechanisms import PoissonGaussian
from shared_models.software import software_digest

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STEP = PoissonGaussian(sample_rate=0.001, noise_multiplier=1000.0, steps=5, clip=1.0, expected_batch=10.0)
DIGEST = "ab" * 32
BATCH = 1000
TARGETS = {"charges_per_s": 1000.0, "verify_100k_s": 30.0, "memory_100k_over_10k": 1.05}

VERIFIER = """
import json, resource, sys, time
from pathlib import Path
from auditor.verify import verify_ledger
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started, cpu = peak(), time.perf_counter(), time.process_time()
entries = verify_ledger(Path(sys.argv[1])).entries
figures = {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "mb": peak()}
print(json.dumps(figures | {"growth_mb": peak() - before, "entries": entries}))
"""


def written_bytes() -> int:
    """Bytes that this process has handed to the kernel so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


class PlainFiles:
    """What a charge costs the disk, without a database: one file that grows, one slot that is overwritten."""

    def __init__(self, folder: Path) -> None:
        self._log = os.open(folder / "plain.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._slots = os.open(folder / "plain.slots", os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(self._slots, bytes(2 * SLOT_BYTES), 0)
        os.fsync(self._slots)

    def write(self, times: int, each: int) -> float:
        """Seconds for as many durable writes of ``each`` bytes, a slot included."""
        part, slot = os.urandom(max(each - SLOT_BYTES, 1)), os.urandom(SLOT_BYTES)
        started = time.perf_counter()
        for number in range(times):
            os.write(self._log, part)
            os.fdatasync(self._log)
            os.pwrite(self._slots, slot, number % 2 * SLOT_BYTES)
            os.fdatasync(self._slots)
        return time.perf_counter() - started

    def close(self) -> None:
        """Let go of both files."""
        os.close(self._log)
        os.close(self._slots)


def opened(path: Path, charges: int) -> Ledger:
    """A ledger with a budget and one study of so many charges."""
    ledger = Ledger.create(path, KEY, hospital="north")
    Budget.open(ledger, population="all", public_size=1000, epsilon=1.0, delta=1e-5, order=64)
    ledger.append(
        "plan-approved",
        population="all",
        study="long",
        plan_digest=DIGEST,
        limit=StudyLimit(epsilon=1.0, delta=1e-5),
        reservation=(Reserved(mechanism=STEP, charges=charges),),
        software_digest=software_digest(),
    )
    return ledger


def charge(budget: Budget, number: int) -> Entry:
    """One charge, as a round makes it."""
    return budget.charge("long", DIGEST, round=number, attempt=1, mechanism=STEP, parameters_digest=DIGEST)


def measure_charges(path: Path, charges: int) -> dict[str, float]:
    """Charges per second, and the disk's limit, in turns of ``BATCH``: of all together, and of the fastest turn."""
    ours, limit, each = [], [], 0
    plain = PlainFiles(path.parent)
    with opened(path, charges) as ledger:
        budget = Budget(ledger)
        for first in range(1, charges + 1, BATCH):
            numbers = range(first, min(first + BATCH, charges + 1))
            before, started = written_bytes(), time.perf_counter()
            for number in numbers:
                charge(budget, number)
            ours.append((time.perf_counter() - started) / len(numbers))
            each = round((written_bytes() - before) / len(numbers))
            limit.append(plain.write(len(numbers), each) / len(numbers))
    plain.close()
    return {
        "charges_per_s": 1 / statistics.fmean(ours),
        "charges_per_s_fastest_1000": 1 / min(ours),
        "raw_limit_per_s": 1 / statistics.fmean(limit),
        "raw_limit_per_s_fastest_1000": 1 / min(limit),
        "charges_over_raw_limit": statistics.fmean(limit) / statistics.fmean(ours),
        "bytes_per_charge": each,
    }


def fill(path: Path, charges: int) -> None:
    """A ledger of so many charges, not timed."""
    with opened(path, charges) as ledger:
        budget = Budget(ledger)
        for number in range(1, charges + 1):
            charge(budget, number)


def measure_verifying(path: Path) -> dict[str, float]:
    """The auditor's verification, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", VERIFIER, str(path)], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure_signatures(path: Path, count: int) -> float:
    """Seconds for as many Ed25519 verifications of entries, and nothing else."""
    with Ledger.open(path, KEY) as ledger:
        entry = ledger.first
    assert entry is not None
    public, payload, signature = public_bytes(KEY), entry.canonical, sign(KEY, "ledger-entry", entry.canonical)
    started = time.perf_counter()
    for _ in range(count):
        verify(public, "ledger-entry", payload, signature)
    return time.perf_counter() - started


def measure(folder: Path, memory: Path, entries: int) -> dict[str, float]:
    """Everything: charges on the disk of ``folder``, verifying from ``memory``."""
    small, large = folder / "ledger.sqlite", memory / "large.sqlite"
    figures = measure_charges(small, entries // 10 - 2)
    fill(large, entries - 2)
    tenth, whole = measure_verifying(small), measure_verifying(large)
    signatures = measure_signatures(small, entries)
    return figures | {
        "entries": whole["entries"],
        "verify_100k_s": whole["s"],
        "verify_100k_cpu_s": whole["cpu_s"],
        "ed25519_100k_s": signatures,
        "verify_over_ed25519": whole["s"] / signatures,
        "verify_100k_mb": whole["mb"],
        "verify_10k_mb": tenth["mb"],
        "verify_100k_growth_mb": whole["growth_mb"],
        "verify_10k_growth_mb": tenth["growth_mb"],
        "memory_100k_over_10k": whole["mb"] / tenth["mb"],
    }


def verdict(name: str, value: float) -> str:
    """A figure beside its target; of charges more is better, of all else less."""
    target = TARGETS[name]
    met = value >= target if name == "charges_per_s" else value <= target
    sign_ = ">=" if name == "charges_per_s" else "<="
    return f"target {sign_} {target:g}: {'met' if met else 'MISSED'}"


def main() -> None:
    """Measure, print, and say which targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000, help="length of the ledger (default: 100000)")
    parser.add_argument(
        "--folder", type=Path, help="where charges are written: measures that disk (default: the system's /tmp)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.entries < 100:
        parser.error("--entries must be at least 100; the targets are for 100000")
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made there
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else options.folder) as shared,
    ):
        figures = measure(Path(folder), Path(shared), options.entries)
    for name, value in figures.items():
        print(f"{name:28} {value:12.3f}   {verdict(name, value) if name in TARGETS else ''}".rstrip())
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
