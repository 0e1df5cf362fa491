"""The study plan: what a study is allowed to vary, validated, with a canonical digest.

A plan is data, never code. The coordinator sends it, every hospital validates it again and approves it by its digest.
The stricter of plan and hospital policy wins.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from shared_models.config import (
    ALWAYS_WRITTEN,
    Count,
    Evolving,
    Name,
    Positive,
    Probability,
    explain,
    read_toml,
    refuse_together,
)
from shared_models.errors import ConfigError, UnsupportedFileError
from shared_models.versions import refuse_version

SMALLEST_COHORT = 3  # two hospitals would each learn the other's update from the sum
LARGEST_COHORT = 100  # every hospital has a mask with every other; larger federations sample


class LogisticRegression(Evolving):
    """Tabular: one linear layer."""

    name: Literal["logistic-regression"]


class ProportionalHazards(Evolving):
    """Tabular, time to an event: one linear score for all intervals, and a hazard for each."""

    name: Literal["proportional-hazards"]


class Mlp(Evolving):
    """Tabular: linear layers with ReLU between them."""

    name: Literal["mlp"]
    hidden: Annotated[tuple[Count, ...], ALWAYS_WRITTEN] = (32,)


class Cnn(Evolving):
    """Images: convolutions with GroupNorm, global average pooling, one linear layer."""

    name: Literal["cnn"]
    channels: Annotated[tuple[Count, ...], ALWAYS_WRITTEN] = (16, 32, 64)


class UNet(Evolving):
    """Outlines in images: convolutions with GroupNorm down to a small map and up again."""

    name: Literal["unet"]
    channels: Annotated[tuple[Count, ...], Field(min_length=2)] = (16, 32, 64)


class Lstm(Evolving):
    """Series with missing values: values, mask and time since last seen enter together.

    Attributes:
        carry_forward: Whether the last value seen of a variable stands where it is missing, instead of nothing.
    """

    name: Literal["lstm"]
    hidden: Annotated[Count, ALWAYS_WRITTEN] = 64
    layers: Annotated[int, Field(ge=1, le=4), ALWAYS_WRITTEN] = 1
    carry_forward: bool = False


class Transformer(Evolving):
    """Tokens or series: pre-norm encoder layers, mean over the positions that are there.

    Attributes:
        carry_forward: As of ``Lstm``; tokens have nothing to carry.
    """

    name: Literal["transformer"]
    width: Annotated[Count, ALWAYS_WRITTEN] = 64
    heads: Annotated[int, Field(ge=1, le=64), ALWAYS_WRITTEN] = 4
    layers: Annotated[int, Field(ge=1, le=48), ALWAYS_WRITTEN] = 2
    carry_forward: bool = False

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        return self


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PretrainedEncoder(Evolving):
    """Texts: a pretrained encoder of BERT's kind, frozen, with low-rank adapters in its top layers and a linear head.

    Attributes:
        base: Digest of the encoder's files (``pretrained.digest_of``): weights, configuration, tokenizer.
        rank: Of each adapter.
        alpha: What an adapter gives is scaled by alpha / rank.
        top_layers: How many of the encoder's layers have adapters, at their queries and values; counted from the top.
            0: only the head is trained.
        length: Tokens of a text that are read.
    """

    name: Literal["pretrained-encoder"]
    base: Digest
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    alpha: Positive = 8.0
    top_layers: Annotated[int, Field(ge=0, le=48)] = 2
    length: Annotated[int, Field(ge=8, le=4096)] = 256


class PretrainedCnn(Evolving):
    """Images: the convolutions of a model that this project trained before, frozen, and a linear layer of its own.

    Attributes:
        base: Digest of the model file (``pretrained.digest_of``).
        train_norms: Whether the scales and shifts of its group normalisations are trained too.
    """

    name: Literal["pretrained-cnn"]
    base: Digest
    train_norms: bool = False


Network = Annotated[
    LogisticRegression
    | ProportionalHazards
    | Mlp
    | Cnn
    | UNet
    | Lstm
    | Transformer
    | PretrainedEncoder
    | PretrainedCnn,
    Field(discriminator="name"),
]


SMALLEST_RATE = 1e-4  # of the learning rate: below it rounds are paid for and hardly move the model


class ConstantRate(Evolving):
    """The same learning rate in every round."""

    name: Literal["constant"]

    def factor(self, round_number: int, rounds: int) -> float:  # noqa: ARG002 - the same of every schedule
        """What the learning rate is multiplied with."""
        return 1.0


class CosineRate(Evolving):
    """Half a cosine from the learning rate in the first round to ``final`` times it in the last.

    Source:
        Loshchilov and Hutter, arXiv:1608.03983, equation 5, without restarts, over rounds.
    """

    name: Literal["cosine"]
    final: Annotated[float, Field(ge=SMALLEST_RATE, le=1, allow_inf_nan=False)]

    def factor(self, round_number: int, rounds: int) -> float:
        """What the learning rate is multiplied with."""
        gone = (round_number - 1) / max(rounds - 1, 1)
        return min(1.0, self.final + (1 - self.final) * (1 + math.cos(math.pi * gone)) / 2)


class StepRate(Evolving):
    """The learning rate falls to ``by`` times what it was after every ``every`` rounds."""

    name: Literal["step"]
    every: Count
    by: Probability

    def factor(self, round_number: int, rounds: int) -> float:  # noqa: ARG002 - the same of every schedule
        """What the learning rate is multiplied with."""
        return float(self.by ** ((round_number - 1) // self.every))


class ExponentialRate(Evolving):
    """The learning rate falls to ``by`` times what it was after every round."""

    name: Literal["exponential"]
    by: Probability

    def factor(self, round_number: int, rounds: int) -> float:  # noqa: ARG002 - the same of every schedule
        """What the learning rate is multiplied with."""
        return float(self.by ** (round_number - 1))


Schedule = Annotated[ConstantRate | CosineRate | StepRate | ExponentialRate, Field(discriminator="name")]


Extent = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Augmentation(Evolving):
    """How the hospital changes images and series each time that they are trained on; nothing of it is kept.

    A record's change depends on no other record, so the clip still bounds a patient, and it costs no privacy.

    Attributes:
        copies: Changed copies of each record in a step, whose mean gradient is the record's: less noise of the changes
            in one clipped gradient, at so many times the work (De et al., arXiv:2204.13650, section 3.2).
        shift: Images: moved by up to this share of their size, in whole pixels, each direction by itself.
        rotate_degrees: Images: turned by up to this angle.
        flip: Images: left and right change sides in every other copy. Not where the side of the body matters.
        contrast: Values are multiplied by up to this share more or less.
        noise: Standard deviation of what is added to every value, in encoded units.
        drop: Series: the probability of a measurement to be taken for missing.
    """

    copies: Annotated[int, Field(ge=1, le=64)] = 1
    shift: Extent = 0.0
    rotate_degrees: Annotated[float, Field(ge=0, le=180, allow_inf_nan=False)] = 0.0
    flip: bool = False
    contrast: Extent = 0.0
    noise: Extent = 0.0
    drop: Extent = 0.0


class TrainingPlan(Evolving):
    """What one round does at a hospital. Merely fast or slow: nothing here changes what privacy costs but ``steps``.

    Attributes:
        learning_rate: Of the local steps; the largest of any round.
        steps: Local steps of a round.
        proximal: mu of FedProx: every local step also pulls towards the round's global parameters, by mu times the
            distance from them. 0 is FedAvg's plain step.
        schedule: How the learning rate falls from round to round; it never rises above ``learning_rate``.
        class_weights: What a record's loss is multiplied with, by label column and, in the task's order, class. From
            public figures or from released, noised counts: a hospital's own counts would be one more release.
        augmentation: How images and series are changed each time; None trains on them as they are.
    """

    learning_rate: Positive
    steps: Annotated[int, Field(ge=1, le=100_000)]
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    schedule: Schedule = ConstantRate(name="constant")
    class_weights: Mapping[str, tuple[Positive, ...]] = {}
    augmentation: Augmentation | None = None

    @model_validator(mode="after")
    def _the_pull_does_not_overshoot(self) -> "TrainingPlan":
        """Beyond 1 a pull carries past the global parameters, and beyond 2 further away with every step."""
        if not self.learning_rate * self.proximal <= 1:
            raise ValueError("learning_rate times proximal must be at most 1: a step would overshoot")
        return self


Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # share of a running mean that is kept


class FedAvg(Evolving):
    """Global parameters plus the weighted mean of the updates."""

    name: Literal["fedavg"]


class FedAvgM(Evolving):
    """FedAvg with momentum at the coordinator."""

    name: Literal["fedavgm"]
    learning_rate: Positive = 1.0
    momentum: Decay


class FedAdam(Evolving):
    """Adam at the coordinator, over rounds."""

    name: Literal["fedadam"]
    learning_rate: Positive
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99
    tau: Positive = 1e-3


class FedYogi(Evolving):
    """Yogi at the coordinator, over rounds."""

    name: Literal["fedyogi"]
    learning_rate: Positive
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99
    tau: Positive = 1e-3


class FedAdagrad(Evolving):
    """Adagrad at the coordinator, over rounds; there is no second running mean, so no ``beta_2``."""

    name: Literal["fedadagrad"]
    learning_rate: Positive
    beta_1: Decay = 0.0
    tau: Positive = 1e-3


Averaging = Annotated[FedAvg | FedAvgM | FedAdam | FedYogi | FedAdagrad, Field(discriminator="name")]


class PrivacyPlan(Evolving):
    """The mechanism of every local step, and what it may cost; there is no honest default for any of it.

    Attributes:
        clip: C, the L2 norm that one patient's gradient is clipped to.
        noise_multiplier: sigma; each step adds Gaussian noise of standard deviation sigma * C to the clipped sum.
        sample_rate: q, the probability that a patient takes part in a step; the expected batch, and so the
            denominator, is q times the hospital's public size.
        epsilon: The most that this study may cost any patient, enforced at the hospital by its Renyi filter.
        delta: The delta it holds at; each hospital demands at most 1 / (10 * public size).
        spare_charges: Rounds beyond ``rounds`` that are reserved for attempts that fail.
    """

    clip: Positive
    noise_multiplier: Positive
    sample_rate: Probability
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    spare_charges: Annotated[int, Field(ge=0, le=999), ALWAYS_WRITTEN] = 0


Finite = Annotated[float, Field(allow_inf_nan=False)]
# Printed on terminals, in pictures and in reports: nothing of it may be taken for mark-up, nor differ by a space.
Words = Annotated[str, Field(max_length=64, pattern=r"^[^\s\[\]$\\\p{C}]([^\[\]$\\\p{C}]*[^\s\[\]$\\\p{C}])?$")]


class Subgroups(Evolving):
    """Patients told apart by one column: each in one group, or in none where the column's value is not known.

    The column is one of the task's table; or, with ``categories`` or a range, one that is *beside* the network's
    inputs: hospitals read it for evaluations only, and no network sees it.

    Attributes:
        column: Name of the column in the task's schema, or of the one beside the inputs.
        edges: Of a numeric column, public, ascending: a group below the first, one from each to the next, one above.
            Of a column of categories none; each category is a group.
        categories: Of a column beside the inputs: its public categories, each a group.
        low: Of a number beside the inputs: the least value that is possible; public.
        high: The greatest.
        unit: Of the number.
    """

    column: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
    edges: Annotated[tuple[Finite, ...], Field(max_length=10)] = ()
    categories: Annotated[tuple[Words, ...], Field(max_length=20)] = ()
    low: Finite | None = None
    high: Finite | None = None
    unit: Words | Literal[""] = ""

    @property
    def beside(self) -> bool:
        """Whether the column is none of the network's inputs, but declared here."""
        return bool(self.categories) or self.low is not None

    @model_validator(mode="after")
    def _edges_ascend(self) -> "Subgroups":
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("edges must ascend")
        return self

    @model_validator(mode="after")
    def _a_column_beside_the_inputs_is_declared_whole(self) -> "Subgroups":
        ranged = self.low is not None and self.high is not None and self.unit != ""
        if self.categories and (self.edges or self.low is not None or self.high is not None or self.unit):
            raise ValueError("categories have no edges, range or unit")
        if self.categories and not 2 <= len(set(self.categories)) == len(self.categories):
            raise ValueError("categories: at least two, and none twice")
        if not ranged and not (self.low is None and self.high is None and self.unit == ""):
            raise ValueError("low, high and unit need each other")
        if self.low is not None and self.high is not None:
            if not self.edges:
                raise ValueError("a number needs edges")
            if not self.low < self.edges[0] <= self.edges[-1] <= self.high:
                raise ValueError("edges must lie above low and not above high")
        return self


class EvaluationPlan(Evolving):
    """Release of validation statistics: noised at the hospital with sigma * S, charged at sample rate 1.

    Attributes:
        every: Rounds between two releases.
        clip: S, the L2 norm that one validation patient's statistics are clipped to.
        noise_multiplier: sigma of the release.
        bins: Score bins of the released histograms.
        subgroups: How patients are told apart for statistics of each group, in the same release at the same price: the
            noise of every count is sqrt(1 + groupings) times as large.
    """

    every: Count
    clip: Positive
    noise_multiplier: Positive
    bins: Annotated[int, Field(ge=2, le=1000, multiple_of=2), ALWAYS_WRITTEN] = 20
    subgroups: Annotated[tuple[Subgroups, ...], Field(max_length=8)] = ()

    @model_validator(mode="after")
    def _columns_are_named_once(self) -> "EvaluationPlan":
        if len({one.column for one in self.subgroups}) < len(self.subgroups):
            raise ValueError("subgroups: a column is named twice")
        return self


class Fold(Evolving):
    """Which part of every hospital's patients is left out of training, and is what the model is evaluated on.

    Attributes:
        index: Which one, counted from 1.
        count: How many there are. Hospitals divide their patients by a keyed hash of the id alone.
    """

    index: Annotated[int, Field(ge=1, le=20)]
    count: Annotated[int, Field(ge=2, le=20)]

    @model_validator(mode="after")
    def _it_is_one_of_them(self) -> "Fold":
        if self.index > self.count:
            raise ValueError("index is above count")
        return self


class EarlyStopping(Evolving):
    """When a study ends before its last round: by released, noised statistics, and by nothing else.

    Attributes:
        metric: Which released figure is watched; the best checkpoint is chosen by it too.
        patience: Releases in a row that may bring no improvement.
        minimum_improvement: By how much a release must beat the best one before it to count as an improvement.
    """

    metric: Literal[
        "auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "brier", "mae", "rmse", "wape", "c_index", "dice"
    ]
    patience: Count
    minimum_improvement: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


def _named_once(hospitals: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if hospitals is None:
        return None
    if len(set(hospitals)) < len(hospitals):
        raise PydanticCustomError("twice", "a hospital is named twice")
    return tuple(sorted(hospitals))


Hospitals = Annotated[tuple[Name, ...], Field(min_length=SMALLEST_COHORT, max_length=10_000)]


class StudyPlan(Evolving):
    """A study, whole: task, network, rounds, mechanism.

    Attributes:
        format: Version of this schema.
        study: The study's name, unique at a coordinator.
        purpose: What it is for, in words that a hospital's steward reads before approving.
        task: Name of a task that every hospital has installed (``shared_models/tasks.py``).
        data_licence: Licence of the data, or the agreement it is used under; printed on the model card.
        seed: Of the public initial parameters; never of noise or sampling.
        rounds: Rounds to complete.
        minimum_hospitals: Below this many updates a round is not averaged; at least three, because a sum of two hides
            nothing from either.
        deadline_s: Seconds to wait for hospitals, in each stage.
        reply_grid_s: What a hospital computed leaves at a multiple of this many seconds after the request came.
        weight_cap: Public size from which a hospital's weight stays 1; weights are min(1, public size / cap).
        averaging: How the coordinator moves the global parameters by the sum of a round.
        early_stopping: Whether the study may end before its last round.
        hospitals: Whom the study is for, sorted; None means every hospital of the roster.
        fold: Part of a cross-validation: the patients that train are all but those of this fold, whatever share a
            hospital's manifest keeps for validation.
    """

    format: Literal[1]
    study: Name
    purpose: Annotated[str, Field(min_length=10, max_length=2000)]
    task: Name
    data_licence: Annotated[str, Field(min_length=2, max_length=200)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), ALWAYS_WRITTEN] = 0
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    minimum_hospitals: Annotated[int, Field(ge=SMALLEST_COHORT, le=LARGEST_COHORT)]
    deadline_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
    reply_grid_s: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False), ALWAYS_WRITTEN] = 0.1
    weight_cap: Count
    network: Network
    training: TrainingPlan
    privacy: PrivacyPlan
    evaluation: Annotated[EvaluationPlan | None, ALWAYS_WRITTEN] = None
    averaging: Averaging = FedAvg(name="fedavg")
    early_stopping: EarlyStopping | None = None
    hospitals: Annotated[Hospitals | None, AfterValidator(_named_once)] = None
    fold: Fold | None = None

    @model_validator(mode="after")
    def _its_parts_fit(self) -> "StudyPlan":
        refuse_together(type(self), self._misfits())
        return self

    def _misfits(self) -> Iterator[tuple[str, str]]:
        """Keys that do not fit the others, each with what is wrong."""
        if not self.reply_grid_s < self.deadline_s:
            yield "reply_grid_s", "reply_grid_s must be below deadline_s: every update would come too late"
        if not self.training.schedule.factor(self.rounds, self.rounds) >= SMALLEST_RATE:
            yield "training.schedule", f"the last round's learning rate is below {SMALLEST_RATE:g} of the first's"
        if self.hospitals is not None and len(self.hospitals) < self.minimum_hospitals:
            yield "hospitals", f"{len(self.hospitals)} are named, and minimum_hospitals is {self.minimum_hospitals}"
        if self.fold is not None and (self.evaluation is None or self.rounds % self.evaluation.every):
            yield "fold", "a fold is for evaluating the last round's model: [evaluation] must release after it"
        if self.early_stopping is None:
            return
        if self.evaluation is None:
            yield "early_stopping", "only released statistics may stop a study: there is no [evaluation]"
        elif self.early_stopping.patience >= (releases := self.rounds // self.evaluation.every):
            yield "early_stopping.patience", f"{releases} releases in {self.rounds} rounds: it could never stop"

    def training_in(self, round_number: int) -> TrainingPlan:
        """What one round does at a hospital, with the learning rate that the schedule gives this round.

        The hospital computes it, from the plan and the round's number, so that it is part of what was approved. Two
        machines may differ in the last digit of a cosine; nothing depends on it, because no other party uses the rate.
        """
        factor = self.training.schedule.factor(round_number, self.rounds)
        rate = self.training.learning_rate * factor
        return self.training.model_copy(update={"learning_rate": rate, "schedule": ConstantRate(name="constant")})

    def digest(self) -> str:
        """SHA-256 of the plan in canonical JSON (RFC 8785), in hexadecimal.

        Guarantees:
            * Equal plans have equal digests whatever the order of their keys or the notation of their numbers.
            * Different plans have different digests (collision resistance of SHA-256).
        """
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """The plan as canonical JSON (RFC 8785): what is sent, signed and hashed."""
        return rfc8785.dumps(self.model_dump(mode="json"))


def parse_plan(fields: Mapping[str, Any], source: str = "plan") -> StudyPlan:
    """Validate a plan, every error at once.

    Goes through JSON so that TOML's lists and JSON's lists are the same thing to the strict model.

    Raises:
        ConfigError: A key is unknown, missing or out of range.
    """
    try:
        text = json.dumps(fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}", hint="See docs/plan.md for every key and its range.") from None
    return parse_plan_json(text, source)


def parse_plan_json(text: str, source: str = "plan") -> StudyPlan:
    """Validate a plan in JSON, as it travels and as a model file carries it."""
    try:
        return StudyPlan.model_validate_json(text)
    except ValidationError as error:
        refuse_version(error, source, UnsupportedFileError)
        raise ConfigError(f"{source}: {explain(error)}", hint="See docs/plan.md for every key and its range.") from None


def read_plan(path: Path) -> StudyPlan:
    """Read and validate a plan file (TOML)."""
    return parse_plan(read_toml(path, "plan"), str(path))
