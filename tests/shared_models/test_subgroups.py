"""Statistics of subgroups: both halves agree, a row grows no longer, and what does not fit a task is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_models.encoding import encoding
from shared_models.errors import ConfigError, ProtocolError
from shared_models.metrics import record_statistics, total_statistics
from shared_models.outcomes import statistics_size
from shared_models.plan import EvaluationPlan, Subgroups
from shared_models.subgroups import (
    EVERYBODY,
    UNKNOWN,
    group_of_each,
    groupings,
    release_noise,
    release_size,
    split,
    spread,
)
from shared_models.tasks import HEART_DISEASE, PNEUMONIA, TASKS, Categorical, TableInput, with_groups
from tests.vectors.regenerate import RELEASING

SEX = Subgroups(column="sex")
AGE = Subgroups(column="age", edges=(40.0, 65.0))
CHEST = Subgroups(column="chest_pain")
GENDER = Subgroups(column="gender", categories=("F", "M", "X"))
YEARS = Subgroups(column="years", low=0, high=120, unit="year", edges=(40.0, 65.0))


def plan(*subgroups: Subgroups, bins: int = 20) -> EvaluationPlan:
    """What a study releases."""
    return EvaluationPlan(every=1, clip=1.0, noise_multiplier=3.0, bins=bins, subgroups=subgroups)


def encoded(**cells: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of the heart task as a hospital encodes them; columns that are not named are zeros."""
    assert isinstance(HEART_DISEASE.input, TableInput)
    blocks = []
    count = len(next(iter(cells.values())))
    for column in HEART_DISEASE.input.columns:
        values = np.array(cells.get(column.name, np.zeros(count)))
        if isinstance(column, Categorical):
            blocks.append(values[:, None] == np.arange(1, len(column.categories)))
        else:
            blocks.append(column.scaled(values.astype(np.float64))[:, None])
    return np.concatenate(blocks, axis=1, dtype=np.float32)


def test_a_record_falls_in_the_group_of_its_category_or_band() -> None:
    """An edge belongs to the band that begins there; the first category, which has no indicator, is a group too."""
    inputs = encoded(age=[18, 39.999, 40, 64.5, 65, 100], sex=[0, 1, 0, 1, 0, 1], chest_pain=[0, 1, 2, 3, 0, 2])

    found = group_of_each(HEART_DISEASE, (SEX, AGE, CHEST), inputs, np.empty((6, 0)))

    assert found[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert found[:, 1].tolist() == [0, 0, 1, 1, 2, 2]
    assert found[:, 2].tolist() == [0, 1, 2, 3, 0, 2]


@given(seed=st.integers(0, 2**32 - 1), subgroups=st.sampled_from([(), (SEX,), (AGE, SEX), (SEX, AGE, CHEST)]))
def test_what_is_spread_and_summed_splits_into_the_groups_counts(seed: int, subgroups: tuple[Subgroups, ...]) -> None:
    """Every block is the statistics of the group's records alone; and a row is as long as it was."""
    rng = np.random.default_rng(seed)
    evaluation, count = plan(*subgroups), 50
    inputs = encoded(
        age=rng.uniform(18, 100, count), sex=rng.integers(2, size=count), chest_pain=rng.integers(4, size=count)
    )
    scores, labels = rng.random(count), rng.integers(2, size=count)
    rows = record_statistics(2, scores, labels, bins=20)
    groups = group_of_each(HEART_DISEASE, subgroups, inputs, np.empty((count, 0)))

    wide = spread(HEART_DISEASE, evaluation, rows, groups)
    found = split(HEART_DISEASE, evaluation, wide.sum(axis=0))

    np.testing.assert_allclose(np.linalg.norm(wide, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(found.pop(EVERYBODY), total_statistics(2, scores, labels, bins=20), atol=1e-9)
    for place, grouping in enumerate(groupings(HEART_DISEASE, subgroups)):
        for number, name in enumerate(grouping.groups):
            those = groups[:, place] == number
            expected = total_statistics(2, scores[those], labels[those], bins=20)
            np.testing.assert_allclose(found.pop((grouping.column, name)), expected, atol=1e-9)
    assert found == {}


def test_a_column_beside_the_inputs_tells_patients_apart_in_any_task() -> None:
    """By categories and by bands; an edge belongs to the band that begins there, and what is not known to none."""
    task = with_groups(PNEUMONIA, (YEARS, GENDER))
    beside = np.array([[0, 2], [40, 0], [64.9, np.nan], [120, 1], [np.nan, 1]])

    found = group_of_each(task, (GENDER, YEARS), np.empty(0), beside)

    assert found.tolist() == [[2, 0], [0, 1], [UNKNOWN, 1], [1, 2], [1, UNKNOWN]]
    assert [one.groups for one in groupings(task, (GENDER, YEARS))] == [
        ("F", "M", "X"),
        ("below 40 year", "40 to below 65 year", "from 65 year"),
    ]


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(TASKS)), bins=st.sampled_from([2, 20]))
def test_no_assignment_of_groups_makes_a_row_longer(seed: int, name: str, bins: int) -> None:
    """Of any task, known or not: at most a row's norm without subgroups, so that the clip S and the price stay."""
    rng = np.random.default_rng(seed)
    task, evaluation = with_groups(TASKS[name], (GENDER, YEARS)), plan(GENDER, YEARS, bins=bins)
    rows = rng.random((20, statistics_size(task, bins)))
    groups = np.stack([rng.integers(UNKNOWN, 3, 20) for _ in range(2)], axis=1)

    wide = spread(task, evaluation, rows, groups)

    before, after = np.linalg.norm(rows, axis=1), np.linalg.norm(wide, axis=1)
    known = (groups != UNKNOWN).all(axis=1)
    assert (after <= before * (1 + 1e-12)).all()
    np.testing.assert_allclose(after[known], before[known])
    assert (after[~known] < before[~known]).all()
    found = split(task, evaluation, wide.sum(axis=0))
    np.testing.assert_allclose(found[EVERYBODY], rows.sum(axis=0))
    np.testing.assert_allclose(found["gender", "X"], rows[groups[:, 0] == 2].sum(axis=0), atol=1e-12)


def test_groups_have_names_that_people_read() -> None:
    """Categories as the task calls them, bands with their unit."""
    found = [one.groups for one in groupings(HEART_DISEASE, (SEX, AGE))]

    assert found == [("female", "male"), ("below 40 year", "40 to below 65 year", "from 65 year")]


def test_the_noise_of_a_count_is_what_hospitals_add_together() -> None:
    """Sigma S per hospital, by the square root of their number, times what the rows were divided by."""
    assert release_noise(plan(), 1) == 3
    assert release_noise(plan(SEX, AGE, CHEST), 4) == pytest.approx(3 * 2 * 2)


def test_a_plan_without_subgroups_is_encoded_as_it_was() -> None:
    """Forty numbers; with three groups more, four times as many."""
    grouped = RELEASING.model_copy(
        update={
            "evaluation": EvaluationPlan.model_validate_json(
                '{"every": 1, "clip": 1, "noise_multiplier": 40, '
                '"subgroups": [{"column": "mean_radius", "edges": [12, 16]}]}'
            )
        }
    )

    assert encoding(RELEASING, "evaluate", parameters=31, hospitals=4).length == 40
    assert encoding(grouped, "evaluate", parameters=31, hospitals=4).length == 160


@pytest.mark.parametrize(
    ("task", "subgroup"),
    [
        (HEART_DISEASE, Subgroups(column="height")),
        (HEART_DISEASE, Subgroups(column="age")),
        (HEART_DISEASE, Subgroups(column="age", edges=(18.0,))),
        (HEART_DISEASE, Subgroups(column="age", edges=(40.0, 101.0))),
        (HEART_DISEASE, Subgroups(column="sex", edges=(1.0,))),
        (PNEUMONIA, SEX),
        (PNEUMONIA, GENDER),
    ],
)
def test_subgroups_that_do_not_fit_the_task_are_refused(task: Any, subgroup: Subgroups) -> None:
    """No such column, no edges for a number, an edge that leaves a band empty, edges for categories, no table.

    Nor a column beside the inputs that nobody has told the task of, so that no hospital has read it.
    """
    with pytest.raises(ConfigError, match=subgroup.column):
        release_size(task, plan(subgroup))


def test_subgroups_that_contradict_themselves_are_refused() -> None:
    """Edges that do not ascend, a column twice."""
    with pytest.raises(ValidationError, match="ascend"):
        Subgroups(column="age", edges=(65.0, 40.0))
    with pytest.raises(ValidationError, match="twice"):
        plan(SEX, SEX)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"categories": ("F",)}, "at least two"),
        ({"categories": ("F", "F")}, "none twice"),
        ({"categories": ("F", "M"), "edges": (1.0,)}, "no edges"),
        ({"categories": ("F", "M"), "unit": "year"}, "no edges, range or unit"),
        ({"low": 0.0, "edges": (1.0,)}, "need each other"),
        ({"low": 0.0, "high": 9.0, "edges": (1.0,)}, "need each other"),
        ({"unit": "year", "edges": (1.0,)}, "need each other"),
        ({"low": 0.0, "high": 9.0, "unit": "year"}, "needs edges"),
        ({"low": 0.0, "high": 9.0, "unit": "year", "edges": (0.0,)}, "above low"),
        ({"low": 0.0, "high": 9.0, "unit": "year", "edges": (9.5,)}, "not above high"),
        ({"categories": ("F", " M")}, "pattern"),
        ({"categories": ("F", "[red]M")}, "pattern"),
        ({"categories": ("F", "$M$")}, "pattern"),
        ({"categories": ("F", "M\x1b")}, "pattern"),
        ({"categories": ("F", "")}, "pattern"),
        ({"low": 0.0, "high": 9.0, "unit": "[year]", "edges": (1.0,)}, "pattern"),
        ({"low": 0.0, "high": np.nan, "unit": "year", "edges": (1.0,)}, "finite"),
    ],
)
def test_a_column_beside_the_inputs_is_declared_whole_or_refused(fields: dict[str, Any], why: str) -> None:
    """Categories, or a number with range, unit and edges; never a part of either, nor texts that are mark-up."""
    with pytest.raises(ValidationError, match=why):
        Subgroups(column="group", **fields)


@pytest.mark.parametrize("name", ["sex", "disease"])
def test_a_column_of_the_task_cannot_be_declared_anew(name: str) -> None:
    """Else a hospital would have two columns of one name: an input or a label, and a group."""
    with pytest.raises(ConfigError, match="has a column of that name"):
        with_groups(HEART_DISEASE, (Subgroups(column=name, categories=("one", "two")),))


def test_statistics_of_another_plan_are_refused() -> None:
    """By their length."""
    with pytest.raises(ProtocolError, match="this plan"):
        split(HEART_DISEASE, plan(SEX), np.zeros(40))
