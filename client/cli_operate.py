"""Commands of ``konsil-hospital`` for running it for years: ``doctor``, ``backup``, ``restore``."""

from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Argument(help="The hospital's settings, hospital.toml.")]


def doctor(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at all that a hospital needs, one line each: ok, warn or fail, and what to do. It changes nothing.

    The exit status is 0 unless something fails. Records are only opened: check-data reads them.
    """
    from client.doctor import examine
    from client.settings import read_settings
    from shared_models.health import healthy, in_words

    found = examine(read_settings(settings_file))
    typer.echo(in_words(found, as_json=as_json))
    if not healthy(found):
        raise typer.Exit(1)


def backup(
    settings_file: SettingsFile,
    target: Annotated[Path, typer.Argument(help="The backup's folder; made, and must not exist.")],
) -> None:
    """Copy settings, keys, roster, ledger, state and registry into a new folder; no records. The daemon may run.

    The backup holds private keys: keep it where you would keep them.
    """
    from client.backup import backup as make
    from client.settings import read_settings

    made = make(read_settings(settings_file), settings_file, target.absolute())
    size = sum(file.bytes for file in made.files.values())
    typer.echo(f"{target}: {len(made.files)} files, {size} bytes, {made.facts['ledger_entries']} ledger entries")


def restore(
    folder: Annotated[Path, typer.Argument(help="The backup's folder.")],
    settings_file: Annotated[Path, typer.Argument(help="hospital.toml; it comes from the backup if it is not there.")],
    keys_only: Annotated[
        bool, typer.Option("--keys-only", help="Only keys, certificates and roster that are missing here.")
    ] = False,
) -> None:
    """Put a backup back, with the daemon stopped; refused if that would forget a charge that this machine knows of."""
    from client.backup import restore as put_back
    from client.backup import restore_keys

    if keys_only:
        for path in restore_keys(folder, settings_file):
            typer.echo(f"restored {path}")
        return
    done = put_back(folder, settings_file)
    typer.echo(f"restored the backup of {done.manifest.time}: {done.entries} ledger entries")
    if done.aside is not None:
        typer.echo(f"what was there before is in {done.aside}; remove it when all is well")
    if not done.certain:
        typer.echo(
            "Nothing on this machine knows whether anything was charged after the backup. The coordinator does: if it "
            "shows a later receipt, this hospital stops (rolled-back), and a newer backup is needed."
        )


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (doctor, backup, restore):
        app.command()(command)
