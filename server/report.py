"""A study's report: what was released, with intervals and pictures, and what it cost; one HTML file, and JSON.

It is computed from what lies in the study's folder, and so from what hospitals released, noised and paid for: making it
again, or otherwise, spends nothing.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.checkpoint import checkpoint_path
from server.journal import read_events
from server.released import Released, read_released
from server.standing import Standing
from shared_models.durable import replace_file
from shared_models.errors import ConfigError
from shared_models.estimates import estimate_heads, leading_figures
from shared_models.evaluation import SPECIFICITY, AtThreshold, Evaluation, evaluate_task
from shared_models.intervals import LEVEL, Estimate
from shared_models.model_file import read_about
from shared_models.outcomes import compute_metrics, row_norm
from shared_models.pictures import (
    Bar,
    Drawn,
    Release,
    draw_costs,
    draw_evaluation,
    draw_groups,
    draw_progress,
    require_matplotlib,
    save,
)
from shared_models.plan import StudyPlan, parse_plan_json
from shared_models.subgroups import EVERYBODY, release_noise, split
from shared_models.tasks import Choice, Task, task_of

FORMAT: Final = "konsil-report/1"
FOLDER: Final = "report"  # beside the study's other files
WEB: Final = Path(__file__).parent / "web"
MOST_RELEASES: Final = 100  # in the picture of the rounds; of more, evenly chosen ones
MOST_BARS: Final = 20  # hospitals in the picture of the costs; the table has all

Groups = Mapping[tuple[str, str], Mapping[str, Evaluation]]


class Cost(NamedTuple):
    """What a study cost the patients of one hospital, as far as the journal says."""

    hospital: str
    public_size: int | None
    rounds: int
    enforced: float | None
    stated: float | None
    budget: float | None
    delta: float | None
    accountant: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """A study, as its folder tells it.

    Attributes:
        plan: As approved.
        standing: The journal, folded.
        release: The release that is shown; None where there is none.
        groups: Its evaluation by (column, group) and by class; ``EVERYBODY`` first.
        plain: By (column, group), the metrics of tasks with heads that are no choice.
        estimates: By (column, group), those of them that have intervals.
        noise: Standard deviation of the noise on every count of it.
        progress: Everybody's figures over the rounds.
        costs: By hospital.
        measured: What somebody measured on data of nobody's budget, by model.
        specificity: At which the sensitivity is said.
    """

    plan: StudyPlan
    standing: Standing
    release: Released | None
    groups: Groups
    plain: Mapping[tuple[str, str], Mapping[str, float]]
    estimates: Mapping[tuple[str, str], Mapping[str, Estimate]]
    noise: float
    progress: Sequence[Release]
    costs: Sequence[Cost]
    measured: Mapping[str, Mapping[str, float]]
    specificity: float

    def as_json(self) -> dict[str, Any]:
        """For machines; later releases add fields and remove none."""
        return {
            "format": FORMAT,
            "study": self.plan.study,
            "task": self.plan.task,
            "plan_digest": self.plan.digest(),
            "state": self.standing.state,
            "rounds": self.plan.rounds,
            "rounds_done": self.standing.done,
            "level": LEVEL,
            "released_after_round": self.release.round if self.release else None,
            "hospitals_in_release": self.release.hospitals if self.release else None,
            "noise": self.noise,
            "groups": [
                {
                    "column": column or None,
                    "group": group,
                    "classes": {label: one.as_json() for label, one in found.items()},
                    "metrics": dict(self.plain.get((column, group), {})),
                    "estimates": {name: one._asdict() for name, one in self.estimates.get((column, group), {}).items()},
                }
                for (column, group), found in self.groups.items()
            ],
            "progress": [
                {"round": one.round, "figures": {name: found._asdict() for name, found in one.figures.items()}}
                for one in self.progress
            ],
            "metrics_released": dict(self.standing.released) if self.standing.released else None,
            "costs": [cost._asdict() for cost in self.costs],
            "measured": {name: dict(figures) for name, figures in self.measured.items()},
        }


def write_report(
    folder: Path, out: Path | None = None, *, specificity: float = SPECIFICITY, round_number: int | None = None
) -> Path:
    """Write a study's report.

    Args:
        folder: The study's.
        out: Folder to write to; ``report`` in the study's where None.
        specificity: At which the sensitivity is said.
        round_number: Which release is shown; the newest where None.

    Returns:
        Path of ``report.html``, which needs nothing beside it. The pictures lie there too, as SVG and PNG, and
        ``report.json``.

    Raises:
        ConfigError: Matplotlib is not installed; the folder is no study's, or has no such release; or nothing can be
            written to ``out``.
    """
    require_matplotlib()
    report = read_report(folder, specificity=specificity, round_number=round_number)
    pictures = draw(report)
    target = out or folder / FOLDER
    try:
        save(target, pictures)
        content = json.dumps(report.as_json(), indent=1, allow_nan=False).encode() + b"\n"
        replace_file(target / "report.json", content)
        replace_file(target / "report.html", render(report, pictures).encode())
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}", hint="Choose another --out.") from None
    return target / "report.html"


def read_report(folder: Path, *, specificity: float = SPECIFICITY, round_number: int | None = None) -> Report:
    """Everything that a report says, from a study's folder; while the study runs, as far as it has come.

    Raises:
        ConfigError: It is no study's folder, or has no such release.
    """
    events, _ = read_events(folder / "events.jsonl")
    if not events:
        raise ConfigError(f"{folder} has no journal of a study", hint="Name the folder that holds events.jsonl.")
    standing = Standing()
    for event in events:
        standing.see(event)
    plan = _plan(folder, standing)
    task = task_of(plan)
    releases = read_released(folder)
    chosen = next((one for one in reversed(releases) if round_number in {None, one.round}), None)
    if round_number is not None and chosen is None:
        raise ConfigError(
            f"nothing was released after round {round_number}",
            hint=f"Releases: {', '.join(str(one.round) for one in releases) or 'none'}.",
        )
    return Report(
        plan=plan,
        standing=standing,
        release=chosen,
        groups=evaluate_release(plan, task, chosen, specificity=specificity) if chosen else {},
        plain=_plain(plan, task, chosen) if chosen else {},
        estimates=estimate_release(plan, task, chosen) if chosen else {},
        noise=noise_of(plan, task, chosen) if chosen else 0.0,
        progress=[_figures(plan, task, one) for one in _evenly(releases)],
        costs=[_cost(name, standing) for name in sorted(standing.hospitals)],
        measured=_measured(folder),
        specificity=specificity,
    )


def _plan(folder: Path, standing: Standing) -> StudyPlan:
    """The plan, from any model of the study."""
    newest = checkpoint_path(folder / "checkpoints", standing.done)
    for file in (folder / "model.safetensors", newest):
        if file.exists():
            return parse_plan_json(read_about(file).get("plan", ""), str(file))
    raise ConfigError(f"{folder} has no model yet", hint="A report can be made once the first round is done.")


def _shrunk(plan: StudyPlan, task: Task) -> float:
    """What clipping leaves of a patient: S below a row's length makes all counts smaller alike.

    Exact for one choice and one record per patient; else rows may be shorter, and less of them was clipped.
    """
    return min(1.0, plan.evaluation.clip / row_norm(task)) if plan.evaluation else 1.0


def noise_of(plan: StudyPlan, task: Task, released: Released) -> float:
    """Standard deviation of the noise on every count of patients."""
    return release_noise(plan.evaluation, released.hospitals) / _shrunk(plan, task) if plan.evaluation else 0.0


def evaluate_release(plan: StudyPlan, task: Task, released: Released, *, specificity: float) -> Groups:
    """Every group of a release, evaluated with its noise.

    Raises:
        ProtocolError: The statistics are none of this plan's.
    """
    if plan.evaluation is None:
        return {}
    noise = noise_of(plan, task, released)
    return {
        group: evaluate_task(
            task, counts / _shrunk(plan, task), bins=plan.evaluation.bins, noise=noise, specificity=specificity
        )
        for group, counts in split(task, plan.evaluation, released.statistics).items()
    }


def estimate_release(
    plan: StudyPlan, task: Task, released: Released
) -> Mapping[tuple[str, str], Mapping[str, Estimate]]:
    """Every group's figures of heads that are no choice, with intervals that know the noise.

    Raises:
        ProtocolError: The statistics are none of this plan's.
    """
    if plan.evaluation is None:
        return {}
    noise, shrunk, bins = noise_of(plan, task, released), _shrunk(plan, task), plan.evaluation.bins
    return {
        group: estimate_heads(task, counts / shrunk, bins=bins, noise=noise)
        for group, counts in split(task, plan.evaluation, released.statistics).items()
    }


def _plain(plan: StudyPlan, task: Task, released: Released) -> Mapping[tuple[str, str], Mapping[str, float]]:
    if plan.evaluation is None or all(isinstance(head, Choice) for head in task.heads):
        return {}
    counts = split(task, plan.evaluation, released.statistics)
    return {
        group: compute_metrics(task, part / _shrunk(plan, task), bins=plan.evaluation.bins)
        for group, part in counts.items()
    }


def _figures(plan: StudyPlan, task: Task, released: Released) -> Release:
    whole = evaluate_release(plan, task, released, specificity=SPECIFICITY)[EVERYBODY]
    alone = len(whole) == 1
    estimates = estimate_release(plan, task, released)[EVERYBODY]
    figures = {"AUROC" if alone else f"AUROC {label}": one.auroc for label, one in whole.items()}
    figures |= {name: estimates[name] for name in leading_figures(task)}
    if alone:
        figures["AUPRC"] = next(iter(whole.values())).auprc
    return Release(released.round, figures)


def _evenly(releases: Sequence[Released]) -> list[Released]:
    if len(releases) <= MOST_RELEASES:
        return list(releases)
    return [releases[round(place * (len(releases) - 1) / (MOST_RELEASES - 1))] for place in range(MOST_RELEASES)]


def _cost(name: str, standing: Standing) -> Cost:
    seen = standing.hospitals[name]
    stated = seen.stated or {}
    return Cost(
        hospital=name,
        public_size=seen.public_size,
        rounds=seen.rounds,
        enforced=seen.epsilon,
        stated=stated.get("epsilon"),
        budget=stated.get("budget_epsilon"),
        delta=stated.get("delta"),
        accountant=stated.get("accountant", ""),
    )


def _measured(folder: Path) -> Mapping[str, Mapping[str, float]]:
    path = folder / "card.json"
    return (json.loads(path.read_text(encoding="utf-8")).get("metrics") or {}) if path.exists() else {}


# how it looks


def draw(report: Report) -> dict[str, Drawn]:
    """All pictures of a report, by the names of their files."""
    pictures: dict[str, Drawn] = {}
    if report.groups.get(EVERYBODY):
        pictures |= draw_evaluation(report.groups[EVERYBODY])
        if len(report.groups) > 1 and any(found.value is not None for _, found in _rows(report)):
            pictures["groups"] = draw_groups(_rows(report), figure="AUROC")
    if len(report.estimates) > 1:
        for name in leading_figures(task_of(report.plan)):
            rows = [(_named(group, "", 1), those[name]) for group, those in report.estimates.items()]
            if any(found.value is not None for _, found in rows):
                pictures[f"groups-{name}"] = draw_groups(rows, figure=name)
    if any(found.value is not None for one in report.progress for found in one.figures.values()):
        pictures["progress"] = draw_progress(report.progress)
    limit = report.plan.privacy.epsilon
    bars = [
        Bar(cost.hospital, cost.enforced, cost.budget or limit) for cost in report.costs if cost.enforced is not None
    ]
    if bars:
        pictures["costs"] = draw_costs(sorted(bars, key=lambda bar: -bar.spent)[:MOST_BARS])
    return pictures


def _rows(report: Report) -> list[tuple[str, Estimate]]:
    return [
        (_named(group, label, len(found)), one.auroc)
        for group, found in report.groups.items()
        for label, one in found.items()
    ]


def _named(group: tuple[str, str], label: str, classes: int) -> str:
    column, name = group
    what = f"{column}: {name}" if column else name
    return what if classes == 1 else f"{what}, {label}"


def render(report: Report, pictures: Mapping[str, Drawn]) -> str:
    """The report as one HTML file: no script, nothing from elsewhere; what others wrote is escaped."""
    web = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return web.get_template("report.html").render(
        report=report,
        plan=report.plan,
        description=task_of(report.plan).description,
        figures={label: list(_said_figures(one)) for label, one in report.groups.get(EVERYBODY, {}).items()},
        rows=[
            (_named(group, label, len(found)), one, said(one.auroc), said(one.at_half.sensitivity))
            for group, found in report.groups.items()
            for label, one in found.items()
        ],
        columns=sorted({name for figures in report.measured.values() for name in figures} - {"records"}),
        plain={_named(group, "", 1): _said_plain(report, group) for group in report.plain},
        plain_columns=list(dict.fromkeys(name for group in report.plain for name in _said_plain(report, group))),
        leading=leading_figures(task_of(report.plan)),
        pictures={name: base64.b64encode(drawn.svg).decode() for name, drawn in pictures.items()},
        level=f"{LEVEL:.0%}",
        limit=report.plan.privacy.epsilon,
        said=said,
    )


def _said_plain(report: Report, group: tuple[str, str]) -> dict[str, str]:
    """Figures of a group by name: with an interval where there is one, and then never without."""
    metrics = {
        name: f"{value:.0f}" if name.endswith("records") else f"{value:.3f}"
        for name, value in report.plain[group].items()
    }
    return metrics | {name: said(found) for name, found in report.estimates.get(group, {}).items()}


def _said_figures(found: Evaluation) -> list[tuple[str, str, str]]:
    """Name, figure with interval, and what it means in a few words."""
    at = found.at_specificity
    return [
        ("AUROC", said(found.auroc), "how often a patient with it scores above one without"),
        ("AUPRC", said(found.auprc), "mean precision over all sensitivities"),
        *_decisions("at a score of 1/2", found.at_half),
        *_decisions(f"at a score of {at.threshold:.2f}", at),
        ("Brier score", said(found.brier), "mean squared distance of the score from the truth; 0 is best"),
        ("observed less predicted share", said(found.calibration_in_the_large), "0 if as many have it as predicted"),
        ("calibration intercept", said(found.calibration_intercept), "the same on the logit scale, at a slope of 1"),
        ("calibration slope", said(found.calibration_slope), "1 is best; below 1, scores are too extreme"),
    ]


def _decisions(where: str, found: AtThreshold) -> list[tuple[str, str, str]]:
    return [
        (f"sensitivity {where}", said(found.sensitivity), "share of those with it that are found"),
        (f"specificity {where}", said(found.specificity), "share of those without it that are left alone"),
        (
            f"positive predictive value {where}",
            said(found.positive_predictive_value),
            "share of the found that have it",
        ),
        (f"negative predictive value {where}", said(found.negative_predictive_value), "share of the rest without it"),
    ]


def said(found: Estimate) -> str:
    """A figure with its interval, for people."""
    if found.value is None:
        return f"cannot be told ({found.low:.2f} to {found.high:.2f})"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
