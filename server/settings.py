"""The coordinator's own settings, ``coordinator.toml``: where it listens, whom it knows, where it keeps its state."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from shared_models import config
from shared_models.config import Frozen, LocalPath, Name


class RegisteredHospital(Frozen):
    """A hospital the coordinator knows, and the public halves of its keys.

    Attributes:
        node_key: OpenSSH file of its Flower node key (ECDSA P-384): who may connect.
        identity: File of its Ed25519 identity key (32 raw bytes in hexadecimal): who signed a receipt.
    """

    name: Name
    node_key: LocalPath
    identity: LocalPath


class Tls(Frozen):
    """Certificate and key of the coordinator, and the authority that signs the hospitals' certificates."""

    ca: LocalPath
    certificate: LocalPath
    key: LocalPath


class Settings(Frozen):
    """Everything that the coordinator's process needs to know before it sees a plan."""

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    state: LocalPath
    tls: Tls
    hospitals: Annotated[tuple[RegisteredHospital, ...], Field(min_length=1, max_length=10_000)]

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Settings":
        if len({hospital.name for hospital in self.hospitals}) != len(self.hospitals):
            raise ValueError("two hospitals have the same name")
        return self


def read_settings(path: Path) -> Settings:
    """Read and validate ``coordinator.toml``, every error at once.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or out of range.
    """
    return config.read_settings(path, Settings, described_in="docs/coordinator.md")
