"""Models measured on this hospital's own patients, with intervals, curves, groups and differences. Nothing leaves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.alone import LOCAL_BINS, NO_SECRET
from client.evaluate import counted_once, scores_of
from client.paired import Difference, difference
from client.records.manifest import read_manifest
from client.records.population import Source
from client.records.records import Records
from client.records.tabular import read_table
from client.settings import Settings
from shared_models.durable import replace_file
from shared_models.errors import ConfigError
from shared_models.estimates import estimate_heads, leading_figures
from shared_models.evaluation import Evaluation, evaluate_task
from shared_models.intervals import LEVEL, Estimate
from shared_models.model_file import read_model
from shared_models.outcomes import compute_metrics, ranked_classes
from shared_models.pictures import Drawn, draw_evaluation, draw_groups, save
from shared_models.plan import StudyPlan, Subgroups
from shared_models.subgroups import group_of_each, groupings
from shared_models.tasks import TableInput, Task, task_of, with_groups

FORMAT = "konsil-evaluation/1"
EVERYBODY = "everybody"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on these patients.

    Attributes:
        file: The model's.
        metrics: The figures of the whole task, as ``outcomes.compute_metrics`` has them; every patient counts once.
        classes: By class, as ``evaluation.evaluate_task``.
        groups: The same within each group, by its name.
        estimates: Of everybody and then of each group, figures of heads that are no choice, as
            ``estimates.estimate_heads``.
    """

    file: Path
    metrics: Mapping[str, float]
    classes: Mapping[str, Evaluation]
    groups: Mapping[str, Mapping[str, Evaluation]]
    estimates: Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class Appraisal:
    """Several models on the same patients.

    Attributes:
        task: What they predict.
        part: Which patients, in words.
        patients: How many: a true count, for the hospital's own eyes.
        records: How many records they have.
        models: By a short name, in the order in which they were given.
        differences: By class and by name: the model's area under the ROC curve less the first model's.
        leading: Of each head that is no choice the figure by which groups are compared.
    """

    task: str
    part: str
    patients: int
    records: int
    models: Mapping[str, Measured]
    differences: Mapping[str, Mapping[str, Difference]]
    leading: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """For machines; every number that is shown anywhere is in it."""
        return {
            "format": FORMAT,
            "task": self.task,
            "part": self.part,
            "patients": self.patients,
            "records": self.records,
            "level": LEVEL,
            "models": {
                name: {
                    "file": str(found.file),
                    "metrics": dict(found.metrics),
                    "classes": {label: one.as_json() for label, one in found.classes.items()},
                    "groups": {
                        group: {label: one.as_json() for label, one in those.items()}
                        for group, those in found.groups.items()
                    },
                    "estimates": {
                        group: {name: one._asdict() for name, one in those.items()}
                        for group, those in found.estimates.items()
                    },
                }
                for name, found in self.models.items()
            },
            "differences": {
                label: {name: asdict(one) for name, one in those.items()} for label, those in self.differences.items()
            },
        }


def records_of_folder(task: Task, folder: Path) -> tuple[Records, str]:
    """What ``evaluate --records`` measures on: all that the manifest does not keep for validation."""
    records, _ = read_table(read_manifest(folder), task, split_key=NO_SECRET)
    return records, f"records in {folder}"


def own_validation(task: Task, settings: Settings) -> tuple[Records, str]:
    """This hospital's validation part, which no study trains on, less those who said no.

    Raises:
        ConfigError: The manifest keeps nobody for validation.
    """
    records = Source(task).current(settings).validation
    if not len(records):
        raise ConfigError(
            f"{settings.records} keeps no patient for validation",
            hint="Set validation_fraction in the manifest, or name a folder of test records with --records.",
        )
    return records, "validation part of this hospital"


def subgroups_of(file: Path) -> tuple[Subgroups, ...]:
    """How the plan of a model tells patients apart.

    Raises:
        ConfigError: The file is no model.
    """
    return _planned(read_model(file)[0])


def _planned(plan: StudyPlan) -> tuple[Subgroups, ...]:
    return plan.evaluation.subgroups if plan.evaluation else ()


def task_of_models(files: Sequence[Path], subgroups: Sequence[Subgroups]) -> Task:
    """The one task that all models are for.

    Args:
        files: Of the models.
        subgroups: How patients are told apart.

    Raises:
        ConfigError: A file is no model, two are for different tasks, or subgroups are none of the task's.
    """
    return _one_task([read_model(file)[0] for file in files], subgroups)


def _one_task(plans: Sequence[StudyPlan], subgroups: Sequence[Subgroups]) -> Task:
    tasks = [task_of(plan) for plan in plans]
    if len({task.name for task in tasks}) > 1:
        raise ConfigError(
            f"the models are for different tasks: {', '.join(sorted({task.name for task in tasks}))}",
            hint="Compare models of one task.",
        )
    return with_groups(tasks[0], subgroups)


def appraise(
    files: Sequence[Path],
    records: Records,
    *,
    part: str,
    specificity: float,
    subgroups: Sequence[Subgroups] | None = None,
) -> Appraisal:
    """Measure models on the same records.

    Args:
        files: Models of one task; differences are from the first.
        records: Of that task, read with the same subgroups.
        part: Which patients these are, in words.
        specificity: At which the sensitivity is reported.
        subgroups: How patients are told apart; None takes those of the first model's plan.

    Raises:
        ConfigError: A file is no model, a network's outputs are not finite, or subgroups are none of the task's.
    """
    plans, networks = zip(*map(read_model, files), strict=True)
    if subgroups is None:
        subgroups = _planned(plans[0])
    task, names = _one_task(plans, subgroups), _names(files)
    parts = _rows_of_groups(task, records, subgroups)
    scores = {name: scores_of(network, records, task) for name, network in zip(names, networks, strict=True)}
    models = {}
    for name, file in zip(names, files, strict=True):
        counts = {
            group: counted_once(scores[name], records, task, bins=LOCAL_BINS, rows=rows)
            for group, rows in parts.items()
        }
        found = {
            group: evaluate_task(task, total, bins=LOCAL_BINS, specificity=specificity)
            for group, total in counts.items()
        }
        models[name] = Measured(
            file=file,
            metrics=compute_metrics(task, counts[EVERYBODY], bins=LOCAL_BINS),
            classes=found.pop(EVERYBODY),
            groups=found,
            estimates={group: estimate_heads(task, total, bins=LOCAL_BINS) for group, total in counts.items()},
        )
    ranked = {name: ranked_classes(task, given, records.targets[:].numpy()) for name, given in scores.items()}
    first, *others = names
    differences = {
        label: {name: _difference(ranked[name][label], ranked[first][label], records) for name in others}
        for label in ranked[first]
    }
    return Appraisal(
        task=task.name,
        part=part,
        patients=records.patient_count,
        records=len(records),
        models=models,
        differences=differences if others else {},
        leading=leading_figures(task),
    )


def _names(files: Sequence[Path]) -> list[str]:
    """Short names that tell the files apart: the file's, or where two are alike the folder's too."""
    short = [file.stem for file in files]
    if len(set(short)) == len(short):
        return short
    longer = [f"{file.absolute().parent.name}/{file.stem}" for file in files]
    return longer if len(set(longer)) == len(longer) else [str(file) for file in files]


def _rows_of_groups(task: Task, records: Records, subgroups: Sequence[Subgroups]) -> dict[str, Any]:
    everybody = np.arange(len(records))
    if not subgroups:
        return {EVERYBODY: everybody}
    inputs = records.inputs[:].numpy() if isinstance(task.input, TableInput) else np.empty(0)
    place = group_of_each(task, subgroups, inputs, records.groups)
    return {EVERYBODY: everybody} | {
        f"{grouping.column}: {group}": np.flatnonzero(place[:, column] == number)
        for column, grouping in enumerate(groupings(task, subgroups))
        for number, group in enumerate(grouping.groups)
    }


def _difference(one: tuple[Any, Any, Any], first: tuple[Any, Any, Any], records: Records) -> Difference:
    (scores, labels, known), (others, _, _) = one, first
    _, patients = np.unique(records.patients[known], return_inverse=True)
    return difference(scores[known], others[known], labels[known], patients)


def write_report(folder: Path, found: Appraisal) -> list[Path]:
    """Write ``evaluation.json`` and the pictures, as SVG and PNG.

    Raises:
        ConfigError: The folder cannot be written.
    """
    lines = _lines(found)
    pictures = draw_evaluation(lines) if lines else {}
    for number, (name, one) in enumerate(found.models.items(), start=1):
        file = "groups" if len(found.models) == 1 else f"groups-{number}"
        pictures |= _forest(file, name, one)
        for figure in found.leading if one.groups else ():
            rows = [(group, those[figure]) for group, those in one.estimates.items()]
            pictures[f"{file}-{figure}"] = draw_groups(rows, figure=f"{figure} of {name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(
            folder / "evaluation.json", json.dumps(found.as_json(), indent=1, allow_nan=False).encode() + b"\n"
        )
        return [folder / "evaluation.json", *save(folder, pictures)]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}", hint="Choose another folder.") from None


def _lines(found: Appraisal) -> dict[str, Evaluation]:
    """A line for each model, and where a task tells more classes, for each of them."""
    return {
        name if len(one.classes) == 1 else f"{name}, {label}" if len(found.models) > 1 else label: evaluation
        for name, one in found.models.items()
        for label, evaluation in one.classes.items()
    }


def _forest(file: str, model: str, found: Measured) -> dict[str, Drawn]:
    rows = [
        (group if len(found.classes) == 1 else f"{group}, {label}", one.auroc)
        for group, those in ({EVERYBODY: found.classes} | dict(found.groups)).items()
        for label, one in those.items()
    ]
    return {file: draw_groups(rows, figure=f"AUROC of {model}")} if found.groups and found.classes else {}
