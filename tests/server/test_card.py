"""The model card: for people, complete, and honest about what is missing."""

import json
from pathlib import Path

from server.card import read_statements, write_card
from server.examples import example_plan
from shared_models.messages import PrivacyStatement

PLAN = example_plan("breast-cancer", 4)
STATEMENT = PrivacyStatement(
    study=PLAN.study,
    rounds=25,
    epsilon=0.87,
    epsilon_filter=0.98,
    delta=3e-4,
    unit="patient",
    neighbouring="add or remove one patient",
    accountant="PRV (Opacus 1.6.0)",
    budget_epsilon=1.0,
    public_size=160,
)


def test_it_says_what_it_is_what_it_cost_and_under_which_licence(tmp_path: Path) -> None:
    """Study, digest, rounds, licence, and every epsilon with its delta, budget and accountant."""
    sizes = {"north": 160, "east": 100, "south": 80, "west": 70}
    card = write_card(tmp_path, PLAN, sizes, {"north": STATEMENT}).read_text(encoding="utf-8")

    for text in (PLAN.study, PLAN.digest(), "25 rounds", PLAN.data_licence, "one patient", "at least 3 of 4 hospitals"):
        assert text in card
    assert "| north | 160 | 25 | 0.870 | 0.980 | 1 | 0.0003 | PRV (Opacus 1.6.0) |" in card
    assert "## Metrics" not in card


def test_a_hospital_that_stated_nothing_is_not_left_out(tmp_path: Path) -> None:
    """It took part; that its cost is unknown here is said in its row."""
    card = write_card(tmp_path, PLAN, {"north": 160, "south": 80}, {"north": STATEMENT}).read_text(encoding="utf-8")

    assert "| south | 80 | not stated: offline at the end |" in card


def test_metrics_are_added_without_losing_the_statements(tmp_path: Path) -> None:
    """The demo writes the card again with what it measured; an undefined figure leaves its cell empty."""
    write_card(tmp_path, PLAN, {"north": 160}, {"north": STATEMENT})
    sizes, statements = read_statements(tmp_path)

    figures = {"federated": {"auroc": 0.99, "records": 142.0}, "pooled": {"accuracy": 0.5}}
    card = write_card(tmp_path, PLAN, sizes, statements, metrics=figures, about_data="An artificial split").read_text()

    assert statements == {"north": STATEMENT}
    assert "| federated |  | 0.990 |" in card
    assert "| pooled | 0.500 |  |" in card
    assert "An artificial split" in card
    assert json.loads((tmp_path / "card.json").read_text())["metrics"] == figures
