"""The TLS authority of a coordinator, and throw-away keys for trials on one machine.

Private keys are written 0600. Nothing here is used to verify anything: verification is TLS's, Flower's and the
ledger's own.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
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
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared_models.certificates import key_usage
from shared_models.durable import create_file
from shared_models.errors import IdentityError
from shared_models.identity import create_key, public_bytes

VALID_FOR = timedelta(days=90)
ROLE_URI = "konsil:role/"


class Authority:
    """A certificate authority on the P-256 curve that lives in one folder.

    Args:
        folder: Where ``ca.pem`` is written; the authority's key dies with the process, unless it is saved.
        valid_for: Lifetime of every certificate it signs, counted from an hour ago.
    """

    certificate: Path

    def __init__(self, folder: Path, *, valid_for: timedelta = VALID_FOR) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._valid_for = valid_for
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Konsil trial authority")])
        self.certificate = folder / "ca.pem"
        self.certificate.write_bytes(self.self_signed())

    def self_signed(self) -> bytes:
        """The authority's own certificate, made anew, in PEM."""
        builder = self._builder(self._name, self._key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(key_usage(authority=True), critical=True)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def save_key(self, path: Path) -> None:
        """Keep the authority's key, readable by its owner alone."""
        write_private(path, pem(self._key))

    @classmethod
    def load(cls, certificate: Path, key: Path, *, valid_for: timedelta) -> "Authority":
        """An authority whose key was saved.

        Raises:
            IdentityError: A file is missing, or is something else.
        """
        try:
            found = load_pem_private_key(key.read_bytes(), password=None)
            name = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
        except (OSError, ValueError, TypeError):
            found = None
        if not isinstance(found, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"the authority's key {key} cannot be used", hint="Check [tls] in the settings.")
        authority = cls.__new__(cls)
        authority._key, authority._name, authority.certificate = found, name, certificate
        authority._valid_for = valid_for
        return authority

    def certify(
        self, key: ec.EllipticCurvePublicKey, name: str, *, hosts: Sequence[str] = (), role: str | None = None
    ) -> bytes:
        """A certificate in PEM for somebody's key. With hosts it is a server's, else a client's; see ``roles.py``."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(key_usage(authority=False), critical=True)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        if role is not None:
            uri = x509.UniformResourceIdentifier(f"{ROLE_URI}{role}")
            builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def issue(self, folder: Path, name: str, *, hosts: Sequence[str] = (), role: str | None = None) -> None:
        """Make a TLS key and certificate: ``tls.key`` and ``tls.pem``. With hosts it is a server's, else a client's."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / "tls.pem").write_bytes(self.certify(key.public_key(), name, hosts=hosts, role=role))
        write_private(folder / "tls.key", pem(key))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        start = datetime.now(UTC) - timedelta(hours=1)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + self._valid_for)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def create_hospital_keys(private: Path, public: Path, name: str) -> None:
    """Make a hospital's node and identity keys; the public halves, for the coordinator, go to another folder."""
    node = ec.generate_private_key(ec.SECP384R1())
    write_private(private / "node.key", node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.mkdir(parents=True, exist_ok=True)
    (public / f"{name}.node.pub").write_bytes(node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    identity = create_key(private / "identity.key")
    (public / f"{name}.identity.pub").write_text(public_bytes(identity).hex() + "\n", encoding="ascii")


def publish_tls_key(certificate: Path, public: Path) -> None:
    """Write the digest of a certificate's key, as the roster has it, to a file for the coordinator of a trial."""
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    public.write_text(digest + "\n", encoding="ascii")


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as its file holds it; not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a secret that only its owner can read; an existing file is never overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    create_file(path, content, mode=0o600)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
