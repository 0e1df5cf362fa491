"""The highest round and attempt that this hospital took part in, on the disk before any key of the attempt leaves."""

import json
from pathlib import Path

from shared_models.durable import replace_file
from shared_models.errors import LedgerError
from shared_models.secagg.protocol import Positions

POSITIONS = "positions.json"


def open_positions(state: Path) -> Positions:
    """Read what was saved last; an attempt that the file knows is never taken part in again, also after a crash.

    Raises:
        LedgerError: The file is damaged. Nothing is guessed: a forgotten attempt could be repeated.
    """
    path = state / POSITIONS
    highest: dict[str, tuple[int, int]] = {}
    try:
        highest = {key: (int(at[0]), int(at[1])) for key, at in json.loads(path.read_bytes()).items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise LedgerError(f"{path} is damaged", hint="Restore it, or end this hospital's open studies.") from None

    def save(study: str, purpose: str, round: int, attempt: int) -> None:  # noqa: A002 - the field's own word
        highest[f"{purpose} {study}"] = (round, attempt)
        try:
            replace_file(path, json.dumps(highest).encode())
        except OSError as error:
            raise LedgerError(f"{path} cannot be written: {error.strerror}", hint="Check the disk.") from None

    split = {key.partition(" "): at for key, at in highest.items()}
    return Positions({(study, purpose): at for (purpose, _, study), at in split.items()}, save)
