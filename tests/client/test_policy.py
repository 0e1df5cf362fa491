"""The policy: the stricter of plan and hospital wins, and a refusal says which clause and which numbers."""

import inspect
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client import dp_sgd, policy
from client.hours import DAYS, is_open
from client.policy import Policy, Population, Site, StandingApproval, admit, permit_now
from shared_models.errors import DailyRoundsError, OutsideHoursError, PolicyError
from shared_models.plan import StudyPlan, parse_plan

PLAN: dict[str, Any] = {
    "format": 1,
    "study": "a-study",
    "purpose": "To see what is permitted.",
    "task": "breast-cancer",
    "data_licence": "none",
    "rounds": 20,
    "minimum_hospitals": 4,
    "deadline_s": 60.0,
    "weight_cap": 200,
    "network": {"name": "mlp"},
    "training": {"learning_rate": 1.0, "steps": 5},
    "privacy": {
        "clip": 1.0,
        "noise_multiplier": 8.0,
        "sample_rate": 0.5,
        "epsilon": 1.0,
        "delta": 5e-4,
        "spare_charges": 2,
    },
}
RELEASE = {"every": 10, "clip": 1.0, "noise_multiplier": 8.0}
POPULATION = Population(name="all-patients", public_size=200, epsilon=2.0, delta=1e-4, order=14)
# Every limit is exactly what the plan asks for, so that each clause is tested at its edge.
POLICY = Policy(
    tasks=("breast-cancer",),
    networks=("mlp",),
    minimum_noise_multiplier=8.0,
    maximum_epsilon_per_study=1.0,
    minimum_hospitals=4,
    maximum_attempts=10,
    maximum_rounds=22,
    minimum_threshold=4,
    maximum_rounds_per_day=20,
    coordinators=("coordinator.example:9092",),
    hours=("mon-fri 20:00-06:00",),
    devices=("cpu",),
    maximum_memory_mb=5,
    release_validation=True,
)
SITE = Site("coordinator.example:9092", "cpu", 1200)


def plan(**changes: Any) -> StudyPlan:
    """The plan above with changes; ``privacy__epsilon`` reaches into a table."""
    fields = {key: dict(value) if isinstance(value, dict) else value for key, value in PLAN.items()}
    for key, value in changes.items():
        table, _, inner = key.partition("__")
        if inner:
            fields[table][inner] = value
        else:
            fields[table] = value
    return parse_plan(fields)


def test_a_plan_at_every_limit_is_admitted() -> None:
    """A limit is what is still allowed."""
    admit(plan(evaluation=RELEASE), POLICY, POPULATION, SITE)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"task": "heart-disease"}, "tasks: heart-disease is not among breast-cancer"),
        ({"network": {"name": "cnn"}}, "networks: cnn is not among mlp"),
        ({"privacy__noise_multiplier": 7.9}, "minimum_noise_multiplier: 7.9 < 8"),
        ({"privacy__epsilon": 1.1}, "maximum_epsilon_per_study: 1.1 > 1"),
        ({"privacy__epsilon": 2.1}, "population epsilon: 2.1 > 2"),
        ({"privacy__delta": 6e-4}, "delta: 0.0006 > 1 / (10 * 200 patients) = 0.0005"),
        ({"minimum_hospitals": 3}, "minimum_hospitals: 3 < 4"),
        ({"rounds": 21}, "maximum_rounds: 23 (2 of them spare) > 22"),
        ({"privacy__spare_charges": 3}, "maximum_rounds: 23 (3 of them spare) > 22"),
        ({"evaluation": RELEASE | {"noise_multiplier": 7.9}}, "minimum_noise_multiplier of the release: 7.9 < 8"),
    ],
)
def test_each_clause_refuses_with_its_name_and_both_numbers(changes: dict[str, Any], refusal: str) -> None:
    """Whoever reads the refusal knows what to change, and by how much."""
    with pytest.raises(PolicyError) as caught:
        admit(plan(**changes), POLICY, POPULATION, SITE)

    assert refusal in str(caught.value)


def test_statistics_are_released_only_where_the_hospital_says_so() -> None:
    """By default nothing but updates leaves."""
    silent = POLICY.model_copy(update={"release_validation": False})
    admit(plan(), silent, POPULATION, SITE)

    with pytest.raises(PolicyError, match=r"release_validation: .* every 10 rounds"):
        admit(plan(evaluation=RELEASE), silent, POPULATION, SITE)


@given(broken=st.sets(st.sampled_from(["task", "rounds", "minimum_hospitals", "privacy__epsilon"]), min_size=1))
def test_every_broken_clause_is_named(broken: set[str]) -> None:
    """A coordinator does not learn its refusals one by one."""
    worse = {"task": "heart-disease", "rounds": 99, "minimum_hospitals": 3, "privacy__epsilon": 1.5}

    with pytest.raises(PolicyError) as caught:
        admit(plan(**{key: worse[key] for key in broken}), POLICY, POPULATION, SITE)

    assert str(caught.value).count(";") == len(broken) - 1


def test_a_policy_has_no_default_limits() -> None:
    """Left out is an error, never "whatever the plan says"; but for what limits nothing, or asks the steward."""
    fields = POLICY.model_dump()
    optional = {name for name, field in Policy.model_fields.items() if not field.is_required()}

    for key in set(fields) - optional:
        with pytest.raises(ValidationError, match=key):
            Policy(**{name: value for name, value in fields.items() if name != key})

    plain = Policy(**{name: value for name, value in fields.items() if name not in optional})
    assert (plain.least_threshold, plain.release_validation) == (plain.minimum_hospitals, False)
    assert not plain.stands(plan(), SITE.coordinator)
    admit(plan(), plain, POPULATION, Site("anybody.example:1", "cuda", 10**9))
    permit_now(plain, moment=datetime(2026, 3, 2, 12), charged_today=10**6)


# who asks, and where it would run


@pytest.mark.parametrize(
    ("site", "refusal"),
    [
        (SITE._replace(coordinator="other.example:9092"), "coordinators: other.example:9092 is not among coordinator"),
        (SITE._replace(device="cuda"), "devices: this process computes on cuda, permitted: cpu"),
        (SITE._replace(parameters=1209), "maximum_memory_mb: 1209 parameters need about 5 MB > 5"),
    ],
)
def test_each_clause_on_the_site_refuses_with_its_name(site: Site, refusal: str) -> None:
    """The coordinator is the one that this hospital dials; its certificate proves that it is there."""
    with pytest.raises(PolicyError) as caught:
        admit(plan(), POLICY, POPULATION, site)

    assert refusal in str(caught.value)


def test_a_network_at_the_limit_of_memory_is_admitted() -> None:
    """40 bytes and 16 for each of the 256 records at once, for each parameter: 1208 are just below 5 MB."""
    admit(plan(), POLICY, POPULATION, SITE._replace(parameters=1208))

    assert Site("", "cpu", 1208).memory_mb == 1208 * (40 + 16 * 256) / 1e6


def test_the_estimate_is_for_as_many_records_as_are_computed_at_once() -> None:
    """The policy does not import torch to learn that number; here the two are held together."""
    assert inspect.signature(dp_sgd.train).parameters["micro_batch"].default == policy.MICRO_BATCH


# when


MONDAY = datetime(2026, 3, 2)


def at(day: str, time: str) -> datetime:
    """A moment of the first week of March 2026, which began on a Monday."""
    hour, minute, *second = map(int, time.split(":"))
    return MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute, seconds=sum(second))


@pytest.mark.parametrize(
    ("window", "day", "time", "is_in"),
    [
        ("20:00-06:00", "wed", "19:59:59", False),
        ("20:00-06:00", "wed", "20:00", True),
        ("20:00-06:00", "thu", "05:59:59", True),
        ("20:00-06:00", "thu", "06:00", False),
        ("09:00-17:00", "wed", "09:00", True),
        ("09:00-17:00", "wed", "17:00", False),
        ("09:00-17:00", "wed", "03:00", False),
        ("mon-fri 20:00-06:00", "fri", "23:00", True),
        ("mon-fri 20:00-06:00", "sat", "05:59", True),
        ("mon-fri 20:00-06:00", "sat", "20:00", False),
        ("mon-fri 20:00-06:00", "mon", "05:00", False),
        ("sun 20:00-06:00", "mon", "05:00", True),
        ("fri-mon 00:00-24:00", "sun", "23:59:59", True),
        ("fri-mon 00:00-24:00", "tue", "00:00", False),
        ("tue,thu 08:00-09:00", "thu", "08:30", True),
        ("tue,thu 08:00-09:00", "wed", "08:30", False),
    ],
)
def test_a_window_has_its_first_minute_and_not_its_last(window: str, day: str, time: str, is_in: bool) -> None:
    """Over midnight it belongs to the day on which it begins."""
    assert is_open([window], at(day, time)) == is_in


NO_TIMES = ["", "20:00", "20:00-20:00", "24:00-06:00", "29:00-06:00", "20:00-24:01", "8:00-9:00", "20:60-21:00"]
NO_DAYS = ["monday 08:00-09:00", "mon- 08:00-09:00", "mon,,tue 08:00-09:00", " 08:00-09:00", "08:00-09:00 mon"]


@pytest.mark.parametrize("window", [*NO_TIMES, *NO_DAYS])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    """A typo must not open or close a night."""
    with pytest.raises(ValidationError, match="hours"):
        Policy(**{**POLICY.model_dump(), "hours": (window,)})


def test_outside_the_hours_a_hospital_has_dropped_out() -> None:
    """With a code of its own: it is no refusal of the study."""
    permit_now(POLICY, moment=at("mon", "20:00"), charged_today=0)

    with pytest.raises(OutsideHoursError, match=r"hours: it is Mon 19:59, and rounds run in mon-fri 20:00-06:00 only"):
        permit_now(POLICY, moment=at("mon", "19:59"), charged_today=0)


def test_the_last_round_of_a_day_is_permitted_and_the_next_is_not() -> None:
    """Both numbers are in the refusal."""
    permit_now(POLICY, moment=at("mon", "21:00"), charged_today=19)

    with pytest.raises(DailyRoundsError, match=r"20 rounds were charged in the last 24 hours, 20 are permitted"):
        permit_now(POLICY, moment=at("mon", "21:00"), charged_today=20)


# standing approvals


RULE = StandingApproval(
    tasks=("breast-cancer",),
    networks=("mlp",),
    coordinators=("coordinator.example:9092",),
    maximum_epsilon=1.0,
    minimum_noise_multiplier=8.0,
    maximum_rounds=22,
)


def test_a_plan_at_every_condition_of_a_rule_is_approved_by_it() -> None:
    """A condition is what is still covered."""
    assert RULE.covers(plan(evaluation=RELEASE), SITE.coordinator)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "heart-disease"},
        {"network": {"name": "cnn"}},
        {"privacy__epsilon": 1.1},
        {"privacy__noise_multiplier": 7.9},
        {"evaluation": RELEASE | {"noise_multiplier": 7.9}},
        {"rounds": 21},
    ],
)
def test_a_plan_beyond_one_condition_waits_for_the_steward(changes: dict[str, Any]) -> None:
    """One is enough."""
    assert not RULE.covers(plan(**changes), SITE.coordinator)


def test_a_rule_is_for_the_coordinators_that_it_names() -> None:
    """Another coordinator's study waits."""
    assert not RULE.covers(plan(), "other.example:9092")


def test_a_rule_may_leave_releases_to_the_steward() -> None:
    """The policy permits them, and they are still not approved in advance."""
    rule = StandingApproval(release_validation=False)

    assert rule.covers(plan(), SITE.coordinator)
    assert not rule.covers(plan(evaluation=RELEASE), SITE.coordinator)


def test_one_rule_that_covers_a_plan_is_enough() -> None:
    """Rules are alternatives."""
    narrow = StandingApproval(tasks=("heart-disease",))

    assert POLICY.model_copy(update={"standing_approvals": (narrow, RULE)}).stands(plan(), SITE.coordinator)
    assert not POLICY.model_copy(update={"standing_approvals": (narrow,)}).stands(plan(), SITE.coordinator)


def test_a_rule_without_a_condition_is_refused() -> None:
    """It would approve everything, and looks as if it approved nothing."""
    with pytest.raises(ValidationError, match="approves everything"):
        StandingApproval()
