"""Commands of ``konsil-coordinator`` about results: a study's report, and cross-validation."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="The study's folder, with events.jsonl.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report; default: report in the study's folder.")
    ] = None,
    specificity: Annotated[float, typer.Option(min=0.01, max=0.999, help="At which the sensitivity is said.")] = 0.9,
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, help="Which release to show; default: the newest.")
    ] = None,
) -> None:
    """Write a study's report: figures with intervals, curves, groups, costs; report.html needs nothing beside it.

    It is made from what hospitals released and paid for, so that it spends nothing. Needs matplotlib.
    """
    from server.report import write_report

    typer.echo(write_report(folder, out, specificity=specificity, round_number=round_number))


def cross_validate(
    plan: Annotated[Path, typer.Argument(help="The study plan (TOML), which releases after its last round.")],
    settings_file: Annotated[Path, typer.Option("--settings", help="The coordinator's settings, coordinator.toml.")],
    folds: Annotated[int, typer.Option(min=2, max=20, help="Into how many parts hospitals divide their patients.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the summary to this file.")] = None,
) -> None:
    """Run a study for each fold, and show mean and spread; every fold is charged in full at every hospital.

    Interrupted, it goes on where it was when it is given again.
    """
    from rich.console import Console

    from server import logs
    from server.folds import run_folds, tables, write_summary
    from server.settings import read_settings

    settings = read_settings(settings_file)
    logs.to_terminal("coordinator", settings.log_format)
    found = run_folds(settings, plan, folds, say=typer.echo)
    for table in tables(found):
        Console(highlight=False).print(table)
    if json_file is not None:
        write_summary(json_file, found)


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(report)
    app.command("cross-validate")(cross_validate)
