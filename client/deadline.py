"""A deadline for a whole call over HTTP, kept where all of its bytes pass.

httpx bounds every read and every write by itself. Whoever sends one byte before each of these bounds would hold the
caller for ever.
"""

import math
import ssl
import threading
import time
from collections.abc import Iterable

import httpcore
import httpx

_AT_ONCE = 1 << 14  # bytes; a TLS record, which is written whole or not at all


class _Moment(threading.local):
    """What each thread has to keep to."""

    at, longest_s = math.inf, math.inf


class Deadline:
    """When the call must be over that a thread is making; each thread has its own.

    Args:
        client: Whose connections keep to it from now on, those through a proxy too.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._moment = _Moment()
        for transport in (client._transport, *client._mounts.values()):
            if isinstance(transport, httpx.HTTPTransport):  # httpx hands no backend through
                transport._pool._network_backend = _Bounded(transport._pool._network_backend, self)

    def begin(self, longest_s: float) -> None:
        """All that this thread does on these connections must be over within so many seconds.

        What takes longer raises an httpx error, a ``TimeoutException``, which says so.
        """
        self._moment.at, self._moment.longest_s = time.monotonic() + longest_s, longest_s

    def within(self, timeout: float | None) -> float | None:
        """A bound for one step: its own, or what is left."""
        left = max(self._moment.at - time.monotonic(), 1e-3)  # a socket takes 0 for "do not wait"
        if math.isinf(left):
            return timeout
        return left if timeout is None else min(left, timeout)

    @property
    def passed(self) -> str:
        """Why no step may begin; empty as long as one may."""
        over = time.monotonic() >= self._moment.at
        return f"not over after {self._moment.longest_s:g} s: the line or the other side is too slow" if over else ""


class _Bounded(httpcore.NetworkBackend):
    """Connections that keep to a deadline."""

    def __init__(self, inner: httpcore.NetworkBackend, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """As httpcore has it."""
        within = self._deadline.within(timeout)
        return _Stream(self._inner.connect_tcp(host, port, within, local_address, socket_options), self._deadline)


class _Stream(httpcore.NetworkStream):
    """A connection that keeps to a deadline; the methods are httpcore's."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            if not self._deadline.passed:
                return self._inner.read(max_bytes, self._deadline.within(timeout))
        except httpcore.ReadTimeout:
            if not self._deadline.passed:
                raise
        raise httpcore.ReadTimeout(self._deadline.passed)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _AT_ONCE):
            if why := self._deadline.passed:
                raise httpcore.WriteTimeout(why)
            self._inner.write(buffer[start : start + _AT_ONCE], self._deadline.within(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        within = self._deadline.within(timeout)  # of the whole handshake: Python's ssl sees to that
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, within), self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)
