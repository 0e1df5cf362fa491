"""Death in hospital, from 48 hours in intensive care: the PhysioNet/CinC Challenge 2012, one hospital per kind of unit.

The four hospitals are the challenge's four kinds of intensive care unit: coronary care, cardiac surgery recovery,
medical, surgical. Their case mixes differ: of the patients after cardiac surgery 5 % die, of the medical ones
19 %. Set a (4000 stays, one per patient) is trained on; set b (4000 others) is the test part, and nobody's.

The records lie in folders as a hospital would have them (a row per stay, measurements in long form) and are read by the
hospital's own reader. What is outside the task's public range (a pH of 735) is taken for missing.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import tomli_w
from numpy.typing import NDArray
from torch import nn

from client.alone import NO_SECRET
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from lines.training import (
    PLANS,
    Plain,
    federate,
    mean_and_sd,
    measure_model,
    pool,
    read_plain,
    run_study,
    train_in_one_place,
)
from server.examples import Example, ExampleHospital
from shared_models.errors import ConfigError
from shared_models.plan import read_plan
from shared_models.public_data import declared_size
from shared_models.tasks import find_task

FILE = Path("physionet2012") / "physionet2012_hourly.npz"
PRIVATE = PLANS / "physionet-eps8.toml"
UNITS = MappingProxyType({1: "coronary", 2: "cardiac-surgery", 3: "medical", 4: "surgical"})  # the file's ICUType
VARIABLES = MappingProxyType(
    {  # the challenge's name -> the task's
        "Albumin": "albumin",
        "ALP": "alkaline_phosphatase",
        "ALT": "alanine_transaminase",
        "AST": "aspartate_transaminase",
        "Bilirubin": "bilirubin",
        "BUN": "blood_urea_nitrogen",
        "Cholesterol": "cholesterol",
        "Creatinine": "creatinine",
        "DiasABP": "diastolic_pressure_invasive",
        "FiO2": "inspired_oxygen",
        "GCS": "glasgow_coma_score",
        "Glucose": "glucose",
        "HCO3": "bicarbonate",
        "HCT": "haematocrit",
        "HR": "heart_rate",
        "K": "potassium",
        "Lactate": "lactate",
        "MAP": "mean_pressure_invasive",
        "MechVent": "mechanical_ventilation",
        "Mg": "magnesium",
        "NIDiasABP": "diastolic_pressure",
        "NIMAP": "mean_pressure",
        "NISysABP": "systolic_pressure",
        "Na": "sodium",
        "PaCO2": "carbon_dioxide_pressure",
        "PaO2": "oxygen_pressure",
        "Platelets": "platelets",
        "RespRate": "respiration_rate",
        "SaO2": "oxygen_saturation",
        "SysABP": "systolic_pressure_invasive",
        "Temp": "temperature",
        "TroponinI": "troponin_i",
        "TroponinT": "troponin_t",
        "Urine": "urine",
        "WBC": "white_cells",
        "Weight": "weight",
        "pH": "ph",
        "Age": "age",
    }
)
STATIC, OUTCOME = ("Age", "Gender", "Height", "Weight", "ICUType"), "In-hospital_death"


def measure(data: Path, seeds: int) -> dict[str, float]:
    """Train on set a, and measure on set b once per seed.

    Args:
        data: Folder of the data sets.
        seeds: Runs; each has initial parameters, an order of records and noise of its own.

    Returns:
        The line's figures, with ``_sd`` beside each that varies.

    Raises:
        ConfigError: The data is not there.
    """
    with tempfile.TemporaryDirectory(prefix="konsil-physionet-") as folder:
        root = Path(folder)
        example = write_hospitals(data / FILE, root / "records")
        return run(
            example,
            root,
            seeds,
            lstm=read_plain("physionet"),
            pooled=read_plain("physionet-pooled"),
            transformer=read_plain("physionet-transformer"),
            private=PRIVATE,
        )


def run(
    example: Example, folder: Path, seeds: int, *, lstm: Plain, pooled: Plain, transformer: Plain, private: Path
) -> dict[str, float]:
    """Everything that is measured, of hospitals whose records are on the disk.

    Args:
        example: Their folders.
        folder: Where the private studies' files go.
        seeds: Runs.
        lstm: Training of the LSTM without privacy, federated.
        pooled: The same in one place: of all records, and of each hospital's alone.
        transformer: The same of the Transformer.
        private: File of the private study's plan.
    """
    hospitals = {hospital.name: _read(hospital.folder) for hospital in example.hospitals}
    tests = {name: _read(place) for name, place in example.tests.items()}
    everybody, trained = pool(list(tests.values())), list(hospitals.values())
    together, task = pool(trained), find_task(lstm.task)
    found: dict[str, list[float]] = {}

    def keep(name: str, model: nn.Module, records: Records, *metrics: str) -> None:
        figures = measure_model(model, records, task)
        for metric in metrics:
            found.setdefault(f"physionet_{metric}{name}", []).append(figures[metric])

    studies = []
    for seed in range(seeds):
        federated = federate(lstm, trained, seed=seed)
        keep("", federated, everybody, "auroc", "auprc")
        all_records = train_in_one_place(pooled, together, seed=seed, hospitals=len(trained))
        keep("_pooled", all_records, everybody, "auroc", "auprc")
        for name, records in hospitals.items():
            alone, place = train_in_one_place(pooled, records, seed=seed), name.replace("-", "_")
            keep(f"_alone_{place}", alone, everybody, "auroc")
            keep(f"_alone_{place}_own", alone, tests[name], "auroc")
            keep(f"_{place}_own", federated, tests[name], "auroc")
        keep("_transformer", federate(transformer, trained, seed=seed), everybody, "auroc", "auprc")
        study = run_study(private, example.pooled, folder / f"study-{seed}", seed=seed)
        keep("_eps8", study.model, everybody, "auroc", "auprc")
        studies.append(study)
        latest = ", ".join(f"{name.removeprefix('physionet_')} {values[-1]:.4f}" for name, values in found.items())
        print(f"physionet, seed {seed}: {latest}", flush=True)
    figures: dict[str, float] = {}
    for name, values in found.items():
        figures |= mean_and_sd(name, values)
    return figures | {
        "physionet_epsilon": max(study.epsilon for study in studies),
        "physionet_epsilon_filter": max(study.epsilon_filter for study in studies),
        "physionet_delta": max(study.delta for study in studies),
    }


def _read(folder: Path) -> Records:
    """All records of a folder, by the hospital's reader."""
    manifest = read_manifest(folder)
    records, _ = read_table(manifest, find_task(manifest.task), split_key=NO_SECRET)
    return records


# the hospitals' folders


def write_hospitals(file: Path, root: Path, *, most: int | None = None) -> Example:
    """Write a folder for each kind of unit, with the stays of set a, and one with its stays of set b.

    Args:
        file: The challenge's two sets in one archive: sparse hourly values, descriptors, outcomes.
        root: Folder to write into; made if missing.
        most: Stays of each folder at most, the first ones; None for all.

    Returns:
        The hospitals; ``pooled`` is the folder that holds their folders and ``example.json``.

    Raises:
        ConfigError: The file is not there, or another one.
    """
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", hint="Set KONSIL_DATA to a folder with physionet2012 in it.")
    hospitals, tests = [], {}
    with np.load(file, allow_pickle=False) as archive:
        if set(VARIABLES) - {*archive["vars"], *archive["static"]} or tuple(archive["static"]) != STATIC:
            raise ConfigError(f"{file} has other variables than the challenge", hint="Get the file anew.")
        for letter, place in (("a", root / "hospitals"), ("b", root / "tests")):
            for name, stays, measurements in _cut(archive, letter, most):
                _write(place / name, stays, measurements)
                if letter == "a":
                    size = declared_size(len(stays))
                    hospitals.append(ExampleHospital(name=name, folder=place / name, public_size=size))
                else:
                    tests[name] = place / name
    example = Example(
        plan=read_plan(PRIVATE),
        hospitals=tuple(hospitals),
        pooled=root / "hospitals",
        test=root / "tests",
        split="PhysioNet/CinC Challenge 2012: set a by kind of intensive care unit; set b for testing",
        tests=tests,
    )
    (example.pooled / "example.json").write_text(example.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return example


def _cut(
    archive: Mapping[str, NDArray[Any]], letter: str, most: int | None
) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Each unit's stays and their measurements, of one set."""
    static, stays = archive[f"{letter}_static"], archive[f"{letter}_id"]
    died = archive[f"{letter}_outcome"][:, list(archive["outcome"]).index(OUTCOME)]
    _, steps, variables = archive[f"{letter}_shape"].tolist()
    cells = np.cumsum(archive[f"{letter}_idx"].astype(np.int64))
    row, hour, variable = cells // (steps * variables), cells // variables % steps, cells % variables
    names = np.array([VARIABLES[name] for name in archive["vars"].tolist()], dtype=object)
    values = archive[f"{letter}_val"].astype(np.float64)
    for unit, name in UNITS.items():
        rows = np.flatnonzero(static[:, STATIC.index("ICUType")] == unit)[:most]
        here = np.isin(row, rows)
        measured = {"stay": stays[row[here]], "hour": hour[here], "variable": names[variable[here]]}
        aged = {"stay": stays[rows], "hour": 0, "variable": VARIABLES["Age"]}
        long = [pd.DataFrame(measured | {"value": values[here]})]
        long.append(pd.DataFrame(aged | {"value": static[rows, STATIC.index("Age")].astype(np.float64)}))
        outcomes = np.array(["survived", "died"], dtype=object)[died[rows]]
        yield name, pd.DataFrame({"stay": stays[rows], "outcome": outcomes}), pd.concat(long)


def _write(folder: Path, stays: pd.DataFrame, measurements: pd.DataFrame) -> None:
    """A hospital's folder: stays, measurements in long form, and the manifest that explains them."""
    folder.mkdir(parents=True)
    stays.to_csv(folder / "stays.csv", index=False)
    measurements.to_parquet(folder / "measurements.parquet", index=False)
    measured: Sequence[str] = measurements["variable"].unique().tolist()
    outcomes = stays["outcome"].unique().tolist()
    fields: dict[str, Any] = {
        "task": "icu-mortality",
        "file": "stays.csv",
        "label": "outcome",
        "patient": "stay",  # the challenge has one stay of each patient
        "one_row_per_patient": True,
        "validation_fraction": 0.0,
        "out_of_range": "leave-out",
        "incomplete_rows": "leave-out",
        "absent_classes": [label for label in ("survived", "died") if label not in outcomes],
        "series": {
            "file": "measurements.parquet",
            "record": "stay",
            "time": "hour",
            "variable": "variable",
            "value": "value",
            "absent_variables": [name for name in VARIABLES.values() if name not in measured],
        },
    }
    (folder / "manifest.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
