"""The example studies: what is in which folder, and that their plans cost what they say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.records.manifest import read_manifest
from client.records.records import Records
from client.records.tabular import read_table
from server.examples import MAXIMUM_HOSPITALS, Example, example_plan, write_example
from shared_models.errors import ConfigError
from shared_models.privacy.mechanisms import (
    best_order,
    calibrate_noise,
    filter_epsilon,
    study_mechanisms,
    total_divergence,
)
from shared_models.public_data import declared_size
from shared_models.tasks import find_task

STUDIES = ["breast-cancer", "heart-disease"]
DATA = Path(os.environ.get("KONSIL_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_heart_data = pytest.mark.skipif(
    not (DATA / "heart_disease").is_dir(), reason="the four UCI files are not part of the project"
)


def read(folder: Path) -> Records:
    """A folder's records, read as a hospital reads them."""
    manifest = read_manifest(folder)
    training, _ = read_table(manifest, find_task(manifest.task), split_key=b"key")
    return training


def rows(folder: Path) -> list[str]:
    """The lines of a folder's table, without the header."""
    return (folder / "data.csv").read_text(encoding="utf-8").splitlines()[1:]


@pytest.mark.parametrize("hospitals", [2, 4, 7, MAXIMUM_HOSPITALS])
def test_every_patient_is_in_one_hospital_or_in_the_test_part(tmp_path: Path, hospitals: int) -> None:
    """569 patients: each at exactly one hospital and in the pooled folder, or in the test part, never both."""
    example = write_example("breast-cancer", tmp_path, hospitals=hospitals, seed=1)

    parts = [rows(hospital.folder) for hospital in example.hospitals]
    pooled, test = rows(example.pooled), rows(example.test)

    assert sorted(row for part in parts for row in part) == sorted(pooled)
    assert not set(pooled) & set(test)
    assert len({row.split(",")[0] for row in pooled + test}) == len(pooled + test) == 569


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_artificial_hospitals_are_unequal_and_skewed(tmp_path: Path, seed: int) -> None:
    """Sizes differ at least twofold and the share of malignant cases by 30 points; both classes occur everywhere."""
    example = write_example("breast-cancer", tmp_path, hospitals=4, seed=seed)

    records = [read(hospital.folder) for hospital in example.hospitals]
    shares = [float(r.targets[:].mean()) for r in records]
    sizes = [len(r) for r in records]

    assert max(sizes) >= 2 * min(sizes)
    assert max(shares) - min(shares) >= 0.3
    assert all(0 < share < 1 for share in shares)
    assert "artificial" in example.split


def test_the_test_part_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    """Nobody can try seeds until the test part is an easy one; the hospitals do depend on it, and only on it."""
    one, same, other = (
        write_example("breast-cancer", tmp_path / name, hospitals=4, seed=seed)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )

    def hospitals(example: Example) -> list[list[str]]:
        return [rows(hospital.folder) for hospital in example.hospitals]

    assert rows(one.test) == rows(other.test)
    assert hospitals(one) == hospitals(same)
    assert hospitals(one) != hospitals(other)


@needs_heart_data
def test_the_heart_disease_parts_are_those_of_the_published_benchmark(tmp_path: Path) -> None:
    """FLamby's counts per centre: 199, 172, 30 and 85 patients to train on, 104, 89, 16 and 45 to test on."""
    example = write_example("heart-disease", tmp_path, hospitals=4, seed=0)

    assert [len(read(hospital.folder)) for hospital in example.hospitals] == [199, 172, 30, 85]
    assert [len(read(folder)) for folder in example.tests.values()] == [104, 89, 16, 45]
    assert list(example.tests) == [hospital.name for hospital in example.hospitals]
    assert (len(read(example.pooled)), len(read(example.test))) == (486, 254)
    assert [hospital.public_size for hospital in example.hospitals] == [200, 170, 30, 90]


@needs_heart_data
def test_a_hospital_without_healthy_patients_says_so(tmp_path: Path) -> None:
    """All 30 training patients of Switzerland are ill: its manifest declares what would otherwise be an error."""
    example = write_example("heart-disease", tmp_path, hospitals=4, seed=0)

    manifests = {hospital.name: read_manifest(hospital.folder) for hospital in example.hospitals}

    assert manifests["switzerland"].absent_classes == ("absent",)
    assert manifests["cleveland"].absent_classes == ()


@given(patients=st.integers(0, 10**6))
def test_a_declared_size_is_the_nearest_ten(patients: int) -> None:
    """One patient more or less rarely shows, and never by more than ten."""
    size = declared_size(patients)

    assert size % 10 == 0
    assert abs(size - max(10, patients)) <= 5


@pytest.mark.parametrize("study", STUDIES)
def test_a_plan_fits_its_budget_by_the_enforced_filter(study: str) -> None:
    """All rounds and spare charges together cost at most epsilon 1, and the noise is the least that does it."""
    plan = example_plan(study, 4)
    privacy, mechanisms = plan.privacy, study_mechanisms(plan, 100)

    order = best_order(mechanisms, privacy.delta)
    spent = filter_epsilon(total_divergence(mechanisms, order), order=order, delta=privacy.delta)

    assert plan.rounds >= 20
    assert spent <= privacy.epsilon == 1.0
    assert privacy.noise_multiplier == calibrate_noise(
        sample_rate=privacy.sample_rate,
        steps=(plan.rounds + privacy.spare_charges) * plan.training.steps,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
    )


@pytest.mark.parametrize("hospitals", [2, 4, MAXIMUM_HOSPITALS])
def test_every_hospital_accepts_the_plan_of_its_example(tmp_path: Path, hospitals: int) -> None:
    """Delta is at most 1 / (10 * public size) everywhere, no weight is capped, and enough hospitals exist."""
    example = write_example("breast-cancer", tmp_path, hospitals=hospitals, seed=0)
    sizes = np.array([hospital.public_size for hospital in example.hospitals])

    assert (example.plan.privacy.delta <= 1 / (10 * sizes)).all()
    assert (sizes <= example.plan.weight_cap).all()
    assert example.plan.minimum_hospitals <= hospitals


@pytest.mark.parametrize(
    ("study", "hospitals"), [("breast-cancer", 1), ("breast-cancer", 21), ("heart-disease", 3), ("no-such-study", 4)]
)
def test_an_example_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, study: str, hospitals: int
) -> None:
    """One error, and nothing half-done."""
    with pytest.raises(ConfigError, match=str(hospitals) if study in STUDIES else study):
        write_example(study, tmp_path / "out", hospitals=hospitals, seed=0)

    assert not (tmp_path / "out").exists()


def test_missing_heart_data_is_named_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data is not part of the project: the hint says which variable to set."""
    monkeypatch.setenv("KONSIL_DATA", str(tmp_path))

    with pytest.raises(ConfigError, match=r"processed\.cleveland\.data") as caught:
        write_example("heart-disease", tmp_path / "out", hospitals=4, seed=0)

    assert "KONSIL_DATA" in caught.value.hint


def test_examples_need_no_torch() -> None:
    """The coordinator's command line stays quick."""
    code = "import sys, server.examples; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
