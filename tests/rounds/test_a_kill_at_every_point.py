"""A hospital's daemon killed at every write of its ledger and every stage of a round, in one study that goes on."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.books import LEDGER, report
from client.settings import read_settings
from server.demo import free_port, lay_out, start_coordinator
from server.examples import write_example
from server.journal import read_events
from server.processes import Children
from shared_models.identity import read_public
from shared_models.plan import StudyPlan
from shared_models.privacy.ledger import Entry, head_path, read_head, read_ledger, verify_entries, verify_head
from tests.federation import changed
from tests.kill_points import DISK, EXECUTE, Point
from tests.killed_daemon import Lives, killed

_APPEND, _HEAD = "shared_models.privacy.ledger:Ledger.append", "shared_models.privacy.head:HeadWriter.write"
_CREATE, _OPEN = "shared_models.privacy.ledger:Ledger.create", "shared_models.privacy.ledger:Ledger.open"
_APPROVE, _CHARGE, _FINISH = (f"client.budget:Budget.{name}" for name in ("approve", "charge", "finish"))
_DONE, _RELEASED = "client.books:Books.round_done", "client.books:Books.released"
_SEND, _INFLATE = "client.daemon:FleetConnection.send", "client.daemon:FleetConnection._inflate"
_POSITION, _UPLOAD = "client.positions:replace_file", "shared_models.secagg.protocol:Hospital.upload"


def _station(name: str) -> str:
    return f"client.round:Hospital.{name}"


# In the order in which they can be reached: first the ledger is made, then the study approved, then rounds run.
OPENING = (
    Point("before", _CREATE),
    Point("before", DISK, within=_CREATE),
    Point("before", EXECUTE, of="COMMIT", within=_CREATE),
    Point("after", "os:fsync", within=_CREATE),
    Point("after", "shared_models.privacy.ledger:create_head"),
    Point("after", "os:replace", within=_CREATE, number=2),  # the first is the head file's
    Point("before", _APPEND, of="budget-opened"),
    Point("before", EXECUTE, of="COMMIT", within=_APPEND),
    Point("before", _HEAD, within=_APPEND),
    Point("before", _HEAD, within=_OPEN),
    Point("after", "os:pwrite", within=_OPEN),
)
APPROVING = (
    Point("after", "client.daemon:FleetConnection.__enter__"),
    Point("before", _station("enrol")),
    Point("before", _APPEND, of="plan-approved"),
    Point("before", EXECUTE, of="COMMIT", within=_APPROVE),
    Point("after", EXECUTE, of="COMMIT", within=_APPROVE),
    Point("after", _station("enrol")),
)
KEYS = (
    Point("before", _station("advertise")),
    Point("before", _POSITION),
    Point("after", "os:fsync", within=_POSITION),
    Point("after", "os:replace", within=_POSITION),
    Point("after", _station("advertise")),
    Point("after", _SEND, of="query.advertise"),
    Point("before", _station("share")),
    Point("after", _station("share")),
)
CHARGING = (
    Point("after", _INFLATE, number=5),
    Point("before", _station("train")),
    Point("before", _CHARGE),
    Point("before", _APPEND, of="charge"),
    Point("before", EXECUTE, of="BEGIN", within=_CHARGE),
    Point("before", EXECUTE, of="INSERT", within=_CHARGE),
    Point("before", EXECUTE, of="COMMIT", within=_CHARGE),
    *(Point("before", DISK, within=_CHARGE, number=number) for number in range(1, 7)),
    Point("after", DISK, within=_CHARGE, number=6),
    Point("after", EXECUTE, of="COMMIT", within=_CHARGE),
    Point("after", EXECUTE, of="COMMIT", within=_CHARGE),  # twice at the same place
    Point("before", "os:pwrite", within=_CHARGE),
    Point("after", "os:pwrite", within=_CHARGE),
    Point("after", "os:fdatasync", within=_CHARGE),
    Point("after", _APPEND, of="charge"),
    Point("after", _CHARGE),
    Point("after", _CHARGE),
)
TRAINING = (
    Point("after", "client.loader:PoissonLoader.draw"),
    Point("after", "client.round:train"),
    Point("before", _UPLOAD),
    Point("after", _UPLOAD),
    Point("before", _APPEND, of="round-done"),
    Point("before", EXECUTE, of="COMMIT", within=_DONE),
    Point("before", _HEAD, within=_DONE),
    Point("after", _DONE),
    Point("after", _station("train")),
    Point("before", _SEND, of="train.round"),
    Point("after", _SEND, of="train.round"),
)
UNMASKING = (
    Point("before", _station("agree")),
    Point("after", _station("agree")),
    Point("after", _SEND, of="query.agree"),
    Point("before", _station("unmask")),
    Point("before", _station("_keep_transcript"), within=_station("unmask")),
    Point("after", _station("unmask")),
)
RELEASING = (
    Point("before", _station("evaluate")),
    Point("after", _CHARGE, within=_station("evaluate")),
    Point("after", "client.round:released_statistics"),
    Point("before", _APPEND, of="release"),
    Point("after", EXECUTE, of="COMMIT", within=_RELEASED),
    Point("after", _SEND, of="evaluate.round"),
)
# One for each hospital: the study ends once.
FINISHING = (
    Point("before", _SEND, of="query.finish"),
    Point("before", _station("finish")),
    Point("before", _APPEND, of="study-closed"),
    Point("after", EXECUTE, of="COMMIT", within=_FINISH),
)
EVERYWHERE = OPENING + APPROVING + KEYS + CHARGING + TRAINING + UNMASKING + RELEASING
