"""What is kept to be shown later."""

import hashlib
import json
import stat
from pathlib import Path

import pytest

from client.evidence import LONGEST_BODY, EvidenceFile, evidence_files, refusal
from shared_models.errors import LedgerError


def test_a_flood_fills_no_disk_and_hides_no_beginning(tmp_path: Path) -> None:
    """Three files at most, each within the bound; the first line ever and the newest are both still there."""
    file = EvidenceFile(tmp_path / "evidence.jsonl", largest=1_000)

    for number in range(500):
        file.write(number=number)

    kept = [path for path in evidence_files(file.path) if path.exists()]
    numbers = [json.loads(line)["number"] for path in kept for line in path.read_bytes().splitlines()]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert all(path.stat().st_size <= 1_000 for path in kept)
    assert numbers[0] == 0
    assert numbers[-1] == 499
    assert numbers == sorted(numbers)


def test_evidence_is_the_owners(tmp_path: Path) -> None:
    """Nobody else on the machine reads what peers sent."""
    file = EvidenceFile(tmp_path / "evidence.jsonl")

    file.write(a=1)

    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_a_line_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Whoever depends on the line being there must know that it is not."""
    with pytest.raises(LedgerError, match="cannot be written"):
        EvidenceFile(tmp_path / "missing" / "evidence.jsonl").write(a=1)


@pytest.mark.parametrize("body", ["x" * (LONGEST_BODY + 1), "\ud800", b"bytes", 3.0, None, ["list"]], ids=str)
def test_whatever_a_peer_sends_can_be_kept(tmp_path: Path, body: object) -> None:
    """A body that is too long, no text or no Unicode is evidence too; its digest covers what was cut."""
    kept = refusal("query.advertise", "protocol", "f" * 64, body)
    EvidenceFile(tmp_path / "refusals.jsonl").write(**kept)

    text = body if isinstance(body, str) else ""
    line = json.loads((tmp_path / "refusals.jsonl").read_bytes())
    assert line["sha256"] == hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    assert line["body"] == text[:LONGEST_BODY]
