"""What this hospital permits: studies, networks, minimum noise, minimum peers. The stricter of plan and policy wins.

The policy is read from the hospital's own settings; a plan can only be refused by it, never change it. Whether the
budget can still pay for a plan that the policy permits is asked in ``client/budget.py``.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared_models.config import Count, Frozen, Name, Positive
from shared_models.errors import PolicyError
from shared_models.plan import LARGEST_COHORT, SMALLEST_COHORT, StudyPlan

NetworkName = Literal["logistic-regression", "mlp", "cnn", "lstm", "transformer"]


class Population(Frozen):
    """The patients that one budget protects, and how much may ever be spent on any of them.

    Attributes:
        public_size: Declared by the steward, rounded, fixed when the budget is opened; never recomputed from records.
        epsilon: The most that all studies together may cost one patient.
        delta: What ``epsilon`` holds at; at most 1 / (10 * public size).
        order: Renyi order that the budget is enforced at, committed when it is opened.
    """

    name: Name
    public_size: Count
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    order: Annotated[int, Field(ge=2, le=100_000)]

    @property
    def largest_delta(self) -> float:
        """The largest delta that this hospital accepts, for its budget and for every study: 1 / (10 * public size)."""
        return 1 / (10 * self.public_size)

    @model_validator(mode="after")
    def _delta_fits_the_size(self) -> "Population":
        if not self.delta <= self.largest_delta:
            raise ValueError(
                f"delta {self.delta:g} is above 1 / (10 * public_size) = {self.largest_delta:g} "
                f"for a public size of {self.public_size}"
            )
        return self


class Policy(Frozen):
    """The hospital's own limits on every plan; there is no default that would be honest for all hospitals.

    Attributes:
        tasks: Tasks that may be trained here, by name.
        networks: Networks that may be trained here, by name.
        minimum_noise_multiplier: Least sigma of a training step and of a release.
        maximum_epsilon_per_study: Most that one study may cost a patient.
        minimum_hospitals: Fewest hospitals whose updates may be averaged: those invited, and the threshold of each sum.
        maximum_attempts: Most attempts at one round, failed ones included.
        maximum_rounds: Most training runs of one study: its rounds and its spare charges together.
        standing_approval: Approve whatever this policy and the budget permit, without asking the steward.
        release_validation: Whether noised validation statistics may leave at all.
    """

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)]
    networks: Annotated[tuple[NetworkName, ...], Field(min_length=1)]
    minimum_noise_multiplier: Positive
    maximum_epsilon_per_study: Positive
    minimum_hospitals: Annotated[int, Field(ge=SMALLEST_COHORT, le=LARGEST_COHORT)]
    maximum_attempts: Count
    maximum_rounds: Count
    standing_approval: bool
    release_validation: bool = False


def admit(plan: StudyPlan, policy: Policy, population: Population) -> None:
    """Refuse a plan that this hospital does not permit.

    Guarantees:
        * Uses the plan and the hospital's settings only, never a record: the answer reveals nothing about a patient.
        * Names every clause that the plan breaks, each with the plan's figure and the policy's.

    Raises:
        PolicyError: At least one clause is broken.
    """
    refusals = list(_refusals(plan, policy, population))
    if refusals:
        raise PolicyError(
            f"study {plan.study} is refused by this hospital's policy: {'; '.join(refusals)}",
            hint="Change the plan, or have the steward change [policy] or [population] in the hospital's settings.",
        )


def _refusals(plan: StudyPlan, policy: Policy, population: Population) -> Iterator[str]:
    """Every broken clause in words. Comparisons are written so that a NaN would be refused."""
    privacy, runs = plan.privacy, plan.rounds + plan.privacy.spare_charges
    if plan.task not in policy.tasks:
        yield f"tasks: {plan.task} is not among {', '.join(policy.tasks)}"
    if plan.network.name not in policy.networks:
        yield f"networks: {plan.network.name} is not among {', '.join(policy.networks)}"
    if not privacy.noise_multiplier >= policy.minimum_noise_multiplier:
        yield f"minimum_noise_multiplier: {privacy.noise_multiplier:g} < {policy.minimum_noise_multiplier:g}"
    if not privacy.epsilon <= policy.maximum_epsilon_per_study:
        yield f"maximum_epsilon_per_study: {privacy.epsilon:g} > {policy.maximum_epsilon_per_study:g}"
    if not privacy.epsilon <= population.epsilon:
        yield f"population epsilon: {privacy.epsilon:g} > {population.epsilon:g}"
    if not privacy.delta <= population.largest_delta:
        yield f"delta: {privacy.delta:g} > 1 / (10 * {population.public_size} patients) = {population.largest_delta:g}"
    if not plan.minimum_hospitals >= policy.minimum_hospitals:
        yield f"minimum_hospitals: {plan.minimum_hospitals} < {policy.minimum_hospitals}"
    if not runs <= policy.maximum_rounds:
        yield f"maximum_rounds: {runs} ({privacy.spare_charges} of them spare) > {policy.maximum_rounds}"
    yield from _release_refusals(plan, policy)


def _release_refusals(plan: StudyPlan, policy: Policy) -> Iterator[str]:
    """The clauses on released validation statistics."""
    if plan.evaluation is None:
        return
    if not policy.release_validation:
        yield f"release_validation: the plan releases statistics every {plan.evaluation.every} rounds, the policy none"
    if not plan.evaluation.noise_multiplier >= policy.minimum_noise_multiplier:
        yield (
            f"minimum_noise_multiplier of the release: {plan.evaluation.noise_multiplier:g} "
            f"< {policy.minimum_noise_multiplier:g}"
        )
