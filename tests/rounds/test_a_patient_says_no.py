"""A patient says no between two rounds: not used from the next round on, and nobody outside can tell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

import client.app
import client.round
from auditor.verify import verify_ledger
from client.books import LEDGER
from client.dp_sgd import TrainingReport, train
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from shared_models.identity import read_public
from shared_models.messages import (
    AdvertiseRequest,
    Body,
    Enrolment,
    PrivacyStatement,
    Proposal,
    ReleasedStatistics,
    TrainRequest,
    Update,
    read_reply,
)
from shared_models.privacy.ledger import Entry, verify_entries
from shared_models.tasks import find_task
from tests.federation import Federation, changed, make_federation, restart
from tests.rounds.test_data_stays_intact import hold_out

HOSPITAL = "hospital-1"


class Story:
    """A federation in which hospital-1 keeps an opt-out list, and what it was asked, used and answered.

    Attributes:
        given: The records that the hospital's trainer got, charge by charge.
        answers: What the hospital sent, with the length of each vector.
        acts: (Type of request, its number) -> what happens right before the hospital gets it.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.federation = make_federation(folder, **{"rounds": 3, **changes})
        settings = self.federation.settings_file(HOSPITAL)
        settings.write_text('opt_out = "opt-out.txt"\n' + settings.read_text(encoding="utf-8"), encoding="utf-8")
        self.list = settings.parent / "opt-out.txt"
        self.list.write_text("# nobody yet\n", encoding="utf-8")
        self.data = self.federation.settings(HOSPITAL).records / "data.csv"
        self.given: list[Records] = []
        self.answers: list[tuple[Body, int]] = []
        self.acts: dict[tuple[type[Body], int], Callable[[], object]] = {}
        self._asked: list[str] = []
        self._at = ""
        self.federation.wire.on_request, self.federation.wire.tamper = self._request, self._answer
        monkeypatch.setattr(client.round, "train", self._train)

    def _request(self, hospital: str, request: Message) -> None:
        self._at = hospital
        if hospital == HOSPITAL:
            self._asked.append(request.metadata.message_type)
            for (kind, number), act in self.acts.items():
                if self._asked[-1] == kind.action and self._asked.count(kind.action) == number:
                    act()

    def _answer(self, hospital: str, reply: Message) -> Message:
        if hospital == HOSPITAL:
            body, vector = read_reply(reply)
            self.answers.append((body, -1 if vector is None else len(vector)))
        return reply

    def _train(self, model: Any, records: Records, task: Any, **options: Any) -> TrainingReport:
        """The real trainer, watched."""
        if self._at == HOSPITAL:
            self.given.append(records)
        return train(model, records, task, **options)

    @property
    def patients(self) -> list[str]:
        """All ids in hospital-1's file."""
        return [line.split(",")[0] for line in self.data.read_text(encoding="utf-8").splitlines()[1:]]

    def entries(self, *kinds: str) -> list[Entry]:
        """Hospital-1's ledger, or some kinds of its entries."""
        return [entry for entry in self.federation.ledger(HOSPITAL) if not kinds or entry.kind in kinds]

    def says_no(self, *patients: str) -> Callable[[], object]:
        """Patients write themselves on the list."""
        return lambda: self.list.write_text("\n".join(patients), encoding="utf-8")

    def row(self, patient: str) -> torch.Tensor:
        """A patient's encoded record, as the trainer would get it."""
        manifest = read_manifest(self.data.parent)
        everybody, _ = read_table(manifest, find_task(manifest.task), split_key=bytes(32))
        return everybody.inputs[:][self.patients.index(patient)]


def holds(records: Records, row: torch.Tensor) -> bool:
    """Whether a record is among these."""
    return bool((records.inputs[:] == row).all(dim=1).any())


def test_who_says_no_between_two_rounds_is_not_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In round 1 the patient's record may be drawn, from round 2 on it isn't there; the others all are."""
    story = Story(tmp_path, monkeypatch)
    patient = story.patients[5]
    row = story.row(patient)
    story.acts[AdvertiseRequest, 2] = story.says_no(patient)

    story.federation.run()

    assert [holds(records, row) for records in story.given] == [True, False, False]
    before, *after = [records.patient_count for records in story.given]
    assert after == [before - 1] * 2


def test_the_ledger_says_that_the_set_changed_and_not_who_nor_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry, before the next charge, with another fingerprint; the chain verifies."""
    story = Story(tmp_path, monkeypatch)
    patient = story.patients[5]
    story.acts[AdvertiseRequest, 2] = story.says_no(patient, story.patients[6])

    story.federation.run()

    kinds = [e.kind for e in story.entries() if e.kind in {"plan-approved", "population-changed", "charge"}]
    assert kinds == ["plan-approved", "charge", "population-changed", "charge", "charge"]
    (approved,), (change,) = story.entries("plan-approved"), story.entries("population-changed")
    assert approved.population_fingerprint
    assert change.population_fingerprint not in {None, approved.population_fingerprint}
    said = change.model_dump(exclude_none=True)
    assert set(said) == {
        *("seq", "previous_hash", "time", "kind", "hospital", "signature"),
        *("population", "population_fingerprint"),
    }
    assert patient not in str([entry.canonical for entry in story.entries()])
    verify_entries(story.entries(), read_public(tmp_path / "public" / f"{HOSPITAL}.identity.pub"))


def test_a_study_is_approved_for_the_set_that_there_is_by_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two studies too, the change comes first, then an approval with the new fingerprint."""
    story = Story(tmp_path, monkeypatch, rounds=1)
    story.federation.run()
    story.says_no(story.patients[5])()
    story.federation.plan = changed(story.federation.plan, study="another")

    story.federation.run("another")

    named = [(e.kind, e.population_fingerprint) for e in story.entries() if e.population_fingerprint]
    assert [kind for kind, _ in named] == ["plan-approved", "population-changed", "plan-approved"]
    assert named[0][1] != named[1][1] == named[2][1]
    assert verify_ledger(story.federation.settings(HOSPITAL).state / LEDGER).entries == len(story.entries())


def test_without_a_change_there_is_one_fingerprint_and_no_entry(federation: Federation) -> None:
    """And no two hospitals have the same, though nobody compares them."""
    federation.run()

    entries = [entry for name in federation.names for entry in federation.ledger(name)]
    approvals = [entry.population_fingerprint for entry in entries if entry.kind == "plan-approved"]
    assert len(set(approvals)) == len(federation.names)
    assert None not in approvals
    assert [entry for entry in entries if entry.kind == "population-changed"] == []


def test_nobody_leaves_in_the_middle_of_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the list after stage 1, a patient is in this round and out of the next; a new proposal changes nothing."""
    story = Story(tmp_path, monkeypatch)
    patient = story.patients[5]
    row = story.row(patient)

    def say_no_and_propose_again() -> None:
        story.says_no(patient)()
        hospital = client.app.hospital_at(str(story.federation.settings_file(HOSPITAL)))
        hospital.enrol(Proposal(plan=story.federation.plan.model_dump(mode="json")))

    story.acts[TrainRequest, 2] = say_no_and_propose_again

    story.federation.run()

    assert [holds(records, row) for records in story.given] == [True, True, False]


def test_whom_a_new_export_no_longer_holds_is_not_in_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are read again when their file has changed; the ledger says so."""
    story = Story(tmp_path, monkeypatch)
    lines = story.data.read_text(encoding="utf-8").splitlines()
    row = story.row(story.patients[5])
    shorter = "\n".join([*lines[:6], *lines[7:]])
    story.acts[AdvertiseRequest, 2] = lambda: story.data.write_text(shorter, encoding="utf-8")

    story.federation.run()

    assert [holds(records, row) for records in story.given] == [True, False, False]
    assert len(story.entries("population-changed")) == 1


def test_after_a_restart_the_change_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last recorded fingerprint is read from the ledger, not remembered."""
    story = Story(tmp_path, monkeypatch)
    patient = story.patients[5]

    def say_no_and_restart() -> None:
        story.says_no(patient)()
        restart(story.federation, HOSPITAL)

    story.acts[AdvertiseRequest, 2] = say_no_and_restart

    story.federation.run()

    assert len(story.entries("population-changed")) == 1
    assert story.entries("charge")[-1].round == 3


@pytest.mark.parametrize("cause", ["the opt-out list {} cannot be read", "line 1 of the opt-out list {} has a comment"])
def test_a_list_that_cannot_be_understood_stops_the_hospital(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No charge, nothing trained, the cause in the log without any id; mended, it takes part again."""
    story = Story(tmp_path, monkeypatch)
    patient = story.patients[5]
    broken = story.list.unlink if "cannot" in cause else story.says_no(f"{patient} # moved")
    story.acts[AdvertiseRequest, 2] = broken
    story.acts[AdvertiseRequest, 3] = story.says_no(patient)

    story.federation.run()

    assert [e.round for e in story.entries("charge")] == [1, 3]
    assert len(story.given) == 2
    assert cause.format(story.list) in caplog.text
    assert patient not in caplog.text


# what is visible from outside


def test_nothing_on_the_wire_changes_with_who_said_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same messages, of the same size, with the same figures and prices in them, though half the patients left."""
    evaluation = {"every": 1, "clip": 1.0, "noise_multiplier": 30.0}
    stories = [Story(tmp_path / name, monkeypatch, evaluation=evaluation) for name in ("all", "half")]
    for number, story in enumerate(stories):
        for name in story.federation.names:
            hold_out(
                story.federation.settings(name).records / "manifest.toml", find_task(story.federation.plan.task).classes
            )
        monkeypatch.setattr(client.round, "train", story._train)
        if number:
            story.acts[AdvertiseRequest, 2] = story.says_no(*story.patients[::2])
        story.federation.run()
        client.app.close_hospitals()

    assert stories[1].given[-1].patient_count < 0.6 * stories[0].given[-1].patient_count
    everybody, half = ([_visible(*answer) for answer in story.answers] for story in stories)
    assert half == everybody
    assert {type(body) for body, _ in story.answers} >= {Enrolment, Update, ReleasedStatistics, PrivacyStatement}
    sizes = [[len(sent) for origin, _, sent in s.federation.wire.trace if origin == HOSPITAL] for s in stories]
    np.testing.assert_allclose(sizes[1], sizes[0], atol=8)  # varints of times and ids in Flower's envelope


def _visible(body: Body, length: int) -> tuple[object, ...]:
    """All of an answer but keys, masks, signatures and hashes, of which the shape."""
    shape = (type(body), length, len(body.model_dump_json()))
    if isinstance(body, Update | ReleasedStatistics):
        receipt = body.receipt
        return (*shape, body.round, body.attempt, receipt.mechanism, receipt.charges, receipt.epsilon_filter)
    return (*shape, body) if isinstance(body, Enrolment | PrivacyStatement) else shape


def test_when_everybody_has_said_no_noise_is_still_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hospital answers every round, pays for it and adds its noise; to whom it says so is its own ledger."""
    story = Story(tmp_path, monkeypatch)
    story.acts[AdvertiseRequest, 2] = story.says_no(*story.patients)

    story.federation.run()

    assert [records.patient_count for records in story.given][1:] == [0, 0]
    assert [event["answered"] for event in story.federation.events("round")] == [story.federation.names] * 3
    assert story.federation.charges(HOSPITAL) == [(1, 1), (2, 1), (3, 1)]
    assert story.entries("study-closed")
    assert isinstance(story.answers[-1][0], PrivacyStatement)
