"""Real medicine: tables, images, series and text of real patients, federated and private, beside published figures.

Each line is a module of ``bench/lines`` with ``measure(data, seeds)``, which trains with so many seeds and gives means,
and sample standard deviations beside them under the same name with ``_sd``. What was chosen for a line (learning rates,
rounds, noise) stands in ``bench/plans``; it was chosen on training parts only, and a test part is read once per seed.

The data comes from ``KONSIL_DATA`` (default: ``shared/data`` beside the project). A line whose data is absent is
skipped, with the reason.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shared_models.errors import ConfigError, FederationError

LINES = ("heart", "tcga", "physionet", "pneumonia", "mtsamples", "nhs")


@dataclass(frozen=True)
class Target:
    """What a figure should reach: ``limit`` itself, or ``limit`` above another figure of the same line.

    Attributes:
        figure: Name of the figure.
        limit: The bound.
        most: Whether the bound is an upper one.
        above: Name of a figure that is added to the bound.
    """

    figure: str
    limit: float
    most: bool = False
    above: str | None = None

    def verdict(self, figures: Mapping[str, float]) -> str:
        """One line: the bound, and whether it is met; a NaN misses every bound."""
        bound = self.limit + (figures[self.above] if self.above else 0.0)
        met = figures[self.figure] <= bound if self.most else figures[self.figure] >= bound
        origin = f" ({self.above} {self.limit:+g})" if self.above else ""
        return f"target {'<=' if self.most else '>='} {bound:.4g}{origin}: {'met' if met else 'MISSED'}"


TARGETS = (
    Target("heart_flamby_fedavg", 0.655),
    Target("heart_flamby_fedavg", 0.715, most=True),
    Target("heart_centre_accuracy", 0.81),
    Target("heart_pooled_accuracy", 0.80),
    Target("heart_pooled_accuracy_eps2", 0.79),
    Target("tcga_cindex", 0.842),
    Target("physionet_auroc", 0.84),
    Target("physionet_auroc", -0.01, above="physionet_auroc_pooled"),
    Target("physionet_auprc", 0.50),
    Target("physionet_auroc_eps8", 0.80),
    Target("pneumonia_auroc", 0.95),
    Target("pneumonia_auroc", -0.01, above="pneumonia_auroc_pooled"),
    Target("pneumonia_auroc_eps8", 0.93),
    Target("pneumonia_auroc_eps3", 0.90),
    Target("mtsamples_f1", 0.93),
    Target("mtsamples_f1_eps8", 0.80),
    Target("mtsamples_bytes_fraction", 0.02, most=True),
    Target("nhs_wape", 0.05, most=True),
)


def data_folder() -> Path:
    """Where the data sets' folders lie.

    Raises:
        ConfigError: There is no such folder.
    """
    folder = Path(os.environ.get("KONSIL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", hint="Set KONSIL_DATA to the folder of the data sets.")
    return folder


def find_line(name: str) -> Callable[[Path, int], dict[str, float]]:
    """The ``measure`` of a line; only its own module is imported."""
    measure: Callable[[Path, int], dict[str, float]] = importlib.import_module(f"lines.{name}").measure
    return measure


def describe(figures: Mapping[str, float]) -> Iterator[str]:
    """A text line for each figure, with its spread and its targets."""
    for name, figure in figures.items():
        if name.endswith("_sd"):
            continue
        spread = f" +- {figures[f'{name}_sd']:.4f}" if f"{name}_sd" in figures else ""
        verdicts = [target.verdict(figures) for target in TARGETS if target.figure == name]
        yield f"{name:<36} {figure:.4f}{spread:<11} {'; '.join(verdicts)}".rstrip()


def main() -> None:
    """Measure the lines that were asked for, print, and say which targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=LINES, metavar="NAME", help=f"one line: {', '.join(LINES)} (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="runs, each with its own seed (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name in (options.only,) if options.only else LINES:
        try:
            data = data_folder()
            found = find_line(name)(data, options.seeds)
        except ConfigError as error:
            print(f"{name} skipped: {error}. {error.hint}", flush=True)
            continue
        except FederationError as error:
            sys.exit(f"error: {name}: {error}\nhint: {error.hint}")
        figures |= found
        print(*describe(found), sep="\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
