"""Commands of ``konsil-coordinator`` for the roster: ``init, enrol, revoke, renew, sign, kits, roster``."""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Option("--settings", help="The coordinator's settings, coordinator.toml.")]


class Renewed(Enum):
    """A certificate of the coordinator's."""

    CERTIFICATE = "certificate"
    AUTHORITY = "authority"


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


def renew(
    which: Annotated[Renewed, typer.Argument(help="The coordinator's own, or the authority's.")],
    settings_file: SettingsFile,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a new key too: the old one may be known.")] = False,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address that the certificate is for; as before by default.")
    ] = None,
) -> None:
    """Issue a certificate anew: the coordinator's own at once, the authority's with the next signed roster."""
    from server.renew import renew_authority, renew_certificate
    from server.settings import read_settings

    settings = read_settings(settings_file)
    if which is Renewed.CERTIFICATE:
        until = renew_certificate(settings, new_key=new_key, hosts=host or ())
        typer.echo(f"{settings.tls.certificate}: valid until {until:%Y-%m-%d}; restart the coordinator")
        return
    staged = renew_authority(settings, new_key=new_key)
    typer.echo(f"staged: roster version {staged.version} with the new authority; now sign it, and hand out the kits")
    if new_key:
        typer.echo("Every certificate will be issued anew; hospitals connect again once they have joined their kit.")


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
    from server.renew import take_over_authority
    from server.settings import read_settings

    settings = read_settings(settings_file)
    if take_over_authority(settings):
        typer.echo(f"{settings.tls.ca}: the new authority is in use; restart the coordinator")
    for path in write_kits(settings):
        typer.echo(f"kit       {path}")


def roster(settings_file: SettingsFile) -> None:
    """Show the signed roster, and what runs out within 30 days."""
    from server.expiry import expiries
    from server.members import signed_roster
    from server.settings import read_settings
    from shared_models.certificates import warnings
    from shared_models.identity import fingerprint

    settings, now = read_settings(settings_file), time.time()
    signed = signed_roster(settings)
    typer.echo(f"{signed.consortium}, version {signed.version}, root key {signed.root_fingerprint}")
    for member in signed.members:
        state = "revoked" if member.revoked else "valid" if member.valid(now) else "not valid now"
        until = time.strftime("%Y-%m-%d", time.gmtime(member.valid_until))
        typer.echo(f"{member.name:<20} {state:<14} until {until}  {fingerprint(bytes.fromhex(member.identity))}")
    for warning in warnings(expiries(settings)):
        typer.echo(f"warning: {warning}")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (init, enrol, revoke, renew, sign, kits, roster):
        app.command()(command)
