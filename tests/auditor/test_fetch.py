"""Fetching from a coordinator and watching it, as commands over real TLS; and coordinators that do not play fair."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from auditor.fetch import Fetched, fetch
from server.deposits import FOLDER
from server.evidence import RECEIPTS
from shared_models.audit_log import read_export, verify_export
from shared_models.control import control_pb2 as pb
from shared_models.control.access import Access, connect
from shared_models.control.connection import DepositFile
from shared_models.control.deposits import CHECKPOINTS
from shared_models.errors import FederationError, TransferError
from tests.centre import Centre
from tests.link import Keys, checkpoint_chunks, made_checkpoint
from tests.network import Relay, running_loop
from tests.server.test_deposits import bundle, bundle_chunks, leave

NOISE = os.urandom(1_500_000)  # does not shrink in an archive


@pytest.fixture
def centre(tmp_path: Path) -> Iterator[Centre]:
    """A service with a finished study, and what north has left: three checkpoints, and a bundle of 1.5 MB."""
    with Centre(Keys(tmp_path / "keys")).serving() as centre:
        centre.finished("done")
        for seq in (1, 2, 3):
            leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", seq)]))
        leave(centre, bundle_chunks(bundle(centre.keys, "north", content=NOISE)))
        yield centre


def auditor_file(centre: Centre, *, role: str = "auditor", connect_to: str | None = None) -> Path:
    """What the coordinator hands over to an auditor."""
    access = centre.operator(role)
    fields = {name: str(value) for name, value in access.model_dump(exclude_none=True).items()}
    path = centre.keys.folder / f"{role}.toml"
    path.write_text(tomli_w.dumps(fields | ({"connect": connect_to} if connect_to else {})), encoding="utf-8")
    return path


def run(*arguments: object, code: str = "") -> "subprocess.CompletedProcess[str]":
    """The auditor's command as a process."""
    start = f"import sys; sys.argv[0] = 'konsil-audit'\n{code}\nfrom auditor.cli import main\nmain()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# fetch


def test_everything_that_is_evidence_is_fetched(centre: Centre, tmp_path: Path) -> None:
    """Study, log, roster, bundles, checkpoints, as they lie at the coordinator; and what to do next. Twice is once."""
    out, state = tmp_path / "out", centre.settings.state

    first = run("fetch", "--connection", auditor_file(centre), "-o", out)
    before = tree(out)
    again = run("fetch", "--connection", auditor_file(centre), "-o", out, "--study", "done")

    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    study = {
        f"studies/done/{name}": data for name, data in tree(state / "studies" / "done").items() if ".jsonl" in name
    }
    del study["studies/done/events.jsonl"]
    left = {f"hospitals/{name}": data for name, data in tree(state / FOLDER).items()}
    own = {"roster.json": centre.settings.roster.read_bytes()}
    log = before.pop("audit-log.jsonl")
    assert before == study | left | own
    assert {name: data for name, data in tree(out).items() if name != "audit-log.jsonl"} == before
    assert tree(out)["audit-log.jsonl"].startswith(log[: log.rindex(b'{"head"')])
    assert verify_export(read_export(out / "audit-log.jsonl")).key
    (name,) = [Path(name).name for name in left if name.endswith(".zip")]
    north = out / "hospitals" / "north"
    told = f"{north / name[:19]}*.zip {north / CHECKPOINTS} --study {out / 'studies' / 'done'} --root"
    verify = f"konsil-audit verify {told}"
    assert verify in first.stdout
    assert "was there already" in again.stdout


def test_a_transfer_that_was_cut_off_is_gone_on_with(centre: Centre, tmp_path: Path) -> None:
    """The network fails in the middle of a bundle; the same command again fetches the rest of it, not all of it."""
    out, whole = tmp_path / "out", tree(centre.settings.state / FOLDER)
    with running_loop() as loop:
        relay = Relay("127.0.0.1", centre.settings.control.port, loop, {"down": [800_000]})
        who = auditor_file(centre, connect_to=relay.address)

        cut = run("fetch", "--connection", who, "-o", out)
        (part,) = out.rglob("*.zip.fetched.part")
        there, passed = part.stat().st_size, relay.passed["down"]
        again = run("fetch", "--connection", who, "-o", out)
        rest = relay.passed["down"] - passed
        relay.close()

    assert (cut.returncode, cut.stderr.count("error: "), cut.stderr.count("hint: ")) == (1, 1, 1)
    assert again.returncode == 0, again.stderr
    assert there > 300_000
    assert rest < len(NOISE) - there + 200_000
    assert tree(out / "hospitals") == whole


@pytest.mark.parametrize("role", ["operator", "viewer", "hospital"])
def test_only_an_auditor_fetches(centre: Centre, tmp_path: Path, role: str) -> None:
    """Two lines, no traceback, nothing written."""
    found = run("fetch", "--connection", auditor_file(centre, role=role), "-o", tmp_path / "out")

    assert found.returncode == 1
    assert found.stderr.startswith(f"error: {role} ")
    assert "may not call Control/Roster" in found.stderr
    assert [path for path in tree(tmp_path / "out") if not path.endswith((".part", ".snapshot"))] == []


def test_without_grpc_the_command_says_what_to_install(tmp_path: Path) -> None:
    """Auditors who only verify need no gRPC; those who call are told."""
    access = tmp_path / "auditor.toml"
    access.write_text('connect = "h:1"\nca = "a"\ncertificate = "b"\nkey = "c"\n', encoding="utf-8")

    for arguments in (("fetch", "-o", tmp_path / "out"), ("watch", "--key", key_file(tmp_path))):
        found = run(*arguments, "--connection", access, code="sys.modules['grpc'] = None")
        assert found.returncode == 1
        assert found.stderr.splitlines()[0].startswith("error: calling a coordinator needs gRPC")
        assert found.stderr.splitlines()[1] == "hint: pip install 'konsil[remote]'"


def key_file(folder: Path) -> Path:
    path = folder / "key.pub"
    path.write_text("ab" * 32 + "\n", encoding="ascii")
    return path


def test_a_coordinator_that_is_not_there_is_said_so(centre: Centre, tmp_path: Path) -> None:
    """With what to look at."""
    who = auditor_file(centre, connect_to="127.0.0.1:1")
    found = run("fetch", "--connection", who, "-o", tmp_path / "out")

    assert (found.returncode, "does not answer" in found.stderr, "hint: " in found.stderr) == (1, True, True)


# coordinators that do not play fair


def archive(files: dict[str, bytes], *, kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size, about.type, about.linkname = (
                (len(data), kind, "/etc/passwd") if kind == b"0" else (0, kind, "/x")
            )
            tar.addfile(about, io.BytesIO(data))
    return buffer.getvalue()


GOOD = {"done/receipts.jsonl": b"{}\n", "done/sums.jsonl": b"{}\n{}\n"}


@dataclass
class Hostile:
    """A coordinator that hands out what it wants to."""

    studies: list[str] = field(default_factory=lambda: ["done"])
    tar: bytes = archive(GOOD)
    files: list[DepositFile] = field(default_factory=list)
    content: bytes = b""

    def all(self) -> list[dict[str, Any]]:
        """Names that it chose."""
        return [{"name": name} for name in self.studies]

    def fetch_roster(self, out: Path) -> str:
        """Something."""
        return self._write(out, b"{}")

    def fetch_audit(self, out: Path) -> str:
        """A log of one line."""
        return self._write(out, b'{"line":1}\n{"head":{}}\n')

    def fetch_evidence(self, _study: str, out: Path) -> str:
        """Its archive, for any study."""
        return self._write(out, self.tar)

    def deposits(self) -> list[DepositFile]:
        """Files that it chose."""
        return self.files

    def fetch_deposit(self, _hospital: str, _name: str, out: Path) -> str:
        """Its content, for any file."""
        return self._write(out, self.content)

    def _write(self, out: Path, data: bytes) -> str:
        out.write_bytes(data)
        return "ab" * 32


def fetched(coordinator: Hostile, folder: Path) -> Fetched:
    return fetch(coordinator, folder / "out")  # type: ignore[arg-type]


def test_the_stand_in_is_read_when_it_plays_fair(tmp_path: Path) -> None:
    """So that what the tests below refuse is refused for its own fault."""
    done = fetched(Hostile(), tmp_path)

    assert done.findings == []
    assert {name: tree(tmp_path / "out" / "studies")[name] for name in GOOD} == GOOD


@pytest.mark.parametrize("name", ["../done", "/done", "", ".", "..", "a/b", "A", "a" * 65, "a\nb", "a\0b"], ids=repr)
def test_a_name_never_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Of a study, of a hospital, of a deposit; nothing is written anywhere but in the folder."""
    listed = DepositFile("north", CHECKPOINTS, 3, None, 0.0)
    for coordinator in (
        Hostile(studies=[name]),
        Hostile(files=[listed._replace(hospital=name)]),
        Hostile(files=[listed._replace(name=name)]),
        Hostile(files=[listed._replace(name=f"bundle-{name}.zip")]),
    ):
        with pytest.raises(TransferError):
            fetched(coordinator, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "tar",
    [
        b"",
        b"x" * 2048,
        archive({"../receipts.jsonl": b"{}", "done/sums.jsonl": b"{}"}),
        archive({"done/receipts.jsonl": b"{}", "done/../../sums.jsonl": b"{}"}),
        archive({"done/receipts.jsonl": b"{}", "/sums.jsonl": b"{}"}),
        archive({"done/sums.jsonl": b"{}", "done/receipts.jsonl": b"{}"}),
        archive({**GOOD, "done/more": b"{}"}),
        archive(GOOD, kind=tarfile.SYMTYPE),
        archive(GOOD, kind=tarfile.LNKTYPE),
        archive(GOOD, kind=tarfile.DIRTYPE),
        archive(GOOD, kind=tarfile.FIFOTYPE),
        archive({"done/receipts.jsonl": b"{}", "done/" + "s" * 200: b"{}"}, form=tarfile.PAX_FORMAT),
        archive({"done/receipts.jsonl": b"{}", "done/" + "s" * 200: b"{}"}, form=tarfile.GNU_FORMAT),
        archive(GOOD)[:700],
    ],
)
def test_an_archive_writes_its_two_files_and_nothing_else(tmp_path: Path, tar: bytes) -> None:
    """Paths, links, folders, pipes, extensions, another order, one file more, a cut: refused by name."""
    with pytest.raises(TransferError, match="the evidence of done is no archive of a coordinator's"):
        fetched(Hostile(tar=tar), tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path for path in tmp_path.rglob("*") if path.is_symlink() or path.is_fifo()] == []


def test_another_past_is_found_and_both_are_kept(centre: Centre, tmp_path: Path) -> None:
    """Evidence only grows; a coordinator that drops a line of it is found by whoever looked before."""
    out, state = tmp_path / "out", centre.settings.state
    who = auditor_file(centre)
    with (state / "studies" / "done" / RECEIPTS).open("a", encoding="ascii") as file:
        file.write('{"hospital":"south"}\n')
    run("fetch", "--connection", who, "-o", out)
    before = tree(out)
    (state / "studies" / "done" / RECEIPTS).write_text('{"hospital":"south"}\n', encoding="ascii")

    found = run("fetch", "--connection", who, "-o", out)

    after = tree(out)
    assert found.returncode == 1
    assert "FINDING critical evidence-rewritten: coordinator, study done" in found.stdout
    assert after["studies/done/receipts.jsonl.before-1"] == before["studies/done/receipts.jsonl"]
    assert after["studies/done/receipts.jsonl"] == b'{"hospital":"south"}\n'
    assert [name for name in after if "before" in name] == ["studies/done/receipts.jsonl.before-1"]


def test_a_bundle_under_another_hospitals_name_is_found(centre: Centre, tmp_path: Path) -> None:
    """The coordinator put it where it does not belong."""
    folder = centre.settings.state / FOLDER
    (source,) = (folder / "north").glob("bundle-*.zip")
    (folder / "south").mkdir()
    (folder / "south" / source.name).write_bytes(source.read_bytes())

    found = run("fetch", "--connection", auditor_file(centre), "-o", tmp_path / "out")

    assert found.returncode == 1
    assert "FINDING critical deposit-foreign: south: " in found.stdout
    assert "says that it is north's" in found.stdout


def test_a_bundle_with_another_digest_than_its_name_is_refused(tmp_path: Path) -> None:
    """It is fetched by its name, and its name is its content."""
    listed = DepositFile("north", f"bundle-{'0' * 64}.zip", 3, "0" * 64, 0.0)

    with pytest.raises(TransferError, match="has another digest"):
        fetched(Hostile(files=[listed], content=b"abc"), tmp_path)

    assert tree(tmp_path / "out" / "hospitals") == {}


def test_more_than_was_said_is_not_taken(centre: Centre, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator cannot fill the auditor's disk with what its header does not name."""
    honest: Callable[..., Any] = pb.Header
    monkeypatch.setattr(pb, "Header", lambda **fields: honest(**{**fields, "size": 10}))
    with connect(access(centre)) as client, pytest.raises(TransferError, match="larger than was said"):
        client.fetch_roster(tmp_path / "roster.json")

    assert not (tmp_path / "roster.json").exists()


def access(centre: Centre) -> Access:
    return centre.operator("auditor")


# watch


def test_watching_prints_a_line_per_checkpoint_and_ends_at_a_fork(centre: Centre, tmp_path: Path) -> None:
    """Restarted, it says only what is new; a second history, and then a rollback, end it with status 1."""
    root = centre.keys.folder / "coordinator" / "root.pub"
    options = (
        "watch",
        "--connection",
        auditor_file(centre),
        "--root",
        root,
        "--known",
        tmp_path / "known.jsonl",
        "--once",
    )

    first = run(*options)
    second = run(*options)
    for seq, minute, fork in ((3, 5, "b"), (2, 6, "a")):
        with pytest.raises(FederationError):
            leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", seq, minute=minute, fork=fork)]))
    third = run(*options)
    fourth = run(*options, "--go-on")

    assert (first.returncode, first.stdout.count("north, population all-patients: entry")) == (0, 3), first.stderr
    assert (second.returncode, second.stdout) == (0, "")
    assert third.returncode == 1
    assert third.stdout.startswith("FINDING critical checkpoint-fork: north, ledger entry 3: north signed two hashes")
    assert third.stderr.startswith("error: north signed two hashes")
    assert "\nhint: " in third.stderr
    assert fourth.returncode == 1
    assert [line.split()[2] for line in fourth.stdout.splitlines()] == ["checkpoint-fork:", "checkpoint-rollback:"]


def test_watching_hears_a_rollback_while_it_runs(centre: Centre, tmp_path: Path) -> None:
    """It follows, says each checkpoint when it comes, and ends by itself when one contradicts."""
    root = centre.keys.folder / "coordinator" / "root.pub"
    command = [
        sys.executable,
        "-m",
        "auditor.cli",
        "watch",
        "--connection",
        str(auditor_file(centre)),
        "--root",
        str(root),
    ]
    with subprocess.Popen(
        [*command, "--known", str(tmp_path / "known.jsonl")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        first = [watching.stdout.readline() for _ in range(3)]
        leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 9)]))
        then = watching.stdout.readline()
        with pytest.raises(FederationError):
            leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 4, minute=30)]))
        out, errors = watching.communicate(timeout=30)

    assert all("north, population all-patients: entry" in line for line in [*first, then])
    assert "entry 9 " in then
    assert out.startswith("FINDING critical checkpoint-rollback: north, ledger entry 4")
    assert watching.returncode == 1
    assert errors.startswith("error: ")


def test_watching_needs_to_know_whose_key_is_whose(centre: Centre) -> None:
    """Without a root key or a hospital's nothing could be foreign."""
    found = run("watch", "--connection", auditor_file(centre), "--once")

    assert found.returncode == 1
    assert found.stderr == (
        "error: nobody said whose key is whose\nhint: Give --root root.pub, or --key for each hospital.\n"
    )
