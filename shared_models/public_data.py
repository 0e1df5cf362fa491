"""Public data sets as hospitals would hold them: tables and manifests, and what their publishers' columns mean."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from shared_models.tasks import find_task

HEART_HOSPITALS = {  # FLamby's order of centres, and the name that each file has at UCI
    "cleveland": "cleveland",
    "hungary": "hungarian",
    "switzerland": "switzerland",
    "long-beach": "va",
}
HEART_COLUMNS = {  # schema name -> UCI's name, in the order of UCI's columns 0 to 9
    "age": "age",
    "sex": "sex",
    "chest_pain": "cp",
    "resting_blood_pressure": "trestbps",
    "cholesterol": "chol",
    "fasting_blood_sugar": "fbs",
    "resting_ecg": "restecg",
    "maximum_heart_rate": "thalach",
    "exercise_angina": "exang",
    "st_depression": "oldpeak",
}
HEART_CODES = {  # UCI's codes -> the task's categories
    "sex": {"0": "female", "1": "male"},
    "chest_pain": {"1": "typical-angina", "2": "atypical-angina", "3": "non-anginal-pain", "4": "asymptomatic"},
    "fasting_blood_sugar": {"0": "normal", "1": "above-120-mg-dl"},
    "resting_ecg": {"0": "normal", "1": "st-t-abnormality", "2": "left-ventricular-hypertrophy"},
    "exercise_angina": {"0": "no", "1": "yes"},
    "disease": {"0": "absent", "1": "present", "2": "present", "3": "present", "4": "present"},
}


@dataclass(frozen=True)
class Table:
    """Rows as they stand in a file: texts, in the order of ``header``; ``labels`` index the task's classes."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> "Table":
        """The rows at ``indices``, in that order."""
        return Table(self.header, tuple(self.rows[i] for i in indices), self.labels[indices])


def declared_size(patients: int) -> int:
    """What a steward declares as public size: patients to the nearest ten, halves up, at least 10.

    Rounding keeps the exact number, which depends on each single patient, out of everything that leaves.
    """
    return max(10, (patients + 5) // 10 * 10)


def breast_cancer_table() -> Table:
    """scikit-learn's set, with made-up patient numbers; malignant is class 1, the positive one."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  # scikit-learn takes a second to import

    data: Any = load_breast_cancer()
    names = tuple(str(name).replace(" ", "_") for name in data.feature_names)
    labels = (data.target == list(data.target_names).index("malignant")).astype(np.int64)
    rows = tuple(
        (f"patient-{i + 1:03d}", *(f"{value:g}" for value in values), ("benign", "malignant")[label])
        for i, (values, label) in enumerate(zip(data.data, labels, strict=True))
    )
    return Table(("patient", *names, "diagnosis"), rows, labels)


def every_fourth(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, test): every fourth patient of each class, in the published order, is for testing.

    A fixed rule without a seed. It was settled after other fixed cuts had been looked at: DECISIONS.md, 14.
    """
    test = np.sort(np.concatenate([np.flatnonzero(labels == label)[3::4] for label in np.unique(labels)]))
    return np.setdiff1d(np.arange(len(labels)), test), test


def write_table_folder(
    folder: Path, table: Table, manifest: Mapping[str, Any], *, usable: NDArray[np.bool_] | None = None
) -> None:
    """Write ``data.csv`` and the manifest that explains it.

    Args:
        folder: Made if missing.
        table: Its rows, with their labels.
        manifest: The task and what is not the same for all tables.
        usable: Which rows have all their values; all of them unless told otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.header)
        writer.writerows(table.rows)
    fields = {"file": "data.csv", "validation_fraction": 0.0, **manifest}
    seen, choice = table.labels if usable is None else table.labels[usable], find_task(manifest["task"]).choice
    absent = [name for label, name in enumerate(choice.classes) if label not in seen] if choice else []
    if absent:  # a class that a hospital never sees must be declared, else it would be an error
        fields["absent_classes"] = absent
    write_manifest(folder / "manifest.toml", fields)


def write_manifest(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a manifest as a person would."""
    path.write_text(tomli_w.dumps(fields), encoding="utf-8")
