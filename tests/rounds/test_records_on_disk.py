"""A study on pictures that stay on the disk: decoded when they are drawn, and no error once a round is paid for."""

import logging
from pathlib import Path

import pytest
from flwr.app import Message

from shared_models.messages import TrainRequest
from tests.rounds import test_other_records
from tests.rounds.test_data_stays_intact import writes

ROUNDS = 2


def test_pictures_that_go_bad_in_a_round_cost_it_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hospitals keep no picture in memory. One's file is damaged, another's replaced, after a round began.

    Everybody answers and pays for every round as planned. Only the log at the hospital says that something was wrong:
    how many records, and neither which nor whose.
    """
    monkeypatch.setattr(test_other_records, "ROUNDS", ROUNDS)
    monkeypatch.setattr(test_other_records, "PATIENTS", 24)
    federation = test_other_records.lay_out(tmp_path, "pneumonia")
    for name in federation.names:
        settings = federation.settings_file(name)
        settings.write_text("records_memory_mb = 0\n" + settings.read_text(encoding="utf-8"), encoding="utf-8")
    damaged = [federation.settings("hospital-1").records / f"{number}.png" for number in range(12)]
    replaced = [federation.settings("hospital-2").records / f"{number}.dcm" for number in range(12)]
    written: list[Path] = []

    def spoil(hospital: str, request: Message) -> None:
        if request.metadata.message_type != TrainRequest.action or request.metadata.group_id != "1":
            return
        if hospital == "hospital-1":
            for path in damaged:
                data = path.read_bytes()
                path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])  # pixels, under a checksum
        if hospital == "hospital-2":
            for path in replaced:
                path.with_suffix(".new").write_bytes(path.read_bytes())
                path.with_suffix(".new").replace(path)

    federation.wire.on_request = spoil
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")

    with writes(written):
        federation.run()

    assert [event["answered"] for event in federation.events("round")] == [federation.names] * ROUNDS
    for name in federation.names:
        assert federation.charges(name) == [(number, 1) for number in range(1, ROUNDS + 1)]
    # Of twelve some are drawn in 8 steps at one half: none with probability 2**-96.
    counted = [line for line in caplog.messages if "cannot be read, or their files changed" in line]
    assert counted
    assert not [line for line in caplog.messages if any(f"{path.stem}.p" in line for path in damaged)]
    assert not any(
        f"{hospital}-{number}" in line for line in counted for hospital in federation.names for number in (0, 5)
    )
    by_us = [*damaged, *(path.with_suffix(".new") for path in replaced), *replaced]
    folders = [federation.settings(name).records for name in federation.names]
    assert {path for path in written if path.parent in folders} <= set(by_us)
