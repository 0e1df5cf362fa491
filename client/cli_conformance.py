"""The command ``konsil-hospital conformance``: does the installed trainer do what the ledger says?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from client.settings import Settings
    from shared_models.plan import StudyPlan
    from shared_models.privacy.conformance import Conformance

_MEANINGS = {
    "sample-rate": "each patient's probability to be drawn",
    "draws-per-patient": "spread of draws per patient; 1 is Poisson sampling",
    "patients-per-draw": "spread of patients per draw; 1 is Poisson sampling",
    "clipping": "the most that one patient moves a step, over the clip",
    "patient-share": "what a drawn patient adds to a round, over the clip",
    "parameter-noise": "noise on the parameters, over what is claimed",
    "null-noise": "noise on the null coordinates, over what is claimed",
    "fresh-noise": "largest correlation of two rounds' noise",
    "noise-shape": "distance of the noise's distribution from a Gaussian",
    "real-rounds-noise": "noise of this plan's real rounds here, over what was charged",
    "canaries": "lower bound on epsilon; expected: of an honest run",
}


def conformance(
    settings_file: Annotated[Path, typer.Argument(help="The hospital's settings, hospital.toml.")],
    study: Annotated[str, typer.Argument(help="A study that was proposed here; or give --plan.")] = "",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Instead: a study plan.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the result; also works while the daemon runs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Test this hospital's installed trainer on made-up records, and sign the result into the ledger.

    No patient's record is read and no budget is spent. The ledger has one writer: the daemon must be stopped, or use
    --dry-run. The exit status is 0 only if every check holds.
    """
    from client.conformance import conform
    from client.device import choose_device
    from client.own_noise import noted_noise
    from client.process import refuse_second
    from client.settings import read_settings
    from shared_models.errors import ConformanceError
    from shared_models.pretrained import offer_bases

    settings = read_settings(settings_file)
    offer_bases(settings.pretrained)
    plan = _plan(settings, study, plan_file)
    if not dry_run:
        refuse_second(settings.state)  # before the rehearsal, not after it
    found = conform(
        plan,
        settings.population.public_size,
        device=choose_device(settings),
        noted=noted_noise(settings.state, plan.digest()),
    )
    recorded = None if dry_run else _record(settings, plan, found)
    if as_json:
        typer.echo(json.dumps({"study": plan.study, "entry": recorded, **found.model_dump(mode="json")}, indent=2))
    else:
        _show(plan, found, recorded)
    broken = [check.name for check in found.checks if check.verdict != "holds"]
    if broken:
        raise ConformanceError(
            f"the installed trainer does not do what study {plan.study} claims: {', '.join(broken)}",
            hint="Do not train with it. Install the release again; if that does not help, report it.",
        )


def _plan(settings: "Settings", study: str, plan_file: Path | None) -> "StudyPlan":
    from client.consent import Consents
    from shared_models.errors import ConfigError
    from shared_models.plan import read_plan

    if bool(study) == (plan_file is not None):
        raise ConfigError(
            "conformance needs a study or --plan, and not both", hint="konsil-hospital conformance hospital.toml STUDY"
        )
    if plan_file is not None:
        return read_plan(plan_file)
    proposed = Consents(settings.state).proposed(study)
    if proposed is None:
        raise ConfigError(f"the plan of study {study} is not kept here", hint="Give the plan itself: --plan FILE.")
    return proposed.plan


def _record(settings: "Settings", plan: "StudyPlan", found: "Conformance") -> int:
    """Sign the result into the ledger. Returns the entry's number."""
    from client.books import Books
    from shared_models.software import software_digest

    books = Books.open(settings)
    try:
        return books.ledger.append(
            "conformance",
            population=settings.population.name,
            study=plan.study,
            plan_digest=plan.digest(),
            software_digest=software_digest(),
            conformance=found,
        ).seq
    finally:
        books.close()


def _show(plan: "StudyPlan", found: "Conformance", recorded: int | None) -> None:
    import sys

    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(_table(found))
    canaries = found.canaries
    typer.echo(
        f"{plan.study}: {found.rounds} rounds of {found.steps} steps, rehearsed. A trainer that does what it claims "
        f"fails with probability {found.false_alarm:g} at most; noise below {found.noise_ratio_found:.3f} of what is "
        "claimed is found with probability 0.99."
    )
    typer.echo(
        f"{canaries.correct} of {canaries.guesses} guesses about {canaries.canaries} canaries were right: epsilon is "
        f"at least {canaries.epsilon_lower:.3f} (confidence {canaries.confidence:g}). Claimed "
        f"{canaries.epsilon_claimed:.3f} at delta {canaries.delta:g}; an honest run shows "
        f"{canaries.epsilon_expected:.3f} on average, and the test {canaries.epsilon_most:.3f} at most."
    )
    typer.echo("not recorded" if recorded is None else f"signed into the ledger: entry {recorded}")


def _table(found: "Conformance") -> "Table":
    from rich.table import Table

    table = Table("check", "verdict", "seen", "expected", "p-value", "what")
    for check in found.checks:
        p_value = "" if check.p_value is None else f"{check.p_value:.2g}"
        what = check.reason or _MEANINGS.get(check.name, "")
        table.add_row(check.name, check.verdict, f"{check.statistic:.4g}", f"{check.expected:.4g}", p_value, what)
    return table


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(conformance)
