"""Cohort, weighted sum, FedAvg, checkpoints and journal: what the coordinator does alone, file by file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aggregate import WeightedSum, weight
from server.checkpoint import KEPT, save_checkpoint
from server.cohort import LARGEST_COHORT, choose
from server.examples import example_plan
from server.fedavg import average
from server.journal import Journal, read_events
from shared_models.errors import ProtocolError
from shared_models.model_file import read_model
from shared_models.nets.build import build_network
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector

PLAN = example_plan("breast-cancer", 4)


@given(seed=st.integers(0, 2**32), hospitals=st.integers(1, 9))
def test_the_average_is_the_weighted_mean(seed: int, hospitals: int) -> None:
    """One at a time, in any order, gives what numpy's own weighted average gives of all at once."""
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(hospitals, 20)).astype(np.float32)
    weights = rng.uniform(0.1, 1, size=hospitals)
    start = rng.normal(size=20).astype(np.float32)

    total = WeightedSum(20)
    for k in rng.permutation(hospitals):
        total.add(updates[k], float(weights[k]))

    expected = start + np.average(updates.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(average(start, total), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(50, 0.125), (400, 1.0), (5000, 1.0)])
def test_a_weight_is_the_public_size_over_the_cap_and_at_most_one(size: int, expected: float) -> None:
    """No hospital counts for more than the cap, however large it says it is."""
    assert weight(size, 400) == expected


def test_a_vector_of_the_wrong_length_or_norm_changes_nothing() -> None:
    """Checked before it is added: the sum stays what it was."""
    total = WeightedSum(3)
    total.add(np.ones(3, dtype=np.float32), 1.0, limit=2.0)

    for bad in (np.ones(4), np.full(3, 10.0), np.full(3, np.nan)):
        with pytest.raises(ProtocolError):
            total.add(bad.astype(np.float32), 1.0, limit=2.0)

    np.testing.assert_array_equal(total.total, np.ones(3))
    assert total.weight == 1.0


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
