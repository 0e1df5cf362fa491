"""An auditor reads from elsewhere: real processes, real TLS, and a proxy that sees what a hospital leaves for it."""

import hashlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from auditor.checkpoints import check_checkpoints, read_checkpoints
from auditor.record import HospitalRecord, Key, Line
from client.egress import EGRESS
from client.evidence import read_evidence
from server.demo import fit_plan, free_port, lay_out, start_hospital
from server.examples import write_example
from server.processes import Children
from shared_models.config import read_toml
from shared_models.control.access import connect, read_access
from shared_models.control.control_pb2 import Chunk
from shared_models.control.deposits import owner_of_bundle
from shared_models.identity import fingerprint
from shared_models.privacy.checkpoint import SignedCheckpoint, read_checkpoint
from shared_models.privacy.entries import Entry
from tests.federation import changed
from tests.proxy import RecordingProxy, Stream
from tests.rounds.test_a_study_from_elsewhere import PATIENCE_S, STUDY, Centre

SENDS, RESTORED, UNREACHED = (f"hospital-{number}" for number in (1, 2, 3))
POLICY = {"send_checkpoints": True, "send_evidence": True}


@dataclass
class Read:
    """What an auditor has read, and what was seen on the way.

    Attributes:
        folder: Of everybody.
        fetched: What ``fetch`` wrote.
        said: What the commands printed, by name.
        streams: What ``SENDS`` sent to the control service, as it crossed the socket.
        before: Watched after the study.
        restored: What a hospital sends whose ledger was restored from a backup.
        after: Watched after that.
    """

    folder: Path
    fetched: Path
    said: dict[str, str]
    streams: list[Stream]
    before: "subprocess.CompletedProcess[str]"
    restored: "subprocess.CompletedProcess[str]"
    after: "subprocess.CompletedProcess[str]"

    def state(self, hospital: str) -> Path:
        """A hospital's state folder."""
        return self.folder / "hospitals" / hospital / "state"


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def tell(folder: Path, hospital: str, control: str) -> None:
    """Change a hospital's settings."""
    path = folder / "hospitals" / hospital / "hospital.toml"
    fields = read_toml(path, "settings")
    fields["control"] = control
    fields["policy"] |= POLICY
    path.write_text(tomli_w.dumps(fields), encoding="utf-8")


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A study of two rounds; one hospital sends through the proxy, one directly, one into the void."""
    folder = tmp_path_factory.mktemp("read")
    example = write_example("breast-cancer", folder / "data", hospitals=3, seed=0)
    plan = changed(fit_plan(example, 2), deadline_s=60.0)
    authority = lay_out(folder, example, plan, free_port())
    authority.save_key(folder / "authority" / "ca.key")
    home = folder / "hospitals" / SENDS
    ca = home / read_toml(home / "hospital.toml", "settings")["tls"]["ca"]
    with Children(folder / "logs") as children:
        centre = Centre(folder, children)
        for role in ("operator", "auditor"):
            centre.issue(role)
        with RecordingProxy(centre.port, folder / "coordinator", home / "keys", ca, http2=True) as proxy:
            direct = f"127.0.0.1:{centre.port}"
            for name, control in ((SENDS, proxy.address), (RESTORED, direct), (UNREACHED, "127.0.0.1:1")):
                tell(folder, name, control)
            centre.start()
            daemons = {hospital.name: start_hospital(children, folder, hospital.name) for hospital in example.hospitals}
            state, backup = folder / "hospitals" / RESTORED / "state", folder / "backup"
            with connect(read_access(folder / "auditor" / "auditor.toml")) as service:
                until(lambda: {file.hospital for file in service.deposits()} == {SENDS, RESTORED})
                backup.mkdir()
                for file in state.glob("ledger.sqlite*"):
                    shutil.copy(file, backup)
                centre.call("operator", "submit", str(folder / "plan.toml"))
                watched = centre.call("operator", "watch", STUDY)
                until(lambda: Counter(file.hospital for file in service.deposits()) == {SENDS: 2, RESTORED: 2})
            for name in (SENDS, RESTORED):
                daemons[name].send_signal(signal.SIGTERM)
                daemons[name].wait(timeout=30)
            streams = proxy.streams()

        who = ("--connection", str(folder / "auditor" / "auditor.toml"))
        fetched = children.run("fetch", "konsil-audit", "fetch", *who, "-o", str(folder / "fetched"))
        watching = ("watch", *who, "--root", str(folder / "coordinator" / "root.pub"), "--once")
        known = ("--known", str(folder / "known.jsonl"))
        before = command("auditor.cli", *watching, *known)
        for file in state.glob("ledger.sqlite*"):
            file.unlink()
        for file in backup.iterdir():
            shutil.copy(file, state)
        settings = str(folder / "hospitals" / RESTORED / "hospital.toml")
        restored = command("client.cli", "ledger", "send", settings)
        after = command("auditor.cli", *watching, *known)
    said = {"watch": watched, "fetch": fetched}
    return Read(folder, folder / "fetched", said, streams, before, restored, after)


def command(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_auditor_gets_what_hospitals_permit(read: Read) -> None:
    """Study, log, roster; of the hospitals that send, bundles and checkpoints."""
    found = {str(path.relative_to(read.fetched)) for path in read.fetched.rglob("*") if path.is_file()}

    bundles = {path for path in found if path.endswith(".zip")}
    assert {Path(path).parts[1] for path in bundles} == {SENDS, RESTORED}
    assert found - bundles == {
        *("audit-log.jsonl", "roster.json"),
        *(f"studies/{STUDY}/{name}.jsonl" for name in ("receipts", "sums")),
        *(f"hospitals/{name}/checkpoints.jsonl" for name in (SENDS, RESTORED)),
    }
    assert "1 studies, bundles of 2 hospitals" in read.said["fetch"]


def test_what_was_fetched_is_what_the_hospital_has(read: Read) -> None:
    """The bundle holds the ledger to the end of the study, and every checkpoint is of an entry of it."""
    for name in (SENDS, RESTORED):
        home = read.fetched / "hospitals" / name
        (path,) = home.glob("bundle-*.zip")
        entries = ledger(path)
        checkpoints = list(read_checkpoints(home / "checkpoints.jsonl"))

        assert entries[-1].kind == "study-closed"
        assert [checkpoint.seq for checkpoint in checkpoints] == [1, len(entries)]
        assert check_checkpoints(record(path), checkpoints) == []
        forged = [forge(checkpoints[0]), *checkpoints[1:]]
        assert [finding.code for finding in check_checkpoints(record(path), forged)] == ["checkpoint-fork"]


def ledger(path: Path) -> list[Entry]:
    """The ledger in a bundle."""
    with zipfile.ZipFile(path) as archive:
        return [Entry.model_validate_json(line) for line in archive.read("ledger.jsonl").splitlines()]


def record(path: Path) -> HospitalRecord:
    """A bundle as an audit has read it, as far as it matters here."""
    entries, manifest = ledger(path), owner_of_bundle(path)
    first = entries[0]
    assert first.budget is not None
    return HospitalRecord(
        source=path,
        hospital=first.hospital,
        population=first.population or "",
        terms=first.budget,
        packed=manifest.time,
        lines=tuple(Line(entry.seq, entry.time, entry.kind, entry.hash) for entry in entries),
        keys=(Key(fingerprint(bytes.fromhex(manifest.public_key)), 1),),
    )


def forge(checkpoint: SignedCheckpoint) -> SignedCheckpoint:
    return checkpoint.model_copy(update={"entry_hash": "f" * 64})


def test_what_was_sent_is_what_was_listed(read: Read) -> None:
    """On the socket: each call's messages, to the byte, with the digest in the log; and next to nothing around them."""
    listed = [line for line in read_evidence(read.state(SENDS) / EGRESS) if line["what"] == "deposit"]

    assert [line["message"] for line in listed] == ["checkpoint", "checkpoint", "bundle"]
    assert len(read.streams) == len(listed)
    for line, stream in zip(listed, read.streams, strict=True):
        chunks = list(messages(stream.data))
        content = b"".join(chunk.data for chunk in chunks)
        assert len(stream.data) == line["calls"]["Deposit"]["body"]
        assert hashlib.sha256(content).hexdigest() == line["sha256"] == chunks[-1].footer.sha256
        assert len(content) == line["bytes"] == sum(field["bytes"] for field in line["fields"].values())
        assert chunks[0].header.name == line["message"]
        assert stream.headers < 400
    assert read_checkpoint(b"".join(chunk.data for chunk in messages(read.streams[0].data))).seq == 1


def messages(data: bytes) -> Iterator[Chunk]:
    """GRPC over HTTP/2: a flag, a length of four bytes, a message."""
    while data:
        assert data[0] == 0, "compressed"
        length = int.from_bytes(data[1:5])
        yield Chunk.FromString(data[5 : 5 + length])
        data = data[5 + length :]


def test_no_study_waits_for_it(read: Read) -> None:
    """All took part in both rounds; the one that cannot reach the service says so once."""
    assert "finished" in read.said["watch"]
    log = (read.state(UNREACHED) / "hospital.log").read_text(encoding="utf-8")

    answered = [line for line in read.said["watch"].splitlines() if re.search(r"round \d/2", line)]
    assert ["3 of 3 hospitals" in line for line in answered] == [True] * 2
    assert log.count("what is left for auditors was not sent") == 1
    assert "does not answer" in log


def test_a_restored_backup_is_noticed_by_everybody(read: Read) -> None:
    """By the hospital itself when it sends, and by an auditor who watches; before, there was nothing to notice."""
    assert (read.before.returncode, read.before.stderr) == (0, "")
    told = [f"{name}, population all-patients: entry" in read.before.stdout for name in (SENDS, RESTORED, UNREACHED)]
    assert told == [True, True, False]

    assert read.restored.returncode == 1
    assert re.match(
        rf"error: {RESTORED} signed on .* ledger has \d+ entries, and on .* that it has 1\n", read.restored.stderr
    )
    assert read.after.returncode == 1
    assert f"FINDING critical checkpoint-rollback: {RESTORED}, ledger entry 1: " in read.after.stdout
