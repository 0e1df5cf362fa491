"""Columns of a frame -> numbers inside a public range, and indices of public categories."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.frames import refuse, texts
from client.records.manifest import Manifest
from shared_models.tasks import Categorical, Numeric


def finite_numbers(frame: pd.DataFrame, manifest: Manifest, name: str, unit: str) -> NDArray[np.float64]:
    """A column of finite numbers.

    Raises:
        RecordsError: A cell is none; with file, row, column and value.
    """
    series = frame[name]
    if pd.api.types.is_bool_dtype(series):
        refuse(manifest, frame, name, np.ones(len(frame), dtype=np.bool_), "is a truth value, not a number")
    read = series if pd.api.types.is_numeric_dtype(series) else texts(series)
    values: NDArray[np.float64] = pd.to_numeric(read, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    not_finite = read.astype(str).str.lower().str.lstrip("+-").isin(["nan", "inf", "infinity"]).to_numpy()
    refuse(manifest, frame, name, not_finite | np.isinf(values), "is not a finite number")
    refuse(manifest, frame, name, np.isnan(values), f"is not a number ({unit} expected)")
    return values + 0.0  # "-0" is 0, or -0.0 where another row of the part has a fraction: a row's content is its own


def numbers(frame: pd.DataFrame, manifest: Manifest, column: Numeric) -> NDArray[np.float64]:
    """A numeric column, every value inside its public range.

    Raises:
        RecordsError: A cell is not; with file, row, column and value.
    """
    name = manifest.column(column.name)
    values = finite_numbers(frame, manifest, name, column.unit)
    outside = ~((values >= column.low) & (values <= column.high))
    refuse(
        manifest, frame, name, outside, f"is outside the public range {column.low:g} to {column.high:g} {column.unit}"
    )
    return values


def categories(
    frame: pd.DataFrame, manifest: Manifest, schema: Categorical, column: str | None = None
) -> NDArray[np.int64]:
    """A column of categories, as indices into the schema's; the manifest's map translates codes.

    Raises:
        RecordsError: A cell is none of them; with file, row, column and value.
    """
    name = column or manifest.column(schema.name)
    codes = manifest.categories.get(schema.name, {})
    named = texts(frame[name]).map(lambda text: codes.get(text, text))
    index = {category: i for i, category in enumerate(schema.categories)}
    found = named.map(lambda text: index.get(text, -1)).to_numpy(dtype=np.int64)
    refuse(manifest, frame, name, found < 0, f"is none of {', '.join(schema.categories)}")
    return found
