"""Who signed this: Ed25519 keys on disk, signatures that name their purpose, and the other half, checking them."""

import hashlib
import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shared_models.durable import create_file
from shared_models.errors import IdentityError

# Signed bytes start with this, so that nothing that another program signs with the same key can pass for ours.
_DOMAIN = b"konsil signature v1\0"
_KIND = re.compile(r"[a-z0-9-]{1,64}")


# In the environment: a file, 0600, whose first line encrypts identity keys.
PASSPHRASE_FILE = "KONSIL_PASSPHRASE_FILE"  # noqa: S105 - the name of a variable


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a new identity and store it, readable by its owner alone (PKCS 8, PEM).

    Guarantees:
        * Encrypted with the passphrase in the file that ``KONSIL_PASSPHRASE_FILE`` names, if it is set.
        * An existing file is never replaced: losing an identity loses the right to its ledger.
        * The key is durable before it is returned.

    Raises:
        IdentityError: There is a file already, or it cannot be written; or the passphrase cannot be read.
    """
    key = Ed25519PrivateKey.generate()
    passphrase = _passphrase()
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    try:
        create_file(path, text, mode=0o600)
    except FileExistsError:
        raise IdentityError(f"{path} exists already", hint="A key is never replaced; choose another file.") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read an identity that ``create_key`` wrote.

    Raises:
        IdentityError: The file is missing, readable by others, or no Ed25519 private key; or it is encrypted, and the
            passphrase is missing or wrong.
    """
    try:
        with path.open("rb") as stream:
            # Asked of the open file, so that it cannot be swapped between the question and the reading.
            mode = os.fstat(stream.fileno()).st_mode
            text = stream.read()
    except OSError as error:
        raise IdentityError(
            f"the identity key {path} cannot be read: {error.strerror}", hint="Check the path in the settings."
        ) from None
    if mode & 0o077:
        raise IdentityError(f"the identity key {path} is open to others", hint=f"Run: chmod 600 {path}")
    passphrase = _passphrase() if text.startswith(b"-----BEGIN ENCRYPTED") else None
    try:
        key = load_pem_private_key(text, password=passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The library's own text could quote the key.
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            f"{path} is no Ed25519 private key, or is encrypted with another passphrase",
            hint=f"It must be PKCS 8 in PEM format; if it has a passphrase, {PASSPHRASE_FILE} names the file with it.",
        )
    return key


def _passphrase() -> bytes | None:
    """From a file, because every process of the same user can read the environment itself."""
    name = os.environ.get(PASSPHRASE_FILE)
    if not name:
        return None
    path = Path(name)
    try:
        with path.open("rb") as stream:
            mode, line = os.fstat(stream.fileno()).st_mode, stream.readline().rstrip(b"\r\n")
    except OSError as error:
        raise IdentityError(
            f"the passphrase file {path} cannot be read: {error.strerror}", hint=f"Check {PASSPHRASE_FILE}."
        ) from None
    if mode & 0o077:
        raise IdentityError(f"the passphrase file {path} is open to others", hint=f"Run: chmod 600 {path}")
    if not line:
        raise IdentityError(f"the passphrase file {path} is empty", hint="Its first line is the passphrase.")
    return line


def read_public(path: Path) -> bytes:
    """Read a public key file: 32 raw bytes in hexadecimal.

    Raises:
        IdentityError: The file is missing, or holds something else.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"the public key {path} cannot be read: {error}", hint="Check the path.") from None
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise IdentityError(f"{path} is no public key", hint="It must be 32 raw bytes in lower-case hexadecimal.")
    return bytes.fromhex(text)


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public key that belongs to a private key."""
    return key.public_key().public_bytes_raw()


def fingerprint(public: bytes) -> str:
    """A public key's name for people to compare: SHA-256 in hexadecimal, in groups of four."""
    digest = hashlib.sha256(public).hexdigest()
    return ":".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def sign(key: Ed25519PrivateKey, kind: str, payload: bytes) -> bytes:
    """Sign ``payload`` as a statement of one kind.

    Guarantees:
        * The signature (64 bytes) verifies for exactly this kind and payload: a signed receipt can never be shown as a
          ledger entry.

    Source:
        RFC 8032, Ed25519; deterministic, so a bad random generator cannot leak the key.
    """
    return key.sign(_signed_bytes(kind, payload))


def verify(public: bytes, kind: str, payload: bytes, signature: bytes) -> None:
    """Check a signature that ``sign`` made.

    Raises:
        IdentityError: The signature belongs to another key, kind or payload; or the public key is none.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed_bytes(kind, payload))
    except (InvalidSignature, ValueError, TypeError):
        raise IdentityError(
            f"a signature of kind {kind!r} is not valid for the key it is checked with",
            hint="It was made with another key, for something else, or changed on the way.",
        ) from None


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    """Domain, kind, payload. A kind holds no NUL, so no two pairs give the same bytes."""
    if not _KIND.fullmatch(kind):
        raise ValueError(f"a kind is 1 to 64 lower-case letters, digits and hyphens, not {kind!r}")
    return _DOMAIN + kind.encode("ascii") + b"\0" + payload


def _unwritable(path: Path, error: OSError) -> IdentityError:
    return IdentityError(f"{path} cannot be written: {error.strerror}", hint="Check the folder and the space left.")
