"""The offline look-up of known vulnerabilities: what is found, what is not, and what cannot be looked at."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.version import Version

from deploy.advisories import CONSTRAINTS, is_affected, look_up, read_packages
from tests.deploy.tools import ROOT

# As OSV has it, shortened.
JINJA: dict[str, Any] = {
    "schema_version": "1.6.0",
    "id": "GHSA-462w-v97r-4m45",
    "aliases": ["CVE-2019-10906", "PYSEC-2019-217"],
    "modified": "2024-09-24T19:51:35.215413Z",
    "published": "2019-04-10T14:30:24Z",
    "summary": "Jinja2 sandbox escape via string formatting",
    "affected": [
        {
            "package": {"name": "Jinja2", "ecosystem": "PyPI", "purl": "pkg:pypi/jinja2"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.10.1"}]}],
            "versions": ["2.9", "2.10"],
        }
    ],
}


def entry(
    *events: dict[str, str], versions: tuple[str, ...] = (), kind: str = "ECOSYSTEM", **more: Any
) -> dict[str, Any]:
    """One about jinja2."""
    package = {"name": "jinja2", "ecosystem": "PyPI"}
    ranges = [{"type": kind, "events": list(events)}] if events else []
    affected = {"package": package, "ranges": ranges, "versions": list(versions)}
    return {"id": "OSV-1", "modified": "2026-01-01T00:00:00Z", "affected": [affected], **more}


def said(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """The script, as a person runs it."""
    command = [sys.executable, str(ROOT / "deploy" / "advisories.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("version", "events", "found"),
    [
        ("2.10", [{"introduced": "0"}, {"fixed": "2.10.1"}], True),
        ("2.10.1", [{"introduced": "0"}, {"fixed": "2.10.1"}], False),
        ("2.10.1rc1", [{"introduced": "0"}, {"fixed": "2.10.1"}], True),
        ("2.9", [{"introduced": "2.10"}], False),
        ("2.10", [{"introduced": "2.10"}], True),
        ("3.0", [{"introduced": "2.0"}, {"last_affected": "3.0"}], True),
        ("3.0.1", [{"introduced": "2.0"}, {"last_affected": "3.0"}], False),
        ("2.5", [{"introduced": "0"}, {"fixed": "2.1"}, {"introduced": "2.4"}, {"fixed": "2.6"}], True),
        ("2.2", [{"introduced": "2.4"}, {"fixed": "2.6"}, {"introduced": "0"}, {"fixed": "2.1"}], False),
        ("2.10", [{"introduced": "0"}, {"fixed": "not a version"}], True),
    ],
)
def test_a_range_is_read_as_its_schema_says(version: str, events: list[dict[str, str]], found: bool) -> None:
    """In whatever order its events come; a mended version that cannot be compared with mends nothing."""
    assert is_affected(Version(version), entry(*events)["affected"][0]) is found


def test_only_what_is_about_an_installed_version_of_a_python_package_is_found() -> None:
    """Names are the same in any spelling; a listed version counts without a range; git ranges are about no release."""
    packages = {"jinja2": Version("2.10")}
    npm = entry({"introduced": "0"})
    npm["affected"][0]["package"]["ecosystem"] = "npm"
    silent = [npm, entry({"introduced": "0"}, kind="GIT"), entry(versions=("2.9",))]

    assert look_up(packages, silent) == []
    (listed,) = look_up(packages, [entry(versions=("2.10",)), *silent])
    assert str(listed) == "jinja2 2.10: OSV-1: no summary (no mended version is known)"
    (found,) = look_up(packages, [JINJA, JINJA])
    assert str(found) == (
        "Jinja2 2.10: GHSA-462w-v97r-4m45 = CVE-2019-10906 = PYSEC-2019-217: "
        "Jinja2 sandbox escape via string formatting (mended in 2.10.1)"
    )


def test_an_sbom_and_the_pins_are_read_and_a_local_build_is_its_release(tmp_path: Path) -> None:
    """A torch 2.13.0+cpu is vulnerable where 2.13.0 is."""
    sbom = {
        "components": [{"name": "Torch", "version": "2.13.0+cpu", "purl": "pkg:pypi/torch@2.13.0%2Bcpu"}, {"name": "x"}]
    }
    (tmp_path / "sbom.cdx.json").write_text(json.dumps(sbom), encoding="utf-8")

    assert read_packages(tmp_path / "sbom.cdx.json") == {"torch": Version("2.13.0")}
    pins = read_packages(CONSTRAINTS)
    lines = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line and not line.startswith("#")]
    assert len(pins) == len(lines) > 100
    assert "cryptography" in pins


@pytest.mark.parametrize("packed", [True, False])
def test_the_exit_status_says_whether_something_was_found(tmp_path: Path, packed: bool) -> None:
    """Of a zip as OSV has it and of a folder; what was withdrawn or looked into is not found; an old copy says so."""
    (tmp_path / "pins.txt").write_text("# ours\nJINJA2==2.10  # for pages\nother==1\n", encoding="utf-8")
    old = [JINJA, {**entry({"introduced": "0"}), "id": "GONE", "withdrawn": "2025-01-01T00:00:00Z"}]
    fresh = [*old, entry(versions=("0.1",), modified=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")]
    places = [_database(tmp_path / name, entries, packed=packed) for name, entries in (("old", old), ("fresh", fresh))]

    found = [said(place, "--of", tmp_path / "pins.txt") for place in places]
    accepted = said(places[1], "--of", tmp_path / "pins.txt", "--accept", "CVE-2019-10906")

    assert [one.returncode for one in [*found, accepted]] == [1, 1, 0], found
    assert "Jinja2 2.10: GHSA-462w-v97r-4m45" in found[0].stdout
    assert "GONE" not in found[0].stdout
    assert "1 advisories, the newest of 2024-09-24" in found[0].stdout
    assert "days old" in found[0].stderr
    assert found[1].stderr == ""
    assert accepted.stdout.splitlines()[-1] == "0 known vulnerabilities"


def _database(place: Path, entries: list[dict[str, Any]], *, packed: bool) -> Path:
    place.mkdir()
    for one in entries:
        (place / f"{one['id']}.json").write_text(json.dumps(one), encoding="utf-8")
    if not packed:
        return place
    with ZipFile(place.with_suffix(".zip"), "w") as archive:
        for file in place.iterdir():
            archive.write(file, file.name)
    return place.with_suffix(".zip")


def test_what_cannot_be_looked_at_is_not_taken_for_harmless(tmp_path: Path) -> None:
    """One line each, and another exit status than a finding's."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "all.zip").write_bytes(b"no archive")
    good = _database(tmp_path / "good", [JINJA], packed=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.json").write_text("[1]", encoding="ascii")
    (tmp_path / "nothing.txt").write_text("# nothing\n", encoding="ascii")
    cases = [(tmp_path / name, CONSTRAINTS) for name in ("empty", "all.zip", "foreign", "missing.zip")]
    cases += [(good, tmp_path / name) for name in ("nothing.txt", "missing.json", "foreign/x.json")]

    for database, of in cases:
        found = said(database, "--of", of)
        assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found
        assert found.stderr.startswith("error: ")
