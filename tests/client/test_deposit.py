"""What a hospital leaves for auditors: by its own policy only, listed before it leaves, and never in training's way."""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

import client.deposit
import server.deposits
from client.books import Books
from client.bundle import export
from client.cli import app
from client.deposit import NEWEST, Courier, own_checkpoint, send_bundle, send_checkpoint
from client.egress import EGRESS, FREE, EgressLog, summary
from client.evidence import read_evidence
from client.settings import Settings, read_settings
from server.deposits import FOLDER
from shared_models.config import read_toml
from shared_models.control.deposits import CHECKPOINTS, CHUNK_BYTES
from shared_models.errors import ConfigError, FederationError, LedgerError, PolicyError, RolledBackCheckpointError
from shared_models.identity import load_key, sign
from shared_models.privacy.checkpoint import CheckpointHistory, SignedCheckpoint, read_checkpoint
from tests.centre import Centre
from tests.link import Keys
from tests.network import Relay, running_loop
from tests.server.test_deposits import bundle

NAME = "north"
PATIENCE_S = 30.0
NOISE = os.urandom(400_000)  # does not shrink in an archive


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    """A control service, not served yet; north has a ledger, and settings that say where the service is."""
    centre = Centre(Keys(tmp_path))
    permit(centre, send_checkpoints=True, send_evidence=True)
    Books.open(centre.keys.hospital(NAME)).close()
    return centre


def permit(centre: Centre, **policy: bool) -> Settings:
    """Change what north's policy says of sending."""
    path = centre.keys.hospital_file(NAME)
    fields = read_toml(path, "settings")
    fields["control"] = centre.address
    fields["policy"] |= policy
    path.write_text(tomli_w.dumps(fields), encoding="utf-8")
    return read_settings(path)


def grow(settings: Settings) -> None:
    """One more entry in the ledger."""
    books = Books.open(settings)
    books.ledger.append(
        "population-changed", population=settings.population.name, population_fingerprint=f"{time.time_ns():064x}"
    )
    books.close()


def stored(centre: Centre) -> list[int]:
    """Entries that north's checkpoints at the coordinator are about."""
    path = centre.settings.state / FOLDER / NAME / CHECKPOINTS
    return [read_checkpoint(line).seq for line in path.read_bytes().splitlines()] if path.exists() else []


def bundles(centre: Centre) -> list[Path]:
    return sorted((centre.settings.state / FOLDER / NAME).glob("bundle-*.zip"))


def listed(settings: Settings) -> list[dict[str, Any]]:
    return [line for line in read_evidence(settings.state / EGRESS) if line["what"] == "deposit"]


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


# what is signed


def test_a_clock_that_was_set_back_makes_no_rollback(centre: Centre) -> None:
    """The ledger bears with five minutes; the next checkpoint is later than the one before all the same."""
    settings = read_settings(centre.keys.hospital_file(NAME))
    first = own_checkpoint(settings)
    ahead = first.model_copy(update={"time": "2999-01-01T00:00:00.000Z"})  # as a clock of then would have signed it
    key = load_key(settings.keys.identity)
    signature = sign(key, "checkpoint", ahead.payload()).hex()
    (settings.state / NEWEST).write_bytes(ahead.model_copy(update={"signature": signature}).line())
    grow(settings)

    second = own_checkpoint(settings)

    assert (second.seq, second.time) == (2, "2999-01-01T00:00:00.001Z")
    history = CheckpointHistory()
    assert [history.take(one) for one in (second, ahead)] == [True, True]


def test_an_honest_hospital_never_contradicts_itself(centre: Centre) -> None:
    """The daemon and a command sign at the same time, while the ledger grows: no two of it look like a rollback."""
    settings = read_settings(centre.keys.hospital_file(NAME))
    signed, over = list[SignedCheckpoint](), threading.Event()

    def keep_signing() -> None:
        while not over.is_set():
            signed.append(own_checkpoint(settings))

    threads = [threading.Thread(target=keep_signing) for _ in range(3)]
    for thread in threads:
        thread.start()
    books = Books.open(settings)
    for number in range(40):
        books.ledger.append(
            "population-changed", population=settings.population.name, population_fingerprint=f"{number:064x}"
        )
    books.close()
    over.set()
    for thread in threads:
        thread.join()

    random.Random(0).shuffle(signed)
    history = CheckpointHistory()
    assert sum(history.take(one) for one in signed) == len({one.seq for one in signed}) > 1
    assert len({one.time for one in signed}) == len(signed)


# policy


def test_nothing_is_sent_unless_policy_says_so(centre: Centre) -> None:
    """Off by default: neither by the command nor by the daemon; nothing is listed, because nothing left."""
    settings = permit(centre, send_checkpoints=False, send_evidence=False)
    egress, bundle = EgressLog(settings), settings.state / "bundle.zip"
    export(settings, bundle)

    with centre.serving():
        with pytest.raises(PolicyError, match="sends no checkpoints"):
            send_checkpoint(settings, egress, own_checkpoint(settings))
        with pytest.raises(PolicyError, match="sends no evidence bundles"):
            send_bundle(settings, egress, bundle)
        found = CliRunner().invoke(app, ["ledger", "send", str(centre.keys.hospital_file(NAME))])
        with Courier(settings, centre.keys.hospital_file(NAME)) as courier:
            courier.notice(study_over=True)
            time.sleep(0.3)
        calls = [entry.call for entry in centre.log() if entry.kind == "call"]

    assert isinstance(found.exception, PolicyError)
    assert (stored(centre), bundles(centre), listed(settings), calls) == ([], [], [], [])
    assert not Settings.model_fields["policy"].annotation.model_fields["send_evidence"].default  # type: ignore[union-attr]
    assert not Settings.model_fields["policy"].annotation.model_fields["send_checkpoints"].default  # type: ignore[union-attr]


def test_policy_that_sends_needs_an_address(centre: Centre) -> None:
    """Said when the settings are read, not when it is too late."""
    path = centre.keys.hospital_file(NAME)
    fields = read_toml(path, "settings")
    del fields["control"]
    path.write_text(tomli_w.dumps(fields), encoding="utf-8")

    with pytest.raises(ConfigError, match="control does not say where the service is"):
        read_settings(path)


# what leaves is listed


def test_what_is_left_is_listed_by_part(centre: Centre) -> None:
    """Its parts add up to it, its digest is its own, and the messages that carry it are counted; all of it is free."""
    settings = read_settings(centre.keys.hospital_file(NAME))
    egress, bundle = EgressLog(settings), settings.state / "bundle.zip"
    export(settings, bundle)

    with centre.serving():
        assert send_checkpoint(settings, egress, own_checkpoint(settings))
        assert send_bundle(settings, egress, bundle)

    one, two = listed(settings)
    (kept,) = bundles(centre)
    line = (centre.settings.state / FOLDER / NAME / CHECKPOINTS).read_bytes()[:-1]
    assert (one["message"], one["bytes"], one["to"]) == ("checkpoint", len(line), centre.address)
    assert set(one["fields"]) == {*json.loads(line), "JSON punctuation"}
    assert (two["message"], two["bytes"]) == ("bundle", kept.stat().st_size)
    assert {"manifest.json", "ledger.jsonl", "archive"} <= set(two["fields"])
    assert two["sha256"] in kept.name
    for entry in (one, two):
        assert sum(field["bytes"] for field in entry["fields"].values()) == entry["bytes"]
        assert {field["price"] for field in entry["fields"].values()} == {FREE}
        assert entry["bytes"] < entry["calls"]["Deposit"]["body"] < entry["bytes"] + 400
    (deposits,) = [row for row in summary(read_evidence(settings.state / EGRESS))["calls"] if row["call"] == "Deposit"]
    assert (deposits["count"], deposits["body"]) == (2, sum(e["calls"]["Deposit"]["body"] for e in (one, two)))


def test_what_cannot_be_listed_does_not_leave(centre: Centre) -> None:
    """The log cannot be written: no call is made."""
    settings = read_settings(centre.keys.hospital_file(NAME))
    egress = EgressLog(settings)
    (settings.state / EGRESS).mkdir()

    with centre.serving(), pytest.raises(LedgerError, match="cannot be written"):
        send_checkpoint(settings, egress, own_checkpoint(settings))

    assert stored(centre) == []


def test_a_bundle_that_is_another_by_the_time_it_is_sent_is_not_stored(
    centre: Centre, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was listed is what leaves, or the coordinator does not get to the end of it."""
    settings = read_settings(centre.keys.hospital_file(NAME))
    bundle = settings.state / "bundle.zip"
    export(settings, bundle)
    whole = bundle.read_bytes()
    reads = iter([whole, whole[:-1] + b"x"])
    monkeypatch.setattr(client.deposit, "_parts", lambda _: iter([next(reads)[:CHUNK_BYTES]]))

    with centre.serving(), pytest.raises(FederationError):
        send_bundle(settings, EgressLog(settings), bundle)

    assert bundles(centre) == []


# the command


def test_the_command_sends_what_somebody_looked_at(centre: Centre, tmp_path: Path) -> None:
    """A bundle that was exported before, as it is; or a fresh one; and a checkpoint of now. Sent again, it is known."""
    settings, file = read_settings(centre.keys.hospital_file(NAME)), str(centre.keys.hospital_file(NAME))
    export(settings, tmp_path / "looked-at.zip")

    with centre.serving():
        said = [
            CliRunner().invoke(app, ["ledger", "send", file, *more], catch_exceptions=False).output
            for more in (
                ["--bundle", str(tmp_path / "looked-at.zip")],
                ["--bundle", str(tmp_path / "looked-at.zip")],
                [],
            )
        ]

    assert ["stored" in text.splitlines()[1] for text in said] == [True, False, True]
    assert [text.startswith("checkpoint of entry 1 (") for text in said] == [True] * 3
    assert (tmp_path / "looked-at.zip").read_bytes() in [path.read_bytes() for path in bundles(centre)]
    assert (len(bundles(centre)), stored(centre)) == (2, [1])
    assert list(settings.state.rglob("*.zip")) == []


def test_a_file_that_is_no_bundle_is_not_sent(centre: Centre, tmp_path: Path) -> None:
    """Two lines, before anything is called."""
    settings = permit(centre, send_checkpoints=False)
    (tmp_path / "x.zip").write_bytes(b"x" * 100)

    with pytest.raises(ConfigError, match="cannot be sent"):
        send_bundle(settings, EgressLog(settings), tmp_path / "x.zip")

    assert listed(settings) == []


# the daemon


def test_the_daemon_sends_a_checkpoint_at_its_start_and_a_bundle_when_a_study_is_over(centre: Centre) -> None:
    """Between them no more than one a minute, and none that says nothing new."""
    file = centre.keys.hospital_file(NAME)
    settings = read_settings(file)
    with centre.serving(), Courier(settings, file) as courier:
        until(lambda: stored(centre) == [1])
        for _ in range(3):
            grow(settings)
            courier.notice(study_over=False)
        time.sleep(0.5)
        assert stored(centre) == [1]
        courier.notice(study_over=True)
        until(lambda: bundles(centre))

    assert stored(centre) == [1, 4]
    assert not (settings.state / client.deposit.OUTBOX).exists()
    assert [line["message"] for line in listed(settings)] == ["checkpoint", "checkpoint", "bundle"]


def test_a_policy_that_changes_holds_for_the_next_one(centre: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    """No restart; a settings file that is being mended sends nothing."""
    monkeypatch.setattr(client.deposit, "BETWEEN_S", 0.05)
    monkeypatch.setattr(client.deposit, "SHORTEST_RETRY_S", 0.05)
    file = centre.keys.hospital_file(NAME)
    settings = permit(centre, send_checkpoints=False, send_evidence=False)
    with centre.serving(), Courier(settings, file) as courier:
        courier.notice(study_over=False)
        time.sleep(0.3)
        assert stored(centre) == []
        text = file.read_text(encoding="utf-8")
        file.write_text("policy = [", encoding="utf-8")
        courier.notice(study_over=False)
        time.sleep(0.3)
        assert stored(centre) == []
        file.write_text(text.replace("send_checkpoints = false", "send_checkpoints = true"), encoding="utf-8")
        courier.notice(study_over=False)
        until(lambda: stored(centre) == [1])


def test_a_coordinator_that_is_away_is_tried_again_and_logged_once(
    centre: Centre, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it; when it is back, it gets the newest checkpoint, and the bundle of the study that is over."""
    monkeypatch.setattr(client.deposit, "SHORTEST_RETRY_S", 0.05)
    file = centre.keys.hospital_file(NAME)
    settings = read_settings(file)
    with caplog.at_level(logging.WARNING, "konsil.hospital"), Courier(settings, file) as courier:
        courier.notice(study_over=True)  # returns, with nobody there
        until(lambda: len(listed(settings)) >= 4)
        with centre.serving():
            until(lambda: bundles(centre) and stored(centre))

    assert stored(centre) == [1]
    assert [record.getMessage()[:39] for record in caplog.records] == ["what is left for auditors was not sent:"]


def test_a_network_that_fails_in_the_middle_of_a_bundle_costs_a_second_try(
    centre: Centre, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half is thrown away at the other side, also if nobody there notices; a later one is whole. All are listed."""
    monkeypatch.setattr(client.deposit, "SHORTEST_RETRY_S", 0.05)
    monkeypatch.setattr(server.deposits, "STALLED_S", 0.5)
    settings, file = permit(centre, send_checkpoints=False), centre.keys.hospital_file(NAME)
    monkeypatch.setattr(
        client.deposit, "export", lambda _, path: path.write_bytes(bundle(centre.keys, NAME, content=NOISE))
    )
    with centre.serving(), running_loop() as loop:
        relay = Relay("127.0.0.1", centre.settings.control.port, loop, {"up": [200_000]})
        through = settings.model_copy(update={"control": relay.address})
        with Courier(through, file) as courier:
            courier.notice(study_over=True)
            until(lambda: bundles(centre))
        relay.close()

    assert relay.breaks["up"] == []
    messages = [line["message"] for line in listed(settings)]
    assert len(messages) >= 2  # more, where the other side noticed late
    assert set(messages) == {"bundle"}
    assert [path.read_bytes() for path in bundles(centre)] == [bundle(centre.keys, NAME, content=NOISE)]


def test_a_ledger_that_was_rolled_back_is_told_to_the_hospital_and_does_not_stop_it(
    centre: Centre, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own log says so, loudly; its bundle is sent all the same, because an auditor wants to see it."""
    file = centre.keys.hospital_file(NAME)
    settings = read_settings(file)
    backup = {path: path.read_bytes() for path in settings.state.iterdir() if path.name.startswith("ledger.sqlite")}
    grow(settings)
    with centre.serving():
        with Courier(settings, file):
            until(lambda: stored(centre) == [2])
        for path in settings.state.glob("ledger.sqlite*"):
            path.unlink()
        for path, content in backup.items():
            path.write_bytes(content)
        with pytest.raises(RolledBackCheckpointError):
            send_checkpoint(settings, EgressLog(settings), own_checkpoint(settings))
        with caplog.at_level(logging.ERROR, "konsil.hospital"), Courier(settings, file) as courier:
            courier.notice(study_over=True)
            until(lambda: bundles(centre))

    assert stored(centre) == [2, 1, 1]  # both that contradict are kept
    assert "all-patients's ledger has 2 entries" in caplog.text


def test_whatever_goes_wrong_the_daemon_goes_on(
    centre: Centre, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of this program: its kind is logged, its text is not, and it is tried again."""
    monkeypatch.setattr(client.deposit, "SHORTEST_RETRY_S", 0.05)
    monkeypatch.setattr(client.deposit, "LONGEST_RETRY_S", 0.05)
    failures = iter([RuntimeError("patient 17")])
    real = client.deposit.own_checkpoint

    def faulty(settings: Settings) -> object:
        for failure in failures:
            raise failure
        return real(settings)

    monkeypatch.setattr(client.deposit, "own_checkpoint", faulty)
    file = centre.keys.hospital_file(NAME)
    with centre.serving(), caplog.at_level(logging.ERROR), Courier(read_settings(file), file):
        until(lambda: stored(centre) == [1])

    assert "RuntimeError" in caplog.text
    assert "patient 17" not in caplog.text
