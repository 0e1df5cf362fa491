"""A report as one HTML file: no script, nothing from elsewhere, and everything that others wrote is escaped."""

import base64
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from auditor.findings import Finding
from auditor.record import Audit
from auditor.report import MOST_ROUNDS, Hospital, Point, Report, Span, Study, UsedMechanism, anchors_of, recipe, spans
from shared_models.curves import MOST_SERIES, Chart, chart
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian

LONGEST_TEXT = 2000  # characters of one text: as many as a study's purpose may have
WEB = Path(__file__).parent / "web"
MOST_ROWS = 12  # of one hospital, in the table behind a picture of several
MOST_PLACES = 20  # of findings of one kind
MOST_LINKS = 12  # to entries, in one cell
FREQUENT = frozenset({"charge", "round-done", "release", "checkpoint"})  # kinds that a long ledger has many of
MOST_ENTRIES = 250  # a longer ledger is shown by the entries that something refers to; the JSON has all
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


class Row(NamedTuple):
    """One line of the table behind a picture: its cells, and the entry that the last one rests on."""

    cells: tuple[str, ...]
    anchor: str
    entry: int


class Picture(NamedTuple):
    """A chart with the same in words and in numbers.

    Attributes:
        text: What a reader sees in it, for whoever does not.
        unit: What the horizontal axis counts.
    """

    chart: Chart
    text: str
    unit: str
    heads: tuple[str, ...]
    rows: Sequence[Row]


class Ledger(NamedTuple):
    """The appendix of one hospital."""

    hospital: str
    anchor: str
    spans: Sequence[Span]
    entries: int


def printable(value: object) -> object:
    """A text without what could hide a part of it or turn its direction, and no longer than anybody reads."""
    if isinstance(value, str) and not isinstance(value, Markup):
        shown = _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", value[:LONGEST_TEXT])
        return shown if len(value) <= LONGEST_TEXT else f"{shown}\N{HORIZONTAL ELLIPSIS}"
    return value


def environment() -> Environment:
    """Templates that escape what they are given, and fail where a name is missing."""
    web = Environment(
        loader=FileSystemLoader(WEB),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )
    web.filters |= {
        "epsilon": epsilon,
        "moment": _moment,
        "odds": odds,
        "plain": plain,
        "breakable": breakable,
        "chance": chance,
    }
    return web


def style() -> tuple[Markup, str]:
    """The style sheet, and the policy that allows it and nothing else: no script, no picture, no font, no form."""
    text = (WEB / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return Markup(text), policy  # noqa: S704 - a file of this package


def render_report(report: Report, audit: Audit) -> str:
    """The page.

    Args:
        report: What it says.
        audit: What the report was made from: the entries come from it.
    """
    sheet, policy = style()
    ledgers = _ledgers(report, audit)
    there = {
        (ledger.anchor, line.seq) for ledger in ledgers for span in ledger.spans if span.shown for line in span.lines
    }
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            style=sheet,
            policy=policy,
            burn_down={hospital.anchor: _burn_down(hospital) for hospital in report.hospitals},
            pictures={study.study: (_over_rounds(study), _sums(study)) for study in report.studies},
            populations={hospital.anchor: hospital.population for hospital in report.hospitals},
            accountants=", ".join(_accountants(report)),
            label=_labels(report),
            describe=describe,
            anchors={hospital.hospital: hospital.anchor for hospital in reversed(report.hospitals)},
            findings=_by_kind(report.findings),
            most_places=MOST_PLACES,
            ledgers=ledgers,
            there=there,
            most_rounds=MOST_ROUNDS,
            most_links=MOST_LINKS,
        )
    )


def _by_kind(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one kind together, the worst kinds first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.code, []).append(finding)
    return list(kinds.values())


def _labels(report: Report) -> Callable[[PoissonGaussian | GaussianRelease], str]:
    """What names a charge's mechanism on the page."""
    labels = {recipe(used.mechanism): used.label for used in report.mechanisms}
    return lambda mechanism: labels.get(recipe(mechanism), "")


def _accountants(report: Report) -> list[str]:
    """Whose figures hospitals state."""
    claims = [hospital.claim for hospital in report.hospitals]
    claims += [part.claim for study in report.studies for part in study.hospitals]
    return sorted({claim.accountant for claim in claims if claim is not None})


# Words for numbers


def epsilon(value: float | None) -> str:
    """Three decimals, rounded to the nearest; a dash where there is none."""
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else f"{value:.3f}"


def odds(value: float) -> str:
    """How sure an attacker can become at most who could as well have tossed a coin, in per cent, rounded up.

    Source:
        Bayes' rule with even prior odds: the posterior odds are at most exp(epsilon), apart from delta.
    """
    sure = 100 / (1 + math.exp(-value))
    shown = math.ceil(sure * 10 - 1e-9) / 10 if sure > 99 else math.ceil(sure - 1e-9)
    return f"{shown:g} %"


def describe(used: UsedMechanism) -> str:
    """A mechanism in words."""
    mechanism = used.mechanism
    noise = (
        f"What a patient adds is cut to length {mechanism.clip:.4g}. Then Gaussian noise is added, "
        f"{mechanism.noise_multiplier:.4g} times that length (standard deviation "
        f"{mechanism.noise_multiplier * mechanism.clip:.4g})."
    )
    if isinstance(mechanism, GaussianRelease):
        times = "" if mechanism.releases == 1 else f" {mechanism.releases} times"
        return f"Release of statistics{times}: every validation patient takes part. {noise}"
    low, high = used.batches or (mechanism.expected_batch, mechanism.expected_batch)
    expected = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, by the hospital's size"
    return (
        f"Training: {plain(mechanism.steps)} steps. In each, every patient is drawn by chance with probability "
        f"{mechanism.sample_rate:.4g}. {noise} Patients expected in a step: {expected}."
    )


def breakable(text: str) -> Markup:
    """A fingerprint that may be broken between its groups."""
    return Markup(":<wbr>").join(text.split(":"))


def plain(number: float) -> str:
    """A number as people write it."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def chance(probability: float) -> str:
    """A small probability in words."""
    return f"one in {1 / probability:,.0f}" if probability > 0 else "none"


def _moment(time: str) -> str:
    return time[:16].replace("T", " ")


# Pictures


def _burn_down(hospital: Hospital) -> Picture | None:
    """What is left of a hospital's budget, over its charges; one charge makes no picture."""
    points, budget = hospital.curve, hospital.terms.epsilon
    if len(points) < 2:
        return None
    drawn = chart(
        f"Budget of {hospital.hospital}",
        {
            "left": [(point.charges, budget - point.spent) for point in points],
            "spent": [(point.charges, point.spent) for point in points],
        },
        last=points[-1].charges,
        limit=(f"budget {budget:g}", budget),
    )
    first, last = points[0], points[-1]
    text = (
        f"Of a budget of epsilon {budget:g}, {epsilon(first.spent)} was spent after the first charge, and "
        f"{epsilon(last.spent)} after the last, number {last.charges}; {epsilon(budget - last.spent)} was not spent."
    )
    rows = [
        Row(
            (str(point.charges), _moment(point.time), epsilon(point.spent), epsilon(budget - point.spent)),
            hospital.anchor,
            point.entry,
        )
        for point in points
    ]
    return Picture(drawn, text, "charge", ("charges", "time, UTC", "spent", "not spent"), rows)


def _over_rounds(study: Study) -> Picture | None:
    """Epsilon of one study at every hospital, over its rounds; one round makes no picture."""
    series = {part.anchor: [(float(point.round), point.spent) for point in part.curve] for part in study.hospitals}
    there = {name: points for name, points in series.items() if points}
    last = max((point.round for part in study.hospitals for point in part.curve), default=0)
    if last < 2:
        return None
    limits = {part.limit for part in study.hospitals}
    highest = max(limits)
    drawn = chart(
        f"Epsilon of study {study.study}",
        there,
        last=last,
        limit=(f"limit {highest:g}", highest) if len(limits) == 1 else (f"highest limit {highest:g}", highest),
    )
    ends = ", ".join(
        f"{epsilon(part.curve[-1].spent)} at {part.anchor} after round {part.curve[-1].round}"
        for part in study.hospitals[:MOST_SERIES]
        if part.curve
    )
    rows = [
        Row((part.anchor, str(point.round), _moment(point.time), epsilon(point.spent)), part.anchor, point.entry)
        for part in study.hospitals[:MOST_SERIES]
        for point in _fewer(part.curve)
    ]
    text = f"Epsilon by the hospitals' filters, at the study's delta. At the end: {ends}."
    return Picture(drawn, text, "round", ("hospital", "round", "time, UTC", "spent by then"), rows)


def _fewer(points: Sequence[Point]) -> Sequence[Point]:
    """The first, the last and some between."""
    step = math.ceil(len(points) / MOST_ROWS)
    return [*points[:-1:step], points[-1]] if points else []


def _sums(study: Study) -> Picture | None:
    """How many hospitals were in the sum of each round; one round makes no picture."""
    if len(study.summed) < 2:
        return None
    points = [(float(number), float(hospitals)) for number, hospitals in study.summed]
    most = len(study.attendance)
    drawn = chart(
        f"Hospitals in the sum, study {study.study}",
        {"hospitals": points},
        last=study.summed[-1][0],
        limit=(f"asked {most}", float(most)),
        whole=True,
    )
    counts = Counter(hospitals for _, hospitals in study.summed)
    text = "; ".join(
        f"{hospitals} of {most} hospitals in {'one round' if rounds == 1 else f'{rounds} rounds'}"
        for hospitals, rounds in sorted(counts.items(), reverse=True)
    )
    return Picture(drawn, f"{text}.", "round", (), ())


# Entries


def _ledgers(report: Report, audit: Audit) -> list[Ledger]:
    wanted = _wanted(report)
    anchors = anchors_of(audit.hospitals)
    return [
        Ledger(
            record.hospital,
            anchors[id(record)],
            spans(
                record.lines,
                wanted[anchors[id(record)]] | {line.seq for line in record.lines if line.kind not in FREQUENT},
                most=MOST_ENTRIES,
            ),
            len(record.lines),
        )
        for record in audit.hospitals
    ]


def _wanted(report: Report) -> defaultdict[str, set[int]]:
    """Every entry that the page refers to, by ledger."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    for hospital in report.hospitals:
        wanted[hospital.anchor] |= {1, hospital.entries, hospital.last or 1, *(point.entry for point in hospital.curve)}
        wanted[hospital.anchor] |= {key.first for key in hospital.keys}
        wanted[hospital.anchor] |= {place for used in hospital.software for place in (used.first, used.last)}
        wanted[hospital.anchor] |= {found.entry or 1 for found in report.findings if found.party == hospital.hospital}
    for part in (part for study in report.studies for part in study.hospitals):
        wanted[part.anchor] |= {part.approved, *part.again, part.closed or 1, part.last or 1}
        wanted[part.anchor] |= {point.entry for point in part.curve} | set(part.releases[:MOST_LINKS])
    for use in (use for used in report.mechanisms for use in used.uses):
        wanted[use.anchor] |= {use.first, use.last}
    for rests in (rests for edge in report.edges for rests in edge.rests):
        wanted[rests.anchor].add(rests.entry)
    return wanted
