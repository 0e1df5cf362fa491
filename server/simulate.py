"""A whole federation in one process: the installed ServerApp and ClientApp, with masks, ledgers and privacy as ever.

Only the transport is missing. A message is handed over as it is, not as bytes, and a hospital computes its reply when
the coordinator pulls it: one hospital works at a time, and one reply exists at a time, however many there are.
"""

import importlib
import itertools
import json
import logging
import resource
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import tomli_w
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from server.demo import fresh_folder, hospital_settings, plan_text, secure_aggregation, stated
from server.examples import ExampleHospital, read_example
from server.folds import fold_plans, summarise, tables
from server.journal import read_events
from server.made_up import write_made_up
from server.pki import create_hospital_keys
from server.standing import Standing
from server.trial import hand_out, trial_root, trial_roster
from shared_models.config import Name
from shared_models.errors import ConfigError, FederationError
from shared_models.identity import read_public
from shared_models.messages import Proposal, StudyEnd
from shared_models.plan import LARGEST_COHORT, SMALLEST_COHORT, StudyPlan, read_plan
from shared_models.tasks import task_of

# Flower's logger has a handler of its own; what matters is in the journal.
logging.getLogger("flwr").setLevel(logging.ERROR)
logging.getLogger("flwr").handlers.clear()

COORDINATOR_NODE, FIRST_NODE, RUN = 1, 100, 7
HOSPITAL_APP = "client.app"  # named, not imported: the coordinator's code knows no hospital's
MOST_OPEN = LARGEST_COHORT  # hospitals at once; a cohort stays open for as long as its attempt lasts
LOOK_EVERY_S = 0.2


def hospital_app(name: str = HOSPITAL_APP) -> ModuleType:
    """The module with the hospitals' ClientApp, looked up when it is needed, as Flower's own simulation does.

    Raises:
        ConfigError: The hospitals' software is not installed here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"simulated hospitals need the hospitals' software, which is not installed here: {error}",
            hint="Install it: pip install 'konsil[hospital]'.",
        ) from None


class CallGrid(Grid):
    """Flower's Grid over nothing but function calls.

    Args:
        settings_files: Each hospital's settings, by name.

    Attributes:
        offline: Hospitals that do not answer.
    """

    def __init__(self, settings_files: Mapping[str, Path]) -> None:
        self.offline: set[str] = set()
        self._settings_files = dict(settings_files)
        self._node_of = {name: FIRST_NODE + number for number, name in enumerate(settings_files)}
        self._name_of = {node_id: name for name, node_id in self._node_of.items()}
        self._waiting: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    @property
    def run(self) -> Run:
        """There is one run, and nobody asks for it."""
        raise AssertionError("not called")

    def set_run(self, *_: Any) -> None:
        """There is one run."""

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Deprecated in Flower, and never called."""
        raise AssertionError("not called")

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the hospitals that are online."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The hospitals that are online."""
        return [NodeInfo(node_id=i, name=n) for n, i in self._node_of.items() if n not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep each request until its answer is pulled."""
        keys = []
        for message in messages:
            keys.append(str(next(self._numbers)))
            self._waiting[keys[-1]] = message
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Have the hospitals answer these requests, once."""
        asked = [(key, self._waiting.pop(key)) for key in list(message_ids) if key in self._waiting]
        answers = []
        for key, message in asked:
            message.metadata.__dict__["_message_id"] = key
            answers.append(self.deliver(self._name_of[message.metadata.dst_node_id], message))
        return [answer for answer in answers if answer is not None]

    def deliver(self, name: str, message: Message) -> Message | None:
        """One request to one hospital, and its answer; None where it is lost."""
        return None if name in self.offline else self.call(name, message)

    def call(self, name: str, message: Message) -> Message:
        """What the hospital's installed ClientApp answers."""
        node_config: UserConfig = {"settings": str(self._settings_files[name])}
        answer: Message = hospital_app().app(message, Context(RUN, self._node_of[name], node_config, RecordDict(), {}))
        return answer

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        """Not used: answers are gathered as they come."""
        raise AssertionError("not called")


class FewOpenGrid(CallGrid):
    """A ``CallGrid`` that holds the ledgers and records of a bounded number of hospitals open.

    Whoever was asked least recently is closed, which to a hospital is the end of its process. When it is asked again it
    opens its ledger, and the study is proposed to it again, as after any restart: that reserves nothing twice.
    """

    def __init__(self, settings_files: Mapping[str, Path], most_open: int = MOST_OPEN) -> None:
        super().__init__(settings_files)
        self._most_open = most_open
        self._open: OrderedDict[str, None] = OrderedDict()
        self._proposals: dict[str, Message] = {}

    @property
    def open_hospitals(self) -> tuple[str, ...]:
        """Who is open, the least recently asked first."""
        return tuple(self._open)

    def call(self, name: str, message: Message) -> Message:
        """Open the hospital if need be, and hand it the request."""
        kind = message.metadata.message_type
        reopened = name not in self._open
        if reopened and len(self._open) >= self._most_open:
            self._close(self._open.popitem(last=False)[0])
        self._open[name] = None
        self._open.move_to_end(name)
        if kind == Proposal.action:
            self._proposals[name] = message
        elif reopened and name in self._proposals:
            super().call(name, self._proposals[name])
        if kind == StudyEnd.action:
            self._proposals.pop(name, None)
        return super().call(name, message)

    def close(self) -> None:
        """Close every hospital."""
        while self._open:
            self._close(self._open.popitem()[0])

    def _close(self, name: str) -> None:
        hospital_app().close_hospital(str(self._settings_files[name]))


def run_server_app(
    grid: Grid,
    *,
    plan_file: Path,
    folder: Path,
    state: Path,
    identities: Mapping[str, bytes],
    public_sizes: Mapping[str, int],
) -> None:
    """Run the coordinator's ServerApp to its end over a grid of this process.

    Args:
        grid: Reaches the hospitals.
        plan_file: The study.
        folder: Where the study's files go.
        state: Where the coordinator's database and the hospitals' last receipts are.
        identities: Raw public identity keys, by hospital.
        public_sizes: Their declared sizes.

    Raises:
        FederationError: What stopped the study.
    """
    from server.app import app  # noqa: PLC0415 - torch is only needed once a study really starts

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, RUN, COORDINATOR_NODE
    keys = ConfigRecord()
    keys.update({name: key.hex() for name, key in identities.items()})
    config: UserConfig = {
        "plan": str(plan_file),
        "folder": str(folder),
        "receipts": str(state / "last-receipts.json"),
        "database": f"sqlite:///{state.absolute() / 'coordinator.sqlite'}",
    }
    known = RecordDict({"identities": keys, "public_sizes": ConfigRecord(dict(public_sizes))})
    app(grid, Context(RUN, COORDINATOR_NODE, {}, known, config))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line chose.

    Attributes:
        plan: File of the study plan.
        folder: Where everything goes; must not exist.
        records: Folder of the hospitals' records folders; None makes records up.
        hospitals: How many hospitals to make up; of ``records``, how many to take, None for all.
        patients: Of each made-up hospital.
        public_size: Of each hospital whose folder's ``example.json`` says nothing.
        seed: Of made-up records.
        threads: Of torch.
        json_file: Where to write the result for machines.
        folds: Of a cross-validation; None runs the plan once.
        bases: Copies of pretrained bases, which every hospital and the coordinator use.
    """

    plan: Path
    folder: Path
    records: Path | None
    hospitals: int | None
    patients: int
    public_size: int | None
    seed: int
    threads: int
    json_file: Path | None
    folds: int | None = None
    bases: tuple[Path, ...] = ()


def run_simulation(options: Options, console: Console) -> dict[str, Any]:
    """Simulate a study from keys to model, and return the result.

    Raises:
        ConfigError: The plan, the records or the folder cannot be used; nothing is left behind.
        FederationError: What stopped the study; its folder stays, with the journal.
    """
    started = time.monotonic()
    plan = read_plan(options.plan)
    task = task_of(plan)
    plans = fold_plans(plan, options.folds) if options.folds else []
    hospital_app()
    bases = _offered(plan, options.bases)
    if options.records is not None:
        chosen = hospitals_in(options.records, options.public_size)[: options.hospitals]
    else:
        chosen = None
    count = len(chosen) if chosen is not None else options.hospitals or 0
    least = max(SMALLEST_COHORT, plan.minimum_hospitals)
    if count < least:
        raise ConfigError(
            f"{count} hospitals are too few: the plan wants at least {least}",
            hint="Name a --records folder with more, or make some up with --hospitals N.",
        )
    folder = fresh_folder(options.folder)
    try:
        if chosen is None:
            records = folder / "records"
            chosen = write_made_up(task, records, hospitals=count, patients=options.patients, seed=options.seed)
        lay_out(folder, chosen, plan, bases, studies=len(plans) or 1)
    except BaseException:
        shutil.rmtree(folder)  # nothing has run: leave nothing half-done
        raise
    console.print(f"{plan.study}: {count} hospitals in one process, {plan.rounds} rounds; {folder}", soft_wrap=True)
    if plans:
        report = _cross_validate(folder, chosen, plan, plans, options.threads, console)
    else:
        progress = _run(folder, chosen, plan, options.threads, console)
        report = _report(progress, plan, folder, time.monotonic() - started)
        _say_result(report, console)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _cross_validate(
    folder: Path,
    hospitals: Sequence[ExampleHospital],
    plan: StudyPlan,
    plans: Sequence[StudyPlan],
    threads: int,
    console: Console,
) -> dict[str, Any]:
    """One fold after the other, with the same hospitals and ledgers; and the summary of all."""
    folders = []
    for number, one in enumerate(plans, start=1):
        console.print(f"fold {number} of {len(plans)}")
        _run(folder, hospitals, one, threads, console, name=f"fold-{number}")
        folders.append(folder / f"fold-{number}")
    found = summarise(plan, folders)
    for table in tables(found):
        console.print(table)
    return found


def hospitals_in(records: Path, public_size: int | None) -> list[ExampleHospital]:
    """The hospitals whose records folders lie in one folder.

    ``konsil-coordinator example`` leaves word of names and sizes in ``example.json``; elsewhere every folder with a
    manifest is a hospital, named as its folder, and of the size that is given.

    Raises:
        ConfigError: There is no such folder, nothing in it, a name that no hospital can have, or no size.
    """
    if not records.is_dir():
        raise ConfigError(f"there is no folder {records}", hint="Name the folder that holds the hospitals' folders.")
    if (records / "example.json").is_file():
        found = list(read_example(records).hospitals)
        return [
            h.model_copy(update={"folder": records / h.name, "public_size": public_size or h.public_size})
            for h in found
        ]
    homes = sorted(path.parent for path in records.glob("*/manifest.toml"))
    if not homes:
        raise ConfigError(
            f"{records} holds no hospital", hint="Each hospital's folder has a manifest.toml; see docs/hospital.md."
        )
    if public_size is None:
        raise ConfigError(
            "nobody has declared how many patients these hospitals have",
            hint="Pass --public-size N: the true number to the nearest ten, as a steward would.",
        )
    names: TypeAdapter[str] = TypeAdapter(Name)
    for home in homes:
        with suppress(ValidationError):
            names.validate_python(home.name)
            continue
        raise ConfigError(
            f"a hospital cannot be called {home.name!r}", hint="Folders' names: lower-case letters, digits, hyphens."
        )
    return [ExampleHospital(name=home.name, folder=home, public_size=public_size) for home in homes]


def _offered(plan: StudyPlan, bases: Sequence[Path]) -> dict[str, Path]:
    """The copies of pretrained bases by digest; the one that the plan starts from is read and checked."""
    if not bases and not hasattr(plan.network, "base"):
        return {}
    from shared_models.pretrained import check_copy, offer_files  # noqa: PLC0415 - needs torch

    copies = offer_files(bases)
    check_copy(plan.network, copies)
    return copies


def lay_out(
    folder: Path,
    hospitals: Iterable[ExampleHospital],
    plan: StudyPlan,
    bases: Mapping[str, Path] = MappingProxyType({}),
    *,
    studies: int = 1,
) -> None:
    """Make everybody's throw-away keys and settings, and one roster that all of them read.

    Budgets pay for so many ``studies`` of the plan.
    """
    (folder / "plan.toml").write_text(plan_text(plan), encoding="utf-8")
    sizes = {hospital.name: hospital.public_size for hospital in hospitals}
    root, public = trial_root(folder / "root"), folder / "public"
    terms = lru_cache(lambda size: hospital_settings("", folder, size, plan, 9443, folder / "no-ca.pem"))
    for hospital in hospitals:
        home = folder / "hospitals" / hospital.name
        create_hospital_keys(home / "keys", public, hospital.name)
        settings = terms(hospital.public_size) | {
            "name": hospital.name,
            "records": str(hospital.folder.absolute()),
            "roster": str(folder / "roster.json"),
            "keys": {"identity": "keys/identity.key", "node": "keys/node.key", "root": str(folder / "root.pub")},
            "pretrained": {digest: str(path) for digest, path in bases.items()},
        }
        settings["population"] = settings["population"] | {"epsilon": settings["population"]["epsilon"] * studies}
        (home / "hospital.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    hand_out(root, trial_roster(root, public, sizes), [folder])


def _run(
    folder: Path,
    hospitals: Sequence[ExampleHospital],
    plan: StudyPlan,
    threads: int,
    console: Console,
    *,
    name: str = "study",
) -> Standing:
    import torch  # noqa: PLC0415 - what was refused above needed no torch

    torch.set_num_threads(threads)
    names = [hospital.name for hospital in hospitals]
    grid = FewOpenGrid({name: folder / "hospitals" / name / "hospital.toml" for name in names})
    identities = {name: read_public(folder / "public" / f"{name}.identity.pub") for name in names}
    progress = Standing(study=plan.study)
    plan_file = folder / ("plan.toml" if name == "study" else f"{name}.toml")
    plan_file.write_text(plan_text(plan), encoding="utf-8")
    with _Watch(folder / name / "events.jsonl", progress, lambda line: console.print(line, soft_wrap=True)):
        try:
            run_server_app(
                grid,
                plan_file=plan_file,
                folder=folder / name,
                state=folder,
                identities=identities,
                public_sizes={hospital.name: hospital.public_size for hospital in hospitals},
            )
        finally:
            grid.close()
    return progress


class _Watch:
    """Follows the journal from a thread beside the study, and says a line for each round; a context."""

    def __init__(self, journal: Path, progress: Standing, say: Callable[[str], None]) -> None:
        self._journal, self._progress, self._say = journal, progress, say
        self._offset = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        events, self._offset = read_events(self._journal, self._offset)
        for event in events:
            self._progress.see(event)
            if event["event"] == "round":
                self._say(self._progress.line())


def _report(progress: Standing, plan: StudyPlan, folder: Path, seconds: float) -> dict[str, Any]:
    """The machine-readable result: names as in the demo's."""
    if progress.finished is None:
        raise FederationError("the study ended without a word", hint=f"See {folder / 'study' / 'events.jsonl'}.")
    events, _ = read_events(folder / "study" / "events.jsonl")
    own, forked = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "study": plan.study,
        "engine": "in-process Grid",
        "rounds_completed": progress.done,
        "seconds": round(seconds, 3),
        "round_seconds": [event["seconds"] for event in events if event["event"] == "round"],
        "cpu_seconds": round(own.ru_utime + own.ru_stime + forked.ru_utime + forked.ru_stime, 2),
        "peak_memory_mb": round(own.ru_maxrss * 1024 / 1e6, 1),
        "metrics_released": progress.released and dict(progress.released),
        "hospitals": {name: stated(statement) for name, statement in progress.finished["hospitals"].items()},
        "secure_aggregation": secure_aggregation([event for event in events if event["event"] == "sum"]),
        "model": progress.finished["model"],
        "card": progress.finished["card"],
        "ledgers": {name: str(folder / "hospitals" / name / "state" / "ledger.sqlite") for name in progress.hospitals},
    }


def _say_result(report: Mapping[str, Any], console: Console) -> None:
    worst = max((figures["epsilon"] for figures in report["hospitals"].values()), default=0.0)
    for line in (
        f"{report['rounds_completed']} rounds in {report['seconds']:.1f} s, {report['cpu_seconds']:.1f} s of processor "
        f"time, at most {report['peak_memory_mb']:.0f} MB",
        f"epsilon of any patient, as reported: at most {worst:.3f}",
        f"model   {report['model']}",
        f"card    {report['card']}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
