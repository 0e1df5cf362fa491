"""Who may call what of the control service: a role in a certificate that the authority signed, and one table.

The authority puts a person's or program's role into the certificate, as the URI ``konsil:role/ROLE``. A certificate
without one is a hospital's, and counts as long as the signed roster has that hospital, with that key.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.members import signed_roster
from server.pki import ROLE_URI
from server.settings import Settings
from shared_models.durable import file_state, replace_file
from shared_models.errors import ConfigError, FederationError, NotAllowedError
from shared_models.plan import StudyPlan
from shared_models.roster import Member

T = TypeVar("T")

log = logging.getLogger("konsil.control")

WITHDRAWN = "withdrawn.txt"  # beside the roster: one digest of a key per line


class Role(StrEnum):
    """What a certificate makes its holder."""

    OPERATOR = "operator"
    """Submits, pauses, resumes and stops studies, and fetches their models."""
    AUDITOR = "auditor"
    """Reads everything that is evidence, and changes nothing; gets no model."""
    HOSPITAL = "hospital"
    """Looks at the studies that it is part of, and at nothing of another hospital's; leaves evidence of its own."""
    VIEWER = "viewer"
    """Looks at studies."""


STAFF = (Role.OPERATOR, Role.AUDITOR, Role.VIEWER)  # roles that the authority puts into certificates

_ANYBODY = frozenset(Role)
_READING = frozenset({Role.OPERATOR, Role.AUDITOR})
_ONLY_OPERATORS = frozenset({Role.OPERATOR})
_ONLY_AUDITORS = frozenset({Role.AUDITOR})

# Least privilege, and the whole of it: what is not here is refused to everybody.
ALLOWED: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        "Control/Submit": _ONLY_OPERATORS,
        "Control/List": _ANYBODY,
        "Control/Show": _ANYBODY,
        "Control/Watch": _ANYBODY,
        "Control/Pause": _ONLY_OPERATORS,
        "Control/Resume": _ONLY_OPERATORS,
        "Control/Stop": _ONLY_OPERATORS,
        "Control/Model": _ONLY_OPERATORS,
        "Control/Evidence": _READING,
        "Control/Audit": _ONLY_AUDITORS,  # who is watched does not choose when the log is looked at
        "Control/Roster": _ONLY_AUDITORS,
        "Control/Deposit": frozenset({Role.HOSPITAL}),
        "Control/Deposits": _ONLY_AUDITORS,
        "Control/FetchDeposit": _ONLY_AUDITORS,
        "Control/Checkpoints": _ONLY_AUDITORS,
        "Health/Check": _ANYBODY,
        "Health/Watch": _ANYBODY,
        "ServerReflection/ServerReflectionInfo": _ANYBODY,
    }
)


@dataclass(frozen=True)
class Caller:
    """Who is calling, by its certificate.

    Attributes:
        name: The certificate's common name.
        role: What it makes its holder; None for nothing, and then ``problem`` says why.
        key: SHA-256 of the SubjectPublicKeyInfo of its key, in hexadecimal.
        until: When the certificate runs out.
    """

    name: str
    role: Role | None
    key: str
    until: datetime
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.role or 'nobody'} {self.name}"


class Doorman:
    """Reads certificates, whose chain and signature TLS has checked already, in the light of roster and withdrawals.

    Both files are read again when they change. Safe to use from one thread at a time.
    """

    def __init__(self, settings: Settings) -> None:
        self._members = _Reread[dict[str, Member]](
            settings.roster, lambda: {member.name: member for member in signed_roster(settings).members}
        )
        withdrawn = settings.roster.with_name(WITHDRAWN)
        self._withdrawn = _Reread[frozenset[str]](withdrawn, lambda: frozenset(withdrawn_keys(withdrawn)))

    def identify(self, certificate: bytes) -> Caller:
        """Who a certificate (PEM) makes its holder.

        Raises:
            RosterError: The roster is refused: no hospital can be told from a stranger.
        """
        found = x509.load_pem_x509_certificate(certificate)
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(names[0].value) if len(names) == 1 else ""
        key = found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        caller = Caller(name[:100], None, hashlib.sha256(key).hexdigest(), found.not_valid_after_utc)
        try:
            caller = replace(caller, role=_role(found))
        except ValueError as error:
            return replace(caller, problem=str(error))
        problem = self.problem_with(caller)
        return replace(caller, role=None, problem=problem) if problem else caller

    def problem_with(self, caller: Caller) -> str:
        """Why a certificate counts no longer, empty if it does; asked again while a call goes on.

        Raises:
            RosterError: The roster is refused.
        """
        if datetime.now(UTC) >= caller.until:
            return "the certificate has run out"
        if caller.key in self._withdrawn.value():
            return "the certificate was withdrawn"
        if caller.role is not Role.HOSPITAL:
            return ""
        member = self._members.value().get(caller.name)
        if member is None or not member.valid(time.time()):
            return "no hospital of this name is on the roster now"
        return "" if member.tls_key == caller.key else "the roster has another TLS key for this hospital"

    def identity(self, caller: Caller) -> bytes:
        """A hospital's public identity key, by the roster.

        Raises:
            NotAllowedError: The roster has it no longer.
            RosterError: The roster is refused.
        """
        member = self._members.value().get(caller.name)
        if member is None:
            raise NotAllowedError(f"{caller.name} is not on the roster", hint=_ASK)
        return bytes.fromhex(member.identity)


def check_allowed(caller: Caller, call: str) -> None:
    """Whether a caller's role may make a call.

    Raises:
        NotAllowedError: It may not; nor may anybody make a call that is not in the table.
    """
    if caller.role is None:
        raise NotAllowedError(f"this certificate ({caller.name}) is no good here: {caller.problem}", hint=_ASK)
    if caller.role not in ALLOWED.get(call, frozenset()):
        raise NotAllowedError(f"{caller.role} {caller.name} may not call {call}", hint=_ASK)


def takes_part(caller: Caller, plan: StudyPlan) -> bool:
    """Whether a study concerns a caller: a hospital sees its own ones, everybody else all."""
    return caller.role is not Role.HOSPITAL or plan.hospitals is None or caller.name in plan.hospitals


def withdraw(settings: Settings, certificate: Path) -> str:
    """Make the service refuse a certificate from now on; a key that was withdrawn never comes back.

    Returns:
        Whose it is.

    Raises:
        ConfigError: The file is no certificate.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate} is no certificate: {error}", hint="Give the PEM file.") from None
    key = found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    path = settings.roster.with_name(WITHDRAWN)
    digests = {*withdrawn_keys(path), hashlib.sha256(key).hexdigest()}
    replace_file(path, "".join(f"{digest}\n" for digest in sorted(digests)).encode())
    return found.subject.rfc4514_string()


_ASK = "Ask the coordinator's operators for a certificate of another role; see the table in docs/coordinator.md."


def _role(certificate: x509.Certificate) -> Role:
    """The one role that a client's certificate carries; a hospital's where it carries none.

    Raises:
        ValueError: It is no client's certificate, or its roles are not exactly one that exists.
    """
    extensions = certificate.extensions
    try:
        usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise ValueError("it is no client's certificate")
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Role.HOSPITAL
    found = [uri.removeprefix(ROLE_URI) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if len(found) != 1 or found[0] not in STAFF:
        raise ValueError("its role is none of operator, auditor, viewer")
    return Role(found[0])


def withdrawn_keys(path: Path) -> Iterator[str]:
    """Digests of the keys whose certificates were withdrawn."""
    if path.exists():
        yield from path.read_text("ascii").split()


class _Reread(Generic[T]):
    """What a file says, read again whenever it is another file, or was written.

    As long as what is there now is refused, or is just being written, what was there before stays in force.
    """

    def __init__(self, path: Path, read: Callable[[], T]) -> None:
        self._path, self._read = path, read
        self._known: tuple[tuple[int, ...], T] | None = None

    def value(self) -> T:
        seen = file_state(self._path)
        if self._known is None or self._known[0] != seen:
            try:
                self._known = seen, self._read()
            except FederationError as error:
                if self._known is None:
                    raise
                log.warning("%s of before stays in force: %s (%s)", self._path.name, error, error.hint)
        return self._known[1]
