"""The control service over real TLS: who may do what, what is written down, and what does not bring it down."""

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import tomli_w
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

import shared_models.control.connection
from server import cli
from server.audit import AuditLog
from server.control import HEALTH, REFLECTION, SERVICE, THREADS, ControlService
from server.control_client import ControlClient
from server.control_events import for_hospital, from_message, to_message
from server.control_server import ControlServer
from server.demo import plan_text
from server.deposits import FOLDER, Deposits
from server.evidence import RECEIPTS, SUMS
from server.journal import read_events
from server.pki import Authority
from server.roles import ALLOWED, Doorman, withdraw
from server.store import Wish
from server.transfer import CHUNK_BYTES
from shared_models.audit_log import read_export, verify_export
from shared_models.config import read_toml
from shared_models.control import control_pb2 as pb
from shared_models.control.access import read_access
from shared_models.control.control_pb2_grpc import ControlStub
from shared_models.control.deposits import CHECKPOINTS
from shared_models.errors import (
    AuditError,
    ConfigError,
    ConnectionLostError,
    FederationError,
    NotAllowedError,
    StudyStateError,
    TransferError,
    UnknownStudyError,
)
from shared_models.privacy.checkpoint import SignedCheckpoint
from tests.centre import MODEL, ROLES, Centre, plan, round_facts
from tests.link import Keys, checkpoint_chunks, made_checkpoint
from tests.network import Relay, running_loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Keys, certificates and settings of a coordinator and three hospitals."""
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def centre(keys: Keys) -> Iterator[Centre]:
    """A service for tests that leave it as it is."""
    with Centre(keys).serving() as centre:
        centre.finished("done")
        centre.studies.submit(plan("long").model_dump(mode="json"), by="the test")
        NORTHS[:] = [made_checkpoint(keys, "north", 1)]
        with centre.client("hospital") as client:
            client.deposit(checkpoint_chunks(NORTHS), timeout_s=10)
        yield centre


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Centre]:
    """Makes a service of a test's own, with limits of its own."""
    return lambda **limits: Centre(Keys(tmp_path), limits)


def test_a_fetch_that_comes_to_nothing_ends(centre: Centre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line that passes next to nothing the call is over when its time is, and says so."""
    monkeypatch.setattr(shared_models.control.connection, "FETCH_TIMEOUT_S", 1.5)
    port = centre.settings.control.port
    with running_loop() as loop, contextlib.closing(Relay("127.0.0.1", port, loop)) as relay:
        access = centre.operator("auditor").model_copy(update={"connect": relay.address})
        with ControlClient(access) as client:
            client.all()
            relay.delay_s = 3.0

            with pytest.raises(ConnectionLostError, match=r"does not answer: .*Deadline Exceeded"):
                client.fetch_evidence("done", tmp_path / "evidence")


# who may do what

NORTHS: list[SignedCheckpoint] = []  # the one checkpoint that north has left
_HEALTH = health_pb2.HealthCheckRequest(service=SERVICE)

CALLS: dict[str, Callable[[ControlClient, Path], Any]] = {
    "Control/Submit": lambda client, _: client.submit(plan_text(plan("done"))),
    "Control/List": lambda client, _: client.all(),
    "Control/Show": lambda client, _: client.show("done"),
    "Control/Watch": lambda client, _: list(client.watch("done")),
    "Control/Pause": lambda client, _: client.pause("done"),
    "Control/Resume": lambda client, _: client.resume("done"),
    "Control/Stop": lambda client, _: client.stop("done"),
    "Control/Model": lambda client, folder: client.fetch_model("done", folder / "model"),
    "Control/Evidence": lambda client, folder: client.fetch_evidence("done", folder / "evidence"),
    "Control/Audit": lambda client, folder: client.fetch_audit(folder / "audit"),
    "Control/Roster": lambda client, folder: client.fetch_roster(folder / "roster"),
    "Control/Deposit": lambda client, _: client.deposit(checkpoint_chunks(NORTHS), timeout_s=10),
    "Control/Deposits": lambda client, _: client.deposits(),
    "Control/FetchDeposit": lambda client, folder: client.fetch_deposit("north", CHECKPOINTS, folder / "deposit"),
    "Control/Checkpoints": lambda client, _: next(client.checkpoints()),
    "Health/Check": lambda client, _: health_pb2_grpc.HealthStub(client._channel).Check(_HEALTH, timeout=10),
    "Health/Watch": lambda client, _: next(
        iter(health_pb2_grpc.HealthStub(client._channel).Watch(_HEALTH, timeout=10))
    ),
    "ServerReflection/ServerReflectionInfo": lambda client, _: services(client._channel),
}

# As docs/coordinator.md has it, written out again.
EVIDENCE = {f"Control/{call}" for call in ("Roster", "Deposits", "FetchDeposit", "Checkpoints")}
MAY = {
    "operator": set(CALLS) - {"Control/Audit", "Control/Deposit"} - EVIDENCE,
    "auditor": set(CALLS) - {f"Control/{call}" for call in ("Submit", "Pause", "Resume", "Stop", "Model", "Deposit")},
    "viewer": {call for call in CALLS if "Control" not in call} | {f"Control/{c}" for c in ("List", "Show", "Watch")},
    "hospital": {call for call in CALLS if "Control" not in call}
    | {f"Control/{c}" for c in ("List", "Show", "Watch", "Deposit")},
}


def health(client: ControlClient) -> Any:
    """Health checks over a client's connection."""
    return health_pb2_grpc.HealthStub(client._channel)


def services(channel: grpc.Channel) -> list[str]:
    """What reflection says is served."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    return [service.name for service in answer.list_services_response.service]


def test_every_method_is_in_the_table() -> None:
    """A method that somebody adds is refused to everybody until it is in the table, and is tested here."""
    methods = {f"Control/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Control"].methods}

    assert {call for call in ALLOWED if call.startswith("Control/")} == methods
    assert set(ALLOWED) == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("role", ROLES)
def test_every_role_makes_the_calls_that_it_may(centre: Centre, role: str, call: str, tmp_path: Path) -> None:
    """Each role by each call; what is allowed and what is refused is in the audit log, with who and why."""
    with centre.client(role) as client:
        problem: Exception | None = None
        try:
            CALLS[call](client, tmp_path)
        except (FederationError, grpc.RpcError) as error:
            problem = error

    refused = isinstance(problem, NotAllowedError)
    assert refused == (call not in MAY[role])
    if call in {"Control/Pause", "Control/Resume", "Control/Stop"} and not refused:
        assert isinstance(problem, StudyStateError)  # the study is over
    elif not refused:
        assert problem is None
    entry = [entry for entry in centre.log() if entry.kind == "call"][-1]
    name = "north" if role == "hospital" else f"{role}-anna"
    assert (entry.call, entry.role, entry.caller) == (call, role, name)
    assert (entry.outcome, entry.code) == (("refused", "not-allowed") if refused else ("allowed", None))
    named = call.startswith("Control/") and call not in {"Control/Submit", "Control/List", "Control/Audit"}
    assert entry.study == ("done" if named and call not in EVIDENCE | {"Control/Deposit"} else None)
    assert entry.hospital == ("north" if call == "Control/FetchDeposit" else None)


def test_what_has_an_effect_is_in_the_log_with_its_end(own: Callable[..., Centre], tmp_path: Path) -> None:
    """First that it may be, then the effect, then how it ended; the log verifies."""
    with own().serving() as centre, centre.client("operator") as client:
        client.submit(plan_text(plan("long")))
        client.pause("long")
        with pytest.raises(TransferError):
            client.fetch_model("long", tmp_path / "nowhere" / "model")
        with pytest.raises(StudyStateError):
            client.fetch_model("long", tmp_path / "model")

        log = centre.log()

    calls = {entry.seq: entry.call for entry in log if entry.kind == "call"}
    ends = [(calls[entry.of or 0], entry.outcome, entry.code) for entry in log if entry.kind == "done"]
    assert ends == [
        ("Control/Submit", "succeeded", None),
        ("Control/Pause", "succeeded", None),
        ("Control/Model", "failed", "study-state"),
    ]


def test_what_cannot_be_written_down_does_not_happen(own: Callable[..., Centre]) -> None:
    """Without its audit log the service does nothing, and says so."""
    with own().serving() as centre, centre.client("operator") as client:
        client.submit(plan_text(plan("long")))
        centre.audit._failed = True  # as after a disk that took half a line and gave it back no more

        with pytest.raises(AuditError):
            client.stop("long")
        with pytest.raises(AuditError):
            client.all()

        assert not centre.studies.show("long").row.state.over
        assert centre.studies.show("long").row.wish is Wish.RUN


def test_a_hospital_counts_as_long_as_the_roster_has_it(own: Callable[..., Centre]) -> None:
    """Revoked in the middle of a watch, it hears no more; nor can it call again."""
    with own().serving() as centre, centre.client("hospital") as client:
        centre.studies.submit(plan("long").model_dump(mode="json"), by="the test")
        heard = client.watch("long")
        next(heard)
        centre.keys.sign_roster(version=2, revoked=["north"])
        centre.rounds.release()

        with pytest.raises(NotAllowedError, match="no hospital of this name is on the roster now"):
            list(heard)
        with pytest.raises(NotAllowedError, match="no hospital of this name"):
            client.all()


def test_a_roster_that_is_refused_changes_nothing(own: Callable[..., Centre]) -> None:
    """As on the hospitals' port: half a file, or somebody else's, turns nobody in or out."""
    with own().serving() as centre, centre.client("hospital") as client:
        client.all()
        content = centre.settings.roster.read_bytes()

        for broken in (content[:100], b"", content.replace(b'"north"', b'"norxh"')):
            centre.settings.roster.write_bytes(broken)
            client.all()
        centre.keys.sign_roster(version=2, revoked=["north"])
        with pytest.raises(NotAllowedError):
            client.all()


def test_a_hospitals_certificate_is_the_rosters(own: Callable[..., Centre]) -> None:
    """The authority's signature and a name are not enough: the key must be the one on the roster."""
    with own().serving() as centre:
        centre.keys.hospital_certificate("north", centre.keys.authority)

        with centre.client("hospital") as client, pytest.raises(NotAllowedError, match="another TLS key"):
            client.all()


def test_a_withdrawn_certificate_is_refused_at_once(own: Callable[..., Centre]) -> None:
    """No restart; the same person's next certificate is another key."""
    with own().serving() as centre, centre.client("viewer") as client:
        client.all()
        withdraw(centre.settings, centre.keys.folder / "viewer" / "tls.pem")

        with pytest.raises(NotAllowedError, match="was withdrawn"):
            client.all()
        centre.keys.authority.issue(centre.keys.folder / "viewer-2", "viewer-anna", role="viewer")
        with centre.client("viewer-2") as again:
            again.all()


@pytest.mark.parametrize("role", ["root", "hospital", "", "operator/auditor"])
def test_a_role_that_there_is_not_is_none(centre: Centre, role: str) -> None:
    """Also ``hospital``: hospitals are on the roster, and no certificate says it of itself."""
    folder = centre.keys.folder / f"odd-{role.replace('/', '-')}"
    centre.keys.authority.issue(folder, "north", role=role)

    with centre.client(folder.name) as client, pytest.raises(NotAllowedError, match="its role is none of"):
        client.all()


def test_a_stranger_with_a_hospitals_kind_of_certificate_is_nobody(centre: Centre) -> None:
    """Signed by the authority, but not on the roster."""
    centre.keys.authority.issue(centre.keys.folder / "stranger", "west")

    with centre.client("stranger") as client, pytest.raises(NotAllowedError, match="no hospital of this name"):
        client.all()


def test_a_hospital_hears_nothing_of_another_hospital(centre: Centre) -> None:
    """Of the same study an operator hears everything, a hospital what concerns it."""
    with centre.client("hospital") as client, centre.client("operator") as operator:
        heard, all_ = list(client.watch("done")), list(operator.watch("done"))
        shown = client.show("done")

    assert {"south", "east"} <= {name for name in ("north", "south", "east") if name in json.dumps(all_)}
    assert not {name for name in ("south", "east") if name in json.dumps(heard)}
    assert [event["hospital"] for event in heard if event["event"] == "enrolled"] == ["north"]
    rounds = [event for event in heard if event["event"] == "round"]
    assert rounds[0]["epsilon_filter"] == {"north": 0.25}
    assert rounds[0]["answered"] == ["north"]
    assert len(rounds) == plan("done").rounds
    assert "reason" not in shown


PLANS_FOR = {"theirs": ("east", "south", "west"), "ours": ("east", "north", "south"), "all": None}


def test_a_hospital_sees_the_studies_that_it_is_part_of(own: Callable[..., Centre]) -> None:
    """A plan may name its hospitals; to the others it is as if there was no such study, and the log says who asked."""
    with own().serving() as centre, centre.client("hospital") as client, centre.client("viewer") as viewer:
        for study, hospitals in PLANS_FOR.items():
            centre.studies.submit(plan(study, hospitals=hospitals).model_dump(mode="json"), by="the test")
            centre.studies.wait(study)

        assert [study["name"] for study in client.all()] == ["ours", "all"]
        assert [study["name"] for study in viewer.all()] == ["theirs", "ours", "all"]
        client.show("ours")
        for call in (client.show, lambda name: list(client.watch(name))):
            with pytest.raises(UnknownStudyError) as theirs:
                call("theirs")
            with pytest.raises(UnknownStudyError) as nothing:
                call("no-such")
            assert str(theirs.value).replace("theirs", "no-such") == str(nothing.value)
        refused = [(entry.caller, entry.study, entry.code) for entry in centre.log() if entry.outcome == "refused"]

    assert refused == [("north", study, "unknown-study") for study in ("theirs", "no-such")] * 2


# studies


def test_a_study_is_submitted_watched_paused_and_stopped(own: Callable[..., Centre]) -> None:
    """From a client, as from the machine itself; the second submission changes nothing."""
    with own().serving() as centre, centre.client("operator") as client:
        first = client.submit(plan_text(plan("long")))
        again = client.submit(plan("long").canonical().decode())
        assert (first["name"], first["number"], first["submitted_by"]) == ("long", 1, "operator operator-anna")
        assert (again["number"], again["plan_digest"]) == (1, plan("long").digest())
        assert json.loads(client.show("long")["plan"])["study"] == "long"

        centre.rounds.release(2)
        seen: list[dict[str, Any]] = []
        for event in client.watch("long"):
            seen.append(event)
            if event["event"] == "state" and event["state"] == "running" and event["rounds_done"] == 2:
                assert client.pause("long")["wish"] == "pause"
            if event["event"] == "state" and event["state"] == "paused":
                client.resume("long")
                client.stop("long")

    journal, _ = read_events(centre.settings.state / "studies" / "long" / "events.jsonl")
    assert [strip(event) for event in seen if event["event"] != "state"] == journal
    assert seen[-1]["event"] == "state"
    assert (seen[-1]["state"], seen[-1]["reason"]) == ("stopped", "by an operator")


def strip(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the journal has it."""
    own = {"position"} if event["event"] == "started" else {"position", "study"}
    return {key: value for key, value in event.items() if key not in own}


def test_watching_goes_on_where_it_was(centre: Centre) -> None:
    """Every event's position is a place to begin; what is before it is not said again."""
    with centre.client("viewer") as client:
        everything = [event for event in client.watch("done") if event["event"] != "state"]

        for number in (0, 3, len(everything) - 1):
            rest = [e for e in client.watch("done", everything[number]["position"]) if e["event"] != "state"]
            assert rest == everything[number + 1 :]


@pytest.mark.parametrize("after", [1, 7, 10**15, 2**63])
def test_a_position_in_the_middle_of_an_event_is_refused(centre: Centre, after: int) -> None:
    """Half an event is nobody's."""
    with centre.client("viewer") as client, pytest.raises(FederationError, match="there is no event before position"):
        list(client.watch("done", after))


def test_a_watcher_connects_again_by_itself(own: Callable[..., Centre]) -> None:
    """The service is restarted under a watcher: it hears the rest, and nothing twice."""
    centre = own()
    told: list[str] = []
    seen: list[dict[str, Any]] = []
    with centre.client("viewer") as client:
        with centre.serving():
            centre.studies.submit(plan("long", rounds=3).model_dump(mode="json"), by="the test")
            centre.rounds.release()
            heard = client.watch("long", lost=told.append)
            while not [event for event in seen if event["event"] == "round"]:
                seen.append(next(heard))
        centre.rounds.release(2)
        with centre.serving():
            seen += heard

    assert [event["round"] for event in seen if event["event"] == "round"] == [1, 2, 3]
    assert told
    assert seen[-1]["state"] == "finished"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "started", "study": "done", "plan_digest": "ab", "rounds": 3, "parameters": 2**40},
        {"event": "enrolled", "hospital": "north", "public_size": 100, "same_software": False},
        {"event": "left-out", "hospital": "north", "round": 2, "stage": "train", "reason": "it was late"},
        {"event": "round", **round_facts(1, 2)},
        {
            "event": "sum",
            "purpose": "train",
            "round": 1,
            "attempt": 2,
            "opened": False,
            "answered": ["north"],
            "threshold": 3,
            "hospitals": 4,
            "dropped": {"east": 3},
            "at_fault": "east",
            "bytes_up": 2**33,
            "stages": {"keys": 0.25},
        },
        {"event": "aborted", "purpose": "train", "round": 1, "attempt": 1, "reason": "no sum", "answered": []},
        {"event": "attempt-failed", "round": 1, "attempt": 1, "charged": True, "answered": ["north"]},
        {"event": "quorum", "hospitals": ["north"]},
        {"event": "failed", "error": "it", "hint": "mend it"},
        {"event": "finished", "model": "m", "card": "c", "hospitals": {"north": {"epsilon": 0.5}}},
        {"event": "of-a-later-release", "what": [1.5, {"ever": None}]},
        {"event": "round", **round_facts(1, 2), "of_a_later_release": True},
    ],
    ids=lambda event: event["event"],
)
def test_an_event_arrives_as_it_was_told(event: dict[str, Any]) -> None:
    """Typed where it has a type, as it is where not: nothing is lost on the way."""
    told = {"time": "2026-01-01T00:00:00.000+00:00", **event}

    heard = from_message(pb.Event.FromString(to_message("done", 77, told).SerializeToString()))

    assert heard == {"study": "done", "position": 77, **told}


def test_unknown_events_are_not_for_hospitals() -> None:
    """What a later release tells in a field of its own may be about another hospital."""
    told = {"time": "t", "event": "of-a-later-release", "secret": "of east", "round": 3}

    assert for_hospital(told, "north") == {"time": "t", "event": "of-a-later-release", "round": 3}
    assert for_hospital({"time": "t", "event": "refused", "hospital": "east", "code": "policy"}, "north") is None


# files


def test_a_model_arrives_whole(centre: Centre, tmp_path: Path) -> None:
    """In chunks of at most a megabyte, with its digest; nothing else is left."""
    with centre.client("operator") as client:
        client.fetch_model("done", tmp_path / "model")
        chunks = list(client._stub.Model(pb.FetchRequest(study="done")))

    assert (tmp_path / "model").read_bytes() == MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert max(len(chunk.data) for chunk in chunks) <= CHUNK_BYTES < 1_000_000
    assert chunks[0].header.size == len(MODEL)


@pytest.mark.parametrize("there", [1, CHUNK_BYTES, CHUNK_BYTES + 1, len(MODEL) - 1, len(MODEL)])
def test_a_transfer_goes_on_where_it_was(centre: Centre, tmp_path: Path, there: int) -> None:
    """What is there already is not sent again; the digest is over all of it."""
    out = tmp_path / "model"
    with centre.client("operator") as client:
        header = next(iter(client._stub.Model(pb.FetchRequest(study="done")))).header
        (tmp_path / "model.part").write_bytes(MODEL[:there])
        (tmp_path / "model.snapshot").write_text(header.snapshot, encoding="utf-8")
        request = pb.FetchRequest(study="done", offset=there, snapshot=header.snapshot)
        sent = sum(len(chunk.data) for chunk in client._stub.Model(request))

        client.fetch_model("done", out)

    assert sent == len(MODEL) - there
    assert out.read_bytes() == MODEL


def test_a_damaged_part_is_fetched_again(centre: Centre, tmp_path: Path) -> None:
    """What is there already is not what it should be: the digest says so, and it begins again, once."""
    with centre.client("operator") as client:
        header = next(iter(client._stub.Model(pb.FetchRequest(study="done")))).header
        (tmp_path / "model.part").write_bytes(b"x" * 100)
        (tmp_path / "model.snapshot").write_text(header.snapshot, encoding="utf-8")

        client.fetch_model("done", tmp_path / "model")

    assert (tmp_path / "model").read_bytes() == MODEL


def test_evidence_is_the_same_tar_every_time(centre: Centre, tmp_path: Path) -> None:
    """It unpacks to a folder that an auditor's command reads."""
    with centre.client("auditor") as client:
        digests = {client.fetch_evidence("done", tmp_path / f"{number}.tar") for number in range(2)}
    with tarfile.open(tmp_path / "0.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")

    assert len(digests) == 1
    folder = centre.studies.show("done").row.folder
    for name in (RECEIPTS, SUMS):
        assert (tmp_path / "out" / "done" / name).read_bytes() == (folder / name).read_bytes()


def test_an_attempt_at_hand_is_not_in_the_evidence(own: Callable[..., Centre], tmp_path: Path) -> None:
    """Receipts and sums of whole attempts only; and a transfer that goes on sees what it saw when it began."""
    with own().serving() as centre, centre.client("auditor") as client:
        centre.finished("done")
        folder = centre.studies.show("done").row.folder
        before = client.fetch_evidence("done", tmp_path / "before")
        snapshot = next(iter(client._stub.Evidence(pb.FetchRequest(study="done")))).header.snapshot
        sizes = {name: (folder / name).stat().st_size for name in (RECEIPTS, SUMS)}
        (folder / "open-attempt.json").write_text(json.dumps({"sizes": sizes}), encoding="ascii")
        with (folder / RECEIPTS).open("a", encoding="ascii") as file:
            file.write('{"hospital":"south"}\n')

        during = client.fetch_evidence("done", tmp_path / "during")
        (folder / "open-attempt.json").unlink()
        after = client.fetch_evidence("done", tmp_path / "after")
        rest = list(client._stub.Evidence(pb.FetchRequest(study="done", offset=10, snapshot=snapshot)))

    assert before == during != after
    assert rest[-1].footer.sha256 == before


def test_the_audit_log_is_fetched_and_verified_elsewhere(centre: Centre, tmp_path: Path) -> None:
    """By the auditor's own command, which has no code of the coordinator's."""
    with centre.client("auditor") as client:
        client.fetch_audit(tmp_path / "log")
    key = centre.settings.state / "audit.pub"
    command = [sys.executable, "-m", "auditor.cli", "log", str(tmp_path / "log"), "--key", str(key)]

    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    text = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(text.replace(b'"viewer-anna"', b'"viewer-otto"', 1))
    broken = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    assert found.stdout.startswith("holds"), found.stderr
    assert "signed by a given key" in found.stdout
    assert (broken.returncode, "not signed by the log's key" in broken.stderr) == (1, True)


# bad input


def test_every_error_of_a_plan_is_said_at_once(centre: Centre) -> None:
    """With its path, as for a file; from TOML and from JSON."""
    broken = plan("broken").model_dump(mode="json")
    broken |= {"rounds": 0, "minimum_hospitals": 1, "colour": "blue", "task": "No Task"}
    broken["privacy"]["epsilon"] = -1
    broken = {key: value for key, value in broken.items() if value is not None}
    with centre.client("operator") as client:
        for text in (tomli_w.dumps(broken), json.dumps(broken)):
            with pytest.raises(ConfigError) as caught:
                client.submit(text)
            assert [
                word
                for word in ("rounds", "minimum_hospitals", "colour: unknown key", "task", "privacy.epsilon")
                if word not in str(caught.value)
            ] == []
            assert "docs/plan.md" in caught.value.hint


@pytest.mark.parametrize("text", ["", "rounds = ", "{", "[1, 2]", "{}", '"plan"', "[" * 100_000, "x = " + "[" * 5000])
def test_a_plan_that_is_none_is_refused(centre: Centre, text: str) -> None:
    """Not a fault of the program's."""
    with centre.client("operator") as client, pytest.raises(ConfigError):
        client.submit(text)


def test_a_study_that_there_is_not_is_said_so(centre: Centre) -> None:
    """By every call that names one."""
    with centre.client("operator") as client:
        for call in (client.show, client.pause, client.resume, client.stop, lambda name: list(client.watch(name))):
            with pytest.raises(UnknownStudyError, match="there is no study nothing"):
                call("nothing")


def test_an_error_is_one_line_that_moves_no_cursor(centre: Centre) -> None:
    """Whatever the other side puts into it: it goes to terminals, and to a hospital's log."""
    with centre.client("operator") as client, pytest.raises(UnknownStudyError) as caught:
        client.show("no\nsuch\x1b[2J")

    assert "no such\N{REPLACEMENT CHARACTER}[2J" in str(caught.value)


def test_another_plan_of_the_same_name_is_refused(centre: Centre) -> None:
    """Names are never used again."""
    with centre.client("operator") as client, pytest.raises(StudyStateError, match="with another plan"):
        client.submit(plan_text(plan("done", seed=7)))


@pytest.mark.parametrize(
    "method", [*(f"/{SERVICE}/{c}" for c in ("Submit", "Show", "Watch", "Model")), f"/{HEALTH}/Check"]
)
@pytest.mark.parametrize("body", [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x04\xff\xfe\xfd\xfc"], ids=repr)
def test_malformed_protobuf_is_refused_and_written_down(centre: Centre, method: str, body: bytes) -> None:
    """The caller hears that it cannot be read; the log has who sent it."""
    with centre.channel("viewer") as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(method)(body, timeout=10))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    entry = [entry for entry in centre.log() if entry.kind == "call"][-1]
    assert (entry.caller, entry.outcome, entry.code) == ("viewer-anna", "refused", "malformed-call")
    assert alive(centre)


def test_an_oversized_message_is_refused_and_written_down(centre: Centre) -> None:
    """It never reaches the parser."""
    huge = "#" * (centre.settings.control.maximum_message_bytes + 1)

    with centre.client("operator") as client, pytest.raises(FederationError):
        client.submit(huge)

    entry = [entry for entry in centre.log() if entry.kind == "call"][-1]
    assert (entry.call, entry.outcome, entry.code) == ("Control/Submit", "refused", "malformed-call")
    assert alive(centre)


@pytest.mark.parametrize("method", [f"/{SERVICE}/Shutdown", "/a/b", "/a", f"/{REFLECTION.replace('v1alpha', 'v9')}/X"])
def test_a_call_that_there_is_not_is_refused_and_written_down(centre: Centre, method: str) -> None:
    """Like any other."""
    with centre.channel("operator") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(method)(b"", timeout=10)

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert [entry for entry in centre.log() if entry.kind == "call"][-1].code == "unknown-call"


def alive(centre: Centre) -> bool:
    """Whether somebody else is answered."""
    with centre.client("operator") as client:
        return bool(client.all())


# the network


@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_without_a_certificate_there_is_a_tls_failure_and_nothing_else(centre: Centre, most: ssl.TLSVersion) -> None:
    """Not one byte of HTTP/2 comes, whatever is sent."""
    context = ssl.create_default_context(cafile=centre.keys.authority.certificate)
    context.maximum_version = most
    context.set_alpn_protocols(["h2"])
    heard = b""

    # An SSLError is an OSError.
    with contextlib.suppress(OSError), context.wrap_socket(dial(centre), server_hostname="127.0.0.1") as tls:
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        heard = tls.recv(100)

    assert heard == b""
    assert alive(centre)


def test_without_a_certificate_no_call_gets_through(centre: Centre) -> None:
    """Each method, by a client of gRPC that has none: no status of the service's, nothing in its log."""
    before = len(centre.log())
    credentials = grpc.ssl_channel_credentials(centre.keys.authority.certificate.read_bytes())
    packages = {"Control": SERVICE, "Health": HEALTH, "ServerReflection": REFLECTION}
    methods = [f"/{packages[service]}/{method}" for service, method in (call.split("/") for call in CALLS)]

    with grpc.secure_channel(centre.address, credentials) as channel:
        for method in methods:
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream(method)(b"", timeout=10))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "konsil-error-bin" not in dict(caught.value.trailing_metadata() or ())

    assert len(methods) == len(CALLS)
    assert len(centre.log()) == before


def test_a_certificate_of_another_authority_is_none(centre: Centre, tmp_path: Path) -> None:
    """Role and name may be right; a call of any kind ends in the handshake."""
    other = Authority(tmp_path / "other")
    other.issue(centre.keys.folder / "foreign", "operator-anna", role="operator")
    expired = centre.keys.expired("old")
    expired.issue(centre.keys.folder / "expired", "operator-anna", role="operator")

    for role in ("foreign", "expired"):
        with centre.client(role) as client, pytest.raises(ConnectionLostError):
            client.all()
    with ControlClient(centre.operator("operator", other)) as client, pytest.raises(ConnectionLostError):
        client.all()  # the coordinator is not whom this client expects


def test_a_server_s_certificate_calls_nothing(centre: Centre) -> None:
    """The coordinator's own is signed by the same authority."""
    with centre.client("coordinator") as client, pytest.raises(ConnectionLostError):
        client.all()


def test_plain_text_is_answered_with_nothing_but_an_alert(centre: Centre) -> None:
    """HTTP/2 without TLS, HTTP/1, and noise."""
    for said in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 40):
        with dial(centre) as plain, contextlib.suppress(ConnectionError):
            plain.sendall(said)
            heard = plain.recv(100)
            assert heard[:1] in {b"", b"\x15"}  # a TLS alert
    assert alive(centre)


def dial(centre: Centre) -> socket.socket:
    """A bare connection."""
    return socket.create_connection(("127.0.0.1", centre.settings.control.port), timeout=20)


def handshaken(centre: Centre, role: str) -> ssl.SSLSocket:
    """A TLS connection with a certificate, on which nothing has been said."""
    who = centre.operator(role)
    context = ssl.create_default_context(cafile=who.ca)
    context.load_cert_chain(who.certificate, who.key)
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(dial(centre), server_hostname="127.0.0.1")


def test_slow_clients_are_let_go_of_and_hold_nobody_up(own: Callable[..., Centre]) -> None:
    """Connections that dribble their handshake, or never say a word after it, or never send the request of a call."""
    centre = own(handshake_timeout_s=1.0, request_timeout_s=1.0)
    with centre.serving(), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(centre)) for _ in range(50)]
        for one in silent[:25]:
            one.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        mute = [stack.enter_context(handshaken(centre, "viewer")) for _ in range(10)]
        channel = stack.enter_context(centre.channel("viewer"))
        half = [channel.stream_stream(f"/{SERVICE}/Show")(never_ends()) for _ in range(20)]

        assert not alive_at_all(centre)  # there are no studies, and the answer comes

        for one in silent:
            assert drained(one) is not None
        for call in half:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for tls in mute:
            assert drained(tls) is not None
        assert Counter(e.code for e in centre.log() if e.kind == "call" and e.outcome == "refused") == {
            "malformed-call": 20
        }


def never_ends() -> Iterator[bytes]:
    """The requests of a call that never sends one."""
    threading.Event().wait(5)
    yield from ()


def alive_at_all(centre: Centre) -> list[dict[str, Any]]:
    with centre.client("operator") as client:
        return client.all()


def drained(connection: socket.socket) -> bytes | None:
    """What comes until the other side closes the connection; None if it never does."""
    heard = b""
    try:
        while data := connection.recv(4096):
            heard += data
    except TimeoutError:
        return None
    except OSError:
        pass
    return heard


def test_two_hundred_watchers_leave_the_service_up(own: Callable[..., Centre]) -> None:
    """All of one study, from several connections, while others call; each hears everything; no thread is added."""
    before = len(control_threads())
    with own().serving() as centre, contextlib.ExitStack() as stack:
        centre.studies.submit(plan("long", rounds=3).model_dump(mode="json"), by="the test")
        stubs = [ControlStub(stack.enter_context(centre.channel("viewer"))) for _ in range(4)]
        watchers = [stubs[number % 4].Watch(pb.WatchRequest(study="long")) for number in range(200)]
        first = [next(watcher) for watcher in watchers]  # all of them are admitted

        assert len(control_threads()) <= before + 3 + THREADS
        with centre.client("operator") as client:
            assert client.show("long")["state"] in {"pending", "running"}
        centre.rounds.release(3)
        rounds = [[m.round.round for m in watcher if m.kind == "round"] for watcher in watchers]

        assert len(first) == 200
        assert rounds == [[1, 2, 3]] * 200
        assert alive(centre)


def control_threads() -> list[threading.Thread]:
    """Threads of all control services in this process: an event loop, a door, a gate, and a few each."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("control")]


def test_nobody_has_more_calls_than_a_part(own: Callable[..., Centre]) -> None:
    """One certificate that is everywhere leaves room for the others."""
    with own(maximum_calls=20, maximum_calls_per_certificate=10).serving() as centre:
        centre.studies.submit(plan("long").model_dump(mode="json"), by="the test")
        with centre.channel("viewer") as channel:
            stub = ControlStub(channel)
            watchers = [stub.Watch(pb.WatchRequest(study="long")) for _ in range(10)]
            for watcher in watchers:
                next(watcher)

            with pytest.raises(grpc.RpcError) as caught:
                next(stub.Watch(pb.WatchRequest(study="long")))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert alive(centre)
            for watcher in watchers:
                watcher.cancel()
            deadline = time.monotonic() + 10
            while not viewer_is_back(stub):
                assert time.monotonic() < deadline


def viewer_is_back(stub: ControlStub) -> bool:
    try:
        stub.List(pb.ListRequest(), timeout=10)
    except grpc.RpcError:
        return False
    return True


def test_there_are_no_more_connections_than_the_limit(own: Callable[..., Centre]) -> None:
    """Further ones are closed at once; when the others are let go of, there is room again."""
    with own(maximum_connections=10, handshake_timeout_s=1.0).serving() as centre, contextlib.ExitStack() as stack:
        held = [stack.enter_context(dial(centre)) for _ in range(20)]
        assert all(drained(one) is not None for one in held)

        assert not alive_at_all(centre)


def test_a_port_in_use_is_said_so(centre: Centre, tmp_path: Path) -> None:
    """The second service names the address and leaves the first one alone."""
    with AuditLog(tmp_path) as audit, pytest.raises(ConfigError, match=f"cannot listen on {centre.address}"):
        ControlServer(centre.settings, centre.studies, audit).__enter__()

    assert alive(centre)


def test_a_watch_that_was_cancelled_is_in_the_log(own: Callable[..., Centre]) -> None:
    """Who went away, and that it was not the coordinator that ended it."""
    with own().serving() as centre, centre.channel("viewer") as channel:
        centre.studies.submit(plan("long").model_dump(mode="json"), by="the test")
        watcher = ControlStub(channel).Watch(pb.WatchRequest(study="long"))
        next(watcher)
        watcher.cancel()

        deadline = time.monotonic() + 10
        while not [entry for entry in centre.log() if entry.kind == "done"]:
            assert time.monotonic() < deadline
        entry = centre.log()[-1]

    assert (entry.outcome, entry.code) == (None, "cancelled")


# what is generated


def test_the_generated_files_are_those_of_the_protocol(tmp_path: Path) -> None:
    """``make proto`` gives what is checked in; the service is what the file says."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *outputs, "shared_models/control/control.proto"]

    subprocess.run(command, check=True, cwd=ROOT)

    folder = Path("shared_models") / "control"
    made = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    assert made == {path.name: path.read_bytes() for path in (ROOT / folder).glob("control_pb2*")}


def test_reflection_names_what_is_served(centre: Centre) -> None:
    """Tools find their way with a certificate, and not without."""
    with centre.channel("viewer") as channel:
        assert set(services(channel)) == {SERVICE, HEALTH, REFLECTION}


# the commands


def run(centre: Centre, *arguments: str, role: str = "operator") -> str:
    """What a command prints; who calls is in the environment, as a person would have it."""
    who = centre.operator(role)
    environment = {
        "KONSIL_CONNECT": who.connect,
        **{f"KONSIL_{name.upper()}": str(getattr(who, name)) for name in ("ca", "certificate", "key")},
    }
    found = CliRunner().invoke(cli.app, arguments, env=environment)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


def test_people_read_studies_in_lines(centre: Centre) -> None:
    """One line per study and per event; JSON for programs."""
    listed = run(centre, "list").splitlines()
    shown = run(centre, "show", "done")
    watched = run(centre, "watch", "done", role="viewer").splitlines()

    rounds = plan("done").rounds
    assert listed[0] == f"{'done':<24} finished, round {rounds}/{rounds}"
    assert f"submitted by the test, {datetime.now(UTC):%Y-%m-%d}" in shown
    assert plan("done").digest() in shown
    assert len([line for line in watched if f"/{rounds}: " in line]) == rounds
    assert "epsilon up to 0.500" in "\n".join(watched)
    assert json.loads(run(centre, "list", "--json"))[0]["state"] == "finished"
    assert [json.loads(line)["event"] for line in run(centre, "watch", "done", "--json").splitlines()][-1] == "state"


def test_who_calls_and_where_has_to_be_said(centre: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is missing; a file with a mistake in it is explained."""
    found = CliRunner().invoke(cli.app, ["list", "--connect", "here:1"])
    assert isinstance(found.exception, ConfigError)
    assert "--ca, --certificate, --key" in str(found.exception)

    file = centre.keys.folder / "operator.toml"
    file.write_text('connect = "nowhere"\nca = "ca.pem"\nport = 1\n', encoding="utf-8")
    found = CliRunner().invoke(cli.app, ["list", "--operator", str(file)])

    assert isinstance(found.exception, ConfigError)
    assert [
        word for word in ("connect", "port: unknown key", "certificate", "key") if word not in str(found.exception)
    ] == []


def test_the_log_is_shown_and_verified_on_the_machine_itself(centre: Centre, tmp_path: Path) -> None:
    """Without a certificate: whoever may read the state folder may read it."""
    settings = ("--settings", str(centre.folder / "coordinator.toml"))
    with centre.client("viewer") as client, pytest.raises(NotAllowedError):
        client.stop("done")

    last = json.loads(run(centre, "audit", "show", "--json", *settings).splitlines()[-1])

    assert (last["call"], last["caller"], last["outcome"]) == ("Control/Stop", "viewer-anna", "refused")
    assert "outcome=refused" in run(centre, "audit", "show", *settings).splitlines()[-1]
    assert run(centre, "audit", "verify", *settings).startswith("holds: ")
    run(centre, "audit", "export", "--out", str(tmp_path / "log"), *settings)
    assert verify_export(read_export(tmp_path / "log")).refused > 0


def test_certificates_are_issued_and_withdrawn(own: Callable[..., Centre]) -> None:
    """The folder that is handed over is all that its holder needs; keys are theirs alone; nothing is overwritten."""
    centre = own()
    settings = read_toml(centre.folder / "coordinator.toml", "settings")
    centre.keys.authority.save_key(centre.folder / "ca.key")
    settings["tls"]["authority_key"] = "ca.key"
    settings["control"] = {"port": centre.settings.control.port}
    (centre.folder / "coordinator.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    where = ("--settings", str(centre.folder / "coordinator.toml"))
    home = centre.keys.folder / "bert"

    run(centre, "issue", "bert", "--role", "viewer", "--folder", str(home), *where)

    assert (home / "tls.key").stat().st_mode & 0o777 == 0o600
    for name, role, folder in (
        ("bert", "viewer", home),
        ("bert", "root", home / "2"),
        ("No Name", "viewer", home / "3"),
    ):
        with pytest.raises(ConfigError):
            run(centre, "issue", name, "--role", role, "--folder", str(folder), *where)
    with centre.serving(), ControlClient(read_access(home / "viewer.toml")) as client:
        client.all()
        assert "CN=bert" in run(centre, "withdraw", str(home / "tls.pem"), *where)
        with pytest.raises(NotAllowedError, match="was withdrawn"):
            client.all()
    with pytest.raises(ConfigError, match="is no certificate"):
        run(centre, "withdraw", str(home / "tls.key"), *where)


def test_a_call_over_an_old_tls_is_refused(centre: Centre) -> None:
    """Where the handshake could not prevent it: the gate asks for the version too."""
    limits, state = centre.settings.control, centre.settings.state
    deposits = Deposits(state / FOLDER, largest=limits.maximum_deposit_bytes)
    service = ControlService(
        centre.studies,
        Doorman(centre.settings),
        centre.audit,
        limits,
        deposits=deposits,
        roster=centre.settings.roster,
    )
    certificate = centre.operator("operator").certificate.read_bytes()
    auth = {"x509_pem_cert": [certificate], "x509_common_name": [b"operator-anna"]}

    assert service._identify({**auth, "ssl_tls_version": [b"TLSv1.3"]}).role == "operator"
    for version in ([b"TLSv1.2"], []):
        with pytest.raises(NotAllowedError, match="old version of TLS"):
            service._identify({**auth, "ssl_tls_version": version})
    service.shutdown()
