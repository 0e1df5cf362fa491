"""Released statistics of subgroups: one block of counts for everybody, then one for each group of each grouping.

A patient's record fills one group of every grouping, beside everybody's. Its row is divided by sqrt(1 + groupings), so
that it is as long as without subgroups: the same clipping bound S loses nothing, and the release costs what it cost.
What is paid is precision: multiplied back, the noise of every count is sqrt(1 + groupings) times as large.

Groups come from a column of the task's table, or from one beside the network's inputs. Whose value there is not known
fills no group of that grouping, only everybody's block: its row is shorter, and no cells, which would bring noise of
their own, are spent on those of whom nothing is said. So groups need not add up to everybody.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_models.errors import ConfigError, ProtocolError
from shared_models.outcomes import statistics_size
from shared_models.plan import EvaluationPlan, Subgroups
from shared_models.tasks import Categorical, Numeric, TableInput, Task

Floats = NDArray[np.float64]

EVERYBODY: Final = ("", "everybody")
UNKNOWN: Final = -1  # in place of a group's index
_HINT: Final = (
    "A column of the task's table: categories, or a number with edges in its range. Any other: with categories, or "
    "with low, high and unit."
)


class Grouping(NamedTuple):
    """How one column tells patients apart.

    Attributes:
        column: Its name.
        groups: Names of the groups, in the order of their blocks.
        beside: Whether the column is one of ``Task.groups``, and none of the inputs.
        first: Where the encoded column begins in a row of inputs, or which of ``Task.groups`` it is.
        edges: Of a number, encoded as inputs are, or, beside them, as they were given; empty for categories.
    """

    column: str
    groups: tuple[str, ...]
    beside: bool
    first: int
    edges: NDArray[np.float32] | Floats


def groupings(task: Task, subgroups: Sequence[Subgroups]) -> tuple[Grouping, ...]:
    """Subgroups, held against the task's schema.

    Args:
        task: As ``task_of`` or ``with_groups`` gives it, with those that are beside its inputs.
        subgroups: How patients are told apart.

    Raises:
        ConfigError: The task has no such column; a number has no edges, or some outside of its public range; categories
            have edges.
    """
    return tuple(_beside(task, one) if one.beside else _grouping(task, one) for one in subgroups)


def _beside(task: Task, wanted: Subgroups) -> Grouping:
    for place, column in enumerate(task.groups):
        if column.name == wanted.column:
            groups = wanted.categories or _bands(wanted.edges, wanted.unit)
            return Grouping(column.name, groups, True, place, np.array(wanted.edges, dtype=np.float64))
    raise ConfigError(f"subgroups by {wanted.column}: task {task.name} has no such column", hint=_HINT)


def _grouping(task: Task, wanted: Subgroups) -> Grouping:
    first = 0
    for column in task.input.columns if isinstance(task.input, TableInput) else ():
        if column.name != wanted.column:
            first += len(column.categories) - 1 if isinstance(column, Categorical) else 1
            continue
        if isinstance(column, Categorical) and not wanted.edges:
            return Grouping(column.name, column.categories, False, first, np.empty(0, dtype=np.float32))
        if (
            isinstance(column, Numeric)
            and wanted.edges
            and column.low < wanted.edges[0] <= wanted.edges[-1] <= column.high
        ):
            edges = column.scaled(np.array(wanted.edges)).astype(np.float32)
            return Grouping(column.name, _bands(wanted.edges, column.unit), False, first, edges)
        raise ConfigError(f"subgroups by {wanted.column}: its edges do not fit the column", hint=_HINT)
    raise ConfigError(f"subgroups by {wanted.column}: task {task.name} has no such column", hint=_HINT)


def _bands(edges: tuple[float, ...], unit: str) -> tuple[str, ...]:
    between = [f"{low:g} to below {high:g}" for low, high in pairwise(edges)]
    return tuple(f"{band} {unit}" for band in (f"below {edges[0]:g}", *between, f"from {edges[-1]:g}"))


def release_size(task: Task, evaluation: EvaluationPlan) -> int:
    """Length of what a release sums.

    Raises:
        ConfigError: As for ``groupings``.
    """
    blocks = 1 + sum(len(one.groups) for one in groupings(task, evaluation.subgroups))
    return blocks * statistics_size(task, evaluation.bins)


def group_of_each(
    task: Task, subgroups: Sequence[Subgroups], inputs: NDArray[Any], beside: Floats
) -> NDArray[np.int64]:
    """Which group each record falls in, by what the network sees of it or by what stands beside.

    Guarantees:
        * A value that equals an edge falls in the group that begins there: both are encoded by the same arithmetic.

    Args:
        task: The task, with its groups.
        subgroups: How they are told apart.
        inputs: Of a table the encoded rows, shape ``(n, width)``; of another task they are not looked at.
        beside: Values of ``Task.groups``, shape ``(n, len(task.groups))``: numbers, or indices of categories; NaN where
            one is not known.

    Returns:
        Shape ``(n, groupings)``, indices of ``Grouping.groups``, or ``UNKNOWN``.
    """
    found = np.zeros((len(beside), len(subgroups)), dtype=np.int64)
    for place, grouping in enumerate(groupings(task, subgroups)):
        if grouping.beside:
            values = beside[:, grouping.first]
            known = ~np.isnan(values)
            of_known = values[known]
            found[:, place] = UNKNOWN
            found[known, place] = (
                np.searchsorted(grouping.edges, of_known, side="right") if len(grouping.edges) else of_known
            )
        elif len(grouping.edges):
            found[:, place] = np.searchsorted(grouping.edges, inputs[:, grouping.first], side="right")
        else:
            indicators = inputs[:, grouping.first : grouping.first + len(grouping.groups) - 1] > 0.5
            found[:, place] = np.where(indicators.any(axis=1), indicators.argmax(axis=1) + 1, 0)
    return found


def spread(task: Task, evaluation: EvaluationPlan, rows: Floats, groups: NDArray[np.int64]) -> Floats:
    """Records' statistics, each in everybody's block and in those of its groups.

    Guarantees:
        * A row is at most as long (L2) as it was, whatever the groups; exactly as long where all are known.

    Args:
        task: The task.
        evaluation: The plan's.
        rows: Shape ``(n, size)``.
        groups: As ``group_of_each`` returned it.

    Returns:
        Shape ``(n, release_size(task, evaluation))``.
    """
    if not evaluation.subgroups:
        return rows
    size, first = rows.shape[1], 1
    wide = np.zeros((len(rows), release_size(task, evaluation)))
    wide[:, :size] = rows
    for place, grouping in enumerate(groupings(task, evaluation.subgroups)):
        known = np.flatnonzero(groups[:, place] != UNKNOWN)
        columns = ((first + groups[known, place]) * size)[:, None] + np.arange(size)
        wide[known[:, None], columns] = rows[known]
        first += len(grouping.groups)
    return wide / _unit(evaluation)


def split(task: Task, evaluation: EvaluationPlan, statistics: ArrayLike) -> dict[tuple[str, str], Floats]:
    """A release as counts by (column, group), ``EVERYBODY`` first; each like ``outcomes`` makes them.

    Raises:
        ProtocolError: Wrong length.
    """
    counts = np.asarray(statistics, dtype=np.float64)
    names = [EVERYBODY, *((one.column, group) for one in groupings(task, evaluation.subgroups) for group in one.groups)]
    if counts.shape != (release_size(task, evaluation),):
        raise ProtocolError(
            f"statistics of shape {counts.shape} are none of this plan's", hint="The sender runs another plan."
        )
    return dict(zip(names, counts.reshape(len(names), -1) * _unit(evaluation), strict=True))


def release_noise(evaluation: EvaluationPlan, hospitals: int) -> float:
    """Standard deviation of the noise on every count of ``split``, of a sum over so many hospitals."""
    return evaluation.noise_multiplier * evaluation.clip * math.sqrt(hospitals) * _unit(evaluation)


def _unit(evaluation: EvaluationPlan) -> float:
    """What a count is divided by before it leaves a hospital."""
    return math.sqrt(1 + len(evaluation.subgroups))
