"""Commands of ``konsil-hospital`` for logging in to the page by certificate: make, issue, revoke."""

import sys
from pathlib import Path
from typing import Annotated

import typer

SettingsFile = Annotated[Path, typer.Argument(help="The hospital's settings, hospital.toml.")]
Steward = Annotated[str, typer.Argument(help="The steward's name, of a-z, 0-9 and -.")]

_LINES = """\
Add to {file}, and start the daemon again:

[page.tls]
certificate = "page/localhost.pem"
key = "page/localhost.key"
stewards = "page/authority.pem"
revoked = "page/revoked.pem"
"""


def page_certificate(settings_file: SettingsFile) -> None:
    """Make or renew the page's TLS certificate, for this machine's loopback only, and the stewards' authority."""
    from client.settings import read_settings
    from client.stewards import FOLDER, make_page_certificate

    settings, folder = read_settings(settings_file), settings_file.absolute().parent / FOLDER
    until = make_page_certificate(folder, settings.name)
    typer.echo(
        f"{folder / 'localhost.pem'}: valid until {until:%Y-%m-%d}; browsers trust it by authority.pem beside it"
    )
    if settings.page is None or settings.page.tls is None:
        typer.echo(_LINES.format(file=settings_file), nl=False)
    else:
        typer.echo("The daemon shows it from its next start on.")


def page_steward(
    settings_file: SettingsFile,
    name: Steward,
    out: Annotated[Path, typer.Argument(help="Where to write it (PKCS 12), for the steward's browser.")],
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long it is valid.")] = 365,
) -> None:
    """Make a certificate that opens the page, with its key, under a passphrase: typed twice, or from standard input."""
    from client.settings import read_settings
    from client.stewards import FOLDER, SHORTEST, issue

    read_settings(settings_file)
    if sys.stdin.isatty():
        asked = f"Passphrase of the file, at least {SHORTEST} characters"
        passphrase = typer.prompt(asked, hide_input=True, confirmation_prompt=True)
    else:
        passphrase = sys.stdin.readline().rstrip("\n")
    until = issue(settings_file.absolute().parent / FOLDER, name, out, passphrase=passphrase, days=days)
    typer.echo(f"{out}: opens the page until {until:%Y-%m-%d}. Give {name} file and passphrase by two ways.")


def page_revoke(settings_file: SettingsFile, name: Steward) -> None:
    """Let a steward's certificate open the page no more, at once; whoever is logged in by it is logged out."""
    from client.settings import read_settings
    from client.stewards import FOLDER, revoke

    read_settings(settings_file)
    revoke(settings_file.absolute().parent / FOLDER, name)
    typer.echo(f"the certificate of {name} opens the page no more")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (page_certificate, page_steward, page_revoke):
        app.command()(command)
