"""A study with everybody in one process: the same bits, memory that does not grow, and what is refused."""

import gc
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray
from rich.console import Console
from typer.testing import CliRunner

import client.app
import server.cohort
import server.simulate
from auditor.verify import verify_ledger
from client.books import Books
from client.randomness import SecureRandom
from client.round import Hospital
from server.cli import app as command
from server.demo import plan_text
from server.examples import example_plan, write_example
from server.gather import Gather
from server.made_up import write_made_up
from server.simulate import FewOpenGrid, Options, hospital_app, hospitals_in, run_server_app, run_simulation
from shared_models.errors import ConfigError
from shared_models.identity import read_public
from shared_models.messages import StudyEnd, TrainRequest, Update, reply, request_all
from shared_models.model_file import read_model
from shared_models.plan import StudyPlan
from shared_models.privacy.ledger import read_ledger
from shared_models.receipts import Receipt
from shared_models.secagg.protocol import Delivery
from shared_models.tasks import BREAST_CANCER, HEART_DISEASE, TRIAL_IMAGES, Task
from shared_models.update import parameters_to_vector
from tests.federation import Federation, changed, make_federation


def options(folder: Path, study: StudyPlan | None = None, **changes: Any) -> Options:
    """Three made-up hospitals and two rounds, unless told otherwise."""
    study = study or changed(example_plan("breast-cancer", 3), rounds=2, reply_grid_s=0.001)
    file = folder / "plan.toml"
    file.write_text(plan_text(study), encoding="utf-8")
    fields: dict[str, Any] = {
        "plan": file,
        "folder": folder / "run",
        "records": None,
        "hospitals": 3,
        "patients": 30,
        "public_size": None,
        "seed": 0,
        "threads": 1,
        "json_file": None,
    }
    return Options(**fields | changes)


def simulate(chosen: Options) -> dict[str, Any]:
    """Run it without a word."""
    return run_simulation(chosen, Console(quiet=True))


def parameters(folder: Path) -> NDArray[np.float32]:
    """Of a study's final model."""
    return parameters_to_vector(read_model(folder / "model.safetensors")[1])


def repeatable(federation: Federation) -> None:
    """Open every hospital with a generator that gives the same in every federation."""
    for number, name in enumerate(federation.names, 1):
        settings = federation.settings(name)
        random = SecureRandom.for_tests(bytes([number]) * 32)
        hospital = Hospital(settings, Books.open(settings), test_random=lambda random=random: random)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        client.app._hospitals[str(federation.settings_file(name))] = hospital


def over_calls(federation: Federation, grid: FewOpenGrid) -> Path:
    """Run a federation's study over function calls. Returns the study's folder."""
    plan = federation.folder / "simulated.toml"
    plan.write_text(plan_text(federation.plan), encoding="utf-8")
    keys = {name: read_public(federation.folder / "public" / f"{name}.identity.pub") for name in federation.names}
    sizes = {hospital.name: hospital.public_size for hospital in federation.example.hospitals}
    folder, state = federation.folder / "simulated", federation.folder / "simulated-state"
    state.mkdir()
    run_server_app(grid, plan_file=plan, folder=folder, state=state, identities=keys, public_sizes=sizes)
    return folder


def grid_of(federation: Federation, **few: int) -> FewOpenGrid:
    """The grid of a federation's hospitals."""
    return FewOpenGrid({name: federation.settings_file(name) for name in federation.names}, **few)


def test_it_gives_the_same_bits_as_messages_that_travel_as_bytes(tmp_path: Path) -> None:
    """Handing messages over as they are changes no parameter: masks, order and arithmetic are the same."""
    travelled, called = (make_federation(tmp_path / name, rounds=2) for name in ("travelled", "called"))
    for federation in (travelled, called):
        repeatable(federation)

    first, second = parameters(travelled.run()), parameters(over_calls(called, grid_of(called)))

    np.testing.assert_array_equal(first, second)


def test_hospitals_beyond_the_bound_are_closed_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 7 hospitals, 4 asked a round and 4 open, every round has its 4, and ledgers hold what was charged, once."""
    monkeypatch.setattr(server.cohort, "LARGEST_COHORT", 4)
    federation = make_federation(tmp_path, rounds=4, hospitals=7)
    grid = grid_of(federation, most_open=4)
    most = 0
    call = client.app.app.__class__.__call__

    def watched(app: Any, *arguments: Any) -> Message:
        nonlocal most
        answer: Message = call(app, *arguments)
        most = max(most, len(client.app._hospitals))
        return answer

    monkeypatch.setattr(client.app.app.__class__, "__call__", watched)
    over_calls(federation, grid)

    assert most == len(grid.open_hospitals) == 4
    rounds = federation.events("round", "simulated")
    assert [len(event["answered"]) for event in rounds] == [4] * 4
    assert not federation.events("left-out", "simulated")
    assert not federation.events("attempt-failed", "simulated")
    for name in federation.names:
        asked = [(event["round"], 1) for event in rounds if name in event["answered"]]
        assert federation.charges(name) == asked
        assert [entry.kind for entry in federation.ledger(name)].count("plan-approved") == 1


def test_a_reply_is_computed_when_it_is_pulled(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reply at a time exists: a push computes nothing, and each pull computes one."""
    asked: list[str] = []
    grid = grid_of(federation)

    def answer(name: str, message: Message) -> Message:
        asked.append(name)
        return message

    monkeypatch.setattr(grid, "call", answer)
    bodies = {100 + number: (StudyEnd(study="a", plan_digest="a" * 64), None) for number in range(3)}

    keys = list(grid.push_messages(request_all(bodies, group_id="", ttl_s=1.0)))
    assert not asked
    for number, key in enumerate(keys, 1):
        assert len(list(grid.pull_messages([key]))) == 1
        assert len(asked) == number
    assert not list(grid.pull_messages(keys))


def test_requests_with_the_same_vector_share_one_copy(federation: Federation) -> None:
    """A hundred hospitals get a hundred messages and one model; each message still holds the vector's numbers."""
    vector = np.arange(5, dtype=np.float32)
    delivery = Delivery.model_construct(context=b"", commitments=(), sealed={})
    bodies = {number: (TrainRequest.model_construct(delivery=delivery), vector) for number in range(100, 103)}

    sent = [message.content.array_records["vector"]["vector"] for message in _requests(bodies)]

    assert all(array.data is sent[0].data for array in sent)
    np.testing.assert_array_equal(np.frombuffer(sent[2].data, np.float32), vector)


def _requests(bodies: Any) -> Iterable[Message]:
    return request_all(bodies, group_id="1", ttl_s=1.0)


class Answering(FewOpenGrid):
    """A grid whose hospitals answer anything with a vector of a megabyte."""

    def call(self, name: str, message: Message) -> Message:
        """Whatever was asked."""
        receipt = Receipt(
            entry_hash="a" * 64, chain_head="a" * 64, mechanism={}, charges=1, epsilon_filter=0.1, signature="0" * 128
        )
        message.metadata.message_type = "train.round"
        body = Update(study="a", round=1, attempt=1, context="a" * 64, receipt=receipt)
        return reply(body, np.ones(250_000, np.uint32), to=message)


def test_the_coordinator_keeps_no_vector_it_has_read(federation: Federation) -> None:
    """Thirty answers of a megabyte never need five, also while Python's garbage collector does not look."""
    names = [f"hospital-{number}" for number in range(30)]
    gather = Gather(Answering({name: Path() for name in names}), frozenset(names))
    requests = dict.fromkeys(names, (StudyEnd(study="a", plan_digest="a" * 64), None))

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        sums = [int(answer.vector.sum()) for answer in gather.ask(requests, group="1", deadline_s=60) if answer.vector is not None]  # fmt: skip  # noqa: E501 - one line is what is measured
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()

    assert sums == [250_000] * 30
    assert peak < 5_000_000


# From keys to model


def test_made_up_hospitals_finish_a_study(tmp_path: Path) -> None:
    """Model, card and result are there; every ledger verifies and says what the result says."""
    report = simulate(options(tmp_path, json_file=tmp_path / "report.json"))

    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    assert (report["rounds_completed"], report["engine"]) == (2, "in-process Grid")
    assert len(report["round_seconds"]) == 2
    assert report["secure_aggregation"]["enabled"] is True
    assert Path(report["card"]).exists()
    assert np.isfinite(parameters(tmp_path / "run" / "study")).all()
    for name, ledger in report["ledgers"].items():
        assert verify_ledger(Path(ledger)).entries
        charges = [entry for entry in read_ledger(Path(ledger)) if entry.kind == "charge"]
        assert len(charges) == report["hospitals"][name]["rounds"] == 2
    assert not client.app._hospitals


def test_images_are_trained_on(tmp_path: Path) -> None:
    """The trial task with images goes from made-up pictures to a model."""
    plan = changed(
        example_plan("breast-cancer", 3),
        task="trial-images",
        network={"name": "cnn", "channels": [4]},
        rounds=1,
        training={"steps": 2},
        privacy={"sample_rate": 0.2, "noise_multiplier": 23.346},
    )

    report = simulate(options(tmp_path, plan))

    assert report["rounds_completed"] == 1


def test_the_records_of_an_example_are_taken_by_its_own_word(tmp_path: Path) -> None:
    """``example`` writes folders that are no hospital's; its ``example.json`` says which are, and how large."""
    example = write_example("breast-cancer", tmp_path / "data", hospitals=4, seed=0)
    (tmp_path / "data").rename(tmp_path / "moved")

    found = hospitals_in(tmp_path / "moved", None)

    assert [h.name for h in found] == [h.name for h in example.hospitals]
    assert [h.public_size for h in found] == [h.public_size for h in example.hospitals]
    assert all((h.folder / "manifest.toml").exists() for h in found)
    assert {h.public_size for h in hospitals_in(tmp_path / "moved", 50)} == {50}


@pytest.mark.parametrize("task", [BREAST_CANCER, HEART_DISEASE, TRIAL_IMAGES], ids=lambda task: task.name)
def test_made_up_records_fit_their_task(tmp_path: Path, task: Task) -> None:
    """Hospitals' own reader accepts them, also where a class is missing."""
    from client.records.report import summarise

    for hospital in write_made_up(task, tmp_path, hospitals=3, patients=7, seed=1):
        summary = summarise(hospital.folder)
        assert summary.parts["training"][:2] == (7, 7)
        assert hospital.public_size == 10


# What is refused, before anything is made


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hospitals": 2}, "2 hospitals are too few"),
        ({"hospitals": None}, "0 hospitals are too few"),
        ({"records": Path("/nowhere")}, "there is no folder"),
        ({"plan": Path("/nowhere.toml")}, "nowhere.toml"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    """Too few hospitals, no records, no plan: said before a folder is made."""
    chosen = options(tmp_path, **changes)

    with pytest.raises(ConfigError, match=text):
        simulate(chosen)

    assert not chosen.folder.exists()


def test_a_folder_in_use_is_never_written_into(tmp_path: Path) -> None:
    """What is there stays as it is."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").touch()

    with pytest.raises(ConfigError, match="exists already"):
        simulate(options(tmp_path))

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_folders_of_records_need_a_size_and_names_that_hospitals_can_have(tmp_path: Path) -> None:
    """Each error says what to mend."""
    with pytest.raises(ConfigError, match="holds no hospital"):
        hospitals_in(tmp_path, 30)
    write_made_up(BREAST_CANCER, tmp_path, hospitals=3, patients=5, seed=0)
    with pytest.raises(ConfigError, match="nobody has declared"):
        hospitals_in(tmp_path, None)
    assert len(hospitals_in(tmp_path, 30)) == 3
    (tmp_path / "hospital-3").rename(tmp_path / "St. Elsewhere")
    with pytest.raises(ConfigError, match=r"cannot be called 'St\. Elsewhere'"):
        hospitals_in(tmp_path, 30)


def test_without_the_hospitals_software_it_says_what_to_install() -> None:
    """A coordinator's own installation has no Opacus: the hint names the extra."""
    with pytest.raises(ConfigError, match="not installed here") as caught:
        hospital_app("client.no_such_app")
    assert "konsil[hospital]" in caught.value.hint


def test_the_command_prints_a_line_for_each_round(tmp_path: Path) -> None:
    """A person sees that it goes on, and where the model lies."""
    chosen = options(tmp_path)

    said = CliRunner().invoke(
        command, ["simulate", str(chosen.plan), "--hospitals", "3", "--patients", "20", "--folder", str(chosen.folder)]
    )

    assert said.exit_code == 0, said.output
    assert "round 1/2: 3 of 3 hospitals" in said.output
    assert "model.safetensors" in said.output
