"""Commands of ``konsil-coordinator`` for running it for years: ``doctor``, ``backup``, ``restore``."""

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
    from shared_models.health import healthy, in_words

    found = examine(read_settings(settings_file))
    typer.echo(in_words(found, as_json=as_json))
    if not healthy(found):
        raise typer.Exit(1)


def backup(
    target: Annotated[Path, typer.Argument(help="The backup's folder; made, and must not exist.")],
    settings_file: SettingsFile,
) -> None:
    """Copy settings, certificates, rosters and state into a new folder, without the root key. It may be running.

    The backup holds private keys: keep it where you would keep them.
    """
    from server.backup import backup as make
    from server.backup import own_database
    from server.settings import read_settings

    settings = read_settings(settings_file)
    made = make(settings, settings_file, target.absolute())
    typer.echo(f"{target}: {len(made.files)} files, {sum(file.bytes for file in made.files.values())} bytes")
    if settings.database is not None and not own_database(settings):
        typer.echo(f"database {made.facts['database']}: not in it; back it up with pg_dump, at the same hour")
    typer.echo("The root key is not in it: it has a backup of its own, offline.")


def restore(
    folder: Annotated[Path, typer.Argument(help="The backup's folder.")],
    settings_file: SettingsFile,
) -> None:
    """Put a backup where there is no coordinator yet; nothing is overwritten."""
    from server.backup import restore as put_back

    done = put_back(folder, settings_file)
    typer.echo(f"restored the backup of {done.time}: {len(done.files)} files, database {done.facts['database']}")
    typer.echo(
        "Hospitals refuse rounds that they have done since: a study that was under way then ends as failed. Submit its "
        "plan under another name; withdraw the old one at the hospitals."
    )


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (doctor, backup, restore):
        app.command()(command)
