"""Commands of ``konsil-hospital`` for joining a consortium: ``init``, ``join``, ``rotate``, ``status``."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Argument(help="The hospital's settings, hospital.toml.")]


class Rotated(Enum):
    """A hospital's own keys."""

    IDENTITY = "identity"
    NODE = "node"
    TLS = "tls"


def init(
    folder: Annotated[Path, typer.Argument(help="The hospital's folder; made if missing.")],
    name: Annotated[str, typer.Option(help="a-z, 0-9, -: the name on the roster.")],
    coordinator: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    public_size: Annotated[int, typer.Option(min=1, help="Number of patients, rounded; it becomes known.")],
    epsilon: Annotated[float, typer.Option(help="Most that all studies together may cost a patient.")],
    delta: Annotated[float, typer.Option(help="What epsilon holds at; at most 1 / (10 * public size).")],
    order: Annotated[int, typer.Option(min=2, help="Renyi order of the budget's filter.")],
    display_name: Annotated[str, typer.Option(help="For people.")] = "",
    registry: Annotated[
        Path | None, typer.Option(help="Registry of an enrolment before, or of another population of this hospital.")
    ] = None,
    records: Annotated[str, typer.Option(help="Folder of the records, in FOLDER or absolute.")] = "records",
    state: Annotated[str, typer.Option(help="Folder of ledger and logs, in FOLDER or absolute.")] = "state",
) -> None:
    """Make this hospital's keys, settings and ledger here, and the request to be enrolled."""
    from client.enrol import init as make

    path, request = make(
        folder,
        name=name,
        display_name=display_name or name,
        coordinator=coordinator,
        public_size=public_size,
        epsilon=epsilon,
        delta=delta,
        order=order,
        registry=registry,
        records=records,
        state=state,
    )
    typer.echo(f"request      {path}")
    typer.echo(f"fingerprint  {request.fingerprint}")
    typer.echo("Send the request to the coordinator, and read the fingerprint out on the telephone.")


def join(
    settings_file: SettingsFile,
    kit: Annotated[Path, typer.Argument(help="NAME.kit.json from the coordinator.")],
    root_fingerprint: Annotated[str | None, typer.Option(help="As read out; otherwise you are asked.")] = None,
    new_root: Annotated[
        bool, typer.Option("--new-root", help="The consortium moves to another root key; confirmed like the first.")
    ] = False,
) -> None:
    """Check a kit and pin it: the consortium's root key, the signed roster, this hospital's TLS certificate."""
    from client.enrol import join as pin
    from client.settings import read_settings

    def confirm(found: str) -> bool:
        if root_fingerprint is not None:
            return root_fingerprint == found
        return typer.confirm(f"root key  {found}\nIs this what the coordinator read out?")

    signed = pin(read_settings(settings_file), kit, confirm=confirm, new_root=new_root)
    typer.echo(f"joined {signed.consortium}: roster version {signed.version}, {len(signed.members)} hospitals")


def rotate(
    settings_file: SettingsFile,
    key: Annotated[Rotated, typer.Argument(help="Which key.")],
) -> None:
    """Make a new key beside an old one, and the request to put it on the roster; join takes it into use."""
    from client.rotate import rotate as make
    from client.settings import read_settings

    path, request = make(read_settings(settings_file), settings_file.absolute().parent, key.value)
    typer.echo(f"request      {path}")
    typer.echo(f"fingerprint  {request.fingerprint}")
    typer.echo("Send the request to the coordinator as at enrolment; the old key is in use until you join its kit.")


def status(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Show who this hospital is, whom it is with, and what is left of its budget."""
    from client.enrol import status as found
    from client.settings import read_settings

    facts = found(read_settings(settings_file))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    warnings, expires = facts.pop("warnings"), facts.pop("expires")
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<17} {', '.join(value) if isinstance(value, list) else value}")
    for what, day in expires.items():
        typer.echo(f"{'expires':<17} {day}  {what}")
    for warning in warnings:
        typer.echo(f"{'warning':<17} {warning}")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (init, join, rotate, status):
        app.command()(command)
