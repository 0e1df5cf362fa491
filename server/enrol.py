"""Who is let into the consortium: requests are checked, staged in an unsigned roster, signed elsewhere, handed out.

The root key signs and does nothing else, so it may live on a machine without a network: carry ``roster.next.json``
there and ``roster.json`` back.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509 import load_pem_x509_certificate
from pydantic import ValidationError

from server.expiry import CERTIFICATES, ISSUED
from server.members import signed_roster
from server.pki import Authority
from server.roles import STAFF
from server.settings import Settings, read_settings
from shared_models.config import explain
from shared_models.control.access import read_access
from shared_models.enrolment import (
    Kit,
    Request,
    certificate_digest,
    check_rotation,
    key_digest,
    read_document,
    read_request,
    written,
)
from shared_models.errors import (
    ConfigError,
    MalformedRosterError,
    OlderRosterError,
    RequestError,
    UnsupportedRosterError,
)
from shared_models.identity import create_key, fingerprint, public_bytes
from shared_models.roster import Coordinator, Member, SignedRoster, UnsignedRoster, sign_roster, verify_roster
from shared_models.versions import refuse_version

SIGNED, STAGED = "roster.json", "roster.next.json"
ANY_ADDRESS = frozenset({"0.0.0.0", "::", "[::]"})  # noqa: S104 - compared with, not listened on
AUTHORITY_VALID_FOR = timedelta(days=3650)
MEMBER_VALID_FOR = timedelta(days=730)


def init(folder: Path, *, consortium: str, name: str, address: str, state: str = "state") -> str:
    """Make a coordinator's folder: root key, TLS authority, server certificate, settings, and an empty staged roster.

    Args:
        folder: Where; made if missing.
        consortium: Its name.
        name: The coordinator's name.
        address: ``host:port`` by which hospitals reach it; the certificate is for this host.
        state: Folder of studies; relative to this one, or absolute.

    Returns:
        The root key's fingerprint.

    Raises:
        ConfigError: There is a coordinator in the folder already, or the address is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"the address must be host:port, not {address!r}", hint="As hospitals will dial it.")
    settings_file = folder / "coordinator.toml"
    if settings_file.exists():
        raise ConfigError(f"{settings_file} exists already", hint="Nothing is overwritten: choose an empty folder.")
    (folder / "root").mkdir(parents=True, exist_ok=True, mode=0o700)
    root = create_key(folder / "root" / "root.key")
    (folder / "root.pub").write_text(public_bytes(root).hex() + "\n", encoding="ascii")
    authority = Authority(folder / "authority", valid_for=AUTHORITY_VALID_FOR)
    authority.save_key(folder / "authority" / "ca.key")
    hosts = dict.fromkeys((host.strip("[]"), "localhost", "127.0.0.1"))  # operators may call from this machine
    authority.issue(folder, "coordinator", hosts=list(hosts))
    certificate = load_pem_x509_certificate(authority.certificate.read_bytes())
    empty = UnsignedRoster(
        consortium=consortium,
        version=1,
        coordinator=Coordinator(name=name, address=address, authority=certificate_digest(certificate)),
        members=(),
        root_fingerprint=fingerprint(public_bytes(root)),
    )
    (folder / STAGED).write_bytes(written(empty))
    settings_file.write_text(tomli_w.dumps(_settings(int(port), state)), encoding="utf-8")
    read_settings(settings_file)
    return empty.root_fingerprint


def enrol(settings: Settings, request_file: Path, *, confirm: Callable[[Request], bool]) -> UnsignedRoster:
    """Check a request, issue the hospital's TLS certificate, and stage the roster that has it in it.

    A member's request, signed by the identity key on the roster, puts its new keys in the place of the old ones and
    renews its validity.

    Args:
        settings: The coordinator's.
        request_file: From the hospital.
        confirm: Whether the request's fingerprint is the one that the hospital read out on the telephone.

    Raises:
        RequestError: The request is malformed or forged, was not confirmed, or its name is taken or was revoked.
    """
    request = read_request(read_document(request_file))
    if not confirm(request):
        raise RequestError(
            f"the fingerprint of {request.name} was not confirmed; nothing was changed",
            hint="Call the hospital, and compare every digit.",
        )
    staged = next_roster(settings)
    known = staged.member(request.name)
    if known is not None:
        if known.revoked:
            raise RequestError(f"{request.name} was revoked", hint="Names are never used again: choose another.")
        check_rotation(request, known)
    now = int(time.time())
    member = Member(
        **request.model_dump(include=_SHARED),
        tls_key=key_digest(request.tls_key()),
        valid_from=now - 3600,  # clocks differ
        valid_until=now + int(MEMBER_VALID_FOR.total_seconds()),
    )
    certificate = _authority(settings).certify(request.tls_key(), request.name)
    folder = settings.roster.with_name(CERTIFICATES)
    folder.mkdir(exist_ok=True)
    (folder / f"{request.name}.pem").write_bytes(certificate)
    others = tuple(m for m in staged.members if m.name != request.name)
    return stage(settings, staged.model_copy(update={"members": (*others, member)}))


def revoke(settings: Settings, name: str) -> UnsignedRoster:
    """Stage a roster in which a hospital is turned out.

    Raises:
        RequestError: There is no such hospital.
    """
    staged = next_roster(settings)
    if staged.member(name) is None:
        raise RequestError(f"{name} is not on the roster", hint="See konsil-coordinator roster.")
    members = [m.model_copy(update={"revoked": True}) if m.name == name else m for m in staged.members]
    return stage(settings, staged.model_copy(update={"members": tuple(members)}))


def sign(staged_file: Path, root: Ed25519PrivateKey) -> tuple[Path, SignedRoster]:
    """Sign a staged roster, and write ``roster.json`` beside it. Needs nothing but this file and the root key.

    Raises:
        MalformedRosterError: It is no roster.
        OlderRosterError: The roster beside it is as new: the root key signs one list per version.
        RosterError: It is of another root key, or two members share a name or a key.
    """
    staged, target = read_staged(staged_file), staged_file.with_name(SIGNED)
    if target.exists():
        before = verify_roster(target.read_bytes(), public_bytes(root))
        if before.version >= staged.version:
            raise OlderRosterError(
                f"version {before.version} is signed already, and this is version {staged.version}",
                hint="Enrol or revoke first; that stages the next version.",
            )
    signed = sign_roster(root, staged)
    target.write_bytes(written(signed))
    return target, signed


def write_kits(settings: Settings) -> Iterator[Path]:
    """Write a kit for every hospital that is a member now: ``NAME.kit.json`` in ``kits`` beside the roster.

    Raises:
        RosterError: The signed roster is refused.
    """
    signed = signed_roster(settings)
    folder = settings.roster.with_name("kits")
    folder.mkdir(exist_ok=True)
    for member in signed.members:
        certificate = settings.roster.with_name(CERTIFICATES) / f"{member.name}.pem"
        if not member.valid(time.time()):
            continue
        kit = Kit(
            name=member.name,
            roster=signed.model_dump(mode="json"),
            root=settings.root.read_text("ascii").strip(),
            authority=settings.tls.ca.read_text("ascii"),
            certificate=read_document(certificate).decode("ascii"),
        )
        path = folder / f"{member.name}.kit.json"
        path.write_bytes(written(kit))
        yield path


def issue(settings: Settings, name: str, role: str, folder: Path, *, valid_for: timedelta, connect: str | None) -> Path:
    """Make a key and a certificate for a person or a program that calls the control service, and ``ROLE.toml``.

    Args:
        settings: The coordinator's.
        name: Whose; it is in the audit log with every call.
        role: What it may do, see ``roles.py``.
        folder: Where; made if missing.
        valid_for: How long.
        connect: ``host:port`` by which the service is reached from there; this machine's if None.

    Returns:
        That file.

    Raises:
        ConfigError: Name or role is none, or there is something in the folder already.
    """
    if role not in STAFF:
        raise ConfigError(f"there is no role {role}", hint=f"Choose one of {', '.join(STAFF)}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name):
        raise ConfigError(f"{name!r} is no name", hint="a-z, 0-9, -; at most 64 characters.")
    file = folder / f"{role}.toml"
    if any((folder / taken).exists() for taken in (file.name, "tls.key", "tls.pem", "ca.pem")):
        raise ConfigError(f"{folder} holds a certificate already", hint="Nothing is overwritten: choose another.")
    _authority(settings, valid_for).issue(folder, name, role=role)
    kept = settings.roster.with_name(ISSUED)  # to be warned of its end, and to be withdrawn without its holder
    kept.mkdir(exist_ok=True)
    (kept / f"{role}-{name}.pem").write_bytes((folder / "tls.pem").read_bytes())
    (folder / "ca.pem").write_bytes(settings.tls.ca.read_bytes())
    host = settings.control.host
    near = f"{'localhost' if host in ANY_ADDRESS else host}:{settings.control.port}"
    fields = {"connect": connect or near, "ca": "ca.pem", "certificate": "tls.pem", "key": "tls.key"}
    file.write_text(tomli_w.dumps(fields), encoding="utf-8")
    read_access(file)
    return file


def read_staged(path: Path) -> UnsignedRoster:
    """Read an unsigned roster.

    Raises:
        MalformedRosterError: It is something else.
    """
    try:
        return UnsignedRoster.model_validate_json(read_document(path))
    except ValidationError as error:
        refuse_version(error, str(path), UnsupportedRosterError)
        raise MalformedRosterError(
            f"{path} is no staged roster: {explain(error)}", hint="It is the file that enrol or revoke wrote."
        ) from None


_SHARED = {"name", "display_name", "identity", "node_key", "public_size", "ledger_genesis"}


def next_roster(settings: Settings) -> UnsignedRoster:
    """The roster to change: what is staged and not signed yet, else the signed one with the next version."""
    staged = settings.roster.with_name(STAGED)
    signed = signed_roster(settings) if settings.roster.exists() else None
    if staged.exists():
        found = read_staged(staged)
        if signed is None or found.version > signed.version:
            return found
    if signed is None:
        raise RequestError("there is no roster to add to", hint="Begin with konsil-coordinator init.")
    fields = signed.model_dump(mode="json", exclude={"signature"})
    return UnsignedRoster.model_validate_json(json.dumps({**fields, "version": signed.version + 1}))


def stage(settings: Settings, roster: UnsignedRoster) -> UnsignedRoster:
    """Write the roster that is to be signed next."""
    settings.roster.with_name(STAGED).write_bytes(written(roster))
    return roster


def _authority(settings: Settings, valid_for: timedelta = MEMBER_VALID_FOR) -> Authority:
    if settings.tls.authority_key is None:
        raise ConfigError("tls.authority_key is not set", hint="Name the TLS authority's key in coordinator.toml.")
    return Authority.load(settings.tls.ca, settings.tls.authority_key, valid_for=valid_for)


def _settings(port: int, state: str) -> dict[str, object]:
    return {
        "host": "0.0.0.0",  # noqa: S104 - hospitals dial in; who they are, TLS and the roster decide
        "port": port,
        "state": state,
        "roster": SIGNED,
        "root": "root.pub",
        "tls": {
            "ca": "authority/ca.pem",
            "certificate": "tls.pem",
            "key": "tls.key",
            "authority_key": "authority/ca.key",
        },
    }
