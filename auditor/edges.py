"""The sharp edges of an accounting: what its figures rest on, and what they do not show; from what is recorded.

Each edge is stated from facts in the evidence, with the entries it was read from, and with what a careful reader does
about it. An edge is no fault: it is what the same figure would not tell by itself.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from auditor.claims import TIGHT_TOLERANCE
from auditor.noise import noise_reports
from auditor.recompute import PLD_INTERVAL
from auditor.record import Audit, HospitalRecord, Line
from shared_models.config import Frozen
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian


class Rests(NamedTuple):
    """An entry that a statement was read from: the name that its ledger has on the page, and the entry's number."""

    anchor: str
    entry: int


class Edge(Frozen):
    """One thing to know about the figures.

    Attributes:
        severity: How far a figure could mislead whoever does not know it.
        says: What is recorded, and what it means.
        do: What to do about it.
        rests: Entries that show it; one for each hospital at most.
    """

    topic: str
    severity: Literal["high", "medium", "low"]
    says: str
    do: str
    rests: tuple[Rests, ...] = ()


def sharp_edges(audit: Audit, anchors: Mapping[int, str]) -> list[Edge]:
    """What to know about these figures, the sharpest first.

    Args:
        audit: What was read.
        anchors: The name of each record on the page, by the record's ``id``.
    """
    if not audit.hospitals:
        return []
    found = [
        *_unit(audit, anchors),
        *_adaptivity(audit, anchors),
        *_absent(audit),
        *_recorded_only(audit, anchors),
        *_sampling(audit, anchors),
        *_several_hospitals(audit, anchors),
        *_size(audit, anchors),
        *_software(audit, anchors),
        *_adjacency(audit, anchors),
        *_computation(audit),
        *_clocks(),
    ]
    return sorted(found, key=lambda edge: ("high", "medium", "low").index(edge.severity))


def _everywhere(audit: Audit, anchors: Mapping[int, str], entry: int = 1) -> tuple[Rests, ...]:
    return tuple(Rests(anchors[id(record)], entry) for record in audit.hospitals)


def _unit(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    units = sorted({record.terms.unit for record in audit.hospitals})
    yield Edge(
        topic="Who counts as one person",
        severity="high",
        says=f"What is protected is one {' or '.join(units)} with all records at one hospital. The ledger cannot show "
        "that all records of a patient carry the same number. A patient who stands in the data under two numbers has "
        "half the protection.",
        do="Ask each hospital how it links the records of a patient, and whether it declared one row per patient.",
        rests=_everywhere(audit, anchors),
    )


def _several_hospitals(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    spent = sorted(
        ((record.budget.spent.epsilon_filter, record.hospital, record) for record in audit.hospitals if record.budget),
        key=lambda found: (-found[0], found[1]),
    )
    if len({name for _, name, _ in spent}) < 2:
        return
    (first, one, here), (second, other, there) = spent[0], next(found for found in spent if found[1] != spent[0][1])
    yield Edge(
        topic="Patients of two hospitals",
        severity="medium",
        says="Nothing links patients across hospitals. A patient of two hospitals is covered by the sum of both "
        "figures: "
        f"in the worst case here epsilon {first + second:.3f}, for a patient of {one} ({first:.3f}) and of {other} "
        f"({second:.3f}).",
        do="Where many patients are treated at several of these hospitals, judge by the sum.",
        rests=tuple(Rests(anchors[id(record)], line.seq) for record in (here, there) for line in _last_charge(record)),
    )


def _last_charge(record: HospitalRecord) -> list[Line]:
    return [line for line in record.lines if line.kind == "charge"][-1:]


def _adjacency(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    relations = sorted({record.terms.neighbouring for record in audit.hospitals})
    yield Edge(
        topic="What is compared with what",
        severity="low",
        says=f"The figures compare the data with the same data after one change: {' or '.join(relations)}. Other texts "
        "compare data in which one person is replaced by another. Their figures are up to twice as large for the same "
        "protection.",
        do="Compare figures of two systems only if both name the same comparison.",
        rests=_everywhere(audit, anchors),
    )


def _sampling(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    rates: dict[float, Rests] = {}
    releases: list[Rests] = []
    tested: list[Rests] = []
    for record in audit.hospitals:
        first_release = None
        for line in record.lines:
            if line.kind == "charge" and isinstance(line.mechanism, PoissonGaussian):
                rates.setdefault(line.mechanism.sample_rate, Rests(anchors[id(record)], line.seq))
            if line.kind == "charge" and isinstance(line.mechanism, GaussianRelease):
                first_release = first_release or Rests(anchors[id(record)], line.seq)
            if line.kind == "conformance" and (not tested or tested[-1].anchor != anchors[id(record)]):
                tested.append(Rests(anchors[id(record)], line.seq))
        releases += [first_release] if first_release else []
    if not rates:
        return
    shares = ", ".join(f"{rate:.3g}" for rate in sorted(rates))
    checked = (
        f"{len(tested)} of {len(audit.hospitals)} hospitals recorded a test of it."
        if tested
        else "No hospital recorded a test of it."
    )
    yield Edge(
        topic="How patients were drawn",
        severity="medium",
        says=f"The price of training assumes that in every step each patient was drawn by chance, independently of all "
        f"others (Poisson sampling), with probability {shares}. Fixed or shuffled batches would cost more than is "
        f"charged here. The ledger records the probability; it cannot show how the draw was made. {checked}"
        + (" Released statistics use every patient, and are priced so." if releases else ""),
        do="Ask for a conformance test of the hospital's trainer (konsil-hospital conformance), or for konsil-audit "
        "attack.",
        rests=(*rates.values(), *tested, *releases),
    )


def _adaptivity(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    """Was anything decided after results were known? Then the tight figure is no bound, and the filter's is."""
    later: list[Rests] = []
    approvals = [
        Rests(anchors[id(record)], line.seq)
        for record in audit.hospitals
        for line in [line for line in record.lines if line.kind == "plan-approved"][:1]
    ]
    for record in audit.hospitals:
        charged: set[str | None] = set()
        for line in record.lines:
            if line.kind == "charge":
                charged.add(line.study)
            elif line.kind == "plan-approved" and charged - {line.study}:
                later.append(Rests(anchors[id(record)], line.seq))
                break
    early = sorted(
        {name for record in audit.hospitals for name, plan in record.plans.items() if plan.early_stopping is not None}
    )
    known = any(record.plans for record in audit.hospitals)
    reasons = [
        *(["a study was approved after another had produced results"] if later else []),
        *([f"the plan of {', '.join(early)} lets released results end the study early"] if early else []),
    ]
    if reasons:
        says = (
            f"Something may have been decided after results were known: {' and '.join(reasons)}. Then only the "
            "enforced figure is a bound. The tight figures (PLD, PRV, RDP) hold for a schedule fixed in advance."
        )
    else:
        says = (
            "No ledger shows a study that was approved after another had produced results"
            + (", and no plan lets results end a study early" if known else "")
            + ". If nobody stopped a study because of its results either, the tight figures hold as well as "
            "the enforced one."
        )
    yield Edge(
        topic="Decisions on the way",
        severity="high" if reasons else "low",
        says=says,
        do="Quote the enforced figure. It holds whatever was decided on the way.",
        rests=tuple(later or approvals),
    )


def _size(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    for_each = "; ".join(
        f"{record.hospital} {record.terms.public_size}" for record in sorted(audit.hospitals, key=lambda r: r.hospital)
    )
    yield Edge(
        topic="Size of the population",
        severity="medium",
        says="How many patients there are was declared by each hospital when the budget was opened, and is not counted "
        f"from records: {for_each}. It limits delta: at most one in ten times the size. Were the true number far "
        "smaller, "
        "that limit would be weaker than it looks.",
        do="Compare the declared sizes with what is known of the hospitals.",
        rests=_everywhere(audit, anchors),
    )


def _software(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    places: dict[str, Rests] = {}
    for record in audit.hospitals:
        for line in record.lines:
            if line.software_digest is not None:
                places.setdefault(line.software_digest, Rests(anchors[id(record)], line.seq))
    if len(places) > 1:
        yield Edge(
            topic="Software",
            severity="low",
            says=f"The ledgers name {len(places)} different versions of the software. A digest tells versions apart; "
            "it does not show what a version does.",
            do="Ask which releases these digests belong to, and when they were installed.",
            rests=tuple(places.values()),
        )


def _recorded_only(audit: Audit, anchors: Mapping[int, str]) -> Iterator[Edge]:
    tests = [
        Rests(anchors[id(record)], line.seq)
        for record in audit.hospitals
        for line in [line for line in record.lines if line.kind == "conformance"][-1:]
    ]
    noise = [found for found in noise_reports(audit.attempts, audit.hospitals) if found.ratio is not None]
    sums = sum(found.attempts for found in noise)
    seen = (
        f"In {'one sum' if sums == 1 else f'{sums} sums'} the noise itself was measured, in coordinates that hold "
        "nothing else: section 8 of the report has the result, and how little noise would have been noticed."
        if noise
        else "Nothing in this evidence let the noise itself be measured."
    )
    yield Edge(
        topic="Recorded is not done",
        severity="medium" if tests or noise else "high",
        says=f"A ledger proves what a hospital recorded. It does not prove that noise was really added. {seen}",
        do="Have each hospital's trainer tested (konsil-hospital conformance) before large studies, and the model "
        "attacked (konsil-audit attack) before it is given away.",
        rests=tuple(tests),
    )


def _absent(audit: Audit) -> Iterator[Edge]:
    here = {record.hospital for record in audit.hospitals}
    asked = {name for attempt in audit.attempts for name in attempt.invited}
    missing = sorted((set(audit.members) | asked) - here)
    if missing:
        shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        yield Edge(
            topic="Evidence that is not here",
            severity="high",
            says=f"Members of the consortium without evidence in this audit: {shown}. Nothing is said about their "
            "patients.",
            do="Ask these hospitals for their evidence bundles, and audit all of them together.",
        )


def _computation(audit: Audit) -> Iterator[Edge]:
    orders = ", ".join(str(order) for order in sorted({record.terms.order for record in audit.hospitals}))
    yield Edge(
        topic="How epsilon was computed",
        severity="low",
        says="By Google's dp-accounting, in this audit, from the recorded mechanisms. The enforced figure: Renyi "
        f"divergences at the order that each budget fixed ({orders}). PLD: privacy loss distributions in cells of "
        f"{PLD_INTERVAL:g}, rounded up. RDP: the best whole order. The hospitals' own figures come from other code; "
        f"tight ones may differ by {TIGHT_TOLERANCE:g}. Attempts that failed were charged like any other.",
        do="Nothing. It is stated so that others can compute the same.",
    )


def _clocks() -> Iterator[Edge]:
    yield Edge(
        topic="Times",
        severity="low",
        says="Times are those of the hospitals' own clocks. The order of entries is proven; the times are not.",
        do="Where a date matters, ask for a second source.",
    )
