"""Fetching evidence from a coordinator, into a folder that ``verify`` reads; the coordinator is not believed.

Names come from the other side, so they are checked before they become paths. What was fetched before is compared with
what comes now: a coordinator's records only ever grow.
"""

import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from auditor.findings import COORDINATOR, Finding
from shared_models.control.deposits import BUNDLE, CHECKPOINTS, bundle_name
from shared_models.errors import EvidenceError, TransferError
from shared_models.privacy.evidence import read_manifest

if TYPE_CHECKING:
    from shared_models.control.connection import ControlConnection

AUDIT_LOG, ROSTER = "audit-log.jsonl", "roster.json"
EVIDENCE = ("receipts.jsonl", "sums.jsonl")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_BLOCK = tarfile.BLOCKSIZE


@dataclass
class Fetched:
    """What is in the folder now.

    Attributes:
        studies: Their folders.
        bundles: The newest of each hospital.
        findings: What is wrong with what came.
    """

    studies: list[Path] = field(default_factory=list)
    bundles: dict[str, Path] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def fetch(
    connection: "ControlConnection",
    folder: Path,
    studies: Collection[str] | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Fetched:
    """Fetch roster, audit log, studies' evidence, and what hospitals have left.

    Guarantees:
        * Every file is as the coordinator sent it, by its SHA-256, or as it was before.
        * Cut off anywhere, the same call again goes on with what is there; bundles that are there are not sent again.
        * Nothing is written outside of the folder, whatever names the other side gives.
        * Where something that only grows was rewritten, there is a finding, and both versions are kept.

    Args:
        connection: With an auditor's certificate.
        folder: Where to; made if missing.
        studies: Only these; all where it is None.
        say: Is told what was fetched, a line each.

    Raises:
        TransferError: A transfer was cut off or damaged, or the folder cannot be written.
        FederationError: There is no such study; the caller may not; no connection.
    """
    done = Fetched()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        connection.fetch_roster(folder / ROSTER)
        say(f"{ROSTER}: {(folder / ROSTER).stat().st_size} bytes")
        fresh = folder / f"{AUDIT_LOG}.fetched"
        connection.fetch_audit(fresh)
        _grown(folder / AUDIT_LOG, fresh, done, head_lines=1)
        say(f"{AUDIT_LOG}: {(folder / AUDIT_LOG).stat().st_size} bytes")
        for study in _named(study["name"] for study in connection.all()) if studies is None else studies:
            done.studies.append(_fetch_study(connection, folder / "studies", _checked(study), done))
            say(f"studies/{study}: " + ", ".join(f"{n}, {_size(done.studies[-1] / n)} bytes" for n in EVIDENCE))
        _fetch_deposits(connection, folder / "hospitals", done, say)
    except OSError as error:
        raise TransferError(f"{folder} cannot be written: {error.strerror}", hint="Choose another folder.") from None
    return done


def _fetch_study(connection: "ControlConnection", folder: Path, study: str, done: Fetched) -> Path:
    target, tar = folder / study, folder / f"{study}.tar"
    target.mkdir(parents=True, exist_ok=True)
    connection.fetch_evidence(study, tar)
    with tar.open("rb") as file:
        for name in EVIDENCE:
            fresh = target / f"{name}.fetched"
            _unpack(file, f"{study}/{name}", fresh)
            _grown(target / name, fresh, done, study=study)
        if file.read(_BLOCK).strip(b"\0"):
            raise _no_evidence(study, "it holds more files than it may")
    tar.unlink()
    return target


def _unpack(file: BinaryIO, name: str, target: Path) -> None:
    """The next file of a tar, which must have this very name.

    Only the plain header that coordinators write is read, by hand: none of the formats' extensions, no links, and no
    path of the other side's choosing.

    Raises:
        TransferError: It is something else.
    """
    study = name.partition("/")[0]
    try:
        header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise _no_evidence(study, str(error)) from None
    if header.name != name or header.type != tarfile.REGTYPE or header.size < 0:
        raise _no_evidence(study, f"it holds {header.name[:80]!r} where {name} should be")
    left = header.size
    with target.open("wb") as out:
        while left:
            data = file.read(min(left, 1 << 20))
            if not data:
                raise _no_evidence(study, f"it ends within {name}")
            out.write(data)
            left -= len(data)
    file.read(-header.size % _BLOCK)


def _fetch_deposits(connection: "ControlConnection", folder: Path, done: Fetched, say: Callable[[str], None]) -> None:
    newest: dict[str, str] = {}
    for listed in connection.deposits():
        home = folder / _checked(listed.hospital)
        home.mkdir(parents=True, exist_ok=True)
        if listed.name == CHECKPOINTS:
            fresh = home / f"{CHECKPOINTS}.fetched"
            connection.fetch_deposit(listed.hospital, listed.name, fresh)
            _grown(home / CHECKPOINTS, fresh, done)
            say(f"hospitals/{listed.hospital}/{CHECKPOINTS}: {_size(home / CHECKPOINTS)} bytes")
            continue
        if not BUNDLE.fullmatch(listed.name):
            raise TransferError(f"{listed.hospital} has left {listed.name[:80]!r}", hint="It is not what is left here.")
        path = home / listed.name
        there = path.exists()
        if not there:
            _fetch_bundle(connection, listed.hospital, path)
        try:
            manifest = read_manifest(path)
        except EvidenceError as error:
            done.findings.append(Finding(code="deposit-foreign", party=listed.hospital, what=str(error)))
            continue
        if manifest.hospital != listed.hospital:
            text = f"{path.name}, handed out as {listed.hospital}'s, says that it is {manifest.hospital}'s"
            done.findings.append(Finding(code="deposit-foreign", party=listed.hospital, what=text))
        elif newest.get(listed.hospital, "") <= manifest.time:
            newest[listed.hospital], done.bundles[listed.hospital] = manifest.time, path
        word = "was there already" if there else f"{_size(path)} bytes"
        say(f"hospitals/{listed.hospital}/{listed.name[:19]}….zip: packed {manifest.time}, {word}")


def _fetch_bundle(connection: "ControlConnection", hospital: str, path: Path) -> None:
    fresh = path.with_name(f"{path.name}.fetched")
    digest = connection.fetch_deposit(hospital, path.name, fresh)
    if bundle_name(digest) != path.name:
        fresh.unlink()
        raise TransferError(f"{path.name} of {hospital} has another digest, {digest[:16]}…", hint="Fetch it again.")
    fresh.replace(path)


def _grown(path: Path, fresh: Path, done: Fetched, *, study: str | None = None, head_lines: int = 0) -> None:
    """Put a file that only grows in the place of what was fetched before, which must be its beginning.

    Args:
        path: Where the one before lies, if there is one.
        fresh: What came now.
        done: Gets the finding.
        study: Whose.
        head_lines: Lines at the end that are not part of what grows.
    """
    if path.exists() and not _begins(path, fresh, head_lines):
        number = 1
        while (kept := path.with_name(f"{path.name}.before-{number}")).exists():
            number += 1
        path.rename(kept)
        text = f"{path.name} is no continuation of what was fetched before, which is kept as {kept.name}"
        party = path.parent.name if path.name == CHECKPOINTS else COORDINATOR
        done.findings.append(Finding(code="evidence-rewritten", party=party, what=text, study=study))
    fresh.replace(path)


def _begins(path: Path, fresh: Path, head_lines: int) -> bool:
    """Whether one file is the beginning of another, but for some lines at its end."""
    left = _size(path)
    if head_lines:
        left -= len(_last_line(path))
    with path.open("rb") as old, fresh.open("rb") as new:
        while left > 0:
            data = old.read(min(left, 1 << 20))
            if not data or new.read(len(data)) != data:
                return False
            left -= len(data)
    return True


def _last_line(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, _size(path) - 65_536))
        return (file.read().splitlines(keepends=True) or [b""])[-1]


def _named(names: Iterator[str]) -> Iterator[str]:
    return (_checked(name) for name in names)


def _checked(name: str) -> str:
    """A name from the other side that may become part of a path.

    Raises:
        TransferError: It may not.
    """
    if not _NAME.fullmatch(name):
        raise TransferError(f"{name[:80]!r} is no name of a study or a hospital", hint="The coordinator is broken.")
    return name


def _size(path: Path) -> int:
    return path.stat().st_size


def _no_evidence(study: str, why: str) -> TransferError:
    return TransferError(f"the evidence of {study} is no archive of a coordinator's: {why}", hint="Fetch it again.")
