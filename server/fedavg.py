"""How the global parameters move by the sum of a round: federated averaging, and its relatives with a memory.

All of them take the same weighted mean of the hospitals' updates, and nothing else of a round. So they work under
secure aggregation, and spend no privacy: each is arithmetic on a sum of updates that were noised at the hospitals.

The coordinator takes one step a round, keeps what the step remembers beside the checkpoint, and goes on from there
after a crash as if nothing had happened.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared_models import plan
from shared_models.errors import ConfigError

Parameters = NDArray[np.float32]
Floats = NDArray[np.float64]
State = dict[str, Floats]

MOMENTUM, VARIANCE = "momentum", "variance"


class ServerStep(Protocol):
    """One way to move the global parameters by what a round summed up."""

    def step(self, parameters: Parameters, total: Floats, weight: float) -> Parameters:
        """Move the parameters, and remember what the next step needs.

        Args:
            parameters: Global parameters of the last round, shape ``(d,)``; left as they are.
            total: Sum of m * x over the hospitals that uploaded, shape ``(d,)``; left as it is.
            weight: Sum of m over them; public.

        Returns:
            Shape ``(d,)``; everything is computed in float64 and rounded once.
        """

    def state(self) -> State:
        """What is remembered: arrays by name, each of shape ``(d,)``.

        Guarantees:
            * ``server_step`` with these arrays goes on bit-identically.

        Not copies: they change with the next step.
        """


def server_step(averaging: plan.Averaging, parameters: int, state: Mapping[str, Floats] | None = None) -> ServerStep:
    """The step that a plan asks for, at its beginning or where an earlier one stood.

    Args:
        averaging: Of the plan.
        parameters: d, parameters of the network.
        state: What ``state`` of the same plan's step gave; None before the first round.

    Raises:
        ConfigError: The state is not one of this step: other names, shapes or types, or numbers that it cannot have.
    """
    match averaging:
        case plan.FedAvg():
            _check_state(state, (), parameters)
            return FedAvg()
        case plan.FedAvgM():
            _check_state(state, (MOMENTUM,), parameters)
            return FedAvgM(averaging, np.zeros(parameters) if state is None else state[MOMENTUM].copy())
        case _:
            _check_state(state, (MOMENTUM, VARIANCE), parameters)
            if state is None:
                return Adaptive(averaging, np.zeros(parameters), np.full(parameters, averaging.tau**2))
            return Adaptive(averaging, state[MOMENTUM].copy(), state[VARIANCE].copy())


def average(parameters: Parameters, total: Floats, total_weight: float) -> Parameters:
    """Move the global parameters by the weighted mean of the updates.

    Args:
        parameters: Global parameters of the last round, shape ``(d,)``.
        total: Sum of m * x over the hospitals that uploaded, shape ``(d,)``.
        total_weight: Sum of m over them; public.

    Returns:
        Shape ``(d,)``; the mean is taken in float64 and rounded once.

    Source:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1, with public sizes in place of true counts.
    """
    return (parameters.astype(np.float64) + total / total_weight).astype(np.float32)


class FedAvg:
    """``average``; remembers nothing."""

    def step(self, parameters: Parameters, total: Floats, weight: float) -> Parameters:
        """See ``ServerStep``."""
        return average(parameters, total, weight)

    def state(self) -> State:
        """See ``ServerStep``."""
        return {}


class FedAvgM:
    """FedAvg with momentum: v becomes beta v + mean, and the parameters move by learning rate times v.

    Source:
        Hsu, Qi and Brown, arXiv:1909.06335, section 4.3, with a learning rate at the server.
    """

    def __init__(self, rule: plan.FedAvgM, momentum: Floats) -> None:
        self._rule, self._momentum = rule, momentum

    def step(self, parameters: Parameters, total: Floats, weight: float) -> Parameters:
        """See ``ServerStep``."""
        moved = total / weight
        self._momentum *= self._rule.momentum
        self._momentum += moved
        np.multiply(self._momentum, self._rule.learning_rate, out=moved)
        moved += parameters
        return moved.astype(np.float32)

    def state(self) -> State:
        """See ``ServerStep``."""
        return {MOMENTUM: self._momentum}


class Adaptive:
    """FedAdagrad, FedAdam and FedYogi: each parameter's step is scaled by the size of its own recent updates.

    As in the paper, the running mean m begins at zero, the running square v at tau squared, and neither is corrected
    for that.

    Guarantees:
        * v is never negative.

    Source:
        Reddi et al., arXiv:2003.00295, Algorithm 2.
    """

    def __init__(self, rule: plan.FedAdam | plan.FedYogi | plan.FedAdagrad, momentum: Floats, variance: Floats) -> None:
        self._rule, self._momentum, self._variance = rule, momentum, variance

    def step(self, parameters: Parameters, total: Floats, weight: float) -> Parameters:
        """See ``ServerStep``. Besides what is remembered it needs two arrays of the model's length."""
        rule, m, v = self._rule, self._momentum, self._variance
        delta = total / weight
        scratch = delta * (1 - rule.beta_1)
        m *= rule.beta_1
        m += scratch
        square = np.square(delta, out=delta)
        match rule:
            case plan.FedAdagrad():
                v += square
            case plan.FedAdam():
                v *= rule.beta_2
                square *= 1 - rule.beta_2
                v += square
            case plan.FedYogi():
                np.subtract(v, square, out=scratch)
                square *= np.sign(scratch, out=scratch)
                square *= 1 - rule.beta_2
                v -= square
        np.sqrt(v, out=scratch)
        scratch += rule.tau
        np.divide(m, scratch, out=scratch)
        scratch *= rule.learning_rate
        scratch += parameters
        return scratch.astype(np.float32)

    def state(self) -> State:
        """See ``ServerStep``."""
        return {MOMENTUM: self._momentum, VARIANCE: self._variance}


def _check_state(state: Mapping[str, Floats] | None, names: tuple[str, ...], parameters: int) -> None:
    """Refuse a state that is not of this step; no state at all is the beginning."""
    if state is None:
        return
    hint = "Go on with the plan and the checkpoint of the study that was interrupted."
    if set(state) != set(names):
        raise ConfigError(
            f"the checkpoint remembers {sorted(state)}, and the plan's averaging {sorted(names)}", hint=hint
        )
    for name, array in state.items():
        if array.dtype != np.float64 or array.shape != (parameters,) or not np.isfinite(array).all():
            raise ConfigError(f"{name} of the checkpoint is not {parameters} finite float64 numbers", hint=hint)
        if name == VARIANCE and array.min(initial=0.0) < 0:
            raise ConfigError(f"{name} of the checkpoint is negative", hint=hint)
