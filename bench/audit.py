"""Seconds and memory to audit 20 hospitals' 1,000 rounds, beside as many signature checks and nothing else.

The evidence is what hospitals and a coordinator write: ledgers with a charge and its end for every round, receipts,
transcripts with every hospital's signed keys, commitment and list of uploaders, a signed roster, plan and claims. It is
made here by the same code, with real keys and signatures; no model is trained for it. ``konsil-audit verify`` then runs
as a process of its own. Its peak is the highest resident set, with all that it imports.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.budget import Budget
from shared_models.identity import fingerprint, public_bytes, sign, verify
from shared_models.plan import StudyPlan, parse_plan
from shared_models.privacy.accounting import reported_epsilon
from shared_models.privacy.entries import Entry
from shared_models.privacy.evidence import Claim, encode_parts, pack
from shared_models.privacy.head import head_path, read_head
from shared_models.privacy.ledger import Ledger, read_ledger
from shared_models.privacy.mechanisms import (
    best_order,
    calibrate_noise,
    filter_epsilon,
    study_mechanisms,
    total_divergence,
    training_mechanism,
)
from shared_models.receipts import Receipt, SignedReceipt
from shared_models.roster import Coordinator, Member, SignedRoster, UnsignedRoster, members_now, sign_roster
from shared_models.secagg.key_agreement import Advertisement, Announcement, KeyPairs, advertise
from shared_models.secagg.protocol import (
    SURVIVORS_KIND,
    Agreement,
    SignedDigest,
    Transcript,
    smallest_threshold,
    survivors_payload,
)
from shared_models.secagg.secret_sharing import COMMITMENT_KIND, commitment_payload
from shared_models.software import software_digest

HOSPITALS, ROUNDS, PUBLIC_SIZE = 20, 1000, 1000
TARGETS = {"verify_s": 60.0, "verify_mb": 500.0}
CHECKED = 20_000  # signatures that the limit is measured with
NOW = 1_800_000_000

# Seconds of processor time and the highest resident set since the program began: what its parent had does not count.
MEASURED = """
import sys, time
from pathlib import Path
from auditor.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    print(time.process_time(), status[status.index("VmHWM:") + 1], file=sys.stderr)
"""


@dataclass(frozen=True)
class Case:
    """Evidence on the disk, and how many signatures are in it."""

    bundles: tuple[Path, ...]
    study: Path
    root: Path
    entries: int
    signatures: int


def make_plan(rounds: int) -> StudyPlan:
    """A study of so many rounds that stays within epsilon 1."""
    privacy = {"clip": 0.1, "sample_rate": 0.02, "epsilon": 1.0, "delta": 1e-4}
    noise = calibrate_noise(sample_rate=0.02, steps=2 * rounds, epsilon=1.0, delta=1e-4)
    return parse_plan(
        {
            "format": 1,
            "study": "a-long-study",
            "purpose": "Measure how long an audit takes.",
            "task": "breast-cancer",
            "data_licence": "made up",
            "rounds": rounds,
            "minimum_hospitals": 3,
            "deadline_s": 3600.0,
            "reply_grid_s": 1.0,
            "weight_cap": 4000,
            "network": {"name": "logistic-regression"},
            "training": {"learning_rate": 0.1, "steps": 2},
            "privacy": {**privacy, "noise_multiplier": noise},
        }
    )


def make_evidence(folder: Path, hospitals: int, rounds: int) -> Case:
    """Write what everybody would have kept of one study.

    Args:
        folder: Where to.
        hospitals: All of them take part in every round.
        rounds: Of the study; each takes one attempt.
    """
    plan, names = make_plan(rounds), [f"hospital-{number:02}" for number in range(1, hospitals + 1)]
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    root = Ed25519PrivateKey.generate()
    (folder / "root.pub").write_text(public_bytes(root).hex() + "\n", encoding="ascii")
    with ExitStack() as stack:
        ledgers = {name: stack.enter_context(_ledger(folder, name, keys[name])) for name in names}
        order = best_order(study_mechanisms(plan, PUBLIC_SIZE), plan.privacy.delta)
        budgets = {name: _budget(ledger, order) for name, ledger in ledgers.items()}
        for budget in budgets.values():
            budget.approve(plan, approved_by="standing-rule")
        signed = _roster(root, keys, {name: _first(folder, name).hash for name in names})
        transcripts, receipts = [], {name: list[SignedReceipt]() for name in names}
        for number in range(1, rounds + 1):
            transcript = _transcript(plan, number, keys, members_now(signed, NOW).digest)
            transcripts.append(transcript)
            context = (transcript.context or b"").hex()
            for name in names:
                charge = budgets[name].charge(
                    plan.study,
                    plan.digest(),
                    round=number,
                    attempt=1,
                    mechanism=training_mechanism(plan, PUBLIC_SIZE),
                    parameters_digest="ab" * 32,
                )
                ledgers[name].append("round-done", study=plan.study, plan_digest=plan.digest(), round=number, attempt=1)
                receipts[name].append(_receipt(keys[name], charge, context, number))
        for budget in budgets.values():
            budget.finish(plan.study)
    bundles = tuple(folder / f"{name}.evidence" for name in names)
    entries = 0
    for name, path in zip(names, bundles, strict=True):
        kept = read_ledger(folder / f"{name}.sqlite")
        entries += len(kept)
        _pack(path, keys[name], name, kept, folder, receipts[name], transcripts, signed, plan)
    study = folder / "study"
    study.mkdir()
    _write_lines(study / "sums.jsonl", ({"transcript": t.model_dump(mode="json")} for t in transcripts))
    held = ((t.context, name, kept) for n, t in enumerate(transcripts) for name, kept in _of(receipts, n))
    _write_lines(study / "receipts.jsonl", ({"hospital": n, "upload": k.model_dump(mode="json")} for _, n, k in held))
    signatures = entries + hospitals * rounds + 3 * hospitals * rounds
    return Case(bundles, study, folder / "root.pub", entries, signatures)


def _of(receipts: dict[str, list[SignedReceipt]], number: int) -> Iterator[tuple[str, SignedReceipt]]:
    return ((name, receipts[name][number]) for name in sorted(receipts))


def _write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(rfc8785.dumps(line) + b"\n" for line in lines))


def _ledger(folder: Path, name: str, key: Ed25519PrivateKey) -> Ledger:
    return Ledger.create(folder / f"{name}.sqlite", key, hospital=name)


def _budget(ledger: Ledger, order: int) -> Budget:
    return Budget.open(ledger, population="all", public_size=PUBLIC_SIZE, epsilon=1.0, delta=1e-4, order=order)


def _first(folder: Path, name: str) -> Entry:
    return read_ledger(folder / f"{name}.sqlite")[0]


def _roster(root: Ed25519PrivateKey, keys: dict[str, Ed25519PrivateKey], firsts: dict[str, str]) -> SignedRoster:
    members = tuple(
        Member(
            name=name,
            display_name=name,
            identity=public_bytes(key).hex(),
            node_key=f"ecdsa-sha2-nistp384 {name.replace('-', '')}",
            tls_key=hashlib.sha256(name.encode()).hexdigest(),
            public_size=PUBLIC_SIZE,
            ledger_genesis=firsts[name],
            valid_from=NOW - 1,
            valid_until=NOW + 10**8,
        )
        for name, key in keys.items()
    )
    coordinator = Coordinator(name="coordinator", address="127.0.0.1:9443")
    mark = fingerprint(public_bytes(root))
    unsigned = UnsignedRoster(
        consortium="bench", version=1, coordinator=coordinator, members=members, root_fingerprint=mark
    )
    return sign_roster(root, unsigned)


def _transcript(plan: StudyPlan, number: int, keys: dict[str, Ed25519PrivateKey], roster: str) -> Transcript:
    names = tuple(keys)
    announcement = Announcement(
        purpose="train",
        study=plan.study,
        plan_digest=plan.digest(),
        roster_digest=roster,
        round=number,
        attempt=1,
        parameters_digest="ab" * 32,
        invited=names,
        threshold=smallest_threshold(len(names)),
    )
    cohort = tuple(_keys(name, key, announcement) for name, key in keys.items())
    context = Transcript(announcement=announcement, cohort=cohort).context or b""
    digest = hashlib.sha256(context).digest()
    agreed = survivors_payload(context, names)
    return Transcript(
        announcement=announcement,
        cohort=cohort,
        commitments=tuple(
            SignedDigest(
                dealer=name,
                digest=digest,
                signature=sign(key, COMMITMENT_KIND, commitment_payload(context=context, dealer=name, digest=digest)),
            )
            for name, key in keys.items()
        ),
        uploaders=names,
        agreements=tuple(
            Agreement(hospital=name, signature=sign(key, SURVIVORS_KIND, agreed)) for name, key in keys.items()
        ),
    )


def _keys(name: str, key: Ed25519PrivateKey, announcement: Announcement) -> Advertisement:
    return advertise(KeyPairs.generate(os.urandom), key, hospital=name, context0=announcement.context0)


def _receipt(key: Ed25519PrivateKey, charge: Entry, context: str, number: int) -> SignedReceipt:
    assert charge.mechanism is not None
    receipt = Receipt(
        entry_hash=charge.hash,
        chain_head=charge.hash,
        mechanism=charge.mechanism.model_dump(mode="json"),
        charges=number,
        epsilon_filter=0.1,
        signature="0" * 128,
    )
    kept = SignedReceipt(
        type="Update", study=charge.study or "", round=number, attempt=1, context=context, receipt=receipt
    )
    signature = sign(key, "receipt", kept.payload()).hex()
    return kept.model_copy(update={"receipt": receipt.model_copy(update={"signature": signature})})


def _pack(
    path: Path,
    key: Ed25519PrivateKey,
    name: str,
    entries: list[Entry],
    folder: Path,
    receipts: list[SignedReceipt],
    transcripts: list[Transcript],
    signed: SignedRoster,
    plan: StudyPlan,
) -> None:
    charges = [entry.mechanism for entry in entries if entry.kind == "charge" and entry.mechanism is not None]
    assert entries[0].budget is not None
    reported, order = reported_epsilon(charges, plan.privacy.delta), entries[0].budget.order
    claim = Claim(
        study=plan.study,
        charges=len(charges),
        epsilon=reported.epsilon,
        epsilon_filter=filter_epsilon(total_divergence(charges, order), order=order, delta=reported.delta),
        delta=reported.delta,
        accountant=reported.accountant,
    )
    parts = encode_parts(
        entries=entries,
        head=read_head(head_path(folder / f"{name}.sqlite")),
        receipts=receipts,
        transcripts=transcripts,
        shown=(),
        roster=members_now(signed, NOW),
        claims=[claim],
        plans=[plan],
        rosters=[signed],
    )
    time_ = entries[-1].time
    pack(path, key, parts, hospital=name, time=time_, software_digest=software_digest(), egress_digest="0" * 64)


def signature_limit(signatures: int) -> float:
    """Seconds that so many Ed25519 verifications take and nothing else, from a part of them."""
    key, message = Ed25519PrivateKey.generate(), b"x" * 600
    public, signature = public_bytes(key), sign(key, "limit", message)
    started = time.process_time()
    for _ in range(CHECKED):
        verify(public, "limit", message, signature)
    return (time.process_time() - started) / CHECKED * signatures


def measure(hospitals: int, rounds: int) -> dict[str, float]:
    """Make the evidence, audit it as a user would, and say what it took."""
    memory = Path("/dev/shm")  # noqa: S108 - charging is not what is measured
    with tempfile.TemporaryDirectory(prefix="konsil-bench-", dir=memory if memory.is_dir() else None) as temporary:
        started = time.perf_counter()
        case = make_evidence(Path(temporary), hospitals, rounds)
        made_s = time.perf_counter() - started
        size_mb = sum(path.stat().st_size for path in case.bundles) / 1e6
        print(f"made {case.entries:,} entries, {case.signatures:,} signatures, {size_mb:.0f} MB in {made_s:.0f} s")
        command = [sys.executable, "-c", MEASURED, "verify", *map(str, case.bundles), str(case.study)]
        started = time.perf_counter()
        done = subprocess.run([*command, "--root", str(case.root)], check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"error: honest evidence was not verified:\n{done.stdout[-2000:]}{done.stderr}")
    cpu_s, peak_kib = map(float, done.stderr.split()[-2:])
    limit = signature_limit(case.signatures)
    return {
        "hospitals": hospitals,
        "rounds": rounds,
        "entries": case.entries,
        "signatures": case.signatures,
        "verify_s": seconds,
        "verify_cpu_s": cpu_s,
        "verify_mb": peak_kib * 1024 / 1e6,
        "signatures_alone_s": limit,
        "verify_over_signatures": seconds / limit,
    }


def main() -> None:
    """Measure, print, and say which targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hospitals", type=int, default=HOSPITALS, help=f"how many (default: {HOSPITALS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of their study (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.hospitals, options.rounds)
    print(
        f"audit of {options.hospitals} hospitals, {options.rounds} rounds: {figures['verify_s']:.1f} s, "
        f"{figures['verify_mb']:.0f} MB; the signatures alone {figures['signatures_alone_s']:.1f} s "
        f"(ratio {figures['verify_over_signatures']:.1f}; load {os.getloadavg()[0]:.1f})"
    )
    for name, target in TARGETS.items():
        print(f"{name}: {figures[name]:.1f} (target <= {target:g}: {'met' if figures[name] <= target else 'MISSED'})")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
