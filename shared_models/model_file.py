"""A model file that explains itself: parameters, and the plan that says which network they belong to."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from shared_models.errors import ConfigError, UnsupportedFileError
from shared_models.nets.build import build_network
from shared_models.plan import StudyPlan, parse_plan_json
from shared_models.pretrained import base_of
from shared_models.tasks import task_of
from shared_models.update import load_model, save_model
from shared_models.versions import unsupported_format

FORMAT = "konsil-model/1"
INTENDED_USE = "Research. Not a medical device; validate locally before any use on patients."


def write_model(
    path: Path,
    model: nn.Module,
    plan: StudyPlan,
    *,
    beside: Mapping[str, NDArray[np.float64]] | None = None,
    **about: str,
) -> None:
    """Write a model with its plan, atomically (see ``save_model``); ``about`` adds texts such as the round.

    Of a network that starts from a pretrained base, the base's digest is written, and not its weights.
    """
    base = base_of(plan.network)
    metadata = {"format": FORMAT, "plan": plan.canonical().decode(), "plan_digest": plan.digest()}
    metadata |= {"intended_use": INTENDED_USE, **about, **({"base": base} if base else {})}
    save_model(path, model, metadata, beside)


def read_about(path: Path) -> dict[str, str]:
    """The texts of a model file: its format, its plan and its digest, and what ``write_model`` was told about it.

    Raises:
        UnsupportedFileError: A later release wrote it.
        ConfigError: The file is missing, damaged, or not a model of this project.
    """
    hint = "Pass a model.safetensors or a checkpoint of a study."
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model {path} cannot be read: {error}", hint=hint) from None
    found = metadata.get("format", "")
    if found.startswith("konsil-model/") and found != FORMAT:
        raise unsupported_format(str(path), found, FORMAT, UnsupportedFileError)
    if found != FORMAT:
        raise ConfigError(f"{path} is no Konsil model", hint=hint)
    return metadata


def intended_use(about: Mapping[str, str]) -> str:
    """What a model is for, by its file; files of the first release do not say it, and are for the same."""
    return about.get("intended_use", INTENDED_USE)


def read_model(path: Path) -> tuple[StudyPlan, nn.Module]:
    """Build the network that a model file names and load its parameters.

    Raises:
        PretrainedError: The network starts from a base of which no copy is known here (``offer_bases``).
        ConfigError: As for ``read_about``, or its parameters do not fit the network that its plan names.
    """
    metadata = read_about(path)
    plan = parse_plan_json(metadata.get("plan", ""), str(path))
    model = build_network(plan.network, task_of(plan), seed=plan.seed)
    load_model(path, model)
    return plan, model
