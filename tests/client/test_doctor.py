"""What `konsil-hospital doctor` finds: on a healthy hospital nothing, and each thing that is wrong by its name."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.doctor import examine
from client.settings import Settings
from server.coordinator import SuperLink
from shared_models.health import Finding, _clock, healthy
from shared_models.phrase import Phrase
from tests.link import Keys, ready_hospital


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A hospital that is ready for studies, and its coordinator's keys."""
    return ready_hospital(tmp_path)


def found(settings: Settings) -> dict[str, Finding]:
    """The worst finding of each check."""
    worst: dict[str, Finding] = {}
    for finding in sorted(examine(settings), key=lambda f: ("ok", "warn", "fail").index(f.status)):
        worst[finding.check] = finding
    return worst


def test_a_healthy_hospital_is_green(keys: Keys) -> None:
    """Every line says ok, the exit status is 0, and tools get the same as JSON."""
    with SuperLink(keys.coordinator()):
        shown = CliRunner().invoke(app, ["doctor", str(keys.hospital_file("north"))])
        machine = CliRunner().invoke(app, ["doctor", str(keys.hospital_file("north")), "--json"])

    assert (shown.exit_code, machine.exit_code) == (0, 0), shown.output
    assert {line.split()[0] for line in shown.output.splitlines()} == {"ok"}
    checks = [finding["check"] for finding in json.loads(machine.output)]
    assert {"versions", "disk", "permissions", "ledger", "budget", "roster", "expiry", "TLS", "clock"} <= set(checks)
    assert len(shown.output.splitlines()) == len(checks)


def test_every_finding_can_be_said_in_another_language_or_has_a_code(keys: Keys) -> None:
    """Also what was found wrong: the page shows it to a steward who may not read English."""
    settings = keys.hospital("north")
    seen = examine(settings)
    settings.keys.identity.chmod(0o644)
    (settings.records / "manifest.toml").unlink()
    seen += examine(settings)

    assert {finding.code for finding in seen if finding.check == "records"} == {"", "records"}
    for finding in seen:
        assert finding.code or finding.check == "versions" or isinstance(finding.text, Phrase), finding
        assert finding.code or not finding.advice or isinstance(finding.advice, Phrase), finding


def test_a_coordinator_that_is_away_fails_and_says_what_to_look_at(keys: Keys) -> None:
    """The exit status is for scripts."""
    result = CliRunner().invoke(app, ["doctor", str(keys.hospital_file("north"))])

    assert result.exit_code == 1
    assert "cannot be reached: Connection refused -> Is it up? Does the firewall" in result.output


def _open_key(settings: Settings) -> None:
    settings.keys.identity.chmod(0o644)


def _no_records(settings: Settings) -> None:
    (settings.records / "data.csv").unlink()


def _cut_ledger(settings: Settings) -> None:
    (settings.state / "ledger.sqlite").write_bytes(b"SQLite format 3\0")


def _no_roster(settings: Settings) -> None:
    settings.roster.unlink()


def _roots_file(settings: Settings) -> None:
    os.chown(settings.keys.node, 12345, 12345)


def _not_joined(settings: Settings) -> None:
    settings.keys.root.unlink()


def _other_authority(settings: Settings) -> None:
    settings.tls.certificate.write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("harm", "check", "words"),
    [
        (_open_key, "permissions", "is open to others"),
        (_no_records, "records", "No such file"),
        (_cut_ledger, "ledger", "ledger.sqlite"),
        (_no_roster, "roster", "cannot be read"),
        (_other_authority, "TLS", "cannot be used"),
        (_not_joined, "roster", "has not joined yet"),
        pytest.param(
            _roots_file,
            "owner",
            "belongs to user 12345",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_is_still_looked_at(
    keys: Keys, harm: Callable[[Settings], None], check: str, words: str
) -> None:
    """One fault keeps nobody from seeing the next; each has advice."""
    harm(keys.hospital("north"))
    with SuperLink(keys.coordinator()):
        seen = found(keys.hospital("north"))

    assert seen[check].status == "fail"
    assert words in seen[check].text
    assert seen[check].advice
    assert not healthy(seen.values())
    assert seen["entropy"].status == "ok"
    assert "daemon" in seen


def test_nothing_is_left_behind(keys: Keys) -> None:
    """Doctor changes nothing that it looks at."""
    state = keys.hospital("north").state
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}

    examine(keys.hospital("north"))

    after = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    assert {path for path in after if path.name not in {"roster-pin.json", "1.json"}} == set(before)
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.parametrize(
    ("seconds", "status"),
    [(0, "ok"), (28, "ok"), (32, "warn"), (-32, "warn"), (297, "warn"), (302, "fail"), (-302, "fail")],
)
def test_clocks_that_differ_are_warned_of_before_signatures_are_refused(seconds: int, status: str) -> None:
    """Flower takes a signature of up to five minutes; half a minute is more than NTP leaves."""
    shown = format_datetime(datetime.now(UTC) - timedelta(seconds=seconds))

    assert _clock(shown).status == status


@pytest.mark.parametrize(
    "date", [None, "", "yesterday", "Thu, 99 Nov 9999 99:99:99 GMT", "Thu, 26 Nov 2026 23:00:00 -0000"]
)
def test_a_date_that_is_none_is_no_time(date: str | None) -> None:
    """Whatever a coordinator says: no traceback, and no clock that is right by chance."""
    assert _clock(date).status == "warn"
