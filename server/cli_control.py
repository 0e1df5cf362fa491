"""Commands of ``konsil-coordinator`` for studies: ``start`` serves them, the others call it from any machine."""

import functools
import inspect
import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.control_client import ControlClient

SettingsFile = Annotated[Path, typer.Option("--settings", help="The coordinator's settings, coordinator.toml.")]
Study = Annotated[str, typer.Argument(help="The study's name.")]
Out = Annotated[Path, typer.Option("--out", help="Where to write it; what is there is replaced.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_OPERATOR = Annotated[
    Path | None, typer.Option("--operator", envvar="KONSIL_OPERATOR", help="Your operator.toml, or viewer.toml.")
]
_CONNECT = Annotated[str | None, typer.Option("--connect", envvar="KONSIL_CONNECT", help="HOST:PORT of the service.")]
_CA = Annotated[Path | None, typer.Option("--ca", envvar="KONSIL_CA", help="The authority's certificate.")]
_CERTIFICATE = Annotated[
    Path | None, typer.Option("--certificate", envvar="KONSIL_CERTIFICATE", help="Your certificate.")
]
_KEY = Annotated[Path | None, typer.Option("--key", envvar="KONSIL_KEY", help="Your private key.")]
_NAME = Annotated[
    str | None, typer.Option("--server-name", envvar="KONSIL_SERVER_NAME", help="In its certificate, if not the host.")
]
_CALLING = {
    "operator": _OPERATOR,
    "connect": _CONNECT,
    "ca": _CA,
    "certificate": _CERTIFICATE,
    "key": _KEY,
    "server_name": _NAME,
}

# No certificate on the P-256 curve, as `init` makes them, can be used with this suite: a client that offers nothing
# newer than TLS 1.2 fails in its handshake. TLS 1.3 has suites of its own. gRPC has no other way to say so.
TLS_1_2_SUITES = "ECDHE-RSA-AES256-GCM-SHA384"

ROUNDS_MAY_TAKE_S = 600.0  # before an attempt is given up at the end; below the unit's TimeoutStopSec


def start(settings_file: SettingsFile) -> None:
    """Serve hospitals and the control service, and run every study that is submitted, until told to end.

    SIGTERM or Ctrl-C ends it after the rounds at hand, ten minutes later at most; a second one at once. The studies go
    on when it is started again, also after it was killed.
    """
    os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", TLS_1_2_SUITES)  # before gRPC is loaded
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # every scan of the port would be a line
    from server import logs
    from server.audit import AuditLog
    from server.control_server import ControlServer, described
    from server.coordinator import coordinating
    from server.settings import read_settings
    from shared_models.service import Signalled, Watchdog, tell

    over, hurry = Signalled(), Signalled()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (hurry if over.is_set() else over).set())
    settings = read_settings(settings_file)
    logs.to_terminal("coordinator", settings.log_format)
    watchdog = Watchdog()
    with (
        coordinating(settings, watchdog) as studies,
        AuditLog(settings.state) as audit,
        ControlServer(settings, studies, audit) as server,
        watchdog,
    ):
        watchdog.watch(server.answers)
        serving = f"hospitals on {settings.host}:{settings.port}; {described(server, audit)}"
        typer.echo(serving)
        tell(READY=1, STATUS=serving)
        over.wait()
        typer.echo("ending after the rounds at hand, told again at once; studies go on at the next start")
        tell(STOPPING=1, STATUS="ending after the rounds at hand")
        studies.finish_rounds(patience_s=ROUNDS_MAY_TAKE_S, hurry=hurry)


def issue(
    name: Annotated[str, typer.Argument(help="Whose; a-z, 0-9, -. It is in the audit log with every call.")],
    role: Annotated[str, typer.Option(help="operator, auditor or viewer.")],
    settings_file: SettingsFile,
    folder: Annotated[Path | None, typer.Option(help="Where key, certificate and ROLE.toml go; NAME.")] = None,
    days: Annotated[int, typer.Option(min=1, max=730, help="How long the certificate is valid.")] = 365,
    connect: Annotated[str | None, typer.Option(help="HOST:PORT by which they reach the service.")] = None,
) -> None:
    """Make a key and a certificate for somebody who calls the control service."""
    from server.enrol import issue as make
    from server.settings import read_settings

    target = (folder or Path(name)).absolute()
    file = make(
        read_settings(settings_file), name, role, target, valid_for=timedelta(days=days, hours=1), connect=connect
    )
    typer.echo(f"{file}: {role} {name}, for {days} days; hand the folder over, and keep no copy of tls.key")


def withdraw(
    certificate: Annotated[Path, typer.Argument(help="The certificate (PEM).")], settings_file: SettingsFile
) -> None:
    """Make the control service refuse a certificate from now on. Hospitals are revoked on the roster instead."""
    from server.roles import withdraw as refuse
    from server.settings import read_settings

    typer.echo(f"withdrawn: {refuse(read_settings(settings_file), certificate)}")


def _calling(command: Callable[..., None]) -> Callable[..., None]:
    """A command that calls the service: with the options that say where it is and who calls."""

    @functools.wraps(command)
    def call(**arguments: Any) -> None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what is wrong is said in our own two lines
        from server.control_client import ControlClient
        from shared_models.control.access import find_access

        where = {name: arguments.pop(name) for name in _CALLING}
        said = {"option": "--operator operator.toml", "variable": "KONSIL_OPERATOR"}
        with ControlClient(find_access(where.pop("operator"), **said, **where)) as client:
            command(client, **arguments)

    own = list(inspect.signature(command).parameters.values())[1:]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _CALLING.items()
    ]
    call.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
    return call


@_calling
def submit(
    client: "ControlClient", plan: Annotated[Path, typer.Argument(help="The study plan (TOML).")], as_json: Json = False
) -> None:
    """Submit a study; it begins as soon as its hospitals are there."""
    from shared_models.config import read_text

    _say(client.submit(read_text(plan, "plan")), as_json=as_json)


@_calling
def list_(client: "ControlClient", as_json: Json = False) -> None:
    """List the studies."""
    found = client.all()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    for study in [] if as_json else found:
        typer.echo(_line(study))


@_calling
def show(client: "ControlClient", study: Study, as_json: Json = False) -> None:
    """Show a study: its state and why, how far it is, who submitted it, its plan."""
    _say(client.show(study), as_json=as_json)


@_calling
def watch(
    client: "ControlClient",
    study: Study,
    after: Annotated[int, typer.Option(min=0, help="Position of the last event that you know.")] = 0,
    as_json: Json = False,
) -> None:
    """Show a study live until it is over: as a view on a terminal, elsewhere as a line per event."""
    from rich.console import Console

    from server.watch import Watch

    if as_json:
        for event in client.watch(study, after, lost=lambda why: typer.echo(f"lost: {why}", err=True)):
            typer.echo(json.dumps(event))
        return
    with Watch(Console(), study, full_screen=True) as live:

        def lost(why: str) -> None:
            live.progress.problem = f"{why}; connecting again"
            live.draw()

        for event in client.watch(study, after, lost=lost):
            live.progress.problem = None
            live.see(event)


@_calling
def pause(client: "ControlClient", study: Study, as_json: Json = False) -> None:
    """Pause a study after the round at hand."""
    _say(client.pause(study), as_json=as_json)


@_calling
def resume(client: "ControlClient", study: Study, as_json: Json = False) -> None:
    """Go on with a paused study."""
    _say(client.resume(study), as_json=as_json)


@_calling
def stop(client: "ControlClient", study: Study, as_json: Json = False) -> None:
    """End a study for good; hospitals get back what they reserved, what was charged stays charged."""
    _say(client.stop(study), as_json=as_json)


@_calling
def model(client: "ControlClient", study: Study, out: Out, as_json: Json = False) -> None:
    """Fetch a finished study's model."""
    _fetched(out, client.fetch_model(study, out), as_json=as_json)


@_calling
def evidence(client: "ControlClient", study: Study, out: Out, as_json: Json = False) -> None:
    """Fetch a study's evidence, a tar that unpacks to a folder for konsil-audit verify --study."""
    _fetched(out, client.fetch_evidence(study, out), as_json=as_json)


audit = typer.Typer(help="The coordinator's own audit log: every call of the control service.", no_args_is_help=True)


@audit.command("show")
def audit_show(settings_file: SettingsFile, as_json: Json = False) -> None:
    """Show the log."""
    from server.audit import export_lines
    from server.settings import read_settings
    from shared_models.audit_log import follow_export

    for entry in follow_export(export_lines(read_settings(settings_file).state)):
        fields = entry.model_dump(mode="json", exclude_none=True, exclude={"signature", "previous_hash"})
        typer.echo(json.dumps(fields) if as_json else _told({**fields, "event": entry.kind}, hide=("kind", "key")))


@audit.command("verify")
def audit_verify(settings_file: SettingsFile) -> None:
    """Check that no line was changed, removed or added."""
    from server.audit import PUBLIC, export_lines
    from server.settings import read_settings
    from shared_models.audit_log import verify_export
    from shared_models.identity import read_public

    state = read_settings(settings_file).state
    found = verify_export(export_lines(state), read_public(state / PUBLIC))
    typer.echo(f"holds: {found.entries} lines, {found.calls} calls, {found.refused} of them refused; key {found.key}")


@audit.command("export")
def audit_export(settings_file: SettingsFile, out: Out) -> None:
    """Write the log to a file that konsil-audit log verifies, also while the coordinator runs."""
    from server.audit import export_lines
    from server.settings import read_settings
    from shared_models.durable import replace_file

    lines = list(export_lines(read_settings(settings_file).state))
    replace_file(out, b"".join(line + b"\n" for line in lines))
    typer.echo(f"{out}: {len(lines) - 1} lines")


@_calling
def audit_fetch(client: "ControlClient", out: Out, as_json: Json = False) -> None:
    """Fetch an export from another machine."""
    _fetched(out, client.fetch_audit(out), as_json=as_json)


audit.command("fetch")(audit_fetch)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (start, submit, show, watch, pause, resume, stop, model, evidence, issue, withdraw):
        app.command()(command)
    app.command("list")(list_)
    app.add_typer(audit, name="audit")


def _say(study: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(study, indent=2))
        return
    typer.echo(_line(study))
    moment = datetime.fromtimestamp(study["submitted_at"], UTC)
    typer.echo(f"submitted by {study['submitted_by']}, {moment:%Y-%m-%d %H:%M:%S} UTC; plan {study['plan_digest']}")


def _line(study: dict[str, Any]) -> str:
    queue = f", {study['position']} before it" if study["position"] else ""
    why = f": {study['reason']}" if study.get("reason") else ""
    wish = f" (to {study['wish']})" if study["wish"] != "run" and study["state"] not in _OVER else ""
    return f"{study['name']:<24} {study['state']}{wish}{queue}, round {study['rounds_done']}/{study['rounds']}{why}"


_OVER = {"finished", "failed", "stopped", "paused"}


def _told(event: dict[str, Any], hide: tuple[str, ...] = ("position", "study")) -> str:
    """An event on one line."""
    first = {"time", "event", *hide}
    rest = " ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in first)
    return f"{event['time']} {event['event']} {rest}".rstrip()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return json.dumps(value) if isinstance(value, bool) or " " in str(value) else str(value)


def _fetched(out: Path, digest: str, *, as_json: bool) -> None:
    size = out.stat().st_size
    text = {"file": str(out), "bytes": size, "sha256": digest}
    typer.echo(json.dumps(text) if as_json else f"{out}: {size} bytes, SHA-256 {digest}")
