"""Pictures of single records: masks, images with what a prediction rests on, series as maps. They stay in the house."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.records.extras import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
_RAISES, _LOWERS = "red raises it", "blue lowers it"


def write_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write a mask as a PNG: white where it holds, black elsewhere.

    Args:
        path: In a folder that is made if missing, for its owner alone.
        mask: Shape ``(height, width)``.

    Raises:
        RecordsError: The extra ``images`` is not installed.
    """
    with needed("images", "pillow"):
        from PIL import Image  # noqa: PLC0415  # an extra
    path.parent.mkdir(exist_ok=True, mode=0o700)
    with _private(path).open("wb") as stream:
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(stream, format="PNG")


def draw_image(path: Path, image: Floats, attributions: Floats, *, title: str, foot: str) -> None:
    """Draw an image beside itself with attributions over it.

    Args:
        path: Of the PNG.
        image: As the network sees it, shape ``(channels, height, width)``, in [-1, 1].
        attributions: Of its pixels, shape ``(height, width)``.
        title: What is explained.
        foot: Below the picture.
    """
    figure, (left, right) = _figure(8.2, 4.4, columns=2)
    shown = np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1)
    grey = shown.mean(axis=2)
    left.imshow(shown if shown.shape[2] == 3 else grey, cmap="gray", vmin=0, vmax=1)
    right.imshow(grey, cmap="gray", vmin=0, vmax=1)
    _heat(figure, right, attributions, over=True)
    left.set_title("as the network sees it", fontsize=9)
    right.set_title(f"{_RAISES}, {_LOWERS}", fontsize=9)
    for axes in (left, right):
        axes.set_axis_off()
    _save(path, figure, title, foot)


def draw_series(
    path: Path,
    attributions: Floats,
    seen: NDArray[np.bool_],
    names: list[str],
    *,
    step_unit: str,
    title: str,
    foot: str,
) -> None:
    """Draw attributions of a series as a map: a line per variable that was measured, a column per step.

    Args:
        path: Of the PNG.
        attributions: Shape ``(steps, variables)``.
        seen: Where something was measured, shape ``(steps, variables)``.
        names: Of the variables.
        step_unit: Of the steps.
        title: What is explained.
        foot: Below the picture.
    """
    measured = np.flatnonzero(seen.any(axis=0))
    figure, (axes,) = _figure(8.2, 1.9 + 0.22 * max(3, len(measured)), columns=1)
    if len(measured):
        _heat(figure, axes, np.where(seen, attributions, np.nan)[:, measured].T)
    axes.set_yticks(range(len(measured)), [names[i] for i in measured], fontsize=8)
    axes.set_xlabel(step_unit, fontsize=9)
    axes.set_title(f"{_RAISES}, {_LOWERS}; grey was not measured", fontsize=9)
    axes.set_facecolor("0.85")
    _save(path, figure, title, foot)


def _figure(width: float, height: float, *, columns: int) -> tuple["Figure", list["Axes"]]:
    with needed("explain", "matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # an extra
        from matplotlib.figure import Figure  # noqa: PLC0415  # an extra
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _heat(figure: "Figure", axes: "Axes", values: Floats, *, over: bool = False) -> None:
    """Red above zero, blue below; the scale ends at the largest value of this record.

    Args:
        figure: Gets the scale.
        axes: To draw into.
        values: NaN where there is nothing to say.
        over: Over an image, which is seen where values are near zero; else a map of its own, white at zero.
    """
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415  # an extra
    from matplotlib.colors import Normalize  # noqa: PLC0415  # an extra

    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
    colours = ScalarMappable(Normalize(-largest, largest), "RdBu_r")
    shown = colours.to_rgba(values)
    if over:
        shown[..., 3] = 0.8 * np.sqrt(np.abs(values) / largest)
    axes.imshow(shown, aspect="equal" if over else "auto", interpolation="nearest")
    bar = figure.colorbar(colours, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=8)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]  # a ScalarFormatter


def _save(path: Path, figure: "Figure", title: str, foot: str) -> None:
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(foot, fontsize=7, color="0.35")
    with _private(path).open("wb") as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})


def _private(path: Path) -> Path:
    """The path of an empty file that its owner alone can read."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    return path
