"""Whatever a file holds, an audit names it: no traceback, no network, and memory that does not grow with the file."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.bundle import export
from shared_models.identity import load_key, public_bytes
from shared_models.privacy.evidence import MANIFEST, PARTS, open_bundle, pack
from tests.federation import Federation, make_federation, restart_hospitals

HOSPITAL = "hospital-1"
MEMORY_MB = 250  # imports take 140; a file that is read whole would take its own size more
DEEP = b"[" * 100_000 + b"]" * 100_000


@dataclass(frozen=True)
class Said:
    """How an audit ended."""

    status: int
    out: str
    error: str
    peak_mb: float


# The highest resident set since the program began, from inside: what its parent had before does not count.
MEASURED = """
import sys
from pathlib import Path
from auditor.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    sys.stderr.write("peak " + status[status.index("VmHWM:") + 1])
"""


def verify(*arguments: object, before: tuple[str, ...] = ()) -> Said:
    """``konsil-audit verify`` as a process, with the most memory that it had."""
    command = [*before, sys.executable, "-c", MEASURED, "verify", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    error, _, peak = done.stderr.rpartition("peak ")
    return Said(done.returncode, done.stdout, error, int(peak) / 1024)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A study of one round, and a bundle of every hospital."""
    made = make_federation(tmp_path_factory.mktemp("hostile"), hospitals=3, rounds=1)
    made.run()
    restart_hospitals()
    for name in made.names:
        export(made.settings(name), made.folder / f"{name}.evidence")
    yield made
    restart_hospitals()


@pytest.fixture
def bundle(federation: Federation) -> Path:
    return federation.folder / f"{HOSPITAL}.evidence"


def repacked(federation: Federation, path: Path, **parts: bytes) -> Path:
    """A bundle with other parts, signed by its hospital: whatever is in them, the hospital put it there."""
    honest = federation.folder / f"{HOSPITAL}.evidence"
    with zipfile.ZipFile(honest) as archive:
        kept = {name: archive.read(name) for name in PARTS}
    manifest = open_bundle(honest).manifest
    fields = {name: getattr(manifest, name) for name in ("hospital", "time", "software_digest", "egress_digest")}
    names = {name.partition(".")[0]: name for name in PARTS}
    changed = {names[name]: data for name, data in parts.items()}
    pack(path, load_key(federation.settings(HOSPITAL).keys.identity), kept | changed, **fields)
    return path


def named(said: Said, code: str) -> None:
    """It ended with a finding of this code, in two lines on standard error, within bounds."""
    assert said.status == 1, said
    assert f"[{code}]" in said.out, said.out
    assert [line.split(":")[0] for line in said.error.splitlines()] == ["error", "hint"], said.error
    assert "Traceback" not in said.error
    assert said.peak_mb < MEMORY_MB


def _sparse(path: Path, start: bytes) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(10 * 2**30)


@pytest.mark.parametrize(
    ("start", "code"),
    [
        (b"PK\x03\x04", "bundle-broken"),
        (b"SQLite format 3\0", "ledger-broken"),
        (b'{"seq":1,', "log-broken"),
        (b"GIF89a", "no-evidence"),
    ],
    ids=["bundle", "ledger", "log", "something else"],
)
def test_ten_gigabytes_are_not_read_into_memory(tmp_path: Path, start: bytes, code: str) -> None:
    """A file that begins like evidence and goes on for ever."""
    _sparse(tmp_path / "large", start)

    named(verify(tmp_path / "large"), code)


def test_a_list_of_contents_of_a_gigabyte_is_not_read(tmp_path: Path, bundle: Path) -> None:
    """Python's reader of archives takes the whole list into memory; its size is looked at before."""
    data = bytearray(bundle.read_bytes())
    data[-10:-6] = (2**30).to_bytes(4, "little")
    (tmp_path / "large").write_bytes(data)

    named(verify(tmp_path / "large"), "bundle-broken")


@pytest.mark.parametrize("part", ["ledger", "receipts", "transcripts", "claims"])
def test_a_part_that_unpacks_to_much_more_than_it_is_stays_small(
    federation: Federation, tmp_path: Path, part: str
) -> None:
    """300 MB of zeros in 300 KB: one line that has no end."""
    path = repacked(federation, tmp_path / "bomb", **{part: bytes(300 * 2**20)})
    assert path.stat().st_size < 2**20

    named(verify(path), "bundle-broken" if part == "claims" else "ledger-broken")


def _twice(line: bytes) -> bytes:
    """The first key once more, with another value: JSON readers differ in which one counts."""
    return b'{"attempt":1,' + line[1:] if b'"attempt"' in line else b'{"kind":"charge",' + line[1:]


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "deep nesting": lambda line: line[:-1] + b',"x":' + DEEP + b"}",
    "a key twice": _twice,
    "a huge whole number": lambda line: line.replace(b'"seq":2', b'"seq":' + b"9" * 50_000),
    "a huge fraction": lambda line: line.replace(b'"seq":2', b'"seq":1e999'),
    "no UTF-8": lambda line: line.replace(b"hospital-1", b"hospital-\xff"),
    "no JSON": lambda _: b"\0\1\2",
    "null": lambda _: b"null",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_json_in_a_ledger_is_named(federation: Federation, bundle: Path, tmp_path: Path, what: str) -> None:
    """The second entry, in a bundle that its hospital signed."""
    lines = [*open_bundle(bundle).lines("ledger.jsonl")]
    lines[1] = HOSTILE[what](lines[1])
    path = repacked(federation, tmp_path / "hostile", ledger=b"".join(line + b"\n" for line in lines))

    said = verify(path)

    named(said, "ledger-broken")
    assert "ledger entry 2" in said.out


@pytest.mark.parametrize("part", ["head", "roster", "plans", "rosters", "receipts", "transcripts", "anchors"])
def test_hostile_json_elsewhere_is_named(federation: Federation, tmp_path: Path, part: str) -> None:
    """Every part, nested too deep."""
    path = repacked(federation, tmp_path / "hostile", **{part: DEEP + b"\n"})

    read_first = part in {"head", "roster", "plans", "rosters"}
    named(verify(path), "bundle-broken" if read_first else "ledger-broken")


@pytest.mark.parametrize("file", ["receipts.jsonl", "sums.jsonl"])
@pytest.mark.parametrize("line", [DEEP, b"{}", b'{"hospital":"a","hospital":"b"}', b"\xff", b"1e999"])
def test_hostile_json_at_the_coordinator_is_named(
    federation: Federation, tmp_path: Path, file: str, line: bytes
) -> None:
    """A study's folder."""
    study = tmp_path / "study"
    shutil.copytree(federation.folder / "study", study)
    (study / file).write_bytes(line + b"\n")

    named(verify(study, "--partial"), "study-broken")


def test_what_is_not_there_is_named_beside_what_is(federation: Federation, bundle: Path, tmp_path: Path) -> None:
    """A mistyped path, an empty folder and a picture hide no honest file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")

    said = verify(tmp_path / "absent", tmp_path / "empty", tmp_path / "picture.png", bundle, "--partial")

    named(said, "no-evidence")
    assert said.out.count("[no-evidence]") == 3
    assert f"holds    {bundle}: {HOSPITAL}" in said.out


def test_another_root_key_is_named(federation: Federation, bundle: Path, tmp_path: Path) -> None:
    """Of another consortium: none of the lists is signed by it."""
    (tmp_path / "root.pub").write_text(public_bytes(Ed25519PrivateKey.generate()).hex() + "\n", encoding="ascii")

    said = verify(bundle, "--root", tmp_path / "root.pub", "--partial")

    named(said, "roster-unsigned")
    assert "of another root key" in said.out


def test_a_newer_format_is_named(bundle: Path, tmp_path: Path) -> None:
    """What to install is the hint."""
    with zipfile.ZipFile(bundle) as old, zipfile.ZipFile(tmp_path / "newer", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b"evidence/2", b"evidence/3") if name == MANIFEST else data)

    said = verify(tmp_path / "newer")

    named(said, "newer-format")
    assert "konsil-evidence/3" in said.out


def test_a_missing_hospital_is_named(federation: Federation, bundle: Path) -> None:
    """Whoever is in a sum, and shows nothing; a note if that was meant."""
    said = verify(bundle, federation.folder / "study")

    named(said, "bundle-missing")
    assert "hospital-2 took part, and its evidence is not here" in said.out
    assert verify(bundle, federation.folder / "study", "--partial").status == 0


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_an_audit_needs_no_network(federation: Federation, tmp_path: Path) -> None:
    """All of it again in a namespace with no interface but a loopback that is down; what holds and what does not."""
    bundles = [federation.folder / f"{name}.evidence" for name in federation.names]
    root = federation.settings(HOSPITAL).keys.root
    alone = ("unshare", "--net")
    up = subprocess.run([*alone, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
    assert [line.split(":")[0].strip() for line in up.splitlines()[2:]] == ["lo"]

    said = verify(*bundles, federation.folder / "study", "--root", root, "--json", tmp_path / "a.json", before=alone)
    broken = verify(repacked(federation, tmp_path / "cut", ledger=b""), before=alone)

    assert said.status == 0, said
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found["verified"] is True
    assert {finding["severity"] for finding in found["findings"]} <= {"note"}
    assert set(found["hospitals"]) == set(federation.names)
    named(broken, "ledger-broken")
