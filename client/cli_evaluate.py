"""The command ``konsil-hospital evaluate``: models on this hospital's own patients, for its own eyes."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli_use import Bases

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from client.appraise import Appraisal, Measured
    from client.records.records import Records
    from shared_models.evaluation import AtThreshold, Evaluation
    from shared_models.intervals import Estimate
    from shared_models.plan import Subgroups


def evaluate(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Model files, the one to compare with first; without any, paths come on standard input."),
    ] = None,
    records: Annotated[
        Path | None, typer.Option("--records", help="Folder with manifest.toml and the data it names.")
    ] = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="Instead: hospital.toml, to measure on its validation part.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Folder for intervals, curves and groups: JSON, SVG and PNG.")
    ] = None,
    specificity: Annotated[
        float, typer.Option(min=0.01, max=0.999, help="At which the report says the sensitivity.")
    ] = 0.9,
    subgroup: Annotated[
        list[str] | None,
        typer.Option(
            "--subgroup",
            help="Of the report: a column of the task's table or of the plan's subgroups, or with edges as in "
            "age:40,65. Default: the plan's.",
        ),
    ] = None,
    base: Bases = None,
) -> None:
    """Measure models on local records, without noise: one line of JSON per model. For the hospital's own eyes.

    With several models, or --report, tables show every figure with its interval, and how the models differ from the
    first. Without MODELS it stays warm and reads one path per line from standard input.
    """
    from shared_models.errors import ConfigError
    from shared_models.pretrained import offer_files

    offer_files(base or ())
    if (records is None) == (settings_file is None):
        raise ConfigError("evaluate needs --records or --settings", hint="konsil-hospital evaluate MODEL --records …")
    if models and (report is not None or len(models) > 1 or settings_file is not None):
        _appraise(models, records, settings_file, report, specificity, subgroup)
        return
    if records is None:
        raise ConfigError("paths on standard input need --records", hint="Name the models, or the folder.")
    _lines(models, records)


def _lines(models: "Sequence[Path] | None", records: Path) -> None:
    from client.alone import evaluate_folder

    if models:
        typer.echo(json.dumps(evaluate_folder(models[0], records)))
        return
    for line in sys.stdin:
        path = Path(line.strip())
        if path.exists():  # a study drops old checkpoints; one that is gone has a newer one behind it
            typer.echo(json.dumps({"model": str(path), **evaluate_folder(path, records)}))
            sys.stdout.flush()


def _appraise(
    models: "Sequence[Path]",
    records: Path | None,
    settings_file: Path | None,
    report: Path | None,
    specificity: float,
    subgroup: "Sequence[str] | None",
) -> None:
    from rich.console import Console

    from client.appraise import (
        appraise,
        own_validation,
        records_of_folder,
        subgroups_of,
        task_of_models,
        write_report,
    )
    from client.settings import read_settings
    from shared_models.pictures import require_matplotlib

    if report is not None:
        require_matplotlib()
    planned = subgroups_of(models[0])
    wanted = planned if subgroup is None else [_subgroup(text, planned) for text in subgroup]
    task = task_of_models(models, wanted)
    found: tuple[Records, str]
    found = (
        records_of_folder(task, records)
        if records is not None
        else own_validation(task, read_settings(settings_file or Path()))
    )
    appraisal = appraise(models, found[0], part=found[1], specificity=specificity, subgroups=wanted)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in _tables(appraisal):
        console.print(table)
    if report is not None:
        write_report(report, appraisal)
        console.print(f"written: {report}", soft_wrap=True)


def _subgroup(text: str, planned: "Sequence[Subgroups]") -> "Subgroups":
    """``sex``, or ``age:40,65``; a column beside the network's inputs is what the plan says that it is."""
    from pydantic import ValidationError

    from shared_models.config import explain
    from shared_models.errors import ConfigError
    from shared_models.plan import Subgroups

    column, _, edges = text.partition(":")
    known = {one.column: one.model_dump() for one in planned if one.beside}.get(column, {"column": column})
    try:
        given = {"edges": tuple(float(edge) for edge in edges.split(","))} if edges else {}
        return Subgroups.model_validate(known | given)
    except (ValueError, ValidationError) as error:
        what = explain(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"--subgroup {text}: {what}", hint="As in --subgroup sex --subgroup age:40,65.") from None


def _tables(appraisal: "Appraisal") -> "Iterator[Table]":
    from rich.table import Table

    about = f"{appraisal.patients} patients, {appraisal.records} records: {appraisal.part}"
    labels = next(iter(appraisal.models.values())).classes
    for label in labels:
        table = Table("", *appraisal.models, title=f"{appraisal.task}: {label}; {about}", title_justify="left")
        columns = [dict(_figures(one.classes[label])) for one in appraisal.models.values()]
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
        yield table
        groups = next(iter(appraisal.models.values())).groups
        if groups:
            table = Table("group", "patients", *appraisal.models, title=f"AUROC: {label}", title_justify="left")
            for group, those in groups.items():
                count = f"{those[label].positives + those[label].negatives:.0f}"
                cells = (_said(one.groups[group][label].auroc) for one in appraisal.models.values())
                table.add_row(group, count, *cells)
            yield table
        if appraisal.differences:
            first = next(iter(appraisal.models))
            table = Table(
                "model", "difference", "p", title=f"AUROC less that of {first}: {label}", title_justify="left"
            )
            for name, one in appraisal.differences[label].items():
                table.add_row(name, f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})", f"{one.p_value:.3g}")
            yield table
    if not labels or appraisal.leading:
        table = Table("", *appraisal.models, title=f"{appraisal.task}; {about}", title_justify="left")
        one_model = next(iter(appraisal.models.values()))
        for name in one_model.metrics if not labels else one_model.estimates["everybody"]:
            table.add_row(name, *(_said_plain(one, name) for one in appraisal.models.values()))
        yield table
        for figure in appraisal.leading if one_model.groups else ():
            table = Table("group", *appraisal.models, title=figure, title_justify="left")
            for group in one_model.groups:
                table.add_row(group, *(_said(one.estimates[group][figure]) for one in appraisal.models.values()))
            yield table


def _said_plain(found: "Measured", name: str) -> str:
    estimates = found.estimates["everybody"]
    return _said(estimates[name]) if name in estimates else f"{found.metrics[name]:.4g}"


def _figures(found: "Evaluation") -> "Iterator[tuple[str, str]]":
    yield "AUROC", _said(found.auroc)
    yield "AUPRC", _said(found.auprc)
    yield from _decisions("at 1/2", found.at_half)
    yield "threshold of that specificity", f"{found.at_specificity.threshold:.3f}"
    yield from _decisions("there", found.at_specificity)
    yield "Brier score", _said(found.brier)
    yield "observed less predicted share", _said(found.calibration_in_the_large)
    yield "calibration intercept", _said(found.calibration_intercept)
    yield "calibration slope", _said(found.calibration_slope)


def _decisions(where: str, found: "AtThreshold") -> "Iterator[tuple[str, str]]":
    yield f"sensitivity {where}", _said(found.sensitivity)
    yield f"specificity {where}", _said(found.specificity)
    yield f"positive predictive value {where}", _said(found.positive_predictive_value)
    yield f"negative predictive value {where}", _said(found.negative_predictive_value)


def _said(found: "Estimate") -> str:
    value = "none" if found.value is None else f"{found.value:.3f}"
    return f"{value} ({found.low:.3f} to {found.high:.3f})"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)
