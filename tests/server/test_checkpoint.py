"""Checkpoints: parameters and what the averaging remembers in one file, and the best model beside the last."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from server.checkpoint import BEST, KEPT, keep_best, load_checkpoint, save_checkpoint
from server.examples import example_plan
from server.fedavg import server_step
from server.progress import Best
from shared_models.errors import ConfigError
from shared_models.model_file import read_about, read_model
from shared_models.nets.build import build_network
from shared_models.plan import Averaging, StudyPlan
from shared_models.tasks import find_task
from shared_models.update import parameters_to_vector
from tests.federation import changed
from tests.server.plain_averaging import RULES

PLAN = example_plan("breast-cancer", 4)
LENGTH = 31
MODEL = build_network(PLAN.network, find_task(PLAN.task), seed=0)


def _plan(rule: Averaging) -> StudyPlan:
    return changed(PLAN, averaging=rule.model_dump(mode="json"))


def _vector(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).normal(size=LENGTH).astype(np.float32)


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_a_coordinator_that_died_goes_on_bit_for_bit_from_any_kept_checkpoint(tmp_path: Path, rule: Averaging) -> None:
    """Parameters and state from the disk, then the remaining rounds: the same last checkpoint, byte for byte."""
    plan, rounds = _plan(rule), 5
    totals = [_vector(k).astype(np.float64) for k in range(rounds)]
    step, parameters = server_step(rule, LENGTH), _vector(99)
    for number, total in enumerate(totals, 1):
        parameters = step.step(parameters, total, 2.5)
        last = save_checkpoint(tmp_path / "whole", MODEL, parameters, plan, number, step.state())

    for crash in range(rounds - KEPT + 1, rounds + 1):
        resumed, state = load_checkpoint(tmp_path / "whole", plan, crash)
        again = server_step(plan.averaging, LENGTH, state)
        for total in totals[crash:]:
            resumed = again.step(resumed, total, 2.5)
        after = save_checkpoint(tmp_path / f"after-{crash}", MODEL, resumed, plan, rounds, again.state())

        assert after.read_bytes() == last.read_bytes()


def test_a_reader_of_models_leaves_the_memory_alone(tmp_path: Path) -> None:
    """A checkpoint of FedAdam is a model like any other; one of FedAvg is the very file that it always was."""
    rule = RULES[2]
    plan, step = _plan(rule), server_step(rule, LENGTH)
    parameters = step.step(_vector(1), _vector(2).astype(np.float64), 1.0)

    with_memory = save_checkpoint(tmp_path / "adam", MODEL, parameters, plan, 1, step.state())
    plain = save_checkpoint(tmp_path / "plain", MODEL, parameters, PLAN, 1, {})
    as_before = save_checkpoint(tmp_path / "before", MODEL, parameters, PLAN, 1)

    read, model = read_model(with_memory)
    assert read == plan
    np.testing.assert_array_equal(parameters_to_vector(model), parameters)
    assert plain.read_bytes() == as_before.read_bytes()
    assert b"beside/" not in plain.read_bytes()


def test_a_disk_that_is_full_leaves_parameters_and_memory_of_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are one file: never the parameters of one round with the memory of another."""
    rule = RULES[1]
    plan, step = _plan(rule), server_step(rule, LENGTH)
    first = step.step(_vector(1), _vector(2).astype(np.float64), 1.0)
    save_checkpoint(tmp_path, MODEL, first, plan, 1, step.state())
    kept = {name: array.copy() for name, array in step.state().items()}
    second = step.step(first, _vector(3).astype(np.float64), 1.0)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        save_checkpoint(tmp_path, MODEL, second, plan, 2, step.state())
    monkeypatch.undo()

    parameters, state = load_checkpoint(tmp_path, plan, 1)
    np.testing.assert_array_equal(parameters, first)
    np.testing.assert_array_equal(state["momentum"], kept["momentum"])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_of_another_study_or_round_is_refused(tmp_path: Path) -> None:
    """Going on from it would train something that nobody approved."""
    path = save_checkpoint(tmp_path, MODEL, _vector(1), PLAN, 4)

    with pytest.raises(ConfigError, match="not of round 4 of plan"):
        load_checkpoint(tmp_path, changed(PLAN, training={"learning_rate": 0.1}), 4)
    path.rename(tmp_path / "round-000005.safetensors")
    with pytest.raises(ConfigError, match=r"is of round 4 .* not of round 5"):
        load_checkpoint(tmp_path, PLAN, 5)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(tmp_path, PLAN, 4)
    (tmp_path / "round-000005.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(tmp_path, PLAN, 5)


def _best(number: int) -> Best:
    return Best(round=number, metric="auroc", value=0.5 + number / 100)


def test_the_best_outlives_the_newest_few(tmp_path: Path) -> None:
    """Its checkpoint makes room like any other; the model stays, with what it was chosen by, and without a memory."""
    rule = RULES[3]
    plan, step = _plan(rule), server_step(rule, LENGTH)
    step.step(_vector(0), _vector(0).astype(np.float64), 1.0)
    for number in range(1, 8):
        save_checkpoint(tmp_path / "checkpoints", MODEL, _vector(number), plan, number, step.state())
        keep_best(tmp_path, plan, _best(min(number, 2)))

    about = read_about(tmp_path / BEST)
    assert {key: about[key] for key in ("round", "metric", "value")} == {
        "round": "2",
        "metric": "auroc",
        "value": "0.52",
    }
    _, model = read_model(tmp_path / BEST)
    np.testing.assert_array_equal(parameters_to_vector(model), _vector(2))
    assert b"beside/" not in (tmp_path / BEST).read_bytes()


def test_where_nothing_is_released_there_is_no_best(tmp_path: Path) -> None:
    """Nothing else may choose it."""
    save_checkpoint(tmp_path / "checkpoints", MODEL, _vector(1), PLAN, 1)

    keep_best(tmp_path, PLAN, None)

    assert not (tmp_path / BEST).exists()


def test_a_crash_before_the_best_was_written_is_mended_after_the_next_round(tmp_path: Path) -> None:
    """Its checkpoint is there until then; where somebody removed it, the older best says which round it is of."""
    for number in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", MODEL, _vector(number), PLAN, number)
        if number == 1:
            keep_best(tmp_path, PLAN, _best(1))
    save_checkpoint(tmp_path / "checkpoints", MODEL, _vector(3), PLAN, 3)

    keep_best(tmp_path, PLAN, _best(2))
    assert read_about(tmp_path / BEST)["round"] == "2"
    keep_best(tmp_path, PLAN, _best(9))

    assert read_about(tmp_path / BEST)["round"] == "2"
