"""The demo: a coordinator and hospitals as separate processes on this machine, over real TLS, one study end to end.

It plays the people: makes throw-away keys and folders, starts the commands, watches, compares, and cleans up after
itself. It computes no update and sees no record that a hospital holds.
"""

import json
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from server.card import read_statements, write_card
from server.examples import Example, check_study, read_example
from server.journal import read_events
from server.pki import Authority, create_hospital_keys, publish_tls_key
from server.processes import Children, MemoryMeter
from server.trial import hand_out, trial_root, trial_roster
from shared_models.errors import ConfigError, FederationError
from shared_models.plan import StudyPlan
from shared_models.privacy.mechanisms import best_order, calibrate_noise, study_mechanisms
from shared_models.secagg.protocol import who_could_learn_what
from shared_models.secagg.quantize import MODULUS_BITS

LOOK_EVERY_S = 0.1
BUDGET = 1.0  # of every hospital in the demo, per patient


@dataclass
class Progress:
    """What the demo has seen so far, for the live view."""

    study: str
    rounds: int
    hospitals: tuple[str, ...]
    started: float = field(default_factory=time.monotonic)
    first_round: float | None = None
    round: int = 0
    seconds: float = 0.0
    status: dict[str, str] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    released: dict[str, float] | None = None
    sums: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Any] | None = None

    def see(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the coordinator's journal."""
        match event["event"]:
            case "enrolled":
                self.status[event["hospital"]] = f"joined, public size {event['public_size']}"
            case "pending":
                self.status[event["hospital"]] = "waits for its steward"
            case "refused" | "left-out":
                self.status[event["hospital"]] = f"{event['event']}: {event.get('code') or event.get('reason')}"
            case "round":
                self.first_round = self.first_round or time.monotonic() - event["seconds"]
                self.round, self.seconds = event["round"], event["seconds"]
                self.epsilon, self.released = event["epsilon_filter"], event["metrics_released"] or self.released
                self.status |= dict.fromkeys(event["answered"], "answered") | dict.fromkeys(event["missing"], "missing")
            case "sum":
                self.sums.append(dict(event))
            case "finished":
                self.finished = dict(event)

    def secure_aggregation(self) -> dict[str, Any]:
        """How the updates were summed; the smallest threshold of any round, and everybody who ever dropped out."""
        trained = [event for event in self.sums if event["purpose"] == "train"]
        least = min(trained, key=lambda event: event["threshold"])
        return {
            "enabled": True,
            "threshold": least["threshold"],
            "hospitals": least["hospitals"],
            "dropped": sorted({name for event in trained for name in event["dropped"]}),
            "bytes_up_per_round": trained[-1]["bytes_up"],
            "modulus_bits": MODULUS_BITS,
        }

    def left_s(self) -> float | None:
        """Seconds that the remaining rounds will take, at the pace so far."""
        if not self.round or self.first_round is None:
            return None
        return (time.monotonic() - self.first_round) / self.round * (self.rounds - self.round)


@dataclass(frozen=True)
class Options:
    """What the command line chose; None means the study's own default."""

    study: str
    rounds: int | None
    hospitals: int
    folder: Path
    json_file: Path | None
    port: int | None
    seed: int


def run_demo(options: Options, console: Console) -> None:
    """Run the demo from keys to comparison.

    Raises:
        FederationError: Something failed; every child process has been ended.
    """
    started = time.monotonic()
    check_study(options.study)
    folder = fresh_folder(options.folder)
    try:
        example = _prepare(folder, options)
        plan = fit_plan(example, options.rounds)
        lay_out(folder, example, plan, options.port or free_port())
    except BaseException:
        shutil.rmtree(folder)  # nothing has run: leave nothing half-done
        raise
    _say(console, f"{plan.study}: {example.split}.")
    _say(console, f"{len(example.hospitals)} hospitals, {plan.rounds} rounds, everything under {folder}.")
    _say(console, "The epsilon shown is the enforced one; the first round pays the filter's own price.\n")
    with MemoryMeter() as memory, Children(folder / "logs") as children:
        progress = train(children, folder, example, plan, console)
        children.stop()
        baselines = compare(children, folder, example, console)
        final = _measure(children, folder / "study" / "model.safetensors", example.test)
    card = _finish_card(folder / "study", plan, example, {"federated, private": final, **_named(baselines)})
    report = _report(plan, progress, final, baselines, folder, card, seconds=time.monotonic() - started)
    report["peak_memory_mb"] = round(memory.peak_mb, 1)
    _print_comparison(console, report, example)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _prepare(folder: Path, options: Options) -> Example:
    """Have the data written by a process of its own: what reads it takes a hundred megabytes and is needed once."""
    choice = ("--hospitals", str(options.hospitals), "--seed", str(options.seed))
    with Children(folder / "logs") as children:
        children.run("data", "konsil-coordinator", "example", options.study, str(folder / "data"), *choice)
    return read_example(folder / "data")


def fit_plan(example: Example, rounds: int | None) -> StudyPlan:
    """The example's plan for another number of rounds: the noise is calibrated again, so that it costs the same."""
    plan = example.plan
    if rounds is None or rounds == plan.rounds:
        return plan
    privacy = plan.privacy
    steps = (rounds + privacy.spare_charges) * plan.training.steps
    noise = calibrate_noise(sample_rate=privacy.sample_rate, steps=steps, epsilon=privacy.epsilon, delta=privacy.delta)
    update = {"rounds": rounds, "privacy": privacy.model_copy(update={"noise_multiplier": noise})}
    return plan.model_copy(update=update)


def lay_out(folder: Path, example: Example, plan: StudyPlan, port: int, *, hosts: Iterable[str] = ()) -> Authority:
    """Make the throw-away keys, certificates and settings of everybody, as they would do themselves.

    ``hosts`` are further names or addresses of the coordinator, for its certificate.

    Returns:
        The authority, whose key is written nowhere.
    """
    authority = Authority(folder / "authority")
    authority.issue(folder / "coordinator", "coordinator", hosts=["127.0.0.1", "localhost", *hosts])
    (folder / "plan.toml").write_text(plan_text(plan), encoding="utf-8")
    public = folder / "coordinator" / "hospitals"
    for hospital in example.hospitals:
        home = folder / "hospitals" / hospital.name
        create_hospital_keys(home / "keys", public, hospital.name)
        authority.issue(home / "keys", hospital.name)
        publish_tls_key(home / "keys" / "tls.pem", public / f"{hospital.name}.tls.pub")
        settings = hospital_settings(
            hospital.name, hospital.folder, hospital.public_size, plan, port, authority.certificate
        )
        (home / "hospital.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    root, sizes = trial_root(folder / "root"), {hospital.name: hospital.public_size for hospital in example.hospitals}
    homes = [folder / "coordinator", *(folder / "hospitals" / name for name in sizes)]
    hand_out(root, trial_roster(root, public, sizes, address=f"127.0.0.1:{port}"), homes)
    settings = coordinator_settings(port, authority.certificate)
    (folder / "coordinator" / "coordinator.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    return authority


def plan_text(plan: StudyPlan) -> str:
    """A plan as TOML; what is absent stays absent."""
    return tomli_w.dumps(plan.model_dump(mode="json", exclude_none=True))


def coordinator_settings(port: int, authority: Path) -> dict[str, Any]:
    """The coordinator's settings for a trial on this machine."""
    return {
        "host": "127.0.0.1",
        "port": port,
        "state": "state",
        "tls": {"ca": str(authority.absolute()), "certificate": "tls.pem", "key": "tls.key"},
        "roster": "roster.json",
        "root": "root.pub",
    }


def hospital_settings(
    name: str, records: Path, public_size: int, plan: StudyPlan, port: int, authority: Path
) -> dict[str, Any]:
    """One hospital's settings for a trial: a budget of its own, and a standing approval for studies of this task."""
    delta = plan.privacy.delta
    return {
        "name": name,
        "coordinator": f"127.0.0.1:{port}",
        "records": str(records.absolute()),
        "state": "state",
        "roster": "roster.json",
        "device": "cpu",
        "threads": 1,
        "tls": {"ca": str(authority.absolute()), "certificate": "keys/tls.pem", "key": "keys/tls.key"},
        "keys": {"identity": "keys/identity.key", "node": "keys/node.key", "root": "root.pub"},
        "population": {
            "name": "all-patients",
            "public_size": public_size,
            "epsilon": max(BUDGET, plan.privacy.epsilon),
            "delta": delta,
            "order": best_order(study_mechanisms(plan, public_size), delta),
        },
        "policy": {
            "tasks": [plan.task],
            "networks": [plan.network.name],
            "minimum_noise_multiplier": plan.privacy.noise_multiplier,
            "maximum_epsilon_per_study": plan.privacy.epsilon,
            "minimum_hospitals": plan.minimum_hospitals,
            "maximum_attempts": 10,
            "maximum_rounds": plan.rounds + plan.privacy.spare_charges,
            "standing_approvals": [{"tasks": [plan.task], "maximum_epsilon": plan.privacy.epsilon}],
            "release_validation": plan.evaluation is not None,
        },
    }


def start_coordinator(children: Children, folder: Path) -> "subprocess.Popen[str]":
    """Start the coordinator that ``lay_out`` made, with its plan."""
    settings = folder / "coordinator" / "coordinator.toml"
    study = ("--settings", str(settings), "--folder", str(folder / "study"))
    return children.start("coordinator", "konsil-coordinator", "run", str(folder / "plan.toml"), *study)


def start_hospital(children: Children, folder: Path, name: str, *, log: str | None = None) -> "subprocess.Popen[str]":
    """Start a hospital's daemon that ``lay_out`` made; ``log`` names it, and its log, otherwise than the hospital."""
    return children.start(log or name, "konsil-hospital", "start", str(folder / "hospitals" / name / "hospital.toml"))


def train(children: Children, folder: Path, example: Example, plan: StudyPlan, console: Console) -> Progress:
    """Start everybody, feed each new checkpoint to a measuring process, and watch until the study is over."""
    meter = children.start("measure", "konsil-hospital", "evaluate", "--records", str(example.test), talk=True)
    start_coordinator(children, folder)
    names = tuple(hospital.name for hospital in example.hospitals)
    for name in names:
        start_hospital(children, folder, name)
    progress = Progress(plan.study, plan.rounds, names)
    figures = _lines_of(meter)
    offset = 0
    with Live(console=console, refresh_per_second=4, transient=console.is_terminal) as live:
        while progress.finished is None:
            running = children.check("coordinator") and children.check("measure")
            for name in names:
                if not children.check(name):
                    progress.status[name] = "gone"
            events, offset = read_events(folder / "study" / "events.jsonl", offset)
            for event in events:
                progress.see(event)
                if event["event"] == "round" and meter.stdin is not None:
                    print(event["checkpoint"], file=meter.stdin, flush=True)
                if event["event"] == "round" and not console.is_terminal:
                    _say(console, _plain(progress))
            while not figures.empty():
                progress.metrics = json.loads(figures.get())
            live.update(_view(progress) if console.is_terminal else "")
            if not running and progress.finished is None and not events:
                raise FederationError("the coordinator ended before the study did", hint=f"See {folder / 'logs'}.")
            time.sleep(LOOK_EVERY_S)
    return progress


def compare(children: Children, folder: Path, example: Example, console: Console) -> dict[str, Any]:
    """Train each hospital alone and all data pooled, without privacy, and measure on the same test part."""
    out = folder / "baselines"
    out.mkdir()
    homes = {hospital.name: hospital.folder for hospital in example.hospitals} | {"pooled": example.pooled}
    figures: dict[str, dict[str, float]] = {}
    with console.status("Comparing with each hospital alone, and with all data in one place …"):
        for name, records in homes.items():
            said = children.run(
                f"alone-{name}",
                "konsil-hospital",
                "train-alone",
                str(folder / "plan.toml"),
                "--records",
                str(records),
                "--out",
                str(out / f"{name}.safetensors"),
                "--test",
                str(example.test),
            )
            figures[name] = json.loads(said)
    return {"pooled": figures.pop("pooled"), "local": figures}


def _measure(children: Children, model: Path, test: Path) -> dict[str, float]:
    return dict(json.loads(children.run("final", "konsil-hospital", "evaluate", str(model), "--records", str(test))))


def _lines_of(child: "subprocess.Popen[str]") -> "queue.SimpleQueue[str]":
    """Lines a child prints, without ever waiting for one."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        with suppress(ValueError):  # the pipe was closed under us: the child has been ended
            for line in child.stdout or ():
                lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    return lines


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fresh_folder(folder: Path) -> Path:
    """Make the demo's folder; one that is in use is never written into."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{folder} exists already", hint="Choose another --folder, or remove it.") from None
    return folder.resolve()


def _named(baselines: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    local = {f"{name} alone": figures for name, figures in baselines["local"].items()}
    return {"all data pooled": baselines["pooled"], **local}


def _finish_card(folder: Path, plan: StudyPlan, example: Example, metrics: Mapping[str, Mapping[str, float]]) -> Path:
    """Write the card again, now with what the demo measured."""
    public_sizes, statements = read_statements(folder)
    return write_card(folder, plan, public_sizes, statements, metrics=metrics, about_data=example.split)


def _report(
    plan: StudyPlan,
    progress: Progress,
    final: Mapping[str, float],
    baselines: Mapping[str, Any],
    folder: Path,
    card: Path,
    *,
    seconds: float,
) -> dict[str, Any]:
    """The machine-readable result; later versions add fields and remove none."""
    finished = progress.finished or {}
    return {
        "study": plan.study,
        "rounds_completed": progress.round,
        "seconds": round(seconds, 1),
        "metrics": dict(final),
        "metrics_released": progress.released,
        "baselines": dict(baselines),
        "hospitals": {name: stated(statement) for name, statement in finished["hospitals"].items()},
        "secure_aggregation": progress.secure_aggregation(),
        "model": finished["model"],
        "card": str(card),
        "ledgers": {name: str(folder / "hospitals" / name / "state" / "ledger.sqlite") for name in progress.hospitals},
    }


_STATED = (
    "rounds",
    "epsilon",
    "epsilon_filter",
    "delta",
    "unit",
    "neighbouring",
    "accountant",
    "budget_epsilon",
    "public_size",
)


def stated(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Of a hospital's statement in the journal, what a report shows."""
    return {key: statement[key] for key in _STATED}


def _view(progress: Progress) -> Group:
    """The live picture of a running study."""
    table = Table(box=None, pad_edge=False)
    for column in ("hospital", "state", "epsilon spent (enforced)"):
        table.add_column(column)
    for name in progress.hospitals:
        spent = f"{progress.epsilon[name]:.3f}" if name in progress.epsilon else "0"
        table.add_row(name, progress.status.get(name, "starting"), spent)
    bar = Table.grid()  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=progress.rounds, completed=progress.round, width=40))
    return Group(_plain(progress), bar, table)


def _plain(progress: Progress) -> str:
    """One line on where the study is."""
    if not progress.round:
        return "waiting for the hospitals to join …"
    left = progress.left_s()
    metrics = ", ".join(f"{n} {progress.metrics[n]:.3f}" for n in ("auroc", "accuracy") if n in progress.metrics)
    answered = sum(state == "answered" for state in progress.status.values())
    highest = max(progress.epsilon.values(), default=0.0)
    return (
        f"round {progress.round}/{progress.rounds}: {answered} of {len(progress.hospitals)} hospitals answered in "
        f"{progress.seconds:.2f} s; {metrics or 'measuring'}; epsilon up to {highest:.3f}; {left or 0:.0f} s left"
    )


def _print_comparison(console: Console, report: Mapping[str, Any], example: Example) -> None:
    """The closing table, and where everything lies."""
    hospitals, baselines = report["hospitals"], report["baselines"]
    worst = max((stated["epsilon"] for stated in hospitals.values()), default=0.0)
    models = _table("On the test part, which belongs to no hospital", "model", (*_SHOWN.values(), "epsilon"))
    models.add_row("federated, private", *_cells(report["metrics"]), f"{worst:.2f}", style="bold")
    models.add_row("all data pooled", *_cells(baselines["pooled"]), "none")
    for name, figures in baselines["local"].items():
        models.add_row(f"{name} alone", *_cells(figures), "none")
    console.print(models)
    spent = _table(
        "What it cost a patient, by each hospital's own ledger",
        "hospital",
        ("public size", "rounds", "epsilon", "enforced", "budget", "delta"),
    )
    for name, stated in hospitals.items():
        epsilons = (f"{stated['epsilon']:.3f}", f"{stated['epsilon_filter']:.3f}", f"{stated['budget_epsilon']:g}")
        spent.add_row(name, str(stated["public_size"]), str(stated["rounds"]), *epsilons, f"{stated['delta']:g}")
    console.print(spent)
    accountants = ", ".join(sorted({stated["accountant"] for stated in hospitals.values()}))
    lines = [
        f"epsilon: per patient, add or remove one patient, by {accountants}; for the schedule as executed,",
        "valid if it was fixed in advance. enforced: by the hospital's Renyi filter, valid in any case.",
        "Models trained alone or on pooled data have no privacy.",
        "",
        who_could_learn_what(report["secure_aggregation"]["hospitals"], report["secure_aggregation"]["threshold"]),
        *_dropped(report["secure_aggregation"]["dropped"]),
        "",
        f"Data: {example.split}.",
        "",
        f"model   {report['model']}",
        f"card    {report['card']}",
        *(f"ledger  {path}" for path in report["ledgers"].values()),
        "",
        f"{report['rounds_completed']} rounds, {report['seconds']:.0f} s in all; all processes together took at most "
        f"{report['peak_memory_mb']:.0f} MB.",
    ]
    _say(console, "\n".join(lines))


def _dropped(names: list[str]) -> list[str]:
    return [f"Dropped out of at least one round: {', '.join(names)}."] if names else []


_SHOWN = {"auroc": "AUROC", "accuracy": "accuracy", "sensitivity": "sensitivity", "specificity": "specificity"}


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [f"{figures[name]:.3f}" if name in figures else "-" for name in _SHOWN]


def _say(console: Console, text: str) -> None:
    """Print plain text: wrapped at words on a terminal, line by line where a program may read it."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _table(title: str, first: str, others: Iterable[str]) -> Table:
    """A table that fits 80 columns: a name, then numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table
