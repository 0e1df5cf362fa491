"""Commands of ``konsil-hospital`` before and after studies: example data, and what becomes of a model."""

from pathlib import Path
from typing import Annotated

import typer


def example(
    name: Annotated[
        str,
        typer.Argument(help="breast-cancer, heart-disease, lung, pneumonia, note-specialty, or icu-mortality."),
    ],
    folder: Annotated[Path, typer.Argument(help="The hospital's folder; made if missing.")],
    part: Annotated[
        str | None, typer.Option("--hospital", help="Of heart-disease: cleveland, hungary, switzerland, long-beach.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A local copy of the file, or a folder with it; nothing is fetched.")
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Do not ask whether the licence is accepted.")
    ] = False,
    coordinator: Annotated[str, typer.Option(help="host:port of the coordinator.")] = "127.0.0.1:9092",
    epsilon: Annotated[float, typer.Option(help="Most that all studies together may cost a patient.")] = 4.0,
) -> None:
    """Write a hospital with public data: records and their manifest, a test part, settings with a policy, keys, ledger.

    The data's licence is shown first. What is fetched is held against a pinned digest before anything reads it.
    """
    from client.examples import find_example, write_hospital
    from shared_models.terminal import progress

    found = find_example(name)
    typer.echo(f"data      {found.source}\nlicence   {found.licence}")
    written = write_hospital(
        found,
        folder,
        part=part,
        data=data,
        accept=lambda: accept_licence or typer.confirm("Fetch it, and keep to this licence?"),
        say=progress(),
        coordinator=coordinator,
        epsilon=epsilon,
    )
    typer.echo(f"records   {folder / 'records'}: {written.patients} patients, declared as {written.public_size}")
    typer.echo(f"test      {folder / 'test'}: of no study")
    typer.echo(f"settings  {written.settings}; next: konsil-hospital check-data {written.settings}")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (example,):
        app.command()(command)
