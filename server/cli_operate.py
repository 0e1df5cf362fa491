"""Commands of ``konsil-coordinator`` for running it for years: ``doctor``."""

import json
from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Option("--settings", help="The coordinator's settings, coordinator.toml.")]


def doctor(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at all that a coordinator needs, one line each: ok, warn or fail, and what to do. It changes nothing.

    The exit status is 0 unless something fails.
    """
    from server.doctor import examine
    from server.settings import read_settings
    from shared_models.health import healthy, lines

    found = examine(read_settings(settings_file))
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        typer.echo("\n".join(lines(found)))
    if not healthy(found):
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (doctor,):
        app.command()(command)
