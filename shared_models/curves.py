"""Curves, laid out here and drawn by templates as SVG: for the coordinator's page and the auditor's report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 180  # in pixels on a phone; more, scaled, elsewhere
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26
MOST_SERIES = 8  # as many as can be told apart
MOST_POINTS = 300


class Level(NamedTuple):
    """A horizontal line: where it is drawn, and what is written at it."""

    y: float
    text: str
    text_y: float


class Line(NamedTuple):
    """One series as points of the picture."""

    name: str
    points: Points


@dataclass(frozen=True)
class Chart:
    """Everything that the template needs to draw one.

    Attributes:
        title: What is drawn.
        last: The last round of the axis.
        of: How many series there are; where there are too many, those that end highest are drawn.
        limit: A level that is marked.
    """

    title: str
    last: int
    grid: Sequence[Level]
    lines: Sequence[Line]
    of: int
    limit: Level | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT


def chart(
    title: str,
    series: Mapping[str, Points],
    *,
    last: int,
    limit: tuple[str, float] | None = None,
    full: float = 0,
    whole: bool = False,
) -> Chart:
    """Lay lines out over the rounds, from zero.

    Args:
        title: What is drawn.
        series: Points (round, value) by name. What is not finite is left out.
        last: The last round of the axis; at least two are drawn.
        limit: A level that is marked, and its name.
        full: The axis reaches at least so far.
        whole: Whether values are counts.
    """
    chosen = _highest(series)
    values = [value for points in chosen.values() for _, value in points]
    highest, last = max([full, *values, *([limit[1]] if limit else [])]), max(last, 2)
    top = max(4 * math.ceil(highest / 4), 4) if whole else _ceiling(highest)

    def x(number: float) -> float:
        return round(LEFT + (number - 1) / (last - 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    levels = [top * quarter / 4 for quarter in range(5)]
    mark = None
    if limit is not None:
        at = y(limit[1])
        mark = Level(at, limit[0], at + 15 if at < TOP + 16 else at - 4)
    return Chart(
        title=title,
        last=last,
        grid=[Level(y(value), f"{value:.3g}" if value < 1000 else f"{value:,.0f}", y(value) + 4.5) for value in levels],
        lines=[Line(name, [(x(at), y(value)) for at, value in _thinned(points)]) for name, points in chosen.items()],
        of=len(series),
        limit=mark,
    )


def _highest(series: Mapping[str, Points]) -> dict[str, Points]:
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    found: dict[str, Points] = {name: points for name, points in finite.items() if points}
    if len(found) > MOST_SERIES:
        highest = sorted(found, key=lambda name: -found[name][-1][1])[:MOST_SERIES]
        found = {name: points for name, points in found.items() if name in highest}
    return found


def _ceiling(value: float) -> float:
    """The next number from here on whose quarters are short to write, such as 1.2, 2 or 60."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))


def _thinned(points: Points) -> Points:
    step = math.ceil(len(points) / MOST_POINTS)
    return [*points[:-1:step], points[-1]]
