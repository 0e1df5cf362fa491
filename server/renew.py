"""New certificates for old: the coordinator's own at once, the authority's once the root key has signed its digest."""

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from server.enrol import AUTHORITY_VALID_FOR, MEMBER_VALID_FOR, next_roster, stage
from server.expiry import CERTIFICATES
from server.members import signed_roster
from server.pki import Authority, pem
from server.settings import Settings
from shared_models.certificates import certificate_end
from shared_models.durable import create_file, replace_file, sync_folder
from shared_models.enrolment import certificate_digest
from shared_models.errors import ConfigError, IdentityError
from shared_models.roster import UnsignedRoster

WAITING = "authority.next"  # beside the roster: the authority that the next roster names


def renew_certificate(settings: Settings, *, new_key: bool, hosts: Sequence[str] = ()) -> datetime:
    """Issue the coordinator's own certificate anew; a coordinator that runs takes it at its next start.

    Args:
        settings: The coordinator's.
        new_key: Make a new key, too. Cut off between the two files, it has to be given again.
        hosts: Names and addresses that it is for; those of the old one unless told otherwise.

    Returns:
        When it expires: with the authority's at the latest.

    Raises:
        ConfigError, IdentityError: A file is missing, or is something else.
    """
    ca, key, certificate = settings.tls.ca, settings.tls.key, settings.tls.certificate
    names = list(hosts) or _hosts(certificate)
    left = certificate_end(ca) - datetime.now(UTC)
    if left <= timedelta():
        raise IdentityError(
            "the authority's certificate has expired", hint="First: konsil-coordinator renew authority."
        )
    own = ec.generate_private_key(ec.SECP256R1()) if new_key else _key(key)
    issued = _authority(settings, min(AUTHORITY_VALID_FOR, left)).certify(own.public_key(), "coordinator", hosts=names)
    if new_key:
        _replace_private(key, pem(own))
    replace_file(certificate, issued)
    return certificate_end(certificate)


def renew_authority(settings: Settings, *, new_key: bool) -> UnsignedRoster:
    """Make the authority's certificate anew, and stage the roster that names it; the old one is in use until ``kits``.

    With its old key, what it has issued stays valid, and hospitals go over one by one. With a new key (the old one is
    known to somebody), every certificate is issued anew by ``kits``, and hospitals cannot connect until they join.

    Raises:
        ConfigError, IdentityError, RosterError: A file is missing, or is something else.
    """
    folder = settings.roster.with_name(WAITING)
    shutil.rmtree(folder, ignore_errors=True)
    if new_key:
        authority = Authority(folder, valid_for=AUTHORITY_VALID_FOR)
        authority.save_key(folder / "ca.key")
    else:
        folder.mkdir()
        (folder / "ca.pem").write_bytes(_authority(settings, AUTHORITY_VALID_FOR).self_signed())
    digest = certificate_digest(_certificate(folder / "ca.pem"))
    roster = next_roster(settings)
    coordinator = roster.coordinator.model_copy(update={"authority": digest})
    return stage(settings, roster.model_copy(update={"coordinator": coordinator}))


def take_over_authority(settings: Settings) -> bool:
    """Put an authority that waits in the place of the old one, if the signed roster names it. Returns whether it does.

    Guarantees:
        * Cut off anywhere, doing it again finishes it.
    """
    folder = settings.roster.with_name(WAITING)
    signed = signed_roster(settings)
    if not (folder / "ca.pem").exists():
        return False
    if certificate_digest(_certificate(folder / "ca.pem")) != signed.coordinator.authority:
        return False
    if (folder / "ca.key").exists():
        authority = Authority.load(folder / "ca.pem", folder / "ca.key", valid_for=MEMBER_VALID_FOR)
        for path in sorted(settings.roster.with_name(CERTIFICATES).glob("*.pem")):
            replace_file(path, authority.certify(_public(path), path.stem))
        own = settings.tls.certificate
        servers = Authority.load(folder / "ca.pem", folder / "ca.key", valid_for=AUTHORITY_VALID_FOR)
        replace_file(own, servers.certify(_public(own), "coordinator", hosts=_hosts(own)))
        _replace_private(_authority_key(settings), (folder / "ca.key").read_bytes())
    replace_file(settings.tls.ca, (folder / "ca.pem").read_bytes())
    shutil.rmtree(folder)
    return True


def _authority(settings: Settings, valid_for: timedelta) -> Authority:
    return Authority.load(settings.tls.ca, _authority_key(settings), valid_for=valid_for)


def _authority_key(settings: Settings) -> Path:
    if settings.tls.authority_key is None:
        raise ConfigError("tls.authority_key is not set", hint="Name the TLS authority's key in coordinator.toml.")
    return settings.tls.authority_key


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"certificate {path} cannot be read: {error}", hint="Check [tls] in the settings."
        ) from None


def _public(path: Path) -> ec.EllipticCurvePublicKey:
    key = _certificate(path).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError(f"certificate {path} is for a key of another kind", hint="Enrol its holder again.")
    return key


def _hosts(path: Path) -> list[str]:
    """The names and addresses that a server's certificate is for."""
    try:
        names = _certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise IdentityError(f"certificate {path} names no host", hint="Give --host.") from None
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return [str(name) for name in found]


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} is no TLS key", hint="Make a new one: --new-key.")
    return key


def _replace_private(path: Path, content: bytes) -> None:
    """Replace a secret; at every moment the path holds the old one or the new one, and only its owner reads it."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    create_file(new, content, mode=0o600)
    new.replace(path)
    sync_folder(path.parent)
