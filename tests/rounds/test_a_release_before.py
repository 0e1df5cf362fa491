"""A side that is one minor release behind takes part: what 0.1.0 said is read, and what is said to it 0.1.0 can read.

``tests/vectors/release_0_1_0.json`` is a whole study as 0.1.0 ran it. Other majors are refused by name.
"""

import base64
import json
import sqlite3
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import jsonschema
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from pydantic import BaseModel
from safetensors.torch import save_file

from auditor.audit import audit
from auditor.evidence import Transcripts, read_study
from auditor.verify import Rules, check_entries
from client.budget import Budget
from client.consent import Consents, Proposed, Refused
from server.aggregate import Attempt
from server.gather import Answer
from server.receipts import LastReceipts
from server.round import check_receipt
from shared_models import messages, versions
from shared_models.approval import Approval, verify_approval
from shared_models.config import ALWAYS_WRITTEN, Evolving, read_toml
from shared_models.encoding import encoding
from shared_models.enrolment import read_kit, read_request
from shared_models.errors import (
    FederationError,
    ProtocolError,
    UnsupportedApprovalError,
    UnsupportedEvidenceError,
    UnsupportedFileError,
    UnsupportedLedgerError,
    UnsupportedMessageError,
    UnsupportedRosterError,
    UnsupportedVersionError,
)
from shared_models.identity import sign
from shared_models.messages import (
    AdvertiseRequest,
    Body,
    Enrolment,
    Proposal,
    Upload,
    decode,
    encode,
    read_reply,
)
from shared_models.model_file import read_model
from shared_models.outcomes import compute_metrics
from shared_models.plan import StudyPlan, TrainingPlan, parse_plan
from shared_models.privacy.entries import KINDS as ENTRY_KINDS
from shared_models.privacy.entries import canonical_json, parse_entry
from shared_models.privacy.evidence import open_bundle
from shared_models.privacy.ledger import Ledger
from shared_models.privacy.mechanisms import release_mechanism, training_mechanism
from shared_models.receipts import Anchor
from shared_models.roster import verify_roster
from shared_models.secagg import protocol
from shared_models.secagg.key_agreement import Announcement, Purpose, Roster
from shared_models.secagg.transcripts import verify_transcript
from shared_models.subgroups import EVERYBODY, split
from shared_models.tasks import find_task
from tests.federation import Federation, change_policy, make_federation
from tests.vectors.record_release import ASKED, FOLDER, RELEASE, bodies, spoken

BEFORE: dict[str, Any] = json.loads((FOLDER / "release_0_1_0.json").read_text(encoding="utf-8"))
HOSPITAL, COORDINATOR = BEFORE["hospital"], BEFORE["coordinator"]
IDENTITIES = {name: bytes.fromhex(key) for name, key in BEFORE["identities"].items()}
EXCHANGE: list[dict[str, Any]] = BEFORE["exchange"]
KINDS = {kind.__name__: kind for kind in bodies()}
_FIELDS = """
AdvertiseRequest.anchor Anchor.everybody Anchor.last Announcement.protocol Approval.format BudgetTerms.neighbouring
BudgetTerms.unit Cnn.channels Coordinator.authority EvaluationPlan.bins GaussianRelease.kind
GaussianRelease.releases Kit.format Lstm.hidden Lstm.layers Manifest.format Manifest.signature Member.ledger_genesis
Member.revoked Mlp.hidden PoissonGaussian.kind PrivacyPlan.spare_charges Proposal.anchor Request.format
Request.signature_before Shown.attempt Shown.purpose Shown.round SignedReceipt.version SignedRoster.format
StudyPlan.evaluation StudyPlan.reply_grid_s StudyPlan.seed Transcript.agreements Transcript.cohort
Transcript.commitments Transcript.uploaders Transformer.heads Transformer.layers Transformer.width
UnsignedRequest.format UnsignedRoster.format
"""
ALWAYS_WRITTEN_IN_0_1_0 = {*_FIELDS.split(), *(f"{name}.version" for name in (*KINDS, "Body", "SumRequest", "Upload"))}


def records(said: dict[str, Any]) -> RecordDict:
    """A recorded message as it came; a long vector's numbers were not kept, and are zeros."""
    found = RecordDict({"konsil": ConfigRecord({"type": said["type"], "json": said["json"]})})
    if "vector" in said:
        vector = said["vector"]
        data = base64.b64decode(vector["data"]) if "data" in vector else bytes(4 * vector["shape"][0])
        array = Array(dtype=vector["dtype"], shape=tuple(vector["shape"]), stype=vector["stype"], data=data)
        found["vector"] = ArrayRecord({"vector": array})
    return found


def could_read(name: str, text: str) -> None:
    """Whether 0.1.0 would take this body: its own schema, which refuses keys that it does not know.

    Raises:
        jsonschema.ValidationError: It would not.
    """
    jsonschema.Draft202012Validator(_of_text(BEFORE["schemas"][name])).validate(json.loads(text))


def _of_text(schema: Any) -> Any:
    """A schema whose lengths of bytes, which are those before base64, are left to the models."""
    if isinstance(schema, list):
        return [_of_text(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    lengths = {"minLength", "maxLength"} if schema.get("format") in {"base64url", "binary"} else set()
    return {key: _of_text(value) for key, value in schema.items() if key not in lengths}


# The wire


def test_the_recording_is_whole() -> None:
    """Every message that 0.1.0 had, both ways, and a ledger entry of every kind that it had."""
    assert {said["type"] for said in EXCHANGE} == set(BEFORE["schemas"])
    assert {said["way"] for said in EXCHANGE} == {"request", "reply"}
    recorded = {json.loads(entry["body"])["kind"] for entry in HOSPITAL["ledger"]}
    assert ENTRY_KINDS - recorded == {"plan-reapproved"}  # the one that came later


@pytest.mark.parametrize("said", EXCHANGE, ids=lambda said: f"{said['way']} {said['type']}")
def test_what_it_said_is_read_and_said_again_to_the_bit(said: dict[str, Any]) -> None:
    """Today's models lose nothing of it, add nothing to it, and 0.1.0's schema agrees with its own words."""
    kind = KINDS[said["type"]]
    body, vector = decode(records(said), kind)

    again = encode(body, vector).config_records["konsil"]

    assert (again["type"], again["json"]) == (said["type"], said["json"])
    could_read(said["type"], said["json"])


def test_what_is_said_today_it_could_read(tmp_path: Path) -> None:
    """A whole study of today, every kind of message in it, under the schemas by which 0.1.0 refuses unknown keys."""
    federation = make_federation(
        tmp_path, hospitals=3, rounds=1, evaluation=RELEASE, privacy={"noise_multiplier": 60.0}
    )
    found: list[dict[str, Any]] = []
    federation.wire.on_request = lambda hospital, message: found.append(spoken("request", hospital, message))

    def tamper(hospital: str, message: Message) -> Message:
        found.append(spoken("reply", hospital, message))
        return message

    federation.wire.tamper = tamper
    federation.run()

    for said in found:
        could_read(said["type"], said["json"])
    assert {said["type"] for said in found} == set(BEFORE["schemas"]) - {"Complained", "Refusal"}
    before = {(said["type"], said["action"], "vector" in said) for said in EXCHANGE}
    assert {(said["type"], said["action"], "vector" in said) for said in found} <= before
    shapes = {(s["type"], str(s["vector"]["shape"]), s["vector"]["dtype"]) for s in EXCHANGE if "vector" in s}
    assert {(s["type"], str(s["vector"]["shape"]), s["vector"]["dtype"]) for s in found if "vector" in s} == shapes


def test_todays_hospital_takes_part_in_its_study(federation: Federation) -> None:
    """Its proposal, as it sent it; the answer is one that it could read, for the plan that it meant."""
    proposal = next(said for said in EXCHANGE if said["type"] == "Proposal")
    for name in federation.names:
        change_policy(federation, name, release_validation=True, maximum_rounds=3)
    message = Message(records(proposal), dst_node_id=100, message_type=proposal["action"], group_id="1", ttl=60.0)

    answer = federation.wire.deliver("hospital-1", message)

    assert answer is not None
    body, _ = read_reply(answer)
    assert isinstance(body, Enrolment)
    assert body.plan_digest == BEFORE["plan_digest"]
    could_read("Enrolment", spoken("reply", "hospital-1", answer)["json"])


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_todays_coordinator_leads_its_hospitals_through_a_sum(purpose: Purpose) -> None:
    """From their recorded replies it makes the recorded requests, to the bit; of statistics it opens the same sum."""
    plan, task = parse_plan(BEFORE["plan"]), find_task(BEFORE["plan"]["task"])
    sizes = {said["hospital"]: decode(records(said), Enrolment)[0].public_size for said in said_as("Enrolment")}
    requests = {
        (said["hospital"], said["type"], body.model_dump_json()): said
        for said in EXCHANGE
        for body in [decode(records(said), KINDS[said["type"]])[0]]
    }
    announcement = _announced(purpose)
    code = encoding(plan, purpose, parameters=31, hospitals=len(IDENTITIES))
    party = protocol.Coordinator(announcement, roster=Roster.of(IDENTITIES), length=code.length)
    anchors = {
        (said["hospital"]): body.anchor
        for said in said_as("AdvertiseRequest")
        for body in [decode(records(said), AdvertiseRequest)[0]]
        if body.announcement == announcement
    }

    def ask(asked: Mapping[str, tuple[Body, Any]]) -> Iterator[Answer]:
        for name, (body, vector) in asked.items():
            said = requests[name, type(body).__name__, body.model_dump_json()]  # exactly this was recorded
            if vector is not None:
                np.testing.assert_array_equal(vector, decode(records(said), KINDS[said["type"]])[1])
            answered = EXCHANGE[EXCHANGE.index(said) + 1]
            assert (answered["way"], answered["hospital"]) == ("reply", name)
            yield Answer(name, *decode(records(answered), KINDS[answered["type"]]))

    def check(name: str, upload: Upload) -> None:
        mechanism = training_mechanism(plan, sizes[name]) if purpose == "train" else release_mechanism(plan)
        check_receipt(upload, IDENTITIES[name], mechanism)

    def leave_out(name: str, stage: str, _answer: Answer, error: FederationError) -> None:
        raise AssertionError(f"{name} left out at {stage}: {error}")

    attempt = Attempt(
        party, ask=ask, check=check, leave_out=leave_out, anchor=anchors.__getitem__, about_to=lambda _: None
    )
    kind = "TrainRequest" if purpose == "train" else "EvaluateRequest"
    parameters = decode(records(said_as(kind)[0]), KINDS[kind])[1]
    assert parameters is not None
    cells = attempt.run(parameters.astype(np.float32))

    assert set(attempt.uploads) == set(IDENTITIES)
    verify_transcript(party.transcript(), roster=Roster.of(IDENTITIES))
    if purpose == "evaluate":
        (event,) = [e for e in map(json.loads, COORDINATOR["events.jsonl"].splitlines()) if e["event"] == "round"]
        assert plan.evaluation is not None
        counts = split(task, plan.evaluation, code.decode(cells, 3))[EVERYBODY]
        # 0.1.0 cut noised counts off at zero; of counts that are not below zero, both compute the same.
        assert compute_metrics(task, counts.clip(min=0), bins=plan.evaluation.bins) == event["metrics_released"]


def said_as(kind: str) -> list[dict[str, Any]]:
    """All recorded messages of one kind of the main study, in order."""
    return [said for said in EXCHANGE if said["type"] == kind]


def _announced(purpose: Purpose) -> Announcement:
    bodies_of = [decode(records(said), AdvertiseRequest)[0].announcement for said in said_as("AdvertiseRequest")]
    return next(announcement for announcement in bodies_of if announcement.purpose == purpose)


# Its files


def test_its_ledger_holds_with_an_entry_of_every_kind() -> None:
    """Chain, signatures and the budget's rules, by today's auditor; each entry's bytes are what they were."""
    entries = [parse_entry(e["body"].encode(), bytes.fromhex(e["signature"])) for e in HOSPITAL["ledger"]]

    verified, keys = check_entries(entries, None, [IDENTITIES[ASKED]], Rules().follow)

    assert (verified.charges, verified.rotations, keys[0]) == (2, 1, IDENTITIES[ASKED])
    assert [entry.canonical.decode() for entry in entries] == [e["body"] for e in HOSPITAL["ledger"]]


def test_its_evidence_holds_and_agrees_with_its_coordinators(tmp_path: Path) -> None:
    """Bundle and study folder, verified and cross-checked by today's auditor."""
    (tmp_path / "evidence").write_bytes(base64.b64decode(HOSPITAL["evidence"]))
    for name in ("receipts.jsonl", "sums.jsonl"):
        (tmp_path / name).write_text(COORDINATOR[name], encoding="utf-8")

    found = audit([tmp_path / "evidence", tmp_path], keys=[IDENTITIES[ASKED]], partial=True)

    assert [(record.hospital, record.receipts) for record in found.hospitals] == [(ASKED, 2)]
    assert len(found.attempts) == 2
    assert found.passed, found.findings
    assert "older-bundle" in {finding.code for finding in found.findings}


def test_its_other_files_are_read(tmp_path: Path) -> None:
    """Roster, plan, proposal, refusal, approval, last receipts: digests and signatures are what they were."""
    roster = verify_roster(HOSPITAL["roster.json"].encode(), bytes.fromhex(BEFORE["root"]))
    approval = Approval.model_validate_json(HOSPITAL["approval.json"])
    (tmp_path / "last-receipts.json").write_text(COORDINATOR["last-receipts.json"], encoding="utf-8")

    assert {member.name: bytes.fromhex(member.identity) for member in roster.members} == IDENTITIES
    assert parse_plan(BEFORE["plan"]).digest() == BEFORE["plan_digest"]
    assert Proposed.model_validate_json(HOSPITAL["plan.json"]).plan_digest == BEFORE["plan_digest"]
    assert Refused.model_validate_json(HOSPITAL["refused.json"]).study == "unwanted"
    study = BEFORE["plan"]["study"]
    verify_approval(approval, IDENTITIES[ASKED], study=study, plan_digest=BEFORE["plan_digest"])
    assert approval.software_digest is None
    last = LastReceipts(tmp_path / "last-receipts.json").anchors()(ASKED).last
    assert last is not None
    last.check(IDENTITIES[ASKED])


# What a later release adds


def evolving(kind: type[BaseModel] = Evolving) -> set[type[BaseModel]]:
    """Every model that crosses the wire, is signed or is hashed."""
    return {kind}.union(*(evolving(below) for below in kind.__subclasses__()))


def test_a_field_that_is_added_is_not_said_while_it_holds_its_default() -> None:
    """In a body, deep inside one, and in what is signed: 0.1.0 reads it, and the bytes are what they were."""

    class LaterAnchor(Anchor):
        seen: int = 0

    class LaterProposal(Proposal):
        anchor: Annotated[LaterAnchor, ALWAYS_WRITTEN] = LaterAnchor()
        priority: int = 3
        labels: tuple[str, ...] = ()

    plan = {"a": 1}
    by_default = LaterProposal(plan=plan, priority=3, anchor=LaterAnchor(seen=0))

    assert by_default.model_dump_json() == Proposal(plan=plan).model_dump_json()
    assert by_default.model_dump() == Proposal(plan=plan).model_dump()
    could_read("Proposal", by_default.model_dump_json())
    used = LaterProposal(plan=plan, priority=4, anchor=LaterAnchor(seen=1))
    assert LaterProposal.model_validate_json(used.model_dump_json()) == used
    for field in ("priority", "seen"):
        assert f'"{field}"' in used.model_dump_json()
    with pytest.raises(jsonschema.ValidationError, match="priority"):
        could_read("Proposal", used.model_dump_json())


def test_a_plan_that_gets_a_key_keeps_its_digest_until_somebody_uses_it() -> None:
    """So that a hospital one release behind approves, by its digest, what it can read."""

    class LaterTraining(TrainingPlan):
        momentum: float = 0.0

    class LaterPlan(StudyPlan):
        training: LaterTraining
        cohort: int | None = None

    later = LaterPlan.model_validate_json(json.dumps(BEFORE["plan"]))

    assert later.digest() == BEFORE["plan_digest"]
    assert json.loads(later.canonical()) == BEFORE["plan"]
    assert later.model_copy(update={"cohort": 5}).digest() != BEFORE["plan_digest"]


def test_nothing_that_evolves_holds_something_that_does_not() -> None:
    """The rule reaches every depth: a model inside a message, a plan or a signed file follows it too."""

    def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for inside in get_args(annotation):
            yield from models_in(inside)

    for kind in evolving():
        for name, field in kind.model_fields.items():
            assert all(issubclass(inside, Evolving) for inside in models_in(field.annotation)), (kind, name)


def test_only_what_the_first_release_wrote_is_always_written() -> None:
    """The mark is for old fields; on a new one it would make every message unreadable to the release before."""
    marked = {
        f"{kind.__name__}.{name}"
        for kind in {*KINDS.values(), *evolving()}
        if kind.__module__.startswith("shared_models")
        for name, field in kind.model_fields.items()
        if ALWAYS_WRITTEN in field.metadata
    }

    assert marked == ALWAYS_WRITTEN_IN_0_1_0


# Another major


def _of_version(said: dict[str, Any], version: object) -> RecordDict:
    body = {**json.loads(said["json"]), "version": version}
    return records({**said, "json": json.dumps(body)})


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("said", {said["type"]: said for said in EXCHANGE}.values(), ids=lambda said: said["type"])
def test_a_message_of_another_version_is_refused_by_name(said: dict[str, Any], version: int) -> None:
    """Older or newer: which version it is, which one is read, by which release, and what to do."""
    with pytest.raises(UnsupportedMessageError) as caught:
        decode(_of_version(said, version), KINDS[said["type"]])

    text = f"{said['type']} is of version {version}; Konsil {versions.RELEASE} reads version 1"
    assert (str(caught.value), caught.value.code) == (text, "unsupported-version")
    assert "update the older one" in caught.value.hint


@pytest.mark.parametrize("version", ["1; rm", {"a": 1}, None, -1, 10**30, 1.5], ids=str)
def test_what_is_no_version_is_malformed_and_not_repeated(version: object) -> None:
    """A peer's words reach a log only where they are harmless."""
    said = said_as("Refusal")[0]

    with pytest.raises(ProtocolError, match="malformed") as caught:
        decode(_of_version(said, version), KINDS["Refusal"])

    assert not isinstance(caught.value, UnsupportedVersionError)


def test_both_sides_refuse_by_the_same_code(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """A coordinator of another major hears the code; a hospital of another major stands in the journal with it."""
    proposal = said_as("Proposal")[0]
    message = Message(
        _of_version(proposal, 2), dst_node_id=100, message_type=proposal["action"], group_id="1", ttl=60.0
    )

    answer = federation.wire.deliver("hospital-1", message)

    assert answer is not None
    body, _ = read_reply(answer)
    assert isinstance(body, messages.Refusal)
    assert body.code == "unsupported-version"
    assert "Proposal is of version 2; Konsil" in caplog.text

    def newer(hospital: str, reply: Message) -> Message:
        config = reply.content.config_records["konsil"]
        if hospital == "hospital-2" and config["type"] == "Enrolment":
            config["json"] = str(config["json"]).replace('"version":1', '"version":2')
        return reply

    federation.wire.tamper = newer
    federation.run()
    refused = [(event["hospital"], event["code"]) for event in federation.events("refused")]
    assert refused == [("hospital-2", "unsupported-version")]
    assert [event["missing"] for event in federation.events("round")] == [["hospital-2"]] * 3


def test_files_of_another_format_are_refused_by_name(tmp_path: Path, federation: Federation) -> None:
    """Plan, roster, request, kit, approval, last receipts, bundle, model: each says its format and ours."""
    root = bytes.fromhex(BEFORE["root"])
    with pytest.raises(UnsupportedFileError, match=r"plan is of format 2; Konsil .* reads format 1"):
        parse_plan({**BEFORE["plan"], "format": 2})
    roster = {**json.loads(HOSPITAL["roster.json"]), "format": 2}
    with pytest.raises(UnsupportedRosterError, match="this roster is of format 2"):
        verify_roster(json.dumps(roster).encode(), root)
    for read, what in ((read_request, "request"), (read_kit, "kit")):
        with pytest.raises(UnsupportedRosterError, match=f"this {what} is of format 3"):
            read(json.dumps({"format": 3}).encode())
    (tmp_path / "last.json").write_text(
        COORDINATOR["last-receipts.json"].replace('"version":1', '"version":2'), "utf-8"
    )
    with pytest.raises(UnsupportedFileError, match="is of version 2"):
        LastReceipts(tmp_path / "last.json")
    consents = Consents(federation.settings("hospital-1").state)
    approval = Approval.model_validate_json(HOSPITAL["approval.json"])
    consents.approve(approval)
    (file,) = (federation.settings("hospital-1").state / "studies").iterdir()
    file.write_text(HOSPITAL["approval.json"].replace("konsil-approval/1", "konsil-approval/2"), encoding="utf-8")
    with pytest.raises(UnsupportedApprovalError, match=r"is of format konsil-approval/2; Konsil .* reads") as caught:
        consents.approved(approval.study)
    assert caught.value.code == "pending"
    model = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, model, {"format": "konsil-model/2"})
    with pytest.raises(UnsupportedFileError, match=r"is of format konsil-model/2; Konsil .* reads konsil-model/1"):
        read_model(model)


def test_evidence_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    """The manifest's format; and a line of the coordinator's of another version."""
    (tmp_path / "old").write_bytes(base64.b64decode(HOSPITAL["evidence"]))
    with zipfile.ZipFile(tmp_path / "old") as old, zipfile.ZipFile(tmp_path / "new", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"konsil-evidence/1", b"konsil-evidence/3"))
    with pytest.raises(UnsupportedEvidenceError, match="is of format konsil-evidence/3"):
        open_bundle(tmp_path / "new")
    (tmp_path / "sums.jsonl").write_text("", encoding="utf-8")
    receipts = COORDINATOR["receipts.jsonl"].replace('"version":1', '"version":2')
    (tmp_path / "receipts.jsonl").write_text(receipts, encoding="utf-8")
    with pytest.raises(UnsupportedEvidenceError, match="is of version 2"):
        read_study(tmp_path, Transcripts({}))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kind": "merged"}, "knows no entries of kind merged"), ({"format": 2}, "is of format 2; Konsil")],
    ids=["kind", "format"],
)
def test_a_ledger_that_a_later_release_wrote_stops_the_hospital_by_name(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    """Going back to an older release does not go on where the newer one was; the error says what to install."""
    key, path = Ed25519PrivateKey.generate(), tmp_path / "ledger.sqlite"
    ledger = Ledger.create(path, key, hospital="north")
    Budget.open(ledger, population="all", public_size=200, epsilon=1.0, delta=1e-4, order=12)
    entry = ledger.append("conformance")
    ledger.close()
    later = canonical_json({**json.loads(entry.canonical), **change})
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER no_update")
    signature = sign(key, "ledger-entry", later)
    database.execute("UPDATE entries SET body = ?, signature = ? WHERE seq = 2", (later, signature))
    database.commit()
    database.close()

    with pytest.raises(UnsupportedLedgerError, match=f"ledger entry 2.*{said}") as caught:
        Ledger.open(path, key)

    assert "Install that release again" in caught.value.hint


def test_the_release_is_the_projects() -> None:
    """What errors name is what is installed."""
    project = read_toml(FOLDER.parents[1] / "pyproject.toml", "project")

    assert project["project"]["version"] == versions.RELEASE
