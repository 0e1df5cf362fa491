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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
TABLE = "konsil"


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


class Link:
    """The way from one hospital to the coordinator.

    Attributes:
        address: What the hospital dials.
        namespace: Where it must run.
        delay_s: Added to everything that passes, each way.
    """

    def __init__(self, number: int, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.namespace, self._device = f"konsil-{os.getpid()}-{number}", f"kon{number}"
        self.host, self.delay_s = f"10.77.{number}.1", 0.0
        self._port, self._loop = port, loop
        self._writers: set[asyncio.StreamWriter] = set()
        inner = f"{self._device}i"
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "link", "add", self._device, "type", "veth", "peer", "name", inner, "netns", self.namespace)
        _run("ip", "addr", "add", f"{self.host}/30", "dev", self._device)
        _run("ip", "link", "set", self._device, "up")
        _run("ip", "-n", self.namespace, "addr", "add", f"10.77.{number}.2/30", "dev", inner)
        _run("ip", "-n", self.namespace, "link", "set", inner, "up")
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), loop).result()
        self.address = f"{self.host}:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Take it down."""
        self._loop.call_soon_threadsafe(self._server.close)
        for writer in list(self._writers):
            self._loop.call_soon_threadsafe(writer.transport.abort)
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
        self.delay_s = 0.2

    def mend(self) -> None:
        """All is well again."""
        self.delay_s = 0.0
        _run("ip", "link", "set", self._device, "up")
        for command in (
            ("tc", "qdisc", "del", "dev", self._device, "root"),
            ("ip", "netns", "exec", self.namespace, "tc", "qdisc", "del", "dev", f"{self._device}i", "root"),
            ("nft", "delete", "table", "inet", f"{TABLE}-{self._device}"),
        ):
            subprocess.run(command, check=False, capture_output=True)  # what was not broken needs no mending

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, self.host, 0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers.add(back)
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
            self._writers.discard(back)
        self._writers.discard(writer)
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


class Network:
    """Links of several hospitals to a coordinator on loopback; a context manager."""

    def __init__(self, names: Sequence[str], port: int) -> None:
        self._names, self._port = names, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> dict[str, Link]:
        self._thread.start()
        self.links = {name: Link(number, self._port, self._loop) for number, name in enumerate(self._names, start=1)}
        return self.links

    def __exit__(self, *_: object) -> None:
        for link in self.links.values():
            link.mend()
            link.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
