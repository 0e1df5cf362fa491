"""The coordinator's own settings, ``coordinator.toml``: where it listens, whom it knows, where it keeps its state."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from shared_models import config
from shared_models.config import Frozen, LocalPath


class Tls(Frozen):
    """Certificate and key of the coordinator, and the authority that signs the hospitals' certificates.

    Attributes:
        authority_key: The authority's private key, where this coordinator enrols hospitals itself.
    """

    ca: LocalPath
    certificate: LocalPath
    key: LocalPath
    authority_key: LocalPath | None = None


class Settings(Frozen):
    """Everything that the coordinator's process needs to know before it sees a plan.

    Attributes:
        host: Address to listen on.
        port: Port to listen on.
        state: Folder for studies and the hospitals' last receipts.
        roster: The signed roster: which hospitals may connect, and with which keys.
        root: The consortium's public root key, 32 bytes in hexadecimal.
        database: URL of the database; by default ``coordinator.sqlite`` in the state folder.
    """

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    state: LocalPath
    tls: Tls
    roster: LocalPath
    root: LocalPath
    database: Annotated[str, Field(min_length=1)] | None = None

    @property
    def database_url(self) -> str:
        """Where studies and their progress are written down."""
        return self.database or f"sqlite:///{self.state.absolute() / 'coordinator.sqlite'}"


def read_settings(path: Path) -> Settings:
    """Read and validate ``coordinator.toml``, every error at once.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or out of range.
    """
    return config.read_settings(path, Settings, described_in="docs/coordinator.md")
