"""The model card: for people, complete, and honest about what is missing."""

import json
import re
from pathlib import Path

from server.card import read_statements, write_card
from server.examples import example_plan
from server.journal import Journal
from shared_models.messages import PrivacyStatement
from shared_models.model_file import read_model
from shared_models.pretrained import KNOWN, Origin, offer_files
from tests.tiny_bases import image_plan, text_plan, write_body, write_encoder

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


def test_it_says_what_made_each_hospitals_gradients_and_never_guesses(tmp_path: Path) -> None:
    """A statement names the exception; its silence is this software's choice where that software ran, or nothing."""
    journal = Journal(tmp_path / "events.jsonl")
    for name, same in (("north", True), ("south", True), ("west", False)):
        journal.write("enrolled", hospital=name, public_size=160, same_software=same)
    odd = STATEMENT.model_copy(update={"engine": "opacus-hooks"})

    card = write_card(tmp_path, PLAN, {"north": 160}, {"north": STATEMENT, "south": odd, "west": STATEMENT}).read_text()

    found = json.loads((tmp_path / "card.json").read_text())
    assert found["engines"] == {"north": "book-keeping", "south": "opacus-hooks", "west": "unknown"}
    assert found["base"] is None
    assert (
        "Gradients per patient: from book-keeping (north); from Opacus's hooks, because book-keeping does not cover "
        "the network (south); not stated (west)." in card
    )
    assert read_statements(tmp_path)[1]["south"] == odd


def test_it_names_the_base_and_its_licence(tmp_path: Path) -> None:
    """A base that this project trained says itself what it is; an encoder is known by its digest, or said not to be."""
    body = tmp_path / "body.safetensors"
    plan = image_plan(write_body(body))
    offer_files([body])
    texts = text_plan(write_encoder(tmp_path / "encoder"))
    offer_files([tmp_path / "encoder"])

    card = write_card(tmp_path, plan, {"north": 160}, {"north": STATEMENT}).read_text()
    of_texts = write_card(tmp_path, texts, {"north": 160}, {"north": STATEMENT}).read_text()

    trained = read_model(body)[0]
    assert f"- Starts from: model of study {trained.study}, frozen; licence: {trained.data_licence}; digest `" in card
    assert texts.network.base in of_texts  # type: ignore[union-attr]  # it has one
    assert "a base whose name is not known here" in of_texts
    assert "licence: not known here" in of_texts


def test_the_base_of_the_documents_is_known_by_its_digest() -> None:
    """The digest that ``docs/plan.md`` names is one that the card can name."""
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    (digest,) = re.findall(r'base = "([0-9a-f]{64})"  # all-MiniLM-L6-v2', text)

    assert KNOWN[digest] == Origin("all-MiniLM-L6-v2", "Apache-2.0")
