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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.examples import Example, check_study, read_example
from server.journal import read_events
from server.pki import Authority, create_hospital_keys, publish_tls_key
from server.processes import Children, MemoryMeter
from server.standing import Event, Standing
from server.trial import hand_out, trial_root, trial_roster
from server.watch import Watch
from shared_models.errors import ConfigError, FederationError
from shared_models.plan import StudyPlan
from shared_models.privacy.mechanisms import best_order, calibrate_noise, study_mechanisms
from shared_models.secagg.protocol import who_could_learn_what
from shared_models.secagg.quantize import MODULUS_BITS

LOOK_EVERY_S = 0.1
BUDGET = 1.0  # of every hospital in the demo, per patient


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
    page: int | None = None


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
        lay_out(folder, example, plan, options.port or free_port(), page=options.page)
    except BaseException:
        shutil.rmtree(folder)  # nothing has run: leave nothing half-done
        raise
    _say(console, f"{plan.study}: {example.split}.")
    _say(console, f"{len(example.hospitals)} hospitals, {plan.rounds} rounds, everything under {folder}.")
    _say(console, "The epsilon shown is the enforced one; the first round pays the filter's own price.")
    if options.page is not None:
        _say(console, f"The page, while the study runs: http://127.0.0.1:{options.page}")
    _say(console, "")
    with MemoryMeter() as memory, Children(folder / "logs") as children:
        progress, sums = train(children, folder, example, plan, console)
        children.stop()
        baselines = compare(children, folder, example, console)
        final = _measure(children, folder / "study" / "model.safetensors", example.test)
        audited = audit(children, folder, [hospital.name for hospital in example.hospitals], console)
    card = _finish_card(folder / "study", plan, example, {"federated, private": final, **_named(baselines)})
    report = _report(plan, progress, sums, final, baselines, folder, card, seconds=time.monotonic() - started)
    report["peak_memory_mb"] = round(memory.peak_mb, 1)
    report["audit"] = audited
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


def lay_out(
    folder: Path,
    example: Example,
    plan: StudyPlan,
    port: int,
    *,
    hosts: Iterable[str] = (),
    page: int | None = None,
) -> Authority:
    """Make the throw-away keys, certificates and settings of everybody, as they would do themselves.

    ``hosts`` are further names or addresses of the coordinator, for its certificate; ``page`` is the page's port.

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
    settings = coordinator_settings(port, authority.certificate) | ({"page": {"port": page}} if page else {})
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


def train(
    children: Children, folder: Path, example: Example, plan: StudyPlan, console: Console
) -> tuple[Standing, list[Event]]:
    """Start everybody, feed each new checkpoint to a measuring process, and watch until the study is over.

    Returns:
        What was seen, and every sum.
    """
    meter = children.start("measure", "konsil-hospital", "evaluate", "--records", str(example.test), talk=True)
    start_coordinator(children, folder)
    names = tuple(hospital.name for hospital in example.hospitals)
    for name in names:
        start_hospital(children, folder, name)
    figures = _lines_of(meter)
    offset = 0
    sums: list[Event] = []
    with Watch(console, plan.study, hospitals=names, keep=False) as watch:
        progress = watch.progress
        while progress.finished is None:
            running = children.check("coordinator") and children.check("measure")
            for name in names:
                if not children.check(name):
                    progress.hospital(name).state = "gone"
            events, offset = read_events(folder / "study" / "events.jsonl", offset)
            for event in events:
                watch.see(event)
                if event["event"] == "round" and meter.stdin is not None:
                    print(event["checkpoint"], file=meter.stdin, flush=True)
                if event["event"] == "sum":
                    sums.append(event)
            while not figures.empty():
                progress.measured = json.loads(figures.get())
            watch.draw()
            if not running and progress.finished is None and not events:
                raise FederationError("the coordinator ended before the study did", hint=f"See {folder / 'logs'}.")
            time.sleep(LOOK_EVERY_S)
    return progress, sums


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


def audit(children: Children, folder: Path, names: Iterable[str], console: Console) -> dict[str, Any]:
    """Have every hospital pack its evidence, and an auditor judge all of it with nothing but the root key.

    Returns:
        Whether all of it holds, what was found, epsilon as the auditor computes it, and the report's path.

    Raises:
        FederationError: A hospital could not pack, or the auditor wrote no report.
    """
    out = folder / "audit"
    out.mkdir()
    bundles = {name: out / f"{name}.evidence" for name in names}
    with console.status("Auditing what was just done …"):
        for name, bundle in bundles.items():
            settings = folder / "hospitals" / name / "hospital.toml"
            children.start(f"export {name}", "konsil-hospital", "ledger", "export", str(settings), str(bundle))
        for name in bundles:
            children.wait(f"export {name}")
            children.check(f"export {name}")
        evidence = [*map(str, bundles.values()), str(folder / "study")]
        files = ("--output", str(out / "report.html"), "--json", str(out / "report.json"))
        root = ("--root", str(folder / "coordinator" / "root.pub"))
        children.start("audit", "konsil-audit", "report", *evidence, *root, *files)
        children.wait("audit")
        if not (out / "report.json").exists():
            children.check("audit")
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "verified": found["passed"],
        "entries": sum(hospital["entries"] for hospital in found["hospitals"]),
        "epsilon_recomputed": {
            hospital["hospital"]: hospital["computed"] and hospital["computed"]["epsilon_pld"]
            for hospital in found["hospitals"]
        },
        "findings": found["findings"],
        "report": str(out / "report.html"),
    }


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
    # It brings torch and Flower, 130 MB that nobody needs while the hospitals run.
    from server.card import read_statements, write_card  # noqa: PLC0415

    public_sizes, statements = read_statements(folder)
    return write_card(folder, plan, public_sizes, statements, metrics=metrics, about_data=example.split)


def _report(
    plan: StudyPlan,
    progress: Standing,
    sums: Sequence[Event],
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
        "rounds_completed": progress.done,
        "seconds": round(seconds, 1),
        "metrics": dict(final),
        "metrics_released": progress.released and dict(progress.released),
        "baselines": dict(baselines),
        "hospitals": {name: stated(statement) for name, statement in finished["hospitals"].items()},
        "secure_aggregation": secure_aggregation(sums),
        "model": finished["model"],
        "card": str(card),
        "ledgers": {name: str(folder / "hospitals" / name / "state" / "ledger.sqlite") for name in progress.hospitals},
    }


def secure_aggregation(sums: Sequence[Event]) -> dict[str, Any]:
    """How the updates were summed; the smallest threshold of any round, and everybody who ever dropped out."""
    trained = [event for event in sums if event["purpose"] == "train"]
    least = min(trained, key=lambda event: event["threshold"])
    return {
        "enabled": True,
        "threshold": least["threshold"],
        "hospitals": least["hospitals"],
        "dropped": sorted({name for event in trained for name in event["dropped"]}),
        "bytes_up_per_round": trained[-1]["bytes_up"],
        "modulus_bits": MODULUS_BITS,
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
        _verdict(report["audit"]),
        "",
        f"Data: {example.split}.",
        "",
        f"model   {report['model']}",
        f"card    {report['card']}",
        f"audit   {report['audit']['report']}",
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


def _verdict(audited: Mapping[str, Any]) -> str:
    """What the auditor says, in a sentence or two."""
    if not audited["verified"]:
        problems = [finding for finding in audited["findings"] if finding["severity"] != "note"]
        return f"The auditor found {len(problems)} problems, the first: {problems[0]['title']}: {problems[0]['what']}."
    highest = max(audited["epsilon_recomputed"].values(), default=0.0)
    return (
        f"The auditor, with nothing but the consortium's root key, verified {audited['entries']} ledger entries and "
        f"every sum,\nand computed epsilon again by another accountant: at most {highest:.3f} (PLD, dp-accounting)."
    )


def _table(title: str, first: str, others: Iterable[str]) -> Table:
    """A table that fits 80 columns: a name, then numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table
