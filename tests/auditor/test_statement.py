"""Papers from evidence: each field is traced to what it was read from, or is left to the controller."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from auditor.audit import audit
from auditor.papers import as_html, as_markdown, export_log
from auditor.record import Audit
from auditor.statement import OPEN, Item, Statement, make_statement
from shared_models.errors import EvidenceError
from shared_models.identity import read_public
from tests.auditor.conftest import LOST, Told
from tests.auditor.test_report import HOSTILE, Page

NOW = datetime(2026, 7, 1, 12, 30, tzinfo=UTC)
STUDY = "breast-cancer"


@pytest.fixture(scope="module")
def real(told: Told) -> Audit:
    """Two real studies, audited."""
    return audit(told.everything, root=read_public(told.root))


@pytest.fixture(scope="module")
def statement(real: Audit) -> Statement:
    """The papers about the first one."""
    return make_statement(real, STUDY, now=NOW)


def items(statement: Statement, paper: str) -> dict[str, Item]:
    """The fields of one paper by label."""
    (chosen,) = [found for found in statement.papers if found.name == paper]
    return {item.label: item for section in chosen.sections for item in section.items}


def test_every_field_is_traced_or_left_open(statement: Statement, real: Audit) -> None:
    """No value without a source, no source without a value; and each entry that is named exists."""
    lengths = {record.hospital: len(record.lines) for record in real.hospitals}
    for paper in statement.papers:
        for item in (item for section in paper.sections for item in section.items):
            assert (item.value is None) == (item.traces == ()), f"{paper.name}: {item.label}"
            for trace in item.traces:
                assert (trace.entry is None) != (trace.what is None)
                assert trace.party in {*lengths, "transcripts", "auditor"}
                assert trace.entry is None or 1 <= trace.entry <= lengths[trace.party]


def test_the_privacy_statement_has_what_the_guideline_asks_for(statement: Statement, real: Audit) -> None:
    """Unit, relation, epsilon and delta, accountant and version, sampling, trust, composition, randomness."""
    found = items(statement, "privacy-statement")
    record, first = real.hospitals[0], "hospital-1"

    assert found["Unit of privacy"].value == "one patient, all records at one hospital"
    assert found["Neighbouring relation"].value == "add or remove one patient"
    assert record.budget is not None
    spent = record.budget.studies[0].spent
    cost = found[f"Epsilon and delta at {first}"]
    assert f"epsilon {spent.epsilon_filter:.3f} (enforced" in (cost.value or "")
    assert f"{spent.epsilon_pld:.3f} (PLD; for the schedule as executed" in (cost.value or "")
    assert f"delta {spent.delta:g}" in (cost.value or "")
    charges = [line.seq for line in record.lines if line.kind == "charge" and line.study == STUDY]
    assert [trace.entry for trace in cost.traces if trace.entry] == [charges[0], charges[-1]]
    assert "with probability 0.5" in (found["Mechanism M1"].value or "")
    assert f"order {record.terms.order}" in (found["Accountant that enforces"].value or "")
    assert (found["Accountant that computed the figures above"].value or "").startswith("dp-accounting 0.6")
    assert "PRV (Opacus" in (found["Accountant of the hospitals"].value or "")
    assert "at least 3 of 3 hospitals' updates" in (found["Trust model"].value or "")
    assert "every study of the same record set" in (found["Scope of composition"].value or "")
    assert (record.software_digest or "?") in (found["Randomness"].value or "")
    assert "2 releases of statistics" in (found["Released besides the model"].value or "")
    assert found["Utility and bias"].value is None
    assert "of the standard deviation that was charged, over 2 sums" in (found["Noise, measured"].value or "")


def test_the_record_of_processing_goes_by_the_letters_of_the_article(statement: Statement, real: Audit) -> None:
    """(a) to (g); what no evidence shows is left open, and what the plan says is there."""
    (paper,) = [found for found in statement.papers if found.name == "record-of-processing"]
    found = items(statement, "record-of-processing")

    assert [section.title[:3] for section in paper.sections] == [f"({letter})" for letter in "abcdefg"]
    assert found["Purpose"].value == real.hospitals[0].plans[STUDY].purpose
    assert found["Data protection officer"].value is None
    assert found["Transfers"].value is None
    decision = found["Decision before processing at hospital-1"]
    assert [trace.entry for trace in decision.traces] == [2]
    recipients = found["Recipients of sums of noised contributions"].value or ""
    assert LOST in recipients


def test_the_annex_goes_by_the_letters_of_the_article(statement: Statement) -> None:
    """(a) to (d), and the risk in words."""
    (paper,) = [found for found in statement.papers if found.name == "dpia-annex"]

    assert [section.title[:3] for section in paper.sections] == ["(a)", "(b)", "(c)", "(d)"]
    risk = items(statement, "dpia-annex")["What could be learned of one patient of hospital-1"]
    assert "guessed right at most 53 % of the time" in (risk.value or "")


def test_without_a_plan_nothing_is_made_up(real: Audit) -> None:
    """An older bundle has no plan: purpose, task and trust are left open."""
    bare = replace(real, hospitals=tuple(replace(record, plans={}) for record in real.hospitals))

    made = make_statement(bare, STUDY, now=NOW)

    for paper, label in [
        ("privacy-statement", "Purpose"),
        ("privacy-statement", "Trust model"),
        ("record-of-processing", "Task that fixes which columns are read"),
        ("dpia-annex", "What is computed"),
    ]:
        assert items(made, paper)[label].value is None


def test_the_papers_of_one_hospital_are_about_it_alone(real: Audit) -> None:
    """Each controller keeps its own record: from its own bundle, whoever else took part."""
    alone = make_statement(replace(real, hospitals=real.hospitals[:1]), STUDY, now=NOW)

    found = items(alone, "record-of-processing")

    assert "Persons at hospital-1" in found
    assert "Persons at hospital-2" not in found
    limits = items(alone, "privacy-statement")
    assert "hospital-2" in (limits["Evidence that is not here"].value or "")


def test_a_study_that_nobody_approved_is_refused(real: Audit) -> None:
    """With the names of those that are there; of the export as well."""
    with pytest.raises(EvidenceError, match="approved a study kidneys") as refused:
        make_statement(real, "kidneys")
    assert "breast-cancer, lungs" in refused.value.hint
    with pytest.raises(EvidenceError, match="approved a study kidneys"):
        list(export_log(real, "kidneys"))


def test_a_broken_ledger_costs_nothing_in_words(real: Audit) -> None:
    """Where nothing was computed, the field is left open rather than zero."""
    broken = replace(real, hospitals=(replace(real.hospitals[0], budget=None), *real.hospitals[1:]))

    cost = items(make_statement(broken, STUDY, now=NOW), "privacy-statement")["Epsilon and delta at hospital-1"]

    assert (cost.value, cost.traces, cost.hint) == (None, (), "The ledger does not hold.")


# As files


def test_markdown_says_the_same_and_takes_no_markup(real: Audit) -> None:
    """A hostile purpose neither opens a tag nor a link, nor ends its line."""
    wicked = HOSTILE + "\n\n# Approved\n[click](https://evil.example) *bold* www.evil.example <b>"
    record = real.hospitals[0]
    plans = {STUDY: record.plans[STUDY].model_copy(update={"purpose": wicked})}
    made = make_statement(replace(real, hospitals=(replace(record, plans=plans), *real.hospitals[1:])), STUDY, now=NOW)

    text = as_markdown(made.papers[0], made)

    assert "<" not in text
    assert "\n# Approved" not in text
    assert r"\[click\](https\://evil.example) \*bold\* www\.evil.example &lt;b&gt;" in text
    assert "\u202e" not in text
    assert f"*{OPEN}*" in text
    assert "Source: ledger entry 2 of hospital-1, hospital-2, hospital-3, hospital-4" in text


def test_the_page_of_papers_is_as_closed_as_the_report(statement: Statement) -> None:
    """All papers, a policy, no script."""
    shown = Page(as_html(statement))

    assert all(paper.title in shown.text for paper in statement.papers)
    assert "script" not in {tag for tag, _ in shown.tags}
    assert any((a.get("content") or "").startswith("default-src 'none'") for tag, a in shown.tags if tag == "meta")


def test_the_export_has_every_event_of_the_study(real: Audit) -> None:
    """One JSON object a line: what it is, the entries of each ledger in order, and every attempt with who took part."""
    head, *events = [json.loads(line) for line in export_log(real, STUDY)]

    assert head["format"] == "konsil-log/1"
    assert head["provider_or_deployer"] == OPEN
    for record in real.hospitals:
        wanted = [line.seq for line in record.lines if line.study in {STUDY, None}]
        assert [e["entry"] for e in events if e["party"] == record.hospital] == wanted
    sums = [event for event in events if event["event"] == "sum"]
    assert [(e["purpose"], e["round"], len(e["uploaders"])) for e in sums] == [
        ("train", 1, 4),
        ("evaluate", 1, 4),
        ("train", 2, 3),
        ("evaluate", 2, 3),
    ]
    charge = next(event for event in events if event["event"] == "charge")
    assert charge["mechanism"]["kind"] == "poisson-gaussian"
    assert len(charge["hash"]) == 64
