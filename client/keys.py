"""The hospital's local secrets: they key the hashes that split, fingerprint and recognise patients, and never leave."""

import hashlib
import hmac
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from shared_models.durable import sync_folder
from shared_models.errors import IdentityError

KEY_BYTES = 32


def local_key(state: Path, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose, derived from the secret in a folder; made there at first use (0600).

    Raises:
        IdentityError: The secret can be read by others, is not what was written, or cannot be read or made.
    """
    path = state / "local.key"
    try:
        secret = _secret(path)
    except OSError as error:
        raise IdentityError(f"{path} cannot be used: {error.strerror}", hint="Check the folder and the disk.") from None
    if len(secret) != KEY_BYTES:
        raise IdentityError(f"{path} does not hold {KEY_BYTES} bytes", hint="Restore it from a backup of this folder.")
    return hmac.digest(secret, purpose.encode(), hashlib.sha256)


def _secret(path: Path) -> bytes:
    """What the file holds; it is made if it isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        _make(path)
    secret = path.read_bytes()
    if path.stat().st_mode & 0o077:
        raise IdentityError(f"{path} can be read by others", hint=f"Run: chmod 600 {path}")
    return secret


def _make(path: Path) -> None:
    """Make the file with its content or not at all: a process killed here leaves no half of a secret.

    Of two processes that make it at once the first one's counts.
    """
    descriptor, unnamed = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(unnamed, path)
    finally:
        Path(unnamed).unlink()
    sync_folder(path.parent)


def split_key(state: Path) -> bytes:
    """Key of the hash that puts patients into the training or the validation part."""
    return local_key(state, "validation split")
