"""Epsilon again, from the recorded mechanisms, by code that shares nothing with what the hospital enforced or reported.

dp-accounting (Google) computes the filter's figure, RDP and PLD. The hospital used its own closed form and Opacus.
dp-accounting takes most of a second to import: an audit with nothing to compute, of a broken file say, does without.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

from shared_models.config import Frozen
from shared_models.errors import LedgerError
from shared_models.privacy.entries import BudgetTerms, Entry, Reserved, StudyLimit
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

PLD_INTERVAL = 1e-3  # width of a cell of the privacy loss distribution, rounded up: an upper bound

_Mechanism = PoissonGaussian | GaussianRelease
_Steps = tuple[tuple[float, float, int], ...]  # sample rate, noise multiplier, times


class Fact(Protocol):
    """What a price depends on, of a ledger entry."""

    @property
    def kind(self) -> str: ...  # noqa: D102 - as in ``Entry``, these five
    @property
    def study(self) -> str | None: ...  # noqa: D102
    @property
    def limit(self) -> StudyLimit | None: ...  # noqa: D102
    @property
    def reservation(self) -> tuple[Reserved, ...] | None: ...  # noqa: D102
    @property
    def mechanism(self) -> _Mechanism | None: ...  # noqa: D102


class Figures(Frozen):
    """What some charges cost one patient, by three accountants; never without what it holds at and for whom.

    Attributes:
        charges: How many.
        epsilon_filter: At the order that the budget committed to: all that holds under adaptive choice.
        epsilon_pld: For the schedule as executed, valid if it was fixed in advance; the tight one.
        epsilon_rdp: The same by RDP, at the best of many integer orders; looser.
    """

    charges: int
    epsilon_filter: float
    epsilon_pld: float
    epsilon_rdp: float
    delta: float
    order: int
    unit: Literal["patient"] = "patient"
    neighbouring: Literal["add or remove one patient"] = "add or remove one patient"
    accountant: Literal["dp-accounting: PLD, RDP"] = "dp-accounting: PLD, RDP"


class StudyReport(Frozen):
    """One study: what it cost at its own delta, and what its plan promised."""

    study: str
    open: bool
    limit_epsilon: float
    spent: Figures


class BudgetReport(Frozen):
    """One hospital's population: what its budget was opened with, and what is spent, reserved and left.

    Attributes:
        left: Epsilon of the budget that is neither spent nor reserved, by the filter.
    """

    hospital: str
    population: str
    budget: BudgetTerms
    spent: Figures
    left: float
    studies: tuple[StudyReport, ...]


def recompute(counts: Counter[_Mechanism], *, delta: float, order: int) -> Figures:
    """What mechanisms cost, at one delta; ``counts`` says how often each was charged."""
    steps = _steps(counts)
    return Figures(
        charges=counts.total(),
        epsilon_filter=_filter(steps, delta, order),
        epsilon_pld=_pld(steps, delta),
        epsilon_rdp=_rdp(steps, delta),
        delta=delta,
        order=order,
    )


def report_budget(entries: Iterable[Entry]) -> BudgetReport:
    """What a ledger's entries add up to, per study and in total; they are read once, one at a time.

    Raises:
        LedgerError: The entries open no budget, or charge what was never approved.
    """
    rest = iter(entries)
    opening = next(rest, None)
    if opening is None or opening.budget is None or opening.population is None:
        raise LedgerError("the ledger opens no budget", hint="It is empty, or not a hospital's.")
    return report_facts(opening.hospital, opening.population, opening.budget, rest)


def report_facts(hospital: str, population: str, terms: BudgetTerms, facts: Iterable[Fact]) -> BudgetReport:
    """What a ledger's entries, or what was kept of them, add up to.

    Raises:
        LedgerError: They charge what was never approved.
    """
    books = _Books()
    for fact in facts:
        books.follow(fact)
    if not set(books.charged) <= set(books.approvals):
        raise LedgerError("charges of a study that was never approved", hint="Run: konsil-audit verify")
    spent = sum(books.charged.values(), Counter[_Mechanism]())
    return BudgetReport(
        hospital=hospital,
        population=population,
        budget=terms,
        spent=recompute(spent, delta=terms.delta, order=terms.order),
        left=terms.epsilon - filter_epsilon(spent + books.left(), delta=terms.delta, order=terms.order),
        studies=tuple(
            StudyReport(
                study=study or "",
                open=study not in books.closed,
                limit_epsilon=approval.limit.epsilon,
                spent=recompute(books.charged[study], delta=approval.limit.delta, order=terms.order),
            )
            for study, approval in books.approvals.items()
            if approval.limit is not None
        ),
    )


class _Books:
    """What entries add up to; memory grows with the number of studies only."""

    def __init__(self) -> None:
        self.approvals: dict[str | None, Fact] = {}
        self.charged: defaultdict[str | None, Counter[_Mechanism]] = defaultdict(Counter)
        self.closed: set[str | None] = set()

    def follow(self, entry: Fact) -> None:
        if entry.kind == "plan-approved":
            self.approvals[entry.study] = entry
        elif entry.kind == "study-closed":
            self.closed.add(entry.study)
        elif entry.kind == "charge" and entry.mechanism is not None:
            self.charged[entry.study][entry.mechanism] += 1

    def left(self) -> Counter[_Mechanism]:
        """What open studies may still charge."""
        left = Counter[_Mechanism]()
        for study, approval in self.approvals.items():
            if study not in self.closed:
                left += Counter({r.mechanism: r.charges for r in approval.reservation or ()}) - self.charged[study]
        return left


def filter_epsilon(counts: Mapping[_Mechanism, int], *, delta: float, order: int) -> float:
    """The Rényi filter's figure at one order, independently of ``shared_models``; 0 for no mechanisms.

    Args:
        counts: How often each mechanism was charged.
        delta: What the figure holds at.
        order: Of the divergence.
    """
    return _filter(_steps(counts), delta, order)


# Hospitals of one study charge the same steps, and each figure takes up to a second.
@lru_cache(maxsize=4096)
def _filter(steps: _Steps, delta: float, order: int) -> float:
    return float(_rdp_accountant([order]).compose(_event(steps)).get_epsilon(delta)) if steps else 0.0


@lru_cache(maxsize=1024)
def _rdp(steps: _Steps, delta: float) -> float:
    return float(_rdp_accountant(None).compose(_event(steps)).get_epsilon(delta)) if steps else 0.0


@lru_cache(maxsize=1024)
def _pld(steps: _Steps, delta: float) -> float:
    return float(_pld_accountant().compose(_event(steps)).get_epsilon(delta)) if steps else 0.0


def _rdp_accountant(orders: list[int] | None) -> "RdpAccountant":
    """At some orders, or at all of dp-accounting's that are integers: its series for others need not converge."""
    from dp_accounting.privacy_accountant import NeighboringRelation  # noqa: PLC0415 - see above, as all in this file
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS, RdpAccountant  # noqa: PLC0415

    integers = [order for order in DEFAULT_RDP_ORDERS if order >= 2 and order == int(order)]
    return RdpAccountant(orders or integers, NeighboringRelation.ADD_OR_REMOVE_ONE)


def _pld_accountant() -> "PLDAccountant":
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant  # noqa: PLC0415
    from dp_accounting.privacy_accountant import NeighboringRelation  # noqa: PLC0415

    return PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=PLD_INTERVAL)


def _steps(counts: Mapping[_Mechanism, int]) -> _Steps:
    """Sample rate, noise multiplier and number of steps, equal ones grouped: all that a price depends on."""
    steps: Counter[tuple[float, float]] = Counter()
    for mechanism, times in counts.items():
        if isinstance(mechanism, PoissonGaussian):
            steps[mechanism.sample_rate, mechanism.noise_multiplier] += mechanism.steps * times
        else:
            steps[1.0, mechanism.noise_multiplier] += mechanism.releases * times
    return tuple((q, sigma, times) for (q, sigma), times in sorted(steps.items()) if times)


def _event(steps: _Steps) -> "DpEvent":
    """Steps in dp-accounting's words."""
    from dp_accounting.dp_event import ComposedDpEvent, SelfComposedDpEvent  # noqa: PLC0415

    return ComposedDpEvent([SelfComposedDpEvent(_step(q, sigma), times) for q, sigma, times in steps])


def _step(sample_rate: float, noise_multiplier: float) -> "DpEvent":
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent  # noqa: PLC0415

    noise = GaussianDpEvent(noise_multiplier)
    return noise if sample_rate == 1 else PoissonSampledDpEvent(sample_rate, noise)
