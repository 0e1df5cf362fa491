"""The report: every figure is the auditor's own and leads to its entry; whatever others wrote stays text."""

import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from auditor.audit import audit
from auditor.findings import CODES, Finding
from auditor.noise import noise_reports
from auditor.recompute import recompute
from auditor.record import Audit, Key
from auditor.render import MOST_ENTRIES, odds, render_report
from auditor.report import MOST_POINTS, Span, make_report, spans, verdict, write_json
from shared_models.identity import read_public
from shared_models.privacy.conformance import CanaryAudit, Check, Conformance
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian
from tests.auditor.conftest import LOST, Told
from tests.auditor.made_up import Writer, hospital, large

NOW = datetime(2026, 7, 1, 12, 30, tzinfo=UTC)
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, ids, links, and the text of each element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.links = [attributes["href"] or "" for tag, attributes in self.tags if tag == "a"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Gather text."""
        self.text += data


def page(found: Audit) -> Page:
    return Page(render_report(make_report(found, now=NOW), found))


@pytest.fixture(scope="module")
def real(told: Told) -> Audit:
    """Two real studies, audited."""
    return audit(told.everything, root=read_public(told.root))


def test_every_figure_is_computed_again(real: Audit) -> None:
    """Per hospital, study and in total, as recompute has it; and the last point of each curve is the whole."""
    report = make_report(real, now=NOW)

    assert report.passed, report.findings
    for record, shown in zip(real.hospitals, report.hospitals, strict=True):
        assert record.budget is not None
        assert shown.computed == record.budget.spent
        assert shown.claim is not None
        assert shown.curve[-1].charges == record.budget.spent.charges
        assert shown.curve[-1].spent == pytest.approx(record.budget.spent.epsilon_filter, rel=1e-9)
        assert shown.reserved is not None
        assert shown.curve[-1].spent + shown.reserved + record.budget.left == pytest.approx(record.terms.epsilon)
    for study in report.studies:
        for part in study.hospitals:
            assert part.computed is not None
            assert part.curve[-1].spent == pytest.approx(part.computed.epsilon_filter, rel=1e-9)
            assert part.plan_digest == (study.plan.digest() if study.plan else None)
    assert [study.study for study in report.studies] == ["breast-cancer", "lungs"]


def test_who_took_part_is_told_from_transcripts(real: Audit) -> None:
    """The lost hospital agreed on keys in round 2 and is not in its sum; later it was not asked."""
    first, second = make_report(real, now=NOW).studies

    lost = next(seen for seen in first.attendance if seen.hospital == LOST)
    assert (lost.asked, lost.agreed, lost.summed, lost.dropped) == (3, 3, 2, 1)
    (attempt,) = first.incomplete
    assert (attempt.purpose, attempt.round, attempt.summed, attempt.dropped) == ("train", 2, 3, (LOST,))
    assert first.summed == ((1, 4), (2, 3))
    assert second.incomplete == ()


def test_releases_are_listed_with_their_price(real: Audit) -> None:
    """Two of them cost what the filter says with them, less what it says without."""
    part = make_report(real, now=NOW).studies[0].hospitals[0]
    record = real.hospitals[0]
    charged = [line for line in record.lines if line.kind == "charge" and line.study == "breast-cancer"]
    without = Counter[PoissonGaussian | GaussianRelease](
        line.mechanism for line in charged if isinstance(line.mechanism, PoissonGaussian)
    )

    assert [record.lines[entry - 1].kind for entry in part.releases] == ["release", "release"]
    assert part.computed is not None
    less = recompute(without, delta=part.delta, order=record.terms.order).epsilon_filter
    assert part.price == pytest.approx(part.computed.epsilon_filter - less, rel=1e-6)
    assert part.price > 0


@pytest.mark.parametrize("which", ["real", "large"])
def test_every_link_leads_somewhere(which: str, request: pytest.FixtureRequest) -> None:
    """Each id is there once, each link has its id; figures of every hospital lead into its ledger."""
    found = request.getfixturevalue("real") if which == "real" else large(3, 400)

    shown = page(found)

    assert len(set(shown.ids)) == len(shown.ids)
    assert [link for link in shown.links if link.removeprefix("#") not in shown.ids] == []
    assert all(link.startswith("#") for link in shown.links)
    for record in found.hospitals:
        last = max(line.seq for line in record.lines if line.kind == "charge")
        assert shown.links.count(f"#{record.hospital}-entry-{last}") >= 3
        assert f"#{record.hospital}-entry-1" in shown.links


def test_the_page_holds_the_figures(real: Audit) -> None:
    """Verdict, epsilon, limits, drop-outs, digests, keys and sources, as a reader sees them."""
    text = page(real).text

    assert "Everything that was checked holds: what 4 hospitals recorded is whole and signed" in text
    for record in real.hospitals:
        assert record.budget is not None
        assert f"{record.budget.spent.epsilon_filter:.3f}" in text
        assert f"{record.budget.spent.epsilon_pld:.3f}" in text
        assert record.keys[-1].fingerprint in text
        assert record.plans["lungs"].purpose in text
    assert f"3 of 4{LOST}" in text
    assert "a study was approved after another had produced results" in text
    for source in make_report(real, now=NOW).sources:
        assert source.sha256 in text


def test_the_json_holds_everything(real: Audit, tmp_path: Path) -> None:
    """The same figures, and every entry of every ledger with its whole hash."""
    report = make_report(real, now=NOW)

    write_json(tmp_path / "report.json", report, real)

    read = json.loads((tmp_path / "report.json").read_bytes())
    kept = read.pop("entries")
    assert list(kept) == [record.hospital for record in real.hospitals]
    for record in real.hospitals:
        assert [(line["seq"], line["hash"], line["kind"]) for line in kept[record.hospital]] == [
            (line.seq, line.hash, line.kind) for line in record.lines
        ]
        charges = [line for line in kept[record.hospital] if line["kind"] == "charge"]
        assert [line["mechanism"] for line in charges] == [
            line.mechanism.model_dump(mode="json") for line in record.lines if line.kind == "charge" and line.mechanism
        ]
    assert read == json.loads(report.model_dump_json())


def test_the_noise_and_the_trainers_tests_are_told(real: Audit) -> None:
    """As the auditor measured it in every opened sum of training; and a hospital's own test with its entry."""
    report = make_report(real, now=NOW)
    (first, second) = report.noise
    measured = noise_reports(real.attempts, real.hospitals)[0]

    assert (first.study, first.sums, first.unchecked) == ("breast-cancer", 2, 0)
    assert (second.study, second.sums) == ("lungs", 1)
    assert first.ratio == measured.ratio
    assert first.ratio == pytest.approx(1, abs=0.1)  # 2 sums of 1,024 coordinates: six standard errors of 1 / 64
    assert report.tests == ()

    check = Check(name="clipping", statistic=2.0, expected=1.0, verdict="failed")
    canaries = CanaryAudit(
        canaries=10,
        guesses=5,
        correct=5,
        epsilon_lower=0.4,
        confidence=0.95,
        epsilon_claimed=0.8,
        delta=1e-4,
        epsilon_expected=0.3,
        epsilon_most=1.0,
    )
    result = Conformance(
        rounds=1,
        steps=1,
        checks=(check,),
        canaries=canaries,
        false_alarm=1e-6,
        noise_ratio_found=0.9,
        trainer_digest="ab" * 32,
    )
    writer = Writer("north")
    writer.add("budget-opened")
    writer.add("conformance", study="heart", plan_digest="ab" * 32, conformance=result)
    tested = replace(real, hospitals=(hospital("north", writer),), attempts=())

    (test,) = make_report(tested, now=NOW).tests
    assert (test.entry, test.result) == (2, result)
    assert "clipping: failed" in page(tested).text
    assert "0.400 of 0.800" in page(tested).text


# Hostile evidence


def test_what_others_wrote_stays_text(real: Audit) -> None:
    """Markup in a purpose, a licence, a complaint, a claim, a finding or a file's name is shown, and is no markup."""
    record = real.hospitals[0]
    plan = record.plans["lungs"].model_copy(update={"purpose": HOSTILE, "data_licence": HOSTILE})
    claims = tuple(claim.model_copy(update={"accountant": HOSTILE}) for claim in record.claims)
    evil = replace(record, plans={"lungs": plan}, claims=claims, source=Path(HOSTILE), software_digest=HOSTILE)
    attempts = tuple(replace(attempt, complaint=HOSTILE) for attempt in real.attempts)
    findings = tuple(Finding(code=code, party=HOSTILE, what=HOSTILE) for code in CODES)
    found = replace(real, hospitals=(evil, *real.hospitals[1:]), attempts=attempts, findings=findings)

    shown = page(found)

    plain = page(real)
    assert {tag for tag, _ in shown.tags} <= {tag for tag, _ in plain.tags} | {"ul", "li", "br"}
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert shown.text.count("<script>alert(1)</script>") >= len(CODES)
    assert "\u202e" not in shown.text
    assert "\x1b" not in shown.text


def test_a_text_of_a_megabyte_does_not_drown_the_page(real: Audit) -> None:
    """A complaint in the coordinator's file has no length; the page shows its beginning."""
    attempts = tuple(replace(attempt, complaint="a word " * 150_000) for attempt in real.attempts)

    text = page(replace(real, attempts=attempts)).text

    assert len(text) < 200_000
    assert "a word a word" in text


def test_nothing_can_be_loaded_or_run() -> None:
    """The policy allows the page's own style sheet and nothing else; there is no script and no address of a file."""
    shown = page(large(2, 10))

    policy = next(a["content"] for tag, a in shown.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.endswith("base-uri 'none'; form-action 'none'")
    assert not {"script", "img", "link", "iframe", "object", "form"} & {tag for tag, _ in shown.tags}
    assert not [a for _, a in shown.tags if {"style", "src"} & set(a)]


# Large and broken evidence


def test_a_long_ledger_is_shown_by_what_is_referred_to(tmp_path: Path) -> None:
    """20 hospitals, 1,000 rounds: a page of about a megabyte; the JSON has all 44,000 entries."""
    found = large(20, 1000)
    report = make_report(found, now=NOW)

    text = render_report(report, found)
    write_json(tmp_path / "report.json", report, found)

    assert len(text) < 1.5e6
    assert Page(text).text.count("in the JSON file of this report") >= 20
    assert all(len(shown.curve) == MOST_POINTS for shown in report.hospitals)
    read = json.loads((tmp_path / "report.json").read_bytes())
    assert sum(len(lines) for lines in read["entries"].values()) == 20 * 2203
    assert [study["study"] for study in read["studies"]] == ["heart"]


def test_spans_cover_a_ledger_exactly() -> None:
    """Nothing is shown twice or left out; what is wanted is shown; numbers that are not there are ignored."""
    writer = Writer("north")
    writer.add("budget-opened")
    writer.study("heart", 300)
    wanted = {1, 2, 300, 301, 602, 9999}

    cut = spans(writer.lines, wanted, most=MOST_ENTRIES)

    assert [line for span in cut for line in span.lines] == writer.lines
    shown = {line.seq for span in cut if span.shown for line in span.lines}
    assert shown == {1, 2, 300, 301, 602, 603}  # a gap of one is no gap
    assert spans(writer.lines, wanted, most=1000) == [Span(writer.lines, shown=True)]
    assert spans([], wanted, most=10) == []


def test_a_ledger_that_does_not_hold_is_not_computed() -> None:
    """The page is made all the same, and says so wherever a figure would stand."""
    found = large(2, 10)
    broken = replace(found.hospitals[0], budget=None)

    text = page(replace(found, hospitals=(broken, found.hospitals[1]))).text

    assert text.count("the ledger does not hold") >= 3


def test_a_page_is_made_of_nothing() -> None:
    """No evidence at all, one hospital that never did anything, and one charge."""
    writer = Writer("north")
    writer.add("budget-opened")
    idle = replace(large(2, 1), hospitals=(hospital("north", writer),), attempts=(), members={})
    writer.study("heart", 1)
    one = replace(idle, hospitals=(hospital("north", writer),))

    assert "there is no hospital's evidence" in page(Audit((), (), ())).text
    assert "north: nothing was ever charged." in page(idle).text
    assert "north: one charge so far, of epsilon" in page(one).text


def test_two_ledgers_of_one_hospital_have_names_of_their_own() -> None:
    """Their entries are not confused, whatever else an audit says of it."""
    found = large(1, 10)

    again = replace(found.hospitals[0], source=Path("/evidence/again.zip"))

    shown = page(replace(found, hospitals=(found.hospitals[0], again)))

    assert {"hospital-1-1-entry-1", "hospital-1-2-entry-1"} <= set(shown.ids)
    assert len(set(shown.ids)) == len(shown.ids)


# Words


VERDICTS: list[tuple[list[str], str]] = [
    ([], "Everything that was checked holds"),
    (["not-here"], "Everything that was checked holds"),
    (["claim-too-high", "not-here"], "there is one open question"),
    (["claim-too-low", "claim-too-high"], "The promise to patients cannot be shown to hold: there is one serious"),
    (["claim-too-low", "claim-too-low"], "there are 2 serious findings, the first about hospital-1"),
]


@pytest.mark.parametrize(("codes", "sentence"), VERDICTS)
def test_the_verdict_is_the_worst_of_what_was_found(codes: list[str], sentence: str) -> None:
    """One sentence; and only notes let an audit pass."""
    given = [Finding(code=code, party="hospital-1", what="it is so") for code in codes]
    found = replace(large(2, 5, findings=given), root="the root")

    assert sentence in verdict(found)
    assert found.passed == ("checked holds:" in verdict(found))
    assert sentence in page(found).text


def test_the_verdict_says_that_nobody_vouched_for_the_keys() -> None:
    """Whoever reads one sentence only must not miss that."""
    assert "Without the consortium's root key, everything that could be checked holds" in verdict(large(2, 5))


@pytest.mark.parametrize(
    ("epsilon", "words"), [(0.0, "50 %"), (0.1, "53 %"), (1.0, "74 %"), (3.0, "96 %"), (8.0, "100 %")]
)
def test_epsilon_as_odds_is_rounded_up(epsilon: float, words: str) -> None:
    """exp(epsilon) / (1 + exp(epsilon)), never less: the glossary names the same figures."""
    assert odds(epsilon) == words


def test_findings_of_one_kind_are_told_together(real: Audit) -> None:
    """A thousand of them take twenty lines and the rest in one; each lead has its entry."""
    many = tuple(
        Finding(code="claim-too-low", party="hospital-1", what=f"figure {number}", entry=3) for number in range(1000)
    )

    text = page(replace(real, findings=many)).text

    assert "figure 19" in text
    assert "figure 20" not in text
    assert "and 980 more of the same kind" in text


def test_keys_are_told_with_what_the_consortium_says() -> None:
    """A rotated key, the one that replaced it, one that nobody vouches for, and a member without evidence."""
    found = large(3, 5)
    rotated = replace(found.hospitals[0], keys=(Key("old", 1), Key("new", 7)))
    records = (rotated, *found.hospitals[1:])
    members = {"hospital-1": "new", "hospital-2": "another", "hospital-9": "absent"}

    report = make_report(replace(found, hospitals=records, members=members), now=NOW)
    text = page(replace(found, hospitals=records, members=members)).text

    keys = [(key.fingerprint, key.first, key.vouched) for key in report.hospitals[0].keys]
    assert keys == [("old", 1, False), ("new", 8, True)]
    assert report.hospitals[1].keys[0].vouched is False
    assert report.hospitals[2].keys[0].vouched is None
    assert "no: it was exchanged" in text
    assert "absentno ledger hereyes" in text


def test_a_charge_without_a_result_is_counted() -> None:
    """Two attempts for each of two rounds: two charges came to nothing, and are paid for."""
    writer = Writer("north")
    writer.add("budget-opened")
    writer.study("heart", 6, releases_every=3, vain=2)

    (study,) = make_report(replace(large(1, 1), hospitals=(hospital("north", writer),)), now=NOW).studies

    (part,) = study.hospitals
    assert part.computed is not None
    assert (part.computed.charges, part.vain, len(part.releases)) == (6 + 2 + 2, 2, 2)
