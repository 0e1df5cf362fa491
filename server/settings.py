"""The coordinator's own settings, ``coordinator.toml``: where it listens, whom it knows, where it keeps its state."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from shared_models import config
from shared_models.config import Frozen, LocalPath
from shared_models.errors import ConfigError


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


class Operator(Frozen):
    """``operator.toml``: where the coordinator is, and with which certificate to call it.

    Attributes:
        connect: ``host:port`` of the control service.
        ca: The authority's certificate.
        certificate: The caller's own, which holds its role.
        key: Its private key.
        server_name: The name in the coordinator's certificate, where it is not the host of ``connect``: in a tunnel.
    """

    connect: Annotated[str, Field(pattern=r"^.+:[0-9]{1,5}$")]
    ca: LocalPath
    certificate: LocalPath
    key: LocalPath
    server_name: Annotated[str, Field(min_length=1)] | None = None


def read_operator(path: Path) -> Operator:
    """Read and validate ``operator.toml``, every error at once.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or out of range.
    """
    return config.read_settings(path, Operator, described_in="docs/coordinator.md")


def find_operator(file: Path | None, **given: Any) -> Operator:
    """Where to call and as whom: from a file, from options that override it, or from options alone.

    Raises:
        ConfigError: Something is missing, or the file is invalid.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if file is None:
        missing = [f"--{key}" for key in ("connect", "ca", "certificate", "key") if key not in given]
        if missing:
            raise ConfigError(
                f"nobody said where the control service is, or who calls: {', '.join(missing)}",
                hint="Give these options, or --operator operator.toml, or set KONSIL_OPERATOR.",
            )
        fields: dict[str, Any] = {}
    else:
        fields = dict(read_operator(file))
    try:
        return Operator(**{**fields, **given})
    except ValidationError as error:
        raise ConfigError(config.explain(error), hint="See docs/coordinator.md.") from None
