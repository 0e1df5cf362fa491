"""Where torch computes at this hospital."""

import torch

from client.settings import Settings
from shared_models.errors import ConfigError


def choose_device(settings: Settings) -> torch.device:
    """CUDA when it is there and permitted, else the CPU; the setting decides.

    Raises:
        ConfigError: ``cuda`` is demanded and not there.
    """
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError(
            "the settings demand cuda, which is not available",
            hint='Set device = "auto" or "cpu"; or have the driver looked at: nvidia-smi.',
        )
    wanted = settings.device == "cuda" or (settings.device == "auto" and "cuda" in settings.policy.devices)
    return torch.device("cuda" if wanted and there else "cpu")


def other_devices(settings: Settings, device: torch.device) -> list[torch.device]:
    """Further GPUs that share the work of this one, as many as the setting says.

    Raises:
        ConfigError: The machine has fewer.
    """
    if device.type != "cuda":
        return []
    there = torch.cuda.device_count()
    if settings.gpus > there:
        raise ConfigError(
            f"the settings ask for {settings.gpus} GPUs, and there are {there}",
            hint="Set gpus to as many as nvidia-smi lists, and CUDA_VISIBLE_DEVICES permits.",
        )
    return [torch.device("cuda", number) for number in range(1, settings.gpus)]
