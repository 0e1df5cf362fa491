"""The hospital's side of mutual TLS: what it shows, and whom it trusts."""

import ssl
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.x509 import Certificate, load_pem_x509_certificate, load_pem_x509_certificates

from client.settings import Settings
from shared_models.errors import IdentityError


def client_context(settings: Settings) -> ssl.SSLContext:
    """TLS 1.3 with our certificate, trusting the consortium's authority and nobody else.

    A coordinator that rejects a certificate just hangs up, so what can be wrong with ours is looked for here.

    Raises:
        IdentityError: A file cannot be used; our certificate is not valid now, or of another authority.
    """
    files = settings.tls
    try:
        authorities = load_pem_x509_certificates(files.ca.read_bytes())
        certificate = load_pem_x509_certificate(files.certificate.read_bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(files.ca)
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise IdentityError(f"the TLS files cannot be used: {error}", hint="Check [tls] in the settings.") from None
    if not certificate.not_valid_before_utc <= datetime.now(UTC) < certificate.not_valid_after_utc:
        raise IdentityError(
            f"certificate {files.certificate} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} "
            f"to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, not now",
            hint="Have it renewed (konsil-hospital rotate hospital.toml tls), or mend this machine's clock.",
        )
    if not any(issued_by(authority, certificate) for authority in authorities):
        raise IdentityError(
            f"certificate {files.certificate} was not issued by the authority in {files.ca}",
            hint="The coordinator would hang up. Have a certificate issued by the consortium's authority.",
        )
    return context


def issued_by(authority: Certificate, certificate: Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
