"""What left is kept for as long as the law wants it, part by part; what a peer can fill stays within its bound."""

import os
import time
from pathlib import Path

import pytest

from client.evidence import EvidenceFile, evidence_files, read_evidence
from client.settings import Logs

YEAR_S = 366 * 24 * 3600.0


def lines(path: Path) -> list[int]:
    """The numbers that were written."""
    return [line["number"] for line in read_evidence(path)]


def test_every_part_that_was_set_aside_is_kept_and_read_in_order(tmp_path: Path) -> None:
    """Without the retention only the first and the newest would be."""
    kept, bounded = tmp_path / "egress.jsonl", tmp_path / "refusals.jsonl"
    for number in range(100):
        EvidenceFile(kept, largest=500, keep_s=YEAR_S).write(number=number)
        EvidenceFile(bounded, largest=500).write(number=number)

    assert lines(kept) == list(range(100))
    assert len(evidence_files(kept)) > 5
    assert lines(bounded)[0] == 0
    assert len(lines(bounded)) < 100
    assert {path.stat().st_mode & 0o777 for path in evidence_files(kept) if path.exists()} == {0o600}


@pytest.mark.parametrize(("days_short", "stays"), [(1, True), (-1, False)])
def test_a_part_is_removed_once_its_newest_line_is_older_than_the_retention(
    tmp_path: Path, days_short: int, stays: bool
) -> None:
    """Not a day before; and only when another part is set aside."""
    path, logs = tmp_path / "egress.jsonl", Logs(audit_years=6)
    file = EvidenceFile(path, largest=100, keep_s=logs.audit_s)
    for number in range(3):
        file.write(number=number)
    old = evidence_files(path)[2]
    age = 6 * YEAR_S - days_short * 24 * 3600
    os.utime(old, (time.time() - age, time.time() - age))

    for number in range(3, 6):
        file.write(number=number)

    assert old.exists() == stays
    assert lines(path)[-1] == 5


def test_what_an_earlier_release_set_aside_is_still_read(tmp_path: Path) -> None:
    """Its two files come first: they are older than all that was set aside since."""
    path = tmp_path / "egress.jsonl"
    for number, name in enumerate(("egress.jsonl.first", "egress.jsonl.last")):
        (tmp_path / name).write_text(f'{{"number": {number}}}\n', encoding="ascii")
    file = EvidenceFile(path, largest=100, keep_s=YEAR_S)
    for number in range(2, 6):
        file.write(number=number)

    assert lines(path) == list(range(6))


def test_six_years_are_never_a_day_short() -> None:
    """45 CFR 164.316(b)(2)(i), with two leap years in it."""
    assert Logs().audit_s >= (6 * 365 + 2) * 24 * 3600
