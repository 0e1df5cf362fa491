"""Commands of ``konsil-audit`` that call a coordinator, with an auditor's certificate; all others need no network."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from auditor.findings import Finding

Connection = Annotated[
    Path,
    typer.Option("--connection", envvar="KONSIL_CONNECTION", help="auditor.toml, as the coordinator issued it."),
]


def fetch(
    connection: Connection,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what is fetched; goes on with what is there.")],
    study: Annotated[
        list[str] | None, typer.Option("--study", help="Only this study; can be given more than once.")
    ] = None,
) -> None:
    """Fetch a coordinator's evidence, and the bundles and checkpoints that hospitals have left with it."""
    from auditor.fetch import fetch as fetch_all
    from auditor.findings import passed
    from shared_models.control.access import connect, read_access
    from shared_models.control.deposits import CHECKPOINTS
    from shared_models.errors import EvidenceError

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what is wrong is said in our own two lines
    with connect(read_access(connection)) as service:
        done = fetch_all(service, out, study, say=typer.echo)
    for finding in done.findings:
        typer.echo(_line(finding))
    bundles = [f"{path.parent}/{path.name[:19]}*.zip" for _, path in sorted(done.bundles.items())]
    checkpoints = [str(path) for path in sorted((out / "hospitals").glob(f"*/{CHECKPOINTS}"))]
    typer.echo(f"{len(done.studies)} studies, bundles of {len(bundles)} hospitals. Next, without a network:")
    studies = [f"--study {path}" for path in done.studies]
    typer.echo(
        " ".join(["konsil-audit verify", *(bundles or ["BUNDLE..."]), *checkpoints, *studies, "--root root.pub"])
    )
    if not passed(done.findings):
        raise EvidenceError(done.findings[0].what, hint=done.findings[0].meaning)


def watch(
    connection: Connection,
    known: Annotated[
        Path, typer.Option(help="What was seen so far; a history that is replaced later contradicts it.")
    ] = Path("known-checkpoints.jsonl"),
    root: Annotated[
        Path | None,
        typer.Option(help="The consortium's root key, root.pub; the roster it signed says whose key is whose."),
    ] = None,
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="Public key of a hospital, instead of a roster, or besides it.")
    ] = None,
    go_on: Annotated[bool, typer.Option("--go-on", help="Do not end at a finding.")] = False,
    once: Annotated[bool, typer.Option("--once", help="End when all that is there has been seen.")] = False,
) -> None:
    """Follow hospitals' signed checkpoints, a line each; a fork, a rollback or a foreign key ends it with status 1."""
    from contextlib import closing

    from auditor.watch import Memory, Trust
    from shared_models.control.access import connect, read_access
    from shared_models.errors import ConfigError, EvidenceError
    from shared_models.identity import read_public
    from shared_models.privacy.checkpoint import describe

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if root is None and not key:
        raise ConfigError("nobody said whose key is whose", hint="Give --root root.pub, or --key for each hospital.")
    trust = Trust(
        [read_public(path) for path in key or []],
        None if root is None else read_public(root),
        known.with_name(f"{known.name}.roster.json"),
    )
    found = list["Finding"]()

    def report(finding: "Finding") -> None:
        found.append(finding)
        typer.echo(_line(finding))
        if not go_on:
            raise EvidenceError(finding.what, hint=finding.meaning)

    with closing(Memory(known, trust)) as memory, connect(read_access(connection)) as service:
        for finding in memory.findings:
            report(finding)
        trust.renew(service.fetch_roster)
        for news in service.checkpoints(lost=lambda why: typer.echo(f"lost: {why}; connecting again", err=True)):
            if news.line is None:
                if once:
                    break
                continue
            seen = memory.see(news.hospital, news.line, unknown=lambda: trust.renew(service.fetch_roster))
            if seen.finding is not None:
                report(seen.finding)
            elif seen.checkpoint is not None and seen.new:
                typer.echo(describe(seen.checkpoint))
    if found:
        raise EvidenceError(f"{found[0].what} (and {len(found) - 1} more)", hint=found[0].meaning)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (fetch, watch):
        app.command()(command)


def _line(finding: "Finding") -> str:
    return f"FINDING {finding.severity} {finding.code}: {finding.place}: {finding.what}"
