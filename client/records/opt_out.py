"""The list of patients who say no: one id per line, kept by the hospital, read at the start of every round."""

from pathlib import Path

from client.records.patient_ids import plain
from shared_models.errors import ConfigError

_HINT = "One patient id per line; a comment is a line of its own that begins with #. Nothing trains until it is mended."


def read_opt_outs(path: Path | None) -> frozenset[str]:
    """Who is not to be used, as ``plain`` ids; nobody where the settings name no list.

    Fails closed: a list that is gone or cannot be understood is never taken for an empty one.

    Raises:
        ConfigError: It cannot be read, or a line is no id; names file, line and cause, and never quotes a line.
    """
    if path is None:
        return frozenset()
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"the opt-out list {path} cannot be read: {error.strerror}", hint=_HINT) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the opt-out list {path} is not UTF-8 text", hint=_HINT) from None
    ids = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    return frozenset(_id(path, number, text) for number, text in ids if text and not text.startswith("#"))


def _id(path: Path, number: int, text: str) -> str:
    """Refuse what would silently match nobody: a trailing comment, quotes around an id, cells of a table, noise."""
    problem = None
    if not text.isprintable():
        problem = "holds a character that cannot be printed"
    elif " #" in text or "\t#" in text:
        problem = "has a comment behind the id"
    elif text[0] in "\"'" or text[-1] in "\"',;":
        problem = "has a quotation mark or a separator around the id"
    if problem:
        raise ConfigError(f"line {number} of the opt-out list {path} {problem}", hint=_HINT)
    return plain(text)
