"""What a machine must have for a daemon to run for years, looked at from the outside; the same at both sides."""

import errno
import json
import os
import shutil
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from shared_models.certificates import Expiry
from shared_models.errors import FederationError
from shared_models.phrase import Phrase

Status = Literal["ok", "warn", "fail"]
Of = TypeVar("Of")  # settings of a hospital or a coordinator

LITTLE_ROOM_MB, NO_ROOM_MB = 1024, 64
MOST_SKEW_S, SOME_SKEW_S = 300.0, 30.0  # Flower's node authentication takes no signature that is five minutes old
TIMEOUT_S = 5.0


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: Which, in one word or two.
        status: ``fail``: the daemon does not, or soon will not, work. ``warn``: somebody should act.
        text: What was found, on one line, without a record's content and without a secret.
        advice: What to do about it; empty if nothing.
        code: Of the error that the text is of; empty if it is of none. Such a text is for a terminal only, because it
            may quote what somebody else wrote.
    """

    check: str
    status: Status
    text: str
    advice: str = ""
    code: str = ""


def look(checks: Sequence[Callable[[Of], Iterator[Finding]]], settings: Of) -> list[Finding]:
    """What all checks find; what is wrong with one thing keeps nobody from looking at the next.

    A check is named by its function.
    """
    return [finding for check in checks for finding in _guarded(check, settings)]


def _guarded(check: Callable[[Of], Iterator[Finding]], settings: Of) -> Iterator[Finding]:
    name = check.__name__.strip("_").replace("tls", "TLS")
    try:
        yield from check(settings)
    except FederationError as error:
        yield Finding(name, "fail", str(error), error.hint, error.code)
    except OSError as error:
        text = f"{error.filename or 'a file'}: {error.strerror}"
        yield Finding(name, "fail", text, Phrase("Check file and disk."), "unreadable")


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.status != "fail" for finding in findings)


def in_words(findings: Iterable[Finding], *, as_json: bool) -> str:
    """One line per finding, or a list of JSON objects."""
    if as_json:
        return json.dumps([finding._asdict() for finding in findings], indent=2)
    return "\n".join(f"{f.status:<5} {f.check:<13} {f.text}{f' -> {f.advice}' if f.advice else ''}" for f in findings)


def versions(packages: Sequence[str]) -> Finding:
    """The installed versions; those of Konsil and Python first."""
    found, missing = [f"Python {sys.version.split()[0]}"], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        text = Phrase("not installed: {packages}", packages=", ".join(missing))
        return Finding("versions", "fail", text, Phrase("Install this release again."))
    return Finding("versions", "ok", ", ".join(found))


def entropy() -> Finding:
    """Whether the kernel's generator, which keys and noise come from, has been seeded."""
    try:
        os.getrandom(32, os.GRND_NONBLOCK)
    except BlockingIOError:
        text = Phrase("the kernel's generator is not seeded yet")
        return Finding("entropy", "fail", text, Phrase("Wait; or add a source of it."))
    return Finding("entropy", "ok", Phrase("the kernel's generator is seeded"))


def room(folder: Path) -> Finding:
    """Whether a folder can be written, and how much its disk takes."""
    there = folder
    while not there.exists():  # it is made at first use
        there = there.parent
    probe = there / f".room-{os.getpid()}"
    try:
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        text = Phrase("{folder} cannot be written: {why}", folder=there, why=error.strerror)
        return Finding("disk", "fail", text, Phrase("Make room, or mount it writable."))
    finally:
        probe.unlink(missing_ok=True)
    free_mb = shutil.disk_usage(there).free // 2**20
    text = Phrase("{free} MB free at {folder}", free=free_mb, folder=there)
    if free_mb < NO_ROOM_MB:
        return Finding("disk", "fail", text, Phrase("Make room: on a full disk the daemon stops."))
    if free_mb < LITTLE_ROOM_MB:
        return Finding("disk", "warn", text, Phrase("Make room: {least} MB or more.", least=LITTLE_ROOM_MB))
    return Finding("disk", "ok", text)


def private(files: Iterable[Path]) -> Finding:
    """Whether secrets are their owner's alone, and readable to this process; what is not there is passed by."""
    seen = 0
    for file in files:
        try:
            mode = file.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            text = Phrase("{file}: {why}", file=file, why=error.strerror)
            return Finding("permissions", "fail", text, Phrase("Run this as the daemon's user."))
        if stat.S_IMODE(mode) & 0o077:
            text = Phrase("{file} is open to others", file=file)
            return Finding("permissions", "fail", text, Phrase("Run: {command}", command=f"chmod go= {file}"))
        if not os.access(file, os.R_OK):
            text = Phrase("{file} cannot be read", file=file)
            return Finding("permissions", "fail", text, Phrase("Run this as the daemon's user."))
        seen += 1
    return Finding("permissions", "ok", Phrase("{count} secrets are their owner's alone", count=seen))


def owned(folder: Path, files: Iterable[Path]) -> Finding:
    """Whether files belong to the user that the daemon's folder belongs to: a command that root gave makes root's."""
    if not folder.exists():
        return Finding("owner", "ok", Phrase("{folder} is made at the first start", folder=folder))
    user = folder.stat().st_uid
    for file in files:
        if file.exists() and file.stat().st_uid != user:
            text = Phrase(
                "{file} belongs to user {other}, and {folder} to {user}",
                file=file,
                other=file.stat().st_uid,
                folder=folder,
                user=user,
            )
            command = f"chown --reference={folder} {file}"
            advice = Phrase("Run: {command}; give commands as that user.", command=command)
            return Finding("owner", "fail", text, advice)
    return Finding("owner", "ok", Phrase("all belongs to user {user}", user=user))


def expiring(expiries: Iterable[Expiry]) -> list[Finding]:
    """One finding per certificate and membership; see ``certificates.py``."""
    now = datetime.now(UTC)
    found = []
    for expiry in expiries:
        status: Status = "fail" if expiry.over(now) else "warn" if expiry.soon(now) else "ok"
        found.append(Finding("expiry", status, expiry.text(now), "" if status == "ok" else expiry.renewal))
    return found


def reach(check: str, address: str) -> Finding:
    """Whether anybody listens at ``host:port``; nothing is said there."""
    try:
        socket.create_connection(_split(address), TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        text = Phrase("{address} cannot be reached: {why}", address=address, why=why)
        advice = Phrase("Is it up? Does the firewall let this machine dial out to it?")
        return Finding(check, "fail", text, advice)
    return Finding(check, "ok", Phrase("{address} answers", address=address))


def listening(check: str, host: str, port: int) -> Finding:
    """Whether a port is served, or free to be."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Finding(check, "ok", Phrase("{host}:{port} is served", host=host, port=port))
        text = Phrase("{host}:{port}: {why}", host=host, port=port, why=error.strerror)
        return Finding(check, "fail", text, Phrase("Choose an address of this machine."))
    return Finding(check, "ok", Phrase("{host}:{port} is free", host=host, port=port))


def ask(address: str, context: ssl.SSLContext) -> list[Finding]:
    """Ask an HTTPS server for anything, as a client of the consortium: is it trusted, and of one time with us?

    Any answer will do, and a refusal is one. Its ``Date`` is held against this machine's clock.

    Args:
        address: ``host:port``, where somebody listens.
        context: This side's certificate, and the authority that it trusts.
    """
    host, port = _split(address)
    connection = HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        connection.connect()
        until = _until(connection)
        connection.request("GET", "/")
        date = connection.getresponse().headers["Date"]
    except ssl.SSLCertVerificationError as error:
        text = Phrase("its certificate is not trusted: {why}", why=error.verify_message)
        advice = Phrase("Expired, of another host or authority; or this machine's clock is wrong. Call its operators.")
        return [Finding("TLS", "fail", text, advice)]
    except (OSError, HTTPException) as error:
        text = Phrase("the connection was ended: {why}", why=type(error).__name__)
        advice = Phrase("It refuses this certificate; or something in between ends the connection. Call its operators.")
        return [Finding("TLS", "fail", text, advice)]
    finally:
        connection.close()
    day = f"{until:%Y-%m-%d}"
    trusted = Phrase("TLS 1.3, both sides proven; its certificate is valid until {day}", day=day)
    return [Finding("TLS", "ok", trusted), _clock(date)]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _until(connection: HTTPSConnection) -> datetime:
    certificate = connection.sock.getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)


def _clock(date: str | None) -> Finding:
    try:
        ahead = datetime.now(UTC) - parsedate_to_datetime(date or "")
    except (ValueError, TypeError, OverflowError):  # none, or what no clock says
        text = Phrase("the other side does not say what time it is")
        return Finding("clock", "warn", text, Phrase("Compare the clocks by hand."))
    text = _apart(ahead.total_seconds())
    if not abs(ahead.total_seconds()) < MOST_SKEW_S:
        advice = Phrase("Set the clock that is wrong, by NTP: signatures last five minutes.")
        return Finding("clock", "fail", text, advice)
    if not abs(ahead.total_seconds()) < SOME_SKEW_S:
        return Finding("clock", "warn", text, Phrase("Keep both clocks by NTP."))
    agree = Phrase("this clock and the coordinator's agree to {count:.0f} s", count=abs(ahead.total_seconds()))
    return Finding("clock", "ok", agree)


def _apart(seconds: float) -> Phrase:
    if seconds > 0:
        return Phrase("this clock is {count:.0f} s ahead of the coordinator's", count=seconds)
    return Phrase("this clock is {count:.0f} s behind the coordinator's", count=-seconds)
