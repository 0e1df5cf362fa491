"""Pictures of an evaluation, as SVG and PNG, by matplotlib; only where somebody asks for a report.

Each picture says in its file what it shows; numbers behind it are in the report's JSON.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from shared_models.durable import replace_file
from shared_models.errors import ConfigError
from shared_models.evaluation import Evaluation
from shared_models.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES: Final = 8  # as many as can be told apart
_SIZE: Final = (4.4, 3.7)  # inches; a phone shows it at about its own size
_DOTS: Final = 200  # of the PNG, per inch
# Okabe and Ito's colours, which colour-blind people tell apart; darkest first.
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_DASHES: Final = ("-", "--", "-.", ":", "-", "--", "-.", ":")  # and for those who see no colours at all
_GREY: Final = "#6b7780"
_STYLE: Final[dict[Any, Any]] = {
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.labelsize": 9.5,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e3e8ea",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.edgecolor": "white",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "konsil",  # the same picture is the same file
}

Lines = Mapping[str, Evaluation]


class Drawn(NamedTuple):
    """A picture.

    Attributes:
        svg: As it stands in a page or a paper.
        png: The same, for programs that read no SVG.
    """

    svg: bytes
    png: bytes


class Bar(NamedTuple):
    """What one hospital spent."""

    name: str
    spent: float
    budget: float


class Release(NamedTuple):
    """What was released after a round."""

    round: int
    figures: Mapping[str, Estimate]


def require_matplotlib() -> None:
    """Refuse before anything is computed, where pictures cannot be drawn.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401, PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            f"pictures need matplotlib, which is not installed: {error}", hint="pip install 'konsil[explain]'"
        ) from None


def draw_evaluation(lines: Lines) -> dict[str, Drawn]:
    """The four curves, with a line for each evaluation; of more than ``MOST_LINES`` the first ones.

    Where the noise leaves no area under a curve to tell, the curve is not drawn either: it would be read as one.

    Args:
        lines: By what the legend calls them.

    Returns:
        By file name without its suffix: ``roc``, ``precision-recall``, ``calibration``, ``decision``.
    """
    shown = dict(list(lines.items())[:MOST_LINES])
    painters = {"roc": _roc, "precision-recall": _precision_recall, "calibration": _calibration, "decision": _decision}
    return {name: _draw(painter, shown) for name, painter in painters.items()}


def draw_groups(rows: Sequence[tuple[str, Estimate]], *, figure: str) -> Drawn:
    """A forest plot: one figure of every group with its interval, the first row the whole.

    Args:
        rows: Name and figure; a figure without a value is drawn as its interval, in grey.
        figure: What it is called.
    """
    return _draw(_forest, rows, figure, size=(_SIZE[0], 1.15 + 0.3 * len(rows)))


def draw_progress(releases: Sequence[Release]) -> Drawn:
    """Figures over the rounds, with bands for their intervals."""
    return _draw(_progress, releases)


def draw_costs(bars: Sequence[Bar]) -> Drawn:
    """What each hospital's patients paid, beside their budgets."""
    return _draw(_costs, bars, size=(_SIZE[0], 1.15 + 0.32 * len(bars)))


def save(folder: Path, pictures: Mapping[str, Drawn]) -> list[Path]:
    """Write each picture as ``NAME.svg`` and ``NAME.png``.

    Raises:
        OSError: A file could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, drawn in pictures.items():
        for suffix, content in (("svg", drawn.svg), ("png", drawn.png)):
            path = folder / f"{name}.{suffix}"
            replace_file(path, content)
            written.append(path)
    return written


def _draw(painter: Any, *what: Any, size: tuple[float, float] = _SIZE) -> Drawn:
    """Paint on a canvas of its own: nothing global is touched, and no display is needed."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        painter(figure.add_subplot(), *what)
        files = []
        for form in ("svg", "png"):
            file = io.BytesIO()
            metadata = {"Date": None} if form == "svg" else {"Software": None}
            figure.savefig(file, format=form, dpi=_DOTS, metadata=metadata)
            files.append(file.getvalue())
    return Drawn(*files)


# the curves


def _roc(axes: "Axes", lines: Lines) -> None:
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (2, 3)))
    for place, (name, found) in enumerate(lines.items()):
        if found.roc and found.auroc.value is not None:
            label = _label(name, "AUROC", found.auroc)
            axes.plot(*zip(*found.roc, strict=True), label=label, **_look(place))
            point = found.at_specificity
            if point.sensitivity.value is not None and point.specificity.value is not None:
                at = (1 - point.specificity.value, point.sensitivity.value)
                axes.plot(*at, marker="o", markersize=5, color=_COLOURS[place])
    _finish(axes, "ROC curve", "1 - specificity", "sensitivity")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    _legend(axes, "lower right")


def _precision_recall(axes: "Axes", lines: Lines) -> None:
    for place, (name, found) in enumerate(lines.items()):
        if found.precision_recall and found.auprc.value is not None:
            label = _label(name, "AUPRC", found.auprc)
            axes.plot(*zip(*found.precision_recall, strict=True), label=label, **_look(place))
            share = found.positives / (found.positives + found.negatives)
            axes.axhline(share, color=_COLOURS[place], linewidth=0.9, linestyle=(0, (1, 3)))
    _finish(axes, "Precision and recall", "sensitivity (recall)", "positive predictive value")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03))
    _legend(axes, "lower left")


def _calibration(axes: "Axes", lines: Lines) -> None:
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (2, 3)))
    for place, (name, found) in enumerate(lines.items()):
        seen = [one for one in found.calibration if one.observed.value is not None and one.patients >= 0.5]
        if not seen:
            continue
        x = [one.predicted for one in seen]
        y = [one.observed.value or 0.0 for one in seen]
        beside = [
            [max(at - one.observed.low, 0.0) for at, one in zip(y, seen, strict=True)],
            [max(one.observed.high - at, 0.0) for at, one in zip(y, seen, strict=True)],
        ]
        look = _look(place) | {"linewidth": 1.2}
        axes.errorbar(x, y, yerr=beside, label=name, marker="o", markersize=4, elinewidth=1, capsize=2, **look)
    _finish(axes, "Calibration", "predicted probability", "observed share")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02))
    _legend(axes, "upper left")


def _decision(axes: "Axes", lines: Lines) -> None:
    lowest, highest = 0.0, 0.05
    for place, (name, found) in enumerate(lines.items()):
        if not found.decision or found.positives + found.negatives <= 0:
            continue
        x = [one.threshold for one in found.decision]
        y = [one.model.value or 0.0 for one in found.decision]
        low, high = ([getattr(one.model, end) for one in found.decision] for end in ("low", "high"))
        axes.plot(x, y, label=name, **_look(place))
        axes.fill_between(x, low, high, color=_COLOURS[place], alpha=0.13, linewidth=0)
        all_treated = [one.treat_all for one in found.decision]
        axes.plot(x, all_treated, color=_COLOURS[place], linewidth=0.9, linestyle=(0, (1, 2)))
        highest = max(highest, *y, all_treated[0])
    axes.axhline(0, color=_GREY, linewidth=1)
    axes.plot([], [], color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="treat all")
    axes.plot([], [], color=_GREY, linewidth=1, label="treat none")
    _finish(axes, "Decision curve", "threshold probability", "net benefit")
    axes.set(xlim=(0, 1), ylim=(lowest - 0.25 * highest, 1.55 * highest))  # room for the legend
    _legend(axes, "upper right")


# the rest


def _forest(axes: "Axes", rows: Sequence[tuple[str, Estimate]], figure: str) -> None:
    places = range(len(rows), 0, -1)
    for place, (_, found) in zip(places, rows, strict=True):
        colour = _COLOURS[0] if found.value is not None else "#b5bdc1"
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        if found.value is not None:
            axes.plot(found.value, place, marker="s", markersize=5.5, color=colour)
    whole = rows[0][1].value if rows else None
    if whole is not None:
        axes.axvline(whole, color=_GREY, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.set_yticks(list(places), [name for name, _ in rows])
    axes.set(xlim=(-0.01, 1.01), ylim=(0.4, len(rows) + 0.6))
    axes.grid(visible=False, axis="y")
    _finish(axes, f"{figure} by group", figure, "")


def _progress(axes: "Axes", releases: Sequence[Release]) -> None:
    names = list(dict.fromkeys(name for one in releases for name in one.figures))[:MOST_LINES]
    for place, name in enumerate(names):
        there = [(one.round, one.figures[name]) for one in releases if name in one.figures]
        known = [(number, found.value) for number, found in there if found.value is not None]
        if not known:
            continue
        axes.plot(*zip(*known, strict=True), label=name, marker="o", markersize=3.5, **_look(place))
        rounds = [number for number, _ in there]
        low, high = ([getattr(found, end) for _, found in there] for end in ("low", "high"))
        if len(there) > 1:
            axes.fill_between(rounds, low, high, color=_COLOURS[place], alpha=0.13, linewidth=0)
        else:
            axes.plot(rounds * 2, [low[0], high[0]], color=_COLOURS[place], linewidth=1)
    _finish(axes, "Released after each round", "round", "")
    axes.set(ylim=(-0.02, 1.02))
    axes.locator_params(axis="x", integer=True)
    _legend(axes, "lower right")


def _costs(axes: "Axes", bars: Sequence[Bar]) -> None:
    places = list(range(len(bars), 0, -1))
    axes.barh(places, [bar.budget for bar in bars], color="#e3e8ea", height=0.62, label="budget")
    axes.barh(places, [bar.spent for bar in bars], color=_COLOURS[0], height=0.62, label="this study")
    for place, bar in zip(places, bars, strict=True):
        axes.text(bar.budget, place, f" {bar.spent:.3g} of {bar.budget:.3g}", va="center", fontsize=8.5)
    axes.set_yticks(places, [bar.name for bar in bars])
    axes.set(xlim=(0, 1.28 * max([bar.budget for bar in bars], default=1.0)))
    axes.grid(visible=False, axis="y")
    _finish(axes, "Privacy spent, per patient", "epsilon (enforced)", "")


def _look(place: int) -> dict[str, Any]:
    return {"color": _COLOURS[place], "linestyle": _DASHES[place]}


def _label(name: str, figure: str, found: Estimate) -> str:
    if found.value is None:
        return name
    return f"{name}: {figure} {found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _finish(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_axisbelow(True)
    figure = axes.get_figure(root=True)
    if figure is not None:  # over everything: beside long names, the axes leave a title no room
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=11, fontweight="bold")


def _legend(axes: "Axes", where: Literal["upper right", "upper left", "lower left", "lower right"]) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=where)
    else:
        box = {"facecolor": "white", "edgecolor": "none"}
        why = "the noise leaves nothing to draw"
        axes.text(0.5, 0.5, why, ha="center", va="center", color=_GREY, transform=axes.transAxes, bbox=box)
