"""The budget never pays more than it has, whatever is proposed; and it forgets nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from client.budget import Budget
from shared_models.errors import (
    BudgetExhaustedError,
    ConfigError,
    FederationError,
    LedgerError,
    NotEnrolledError,
    PolicyError,
    ProtocolError,
)
from shared_models.plan import StudyPlan, parse_plan
from shared_models.privacy.ledger import Entry, Ledger
from shared_models.privacy.mechanisms import (
    PoissonGaussian,
    filter_epsilon,
    filter_limit,
    release_mechanism,
    total_divergence,
    training_mechanism,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIZE, DELTA, ORDER = 100, 1e-4, 20
TERMS: dict[str, Any] = {"population": "all", "public_size": SIZE, "epsilon": 1.5, "delta": DELTA, "order": ORDER}
DIGEST = "cd" * 32


def plan(study: str = "heart", **privacy: Any) -> StudyPlan:
    """Ten rounds and two spare ones, for a filter epsilon of 0.7 or so."""
    evaluation = privacy.pop("evaluation", None)
    fields = {
        "format": 1,
        "study": study,
        "purpose": "Tests of the privacy budget",
        "task": "heart-disease",
        "data_licence": "CC BY 4.0",
        "rounds": 10,
        "minimum_hospitals": 3,
        "deadline_s": 10,
        "weight_cap": 200,
        "network": {"name": "logistic-regression"},
        "training": {"learning_rate": 0.1, "steps": 5},
        "privacy": {
            "clip": 1.0,
            "noise_multiplier": 8.0,
            "sample_rate": 0.2,
            "epsilon": 1.0,
            "delta": DELTA,
            "spare_charges": 2,
        }
        | privacy,
    }
    return parse_plan(fields | ({"evaluation": evaluation} if evaluation else {}))


HEART = plan()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger.sqlite", KEY, hospital="north") as ledger:
        yield ledger


@pytest.fixture
def budget(ledger: Ledger) -> Budget:
    return Budget.open(ledger, **TERMS)


def charge(budget: Budget, study: StudyPlan, number: int, attempt: int = 1) -> Entry:
    return budget.charge(
        study.study,
        study.digest(),
        round=number,
        attempt=attempt,
        mechanism=training_mechanism(study, SIZE),
        parameters_digest=DIGEST,
    )


def rho(*plans: tuple[StudyPlan, int]) -> float:
    return total_divergence([training_mechanism(p, SIZE) for p, count in plans for _ in range(count)], ORDER)


def epsilon(divergence: float) -> float:
    return filter_epsilon(divergence, order=ORDER, delta=DELTA)


# Opening


def test_opening_records_the_terms_and_the_key(ledger: Ledger, budget: Budget) -> None:
    """The first entry says what is promised, to whom, and who signs."""
    (opening,) = ledger.entries()

    assert opening.kind == "budget-opened"
    assert opening.public_key == ledger.public_key.hex()
    assert opening.budget == budget.terms
    assert opening.budget is not None
    assert opening.budget.unit == "patient"
    assert budget.left() == TERMS["epsilon"]


@pytest.mark.parametrize(
    "change",
    [{"population": "renamed"}, {"public_size": 99}, {"epsilon": 2.0}, {"delta": 5e-5}, {"order": 21}],
    ids=lambda change: next(iter(change)),
)
def test_the_terms_of_a_budget_never_change(ledger: Ledger, budget: Budget, change: dict[str, Any]) -> None:
    """Else a new name or a larger epsilon would refund what was spent; the error shows both."""
    budget.approve(HEART)

    with pytest.raises(ConfigError, match=r"was opened for population all .* the settings now say"):
        Budget.open(ledger, **TERMS | change)

    assert Budget.open(ledger, **TERMS).left() == budget.left()


def test_a_delta_too_large_for_the_population_is_refused_with_both_numbers(ledger: Ledger) -> None:
    """And nothing is opened."""
    with pytest.raises(ConfigError, match=r"delta 0\.0011 is above 1 / \(10 \* public size\) = 0\.001 .* of 100"):
        Budget.open(ledger, **TERMS | {"delta": 0.0011})

    assert ledger.entries() == ()
    Budget.open(ledger, **TERMS | {"delta": 0.001})


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"delta": 0.0},
        {"delta": float("nan")},
        {"order": 1},
        {"order": 2},  # too small for this epsilon: nothing would ever fit
        {"public_size": 0},
    ],
    ids=str,
)
def test_terms_that_mean_nothing_are_refused(ledger: Ledger, change: dict[str, Any]) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError):
        Budget.open(ledger, **TERMS | change)

    assert ledger.entries() == ()


def test_a_budget_needs_an_opening(ledger: Ledger) -> None:
    """A view of an empty ledger has nothing to show."""
    with pytest.raises(LedgerError, match="opens no budget"):
        Budget(ledger)


# Price and approval


def test_the_price_is_the_filters(ledger: Ledger, budget: Budget) -> None:
    """Rounds and spare charges together; asking writes nothing."""
    price = budget.price(HEART)

    assert price.study_epsilon_filter == epsilon(rho((HEART, 12)))
    assert price.left_before == TERMS["epsilon"]
    assert price.left_after == TERMS["epsilon"] - epsilon(rho((HEART, 12)))
    assert len(ledger.entries()) == 1


def test_approval_reserves_the_price(budget: Budget) -> None:
    """What is left afterwards is what was announced; nothing is spent yet."""
    price = budget.price(HEART)

    budget.approve(HEART)

    assert budget.left() == price.left_after
    assert budget.spent() == []
    assert budget.filter_spent() == 0
    assert budget.studies() == {"heart": DELTA}


def test_approving_again_reserves_nothing_twice(ledger: Ledger, budget: Budget) -> None:
    """A coordinator proposes again after a restart."""
    first = budget.approve(HEART)

    assert budget.approve(HEART) == first
    assert Budget.open(ledger, **TERMS).approve(HEART) == first
    assert len(ledger.entries()) == 2


def test_a_plan_beyond_its_own_promise_is_refused_with_the_numbers(ledger: Ledger, budget: Budget) -> None:
    """By the budget's order, though a better order for this plan may exist."""
    dear = plan(epsilon=0.5)

    with pytest.raises(BudgetExhaustedError, match=r"would cost epsilon 0\.\d+, more than the 0\.5 .* order 20"):
        budget.approve(dear)

    assert len(ledger.entries()) == 1


def test_a_plan_beyond_what_is_left_is_refused_with_the_numbers(ledger: Ledger, budget: Budget) -> None:
    """Though each study alone would fit."""
    number = 0
    while budget.price(plan(f"study-{number}")).left_after > 0:
        budget.approve(plan(f"study-{number}"))
        number += 1

    with pytest.raises(BudgetExhaustedError, match=r"population all has epsilon 0\.\d+ of 1\.5 left, and -\d"):
        budget.approve(plan(f"study-{number}"))

    committed = [(plan(name), 12) for name in budget.studies()]
    limit = filter_limit(TERMS["epsilon"], order=ORDER, delta=DELTA)
    assert len(committed) > 1
    assert rho(*committed) <= limit < rho(*committed, (HEART, 12))
    assert len(ledger.entries()) == 1 + len(committed)


def test_a_plan_with_too_large_a_delta_is_refused(budget: Budget) -> None:
    """At a delta of its own it would look cheaper than it is."""
    with pytest.raises(PolicyError, match=r"delta 0\.002 is above"):
        budget.approve(plan(delta=0.002))


def test_a_name_stands_for_one_plan(budget: Budget) -> None:
    """While the study is open and after."""
    budget.approve(HEART)

    with pytest.raises(PolicyError, match="another plan"):
        budget.approve(plan(clip=2.0))
    budget.finish("heart")
    with pytest.raises(PolicyError, match="closed"):
        budget.approve(HEART)


# Charges


def test_a_charge_is_on_disk_before_it_returns(tmp_path: Path, budget: Budget) -> None:
    """Write-ahead: another reader finds it, whole."""
    from shared_models.privacy.ledger import read_ledger

    budget.approve(HEART)

    entry = charge(budget, HEART, 1)

    assert read_ledger(tmp_path / "ledger.sqlite")[-1] == entry
    assert entry.mechanism == training_mechanism(HEART, SIZE)
    assert (entry.study, entry.plan_digest, entry.round, entry.attempt) == ("heart", HEART.digest(), 1, 1)
    assert entry.parameters_digest == DIGEST
    assert entry.software_digest is not None


def test_charges_add_up_to_the_reservation_and_no_further(budget: Budget) -> None:
    """Charging uses up what was reserved: what is left does not move, and one round more is refused."""
    budget.approve(HEART)
    left = budget.left()
    for number in range(1, 13):
        charge(budget, HEART, number)
        assert budget.left() == left
        assert budget.filter_spent("heart") == epsilon(rho((HEART, number)))

    with pytest.raises(BudgetExhaustedError, match="12 of 12 reserved charges"):
        charge(budget, HEART, 13)

    assert budget.filter_spent() == budget.price(HEART).study_epsilon_filter <= HEART.privacy.epsilon


@pytest.mark.parametrize(
    ("number", "attempt"), [(4, 2), (4, 1), (3, 9), (1, 1)], ids=["the same", "older attempt", "older round", "first"]
)
def test_a_replay_is_refused(ledger: Ledger, budget: Budget, number: int, attempt: int) -> None:
    """Each computation is paid for once, and time does not run backwards; nothing is written."""
    budget.approve(HEART)
    charge(budget, HEART, 4, 2)

    with pytest.raises(ProtocolError, match=f"round {number}, attempt {attempt} comes after round 4, attempt 2"):
        charge(budget, HEART, number, attempt)

    assert len(ledger.entries()) == 3
    charge(budget, HEART, 4, 3)
    charge(budget, HEART, 5, 1)


def test_training_and_releases_are_paid_apart(budget: Budget) -> None:
    """One round may train and release: two computations, each from its own part of the reservation."""
    both = plan(noise_multiplier=10.0, evaluation={"every": 5, "clip": 2.0, "noise_multiplier": 30.0})
    budget.approve(both)

    for number in (5, 10):
        charge(budget, both, number)
        fields: dict[str, Any] = {"round": number, "attempt": 1, "parameters_digest": DIGEST}
        budget.charge(both.study, both.digest(), mechanism=release_mechanism(both), **fields)
        with pytest.raises(ProtocolError):
            budget.charge(both.study, both.digest(), mechanism=release_mechanism(both), **fields)
    with pytest.raises(BudgetExhaustedError, match="2 of 2 reserved charges of this gaussian-release"):
        budget.charge(
            both.study,
            both.digest(),
            round=15,
            attempt=1,
            mechanism=release_mechanism(both),
            parameters_digest=DIGEST,
        )

    assert len(budget.spent("heart")) == 4


def test_only_what_was_reserved_can_be_charged(budget: Budget) -> None:
    """Not less noise, not more steps; and not another mechanism that would be cheaper."""
    budget.approve(HEART)
    reserved = training_mechanism(HEART, SIZE)
    for change in ({"noise_multiplier": 7.9}, {"noise_multiplier": 80.0}, {"steps": 6}, {"sample_rate": 0.3}):
        other = PoissonGaussian(**reserved.model_dump() | change)
        with pytest.raises(BudgetExhaustedError, match="0 of 0 reserved"):
            budget.charge("heart", HEART.digest(), round=1, attempt=1, mechanism=other, parameters_digest=DIGEST)


def test_only_the_approved_study_can_be_charged(budget: Budget) -> None:
    """By name and by digest, and not after its end."""
    with pytest.raises(NotEnrolledError, match="was not approved"):
        charge(budget, HEART, 1)
    budget.approve(HEART)
    with pytest.raises(PolicyError, match="another plan"):
        charge(budget, plan(clip=2.0), 1)
    budget.finish("heart")
    with pytest.raises(PolicyError, match="closed"):
        charge(budget, HEART, 1)


def test_a_finished_study_gives_back_what_it_never_charged(ledger: Ledger, budget: Budget) -> None:
    """And nothing else: what was charged stays spent. Finishing twice is finishing once."""
    budget.approve(HEART)
    charge(budget, HEART, 1)

    budget.finish("heart")
    budget.finish("heart")

    assert budget.left() == TERMS["epsilon"] - epsilon(rho((HEART, 1)))
    assert budget.spent("heart") == [training_mechanism(HEART, SIZE)]
    assert [entry.kind for entry in ledger.entries()].count("study-closed") == 1
    with pytest.raises(NotEnrolledError):
        budget.finish("unknown")


def test_studies_are_told_apart(budget: Budget) -> None:
    """Each with its own spending; the population has all of it."""
    other = plan("lungs", noise_multiplier=30.0)
    budget.approve(HEART)
    budget.approve(other)
    charge(budget, HEART, 1)
    charge(budget, other, 1)
    charge(budget, other, 2)

    assert budget.filter_spent("heart") == epsilon(rho((HEART, 1)))
    assert budget.filter_spent("lungs") == epsilon(rho((other, 2)))
    assert budget.filter_spent() == epsilon(rho((HEART, 1), (other, 2)))
    with pytest.raises(NotEnrolledError):
        budget.spent("unknown")


def test_a_charge_that_cannot_be_written_is_not_counted_as_done(tmp_path: Path, ledger: Ledger, budget: Budget) -> None:
    """The error reaches the caller, who then computes nothing."""
    budget.approve(HEART)
    ledger.close()

    with pytest.raises(LedgerError):
        charge(budget, HEART, 1)

    with Ledger.open(tmp_path / "ledger.sqlite", KEY) as reopened:
        assert Budget.open(reopened, **TERMS).spent() == []


def test_a_ledger_that_contradicts_itself_stops_the_hospital(tmp_path: Path) -> None:
    """Signed and chained, but charging what nobody approved, or twice."""
    for name, rounds in (("unapproved", ()), ("twice", (1,))):
        path = tmp_path / name
        with Ledger.create(path, KEY, hospital="north") as ledger:
            budget = Budget.open(ledger, **TERMS)
            if rounds:
                budget.approve(HEART)
                charge(budget, HEART, 1)
            ledger.append(
                "charge",
                population="all",
                study="heart",
                plan_digest=HEART.digest(),
                round=1,
                attempt=1,
                mechanism=training_mechanism(HEART, SIZE),
                parameters_digest=DIGEST,
            )
        with Ledger.open(path, KEY) as ledger, pytest.raises(LedgerError, match=r"ledger entry \d charges"):
            Budget.open(ledger, **TERMS)


STUDIES = st.sampled_from(["a", "b", "c", "d"])
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("approve"), STUDIES, st.sampled_from([6.0, 8.0, 20.0])),
        st.tuples(st.just("charge"), STUDIES, st.integers(1, 14)),
        st.tuples(st.just("finish"), STUDIES, st.none()),
        st.tuples(st.just("reopen"), st.none(), st.none()),
    ),
    max_size=40,
)


@given(moves=MOVES)
@settings(max_examples=40, deadline=None)
def test_no_sequence_of_requests_crosses_the_limit(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, str, Any]]
) -> None:
    """Whatever is asked in whatever order, and however often the hospital restarts in between.

    After every move what was charged fits the budget, each study its own promise, and a budget read again from the same
    ledger gives the same answers.
    """
    limit = filter_limit(TERMS["epsilon"], order=ORDER, delta=DELTA)
    path = tmp_path_factory.mktemp("moves") / "ledger.sqlite"
    ledger = Ledger.create(path, KEY, hospital="north")
    budget, plans = Budget.open(ledger, **TERMS), dict[str, StudyPlan]()
    for move, name, argument in moves:
        try:
            if move == "approve":
                budget.approve(plan(name, noise_multiplier=argument))
                plans[name] = plan(name, noise_multiplier=argument)
            elif move == "charge":
                charge(budget, plans.get(name, HEART), argument)
            elif move == "finish":
                budget.finish(name)
            else:
                ledger.close()
                ledger = Ledger.open(path, KEY)
                budget = Budget.open(ledger, **TERMS)
        except FederationError as error:
            assert not isinstance(error, LedgerError)  # noqa: PT017 - refusals are part of the story, a ledger's are not

        again = Budget(ledger)
        assert total_divergence(budget.spent(), ORDER) <= limit
        assert budget.left() >= 0
        assert (again.spent(), again.left(), again.studies()) == (budget.spent(), budget.left(), budget.studies())
        for study in budget.studies():
            assert budget.filter_spent(study) <= plans[study].privacy.epsilon
    ledger.close()
