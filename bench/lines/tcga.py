"""Breast cancer in TCGA: survival over six regions, FLamby's training and test parts, beside its published c-indices.

FLamby trains Cox's partial likelihood within batches, which no clip per patient bounds. Here hazards of one-year
intervals are trained, whose likelihood is a sum over patients, with one linear score as in Cox's model. Every step
takes all patients of a region and starts are at zero, so runs differ in nothing and the spread is zero.
"""

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import tomli_w
import torch
from lifelines.utils import concordance_index
from torch import nn

from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from lines.training import Plain, federate, mean_and_sd, pool, read_plain, train_in_one_place
from shared_models.errors import ConfigError
from shared_models.nets.losses import scores
from shared_models.tasks import BREAST_CANCER_SURVIVAL, TableInput

REGIONS = 6


def measure(data: Path, seeds: int) -> dict[str, float]:
    """Harrell's c-index on the pooled test part, of every way to train.

    Raises:
        ConfigError: The data is not there.
    """
    table = read_tables(data / "tcga_brca")
    with TemporaryDirectory(prefix="konsil-bench-") as scratch:
        regions = [
            read_region(table[table["fold2"] == f"train_{number}"], Path(scratch) / f"region-{number}")
            for number in range(REGIONS)
        ]
        held_out = table[table["fold"] == "test"]
        test = read_region(held_out, Path(scratch) / "test")
    return _figures(read_plain("tcga"), regions, test, held_out, seeds)


def read_tables(folder: Path) -> pd.DataFrame:
    """Patients with their parts, as FLamby ships them; ``fold`` is the part, ``fold2`` the part and its region.

    Raises:
        ConfigError: A file is missing.
    """
    for name in ("brca.csv", "train_test_split.csv"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"there is no file {folder / name}", hint="Set KONSIL_DATA to the folder of the data sets."
            )
    return pd.read_csv(folder / "brca.csv").merge(pd.read_csv(folder / "train_test_split.csv"), on="pid")


def read_region(rows: pd.DataFrame, folder: Path) -> Records:
    """A hospital's folder, read as the daemon reads it: public ranges, times as intervals."""
    assert isinstance(BREAST_CANCER_SURVIVAL.input, TableInput)
    folder.mkdir()
    rows.drop(columns=["fold", "fold2"]).to_csv(folder / "data.csv", index=False, quoting=csv.QUOTE_MINIMAL)
    indicators = [name for name in rows.columns if name not in {"pid", "age_at_index", "E", "T", "fold", "fold2"}]
    names = [column.name for column in BREAST_CANCER_SURVIVAL.input.columns][1:]
    manifest = {
        "task": BREAST_CANCER_SURVIVAL.name,
        "file": "data.csv",
        "patient": "pid",
        "one_row_per_patient": True,
        "validation_fraction": 0.0,
        "columns": {"age": "age_at_index", "days": "T", "died": "E"} | dict(zip(names, indicators, strict=True)),
        "categories": {name: {"0": "no", "1": "yes"} for name in names} | {"died": {"0.0": "no", "1.0": "yes"}},
    }
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    return read_table(read_manifest(folder), BREAST_CANCER_SURVIVAL, split_key=bytes(32))[0]


@torch.no_grad()
def c_index(model: nn.Module, records: Records, rows: pd.DataFrame) -> float:
    """Harrell's concordance index on days, not on intervals; the risk is the mean of the chances to have died."""
    risk = scores(BREAST_CANCER_SURVIVAL, model(records.inputs)).mean(dim=1)
    order = np.argsort(records.patients)  # patients were numbered as they came: one row each
    return float(concordance_index(rows["T"], -risk.numpy()[order], rows["E"]))


def _figures(
    plain: Plain, regions: list[Records], test: Records, held_out: pd.DataFrame, seeds: int
) -> dict[str, float]:
    found: dict[str, list[float]] = {"tcga_cindex": [], "tcga_cindex_pooled": []}
    found |= {f"tcga_cindex_alone_{number}": [] for number in range(REGIONS)}
    for seed in range(seeds):
        models = {"tcga_cindex": federate(plain, regions, seed=seed)}
        models["tcga_cindex_pooled"] = train_in_one_place(plain, pool(regions), seed=seed)
        for number, records in enumerate(regions):
            models[f"tcga_cindex_alone_{number}"] = train_in_one_place(plain, records, seed=seed)
        for name, model in models.items():
            found[name].append(c_index(model, test, held_out))
    return {key: value for name, values in found.items() for key, value in mean_and_sd(name, values).items()}
