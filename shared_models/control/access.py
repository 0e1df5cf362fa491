"""Where a coordinator's control service is, and with which certificate to call it; gRPC is imported only to call it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from shared_models import config
from shared_models.config import Frozen, LocalPath
from shared_models.errors import ConfigError

if TYPE_CHECKING:
    from shared_models.control.connection import ControlConnection

DESCRIBED_IN = "docs/coordinator.md"


class Access(Frozen):
    """``operator.toml``, ``auditor.toml``: how one person or program calls the control service.

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


def read_access(path: Path) -> Access:
    """Read and validate such a file, every error at once.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or out of range.
    """
    return config.read_settings(path, Access, described_in=DESCRIBED_IN)


def find_access(file: Path | None, *, option: str, variable: str, **given: Any) -> Access:
    """Where to call and as whom: from a file, from options that override it, or from options alone.

    Args:
        file: Such a file, if there is one.
        option: The command's option for the file, for the hint.
        variable: The variable of the environment that may name it instead.
        given: Fields from the command line; None where one was not given.

    Raises:
        ConfigError: Something is missing, or the file is invalid.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if file is None:
        missing = [f"--{key}" for key in ("connect", "ca", "certificate", "key") if key not in given]
        if missing:
            raise ConfigError(
                f"nobody said where the control service is, or who calls: {', '.join(missing)}",
                hint=f"Give these options, or {option}, or set {variable}.",
            )
        fields: dict[str, Any] = {}
    else:
        fields = dict(read_access(file))
    try:
        return Access(**{**fields, **given})
    except ValidationError as error:
        raise ConfigError(config.explain(error), hint=f"See {DESCRIBED_IN}.") from None


def connect(access: Access) -> "ControlConnection":
    """A connection to the control service; a context manager.

    Raises:
        ConfigError: A file cannot be read, or gRPC is not installed here.
    """
    try:
        from shared_models.control.connection import ControlConnection  # noqa: PLC0415 - an extra; not for --help
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"calling a coordinator needs gRPC, which is not installed here ({error.name})",
            hint="pip install 'konsil[remote]'",
        ) from None
    return ControlConnection(access)
