"""The coordinator's own settings, ``coordinator.toml``: where it listens, whom it knows, where it keeps its state."""

from pathlib import Path
from typing import Annotated, Literal

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


class PageSettings(Frozen):
    """The page for browsers and Prometheus.

    Attributes:
        host: Address to listen on. Anywhere but on loopback the page speaks TLS and asks for the token.
        port: Port to listen on.
        token_file: File of mode 0600 whose first line is the viewers' token.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65_535)]
    token_file: LocalPath | None = None


class Settings(Frozen):
    """Everything that the coordinator's process needs to know before it sees a plan.

    Attributes:
        host: Address to listen on.
        port: Port to listen on.
        state: Folder for studies and the hospitals' last receipts.
        roster: The signed roster: which hospitals may connect, and with which keys.
        root: The consortium's public root key, 32 bytes in hexadecimal.
        database: URL of the database; by default ``coordinator.sqlite`` in the state folder.
        page: The page; without it there is none.
        log_format: Log lines for people, or as JSON.
        tensorboard: Whether rounds are written as TensorBoard's event files, too.
    """

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    state: LocalPath
    tls: Tls
    roster: LocalPath
    root: LocalPath
    database: Annotated[str, Field(min_length=1)] | None = None
    page: PageSettings | None = None
    log_format: Literal["text", "json"] = "text"
    tensorboard: bool = False

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
