"""Update: model <-> flat vector, in a fixed order <-> safetensors; and the norm that an honest update stays below."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from shared_models.durable import replace_file
from shared_models.errors import ConfigError, ProtocolError
from shared_models.plan import PrivacyPlan, TrainingPlan


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name, in the model's own order. A frozen base's never travel."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameters_to_vector(model: nn.Module) -> NDArray[np.float32]:
    """All trainable parameters as one vector, in the order of ``model.named_parameters()``.

    Returns:
        A copy, shape ``(d,)``: later training does not change it.
    """
    parts = [parameter.detach().cpu().numpy().ravel() for parameter in trainable(model).values()]
    return np.concatenate(parts, dtype=np.float32)


def vector_to_parameters(vector: NDArray[np.float32], model: nn.Module) -> None:
    """Write a vector into a model's trainable parameters, in the order of ``model.named_parameters()``.

    Guarantees:
        * ``parameters_to_vector`` of the model is then ``vector``, bit for bit.
        * On an error, nothing has been changed.

    Raises:
        ProtocolError: As for ``check_vector``.
    """
    parameters = list(trainable(model).values())
    check_vector(vector, sum(parameter.numel() for parameter in parameters))
    flat = torch.from_numpy(vector.copy())  # a received vector may be read-only memory, which torch does not know
    with torch.no_grad():
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


def check_vector(vector: NDArray[np.float32], length: int) -> None:
    """Check what a peer sent as parameters or as an update.

    Raises:
        ProtocolError: Not a flat array of ``length`` finite float32 numbers. The message holds no values.
    """
    hint = "The sender runs another version, another plan, or its training diverged."
    if not isinstance(vector, np.ndarray) or vector.dtype != np.float32:
        raise ProtocolError(f"vector is {getattr(vector, 'dtype', type(vector).__name__)}, not float32", hint=hint)
    if vector.shape != (length,):
        raise ProtocolError(f"vector has shape {vector.shape}, not ({length},)", hint=hint)
    broken = int(np.count_nonzero(~np.isfinite(vector)))
    if broken:
        raise ProtocolError(f"{broken} of the vector's {length} numbers are NaN or infinite", hint=hint)


def vector_digest(vector: NDArray[np.float32]) -> str:
    """SHA-256 of the vector's little-endian float32 bytes, in hexadecimal: the same on every machine."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).hexdigest()


def update_bound(*, training: TrainingPlan, privacy: PrivacyPlan, parameters: int, expected_batch: float) -> float:
    """B, the L2 norm that an honest hospital's update of one round stays below but for rare noise.

    A step moves the parameters by the learning rate times (clipped sum + noise) / expected batch. The sum's norm is at
    most C per drawn patient, the noise's about ``sigma * C * sqrt(d)``; 1.5 leaves room for larger draws.

    It holds in every round and with a proximal term as it is. No schedule gives a rate above the plan's learning rate.
    A pull towards the global parameters makes the update 1 - learning rate * mu of what it was before each step, and a
    plan's learning rate * mu is at most 1: it only shortens. To bound it more tightly would take a power, whose last
    digit may differ between machines, and both sides need one bound to the bit.

    It bounds an honest hospital's faults, not a hostile one: under secure aggregation only the sum can be checked.

    Args:
        training: Steps of one round and the plan's learning rate, which is the largest of any round.
        privacy: C and sigma.
        parameters: d, the length of the update.
        expected_batch: Sample rate times public size: the denominator of every step, in patients.

    Raises:
        ConfigError: The expected batch is not positive.
    """
    if not 0 < expected_batch < math.inf:
        raise ConfigError(
            f"expected batch {expected_batch} is not a positive number",
            hint="It is the plan's sample rate times the hospital's public size.",
        )
    noise = privacy.noise_multiplier * privacy.clip * math.sqrt(parameters) / expected_batch
    return 1.5 * training.steps * training.learning_rate * (privacy.clip + noise)


def bound_update(update: NDArray[np.float32] | NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Scale an update down to L2 norm ``limit`` if it is longer.

    Guarantees:
        * The result's norm, in float64, is at most ``limit`` but for rounding (relative error below 1e-12).
        * An update within the limit is unchanged, bit for bit. The direction never changes.

    Args:
        update: Local minus global parameters, shape ``(d,)``.
        limit: B; positive.

    Raises:
        ConfigError: The limit is not positive.
        ProtocolError: An entry is NaN or infinite.
    """
    if not limit > 0:
        raise ConfigError(f"limit {limit} of an update is not positive", hint="See update_bound.")
    exact = update.astype(np.float64)
    if not np.isfinite(exact).all():
        raise ProtocolError("the update holds NaN or infinite numbers", hint="Lower the plan's learning rate.")
    largest = float(np.abs(exact).max(initial=0.0))
    if largest == 0.0:
        return exact
    scaled = exact / largest  # so that no square overflows or vanishes
    norm = float(np.linalg.norm(scaled))
    return exact if largest * norm <= limit else scaled * (limit / norm)


BESIDE = "beside/"  # before the name of an array that is no parameter; no parameter's name has a slash


def save_model(
    path: Path, model: nn.Module, metadata: Mapping[str, str], beside: Mapping[str, NDArray[np.float64]] | None = None
) -> None:
    """Write a model's trainable parameters to a safetensors file, tensors by parameter name.

    ``beside`` adds arrays that are no parameters; whoever loads the model leaves them alone.

    Guarantees:
        * At every moment, also after a crash or power cut, the path holds the old file whole, or the new one whole.
        * When this returns, the new file is on the disk.
        * Equal parameters and metadata give equal files, byte for byte.

    Raises:
        ConfigError: The file cannot be written; no temporary file is left behind.
    """
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(model).items()}
    tensors |= {BESIDE + name: torch.from_numpy(array) for name, array in (beside or {}).items()}
    content = _serialize(tensors, metadata)
    try:
        replace_file(path, *content)
    except OSError as error:
        hint = "Check the folder, its permissions and free space."
        raise ConfigError(f"model {path} cannot be written: {error.strerror}", hint=hint) from None


def _serialize(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """A safetensors file as header and data. The library orders metadata at random, so the header is written anew."""
    content = save(tensors)
    data = 8 + int.from_bytes(content[:8], "little")
    fields = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:data])}
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format wants the data aligned
    return len(header).to_bytes(8, "little") + header, memoryview(content)[data:]


def load_model(path: Path, model: nn.Module) -> dict[str, str]:
    """Read a safetensors file that ``save_model`` wrote into a model of the same network.

    Guarantees:
        * On an error, nothing has been changed.
        * No code in the file is ever run: safetensors holds numbers and strings only.

    Returns:
        The file's metadata.

    Raises:
        ConfigError: The file is missing or damaged, or its parameters are not the model's; the message says which.
    """
    with _readable(path), safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        names = [name for name in file.keys() if not name.startswith(BESIDE)]  # noqa: SIM118 - no dictionary
        tensors = {name: file.get_tensor(name) for name in names}
    parameters = trainable(model)
    problem = _mismatch(tensors, parameters)
    if problem:
        raise ConfigError(f"model {path} does not fit the network: {problem}", hint="Use the plan it was trained with.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return metadata


def load_beside(path: Path) -> dict[str, NDArray[np.float64]]:
    """The arrays that were saved beside a model, by name; whoever asked for them checks what they are.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    with _readable(path), safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(BESIDE)]  # noqa: SIM118 - no dictionary
        return {name.removeprefix(BESIDE): file.get_tensor(name) for name in names}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"model {path} does not exist", hint="Check the path, or train it first.") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model {path} cannot be read: {error}", hint="It is damaged; restore a copy.") from None


def _mismatch(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> str:
    """What keeps tensors from a file out of a model; empty if nothing does."""
    if tensors.keys() != parameters.keys():
        return f"parameters {sorted(tensors.keys() ^ parameters.keys())} are in only one of the two"
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape or tensor.dtype != parameters[name].dtype:
            return f"parameter {name} is {tensor.dtype} of shape {tuple(tensor.shape)}"
        if not tensor.isfinite().all():
            return f"parameter {name} holds NaN or infinite numbers"
    return ""
