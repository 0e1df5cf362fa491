"""Bad networks: each hospital in a network namespace of its own, behind a link that can be cut, slow, lossy or far.

Real devices of the kernel: a veth pair per hospital, ``tbf`` for its rate, nftables' ``numgen`` for loss, the link's
own state for cuts. Distance is a relay in this process, because kernels often lack ``netem``.
"""

import asyncio
import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
TABLE, PREFIX, DEVICE = "konsil", "konsil-test-", "kon"


def why_not() -> str | None:
    """Why this machine cannot make networks; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "nft") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt install iproute2 nftables)"
    try:
        _run("ip", "netns", "add", f"probe-{os.getpid()}")
        _run("ip", "netns", "del", f"probe-{os.getpid()}")
    except subprocess.CalledProcessError:
        return "this machine permits no network namespaces"
    return None


def enter(namespace: str) -> None:
    """Move this process, which has one thread, into a namespace."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(descriptor)


class Relay:
    """Passes bytes on to a port of loopback, late or not to the end.

    Attributes:
        address: Where it listens.
        delay_s: Added to everything that passes, each way.
        breaks: By direction, "up" to the coordinator or "down": after how many bytes each of the next connections that
            carry so many dies. Then all live.
        passed: Bytes that have passed, by direction.
    """

    def __init__(
        self, host: str, port: int, loop: asyncio.AbstractEventLoop, breaks: Mapping[str, list[int]] | None = None
    ) -> None:
        self.delay_s, self.passed = 0.0, {"up": 0, "down": 0}
        self.breaks = {"up": [], "down": [], **(breaks or {})}
        self._port, self._loop = port, loop
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = 0
        self._server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._connected, host, 0), loop).result()
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Hang up."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    async def _close(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        while self._open:  # every connection ends by itself once its sockets are gone
            await asyncio.sleep(0.01)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self._writers.add(writer)
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            both = {writer, back}
            self._writers |= both
            await asyncio.gather(self._pass(reader, back, "up", both), self._pass(there, writer, "down", both))
            self._writers -= both
        self._writers.discard(writer)
        writer.close()
        self._open -= 1

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str, both: set[asyncio.StreamWriter]
    ) -> None:
        carried = 0
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                carried += len(data)
                self.passed[way] += len(data)
                if self.breaks[way] and carried > self.breaks[way][0]:
                    self.breaks[way].pop(0)
                    for end in both:
                        end.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


class Link:
    """The way from one hospital to the coordinator.

    Attributes:
        address: What the hospital dials.
        namespace: Where it must run.
    """

    def __init__(self, number: int, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.namespace, self._device = f"{PREFIX}{number}", f"{DEVICE}{number}"
        self.host = f"10.77.{number}.1"
        inner = f"{self._device}i"
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "link", "add", self._device, "type", "veth", "peer", "name", inner, "netns", self.namespace)
        _run("ip", "addr", "add", f"{self.host}/30", "dev", self._device)
        _run("ip", "link", "set", self._device, "up")
        _run("ip", "-n", self.namespace, "addr", "add", f"10.77.{number}.2/30", "dev", inner)
        _run("ip", "-n", self.namespace, "link", "set", inner, "up")
        self._relay = Relay(self.host, port, loop)
        self.address = self._relay.address

    def close(self) -> None:
        """Take it down."""
        self._relay.close()
        _run("ip", "link", "del", self._device)
        _run("ip", "netns", "del", self.namespace)

    def cut(self) -> None:
        """Nothing passes, and nobody is told."""
        _run("ip", "link", "set", self._device, "down")

    def slow(self) -> None:
        """1 Mbit/s towards the hospital and from it."""
        shape = ("root", "tbf", "rate", "1mbit", "burst", "32kbit", "latency", "400ms")
        _run("tc", "qdisc", "add", "dev", self._device, *shape)
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "add", "dev", f"{self._device}i", *shape)

    def lose(self) -> None:
        """5 % of the packets towards the hospital are lost."""
        _run("nft", "add", "table", "inet", f"{TABLE}-{self._device}")
        chain = "{ type filter hook output priority 0 ; }"
        _run("nft", "add", "chain", "inet", f"{TABLE}-{self._device}", "out", chain)
        rule = ("oifname", self._device, "numgen", "random", "mod", "100", "<", "5", "drop")
        _run("nft", "add", "rule", "inet", f"{TABLE}-{self._device}", "out", *rule)

    def move_away(self) -> None:
        """As far away that a message takes a fifth of a second."""
        self._relay.delay_s = 0.2

    def mend(self) -> None:
        """All is well again."""
        self._relay.delay_s = 0.0
        _run("ip", "link", "set", self._device, "up")
        for command in (
            ("tc", "qdisc", "del", "dev", self._device, "root"),
            ("ip", "netns", "exec", self.namespace, "tc", "qdisc", "del", "dev", f"{self._device}i", "root"),
            ("nft", "delete", "table", "inet", f"{TABLE}-{self._device}"),
        ):
            subprocess.run(command, check=False, capture_output=True)  # what was not broken needs no mending


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Network:
    """Links of several hospitals to a coordinator on loopback; a context manager."""

    def __init__(self, names: Sequence[str], port: int) -> None:
        self._names, self._port = names, port
        self._over = ExitStack()
        self.links: dict[str, Link] = {}

    def __enter__(self) -> dict[str, Link]:
        with ExitStack() as over:
            loop = over.enter_context(running_loop())
            for number, name in enumerate(self._names, start=1):
                _clear(number)
                self.links[name] = link = Link(number, self._port, loop)
                over.callback(link.close)
                over.callback(link.mend)
            self._over = over.pop_all()
        return self.links

    def __exit__(self, *_: object) -> None:
        self._over.close()


def _clear(number: int) -> None:
    """Remove what a run that was killed has left; two runs at a time would use the same addresses anyway."""
    for command in (("ip", "link", "del", f"{DEVICE}{number}"), ("ip", "netns", "del", f"{PREFIX}{number}")):
        subprocess.run(command, check=False, capture_output=True)  # mostly there is nothing


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
