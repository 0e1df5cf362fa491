"""Studies on top of a pretrained base: every hospital has its own copy, and only what was trained ever leaves."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from rich.console import Console

import client.app
from client.alone import evaluate_folder
from client.books import Books
from client.disclosure import disclose, in_words
from server.demo import plan_text
from server.examples import Example, ExampleHospital
from server.simulate import Options, run_simulation
from shared_models.config import read_toml
from shared_models.encoding import NULL_COORDINATES
from shared_models.errors import DropoutError, FederationError, PretrainedError
from shared_models.model_file import read_about, read_model
from shared_models.nets.build import count_parameters
from shared_models.plan import StudyPlan
from shared_models.pretrained import Encoder, find_base, offer_bases
from shared_models.tasks import task_of
from shared_models.update import parameters_to_vector, trainable
from tests.federation import Federation, changed, make_federation
from tests.rounds.test_other_records import write_manifest, write_notes, write_pictures
from tests.tiny_bases import image_plan, text_plan, write_body, write_encoder

PATIENTS = 40
ROUNDS = 3
HOSPITALS = ("hospital-1", "hospital-2", "hospital-3")


def lay_out(folder: Path, plan: StudyPlan, copies: dict[str, Path]) -> Federation:
    """Three hospitals and a test part, on made-up notes or pictures; each hospital knows its copy of the base."""
    folders = {name: folder / "data" / name for name in (*HOSPITALS, "test")}
    for seed, (name, place) in enumerate(folders.items()):
        place.mkdir(parents=True)
        writer = write_notes if plan.task == "note-specialty" else write_pictures
        write_manifest(place, **writer(place, name, np.arange(PATIENTS) // 2 % 2, np.random.default_rng(seed)))
    hospitals = tuple(ExampleHospital(name=name, folder=folders[name], public_size=PATIENTS) for name in HOSPITALS)
    example = Example(plan=plan, hospitals=hospitals, pooled=folder, test=folders["test"], split="made up")
    federation = make_federation(
        folder, plan, example=example, study="pretrained", rounds=ROUNDS, minimum_hospitals=3, deadline_s=5.0,
        training={"learning_rate": 0.2, "steps": 8},
        privacy={"clip": 2.0, "noise_multiplier": 0.2, "sample_rate": 0.5, "epsilon": 10000.0, "delta": 1e-3},
    )  # fmt: skip
    offer_bases({plan.network.base: copies["hospital-1"]})  # type: ignore[union-attr]  # the coordinator's own
    for name, copy in copies.items():
        know(federation, name, {plan.network.base: str(copy)})  # type: ignore[union-attr]  # these networks have one
    return federation


def know(federation: Federation, hospital: str, copies: dict[str, str]) -> None:
    """Write a hospital's copies into its settings."""
    path = federation.settings_file(hospital)
    path.write_text(tomli_w.dumps(read_toml(path, "settings file") | {"pretrained": copies}), encoding="utf-8")


def records_kept(federation: Federation, hospital: str) -> list[int]:
    """Of how many records a hospital's studies hold what the frozen part gave."""
    settings = str(federation.settings_file(hospital))
    opened = client.app._hospitals.get(settings)
    return [len(study.model.kept) for study in opened._studies.values()] if opened else []  # type: ignore[arg-type]


@pytest.fixture
def text(tmp_path: Path) -> tuple[StudyPlan, dict[str, Path]]:
    """A plan on notes, and a copy of its base for each hospital, at a place of its own."""
    copies = {name: tmp_path / "bases" / name for name in HOSPITALS}
    digests = {write_encoder(copy) for copy in copies.values()}
    assert len(digests) == 1
    return text_plan(*digests), copies


def test_a_study_on_texts_moves_adapters_and_head_alone(
    tmp_path: Path, text: tuple[StudyPlan, dict[str, Path]]
) -> None:
    """Three hospitals finish it, the model tells the classes apart, and no byte of the base crosses the wire."""
    plan, copies = text
    federation = lay_out(tmp_path, plan, copies)
    kept = list[int]()
    federation.wire.on_request = lambda name, _: kept.extend(records_kept(federation, name))

    folder = federation.run()

    found, model = read_model(folder / "model.safetensors")
    length = count_parameters(plan.network, task_of(plan))
    base = find_base(plan.network.base)  # type: ignore[union-attr]  # it has one
    assert isinstance(base, Encoder)
    assert [event["answered"] for event in federation.events("round")] == [list(HOSPITALS)] * ROUNDS
    assert federation.events("started")[0]["parameters"] == length == len(parameters_to_vector(model))
    assert read_about(folder / "model.safetensors")["base"] == found.network.base  # type: ignore[union-attr]
    assert evaluate_folder(folder / "model.safetensors", federation.example.test)["auroc"] > 0.9
    everything = b"".join(wire for _, _, wire in federation.wire.trace)
    weights = {name: tensor.numpy().tobytes() for name, tensor in base.tensors.items() if "lora" not in name}
    for name, content in weights.items():
        assert np.frombuffer(content, np.float32).std() == 0 or content[:64] not in everything, name
    assert 0 < max(kept) <= 3 * PATIENTS  # the hospitals of this process share a network
    assert [records_kept(federation, name) for name in HOSPITALS] == [[]] * 3
    updates = [len(wire) for sender, _, wire in federation.wire.trace if sender != "coordinator"]
    assert max(updates) < 8 * (length + NULL_COORDINATES) + 5000
    assert sum(len(content) for content in weights.values()) > 10 * length


def test_a_study_on_images_trains_a_head_on_a_body_of_an_earlier_study(tmp_path: Path) -> None:
    """The earlier study's model file is the base; its convolutions stay as they are at every hospital."""
    body = tmp_path / "body.safetensors"
    plan = image_plan(write_body(body), train_norms=True)
    federation = lay_out(tmp_path, plan, dict.fromkeys(HOSPITALS, body))

    folder = federation.run()

    _, model = read_model(folder / "model.safetensors")
    assert len(federation.events("round")) == ROUNDS
    assert set(trainable(model)) == {f"blocks.{block}.1.{part}" for block in (0, 2) for part in ("weight", "bias")} | {
        "head.weight",
        "head.bias",
    }
    assert evaluate_folder(folder / "model.safetensors", federation.example.test)["auroc"] > 0.9


@pytest.mark.parametrize("wrong", ["missing", "another"])
def test_a_hospital_without_the_right_copy_refuses_and_pays_nothing(
    tmp_path: Path, text: tuple[StudyPlan, dict[str, Path]], wrong: str
) -> None:
    """Though other hospitals of this process have one: each party's own is checked, before anything is approved."""
    plan, copies = text
    federation = lay_out(tmp_path, plan, copies)
    if wrong == "missing":
        know(federation, "hospital-2", {})
    else:
        write_encoder(copies["hospital-2"], seed=1)

    with pytest.raises(FederationError) as caught:
        federation.run()

    assert "hospital-2" in str(caught.value)
    assert "pretrained" in str(caught.value)
    assert isinstance(caught.value, DropoutError)
    for name in HOSPITALS:
        assert federation.charges(name) == []
    assert [entry.kind for entry in federation.ledger("hospital-2")] == ["budget-opened"]


def test_the_steward_is_shown_the_base(tmp_path: Path, text: tuple[StudyPlan, dict[str, Path]]) -> None:
    """By digest, with how many numbers are trained and leave: not those of the base."""
    plan, copies = text
    federation = lay_out(tmp_path, plan, copies)
    settings = federation.settings("hospital-1")
    books = Books.open(settings)

    shown: dict[str, Any] = dict(in_words(disclose(settings, federation.plan, books.budget)))
    books.close()

    length = count_parameters(plan.network, task_of(plan))
    assert shown["network"].startswith(f"pretrained-encoder, {length} parameters that are trained, on the pretrained")
    assert plan.network.base in shown["network"]  # type: ignore[union-attr]  # it has one
    assert f"one noised update of {length + NULL_COORDINATES} numbers" in shown["what leaves"]


def test_a_simulation_gives_everybody_the_same_copy(tmp_path: Path) -> None:
    """With `--base` a study of made-up hospitals runs; without it nothing is begun, and nothing left behind."""
    body = tmp_path / "body.safetensors"
    plan = image_plan(write_body(body, seed=11))
    (tmp_path / "plan.toml").write_text(plan_text(changed(plan, rounds=1)), encoding="utf-8")
    options = Options(
        plan=tmp_path / "plan.toml",
        folder=tmp_path / "run",
        records=None,
        hospitals=3,
        patients=12,
        public_size=None,
        seed=0,
        threads=1,
        json_file=None,
    )

    with pytest.raises(PretrainedError, match="no copy of the pretrained base"):
        run_simulation(options, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
    report = run_simulation(replace(options, bases=(body,)), Console(file=io.StringIO()))

    assert report["rounds_completed"] == 1
    assert len(parameters_to_vector(read_model(Path(report["model"]))[1])) == 8 + 1
