"""Calling a coordinator's control service, from wherever there is a certificate for it."""

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc

from shared_models import errors
from shared_models.control import control_pb2 as pb
from shared_models.control.access import Access
from shared_models.control.control_pb2_grpc import ControlStub
from shared_models.control.fields import to_dict
from shared_models.errors import ConfigError, ConnectionLostError, FederationError, TransferError
from shared_models.terminal import printable

ERROR_KEY = "konsil-error-bin"
CALL_TIMEOUT_S, FETCH_TIMEOUT_S = 30.0, 3600.0  # a fetch that was cut off goes on where it was
LONGEST_PAUSE_S = 15.0
_BACK_SOON = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN})

_OPTIONS = [
    ("grpc.max_metadata_size", 65_536),
    ("grpc.absolute_max_metadata_size", 65_536),
    ("grpc.max_receive_message_length", 67_108_864),  # long lists of studies
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),  # a hospital lists what it sends, once
]


class DepositFile(NamedTuple):
    """A file that a hospital has left, as the coordinator lists it.

    Attributes:
        sha256: None of a file that grows.
        changed_at: Unix time.
    """

    hospital: str
    name: str
    size: int
    sha256: str | None
    changed_at: float


class News(NamedTuple):
    """A checkpoint as it comes, or, where there is none, that all there are for now have come.

    Attributes:
        position: In the order in which the coordinator stored those of this hospital.
        line: As the hospital signed it; nothing about it is checked yet.
    """

    hospital: str
    position: int
    line: bytes | None


class ControlConnection:
    """A connection to the control service; a context manager, safe to use from several threads.

    Studies are dictionaries with the fields of ``Study`` in ``control.proto``; ``state`` is in small letters.

    Args:
        access: Where the service is, and with which certificate to call it.

    Raises:
        ConfigError: A file cannot be read.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        credentials = grpc.ssl_channel_credentials(
            _read(access.ca), private_key=_read(access.key), certificate_chain=_read(access.certificate)
        )
        name = [("grpc.ssl_target_name_override", access.server_name)] if access.server_name else []
        self._channel = grpc.secure_channel(access.connect, credentials, options=[*_OPTIONS, *name])
        self._stub = ControlStub(self._channel)
        self._random = random.Random()  # noqa: S311 - of pauses

    def close(self) -> None:
        """Let go of the connection; calls that go on elsewhere end."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def all(self) -> list[dict[str, Any]]:
        """All studies that concern the caller, in the order of their submission.

        Raises:
            FederationError: The caller may not; no connection.
        """
        return [study_fields(study) for study in self._call(self._stub.List, pb.ListRequest()).studies]

    def fetch_evidence(self, study: str, out: Path) -> str:
        """Fetch a study's evidence, a tar of a folder that ``konsil-audit`` reads; goes on with a part that is there.

        Returns:
            Its SHA-256.

        Raises:
            TransferError: It came over with another digest, or cannot be written.
            FederationError: There is no such study; the caller may not; no connection.
        """
        return self._fetch(self._stub.Evidence, pb.FetchRequest(study=study), out)

    def fetch_audit(self, out: Path) -> str:
        """Fetch an export of the coordinator's audit log. Raises as ``fetch_evidence``."""
        return self._fetch(self._stub.Audit, pb.FetchRequest(), out)

    def fetch_roster(self, out: Path) -> str:
        """Fetch the signed roster; whether the consortium signed it, its reader asks. Raises as ``fetch_evidence``."""
        return self._fetch(self._stub.Roster, pb.FetchRequest(), out)

    def deposits(self) -> list[DepositFile]:
        """What hospitals have left at the coordinator, by hospital and then by name.

        Raises:
            FederationError: The caller may not; no connection.
        """
        files = self._call(self._stub.Deposits, pb.DepositsRequest()).files
        return [DepositFile(f.hospital, f.name, f.size, f.sha256 or None, f.changed_at) for f in files]

    def fetch_deposit(self, hospital: str, name: str, out: Path) -> str:
        """Fetch one of these files. Raises as ``fetch_evidence``."""
        return self._fetch(self._stub.FetchDeposit, pb.FetchRequest(hospital=hospital, name=name), out)

    def deposit(self, chunks: Iterable[pb.Chunk], *, timeout_s: float) -> bool:
        """Leave something for auditors, as ``deposit_chunks`` cuts it; stored whole, or not at all.

        Returns:
            Whether it is new there.

        Raises:
            DepositError: It is too large, or comes too often.
            CheckpointError: A checkpoint contradicts an earlier one.
            FederationError: The caller may not; no connection.
        """
        with self._explained():
            return not self._stub.Deposit(iter(chunks), timeout=timeout_s).known

    def checkpoints(
        self, *, patience_s: float = math.inf, lost: Callable[[str], None] = lambda _: None
    ) -> Iterator[News]:
        """All checkpoints that hospitals have left, and then new ones as they come; it does not end by itself.

        Between them, whenever all there are have come, one without a line.

        Args:
            patience_s: How long to try in vain to connect again; what never was connected is not tried again.
            lost: Is told whenever the connection is lost.

        Raises:
            FederationError: The caller may not, or may no longer; no connection for as long as ``patience_s``.
        """
        after: dict[str, int] = {}

        def begin() -> Any:
            return self._stub.Checkpoints(pb.CheckpointsRequest(after=after))

        for message in self._followed(begin, patience_s=patience_s, lost=lost):
            if message.checkpoint:
                after[message.hospital] = message.position
            yield News(message.hospital, message.position, message.checkpoint or None)

    def _followed(self, begin: Callable[[], Any], *, patience_s: float, lost: Callable[[str], None]) -> Iterator[Any]:
        """The messages of a stream, which is begun again whenever the connection is lost."""
        failures, since, connected = 0, time.monotonic(), False
        while True:
            call = begin()
            try:
                for message in call:
                    failures, since, connected = 0, time.monotonic(), True
                    yield message
            except grpc.RpcError as error:
                found = _error(error, self._access.connect)
                gone = not connected or time.monotonic() - since > patience_s
                if error.code() not in _BACK_SOON or gone:
                    raise found from None
                lost(str(found))
                pause = min(0.2 * 2**failures, LONGEST_PAUSE_S)
                time.sleep(self._random.uniform(pause / 2, pause))  # so that many watchers do not come back at once
                failures = min(failures + 1, 10)
            else:
                return
            finally:
                call.cancel()

    def _call(self, method: Any, request: Any) -> Any:
        with self._explained():
            return method(request, timeout=CALL_TIMEOUT_S)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _error(error, self._access.connect) from None

    def _fetch(self, method: Any, request: pb.FetchRequest, out: Path) -> str:
        """Into ``OUT.part``, with the snapshot's name beside it; then renamed, when the digest is right."""
        part, about = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.snapshot")
        try:
            try:
                return self._fetch_from(method, request, out, part, about)
            except TransferError:
                if not part.exists():
                    raise
                part.unlink()  # what is there belongs to another snapshot, or is damaged
                return self._fetch_from(method, request, out, part, about)
        except OSError as error:
            raise TransferError(f"{out} cannot be written: {error.strerror}", hint="Choose another file.") from None

    def _fetch_from(self, method: Any, request: pb.FetchRequest, out: Path, part: Path, about: Path) -> str:
        known = about.read_text("utf-8") if about.exists() and part.exists() else ""
        offset = part.stat().st_size if known else 0
        digest, size, there = hashlib.sha256(), 0, offset
        told: str | None = None
        request = pb.FetchRequest(
            study=request.study, hospital=request.hospital, name=request.name, offset=offset, snapshot=known
        )
        with part.open("r+b" if known else "w+b") as file, self._explained():
            while data := file.read(1 << 20):
                digest.update(data)
            for chunk in method(request, timeout=FETCH_TIMEOUT_S):
                if chunk.HasField("header"):
                    size = chunk.header.size
                    about.write_text(chunk.header.snapshot, encoding="utf-8")
                elif chunk.HasField("footer"):
                    told = chunk.footer.sha256
                else:
                    there += len(chunk.data)
                    if there > size:
                        raise TransferError(f"{out.name} is larger than was said", hint="The other side is broken.")
                    file.write(chunk.data)
                    digest.update(chunk.data)
        if told != digest.hexdigest():
            raise TransferError(
                f"{out.name} came over with the digest {digest.hexdigest()[:16]}…, not {str(told)[:16]}…",
                hint="Fetch it again.",
            )
        part.replace(out)
        about.unlink()
        return digest.hexdigest()


def deposit_chunks(kind: str, content: Iterable[bytes], size: int) -> Iterator[pb.Chunk]:
    """A deposit as it travels.

    Args:
        kind: What it is, ``checkpoint`` or ``bundle``.
        content: Its bytes, in parts of at most a megabyte.
        size: Of all of them.
    """
    digest = hashlib.sha256()
    yield pb.Chunk(header=pb.Header(name=kind, size=size))
    for data in content:
        digest.update(data)
        yield pb.Chunk(data=data)
    yield pb.Chunk(footer=pb.Footer(sha256=digest.hexdigest()))


def study_fields(study: pb.Study) -> dict[str, Any]:
    """A study as a dictionary."""
    fields = to_dict(study)
    return {**fields, "state": fields["state"].removeprefix("STATE_").lower()}


def _error(error: grpc.RpcError, address: str) -> FederationError:
    """What the service said, as the error that it is; or that there is no connection."""
    metadata: Mapping[str, Any] = dict(error.trailing_metadata() or ())
    if ERROR_KEY in metadata:
        told = pb.Error.FromString(metadata[ERROR_KEY])
        return _classes().get(told.code, FederationError)(printable(told.text), hint=printable(told.hint))
    details = error.details() or error.code().name
    return ConnectionLostError(
        f"the control service at {address} does not answer: {details}",
        hint="Is konsil-coordinator start running there? Are ca, certificate and key of its consortium, and valid?",
    )


def _classes() -> dict[str, type[FederationError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FederationError)]
    return {kind.code: kind for kind in reversed(found)}  # the first of a code: the general one


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="Check --ca, --certificate and --key, or operator.toml."
        ) from None
