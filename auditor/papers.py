"""Papers from evidence as files: Markdown, one page of HTML, and an export of a study's events as JSON lines.

The export is meant for the record-keeping of Articles 12 and 19 of the EU AI Act (Regulation (EU) 2024/1689).
"""

import json
import re
from collections.abc import Iterator, Sequence

from auditor.record import Audit
from auditor.render import environment, printable, style
from auditor.report import anchors_of, line_fields
from auditor.statement import NO_ADVICE, OPEN, Paper, Statement, Trace
from shared_models.errors import EvidenceError
from shared_models.versions import RELEASE

_MOST_SOURCES = 24  # named for people beside one field; the JSON has all
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MARKUP = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]|~$"} | _ENTITIES)
_ADDRESS = re.compile(r"(?i)(:(?=//)|\.(?<=\bwww\.)|@)")  # what some readers of Markdown make a link of


def as_markdown(paper: Paper, statement: Statement) -> str:
    """One paper as Markdown; what others wrote cannot become markup."""
    lines = [
        f"# {_md(paper.title)}",
        "",
        f"{paper.intro} Made {statement.made_at} by konsil-audit {statement.release}.",
        "",
    ]
    for section in paper.sections:
        lines += [f"## {_md(section.title)}", ""]
        for item in section.items:
            lines.append(f"- **{_md(item.label)}.** {_md(item.value) if item.value is not None else f'*{OPEN}*'}")
            if item.hint:
                lines.append(f"  - {_md(item.hint)}")
            if item.traces:
                lines.append(f"  - Source: {_md('; '.join(_shortened(item.traces)))}")
        lines.append("")
    return "\n".join(lines)


def _shortened(traces: Sequence[Trace], most: int = _MOST_SOURCES) -> Iterator[str]:
    """The sources in words; of very many, the first and how many more: the JSON has all."""
    entries: dict[int, list[str]] = {}
    for trace in traces[:most]:
        if trace.entry is not None:
            entries.setdefault(trace.entry, []).append(trace.party)
    for entry, parties in entries.items():
        several = f"ledger entry {entry} of {', '.join(parties)}"
        yield f"{parties[0]}, ledger entry {entry}" if len(parties) == 1 else several
    yield from (str(trace) for trace in traces[:most] if trace.entry is None)
    if len(traces) > most:
        yield f"and {len(traces) - most} more"


def _md(text: str) -> str:
    """A text on one line, with every character that Markdown could read as markup escaped."""
    return _ADDRESS.sub(r"\\\1", " ".join(str(printable(text)).split()).translate(_MARKUP))


def as_html(statement: Statement) -> str:
    """All papers as one page, as self-contained as the report."""
    sheet, policy = style()
    template = environment().get_template("statement.html")
    return template.render(statement=statement, style=sheet, policy=policy, open=OPEN, shortened=_shortened)


def export_log(audit: Audit, study: str) -> Iterator[str]:
    """What happened in a study, one JSON object a line: first what the file is, then entries by hospital, then sums.

    Times are those of the hospitals' clocks; attempts at a sum carry none.

    Raises:
        EvidenceError: No ledger in the evidence approved such a study.
    """
    anchors = anchors_of(audit.hospitals)
    if not any(line.study == study and line.kind == "plan-approved" for r in audit.hospitals for line in r.lines):
        raise EvidenceError(f"no ledger in this evidence approved a study {study}", hint="See konsil-audit report.")
    head = {
        "format": "konsil-log/1",
        "about": "Events of one study, for the record-keeping of Articles 12 and 19 of Regulation (EU) 2024/1689. "
        + NO_ADVICE,
        "study": study,
        "made_by": f"konsil-audit {RELEASE}",
        "hospitals": [anchors[id(record)] for record in audit.hospitals],
        "name_and_version_of_the_ai_system": OPEN,
        "provider_or_deployer": OPEN,
    }
    yield json.dumps(head)
    for record in audit.hospitals:
        for line in record.lines:
            if line.study == study or line.study is None:
                fields = line_fields(line)
                yield json.dumps(
                    {"event": fields.pop("kind"), "party": anchors[id(record)], "entry": fields.pop("seq"), **fields}
                )
    for attempt in audit.attempts:
        if attempt.turn.study == study:
            yield json.dumps(
                {
                    "event": "sum",
                    "party": "coordinator",
                    **attempt.turn._asdict(),
                    "invited": list(attempt.invited),
                    "cohort": list(attempt.cohort),
                    "uploaders": list(attempt.uploaders),
                    "dropped": list(attempt.dropped),
                    "complaint": attempt.complaint,
                    "known_to": sorted(attempt.known_to),
                }
            )
