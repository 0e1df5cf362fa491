"""A hospital's own settings, ``hospital.toml``: who it is, whom it calls, where its files lie, what it permits.

Secrets enter as file paths only. All paths are relative to the folder of the settings file, so that the folder can be
moved as one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from client.policy import Policy, Population
from shared_models import config
from shared_models.config import Frozen, LocalPath, Name
from shared_models.plan import Digest


def _host_and_port(address: str) -> str:
    """Accept ``host:port`` and ``[v6]:port`` with a usable port."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or "/" in host or any(c.isspace() for c in host) or (":" in host and not bracketed):
        raise ValueError(f"must be host:port, without a scheme or a path; not {address!r}")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535):
        raise ValueError(f"the port must be a number from 1 to 65535, not {port!r}")
    return address


Address = Annotated[str, AfterValidator(_host_and_port)]


class Tls(Frozen):
    """Files of the mutual TLS connection: the coordinator proves itself to the hospital and the other way round."""

    ca: LocalPath
    certificate: LocalPath
    key: LocalPath


class Keys(Frozen):
    """Key files.

    Attributes:
        identity: Private, Ed25519: signs the ledger.
        node: Private, ECDSA P-384: Flower's node key.
        root: The consortium's public root key, 32 bytes in hexadecimal: nobody else signs a roster.
    """

    identity: LocalPath
    node: LocalPath
    root: LocalPath


class PageSettings(Frozen):
    """The hospital's page, on loopback only.

    Attributes:
        port: Where the daemon serves it.
    """

    port: Annotated[int, Field(ge=1, le=65_535)]


class Logs(Frozen):
    """How much is kept of what the daemon writes down; the ledger, receipts and transcripts are never removed.

    Attributes:
        maximum_mb: At which ``hospital.log`` is set aside.
        files: How many of those are kept.
        audit_years: How long the egress log is kept, once a part of it is set aside: six years, as 45 CFR
            164.316(b)(2)(i) has it, unless told otherwise.
    """

    maximum_mb: Annotated[int, Field(ge=1, le=10_000)] = 16
    files: Annotated[int, Field(ge=1, le=1_000)] = 10
    audit_years: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 6.0

    @property
    def audit_s(self) -> float:
        """The same in seconds, of years that are never too short."""
        return self.audit_years * 366 * 24 * 3600


class Settings(Frozen):
    """Everything that one hospital's processes need to know.

    Attributes:
        name: The hospital's registered name.
        coordinator: Address of the coordinator, ``host:port``.
        control: Address of its control service, where evidence is left for auditors, if policy permits it.
        records: Folder with ``manifest.toml`` and the file that it names.
        state: Folder for the ledger, its head file and the logs; must outlive the process.
        registry: Folder that all populations of this hospital share, with keyed hashes of the patients whose records
            were used: no patient is paid for out of two budgets. ``registry`` beside ``state`` unless told otherwise.
        opt_out: List of the patients who say no, one id per line.
        records_memory_mb: How much of what was decoded of pictures and recordings stays in memory; the rest is decoded
            again when it is needed.
        roster: The signed roster: who is in the consortium, and with which keys.
        device: ``auto`` takes CUDA when it is there, else the CPU.
        precision: Of forward and backward passes; clipping, sums and noise are always in 32 or 64 bits.
        gpus: How many GPUs of this machine share the work of training, where CUDA computes.
        threads: Threads that torch may use.
        logs: How much is kept of the logs.
        pretrained: This hospital's own copies of pretrained bases that plans start from, by their digest.
        page: The page for the steward's browser; absent: there is none.
    """

    name: Name
    coordinator: Address
    control: Address | None = None
    records: LocalPath
    state: LocalPath
    registry: LocalPath | None = None
    opt_out: LocalPath | None = None
    records_memory_mb: Annotated[int, Field(ge=0, le=1_000_000)] = 512
    roster: LocalPath
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    tls: Tls
    keys: Keys
    population: Population
    policy: Policy
    logs: Logs = Logs()
    pretrained: Mapping[Digest, LocalPath] = {}
    page: PageSettings | None = None

    @model_validator(mode="after")
    def _knows_where_to_send(self) -> "Settings":
        if self.control is None and (self.policy.send_checkpoints or self.policy.send_evidence):
            raise ValueError("policy sends checkpoints or evidence, and control does not say where the service is")
        return self

    @property
    def registry_folder(self) -> Path:
        """Where the registry lies."""
        return self.registry or self.state.parent / "registry"


def read_settings(path: Path) -> Settings:
    """Read and validate ``hospital.toml``, every error at once.

    Raises:
        ConfigError: The file is missing, or a key is unknown, missing or out of range; delta is above
            1 / (10 * public size).
    """
    return config.read_settings(path, Settings, described_in="docs/hospital.md")
