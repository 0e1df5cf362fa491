"""The command ``konsil-hospital``. Torch and Flower are imported inside the commands that need them."""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client import cli_conformance, cli_enrol, cli_evaluate, cli_operate, cli_page, cli_use
from client.cli_use import Bases, RecordsFolder
from shared_models import terminal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from client.settings import Settings
    from shared_models.privacy.entries import Entry

app = typer.Typer(
    help="One hospital: trains the shared model next to its data, under its own policy and privacy budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli_enrol.add_to(app)
cli_conformance.add_to(app)
cli_evaluate.add_to(app)
cli_use.add_to(app)
cli_operate.add_to(app)
cli_page.add_to(app)

ledger_app = typer.Typer(help="Show, verify or export this hospital's privacy ledger.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

SettingsFile = Annotated[Path, typer.Argument(help="The hospital's settings, hospital.toml.")]
Study = Annotated[str, typer.Argument(help="Name of the study, as `studies` lists it.")]


@app.command()
def start(settings_file: SettingsFile) -> None:
    """Run the daemon: connect to the coordinator, answer rounds, until stopped with Ctrl-C or SIGTERM.

    Dials out only; opens no port. A coordinator that isn't there is tried again, with back-off, until it is.
    """
    from client.process import Ending, announced, keep_texts_of_crashes_out, refuse_second
    from client.settings import read_settings
    from shared_models.service import Watchdog, tell

    settings = read_settings(settings_file)
    refuse_second(settings.state)
    from client import app as flower_app  # torch and Flower take seconds: not before it is clear that they are needed
    from client.daemon import serve

    _log(settings)
    keep_texts_of_crashes_out()
    _use(settings)
    until = Ending()
    signal.signal(signal.SIGTERM, until.on_signal)
    try:
        flower_app.hospital_at(str(settings_file))  # a ledger or a key that is wrong stops us before we connect
        with announced(settings.state), Watchdog(until.pulse.went_on):
            tell(READY=1, STATUS=f"looking for the coordinator at {settings.coordinator}")
            serve(settings, settings_file, flower_app.app, until=until)
    finally:
        flower_app.close_hospitals()


@app.command()
def page(
    settings_file: SettingsFile,
    descriptor: Annotated[
        int | None, typer.Option("--socket", hidden=True, help="What the daemon listens on for the page.")
    ] = None,
) -> None:
    """Serve the page on loopback, until Ctrl-C. The daemon does it by itself; this is for when it does not run."""
    from socket import socket

    from client.beside import require_page
    from client.settings import read_settings
    from shared_models.errors import ConfigError

    settings = read_settings(settings_file)
    if settings.page is None:
        raise ConfigError("the settings have no page", hint="Add [page] with a port; see docs/hospital.md.")
    require_page()
    from client.page import serve_page

    _log(settings)
    try:
        listener = None if descriptor is None else socket(fileno=descriptor)
    except OSError:
        raise ConfigError(f"{descriptor} is no socket", hint="Leave --socket to the daemon.") from None
    serve_page(settings_file, settings.page, listener)


@app.command("page-password")
def page_password(
    settings_file: SettingsFile,
    remove: Annotated[bool, typer.Option("--remove", help="Take it away: certificates alone open the page.")] = False,
) -> None:
    """Set the password of the page: typed twice, or the first line of standard input. Ends every session."""
    from client.password import SHORTEST, remove_password, set_password
    from client.settings import read_settings

    settings = read_settings(settings_file)
    if remove:
        remove_password(settings.state)
        typer.echo("the page has no password; only stewards' certificates open it, where [page.tls] names them")
        return
    if sys.stdin.isatty():
        asked = f"New password, at least {SHORTEST} characters"
        password = typer.prompt(asked, hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    set_password(settings.state, password)
    typer.echo("the page has a new password; whoever was logged in is logged out")


@app.command()
def stop(
    settings_file: SettingsFile,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the daemon's end.")] = 600,
) -> None:
    """End the running daemon after the message that it is answering, and wait until it is gone."""
    from client.process import stop as stop_daemon
    from client.settings import read_settings

    ended = stop_daemon(read_settings(settings_file).state, patience_s=wait_s)
    typer.echo("no daemon of this hospital runs" if ended is None else f"the daemon, process {ended.pid}, has ended")


@app.command()
def studies(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the studies that wait for an approval, and those that were approved, refused or closed."""
    from client.decide import list_studies, studies_table
    from client.settings import read_settings

    found = list_studies(read_settings(settings_file))
    if as_json:
        typer.echo(json.dumps([study._asdict() for study in found], indent=2))
        return
    _print(studies_table(found) if found else "No study was proposed here.")


@app.command()
def approve(
    settings_file: SettingsFile,
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needs --digest.")] = False,
    digest: Annotated[str, typer.Option("--digest", help="The plan's digest, or its first 8 digits or more.")] = "",
) -> None:
    """Show what a waiting study would do and what it costs, ask, and approve it. Works while the daemon runs.

    The approval is signed with the identity key, and is for exactly this plan. The daemon takes it up when the
    coordinator proposes the study again.
    """
    from client.decide import confirm_digest, facts_table, sign_and_keep, weigh
    from client.disclosure import in_words
    from client.settings import read_settings

    settings = read_settings(settings_file)
    weighed = weigh(settings, study)
    _print(facts_table(in_words(weighed.facts)))
    if yes or digest:
        confirm_digest(weighed.proposal, digest)
    if not yes:
        typer.confirm(f"Approve {study}?", abort=True)
    sign_and_keep(settings, weighed)
    typer.echo(f"study {study} is approved; it begins when the coordinator proposes it again, within half a minute")


@app.command()
def refuse(
    settings_file: SettingsFile,
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept here, and never sent.")] = "",
) -> None:
    """Show what a waiting study would do, ask, and refuse it for good. Works while the daemon runs."""
    from client.consent import Consents
    from client.decide import facts_table, glance
    from client.settings import read_settings

    settings = read_settings(settings_file)
    proposal, seen = glance(settings, study)
    _print(facts_table(seen))
    if not yes:
        typer.confirm(f"Refuse {study} for good?", abort=True)
    Consents(settings.state).refuse(proposal, reason)
    typer.echo(f"study {study} is refused; its name is used up here")


@app.command("check-data")
def check_data(
    settings_file: Annotated[Path | None, typer.Argument(help="The hospital's settings, hospital.toml.")] = None,
    records: Annotated[Path | None, typer.Option("--records", help="Instead: a folder with manifest.toml.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A study's plan: its subgroups are read too.")] = None,
) -> None:
    """Read the records as a study would, and print counts, missing values and ranges. Nothing leaves this machine."""
    from rich.console import Console

    from client.records.report import describe, summarise, summarise_own
    from client.registry import check_records
    from client.settings import read_settings
    from shared_models.errors import ConfigError
    from shared_models.plan import read_plan

    if (settings_file is None) == (records is None):
        raise ConfigError(
            "check-data needs a settings file or --records", hint="konsil-hospital check-data hospital.toml"
        )
    study = None if plan is None else read_plan(plan)
    if settings_file is not None:
        settings = read_settings(settings_file)
        Console().print(describe(summarise_own(settings, plan=study)))
        check_records(settings)
    elif records is not None:
        Console().print(describe(summarise(records, plan=study)))


@app.command()
def budget(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what this hospital's patients' privacy budget has paid for, and what is left. Reads the ledger only."""
    from client.books import report
    from client.settings import read_settings

    found = report(read_settings(settings_file))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for line in _budget_lines(found):
        typer.echo(line)


@app.command()
def egress(
    settings_file: SettingsFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what has left this hospital, by study, message and field, with its price. Reads the egress log only."""
    from rich.console import Console

    from client.egress import EGRESS, summary
    from client.evidence import read_evidence
    from client.settings import read_settings

    found = summary(read_evidence(read_settings(settings_file).state / EGRESS))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for table in _egress_tables(found):
        Console(width=None if sys.stdout.isatty() else 120).print(table)


@ledger_app.command("show")
def ledger_show(
    settings_file: SettingsFile,
    study: Annotated[str | None, typer.Option("--study", help="Only entries of this study.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, help="Only so many entries, the newest.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print each whole entry as a line of JSON.")] = False,
) -> None:
    """Show the newest entries of the ledger, each once its place in the chain is verified."""
    from collections import deque

    from rich.console import Console

    from client.bundle import entries_of
    from client.settings import read_settings

    entries = deque(entries_of(read_settings(settings_file), study), maxlen=last)
    if as_json:
        for entry in entries:
            typer.echo(entry.model_dump_json(exclude_none=True))
        return
    Console(width=None if sys.stdout.isatty() else 120).print(_ledger_table(entries))


@ledger_app.command("verify")
def ledger_verify(settings_file: SettingsFile) -> None:
    """Check chain, signatures, head file and the rules of the budget. The exit status is 0 only if all hold."""
    from client.bundle import verify_own
    from client.settings import read_settings

    found = verify_own(read_settings(settings_file))
    head = "no entry missing at the end" if found["head_file"] else "NO HEAD FILE: entries may be missing at the end"
    typer.echo(
        f"holds: {found['entries']} entries, {found['charges']} charges; {head}; epsilon {found['epsilon_filter']:.4f} "
        f"spent (filter, enforced), {found['epsilon_left']:.4f} left"
    )


@ledger_app.command("export")
def ledger_export(
    settings_file: SettingsFile, file: Annotated[Path, typer.Argument(help="Where to write the bundle.")]
) -> None:
    """Pack ledger, receipts, transcripts and roster into one signed file for an auditor. It holds no record."""
    from client.bundle import export
    from client.settings import read_settings

    manifest = export(read_settings(settings_file), file)
    size = sum(part.bytes for part in manifest.parts.values())
    typer.echo(f"{file}: {len(manifest.parts)} parts, {size} bytes, signed; konsil-audit verify {file}")


@ledger_app.command("send")
def ledger_send(
    settings_file: SettingsFile,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Send this one, which `ledger export` wrote; else a fresh one.")
    ] = None,
) -> None:
    """Leave an evidence bundle at the coordinator for its auditors, if policy permits. Works while the daemon runs."""
    from tempfile import TemporaryDirectory

    from client.bundle import export
    from client.deposit import own_checkpoint, send_bundle, send_checkpoint
    from client.egress import EgressLog
    from client.settings import read_settings

    settings = read_settings(settings_file)
    policy, egress = settings.policy, EgressLog(settings)
    if policy.send_checkpoints:
        checkpoint = own_checkpoint(settings)
        new = send_checkpoint(settings, egress, checkpoint)
        typer.echo(f"checkpoint of {checkpoint}: {'stored' if new else 'known'} at {settings.control}")
    with TemporaryDirectory(dir=settings.state) as folder:
        file = bundle or Path(folder) / "bundle.zip"
        if bundle is None and policy.send_evidence:
            export(settings, file)
        new = send_bundle(settings, egress, file)
        typer.echo(f"bundle of {file.stat().st_size} bytes: {'stored' if new else 'known'} at {settings.control}")


@app.command()
def withdraw(
    settings_file: SettingsFile, study: Annotated[str, typer.Argument(help="Name of the approved study.")]
) -> None:
    """Leave a study for good: what it reserved and never charged is free again. The daemon must be stopped.

    What was charged stays charged, and the study's name cannot be approved here again.
    """
    from client.books import Books
    from client.settings import read_settings

    settings = read_settings(settings_file)
    books = Books.open(settings)
    try:
        books.budget.finish(study)
        typer.echo(f"study {study} is closed; epsilon {books.budget.left():.4f} is neither spent nor reserved")
    finally:
        books.close()


@app.command("train-alone")
def train_alone(
    plan_file: Annotated[Path, typer.Argument(help="A study plan; its task, network and seed are used.")],
    records: RecordsFolder,
    out: Annotated[Path, typer.Option("--out", help="Where to write the model (safetensors).")],
    test: Annotated[Path | None, typer.Option("--test", help="Records folder to measure the model on.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 3000,
    learning_rate: Annotated[float, typer.Option(help="Step size of plain SGD.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per step.")] = 32,
    base: Bases = None,
) -> None:
    """Train on this folder alone, without privacy and without a network: a baseline to compare a study with.

    The model stays here. It has no privacy guarantee: do not give it away.
    """
    from client.alone import evaluate_folder, train_folder
    from shared_models.plan import read_plan
    from shared_models.pretrained import offer_files

    offer_files(base or ())
    plan = read_plan(plan_file)
    train_folder(plan, records, out, steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    if test is not None:
        typer.echo(json.dumps(evaluate_folder(out, test)))


@app.command()
def pretrained(
    path: Annotated[Path, typer.Argument(help="Folder of a text encoder, or a model file of this project.")],
) -> None:
    """Print the digest by which a plan names a pretrained base, as a line for the settings' table `pretrained`."""
    from shared_models.pretrained import digest_of

    typer.echo(f'{digest_of(path)} = "{path.absolute()}"')


def _print(what: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(what)


def _log(settings: "Settings") -> None:
    """Log to standard error and to a file in the state folder: counts, rounds and digests, never records."""
    from client.log_file import LogFile

    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    handlers: list[logging.Handler] = [logging.StreamHandler(), LogFile(settings.state / "hospital.log", settings.logs)]
    text = f"%(asctime)s {settings.name} %(levelname)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=text, handlers=handlers, force=True)
    logging.getLogger("konsil").setLevel(logging.INFO)


def _use(settings: "Settings") -> None:
    """Give torch the threads that the settings allow."""
    import torch

    torch.set_num_threads(settings.threads)


def _egress_tables(found: dict[str, Any]) -> list["Table"]:
    from rich.table import Table

    fields = Table("study", "message", "field", "times", "bytes", "price", title="Replies, by field")
    for row in found["fields"]:
        fields.add_row(*(str(cell) for cell in row.values()))
    calls = Table("call", "times", "bytes", title="Everything on the connection: request lines, headers, bodies")
    for row in found["calls"]:
        calls.add_row(row["call"], str(row["count"]), str(row["line"] + row["headers"] + row["body"]))
    return [fields, calls]


def _ledger_table(entries: "Iterable[Entry]") -> "Table":
    from rich.table import Table

    table = Table("entry", "time", "kind", "study", "round", "attempt", "mechanism", "hash")
    for entry in entries:
        cells = (entry.seq, entry.time, entry.kind, entry.study, entry.round, entry.attempt)
        mechanism = entry.mechanism.kind if entry.mechanism else ""
        table.add_row(*("" if cell is None else str(cell) for cell in cells), mechanism, f"{entry.hash[:12]}…")
    return table


def _budget_lines(report: dict[str, Any]) -> list[str]:
    population = report["population"]
    lines = [
        f"population {population['name']} ({population['public_size']} patients, declared)",
        f"budget     epsilon {population['epsilon']:g} at delta {population['delta']:g} per {report['unit']}, "
        f"{report['neighbouring']}, enforced by a Renyi filter at order {population['order']}",
        f"spent      epsilon {report['epsilon_filter']:.4f} (filter, enforced)",
        f"left       epsilon {report['epsilon_left']:.4f} (neither spent nor reserved)",
    ]
    lines += [
        f"study      {s['study']}: {s['rounds']} charges, epsilon {s['epsilon_filter']:.4f} (filter, enforced); "
        f"epsilon {s['epsilon']:.4f} at delta {s['delta']:g} ({s['accountant']}, {s['note']})"
        for s in report["studies"]
    ]
    return lines


def main() -> None:
    """Entry point of ``konsil-hospital``."""
    terminal.run(app)


if __name__ == "__main__":
    main()
