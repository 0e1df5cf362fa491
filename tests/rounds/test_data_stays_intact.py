"""A study leaves the hospital's records as they were, and no copy of a patient's data or id anywhere."""

import hashlib
import logging
import os
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w

from client.records.manifest import read_manifest
from client.records.tabular import read_table
from shared_models.tasks import Numeric, TableInput, find_task
from tests.federation import Federation, make_federation

EVALUATION = {"every": 1, "clip": 1.0, "noise_multiplier": 30.0}


@pytest.fixture
def marked(tmp_path: Path) -> Federation:
    """A federation whose patients have ids and values that occur nowhere else, and can be searched for."""
    federation = make_federation(tmp_path / "federation", rounds=2, evaluation=EVALUATION)
    task = find_task(federation.plan.task)
    assert isinstance(task.input, TableInput)
    rng = np.random.default_rng(7)
    for name in federation.names:
        folder = federation.settings(name).records
        frame = pd.read_csv(folder / "data.csv")
        frame["patient"] = [f"PATIENT-7f3a-{name}-{number:04}" for number in range(len(frame))]
        for column in task.input.columns:
            assert isinstance(column, Numeric)
            inner = frame[column.name].clip(column.low + 0.01 * (column.high - column.low), column.high * 0.99)
            frame[column.name] = inner * (1 + rng.uniform(0.0001, 0.001, len(frame)))
        frame.to_csv(folder / "data.csv", index=False, float_format="%.12g")
        hold_out(folder / "manifest.toml", task.classes)
        settings = federation.settings_file(name)
        settings.write_text('opt_out = "opt-out.txt"\n' + settings.read_text(encoding="utf-8"), encoding="utf-8")
        (settings.parent / "opt-out.txt").write_text(f"PATIENT-7f3a-{name}-0003\n", encoding="utf-8")
    return federation


def inputs_of(federation: Federation) -> list[Path]:
    """All that a hospital only reads: its records, its list, its settings."""
    homes = [federation.settings_file(name).parent for name in federation.names]
    records = [federation.settings(name).records for name in federation.names]
    return [*records, *(p for f in records for p in f.iterdir()), *(h / f for h in homes for f in INPUTS)]


INPUTS = ("opt-out.txt", "hospital.toml", "roster.json")


def snapshot(paths: list[Path]) -> dict[Path, tuple[object, ...]]:
    """Content and times of files, names in folders; the inode's time cannot be set back."""
    return {
        path: (
            sorted(path.iterdir()) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest(),
            *(path.stat().st_mode, path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns),
        )
        for path in paths
    }


def needles(federation: Federation) -> dict[str, bytes]:
    """What must not be found: every id and its plain hashes, every cell as text and as a number, every encoded row."""
    found: dict[str, bytes] = {}
    for name in federation.names:
        manifest = read_manifest(federation.settings(name).records)
        frame = pd.read_csv(manifest.file, dtype=str)
        for row, patient in enumerate(frame["patient"]):
            found[f"id {patient}"] = patient.encode()
            for kind in ("md5", "sha1", "sha256", "blake2b"):
                digest = hashlib.new(kind, patient.encode())
                found[f"{kind} of {patient}"], found[f"hex {kind} of {patient}"] = (
                    digest.digest(),
                    digest.hexdigest().encode(),
                )
            for cell in frame.drop(columns=["patient", manifest.label]).iloc[row]:
                found[f"cell {cell}"], found[f"number {cell}"] = cell[:-1].encode(), np.float64(cell).tobytes()
        everybody, _ = read_table(
            manifest.model_copy(update={"validation_fraction": 0.0}), find_task(manifest.task), split_key=b""
        )
        for row, values in enumerate(everybody.inputs[:].numpy()):
            found[f"encoded row {row} of {name}"] = values[:4].tobytes()
    return found


def hold_out(manifest: Path, classes: tuple[str, ...]) -> None:
    """Keep a fifth of the patients for validation, of whatever classes they are."""
    fields = tomllib.loads(manifest.read_text(encoding="utf-8"))
    changed = {**fields, "validation_fraction": 0.2, "absent_classes": list(classes)}
    manifest.write_text(tomli_w.dumps(changed), encoding="utf-8")


@contextmanager
def writes(watched: list[Path]) -> Iterator[None]:
    """Collect every path that this process opens for writing, makes, renames or connects a database to."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not on:
            return
        if event == "open" and arguments[0] is not None and not isinstance(arguments[0], int):
            mode, flags = arguments[1] or "", arguments[2] or 0
            if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                watched.append(Path(os.fsdecode(arguments[0])))
        elif event in {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "sqlite3.connect"}:
            texts = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
            watched.extend(Path(text.removeprefix("file:").partition("?")[0]) for text in texts)  # SQLite takes URLs

    on = [True]
    sys.addaudithook(hook)  # there is no way to remove one
    try:
        yield
    finally:
        on.clear()


def test_no_id_and_no_value_of_a_patient_is_written_anywhere(
    marked: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not into ledger, registry, transcripts, log, journal, checkpoints or model, at a hospital or the coordinator."""
    before, scratch = snapshot(inputs_of(marked)), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")
    written: list[Path] = []

    with writes(written):
        marked.run()

    # the study was real
    assert [event["answered"] for event in marked.events("round")] == [marked.names] * 2
    # what was there is as it was, and nothing was opened for writing but in the folders that are for it
    assert snapshot(inputs_of(marked)) == before
    homes = [marked.settings_file(name).parent for name in marked.names]
    allowed = [
        marked.folder / "study",
        marked.folder / "study.toml",
        marked.folder / "last-receipts.json",  # the coordinator's
        marked.folder / "last-receipts.json.new",
        *(marked.folder / f"coordinator.sqlite{end}" for end in ("", "-wal", "-shm")),
        *(h / f for h in homes for f in ("state", "registry")),
    ]
    elsewhere = {p for p in written if not any(p.absolute().is_relative_to(folder) for folder in allowed)}
    assert {p for p in elsewhere if "__pycache__" not in p.parts} <= {Path(os.devnull), marked.folder}  # to sync it
    assert {marked.settings(name).state / "ledger.sqlite" for name in marked.names} <= set(written)
    assert list(scratch.rglob("*")) == []
    # nothing of a patient is in anything but the records
    files = [p for p in marked.folder.rglob("*") if p.is_file() and not _is_input(marked, p)]
    assert {p.name for p in files} >= {"ledger.sqlite", "transcripts.jsonl", "events.jsonl", "model.safetensors"}
    haystack = b"\n".join([*(p.read_bytes() for p in files), caplog.text.encode()])
    words = needles(marked)
    assert [what for what, needle in words.items() if needle in haystack] == []
    records = b"\n".join((marked.settings(name).records / "data.csv").read_bytes() for name in marked.names)
    assert [what for what, needle in words.items() if what.startswith(("id ", "cell ")) and needle not in records] == []


def _is_input(federation: Federation, path: Path) -> bool:
    return path.is_relative_to(federation.folder / "data") or path.name in INPUTS


def _of_more_columns(text: str) -> str:
    return text.replace("PATIENT-7f3a", "PATIENT-7f3a, ")


def _out_of_range(text: str) -> str:
    lines = text.splitlines()
    cells = lines[2].split(",")
    return "\n".join([*lines[:2], ",".join([cells[0], "123456.789", *cells[2:]]), *lines[3:]])


def _without_an_id(text: str) -> str:
    lines = text.splitlines()
    return "\n".join([*lines[:2], "," + lines[2].partition(",")[2], *lines[3:]])


@pytest.mark.parametrize("spoil", [_of_more_columns, _out_of_range, _without_an_id])
def test_records_that_are_refused_leave_no_trace_either(
    spoil: Callable[[str], str], marked: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """An error about a cell is the likeliest way for a cell into a log."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "konsil")
    words = needles(marked)
    data = marked.settings("hospital-1").records / "data.csv"
    data.write_text(spoil(data.read_text(encoding="utf-8")), encoding="utf-8")

    marked.run()

    assert marked.events("round")[0]["answered"] == marked.names[1:]
    assert "run konsil-hospital check-data" in caplog.text
    files = [p for p in marked.folder.rglob("*") if p.is_file() and not _is_input(marked, p)]
    haystack = b"\n".join([*(p.read_bytes() for p in files), caplog.text.encode()])
    assert [what for what, needle in words.items() if needle in haystack] == []
    assert b"123456.789" not in haystack
