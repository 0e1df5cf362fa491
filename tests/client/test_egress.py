"""The log of what leaves, line by line; that it agrees with the socket is shown in tests/rounds/test_what_leaves.py."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest

import client.egress
from client.egress import EGRESS, FREE, EgressLog, summary
from client.evidence import read_evidence
from client.settings import Settings
from shared_models.errors import LedgerError
from shared_models.messages import Enrolment, Proposal, Refusal, Update
from shared_models.receipts import Receipt
from tests.link import Keys

RECEIPT = Receipt(
    entry_hash="a" * 64, chain_head="b" * 64, mechanism={"é": 1}, charges=1, epsilon_filter=1e-7, signature="c" * 128
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A hospital's settings; its state folder is made when it is needed."""
    return Keys(tmp_path, names=("north",)).hospital("north")


def test_fields_add_up_to_the_bytes_that_leave(settings: Settings) -> None:
    """Also with texts that are longer in bytes than in letters, and numbers in scientific notation."""
    body = Update(study="a-study", round=2, attempt=1, context="d" * 64, receipt=RECEIPT)

    EgressLog(settings).reply(body, np.arange(5, dtype=np.uint32))

    (line,) = read_evidence(settings.state / EGRESS)
    assert line["bytes"] == len(body.model_dump_json().encode()) + 20
    assert sum(field["bytes"] for field in line["fields"].values()) == line["bytes"]
    assert (line["study"], line["round"], line["attempt"], line["to"]) == ("a-study", 2, 1, settings.coordinator)
    assert {name: field["price"] for name, field in line["fields"].items() if field["price"] != FREE} == {
        "vector": f"charge {'a' * 64}"
    }


def test_an_enrolment_is_listed_under_the_study_that_was_proposed(settings: Settings) -> None:
    """Its body does not name it."""
    body = Enrolment(plan_digest="0" * 64, public_size=10, software_digest="0" * 64)

    EgressLog(settings).reply(body, None, to=Proposal(plan={"study": "a-study"}))

    assert [line["study"] for line in read_evidence(settings.state / EGRESS)] == ["a-study"]


def test_calls_are_counted_and_written_in_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet hours are not unlisted hours: counts are written while there are only polls."""
    log, request = EgressLog(settings), httpx.Request("POST", "https://h/v1/fleet/pull-messages", content=b"12345")
    log.count(request)
    assert list(read_evidence(settings.state / EGRESS)) == []
    monkeypatch.setattr(client.egress, "COUNTS_EVERY_S", 0.0)

    log.count(request)

    (line,) = read_evidence(settings.state / EGRESS)
    head = b"POST /v1/fleet/pull-messages HTTP/1.1\r\n"
    rest = b"".join(name + b": " + value + b"\r\n" for name, value in request.headers.raw) + b"\r\n"
    expected = {"count": 2, "line": 2 * len(head), "headers": 2 * len(rest), "body": 10}
    assert line["calls"] == {"pull-messages": expected}
    assert sum(line["headers"].values()) + 2 * 2 == 2 * len(rest)


def test_what_cannot_be_listed_does_not_leave(settings: Settings) -> None:
    """The caller gets an error instead of a line, and sends nothing."""
    log = EgressLog(settings)
    (settings.state / EGRESS).mkdir()

    with pytest.raises(LedgerError, match="cannot be written"):
        log.reply(Refusal(code="policy"), None)


def test_only_a_last_line_may_be_cut(settings: Settings) -> None:
    """A crash cuts the end; whoever cuts the middle is found."""
    log = EgressLog(settings)
    for _ in range(3):
        log.reply(Refusal(code="policy"), None)
    path = settings.state / EGRESS
    whole = path.read_bytes()

    path.write_bytes(whole[:-20])
    assert len(list(read_evidence(settings.state / EGRESS))) == 2
    EgressLog(settings).reply(Refusal(code="ledger"), None)
    assert len(list(read_evidence(settings.state / EGRESS))) == 3
    path.write_bytes(whole[20:])
    with pytest.raises(LedgerError, match="line 1 is damaged"):
        list(read_evidence(settings.state / EGRESS))


def test_the_summary_counts_charges_and_bytes(settings: Settings) -> None:
    """Twice the same field is one row."""
    log = EgressLog(settings)
    for number in (1, 2):
        receipt = RECEIPT.model_copy(update={"entry_hash": f"{number}" * 64})
        body = Update(study="a-study", round=number, attempt=1, context="d" * 64, receipt=receipt)
        log.reply(body, np.arange(5, dtype=np.uint32))

    rows = {row["field"]: row for row in summary(read_evidence(settings.state / EGRESS))["fields"]}

    assert (rows["vector"]["times"], rows["vector"]["bytes"], rows["vector"]["price"]) == (2, 40, "2 charges")
    assert rows["receipt"]["price"] == FREE
    assert json.dumps(rows)
