"""Seconds per round over TLS with node authentication: ours, and stock Flower on the same machine in the same run.

Ours is the default study as it is, every stage included: mutual TLS, ledger charge and its fsync, DP-SGD training,
signed receipt, averaging, checkpoint; so it is an upper bound of an empty round. Stock is ``flower-superlink`` and
``flower-supernode`` at their defaults, with a ServerApp that sends 31 float32 parameters to every node and a ClientApp
that sends them back. The first round of both is left out. Nothing leaves the loopback interface.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import tomli_w

from server.demo import fit_plan, lay_out, start_coordinator, start_hospital
from server.examples import write_example
from server.journal import read_events
from server.pki import Authority, create_hospital_keys
from server.processes import Children, find_command
from shared_models.errors import FederationError

TARGET = 0.1
LOOK_EVERY_S = 0.1
STOCK_START_S = 120.0
STOCK_ROUND_S = 120.0
OURS_S = 300.0

STOCK_PROJECT = {
    "project": {"name": "empty-round", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "bench",
                "components": {
                    "serverapp": "empty_round.server_app:app",
                    "clientapp": "empty_round.client_app:app",
                },
                "config": {"rounds": 7, "nodes": 3, "figures": ""},
            }
        }
    },
}
STOCK_SERVER = """
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.1)
    nodes = list(grid.get_node_ids())
    with Path(config["figures"]).open("w") as figures:
        for number in range(config["rounds"]):
            started = time.monotonic()
            records = RecordDict({"model": ArrayRecord({"vector": Array(np.zeros(31, np.float32))})})
            requests = [Message(records, dst_node_id=node, message_type="train") for node in nodes]
            replies = list(grid.send_and_receive(requests))
            assert len(replies) == len(nodes) and not any(reply.has_error() for reply in replies)
            print(time.monotonic() - started, file=figures, flush=True)
"""
STOCK_CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""


class Figures(NamedTuple):
    """Seconds of each counted round."""

    name: str
    seconds: list[float]

    def __str__(self) -> str:
        low, middle, high = min(self.seconds), median(self.seconds), max(self.seconds)
        return (
            f"{self.name:<20} {middle:8.3f} s per round  (median of {len(self.seconds)}, {low:.3f} to {high:.3f};"
            f" load {os.getloadavg()[0]:.1f})"
        )


class StockChildren(Children):
    """Children that have children of their own: stock Flower starts a process for every message."""

    def stop(self) -> None:
        """End every child and all its descendants."""
        family = self._descendants()
        super().stop()
        family += [orphan for process in family for orphan in _descendants(process)]
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=5)

    def _descendants(self) -> list[psutil.Process]:
        running = [child.pid for child in self._children.values() if child.poll() is None]
        return [process for pid in running for process in _descendants(psutil.Process(pid))]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def measure_ours(folder: Path, hospitals: int, rounds: int) -> list[float]:
    """Seconds of each round after the first of the default study, by the coordinator's journal."""
    example = write_example("breast-cancer", folder / "data", hospitals=hospitals, seed=0)
    lay_out(folder, example, fit_plan(example, rounds + 1), _free_ports(1)[0])
    journal = folder / "study" / "events.jsonl"
    with Children(folder / "logs") as children:
        start_coordinator(children, folder)
        for hospital in example.hospitals:
            start_hospital(children, folder, hospital.name)
        deadline = time.monotonic() + OURS_S
        while children.check("coordinator"):
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() > deadline:
                raise FederationError(f"{rounds + 1} rounds took longer than {OURS_S:g} s")
    events, _ = read_events(journal)
    if not any(event["event"] == "finished" for event in events):
        raise FederationError("the coordinator ended before the study did")
    found = [event for event in events if event["event"] == "round"]
    if any(event["missing"] for event in found):
        raise FederationError("a hospital missed a round: its time says nothing")
    return [event["seconds"] for event in found[1:]]


def measure_stock(folder: Path, nodes: int, rounds: int) -> list[float]:
    """Seconds of each round after the first on stock Flower."""
    port, *node_ports = _free_ports(nodes + 1)
    authority = Authority(folder)
    authority.issue(folder, "superlink", hosts=["127.0.0.1", "localhost"])
    figures = folder / "figures.txt"
    app = _write_stock_app(folder / "app", rounds + 1, nodes, figures)
    with StockChildren(folder / "logs") as children:
        flwr = _Flwr(folder, children)
        flwr.configure(port, authority.certificate)
        flwr.start(
            "superlink",
            "flower-superlink",
            *("--port", str(port), "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--ssl-certfile", str(folder / "tls.pem"), "--ssl-keyfile", str(folder / "tls.key")),
            *("--ssl-ca-certfile", str(authority.certificate)),
        )
        _wait_for_port(children, "superlink", port)
        for number, node_port in enumerate(node_ports, 1):
            name = f"node-{number}"
            create_hospital_keys(folder / name, folder / "public", name)
            flwr.run(f"register-{name}", "supernode", "register", str(folder / "public" / f"{name}.node.pub"), "bench")
            flwr.start(
                name,
                "flower-supernode",
                *("--superlink", f"127.0.0.1:{port}", "--port", str(node_port)),
                *("--root-certificates", str(authority.certificate)),
                *("--auth-supernode-private-key", str(folder / name / "node.key")),
            )
        flwr.run("run", "run", str(app), "bench")
        return _watch(children, figures, rounds + 1, nodes)[1:]


class _Flwr:
    """Flower's commands, each process with a home of its own, and none of them looking at the internet."""

    def __init__(self, folder: Path, children: Children) -> None:
        self._folder = folder
        self._children = children

    def configure(self, port: int, certificate: Path) -> None:
        """Tell the command line where the SuperLink is."""
        home = self._folder / "home-cli"
        home.mkdir()
        connection = {"address": f"127.0.0.1:{port}", "root-certificates": str(certificate.absolute())}
        text = tomli_w.dumps({"superlink": {"default": "bench", "bench": connection}})
        (home / "config.toml").write_text(text, encoding="utf-8")

    def start(self, name: str, command: str, *arguments: str) -> None:
        """Start a long-lived process."""
        self._children.start(name, "env", *self._environment(name), find_command(command), *arguments)

    def run(self, name: str, *arguments: str) -> None:
        """Run Flower's command line to its end."""
        self._children.run(name, "env", *self._environment("cli"), find_command("flwr"), *arguments)

    def _environment(self, name: str) -> list[str]:
        return [
            f"FLWR_HOME={self._folder / f'home-{name}'}",
            f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # it starts others
            "FLWR_TELEMETRY_ENABLED=0",
            "FLWR_DISABLE_UPDATE_CHECK=1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        ]


def _write_stock_app(folder: Path, rounds: int, nodes: int, figures: Path) -> Path:
    """A Flower app whose round is one exchange of a small vector."""
    package = folder / "empty_round"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""An empty round."""\n', encoding="utf-8")
    (package / "server_app.py").write_text(STOCK_SERVER, encoding="utf-8")
    (package / "client_app.py").write_text(STOCK_CLIENT, encoding="utf-8")
    project = json.loads(json.dumps(STOCK_PROJECT))
    project["tool"]["flwr"]["app"]["config"] = {"rounds": rounds, "nodes": nodes, "figures": str(figures)}
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
    return folder


def _watch(children: Children, figures: Path, rounds: int, nodes: int) -> list[float]:
    """Wait for every round's figure; a process that ends, or a round that takes for ever, is an error."""
    deadline = time.monotonic() + STOCK_START_S
    seen: list[float] = []
    while len(seen) < rounds:
        time.sleep(LOOK_EVERY_S)
        for name in ("superlink", *(f"node-{number}" for number in range(1, nodes + 1))):
            if not children.check(name):
                raise FederationError(f"stock Flower's {name} ended", hint="See its log.")
        text = figures.read_text(encoding="utf-8") if figures.exists() else ""
        now_seen = [float(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if len(now_seen) > len(seen):
            seen, deadline = now_seen, time.monotonic() + STOCK_ROUND_S
        if time.monotonic() > deadline:
            raise FederationError(f"stock Flower stood still after {len(seen)} of {rounds} rounds")
    return seen


def _wait_for_port(children: Children, name: str, port: int) -> None:
    deadline = time.monotonic() + STOCK_START_S
    while children.check(name) and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(LOOK_EVERY_S)
        else:
            return
    raise FederationError(f"{name} does not listen on port {port}")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def _folder(keep: Path | None, name: str) -> Iterator[Path]:
    """A folder for one measurement: a temporary one, or one that stays for whoever looks for a fault."""
    if keep is not None:
        (keep / name).mkdir(parents=True)
        yield (keep / name).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="konsil-bench-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


def measure(rounds: int, keep: Path | None) -> dict[str, float]:
    """All figures, ours before and after stock, so that a change of the machine's load meets both."""
    with _folder(keep, "ours-3-before") as folder:
        ours_3 = measure_ours(folder, 3, rounds)
        print(Figures("ours, 3, before", ours_3), flush=True)
    with _folder(keep, "stock-3") as folder:
        stock_3 = measure_stock(folder, 3, rounds)
        print(Figures("stock, 3", stock_3), flush=True)
    with _folder(keep, "ours-3-after") as folder:
        after = measure_ours(folder, 3, rounds)
        print(Figures("ours, 3, after", after), flush=True)
    with _folder(keep, "ours-10") as folder:
        ours_10 = measure_ours(folder, 10, rounds)
        print(Figures("ours, 10", ours_10), flush=True)
    ours, stock = median(ours_3 + after), median(stock_3)
    return {"ours_s_3": ours, "stock_s_3": stock, "ratio_3": ours / stock, "ours_s_10": median(ours_10)}


def main() -> None:
    """Measure, print, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="rounds counted, after the first (default: 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep keys, settings and logs in this new folder")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        figures = measure(options.rounds, options.keep)
    except FederationError as error:
        sys.exit(f"error: {error}\nhint: {error.hint or 'Try again with --keep FOLDER, and read the logs there.'}")
    met = "met" if figures["ratio_3"] <= TARGET else "missed"
    print(f"ours / stock, 3 hospitals: {figures['ratio_3']:.4f} (target <= {TARGET:g}: {met})")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
