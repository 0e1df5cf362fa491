"""The coordinator's step: FedAvg and its relatives, against their papers, against Flower, and across a crash."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.fedavg import MOMENTUM, VARIANCE, average, server_step
from shared_models.errors import ConfigError
from shared_models.plan import Averaging, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from tests.server.plain_averaging import RULES, plain_averaging

Floats = NDArray[np.float64]
LENGTH, ROUNDS = 40, 12
NAMES = [rule.name for rule in RULES]


def _rounds(seed: int) -> tuple[NDArray[np.float32], list[Floats], list[float]]:
    """Some parameters; per round a sum of weighed updates and its weight. Updates of sizes from 1e-4 to 1."""
    rng = np.random.default_rng(seed)
    start = rng.normal(size=LENGTH).astype(np.float32)
    sizes = 10.0 ** rng.uniform(-4, 0, LENGTH)
    totals = [rng.normal(size=LENGTH) * sizes for _ in range(ROUNDS)]
    return start, totals, list(rng.uniform(1, 4, ROUNDS))


def _course(
    rule: Averaging, start: NDArray[np.float32], totals: Sequence[Floats], weights: Sequence[float]
) -> list[NDArray[np.float32]]:
    step, course = server_step(rule, len(start)), [start]
    for total, weight in zip(totals, weights, strict=True):
        course.append(step.step(course[-1], total, weight))
    return course[1:]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_each_is_what_its_paper_says(rule: Averaging, seed: int) -> None:
    """Twelve rounds beside the formula, one parameter at a time: apart by the parameters' own rounding each round."""
    start, totals, weights = _rounds(seed)

    course = _course(rule, start, totals, weights)

    means = [total / weight for total, weight in zip(totals, weights, strict=True)]
    expected = plain_averaging(rule, start.astype(np.float64), means)
    largest = np.abs(expected).max()
    for number, (ours, theirs) in enumerate(zip(course, expected, strict=True), 1):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=number * largest * 2.0**-24)


@given(seed=st.integers(0, 2**32))
def test_fedavg_is_bit_for_bit_what_it_was(seed: int) -> None:
    """Parameters plus total over weight, in float64, rounded once; momentum zero at rate one is the same."""
    start, totals, weights = _rounds(seed)
    still = FedAvgM(name="fedavgm", learning_rate=1.0, momentum=0.0)

    plain, without_momentum = (
        _course(FedAvg(name="fedavg"), start, totals, weights),
        _course(still, start, totals, weights),
    )

    expected = start
    for ours, also, total, weight in zip(plain, without_momentum, totals, weights, strict=True):
        expected = (expected.astype(np.float64) + total / weight).astype(np.float32)
        assert ours.tobytes() == also.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(average(start, totals[0], weights[0]), plain[0])


def _factor(rule: Averaging, number: int) -> float:
    """By what Flower's FedAdam multiplies its rate in a round: it corrects for the running means' beginnings."""
    if not isinstance(rule, FedAdam):
        return 1.0
    return float(np.sqrt(1 - rule.beta_2 ** (number + 1)) / (1 - rule.beta_1 ** (number + 1)))


def _flowers(rule: Averaging) -> Any:
    match rule:
        case FedAvgM():
            return strategy.FedAvgM(server_learning_rate=rule.learning_rate, server_momentum=rule.momentum)
        case FedAdam():
            return strategy.FedAdam(beta_1=rule.beta_1, beta_2=rule.beta_2, tau=rule.tau)
        case FedYogi():
            return strategy.FedYogi(eta=rule.learning_rate, beta_1=rule.beta_1, beta_2=rule.beta_2, tau=rule.tau)
        case FedAdagrad():
            found = strategy.FedAdagrad(eta=rule.learning_rate, tau=rule.tau)
            found.beta_1 = rule.beta_1  # Flower's constructor has zero for everybody
            return found
        case _:
            return strategy.FedAvg()


def _reply(parameters: Floats, examples: int) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = asked.object_id
    arrays, metrics = ArrayRecord({"x": Array(parameters)}), MetricRecord({"num-examples": examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_each_is_what_flower_computes_from_the_same_updates(rule: Averaging) -> None:
    """Twelve rounds of three hospitals, beside Flower's own strategy: equal to 1e-5, which is float32's rounding.

    Two things are set right first. Flower starts the running square at zero, where the paper has at least tau squared;
    and its FedAdam corrects the rate for the running means' beginnings, which the paper does not.
    """
    rng = np.random.default_rng(3)
    examples = [10, 25, 65]
    theirs, flower = rng.normal(size=LENGTH), _flowers(rule)
    ours, step = theirs.astype(np.float32), server_step(rule, LENGTH)
    for number in range(1, ROUNDS + 1):
        updates = rng.normal(size=(3, LENGTH)) * 0.1
        if isinstance(rule, FedAvgM):
            flower.current_arrays = ArrayRecord({"x": Array(theirs)})  # as configure_train does
        elif not isinstance(rule, FedAvg):
            flower.current_arrays = {"x": theirs}
            flower.v_t = flower.v_t or {"x": np.full(LENGTH, rule.tau**2)}
            flower.eta = rule.learning_rate / _factor(rule, number)
        replies = [_reply(theirs + update, n) for update, n in zip(updates, examples, strict=True)]
        theirs = flower.aggregate_train(number, replies)[0]["x"].numpy()
        weights = np.array(examples) / 100
        ours = step.step(ours, weights @ updates, float(weights.sum()))

        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("crash", [0, 1, 5, ROUNDS])
def test_a_step_goes_on_from_its_state_bit_for_bit(rule: Averaging, crash: int) -> None:
    """Whatever the round after which the coordinator died, parameters and state come out as without the crash."""
    start, totals, weights = _rounds(7)
    whole, before = server_step(rule, LENGTH), server_step(rule, LENGTH)
    expected, parameters = start, start
    for total, weight in zip(totals, weights, strict=True):
        expected = whole.step(expected, total, weight)
    for total, weight in zip(totals[:crash], weights[:crash], strict=True):
        parameters = before.step(parameters, total, weight)

    after = server_step(rule, LENGTH, {name: array.copy() for name, array in before.state().items()})
    for total, weight in zip(totals[crash:], weights[crash:], strict=True):
        parameters = after.step(parameters, total, weight)

    assert parameters.tobytes() == expected.tobytes()
    assert {k: v.tobytes() for k, v in after.state().items()} == {k: v.tobytes() for k, v in whole.state().items()}


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_what_a_step_is_given_stays_as_it_is(rule: Averaging) -> None:
    """The evidence of a round holds the same arrays."""
    start, totals, weights = _rounds(1)
    given = (start.tobytes(), totals[0].tobytes())
    step = server_step(rule, LENGTH)

    for _ in range(2):
        moved = step.step(start, totals[0], weights[0])

    assert (start.tobytes(), totals[0].tobytes()) == given
    assert moved.dtype == np.float32


WRONG: list[tuple[Callable[[dict[str, Floats]], Any], str]] = [
    (
        lambda state: state.pop(VARIANCE),
        r"remembers \['momentum'\], and the plan's averaging \['momentum', 'variance'\]",
    ),
    (lambda state: state.update(more=np.zeros(LENGTH)), "remembers"),
    (lambda state: state.update(momentum=np.zeros(LENGTH - 1)), "momentum of the checkpoint is not 40 finite float64"),
    (lambda state: state.update(momentum=np.zeros(LENGTH, np.float32)), "momentum of the checkpoint is not"),
    (lambda state: state.update(variance=np.full(LENGTH, np.nan)), "variance of the checkpoint is not"),
    (lambda state: state.update(variance=np.full(LENGTH, -1.0)), "variance of the checkpoint is negative"),
]


@pytest.mark.parametrize(("spoil", "complaint"), WRONG)
def test_a_state_of_something_else_is_refused(spoil: Callable[[dict[str, Floats]], Any], complaint: str) -> None:
    """Going on with another study's memory would train another model, silently."""
    state = {MOMENTUM: np.zeros(LENGTH), VARIANCE: np.ones(LENGTH)}
    spoil(state)

    with pytest.raises(ConfigError, match=complaint):
        server_step(RULES[2], LENGTH, state)
    with pytest.raises(ConfigError, match="remembers"):
        server_step(FedAvg(name="fedavg"), LENGTH, state)
