"""Processor time of a whole private study with our gradients per patient, and with Opacus's hooks in their place.

The study is that of PneumoniaMNIST at epsilon 8 (``bench/plans/pneumonia-eps8.toml``) with fewer rounds: five
hospitals, ledgers, masks, noise, changed pictures, statements. Both run whole in one process and take turns; nothing
but the engine differs. AUROC is on the official validation part; noise is fresh in every run.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from lines.pneumonia import PUBLIC_SIZE, encoded, read_part, split, write_hospitals
from lines.training import PLANS, measure_model, run_study
from medicine import data_folder

from client.clipping.book_keeping import covers
from server.demo import plan_text
from shared_models.errors import FederationError
from shared_models.plan import read_plan
from shared_models.tasks import PNEUMONIA

ENGINES = ("ours", "hooks")
TARGET = 2.0


def measure(rounds: int, runs: int) -> dict[str, float]:
    """Median processor seconds of a study with either engine, their ratio, and the mean AUROC of each."""
    data = data_folder()
    validation = encoded(read_part(data, "val"))
    plan = read_plan(PLANS / "pneumonia-eps8.toml").model_copy(update={"rounds": rounds})
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    auroc: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with TemporaryDirectory(prefix="konsil-bench-") as scratch:
        folder = Path(scratch)
        write_hospitals(split(read_part(data, "train")), folder / "hospitals")
        (folder / "plan.toml").write_text(plan_text(plan), encoding="utf-8")
        for run in range(runs):
            for engine in ENGINES:
                # Hooks are what a network gets that book-keeping does not cover.
                with patch("client.dp_sgd.covers", covers if engine == "ours" else lambda _: False):
                    started = time.process_time()
                    study = run_study(
                        folder / "plan.toml",
                        folder / "hospitals",
                        folder / f"{engine}-{run}",
                        seed=run,
                        public_size=PUBLIC_SIZE,
                    )
                    seconds[engine].append(time.process_time() - started)
                auroc[engine].append(measure_model(study.model, validation, PNEUMONIA)["auroc"])
    figures = {f"study_{engine}_cpu_s": statistics.median(spent) for engine, spent in seconds.items()}
    figures |= {f"study_{engine}_auroc": statistics.mean(found) for engine, found in auroc.items()}
    return figures | {"study_hooks_over_ours": figures["study_hooks_cpu_s"] / figures["study_ours_cpu_s"]}


def main() -> None:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of each study; the plan has 160 (default: 20)")
    parser.add_argument("--runs", type=int, default=3, help="studies with each engine (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds < 1 or options.runs < 1:
        parser.error("--rounds and --runs must be at least 1")
    torch.set_num_threads(1)
    try:
        figures = measure(options.rounds, options.runs)
    except FederationError as error:
        parser.exit(2, f"error: {error}\nhint: {error.hint}\n")
    for name, figure in figures.items():
        print(f"{name:<24} {figure:.3f}")
    met = "met" if figures["study_hooks_over_ours"] >= TARGET else "MISSED"
    print(f"hooks take {figures['study_hooks_over_ours']:.2f} times as long, target >= {TARGET}: {met}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
