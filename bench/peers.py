"""One image study beside two peers' simulators and plain training: wall and processor seconds, and peak memory.

The study: a convolutional network of 106,034 parameters, 4 clients of 1,000 made-up pictures of 28x28, 3 rounds of 31
steps of 32 pictures (Poisson samples of 32 on average in ours), one thread of torch. Everybody trains the same network
on the same files. Ours has masks, ledgers and private training on; the peers have neither masks nor privacy, and
average what their clients send. Contenders:

* ours: ``konsil-coordinator simulate``, one process, in-process Grid;
* ours as real processes over mutual TLS, as in the demo;
* Flower: ``run_simulation`` with Ray at its defaults, ClientApp and FedAvg as in its quickstart;
* NVFlare: its FedAvg recipe in its simulator, a process for each client;
* plain: the same number of steps in one process, without federation and privacy.

Each runs as a process of its own. Seconds are those of the process and all its descendants, also of those that it left
behind; memory is the summed proportional set size of all of them, sampled four times a second. With --runs the fastest
run counts, and the smallest peak. Peers are skipped, with the reason, where they are not installed:
``pip install 'konsil[peers]'``.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

if TYPE_CHECKING:
    import torch
    from flwr.serverapp import Grid

    from shared_models.plan import StudyPlan

CHANNELS = (24, 32, 64, 136)
CLIENTS, PICTURES, ROUNDS, STEPS, BATCH, LEARNING_RATE = 4, 1000, 3, 31, 32, 0.05
CPU_S, PEAK_MB = 35.0, 1000.0  # targets
SAMPLE_EVERY_S = 0.25
LONGEST_S = 600.0
NEEDS = {"flower": "ray", "nvflare": "nvflare"}
CONTENDERS = ("ours", "ours_processes", "flower", "nvflare", "plain")
PR_SET_CHILD_SUBREAPER = 36

NVFLARE_CLIENT = """
import sys

sys.path.insert(0, {bench!r})
import nvflare.client as flare
import torch

import peers

torch.set_num_threads(1)
flare.init()
net = peers.network()
images, labels = peers.pictures({data!r}, int(flare.get_site_name().rsplit("-", 1)[1]))
while flare.is_running():
    model = flare.receive()
    net.load_state_dict({{name: torch.as_tensor(value) for name, value in model.params.items()}})
    peers.train_plainly(net, images, labels)
    flare.send(flare.FLModel(params=net.state_dict(), meta={{"NUM_STEPS_CURRENT_ROUND": peers.STEPS}}))
"""


# The study


def network() -> "torch.nn.Module":
    """The network that everybody trains."""
    from shared_models.nets.cnn import Cnn

    return Cnn(1, 28, CHANNELS, 10)


def pictures(data: str | Path, client: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """A client's pictures and labels, as peers read them; clients count from 1."""
    import torch

    with np.load(Path(data) / f"hospital-{client}" / "data.npz") as file:
        images = torch.from_numpy(file["images"].astype(np.float32) / 127.5 - 1)
        labels = torch.from_numpy(np.array([int(kind.rsplit("-", 1)[1]) for kind in file["labels"]]))
    return images, labels


def train_plainly(net: "torch.nn.Module", images: "torch.Tensor", labels: "torch.Tensor") -> None:
    """One round at one client, without privacy."""
    import torch

    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(len(labels))[: STEPS * BATCH]
    for batch in torch.split(order, BATCH):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images[batch]), labels[batch])
        torch.autograd.backward(loss)
        optimizer.step()


def make_plan() -> "StudyPlan":
    """The study plan for ours."""
    from shared_models.plan import parse_plan
    from shared_models.privacy.mechanisms import calibrate_noise

    rate, epsilon, delta = BATCH / PICTURES, 8.0, 1e-5
    noise = calibrate_noise(sample_rate=rate, steps=ROUNDS * STEPS, epsilon=epsilon, delta=delta)
    return parse_plan(
        {
            "format": 1,
            "study": "peers",
            "purpose": "Measure one image study beside peers' simulators.",
            "task": "trial-images",
            "data_licence": "made up",
            "rounds": ROUNDS,
            "minimum_hospitals": 3,
            "deadline_s": 120.0,
            "weight_cap": PICTURES,
            "network": {"name": "cnn", "channels": list(CHANNELS)},
            "training": {"learning_rate": LEARNING_RATE, "steps": STEPS},
            "privacy": {
                "clip": 1.0,
                "noise_multiplier": noise,
                "sample_rate": rate,
                "epsilon": epsilon,
                "delta": delta,
            },
        }
    )


# The contenders, each in a process of its own


def run_ours_processes(data: Path, folder: Path) -> None:
    """A coordinator and a daemon for each hospital, over mutual TLS."""
    from server.demo import free_port, lay_out, start_coordinator, start_hospital
    from server.examples import Example, ExampleHospital
    from server.processes import Children

    names = [f"hospital-{number}" for number in range(1, CLIENTS + 1)]
    hospitals = tuple(ExampleHospital(name=n, folder=data / n, public_size=PICTURES) for n in names)
    plan = make_plan()
    example = Example(plan=plan, hospitals=hospitals, pooled=data, test=data, split="made up")
    lay_out(folder, example, plan, free_port())
    with Children(folder / "logs") as children:
        start_coordinator(children, folder)
        for name in names:
            start_hospital(children, folder, name)
        while children.check("coordinator"):
            time.sleep(SAMPLE_EVERY_S)
    assert (folder / "study" / "model.safetensors").exists()


def run_flower(data: Path, folder: Path) -> None:
    """Stock Flower's simulation."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch

        torch.set_num_threads(1)
        net = network()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        train_plainly(net, *pictures(data, int(context.node_config["partition-id"]) + 1))
        records = RecordDict({"arrays": ArrayRecord(net.state_dict())})
        records["metrics"] = MetricRecord({"num-examples": STEPS * BATCH})
        return Message(records, reply_to=message)

    @server.main()
    def main(grid: "Grid", context: Context) -> None:  # noqa: ARG001 - Flower's signature
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=ROUNDS)
        assert len(result.train_metrics_clientapp) == ROUNDS
        (folder / "done").touch()

    run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS)
    assert (folder / "done").exists()


def run_nvflare(data: Path, folder: Path) -> None:
    """NVFlare's simulator with its FedAvg recipe."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    script = folder / "client.py"
    script.write_text(NVFLARE_CLIENT.format(bench=str(Path(__file__).parent), data=str(data)), encoding="utf-8")
    recipe = FedAvgRecipe(
        name="peers",
        model={
            "class_path": "shared_models.nets.cnn.Cnn",
            "args": {"image_channels": 1, "size": 28, "channels": list(CHANNELS), "outputs": 10},
        },
        min_clients=CLIENTS,
        num_rounds=ROUNDS,
        train_script=str(script),
    )
    run = recipe.execute(SimEnv(num_clients=CLIENTS, workspace_root=str(folder / "workspace")))
    models = list((folder / "workspace").rglob("*.pt"))
    assert models, f"NVFlare left no model: {run.get_status()}"


def run_plain(data: Path, folder: Path) -> None:
    """The same steps, one client after the other."""
    import torch

    torch.set_num_threads(1)
    net = network()
    clients = [pictures(data, client) for client in range(1, CLIENTS + 1)]
    for _ in range(ROUNDS):
        for images, labels in clients:
            train_plainly(net, images, labels)
    torch.save(net.state_dict(), folder / "model.pt")


def command_of(contender: str, data: Path, folder: Path) -> list[str]:
    """What to start."""
    if contender == "ours":
        from server.processes import find_command

        command = [find_command("konsil-coordinator"), "simulate", str(data / "plan.toml"), "--records", str(data)]
        return [*command, "--public-size", str(PICTURES), "--folder", str(folder / "study")]
    return [sys.executable, __file__, "--contender", contender, "--data", str(data), "--folder", str(folder)]


# Measuring


def measure(contender: str, data: Path) -> dict[str, float]:
    """One run of a contender: seconds of wall and processor, and peak memory of all its processes."""
    peak = 0.0
    over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_EVERY_S):
            peak = max(peak, _descendants_mb())

    with tempfile.TemporaryDirectory(prefix="konsil-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        }
        thread = threading.Thread(target=sample, daemon=True)
        before, started = _children_s(), time.monotonic()
        with (folder / "log").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(
                command_of(contender, data, folder), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            thread.start()
            try:
                code = child.wait(timeout=LONGEST_S)
            finally:
                wall = time.monotonic() - started
                over.set()
                thread.join()
                child.kill()
                _reap_all()
        if code:
            tail = (folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
            sys.exit(f"error: {contender} ended with status {code}\n{tail}")
    return {f"{contender}_wall_s": wall, f"{contender}_cpu_s": _children_s() - before, f"{contender}_peak_mb": peak}


def _descendants_mb() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended while we looked
            total += process.memory_full_info().pss
    return total / 1e6


def _children_s() -> float:
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def _adopt_orphans() -> None:
    """Become the parent of whatever descendants leave behind, so that its seconds are counted and its end is seen."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_all() -> None:
    """End what a contender left behind: ask, insist after five seconds, and collect every one."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + 5
    while psutil.Process().children(recursive=True):
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.05)


def measure_all(runs: int) -> dict[str, float]:
    """Every contender that is installed, in turns, so that a change of the machine's load meets all of them."""
    from server.demo import plan_text
    from server.made_up import write_made_up
    from shared_models.tasks import find_task

    figures: dict[str, float] = {"parameters": sum(p.numel() for p in network().parameters())}
    present = []
    for contender in CONTENDERS:
        needed = NEEDS.get(contender)
        if needed is None or importlib.util.find_spec(needed) is not None:
            present.append(contender)
        else:
            print(f"{contender}: skipped, {needed} is not installed here (pip install 'konsil[peers]')")
    with tempfile.TemporaryDirectory(prefix="konsil-bench-") as temporary:
        data = Path(temporary)
        write_made_up(find_task("trial-images"), data, hospitals=CLIENTS, patients=PICTURES, seed=0)
        (data / "plan.toml").write_text(plan_text(make_plan()), encoding="utf-8")
        for _ in range(runs):
            for contender in present:
                found = measure(contender, data)
                for name, value in found.items():
                    figures[name] = min(value, figures.get(name, value))
                wall, cpu, peak = found.values()
                print(
                    f"{contender:<15} {wall:6.1f} s, {cpu:6.1f} s of processor time, {peak:5.0f} MB "
                    f"(load {os.getloadavg()[0]:.1f})",
                    flush=True,
                )
    return figures


def main() -> None:
    """Measure, print, and say which targets are met."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1, help="runs of each; the least of each figure counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.contender is not None:
        globals()[f"run_{options.contender}"](options.data, options.folder)
        return
    _adopt_orphans()
    figures = measure_all(options.runs)
    cpu, peak = figures["ours_cpu_s"], figures["ours_peak_mb"]
    print(f"ours, processor: {cpu:.1f} s (target <= {CPU_S:g}: {'met' if cpu <= CPU_S else 'missed'})")
    print(f"ours, memory: {peak:.0f} MB (target <= {PEAK_MB:g}: {'met' if peak <= PEAK_MB else 'missed'})")
    for peer in ("flower", "nvflare"):
        if f"{peer}_cpu_s" in figures:
            ratio, memory = cpu / figures[f"{peer}_cpu_s"], peak / figures[f"{peer}_peak_mb"]
            figures |= {f"ours_over_{peer}_cpu": ratio, f"ours_over_{peer}_memory": memory}
            print(f"ours over {peer}: processor {ratio:.2f}, memory {memory:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
