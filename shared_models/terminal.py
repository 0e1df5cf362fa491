"""How the three commands speak to a person: one ``error:`` line, one ``hint:`` line, a non-zero exit, no traceback."""

import sys
from collections.abc import Callable

from shared_models.errors import FederationError


def printable(text: str) -> str:
    """A text that somebody else wrote, on one line, without what could move a cursor or hide a part of it."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def run(app: Callable[[], None]) -> None:
    """Run a typer application; turn what a person or a peer can mend into two lines on standard error.

    Ctrl-C exits with 130, as shells expect. Anything else is a bug and shows its traceback.
    """
    try:
        app()
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the last words of a command
        print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201 - the last words of a command
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
