"""What this hospital permits: studies, networks, noise, peers, hours. The stricter of plan and policy wins.

The policy is read from the hospital's own settings; a plan can only be refused by it, never change it. Whether the
budget can still pay for a plan that the policy permits is asked in ``client/budget.py``.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from client.hours import Window, is_open
from shared_models.config import Count, Frozen, Name, Positive
from shared_models.errors import DailyRoundsError, OutsideHoursError, PolicyError
from shared_models.plan import LARGEST_COHORT, SMALLEST_COHORT, StudyPlan

MICRO_BATCH = 256  # most records whose gradients are in memory at once; dp_sgd's own default
LARGEST_DAY = 10_000  # rounds; a larger limit is none

NetworkName = Literal[
    "logistic-regression",
    "proportional-hazards",
    "mlp",
    "cnn",
    "unet",
    "lstm",
    "transformer",
    "pretrained-encoder",
    "pretrained-cnn",
]
DeviceName = Literal["cpu", "cuda"]
Peers = Annotated[int, Field(ge=SMALLEST_COHORT, le=LARGEST_COHORT)]
Address = Annotated[str, Field(pattern=r"^[^\s/]+:[0-9]{1,5}$")]  # host:port, as in the settings


class Site(NamedTuple):
    """What a plan would meet at this hospital, and what policy looks at besides the plan.

    Attributes:
        coordinator: Address that this hospital dials; TLS proves that whoever proposes is there.
        device: Where this process computes.
        parameters: Parameters of the plan's network for its task.
    """

    coordinator: str
    device: str
    parameters: int

    @property
    def memory_mb(self) -> float:
        """Estimate of what training takes in memory, in megabytes: parameters and gradients per record.

        For each parameter 40 bytes (two copies of the network in float32; sum, noise and update in float64), and 16
        for each of the 256 records that are computed at once: its gradient and its patient's mean in float32, and the
        latter once more in float64. Activations, the records and torch itself, a few hundred megabytes, come on top.
        """
        return self.parameters * (40 + 16 * MICRO_BATCH) / 1e6


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


class StandingApproval(Frozen):
    """A rule that approves studies in the steward's absence: those that meet every condition that it names.

    Attributes:
        tasks: Tasks it is for.
        networks: Networks it is for.
        coordinators: Coordinators it is for, by address.
        maximum_epsilon: Most that the plan may promise to cost.
        minimum_noise_multiplier: Least sigma, of training steps and of a release.
        maximum_rounds: Most training runs, spare ones included.
        release_validation: False: plans that release no statistics only.
        upgrades: No condition: what becomes of a study that is under way when the software here changes. ``ask`` the
            steward, or ``follow``: the rule approves it again.
    """

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    networks: Annotated[tuple[NetworkName, ...], Field(min_length=1)] | None = None
    coordinators: Annotated[tuple[Address, ...], Field(min_length=1)] | None = None
    maximum_epsilon: Positive | None = None
    minimum_noise_multiplier: Positive | None = None
    maximum_rounds: Count | None = None
    release_validation: bool = True
    upgrades: Literal["ask", "follow"] = "ask"

    @model_validator(mode="after")
    def _says_something(self) -> "StandingApproval":
        if not self.model_fields_set - {"upgrades"}:
            raise ValueError("a standing approval without a condition approves everything; name at least one")
        return self

    def covers(self, plan: StudyPlan, coordinator: str) -> bool:
        """Whether a plan meets every condition. Comparisons are written so that a NaN would not."""
        sigma, least = _least_noise(plan), self.minimum_noise_multiplier
        return (
            (self.tasks is None or plan.task in self.tasks)
            and (self.networks is None or plan.network.name in self.networks)
            and (self.coordinators is None or coordinator in self.coordinators)
            and (self.maximum_epsilon is None or plan.privacy.epsilon <= self.maximum_epsilon)
            and (least is None or sigma >= least)
            and (self.maximum_rounds is None or _runs(plan) <= self.maximum_rounds)
            and (self.release_validation or plan.evaluation is None)
        )


class Policy(Frozen):
    """The hospital's own limits on every plan; what has a default limits nothing unless it is set, or asks the steward.

    Attributes:
        tasks: Tasks that may be trained here, by name.
        networks: Networks that may be trained here, by name.
        minimum_noise_multiplier: Least sigma of a training step and of a release.
        maximum_epsilon_per_study: Most that one study may cost a patient.
        minimum_hospitals: Fewest hospitals that a round may invite.
        maximum_attempts: Most attempts at one round, failed ones included.
        maximum_rounds: Most training runs of one study: its rounds and its spare charges together.
        minimum_threshold: Fewest hospitals that must stay to the end of each sum; as many as ``minimum_hospitals``
            unless told otherwise.
        maximum_rounds_per_day: Most training runs that may be charged in any 24 hours, over all studies.
        coordinators: Addresses of coordinators that may lead studies; empty: whichever the settings dial.
        hours: Windows of local time in which rounds may run; empty: always.
        devices: Where may be computed.
        maximum_memory_mb: Most that training may take by the estimate ``Site.memory_mb``.
        standing_approvals: Rules by which a study is approved without the steward; none: the steward is asked.
        release_validation: Whether noised validation statistics may leave at all.
        send_checkpoints: Whether signed checkpoints of the ledger are left at the coordinator for auditors.
        send_evidence: Whether evidence bundles are: at the end of each study, and when somebody asks for it here.
    """

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)]
    networks: Annotated[tuple[NetworkName, ...], Field(min_length=1)]
    minimum_noise_multiplier: Positive
    maximum_epsilon_per_study: Positive
    minimum_hospitals: Peers
    maximum_attempts: Count
    maximum_rounds: Count
    minimum_threshold: Peers | None = None
    maximum_rounds_per_day: Annotated[int, Field(ge=1, le=LARGEST_DAY)] | None = None
    coordinators: tuple[Address, ...] = ()
    hours: tuple[Window, ...] = ()
    devices: Annotated[tuple[DeviceName, ...], Field(min_length=1)] = ("cpu", "cuda")
    maximum_memory_mb: Count | None = None
    standing_approvals: tuple[StandingApproval, ...] = ()
    release_validation: bool = False
    send_checkpoints: bool = False
    send_evidence: bool = False

    @property
    def least_threshold(self) -> int:
        """Fewest hospitals that must stay to the end of each sum."""
        return self.minimum_threshold or self.minimum_hospitals

    def stands(self, plan: StudyPlan, coordinator: str, *, upgrade: bool = False) -> bool:
        """Whether a standing rule approves this plan; whether the policy permits it is ``admit``'s question.

        Args:
            plan: A new one, or one that is under way.
            coordinator: Who proposes it.
            upgrade: It is under way, and the software has changed since it was approved.
        """
        rules = [rule for rule in self.standing_approvals if rule.covers(plan, coordinator)]
        return any(rule.upgrades == "follow" for rule in rules) if upgrade else bool(rules)


def admit(plan: StudyPlan, policy: Policy, population: Population, site: Site) -> None:
    """Refuse a plan that this hospital does not permit.

    Guarantees:
        * Uses the plan and the hospital's settings only, never a record: the answer reveals nothing about a patient.
        * Names every clause that the plan breaks, each with the plan's figure and the policy's.

    Raises:
        PolicyError: At least one clause is broken.
    """
    refusals = [*_refusals(plan, policy, population), *_site_refusals(policy, site)]
    if refusals:
        raise PolicyError(
            f"study {plan.study} is refused by this hospital's policy: {'; '.join(refusals)}",
            hint="Change the plan, or have the steward change [policy] or [population] in the hospital's settings.",
        )


def permit_now(policy: Policy, *, moment: datetime, charged_today: int) -> None:
    """Refuse to compute now what is permitted at another time: for the coordinator this hospital has dropped out.

    Args:
        policy: The hospital's.
        moment: Local time.
        charged_today: Training runs that were charged in the 24 hours before, over all studies.

    Raises:
        OutsideHoursError: No window of ``hours`` is open.
        DailyRoundsError: ``maximum_rounds_per_day`` is used up.
    """
    if policy.hours and not is_open(policy.hours, moment):
        raise OutsideHoursError(
            f"hours: it is {moment:%a %H:%M}, and rounds run in {', '.join(policy.hours)} only",
            hint="Nothing to do: rounds are answered again when the next window opens.",
        )
    limit = policy.maximum_rounds_per_day
    if limit is not None and not charged_today < limit:
        raise DailyRoundsError(
            f"maximum_rounds_per_day: {charged_today} rounds were charged in the last 24 hours, {limit} are permitted",
            hint="Nothing to do: rounds are answered again when the oldest of them is a day old.",
        )


def _runs(plan: StudyPlan) -> int:
    return plan.rounds + plan.privacy.spare_charges


def _least_noise(plan: StudyPlan) -> float:
    """Least sigma of anything that the plan computes."""
    released = [plan.evaluation.noise_multiplier] if plan.evaluation else []
    return min([plan.privacy.noise_multiplier, *released])


def _site_refusals(policy: Policy, site: Site) -> Iterator[str]:
    """The clauses on who asks and where it would run."""
    if policy.coordinators and site.coordinator not in policy.coordinators:
        yield f"coordinators: {site.coordinator} is not among {', '.join(policy.coordinators)}"
    if site.device not in policy.devices:
        yield f"devices: this process computes on {site.device}, permitted: {', '.join(policy.devices)}"
    limit = policy.maximum_memory_mb
    if limit is not None and not site.memory_mb <= limit:
        yield f"maximum_memory_mb: {site.parameters} parameters need about {site.memory_mb:.0f} MB > {limit}"


def _refusals(plan: StudyPlan, policy: Policy, population: Population) -> Iterator[str]:
    """Every broken clause in words. Comparisons are written so that a NaN would be refused."""
    privacy, runs = plan.privacy, _runs(plan)
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
