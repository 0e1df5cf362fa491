"""Whether a study still gets better, by what hospitals released and by nothing else: the best round, and when to stop.

Released statistics are noised and paid for. So whatever is decided by them spends nothing more, and reveals nothing
that was not released.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shared_models.plan import StudyPlan

WATCHED = "auroc"  # where the plan names no metric
_LOWER_IS_BETTER = frozenset({"brier", "mae", "rmse", "wape"})


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best release so far.

    Attributes:
        round: After which round.
        metric: What was compared.
        value: Its value, as released: the best of several noised figures flatters a little.
    """

    round: int
    metric: str
    value: float


class Progress:
    """Follows a study's releases in order; the journal's ``round`` events hold them all, to follow them again.

    Attributes:
        best: The best release; the first of equals; None before the first.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self._rule = plan.early_stopping
        self._metric = self._rule.metric if self._rule else WATCHED
        self._to_beat: float | None = None  # the last value that counted as an improvement
        self._releases_without = 0
        self.best: Best | None = None

    def see(self, round_number: int, released: Mapping[str, float] | None) -> None:
        """Take in what was released after a round.

        A round without a release changes nothing; nor does one whose noise left the metric undefined.
        """
        value = (released or {}).get(self._metric)
        if value is None:
            return
        if self.best is None or self._gain(value, self.best.value) > 0:
            self.best = Best(round=round_number, metric=self._metric, value=value)
        least = self._rule.minimum_improvement if self._rule else 0.0
        if self._to_beat is None or self._gain(value, self._to_beat) > least:
            self._to_beat, self._releases_without = value, 0
        else:
            self._releases_without += 1

    def verdict(self) -> str | None:
        """Why the plan ends the study here, in words; None where it goes on."""
        if self._rule is None or self._releases_without < self._rule.patience:
            return None
        return (
            f"{self._releases_without} releases in a row improved {self._metric} by no more than "
            f"{self._rule.minimum_improvement:g} on {self._to_beat:.4f}"
        )

    def _gain(self, value: float, other: float) -> float:
        return other - value if self._metric in _LOWER_IS_BETTER else value - other
