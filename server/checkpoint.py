"""Checkpoints of the global model: safetensors under a temporary name, fsynced, renamed; the newest few are kept."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shared_models.errors import ConfigError
from shared_models.model_file import read_model, write_model
from shared_models.plan import StudyPlan
from shared_models.update import parameters_to_vector, vector_to_parameters

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
    path = checkpoint_path(folder, round_number)
    write_model(path, model, plan, round=str(round_number))
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def last_checkpoint(folder: Path, plan: StudyPlan) -> tuple[int, NDArray[np.float32]] | None:
    """The newest checkpoint: its round, and the parameters, shape ``(d,)``; None before the first.

    Raises:
        ConfigError: It is damaged, or of another plan. An older one is no way out: hospitals do no round twice.
    """
    paths = sorted(folder.glob("round-*.safetensors"))
    if not paths:
        return None
    found, model = read_model(paths[-1])
    if found.digest() != plan.digest():
        raise ConfigError(f"{paths[-1]} is of another plan", hint="Restore the study's folder from a backup.")
    return int(paths[-1].stem.removeprefix("round-")), parameters_to_vector(model)


def checkpoint_path(folder: Path, round_number: int) -> Path:
    """Where the parameters of a finished round are."""
    return folder / f"round-{round_number:06d}.safetensors"
