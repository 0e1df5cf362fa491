"""How the three commands speak to a person: one ``error:`` line, one ``hint:`` line, a non-zero exit, no traceback."""

import errno
import sys
from collections.abc import Callable

from shared_models.errors import FederationError

_ROOM = "Make room on the disk, then give the command again. What was charged stays charged."
_DISK = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: "The disk is mounted read-only. Mount it writable, or name another folder.",
    errno.EACCES: "Run this as the user that owns the files, or mend their permissions.",
    errno.EPERM: "Run this as the user that owns the files, or mend their permissions.",
    errno.EIO: "The disk fails. Have it looked at before anything else; see docs/operations.md for backups.",
}


def printable(text: str) -> str:
    """A text that somebody else wrote, on one line, without what could move a cursor or hide a part of it."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def run(app: Callable[[], None]) -> None:
    """Run a typer application; turn what a person or a peer can mend into two lines on standard error.

    Ctrl-C exits with 130, as shells expect. A disk that is full, read-only or closed to us is nobody's bug, wherever it
    is met. Anything else is one, and shows its traceback.
    """
    try:
        app()
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the last words of a command
        print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201 - the last words of a command
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)  # noqa: T201 - last words
        print(f"hint: {_DISK[error.errno]}", file=sys.stderr)  # noqa: T201 - the last words of a command
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)  # noqa: T201 - the last words of a command
        print("hint: nothing is lost; what was charged stays charged.", file=sys.stderr)  # noqa: T201 - the last words
        sys.exit(130)


def progress() -> Callable[[str], None]:
    """What tells whoever watches what is being done: one line on standard error, written over each time."""
    if not sys.stderr.isatty():
        return lambda _: None

    def say(what: str) -> None:
        print(f"\r\033[K{what[:100]}", end="\r", file=sys.stderr, flush=True)  # noqa: T201 - for whoever watches

    return say
