"""The control service: every call goes through one gate, and then to the studies.

The gate, in this order: who is calling, by the certificate; the request, within its size and time; may this role make
this call, of this study; the audit log, on the disk; only then the effect.
"""

import asyncio
import hashlib
import json
import logging
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server import control_pb2 as pb
from server.audit import AuditLog
from server.control_events import for_hospital, to_message
from server.roles import Caller, Doorman, Role, check_allowed, takes_part
from server.settings import Control as Limits
from server.studies import Studies, StudyStatus
from server.transfer import Content, audit_content, audit_head, evidence_content, file_content
from server.watching import Watching
from shared_models.errors import (
    AuditError,
    ConfigError,
    FederationError,
    IdentityError,
    MalformedCallError,
    NotAllowedError,
    RosterError,
    StoreError,
    StudyStateError,
    TransferError,
    UnknownStudyError,
)

log = logging.getLogger("konsil.control")

SERVICE = pb.DESCRIPTOR.services_by_name["Control"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
ERROR_KEY = "konsil-error-bin"
MAXIMUM_METADATA_BYTES = 65_536
LONGEST_TEXT = 16_384  # of an error: a plan with very many mistakes
THREADS = 8

_STATUS: tuple[tuple[type[FederationError], grpc.StatusCode], ...] = (
    (NotAllowedError, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownStudyError, grpc.StatusCode.NOT_FOUND),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (MalformedCallError, grpc.StatusCode.INVALID_ARGUMENT),
    (StoreError, grpc.StatusCode.UNAVAILABLE),
    (AuditError, grpc.StatusCode.UNAVAILABLE),
    (RosterError, grpc.StatusCode.UNAVAILABLE),
    (IdentityError, grpc.StatusCode.UNAUTHENTICATED),
    (TransferError, grpc.StatusCode.FAILED_PRECONDITION),
)


class TooManyCallsError(MalformedCallError):
    """More calls at a time than the service, or one certificate, may have."""

    code = "too-many-calls"


class EndingError(FederationError):
    """The service is about to end; whoever watches connects again."""

    code = "ending"


class UnknownCallError(NotAllowedError):
    """A method that is not served."""

    code = "unknown-call"


@dataclass(frozen=True)
class _Call:
    """One method.

    Attributes:
        request: Class of its request; None where the method reads a stream of its own.
        answer: Takes request, caller and the call's context; gives the responses.
        ends: Whether the audit log also says how it ended: what has an effect, or takes a while.
    """

    request: type[Message] | None
    answer: Callable[[Any, Caller, Any], AsyncIterator[Message]]
    ends: bool = False


class ControlService(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """Serves ``control.proto``, health and reflection; belongs to one event loop.

    Every method is served as a stream of bytes, which on the wire is the same thing: so that no request is waited for
    without end, nor parsed before it is known who sent it, and so that every call has its line in the audit log, the
    malformed ones too.

    Args:
        studies: What it gives access to.
        doorman: Reads certificates.
        audit: Where every call is written down first.
        limits: How much of it anybody gets.
    """

    def __init__(self, studies: Studies, doorman: Doorman, audit: AuditLog, limits: Limits) -> None:
        self._studies, self._doorman, self._audit, self._limits = studies, doorman, audit, limits
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="control")
        self._gate = ThreadPoolExecutor(1, thread_name_prefix="control-gate")  # roster and audit log: one at a time
        self._watching = Watching(studies, self._run)
        self._going_on = Counter[str]()
        self._over = asyncio.Event()
        self._reflection = reflection.aio.ReflectionServicer([SERVICE, HEALTH, REFLECTION])
        self._calls: Mapping[str, _Call] = {
            f"/{SERVICE}/Submit": _Call(pb.SubmitRequest, self._submit, ends=True),
            f"/{SERVICE}/List": _Call(pb.ListRequest, self._list),
            f"/{SERVICE}/Show": _Call(pb.StudyRequest, self._show),
            f"/{SERVICE}/Watch": _Call(pb.WatchRequest, self._watch, ends=True),
            f"/{SERVICE}/Pause": _Call(pb.StudyRequest, partial(self._order, studies.pause), ends=True),
            f"/{SERVICE}/Resume": _Call(pb.StudyRequest, partial(self._order, studies.resume), ends=True),
            f"/{SERVICE}/Stop": _Call(pb.StudyRequest, partial(self._order, studies.stop), ends=True),
            f"/{SERVICE}/Model": _Call(pb.FetchRequest, partial(self._fetch, self._model), ends=True),
            f"/{SERVICE}/Evidence": _Call(pb.FetchRequest, partial(self._fetch, self._evidence), ends=True),
            f"/{SERVICE}/Audit": _Call(pb.FetchRequest, partial(self._fetch, self._audit_log), ends=True),
            f"/{HEALTH}/Check": _Call(health_pb2.HealthCheckRequest, self._health),
            f"/{HEALTH}/Watch": _Call(health_pb2.HealthCheckRequest, self._watch_health, ends=True),
            f"/{REFLECTION}/ServerReflectionInfo": _Call(None, self._reflect, ends=True),
        }

    def service(self, details: Any) -> Any:
        """What serves a method: always the gate; it also refuses methods that there are not."""
        return grpc.stream_stream_rpc_method_handler(partial(self._serve, details.method))

    def close(self) -> None:
        """End the calls that go on by themselves; their callers are told to come back."""
        self._over.set()
        self._watching.wake()

    def shutdown(self) -> None:
        """Let go of the threads, once no call goes on."""
        self._threads.shutdown()
        self._gate.shutdown()

    # the gate

    async def _serve(self, method: str, _requests: Any, context: Any) -> None:
        name = "/".join(part.rsplit(".", 1)[-1] for part in method.strip("/").split("/"))[:100]
        about: dict[str, Any] = {"call": name, "peer": context.peer()[:100] or None}
        admitted: int | None = None
        call = self._calls.get(method)
        try:
            try:
                caller = await self._run(self._identify, context.auth_context(), on=self._gate)
                about |= {"caller": caller.name or None, "role": caller.role and str(caller.role), "key": caller.key}
                with self._counted(caller):
                    if call is None:
                        raise UnknownCallError(f"there is no call {name}", hint="See server/control.proto.")
                    request = await self._read(call, context)
                    study = getattr(request, "study", "")
                    about |= {"study": study[:200] or None} if isinstance(study, str) else {}
                    check_allowed(caller, name)
                    await self._check_study(caller, study)
                    admitted = await self._write("call", outcome="allowed", **about)
                    async with aclosing(call.answer(request, caller, context)) as responses:  # type: ignore[type-var]
                        async for response in responses:
                            await context.write(response.SerializeToString())
            except FederationError as error:
                code, text, hint = error.code, str(error), error.hint
                status = _status_of(error)
            except Exception:
                log.exception("%s: a fault of this program", name)
                code, text, hint = "fault", "a fault of the coordinator's", "See its log."
                status = grpc.StatusCode.INTERNAL
            else:
                await self._ended(call, admitted, "succeeded", None)
                return
            if admitted is None:
                await self._write("call", outcome="refused", code=code, **about)
                log.warning("%s by %s refused: %s", name, about.get("caller"), text)
            else:
                await self._ended(call, admitted, "failed", code)
        except asyncio.CancelledError:  # the caller has gone, or the service ends
            self._gone(call, admitted, about)
            raise
        except AuditError as error:  # what cannot be written down is not said either
            log.error("%s (%s)", error, error.hint)  # noqa: TRY400 - no traceback for what is known
            status, code, text, hint = grpc.StatusCode.UNAVAILABLE, error.code, str(error), error.hint
        told = pb.Error(code=code, text=text[:LONGEST_TEXT], hint=hint[:LONGEST_TEXT])
        await context.abort(status, code, ((ERROR_KEY, told.SerializeToString()),))

    def _identify(self, auth: Mapping[str, list[bytes]]) -> Caller:
        (certificate,) = auth.get("x509_pem_cert", [b""])
        if auth.get("ssl_tls_version") != [b"TLSv1.3"]:
            name = b"".join(auth.get("x509_common_name", [])).decode("utf-8", "replace")[:100]
            raise NotAllowedError(f"{name} called over an old version of TLS", hint="Use TLS 1.3.")
        return self._doorman.identify(certificate)

    @contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        """Count the calls that go on, of all and of each key.

        Raises:
            TooManyCallsError: This is one too many.
        """
        if (
            self._going_on.total() >= self._limits.maximum_calls
            or self._going_on[caller.key] >= self._limits.maximum_calls_per_certificate
        ):
            raise TooManyCallsError("too many calls go on at a time", hint="End some, or try again later.")
        self._going_on[caller.key] += 1
        try:
            yield
        finally:
            self._going_on[caller.key] -= 1
            self._going_on += Counter()  # forget keys at zero

    async def _read(self, call: _Call, context: Any) -> Any:
        """The one request of a call.

        Raises:
            MalformedCallError: It does not come in time, is too large, or is no message of its kind.
        """
        if call.request is None:
            return None
        try:
            raw = await asyncio.wait_for(context.read(), self._limits.request_timeout_s)
        except TimeoutError:
            raise MalformedCallError(
                f"no request came within {self._limits.request_timeout_s:g} s", hint="Send it whole, at once."
            ) from None
        if raw is grpc.aio.EOF:
            most = self._limits.maximum_message_bytes
            raise MalformedCallError(f"there was no request, or one above {most} bytes", hint="Send one message.")
        try:
            return call.request.FromString(raw)
        except DecodeError:
            raise MalformedCallError("the request cannot be read", hint="See server/control.proto.") from None

    async def _check_study(self, caller: Caller, study: Any) -> None:
        """Whether a study concerns a caller; to a hospital that is not part of it, it is as if it was not there."""
        if caller.role is not Role.HOSPITAL or not study:
            return
        row = (await self._run(self._studies.show, study)).row
        if not takes_part(caller, row.plan):
            raise UnknownStudyError(f"there is no study {study}", hint="See konsil-coordinator list.")

    async def _check_still(self, caller: Caller) -> None:
        """Whether a certificate that was good when a call began still is.

        Raises:
            NotAllowedError, EndingError: It is not; or the service ends.
        """
        problem = await self._run(self._doorman.problem_with, caller, on=self._gate)
        if problem:
            raise NotAllowedError(f"{caller}: {problem}", hint="Ask the coordinator's operators.")
        if self._over.is_set():
            raise EndingError("the coordinator ends", hint="Connect again when it is back.")

    async def _write(self, kind: Any, **fields: Any) -> int:
        return int(await self._run(partial(self._audit.append, kind, **fields), on=self._gate))

    async def _ended(self, call: _Call | None, admitted: int | None, outcome: str, code: str | None) -> None:
        if call is not None and call.ends and admitted is not None:
            await self._write("done", of=admitted, outcome=outcome, code=code)

    def _gone(self, call: _Call | None, admitted: int | None, about: Mapping[str, Any]) -> None:
        """Have it written down without waiting for it: a call that was cancelled waits for nothing any more."""
        if admitted is None:
            fields = {**about, "outcome": "refused", "code": "cancelled"}
            self._gate.submit(self._append_late, "call", fields)
        elif call is not None and call.ends:
            self._gate.submit(self._append_late, "done", {"of": admitted, "outcome": "failed", "code": "cancelled"})

    def _append_late(self, kind: Any, fields: Mapping[str, Any]) -> None:
        try:
            self._audit.append(kind, **fields)
        except AuditError as error:
            log.error("%s (%s)", error, error.hint)  # noqa: TRY400 - no traceback for what is known

    async def _run(self, function: Callable[..., Any], *arguments: Any, on: Executor | None = None) -> Any:
        return await asyncio.get_running_loop().run_in_executor(on or self._threads, function, *arguments)

    # the calls

    async def _submit(self, request: pb.SubmitRequest, caller: Caller, _context: Any) -> AsyncIterator[Message]:
        plan = _plan_fields(request)
        status = await self._run(partial(self._studies.submit, plan, by=str(caller)))
        yield _study(status, caller, whole=True)

    async def _list(self, _request: pb.ListRequest, caller: Caller, _context: Any) -> AsyncIterator[Message]:
        found = [status for status in await self._run(self._studies.all) if takes_part(caller, status.row.plan)]
        yield pb.Studies(studies=[_study(status, caller, whole=False) for status in found])

    async def _show(self, request: pb.StudyRequest, caller: Caller, _context: Any) -> AsyncIterator[Message]:
        yield _study(await self._run(self._studies.show, request.study), caller, whole=True)

    async def _order(
        self, order: Callable[[str], StudyStatus], request: pb.StudyRequest, caller: Caller, _context: Any
    ) -> AsyncIterator[Message]:
        yield _study(await self._run(order, request.study), caller, whole=True)

    async def _watch(self, request: pb.WatchRequest, caller: Caller, _context: Any) -> AsyncIterator[Message]:
        told: dict[str, Any] = {}
        async with aclosing(self._watching.follow(request.study, request.after)) as news:  # type: ignore[type-var]
            async for events, place, status in news:
                await self._check_still(caller)
                state = _state(status)
                for event, position in events:
                    heard = for_hospital(event, caller.name) if caller.role is Role.HOSPITAL else event
                    if heard is not None:
                        yield to_message(request.study, position, heard)
                if state != told:
                    told = state
                    event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": "state", **state}
                    heard = for_hospital(event, caller.name) if caller.role is Role.HOSPITAL else event
                    yield to_message(request.study, place, heard or {})

    async def _fetch(
        self,
        content_of: Callable[[pb.FetchRequest], Content],
        request: pb.FetchRequest,
        caller: Caller,
        _context: Any,
    ) -> AsyncIterator[Message]:
        content: Content = await self._run(content_of, request)
        if request.offset > content.size or (request.offset and request.snapshot != content.snapshot):
            raise TransferError(
                "it is not what it was when the transfer began", hint="Begin again, without an offset."
            )
        yield pb.Chunk(header=pb.Header(name=content.name, size=content.size, snapshot=content.snapshot))
        digest = hashlib.sha256()
        chunks = content.chunks(request.offset, digest)
        try:
            while (data := await self._run(next, chunks, None)) is not None:
                await self._check_still(caller)
                if data:
                    yield pb.Chunk(data=data)
        finally:
            chunks.close()  # type: ignore[attr-defined]  # a generator's
        yield pb.Chunk(footer=pb.Footer(sha256=digest.hexdigest()))

    def _model(self, request: pb.FetchRequest) -> Content:
        return file_content(self._studies.model(request.study), f"{request.study}.safetensors")

    def _evidence(self, request: pb.FetchRequest) -> Content:
        return evidence_content(request.study, self._studies.show(request.study).row.folder, request.snapshot)

    def _audit_log(self, request: pb.FetchRequest) -> Content:
        size, head = self._audit.export()
        if request.snapshot:
            size, head = audit_head(request.snapshot, size)
            if not self._audit.owns(head):
                raise TransferError("this is no snapshot of the audit log", hint="Begin again, without an offset.")
        return audit_content(self._audit.path, size, head)

    async def _health(self, request: Any, _caller: Caller, _context: Any) -> AsyncIterator[Message]:
        if request.service not in {"", SERVICE, HEALTH, REFLECTION}:
            raise UnknownCallError(f"there is no service {request.service[:100]}", hint=f"Ask for {SERVICE}.")
        serving = health_pb2.HealthCheckResponse.NOT_SERVING if self._over.is_set() else _SERVING
        yield health_pb2.HealthCheckResponse(status=serving)

    async def _watch_health(self, request: Any, caller: Caller, context: Any) -> AsyncIterator[Message]:
        async for response in self._health(request, caller, context):
            yield response
        await self._over.wait()
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _reflect(self, _request: None, caller: Caller, context: Any) -> AsyncIterator[Message]:
        call = _Call(reflection_pb2.ServerReflectionRequest, self._reflect)

        async def requests() -> AsyncIterator[Message]:
            for _ in range(1000):  # enough for every tool; each must come in time
                try:
                    yield await self._read(call, context)
                except MalformedCallError:
                    return

        async for response in self._reflection.ServerReflectionInfo(requests(), context):
            await self._check_still(caller)
            yield response


_SERVING = health_pb2.HealthCheckResponse.SERVING


def _status_of(error: FederationError) -> grpc.StatusCode:
    if isinstance(error, UnknownCallError):
        return grpc.StatusCode.UNIMPLEMENTED
    if isinstance(error, TooManyCallsError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, EndingError):
        return grpc.StatusCode.UNAVAILABLE
    return next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.FAILED_PRECONDITION)


def _plan_fields(request: pb.SubmitRequest) -> dict[str, Any]:
    """A plan's fields, from either notation.

    Raises:
        ConfigError: It is neither TOML nor a JSON object.
    """
    kind = request.WhichOneof("plan")
    try:
        fields = tomllib.loads(request.toml) if kind == "toml" else json.loads(request.json)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the submitted plan cannot be read: {error}", hint="It must be TOML, or JSON.") from None
    if not isinstance(fields, dict):
        raise ConfigError("the submitted plan is no table of keys", hint="See docs/plan.md.")
    return fields


def _state(status: StudyStatus) -> dict[str, Any]:
    row = status.row
    return {
        "state": str(row.state),
        **({} if row.reason is None else {"reason": row.reason}),
        "rounds_done": row.rounds_done,
        "rounds": row.plan.rounds,
        "position": status.position,
    }


def _study(status: StudyStatus, caller: Caller, *, whole: bool) -> pb.Study:
    """A study as a caller sees it; reasons name hospitals, so other hospitals do not see them."""
    row = status.row
    return pb.Study(
        number=row.number,
        name=row.name,
        state=pb.State.Value(f"STATE_{row.state.name}"),
        wish=str(row.wish),
        reason=None if caller.role is Role.HOSPITAL else row.reason,
        rounds_done=row.rounds_done,
        rounds=row.plan.rounds,
        position=status.position,
        submitted_by=row.submitted_by,
        submitted_at=row.submitted_at,
        changed_at=row.changed_at,
        plan_digest=row.plan.digest(),
        task=row.plan.task,
        plan=row.plan.canonical().decode() if whole else None,
    )
