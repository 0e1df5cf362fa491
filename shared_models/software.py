"""Which software is running: a digest of the installed code that both sides must share."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def software_digest() -> str:
    """SHA-256 over the names and contents of every source file of ``shared_models``, in hexadecimal.

    Two installations with equal digests agree on networks, encodings and accounting to the bit. It proves nothing
    about a peer that lies; it finds honest mistakes, and the ledger records what a hospital ran.
    """
    return folder_digest(Path(__file__).parent)


def folder_digest(folder: Path) -> str:
    """The same over the source files of any folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
