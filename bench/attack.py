"""What a one-run audit of a hospital's trainer costs, beside the training of the study that it audits.

Both run here, in turns: all rounds of a study at one hospital, on made-up records of its task, and the whole of
``konsil-hospital conformance`` for the same plan, with its canaries, tests and bounds. Nothing travels and no ledger is
written: a study as it is run takes longer.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from client.conformance import conform
from client.dp_sgd import train
from client.randomness import SecureRandom
from client.records.manifest import read_manifest
from client.records.tabular import read_table
from server.made_up import write_made_up
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan, parse_plan, read_plan
from shared_models.privacy.mechanisms import training_mechanism
from shared_models.tasks import find_task

TARGET = 4.0
PLANS = Path(__file__).parents[1] / "server" / "plans"
PATIENTS = {"breast-cancer": 140, "heart-disease": 200, "trial-images": 500}
_IMAGES = {
    "format": 1,
    "study": "trial-images",
    "purpose": "To measure what an audit costs beside training.",
    "task": "trial-images",
    "data_licence": "made up",
    "rounds": 10,
    "minimum_hospitals": 3,
    "deadline_s": 60.0,
    "weight_cap": 1000,
    "network": {"name": "cnn"},
    "training": {"learning_rate": 0.5, "steps": 8},
    "privacy": {"clip": 1.0, "noise_multiplier": 4.0, "sample_rate": 0.1, "epsilon": 4.0, "delta": 1e-5},
}


def training(plan: StudyPlan, folder: Path) -> Callable[[], None]:
    """All rounds of a study at one hospital; its records are made and read beforehand."""
    task, patients = find_task(plan.task), PATIENTS[plan.study]
    (hospital,) = write_made_up(task, folder / plan.study, hospitals=1, patients=patients, seed=0)
    records, _ = read_table(read_manifest(hospital.folder), task, split_key=bytes(32))
    expected_batch = training_mechanism(plan, patients).expected_batch

    def run() -> None:
        model = build_network(plan.network, task, seed=plan.seed)
        for number in range(1, plan.rounds + 1):
            train(
                model,
                records,
                task,
                training=plan.training_in(number),
                privacy=plan.privacy,
                expected_batch=expected_batch,
                random=SecureRandom.from_system(),
            )

    return run


def seconds(what: Callable[[], object]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def measure(plan: StudyPlan, folder: Path, runs: int) -> tuple[float, float]:
    """Median seconds of training and of the audit, taken in turns after a run of each that is not counted."""
    study = training(plan, folder)

    def audit() -> None:
        if not conform(plan, PATIENTS[plan.study]).holds:
            raise SystemExit("error: the trainer does not conform; what it costs means nothing")

    pairs = [(seconds(study), seconds(audit)) for _ in range(runs + 1)][1:]
    return median(trained for trained, _ in pairs), median(audited for _, audited in pairs)


def main() -> None:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="how often each (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    torch.set_num_threads(1)
    plans = [*(read_plan(PLANS / f"{name}.toml") for name in ("breast-cancer", "heart-disease")), parse_plan(_IMAGES)]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="konsil-bench-") as folder:
        for plan in plans:
            trained, audited = measure(plan, Path(folder), options.runs)
            print(
                f"{plan.study:14} training {trained:6.2f} s, audit {audited:6.2f} s, ratio {audited / trained:5.2f}",
                flush=True,
            )
            name = plan.study.replace("-", "_")
            figures |= {f"training_s_{name}": trained, f"attack_s_{name}": audited}
            figures[f"attack_over_training_{name}"] = audited / trained
    worst = max(ratio for name, ratio in figures.items() if name.startswith("attack_over"))
    figures["attack_over_training"] = worst
    met = "met" if worst <= TARGET else "MISSED"
    print(f"attack_over_training, highest {worst:.2f}   target <= {TARGET:g}: {met}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
