"""Commands of ``konsil-coordinator`` for the roster: ``init, enrol, revoke, sign, kits, roster``."""

import time
from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Option("--settings", help="The coordinator's settings, coordinator.toml.")]


def init(
    folder: Annotated[Path, typer.Argument(help="The coordinator's folder; made if missing.")],
    address: Annotated[str, typer.Option(help="host:port by which hospitals reach it.")],
    consortium: Annotated[str, typer.Option(help="a-z, 0-9, -.")] = "consortium",
    name: Annotated[str, typer.Option(help="a-z, 0-9, -.")] = "coordinator",
    state: Annotated[str, typer.Option(help="Folder of studies, in FOLDER or absolute.")] = "state",
) -> None:
    """Make the consortium's root key, the TLS authority, the coordinator's settings and an empty roster."""
    from server.enrol import init as make

    found = make(folder, consortium=consortium, name=name, address=address, state=state)
    typer.echo(f"root key  {found}")
    typer.echo("Read this fingerprint out to every hospital. root/root.key may move to a machine without a network.")


def enrol(
    request: Annotated[Path, typer.Argument(help="NAME.request.json from the hospital.")],
    settings_file: SettingsFile,
    fingerprint: Annotated[str | None, typer.Option(help="As read out; otherwise you are asked.")] = None,
) -> None:
    """Check a hospital's request and stage the roster with it; it counts once it is signed."""
    from server.enrol import enrol as admit
    from server.settings import read_settings
    from shared_models.enrolment import Request

    def confirm(found: Request) -> bool:
        if fingerprint is not None:
            return fingerprint == found.fingerprint
        typer.echo(f"{found.name}, {found.display_name}, {found.public_size} patients")
        return typer.confirm(f"identity  {found.fingerprint}\nIs this what the hospital read out?")

    staged = admit(read_settings(settings_file), request, confirm=confirm)
    typer.echo(f"staged: roster version {staged.version}, {len(staged.members)} hospitals; now sign it")


def revoke(
    hospital: Annotated[str, typer.Argument(help="Its name on the roster.")], settings_file: SettingsFile
) -> None:
    """Stage the roster in which a hospital is turned out; it counts once it is signed and handed out."""
    from server.enrol import revoke as turn_out
    from server.settings import read_settings

    staged = turn_out(read_settings(settings_file), hospital)
    typer.echo(f"staged: roster version {staged.version} without {hospital}; now sign it")


def sign(
    staged: Annotated[Path, typer.Argument(help="roster.next.json.")],
    root_key: Annotated[Path, typer.Option(help="The consortium's root key.")],
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="Also write the kits, where the coordinator's folder is.")
    ] = None,
) -> None:
    """Sign a staged roster with the root key, on any machine that has both."""
    from server.enrol import sign as write
    from shared_models.identity import load_key

    path, signed = write(staged, load_key(root_key))
    typer.echo(f"{path}: roster version {signed.version}, {len(signed.members)} hospitals")
    if settings_file is not None:
        kits(settings_file)


def kits(settings_file: SettingsFile) -> None:
    """Write a kit for every member of the signed roster; kits hold no secret."""
    from server.enrol import write_kits
    from server.settings import read_settings

    for path in write_kits(read_settings(settings_file)):
        typer.echo(f"kit       {path}")


def roster(settings_file: SettingsFile) -> None:
    """Show the signed roster."""
    from server.members import signed_roster
    from server.settings import read_settings
    from shared_models.identity import fingerprint

    signed, now = signed_roster(read_settings(settings_file)), time.time()
    typer.echo(f"{signed.consortium}, version {signed.version}, root key {signed.root_fingerprint}")
    for member in signed.members:
        state = "revoked" if member.revoked else "valid" if member.valid(now) else "not valid now"
        typer.echo(f"{member.name:<20} {state:<14} {fingerprint(bytes.fromhex(member.identity))}")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (init, enrol, revoke, sign, kits, roster):
        app.command()(command)
