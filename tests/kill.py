"""Konsil's real commands, each life in a process of its own that kills itself with SIGKILL where it is told to.

Nothing in the product knows of this: real functions are wrapped once the process has begun. A *place* is the path of
the calls that lead there, and whether the last of them is about to begin or has just returned, such as
``before train/charge/COMMIT`` or ``after train/draw#2``. Every place that a life passes is written to its trace first,
so that the list of places to die at is what a life that was left alone has passed: no write can be forgotten.

Lives are forked from a server that has imported everything, because importing torch takes seconds; what a life opens,
locks and draws is its own.
"""

import ctypes
import faulthandler
import hashlib
import importlib
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import client.app
import client.cli
import client.daemon
import client.dp_sgd
import client.round
import server.app
import server.cli
import server.coordinator
import server.gather
from client.loader import PoissonLoader
from client.randomness import SecureRandom
from client.records.records import Records
from server.aggregate import Attempt
from server.evidence import Evidence
from server.examples import read_example
from server.journal import Journal
from server.receipts import LastReceipts
from server.store import Store
from shared_models.privacy.ledger import Ledger
from shared_models.secagg.protocol import Positions
from tests.federation import Federation, changed
from tests.network import enter

KILLED = -signal.SIGKILL
SYSTEM = ("write", "pwrite", "fsync", "fdatasync", "replace", "rename", "link", "urandom")
STAGES = ("enrol", "advertise", "share", "train", "evaluate", "agree", "unmask", "finish")
READS = ("before train/select", "before evaluate/parts")  # the self-check of a network selects made-up records
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Fuse:
    """Follows one thread from place to place, writes each down, and kills the process at one of them.

    Args:
        trace: File to append places to; a read of records says after a tab which computation it is for.
        point: Where to die; None to live.
        thread: Name of the thread that is followed.
    """

    def __init__(self, trace: Path, point: str | None, thread: str) -> None:
        self._thread = thread
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._point, self._path = point, list[str]()
        self._write = os.write  # which is about to be wrapped
        self._counts: list[Counter[str]] = [Counter()]
        self.computation = ""

    def wrap(self, function: Callable[..., Any], name: str | Callable[..., str | None]) -> Callable[..., Any]:
        """The same function, with a place before and a place after it; where it has no name, none."""

        @wraps(function)
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            title = name if isinstance(name, str) else name(*arguments, **keywords)
            if title is None or threading.current_thread().name != self._thread:
                return function(*arguments, **keywords)
            with self._within(title):
                return function(*arguments, **keywords)

        return wrapped

    @contextmanager
    def _within(self, title: str) -> Iterator[None]:
        self._counts[-1][title] += 1
        # A daemon does the same again and again; only what one stage repeats is told apart.
        times = self._counts[-1][title] if self._path else 1
        self._path.append(title if times == 1 else f"{title}#{times}")
        self._counts.append(Counter())
        place = "/".join(self._path)
        self._reach(f"before {place}")
        try:
            yield
        finally:
            self._path.pop()
            self._counts.pop()
        self._reach(f"after {place}")

    def _reach(self, place: str) -> None:
        self._write(self._trace, f"{place}\t{self.computation}\n".encode())
        if place == self._point:
            os.kill(os.getpid(), signal.SIGKILL)

    def install_in_coordinator(self) -> None:
        """Wrap the stations of a study, what they write down, and every call that makes something durable."""
        for stage in ("take_up", "enrol_enough", "take_turn", "train_round", "evaluate_round", "close_study"):
            self._wrap_in(server.round, stage, stage)
        for call in ("save_checkpoint", "write_model", "vector_to_parameters"):
            self._wrap_in(server.round, call, call)
        self._wrap_in(server.app, "write_card", "card")
        self._wrap_in(Attempt, "_stage", lambda _, name, *__: name)
        for method in ("begin_attempt", "charged", "end_attempt", "finish_round"):
            self._wrap_in(Store, method, method)
        self._wrap_in(Store, "enter", lambda _, __, state, *___: f"enter-{state}")
        self._wrap_in(Evidence, "hold", "hold")
        self._wrap_in(Evidence, "close", "close")
        self._wrap_in(LastReceipts, "keep", "receipts")
        self._wrap_in(Journal, "write", lambda _, event, **__: event)
        for call in ("fsync", "replace", "unlink"):
            self._wrap_in(os, call, call)

    def install(self) -> None:
        """Wrap the stages of a round, what they are made of, and every call that makes something durable."""
        hospital, connection = client.round.Hospital, client.daemon.FleetConnection
        for stage in STAGES:
            self._wrap_in(hospital, stage, stage)
        self._wrap_in(hospital, "_accept", "accept")
        setattr(hospital, "_accept", self._noting(hospital._accept))  # noqa: B010 - mypy refuses an assignment
        self._wrap_in(hospital, "_masked", "mask")
        self._wrap_in(hospital, "_signed", "sign")
        self._wrap_in(hospital, "_keep_transcript", "transcript")
        self._wrap_in(client.round, "vector_to_parameters", "load")
        self._wrap_in(PoissonLoader, "draw", "draw")
        self._wrap_in(Records, "select", "select")
        self._wrap_in(Records, "row_parts", "parts")
        self._wrap_in(client.dp_sgd, "add_noise", "noise")
        self._wrap_in(Positions, "advance", "position")
        self._wrap_in(Ledger, "append", lambda _, kind, **__: kind)
        for method in ("open", "create"):
            setattr(Ledger, method, classmethod(self.wrap(Ledger.__dict__[method].__func__, method)))
        self._wrap_in(connection, "send", _what_is_sent)
        self._wrap_in(client.daemon, "push_objects", "objects")
        for call in SYSTEM:
            self._wrap_in(os, call, call)
        sqlite3.connect = partial(sqlite3.connect, factory=self._connection())  # type: ignore[assignment]
        wrap_sqlite_writes(lambda write: self.wrap(write, "write"))

    def _wrap_in(self, owner: Any, name: str, title: str | Callable[..., str | None]) -> None:
        setattr(owner, name, self.wrap(getattr(owner, name), title))

    def _noting(self, accept: Callable[..., Any]) -> Callable[..., Any]:
        """Note which computation stage 3 has begun, for the trace."""

        @wraps(accept)
        def noting(hospital: client.round.Hospital, request: Any, parameters: Any, purpose: str) -> Any:
            found = accept(hospital, request, parameters, purpose)
            now = hospital._party.announcement
            self.computation = f"{purpose} {now.round} {now.attempt}"
            return found

        return noting

    def _connection(self) -> type[sqlite3.Connection]:
        """SQLite's connection, with a place before and after each statement that writes."""
        execute = self.wrap(sqlite3.Connection.execute, _what_is_written)
        return type("Connection", (sqlite3.Connection,), {"execute": execute})


def _what_is_written(_: sqlite3.Connection, statement: str, *__: Any) -> str | None:
    verb = statement.split(maxsplit=1)[0].upper()
    return None if verb in {"SELECT", "PRAGMA"} else verb


def _what_is_sent(_: client.daemon.FleetConnection, message: Any) -> str:
    return f"send-{message.metadata.message_type.rpartition('.')[2]}"


_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
_SetCall = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_GetCall = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_SET_CALL_AT = 16 + 3 * 8 + 13 * 8  # in sqlite3_vfs, 64 bits: three ints, padded; three pointers; thirteen methods
_callbacks: list[Any] = []  # SQLite keeps no reference


def wrap_sqlite_writes(wrap: Callable[[Callable[..., int]], Callable[..., int]]) -> None:
    """Wrap the system call by which SQLite writes to its files, in this process for ever.

    A commit is several of them. SQLite has this seam for tests of this kind.

    Source:
        xSetSystemCall, https://www.sqlite.org/c3ref/vfs.html
    """
    library = ctypes.CDLL(importlib.import_module("_sqlite3").__file__)
    library.sqlite3_vfs_find.restype = ctypes.c_void_p
    vfs = library.sqlite3_vfs_find(None)
    set_call, get_call = _SetCall.from_address(vfs + _SET_CALL_AT), _GetCall.from_address(vfs + _SET_CALL_AT + 8)
    for name in (b"pwrite", b"pwrite64"):  # one of them is in use
        address = get_call(vfs, name)
        if address is not None:
            _callbacks.append(_Write(wrap(_Write(address))))
            assert set_call(vfs, name, ctypes.cast(_callbacks[-1], ctypes.c_void_p)) == sqlite3.SQLITE_OK


def _one_round() -> None:
    """A coordinator and its hospitals in this process, at their first round; the folder is the only argument."""
    from tests.rounds.test_a_server_that_lies import Coordinator

    folder = Path(sys.argv[1])
    example = read_example(folder / "data")
    coordinator = Coordinator(Federation(folder, example, changed(example.plan, rounds=3)))
    for name in coordinator.federation.names:
        coordinator.propose(name)
    coordinator.train()


def _known_noise() -> None:
    """A hospital's daemon whose noise and samples are known: keyed by hospital, study, purpose, round and attempt."""
    opened = client.round.Hospital.open

    def open_with_known_noise(settings_file: Path) -> client.round.Hospital:
        hospital = opened(settings_file)

        def known() -> SecureRandom:
            now = hospital.announcement
            assert now is not None
            key = f"{hospital.settings.name} {now.study} {now.purpose} {now.round} {now.attempt}"
            return SecureRandom.for_tests(hashlib.sha256(key.encode()).digest())

        hospital._random, hospital._allow_test_random = known, True
        return hospital

    setattr(client.round.Hospital, "open", staticmethod(open_with_known_noise))  # noqa: B010 - mypy refuses an assignment
    client.cli.main()


COMMANDS = {
    "konsil-hospital": client.cli.main,
    "konsil-hospital-with-known-noise": _known_noise,
    "konsil-coordinator": server.cli.main,
    "one-round": _one_round,
}


def _live(command: Sequence[str], trace: Path, log: Path, point: str | None, namespace: str | None) -> None:
    """One life: arm, then run the command as a shell would. What it prints goes to its log."""
    if namespace is not None:
        enter(namespace)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the test that began it
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin.close()
    faulthandler.enable()  # where it hangs, it can be asked where
    torch.set_num_threads(1)
    server.gather.ONLINE_EVERY_S = 0.1  # a death is noticed sooner, so that the test takes less time
    client.daemon.LONGEST_RETRY_S = 1.0  # and a return
    if command[0] == "konsil-coordinator":
        Fuse(trace, point, thread="breast-cancer").install_in_coordinator()
    else:
        Fuse(trace, point, thread="MainThread").install()
    sys.argv = list(command)
    COMMANDS[command[0]]()


class Lives:
    """Starts lives and ends them all; a context. One trace and one log per name, for all lives of that name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.kill", "pytest"])
        self.begun: list[ForkServerProcess] = []

    def __enter__(self) -> "Lives":
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for life in self.begun:
            life.kill()
            life.join()

    def begin(
        self, name: str, *command: str, point: str | None = None, namespace: str | None = None
    ) -> ForkServerProcess:
        """Begin a life that runs a command, and dies at a point or not; its ``exitcode`` says how it ended.

        It runs in a network namespace where one is named.
        """
        files = (self.trace(name), self.log(name))
        life = self._context.Process(target=_live, args=(command, *files, point, namespace), name=name)
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}):  # one thread can be forked
            life.start()
        self.begun.append(life)
        return life

    def ask_where(self, life: ForkServerProcess) -> None:
        """Have a life that hangs write to its log where each of its threads is, and end."""
        if life.exitcode is None and life.pid is not None:
            os.kill(life.pid, signal.SIGABRT)
            life.join(10)

    def trace(self, name: str) -> Path:
        """File with the places that all lives of this name have passed."""
        return self._folder / f"{name}.trace"

    def log(self, name: str) -> Path:
        """File with what all lives of this name have printed."""
        return self._folder / f"{name}.log"

    def places(self, name: str) -> list[str]:
        """These places, in order."""
        return [line.split("\t")[0] for line in self._lines(name)]

    def computations(self, name: str) -> set[str]:
        """For which computations records were read, each as purpose, round and attempt."""
        return {line.split("\t")[1] for line in self._lines(name) if line.startswith(READS)}

    def _lines(self, name: str) -> list[str]:
        trace = self.trace(name)
        return trace.read_text("utf-8").splitlines() if trace.exists() else []


def points(places: Sequence[str], *, every: bool) -> list[str]:
    """Places to die at: each once, in order.

    Between the end of one call and the beginning of the next nothing happens that could be lost. Without ``every`` the
    end is left out where the next place is such a beginning.
    """
    told = [here for here, then in pairwise([*places, ""]) if every or not (_ends(here) and then.startswith("before"))]
    return list(dict.fromkeys(told))


def _ends(place: str) -> bool:
    return place.startswith("after")
