"""Is a version that Konsil is built with known to be vulnerable? Looked up offline, in a copy of the OSV database.

The copy is fetched on a connected machine, as docs/install.md has it, and carried over: ``all.zip`` of the PyPI part,
or the folder that it unpacks to. The exit status is 0 if nothing was found, 1 if something was, 2 if nothing could be
looked up.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
OLD_DAYS = 30


class Advisory(NamedTuple):
    """One entry of the database that is about an installed version.

    Attributes:
        package: Name and version that are installed.
        names: The entry's id, and what others call it.
        fixed: Versions in which it is mended, oldest first; newer than the installed one.
        summary: In one line.
    """

    package: str
    names: tuple[str, ...]
    fixed: tuple[str, ...]
    summary: str

    def __str__(self) -> str:
        mended = f"mended in {', '.join(self.fixed)}" if self.fixed else "no mended version is known"
        return f"{self.package}: {' = '.join(self.names)}: {self.summary} ({mended})"


class UnusableError(Exception):
    """A file that cannot be looked at; the text says which and why."""


def main() -> int:
    """Look every package up and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", type=Path, help="all.zip of OSV's PyPI part, or the folder that it unpacks to")
    parser.add_argument("--of", type=Path, default=CONSTRAINTS, help="an SBOM (CycloneDX, JSON) or a constraints file")
    parser.add_argument("--accept", action="append", default=[], metavar="ID", help="an advisory that was looked into")
    asked = parser.parse_args()
    try:
        packages = read_packages(asked.of)
        entries = list(read_database(asked.database))
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    newest = max(datetime.fromisoformat(entry["modified"]).astimezone(UTC) for entry in entries)
    days = (datetime.now(UTC) - newest).days
    print(f"{len(packages)} packages of {asked.of}; {len(entries)} advisories, the newest of {newest:%Y-%m-%d}")
    if days > OLD_DAYS:
        print(f"warning: the database is {days} days old; what was found since is not in it", file=sys.stderr)
    found = [one for one in look_up(packages, entries) if not set(one.names) & set(asked.accept)]
    for one in found:
        print(one)
    print(f"{len(found)} known vulnerabilities")
    return 1 if found else 0


def read_packages(path: Path) -> dict[str, Version]:
    """Versions by canonical name, of an SBOM's PyPI components or of ``name==version`` lines.

    Raises:
        UnusableError: It cannot be read, or names no package.
    """
    try:
        text = path.read_text("utf-8")
        found = _of_an_sbom(json.loads(text)) if path.suffix == ".json" else _of_lines(text.splitlines())
        packages: dict[str, Version] = {
            canonicalize_name(name): Version(Version(is_at).public) for name, is_at in found
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"{path} is neither an SBOM nor a constraints file: {error}") from None
    if not packages:
        raise UnusableError(f"{path} names no package")
    return packages


def _of_an_sbom(sbom: Mapping[str, Any]) -> list[tuple[str, str]]:
    components = sbom["components"]
    return [(one["name"], one["version"]) for one in components if one.get("purl", "").startswith("pkg:pypi/")]


def _of_lines(lines: Iterable[str]) -> list[tuple[str, str]]:
    pairs = (line.partition("#")[0].partition(";")[0].split()[:1] for line in lines)
    return [(name, version) for pair in pairs if pair for name, _, version in [pair[0].partition("==")] if version]


def read_database(path: Path) -> Iterator[dict[str, Any]]:
    """Every entry that has not been withdrawn.

    Raises:
        UnusableError: There is none, or it cannot be read.
    """
    empty = True
    for name, content in _files(path):
        try:
            entry = json.loads(content)
            datetime.fromisoformat(entry["modified"])
        except (ValueError, KeyError, TypeError):
            raise UnusableError(f"{name} in {path} is no entry of the OSV database") from None
        if "withdrawn" not in entry:
            empty = False
            yield entry
    if empty:
        raise UnusableError(f"{path} has no entries: give OSV's all.zip, or the folder that it unpacks to")


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                yield file.name, file.read_bytes()
            return
        with ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    yield name, archive.read(name)
    except (OSError, BadZipFile) as error:
        raise UnusableError(f"{path} cannot be read: {error}") from None


def look_up(packages: Mapping[str, Version], entries: Iterable[Mapping[str, Any]]) -> list[Advisory]:
    """What is known of the installed versions, by package.

    Source:
        The OSV schema, https://ossf.github.io/osv-schema: "Evaluation".
    """
    found = []
    for entry in entries:
        for affected in entry.get("affected", ()):
            package = affected.get("package", {})
            version = packages.get(canonicalize_name(package.get("name", "")))
            if package.get("ecosystem") != "PyPI" or version is None or not is_affected(version, affected):
                continue
            names = (entry["id"], *entry.get("aliases", ()))
            lines = str(entry.get("summary") or entry.get("details") or "no summary").strip().splitlines()
            about = f"{package['name']} {version}"
            found.append(Advisory(about, names, tuple(_fixes(version, affected)), lines[0][:200]))
    return sorted(set(found))


def is_affected(version: Version, affected: Mapping[str, Any]) -> bool:
    """Whether an entry lists a version, or has it in one of its ranges."""
    if any(_version(one) == version for one in affected.get("versions", ())):
        return True
    return any(_within(version, one["events"]) for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM")


def _within(version: Version, events: Iterable[Mapping[str, str]]) -> bool:
    """Introduced at or below it, and neither mended nor last affected before it; the newest event counts."""
    inside = False
    for kind, at in sorted(((kind, at) for event in events for kind, at in event.items()), key=lambda one: _at(one[1])):
        if kind == "introduced" and version >= _at(at):
            inside = True
        elif (kind == "fixed" and version >= _at(at)) or (kind == "last_affected" and version > _at(at)):
            inside = False
    return inside


def _fixes(version: Version, affected: Mapping[str, Any]) -> list[str]:
    events = (event for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM" for event in one["events"])
    fixes = {event["fixed"] for event in events if "fixed" in event and _at(event["fixed"]) > version}
    return sorted(fixes, key=_at)


def _at(text: str) -> Version:
    """A version of an event: ``0`` is before all. One that is none of Python's comes last, so that it mends nothing."""
    return Version("0.dev0") if text == "0" else _version(text) or Version(f"{10**9}!0")


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


if __name__ == "__main__":
    sys.exit(main())
