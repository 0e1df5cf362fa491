"""How a coordinator grows with its hospitals: peak memory for 10, 50 and 200, and a round of 1,000 simulated ones.

Memory: the installed ServerApp runs a round with 1e7 parameters, each number of hospitals in a fresh process. The
hospitals are in another process, so that the peak is the coordinator's own: they use the protocol's real parties with
real keys, masks and signatures, and upload an update of zeros. At most 100 are asked in a round, as always. The engine
is an in-process Grid in front of a pipe: a reply is made when it is pulled.

Time: ``konsil-coordinator simulate`` with 1e5 parameters, masks, ledgers and private training, all in one process
(in-process Grid): 10 to 100 hospitals, all asked, and 1,000, of which 100 are asked. The hospitals work one after the
other, and each has a mask with every other: simulated time has a quadratic part that hospitals with machines of their
own share out among them. It is fitted to processor time, which other work on the machine changes little. What is linear
is the coordinator's own processor time, and its slope is fitted.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from server.demo import plan_text
from server.journal import read_events
from server.processes import find_command
from server.simulate import COORDINATOR_NODE, RUN, CallGrid, run_server_app
from shared_models.encoding import encoding
from shared_models.identity import public_bytes, sign
from shared_models.messages import (
    Advertised,
    AdvertiseRequest,
    Agreed,
    AgreeRequest,
    Body,
    Dealt,
    Enrolment,
    Lanes,
    PrivacyStatement,
    Proposal,
    ShareRequest,
    StudyEnd,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    Update,
    decode,
    receipt_payload,
    reply,
)
from shared_models.nets.build import count_parameters
from shared_models.plan import StudyPlan, parse_plan
from shared_models.privacy.mechanisms import calibrate_noise, training_mechanism
from shared_models.receipts import Receipt
from shared_models.secagg.key_agreement import Roster
from shared_models.secagg.protocol import Hospital, Positions
from shared_models.software import software_digest
from shared_models.tasks import find_task, task_of

MEMORY_HOSPITALS, MEMORY_WIDTH = (10, 50, 200), 3146  # 30 inputs and two hidden layers: 10,001,135 parameters
TIME_HOSPITALS, TIME_WIDTH = (10, 25, 50, 100, 1000), 300  # 99,901 parameters
FLAT, MANY = 0.2, 1000
PUBLIC_SIZE, PATIENTS = 20, 20


def make_plan(name: str, width: int, rounds: int) -> StudyPlan:
    """A study of the breast-cancer task with a network of this width, whose noise fits its budget."""
    privacy = {"clip": 0.1, "sample_rate": 0.1, "epsilon": 1.0, "delta": 3e-4}
    noise = calibrate_noise(sample_rate=0.1, steps=2 * rounds, epsilon=1.0, delta=3e-4)
    return parse_plan(
        {
            "format": 1,
            "study": name,
            "purpose": "Measure how a coordinator grows with its hospitals.",
            "task": "breast-cancer",
            "data_licence": "made up",
            "rounds": rounds,
            "minimum_hospitals": 10,
            "deadline_s": 3600.0,
            "reply_grid_s": 0.001,
            "weight_cap": 400,
            "network": {"name": "mlp", "hidden": [width, width]},
            "training": {"learning_rate": 0.1, "steps": 2},
            "privacy": {**privacy, "noise_multiplier": noise},
        }
    )


# Hospitals in another process: the protocol, and nothing behind it


class Party:
    """One hospital as far as a coordinator can tell: real keys, masks and signatures around an update of zeros."""

    def __init__(self, name: str, identity: Ed25519PrivateKey, roster: Roster) -> None:
        self._name, self._identity = name, identity
        self._party = Hospital(name, identity, roster=roster, positions=Positions())

    def answer(self, message: Message) -> Message:
        """Whatever is asked of a hospital."""
        stations: dict[str, tuple[type[Body], Callable[[Any], tuple[Body, Lanes | None]]]] = {
            Proposal.action: (Proposal, self._enrol),
            AdvertiseRequest.action: (AdvertiseRequest, self._advertise),
            ShareRequest.action: (ShareRequest, lambda asked: (Dealt(dealing=self._party.share(asked.cohort)), None)),
            TrainRequest.action: (TrainRequest, self._train),
            AgreeRequest.action: (AgreeRequest, lambda a: (Agreed(agreement=self._party.agree(a.survivors)), None)),
            UnmaskRequest.action: (
                UnmaskRequest,
                lambda asked: (Unmasked(revealed=self._party.unmask(asked.unmasking)), None),
            ),
            StudyEnd.action: (StudyEnd, self._finish),
        }
        kind, station = stations[message.metadata.message_type]
        body, _ = decode(message.content, kind)
        return reply(*station(body), to=message)

    def _enrol(self, asked: Proposal) -> tuple[Body, None]:
        self._plan = parse_plan(asked.plan)
        answer = Enrolment(plan_digest=self._plan.digest(), public_size=PUBLIC_SIZE, software_digest=software_digest())
        return answer, None

    def _advertise(self, asked: AdvertiseRequest) -> tuple[Body, None]:
        digest = self._plan.digest()
        return Advertised(advertisement=self._party.advertise(asked.announcement, plan_digest=digest)), None

    def _train(self, asked: TrainRequest) -> tuple[Body, Lanes]:
        now, plan = self._party.announcement, self._plan
        assert self._party.accept(asked.delivery, parameters_digest=now.parameters_digest) is None
        parameters = count_parameters(plan.network, task_of(plan))
        length = encoding(plan, "train", parameters=parameters, hospitals=len(now.invited)).length
        masked = self._party.upload(np.zeros(length, np.uint32), charge="a" * 64)
        receipt = Receipt(
            entry_hash="a" * 64,
            chain_head="a" * 64,
            mechanism=training_mechanism(plan, PUBLIC_SIZE).model_dump(mode="json"),
            charges=now.round,
            epsilon_filter=0.1,
            signature="0" * 128,
        )
        place: dict[str, Any] = {"study": now.study, "round": now.round, "attempt": now.attempt}
        body = Update(**place, context=self._party.context.hex(), receipt=receipt)
        signature = sign(self._identity, "receipt", receipt_payload(body)).hex()
        return body.model_copy(update={"receipt": receipt.model_copy(update={"signature": signature})}), masked

    def _finish(self, asked: StudyEnd) -> tuple[Body, None]:
        statement = PrivacyStatement(
            study=asked.study,
            rounds=self._plan.rounds,
            epsilon=0.1,
            epsilon_filter=0.1,
            delta=self._plan.privacy.delta,
            unit="patient",
            neighbouring="add or remove one patient",
            accountant="none: nothing was trained",
            budget_epsilon=1.0,
            public_size=PUBLIC_SIZE,
        )
        return statement, None


def play_hospitals(line: Connection, names: list[str]) -> None:
    """The other process: tells everybody's public keys, then answers until the line is closed."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, RUN, COORDINATOR_NODE
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    identities = {name: public_bytes(key) for name, key in keys.items()}
    line.send(identities)
    roster = Roster.of(identities)
    parties = {name: Party(name, key, roster) for name, key in keys.items()}
    while True:
        try:
            name, message = line.recv()
        except EOFError:
            return
        line.send(parties[name].answer(message))


class PipeGrid(CallGrid):
    """A ``CallGrid`` whose hospitals answer from another process."""

    def __init__(self, names: list[str], line: Connection) -> None:
        super().__init__({name: Path() for name in names})
        self._line = line

    def call(self, name: str, message: Message) -> Message:
        """Down the pipe and back."""
        self._line.send((name, message))
        answer: Message = self._line.recv()
        return answer


def coordinate(hospitals: int, rounds: int, width: int) -> dict[str, float]:
    """Run the ServerApp in this process, which must be fresh, and say what it took."""
    names = [f"hospital-{number:04}" for number in range(1, hospitals + 1)]
    context = multiprocessing.get_context("spawn")
    line, theirs = context.Pipe()
    child = context.Process(target=play_hospitals, args=(theirs, names), daemon=True)
    child.start()
    theirs.close()
    identities = line.recv()
    from server.app import app  # noqa: F401 - imports are not what grows

    before_mb, before_s = _peak_mb(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="konsil-bench-") as temporary:
        folder = Path(temporary)
        plan = make_plan(f"scale-{hospitals}", width, rounds)
        (folder / "plan.toml").write_text(plan_text(plan), encoding="utf-8")
        run_server_app(
            PipeGrid(names, line),
            plan_file=folder / "plan.toml",
            folder=folder / "study",
            state=folder,
            public_sizes=dict.fromkeys(names, PUBLIC_SIZE),
            identities=identities,
        )
        spent_s = time.process_time() - before_s
        found = [event for event in read_events(folder / "study" / "events.jsonl")[0] if event["event"] == "round"]
    line.close()
    child.join()
    return {
        "peak_mb": _peak_mb(),
        "imports_mb": before_mb,
        "cohort": len(found[0]["answered"]),
        "coordinator_s": spent_s / rounds,
        "round_s": float(np.median([event["seconds"] for event in found])),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure_memory(rounds: int, width: int) -> dict[str, float]:
    """Each number of hospitals in a process of its own."""
    figures: dict[str, float] = {}
    cohorts, seconds = [], []
    parameters = count_parameters(make_plan("a", width, 1).network, find_task("breast-cancer"))
    print(f"coordinator, {parameters:,} parameters; in-process Grid, hospitals in another process")
    for hospitals in MEMORY_HOSPITALS:
        command = [sys.executable, __file__, "--coordinate", str(hospitals), "--rounds", str(rounds)]
        said = subprocess.run([*command, "--width", str(width)], check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        case = f"n{hospitals}"
        figures |= {
            f"peak_mb_{case}": found["peak_mb"],
            f"beyond_imports_mb_{case}": found["peak_mb"] - found["imports_mb"],
            f"coordinator_s_{case}": found["coordinator_s"],
            f"round_s_{case}": found["round_s"],
        }
        cohorts.append(found["cohort"])
        seconds.append(found["coordinator_s"])
        print(
            f"n {hospitals:>4} ({found['cohort']} asked), a round: peak {found['peak_mb']:.0f} MB, imports "
            f"{found['imports_mb']:.0f} MB; {found['coordinator_s']:6.2f} s of the coordinator's processor time, "
            f"{found['round_s']:.1f} s with all hospitals one after the other (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    slope, start = np.polyfit(cohorts, seconds, 1)
    off = np.abs(np.polyval([slope, start], cohorts) - seconds).max() / max(seconds)
    low, high = f"n{MEMORY_HOSPITALS[0]}", f"n{MEMORY_HOSPITALS[-1]}"
    return figures | {
        "parameters": parameters,
        "memory_200_over_10": figures[f"peak_mb_{high}"] / figures[f"peak_mb_{low}"],
        "memory_beyond_imports_200_over_10": figures[f"beyond_imports_mb_{high}"] / figures[f"beyond_imports_mb_{low}"],
        "coordinator_s_per_hospital": float(slope),
        "coordinator_s_start": float(start),
        "coordinator_off_line": float(off),
    }


# Simulated hospitals


def simulate(hospitals: int, width: int) -> dict[str, Any]:
    """``konsil-coordinator simulate`` of one round, as a user would run it."""
    with tempfile.TemporaryDirectory(prefix="konsil-bench-") as temporary:
        folder = Path(temporary)
        (folder / "plan.toml").write_text(plan_text(make_plan("many", width, 1)), encoding="utf-8")
        command = [find_command("konsil-coordinator"), "simulate", str(folder / "plan.toml")]
        command += ["--hospitals", str(hospitals), "--patients", str(PATIENTS), "--folder", str(folder / "run")]
        subprocess.run([*command, "--json", str(folder / "report.json")], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def measure_time(width: int) -> dict[str, float]:
    """Seconds of a round by the number of hospitals, and of 1,000 hospitals."""
    figures: dict[str, float] = {}
    asked, seconds = [], []
    print("konsil-coordinator simulate, in-process Grid, one process, one round")
    for hospitals in TIME_HOSPITALS:
        found = simulate(hospitals, width)
        (round_s,) = found["round_seconds"]
        case = f"n{hospitals}"
        figures |= {
            f"simulated_round_s_{case}": round_s,
            f"simulated_total_s_{case}": found["seconds"],
            f"simulated_cpu_s_{case}": found["cpu_seconds"],
            f"simulated_peak_mb_{case}": found["peak_memory_mb"],
        }
        if hospitals < MANY:
            asked.append(hospitals)
            seconds.append(found["cpu_seconds"])
        print(
            f"n {hospitals:>4}: round {round_s:6.2f} s; {found['seconds']:6.1f} s from keys to model, "
            f"{found['cpu_seconds']:6.1f} s of processor time, {found['peak_memory_mb']:.0f} MB "
            f"(load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    quadratic, linear, start = np.polyfit(asked, seconds, 2)
    return figures | {
        "seconds_1000_hospitals": figures[f"simulated_round_s_n{MANY}"],
        "simulated_cpu_s_start": float(start),
        "simulated_cpu_s_per_hospital": float(linear),
        "simulated_cpu_s_per_hospital_squared": float(quadratic),
    }


def main() -> None:
    """Measure, print, and say which targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="rounds of the coordinator's measurement (default: 1)")
    parser.add_argument("--width", type=int, default=MEMORY_WIDTH, help=argparse.SUPPRESS)
    parser.add_argument("--coordinate", type=int, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.coordinate is not None:
        print(json.dumps(coordinate(options.coordinate, options.rounds, options.width)))
        return
    figures = measure_memory(options.rounds, options.width) | measure_time(TIME_WIDTH)
    ratio = figures["memory_200_over_10"]
    met = "met" if 1 - FLAT <= ratio <= 1 + FLAT else "missed"
    print(
        f"coordinator's memory, 200 over 10: {ratio:.3f} (target 1 within {FLAT:.0%}: {met}); beyond imports "
        f"{figures['memory_beyond_imports_200_over_10']:.3f}"
    )
    print(
        f"coordinator's time a round: {figures['coordinator_s_start']:.2f} s + "
        f"{figures['coordinator_s_per_hospital']:.4f} s per hospital asked; at most "
        f"{figures['coordinator_off_line']:.1%} of the largest off the line"
    )
    print(
        f"simulated study of one round, processor time: {figures['simulated_cpu_s_start']:.1f} s + n * "
        f"{figures['simulated_cpu_s_per_hospital']:.3f} s + n^2 * "
        f"{figures['simulated_cpu_s_per_hospital_squared'] * 1000:.2f} ms, up to n = 100"
    )
    print(f"1,000 hospitals, 100 asked: a round in {figures['seconds_1000_hospitals']:.1f} s on {os.cpu_count()} cores")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
