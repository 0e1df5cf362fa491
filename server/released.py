"""What hospitals released of a study, as it was summed: kept beside the journal, for reports and for cross-validation.

It is noised and paid for, so that whatever is computed from it later spends nothing more.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_models.durable import append_whole, drop_cut_line
from shared_models.errors import ConfigError

FILE = "statistics.jsonl"


@dataclass(frozen=True, kw_only=True, eq=False)
class Released:
    """One release.

    Attributes:
        round: After which round.
        hospitals: How many hospitals' statistics, and noises, are in the sum.
        statistics: The sum, shape ``(release_size(task, evaluation),)``; entries may be negative.
    """

    round: int
    hospitals: int
    statistics: NDArray[np.float64]


def keep_released(folder: Path, released: Released) -> None:
    """Append a release; on the disk when this returns.

    Raises:
        OSError: It could not be written.
    """
    path = folder / FILE
    drop_cut_line(path)
    line = {"round": released.round, "hospitals": released.hospitals, "statistics": released.statistics.tolist()}
    content = json.dumps(line, allow_nan=False).encode() + b"\n"
    append_whole(path, content, size=path.stat().st_size if path.exists() else 0)


def read_released(folder: Path) -> list[Released]:
    """All releases of a study, in order of their rounds; none where there is no such file.

    Raises:
        ConfigError: The file is not one that ``keep_released`` wrote.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        lines = [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1:] == "\n"
        ]
        found = {
            int(line["round"]): Released(
                round=int(line["round"]),
                hospitals=int(line["hospitals"]),
                statistics=np.array(line["statistics"], dtype=np.float64),
            )
            for line in lines
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="It belongs to a study's folder.") from None
    return [found[number] for number in sorted(found)]
