"""Checkpoints of the global model: safetensors under a temporary name, fsynced, renamed; the newest few are kept."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shared_models.model_file import write_model
from shared_models.plan import StudyPlan
from shared_models.update import vector_to_parameters

KEPT = 3


def save_checkpoint(
    folder: Path, model: nn.Module, parameters: NDArray[np.float32], plan: StudyPlan, round_number: int
) -> Path:
    """Write the parameters of a finished round and drop checkpoints older than the newest few.

    Guarantees:
        * The file appears whole or not at all; a crash or a full disk leaves the previous checkpoint valid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vector_to_parameters(parameters, model)
    path = folder / f"round-{round_number:06d}.safetensors"
    write_model(path, model, plan, round=str(round_number))
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path
