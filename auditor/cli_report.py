"""The auditor's commands that write for people: ``report``, ``statement`` and ``diff``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from auditor.cli_options import Evidence, Keys, Partial, Root, describe, refuse_unverified, run_audit

if TYPE_CHECKING:
    from auditor.diff import Comparison, Difference, History


def register(app: typer.Typer) -> None:
    """Add the commands to ``konsil-audit``."""
    for command in (report, statement, diff):
        app.command()(command)


def report(
    evidence: Evidence,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    root: Root = None,
    key: Keys = None,
    partial: Partial = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all of it, with every ledger entry, to this file.")
    ] = None,
) -> None:
    """Audit, and write what was found as one page for people, and as JSON for tools.

    The page is written whatever was found. The exit status is 0 only if everything holds.
    """
    from auditor.render import render_report
    from auditor.report import make_report, write, write_json

    _refuse_evidence([output, *([json_file] if json_file else [])], evidence)
    found = run_audit(evidence, root, key, partial=partial)
    made = make_report(found)
    write(output, render_report(made, found))
    typer.echo(f"report    {output}")
    if json_file is not None:
        write_json(json_file, made, found)
        typer.echo(f"JSON      {json_file}")
    typer.echo(made.verdict)
    refuse_unverified(found)


def statement(
    evidence: Evidence,
    study: Annotated[str, typer.Option("--study", help="Name of the study that the papers are about.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A folder for all papers; or one file: .md, .json or .html.")
    ],
    root: Root = None,
    key: Keys = None,
    partial: Partial = False,
) -> None:
    """Draft papers about a study: privacy statement, record of processing, DPIA annex, export of events.

    Every field names the ledger entry that it was read from, or is left to be filled in by the controller. The papers
    are written whatever was found, and say so. The exit status is 0 only if everything holds.
    """
    from auditor.papers import as_html, as_markdown, export_log
    from auditor.report import write
    from auditor.statement import make_statement
    from shared_models.errors import ConfigError

    _refuse_evidence([output], evidence)
    found = run_audit(evidence, root, key, partial=partial)
    made = make_statement(found, study)
    data = made.model_dump_json(indent=1) + "\n"
    text = {paper.name: as_markdown(paper, made) for paper in made.papers}
    match output.suffix:
        case ".md":
            files = {output: "\n".join(text.values())}
        case ".json":
            files = {output: data}
        case ".html":
            files = {output: as_html(made)}
        case _:
            files = {output / f"{name}.md": paper for name, paper in text.items()}
            files |= {output / "statement.json": data, output / "statement.html": as_html(made)}
            files[output / "log.jsonl"] = "".join(f"{line}\n" for line in export_log(found, study))
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{output} cannot be made: {error.strerror}", hint="Choose another folder.") from None
    for path, content in files.items():
        write(path, content)
        typer.echo(f"wrote     {path}")
    typer.echo(made.verdict)
    refuse_unverified(found)


def diff(
    old: Annotated[Path, typer.Argument(help="The older bundle, ledger file, or JSON of a report.")],
    new: Annotated[Path, typer.Argument(help="The newer one.")],
    root: Root = None,
    key: Keys = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Not every hospital of the older evidence is to be in the newer.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """What came to a hospital's ledger, and whether the newer evidence goes on from the older.

    A ledger that was forked or rolled back is a finding, and the exit status is 1. Bundles are audited first; a report
    is taken as it is written.
    """
    from auditor.diff import compare
    from auditor.report import write
    from shared_models.errors import EvidenceError

    _refuse_evidence([json_file] if json_file else [], [old, new])
    before, after = (_histories(path, root, key) for path in (old, new))
    found = compare(before, after, partial=partial)
    for difference in found.differences:
        typer.echo("\n".join(_lines(difference)))
    for finding in found.findings:
        typer.echo(describe(finding))
    if json_file is not None:
        write(json_file, found.model_dump_json(indent=1) + "\n")
    if found.findings:
        first = found.findings[0]
        raise EvidenceError(f"{first.place}: {first.what}", hint=first.meaning)
    typer.echo(_goes_on(found))


def _refuse_evidence(outputs: list[Path], evidence: list[Path]) -> None:
    """An auditor never writes over what was shown, even by a slip of the keyboard."""
    from shared_models.errors import ConfigError

    shown = {path.resolve() for path in evidence}
    for path in outputs:
        if path.resolve() in shown:
            raise ConfigError(f"{path} is evidence, and would be written over", hint="Choose another file with -o.")


def _histories(path: Path, root: Path | None, keys: list[Path] | None) -> "list[History]":
    """What a bundle or a report shows; a bundle that does not hold is an error, because nothing follows from it."""
    from auditor.diff import histories, is_report, read_report
    from shared_models.errors import EvidenceError

    if is_report(path):
        return read_report(path)
    found = run_audit([path], root, keys, partial=True)
    broken = next((finding for finding in found.findings if finding.severity == "critical"), None)
    if broken is not None:
        raise EvidenceError(f"{path}: {broken.what}", hint=broken.meaning)
    return histories(found)


def _lines(difference: "Difference") -> list[str]:
    came = ", ".join(f"{number} {kind}" for kind, number in difference.came.items()) or "nothing"
    lines = [
        f"{difference.hospital}, population {difference.population}: {difference.entries_before} entries, then "
        f"{difference.entries_after}; came: {came}",
    ]
    for change in difference.changes:
        what = f"study {change.study}" if change.study else "all together"
        before, after = change.before, change.after
        lines.append(
            f"  {what}: {before.charges} charges, then {after.charges}; epsilon {before.epsilon_filter:.4f}, then "
            f"{after.epsilon_filter:.4f} by the filter; {before.epsilon_pld:.4f}, then {after.epsilon_pld:.4f} by PLD"
        )
    if difference.left_before is not None and difference.left_after is not None:
        lines.append(f"  left of the budget: {difference.left_before:.4f}, then {difference.left_after:.4f}")
    return lines


def _goes_on(found: "Comparison") -> str:
    names = len(found.differences)
    return f"goes on   every entry of the older evidence stands in the newer, at {names} hospital{'s' * (names != 1)}"
