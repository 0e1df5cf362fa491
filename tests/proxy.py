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


@dataclass
class RecordingProxy:
    """Listens in a thread of its own while the context is open.

    Args:
        port: Of the coordinator, on loopback.
        coordinator: Folder with the coordinator's ``tls.pem`` and ``tls.key``.
        hospital: Folder with the hospital's.
        ca: The authority.
    """

    port: int
    coordinator: Path
    hospital: Path
    ca: Path
    connections: list[bytearray] = field(default_factory=list)

    def __enter__(self) -> "RecordingProxy":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        context = _context(ssl.PROTOCOL_TLS_SERVER, self.coordinator, self.ca)
        return await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=context)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = bytearray()
        self.connections.append(kept)
        context = _context(ssl.PROTOCOL_TLS_CLIENT, self.hospital, self.ca)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        await asyncio.gather(_pump(reader, far_writer, kept), _pump(far_reader, writer, bytearray()))

    def requests(self) -> list[Sent]:
        """Every request that was sent, in order within each connection; nothing else may have been sent."""
        return [sent for kept in self.connections for sent in _parse(bytes(kept))]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    while data := await reader.read(65_536):
        kept += data
        writer.write(data)
        await writer.drain()
    writer.close()


def _context(protocol: int, folder: Path, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
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
