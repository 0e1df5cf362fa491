"""NHS emergency departments: next month's attendances, learnt by 130 trusts together. No patient data, so no privacy.

A row is a month of a trust: attendances a day in the twelve months before, over their mean, and in the month itself.
So a small department and a large one have one model, and the length of a month is no news. The first 24 months are
for training, each of the last 12 is forecast from the 12 before.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import tomli_w
import torch
from numpy.typing import NDArray
from torch import nn

from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from lines.training import Plain, federate, mean_and_sd, pool, read_plain, train_in_one_place
from shared_models.errors import ConfigError
from shared_models.tasks import ATTENDANCES, Quantity, TableInput

LAGS, TRAINING_MONTHS = 12, 24
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trusts:
    """Attendances by trust and month.

    Attributes:
        attendances: At major departments (type 1), shape ``(trusts, months)``.
        daily: The same a day.
    """

    attendances: Floats
    daily: Floats

    def level(self, month: int) -> Floats:
        """Mean attendances a day in the twelve months before, of each trust."""
        means: Floats = self.daily[:, month - LAGS : month].mean(axis=1)
        return means

    def rows(self, trust: int, months: range) -> pd.DataFrame:
        """A trust's rows, as its manifest describes them."""
        found = []
        for month in months:
            history = self.daily[trust, month - LAGS : month + 1] / self.level(month)[trust]
            ago = {f"months_ago_{number}": history[LAGS - number] for number in range(1, LAGS + 1)}
            found.append({"month": month, **ago, "next_month": history[LAGS]})
        return pd.DataFrame(found)


def measure(data: Path, seeds: int) -> dict[str, float]:
    """WAPE over all trusts and the last 12 months, of every way to train and of two rules that learn nothing.

    Raises:
        ConfigError: The data is not there.
    """
    trusts = read_trusts(data / "nhs_ae" / "ae_attendances.csv")
    months = trusts.attendances.shape[1]
    with TemporaryDirectory(prefix="konsil-bench-") as scratch:
        hospitals = [
            read_trust(trusts.rows(trust, range(LAGS, TRAINING_MONTHS)), Path(scratch) / f"trust-{trust}")
            for trust in range(len(trusts.attendances))
        ]
    return _figures(read_plain("nhs"), trusts, hospitals, range(TRAINING_MONTHS, months), seeds)


def read_trusts(file: Path) -> Trusts:
    """Trusts with type 1 attendances in each of the 36 months.

    Raises:
        ConfigError: The file is missing.
    """
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", hint="Set KONSIL_DATA to the folder of the data sets.")
    table = pd.read_csv(file, dtype={"type": str}, parse_dates=["period"])
    months = table[table["type"] == "1"].groupby(["org_code", "period"])["attendances"].sum().unstack().dropna()
    attendances = months.to_numpy(dtype=np.float64)
    return Trusts(attendances, attendances / pd.DatetimeIndex(months.columns).days_in_month.to_numpy())


def read_trust(rows: pd.DataFrame, folder: Path) -> Records:
    """A trust's folder, read as the daemon reads it."""
    folder.mkdir()
    rows.to_csv(folder / "data.csv", index=False)
    manifest = {
        "task": ATTENDANCES.name,
        "file": "data.csv",
        "patient": "month",
        "one_row_per_patient": True,
        "validation_fraction": 0.0,
    }
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    return read_table(read_manifest(folder), ATTENDANCES, split_key=bytes(32))[0]


@torch.no_grad()
def forecasts(model: nn.Module, trusts: Trusts, months: range) -> Floats:
    """Attendances of each trust in each month, shape ``(trusts, months)``."""
    head = ATTENDANCES.heads[0]
    assert isinstance(ATTENDANCES.input, TableInput)
    assert isinstance(head, Quantity)
    found = []
    for month in months:
        level = trusts.level(month)
        history = trusts.daily[:, month - LAGS : month][:, ::-1] / level[:, None]
        inputs = np.stack([head.measure.scaled(column) for column in history.T], axis=1)
        answer = model(torch.from_numpy(inputs).float()).squeeze(1).double().numpy()
        low, high = np.log([head.measure.low, head.measure.high])
        days = trusts.attendances[:, month] / trusts.daily[:, month]
        found.append(np.exp(low + (answer + 2) / 4 * (high - low)) * level * days)
    return np.stack(found, axis=1)


def wape(forecast: Floats, truth: Floats) -> float:
    """Sum of absolute errors over the sum of what was to be forecast."""
    return float(np.abs(forecast - truth).sum() / truth.sum())


def _figures(plain: Plain, trusts: Trusts, hospitals: list[Records], months: range, seeds: int) -> dict[str, float]:
    truth = trusts.attendances[:, months.start :]
    found: dict[str, list[float]] = {"nhs_wape": [], "nhs_wape_pooled": [], "nhs_wape_alone": []}
    for seed in range(seeds):
        found["nhs_wape"].append(wape(forecasts(federate(plain, hospitals, seed=seed), trusts, months), truth))
        pooled = train_in_one_place(plain, pool(hospitals), seed=seed)
        found["nhs_wape_pooled"].append(wape(forecasts(pooled, trusts, months), truth))
        alone = [
            forecasts(train_in_one_place(plain, records, seed=seed), trusts, months)[place]
            for place, records in enumerate(hospitals)
        ]
        found["nhs_wape_alone"].append(wape(np.stack(alone), truth))
    figures = {key: value for name, values in found.items() for key, value in mean_and_sd(name, values).items()}
    last, year_ago = (trusts.attendances[:, months.start - lag : -lag] for lag in (1, LAGS))
    return figures | {"nhs_wape_last_value": wape(last, truth), "nhs_wape_last_year": wape(year_ago, truth)}
