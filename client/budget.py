"""May we still afford this? The population's privacy budget, enforced; every charge is written before a record is read.

A view over the ledger and nothing else: opening the same ledger again gives the same answers. The filter that decides
is in ``shared_models/privacy/mechanisms.py``.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from pydantic import ValidationError

from shared_models.config import Frozen, explain
from shared_models.errors import (
    BudgetExhaustedError,
    ConfigError,
    LedgerError,
    NotEnrolledError,
    PolicyError,
    ProtocolError,
)
from shared_models.plan import StudyPlan
from shared_models.privacy.ledger import BudgetTerms, Entry, Ledger, Reserved, StudyLimit
from shared_models.privacy.mechanisms import (
    GaussianRelease,
    PoissonGaussian,
    filter_epsilon,
    filter_limit,
    study_mechanisms,
    total_divergence,
)
from shared_models.software import software_digest

_Mechanism = PoissonGaussian | GaussianRelease

NEWEST_CHARGES = 10_000  # whose times are remembered; policy's largest number of rounds a day


class Price(Frozen):
    """What a plan would cost each patient, before anything runs; all by the filter, at the budget's order.

    Attributes:
        study_epsilon_filter: What the whole study would cost, at the plan's own delta.
        left_before: Epsilon of the population's budget that nothing has spent or reserved, at the budget's delta.
        left_after: The same once the plan is approved; negative when it does not fit.
    """

    study_epsilon_filter: float
    left_before: float
    left_after: float


@dataclass
class _Study:
    """What the ledger says about one study."""

    plan_digest: str
    limit: StudyLimit
    approval: Entry  # the newest: of the software that is trusted to compute it
    reserved: Counter[_Mechanism]
    charged: Counter[_Mechanism] = field(default_factory=Counter)
    newest: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind of mechanism -> (round, attempt)
    closed: bool = False

    @property
    def committed(self) -> Counter[_Mechanism]:
        """What it has charged, and while it is open what it still may."""
        return self.charged if self.closed else self.reserved


class Budget:
    """The budget of one patient population at one hospital.

    Guarantees:
        * Charged and reserved divergence never exceeds what (epsilon, delta) allows at the committed order, whatever
          was proposed, in whatever order, and however often the process was killed.
        * ``charge`` returns after the charge is durable: a crash can count one round too many, never one too few.
        * Refusals depend on public numbers and on the ledger only, never on a record.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._turn = ledger, threading.RLock()
        self._studies: dict[str, _Study] = {}
        self._trained_at: deque[float] = deque(maxlen=NEWEST_CHARGES)
        entries = iter(ledger.stream())
        opening = next(entries, None)
        if opening is None or opening.budget is None or opening.population is None:
            raise LedgerError("the ledger opens no budget", hint="Open one first, or restore the ledger.")
        self.terms: BudgetTerms = opening.budget
        self.population: str = opening.population
        self.opening: str = opening.hash  # tells this ledger from any other
        self._fingerprint: str | None = None  # of its patients, as last recorded
        for entry in entries:
            self._take_in(entry)
        if not self._fits(self._committed()):
            raise LedgerError("the ledger's entries spend more than its budget", hint="Have an auditor look at it.")

    @classmethod
    def open(
        cls, ledger: Ledger, *, population: str, public_size: int, epsilon: float, delta: float, order: int
    ) -> "Budget":
        """The budget in a ledger; opened with these terms if the ledger is empty, and held to them for ever after.

        Args:
            ledger: Open for appending. One ledger holds one population's budget.
            population: Its name.
            public_size: Patients in it, as its steward declared once.
            epsilon: The most that all studies together may cost a patient.
            delta: What ``epsilon`` holds at, at most 1 / (10 * public size).
            order: Renyi order of the filter; see ``mechanisms.best_order``.

        Raises:
            ConfigError: A term is out of range, delta is too large, or the terms are not those that the budget was
                opened with: a new name or size does not refund what was spent.
            LedgerError: The ledger cannot be written, or its entries contradict each other.
        """
        terms = budget_terms(public_size=public_size, epsilon=epsilon, delta=delta, order=order)
        if ledger.first is None:
            ledger.append("budget-opened", population=population, budget=terms, public_key=ledger.public_key.hex())
        budget = cls(ledger)
        if (budget.population, budget.terms) != (population, terms):
            raise ConfigError(
                f"the budget was opened for {_describe(budget.population, budget.terms)}; the settings now say "
                f"{_describe(population, terms)}",
                hint="The terms of a budget never change. Put the old ones back into [population].",
            )
        return budget

    def price(self, plan: StudyPlan) -> Price:
        """What a plan would cost, whether it fits or not; writes nothing.

        A study that is open already is priced as if it were not there.
        """
        with self._turn:
            mechanisms = study_mechanisms(plan, self.terms.public_size)
            others = list(self._committed(but=plan.study))
            return Price(
                study_epsilon_filter=self._epsilon(mechanisms, plan.privacy.delta),
                left_before=self.terms.epsilon - self._epsilon(others, self.terms.delta),
                left_after=self.terms.epsilon - self._epsilon([*others, *mechanisms], self.terms.delta),
            )

    def population_is(self, fingerprint: str) -> None:
        """Record, before its patients are used, that the set of patients is another one; who and how many stays unsaid.

        Raises:
            LedgerError: The change could not be written.
        """
        with self._turn:
            if fingerprint != self._fingerprint:
                self._take_in(
                    self._ledger.append(
                        "population-changed", population=self.population, population_fingerprint=fingerprint
                    )
                )

    def check(self, plan: StudyPlan) -> Entry | None:
        """Whether a study could be approved, by the ledger alone; writes nothing.

        Returns:
            The newest approval there is, if exactly this plan was approved and is open; None if it could be approved
            now. The approval may be for other software than runs here: see ``holds``.

        Raises:
            BudgetExhaustedError, PolicyError: As ``approve`` would.
        """
        with self._turn:
            known = self._studies.get(plan.study)
            if known is not None:
                return _same_approval(known, plan)
            mechanisms = study_mechanisms(plan, self.terms.public_size)
            self._refuse_large_delta(plan)
            self._refuse_over_own_limit(plan, mechanisms)
            self._refuse_over_budget(plan, mechanisms)
            return None

    def approve(
        self,
        plan: StudyPlan,
        *,
        population_fingerprint: str | None = None,
        approved_by: Literal["steward", "standing-rule"] | None = None,
        approval: str | None = None,
    ) -> Entry:
        """Reserve all that a study may charge: rounds, spare charges and releases.

        Approving the same plan again while it is open returns the approval there is. If that was for other software,
        the new approval is recorded beside it, and nothing is reserved twice.

        Args:
            plan: What was approved.
            population_fingerprint: Of the patients that it was approved for.
            approved_by: Whether a steward said yes to it, or a standing rule of the policy.
            approval: The steward's signature.

        Raises:
            BudgetExhaustedError: The plan does not stay within its own epsilon at the budget's order, or does not fit
                into what the population has left.
            PolicyError: A study of this name was approved with another plan, or is closed; or the plan's delta is too
                large for the population.
            LedgerError: The approval could not be written.
        """
        with self._turn:
            known = self.check(plan)
            if known is not None and holds(known):
                return known
            if known is not None:
                again = self._ledger.append(
                    "plan-reapproved",
                    population=self.population,
                    study=plan.study,
                    plan_digest=plan.digest(),
                    approved_by=approved_by,
                    approval=approval,
                    software_digest=software_digest(),
                )
                self._take_in(again)
                return again
            mechanisms = study_mechanisms(plan, self.terms.public_size)
            if population_fingerprint and self._fingerprint:
                self.population_is(population_fingerprint)
            entry = self._ledger.append(
                "plan-approved",
                population=self.population,
                population_fingerprint=population_fingerprint,
                study=plan.study,
                plan_digest=plan.digest(),
                limit=StudyLimit(epsilon=plan.privacy.epsilon, delta=plan.privacy.delta),
                reservation=tuple(Reserved(mechanism=m, charges=n) for m, n in Counter(mechanisms).items()),
                approved_by=approved_by,
                approval=approval,
                software_digest=software_digest(),
            )
            self._take_in(entry)
            return entry

    def charge(
        self,
        study: str,
        plan_digest: str,
        *,
        round: int,  # noqa: A002 - the field's name everywhere else
        attempt: int,
        mechanism: _Mechanism,
        parameters_digest: str,
    ) -> Entry:
        """Pay for one computation, before any record is read for it.

        Args:
            study: The approved study.
            plan_digest: Of the plan that was approved.
            round: Round that is being computed.
            attempt: Attempt at this round; failed attempts stay charged.
            mechanism: What is about to run, exactly as reserved.
            parameters_digest: Of the parameters that the computation starts from.

        Returns:
            The charge, durable.

        Raises:
            NotEnrolledError: The study was not approved here, or not for the software that runs now.
            PolicyError: It is closed, or was approved with another plan.
            ProtocolError: This round and attempt, or a later one, was charged already: a replay.
            BudgetExhaustedError: Nothing of this kind is left of the reservation.
            LedgerError: The charge could not be written. Nothing may be computed.
        """
        with self._turn:
            known = self._open_study(study, plan_digest)
            newest = known.newest.get(mechanism.kind, (0, 0))
            if not (round, attempt) > newest:
                raise ProtocolError(
                    f"study {study}: round {round}, attempt {attempt} comes after round {newest[0]}, attempt "
                    f"{newest[1]} was charged",
                    hint="A message was replayed, or the coordinator went back. Each computation is paid for once.",
                )
            self._refuse_unreserved(study, known, mechanism)
            entry = self._ledger.append(
                "charge",
                population=self.population,
                study=study,
                plan_digest=plan_digest,
                round=round,
                attempt=attempt,
                mechanism=mechanism,
                parameters_digest=parameters_digest,
                software_digest=software_digest(),
            )
            self._take_in(entry)
            return entry

    def finish(self, study: str, plan_digest: str | None = None) -> float:
        """Close a study: what it never charged is free again, and its name is used up. Closing twice is closing once.

        Args:
            study: Its name.
            plan_digest: The plan that whoever asks knows it by; None where the hospital itself asks.

        Returns:
            The delta that its epsilon is stated at.

        Raises:
            NotEnrolledError: The study was not approved here, with this plan.
            LedgerError: The end could not be written.
        """
        with self._turn:
            known = self._find(study)
            if plan_digest not in {None, known.plan_digest}:
                raise NotEnrolledError(f"study {study} was approved with another plan", hint="It is not closed.")
            if not known.closed:
                self._take_in(
                    self._ledger.append(
                        "study-closed", population=self.population, study=study, plan_digest=known.plan_digest
                    )
                )
            return known.limit.delta

    def spent(self, study: str | None = None) -> list[_Mechanism]:
        """Every mechanism charged, by one study or by all; ``accounting.reported_epsilon`` makes an epsilon of it."""
        with self._turn:
            studies = self._studies.values() if study is None else [self._find(study)]
            return [mechanism for known in studies for mechanism in known.charged.elements()]

    @property
    def has_spent(self) -> bool:
        """Whether anything was ever charged."""
        with self._turn:
            return any(known.charged for known in self._studies.values())

    def filter_spent(self, study: str | None = None) -> float:
        """The enforced epsilon of what was charged: of one study at its own delta, of all at the budget's."""
        delta = self.terms.delta if study is None else self._find(study).limit.delta
        return self._epsilon(self.spent(study), delta)

    def planned(self, study: str) -> float:
        """The enforced epsilon of all that a study reserved, at its own delta: what it costs if all of it is charged.

        Raises:
            NotEnrolledError: The study was not approved here.
        """
        with self._turn:
            known = self._find(study)
            return self._epsilon(known.reserved.elements(), known.limit.delta)

    def studies(self) -> dict[str, float]:
        """Names of all studies that were approved, oldest first, each with the delta it holds at."""
        with self._turn:
            return {name: known.limit.delta for name, known in self._studies.items()}

    def approvals(self) -> list[tuple[Entry, bool]]:
        """The newest approval of every study, oldest first, and whether the study is closed."""
        with self._turn:
            return [(known.approval, known.closed) for known in self._studies.values()]

    def limit(self, study: str) -> StudyLimit:
        """What a study promised to stay within when it was approved first.

        Raises:
            NotEnrolledError: The study was not approved here.
        """
        with self._turn:
            return self._find(study).limit

    def charges(self, study: str) -> tuple[int, int]:
        """How many charges of a study are made, and how many were reserved.

        Raises:
            NotEnrolledError: The study was not approved here.
        """
        with self._turn:
            known = self._find(study)
            return known.charged.total(), known.reserved.total()

    def trained_since(self, moment: float) -> int:
        """How many of the newest ``NEWEST_CHARGES`` training runs were charged after a moment, by the ledger's times.

        Args:
            moment: Seconds since the epoch. Charges that a clock since set back has dated later count too.
        """
        with self._turn:
            return sum(at > moment for at in self._trained_at)

    def left(self) -> float:
        """Epsilon that nothing has spent or reserved, at the budget's delta."""
        with self._turn:
            return self.terms.epsilon - self._epsilon(self._committed(), self.terms.delta)

    def _find(self, study: str) -> _Study:
        if study not in self._studies:
            raise NotEnrolledError(f"study {study} was not approved here", hint="The coordinator has to propose it.")
        return self._studies[study]

    def _open_study(self, study: str, plan_digest: str) -> _Study:
        known = self._find(study)
        if known.closed:
            raise PolicyError(f"study {study} is closed", hint="Start a study under a new name.")
        if plan_digest != known.plan_digest:
            raise PolicyError(f"study {study} was approved with another plan", hint="Plans never change; rename it.")
        if not holds(known.approval):
            raise NotEnrolledError(
                f"study {study} was approved for other software than runs here",
                hint="The coordinator proposes it again.",
            )
        return known

    def _committed(self, but: str | None = None) -> Iterable[_Mechanism]:
        """What is charged or reserved by all studies; an open one can be left out."""
        counted = [known for name, known in self._studies.items() if known.closed or name != but]
        return (mechanism for known in counted for mechanism in known.committed.elements())

    def _epsilon(self, mechanisms: Iterable[_Mechanism], delta: float) -> float:
        rho = total_divergence(mechanisms, self.terms.order)
        return filter_epsilon(rho, order=self.terms.order, delta=delta)

    def _fits(self, mechanisms: Iterable[_Mechanism]) -> bool:
        """The filter: does the budget pay for all of this?"""
        terms = self.terms
        limit = filter_limit(terms.epsilon, order=terms.order, delta=terms.delta)
        return total_divergence(mechanisms, terms.order) <= limit

    def _refuse_large_delta(self, plan: StudyPlan) -> None:
        if not plan.privacy.delta <= _largest_delta(self.terms.public_size):
            raise PolicyError(
                f"study {plan.study}: delta {plan.privacy.delta:g} is above 1 / (10 * {self.terms.public_size}) = "
                f"{_largest_delta(self.terms.public_size):g}",
                hint="Plan a smaller delta.",
            )

    def _refuse_over_own_limit(self, plan: StudyPlan, mechanisms: list[_Mechanism]) -> None:
        privacy, order = plan.privacy, self.terms.order
        limit = filter_limit(privacy.epsilon, order=order, delta=privacy.delta)
        if not total_divergence(mechanisms, order) <= limit:
            raise BudgetExhaustedError(
                f"study {plan.study} would cost epsilon {self._epsilon(mechanisms, privacy.delta):.4g}, more than "
                f"the {privacy.epsilon:.4g} that its plan promises (delta {privacy.delta:g}, filter at order {order})",
                hint="Plan more noise, fewer rounds or steps, or a smaller sample rate.",
            )

    def _refuse_over_budget(self, plan: StudyPlan, mechanisms: list[_Mechanism]) -> None:
        terms = self.terms
        if not self._fits([*self._committed(), *mechanisms]):
            price = self.price(plan)
            raise BudgetExhaustedError(
                f"study {plan.study} does not fit: population {self.population} has epsilon {price.left_before:.4g} of "
                f"{terms.epsilon:.4g} left, and {price.left_after:.4g} after it (delta {terms.delta:g}, "
                f"filter at order {terms.order})",
                hint="Plan a cheaper study, or withdraw from one that still holds a reservation.",
            )

    def _refuse_unreserved(self, study: str, known: _Study, mechanism: _Mechanism) -> None:
        reserved, charged = known.reserved[mechanism], known.charged[mechanism]
        if not charged < reserved:
            raise BudgetExhaustedError(
                f"study {study}: {charged} of {reserved} reserved charges of this {mechanism.kind} are used",
                hint="The study is over, or attempts failed more often than its plan has spare charges.",
            )

    def _take_in(self, entry: Entry) -> None:
        """Follow one entry. What the entries contradict is never guessed at: it stops the hospital."""
        _require(entry, entry.population in {None, self.population}, "belongs to another population")
        self._fingerprint = entry.population_fingerprint or self._fingerprint
        match entry.kind:
            case "plan-approved":
                self._take_in_approval(entry)
            case "plan-reapproved":
                self._take_in_another_approval(entry)
            case "charge":
                self._take_in_charge(entry)
            case "study-closed":
                _require(entry, entry.study in self._studies, "closes a study that was not approved")
                self._studies[entry.study or ""].closed = True
            case _:
                pass  # other kinds neither spend nor free anything

    def _take_in_approval(self, entry: Entry) -> None:
        _require(entry, entry.study not in self._studies, "approves a study twice")
        if entry.study and entry.plan_digest and entry.limit and entry.reservation:
            reserved = Counter({r.mechanism: r.charges for r in entry.reservation})
            self._studies[entry.study] = _Study(entry.plan_digest, entry.limit, entry, reserved)

    def _take_in_another_approval(self, entry: Entry) -> None:
        """The same study for other software; what was reserved stays what it was."""
        known = self._studies.get(entry.study or "")
        if known is None or known.plan_digest != entry.plan_digest:
            raise _contradiction(entry, "approves again what was not approved")
        _require(entry, not known.closed, "approves a study again that is closed")
        _require(entry, entry.reservation is None and entry.limit is None, "reserves a study twice")
        known.approval = entry

    def _take_in_charge(self, entry: Entry) -> None:
        known = self._studies.get(entry.study or "")
        if known is None or entry.mechanism is None or entry.round is None or entry.attempt is None:
            raise _contradiction(entry, "charges a study that was not approved")
        _require(
            entry, known.charged[entry.mechanism] < known.reserved[entry.mechanism], "charges what is not reserved"
        )
        _require(entry, not known.closed, "charges a study that is closed")
        newest = known.newest.get(entry.mechanism.kind, (0, 0))
        _require(entry, (entry.round, entry.attempt) > newest, "charges a computation that was charged before")
        known.charged[entry.mechanism] += 1
        if isinstance(entry.mechanism, PoissonGaussian):
            self._trained_at.append(datetime.fromisoformat(entry.time).timestamp())
        known.newest[entry.mechanism.kind] = (entry.round, entry.attempt)


def holds(approval: Entry) -> bool:
    """Whether an approval is for the software that is installed here."""
    return approval.software_digest == software_digest()


def _require(entry: Entry, holds: bool, problem: str) -> None:
    if not holds:
        raise _contradiction(entry, problem)


def _contradiction(entry: Entry, problem: str) -> LedgerError:
    return LedgerError(f"ledger entry {entry.seq} {problem}", hint="This ledger was not written by this software.")


def _same_approval(known: _Study, plan: StudyPlan) -> Entry:
    if known.plan_digest != plan.digest():
        raise PolicyError(f"study {plan.study} was approved with another plan", hint="Plans never change; rename it.")
    if known.closed:
        raise PolicyError(f"study {plan.study} is closed", hint="Start a study under a new name.")
    return known.approval


def _largest_delta(public_size: int) -> float:
    return 1 / (10 * public_size)


def budget_terms(*, public_size: int, epsilon: float, delta: float, order: int) -> BudgetTerms:
    """Terms that a budget can be opened with.

    Raises:
        ConfigError: One is out of range; or together they can pay for nothing.
    """
    try:
        terms = BudgetTerms(epsilon=epsilon, delta=delta, order=order, public_size=public_size)
    except ValidationError as error:
        raise ConfigError(f"the budget's terms: {explain(error)}", hint="Mend [population] in the settings.") from None
    largest = _largest_delta(public_size)
    if not delta <= largest:
        raise ConfigError(
            f"delta {delta:g} is above 1 / (10 * public size) = {largest:g} for a public size of {public_size}",
            hint="A larger delta would allow publishing a whole patient. Choose a smaller one.",
        )
    if not filter_limit(epsilon, order=order, delta=delta) > 0:
        raise ConfigError(
            f"at Renyi order {order}, a budget of epsilon {epsilon:g} at delta {delta:g} can pay for nothing",
            hint="Open the budget with a larger order; see mechanisms.best_order.",
        )
    return terms


def _describe(population: str, terms: BudgetTerms) -> str:
    return (
        f"population {population} (public size {terms.public_size}, epsilon {terms.epsilon:g}, delta {terms.delta:g}, "
        f"order {terms.order})"
    )
