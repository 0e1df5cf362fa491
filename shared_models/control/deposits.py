"""What hospitals leave at the coordinator for auditors: kinds, file names, and whose a bundle is."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from shared_models.errors import EvidenceError, IdentityError, UnsupportedEvidenceError
from shared_models.identity import verify
from shared_models.privacy.evidence import MANIFEST, MANIFEST_KIND, Manifest
from shared_models.versions import refuse_version

Kind = Literal["checkpoint", "bundle"]

CHUNK_BYTES = 49_152  # fits a coordinator that takes the smallest messages
CHECKPOINTS = "checkpoints.jsonl"
BUNDLE = re.compile(r"bundle-[0-9a-f]{64}\.zip")  # named by the SHA-256 of its content

_LARGEST_MANIFEST = 1_048_576
_LARGEST_DIRECTORY = 65_536
_END_BYTES = 22  # of an archive without a comment
_HINT = "It was changed after it was packed, or is no evidence bundle."


def bundle_name(sha256: str) -> str:
    """What a bundle with this digest is called."""
    return f"bundle-{sha256}.zip"


def owner_of_bundle(path: Path) -> Manifest:
    """Whose a bundle is, by the manifest alone; the rest of it is for an auditor to verify.

    Guarantees:
        * The manifest is signed by the key that it names; whose key that is, the caller asks.
        * Memory is bounded, whatever the file holds: nothing but the manifest is unpacked.

    Raises:
        UnsupportedEvidenceError: A later release packed it.
        EvidenceError: It is no bundle, or its manifest was changed.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive, archive.open(MANIFEST) as file:
            data = file.read(_LARGEST_MANIFEST + 1)
        if len(data) > _LARGEST_MANIFEST:
            raise EvidenceError(f"{path.name}: its manifest is too large", hint=_HINT)
        manifest = Manifest.model_validate_json(data)
        verify(bytes.fromhex(manifest.public_key), MANIFEST_KIND, manifest.payload(), bytes.fromhex(manifest.signature))
    except ValidationError as error:
        refuse_version(error, path.name, UnsupportedEvidenceError)
        raise EvidenceError(f"{path.name} holds no manifest of a bundle", hint=_HINT) from None
    except IdentityError:
        raise EvidenceError(f"{path.name}: its manifest is not signed by the key that it names", hint=_HINT) from None
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise EvidenceError(f"{path.name} is no bundle: {str(error)[:100]}", hint=_HINT) from None
    return manifest


def _check_directory(path: Path) -> None:
    """Refuse an archive whose list of files alone would fill the memory, before anything reads that list.

    Raises:
        EvidenceError: It does not end as ``pack`` ends one.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_BYTES - 20))
        tail = file.read()
    end, before = tail[-_END_BYTES:], tail[:-_END_BYTES]
    directory = int.from_bytes(end[12:16], "little")
    if not end.startswith(b"PK\5\6") or before.startswith(b"PK\6\7") or directory > _LARGEST_DIRECTORY:
        raise EvidenceError(f"{path.name} is no bundle", hint=_HINT)
