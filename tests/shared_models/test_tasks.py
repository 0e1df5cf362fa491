"""Tasks: public ranges, and an encoding that uses nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_models.errors import ConfigError
from shared_models.tasks import TASKS, Categorical, Numeric, TableInput, find_task


@pytest.mark.parametrize(("name", "columns", "width"), [("breast-cancer", 30, 30), ("heart-disease", 10, 13)])
def test_the_installed_tasks_have_their_published_shape(name: str, columns: int, width: int) -> None:
    """30 measures of nuclei; FLamby's 13 features from UCI's ten columns."""
    task = find_task(name)

    assert isinstance(task.input, TableInput)
    assert (task.name, len(task.input.columns), task.input.width, task.outputs) == (name, columns, width, 1)
    assert len({column.name for column in task.input.columns}) == columns


def test_every_number_has_a_unit() -> None:
    """A range without a unit is no public knowledge."""
    numerics = [
        c for t in TASKS.values() if isinstance(t.input, TableInput) for c in t.input.columns if isinstance(c, Numeric)
    ]

    assert all(column.unit for column in numerics)


def test_a_task_that_is_not_installed_is_refused_with_those_that_are() -> None:
    """A plan names a task; it never brings one."""
    with pytest.raises(ConfigError, match="'sepsis' is not installed") as caught:
        find_task("sepsis")

    assert all(name in caught.value.hint for name in TASKS)


@given(
    low=st.floats(0.001, 10),
    width=st.floats(0.1, 1000),
    scale=st.sampled_from(["linear", "log", "sqrt"]),
    data=st.data(),
)
def test_the_public_range_is_encoded_to_the_same_interval_in_order(
    low: float, width: float, scale: str, data: st.DataObject
) -> None:
    """The ends of the range become -2 and 2, and what lies between them stays between them, in order."""
    column = Numeric(name="x", unit="1", low=low, high=low + width, scale=scale)  # type: ignore[arg-type]  # a sample
    inside = data.draw(st.lists(st.floats(column.low, column.high), min_size=2))

    encoded = column.scaled(np.sort(np.array([column.low, *inside, column.high])))

    np.testing.assert_allclose(encoded[[0, -1]], [-2, 2], atol=1e-9)
    assert (np.diff(encoded) >= 0).all()


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(1, 1, "linear"), (2, 1, "linear"), (0, 1, "log"), (-1, 1, "sqrt"), (0, float("nan"), "linear")],
)
def test_a_range_that_its_scale_cannot_divide_is_refused(low: float, high: float, scale: str) -> None:
    """Logarithms need a positive range, and every range needs some width."""
    with pytest.raises(ValidationError):
        Numeric(name="x", unit="1", low=low, high=high, scale=scale)  # type: ignore[arg-type]  # a parameter


def test_the_first_category_is_the_reference() -> None:
    """Three categories need two indicators; the widths of a table add up."""
    columns = (Categorical(name="a", categories=("x", "y", "z")), Numeric(name="b", unit="1", low=0, high=1))

    assert TableInput(columns=columns).width == 3
