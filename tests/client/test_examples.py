"""Public data as a hospital's folder: taken from a package, or fetched over TLS and held against a digest."""

import gzip
import hashlib
import http.server
import io
import os
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from lifelines.datasets import load_lung
from typer.testing import CliRunner

import client.download
from client import examples
from client.cli import app
from client.download import Pinned, fetch
from client.examples import EXAMPLES, Example, find_example, write_hospital
from client.records.manifest import read_manifest
from client.records.tabular import read_table
from client.registry import check_records
from client.settings import read_settings
from server.pki import Authority
from shared_models.errors import ConfigError, FederationError, TransferError
from shared_models.tasks import Task, find_task

DATA = Path(os.environ.get("KONSIL_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(not (DATA / "heart_disease").is_dir(), reason="public data sets are no part of this")
CLEVELAND = b"".join(
    # age, sex, pain, pressure, cholesterol; sugar, ecg, heart rate, angina, depression; three that are unused; label
    f"{40 + i}.0,{i % 2}.0,{1 + i % 4}.0,130.0,{'?' if i == 3 else '233.0'},"
    f"1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,{i % 3}\n".encode()
    for i in range(24)
)


@dataclass(frozen=True)
class Source:
    """A publisher's server, on this machine, over TLS."""

    url: str
    content: dict[str, bytes]
    asked: list[str]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """Serves what is put into ``content``; its authority alone is trusted. A path ``/to/X`` leads to X."""
    authority = Authority(tmp_path / "pki")
    authority.issue(tmp_path / "tls", "localhost", hosts=["localhost"])
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    content: dict[str, bytes] = {}
    asked: list[str] = []

    class Publisher(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/slow/"):
                with suppress(OSError):
                    for letter in (
                        b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if "body" in self.path else b"x-letters: ") + bytes(99)
                    ):
                        self.wfile.write(bytes([letter or ord("a")]))
                        time.sleep(0.1)
                return
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            self.send_response(200 if self.path in content else 404)
            self.end_headers()
            self.wfile.write(content.get(self.path, b"not here"))

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            """Say nothing: clients that do not trust it hang up."""

    server = Server(("127.0.0.1", 0), Publisher)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls" / "tls.pem", tmp_path / "tls" / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Source(f"https://localhost:{server.server_address[1]}", content, asked)
    server.shutdown()
    thread.join()
    server.server_close()


def heart(source: Source, content: bytes) -> Example:
    """The heart-disease example, whose Cleveland is at the test's source and has this content's digest."""
    source.content["/cleveland"] = content
    pinned = Pinned(
        "processed.cleveland.data", f"{source.url}/cleveland", len(content), (f"sha256:{_sha256(content)}",)
    )
    return replace(EXAMPLES["heart-disease"], files={"cleveland": pinned})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def command(*arguments: object, answer: str = "") -> Result:
    """One command; errors of ours are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    if isinstance(result.exception, FederationError):
        raise result.exception
    return result


def sizes(folder: Path) -> tuple[int, int]:
    """Records to train on, and to test on, as a study reads them."""
    parts = [
        read_table(read_manifest(folder / name), _task(folder), split_key=b"key")[0] for name in ("records", "test")
    ]
    return len(parts[0]), len(parts[1])


def _task(folder: Path) -> Task:
    return find_task(read_manifest(folder / "records").task)


def test_an_example_is_a_hospital_that_is_ready(tmp_path: Path) -> None:
    """Settings that can be read, a budget, a policy for this task alone, and records that a study would take."""
    said = command("example", "breast-cancer", tmp_path / "north").output

    settings = read_settings(tmp_path / "north" / "hospital.toml")
    check_records(settings)
    assert sizes(tmp_path / "north") == (427, 142)
    assert settings.policy.tasks == ("breast-cancer",)
    assert settings.population.public_size == 430
    assert "CC BY 4.0" in said
    assert (settings.state / "ledger.sqlite").exists()


def test_made_up_notes_need_no_download(tmp_path: Path) -> None:
    """All eight specialties, at the hospital and in the test part; they are the same at every call."""
    for name in ("one", "two"):
        command("example", "note-specialty", tmp_path / name)

    one, two = ((tmp_path / name / "records" / "data.csv").read_bytes() for name in ("one", "two"))
    assert one == two
    assert sizes(tmp_path / "one") == (240, 80)


def test_what_is_fetched_is_what_was_pinned(source: Source, tmp_path: Path) -> None:
    """Fetched over TLS from the table's address; rows without a value are left out by the manifest."""
    told: list[str] = []

    written = write_hospital(heart(source, CLEVELAND), tmp_path / "north", accept=lambda: True, say=told.append)

    assert source.asked == ["/cleveland"]
    assert sizes(tmp_path / "north") == (
        17,
        6,
    )  # every fourth of 8 and of 16 is for testing; one row has no cholesterol
    assert written.patients == 17
    assert read_settings(written.settings).name == "cleveland"
    assert any("processed.cleveland.data" in line for line in told)


def test_nothing_is_fetched_unless_the_licence_is_accepted(source: Source, tmp_path: Path) -> None:
    """Whoever says no has neither asked the source for anything nor a folder."""
    with pytest.raises(ConfigError, match="licence"):
        write_hospital(heart(source, CLEVELAND), tmp_path / "north", accept=lambda: False, say=print)

    assert source.asked == []
    assert not (tmp_path / "north").exists()


def test_the_command_shows_the_licence_and_asks(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question comes after the licence; the answer no ends it, and the option answers it."""
    monkeypatch.setattr(examples, "EXAMPLES", {"heart-disease": heart(source, CLEVELAND)})

    with pytest.raises(ConfigError, match="licence"):
        command("example", "heart-disease", tmp_path / "no", answer="n\n")
    asked = command("example", "heart-disease", tmp_path / "yes", answer="y\n").output
    silent = command("example", "heart-disease", tmp_path / "script", "--accept-licence").output

    assert asked.index("CC BY 4.0") < asked.index("keep to this licence?")
    assert "keep to this licence?" not in silent
    assert source.asked == ["/cleveland"] * 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("sent", [CLEVELAND[:-1] + b"1", CLEVELAND + b"\n", CLEVELAND[:100], b""])
def test_another_file_is_refused_and_leaves_nothing(source: Source, tmp_path: Path, sent: bytes) -> None:
    """One byte changed, one more, cut, or nothing: no folder is made."""
    example = heart(source, CLEVELAND)
    source.content["/cleveland"] = sent

    with pytest.raises(TransferError, match="was not used"):
        write_hospital(example, tmp_path / "north", accept=lambda: True, say=lambda _: None)

    assert not (tmp_path / "north").exists()


def test_a_local_copy_is_held_against_the_same_digest(source: Source, tmp_path: Path) -> None:
    """The file or its folder, without asking the source or anybody; another file is refused."""
    example = heart(source, CLEVELAND)
    copy = tmp_path / "processed.cleveland.data"
    copy.write_bytes(CLEVELAND)

    def write(name: str, data: Path) -> None:
        write_hospital(example, tmp_path / name, data=data, accept=lambda: False, say=lambda _: None)

    write("file", copy)
    write("folder", tmp_path)
    copy.write_bytes(CLEVELAND.replace(b"130.0", b"131.0"))
    with pytest.raises(TransferError, match="has digest sha256:"):
        write("changed", copy)
    with pytest.raises(ConfigError, match="cannot be read"):
        write("absent", tmp_path / "absent")

    assert source.asked == []
    assert (tmp_path / "file" / "records" / "data.csv").read_bytes() == (
        tmp_path / "folder" / "records" / "data.csv"
    ).read_bytes()
    assert not (tmp_path / "changed").exists()


def test_a_source_without_trusted_tls_is_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither plain HTTP, nor a redirection to it, nor a certificate that nobody here trusts."""
    content = source.content["/file"] = b"content"
    pinned = Pinned("file", f"{source.url}/file", 7, (f"sha256:{_sha256(content)}",))
    plain = source.url.replace("https", "http")

    assert fetch(replace(pinned, url=f"{source.url}/to//file"), say=print) == content
    with pytest.raises(ConfigError, match="not an address of https"):
        fetch(replace(pinned, url=f"{plain}/file"), say=print)
    with pytest.raises(ConfigError, match="not an address of https"):
        fetch(replace(pinned, url=f"{source.url}/to/{plain}/file"), say=print)
    with pytest.raises(TransferError, match="404"):
        fetch(replace(pinned, url=f"{source.url}/nowhere"), say=print)
    monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path / "other").certificate))
    with pytest.raises(TransferError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(pinned, say=print)


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_source_that_sends_byte_by_byte_is_not_waited_for(
    source: Source, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read times out; the whole has its own bound."""
    monkeypatch.setattr(client.download, "_LONGEST_S", 2.5)

    with pytest.raises(TransferError, match=r"cannot be fetched: not over after 2\.5 s"):
        fetch(Pinned("file", f"{source.url}/slow/{part}", 1000, ("sha256:" + "0" * 64,)), say=lambda _: None)


def test_no_more_is_taken_than_the_file_has(source: Source) -> None:
    """A source that sends without end fills no memory: reading stops behind the bound."""
    source.content["/file"] = bytes(50_000_000)
    told: list[str] = []

    with pytest.raises(TransferError, match="longer than 1000 bytes"):
        fetch(Pinned("file", f"{source.url}/file", 1000, ("sha256:" + "0" * 64,)), say=told.append)

    assert told == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Neither another hospital nor somebody's records."""
    (tmp_path / "records").mkdir()

    with pytest.raises(ConfigError, match="is not overwritten"):
        command("example", "breast-cancer", tmp_path)

    assert list(tmp_path.iterdir()) == [tmp_path / "records"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("nothing",), "there is no example"),
        (("icu-mortality",), "is not fetched for you"),
        (("heart-disease", "--hospital", "paris"), "there is no 'paris'"),
        (("breast-cancer", "--data", "."), "reads no file"),
        (("breast-cancer", "--epsilon", "-1"), "epsilon"),
    ],
)
def test_what_cannot_be_written_says_so(tmp_path: Path, arguments: tuple[str, ...], match: str) -> None:
    """With a hint of what to do instead, and without a folder."""
    with pytest.raises(ConfigError, match=match):
        command("example", arguments[0], tmp_path / "north", *arguments[1:])

    assert not (tmp_path / "north").exists()


def test_images_come_without_pickles(tmp_path: Path) -> None:
    """The publisher's parts become the hospital's and the test part; an array of objects is refused."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"{part}_{what}": values
        for part, count in (("train", 6), ("val", 2), ("test", 4))
        for what, values in (
            ("images", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels", np.arange(count, dtype=np.uint8)[:, None] % 2),
        )
    }
    plain, pickled = io.BytesIO(), io.BytesIO()
    np.savez_compressed(plain, **arrays)
    np.savez_compressed(pickled, **(arrays | {"train_images": np.array([{}], dtype=object)}))

    EXAMPLES["pneumonia"].write(tmp_path, "", plain.getvalue())

    assert sizes(tmp_path) == (8, 4)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        EXAMPLES["pneumonia"].write(tmp_path / "other", "", pickled.getvalue())


def test_every_file_is_pinned_by_a_strong_digest() -> None:
    """SHA-256 everywhere; one publisher states MD5 alone, and its file has it beside."""
    pinned = {file.name: file for example in EXAMPLES.values() for file in example.files.values()}

    assert {name for name, file in pinned.items() if not any(d.startswith("sha256:") for d in file.digests)} == set()
    assert {name for name, file in pinned.items() if any(d.startswith("md5:") for d in file.digests)} == {
        "pneumoniamnist.npz"
    }
    assert all(file.url.startswith("https://") for file in pinned.values())


@needs_data
@pytest.mark.parametrize(
    ("name", "part", "folder", "expected"),
    [
        ("heart-disease", "cleveland", "heart_disease", (228, 75)),
        ("heart-disease", "switzerland", "heart_disease", (34, 12)),
        ("pneumonia", None, "pneumoniamnist", (5232, 624)),
        ("note-specialty", None, "mtsamples8", (981, 323)),
    ],
)
def test_the_publishers_files_are_read(
    tmp_path: Path, name: str, part: str | None, folder: str, expected: tuple[int, int]
) -> None:
    """The real files have the pinned digests, and a study could begin with each folder."""
    write_hospital(
        find_example(name), tmp_path, part=part, data=DATA / folder, accept=lambda: False, say=lambda _: None
    )

    assert sizes(tmp_path) == expected
    if folder == "mtsamples8":
        text = gzip.decompress((DATA / folder / "mtsamples8.csv.gz").read_bytes())
        assert _sha256(text) == "b14bc7c1426cfeaffb2aed21ef309e132c287252df08764e5ca850d4c1062cd3"


def test_survival_comes_from_a_package_too(tmp_path: Path) -> None:
    """Of 228 patients 167 have all values; times, and whether somebody died, are the labels of the task."""
    command("example", "lung", tmp_path / "north")

    manifest = read_manifest(tmp_path / "north" / "records")
    task = find_task(manifest.task)
    training, _ = read_table(manifest, task, split_key=b"key")
    data = load_lung()
    events = ((data["status"] == 1) & data.drop(columns="inst").notna().all(axis=1) & (data["time"] <= 900)).sum()
    test, _ = read_table(read_manifest(tmp_path / "north" / "test"), task, split_key=b"key")
    assert len(training) + len(test) == 167 + 1  # one lacks the institution alone
    assert float(training.targets[:][:, 1].sum() + test.targets[:][:, 1].sum()) == events
