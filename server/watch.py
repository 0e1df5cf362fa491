"""A study, live in a terminal; where there is no terminal, one plain line per event.

It is fed the journal's events, whoever brings them: the file, or the control service.
"""

from types import TracebackType

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.standing import Event, HospitalSeen, Standing, clock, first_metrics

REFRESH_PER_SECOND = 4
SHOWN_EVENTS = 6  # on a terminal that has the room
WIDE = 72  # columns, from which the table has all of its own
COLOURS = {
    "pending": "yellow",
    "queued": "yellow",
    "running": "green",
    "paused": "yellow",
    "finished": "bold green",
    "failed": "bold red",
    "stopped": "red",
}


class Watch:
    """Shows one study until it is left; a context manager.

    Args:
        console: Where to.
        study: The study's name.
        hospitals: Those that are known already; others are added as events name them.
        keep: Whether the last picture stays when the view is left; lines always stay.
        full_screen: Whether the view has the terminal to itself while it is there.

    Attributes:
        progress: What has been seen; change it between events and call ``draw`` where there is more to show.
    """

    def __init__(
        self,
        console: Console,
        study: str,
        *,
        hospitals: tuple[str, ...] = (),
        keep: bool = True,
        full_screen: bool = False,
    ) -> None:
        self.progress = Standing(study=study)
        for name in hospitals:
            self.progress.hospital(name)
        self._console = console
        self._left_to_print = keep and full_screen  # what a full screen showed goes with it
        self._live = Live(
            console=console, refresh_per_second=REFRESH_PER_SECOND, transient=not keep, screen=full_screen
        )

    def __enter__(self) -> "Watch":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._console.is_terminal:
            self.draw()
            self._live.stop()
            if self._left_to_print:
                self._console.print(self._view())

    def see(self, event: Event) -> None:
        """Take in one event and show it."""
        told = self.progress.see(event)
        if self._console.is_terminal:
            self.draw()
        elif not told.minor:
            text = self.progress.line() if event["event"] == "round" else told.text
            self._console.print(f"{clock(told.at)} {_plain(text)}", highlight=False, markup=False, soft_wrap=True)

    def draw(self) -> None:
        """Show what is known now, where there is a terminal."""
        if self._console.is_terminal:
            self._live.update(self._view())

    def _view(self) -> Group:
        return view(self.progress, self._console.size.width, self._console.size.height)


def view(progress: Standing, width: int, height: int) -> Group:
    """The picture of a study: where it is, its hospitals, metrics, seconds of the stages, what happened last."""
    head = Text.assemble(
        (_plain(progress.study), "bold"), "  ", (progress.state, COLOURS.get(progress.state, "")), overflow="fold"
    )
    bar = Table.grid()  # a bar by itself does not end its line
    done = ProgressBar(
        total=progress.rounds or 1,
        completed=progress.done,
        width=min(width, 60),
        complete_style="cyan",
        finished_style="green",
    )
    bar.add_row(done)
    parts: list[ConsoleRenderable] = [head, bar, Text(_plain(progress.line(metrics=False)))]
    if progress.reason and progress.history:
        parts.append(Text(_plain(progress.reason), style="yellow"))
    parts.append(Padding(_hospitals(progress, width), (1, 0, 0, 0)))
    figures = _figures(progress)
    if figures.row_count:
        parts.append(Padding(figures, (1, 0, 0, 0)))
    room = max(0, min(SHOWN_EVENTS, height - 9 - len(progress.hospitals) - 2 * figures.row_count))
    if room and progress.recent:
        parts.append(Padding(_recent(progress, room), (1, 0, 0, 0)))
    return Group(*parts)


def _hospitals(progress: Standing, width: int) -> Table:
    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("hospital", "round", "epsilon enforced" if wide else "epsilon", *["dropped out"] * wide):
        table.add_column(title, no_wrap=True, justify="left" if title == "hospital" else "right")
    table.add_column("state", ratio=1)  # the one that gives way
    for name, seen in sorted(progress.hospitals.items()):
        cells = [_plain(name), str(seen.last_round or "-"), "-" if seen.epsilon is None else f"{seen.epsilon:.3f}"]
        cells += [str(seen.dropped.total())] * wide
        table.add_row(*(Text(cell) for cell in cells), _one_line(seen.state, _colour(seen)))
    return table


def _colour(seen: HospitalSeen) -> str:
    if seen.state.startswith(("refused", "left out", "set aside", "missing", "gone")):
        return "red"
    return "green" if seen.state in {"answered", "joined", "stated its cost"} else "yellow"


def _figures(progress: Standing) -> Table:
    """Metrics, and the seconds of the last round's stages."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for title, figures in (("released", progress.released), ("measured", progress.measured)):
        if figures:
            told = ", ".join(f"{_plain(name)} {value:.3f}" for name, value in first_metrics(figures).items())
            table.add_row(title, Text(told))
    if progress.history:
        stages = progress.history[-1].stages
        table.add_row("stages", Text(", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items())))
    return table


def _recent(progress: Standing, room: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for told in [told for told in progress.recent if not told.minor][-room:]:
        table.add_row(clock(told.at), _one_line(told.text))
    return table


def _one_line(text: str, style: str = "") -> Text:
    return Text(_plain(text), style=style, no_wrap=True, overflow="ellipsis")


def _plain(text: str) -> str:
    """Without control characters: what a peer wrote must not move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
