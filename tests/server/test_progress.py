"""Which release was best, and when a study stops: by released figures only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.examples import example_plan
from server.progress import Best, Progress
from tests.federation import changed

EVALUATION = {"every": 1, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}


def _following(values: list[float | None], **rule: object) -> tuple[Progress, int | None]:
    """A progress that has seen one release per value, and the round in which its verdict came."""
    rule = {"metric": "auroc", "patience": 2} | rule
    progress = Progress(changed(example_plan("breast-cancer", 4), evaluation=EVALUATION, early_stopping=rule))
    for number, value in enumerate(values, 1):
        progress.see(number, None if value is None else {str(rule["metric"]): value, "records": 9.0})
        if progress.verdict():
            return progress, number
    return progress, None


@pytest.mark.parametrize(
    ("values", "rule", "stops", "best"),
    [
        ([0.5, 0.6, 0.7, 0.8], {}, None, 4),
        ([0.7, 0.6, 0.65, 0.9], {}, 3, 1),
        ([0.7, 0.6, 0.75, 0.7, 0.75], {}, 5, 3),  # an equal is no improvement
        ([0.70, 0.71, 0.72, 0.9], {"minimum_improvement": 0.05}, 3, 3),  # too little to go on, and still the best
        ([0.70, 0.73, 0.76, 0.7], {"minimum_improvement": 0.05}, None, 3),  # little by little is an improvement too
        ([0.2, 0.1, 0.15, 0.12], {"metric": "brier"}, 4, 2),
        ([0.7, None, None, None, 0.6], {}, None, 1),
        ([0.7, None, 0.6, None, 0.6], {}, 5, 1),
    ],
)
def test_it_stops_after_so_many_releases_without_improvement(
    values: list[float | None], rule: dict[str, object], stops: int | None, best: int
) -> None:
    """Rounds without a release do not count, and the best is the best whatever counts as an improvement."""
    progress, stopped = _following(values, **rule)

    assert stopped == stops
    assert progress.best is not None
    assert progress.best.round == best


def test_a_plan_without_early_stopping_never_stops_and_still_has_a_best() -> None:
    """By the AUROC, which every task has."""
    progress = Progress(example_plan("breast-cancer", 4))

    for number in range(1, 50):
        progress.see(number, {"auroc": 1 / number, "accuracy": float(number)})

    assert progress.verdict() is None
    assert progress.best == Best(round=1, metric="auroc", value=1.0)


def test_a_metric_that_the_noise_left_undefined_is_no_release() -> None:
    """It neither improves nor uses up patience."""
    progress = Progress(example_plan("breast-cancer", 4))

    progress.see(1, {"accuracy": 0.9})

    assert progress.best is None


@given(values=st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=30), patience=st.integers(1, 4))
def test_the_best_is_the_first_of_the_highest(values: list[float | None], patience: int) -> None:
    """And a study goes on exactly as long as that one is no more than ``patience - 1`` releases ago."""
    progress, stopped = _following(values, patience=patience)

    seen = [(number, value) for number, value in enumerate(values[:stopped], 1) if value is not None]
    if progress.best is None:
        assert (seen, stopped) == ([], None)
        return
    assert progress.best.value == max(value for _, value in seen)
    assert progress.best.round == next(number for number, value in seen if value == progress.best.value)
    since = [number for number, _ in seen if number > progress.best.round]
    assert len(since) == patience if stopped else len(since) < patience
