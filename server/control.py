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
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server import logs
from server.audit import AuditLog
from server.control_events import for_hospital, to_message
from server.deposits import Deposits
from server.roles import Caller, Doorman, Role, check_allowed, takes_part
from server.settings import Control as Limits
from server.studies import Studies, StudyStatus
from server.transfer import Content, audit_content, audit_head, evidence_content, file_content, growing_content
from server.watching import AT_LEAST_EVERY_S, BATCH_BYTES, Watching
from shared_models.control import control_pb2 as pb
from shared_models.control.deposits import CHECKPOINTS
from shared_models.errors import (
    AuditError,
    ConfigError,
    DepositError,
    FederationError,
    MalformedCallError,
    NotAllowedError,
    RosterError,
    StoreError,
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
CANCELLED = "cancelled"  # the code of a call whose caller went away


class TooManyCallsError(MalformedCallError):
    """More calls at a time than the service, or one certificate, may have."""

    code = "too-many-calls"


class EndingError(FederationError):
    """The service is about to end; whoever watches connects again."""

    code = "ending"


class FaultError(FederationError):
    """A fault of this program; its caller hears no more of it."""

    code = "fault"


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
    answer: Callable[[Any, Caller, Any], AsyncGenerator[Message, None]]
    ends: bool = False


@dataclass
class _Visit:
    """A call on its way through the gate.

    Attributes:
        about: What the audit log says of it.
        line: Its line there, once it is admitted.
        written: Whether its end is there.
    """

    name: str
    call: _Call | None
    context: Any
    about: dict[str, Any]
    line: int | None = None
    written: bool = False


class ControlService(grpc.GenericRpcHandler):
    """Serves ``control.proto``, health and reflection; belongs to one event loop.

    Every method is served as a stream of bytes, which on the wire is the same thing: so that no request is waited for
    without end, nor parsed before it is known who sent it, and so that every call has its line in the audit log, the
    malformed ones too.

    Args:
        studies: What it gives access to.
        doorman: Reads certificates.
        audit: Where every call is written down first.
        limits: How much of it anybody gets.
        deposits: Where hospitals leave evidence.
        roster: The signed roster's file.
    """

    def __init__(
        self,
        studies: Studies,
        doorman: Doorman,
        audit: AuditLog,
        limits: Limits,
        *,
        deposits: Deposits,
        roster: Path,
    ) -> None:
        self._studies, self._doorman, self._audit, self._limits = studies, doorman, audit, limits
        self._deposits, self._roster, self._deposited = deposits, roster, asyncio.Event()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="control")
        self._door = ThreadPoolExecutor(1, thread_name_prefix="control-door")  # the doorman is asked one at a time
        self._gate = ThreadPoolExecutor(1, thread_name_prefix="control-gate")  # the audit log's only writer
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
            f"/{SERVICE}/Roster": _Call(pb.FetchRequest, partial(self._fetch, self._signed_roster), ends=True),
            f"/{SERVICE}/Deposit": _Call(pb.Chunk, self._deposit, ends=True),
            f"/{SERVICE}/Deposits": _Call(pb.DepositsRequest, self._list_deposits),
            f"/{SERVICE}/FetchDeposit": _Call(pb.FetchRequest, partial(self._fetch, self._one_deposit), ends=True),
            f"/{SERVICE}/Checkpoints": _Call(pb.CheckpointsRequest, self._checkpoints, ends=True),
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
        self._ring()

    def shutdown(self) -> None:
        """Let go of the threads, once no call goes on."""
        for pool in (self._threads, self._door, self._gate):
            pool.shutdown()

    # the gate

    async def _serve(self, method: str, _requests: Any, context: Any) -> None:
        with logs.request():
            await self._pass(method, context)

    async def _pass(self, method: str, context: Any) -> None:
        name = "/".join(part.rsplit(".", 1)[-1] for part in method.strip("/").split("/"))[:100]
        visit = _Visit(name, self._calls.get(method), context, {"call": name, "peer": context.peer()[:100] or None})
        error: FederationError | None = None
        try:
            try:
                await self._answer(visit)
            except FederationError as known:
                error = known
            except Exception:
                log.exception("%s: a fault of this program", name)
                error = FaultError("a fault of the coordinator's", hint="See its log.")
            await self._ended(visit, error)
        except asyncio.CancelledError:  # the caller has gone, or the service ends
            self._gone(visit)
            raise
        except AuditError as unwritten:  # what cannot be written down is not said either
            log.error("%s (%s)", unwritten, unwritten.hint)  # noqa: TRY400 - no traceback for what is known
            error = unwritten
        if error is not None:
            told = pb.Error(code=error.code, text=str(error)[:LONGEST_TEXT], hint=error.hint[:LONGEST_TEXT])
            await context.abort(_status_of(error), error.code, ((ERROR_KEY, told.SerializeToString()),))

    async def _answer(self, visit: "_Visit") -> None:
        """One call, from the certificate to the last response.

        Raises:
            FederationError: It is refused, or what it asks for fails.
        """
        context, about = visit.context, visit.about
        caller = await self._run(self._identify, context.auth_context(), on=self._door)
        about |= {"caller": caller.name or None, "role": caller.role and str(caller.role), "key": caller.key}
        with self._counted(caller):
            call = _served(visit)
            request = await self._read(call.request, context)
            study = getattr(request, "study", "")
            about["study"] = study[:200] or None
            about["hospital"] = getattr(request, "hospital", "")[:200] or None
            check_allowed(caller, visit.name)
            await self._check_study(caller, study)
            await self._write(self._admit, visit)
            responses = call.answer(request, caller, context)
            try:
                async for response in responses:
                    await context.write(response.SerializeToString())
            finally:
                await responses.aclose()

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

    async def _read(self, kind: type[Message] | None, context: Any) -> Any:
        """The one request of a call.

        Raises:
            MalformedCallError: It does not come in time, is too large, or is no message of its kind.
        """
        if kind is None:
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
            return kind.FromString(raw)
        except DecodeError:
            raise MalformedCallError(
                "the request cannot be read", hint="See shared_models/control/control.proto."
            ) from None

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
        problem = await self._run(self._doorman.problem_with, caller, on=self._door)
        if problem:
            raise NotAllowedError(f"{caller}: {problem}", hint="Ask the coordinator's operators.")
        if self._over.is_set():
            raise EndingError("the coordinator ends", hint="Connect again when it is back.")

    def _admit(self, visit: "_Visit") -> None:
        """In the gate's thread: what is allowed is on the disk before it happens."""
        visit.line = self._audit.append("call", outcome="allowed", **visit.about)

    def _close(self, visit: "_Visit", code: str | None) -> None:
        """In the gate's thread: how a call ended, once; only what has an effect or takes a while has an end."""
        if visit.written:
            return
        visit.written = True
        if visit.line is None:
            self._audit.append("call", outcome="refused", code=code, **visit.about)
        elif visit.call is not None and visit.call.ends:
            outcome = {None: "succeeded", CANCELLED: None}.get(code, "failed")
            self._audit.append("done", of=visit.line, outcome=outcome, code=code)

    async def _ended(self, visit: "_Visit", error: FederationError | None) -> None:
        """Write down how a call ended, before its caller hears of it."""
        if visit.line is None and error is not None:
            log.warning("%s by %s refused: %s", visit.name, visit.about.get("caller"), error)
        await self._write(self._close, visit, error.code if error else None)

    def _gone(self, visit: "_Visit") -> None:
        """Write it down without waiting for it: a call that was cancelled waits for nothing any more."""

        def late() -> None:
            try:
                self._close(visit, CANCELLED)
            except AuditError as error:
                log.error("%s (%s)", error, error.hint)  # noqa: TRY400 - no traceback for what is known

        self._gate.submit(late)

    async def _write(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the gate's thread write; a caller that goes away meanwhile does not stop it."""
        await asyncio.shield(self._run(function, *arguments, on=self._gate))

    async def _run(self, function: Callable[..., Any], *arguments: Any, on: Executor | None = None) -> Any:
        return await asyncio.get_running_loop().run_in_executor(on or self._threads, function, *arguments)

    # the calls

    async def _submit(self, request: pb.SubmitRequest, caller: Caller, _context: Any) -> AsyncGenerator[Message, None]:
        plan = _plan_fields(request)
        status = await self._run(partial(self._studies.submit, plan, by=str(caller)))
        yield _study(status, caller, whole=True)

    async def _list(self, _request: pb.ListRequest, caller: Caller, _context: Any) -> AsyncGenerator[Message, None]:
        found = [status for status in await self._run(self._studies.all) if takes_part(caller, status.row.plan)]
        yield pb.Studies(studies=[_study(status, caller, whole=False) for status in found])

    async def _show(self, request: pb.StudyRequest, caller: Caller, _context: Any) -> AsyncGenerator[Message, None]:
        yield _study(await self._run(self._studies.show, request.study), caller, whole=True)

    async def _order(
        self, order: Callable[[str], StudyStatus], request: pb.StudyRequest, caller: Caller, _context: Any
    ) -> AsyncGenerator[Message, None]:
        yield _study(await self._run(order, request.study), caller, whole=True)

    async def _watch(self, request: pb.WatchRequest, caller: Caller, _context: Any) -> AsyncGenerator[Message, None]:
        told: dict[str, Any] = {}
        async with aclosing(self._watching.follow(request.study, request.after)) as news:
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
    ) -> AsyncGenerator[Message, None]:
        content: Content = await self._run(content_of, request)
        if request.offset > content.size or (request.offset and request.snapshot != content.snapshot):
            raise TransferError("it is not what it was when the transfer began", hint="Begin again, without an offset.")
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

    def _signed_roster(self, _request: pb.FetchRequest) -> Content:
        return file_content(self._roster, "roster.json")

    def _one_deposit(self, request: pb.FetchRequest) -> Content:
        path = self._deposits.path(request.hospital, request.name)
        if path.name == CHECKPOINTS:
            size = self._deposits.size(request.hospital)
            return growing_content(path, f"{request.hospital}.{path.name}", size, request.snapshot)
        return file_content(path, path.name)

    async def _deposit(self, first: pb.Chunk, caller: Caller, context: Any) -> AsyncGenerator[Message, None]:
        kind, size = first.header.name, first.header.size
        most = self._deposits.largest(kind)
        if size > most:
            raise DepositError(
                f"a {kind} of {size} bytes; at most {most} are taken", hint="See the coordinator's limits."
            )
        identity = await self._run(self._doorman.identity, caller, on=self._door)
        parts = self._parts(size, context)
        if kind == "checkpoint":
            line = b"".join([data async for data in parts])
            keep = partial(self._deposits.keep_checkpoint, line, hospital=caller.name, identity=identity)
            try:
                digest, new = hashlib.sha256(line).hexdigest(), await self._run(keep)
            finally:
                self._ring()  # also where it contradicts: it is kept
        else:
            incoming = await self._run(self._deposits.receive, caller.name)
            try:
                async for data in parts:
                    await self._run(incoming.write, data)
                await self._check_still(caller)
                digest, new = await self._run(partial(incoming.keep, identity=identity))
            finally:
                self._threads.submit(incoming.close)  # not waited for: the caller may be gone
        yield pb.Deposited(sha256=digest, known=not new)

    async def _parts(self, size: int, context: Any) -> AsyncGenerator[bytes, None]:
        """What follows a header, until a footer that fits it.

        Raises:
            MalformedCallError: It does not come in time, or is not what header and footer say.
        """
        digest, left = hashlib.sha256(), size
        while True:
            chunk = await self._read(pb.Chunk, context)
            left -= len(chunk.data)
            if left < 0 or not (chunk.data or chunk.HasField("footer")):
                break
            if chunk.HasField("footer"):
                if left or chunk.footer.sha256 != digest.hexdigest():
                    break
                return
            digest.update(chunk.data)
            yield chunk.data
        raise MalformedCallError("what came is not what its header and footer say", hint="Send it again, whole.")

    async def _list_deposits(
        self, _request: pb.DepositsRequest, _caller: Caller, _context: Any
    ) -> AsyncGenerator[Message, None]:
        yield pb.DepositList(files=await self._run(lambda: [_file(*found) for found in self._deposits.files()]))

    async def _checkpoints(
        self, request: pb.CheckpointsRequest, caller: Caller, _context: Any
    ) -> AsyncGenerator[Message, None]:
        after, anything = dict(request.after), True
        while True:
            bell = self._deposited
            await self._check_still(caller)
            for hospital in await self._run(self._deposits.hospitals):
                read = partial(self._deposits.checkpoints, hospital, at_most=BATCH_BYTES)
                while found := await self._run(read, after.get(hospital, 0)):
                    for line, position in found:
                        yield pb.CheckpointNews(hospital=hospital, position=position, checkpoint=line)
                    after[hospital], anything = found[-1][1], True
            if anything:
                yield pb.CheckpointNews()  # that is all for now
            anything = False
            with suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), AT_LEAST_EVERY_S)

    def _ring(self) -> None:
        """Have everybody who follows checkpoints look again."""
        self._deposited.set()
        self._deposited = asyncio.Event()

    async def _health(self, request: Any, _caller: Caller, _context: Any) -> AsyncGenerator[Message, None]:
        if request.service not in {"", SERVICE, HEALTH, REFLECTION}:
            raise UnknownCallError(f"there is no service {request.service[:100]}", hint=f"Ask for {SERVICE}.")
        serving = health_pb2.HealthCheckResponse.NOT_SERVING if self._over.is_set() else _SERVING
        yield health_pb2.HealthCheckResponse(status=serving)

    async def _watch_health(self, request: Any, caller: Caller, context: Any) -> AsyncGenerator[Message, None]:
        async for response in self._health(request, caller, context):
            yield response
        await self._over.wait()
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _reflect(self, _request: None, caller: Caller, context: Any) -> AsyncGenerator[Message, None]:
        async def requests() -> AsyncGenerator[Message, None]:
            for _ in range(1000):  # enough for every tool; each must come in time
                try:
                    yield await self._read(reflection_pb2.ServerReflectionRequest, context)
                except MalformedCallError:
                    return

        async for response in self._reflection.ServerReflectionInfo(requests(), context):
            await self._check_still(caller)
            yield response


_SERVING = health_pb2.HealthCheckResponse.SERVING


def _served(visit: _Visit) -> _Call:
    if visit.call is None:
        raise UnknownCallError(f"there is no call {visit.name}", hint="See shared_models/control/control.proto.")
    return visit.call


# The first that fits; what is not here is a precondition that does not hold.
_STATUS: tuple[tuple[type[FederationError], grpc.StatusCode], ...] = (
    (UnknownCallError, grpc.StatusCode.UNIMPLEMENTED),
    (TooManyCallsError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotAllowedError, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownStudyError, grpc.StatusCode.NOT_FOUND),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (MalformedCallError, grpc.StatusCode.INVALID_ARGUMENT),
    (StoreError, grpc.StatusCode.UNAVAILABLE),
    (AuditError, grpc.StatusCode.UNAVAILABLE),
    (RosterError, grpc.StatusCode.UNAVAILABLE),
    (EndingError, grpc.StatusCode.UNAVAILABLE),
    (FaultError, grpc.StatusCode.INTERNAL),
)


def _status_of(error: FederationError) -> grpc.StatusCode:
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


def _file(hospital: str, path: Path) -> pb.DepositFile:
    found = path.stat()
    sha256 = "" if path.name == CHECKPOINTS else path.stem.removeprefix("bundle-")
    return pb.DepositFile(
        hospital=hospital, name=path.name, size=found.st_size, sha256=sha256, changed_at=found.st_mtime
    )


def _state(status: StudyStatus) -> dict[str, Any]:
    row = status.row
    return {
        "state": str(row.state),
        **({} if row.reason is None else {"reason": row.reason}),
        "rounds_done": row.rounds_done,
        "rounds": row.plan.rounds,
        "queue": status.position,
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
