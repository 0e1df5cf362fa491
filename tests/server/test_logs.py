"""Log lines as JSON: one object a line, with what they are about, and without what nobody may read."""

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message

from server import logs
from server.demo import free_port
from server.page import serving
from server.settings import PageSettings
from tests.federation import Federation, restart
from tests.link import Keys
from tests.server.conftest import Seen


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Everything that is logged, as JSON."""
    logs._about.set({})  # of tests before this one
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines())
    root, konsil = logging.getLogger(), logging.getLogger("konsil")
    level = konsil.level
    root.addHandler(handler)
    konsil.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    konsil.setLevel(level)


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    """Every line must be an object by itself."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_object_whatever_is_said(lines: io.StringIO) -> None:
    """Line breaks, quotes and control signs of a peer forge no second line."""
    words = 'first\n{"level": "info", "message": "forged"}\r\x1b[2J\u2028"'

    logging.getLogger("konsil.coordinator").warning("said: %s", words)

    (line,) = read(lines)
    assert line["message"] == f"said: {words}"
    assert (line["level"], line["logger"], line["thread"]) == ("warning", "konsil.coordinator", "MainThread")
    assert line["time"].endswith("+00:00")


def test_a_traceback_stays_in_its_line(lines: io.StringIO) -> None:
    """A fault of this program can be found by a machine too."""
    try:
        int("what\nhappened")
    except ValueError:
        logging.getLogger("konsil").exception("a fault")

    (line,) = read(lines)
    assert "ValueError: invalid literal" in line["traceback"]


def test_nothing_but_the_known_fields_is_written(lines: io.StringIO) -> None:
    """A library may attach a header or a body to its records; neither is copied."""
    logging.getLogger("konsil").warning("hello", extra={"authorization": "Bearer secret", "body": b"parameters"})

    (line,) = read(lines)
    assert set(line) == {"time", "level", "logger", "thread", "message"}


def test_threads_speak_of_their_own_studies(lines: io.StringIO) -> None:
    """Studies run side by side, each in a thread; lines of one are never about another."""
    log, both = logging.getLogger("konsil.coordinator"), threading.Barrier(2)

    def run(study: str) -> None:
        logs.about(study=study)
        for attempt in range(1, 4):
            both.wait()
            logs.about(attempt=attempt)
            log.warning("%s %d", study, attempt)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("north", "south")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = read(lines)
    assert len(found) == 6
    assert all(line["message"] == f"{line['study']} {line['attempt']}" for line in found)


def test_lines_of_a_round_say_which(lines: io.StringIO, federation: Federation) -> None:
    """A hospital that is left out in the middle of a study: the line has study, round and attempt."""
    forgotten: list[str] = []

    def forget(hospital: str, message: Message) -> None:
        if not forgotten and (hospital, message.metadata.group_id) == ("hospital-4", "2"):
            forgotten.append(hospital)
            restart(federation, hospital)

    federation.wire.on_request = forget
    thread = threading.Thread(target=federation.run)  # as studies run: what it is about ends with it
    thread.start()
    thread.join()
    logging.getLogger("konsil").warning("afterwards")

    *about, afterwards = read(lines)
    (left_out,) = [line for line in about if "hospital-4 left out" in line["message"]]
    expected = {"study": "breast-cancer", "purpose": "train", "round": 2, "attempt": 1}
    assert {key: left_out[key] for key in expected} == expected
    assert "study" not in afterwards


def test_every_request_has_an_id_that_its_lines_carry(lines: io.StringIO, seen: Seen) -> None:
    """The answer names it, so that a complaint can be followed; a caller's own id is not believed."""
    page = PageSettings(port=free_port())
    settings = seen.settings.model_copy(update={"page": page})
    with seen.studies() as studies, serving(settings, studies):
        url = f"http://127.0.0.1:{page.port}/?token=secret-in-a-query"
        answers = [
            httpx.get(url, headers={"host": "evil.example", "x-request-id": "mine"}, trust_env=False) for _ in range(3)
        ]

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert [line["request"] for line in read(lines) if "refused" in line["message"]] == ids
    assert "secret-in-a-query" not in lines.getvalue()
    assert all("request" not in line for line in read(lines) if "refused" not in line["message"])


def test_a_call_has_an_id_until_it_ends(lines: io.StringIO) -> None:
    """For the control service: within a call lines carry its id, behind it they do not."""
    log = logging.getLogger("konsil.control")

    with logs.request() as outer:
        log.warning("in")
        with logs.request("0123") as inner:
            log.warning("deeper")
        log.warning("in again")
    log.warning("out")

    assert [line.get("request") for line in read(lines)] == [outer, inner, outer, None]
    assert inner == "0123"


@pytest.mark.parametrize("way", ["option", "setting"])
def test_the_command_writes_json_where_it_is_asked_to(tmp_path: Path, way: str) -> None:
    """By the option or by the settings; text is the default."""
    Keys(tmp_path)
    settings = tmp_path / "coordinator" / "coordinator.toml"
    text = settings.read_text(encoding="utf-8")
    lead = 'log_format = "json"\n' if way == "setting" else ""
    settings.write_text(f"{lead}{text}\n[page]\nport = {free_port()}\n", encoding="utf-8")
    plan = Path(__file__).parents[2] / "server" / "plans" / "breast-cancer.toml"
    options = ["--log-json"] if way == "option" else []
    command = [sys.executable, "-m", "server.cli", "run", str(plan), "--settings", str(settings), *options]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        process.terminate()

    assert first["logger"].startswith("konsil.")
    assert first["level"] == "info"


def test_text_is_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    """As before: time, whose line it is, level, message."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.to_terminal("coordinator")
        logging.getLogger("konsil.coordinator").info("ready")
    finally:
        root.handlers[:], root.level = before, level

    assert capfd.readouterr().err.rstrip().endswith(" coordinator INFO ready")
