"""Serving the control service: mutual TLS, limits, and a thread of its own with an event loop in it.

One event loop holds every call, so that hundreds of watchers take no thread each; what waits for a disk or the database
runs in a few.
"""

import asyncio
import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc

from server.audit import AuditLog
from server.control import MAXIMUM_METADATA_BYTES, ControlService
from server.deposits import FOLDER, Deposits
from server.roles import Doorman
from server.settings import Settings
from server.studies import Studies
from shared_models.errors import ConfigError, IdentityError
from shared_models.identity import fingerprint
from shared_models.service import turns
from shared_models.software import software_digest

log = logging.getLogger("konsil.control")

GRACE_S = 2.0


class ControlServer:
    """The control service while it is served; a context manager.

    Guarantees:
        * Whoever has no certificate of the consortium's authority gets a TLS failure and nothing else.
        * A connection that does not finish its handshake, or a call that does not send its request, ends by itself.

    Args:
        settings: The coordinator's.
        studies: What the service gives access to.
        audit: Where its calls are written down.

    Raises:
        ConfigError: The port is in use.
        IdentityError: A TLS file cannot be used.
    """

    def __init__(self, settings: Settings, studies: Studies, audit: AuditLog) -> None:
        self._settings, self._studies, self._audit = settings, studies, audit
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self.address = f"{settings.control.host}:{settings.control.port}"

    def __enter__(self) -> "ControlServer":
        self._audit.append("started", code=software_digest())
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(timeout=10)

    def answers(self) -> bool:
        """Whether its event loop comes round."""
        return turns(self._loop)

    def _run(self) -> None:
        limits = self._settings.control
        deposits = Deposits(self._settings.state / FOLDER, largest=limits.maximum_deposit_bytes)
        service = ControlService(
            self._studies, Doorman(self._settings), self._audit, limits, deposits=deposits, roster=self._settings.roster
        )
        try:
            asyncio.run(self._serve(service))
        except BaseException as error:
            if self._ready.done():
                log.exception("the control service ended")
            else:
                self._ready.set_exception(error)
        finally:
            service.shutdown()  # last: calls that were cut off are still written down

    async def _serve(self, service: ControlService) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        most = 2 * self._settings.control.maximum_calls  # the service counts too, and says so
        server = grpc.aio.server(options=_options(self._settings), maximum_concurrent_rpcs=most)
        server.add_generic_rpc_handlers((service,))
        try:
            port = server.add_secure_port(self.address, _credentials(self._settings))
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigError(
                f"cannot listen on {self.address}",
                hint="The port is in use, or the address is not this machine's: see [control] in the settings.",
            )
        await server.start()
        self._ready.set_result(None)
        await self._over.wait()
        service.close()
        await server.stop(GRACE_S)


def _options(settings: Settings) -> list[tuple[str, Any]]:
    limits = settings.control
    return [
        ("grpc.so_reuseport", 0),  # a port in use is an error
        ("grpc.max_receive_message_length", limits.maximum_message_bytes),
        ("grpc.max_metadata_size", MAXIMUM_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAXIMUM_METADATA_BYTES),
        ("grpc.max_concurrent_streams", limits.maximum_calls_per_certificate + 16),
        ("grpc.max_allowed_incoming_connections", limits.maximum_connections),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.max_connection_idle_ms", 600_000),
    ]


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    pair = (_read(settings.tls.key), _read(settings.tls.certificate))
    return grpc.ssl_server_credentials([pair], root_certificates=_read(settings.tls.ca), require_client_auth=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}", hint="Check [tls] in the settings.") from None


def described(server: ControlServer, audit: AuditLog) -> str:
    """Where the service listens, and by which key its audit log is known."""
    return f"control service on {server.address}; audit key {fingerprint(audit.public_key)}"
