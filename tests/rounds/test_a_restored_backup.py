"""A hospital puts an old copy of its state folder back. It looks whole from the inside, and buys nothing."""

import json
import shutil
from pathlib import Path

import pytest

from client.anchor import ANCHORS, ROLLED_BACK
from client.books import Books
from shared_models.errors import RolledBackError
from shared_models.messages import AdvertiseRequest, Body, Proposal, Refusal, signed_receipt
from shared_models.receipts import Anchor, SignedReceipt
from tests.federation import Federation, changed, make_federation, restart, restart_hospitals
from tests.rounds.test_a_server_that_lies import HOSPITAL, Coordinator


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Four hospitals whose budget pays for several short studies."""
    return make_federation(tmp_path, rounds=2, privacy={"noise_multiplier": 40.0}, deadline_s=5.0)


def _run(federation: Federation, study: str) -> list[dict[str, str]]:
    """Run a study of this name; what hospitals refused in it."""
    federation.plan = changed(federation.plan, study=study)
    federation.run(study)
    return [{event["hospital"]: event["code"]} for event in federation.events("refused", study)]


def _restore(federation: Federation, copy: Path) -> None:
    state = federation.settings(HOSPITAL).state
    shutil.rmtree(state)
    shutil.copytree(copy, state)


def test_a_restored_backup_is_noticed_and_refunds_nothing(federation: Federation, tmp_path: Path) -> None:
    """The next study finds it, a restart changes nothing, the others go on; the newest copy brings it back."""
    state, old, new = federation.settings(HOSPITAL).state, tmp_path / "old", tmp_path / "new"
    assert _run(federation, "first") == []
    restart_hospitals()
    shutil.copytree(state, old)
    assert _run(federation, "second") == []
    restart_hospitals()
    shutil.copytree(state, new)
    _restore(federation, old)
    charged = federation.charges(HOSPITAL)

    refused = _run(federation, "third")

    assert refused == [{HOSPITAL: "rolled-back"}]
    assert federation.charges(HOSPITAL) == charged
    assert [entry.study for entry in federation.ledger(HOSPITAL) if entry.kind == "plan-approved"] == ["first"]
    assert (state / ROLLED_BACK).exists()
    assert all(set(event["answered"]) == set(federation.names[1:]) for event in federation.events("round", "third"))
    restart_hospitals()
    with pytest.raises(RolledBackError, match="second, round 2"):
        Books.open(federation.settings(HOSPITAL))
    _restore(federation, new)
    assert _run(federation, "fourth") == []
    assert federation.charges(HOSPITAL) == [(1, 1), (2, 1)] * 3


def test_the_mark_goes_with_the_ledger_that_has_what_was_signed(federation: Federation, tmp_path: Path) -> None:
    """An operator who puts only the ledger's files back has mended it; the mark alone stops nobody for ever."""
    state, old, new = federation.settings(HOSPITAL).state, tmp_path / "old", tmp_path / "new"
    Coordinator(federation).propose()
    restart_hospitals()
    shutil.copytree(state, old)
    _run(federation, federation.plan.study)
    restart_hospitals()
    shutil.copytree(state, new)
    _restore(federation, old)
    _run(federation, "next")
    restart_hospitals()

    for name in ("ledger.sqlite", "ledger.sqlite.head"):
        shutil.copy(new / name, state / name)
    Books.open(federation.settings(HOSPITAL)).close()

    assert not (state / ROLLED_BACK).exists()


def _first_receipt(coordinator: Coordinator) -> SignedReceipt:
    for name in coordinator.federation.names:
        coordinator.propose(name)
    upload = coordinator.train()
    return signed_receipt(upload)  # type: ignore[arg-type]  # fails where it is none


def _code(answer: Body) -> str:
    assert isinstance(answer, Refusal)
    return answer.code


def test_a_round_announced_to_a_ledger_that_forgot_is_refused(federation: Federation, tmp_path: Path) -> None:
    """Found in stage 1 too, before a key or a charge: also where the proposal said nothing of it."""
    coordinator = Coordinator(federation)
    coordinator.propose()
    restart(federation, HOSPITAL)
    shutil.copytree(federation.settings(HOSPITAL).state, tmp_path / "old")
    last = _first_receipt(coordinator)
    restart(federation, HOSPITAL)
    _restore(federation, tmp_path / "old")
    coordinator.propose()

    announcement = coordinator.announcement()
    first = coordinator.ask(AdvertiseRequest(announcement=announcement, anchor=Anchor(last=last)))
    silent = coordinator.ask(AdvertiseRequest(announcement=announcement))
    proposed = coordinator.propose()

    assert [_code(answer) for answer in (first, silent, proposed)] == ["rolled-back"] * 3
    assert federation.charges(HOSPITAL) == []


def test_a_receipt_that_is_not_ours_stops_nothing(federation: Federation) -> None:
    """A coordinator cannot make a hospital believe that it was rolled back: that takes the hospital's signature."""
    coordinator = Coordinator(federation)
    mine = _first_receipt(coordinator)
    forged = mine.model_copy(update={"receipt": mine.receipt.model_copy(update={"entry_hash": "0" * 64})})
    plan = federation.plan.model_dump(mode="json")

    answer = coordinator.ask(Proposal(plan=plan, anchor=Anchor(last=forged)))
    honest = coordinator.ask(Proposal(plan=plan, anchor=Anchor(last=mine)))

    assert _code(answer) == "foreign-receipt"
    assert not isinstance(honest, Refusal)
    assert not (federation.settings(HOSPITAL).state / ROLLED_BACK).exists()


def test_every_round_shows_all_hospitals_one_digest(federation: Federation) -> None:
    """What was shown is noted; hospitals that compare notes see whether the coordinator told all the same."""
    _run(federation, "first")
    _run(federation, "second")

    noted = [
        [json.loads(line) for line in (federation.settings(name).state / ANCHORS).read_bytes().splitlines()]
        for name in federation.names
    ]
    digests = [[(line["study"], line.get("round"), line["everybody"]) for line in lines] for lines in noted]
    assert all(other == digests[0] for other in digests)
    assert len({digest for _, _, digest in digests[0]}) == 4
    own = {name: {entry.hash for entry in federation.ledger(name)} for name in federation.names}
    for name, lines in zip(federation.names, noted, strict=True):
        assert lines[0]["last"] is None
        assert {line["last"] for line in lines[2:]} <= own[name]
