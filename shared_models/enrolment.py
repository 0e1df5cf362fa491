"""How a hospital asks to be admitted, and what it gets: requests and kits, signed on one side, checked on the other.

Neither file holds a secret. A request is signed by the identity key whose fingerprint is read out on the telephone, so
whoever carries it can change nothing. A kit is worth what the signed roster in it is worth.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field, ValidationError

from shared_models.config import ALWAYS_WRITTEN, Count, Evolving, Name, explain
from shared_models.errors import IdentityError, RequestError, UnsupportedRosterError
from shared_models.identity import fingerprint, sign, verify
from shared_models.roster import Hex32, Member, NodeKey, SignedRoster, Text, UnsignedRoster
from shared_models.versions import refuse_version

REQUESTED, ROTATED = "enrolment-request", "enrolment-rotation"  # the kinds of signatures

Pem = Annotated[str, Field(pattern=r"^-----BEGIN ", max_length=20_000)]


class UnsignedRequest(Evolving):
    """What a hospital asks to be put on the roster.

    Attributes:
        format: Version of this format.
        name, display_name, identity, node_key, public_size, ledger_genesis: As in ``roster.Member``.
        certificate_request: PKCS 10 in PEM for the TLS client key; signed by that key.
    """

    format: Annotated[Literal[1], ALWAYS_WRITTEN] = 1
    name: Name
    display_name: Text
    identity: Hex32
    node_key: NodeKey
    certificate_request: Pem
    public_size: Count
    ledger_genesis: Hex32

    def payload(self) -> bytes:
        """What is signed: canonical JSON (RFC 8785)."""
        return rfc8785.dumps(self.model_dump(mode="json", exclude={"signature", "signature_before"}))

    @property
    def fingerprint(self) -> str:
        """What is read out on the telephone: the identity key's, which signs everything else."""
        return fingerprint(bytes.fromhex(self.identity))

    def tls_key(self) -> EllipticCurvePublicKey:
        """The TLS key that the certificate request holds.

        Raises:
            RequestError: It is no request, was not signed by its own key, or holds a key of another kind.
        """
        try:
            found = x509.load_pem_x509_csr(self.certificate_request.encode("ascii"))
            key = found.public_key() if found.is_signature_valid else None
        except (ValueError, TypeError, InvalidSignature):
            key = None
        if not isinstance(key, EllipticCurvePublicKey):
            raise RequestError(
                f"the certificate request of {self.name} is not signed by the key that it is for",
                hint="Have the hospital make its request anew.",
            )
        return key


Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Request(UnsignedRequest):
    """A request with the identity key's signature, 64 bytes in hexadecimal.

    Attributes:
        signature: Of the identity key that the request holds.
        signature_before: Where a member asks for other keys, of the identity key that it has had.
    """

    signature: Signature
    signature_before: Annotated[Signature | None, ALWAYS_WRITTEN] = None


class Kit(Evolving):
    """What a hospital needs to take part.

    Attributes:
        format: Version of this format.
        name: Whose kit it is.
        roster: Signed by the root key.
        root: The root public key, in hexadecimal; believed only if its fingerprint is the one read out.
        authority: The TLS authority's certificate, in PEM.
        certificate: The hospital's TLS client certificate, in PEM.
    """

    format: Annotated[Literal[1], ALWAYS_WRITTEN] = 1
    name: Name
    roster: dict[str, Any]
    root: Hex32
    authority: Pem
    certificate: Pem


def sign_request(
    identity: Ed25519PrivateKey, request: UnsignedRequest, *, before: Ed25519PrivateKey | None = None
) -> Request:
    """Sign a request with the hospital's own identity key; and, for a rotation, with the one it has had."""
    payload = request.payload()
    return Request(
        **request.model_dump(),
        signature=sign(identity, REQUESTED, payload).hex(),
        signature_before=None if before is None else sign(before, ROTATED, payload).hex(),
    )


def check_rotation(request: Request, member: Member) -> None:
    """Check that a member itself asks for other keys, and for nothing else.

    Raises:
        RequestError: The identity key on the roster did not sign it; or its ledger or public size would change.
    """
    try:
        before = bytes.fromhex(request.signature_before or "")
        verify(bytes.fromhex(member.identity), ROTATED, request.payload(), before)
    except IdentityError:
        raise RequestError(
            f"{member.name} is on the roster already, and its identity key did not sign this request",
            hint="Names are never given to another hospital. A member asks for new keys by konsil-hospital rotate.",
        ) from None
    if (request.ledger_genesis, request.public_size) != (member.ledger_genesis, member.public_size):
        raise RequestError(
            f"{member.name} asks for another ledger or public size, not only for other keys",
            hint="Both are fixed when a budget is opened. Call the hospital.",
        )


def read_document(path: Path) -> bytes:
    """A file that the other side sent.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", hint="Check the path.") from None


def read_request(document: bytes) -> Request:
    """Read a request and check that it is the hospital's own.

    Raises:
        RequestError: It is malformed, or was changed after the hospital signed it.
    """
    try:
        request = Request.model_validate_json(document)
    except ValidationError as error:
        refuse_version(error, "this request", UnsupportedRosterError)
        raise RequestError(
            f"this is no enrolment request: {explain(error)}", hint="It is the file that konsil-hospital init wrote."
        ) from None
    try:
        verify(bytes.fromhex(request.identity), REQUESTED, request.payload(), bytes.fromhex(request.signature))
    except IdentityError:
        raise RequestError(
            f"the request of {request.name} is forged: its own identity key did not sign it",
            hint="It was changed on the way. Get it again over another channel, and call the hospital.",
        ) from None
    request.tls_key()
    return request


def read_kit(document: bytes) -> Kit:
    """Read a kit; who signed its roster is checked elsewhere.

    Raises:
        RequestError: It is malformed.
    """
    try:
        return Kit.model_validate_json(document)
    except ValidationError as error:
        refuse_version(error, "this kit", UnsupportedRosterError)
        raise RequestError(
            f"this is no kit: {explain(error)}", hint="It is the file NAME.kit.json that the coordinator wrote."
        ) from None


def check_certificates(kit: Kit, signed: SignedRoster, own_key: EllipticCurvePublicKey) -> None:
    """Check that a kit's TLS files are those that the roster speaks of, and fit the hospital's own key.

    Raises:
        RequestError: The authority, or the key, was substituted.
    """
    authority, certificate = _certificate(kit.authority), _certificate(kit.certificate)
    if certificate_digest(authority) != signed.coordinator.authority:
        raise RequestError(
            "the kit holds another TLS authority than the signed roster names",
            hint="Somebody put it there to sit in the middle. Get the kit again, and call the coordinator.",
        )
    member, own = signed.member(kit.name), key_digest(own_key)
    key = certificate.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or key_digest(key) != own or member is None or member.tls_key != own:
        raise RequestError(
            "the kit's TLS certificate is not for this hospital's key", hint="Get the kit again; call the coordinator."
        )
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise RequestError(
            "the kit's TLS certificate was not issued by its authority", hint="Get the kit again."
        ) from None


def certificate_digest(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate (DER), in hexadecimal."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def key_digest(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a key's SubjectPublicKeyInfo (DER), in hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def written(document: UnsignedRoster | UnsignedRequest | Kit) -> bytes:
    """A file's bytes: JSON that people can read; its spacing is not part of what is signed."""
    return document.model_dump_json(indent=2).encode("utf-8") + b"\n"


def _certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode("ascii"))
    except ValueError:
        raise RequestError("the kit holds a certificate that is none", hint="Get the kit again.") from None
