"""The hospital's books: its ledger and the budget over it, opened together; and what they say, for people and peers."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.anchor import Anchors
from client.budget import Budget
from client.settings import Settings
from shared_models.errors import ConfigError
from shared_models.identity import load_key, public_bytes
from shared_models.messages import PrivacyStatement
from shared_models.privacy.accounting import reported_epsilon
from shared_models.privacy.evidence import Claim
from shared_models.privacy.ledger import Entry, Ledger, verified
from shared_models.privacy.mechanisms import NEIGHBOURING, UNIT

LEDGER = "ledger.sqlite"


@dataclass
class Books:
    """A ledger open for appending, which locks it, the budget that is read from it, and what others hold of it."""

    ledger: Ledger
    budget: Budget
    anchors: Anchors

    @classmethod
    def open(cls, settings: Settings) -> "Books":
        """Open the hospital's ledger; the first time, make it and open the budget that the settings declare.

        Raises:
            LedgerError: The ledger is missing though its head file is there, locked, damaged, rolled back or not ours.
            ConfigError: The settings declare another budget than the one that was opened.
        """
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        path, key = settings.state / LEDGER, load_key(settings.keys.identity)
        started = Ledger.begun(path, key)
        ledger = Ledger.open(path, key) if started else Ledger.create(path, key, hospital=settings.name)
        population = settings.population
        try:
            anchors = Anchors(settings.state, ledger)
            budget = Budget.open(
                ledger,
                population=population.name,
                public_size=population.public_size,
                epsilon=population.epsilon,
                delta=population.delta,
                order=population.order,
            )
        except BaseException:
            ledger.close()
            raise
        return cls(ledger, budget, anchors)

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()

    def round_done(self, charge: Entry) -> None:
        """Note that the computation which a charge paid for has been done; it costs nothing."""
        self.ledger.append(
            "round-done", study=charge.study, plan_digest=charge.plan_digest, round=charge.round, attempt=charge.attempt
        )

    def released(self, charge: Entry) -> None:
        """Note that statistics were released, paid for by this charge."""
        self.ledger.append(
            "release",
            study=charge.study,
            plan_digest=charge.plan_digest,
            round=charge.round,
            attempt=charge.attempt,
            mechanism=charge.mechanism,
        )

    def statement(self, study: str, delta: float) -> PrivacyStatement:
        """What a study has cost one patient here, for the coordinator and the model card; computed from the ledger."""
        spent, terms = self.budget.spent(study), self.budget.terms
        reported = reported_epsilon(spent, delta)
        return PrivacyStatement(
            study=study,
            rounds=len(spent),
            epsilon=reported.epsilon,
            epsilon_filter=self.budget.filter_spent(study),
            delta=delta,
            unit=reported.unit,
            neighbouring=reported.neighbouring,
            accountant=reported.accountant,
            budget_epsilon=terms.epsilon,
            public_size=terms.public_size,
        )


class _ReadOnly(Ledger):
    """A ledger somebody else may be appending to; it can be looked at and nothing else."""

    def __init__(self, path: Path, public_key: bytes, each: Callable[[Entry], None]) -> None:
        self.path, self.public_key, self._each = path, public_key, each

    def stream(self) -> Iterator[Entry]:
        """All entries, each once it is known to follow the one before."""
        for entry in verified(self.path, self.public_key):
            self._each(entry)
            yield entry


def read_budget(settings: Settings, each: Callable[[Entry], None] = lambda _: None) -> Budget:
    """The budget as the ledger has it, read without locking it: also while the daemon runs. It can approve nothing.

    Args:
        settings: The hospital's own.
        each: Called with every entry, oldest first.

    Raises:
        LedgerError: There is no ledger yet, it cannot be read, or its chain is broken.
    """
    return Budget(_ReadOnly(settings.state / LEDGER, public_bytes(load_key(settings.keys.identity)), each))


def claims(settings: Settings) -> list[Claim]:
    """What every study, and all of them together, cost one patient by this hospital's own accountant.

    A figure that is not finite is not claimed: the budget's filter would not have let it happen.

    Raises:
        LedgerError: There is no ledger yet, it cannot be read, or its chain is broken.
    """
    budget = read_budget(settings)
    made = []
    for study, delta in [*budget.studies().items(), (None, budget.terms.delta)]:
        spent = budget.spent(study)
        with suppress(ConfigError):
            reported = reported_epsilon(spent, delta)
            made.append(
                Claim(
                    study=study,
                    charges=len(spent),
                    epsilon=reported.epsilon,
                    epsilon_filter=budget.filter_spent(study),
                    delta=delta,
                    accountant=reported.accountant,
                )
            )
    return made


def report(settings: Settings) -> dict[str, Any]:
    """What the budget has paid for and what is left, read without locking the ledger: also while the daemon runs.

    Raises:
        LedgerError: There is no ledger yet, it cannot be read, or its chain is broken.
    """
    budget = read_budget(settings)
    studies = []
    for name, delta in budget.studies().items():
        reported = reported_epsilon(budget.spent(name), delta)
        charges = {"study": name, "rounds": len(budget.spent(name)), "epsilon_filter": budget.filter_spent(name)}
        planned = {"epsilon_planned": budget.planned(name)}
        studies.append({**charges, **planned, **reported.model_dump(mode="json")})
    return {
        "population": {"name": budget.population, **budget.terms.model_dump(mode="json")},
        "unit": UNIT,
        "neighbouring": NEIGHBOURING,
        "epsilon_filter": budget.filter_spent(),
        "epsilon_left": budget.left(),
        "studies": studies,
    }
