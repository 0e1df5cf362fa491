"""What commands of ``konsil-audit`` share: options that mean the same everywhere, and running an audit with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared_models import terminal

if TYPE_CHECKING:
    from auditor.findings import Finding
    from auditor.record import Audit

Evidence = Annotated[
    list[Path],
    typer.Argument(
        metavar="EVIDENCE...",
        help="Evidence bundles of hospitals, ledger files, folders of studies at the coordinator, exports of its audit "
        "log, files of checkpoints; or folders that hold such.",
    ),
]
Keys = Annotated[
    list[Path] | None, typer.Option("--key", help="Public key file of a hospital; can be given more than once.")
]
Root = Annotated[
    Path | None, typer.Option("--root", help="The consortium's root public key (root.pub), as it came from elsewhere.")
]
Partial = Annotated[
    bool, typer.Option("--partial", help="Not every hospital that took part is to be here: who is missing is a note.")
]


def run_audit(files: list[Path], root: Path | None, keys: list[Path] | None, *, partial: bool) -> "Audit":
    """One audit, with keys read from their files; tells whoever watches what is being read."""
    from auditor.audit import audit
    from shared_models.identity import read_public

    return audit(
        files,
        root=read_public(root) if root else None,
        keys={read_public(path) for path in keys or []},
        partial=partial,
        progress=terminal.progress(),
    )


def refuse_unverified(found: "Audit", said: str = "") -> None:
    """End with the first finding that is no note; ``said`` begins the error.

    Raises:
        EvidenceError: Not everything holds.
    """
    from shared_models.errors import EvidenceError

    problems = [finding for finding in found.findings if finding.severity != "note"]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise EvidenceError(f"{said}{problems[0].place}: {problems[0].what}{more}", hint=problems[0].meaning)


def describe(finding: "Finding") -> str:
    """A finding in one line."""
    return f"{finding.severity.upper():8} {finding.place}: {finding.what} [{finding.code}]"
