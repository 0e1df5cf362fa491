"""The intensive-care line: what hospitals would have on the disk, and a figure for every way to train."""

import os
from pathlib import Path

import numpy as np
import pytest
from lines import physionet, training

from client.alone import NO_SECRET
from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from server.demo import plan_text
from shared_models.errors import ConfigError
from shared_models.plan import Lstm, Transformer, read_plan
from shared_models.tasks import ICU_MORTALITY, SeriesInput

DATA = Path(os.environ.get("KONSIL_DATA") or Path(__file__).parents[3] / "shared" / "data")
STAYS, STEPS = 12, 48  # stays of each made-up unit
UNIT_ERROR = (0, 5, "pH", 735.0)  # row, hour, variable, value


def made_up_archive(path: Path) -> Path:
    """Two sets in the challenge's sparse form; heart rates tell who dies, and one pH was entered in another unit."""
    rng, rows = np.random.default_rng(0), 4 * STAYS
    names = np.array([name for name in physionet.VARIABLES if name != "Age"])
    arrays = {"vars": names, "static": np.array(physionet.STATIC), "outcome": np.array([physionet.OUTCOME, "SAPS-I"])}
    for letter in "ab":
        died = np.arange(rows) % 3 == 0
        values = np.full((rows, STEPS, len(names)), np.nan)
        values[:, ::4, list(names).index("HR")] = 70 + 60 * died[:, None] + rng.normal(size=(rows, 12))
        values[:, 3, list(names).index("GCS")] = 14
        row, hour, variable, wrong = UNIT_ERROR
        values[row, hour, list(names).index(variable)] = wrong
        places = np.flatnonzero(np.isfinite(values))
        units = np.repeat([1, 2, 3, 4], STAYS)
        arrays |= {
            f"{letter}_idx": np.diff(places, prepend=0).astype(np.uint32),
            f"{letter}_val": values.reshape(-1)[places].astype(np.float16),
            f"{letter}_shape": np.array(values.shape),
            f"{letter}_static": np.column_stack([np.full(rows, 64), *[np.zeros(rows)] * 3, units]).astype(np.float32),
            f"{letter}_outcome": np.column_stack([died, np.zeros(rows)]).astype(np.int32),
            f"{letter}_id": np.arange(rows) + (1000 if letter == "a" else 2000),
        }
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


def read(folder: Path) -> Records:
    """All records of a folder."""
    records, _ = read_table(read_manifest(folder), ICU_MORTALITY, split_key=NO_SECRET)
    return records


def test_each_unit_is_a_hospital_whose_own_reader_reads_it(tmp_path: Path) -> None:
    """Labels, ages and values arrive; a value in another unit is missing, and nothing else is."""
    archive = made_up_archive(tmp_path / "sets.npz")

    example = physionet.write_hospitals(archive, tmp_path / "records")

    assert [hospital.name for hospital in example.hospitals] == list(physionet.UNITS.values())
    records = read(example.hospitals[0].folder)
    assert isinstance(ICU_MORTALITY.input, SeriesInput)
    variables = {variable.name: number for number, variable in enumerate(ICU_MORTALITY.input.variables)}
    values, mask, _ = records.inputs[:].chunk(3, dim=2)
    assert records.targets[:].tolist() == [float(number % 3 == 0) for number in range(STAYS)]
    assert mask.sum(dim=(0, 1))[variables["ph"]] == 0
    assert mask.sum() == STAYS * (12 + 1 + 1)  # heart rates, one coma score, the age
    assert values[:, 0, variables["age"]].tolist() == pytest.approx([4 * (64 - 15) / (120 - 15) - 2] * STAYS, abs=1e-6)


def test_every_way_to_train_gives_its_figures(tmp_path: Path) -> None:
    """Federated, pooled, alone, private, and with the other network; what privacy cost is within the plan."""
    example = physionet.write_hospitals(made_up_archive(tmp_path / "sets.npz"), tmp_path / "records")
    network = Lstm(name="lstm", hidden=3, carry_forward=True)
    lstm = training.read_plain("physionet").model_copy(update={"network": network, "rounds": 2, "steps": 1})
    narrow = Transformer(name="transformer", width=4, heads=1, layers=1, carry_forward=True)
    private = tmp_path / "private.toml"
    private.write_text(plan_text(example.plan.model_copy(update={"network": network, "rounds": 1})), encoding="utf-8")
    transformer = lstm.model_copy(update={"network": narrow})

    figures = physionet.run(example, tmp_path, 1, lstm=lstm, pooled=lstm, transformer=transformer, private=private)

    ways = ("", "_pooled", "_eps8", "_transformer", "_alone_coronary", "_alone_surgical_own", "_medical_own")
    wanted = {f"physionet_auroc{way}{end}" for way in ways for end in ("", "_sd")}
    assert wanted | {"physionet_auprc", "physionet_auprc_sd"} <= set(figures)
    assert all(np.isfinite(figure) for figure in figures.values())
    assert 0 < figures["physionet_epsilon"] <= figures["physionet_epsilon_filter"] <= example.plan.privacy.epsilon


def test_no_unit_is_asked_for_a_larger_delta_than_its_size_allows() -> None:
    """At most 1 / (10 * public size), also of the largest unit."""
    plan = read_plan(physionet.PRIVATE)

    assert plan.privacy.delta <= 1 / (10 * plan.weight_cap)


@pytest.mark.parametrize("key", ["task", "network", "batch_size", "steps"])
def test_pooled_training_is_the_same_network_and_the_same_local_steps(key: str) -> None:
    """Else the distance between them would be the plans', not the federation's."""
    federated, pooled = training.read_plain("physionet"), training.read_plain("physionet-pooled")

    assert getattr(federated, key) == getattr(pooled, key)


def test_other_data_is_refused(tmp_path: Path) -> None:
    """By name: a missing file and one with other variables."""
    with pytest.raises(ConfigError, match="there is no file"):
        physionet.write_hospitals(tmp_path / "absent.npz", tmp_path / "records")
    np.savez(tmp_path / "other.npz", vars=np.array(["HR"]), static=np.array(["Age"]))
    with pytest.raises(ConfigError, match="other variables"):
        physionet.write_hospitals(tmp_path / "other.npz", tmp_path / "records")


def test_the_challenges_sets_have_four_thousand_stays_each(tmp_path: Path) -> None:
    """As the challenge says: set a to train on, set b to test on, by kind of unit."""
    if not (DATA / physionet.FILE).is_file():
        pytest.skip(f"needs {physionet.FILE} in KONSIL_DATA")

    example = physionet.write_hospitals(DATA / physionet.FILE, tmp_path / "records")

    stays = {hospital.name: hospital.folder / "stays.csv" for hospital in example.hospitals}
    counts = {name: len(path.read_text(encoding="utf-8").splitlines()) - 1 for name, path in stays.items()}
    assert counts == {"coronary": 577, "cardiac-surgery": 874, "medical": 1481, "surgical": 1068}
    tested = [(place / "stays.csv").read_text(encoding="utf-8").splitlines() for place in example.tests.values()]
    assert sum(len(lines) - 1 for lines in tested) == 4000
