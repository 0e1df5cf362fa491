"""What a hospital found when it tested its own trainer: checks with their p-values, signed into its ledger."""

from typing import Annotated, Literal

from pydantic import Field

from shared_models.config import Count, Evolving, Name

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Verdict = Literal["holds", "warning", "failed"]


class Check(Evolving):
    """One thing that was tested.

    Attributes:
        statistic: What was seen.
        expected: What it is about, where everything is as the plan has it.
        p_value: The probability, at most, of something like it where everything is; None of what chance has no part in.
        verdict: ``warning`` where patients are protected, and something is not as claimed.
        reason: Why it did not hold, where no number says it.
    """

    name: Name
    statistic: Figure
    expected: Figure
    p_value: Share | None = None
    verdict: Verdict
    reason: Annotated[str, Field(max_length=200)] | None = None


class CanaryAudit(Evolving):
    """A one-run audit: canaries that were in or out by fair coins, and guesses which.

    Attributes:
        canaries: How many coins were flipped.
        guesses: On how many canaries a guess was made; fixed by the plan.
        correct: How many were right.
        epsilon_lower: At least this much epsilon was spent, at ``confidence``.
        epsilon_claimed: What the rehearsed rounds cost by the plan, at ``delta``, tight.
        epsilon_expected: The mean of ``epsilon_lower`` over simulated runs of what the plan claims: its power.
        epsilon_most: What it would be with every guess right: more it cannot show.
    """

    canaries: Count
    guesses: Count
    correct: Annotated[int, Field(ge=0)]
    epsilon_lower: Figure
    confidence: Share
    epsilon_claimed: Figure
    delta: Share
    epsilon_expected: Figure
    epsilon_most: Figure


class Conformance(Evolving):
    """The result of ``konsil-hospital conformance``: what the installed trainer did with made-up records.

    Attributes:
        rounds: Rounds that were rehearsed.
        steps: Local steps of each.
        false_alarm: Probability, at most, that any check does not hold although everything is as claimed.
        noise_ratio_found: The largest ratio of the noise's standard deviation to the claimed one that is found with
            probability 0.99: the power of the check of the noise.
        trainer_digest: SHA-256 over the hospital's own source files, the trainer among them.
    """

    rounds: Count
    steps: Count
    checks: tuple[Check, ...]
    canaries: CanaryAudit
    false_alarm: Share
    noise_ratio_found: Share
    trainer_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def holds(self) -> bool:
        """Whether every check does."""
        return all(check.verdict == "holds" for check in self.checks)
