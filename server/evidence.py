"""What an auditor cross-checks with hospitals' evidence: receipts and transcripts, on the disk before a list is signed.

A hospital that has signed who uploaded keeps that list. So the coordinator must not lose its own part of the attempt to
a crash: it is written down whole before the list goes out, and moved to the two files that auditors read when the
attempt is over, or when the next process finds it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785

from shared_models.durable import replace_file, sync_folder
from shared_models.receipts import SignedReceipt

RECEIPTS, SUMS, OPEN = "receipts.jsonl", "sums.jsonl", "open-attempt.json"


class Evidence:
    """The evidence files of one study's folder; one writer.

    Guarantees:
        * What ``hold`` was given is in the evidence for good, once, whatever happens after it returned.
        * Receipts and sums stand in the order in which attempts were made; no line is torn.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = folder / OPEN
        self._held: Mapping[str, Any] = {}
        if self._open.exists():  # of a process that was killed
            self._held = json.loads(self._open.read_bytes())
            self.close()

    def hold(self, sum_: Mapping[str, Any], receipts: Mapping[str, SignedReceipt]) -> None:
        """Write down what is known of the attempt at hand; replaces what was held of it before."""
        lines = [
            rfc8785.dumps({"hospital": hospital, "upload": kept.model_dump(mode="json")}).decode()
            for hospital, kept in sorted(receipts.items())  # an order that an auditor can check
        ]
        sizes = {name: _size(self._folder / name) for name in (RECEIPTS, SUMS)}
        held = {"sizes": sizes, RECEIPTS: lines, SUMS: [rfc8785.dumps(dict(sum_)).decode()]}
        replace_file(self._open, json.dumps(held).encode())
        self._held = held

    def close(self) -> None:
        """The attempt is over: what was held goes to the files."""
        for name, size in self._held["sizes"].items():
            _extend(self._folder / name, size, self._held[name])
        self._open.unlink()
        sync_folder(self._folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _extend(path: Path, size: int, lines: list[str]) -> None:
    """Make a file end, from a size on, in these lines: also where a crash has left a part of them there."""
    with path.open("ab") as file:
        file.truncate(size)
        file.writelines(line.encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
