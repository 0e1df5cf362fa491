"""Metrics as additive statistics: counted at the hospitals, added anywhere, computed once from the sum.

A record fills a few *cells* of one long vector of counts, and nothing else; summed rows are the statistics. With two
classes that is one cell: its score's bin among the records of its class. With more it is one cell of the confusion
matrix, one per class (its score's bin among the records that are, or are not, of that class), and one for the
confidence of its prediction.

Bins are ``(k / bins, (k + 1) / bins]``, zero in the first. ``bins`` is even, so that 1/2 is an edge and every metric of
the decision at 1/2 is exact; a score of exactly 1/2 counts as negative. Scores within a bin count as tied.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_models.errors import ConfigError, ProtocolError, RecordsError

Floats = NDArray[np.float64]

EXACT_BINS: Final = 1000  # for evaluation that stays in the house, where more cells cost no privacy
LARGEST_COUNT: Final = 2.0**53  # beyond it float64 skips integers


def statistics_size(classes: int, bins: int) -> int:
    """Length of the statistics vector."""
    _check_shape(classes, bins)
    return 2 * bins if classes == 2 else classes * classes + 2 * bins * (classes + 1)


def row_norm(classes: int) -> float:
    """L2 norm of every record's row: what a release must clip a patient's mean row to, to lose nothing."""
    return 1.0 if classes == 2 else float(np.sqrt(classes + 2))


def record_statistics(classes: int, scores: ArrayLike, labels: ArrayLike, *, bins: int) -> Floats:
    """One row of statistics per record.

    Guarantees:
        * Rows hold zeros and ones only; every row's L2 norm is ``row_norm(classes)``, whatever the record holds.
        * The sum over rows is ``total_statistics`` of the same records.
        * A score that is NaN counts as 0, one out of [0, 1] as the nearer end: a diverged model scores badly, it does
          not stop an evaluation.

    Args:
        classes: Number of classes of the task, at least 2.
        scores: Two classes: probability of the positive one, shape ``(n,)``. More: of each class, ``(n, classes)``.
        labels: Class index of each record, shape ``(n,)``; integers in any dtype.
        bins: Score bins; even.

    Returns:
        Shape ``(n, statistics_size(classes, bins))``. For many records ``total_statistics`` needs far less memory.

    Raises:
        RecordsError: Shapes disagree, or a label is no class index.
        ConfigError: Fewer than two classes, or ``bins`` is odd or below 2.
    """
    cells = _cells(classes, scores, labels, bins)
    rows = np.zeros((len(cells), statistics_size(classes, bins)))
    np.put_along_axis(rows, cells, 1.0, axis=1)
    return rows


def total_statistics(classes: int, scores: ArrayLike, labels: ArrayLike, *, bins: int) -> Floats:
    """The sum of ``record_statistics`` over all records, without its rows."""
    cells = _cells(classes, scores, labels, bins)
    return np.bincount(cells.ravel(), minlength=statistics_size(classes, bins)).astype(np.float64)


def compute_metrics(classes: int, statistics: ArrayLike, *, bins: int) -> dict[str, float]:
    """Metrics from summed statistics, which may carry noise.

    With two classes, sensitivity, specificity, F1, AUROC and AUPRC are the positive class's. With more, the first two
    are left out, and the others are means over classes, each against the rest. Balanced accuracy is the mean recall.
    Means are over those classes for which the figure is defined. With more than two classes the Brier score sums over
    them. The calibration error is the expected one over ``calibration_bins(bins)`` bins, of the positive class's
    probability or of the prediction's confidence.

    Ratios of sums, and of products of different counts, are taken from the counts as they came, negative ones included:
    noise of mean zero then cancels, where cutting it off at zero would draw every figure towards chance. Only the AUPRC
    and the calibration error are computed from counts that are cut off: of the first, ratios of single noised counts
    have no mean, and the second is of absolute values; both are biased, the smaller the counts the more. So is a figure
    of which the noise left no more than zero to divide by: that one is computed from counts that are cut off, too.

    Guarantees:
        * On exact statistics every figure differs from its value on the unbinned records by at most ``bin_errors``.
        * Any finite input gives finite figures in their ranges. A figure that is not defined, like the AUROC of a
          single class, is left out.

    Raises:
        ProtocolError: Wrong length, or numbers that cannot be counts.
        ConfigError: As for ``record_statistics``.
    """
    counts = _check_counts(statistics, statistics_size(classes, bins))
    cut_off = counts.clip(min=0.0)
    as_they_came, instead = (_ratios(classes, part, bins) for part in (counts, cut_off))
    _, tables, confidence = _split(classes, cut_off, bins)
    ratios = {name: instead[name] if np.isnan(figure) else figure for name, figure in as_they_came.items()}
    figures = {
        **ratios,
        "auprc": _mean(np.array([_auprc(table) for table in tables])),
        "calibration_error": _calibration_error(confidence),
        "records": 0.0 if np.isnan(instead["records"]) else ratios["records"],
    }
    return {name: float(figure) for name, figure in figures.items() if not np.isnan(figure)}


def _ratios(classes: int, counts: Floats, bins: int) -> dict[str, float]:
    """Figures that are ratios of sums of counts, or of products of different ones; NaN of nothing."""
    confusion, tables, _ = _split(classes, counts, bins)
    recalls = np.array([_ratio(confusion[c, c], confusion[c].sum()) for c in range(classes)])
    f1s = np.array([_ratio(2 * confusion[c, c], confusion[c].sum() + confusion[:, c].sum()) for c in range(classes)])
    return {
        "accuracy": _ratio(confusion.trace(), confusion.sum()),
        "balanced_accuracy": _mean(recalls),
        **({"sensitivity": recalls[1], "specificity": recalls[0]} if classes == 2 else {}),
        "f1": f1s[1] if classes == 2 else _mean(f1s),
        "auroc": _mean(np.array([_auroc(table) for table in tables])),
        "brier": sum(_brier(table) for table in tables),
        "records": confusion.sum() if confusion.sum() > 0 else np.nan,
    }


def score_tables(classes: int, statistics: ArrayLike, *, bins: int) -> Floats:
    """The counts of scores within summed statistics, as they came: noise may have left some below zero.

    Returns:
        Shape ``(tables, 2, bins)``: negatives, then positives. One table of two classes, of more one for each class
        against the rest.

    Raises:
        ProtocolError: Wrong length, or numbers that cannot be counts.
        ConfigError: As for ``record_statistics``.
    """
    counts = _check_counts(statistics, statistics_size(classes, bins))
    return _split(classes, counts, bins)[1]


def bin_errors(classes: int, statistics: ArrayLike, *, bins: int) -> dict[str, float]:
    """How far at most each figure of ``compute_metrics`` lies from its value on the unbinned records.

    Figures of the decision are exact. A score lies within ``1 / (2 * bins)`` of its bin's middle, which bounds the
    errors of Brier score and calibration. The AUROC errs by at most half the share of those pairs, a positive and a
    negative, that fall in one bin. The AUPRC lies between its values with the most and the least fortunate order within
    every bin.

    Args:
        classes: Number of classes of the task.
        statistics: Summed statistics without noise.
        bins: Score bins.

    Returns:
        The same keys as ``compute_metrics``.
    """
    _, tables, _ = _split(classes, _check_counts(statistics, statistics_size(classes, bins)).clip(min=0.0), bins)
    errors = {
        "auroc": _mean(np.array([_auroc_error(table) for table in tables])),
        "auprc": _mean(np.array([_auprc_error(table) for table in tables])),
        "brier": 1 / bins if classes == 2 else 2 / bins + classes / (4 * bins**2),
        "calibration_error": 1 / (2 * bins),
    }
    return {name: errors.get(name, 0.0) for name in compute_metrics(classes, statistics, bins=bins)}


def calibration_bins(bins: int) -> int:
    """Bins of the calibration error: the most, up to the customary 15, whose edges are edges of score bins too."""
    return next(count for count in range(min(bins, 15), 0, -1) if bins % count == 0)


def nearest_counts(noised: Floats) -> Floats:
    """The nearest counts to noised ones: none is negative, and their sum is that of the noised, or 0.

    Cutting negative counts off at zero would add half of the noise of every empty bin to the total, and draw every
    curve towards the diagonal. Here all counts are lowered alike until the total is what was released.

    Guarantees:
        * Counts that are not negative are returned as they are.

    Source:
        Norm-Sub of Wang et al., NDSS 2020 (arXiv:1905.08320): the constrained least-squares solution.
    """
    total = noised.sum()
    if (noised >= 0).all():
        return noised
    if not total > 0:
        return np.zeros_like(noised)
    falling = np.sort(noised)[::-1]
    lowered_by = (falling.cumsum() - total) / np.arange(1, len(noised) + 1)
    last = np.flatnonzero(falling > lowered_by)[-1]
    return np.maximum(noised - lowered_by[last], 0.0)


def _check_shape(classes: int, bins: int) -> None:
    if classes < 2 or bins < 2 or bins % 2:
        hint = "A task has at least 2 classes, and bins are even, so that 1/2 is an edge."
        raise ConfigError(f"{classes} classes and {bins} bins make no statistics", hint=hint)


def _check_counts(statistics: ArrayLike, size: int) -> Floats:
    """Counts as they came; with noise, some may be below zero."""
    counts = np.asarray(statistics, dtype=np.float64)
    if counts.shape != (size,) or not (np.abs(counts) <= LARGEST_COUNT).all():  # NaN fails, too
        hint = "The sender runs another version or another plan."
        raise ProtocolError(f"statistics of shape {counts.shape} are not {size} counts", hint=hint)
    return counts


def _cells(classes: int, scores: ArrayLike, labels: ArrayLike, bins: int) -> NDArray[np.int64]:
    """The cells that each record fills, shape ``(n, cells per record)``."""
    _check_shape(classes, bins)
    probabilities = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0).clip(0.0, 1.0)
    truth = np.asarray(labels)
    expected = truth.shape if classes == 2 else (*truth.shape, classes)
    if truth.ndim != 1 or probabilities.shape != expected or not np.isin(truth, np.arange(classes)).all():
        hint = "Scores and labels need one entry per record, and a label is a class index."
        raise RecordsError(f"scores and labels do not fit {classes} classes", hint=hint)
    truth = truth.astype(np.int64)
    if classes == 2:
        return (truth * bins + _bin(probabilities, bins))[:, None]
    return _cells_of_many(classes, probabilities, truth, bins)


def _cells_of_many(classes: int, scores: Floats, truth: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Cells in the order that ``_split`` reads: confusion matrix, a table per class, the table of confidence."""
    predicted = scores.argmax(axis=1)
    every_class = np.arange(classes)
    of_class = truth[:, None] == every_class
    tables = classes * classes + every_class * 2 * bins + of_class * bins + _bin(scores, bins)
    right = predicted == truth
    confidence = classes * classes + classes * 2 * bins + right * bins + _bin(scores.max(axis=1), bins)
    return np.column_stack([truth * classes + predicted, tables, confidence])


def _bin(scores: Floats, bins: int) -> NDArray[np.int64]:
    return np.maximum(np.ceil(scores * bins).astype(np.int64) - 1, 0)


def _split(classes: int, counts: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Statistics as confusion matrix, tables of scores, and the table that calibration is judged by.

    Returns:
        Confusion matrix, shape ``(classes, classes)``: true class, then predicted. Tables, shape ``(tables, 2, bins)``:
        negatives, then positives. One such table of the confidence in wrong and right predictions; of two classes, the
        positive class's.
    """
    if classes == 2:
        table = counts.reshape(2, bins)
        return table.reshape(2, 2, bins // 2).sum(axis=2), table[None], table
    confusion, tables = np.split(counts, [classes * classes])
    tables = tables.reshape(classes + 1, 2, bins)
    return confusion.reshape(classes, classes), tables[:-1], tables[-1]


def _ratio(part: float, whole: float) -> float:
    """A share of a count, in [0, 1] whatever the noise; NaN of nothing."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else np.nan


def _mean(figures: Floats) -> float:
    """Mean of those figures that are defined; NaN if none is."""
    defined = figures[~np.isnan(figures)]
    return float(defined.mean()) if defined.size else np.nan


def _lacks_a_class(table: Floats) -> bool:
    """Whether negatives or positives are missing, so that no ranking of them can be judged."""
    return not bool((table.sum(axis=1) > 0).all())


def _auroc(table: Floats) -> float:
    """Share of pairs in which the positive has the higher score; a pair in one bin counts half."""
    if _lacks_a_class(table):
        return np.nan
    negatives, positives = table / table.sum(axis=1, keepdims=True)
    return min(max(float(positives @ (negatives.cumsum() - negatives / 2)), 0.0), 1.0)


def _auroc_error(table: Floats) -> float:
    if _lacks_a_class(table):
        return np.nan
    negatives, positives = table / table.sum(axis=1, keepdims=True)
    return float(positives @ negatives) / 2


def _auprc(table: Floats) -> float:
    """Average precision: the precision at each bin's lower edge, weighted by the bin's share of positives."""
    if _lacks_a_class(table):
        return np.nan
    negatives, positives = table[:, ::-1]
    precision = _shares(positives.cumsum(), negatives.cumsum())
    return min(float(positives / positives.sum() @ precision), 1.0)


def _auprc_error(table: Floats) -> float:
    """Width of the interval that holds the average precision for every order, and every tie, within the bins.

    At the r-th of a bin's positives the precision is lowest after all of the bin's negatives: f(r) = (a + r) / (a + r +
    c). f is concave, so its mean over the bin's positives is at least that of its two ends. It is highest at the last
    positive before any of the negatives.
    """
    if _lacks_a_class(table):
        return np.nan
    negatives, positives = table[:, ::-1]
    above, false_above = positives.cumsum() - positives, negatives.cumsum() - negatives
    highest = _shares(above + positives, false_above)
    lowest = (_shares(above + 1, false_above + negatives) + _shares(above + positives, false_above + negatives)) / 2
    return float(positives / positives.sum() @ (highest - lowest))


def _shares(part: Floats, rest: Floats) -> Floats:
    """``part / (part + rest)``, and 0 where both are 0."""
    whole = part + rest
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def _brier(table: Floats) -> float:
    """Mean squared distance of the score, taken as its bin's middle, from 0 or 1."""
    negatives, positives = table
    middles = _middles(table)
    return _ratio(float(negatives @ middles**2 + positives @ (1 - middles) ** 2), float(table.sum()))


def _calibration_error(table: Floats) -> float:
    """Mean over records of how far its bin's share of positives lies from its bin's mean score."""
    coarse = (calibration_bins(table.shape[1]), -1)
    positives = table[1].reshape(coarse).sum(axis=1)
    promised = (table.sum(axis=0) * _middles(table)).reshape(coarse).sum(axis=1)
    return _ratio(float(np.abs(positives - promised).sum()), float(table.sum()))


def _middles(table: Floats) -> Floats:
    bins = table.shape[1]
    return (np.arange(bins) + 0.5) / bins
