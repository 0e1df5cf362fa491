"""Which release this is, and the named refusal of messages and files of a version that it does not read.

What minor and major releases may change is in docs/protocol.md. A version that is not known is not guessed at: whatever
says so fails to validate, and the error says which version it is, which one is read here, and what to do.
"""

import json
import re
from typing import Any

from pydantic import ValidationError

from shared_models.errors import (
    UnsupportedApprovalError,
    UnsupportedEvidenceError,
    UnsupportedFileError,
    UnsupportedLedgerError,
    UnsupportedMessageError,
    UnsupportedRosterError,
    UnsupportedVersionError,
)

RELEASE = "0.2.0"

_KEYS = frozenset({"version", "format", "protocol"})  # where a message or a file says of which version it is
_PLAIN = re.compile(r"[a-z0-9./-]{1,64}")  # what may be repeated in a log of what somebody else wrote

_READ_BY = {
    UnsupportedMessageError: "Both sides must run the same major release of Konsil, at most one minor release apart; "
    "update the older one.",
    UnsupportedApprovalError: "Approve the study again with the release that is installed here.",
    UnsupportedEvidenceError: "Verify it with the release that packed it, or a later one.",
    UnsupportedFileError: "It is another release's. Update this installation, or write the file anew.",
    UnsupportedLedgerError: "A later release wrote it. Install that release again: a ledger is never written back.",
    UnsupportedRosterError: "The consortium uses another release of Konsil. Update this installation.",
}


def refuse_version(error: ValidationError, what: str, kind: type[UnsupportedVersionError]) -> None:
    """If something failed to validate because of its version, say so; otherwise do nothing.

    Args:
        error: What failed.
        what: What was read, in words.
        kind: The refusal for it.

    Raises:
        UnsupportedVersionError: It, or a part of it, is of a version that is not read here.
    """
    for problem in error.errors(include_url=False):
        place = problem["loc"][-1] if problem["loc"] else ""
        if problem["type"] == "literal_error" and place in _KEYS and _is_version(problem["input"]):
            read = re.findall("[^' ]+", problem["ctx"]["expected"].replace(" or ", " "))
            if _name(problem["input"]) == _name(read[-1]):  # else it is something else altogether
                _refuse(what, str(place), problem["input"], " and ".join(read), kind)


def refuse_entry(body: bytes, kinds: frozenset[str], what: str) -> None:
    """If a ledger's entry cannot be read because a later release wrote it, say so; otherwise do nothing.

    An entry has no version of its own: it has one kind. Later formats are told by a ``format``, or by their kind.

    Raises:
        UnsupportedLedgerError: It is of a kind, or a format, that is not known here.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return
    if not isinstance(fields, dict):
        return
    if "format" in fields and _is_version(fields["format"]):
        _refuse(what, "format", fields["format"], "1", UnsupportedLedgerError)
    found = fields.get("kind")
    if isinstance(found, str) and found not in kinds and _PLAIN.fullmatch(found):
        raise UnsupportedLedgerError(
            f"{what}: Konsil {RELEASE} knows no entries of kind {found}", hint=_READ_BY[UnsupportedLedgerError]
        )


def unsupported_format(
    what: str, found: str, read: str, kind: type[UnsupportedVersionError]
) -> UnsupportedVersionError:
    """The refusal of a file whose format is told by other means than a validated key."""
    return kind(f"{what} is of format {found}; Konsil {RELEASE} reads {read}", hint=_READ_BY[kind])


def _refuse(what: str, key: str, found: object, read: str, kind: type[UnsupportedVersionError]) -> None:
    raise kind(f"{what} is of {key} {found}; Konsil {RELEASE} reads {key} {read}", hint=_READ_BY[kind])


def _is_version(found: Any) -> bool:
    """Whether it could be one, and is harmless to repeat."""
    if isinstance(found, str):
        return _PLAIN.fullmatch(found) is not None
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 10**9


def _name(version: int | str) -> str:
    """``konsil-approval`` of ``konsil-approval/1``; nothing of a plain number."""
    text = str(version)
    return "" if text.isdecimal() else text.rpartition("/")[0] or text
