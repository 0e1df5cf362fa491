"""No attribute of any record is touched in a round before its charge is on the disk; and a test that could tell.

The observer sees every access to a hospital's records while it computes, and reads the ledger at that very moment,
as another process would. To show that it can fail, it is shown the same code with the charge moved behind the read.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import client.round
from client.records.records import Records
from client.round import Hospital
from shared_models.config import read_toml
from tests.federation import Federation, make_federation

EVALUATION = {"every": 1, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}
MECHANISMS = {"train": "poisson-gaussian", "evaluate": "gaussian-release"}
TOUCHABLE = {field.name for field in fields(Records)} | {"select", "parts", "rows_of", "record_counts"}

Station = Callable[..., Any]


@dataclass
class Observer:
    """Who watches a hospital's records.

    Attributes:
        computing: The hospital that is in stage 3, and what for.
        paid: Touches for a computation whose charge was on the disk.
        unpaid: The others: what was touched, by whom, for what.
    """

    federation: Federation
    computing: tuple[Hospital, str] | None = None
    paid: int = 0
    unpaid: tuple[tuple[str, str, str], ...] = ()

    def watch(self, patch: pytest.MonkeyPatch, stations: dict[str, Station]) -> None:
        """Look at each access to any record's attribute, while one of these stations runs."""
        look = object.__getattribute__

        def touched(records: Records, name: str) -> Any:
            if name in TOUCHABLE:
                self.touched(name)
            return look(records, name)

        patch.setattr(Records, "__getattribute__", touched)
        for purpose, station in stations.items():
            patch.setattr(Hospital, purpose, self._noting(purpose, station))

    def _noting(self, purpose: str, station: Station) -> Station:
        def noting(hospital: Hospital, request: Any, vector: Any) -> Any:
            self.computing = hospital, purpose
            try:
                return station(hospital, request, vector)
            finally:
                self.computing = None

        return noting

    def touched(self, name: str) -> None:
        """Is the charge of what is being computed in the ledger, as anybody reads it from the disk?"""
        if self.computing is None:
            return  # reading and validating the file, before anything is approved, and the network's self-check
        hospital, purpose = self.computing
        now = hospital._party.announcement
        charges = [entry for entry in self.federation.ledger(hospital.settings.name) if entry.kind == "charge"]
        of_this = [e for e in charges if e.mechanism and e.mechanism.kind == MECHANISMS[purpose]]
        if (now.round, now.attempt) in [(entry.round, entry.attempt) for entry in of_this]:
            self.paid += 1
        else:
            self.unpaid += ((hospital.settings.name, purpose, name),)


def charged_late(station: Station) -> Station:
    """The same source, but for one line: the charge is written only when it is needed, after the records were used."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(station)))
    body = tree.body[0].body  # type: ignore[attr-defined]  # a function has one
    (charge,) = [statement for statement in body if ast.unparse(statement).startswith("charge = self._charge(")]
    at = body.index(charge)
    body.remove(charge)
    assert _put(charge, body, at), "nothing uses the charge"
    made: dict[str, Any] = {}
    exec(compile(tree, "moved", "exec"), dict(vars(client.round)), made)  # noqa: S102 - our own source
    return made[station.__name__]


def _put(charge: ast.stmt, body: list[ast.stmt], start: int = 0) -> bool:
    """Insert the charge before the first simple statement that uses it."""
    for place, statement in enumerate(body[start:], start):
        if isinstance(statement, ast.With):
            if _put(charge, statement.body):
                return True
        elif any(isinstance(node, ast.Name) and node.id == "charge" for node in ast.walk(statement)):
            body.insert(place, charge)
            return True
    return False


@pytest.fixture
def releasing(tmp_path: Path) -> Federation:
    """Four hospitals that train and release statistics."""
    federation = make_federation(
        tmp_path, rounds=2, privacy={"noise_multiplier": 40.0, "spare_charges": 0}, evaluation=EVALUATION
    )
    for hospital in federation.example.hospitals:
        manifest = hospital.folder / "manifest.toml"
        # Hospital-4 has ten patients of one class: one split in 35 puts none of them into the validation part.
        declared = {"validation_fraction": 0.3, "absent_classes": ["benign", "malignant"]}
        kept = read_toml(manifest, "manifest") | declared
        manifest.write_text(tomli_w.dumps(kept), encoding="utf-8")
    return federation


def test_nothing_is_touched_before_it_is_paid_for(releasing: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds and two releases at four hospitals: records are touched often, each time under a charge on disk."""
    observer = Observer(releasing)
    observer.watch(monkeypatch, {"train": Hospital.train, "evaluate": Hospital.evaluate})

    releasing.run()

    assert observer.unpaid == ()
    assert observer.paid > 100


@pytest.mark.parametrize("late", ["train", "evaluate"])
def test_a_charge_after_the_read_is_caught(late: str, releasing: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same observer, the same study, one line moved: it runs to its end, and every hospital is found out."""
    observer = Observer(releasing)
    stations: dict[str, Station] = {"train": Hospital.train, "evaluate": Hospital.evaluate}
    stations[late] = charged_late(stations[late])
    observer.watch(monkeypatch, stations)

    releasing.run()

    assert len(releasing.events("round")) == 2
    assert {(name, purpose) for name, purpose, _ in observer.unpaid} == {(name, late) for name in releasing.names}
    assert "rows_of" in {what for _, _, what in observer.unpaid}
