"""Listening for HTTP: loopback or TLS and a token, brief connections; the same for all that answers requests."""

import asyncio
import ipaddress
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared_models.errors import ConfigError, IdentityError

SHORTEST_TOKEN = 32  # characters
IDLE_S = 20.0  # after which a connection ends where no answer is on its way; browsers make another
LONGEST_S = 120.0
MOST_CONNECTIONS = 200
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for


class Brief(H11Protocol):
    """A connection that ends: neither one that says nothing nor one that says it slowly keeps its place for long.

    Requests have the client's certificate, in DER, as ``request.state.certificate``; None where it showed none.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        shown = None if tls is None else tls.getpeercert(binary_form=True)
        self.app_state = {**self.app_state, "certificate": shown}
        self._ends = [
            self.loop.call_later(IDLE_S, self._end_idle),
            self.loop.call_later(LONGEST_S, transport.abort),
        ]
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        for end in self._ends:
            end.cancel()

    def _end_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def names_loopback(host: str) -> bool:
    """Whether a Host header names this machine; the port may be a tunnel's."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    return is_loopback(name)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    """host:port, as a URL has it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int, *, hint: str) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: The port is in use, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen on {address(host, port)}: {why}", hint=hint) from None


def read_token(path: Path, *, hint: str) -> str:
    """The token that whoever asks has to show.

    Raises:
        IdentityError: The file is missing, open to others, or its first line is too short to be a secret.
    """
    try:
        with path.open("rb") as stream:
            # Asked of the open file, so that it cannot be swapped between the question and the reading.
            mode, line = os.fstat(stream.fileno()).st_mode, stream.readline()
    except OSError as error:
        raise IdentityError(f"the token file {path} cannot be read: {error.strerror}", hint=hint) from None
    if mode & 0o077:
        raise IdentityError(f"the token file {path} is open to others", hint=f"Run: chmod 600 {path}")
    token = line.decode("utf-8", "replace").strip()
    if len(token) < SHORTEST_TOKEN:
        raise IdentityError(f"the token in {path} is shorter than {SHORTEST_TOKEN} characters", hint=hint)
    return token


def brief_server(app: Any, *, tls: tuple[Path, Path] | None, hint: str, clients: Path | None = None) -> uvicorn.Server:
    """A server of brief connections that logs nothing of its own, believes no proxy and says not what it is.

    Guarantees:
        * A client certificate that requests have is of one of ``clients``, or is one of them, and who showed it has its
          key. Whether it is valid now, or revoked, is left to ``app``, which can say so in words.

    Args:
        app: What answers, by ASGI.
        tls: Certificate and key; None speaks plain HTTP.
        hint: What to do where these cannot be used.
        clients: Whose client certificates are asked for; who shows none is served all the same.

    Raises:
        IdentityError: A TLS file cannot be used.
    """
    certificate, key = tls or (None, None)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        http=Brief,
        ws="none",
        timeout_graceful_shutdown=3,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ssl_ca_certs=clients,
        ssl_cert_reqs=ssl.CERT_NONE if clients is None else ssl.CERT_OPTIONAL,
    )
    load_tls(config, hint=hint)
    if config.ssl is not None and clients is not None:
        config.ssl.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    return uvicorn.Server(config)


def load_tls(config: uvicorn.Config, *, hint: str) -> uvicorn.Config:
    """Load a server's configuration; where it has a certificate, with TLS 1.3 as the lowest version.

    Raises:
        IdentityError: A TLS file cannot be used.
    """
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(f"the TLS files cannot be used: {error}", hint=hint) from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return config
