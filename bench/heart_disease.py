"""The heart-disease study, federated and private, several times: accuracy, AUROC and epsilon, mean and spread.

Four real hospitals (UCI heart disease, FLamby's training and test parts), real processes over TLS; every run draws
fresh noise from the operating system. The data comes from ``KONSIL_DATA`` (default: ``shared/data`` beside the
project); without it, nothing is measured.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from demo import highest, run_demo, scratch_folder, verdict

from server.examples import write_example
from server.processes import Children
from shared_models.errors import ConfigError, FederationError

STUDY = "heart-disease"
TARGETS = {"heart_pooled_accuracy": 0.785, "heart_centre_accuracy": 0.80, "heart_auroc": 0.865}
EPSILON, DELTA = 1.0, 1e-4


def measure_centres(folder: Path, tests: Mapping[str, Path], models: list[str]) -> dict[str, list[float]]:
    """Accuracy of each model on each centre's own test part, as that hospital's command measures it."""
    accuracies = {}
    with Children(folder / "logs") as children:
        for centre, records in tests.items():
            name = f"evaluate-{centre}"
            meter = children.start(name, "konsil-hospital", "evaluate", "--records", str(records), talk=True)
            output, _ = meter.communicate("\n".join(models) + "\n")
            children.check(name)
            lines = [json.loads(line) for line in output.splitlines()]
            if [line["model"] for line in lines] != models:
                raise FederationError(f"not every model was measured at {centre}")
            accuracies[centre] = [line["accuracy"] for line in lines]
    return accuracies


def summarise(reports: list[dict[str, Any]], centres: Mapping[str, list[float]]) -> dict[str, float]:
    """Means and sample standard deviations over the runs; epsilon and delta as they are at worst."""
    by_run = [mean(accuracies) for accuracies in zip(*centres.values(), strict=True)]
    figures: dict[str, float] = {"heart_runs": len(reports)}
    figures |= _spread("heart_pooled_accuracy", (report["metrics"]["accuracy"] for report in reports))
    figures |= _spread("heart_centre_accuracy", by_run)
    figures |= _spread("heart_auroc", (report["metrics"]["auroc"] for report in reports))
    for centre, accuracies in centres.items():
        figures |= _spread(f"heart_accuracy_{centre.replace('-', '_')}", accuracies)
    figures |= _spread("heart_seconds", (report["seconds"] for report in reports))
    for figure in ("epsilon", "epsilon_filter", "delta"):
        figures[f"heart_{figure}_max"] = max(highest(report, figure) for report in reports)
    pooled = reports[0]["baselines"]["pooled"]
    return figures | {"heart_baseline_accuracy": pooled["accuracy"], "heart_baseline_auroc": pooled["auroc"]}


def _spread(name: str, values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {name: mean(found), f"{name}_sd": stdev(found) if len(found) > 1 else 0.0}


def print_summary(figures: Mapping[str, float], reports: list[dict[str, Any]]) -> None:
    """The figures beside their targets, and what each hospital paid."""
    for name, target in TARGETS.items():
        print(
            f"{name:<24} {figures[name]:.4f} +- {figures[f'{name}_sd']:.4f}   "
            f"target >= {target:g}: {verdict(figures[name] >= target)}"
        )
    for hospital, stated in reports[-1]["hospitals"].items():
        epsilon = max(report["hospitals"][hospital]["epsilon"] for report in reports)
        enforced = max(report["hospitals"][hospital]["epsilon_filter"] for report in reports)
        own = figures[f"heart_accuracy_{hospital.replace('-', '_')}"]
        print(
            f"{hospital:<24} epsilon {epsilon:.3f}, enforced {enforced:.3f}, delta {stated['delta']:g}, "
            f"{stated['rounds']} rounds; accuracy on its own test part {own:.3f}"
        )
    within = figures["heart_epsilon_filter_max"] <= EPSILON and figures["heart_delta_max"] <= DELTA
    print(f"epsilon <= {EPSILON:g} at delta {DELTA:g}, enforced: {verdict(within)}")


def main() -> None:
    """Run, print, and say which targets are met; skip, and say why, where the data is absent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs, each with fresh noise (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    figures: dict[str, float] = {}
    with scratch_folder() as folder:
        try:
            example = write_example(STUDY, folder / "data", hospitals=4, seed=0)
        except ConfigError as error:
            print(f"skipped: {error}. {error.hint}")
        else:
            try:
                figures = measure(folder, example.tests, options.seeds)
            except FederationError as error:
                sys.exit(f"error: {error}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, tests: Mapping[str, Path], runs: int) -> dict[str, float]:
    """Run the study so many times and print what came out."""
    reports = []
    for number in range(1, runs + 1):
        report = run_demo(folder / f"run-{number}", "--study", STUDY)
        reports.append(report)
        print(
            f"run {number}: pooled accuracy {report['metrics']['accuracy']:.3f}, AUROC "
            f"{report['metrics']['auroc']:.3f}, epsilon {highest(report, 'epsilon'):.3f}, {report['seconds']:.0f} s",
            flush=True,
        )
    figures = summarise(reports, measure_centres(folder, tests, [report["model"] for report in reports]))
    print_summary(figures, reports)
    return figures


if __name__ == "__main__":
    main()
