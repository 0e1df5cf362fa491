"""Predictions of a released model for a folder of records: one line per record, in a file that stays in the house."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.draw import write_mask
from client.records.manifest import read_manifest
from client.records.tabular import Inputs, read_inputs
from client.results import writing
from client.usable import UsableModel

LEFT_OUT = "a value is missing"


@dataclass(frozen=True)
class Counted:
    """How many records got a prediction, and how many were left out for a missing value."""

    predicted: int
    left_out: int


def predict_folder(model: UsableModel, folder: Path, out: Path, *, batch: int = 1024) -> Counted:
    """Write what a model predicts for every record of a folder, in the order of its file.

    Columns: ``row``, as an editor or a spreadsheet numbers it; ``patient``, where the manifest names the column, as the
    hospital's own file has it; those of ``UsableModel.columns``; the predicted class of each choice; ``left_out``: why
    there is no prediction. The masks of an outline go into a folder beside the file, as ``row-N.png``.

    Guarantees:
        * The labels' columns are not read, and need not be there.
        * No more than ``batch`` records are encoded at once, but for series in long form.
        * The file is there whole or not at all, readable by its owner alone.

    Args:
        model: As ``load_model`` returned it.
        folder: With ``manifest.toml``.
        out: Ends in ``.csv`` or ``.parquet``.
        batch: Records at once.

    Raises:
        RecordsError: The manifest or the records do not fit the model's task.
        ConfigError: ``out`` ends in something else.
    """
    predicted = left_out = 0
    with writing(out, _kinds(model)) as writer, torch.inference_mode():
        for part in read_inputs(read_manifest(folder), model.task, at_once=batch):
            outputs = model.outputs(part.inputs)
            writer.write(_lines(model, part, outputs))
            if (masks := model.masks(part.inputs)) is not None:
                for row, mask in zip(np.array(part.rows)[part.kept], masks.numpy(), strict=True):
                    write_mask(out.with_suffix("") / f"row-{row}.png", mask)
            predicted += len(outputs)
            left_out += len(part.rows) - len(outputs)
    return Counted(predicted, left_out)


def _kinds(model: UsableModel) -> dict[str, type]:
    chosen = [model.predicted_column(head) for head in model.choices]
    return {
        "row": int,
        "patient": str,
        **dict.fromkeys(model.columns, float),
        **dict.fromkeys(chosen, str),
        "left_out": str,
    }


def _lines(model: UsableModel, part: Inputs, outputs: Tensor) -> Mapping[str, Sequence[object]]:
    """Columns of some rows; where a row was left out, they are empty but for the reason."""
    place, found = iter(range(len(outputs))), outputs.double().tolist()
    where = [next(place) if kept else None for kept in part.kept]
    return {
        "row": part.rows,
        "patient": part.patients,
        **{
            column: [None if i is None else found[i][number] for i in where]
            for number, column in enumerate(model.columns)
        },
        **{
            column: [None if i is None else names[i] for i in where]
            for column, names in model.predicted(outputs).items()
        },
        "left_out": [LEFT_OUT if i is None else None for i in where],
    }
