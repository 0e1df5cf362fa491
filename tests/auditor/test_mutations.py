"""Every field of every kind of entry and of every receipt, changed by whoever holds which keys: found, and named."""

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from auditor.audit import audit
from auditor.findings import Finding
from client.books import LEDGER, Books
from client.budget import Budget
from client.bundle import export
from client.consent import Consents
from shared_models.identity import load_key, read_public, sign
from shared_models.plan import StudyPlan
from shared_models.privacy.entries import GENESIS, KINDS, Entry, possession
from shared_models.privacy.evidence import PARTS, open_bundle, pack
from shared_models.privacy.ledger import Ledger
from shared_models.receipts import SignedReceipt
from tests.federation import Federation, change_policy, changed, make_federation, restart_hospitals
from tests.rounds.test_a_study_that_waits import approve

LIAR, OTHER = "hospital-1", "hospital-2"
FIRST_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))  # of the liar, before it rotated

Json = Any

REMADE = {(name,) for name in ("signature", "seq", "previous_hash", "new_key_signature")}  # of a whole history


@dataclass
class Evidence:
    """Two hospitals' bundles, the coordinator's folder, and the liar's keys."""

    bundles: dict[str, Path]
    study: Path
    root: bytes
    key: Ed25519PrivateKey

    def __post_init__(self) -> None:
        with zipfile.ZipFile(self.bundles[LIAR]) as archive:
            self.parts = {name: archive.read(name) for name in PARTS}
        self.manifest = open_bundle(self.bundles[LIAR]).manifest
        self.entries = list(open_bundle(self.bundles[LIAR]).entries())
        self.receipts = list(open_bundle(self.bundles[LIAR]).receipts())

    def findings(self, path: Path | None = None, *, study: Path | None = None, alone: bool = False) -> list[Finding]:
        """What an audit with the root key finds, but for notes; the liar's bundle may be another one."""
        bundles = [path or self.bundles[LIAR], *([] if alone else [self.bundles[OTHER], study or self.study])]
        found = audit(bundles, root=self.root, partial=True).findings
        return [finding for finding in found if finding.severity != "note"]

    def packed(self, path: Path, **parts: list[Json]) -> Path:
        """The liar's bundle with some parts replaced, packed and signed by it."""
        written = {f"{name}.jsonl": b"".join(_line(line) + b"\n" for line in lines) for name, lines in parts.items()}
        fields = {name: getattr(self.manifest, name) for name in ("hospital", "time", "software_digest")}
        pack(path, self.key, self.parts | written, egress_digest=self.manifest.egress_digest, **fields)
        return path


def _line(value: Json) -> bytes:
    return rfc8785.dumps(value)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """A ledger with an entry of every kind, all but the last few of them before the first receipt."""
    folder = tmp_path_factory.mktemp("mutations")
    release = {"every": 1, "clip": 1.0, "noise_multiplier": 90.0, "bins": 20}
    federation = make_federation(
        folder, hospitals=3, rounds=1, evaluation=release, privacy={"noise_multiplier": 90.0, "spare_charges": 0}
    )
    change_policy(federation, LIAR, standing_approvals=[])
    _begin(federation, _another(federation.plan))
    federation.wire.on_request = lambda name, message: (
        _say_yes(federation) if (name, message.metadata.message_type) == (LIAR, "query.propose") else None
    )
    study = federation.run()
    restart_hospitals()
    bundles = {name: folder / f"{name}.evidence" for name in (LIAR, OTHER)}
    for name, path in bundles.items():
        export(federation.settings(name), path)
    settings = federation.settings(LIAR)
    yield Evidence(bundles, study, read_public(settings.keys.root), load_key(settings.keys.identity))
    restart_hospitals()


def _another(plan: StudyPlan) -> StudyPlan:
    return changed(plan, study="another", privacy={"noise_multiplier": 200.0})


def _begin(federation: Federation, plan: StudyPlan) -> None:
    """Before the study: a budget under an older key, and an entry of each kind that the study itself makes none of."""
    settings = federation.settings(LIAR)
    settings.state.mkdir(parents=True)
    population = settings.population
    with Ledger.create(settings.state / LEDGER, FIRST_KEY, hospital=LIAR) as ledger:
        Budget.open(
            ledger,
            population=population.name,
            public_size=population.public_size,
            epsilon=population.epsilon,
            delta=population.delta,
            order=population.order,
        )
        ledger.rotate(load_key(settings.keys.identity))
    books = Books.open(settings)
    books.budget.population_is("5" * 64)
    books.ledger.append("conformance")
    books.ledger.append("checkpoint", evidence_digest="6" * 64)
    approval = books.budget.approve(plan, approved_by="standing-rule")
    books.ledger.append(
        "plan-reapproved",
        population=population.name,
        study=plan.study,
        plan_digest=approval.plan_digest,
        software_digest="7" * 64,
        approved_by="standing-rule",
    )
    Consents(settings.state).settle(plan)
    books.close()


def _say_yes(federation: Federation) -> None:
    if (federation.settings(LIAR).state / "studies" / f"{federation.plan.study}.json").exists():
        approve(federation, LIAR)


def test_the_honest_evidence_holds_and_has_every_kind(evidence: Evidence) -> None:
    """Nothing below is found because it was wrong before."""
    assert evidence.findings() == []
    assert {entry.kind for entry in evidence.entries} == KINDS
    assert any(entry.approved_by == "steward" and entry.approval for entry in evidence.entries)
    assert {kept.type for kept in evidence.receipts} == {"Update", "ReleasedStatistics"}


# One leaf after the other


Place = tuple[str | int, ...]


def _leaves(value: Json, place: Place = ()) -> Iterator[Place]:
    if isinstance(value, dict):
        for key in value:
            yield from _leaves(value[key], (*place, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _leaves(one, (*place, number))
    else:
        yield place


def _with(value: Json, place: Place, change: Callable[[Json], Json]) -> Json:
    """A copy with one leaf changed."""
    if not place:
        return change(value)
    head, *rest = place
    copy: Json = dict(value) if isinstance(value, dict) else list(value)
    copy[head] = _with(value[head], tuple(rest), change)
    return copy


def _changed(value: Json) -> Json:
    """Another value that its field may hold, wherever there is one."""
    if isinstance(value, str):
        if value.endswith("Z"):  # a time: one millisecond earlier or later
            return f"{value[:-2]}{(int(value[-2]) + 1) % 10}Z"
        if value in KINDS:
            return "conformance" if value != "conformance" else "checkpoint"
        last = {"0": "1", "a": "b"}.get(value[-1], "a" if value[-1].isalpha() else "0")
        return value[:-1] + last
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 1.5 if isinstance(value, float) else "x"


def _fields(entry: Entry) -> Json:
    return json.loads(entry.model_dump_json(exclude_none=True))


def _key_of(evidence: Evidence, entry: Entry) -> Ed25519PrivateKey:
    rotated = next(known.seq for known in evidence.entries if known.kind == "key-rotated")
    return FIRST_KEY if entry.seq <= rotated else evidence.key


def _places(evidence: Evidence) -> list[tuple[int, Place]]:
    """Every leaf of the first entry of each kind."""
    firsts = {entry.kind: entry for entry in reversed(evidence.entries)}
    return [(entry.seq - 1, place) for entry in firsts.values() for place in _leaves(_fields(entry))]


def test_whoever_has_no_key_changes_no_field(evidence: Evidence, tmp_path: Path) -> None:
    """The entry alone is changed. The finding names it, or the line where it stood."""
    lines = [_fields(entry) for entry in evidence.entries]
    for number, place in _places(evidence):
        forged = [*lines]
        forged[number] = _with(lines[number], place, _changed)

        found = evidence.findings(evidence.packed(tmp_path / "forged", ledger=forged), alone=True)

        assert [finding.code for finding in found] == ["ledger-broken"], place
        assert f"ledger entry {number + 1}" in found[0].what or f"ledger entry {number + 2}" in found[0].what, place


def test_a_hospital_changes_no_field_with_its_key(evidence: Evidence, tmp_path: Path) -> None:
    """The entry is changed and signed again: the one behind it, or what the entry may say, does not agree."""
    lines = [_fields(entry) for entry in evidence.entries]
    for number, place in _places(evidence):
        if place == ("signature",):
            continue
        entry = _entry(_with(lines[number], place, _changed))
        if entry is None:
            continue  # no entry at all: the test above has it
        forged = [*lines]
        forged[number] = _fields(_signed(entry, _key_of(evidence, evidence.entries[number])))

        found = evidence.findings(evidence.packed(tmp_path / "forged", ledger=forged))

        assert {"ledger-broken"} <= {finding.code for finding in found}, (number, place)


def test_a_hospital_writes_no_other_history(evidence: Evidence, tmp_path: Path) -> None:
    """Changed, then everything behind it numbered, chained and signed again, receipts too: others hold the old ones."""
    lines, tried = [_fields(entry) for entry in evidence.entries], 0
    witnessed = next(e.seq for e in evidence.entries if e.hash == evidence.receipts[-1].receipt.chain_head)
    for number, place in _places(evidence):
        entry = _entry(_with(lines[number], place, _changed))
        if entry is None or place in REMADE or number >= witnessed:
            continue  # these are made anew below
        entries = [*evidence.entries]
        entries[number] = entry
        history = _chained(evidence, entries)
        path = evidence.packed(
            tmp_path / "forged", ledger=[_fields(e) for e in history], receipts=_resigned(evidence, history)
        )
        tried += 1

        assert evidence.findings(path) != [], (number, place)
    assert tried > 80


def _entry(fields: Json) -> Entry | None:
    try:
        return Entry.model_validate_json(json.dumps(fields))
    except ValueError:
        return None


def _signed(entry: Entry, key: Ed25519PrivateKey) -> Entry:
    return _whole(entry.model_copy(update={"signature": sign(key, "ledger-entry", _whole(entry).canonical).hex()}))


def _whole(entry: Entry) -> Entry:
    """Without what was computed from older fields."""
    return Entry.model_validate_json(entry.model_dump_json())


def _chained(evidence: Evidence, entries: list[Entry]) -> list[Entry]:
    """The same events as a history that holds: numbered, chained, handed over and signed again."""
    made: list[Entry] = []
    key = FIRST_KEY
    for number, entry in enumerate(entries, start=1):
        previous = made[-1].hash if made else GENESIS
        fields: dict[str, Any] = {"seq": number, "previous_hash": previous}
        if entry.kind == "key-rotated":
            new = bytes.fromhex(entry.new_public_key or "")
            proof = possession(LIAR, seq=number, previous_hash=previous, new_public_key=new)
            fields["new_key_signature"] = sign(evidence.key, "ledger-key", proof).hex()
        made.append(_signed(entry.model_copy(update=fields), key))
        key = evidence.key if entry.kind == "key-rotated" else key
    return made


def _resigned(evidence: Evidence, history: list[Entry]) -> list[Json]:
    """Its own receipts, for the new history."""
    new = {old.hash: made.hash for old, made in zip(evidence.entries, history, strict=True)}
    return [
        _receipt(evidence, kept, entry_hash=new[kept.receipt.entry_hash], chain_head=new[kept.receipt.chain_head])
        for kept in evidence.receipts
    ]


def _receipt(evidence: Evidence, kept: SignedReceipt, **changes: Any) -> Json:
    unsigned = kept.model_copy(update={"receipt": kept.receipt.model_copy(update=changes)})
    signature = sign(evidence.key, "receipt", unsigned.payload()).hex()
    signed = unsigned.model_copy(update={"receipt": unsigned.receipt.model_copy(update={"signature": signature})})
    return signed.model_dump(mode="json")


# Receipts


@pytest.mark.parametrize("signed", [False, True], ids=["as it is", "signed again"])
def test_no_field_of_a_receipt_changes(evidence: Evidence, tmp_path: Path, signed: bool) -> None:
    """At the hospital, with or without its key; both kinds of receipt."""
    lines = [kept.model_dump(mode="json") for kept in evidence.receipts]
    for number, line in enumerate(lines):
        for place in _leaves(line):
            forged = _with(line, place, _changed)
            if signed and place != ("receipt", "signature"):
                try:
                    forged = _receipt(evidence, SignedReceipt.model_validate_json(json.dumps(forged)))
                except ValueError:
                    continue  # no receipt at all
            changed_lines = [*lines[:number], forged, *lines[number + 1 :]]

            found = evidence.findings(evidence.packed(tmp_path / "forged", receipts=changed_lines))

            assert found, (number, place)
            assert all(finding.title and finding.meaning for finding in found)


def test_no_field_of_a_receipt_changes_at_the_coordinator(evidence: Evidence, tmp_path: Path) -> None:
    """It has nobody's key."""
    lines = [json.loads(line) for line in (evidence.study / "receipts.jsonl").read_bytes().splitlines()]
    study = tmp_path / "study"
    study.mkdir()
    (study / "sums.jsonl").write_bytes((evidence.study / "sums.jsonl").read_bytes())
    for number, line in enumerate(lines):
        if line["hospital"] not in {LIAR, OTHER}:
            continue
        for place in _leaves(line):
            forged = [*lines[:number], _with(line, place, _changed), *lines[number + 1 :]]
            (study / "receipts.jsonl").write_bytes(b"".join(_line(one) + b"\n" for one in forged))

            assert evidence.findings(study=study), (number, place)


# Whole entries


@pytest.mark.parametrize("what", ["deletion", "insertion", "reordering", "truncation", "replay", "another's key"])
def test_no_entry_comes_or_goes(evidence: Evidence, tmp_path: Path, what: str) -> None:
    """At every place of the ledger; each is found in the chain, or against its head file."""
    lines = [_fields(entry) for entry in evidence.entries]
    thief = Ed25519PrivateKey.from_private_bytes(bytes(32))
    for number in range(len(lines)):
        forged = [*lines]
        match what:
            case "deletion":
                del forged[number]
            case "insertion":
                inserted = _entry(lines[number] | {"time": "2026-01-01T00:00:00.000Z"})
                assert inserted is not None
                forged.insert(number, _fields(_signed(inserted, _key_of(evidence, inserted))))
            case "reordering":
                other = (number + 1) % len(lines)
                forged[number], forged[other] = forged[other], forged[number]
            case "truncation":
                forged = forged[:number]
            case "replay":
                forged.append(lines[number])
            case _:
                forged[number] = _fields(_signed(evidence.entries[number], thief))

        found = evidence.findings(evidence.packed(tmp_path / "forged", ledger=forged), alone=True)

        assert [finding.code for finding in found] == ["ledger-broken"], number


def test_every_byte_of_every_part_is_the_hospitals(evidence: Evidence, tmp_path: Path) -> None:
    """Whoever has not its key changes nothing in a bundle, wherever."""
    rng, path = random.Random(4), tmp_path / "changed"
    with zipfile.ZipFile(evidence.bundles[LIAR]) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name, data in parts.items():
        for _ in range(5 if data else 0):
            forged = bytearray(data)
            forged[rng.randrange(len(forged))] ^= 1 << rng.randrange(8)
            with zipfile.ZipFile(path, "w") as archive:
                for other, kept in parts.items():
                    archive.writestr(other, bytes(forged) if other == name else kept)

            assert [finding.code for finding in evidence.findings(path, alone=True)] == ["bundle-broken"], name


def test_approvals_and_plans_are_held_against_each_other(evidence: Evidence, tmp_path: Path) -> None:
    """Whatever a hospital changes in the plans and approvals that it shows: the ledger has their digests."""
    for part, codes in (
        ("plans", {"plan-differs", "price-differs", "plan-missing", "plan-unknown", "bundle-broken", "newer-format"}),
        ("approvals", {"forged-approval", "approval-missing", "bundle-broken", "newer-format"}),
    ):
        lines = [json.loads(line) for line in evidence.parts[f"{part}.jsonl"].splitlines()]
        assert lines
        for number, line in enumerate(lines):
            for place in _leaves(line):
                forged = [*lines[:number], _with(line, place, _changed), *lines[number + 1 :]]
                found = evidence.findings(evidence.packed(tmp_path / "forged", **{part: forged}), alone=True)

                assert found, (part, place)
                assert {finding.code for finding in found} <= codes, (part, place)
        found = evidence.findings(evidence.packed(tmp_path / "forged", **{part: []}), alone=True)
        assert {finding.code for finding in found} <= codes
        assert found
