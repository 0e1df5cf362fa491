"""Cross-validation: a study for each fold, each charged in full, and what they have in common.

A fold is a study like any other: hospitals approve it, reserve its cost, train without the fold's patients and release
statistics of them. Every patient is in all trainings but one and in one release, but the ledger charges all folds to
everybody: an upper bound that depends on nobody's fold.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from server.released import read_released
from server.report import estimate_release, evaluate_release, said
from server.settings import Settings
from server.store import State
from shared_models.config import read_toml
from shared_models.errors import ConfigError, StudyStateError
from shared_models.evaluation import SPECIFICITY, Evaluation
from shared_models.intervals import Estimate
from shared_models.plan import StudyPlan, parse_plan
from shared_models.privacy.mechanisms import best_order, filter_epsilon, study_mechanisms, total_divergence
from shared_models.subgroups import EVERYBODY
from shared_models.tasks import task_of

FORMAT = "konsil-cross-validation/1"


def fold_plans(plan: StudyPlan, count: int) -> list[StudyPlan]:
    """The plans of all folds: the same but for the fold, and named ``STUDY-fold-1`` and so on.

    Raises:
        ConfigError: The plan is a fold itself, releases nothing after its last round, or the names become too long.
    """
    if plan.fold is not None:
        raise ConfigError(f"study {plan.study} is a fold already", hint="Take [fold] out of the plan.")
    fields = plan.model_dump(mode="json")
    return [
        parse_plan(
            fields | {"study": f"{plan.study}-fold-{index}", "fold": {"index": index, "count": count}},
            f"fold {index} of {plan.study}",
        )
        for index in range(1, count + 1)
    ]


def cost_of_all(plan: StudyPlan, count: int) -> dict[str, Any]:
    """What all folds may cost a patient together: all that hospitals reserve for them, composed.

    By the filter's arithmetic at the plan's delta, one fold and all of them each at the Renyi order that suits it best.
    A hospital's own budget has an order of its own, at which it may be more; its ledger says so.
    """
    each, delta = study_mechanisms(plan, 1), plan.privacy.delta  # no price depends on a public size
    orders = {folds: best_order(each * folds, delta) for folds in (1, count)}
    one, every = (
        filter_epsilon(total_divergence(each * folds, order), order=order, delta=delta)
        for folds, order in orders.items()
    )
    return {"epsilon_of_one": one, "epsilon_of_all": every, "delta": delta, "order": orders[count]}


def summarise(plan: StudyPlan, folders: Sequence[Path]) -> dict[str, Any]:
    """Mean and spread of every figure over the folds, and what they cost together.

    Args:
        plan: What the folds are folds of.
        folders: Of the folds' studies, finished, in order.

    Returns:
        ``folds``: the last release's figures of each, with intervals; ``figures``: their means, standard deviations and
        ranges over those folds that have one; ``cost``. The spread holds the noise of the releases too.

    Raises:
        ConfigError: A fold's folder has no release.
    """
    folds = [_fold(one, folder) for one, folder in zip(fold_plans(plan, len(folders)), folders, strict=True)]
    names = dict.fromkeys(name for one in folds for name in one["figures"])
    return {
        "format": FORMAT,
        "study": plan.study,
        "folds": folds,
        "figures": {name: _spread([one["figures"].get(name, {}).get("value") for one in folds]) for name in names},
        "cost": cost_of_all(plan, len(folders)),
    }


def _fold(plan: StudyPlan, folder: Path) -> dict[str, Any]:
    releases = read_released(folder)
    if not releases:
        raise ConfigError(f"fold {plan.study} has released nothing", hint=f"See {folder / 'events.jsonl'}.")
    newest = releases[-1]
    found = evaluate_release(plan, task_of(plan), newest, specificity=SPECIFICITY)[EVERYBODY]
    figures = {
        name if len(found) == 1 else f"{name}, {label}": one
        for label, evaluation in found.items()
        for name, one in _figures(evaluation).items()
    }
    figures |= estimate_release(plan, task_of(plan), newest)[EVERYBODY]
    return {
        "study": plan.study,
        "folder": str(folder),
        "round": newest.round,
        "hospitals": newest.hospitals,
        "figures": {name: one._asdict() for name, one in figures.items()},
    }


def _figures(found: Evaluation) -> dict[str, Estimate]:
    return {
        "AUROC": found.auroc,
        "AUPRC": found.auprc,
        "sensitivity": found.at_half.sensitivity,
        "specificity": found.at_half.specificity,
        "Brier score": found.brier,
        "observed less predicted share": found.calibration_in_the_large,
        "calibration intercept": found.calibration_intercept,
        "calibration slope": found.calibration_slope,
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    known = [value for value in values if value is not None]
    return {
        "folds": len(known),
        "mean": mean(known) if known else None,
        "standard_deviation": stdev(known) if len(known) > 1 else None,
        "least": min(known, default=None),
        "greatest": max(known, default=None),
    }


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The summary for people."""
    folds: Sequence[Mapping[str, Any]] = summary["folds"]
    figures = Table("figure", "mean", "sd", *(f"fold {number}" for number in range(1, len(folds) + 1)))
    figures.title, figures.title_justify = f"{summary['study']}: over {len(folds)} folds", "left"
    for name, one in summary["figures"].items():
        cells = (said(Estimate(**fold["figures"][name])) if name in fold["figures"] else "" for fold in folds)
        figures.add_row(name, _number(one["mean"]), _number(one["standard_deviation"]), *cells)
    cost = summary["cost"]
    price = Table("", "epsilon", title="Cost to a patient, at most", title_justify="left")
    price.add_row("one fold", f"{cost['epsilon_of_one']:.3f}")
    price.add_row("all folds together", f"{cost['epsilon_of_all']:.3f}", style="bold")
    price.caption = f"at delta {cost['delta']:g}; all: Renyi order {cost['order']}"
    return [figures, price]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def run_folds(settings: Settings, plan_file: Path, count: int, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Coordinate until all folds of a plan are over, side by side as studies are; those that finished before stay.

    All are proposed at once, so that a hospital whose budget pays for some only says so before most is spent.

    Raises:
        ConfigError: The plan is invalid, or cannot be divided into folds.
        StudyStateError: A fold did not finish; what the others charged stays charged.
    """
    from server.coordinator import coordinating  # noqa: PLC0415 - it loads Flower

    plan = parse_plan(read_toml(plan_file, "plan"), str(plan_file))
    plans = fold_plans(plan, count)
    with coordinating(settings) as studies:
        for one in plans:
            row = studies.submit(one.model_dump(mode="json"), by="the command line").row
            if not row.state.over:
                studies.resume(one.study)
        rows = []
        for one in plans:
            rows.append(studies.wait(one.study))
            say(f"{one.study}: {rows[-1].state}")
    missed = [row for row in rows if row.state is not State.FINISHED]
    if missed:
        raise StudyStateError(
            f"study {missed[0].name} is {missed[0].state}: {missed[0].reason}",
            hint=f"See {missed[0].folder / 'events.jsonl'}; the other folds keep what they have.",
        )
    return summarise(plan, [row.folder for row in rows])


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="Choose another file.") from None
