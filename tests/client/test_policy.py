"""The policy: the stricter of plan and hospital wins, and a refusal says which clause and which numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client.policy import Policy, Population, admit
from shared_models.errors import PolicyError
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
    standing_approval=True,
    release_validation=True,
)


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
    admit(plan(evaluation=RELEASE), POLICY, POPULATION)


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
        admit(plan(**changes), POLICY, POPULATION)

    assert refusal in str(caught.value)


def test_statistics_are_released_only_where_the_hospital_says_so() -> None:
    """By default nothing but updates leaves."""
    silent = POLICY.model_copy(update={"release_validation": False})
    admit(plan(), silent, POPULATION)

    with pytest.raises(PolicyError, match=r"release_validation: .* every 10 rounds"):
        admit(plan(evaluation=RELEASE), silent, POPULATION)


@given(broken=st.sets(st.sampled_from(["task", "rounds", "minimum_hospitals", "privacy__epsilon"]), min_size=1))
def test_every_broken_clause_is_named(broken: set[str]) -> None:
    """A coordinator does not learn its refusals one by one."""
    worse = {"task": "heart-disease", "rounds": 99, "minimum_hospitals": 3, "privacy__epsilon": 1.5}

    with pytest.raises(PolicyError) as caught:
        admit(plan(**{key: worse[key] for key in broken}), POLICY, POPULATION)

    assert str(caught.value).count(";") == len(broken) - 1


def test_a_policy_has_no_default_limits() -> None:
    """Left out is an error, never "whatever the plan says"."""
    fields = POLICY.model_dump()

    for key in set(fields) - {"release_validation"}:
        with pytest.raises(ValidationError, match=key):
            Policy(**{name: value for name, value in fields.items() if name != key})
