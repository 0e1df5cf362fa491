"""Whoever changes one side's evidence is found by the others': hospitals' bundles, and what the coordinator kept."""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.audit import audit
from auditor.evidence import Transcripts, read_study
from auditor.findings import Finding
from client.bundle import export
from shared_models.approval import Approval
from shared_models.errors import EvidenceError
from shared_models.identity import load_key, read_public, sign
from shared_models.plan import StudyPlan
from shared_models.privacy.entries import GENESIS, Entry
from shared_models.privacy.evidence import Bundle, Claim, Shown, encode_parts, open_bundle, pack
from shared_models.privacy.head import Head
from shared_models.receipts import SignedReceipt
from shared_models.roster import SignedRoster
from shared_models.secagg.protocol import Transcript
from tests.federation import Federation, make_federation, restart_hospitals

LIAR = "hospital-1"
TWO = (LIAR, "hospital-2")
SOAK = pytest.param(range(1000), marks=[pytest.mark.soak, pytest.mark.timeout(3600)])


@dataclass
class Evidence:
    """All evidence of one federation's study, and the keys to forge it with."""

    federation: Federation
    bundles: dict[str, Path]
    study: Path

    def findings(self, bundles: dict[str, Path] | None = None, study: Path | None = None) -> list[Finding]:
        """What an auditor finds who has the root key, but for notes."""
        chosen = (bundles or self.bundles).values()
        found = audit([*chosen, study or self.study], root=self.root, partial=True).findings
        return [finding for finding in found if finding.severity != "note"]

    def problems(self, bundles: dict[str, Path] | None = None, study: Path | None = None) -> list[str]:
        """The same in words, each with its place."""
        return [f"{found.place}: {found.what}" for found in self.findings(bundles, study)]

    @property
    def root(self) -> bytes:
        """The consortium's public key."""
        return read_public(self.federation.settings(LIAR).keys.root)

    def key(self, hospital: str = LIAR) -> Ed25519PrivateKey:
        """A hospital's own identity: the strongest forger is who holds it."""
        return load_key(self.federation.settings(hospital).keys.identity)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """Four hospitals, two rounds, a release in each; every hospital's bundle and the coordinator's folder."""
    folder = tmp_path_factory.mktemp("evidence")
    release = {"every": 1, "clip": 1.0, "noise_multiplier": 60.0, "bins": 20}
    federation = make_federation(folder, rounds=2, evaluation=release, privacy={"noise_multiplier": 60.0})
    study = federation.run()
    restart_hospitals()
    bundles = {name: folder / f"{name}.evidence" for name in federation.names}
    for name, path in bundles.items():
        export(federation.settings(name), path)
    yield Evidence(federation, bundles, study)
    restart_hospitals()


def test_honest_evidence_agrees(evidence: Evidence) -> None:
    """No false alarm; and the bundle has a receipt and a transcript for every charge."""
    assert evidence.problems() == []
    bundle = opened(evidence)
    assert len(bundle.receipts) == len(bundle.transcripts) == 4
    assert [kept.receipt.entry_hash for kept in bundle.receipts] == [
        e.hash for e in bundle.entries if e.kind == "charge"
    ]


def test_a_bundle_that_was_changed_after_packing_does_not_open(evidence: Evidence, tmp_path: Path) -> None:
    """Any byte of any part, without the hospital's key."""
    rng, path = random.Random(1), tmp_path / "changed"
    with zipfile.ZipFile(evidence.bundles[LIAR]) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(100):
        name = rng.choice([name for name, data in parts.items() if data])
        data = bytearray(parts[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with zipfile.ZipFile(path, "w") as archive:
            for other, kept in parts.items():
                archive.writestr(other, bytes(data) if other == name else kept)

        with pytest.raises(EvidenceError):
            open_bundle(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"SQLite format 3\0", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes) -> None:
    """An error that says which file, never a crash."""
    (tmp_path / "file").write_bytes(content)

    with pytest.raises(EvidenceError, match="file"):
        open_bundle(tmp_path / "file")


# A hospital that lies with its own key


@dataclass(frozen=True)
class Opened:
    """A bundle with all its parts in memory, to be changed."""

    bundle: Bundle
    entries: tuple[Entry, ...]
    head: Head | None
    receipts: tuple[SignedReceipt, ...]
    transcripts: tuple[Transcript, ...]
    shown: tuple[Shown, ...]
    claims: tuple[Claim, ...]
    plans: tuple[StudyPlan, ...]
    approvals: tuple[Approval, ...]
    rosters: tuple[SignedRoster, ...]


def opened(evidence: Evidence, hospital: str = LIAR) -> Opened:
    """A hospital's honest bundle."""
    bundle = open_bundle(evidence.bundles[hospital])
    return Opened(
        bundle=bundle,
        entries=tuple(bundle.entries()),
        head=bundle.head,
        receipts=tuple(bundle.receipts()),
        transcripts=tuple(bundle.transcripts()),
        shown=tuple(bundle.shown()),
        claims=bundle.claims,
        plans=bundle.plans,
        approvals=bundle.approvals,
        rosters=bundle.rosters,
    )


def _repacked(
    evidence: Evidence, path: Path, key: Ed25519PrivateKey | None = None, *, liar: str = LIAR, **changes: Any
) -> dict[str, Path]:
    """The liar's bundle with something replaced, signed again; beside everybody else's."""
    bundle = replace(opened(evidence, liar), **changes)
    manifest = bundle.bundle.manifest
    parts = encode_parts(
        entries=bundle.entries,
        head=bundle.head,
        receipts=bundle.receipts,
        transcripts=bundle.transcripts,
        shown=bundle.shown,
        roster=bundle.bundle.roster,
        claims=bundle.claims,
        plans=bundle.plans,
        approvals=bundle.approvals,
        rosters=bundle.rosters,
    )
    fields = {name: getattr(manifest, name) for name in ("hospital", "time", "software_digest", "egress_digest")}
    pack(path, key or evidence.key(liar), parts, **fields)
    return {**evidence.bundles, liar: path}


def _chained(entries: list[Entry], key: Ed25519PrivateKey, **opening: Any) -> tuple[Entry, ...]:
    """The same events as another history: numbered, chained and signed again."""
    made: list[Entry] = []
    for number, entry in enumerate(entries, start=1):
        previous = made[-1].hash if made else GENESIS
        fields = {"seq": number, "previous_hash": previous, **(opening if number == 1 else {})}
        unsigned = Entry.model_validate_json(entry.model_copy(update=fields).model_dump_json())
        signature = sign(key, "ledger-entry", unsigned.canonical).hex()
        made.append(Entry.model_validate_json(unsigned.model_copy(update={"signature": signature}).model_dump_json()))
    return tuple(made)


def test_a_whole_new_history_is_found(evidence: Evidence, tmp_path: Path) -> None:
    """The last charge and all after it left out, the end signed again with the right key, its receipt gone."""
    bundle = opened(evidence)
    last = max(entry.seq for entry in bundle.entries if entry.kind == "charge")
    closed = [entry for entry in bundle.entries if entry.kind == "study-closed"]
    entries = _chained([*bundle.entries[: last - 1], *closed], evidence.key())
    receipts, transcripts = bundle.receipts[:-1], bundle.transcripts[:-1]
    bundles = _repacked(
        evidence, tmp_path / "new", entries=entries, head=None, receipts=receipts, transcripts=transcripts, claims=()
    )

    assert audit([bundles[LIAR]], root=evidence.root, partial=True).passed  # it holds by itself
    found = evidence.problems(bundles)

    where = f"{LIAR}, study {evidence.federation.plan.study}, round 2, attempt 1: ReleasedStatistics"
    assert f"{where}: the coordinator holds a receipt that {LIAR}'s evidence lacks: it was cut, or rolled back" in found


def test_a_ledger_signed_by_another_key_is_found(evidence: Evidence, tmp_path: Path) -> None:
    """Everything signed again by a key that nobody knows the hospital by: the others' rosters say so."""
    other = Ed25519PrivateKey.generate()
    bundle = opened(evidence)
    public = other.public_key().public_bytes_raw().hex()
    entries = _chained(list(bundle.entries), other, public_key=public)
    bundles = _repacked(evidence, tmp_path / "other", other, entries=entries, head=None, receipts=(), transcripts=())

    assert f"{LIAR}: {LIAR}'s ledger has another key than hospital-2 knows it by" in evidence.problems(bundles)


Lines = list[Any]


def _mutate(lines: Lines, rng: random.Random, edit: Callable[[Any, random.Random], Any]) -> Lines:
    """Rewrite, cut, reorder, repeat or remove: one change, drawn at random, that changes something."""
    made, at = list(lines), rng.randrange(len(lines))
    match rng.choice(["edit", "remove", "cut", "swap", "repeat"]):
        case "edit":
            made[at] = edit(made[at], rng)
        case "remove":
            del made[at]
        case "cut":
            made = made[:at]
        case "swap" if len(made) > 1:
            other = (at + rng.randrange(1, len(made))) % len(made)
            made[at], made[other] = made[other], made[at]
        case _:
            made.insert(rng.randrange(len(made) + 1), made[at])
    return made


def _edit_receipt(kept: SignedReceipt, rng: random.Random, key: Ed25519PrivateKey) -> SignedReceipt:
    """Another value in one field; signed again by the hospital or not."""
    receipt = kept.receipt
    changes = [
        kept.model_copy(update={"round": kept.round + 1}),
        kept.model_copy(update={"attempt": kept.attempt + 1}),
        kept.model_copy(update={"context": "0" * 64}),
        kept.model_copy(update={"receipt": receipt.model_copy(update={"entry_hash": receipt.chain_head})}),
        kept.model_copy(update={"receipt": receipt.model_copy(update={"chain_head": "1" * 64})}),
        kept.model_copy(update={"receipt": receipt.model_copy(update={"charges": receipt.charges + 1})}),
        kept.model_copy(update={"receipt": receipt.model_copy(update={"mechanism": {"kind": "none"}})}),
        kept.model_copy(update={"receipt": receipt.model_copy(update={"epsilon_filter": 0.0})}),
    ]
    changed = rng.choice(changes)
    if rng.random() < 0.5:
        signature = sign(key, "receipt", changed.payload()).hex()
        changed = changed.model_copy(update={"receipt": changed.receipt.model_copy(update={"signature": signature})})
    return changed


def _edit_json(value: Any, rng: random.Random) -> Any:
    """One leaf of a JSON value changed."""
    if isinstance(value, dict):
        key = rng.choice(sorted(value))
        return {**value, key: _edit_json(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [_edit_json(one, rng) if i == at else one for i, one in enumerate(value)]
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + ("A" if value[at] != "A" else "B") + value[at + 1 :]
    return value + 1 if isinstance(value, int | float) else "changed"


def _edit_entry(entry: Entry, rng: random.Random) -> Entry:
    fields = json.loads(entry.model_dump_json(exclude_none=True))
    try:
        return Entry.model_validate_json(json.dumps(_edit_json(fields, rng)))
    except ValueError:
        return entry.model_copy(update={"time": "2020-01-01T00:00:00.000Z"})


def _lie(evidence: Evidence, liar: str, rng: random.Random, path: Path) -> dict[str, Path]:
    """One hospital's evidence with one random change, packed and signed again.

    Its receipts, or its ledger: as it stands, or the whole chain numbered and signed again from there on. Nobody else
    has ever seen what came after its last receipt, so what a hospital that has the head file does to that is not tried.
    """
    bundle, key = opened(evidence, liar), evidence.key(liar)
    what = rng.choice(["receipts", "ledger", "another history"])
    if what == "receipts":
        receipts = tuple(_mutate(list(bundle.receipts), rng, lambda kept, draw: _edit_receipt(kept, draw, key)))
        return _repacked(evidence, path, liar=liar, receipts=receipts)
    witnessed = next(e.seq for e in bundle.entries if e.hash == bundle.receipts[-1].receipt.chain_head)
    entries = tuple(_mutate(list(bundle.entries), rng, _edit_entry))
    if what == "another history":
        try:
            entries = _chained(list(entries), key)
        except ValueError:  # what is no entry cannot be signed as one
            return _lie(evidence, liar, rng, path)
    without_head = what == "another history" or rng.random() < 0.5
    unseen = without_head and entries[:witnessed] == bundle.entries[:witnessed]
    if entries == bundle.entries or (
        unseen and (what == "another history" or entries == bundle.entries[: len(entries)])
    ):
        return _lie(evidence, liar, rng, path)
    return _repacked(evidence, path, liar=liar, entries=entries, head=None if without_head else bundle.head)


@pytest.mark.parametrize("seeds", [range(60), SOAK])
def test_whatever_a_hospital_changes_in_its_bundle_is_found(evidence: Evidence, tmp_path: Path, seeds: range) -> None:
    """Either of two hospitals, with its own key, against the other one's bundle and the coordinator's folder."""
    for seed in seeds:
        rng = random.Random(f"hospital {seed}")
        liar = rng.choice(TWO)
        bundles = _lie(evidence, liar, rng, tmp_path / "mutated")

        assert evidence.problems({name: bundles[name] for name in TWO}) != [], f"seed {seed} was not found"
    print(f"{len(seeds)} changes of a hospital's evidence, all found")  # noqa: T201 - shown by `make soak ARGS=-s`


@pytest.mark.parametrize("seeds", [range(60), SOAK])
def test_whatever_a_coordinator_changes_is_found(evidence: Evidence, tmp_path: Path, seeds: range) -> None:
    """Random changes of its receipts and transcripts: no signature of hospitals can be made for another content."""
    folder, meaningless = tmp_path / "study", 0
    for seed in seeds:
        rng = random.Random(f"coordinator {seed}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("receipts.jsonl", "sums.jsonl"):
            shutil.copy(evidence.study / name, folder / name)
        path = folder / rng.choice(["receipts.jsonl", "sums.jsonl"])
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        edit = _edit_json if path.name == "receipts.jsonl" else _edit_transcript
        changed = _mutate(lines, rng, edit)
        path.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")

        found = evidence.problems({name: evidence.bundles[name] for name in TWO}, folder)
        if not found:  # the last letter of base64 has bits without a meaning
            kept, whole = read_study(folder, Transcripts({})), read_study(evidence.study, Transcripts({}))
            same = (kept.uploads, kept.views) == (whole.uploads, whole.views)
            assert same, f"seed {seed} of {path.name} was not found"
            meaningless += 1
    print(f"{len(seeds) - meaningless} changes of a coordinator's evidence, all found")  # noqa: T201 - as above
    assert meaningless < len(seeds) / 20


def _edit_transcript(kept: Any, rng: random.Random) -> Any:
    return {**kept, "transcript": _edit_json(kept["transcript"], rng)}


@pytest.mark.parametrize("seeds", [range(30), SOAK])
def test_whatever_is_honest_raises_no_alarm(evidence: Evidence, tmp_path: Path, seeds: range) -> None:
    """Other bundles beside it or none, in another order; written anew, packed earlier, without what was optional."""
    bundle = opened(evidence)
    witnessed = next(e.seq for e in bundle.entries if e.hash == bundle.receipts[-1].receipt.chain_head)
    for seed in seeds:
        rng = random.Random(f"honest {seed}")
        study = tmp_path / f"study {seed}"
        study.mkdir()
        for name in ("receipts.jsonl", "sums.jsonl"):
            lines = [json.loads(line) for line in (evidence.study / name).read_bytes().splitlines()]
            spaced = [json.dumps(_reordered(line, rng), indent=None, separators=(", ", " : ")) for line in lines]
            (study / name).write_text("".join(line + "\n" for line in spaced), encoding="utf-8")
        changes: dict[str, Any] = {}
        if rng.random() < 0.5:  # packed before the study was closed; the head file does not come along
            changes = {"entries": bundle.entries[: rng.randint(witnessed, len(bundle.entries))], "head": None}
        if rng.random() < 0.5:
            changes["transcripts"] = ()
        bundles = _repacked(evidence, tmp_path / "honest", **changes)
        chosen = rng.sample(sorted(bundles), rng.randint(1, len(bundles)))

        assert evidence.problems({name: bundles[name] for name in chosen}, study) == [], f"seed {seed}"


def _reordered(value: Any, rng: random.Random) -> Any:
    """The same JSON value, its keys in another order."""
    if isinstance(value, dict):
        return {key: _reordered(value[key], rng) for key in rng.sample(sorted(value), len(value))}
    return [_reordered(one, rng) for one in value] if isinstance(value, list) else value


def test_a_fork_is_named(evidence: Evidence, tmp_path: Path) -> None:
    """Another list of uploaders at one hospital: what was forked, in which round, and who holds what."""
    bundle = opened(evidence)
    first, *rest = bundle.transcripts
    forked = first.model_copy(update={"uploaders": first.uploaders[:-1], "agreements": ()})
    bundles = _repacked(evidence, tmp_path / "forked", transcripts=(forked, *rest))

    found = evidence.problems(bundles)

    where = f"coordinator, study {evidence.federation.plan.study}, round 1, attempt 1: train"
    assert f"{where}: the coordinator and {LIAR} hold different lists of uploaders (U3)" in found


def test_a_coordinator_that_showed_two_digests_is_found(evidence: Evidence, tmp_path: Path) -> None:
    """What it showed one hospital of all receipts, it must have shown all."""
    shown = list(opened(evidence).shown)
    shown[-1] = shown[-1].model_copy(update={"everybody": "0" * 64})
    bundles = _repacked(evidence, tmp_path / "shown", shown=tuple(shown))

    assert any("were shown different digests over all receipts" in problem for problem in evidence.problems(bundles))


# As a person uses it


def _run(module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_hospital_exports_and_an_auditor_verifies(evidence: Evidence, tmp_path: Path) -> None:
    """From hospital.toml to an exit status of 0, over two commands."""
    settings, bundle = evidence.federation.settings_file(LIAR), tmp_path / "evidence.zip"

    exported = _run("client.cli", "ledger", "export", settings, bundle)
    key = evidence.federation.folder / "public" / f"{LIAR}.identity.pub"
    audited = _run("auditor.cli", "verify", bundle, "--key", key, "--study", evidence.study, "--partial")

    assert exported.returncode == 0, exported.stderr
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert f"{LIAR}, population all-patients, 11 entries, 4 charges, 4 receipts" in audited.stdout
    assert "verified 1 hospitals, 11 entries, 4 attempts; everything holds and agrees" in audited.stdout
    cells = (evidence.federation.settings(LIAR).records / "data.csv").read_text(encoding="utf-8").split(",")
    with zipfile.ZipFile(bundle) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert [cell for cell in cells if len(cell) >= 8 and "\n" not in cell and cell.encode() in content] == []


def test_evidence_that_differs_ends_with_a_status(evidence: Evidence, tmp_path: Path) -> None:
    """Everything that differs is listed; two lines on standard error."""
    shutil.copytree(evidence.study, tmp_path / "study")
    (tmp_path / "study" / "receipts.jsonl").write_text("", encoding="utf-8")

    audited = _run("auditor.cli", "verify", *evidence.bundles.values(), "--study", tmp_path / "study")

    assert audited.returncode != 0
    assert audited.stdout.count("the coordinator's receipts lack it") == 16
    assert len(audited.stderr.splitlines()) == 2


def test_a_hospital_looks_at_its_own_ledger(evidence: Evidence) -> None:
    """Show, filtered and as JSON; verify."""
    settings = evidence.federation.settings_file(LIAR)

    shown = _run("client.cli", "ledger", "show", settings, "--last", 3)
    lines = _run("client.cli", "ledger", "show", settings, "--json", "--study", evidence.federation.plan.study)
    verified = _run("client.cli", "ledger", "verify", settings)

    assert "study-closed" in shown.stdout
    entries = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [entry["kind"] for entry in entries].count("charge") == 4
    assert verified.returncode == 0, verified.stderr
    assert "4 charges; no entry missing at the end" in verified.stdout


def test_a_ledger_without_its_head_file_is_said_to_be_so(evidence: Evidence) -> None:
    """It may be cut; the words say it in capitals."""
    head = evidence.federation.settings(LIAR).state / "ledger.sqlite.head"
    kept = head.read_bytes()
    head.unlink()
    try:
        verified = _run("client.cli", "ledger", "verify", evidence.federation.settings_file(LIAR))
    finally:
        head.write_bytes(kept)

    assert "NO HEAD FILE" in verified.stdout
