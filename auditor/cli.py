"""The auditor's command, ``konsil-audit``: needs ledgers and public keys only; no network, no torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auditor import cli_attack, cli_remote, cli_report
from auditor.cli_options import Evidence, Keys, Partial, Root, describe, refuse_unverified, run_audit
from shared_models import terminal
from shared_models.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from auditor.recompute import BudgetReport, Figures
    from auditor.record import Audit, HospitalRecord

app = typer.Typer(
    help="Verify hospitals' privacy ledgers and compute again what their studies cost. Reads files, changes none.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_NAMED = 5  # of files that nobody looked at

Studies = Annotated[
    list[Path] | None,
    typer.Option("--study", help="A study's folder at the coordinator; the same as to name it among the evidence."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write everything that was found to this file.")]


@app.command()
def verify(
    files: Evidence,
    root: Root = None,
    key: Keys = None,
    study: Studies = None,
    partial: Partial = False,
    json_file: Json = None,
) -> None:
    """Check chains, signatures, charges, receipts, sums and plans of each party, and all of them side by side.

    Every file is looked at, whatever was wrong with those before. The exit status is 0 only if all hold and agree.
    """
    result = run_audit([*files, *(study or [])], root, key, partial=partial)
    for record in result.hospitals:
        typer.echo(_describe(record, result))
    for finding in result.findings:
        typer.echo(describe(finding))
    if result.passed_over:
        typer.echo(f"not looked at: {_few(result.passed_over)}")
    if json_file is not None:
        _write_json(json_file, summary(result))
    refuse_unverified(result, "not verified: ")
    typer.echo(
        f"verified {len(result.hospitals)} hospitals, {sum(len(record.lines) for record in result.hospitals)} entries, "
        f"{len(result.attempts)} attempts; everything holds and agrees"
    )


@app.command()
def budget(files: Evidence, root: Root = None, key: Keys = None, json_file: Json = None) -> None:
    """Verify the evidence, then compute epsilon again from the recorded mechanisms with an independent accountant."""
    result = run_audit(files, root, key, partial=True)
    refuse_unverified(result, "not verified: ")
    reports = [record.budget for record in result.hospitals if record.budget is not None]
    for report in reports:
        typer.echo("\n".join(_lines(report)))
    if json_file is not None:
        _write_json(json_file, {"ledgers": [report.model_dump(mode="json") for report in reports]})


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


def summary(found: "Audit") -> dict[str, Any]:
    """An audit in JSON: the verdict, every finding, and what each hospital's patients paid."""
    return {
        "verified": found.passed,
        "root": found.root,
        "entries": sum(len(record.lines) for record in found.hospitals),
        "attempts": len(found.attempts),
        "not_looked_at": [str(path) for path in found.passed_over],
        "hospitals": {
            record.hospital: {
                "source": str(record.source),
                "entries": len(record.lines),
                "receipts": record.receipts,
                "keys": [key._asdict() for key in record.keys],
                "budget": record.budget.model_dump(mode="json") if record.budget else None,
                "claims": [claim.model_dump(mode="json") for claim in record.claims],
            }
            for record in found.hospitals
        },
        "findings": [finding.model_dump(mode="json", exclude_none=True) for finding in found.findings],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from shared_models.errors import ConfigError

    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="Choose another file.") from None


def _few(paths: "Sequence[Path]") -> str:
    """The first of them and how many more; the JSON has all."""
    first = ", ".join(printable(str(path)) for path in paths[:_NAMED])
    return first if len(paths) <= _NAMED else f"{first} and {len(paths) - _NAMED} more"


def _describe(record: "HospitalRecord", found: "Audit") -> str:
    key = record.keys[-1].fingerprint
    rotations = f", after {len(record.keys) - 1} rotation(s)" if len(record.keys) > 1 else ""
    charges = sum(line.kind == "charge" for line in record.lines)
    word = "holds" if all(f.party != record.hospital or f.severity == "note" for f in found.findings) else "READ"
    return (
        f"{word:8} {record.source}: {record.hospital}, population {record.population}, {len(record.lines)} entries, "
        f"{charges} charges, {record.receipts} receipts; key {key[:19]}…{rotations}"
    )


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


cli_report.register(app)
cli_attack.add_to(app)
cli_remote.add_to(app)


def main() -> None:
    """Entry point of ``konsil-audit``."""
    terminal.run(app)


if __name__ == "__main__":
    main()
