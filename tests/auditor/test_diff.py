"""Two pieces of evidence of one hospital: what came to it; and a fork or a rollback is found, wherever it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from auditor.audit import audit
from auditor.diff import compare, histories, is_report, read_report
from auditor.record import Audit
from auditor.report import make_report, write_json
from shared_models.errors import EvidenceError
from shared_models.identity import read_public
from tests.auditor.conftest import Told
from tests.auditor.made_up import Writer, hospital, large


def of(*writers: Writer) -> Audit:
    """An audit of made-up ledgers."""
    return replace(large(1, 1), hospitals=tuple(hospital(writer.name, writer) for writer in writers))


def ledger(*studies: str, name: str = "north") -> Writer:
    """A ledger of some studies of ten rounds."""
    writer = Writer(name)
    writer.add("budget-opened")
    for study in studies:
        writer.study(study, 10)
    return writer


def test_what_came_to_a_real_hospital_is_told(told: Told) -> None:
    """One study more: its entries and its cost, by the filter and by PLD; what was before is unchanged."""
    root = read_public(told.root)
    before, after = (audit([bundles["hospital-1"]], root=root, partial=True) for bundles in (told.early, told.late))

    found = compare(histories(before), histories(after))

    assert found.findings == ()
    (difference,) = found.differences
    assert difference.came == {"charge": 2, "plan-approved": 1, "release": 1, "round-done": 1, "study-closed": 1}
    assert difference.entries_after - difference.entries_before == 6
    changes = {change.study: change for change in difference.changes}
    assert set(changes) == {None, "lungs"}
    assert changes["lungs"].before.charges == 0
    assert after.hospitals[0].budget is not None
    assert changes["lungs"].after.epsilon_pld == after.hospitals[0].budget.studies[1].spent.epsilon_pld
    assert difference.left_before is not None
    assert difference.left_after is not None
    assert difference.left_after < difference.left_before
    assert difference.since == before.hospitals[0].lines[-1].time


def test_the_other_way_round_it_is_a_rollback(told: Told) -> None:
    """The newer bundle as the older one: the first entry that is missing is named."""
    before, after = (audit([bundles["hospital-1"]], partial=True) for bundles in (told.late, told.early))

    (finding,) = compare(histories(before), histories(after)).findings

    assert (finding.code, finding.severity) == ("history-rolled-back", "critical")
    assert finding.what.endswith(f"the newer one lacks entry {finding.entry}")
    assert finding.entry == len(after.hospitals[0].lines) + 1
    assert finding.study == "lungs"


@pytest.mark.parametrize("place", [1, 2, 12, 22])
def test_a_fork_is_found_at_its_first_entry(place: int) -> None:
    """Whatever came after it, and however long the newer ledger is."""
    old, new = ledger("heart"), ledger("heart", "lungs")
    for seq in range(place, len(new.lines) + 1):
        new.lines[seq - 1] = new.lines[seq - 1]._replace(hash=f"{seq:064x}")

    (finding,) = compare(histories(of(old)), histories(of(new))).findings

    assert (finding.code, finding.entry) == ("history-forked", place)
    assert f"{place:064x}"[:16] in finding.what


def test_an_old_backup_that_went_on_is_a_fork() -> None:
    """Shorter at first, then longer than the one that was lost: its own entries stand where others were shown."""
    old = ledger("heart", "lungs")
    new = ledger("heart")
    for number in range(1, 40):
        line = new.add("charge", study="heart", round=number)
        new.lines[-1] = line._replace(hash=f"{number:064x}")

    (finding,) = compare(histories(of(old)), histories(of(new))).findings

    assert (finding.code, finding.entry) == ("history-forked", len(ledger("heart").lines) + 1)


def test_a_hospital_that_is_missing_is_named_and_a_new_one_is_none() -> None:
    """Only what the older evidence has shown can be missed."""
    old, new = of(ledger("heart"), ledger("heart", name="south")), of(ledger("heart"), ledger("heart", name="east"))

    found = compare(histories(old), histories(new))

    assert [(finding.code, finding.party) for finding in found.findings] == [("history-missing", "south")]
    assert compare(histories(old), histories(new), partial=True).findings == ()
    assert [difference.came for difference in found.differences] == [{}]


# Reports


def test_reports_compare_as_bundles_do(tmp_path: Path) -> None:
    """Through JSON and back nothing is lost that a comparison needs."""
    audits = {"old": of(ledger("heart")), "new": of(ledger("heart", "lungs"))}
    for name, found in audits.items():
        write_json(tmp_path / name, make_report(found), found)

    old, new = (read_report(tmp_path / name) for name in audits)

    assert is_report(tmp_path / "old")
    assert old == histories(audits["old"])
    assert compare(old, new) == compare(histories(audits["old"]), histories(audits["new"]))


BAD = [
    (b"", "no report of an audit"),
    (b"{", "no report of an audit"),
    (b"[" * 100_000, "no report of an audit"),
    (b'{"format": ' + b"[" * 100_000, "no report of an audit"),
    (b'{"format": "konsil-report/1", "hospitals": 1e999, "studies": [], "entries": {}}', "hospitals"),
    (b'{"format": "konsil-report/2", "hospitals": [], "studies": [], "entries": {}}', "another format"),
    (b"\xff\xfe\x00", "no report of an audit"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """By name, with a hint, without a traceback, whatever is in it."""
    (tmp_path / "report.json").write_bytes(content)

    with pytest.raises(EvidenceError, match=words):
        read_report(tmp_path / "report.json")


def test_a_report_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    """A hash that is none, a number that is a text: nothing is guessed at."""
    found = of(ledger("heart"))
    write_json(tmp_path / "good", make_report(found), found)
    for change in [{"hash": "zz"}, {"seq": "1"}, {"seq": 0}, {"study": "<b>"}, {"kind": "x" * 41}]:
        fields = json.loads((tmp_path / "good").read_bytes())
        fields["entries"]["north"][0] |= change
        (tmp_path / "bad").write_text(json.dumps(fields), encoding="utf-8")

        with pytest.raises(EvidenceError, match="entries"):
            read_report(tmp_path / "bad")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """It is no report, and reading it as one says why."""
    assert not is_report(tmp_path / "nothing")
    with pytest.raises(EvidenceError, match="No such file"):
        read_report(tmp_path / "nothing")
