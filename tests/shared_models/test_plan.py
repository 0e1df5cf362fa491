"""The study plan: one digest per meaning, and every mistake refused at once."""

import copy
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_models.errors import ConfigError
from shared_models.plan import parse_plan, read_plan

Fields = dict[str, Any]
Keys = tuple[str, ...]

COUNTS = st.integers(1, 1000)
POSITIVE = st.floats(1e-6, 1e6)
NETWORKS = st.one_of(
    st.just({"name": "logistic-regression"}),
    st.fixed_dictionaries({"name": st.just("mlp"), "hidden": st.lists(COUNTS, max_size=3)}),
    st.fixed_dictionaries({"name": st.just("cnn"), "channels": st.lists(COUNTS, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"name": st.just("lstm"), "hidden": COUNTS, "layers": st.integers(1, 4)}),
    st.fixed_dictionaries({"name": st.just("transformer"), "width": st.just(64), "heads": st.sampled_from([1, 2, 8])}),
)
PRIVACY = st.fixed_dictionaries(
    {
        "clip": POSITIVE,
        "noise_multiplier": POSITIVE,
        "sample_rate": st.floats(1e-6, 1),
        "epsilon": POSITIVE,
        "delta": st.floats(1e-12, 0.5),
        "spare_charges": st.integers(0, 10),
    }
)
EVALUATION = st.fixed_dictionaries(
    {"every": COUNTS, "clip": POSITIVE, "noise_multiplier": POSITIVE, "bins": st.sampled_from([2, 20])}
)
PLANS: st.SearchStrategy[Fields] = st.fixed_dictionaries(
    {
        "format": st.just(1),
        "study": st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
        "purpose": st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=10, max_size=40),
        "task": st.just("breast-cancer"),
        "data_licence": st.just("CC BY 4.0"),
        "seed": st.integers(0, 2**31 - 1),
        "rounds": COUNTS,
        "minimum_hospitals": st.integers(3, 100),
        "deadline_s": st.floats(0.5, 86_400),
        "reply_grid_s": st.floats(0.001, 0.4),
        "weight_cap": COUNTS,
        "network": NETWORKS,
        "training": st.fixed_dictionaries({"learning_rate": POSITIVE, "steps": COUNTS}),
        "privacy": PRIVACY,
    },
    optional={"evaluation": EVALUATION},
)

VALID: Fields = {
    "format": 1,
    "study": "a-study",
    "purpose": "To show what a valid plan looks like.",
    "task": "breast-cancer",
    "data_licence": "CC BY 4.0",
    "rounds": 20,
    "minimum_hospitals": 3,
    "deadline_s": 60.0,
    "weight_cap": 500,
    "network": {"name": "mlp", "hidden": [16, 8]},
    "training": {"learning_rate": 0.1, "steps": 5},
    "privacy": {"clip": 1.0, "noise_multiplier": 2.0, "sample_rate": 0.2, "epsilon": 1.0, "delta": 1e-5},
    "evaluation": {"every": 5, "clip": 1.0, "noise_multiplier": 10.0},
}


def _shuffled(fields: Any, order: random.Random) -> Any:
    """The same mapping with its keys in another order, at every depth."""
    if not isinstance(fields, dict):
        return fields
    return {key: _shuffled(fields[key], order) for key in order.sample(sorted(fields), len(fields))}


def _leaves(fields: Fields, prefix: Keys = ()) -> Iterator[Keys]:
    for key, value in fields.items():
        yield from _leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]


def _with(fields: Fields, path: Keys, value: Any) -> Fields:
    changed = copy.deepcopy(fields)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@settings(max_examples=100, deadline=None)
@given(fields=PLANS, order=st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order_of_keys(fields: Fields, order: random.Random) -> None:
    """Two editors of one plan approve the same digest."""
    assert parse_plan(_shuffled(fields, order)).digest() == parse_plan(fields).digest()


@settings(max_examples=50, deadline=None)
@given(fields=PLANS)
def test_the_digest_survives_the_wire_and_the_file(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a coordinator reads from TOML and a hospital from canonical JSON is one plan, to the last digit."""
    plan = parse_plan(fields)
    file = tmp_path_factory.mktemp("plans") / "plan.toml"
    file.write_text(tomli_w.dumps(fields), encoding="utf-8")

    assert read_plan(file) == plan
    assert parse_plan(json.loads(plan.canonical())) == plan
    assert parse_plan(json.loads(plan.canonical())).digest() == plan.digest()
    assert plan.digest() == hashlib.sha256(plan.canonical()).hexdigest()


OTHER_VALUES: dict[Keys, Any] = {
    ("study",): "b-study",
    ("purpose",): "To show what another plan looks like.",
    ("task",): "heart-disease",
    ("data_licence",): "CC BY 4.1",
    ("network", "hidden"): [8, 16],
    ("evaluation", "bins"): 22,
}


FIELDS = [path for path in _leaves(parse_plan(VALID).model_dump(mode="json")) if path[-1] not in {"format", "name"}]


def _another(number: float) -> float:
    return number + 1 if isinstance(number, int) else number / 2


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_the_digest_changes_with_every_field(path: Keys) -> None:
    """Nothing that a study varies, spelled out or left at its default, escapes what a hospital approved."""
    plan = parse_plan(VALID)
    value: Any = plan.model_dump(mode="json")
    for key in path:
        value = value[key]

    changed = _with(VALID, path, OTHER_VALUES[path] if path in OTHER_VALUES else _another(value))

    assert parse_plan(changed).digest() != plan.digest()


def test_the_digest_changes_with_the_network_and_with_what_is_left_out() -> None:
    """Another kind of network, or no released evaluation, is another plan."""
    digests = {
        parse_plan(fields).digest()
        for fields in (
            VALID,
            {**VALID, "network": {"name": "mlp"}},
            {**VALID, "network": {"name": "logistic-regression"}},
            {key: value for key, value in VALID.items() if key != "evaluation"},
        )
    }

    assert len(digests) == 4


def test_a_default_spelled_out_is_the_same_plan() -> None:
    """The digest is of what the plan means."""
    spelled = _with(_with(VALID, ("seed",), 0), ("evaluation", "bins"), 20)

    assert parse_plan(spelled).digest() == parse_plan(VALID).digest()


def test_numbers_are_what_they_mean() -> None:
    """``1`` and ``1.0`` are one clip, but 20.0 rounds are refused: nobody trains for half a round."""
    assert parse_plan(_with(VALID, ("privacy", "clip"), 1)).digest() == parse_plan(VALID).digest()
    with pytest.raises(ConfigError, match="rounds: Input should be a valid integer"):
        parse_plan(_with(VALID, ("rounds",), 20.0))


NOT_POSITIVE = (0.0, -1.0, math.nan, math.inf, -math.inf, "1.0", True, None)
WRONG: list[tuple[Keys, Any]] = [
    *((("privacy", "epsilon"), value) for value in NOT_POSITIVE),
    *((("privacy", "noise_multiplier"), value) for value in NOT_POSITIVE),
    *((("privacy", "clip"), value) for value in NOT_POSITIVE),
    *((("training", "learning_rate"), value) for value in NOT_POSITIVE),
    *((("privacy", "delta"), value) for value in (0.0, 1.0, -1e-5, math.nan)),
    *((("privacy", "sample_rate"), value) for value in (0.0, 1.01, math.nan)),
    *((("training", "steps"), value) for value in (0, -1, 1.5, "5")),
    *((("rounds",), value) for value in (0, -1, 2.5, math.nan)),
    *((("minimum_hospitals",), value) for value in (2, 101)),
    *((("deadline_s",), value) for value in (0.0, math.nan, math.inf)),
    *((("reply_grid_s",), value) for value in (0.0, 60.5, math.nan, math.inf)),
    *((("evaluation", "bins"), value) for value in (0, 7, 1002)),
    *((("seed",), value) for value in (-1, 2**31)),
    (("study",), "../escape"),
    (("study",), ""),
    (("task",), "A Task"),
    (("purpose",), "short"),
    (("format",), 2),
    (("network",), {"name": "resnet"}),
    (("network",), {"name": "transformer", "width": 10, "heads": 4}),
    (("network",), {"name": "lstm", "channels": [3]}),
    (("network",), "mlp"),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_a_value_out_of_range_is_refused_by_its_name(path: Keys, value: Any) -> None:
    """NaN most of all: it would pass every comparison that is written the wrong way round."""
    with pytest.raises(ConfigError, match="plan: " + r"\.".join(path)):
        parse_plan(_with(VALID, path, value))


def test_replies_that_would_all_come_too_late_are_refused() -> None:
    """A grid as wide as the deadline would have every hospital pay for updates that nobody waits for."""
    with pytest.raises(ConfigError, match="reply_grid_s must be below deadline_s"):
        parse_plan({**VALID, "deadline_s": 5.0, "reply_grid_s": 5.0})


@settings(max_examples=50, deadline=None)
@given(
    where=st.sampled_from([(), ("network",), ("training",), ("privacy",), ("evaluation",)]),
    key=st.from_regex(r"[a-z_]{1,12}x", fullmatch=True),
)
def test_an_unknown_key_is_refused_wherever_it_stands(where: Keys, key: str) -> None:
    """``noise_multipler`` must not mean "default noise"."""
    with pytest.raises(ConfigError, match=f"{key}: unknown key"):
        parse_plan(_with(VALID, (*where, key), 1.0))


@pytest.mark.parametrize("path", [p for p in _leaves(VALID) if p not in {("network", "hidden")}], ids=".".join)
def test_what_has_no_honest_default_must_be_said(path: Keys) -> None:
    """Every key of the minimal plan is needed."""
    fields = copy.deepcopy(VALID)
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]

    with pytest.raises(ConfigError, match=r"Field required|Unable to extract tag"):
        parse_plan(fields)


def test_every_error_is_told_at_once() -> None:
    """One round of mending, not five."""
    fields = _with(_with(VALID, ("privacy", "epsilon"), math.nan), ("privacy", "noise_multipler"), 1)
    fields["rounds"] = 0
    del fields["task"]

    with pytest.raises(ConfigError) as refusal:
        parse_plan(fields, "study.toml")

    assert str(refusal.value) == (
        "study.toml: task: Field required; rounds: Input should be greater than or equal to 1; "
        "privacy.epsilon: Input should be a finite number; privacy.noise_multipler: unknown key"
    )


def test_a_plan_cannot_be_changed_after_it_was_approved() -> None:
    """The digest would no longer be true."""
    plan = parse_plan(VALID)

    with pytest.raises(ValidationError, match="frozen"):
        plan.rounds = 1000  # type: ignore[misc]  # the point of the test
    with pytest.raises(ValidationError, match="frozen"):
        plan.privacy.epsilon = 10.0  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b"rounds = ", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "study: Field required"),
    ],
)
def test_a_plan_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """Missing, broken, in another encoding or empty: the message says which file."""
    path = tmp_path / "plan.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=complaint) as refusal:
        read_plan(path)

    assert str(path) in str(refusal.value)


# Fields that were added after 0.1.0

OF_0_1_0 = {
    (): "format study purpose task data_licence seed rounds minimum_hospitals deadline_s reply_grid_s weight_cap "
    "network training privacy evaluation",
    ("training",): "learning_rate steps",
    ("privacy",): "clip noise_multiplier sample_rate epsilon delta spare_charges",
    ("evaluation",): "every clip noise_multiplier bins",
}
ADDED: Fields = {
    **VALID,
    "training": {
        **VALID["training"],
        "proximal": 0.5,
        "schedule": {"name": "step", "every": 4, "by": 0.5},
    },
    "averaging": {"name": "fedyogi", "learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.9, "tau": 0.01},
    "early_stopping": {"metric": "auroc", "patience": 2, "minimum_improvement": 0.01},
    "hospitals": ["east", "north", "south"],
}


@settings(max_examples=100, deadline=None)
@given(fields=PLANS)
def test_a_plan_that_uses_no_later_field_has_the_bytes_of_the_first_release(fields: Fields) -> None:
    """So hospitals that approved it, or know no later field, see the plan that they always saw."""
    fields = {"evaluation": None, **fields}

    sent = json.loads(parse_plan(fields).canonical())

    for path, keys in OF_0_1_0.items():
        inner = sent
        for key in path:
            inner = inner[key] or {}
        assert not set(inner) - set(keys.split())
    defaults = {"network": sent["network"], "evaluation": sent["evaluation"]}
    assert sent == {**fields, **defaults}  # which PLANS spells out in full, but for these


@pytest.mark.parametrize(
    "spelled",
    [
        {"averaging": {"name": "fedavg"}},
        {"early_stopping": None},
        {"hospitals": None},
        {"training": {**VALID["training"], "proximal": 0}},
        {"training": {**VALID["training"], "schedule": {"name": "constant"}}},
    ],
)
def test_a_later_default_spelled_out_is_the_plan_without_it(spelled: Fields) -> None:
    """Same meaning, same bytes, in whatever way a plan is dumped."""
    plan = parse_plan({**VALID, **spelled})

    assert plan == parse_plan(VALID)
    assert plan.canonical() == parse_plan(VALID).canonical()
    assert plan.model_dump() == parse_plan(VALID).model_dump()


@pytest.mark.parametrize("path", list(_leaves({k: ADDED[k] for k in ADDED if k not in VALID or k == "training"})))
def test_the_digest_changes_with_every_later_field(path: Keys) -> None:
    """They are part of what a hospital approved, like all others."""
    others = {
        ("training", "schedule", "name"): None,
        ("averaging", "name"): "fedadam",
        ("early_stopping", "metric"): "brier",
        ("hospitals",): ["east", "north", "west"],
    }
    value: Any = ADDED
    for key in path:
        value = value[key]

    changed = _with(ADDED, path, others[path] if path in others else _another(value))
    if path == ("training", "schedule", "name"):
        changed["training"]["schedule"] = {"name": "exponential", "by": 0.9}

    assert parse_plan(changed).digest() != parse_plan(ADDED).digest()
    assert parse_plan(json.loads(parse_plan(changed).canonical())) == parse_plan(changed)


def test_hospitals_are_a_set() -> None:
    """Their order means nothing, so it does not enter the digest."""
    orders = [["a", "b", "c"], ["c", "a", "b"]]

    assert len({parse_plan({**VALID, "hospitals": order}).digest() for order in orders}) == 1


WRONG_LATER: list[tuple[Keys, Any, str]] = [
    *((("training", "proximal"), value, "training.proximal") for value in (-0.1, math.nan, math.inf, "0", None)),
    (("training", "proximal"), 10.1, "training: learning_rate times proximal must be at most 1"),
    (("training", "schedule"), {"name": "linear"}, "training.schedule"),
    (("training", "schedule"), {"name": "cosine"}, "training.schedule.cosine.final: Field required"),
    (("training", "schedule"), {"name": "cosine", "final": 0.0}, "training.schedule.cosine.final"),
    (("training", "schedule"), {"name": "step", "every": 0, "by": 0.5}, "training.schedule.step.every"),
    (("training", "schedule"), {"name": "step", "every": 1, "by": 1.5}, "training.schedule.step.by"),
    (("training", "schedule"), {"name": "exponential", "by": 0.0}, "training.schedule.exponential.by"),
    (("training", "schedule"), {"name": "exponential", "by": 0.6}, "training.schedule: the last round's learning rate"),
    (("averaging",), {"name": "fedsgd"}, "averaging"),
    (("averaging",), {"name": "fedavg", "momentum": 0.9}, "averaging.fedavg.momentum: unknown key"),
    (("averaging",), {"name": "fedavgm"}, "averaging.fedavgm.momentum: Field required"),
    *(
        (("averaging",), {"name": "fedavgm", "momentum": value}, "averaging.fedavgm.momentum")
        for value in (-0.1, 1.0, math.nan)
    ),
    (("averaging",), {"name": "fedadam"}, "averaging.fedadam.learning_rate: Field required"),
    (("averaging", "beta_1"), 1.0, "averaging.fedyogi.beta_1"),
    (("averaging", "beta_2"), -0.1, "averaging.fedyogi.beta_2"),
    (("averaging", "tau"), 0.0, "averaging.fedyogi.tau"),
    (("averaging", "learning_rate"), math.inf, "averaging.fedyogi.learning_rate"),
    (("averaging",), {"name": "fedadagrad", "learning_rate": 1.0, "beta_2": 0.9}, "fedadagrad.beta_2: unknown key"),
    (("early_stopping", "metric"), "records", "early_stopping.metric"),
    (("early_stopping", "patience"), 0, "early_stopping.patience"),
    (("early_stopping", "patience"), 4, "early_stopping.patience: 4 releases in 20 rounds: it could never stop"),
    (("early_stopping", "minimum_improvement"), math.nan, "early_stopping.minimum_improvement"),
    (("evaluation",), None, "early_stopping: only released statistics may stop a study"),
    (("hospitals",), ["north", "south"], "hospitals: Tuple should have at least 3 items"),
    (("hospitals",), ["north", "south", "north"], "hospitals: a hospital is named twice"),
    (("hospitals",), ["north", "South", "east"], "hospitals.1"),
    (("hospitals",), "north", "hospitals"),
    (("minimum_hospitals",), 4, "hospitals: 3 are named, and minimum_hospitals is 4"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), WRONG_LATER)
def test_a_wrong_later_value_is_refused_by_its_name(path: Keys, value: Any, complaint: str) -> None:
    """The message has the key's whole path, and says what it should be."""
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parse_plan(_with(ADDED, path, value))


def test_parts_that_do_not_fit_each_other_are_told_at_once() -> None:
    """Four keys that are fine by themselves."""
    fields = {**ADDED, "reply_grid_s": 60.0, "minimum_hospitals": 5, "evaluation": None, "training": VALID["training"]}
    fields["training"] = {**VALID["training"], "schedule": {"name": "exponential", "by": 0.1}}

    with pytest.raises(ConfigError) as refusal:
        parse_plan(fields)

    problems = str(refusal.value).removeprefix("plan: ").split("; ")
    assert [problem.partition(":")[0] for problem in problems] == [
        "reply_grid_s",
        "training.schedule",
        "hospitals",
        "early_stopping",
    ]


# The rate of a round


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"name": "constant"}, [1, 1, 1, 1, 1]),
        (
            {"name": "cosine", "final": 0.2},
            [1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2],
        ),
        ({"name": "step", "every": 2, "by": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
        ({"name": "exponential", "by": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_every_schedule_gives_the_rates_of_its_formula(schedule: Fields, factors: list[float]) -> None:
    """Five rounds; everything else of a round's training is as the plan has it."""
    fields = _with(_with({**VALID, "rounds": 5}, ("training", "schedule"), schedule), ("training", "proximal"), 2.0)
    plan = parse_plan(fields)

    rounds = [plan.training_in(number) for number in range(1, 6)]

    assert [one.learning_rate / plan.training.learning_rate for one in rounds] == pytest.approx(factors, rel=1e-12)
    assert {(one.steps, one.proximal) for one in rounds} == {(5, 2.0)}


SCHEDULES = st.one_of(
    st.fixed_dictionaries({"name": st.just("cosine"), "final": st.floats(1e-4, 1)}),
    st.fixed_dictionaries({"name": st.just("step"), "every": st.integers(1, 50), "by": st.floats(0.9, 1)}),
    st.fixed_dictionaries({"name": st.just("exponential"), "by": st.floats(0.95, 1)}),
)


@settings(max_examples=200, deadline=None)
@given(schedule=SCHEDULES, rounds=st.integers(1, 60), rate=POSITIVE)
def test_no_round_s_rate_is_above_the_plan_s_or_rises(schedule: Fields, rounds: int, rate: float) -> None:
    """So the bound of updates, which is of the plan's rate, bounds every round's."""
    fields = _with(
        {**VALID, "rounds": rounds}, ("training",), {"learning_rate": rate, "steps": 1, "schedule": schedule}
    )
    del fields["evaluation"]
    plan = parse_plan(fields)

    rates = [plan.training_in(number).learning_rate for number in range(1, rounds + 1)]

    assert rates[0] == rate
    assert all(after <= before for before, after in pairwise(rates))
    assert rates[-1] >= 0.99e-4 * rate
