"""The auditor's command, ``konsil-audit``: needs ledgers and public keys only; no network, no torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from auditor import cli_remote
from shared_models import terminal

if TYPE_CHECKING:
    from auditor.evidence import Witness
    from auditor.recompute import BudgetReport, Figures
    from auditor.verify import Verified

app = typer.Typer(
    help="Verify hospitals' privacy ledgers and compute again what their studies cost. Reads files, changes none.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli_remote.add_to(app)

Ledgers = Annotated[list[Path], typer.Argument(metavar="LEDGER...", help="Ledger files (ledger.sqlite).")]
Evidence = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Evidence bundles, or ledger files.")]
Studies = Annotated[
    list[Path] | None,
    typer.Option("--study", help="A study's folder at the coordinator, to compare bundles with; several can be given."),
]
Keys = Annotated[
    list[Path] | None, typer.Option("--key", help="Public key file of a hospital; can be given more than once.")
]


@app.command()
def verify(files: Evidence, key: Keys = None, study: Studies = None) -> None:
    """Check chain, signatures, head file, and every charge; of bundles also receipts and transcripts, side by side.

    Every file is looked at, whatever was wrong with those before. The exit status is 0 only if all hold and agree.
    """
    from zipfile import is_zipfile

    from auditor.evidence import cross_check, read_study, verify_bundle
    from auditor.verify import verify_ledger
    from shared_models.errors import EvidenceError, FederationError, LedgerError
    from shared_models.identity import read_public

    keys = {read_public(path) for path in key or []}
    broken, witnesses = [], []
    for path in files:
        try:
            if is_zipfile(path):
                witnesses.append(verify_bundle(path, keys))
                found, more = witnesses[-1].verified, _evidence(witnesses[-1])
            else:
                found, more = verify_ledger(path, keys), ""
            typer.echo(f"holds   {path}: {_describe(found)}{more}")
        except FederationError as error:
            broken.append((path, error))
            typer.echo(f"BROKEN  {path}: {error}")
    if broken:
        path, first = broken[0]
        what = "ledgers" if not witnesses and isinstance(first, LedgerError) else "files"
        raise LedgerError(f"{len(broken)} of {len(files)} {what} do not hold: {path}: {first}", hint=first.hint)
    problems = cross_check(witnesses, [read_study(folder) for folder in study or []])
    for problem in problems:
        typer.echo(f"DIFFERS {problem}")
    if problems:
        raise EvidenceError(
            f"{problems[0]} (and {len(problems) - 1} more)", hint="Ask both sides; one of them changed."
        )
    if witnesses:
        typer.echo(f"agree   {len(witnesses)} bundles and {len(study or [])} study folders")


@app.command()
def budget(
    ledgers: Ledgers,
    key: Keys = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Verify the ledgers, then compute epsilon again from the recorded mechanisms with an independent accountant."""
    from auditor.recompute import report_budget
    from auditor.verify import verify_ledger
    from shared_models.errors import ConfigError
    from shared_models.identity import read_public
    from shared_models.privacy.ledger import stream_ledger

    keys = {read_public(path) for path in key or []}
    reports = []
    for path in ledgers:
        verify_ledger(path, keys)
        reports.append(report_budget(stream_ledger(path)))
        typer.echo("\n".join(_lines(reports[-1])))
    if json_file is not None:
        text = json.dumps({"ledgers": [report.model_dump(mode="json") for report in reports]}, indent=2)
        try:
            json_file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{json_file} cannot be written: {error.strerror}", hint="Choose another file.") from None


@app.command()
def log(
    exports: Annotated[list[Path], typer.Argument(metavar="EXPORT...", help="Exports of a coordinator's audit log.")],
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="The coordinator's audit.pub, as it came from elsewhere.")
    ] = None,
) -> None:
    """Check a coordinator's audit log: that no line was changed, removed, added or cut off."""
    from shared_models.audit_log import read_export, verify_export
    from shared_models.errors import AuditError
    from shared_models.identity import fingerprint, read_public

    keys = {fingerprint(read_public(path)) for path in key or []}
    for path in exports:
        found = verify_export(read_export(path))
        if keys and found.key not in keys:
            raise AuditError(f"{path} is of the key {found.key}", hint="None of the given keys signed it.")
        word = "a given key" if keys else "the key it names itself; give --key to be sure whose it is"
        typer.echo(
            f"holds   {path}: {found.entries} lines, {found.calls} calls, {found.refused} of them refused; "
            f"signed by {word} ({found.key[:19]}…)"
        )


def _describe(verified: "Verified") -> str:
    key = "a given key" if verified.key_was_given else "the key it names itself; give --key to be sure whose it is"
    rotations = f", after {verified.rotations} rotation(s)" if verified.rotations else ""
    head = (
        "no entry missing at the end"
        if verified.head_was_checked
        else "no head file: entries may be missing at the end"
    )
    return (
        f"{verified.hospital}, population {verified.population}, {verified.entries} entries, "
        f"{verified.charges} charges; signed by {key} ({verified.key[:19]}…{rotations}); {head}"
    )


def _evidence(witness: "Witness") -> str:
    bundle = witness.bundle
    other = f", {witness.unchecked} of them under another roster: not checked" if witness.unchecked else ""
    return f"; {len(bundle.receipts)} receipts, {len(bundle.transcripts)} transcripts{other}"


def _lines(report: "BudgetReport") -> list[str]:
    terms = report.budget
    return [
        f"{report.hospital}, population {report.population} (public size {terms.public_size})",
        f"  budget   epsilon {terms.epsilon:g} at delta {terms.delta:g} per {terms.unit} ({terms.neighbouring}), "
        f"enforced by a Renyi filter at order {terms.order}; {report.left:.4f} left by the filter",
        f"  spent    {_figures(report.spent)}",
        *(
            f"  study    {study.study} ({'open' if study.open else 'closed'}, limit epsilon {study.limit_epsilon:g}): "
            f"{_figures(study.spent)}"
            for study in report.studies
        ),
    ]


def _figures(figures: "Figures") -> str:
    return (
        f"{figures.charges} charges, epsilon {figures.epsilon_filter:.4f} by the filter at order {figures.order} "
        f"(holds under adaptive choice); {figures.epsilon_pld:.4f} by PLD and {figures.epsilon_rdp:.4f} by RDP, for "
        f"the schedule as executed, valid if it was fixed in advance; delta {figures.delta:g}, per {figures.unit}, "
        f"{figures.neighbouring}, {figures.accountant}"
    )


def main() -> None:
    """Entry point of ``konsil-audit``."""
    terminal.run(app)


if __name__ == "__main__":
    main()
