"""Checkpoints of the global model: safetensors under a temporary name, fsynced, renamed; the newest few are kept.

A checkpoint holds all that a study needs to go on after its round: the parameters, and what the averaging remembers.
The best model, by what hospitals released, is kept as well.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from server.progress import Best
from shared_models.errors import ConfigError
from shared_models.model_file import read_about, read_model, write_model
from shared_models.plan import StudyPlan
from shared_models.update import load_beside, parameters_to_vector, vector_to_parameters

log = logging.getLogger("konsil.coordinator")

KEPT = 3
BEST = "best.safetensors"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    parameters: NDArray[np.float32],
    plan: StudyPlan,
    round_number: int,
    state: Mapping[str, NDArray[np.float64]] | None = None,
) -> Path:
    """Write the parameters of a finished round and drop checkpoints older than the newest few.

    Guarantees:
        * The file appears whole or not at all; a crash or a full disk leaves the previous checkpoint valid.
        * Parameters and ``state``, what the averaging remembers, are of the same round: they are one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vector_to_parameters(parameters, model)
    path = checkpoint_path(folder, round_number)
    write_model(path, model, plan, beside=state, round=str(round_number))
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def last_round(folder: Path) -> int:
    """Round of the newest checkpoint; 0 before the first."""
    return max((int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors")), default=0)


def load_checkpoint(
    folder: Path, plan: StudyPlan, round_number: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
    """What ``save_checkpoint`` wrote of a round.

    Returns:
        Global parameters, shape ``(d,)``, finite; and what the averaging remembered, for ``server_step`` to check.

    Raises:
        ConfigError: The file is missing or damaged, of another plan or another round, or does not fit the network.
    """
    path = checkpoint_path(folder, round_number)
    about, (_, model) = read_about(path), read_model(path)
    if (about.get("plan_digest"), about.get("round")) != (plan.digest(), str(round_number)):
        raise ConfigError(
            f"{path} is of round {about.get('round')} of plan {about.get('plan_digest')}, "
            f"not of round {round_number} of plan {plan.digest()}",
            hint="Go on in the folder in which this study ran.",
        )
    return parameters_to_vector(model), load_beside(path)


def keep_best(folder: Path, plan: StudyPlan, best: Best | None) -> None:
    """Keep the checkpoint of the best release beside the study's model, as ``best.safetensors``.

    Repeated after every round it also mends what a crash prevented: which round is the best is known from the journal,
    and its checkpoint is one of the newest until the next round is over.
    """
    path = folder / BEST
    if best is None or (path.exists() and read_about(path).get("round") == str(best.round)):
        return
    source = checkpoint_path(folder / "checkpoints", best.round)
    if not source.exists():
        log.warning("round %d was the best, and its checkpoint is gone: %s is older", best.round, BEST)
        return
    _, model = read_model(source)
    write_model(path, model, plan, round=str(best.round), metric=best.metric, value=repr(best.value))


def checkpoint_path(folder: Path, round_number: int) -> Path:
    """Where the parameters of a finished round are."""
    return folder / f"round-{round_number:06d}.safetensors"
