"""Records that are read when a batch needs them: the same numbers as in memory, little of them there, and no error."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.alone import train_without_privacy
from client.augment import augmented
from client.dp_sgd import local_steps
from client.evaluate import released_statistics, statistics
from client.records.images import scaled
from client.records.on_disk import OnDemand, OnDisk
from client.records.population import Source
from client.records.records import Records
from client.records.stamps import stamps
from client.settings import Settings
from shared_models.errors import RecordsError
from shared_models.nets.build import build_network
from shared_models.plan import Augmentation, Cnn, EvaluationPlan, Lstm, Mlp, Network, Transformer, UNet
from shared_models.tasks import PNEUMONIA, Outline, SeriesInput
from tests.client.made_up import Input, numeric, repeatable, table, task_of
from tests.client.test_pictures import grey, save, write
from tests.client.test_population import settings
from tests.rounds.test_data_stays_intact import writes

ROWS = 30
SHAPE = (1, 28, 28)
NET = Cnn(name="cnn", channels=(4, 8))
SERIES = SeriesInput(variables=(numeric("pulse"), numeric("breath")), steps=6, step_unit="hour")


def content(rows: int = ROWS) -> NDArray[np.uint8]:
    """Pictures of noise."""
    return np.random.default_rng(0).integers(0, 256, (rows, *SHAPE), dtype=np.uint8)


def on_disk(folder: Path, pixels: NDArray[np.uint8]) -> tuple[OnDisk, list[int]]:
    """One file of raw bytes per picture; and which were read, in order."""
    paths = [folder / f"{number}.raw" for number in range(len(pixels))]
    for path, picture in zip(paths, pixels, strict=True):
        path.write_bytes(picture.tobytes())
    readings: list[int] = []

    def read(number: int) -> NDArray[np.uint8]:
        readings.append(number)
        return np.frombuffer(paths[number].read_bytes(), np.uint8).reshape(SHAPE)

    found = OnDisk(
        read, shape=pixels.shape, dtype=np.uint8, files_of=lambda number: [paths[number]], stamps=stamps(paths)
    )
    return found, readings


def records_of(inputs: OnDemand | torch.Tensor) -> Records:
    """Ten patients with one, three or five records each."""
    patients = np.repeat(np.arange(10), np.resize([1, 3, 5], 10))[:ROWS]
    targets = torch.arange(len(patients)) % 2
    chosen = inputs[torch.arange(len(patients))] if isinstance(inputs, torch.Tensor) else inputs
    return Records(chosen, targets.float(), patients, int(patients.max()) + 1)


def both(folder: Path, kept: int = 0) -> tuple[Records, Records, OnDisk]:
    """The same records in memory and on the disk."""
    pixels = content(len(np.repeat(np.arange(10), np.resize([1, 3, 5], 10))[:ROWS]))
    disk, _ = on_disk(folder, pixels)
    disk.keep(kept)
    inputs = OnDemand(disk, np.arange(len(pixels)), scaled, forgiving=True)
    return records_of(torch.from_numpy(scaled(pixels))), records_of(inputs), disk


@examples(max_examples=30, deadline=None)
@given(
    first=st.integers(-5, ROWS + 5),
    last=st.integers(-5, ROWS + 5),
    numbers=st.lists(st.integers(0, ROWS - 1), max_size=12),
    kept=st.integers(0, 2 * ROWS),
)
def test_rows_on_the_disk_are_rows_in_memory(
    tmp_path_factory: pytest.TempPathFactory, first: int, last: int, numbers: list[int], kept: int
) -> None:
    """Any slice and any choice, first and second time, whatever part stays in memory; each kept row is read once."""
    pixels = content()
    disk, readings = on_disk(tmp_path_factory.mktemp("rows"), pixels)
    disk.keep(kept * math.prod(SHAPE))
    inputs, whole = OnDemand(disk, np.arange(ROWS), scaled), torch.from_numpy(scaled(pixels))
    chosen = torch.tensor(numbers, dtype=torch.int64)

    for _ in range(2):
        assert torch.equal(inputs[first:last], whole[first:last])
        assert torch.equal(inputs[chosen], whole[chosen])

    again = [number for number in readings if number < kept]
    assert len(again) == len(set(again))
    assert (len(inputs), inputs.shape) == (len(whole), whole.shape)


def test_a_private_round_takes_the_same_steps_from_the_disk(tmp_path: Path) -> None:
    """The same draws, clips and noise: equal parameters, also of a patient with more records than a micro-batch."""
    task = task_of(PNEUMONIA.input)
    found = []
    for records in both(tmp_path)[:2]:
        model = build_network(NET, task, seed=0)
        report = local_steps(
            model, records, task, steps=3, learning_rate=0.1, clip=1.0, noise_multiplier=0.5, sample_rate=0.6,
            expected_batch=6.0, random=repeatable(), micro_batch=4,
        )  # fmt: skip
        found.append((report, torch.nn.utils.parameters_to_vector(model.parameters())))

    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_evaluation_and_training_alone_read_the_same_from_the_disk(tmp_path: Path) -> None:
    """Exact statistics, a release, and a baseline without privacy."""
    task, plan = task_of(PNEUMONIA.input), EvaluationPlan(every=1, clip=3.0, noise_multiplier=1.0, bins=10)
    found = []
    for records in both(tmp_path)[:2]:
        model = build_network(NET, task, seed=0)
        train_without_privacy(model, records, task, steps=3, learning_rate=0.1, batch_size=8, seed=0)
        released = released_statistics(model, records, task, plan=plan, random=repeatable(), allow_test_random=True)
        found.append((statistics(model, records, task, bins=10), released))

    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("way", ["gone", "shorter", "replaced", "unreadable"])
def test_a_file_that_turns_out_bad_counts_its_patient_as_zero(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a charge nothing raises: the sum is that of the others, in training and in a release; the log counts."""
    task, plan = task_of(PNEUMONIA.input), EvaluationPlan(every=1, clip=3.0, noise_multiplier=1e-9, bins=10)
    memory, disk, _ = both(tmp_path)
    bad = tmp_path / "2.raw"  # the second of patient 1's three
    if way == "gone":
        bad.unlink()
    elif way == "unreadable":
        bad.unlink()
        bad.mkdir()
    else:
        bad.write_bytes(bytes(1 if way == "shorter" else math.prod(SHAPE)))
    memory.inputs[:][2] = math.nan

    found = []
    for records in (memory, disk):
        model = build_network(NET, task, seed=0)
        report = local_steps(
            model, records, task, steps=1, learning_rate=1.0, clip=1.0, noise_multiplier=0.0, sample_rate=1.0,
            expected_batch=1.0, random=repeatable(), micro_batch=4,
        )  # fmt: skip
        released = released_statistics(model, records, task, plan=plan, random=repeatable(), allow_test_random=True)
        found.append((report, torch.nn.utils.parameters_to_vector(model.parameters()), released))

    assert found[0][0] == found[1][0]
    assert found[1][0].not_finite == 1
    assert torch.equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][2], found[1][2])
    assert [record.getMessage() for record in caplog.records if "raw" in record.getMessage()] == []
    assert caplog.text.count("1 records cannot be read") == 1


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (NET, PNEUMONIA.input),
        (UNet(name="unet", channels=(4, 8)), PNEUMONIA.input),
        (Mlp(name="mlp", hidden=(4,)), table(5)),
        (Lstm(name="lstm", hidden=4), SERIES),
        (Transformer(name="transformer", width=8, heads=2, layers=1), SERIES),
    ],
    ids=["cnn", "unet", "mlp", "lstm", "transformer"],
)
def test_no_network_makes_a_number_out_of_what_is_missing(network: Network, inputs: Input) -> None:
    """Content that cannot be had is NaN, and so is what any network makes of it: its patient counts as zero."""
    task = task_of(inputs, (Outline(name="mask"),) if network.name == "unet" else 2)
    shape = {"image": SHAPE, "table": (5,), "series": (6, 6)}[task.input.kind]
    given_ = torch.rand(3, *shape)
    given_[1] = math.nan

    outputs = build_network(network, task, seed=0)(given_)

    assert outputs.isfinite().flatten(1).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("inputs", [PNEUMONIA.input, SERIES], ids=["images", "series"])
def test_no_change_of_copies_makes_a_number_out_of_what_is_missing(inputs: Input) -> None:
    """Turned, mirrored, dropped: NaN stays in it, and so the patient counts as zero."""
    task, image = task_of(inputs), inputs.kind == "image"
    given_ = torch.zeros(2, *(SHAPE if image else (6, 6)))
    given_[1] = math.nan
    changes: dict[str, Any] = {"shift": 0.1, "rotate_degrees": 90.0, "flip": True} if image else {"drop": 0.9}
    records = Records(given_, torch.zeros(2), np.arange(2), 2)

    changed = augmented(records, task, Augmentation(copies=3, noise=0.1, contrast=0.1, **changes), repeatable())

    outputs = build_network(NET if image else Lstm(name="lstm", hidden=4), task, seed=0)(changed.inputs[:])
    assert outputs.isfinite().all(dim=1).tolist() == [True] * 3 + [False] * 3


def test_strict_rows_name_the_file(tmp_path: Path) -> None:
    """Where nothing was charged, as in training alone or ``check-data``, an error helps."""
    disk, _ = on_disk(tmp_path, content(4))
    (tmp_path / "2.raw").write_bytes(b"")

    with pytest.raises(RecordsError, match=r"2\.raw changed"):
        OnDemand(disk, np.arange(4), scaled)[:]
    with pytest.raises(RecordsError, match=r"2\.raw changed"):
        _ = disk.whole
    assert "raw" not in f"{disk!r}{OnDemand(disk, np.arange(4), scaled)!r}"


def pictures(folder: Path, count: int = 12) -> Settings:
    """A hospital with pictures and room in memory for none of them."""
    own = settings(folder).model_copy(update={"records_memory_mb": 0})
    for path in own.records.iterdir():
        path.unlink()
    write(own.records, *(save(own.records, f"{number}.png", grey(number)) for number in range(count)))
    return own


def test_enrolment_looks_at_headers_and_a_round_at_what_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picture is decoded before one is drawn, and then only those that are."""
    from client.records import pictures as module

    own, decoded = pictures(tmp_path), []
    decode = module._decode

    def noted(place: module.Place, *arguments: object) -> NDArray[np.uint8]:
        decoded.append(place.path.name)
        return decode(place, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_decode", noted)
    records = Source(PNEUMONIA).current(own).training
    assert decoded == []
    records.select(np.array([7, 2]))

    assert decoded == ["7.png", "2.png"]


def test_a_population_never_raises_over_what_a_picture_holds(tmp_path: Path) -> None:
    """A header that is in order over pixels that are not; check-data would say so, a round goes on."""
    from client.records.report import summarise

    own = pictures(tmp_path)
    path = own.records / "3.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the last bytes of pixels, under a checksum
    path.write_bytes(data)

    inputs = Source(PNEUMONIA).current(own).training.inputs[:]

    assert inputs[3].isnan().all()
    assert inputs[[0, 1, 2, *range(4, 12)]].isfinite().all()
    with pytest.raises(RecordsError, match=r"3\.png cannot be read"):
        summarise(own.records)


def test_ids_of_pictures_are_their_content_without_keeping_it(tmp_path: Path) -> None:
    """Without a patient column, known by the pixels at the task's size: the same ids as when all were in memory."""
    import hashlib

    from client.records.manifest import read_manifest
    from client.records.tabular import checked_table

    names = [save(tmp_path, f"{number}.png", grey(number % 2)) for number in range(3)]
    write(tmp_path, *names, patient=None, one_row_per_patient=True)

    ids = checked_table(read_manifest(tmp_path), PNEUMONIA).patients.ids

    one, other = (hashlib.sha256(grey(number).tobytes()).hexdigest() for number in (0, 1))
    assert ids == [f"('{one}', 0, 0)", f"('{other}', 1, 0)", f"('{one}', 0, 1)"]


def test_nothing_is_opened_for_writing(tmp_path: Path) -> None:
    """No cache on a disk, and no temporary file: all that a reading opens for writing are the hospital's own keys."""
    own, source, written = pictures(tmp_path), Source(PNEUMONIA), list[Path]()
    source.current(own)  # which makes the hospital's keys
    save(own.records, "0.png", grey(50))

    with writes(written):
        inputs = source.current(own).training.inputs[:]

    assert inputs.isfinite().all()
    assert set(written) <= {own.state, own.registry_folder}  # folders that are made where they are missing
