"""Statistics and metrics of a whole task: of each head its own, beside each other.

What ``metrics.py`` counts for a choice is counted here for the other heads too: a record adds one row of numbers in
[0, 1], rows are summed anywhere, and metrics come from sums alone. So one release, with one clip, covers every head.

Survival: a record fills one cell, by its bin of risk, the intervals that it passed, and whether the event happened.
The concordance index is computed from those cells, with records of one bin of risk tied, as the AUROC is from bins.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_models import metrics
from shared_models.errors import ProtocolError, RecordsError
from shared_models.tasks import Choice, Head, Outline, Quantity, Survival, Task

Floats = NDArray[np.float64]

_QUANTITY = ("known", "absolute", "squared", "level", "level_squared")
_OUTLINE = ("images", "dice", "sensitivity", "precision")
_EVERYWHERE = frozenset({"records"})  # counts, of which no mean over heads is taken


def statistics_size(task: Task, bins: int) -> int:
    """Length of a task's statistics vector."""
    return sum(_size(head, bins) for head in task.heads)


def row_norm(task: Task) -> float:
    """The largest L2 norm of a record's row: what a release must clip a patient's mean row to, to lose nothing."""
    return float(np.sqrt(sum(_norm(head) ** 2 for head in task.heads)))


def record_statistics(task: Task, scores: ArrayLike, targets: ArrayLike, *, bins: int) -> Floats:
    """One row of statistics per record.

    Guarantees:
        * Entries are in [0, 1], and every row's L2 norm is at most ``row_norm(task)``, whatever the record holds.
        * A score that is NaN counts as 0. A target that is not known (NaN) leaves its head's part of the row at zero.

    Args:
        task: Names the heads.
        scores: As ``losses.scores`` gives them.
        targets: Shape ``(n, *task.target_shape)``.
        bins: Bins of scores and of risks; even.

    Returns:
        Shape ``(n, statistics_size(task, bins))``.

    Raises:
        RecordsError: Shapes disagree, or a target is none of its head's.
        ConfigError: ``bins`` is odd or below 2.
    """
    if task.choice is not None:
        return metrics.record_statistics(len(task.choice.classes), scores, targets, bins=bins)
    given = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0)
    known = np.asarray(targets, dtype=np.float64)
    if given.shape != (len(known), task.outputs) or known.shape != (len(known), *task.target_shape):
        raise RecordsError(f"scores and targets do not fit task {task.name}", hint="Read the records again.")
    return np.concatenate([_rows(*part, bins=bins) for part in _parts(task, given, known)], axis=1)


def compute_metrics(task: Task, statistics: ArrayLike, *, bins: int) -> dict[str, float]:
    """Metrics from summed statistics, which may carry noise.

    A choice has those of ``metrics.compute_metrics``. A quantity: mean absolute error and root of the mean squared
    error, as shares of the public range on its scale, and WAPE, the sum of absolute errors over the sum of values,
    counted from the range's lower end. Survival: Harrell's concordance index. An outline: mean Dice coefficient,
    sensitivity and precision of the pixels. A task with several heads has them as ``head.metric``, and the mean over
    heads under the metric's own name.

    Guarantees:
        * Any finite input gives finite figures; one that is not defined is left out.

    Raises:
        ProtocolError: Wrong length, or numbers that cannot be counts.
    """
    found = [_metrics(head, part, bins) for head, part in of_heads(task, statistics, bins)]
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(name for figures in found for name in figures if name not in _EVERYWHERE)
    means = {name: float(np.mean([figures[name] for figures in found if name in figures])) for name in names}
    own = {
        named_figure(task, head, name): figure
        for head, figures in zip(task.heads, found, strict=True)
        for name, figure in figures.items()
    }
    return means | own


def named_figure(task: Task, head: Head, name: str) -> str:
    """What a head's figure, or class, is called in its task: by its name, or after the head's where there are more."""
    return name if len(task.heads) == 1 else f"{head.name}.{name}"


def of_heads(task: Task, statistics: ArrayLike, bins: int) -> list[tuple[Head, Floats]]:
    """Each head with its own part of a task's statistics."""
    counts = np.asarray(statistics, dtype=np.float64)
    size = statistics_size(task, bins)
    if counts.shape != (size,) or not (np.abs(counts) <= metrics.LARGEST_COUNT).all():  # NaN fails, too
        raise ProtocolError(
            f"statistics of shape {counts.shape} are not {size} counts", hint="The sender runs another version or plan."
        )
    ends = np.cumsum([_size(head, bins) for head in task.heads])[:-1]
    return list(zip(task.heads, np.split(counts, ends), strict=True))


def score_tables(task: Task, statistics: ArrayLike, *, bins: int) -> dict[str, Floats]:
    """Counts of patients by score, of every class that a task tells from the rest, as they came.

    Returns:
        Shape ``(2, bins)`` each, as ``metrics.score_tables``: by class, of two the positive one only; where there are
        several heads, by ``head.class``. Heads that are no choice have none.

    Raises:
        ProtocolError: Wrong length, or numbers that cannot be counted.
    """
    found: dict[str, Floats] = {}
    for head, part in of_heads(task, statistics, bins):
        if not isinstance(head, Choice):
            continue
        named = head.classes[1:] if len(head.classes) == 2 else head.classes
        tables = metrics.score_tables(len(head.classes), part, bins=bins)
        found |= {named_figure(task, head, name): table for name, table in zip(named, tables, strict=True)}
    return found


def ranked_classes(
    task: Task, scores: ArrayLike, targets: ArrayLike
) -> dict[str, tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Scores of every class that ``score_tables`` has, unbinned.

    Args:
        task: Names the heads.
        scores: As ``losses.scores`` gives them.
        targets: Shape ``(n, *task.target_shape)``.

    Returns:
        By the same names: each record's score, whether it is of the class, and whether that is known; ``(n,)`` each.
    """
    given, known = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if task.choice is not None:
        given, known = given.reshape(len(given), -1), known[:, None]
    found = {}
    for head, own, truth in _parts(task, given, known):
        if isinstance(head, Choice):
            first = 1 if len(head.classes) == 2 else 0
            for place, name in enumerate(head.classes[first:]):
                told = truth[:, 0]
                found[named_figure(task, head, name)] = own[:, place], told == place + first, ~np.isnan(told)
    return found


def concordance(table: ArrayLike) -> float:
    """Harrell's concordance index from counts; NaN where no pair can be compared.

    A pair can be compared if the event happened to one of the two, and the other passed more intervals. It is
    concordant if the first had the higher risk; one bin counts half.

    Args:
        table: Shape ``(bins, intervals + 1, 2)``: by risk, intervals passed, and whether the event happened. Noise may
            have left some below zero: pairs are products of different counts, so it has mean zero in them.

    Source:
        Harrell et al., "Evaluating the yield of medical tests", JAMA 1982.
    """
    events, later, lower = compared(np.asarray(table, dtype=np.float64))
    pairs = float((events * later.sum(axis=0)).sum())
    return min(max(float((events * lower).sum()) / pairs, 0.0), 1.0) if pairs > 0 else np.nan


def compared(counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Whom a table of ``concordance`` compares, all of shape ``(bins, intervals + 1)``.

    Returns:
        Records with the event; those, at the same risk, that passed more intervals; and how many of these, of all
        risks, had a lower one, the same risk by half.
    """
    events, everybody = counts[:, :, 1], counts.sum(axis=2)
    later = everybody[:, ::-1].cumsum(axis=1)[:, ::-1] - everybody
    return events, later, later.cumsum(axis=0) - later / 2


def _parts(task: Task, scores: Floats, targets: Floats) -> Iterator[tuple[Head, Floats, Floats]]:
    """Each head with its own scores and targets."""
    first, start = 0, 0
    for head, (outputs, columns) in zip(task.heads, task.widths, strict=True):
        yield head, scores[:, first : first + outputs], targets[:, start : start + columns]
        first, start = first + outputs, start + columns


def _size(head: Head, bins: int) -> int:
    match head:
        case Choice(classes=classes):
            return metrics.statistics_size(len(classes), bins)
        case Quantity():
            return len(_QUANTITY)
        case Survival(edges=edges):
            metrics.statistics_size(2, bins)  # refuses bins that are none
            return bins * (len(edges) + 1) * 2
        case Outline():
            return len(_OUTLINE)


def _norm(head: Head) -> float:
    match head:
        case Choice(classes=classes):
            return metrics.row_norm(len(classes))
        case Quantity():
            return float(np.sqrt(len(_QUANTITY)))
        case Survival():
            return 1.0
        case Outline():
            return float(np.sqrt(len(_OUTLINE)))


def _rows(head: Head, scores: Floats, targets: Floats, *, bins: int) -> Floats:
    match head:
        case Choice():
            return _choice_rows(head, scores, targets[:, 0], bins)
        case Quantity():
            return _quantity_rows(scores[:, 0], targets[:, 0])
        case Survival():
            return _survival_rows(head, scores, targets, bins)
        case Outline():
            return _outline_rows(scores > 0.5, targets > 0.5)


def _choice_rows(head: Choice, scores: Floats, targets: Floats, bins: int) -> Floats:
    classes = len(head.classes)
    rows = np.zeros((len(targets), metrics.statistics_size(classes, bins)))
    known = ~np.isnan(targets)
    given = scores[known, 0] if classes == 2 else scores[known]
    rows[known] = metrics.record_statistics(classes, given, targets[known], bins=bins)
    return rows


def _quantity_rows(scores: Floats, targets: Floats) -> Floats:
    """Both on the scale of ``Numeric.scaled``, whose range is 4 wide."""
    known = ~np.isnan(targets)
    level = (np.where(known, targets, -2) + 2) / 4
    error = np.abs(np.clip((scores + 2) / 4, 0, 1) - level)
    return np.stack([np.ones_like(level), error, error**2, level, level**2], axis=1) * known[:, None]


def _survival_rows(head: Survival, scores: Floats, targets: Floats, bins: int) -> Floats:
    passed, happened = targets[:, 0], targets[:, 1]
    intervals = len(head.edges)
    if not (np.isin(passed, np.arange(intervals + 1)) & np.isin(happened, (0, 1))).all():
        raise RecordsError(f"a target of {head.name} is no interval", hint="Read the records again.")
    risk = scores.clip(0, 1).mean(axis=1)
    bin_of = np.maximum(np.ceil(risk * bins).astype(np.int64) - 1, 0)
    cells = (bin_of * (intervals + 1) + passed.astype(np.int64)) * 2 + happened.astype(np.int64)
    rows = np.zeros((len(cells), bins * (intervals + 1) * 2))
    np.put_along_axis(rows, cells[:, None], 1.0, axis=1)
    return rows


def _outline_rows(found: NDArray[np.bool_], mask: NDArray[np.bool_]) -> Floats:
    """Of an empty mask that stays empty, everything is 1."""
    both, given, true = (pixels.sum(axis=1) for pixels in (found & mask, found, mask))
    shares = [_share(2 * both, given + true), _share(both, true), _share(both, given)]
    return np.stack([np.ones(len(mask)), *shares], axis=1)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    return np.divide(part, whole, out=np.ones(len(whole)), where=whole > 0)


def _metrics(head: Head, counts: Floats, bins: int) -> dict[str, float]:
    match head:
        case Choice(classes=classes):
            return metrics.compute_metrics(len(classes), counts, bins=bins)
        case Quantity():
            return _quantity_metrics(counts)
        case Survival(edges=edges):
            table = counts.reshape(bins, len(edges) + 1, 2)
            found = concordance(table)
            index = concordance(table.clip(min=0)) if np.isnan(found) else found  # noise left no pair: near chance
            return _defined(c_index=index, records=max(float(table.sum()), 0.0))
        case Outline():
            images, *sums = counts
            if not images > 0:
                return {}
            means = (min(max(float(total / images), 0.0), 1.0) for total in sums)
            return {**dict(zip(_OUTLINE[1:], means, strict=True)), "records": float(images)}


def _quantity_metrics(sums: Floats) -> dict[str, float]:
    known, absolute, squared = sums[:3].clip(min=0).tolist()
    level, level_squared = sums[3:].tolist()
    if not known > 0:
        return {}
    spread = level_squared - level**2 / known
    return _defined(
        mae=absolute / known,
        rmse=(squared / known) ** 0.5,
        wape=absolute / level if level > 0 else np.nan,
        r2=1 - squared / spread if spread > 0 else np.nan,
        records=known,
    )


def _defined(**figures: float) -> dict[str, float]:
    return {name: float(figure) for name, figure in figures.items() if np.isfinite(figure)}
