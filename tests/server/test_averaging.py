"""Cohort, encoded sum, FedAvg, checkpoints and journal: what the coordinator does alone, file by file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.checkpoint import KEPT, save_checkpoint
from server.cohort import choose
from server.examples import example_plan
from server.fedavg import average
from server.journal import Journal, read_events
from shared_models.encoding import encoding, public_weight
from shared_models.errors import ProtocolError, ScaleTooSmallError
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.plan import LARGEST_COHORT
from shared_models.secagg.key_agreement import Purpose
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector
from tests.federation import changed

PLAN = example_plan("breast-cancer", 4)
RELEASING = changed(PLAN, evaluation={"every": 1, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20})


@given(seed=st.integers(0, 2**32), hospitals=st.integers(1, 9))
def test_the_average_is_the_weighted_mean(seed: int, hospitals: int) -> None:
    """One at a time, in any order, gives what numpy's own weighted average gives of all at once."""
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(hospitals, 20)).astype(np.float32)
    weights = rng.uniform(0.1, 1, size=hospitals)
    start = rng.normal(size=20).astype(np.float32)

    total = (updates.astype(np.float64) * weights[:, None]).sum(axis=0)

    expected = start + np.average(updates.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(average(start, total, float(weights.sum())), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(50, 0.125), (400, 1.0), (5000, 1.0)])
def test_a_weight_is_the_public_size_over_the_cap_and_at_most_one(size: int, expected: float) -> None:
    """No hospital counts for more than the cap, however large it says it is."""
    assert public_weight(size, 400) == expected


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
@given(seed=st.integers(0, 2**32), hospitals=st.integers(3, 100))
def test_a_sum_is_decoded_to_within_the_stated_rounding(purpose: Purpose, seed: int, hospitals: int) -> None:
    """Hospitals of any size, as far out as an honest one can be: weighed, rounded, summed, decoded."""
    rng = np.random.default_rng(seed)
    code = encoding(RELEASING, purpose, parameters=31, hospitals=hospitals)
    uploaders = int(rng.integers(3, hospitals + 1))
    total, exact = np.zeros(code.length, np.uint32), np.zeros(code.length)
    for _ in range(uploaders):
        weight = float(rng.uniform(0.01, 1))
        vector = rng.normal(size=code.length)
        vector *= rng.uniform(0, 1) * code.bound * code.unit / np.linalg.norm(vector) / weight
        total += code.encode(vector, weight, uniform=rng.random)
        exact += weight * vector

    np.testing.assert_allclose(code.decode(total, uploaders), exact, rtol=0, atol=code.rounding * (1 + 1e-6))


@pytest.mark.parametrize(("length", "clips"), [(0.99, False), (1.01, True)])
def test_a_hospital_can_tell_when_its_update_is_shortened(length: float, clips: bool) -> None:
    """``clips`` says of a vector what ``encode`` does to it."""
    code = encoding(PLAN, "train", parameters=31, hospitals=4)
    vector = np.zeros(code.length)
    vector[3] = length * code.bound / 0.5

    encoded = code.encode(vector, 0.5, uniform=np.zeros)

    assert code.clips(vector, 0.5) is clips
    assert encoded.view(np.int32)[3] / code.scale == pytest.approx(min(length, 1) * code.bound, rel=1e-6)


def test_a_sum_that_honest_hospitals_cannot_have_made_is_refused() -> None:
    """Who sent too much cannot be told; that somebody did can."""
    code = encoding(PLAN, "train", parameters=31, hospitals=4)
    total = np.zeros(code.length, np.uint32)
    total[0] = round(4.01 * code.bound * code.scale)

    with pytest.raises(ProtocolError, match="the sum has norm"):
        code.decode(total, 4)


def test_updates_that_would_overflow_the_modulus_are_refused_before_anything_is_sent() -> None:
    """Long steps and many hospitals leave too few integers per unit."""
    long = changed(PLAN, training={"learning_rate": 1e4})

    with pytest.raises(ScaleTooSmallError):
        encoding(long, "train", parameters=31, hospitals=4)


def test_a_cohort_is_who_is_enrolled_and_online() -> None:
    """Sorted, so that everybody lists it in the same order."""
    assert choose({"b", "a", "c"}, {"c", "a", "stranger"}) == ["a", "c"]


def test_a_large_federation_is_sampled_anew_each_time() -> None:
    """At most 100 a round, all distinct, and not always the same."""
    names = {f"h{k:03d}" for k in range(150)}

    cohorts = [choose(names, names) for _ in range(4)]

    assert all(len(set(cohort)) == LARGEST_COHORT for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 1


def test_the_newest_checkpoints_are_kept_and_explain_themselves(tmp_path: Path) -> None:
    """Each holds the round's parameters and the plan; older ones make room."""
    model = build_network(PLAN.network, find_task(PLAN.task), seed=0)
    parameters = [np.full(31, k, dtype=np.float32) for k in range(6)]

    paths = [save_checkpoint(tmp_path, model, p, PLAN, k + 1) for k, p in enumerate(parameters)]

    assert sorted(tmp_path.iterdir()) == paths[-KEPT:]
    plan, newest = read_model(paths[-1])
    assert plan == PLAN
    np.testing.assert_array_equal(parameters_to_vector(newest), parameters[-1])


def test_a_full_disk_leaves_the_previous_checkpoint_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half way is an error, and nothing of it stays."""
    import errno
    import os

    from shared_models.errors import ConfigError

    model = build_network(PLAN.network, find_task(PLAN.task), seed=0)
    good = save_checkpoint(tmp_path, model, np.zeros(31, dtype=np.float32), PLAN, 1)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        save_checkpoint(tmp_path, model, np.ones(31, dtype=np.float32), PLAN, 2)
    monkeypatch.undo()

    assert list(tmp_path.iterdir()) == [good]
    read_model(good)


def test_a_reader_of_the_journal_sees_whole_lines_only(tmp_path: Path) -> None:
    """A line that is being written is left for the next look, and the offset says where to go on."""
    path = tmp_path / "events.jsonl"
    assert read_events(path) == ([], 0)
    Journal(path).write("started", study="a")

    first, offset = read_events(path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "half')
    again, same = read_events(path, offset)

    assert [event["event"] for event in first] == ["started"]
    assert (again, same) == ([], offset)
