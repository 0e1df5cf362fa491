"""The model card: what the model is, what it was trained on, what it cost whom. Markdown for people, JSON for tools."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from server.checkpoint import BEST
from server.journal import read_events
from shared_models.durable import replace_file
from shared_models.messages import PrivacyStatement
from shared_models.model_file import INTENDED_USE, read_about
from shared_models.plan import StudyPlan
from shared_models.pretrained import base_of, origin_of
from shared_models.secagg.protocol import plan_threshold, who_could_learn_what
from shared_models.secagg.quantize import MODULUS_BITS
from shared_models.software import software_digest
from shared_models.tasks import task_of

Metrics = Mapping[str, float]


def write_card(
    folder: Path,
    plan: StudyPlan,
    public_sizes: Mapping[str, int],
    statements: Mapping[str, PrivacyStatement],
    *,
    metrics: Mapping[str, Metrics] | None = None,
    about_data: str | None = None,
) -> Path:
    """Write ``card.md`` and ``card.json`` beside the model.

    Args:
        folder: The study's folder.
        plan: As approved by every hospital.
        public_sizes: Declared sizes of the hospitals that took part.
        statements: What each hospital states the study cost, by its own ledger.
        metrics: Figures by the name of what was measured, where somebody measured on data of nobody's budget.
        about_data: A sentence on where the data comes from.

    Returns:
        Path of ``card.md``.
    """
    events = read_events(folder / "events.jsonl")[0]
    hospitals, threshold = _least_protected(events, plan, len(public_sizes))
    card = {
        "study": plan.study,
        "purpose": plan.purpose,
        "task": plan.task,
        "description": task_of(plan).description,
        "network": plan.network.model_dump(mode="json"),
        "base": _base(plan),
        "engines": _engines(events, statements),
        "rounds": plan.rounds,
        "stopped_early": next((_stop(event) for event in events if event["event"] == "stopped-early"), None),
        "best": _best(folder / BEST),
        "plan_digest": plan.digest(),
        "software_digest": software_digest(),
        "data_licence": plan.data_licence,
        "data": about_data,
        "public_sizes": dict(sorted(public_sizes.items())),
        "privacy": {name: s.model_dump(mode="json") for name, s in sorted(statements.items())},
        "secure_aggregation": {
            "enabled": True,
            "threshold": threshold,
            "hospitals": hospitals,
            "modulus_bits": MODULUS_BITS,
        },
        "metrics": metrics,
    }
    replace_file(folder / "card.json", json.dumps(card, indent=2).encode() + b"\n")
    replace_file(folder / "card.md", _markdown(plan, card, statements, metrics or {}).encode())
    return folder / "card.md"


def _base(plan: StudyPlan) -> dict[str, str | None] | None:
    """What the network starts from, and under which licence, as far as that is known; None where it starts anew."""
    digest = base_of(plan.network)
    if digest is None:
        return None
    origin = origin_of(digest)
    return {
        "digest": digest,
        "name": origin.name if origin else None,
        "licence": origin.licence if origin else None,
    }


def _engines(
    events: Sequence[Mapping[str, Any]], statements: Mapping[str, PrivacyStatement]
) -> dict[str, Literal["book-keeping", "opacus-hooks", "unknown"]]:
    """Where gradients per patient came from, by hospital.

    A statement names the exception only. What it leaves unsaid is this software's own choice, so that it says something
    of a hospital that runs the same.
    """
    same = {event["hospital"] for event in events if event["event"] == "enrolled" and event["same_software"]}
    return {
        name: statement.engine or ("book-keeping" if name in same else "unknown")
        for name, statement in sorted(statements.items())
    }


def _stop(event: Mapping[str, Any]) -> dict[str, Any]:
    return {"round": event["round"], "reason": event["reason"]}


def _best(path: Path) -> dict[str, Any] | None:
    """Which model was best by what was released; None where nothing was."""
    if not path.exists():
        return None
    about = read_about(path)
    return {
        "file": path.name,
        "round": int(about["round"]),
        "metric": about["metric"],
        "released": float(about["value"]),
    }


def _least_protected(events: Sequence[Mapping[str, Any]], plan: StudyPlan, hospitals: int) -> tuple[int, int]:
    """Hospitals invited and threshold of the sum of updates with the smallest threshold, by the study's journal."""
    sums = [event for event in events if event["event"] == "sum"]
    least = min(sums, key=lambda event: event["threshold"], default=None)
    if least is None:
        return hospitals, plan_threshold(plan.minimum_hospitals, hospitals)
    return least["hospitals"], least["threshold"]


def read_statements(folder: Path) -> tuple[dict[str, int], dict[str, PrivacyStatement]]:
    """Public sizes and privacy statements of a card written before."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    statements = {name: PrivacyStatement.model_validate(fields) for name, fields in card["privacy"].items()}
    return card["public_sizes"], statements


_TEMPLATE = """\
# Model card: {plan.study}

{plan.purpose}

- Task: {plan.task}: {description}
- Network: {plan.network.name}
{base}- Training: {rounds} of {plan.training.steps} local steps; {averaging} weighted by public sizes
- Data: {data}
- Data licence: {plan.data_licence}
- Plan digest: `{plan_digest}`
- Software digest: `{software_digest}`
{best}
## What it cost

Unit: one patient, all records together. Neighbouring data sets differ by adding or removing one patient.
Mechanism: Poisson sampling with rate {plan.privacy.sample_rate:g}, clip {plan.privacy.clip:g}, noise multiplier
{plan.privacy.noise_multiplier:g}, in every local step at every hospital.

| hospital | public size | charges | epsilon | enforced epsilon | of budget | delta | accountant |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
{costs}

*epsilon* is the tight figure for the schedule as executed, valid if it was fixed in advance. *enforced epsilon* is what
the hospital's Renyi filter held it to, valid whatever was decided on the way. Both are the hospitals' own statements;
their signed ledgers are the evidence.

Gradients per patient: {engines}.

## Who could learn what

{who}

What protects a patient inside a sum, and in the model, is the noise that each hospital added before anything left it.
Drop-outs, public sizes and the epsilon that each hospital states are not secret.
{metrics}
## Intended use

{intended_use}
"""


def _markdown(
    plan: StudyPlan, card: Mapping[str, Any], statements: Mapping[str, PrivacyStatement], metrics: Mapping[str, Metrics]
) -> str:
    """The card for people."""
    costs = [
        f"| {name} | {s.public_size} | {s.rounds} | {s.epsilon:.3f} | {s.epsilon_filter:.3f} | {s.budget_epsilon:g} "
        f"| {s.delta:g} | {s.accountant} |"
        for name, s in sorted(statements.items())
    ]
    absent = sorted(set(card["public_sizes"]) - set(statements))
    costs += [
        f"| {name} | {card['public_sizes'][name]} | not stated: offline at the end | | | | | |" for name in absent
    ]
    return _TEMPLATE.format(
        plan=plan,
        rounds=_rounds(plan, card),
        averaging=_AVERAGING[plan.averaging.name] + (", FedProx at the hospitals" if plan.training.proximal else ""),
        best=_about_best(card),
        base=_about_base(card),
        engines=_about_engines(card),
        description=card["description"],
        data=card["data"] or "stays at the hospitals named below",
        plan_digest=card["plan_digest"],
        software_digest=card["software_digest"],
        costs="\n".join(costs),
        who=who_could_learn_what(card["secure_aggregation"]["hospitals"], card["secure_aggregation"]["threshold"]),
        metrics=_metrics_table(metrics),
        intended_use=INTENDED_USE,
    )


def _about_base(card: Mapping[str, Any]) -> str:
    base = card["base"]
    if base is None:
        return ""
    return (
        f"- Starts from: {base['name'] or 'a base whose name is not known here'}, frozen; "
        f"licence: {base['licence'] or 'not known here: ask whoever wrote the plan'}; digest `{base['digest']}`\n"
    )


_ENGINES = {
    "book-keeping": "from book-keeping",
    "opacus-hooks": "from Opacus's hooks, because book-keeping does not cover the network",
    "unknown": "not stated",
}


def _about_engines(card: Mapping[str, Any]) -> str:
    """Each way with the hospitals that took it."""
    engines = card["engines"]
    said = (
        f"{words} ({', '.join(names)})"
        for engine, words in _ENGINES.items()
        if (names := [name for name, found in engines.items() if found == engine])
    )
    return "; ".join(said) or "not stated"


_AVERAGING = {
    "fedavg": "FedAvg",
    "fedavgm": "FedAvg with momentum",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
}


def _rounds(plan: StudyPlan, card: Mapping[str, Any]) -> str:
    """How many rounds there were, and why not all that were planned."""
    stop = card["stopped_early"]
    if stop is None:
        return f"{plan.rounds} rounds"
    return f"{stop['round']} of {plan.rounds} rounds (ended early, by released statistics: {stop['reason']})"


def _about_best(card: Mapping[str, Any]) -> str:
    """Where the best model lies beside the last; and what an early end means for the figures below."""
    best, lines = card["best"], []
    if best is not None:
        lines.append(
            f"- Best: `{best['file']}` is the model of round {best['round']}, chosen by the released {best['metric']}, "
            f"{best['released']:.3f}; noised, and the best of several, it flatters. `model.safetensors` is the last."
        )
    if card["stopped_early"] is not None:
        lines.append("- The end was decided by what was released: *enforced epsilon* is what holds.")
    return "".join(f"{line}\n" for line in lines)


def _metrics_table(metrics: Mapping[str, Metrics]) -> str:
    """One row per model, one column per figure; empty where nothing was measured."""
    if not metrics:
        return ""
    names = sorted({name for figures in metrics.values() for name in figures} - {"records"})
    rows = ["", "## Metrics", "", "On a test part that belongs to no hospital.", ""]
    rows += ["| model | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for model, figures in metrics.items():
        cells = [f"{figures[name]:.3f}" if name in figures else "" for name in names]
        rows.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, ""])
