"""What hospitals leave at the coordinator for auditors: kinds, and file names."""

import re
from typing import Literal

Kind = Literal["checkpoint", "bundle"]

CHUNK_BYTES = 49_152  # fits a coordinator that takes the smallest messages
CHECKPOINTS = "checkpoints.jsonl"
BUNDLE = re.compile(r"bundle-[0-9a-f]{64}\.zip")  # named by the SHA-256 of its content


def bundle_name(sha256: str) -> str:
    """What a bundle with this digest is called."""
    return f"bundle-{sha256}.zip"
