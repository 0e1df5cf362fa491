"""Files read in parts, rows that memory has no room for: the same records, splits and errors as of all in memory."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from os import pread
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from client.augment import augmented
from client.dp_sgd import local_steps
from client.evaluate import released_statistics, statistics
from client.keys import split_key
from client.records import series
from client.records.manifest import read_manifest
from client.records.on_disk import OnDemand
from client.records.population import Source
from client.records.report import summarise, summarise_own
from client.records.scratch import ROOM, Room, Scratch
from client.records.tabular import checked_table, read_inputs, read_table, split_table
from shared_models.errors import RecordsError
from shared_models.nets.build import build_network
from shared_models.plan import Augmentation, EvaluationPlan, Mlp, Network, Transformer, UNet
from shared_models.tasks import Outline, Task
from tests.client import test_labels, test_population, test_rows, test_series, test_text
from tests.client.made_up import repeatable
from tests.client.test_scratch import disk_of, nameless

few = examples(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEY = b"the key of a test"


def ways(folder: Path) -> Iterator[dict[str, Any]]:
    """Parts of one row, of some, and all in one; room for nothing, for a few rows, for everything."""
    yield {"at_once": 1, "room": Room(100, folder)}
    yield {"at_once": 7, "room": Room(0, folder)}
    yield {"at_once": 1000, "room": ROOM}


def outcome(folder: Path, task: Task, *, at_once: int, room: Room) -> str:
    """All that a reading gives, or the words with which it is refused."""
    manifest = read_manifest(folder)
    try:
        table = checked_table(manifest, task, room=room, at_once=at_once)
        parts = split_table(table, manifest, task, split_key=KEY, room=room)
    except RecordsError as error:
        return f"{error} | {error.hint}"
    records = [(r.inputs[:].tolist(), r.targets[:].tolist(), r.patients.tolist(), r.patient_count) for r in parts]
    aside = {**table.missing}, table.left_out, {**table.seen}, {**table.set_aside}
    return repr((table.patients.ids, [r.targets[:].dtype for r in parts], aside, records))


def predicted(folder: Path, task: Task, *, at_once: int, room: Room) -> str:
    """All that a reading without labels gives, or the words with which it is refused."""
    try:
        parts = list(read_inputs(read_manifest(folder), task, at_once=at_once, room=room))
    except RecordsError as error:
        return f"{error} | {error.hint}"
    joined = [[v for p in parts for v in f(p)] for f in (_rows, lambda p: p.patients, lambda p: p.kept.tolist())]
    return repr((joined, [text for p in parts for text in p.texts], torch.cat([p.inputs for p in parts]).tolist()))


def _rows(part: Any) -> list[int]:
    rows: list[int] = part.rows
    return rows


def same(folder: Path, task: Task) -> str:
    """What every size of parts and every room give."""
    found = {outcome(folder, task, **way) for way in ways(folder)}
    assert len(found) == 1, "\n".join(found)
    also = {predicted(folder, task, **way) for way in ways(folder)}
    assert len(also) == 1, "\n".join(also)
    return found.pop()


# tables

row = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b", "c", "d", "e", "f", "g", " g", "h", ""]),
        "age": st.sampled_from(["0", "-0", "50.5", "100", "7", "7.0", "", "101", "x", "inf"]),
        "stage": st.sampled_from(["i", "ii", "iii", "", "iv"]),
        "outcome": st.sampled_from(["well", "ill", "", "dead"]),
    }
)
sound = st.fixed_dictionaries(
    {
        "id": st.sampled_from(list("abcdefghij")),
        "age": st.sampled_from(["0", "-0", "50.5", "100", "7.0", ""]),
        "stage": st.sampled_from(["i", "ii", "iii", ""]),
        "outcome": st.sampled_from(["well", "ill"]),
    }
)


def write_rows(folder: Path, file: str, rows: list[dict[str, str]], **changes: Any) -> Path:
    """A table in one of the formats."""
    frame, path = pd.DataFrame(rows), folder / file
    for old in folder.glob("data.*"):
        old.unlink()
    if file.endswith(".csv"):
        frame.to_csv(path, index=False)
    elif file.endswith(".parquet"):
        frame.to_parquet(path, row_group_size=3)
    elif file.endswith(".jsonl"):  # an empty cell is a key that is left out: parts have other columns than the file
        path.write_text("".join(json.dumps({k: v for k, v in r.items() if v}) + "\n" for r in rows), encoding="utf-8")
    else:
        with sqlite3.connect(folder / "data.db") as database:
            frame.to_sql("records", database, index=False)
        database.close()
        path.write_text("SELECT * FROM records", encoding="utf-8")
        url = folder / "url"
        url.write_text(f"sqlite:///{folder / 'data.db'}", encoding="utf-8")
        url.chmod(0o600)
        changes = {"sql": {"url_file": "url"}, **changes}
    return test_rows.write(folder, file=file, validation_fraction=0.3, **changes)


@examples(few, max_examples=40)
@given(
    rows=st.lists(row, min_size=1, max_size=12) | st.lists(sound, min_size=8, max_size=16),
    file=st.sampled_from(["data.csv", "data.parquet", "data.jsonl", "data.sql"]),
    patients=st.sampled_from([{}, {"one_row_per_patient": True}, {"patient": None, "one_row_per_patient": True}]),
    left_out=st.booleans(),
)
def test_a_table_is_the_same_however_it_is_read(
    tmp_path: Path, rows: list[dict[str, str]], file: str, patients: dict[str, Any], left_out: bool
) -> None:
    """Ids, splits, numbers of equal rows, counts and every error, whatever the parts and the room."""
    incomplete = "leave-out" if left_out else "refuse"

    write_rows(tmp_path, file, rows, incomplete_rows=incomplete, absent_classes=["well", "ill"], **patients)
    same(tmp_path, test_rows.TASK)


def test_an_error_is_of_the_whole_file(tmp_path: Path) -> None:
    """The first check that fails anywhere, its first cell, and how many there are, in whatever part they lie."""
    good = {"id": "a", "age": "1", "stage": "i", "outcome": "ill"}
    rows = [dict(good, id=f"p{number}") for number in range(30)]
    rows[3]["stage"] = "iv"
    rows[20]["age"] = rows[21]["age"] = rows[29]["age"] = "101"
    words = "row 22, column 'age', value '101': is outside the public range 0 to 100 year (and 2 more like it) | "
    assert words in same(write_rows(tmp_path, "data.csv", rows), test_rows.TASK)

    rows[29]["outcome"] = "dead"  # labels are looked at first
    assert "row 31, column 'outcome', value 'dead': is none of" in same(
        write_rows(tmp_path, "data.csv", rows), test_rows.TASK
    )

    again = [dict(good, id=identity) for identity in ("a", "b", "a", "c", "b")]
    words = "row 4, column 'id', value 'a': the patient has an earlier row, but the manifest declares"
    found = outcome(
        write_rows(tmp_path, "data.csv", again, one_row_per_patient=True), test_rows.TASK, at_once=2, room=ROOM
    )
    assert words in found
    assert "(and 1 more like it)" in found


def test_an_id_of_content_is_the_rows_own(tmp_path: Path) -> None:
    """However zero is written, and whatever numbers other rows hold: nobody else's row moves a patient."""
    row = {"id": "a", "age": "-0", "stage": "i", "outcome": "ill"}
    folder = write_rows(tmp_path, "data.csv", [row], patient=None, one_row_per_patient=True)
    alone = checked_table(read_manifest(folder), test_rows.TASK).patients.ids

    write_rows(tmp_path, "data.csv", [row, row | {"age": "7.5"}], patient=None, one_row_per_patient=True)
    both = checked_table(read_manifest(folder), test_rows.TASK).patients.ids

    assert (alone, both) == (["(0.0, 0, 1, 0)"], ["(0.0, 0, 1, 0)", "(7.5, 0, 1, 0)"])


def test_whole_numbers_of_parquet_stay_whole(tmp_path: Path) -> None:
    """Two patients whose ids differ in the seventeenth digit are two, also in a part with a missing id's cell."""
    rows = pd.DataFrame(test_rows.ROWS).assign(id=pd.array([9007199254740993, 9007199254740992, None], dtype="Int64"))
    rows.loc[2, "age"] = None
    rows.to_parquet(tmp_path / "data.parquet")
    test_rows.write(tmp_path, file="data.parquet", incomplete_rows="leave-out")

    assert "['9007199254740993', '9007199254740992']" in same(tmp_path, test_rows.TASK)


# texts

TEXTS = ["a cough", "a fever, no cough", "a cough ", "", "mrn: 12345", "- - -", "\N{LATIN SMALL LETTER E WITH ACUTE}"]


@few
@given(
    notes=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=12),
    patients=st.sampled_from([{}, {"patient": None, "one_row_per_patient": True}]),
    changes=st.sampled_from([{}, {"found_in_text": "mask"}, {"found_in_text": "mask", "incomplete_rows": "leave-out"}]),
)
def test_texts_are_the_same_however_they_are_read(
    tmp_path: Path, notes: list[str], patients: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Token ids in as many bytes as the vocabulary needs, ids of content as before, and every error."""
    absent: dict[str, Any] = {"absent_classes": [*test_text.MANIFEST["absent_classes"], "urology", "neurology"]}

    same(test_text.write(tmp_path, notes, **patients, **changes, **absent), test_text.TASK)


# series in long form


@few
@given(
    seed=st.integers(0, 2**32),
    at_once=st.integers(5, 20),
    changes=st.sampled_from(
        [{}, {"incomplete_rows": "leave-out"}, {"incomplete_rows": "leave-out", "out_of_range": "leave-out"}]
    ),
)
def test_series_are_the_same_however_they_are_binned(
    tmp_path: Path, seed: int, at_once: int, changes: dict[str, Any]
) -> None:
    """To the last bit: all bins at once, or heap after heap of neighbouring records; and every error."""
    rng = np.random.default_rng(seed)
    stays = [f"s{n},p{n // 2},{('well', 'ill')[n % 2]}" for n in range(rng.integers(1, 9))]
    names, values = (
        rng.choice(["HR", "fluid", "warmth", "other"], 60),
        rng.choice(["21", "30.1", "39", "400", "650", "", "?"], 60),
    )
    measured = [
        f"s{rng.integers(9)},{rng.integers(-1, 20) / 4},{name},{value}"
        for name, value in zip(names, values, strict=True)
        if rng.random() < 0.5 or (name != "warmth" and value != "?")
    ]
    test_series.write(
        tmp_path,
        ["stay,at,name,value", *measured],
        ["stay,person,outcome", *stays],
        long={"absent_variables": ["pulse", "fluid", "warmth"]},
        absent_classes=["well", "ill"],
        **changes,
    )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(series, "_AT_ONCE", at_once)
        found = same(tmp_path, test_series.TASK)
        patched.setattr(series, "_AT_ONCE", 1000)
        assert outcome(tmp_path, test_series.TASK, at_once=1000, room=ROOM) == found


def test_heaps_are_no_larger_than_their_room(tmp_path: Path) -> None:
    """Bins of a few records at once, unless there would be more heaps than files a process may have."""
    schema = test_series.TASK.input
    sizes = []
    for memory, records in ((0, 1200), (4 * 64 * 12 * 100, 1200), (4 * 64 * 12 * 1200, 1200)):
        heaps = series._Heaps(records, schema, Room(memory, tmp_path))  # type: ignore[arg-type]
        sizes.append([len(bins._counts) for bins in heaps.binned()])

    assert sizes == [[3] * 400, [100] * 12, [1200]]


# masks, and images in an archive


@pytest.mark.parametrize("patient", [{}, {"patient": None, "one_row_per_patient": True}])
def test_masks_are_the_same_wherever_they_lie(tmp_path: Path, patient: dict[str, Any]) -> None:
    """Named by rows; ids that are made of them as before."""
    folder, masks = test_labels.write_outlines(tmp_path)
    rows = pd.read_csv(folder / "data.csv")
    test_labels.write(folder, rows, columns={"mask": "organ"}, categories={}, **patient)
    task = test_labels.task_with(Outline(name="mask"), image=True)

    assert repr(masks.reshape(3, -1).astype(float).tolist()) in same(folder, task)

    Image.fromarray(masks[0]).save(folder / "1-mask.png", format="GIF")
    assert "1-mask.png cannot be read" in same_reading(folder, task)


def same_reading(folder: Path, task: Task) -> str:
    """What every size of parts and every room give with labels."""
    found = {outcome(folder, task, **way) for way in ways(folder)}
    assert len(found) == 1, "\n".join(found)
    return found.pop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("patient", [{}, {"patient": None, "one_row_per_patient": True}])
def test_an_archive_is_the_same_wherever_it_lies(
    tmp_path: Path, save: Callable[..., None], patient: dict[str, Any]
) -> None:
    """Compressed or not, in C order or Fortran's, bytes or booleans; images and masks that are equal are told apart."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 28, 30), dtype=np.uint8)[[0, 1, 2, 0, 0, 5, 6, 7, 8]]
    masks = (rng.integers(0, 3, (9, 28, 30)) > 1)[[0, 1, 2, 0, 4, 5, 6, 7, 8]]
    task = test_labels.task_with(Outline(name="mask"), image=True)
    found = set()
    for array in (masks, masks.astype(np.int64) * 3, np.asfortranarray(masks)):
        save(tmp_path / "data.npz", images=images, mask=array, id=np.array(list("abcdefghi")))
        changes = {"file": "data.npz", "columns": {}, "categories": {}, "validation_fraction": 0.3} | patient
        test_labels.write(tmp_path, **changes)
        found.add(same(tmp_path, task))

    assert len(found) == 1


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_compressed_archive_that_is_damaged_is_an_error(tmp_path: Path, place: float) -> None:
    """Read some images at a time, and held against the checksum at its end all the same."""
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 30), dtype=np.uint8)
    np.savez_compressed(tmp_path / "data.npz", images=images, mask=images, id=np.array(list("abcdefghi")))
    data = bytearray((tmp_path / "data.npz").read_bytes())
    data[int(place * len(data))] ^= 4
    (tmp_path / "data.npz").write_bytes(data)
    test_labels.write(tmp_path, file="data.npz", columns={}, categories={})

    assert "data.npz cannot be read" in same_reading(tmp_path, test_labels.task_with(Outline(name="mask"), image=True))


# training


def kinds(folder: Path) -> Iterator[tuple[Path, Task, Network]]:
    """A table, texts and masks."""
    for name in ("table", "texts", "masks"):
        (folder / name).mkdir()
    cycle = [("0", "i", "well"), ("50.5", "ii", "ill"), ("9", "iii", "well"), ("100", "i", "ill")]
    rows = [dict(zip(("age", "stage", "outcome"), cycle[n % 4], strict=True), id=f"p{n // 2}") for n in range(24)]
    yield write_rows(folder / "table", "data.csv", rows), test_rows.TASK, Mlp(name="mlp", hidden=(4,))
    notes = [f"a cough of {number} days" for number in range(20)]
    yield (
        test_text.write(folder / "texts", notes),
        test_text.TASK,
        Transformer(name="transformer", width=8, heads=2, layers=1),
    )
    masks, _ = test_labels.write_outlines(folder / "masks")
    yield masks, test_labels.task_with(Outline(name="mask"), image=True), UNet(name="unet", channels=(2, 4))


def test_a_private_round_takes_the_same_steps_from_the_disk(tmp_path: Path) -> None:
    """Of every kind: the same draws, clips and noise, the same evaluation and release."""
    for folder, task, network in kinds(tmp_path):
        found = []
        for room in (ROOM, Room(0, tmp_path)):
            records, _ = read_table(read_manifest(folder), task, split_key=KEY, room=room)
            assert isinstance(records.targets if isinstance(task.heads[0], Outline) else records.inputs, OnDemand) == (
                room is not ROOM
            )
            model = build_network(network, task, seed=0)
            local_steps(
                model, records, task, steps=2, learning_rate=0.1, clip=1.0, noise_multiplier=1.0, sample_rate=0.6,
                expected_batch=3, random=repeatable(), micro_batch=2,
            )  # fmt: skip
            plan = EvaluationPlan(every=1, clip=1.0, noise_multiplier=1.0, bins=10)
            released = released_statistics(
                model, records, task, plan=plan, random=repeatable(1), allow_test_random=True
            )
            exact = statistics(model, records, task, bins=10)
            found.append([*[p.detach().numpy() for p in model.parameters()], released, exact])
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_copies_of_masks_stay_masks(tmp_path: Path) -> None:
    """Pictures whose contrast is changed, as often as the plan says, each with its own mask, from the disk too."""
    folder, masks = test_labels.write_outlines(tmp_path)
    task = test_labels.task_with(Outline(name="mask"), image=True)
    records, _ = read_table(read_manifest(folder), task, split_key=KEY, room=Room(0, tmp_path))

    changed = augmented(records, task, Augmentation(copies=2, contrast=0.1), repeatable())

    np.testing.assert_array_equal(changed.targets[:], np.repeat(masks.reshape(3, -1), 2, axis=0))
    assert (len(changed.inputs), changed.patients.tolist()) == (6, [0, 0, 1, 1, 2, 2])


# a hospital


def test_a_hospital_without_memory_reads_nothing_readable_from_its_disk(tmp_path: Path) -> None:
    """Values are nowhere in the raw bytes, in the state folder is no file for them, and check-data says the same."""
    own = test_population.settings(tmp_path).model_copy(update={"records_memory_mb": 0})
    rng = np.random.default_rng(0)
    ages = rng.uniform(0, 100, 200)
    rows = [
        {"id": f"p{n}", "age": f"{age:.9f}", "stage": "ii", "outcome": ("well", "ill")[n % 2]}
        for n, age in enumerate(ages)
    ]
    write_rows(own.records, "data.csv", rows)
    source = Source(test_rows.TASK)
    source.current(own)  # which makes the hospital's keys
    files = set(own.state.rglob("*"))

    inputs = Source(test_rows.TASK).current(own).training.inputs[:]

    raw = b"".join(pread(file, 1 << 20, 0) for file in nameless(own.state))
    assert len(raw) >= 200 * 9
    assert not any(value.tobytes() in raw for value in np.array([row["age"] for row in rows]).astype(np.float64))
    assert not any(value.tobytes() in raw for value in inputs.numpy()[:, 0])
    assert set(own.state.rglob("*")) == files
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shared_models.tasks.TASKS", {"small": test_rows.TASK})
        assert summarise(own.records, room=Room(0, own.state)) == summarise(own.records)


def test_a_full_disk_is_an_error_of_the_records(tmp_path: Path) -> None:
    """Found when records are read, which is before anything is charged."""
    rows = [{"id": f"p{n}", "age": "1", "stage": "ii", "outcome": ("well", "ill")[n % 2]} for n in range(200)]
    write_rows(tmp_path, "data.csv", rows)

    with disk_of(1000), pytest.raises(RecordsError, match=f"do not fit into memory, and not into {tmp_path} either"):
        read_table(read_manifest(tmp_path), test_rows.TASK, split_key=KEY, room=Room(0, tmp_path))


def test_a_check_keeps_to_the_room_that_the_settings_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``check-data`` and the page read lies where a study's records would: if not in memory, in ``state``."""
    own = test_population.settings(tmp_path).model_copy(update={"records_memory_mb": 0})
    opened: list[Path | None] = []

    def noted(scratch: Scratch) -> int:
        opened.append(scratch._folder)
        return opening(scratch)

    opening = Scratch._open
    monkeypatch.setattr(Scratch, "_open", noted)
    monkeypatch.setattr("shared_models.tasks.TASKS", {"small": test_rows.TASK})
    own.state.mkdir(exist_ok=True)

    assert summarise_own(own) == summarise(own.records, split_key=split_key(own.state))
    assert opened
    assert set(opened) == {own.state}
