"""The hospital's key files besides its identity: Flower's node key and the TLS client key."""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID

from shared_models.durable import create_file
from shared_models.errors import ConfigError, IdentityError


def create_node_key(path: Path) -> None:
    """Make Flower's node key (ECDSA P-384, OpenSSH), 0600; never over another."""
    key = ec.generate_private_key(ec.SECP384R1())
    create_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=0o600)


def create_tls_key(path: Path) -> None:
    """Make the TLS client key (ECDSA P-256, PKCS 8), 0600; never over another."""
    key = ec.generate_private_key(ec.SECP256R1())
    create_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def certificate_request(key_file: Path, name: str) -> str:
    """A request (PKCS 10, PEM) for a TLS client certificate, signed by the key that it is for."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = (
        x509.CertificateSigningRequestBuilder().subject_name(subject).sign(load_tls_key(key_file), hashes.SHA256())
    )
    return request.public_bytes(Encoding.PEM).decode("ascii")


def node_public_key(path: Path) -> str:
    """The public half of Flower's node key, as OpenSSH writes it.

    Raises:
        IdentityError: The file is missing or holds something else.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None).public_key()
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"the node key {path} cannot be read: {error}", hint="Check [keys] in the settings."
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError(f"{path} is no P-384 key", hint="Flower's node keys are ECDSA P-384 in OpenSSH format.")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def tls_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The public half of the TLS client key.

    Raises:
        IdentityError: The file is missing or holds something else.
    """
    return load_tls_key(path).public_key()


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A TLS key itself.

    Raises:
        IdentityError: The file is missing or holds something else.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} is no TLS key", hint="Check [tls] in the settings.")
    return key


def create_new(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that is not there yet, as ``create_file`` does.

    Raises:
        ConfigError: There is one.
    """
    try:
        create_file(path, content, mode=mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", hint="Nothing is overwritten: choose an empty folder.") from None
