"""The password of the hospital's page: only a salted scrypt of it lies on the disk, and guessing is slow."""

import hmac
import json
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from shared_models.durable import replace_file
from shared_models.errors import ConfigError, IdentityError, LedgerError

PASSWORD = "page-password.json"  # noqa: S105 - a file's name
SHORTEST, LONGEST = 12, 1024  # characters
COST, BLOCK, LANES = 2**15, 8, 3  # 32 MiB, a quarter of a second; OWASP's second choice
DIGEST_BYTES = 32
FREE_TRIES, LONGEST_PAUSE_S = 3, 60.0


class Password(NamedTuple):
    """What is kept of it, all in hexadecimal or numbers."""

    salt: str
    digest: str
    cost: int
    block: int
    lanes: int


def set_password(state: Path, password: str) -> None:
    """Keep a password for the page; whoever is logged in is logged out.

    Raises:
        ConfigError: It is too short or too long.
        LedgerError: It cannot be written.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise ConfigError(
            f"a password of {len(password)} characters", hint=f"At least {SHORTEST}: four words that are not a saying."
        )
    salt = os.urandom(16)
    kept = Password(salt.hex(), _scrypt(password, salt, COST, BLOCK, LANES).hex(), COST, BLOCK, LANES)
    path = state / PASSWORD
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        old = os.umask(0o077)
        try:
            replace_file(path, json.dumps(kept._asdict()).encode())
        finally:
            os.umask(old)
    except OSError as error:
        raise LedgerError(f"{path} cannot be written: {error.strerror}", hint="Check the disk.") from None


def remove_password(state: Path) -> None:
    """Take the password away, so that nobody gets in by one; whoever did is logged out.

    Raises:
        LedgerError: The file cannot be removed.
    """
    path = state / PASSWORD
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise LedgerError(f"{path} cannot be removed: {error.strerror}", hint="Check the disk.") from None


def read_password(state: Path) -> Password | None:
    """What is kept; None where no password was set.

    Raises:
        IdentityError: The file is open to others, or damaged.
    """
    path = state / PASSWORD
    try:
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(4096)
        kept = Password(**json.loads(content))
        whole = bytes.fromhex(kept.salt) and len(bytes.fromhex(kept.digest)) == DIGEST_BYTES
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole or (kept.cost, kept.block, kept.lanes) != (COST, BLOCK, LANES):
        raise IdentityError(f"{path} is damaged", hint="Run: konsil-hospital page-password hospital.toml")
    if mode & 0o077:
        raise IdentityError(f"{path} is open to others", hint=f"Run: chmod 600 {path}")
    return kept


class Door:
    """Where the password is asked for: one try at a time, and after some wrong ones longer and longer pauses.

    Everybody on this machine shares the pauses, so a neighbour can keep the steward out for a minute, and guess once
    a minute.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._wrong, self._next = 0, 0.0

    def wait_s(self) -> float:
        """How long nobody may try."""
        return max(0.0, self._next - time.monotonic())

    def opens(self, kept: Password, password: str) -> bool:
        """Whether this is the password; a try during a pause is a wrong one that costs nothing."""
        with self._turn:
            if self.wait_s() > 0 or len(password) > LONGEST:
                return False
            found = _scrypt(password, bytes.fromhex(kept.salt), kept.cost, kept.block, kept.lanes)
            if hmac.compare_digest(found, bytes.fromhex(kept.digest)):
                self._wrong = 0
                return True
            self._wrong += 1
            if self._wrong >= FREE_TRIES:
                self._next = time.monotonic() + min(2.0 ** (self._wrong - FREE_TRIES + 1), LONGEST_PAUSE_S)
            return False


def _scrypt(password: str, salt: bytes, cost: int, block: int, lanes: int) -> bytes:
    return Scrypt(salt=salt, length=DIGEST_BYTES, n=cost, r=block, p=lanes).derive(
        password.encode("utf-8", "surrogatepass")
    )
