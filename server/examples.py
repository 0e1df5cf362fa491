"""Data of the two example studies, laid out as hospitals would have it: a table and a manifest per folder.

``breast-cancer`` is one real data set (UCI Wisconsin diagnostic, inside scikit-learn) cut into hospitals that never
existed: unequal and label-skewed, an *artificial* split. ``heart-disease`` is four real hospitals (UCI, CC BY 4.0) read
from the folder that ``KONSIL_DATA`` names, cut into training and test parts as FLamby does.

The test part belongs to no hospital: it is never trained on, and measuring on it spends nobody's budget. Which rows it
has is fixed by a rule, not by a seed.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_models.config import Frozen
from shared_models.errors import ConfigError
from shared_models.plan import StudyPlan, read_plan
from shared_models.public_data import (
    HEART_CODES,
    HEART_COLUMNS,
    HEART_HOSPITALS,
    Table,
    breast_cancer_table,
    declared_size,
    every_fourth,
    write_table_folder,
)

PLANS = Path(__file__).parent / "plans"
MAXIMUM_HOSPITALS = 20
HEART_TRAIN_FRACTION, HEART_SPLIT_SEED = 0.66, 43  # FLamby's fed_heart_disease


class ExampleHospital(Frozen):
    """One hospital's folder, and the size that its steward would declare."""

    name: str
    folder: Path
    public_size: int


class Example(Frozen):
    """An example study on disk; ``example.json`` in its folder says the same.

    Attributes:
        plan: The study's plan, as in ``server/plans``, fitted to the number of hospitals.
        hospitals: In the order of their names' numbers or of UCI's centres.
        pooled: Folder with all hospitals' training rows, for the baseline that pools data without privacy.
        test: Folder with the test rows, which belong to no hospital.
        tests: The test rows of each centre alone, by hospital; only where the centres are real.
        split: One sentence for people: where the data comes from, and whether the split is real.
    """

    plan: StudyPlan
    hospitals: tuple[ExampleHospital, ...]
    pooled: Path
    test: Path
    split: str
    tests: Mapping[str, Path] = {}


def write_example(study: str, root: Path, *, hospitals: int, seed: int) -> Example:
    """Write one folder per hospital, a pooled one and a test one below ``root``.

    Args:
        study: ``breast-cancer`` or ``heart-disease``.
        root: Folder to write into; made if missing.
        hospitals: 2 to 20 for ``breast-cancer``, 4 for ``heart-disease``.
        seed: Of the artificial hospitals; what is for testing never depends on it.

    Raises:
        ConfigError: No such study, a number of hospitals that it cannot have, or its data is absent.
    """
    check_study(study)
    example = _WRITERS[study](root, hospitals, seed)
    (root / "example.json").write_text(example.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return example


def read_example(root: Path) -> Example:
    """What ``write_example`` wrote there, perhaps in another process."""
    return Example.model_validate_json((root / "example.json").read_text(encoding="utf-8"))


def check_study(study: str) -> None:
    """Refuse a study that there is no example of.

    Raises:
        ConfigError: With the ones there are.
    """
    if study not in _WRITERS:
        raise ConfigError(f"there is no example study {study!r}", hint=f"Choose one of {', '.join(sorted(_WRITERS))}.")


def example_plan(study: str, hospitals: int) -> StudyPlan:
    """The installed plan of an example study; it never demands more hospitals than there are."""
    plan = read_plan(PLANS / f"{study}.toml")
    return plan.model_copy(update={"minimum_hospitals": min(plan.minimum_hospitals, hospitals)})


# breast-cancer: one real data set, artificial hospitals


def _write_breast_cancer(root: Path, hospitals: int, seed: int) -> Example:
    if not 2 <= hospitals <= MAXIMUM_HOSPITALS:
        raise ConfigError(
            f"the breast-cancer example has 2 to {MAXIMUM_HOSPITALS} hospitals, not {hospitals}",
            hint=f"Pass --hospitals with a number from 2 to {MAXIMUM_HOSPITALS}.",
        )
    table = breast_cancer_table()
    training, test = every_fourth(table.labels)
    parts = [training[p] for p in _skewed_parts(table.labels[training], hospitals, np.random.default_rng(seed))]
    manifest = {
        "task": "breast-cancer",
        "label": "diagnosis",
        "patient": "patient",
        "columns": {name: name for name in table.header[1:-1]},
    }
    names = [f"hospital-{k + 1}" for k in range(hospitals)]
    folders = {name: table.take(part) for name, part in zip(names, parts, strict=True)}
    folders |= {"pooled": table.take(training), "test": table.take(test)}
    for name, rows in folders.items():
        write_table_folder(root / name, rows, manifest)
    return Example(
        plan=example_plan("breast-cancer", hospitals),
        hospitals=tuple(
            ExampleHospital(name=n, folder=root / n, public_size=declared_size(len(p)))
            for n, p in zip(names, parts, strict=True)
        ),
        pooled=root / "pooled",
        test=root / "test",
        split=(
            f"UCI breast cancer Wisconsin (diagnostic), 569 real patients, cut into {hospitals} unequal, label-skewed "
            "hospitals: an artificial split"
        ),
    )


def _skewed_parts(labels: NDArray[np.int64], hospitals: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Share the rows out among unequal hospitals that see the two classes in different proportions.

    The largest hospital is three times the smallest. The odds of the positive class fall from three times the average
    to a third of it, in an order of hospitals that has nothing to do with their sizes.
    """
    sizes = np.linspace(3.0, 1.0, hospitals)
    odds = rng.permutation(np.geomspace(3.0, 1 / 3, hospitals))
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(hospitals)]
    for label in (0, 1):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = sizes * (np.sqrt(odds) if label else 1 / np.sqrt(odds))
        cuts = np.round(np.cumsum(shares / shares.sum()) * len(rows)).astype(np.int64)[:-1]
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


# heart-disease: four real hospitals


def _write_heart_disease(root: Path, hospitals: int, _seed: int) -> Example:
    if hospitals != len(HEART_HOSPITALS):
        raise ConfigError(
            f"the heart-disease example has four real hospitals, not {hospitals}",
            hint="Leave --hospitals out, or pass --hospitals 4.",
        )
    folder = _heart_disease_folder()
    cuts = {name: _heart_disease_cut(folder / f"processed.{file}.data") for name, file in HEART_HOSPITALS.items()}
    manifest = {
        "task": "heart-disease",
        "label": "num",
        "one_row_per_patient": True,
        "columns": HEART_COLUMNS,
        "categories": HEART_CODES,
    }
    folders = {name: training for name, (training, _) in cuts.items()}
    folders |= {f"test-{name}": test for name, (_, test) in cuts.items()}
    folders["pooled"] = _stack([training for training, _ in cuts.values()])
    folders["test"] = _stack([test for _, test in cuts.values()])
    for name, rows in folders.items():
        write_table_folder(root / name, rows, manifest)
    return Example(
        plan=example_plan("heart-disease", hospitals),
        hospitals=tuple(
            ExampleHospital(name=n, folder=root / n, public_size=declared_size(len(t.rows)))
            for n, (t, _) in cuts.items()
        ),
        pooled=root / "pooled",
        test=root / "test",
        split="UCI heart disease, 740 real patients at four real hospitals; FLamby's training and test parts",
        tests={name: root / f"test-{name}" for name in cuts},
    )


def _heart_disease_folder() -> Path:
    """Where UCI's four files lie.

    Raises:
        ConfigError: At least one of them is not there.
    """
    data = Path(os.environ.get("KONSIL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    folder = data / "heart_disease"
    missing = [f for f in HEART_HOSPITALS.values() if not (folder / f"processed.{f}.data").is_file()]
    if missing:
        raise ConfigError(
            f"the heart-disease data is not in {folder}: {', '.join(f'processed.{f}.data' for f in missing)} missing",
            hint="Set KONSIL_DATA to a folder whose heart_disease/ has the four processed files of UCI's archive.",
        )
    return folder


def _heart_disease_cut(path: Path) -> tuple[Table, Table]:
    """One centre's (training, test) rows: columns 10 to 12 and rows with missing values dropped, then cut 66 to 34.

    Source:
        FLamby, ``fed_heart_disease/dataset.py``: stratified only where each class has more than two patients.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  # scikit-learn takes a second to import

    with path.open(encoding="utf-8", newline="") as file:
        lines = [[*line[:10], line[13]] for line in csv.reader(file) if line]
    rows = tuple(tuple(f"{float(value):g}" for value in line) for line in lines if "?" not in line)
    table = Table((*HEART_COLUMNS.values(), "num"), rows, np.array([row[-1] != "0" for row in rows], dtype=np.int64))
    both = np.bincount(table.labels, minlength=2).min() > 2
    training, test = train_test_split(
        np.arange(len(rows)),
        train_size=HEART_TRAIN_FRACTION,
        test_size=1.0 - HEART_TRAIN_FRACTION,
        random_state=HEART_SPLIT_SEED,
        shuffle=True,
        stratify=table.labels if both else None,
    )
    return table.take(training), table.take(test)


def _stack(tables: Sequence[Table]) -> Table:
    """All rows of tables with one header, in order."""
    rows = tuple(row for table in tables for row in table.rows)
    return Table(tables[0].header, rows, np.concatenate([table.labels for table in tables]))


_WRITERS: Mapping[str, Callable[[Path, int, int], Example]] = {
    "breast-cancer": _write_breast_cancer,
    "heart-disease": _write_heart_disease,
}
