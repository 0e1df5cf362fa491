"""What the lines share: training without privacy, federated, pooled and at each hospital alone; private studies; means.

Without privacy the hospitals take plain SGD steps on shuffled batches, and their updates are averaged by the
coordinator's own averaging; pooled and alone, the same steps are taken on the same records in one place. With privacy a
study runs whole, as ``konsil-coordinator simulate`` runs it: enrolment, ledgers, masks, statements.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from client.alone import train_without_privacy
from client.evaluate import statistics
from client.records.records import Records
from server.demo import plan_text
from server.fedavg import server_step
from server.simulate import Options, run_simulation
from shared_models.config import Count, Frozen, Name, Positive, read_settings
from shared_models.errors import ConfigError
from shared_models.metrics import EXACT_BINS
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.outcomes import compute_metrics
from shared_models.plan import Augmentation, Averaging, ConstantRate, FedAvg, Network, Schedule, read_plan
from shared_models.tasks import Task, find_task
from shared_models.update import parameters_to_vector, vector_to_parameters

PLANS = Path(__file__).parents[1] / "plans"


class Plain(Frozen):
    """Training without privacy, as a file of ``bench/plans`` says it.

    Attributes:
        task: Name of an installed task.
        network: As in a study plan.
        rounds: Rounds to average.
        steps: SGD steps of a round, at each hospital.
        batch_size: Records of a step.
        learning_rate: Of the local steps; the largest of any round.
        schedule: How it falls from round to round.
        averaging: How the global parameters move.
        weight_cap: A hospital weighs min(1, records / cap); None is by its number of records.
        cohort: Hospitals of a round, drawn anew for each; None takes all.
        augmentation: How images and series are changed each time.
    """

    task: Name
    network: Network
    rounds: Count
    steps: Count
    batch_size: Count
    learning_rate: Positive
    schedule: Schedule = ConstantRate(name="constant")
    averaging: Averaging = FedAvg(name="fedavg")
    weight_cap: Count | None = None
    cohort: Count | None = None
    augmentation: Augmentation | None = None

    def rate(self, round_number: int) -> float:
        """Learning rate of a round, counted from 1."""
        return self.learning_rate * self.schedule.factor(round_number, self.rounds)

    def weight(self, records: Records) -> float:
        """Of a hospital in the average."""
        return float(len(records)) if self.weight_cap is None else min(1.0, len(records) / self.weight_cap)


def read_plain(name: str) -> Plain:
    """``bench/plans/NAME.toml``.

    Raises:
        ConfigError: A key is unknown, missing or out of range.
    """
    return read_settings(PLANS / f"{name}.toml", Plain, described_in="bench/lines/training.py")


def federate(plain: Plain, hospitals: Sequence[Records], *, seed: int) -> nn.Module:
    """Average the hospitals' local steps round by round, without clipping, noise or masks.

    Args:
        plain: Network, rounds, steps.
        hospitals: Training records of each.
        seed: Of the initial parameters, of the cohorts and of the order of records.

    Returns:
        The model after the last round.
    """
    task = find_task(plain.task)
    model = build_network(plain.network, task, seed=seed)
    parameters = parameters_to_vector(model)
    cohorts = np.random.default_rng(seed)
    averaging = server_step(plain.averaging, len(parameters))
    weights = [plain.weight(records) for records in hospitals]
    for number in range(1, plain.rounds + 1):
        total = np.zeros(len(parameters))
        cohort = min(plain.cohort or len(hospitals), len(hospitals))
        chosen = cohorts.choice(len(hospitals), cohort, replace=False)
        for place in sorted(chosen.tolist()):
            records, weight = hospitals[place], weights[place]
            vector_to_parameters(parameters, model)
            train_without_privacy(
                model,
                records,
                task,
                steps=plain.steps,
                learning_rate=plain.rate(number),
                batch_size=plain.batch_size,
                seed=_seed(seed, number, place),
                augmentation=plain.augmentation,
            )
            total += weight * (parameters_to_vector(model).astype(np.float64) - parameters)
        parameters = averaging.step(parameters, total, math.fsum(weights[place] for place in chosen))
    vector_to_parameters(parameters, model)
    return model


def train_in_one_place(plain: Plain, records: Records, *, seed: int, hospitals: int = 1) -> nn.Module:
    """Take the same steps on one set of records: a hospital alone, or all of them pooled.

    Args:
        plain: As for ``federate``; what the coordinator would remember between rounds is remembered here.
        records: All training records.
        seed: Of the initial parameters and of the order of records.
        hospitals: How many were pooled: a round has ``steps`` for each, so that the data is passed over as often as in
            the federation.
    """
    return federate(plain.model_copy(update={"steps": plain.steps * hospitals}), [records], seed=seed)


def _seed(seed: int, number: int, place: int) -> int:
    """A seed of its own for each run, round and hospital."""
    return int(np.random.SeedSequence([seed, number, place]).generate_state(1)[0])


def pool(hospitals: Sequence[Records]) -> Records:
    """All records in one place; patients stay apart."""
    first = np.cumsum([0, *(records.patient_count for records in hospitals)])
    return Records(
        inputs=torch.cat([records.inputs[:] for records in hospitals]),
        targets=torch.cat([records.targets[:] for records in hospitals]),
        patients=np.concatenate([r.patients + start for r, start in zip(hospitals, first[:-1], strict=True)]),
        patient_count=int(first[-1]),
    )


def single(inputs: NDArray[np.float32], targets: NDArray[np.float32] | NDArray[np.int64]) -> Records:
    """Records of patients who have one each."""
    count = len(inputs)
    return Records(torch.from_numpy(inputs), torch.from_numpy(targets), np.arange(count), count)


def measure_model(model: nn.Module, records: Records, task: Task) -> dict[str, float]:
    """The project's metrics of a model, by name; scores are exact to 1/2000, decisions exact."""
    return compute_metrics(task, statistics(model, records, task, bins=EXACT_BINS), bins=EXACT_BINS)


@dataclass(frozen=True)
class Study:
    """A private study that was run.

    Attributes:
        model: After the last round.
        epsilon: What it cost any patient at most, as the hospitals' statements report it.
        epsilon_filter: The same as the hospitals enforced it.
        delta: The delta that both hold at.
    """

    model: nn.Module
    epsilon: float
    epsilon_filter: float
    delta: float


def run_study(
    plan: Path,
    records: Path,
    folder: Path,
    *,
    seed: int,
    public_size: int | None = None,
    bases: tuple[Path, ...] = (),
) -> Study:
    """Run a study with ledgers, masks and noise over all hospitals of a folder, in this process.

    Args:
        plan: File of the study plan.
        records: Folder of the hospitals' folders.
        folder: Where the study's files go; must not exist. The plan that is run lies beside it.
        seed: Of the initial parameters, in place of the plan's; noise and sampling are fresh in any case.
        public_size: Of each hospital; None where ``example.json`` says it, as ``write_example`` leaves it.
        bases: Copies of pretrained bases that the plan starts from.

    Raises:
        FederationError: What stopped it.
    """
    seeded = folder.with_name(f"{folder.name}.toml")
    seeded.write_text(plan_text(read_plan(plan).model_copy(update={"seed": seed})), encoding="utf-8")
    options = Options(
        plan=seeded,
        folder=folder,
        records=records,
        hospitals=None,
        patients=0,
        public_size=public_size,
        seed=0,
        threads=1,
        json_file=None,
        bases=bases,
    )
    report = run_simulation(options, Console(file=io.StringIO()))
    hospitals = report["hospitals"].values()
    _, model = read_model(Path(report["model"]))
    return Study(
        model,
        epsilon=max(hospital["epsilon"] for hospital in hospitals),
        epsilon_filter=max(hospital["epsilon_filter"] for hospital in hospitals),
        delta=max(hospital["delta"] for hospital in hospitals),
    )


def mean_and_sd(name: str, values: Iterable[float]) -> dict[str, float]:
    """A figure's mean, and its sample standard deviation beside it.

    Raises:
        ConfigError: There are no values.
    """
    found = list(values)
    if not found:
        raise ConfigError(f"{name} has no values", hint="Run at least one seed.")
    return {name: mean(found), f"{name}_sd": stdev(found) if len(found) > 1 else 0.0}
