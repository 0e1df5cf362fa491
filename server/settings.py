"""The coordinator's own settings, ``coordinator.toml``: where it listens, whom it knows, where it keeps its state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared_models import config
from shared_models.config import Frozen, LocalPath
from shared_models.plan import Digest


class Tls(Frozen):
    """Certificate and key of the coordinator, and the authority that signs the hospitals' certificates.

    Attributes:
        authority_key: The authority's private key, where this coordinator enrols hospitals itself.
    """

    ca: LocalPath
    certificate: LocalPath
    key: LocalPath
    authority_key: LocalPath | None = None


class Control(Frozen):
    """Where ``konsil-coordinator start`` serves people and programs, and how much of it they get.

    Attributes:
        maximum_message_bytes: Of a request; plans are small.
        maximum_deposit_bytes: Of an evidence bundle that a hospital leaves.
        maximum_connections: Open at a time; further ones are closed at once.
        maximum_calls: Going on at a time.
        maximum_calls_per_certificate: The part of them that one key may have.
        handshake_timeout_s: From the connection to the end of its TLS handshake.
        request_timeout_s: From a call's beginning to the end of its request.
        keepalive_s: A connection that says nothing for so long is asked whether it is there.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65_535)] = 9093
    maximum_message_bytes: Annotated[int, Field(ge=65_536, le=67_108_864)] = 1_048_576
    maximum_deposit_bytes: Annotated[int, Field(ge=65_536, le=2**32 - 1)] = 268_435_456
    maximum_connections: Annotated[int, Field(ge=10, le=100_000)] = 500
    maximum_calls: Annotated[int, Field(ge=10, le=100_000)] = 1000
    maximum_calls_per_certificate: Annotated[int, Field(ge=1, le=100_000)] = 250
    handshake_timeout_s: Annotated[float, Field(ge=0.1, le=60, allow_inf_nan=False)] = 10.0
    request_timeout_s: Annotated[float, Field(ge=0.1, le=60, allow_inf_nan=False)] = 10.0
    keepalive_s: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 30.0


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
        control: The control service, which only ``start`` serves.
        page: The page; without it there is none.
        log_format: Log lines for people, or as JSON.
        tensorboard: Whether rounds are written as TensorBoard's event files, too.
        pretrained: This coordinator's own copies of pretrained bases that plans start from, by their digest.
    """

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    state: LocalPath
    tls: Tls
    roster: LocalPath
    root: LocalPath
    database: Annotated[str, Field(min_length=1)] | None = None
    control: Control = Control()
    page: PageSettings | None = None
    log_format: Literal["text", "json"] = "text"
    tensorboard: bool = False
    pretrained: Mapping[Digest, LocalPath] = {}

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
