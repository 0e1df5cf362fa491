"""A recording proxy on loopback: it ends a hospital's TLS, dials on as the hospital, and keeps every byte."""

import asyncio
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Sent:
    """One HTTP request of a hospital, as it crossed the socket."""

    path: str
    line: int  # bytes of the request line, of all headers with the empty line, and the body itself
    headers: int
    body: bytes


@dataclass(frozen=True)
class Stream:
    """One call over HTTP/2, as it crossed the socket."""

    data: bytes  # all that its DATA frames hold
    headers: int  # bytes of its HEADERS frames, without what every frame begins with


@dataclass
class RecordingProxy:
    """Listens in a thread of its own while the context is open.

    Args:
        port: Of the coordinator, on loopback.
        coordinator: Folder with the coordinator's ``tls.pem`` and ``tls.key``.
        hospital: Folder with the hospital's.
        ca: The authority.
        http2: Whether both sides speak HTTP/2, as gRPC does.
    """

    port: int
    coordinator: Path
    hospital: Path
    ca: Path
    http2: bool = False
    connections: list[bytearray] = field(default_factory=list)

    def __enter__(self) -> "RecordingProxy":
        self._loop, self._writers = asyncio.new_event_loop(), list[asyncio.StreamWriter]()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _hang_up(self) -> None:
        """Not every client of TLS answers when the other side takes its leave: nobody waits for it."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _listen(self) -> asyncio.Server:
        context = _context(ssl.PROTOCOL_TLS_SERVER, self.coordinator, self.ca, http2=self.http2)
        return await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=context)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = bytearray()
        self.connections.append(kept)
        context = _context(ssl.PROTOCOL_TLS_CLIENT, self.hospital, self.ca, http2=self.http2)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        self._writers += [writer, far_writer]
        await asyncio.gather(_pump(reader, far_writer, kept), _pump(far_reader, writer, bytearray()))

    def requests(self) -> list[Sent]:
        """Every request that was sent, in order within each connection; nothing else may have been sent."""
        return [sent for kept in self.connections for sent in _parse(bytes(kept))]

    def streams(self) -> list[Stream]:
        """Every call over HTTP/2 that was made, in order within each connection."""
        return [stream for kept in self.connections for stream in _streams(bytes(kept))]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    while data := await reader.read(65_536):
        kept += data
        writer.write(data)
        await writer.drain()
    writer.close()


def _context(protocol: int, folder: Path, ca: Path, *, http2: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    if http2:
        context.set_alpn_protocols(["h2"])
    return context


def _parse(data: bytes) -> list[Sent]:
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        line, *headers = head.split(b"\r\n")
        lengths = [int(h.partition(b":")[2]) for h in headers if h.lower().startswith(b"content-length:")]
        (length,) = lengths
        assert len(rest) >= length, "the recording ends in the middle of a request"
        path = line.split(b" ")[1].decode()
        found.append(Sent(path, len(line) + 2, len(head) - len(line) - 2 + 4, rest[:length]))
        data = rest[length:]
    return found


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _CONTINUATION = 0, 1, 9
_PADDED = 8


def _streams(sent: bytes) -> list[Stream]:
    """RFC 9113, section 4.1: length, type, flags, stream; frames of stream 0 are about the connection."""
    assert sent.startswith(_PREFACE), "no HTTP/2"
    data: dict[int, bytes] = {}
    headers: dict[int, int] = {}
    place = len(_PREFACE)
    while place < len(sent):
        length, kind, flags = int.from_bytes(sent[place : place + 3]), sent[place + 3], sent[place + 4]
        stream, body = int.from_bytes(sent[place + 5 : place + 9]), sent[place + 9 : place + 9 + length]
        assert len(body) == length, "the recording ends in the middle of a frame"
        if kind == _DATA:
            assert not flags & _PADDED
            data[stream] = data.get(stream, b"") + body
        elif kind in {_HEADERS, _CONTINUATION}:
            headers[stream] = headers.get(stream, 0) + length
        place += 9 + length
    return [Stream(data.get(stream, b""), size) for stream, size in sorted(headers.items())]
