"""Columns beside the inputs, by which an evaluation tells patients apart: read like any other, seen by no network.

A value that is not known leaves its row where it is: whom a study trains on must not depend on how it is evaluated.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.columns import categories, numbers
from client.records.frames import missing
from client.records.manifest import MANIFEST, Manifest
from shared_models.errors import RecordsError
from shared_models.tasks import Numeric, Task


def group_columns(manifest: Manifest, task: Task) -> dict[str, str]:
    """Each of the task's groups that is recorded here, and the file's column for it.

    Raises:
        RecordsError: The manifest does not say where one stands, or that it is not recorded.
    """
    if unsaid := [group.name for group in task.groups if group.name not in manifest.groups]:
        raise RecordsError(
            f"{manifest.file.parent / MANIFEST}: the plan tells patients apart by {', '.join(unsaid)}, "
            "which [groups] does not name",
            hint=f'Name the column under [groups]: {unsaid[0]} = "..."; or {unsaid[0]} = "" where it is not recorded.',
        )
    return {group.name: column for group in task.groups if (column := manifest.groups[group.name])}


def read_groups(manifest: Manifest, task: Task, frame: pd.DataFrame) -> NDArray[np.float64] | None:
    """Values of the task's groups.

    Returns:
        Shape ``(n, len(task.groups))``: numbers, or indices of categories; NaN where a value is missing. None of a task
        without groups.

    Raises:
        RecordsError: A value is out of its public range, or none of the public categories; with file, row and column.
    """
    if not task.groups:
        return None
    columns = group_columns(manifest, task)
    found = np.full((len(frame), len(task.groups)), np.nan)
    for place, group in enumerate(task.groups):
        if group.name in columns:
            known = ~missing(frame[columns[group.name]], manifest)
            rows, read = frame[known], numbers if isinstance(group, Numeric) else categories
            found[known, place] = read(rows, manifest, group)  # type: ignore[arg-type]  # the one for its kind
    return found
