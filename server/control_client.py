"""Calling a coordinator's control service, from wherever there is a certificate for it."""

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc

from server import control_pb2 as pb
from server.control_events import from_message, to_dict
from server.control_pb2_grpc import ControlStub
from server.settings import Operator
from shared_models import errors
from shared_models.errors import ConfigError, ConnectionLostError, FederationError, TransferError

ERROR_KEY = "konsil-error-bin"
CALL_TIMEOUT_S = 30.0
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
]

Answer = TypeVar("Answer")


class ControlClient:
    """A connection to the control service; a context manager, safe to use from several threads.

    Studies are dictionaries with the fields of ``Study`` in ``control.proto``; ``state`` is in small letters.

    Args:
        operator: Where the service is, and with which certificate to call it.

    Raises:
        ConfigError: A file cannot be read.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        credentials = grpc.ssl_channel_credentials(
            _read(operator.ca), private_key=_read(operator.key), certificate_chain=_read(operator.certificate)
        )
        name = [("grpc.ssl_target_name_override", operator.server_name)] if operator.server_name else []
        self._channel = grpc.secure_channel(operator.connect, credentials, options=[*_OPTIONS, *name])
        self._stub = ControlStub(self._channel)
        self._random = random.Random()  # noqa: S311 - of pauses

    def close(self) -> None:
        """Let go of the connection; calls that go on elsewhere end."""
        self._channel.close()

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, plan: str) -> dict[str, Any]:
        """Submit a plan, TOML or canonical JSON; the same plan again changes nothing.

        Raises:
            ConfigError: The plan is invalid, every error at once.
            FederationError: It could never run; there is another study of this name; the caller may not; no connection.
        """
        request = pb.SubmitRequest(json=plan) if plan.lstrip().startswith("{") else pb.SubmitRequest(toml=plan)
        return self._study(self._stub.Submit, request)

    def all(self) -> list[dict[str, Any]]:
        """All studies that concern the caller, in the order of their submission.

        Raises:
            FederationError: The caller may not; no connection.
        """
        return [_as_dict(study) for study in self._call(self._stub.List, pb.ListRequest()).studies]

    def show(self, study: str) -> dict[str, Any]:
        """One study, with its plan.

        Raises:
            UnknownStudyError: There is none of this name.
            FederationError: The caller may not; no connection.
        """
        return self._study(self._stub.Show, pb.StudyRequest(study=study))

    def pause(self, study: str) -> dict[str, Any]:
        """Pause a study after the round at hand.

        Raises:
            UnknownStudyError, StudyStateError: There is none, or it is over.
            FederationError: The caller may not; no connection.
        """
        return self._study(self._stub.Pause, pb.StudyRequest(study=study))

    def resume(self, study: str) -> dict[str, Any]:
        """Go on with a paused study. Raises as ``pause``."""
        return self._study(self._stub.Resume, pb.StudyRequest(study=study))

    def stop(self, study: str) -> dict[str, Any]:
        """End a study for good. Raises as ``pause``."""
        return self._study(self._stub.Stop, pb.StudyRequest(study=study))

    def watch(
        self, study: str, after: int = 0, *, patience_s: float = math.inf, lost: Callable[[str], None] = lambda _: None
    ) -> Iterator[dict[str, Any]]:
        """A study's events after a position, as the journal has them, until it is over.

        Every event has ``study`` and ``position`` too. Events called ``state`` come first, and whenever the study's
        state changes: ``state``, ``reason``, ``rounds_done``, ``rounds``, ``queue``. When the connection is lost, it is
        made again, and nothing is missed or said twice but ``state``.

        Args:
            study: Its name.
            after: The position of the last event that is known.
            patience_s: How long to try in vain to connect again; what never was connected is not tried again.
            lost: Is told whenever the connection is lost.

        Raises:
            UnknownStudyError: There is none of this name.
            FederationError: The caller may not, or may no longer; no connection for as long as ``patience_s``.
        """
        failures, since, connected = 0, time.monotonic(), False
        while True:
            call = self._stub.Watch(pb.WatchRequest(study=study, after=after))
            try:
                for message in call:
                    failures, since, after, connected = 0, time.monotonic(), message.position, True
                    yield from_message(message)
            except grpc.RpcError as error:
                found = _error(error, self._operator.connect)
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

    def fetch_model(self, study: str, out: Path) -> str:
        """Fetch a finished study's model; a part that is there already is gone on with. Returns its SHA-256.

        Raises:
            TransferError: It came over with another digest, or cannot be written.
            StudyStateError: The study is not finished.
            FederationError: The caller may not; no connection.
        """
        return self._fetch(self._stub.Model, study, out)

    def fetch_evidence(self, study: str, out: Path) -> str:
        """Fetch a study's evidence, a tar of a folder that ``konsil-audit`` reads. Raises as ``fetch_model``."""
        return self._fetch(self._stub.Evidence, study, out)

    def fetch_audit(self, out: Path) -> str:
        """Fetch an export of the coordinator's audit log. Raises as ``fetch_model``."""
        return self._fetch(self._stub.Audit, "", out)

    def _study(self, method: Any, request: Any) -> dict[str, Any]:
        return _as_dict(self._call(method, request))

    def _call(self, method: Any, request: Any) -> Any:
        with self._explained():
            return method(request, timeout=CALL_TIMEOUT_S)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _error(error, self._operator.connect) from None

    def _fetch(self, method: Any, study: str, out: Path) -> str:
        """Into ``OUT.part``, with the snapshot's name beside it; then renamed, when the digest is right."""
        part, about = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.snapshot")
        try:
            try:
                return self._fetch_from(method, study, out, part, about)
            except TransferError:
                if not part.exists():
                    raise
                part.unlink()  # what is there belongs to another snapshot, or is damaged
                return self._fetch_from(method, study, out, part, about)
        except OSError as error:
            raise TransferError(f"{out} cannot be written: {error.strerror}", hint="Choose another file.") from None

    def _fetch_from(self, method: Any, study: str, out: Path, part: Path, about: Path) -> str:
        known = about.read_text("utf-8") if about.exists() and part.exists() else ""
        offset = part.stat().st_size if known else 0
        digest = hashlib.sha256()
        told: str | None = None
        with part.open("r+b" if known else "w+b") as file, self._explained():
            while data := file.read(1 << 20):
                digest.update(data)
            for chunk in method(pb.FetchRequest(study=study, offset=offset, snapshot=known)):
                if chunk.HasField("header"):
                    about.write_text(chunk.header.snapshot, encoding="utf-8")
                elif chunk.HasField("footer"):
                    told = chunk.footer.sha256
                else:
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


def _as_dict(study: pb.Study) -> dict[str, Any]:
    fields = to_dict(study)
    return {**fields, "state": fields["state"].removeprefix("STATE_").lower()}


def _error(error: grpc.RpcError, address: str) -> FederationError:
    """What the service said, as the error that it is; or that there is no connection."""
    metadata: Mapping[str, Any] = dict(error.trailing_metadata() or ())
    if ERROR_KEY in metadata:
        told = pb.Error.FromString(metadata[ERROR_KEY])
        return _classes().get(told.code, FederationError)(told.text, hint=told.hint)
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
