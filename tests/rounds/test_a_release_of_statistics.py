"""Validation statistics are off by default; where a plan releases them they are noised and paid for."""

import math
from pathlib import Path

import pytest
import tomli_w
from flwr.app import Message
from pydantic import ValidationError

from client.app import hospital_at
from client.records.population import Source
from client.round import Hospital
from server.examples import example_plan
from server.released import read_released
from shared_models.config import read_toml
from shared_models.errors import ConfigError
from shared_models.messages import Proposal, TrainRequest
from shared_models.metrics import compute_metrics
from shared_models.plan import Fold
from shared_models.privacy.mechanisms import GaussianRelease, filter_epsilon, study_mechanisms, total_divergence
from shared_models.subgroups import EVERYBODY, release_noise, split
from shared_models.tasks import find_task
from tests.federation import Federation, changed, make_federation

EVALUATION = {"every": 2, "clip": 1.0, "noise_multiplier": 40.0, "bins": 20}


def _releasing(folder: Path) -> Federation:
    """A federation whose hospitals keep a fifth of their patients for validation, and may release statistics."""
    federation = make_federation(
        folder, rounds=4, privacy={"noise_multiplier": 40.0, "spare_charges": 0}, evaluation=EVALUATION
    )
    for hospital in federation.example.hospitals:
        manifest = hospital.folder / "manifest.toml"
        # Hospital-4 has ten patients of one class: one split in 35 puts none of them into the validation part.
        declared = {"validation_fraction": 0.3, "absent_classes": ["benign", "malignant"]}
        fields = read_toml(manifest, "manifest") | declared
        manifest.write_text(tomli_w.dumps(fields), encoding="utf-8")
    return federation


def test_by_default_nothing_is_released(federation: Federation) -> None:
    """No statistics, no charge for any."""
    federation.run()

    assert [event["metrics_released"] for event in federation.events("round")] == [None] * 3


def test_released_statistics_are_charged_at_sample_rate_one(tmp_path: Path) -> None:
    """Two releases are two charges of the Gaussian mechanism, on top of the rounds, and epsilon counts both kinds."""
    federation = _releasing(tmp_path)

    federation.run()

    released = [event["metrics_released"] for event in federation.events("round")]
    assert [figures is not None for figures in released] == [False, True, False, True]
    entries = federation.ledger("hospital-1")
    mechanisms = [entry.mechanism for entry in entries if entry.kind == "charge" and entry.mechanism]
    assert [entry.round for entry in entries if entry.kind == "release"] == [2, 4]
    assert mechanisms.count(GaussianRelease(noise_multiplier=40.0, clip=1.0)) == 2
    terms = federation.settings("hospital-1").population
    rho = total_divergence(mechanisms, terms.order)
    (finished,) = federation.events("finished")
    stated = finished["hospitals"]["hospital-1"]
    assert stated["epsilon_filter"] == filter_epsilon(rho, order=terms.order, delta=federation.plan.privacy.delta)


def test_subgroups_cost_nothing_more_and_are_kept_with_the_release(tmp_path: Path) -> None:
    """The same charges and the same epsilon as without; counts of every group lie beside the journal, as summed."""
    federation = _releasing(tmp_path)
    plain = federation.plan
    grouped = EVALUATION | {"subgroups": [{"column": "mean_radius", "edges": [12.0, 16.0]}]}
    federation.plan = changed(plain, evaluation=grouped)

    folder = federation.run()

    charged = [entry.mechanism for entry in federation.ledger("hospital-1") if entry.kind == "charge"]
    assert charged.count(GaussianRelease(noise_multiplier=40.0, clip=1.0)) == 2
    assert study_mechanisms(federation.plan, 100) == study_mechanisms(plain, 100)
    kept = read_released(folder)
    assert [(one.round, one.hospitals) for one in kept] == [(2, 4), (4, 4)]
    task, evaluation = find_task(federation.plan.task), federation.plan.evaluation
    assert evaluation is not None
    for one, event in zip(kept, federation.events("released"), strict=True):
        counts = split(task, evaluation, one.statistics)
        assert len(counts) == 4
        assert compute_metrics(2, counts[EVERYBODY], bins=20) == event["metrics"]
        # Noise of four hospitals on 40 cells, six standard deviations; the patients are fewer than 600.
        assert all(
            abs(found.sum()) < 600 + 6 * release_noise(evaluation, 4) * math.sqrt(40) for found in counts.values()
        )


def test_a_plan_whose_subgroups_the_task_does_not_have_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    """By the coordinator before it asks, and by a hospital that is asked all the same."""
    federation = _releasing(tmp_path)
    federation.plan = changed(federation.plan, evaluation=EVALUATION | {"subgroups": [{"column": "sex"}]})

    with pytest.raises(ConfigError, match="no such column"):
        federation.run()

    hospital = Hospital.open(federation.settings_file("hospital-1"))
    with pytest.raises(ConfigError, match="no such column"):
        hospital.enrol(Proposal(plan=federation.plan.model_dump(mode="json")))
    hospital.close()
    assert [entry.kind for entry in federation.ledger("hospital-1")] == ["budget-opened"]


def test_a_fold_trains_without_its_patients_and_evaluates_on_them(tmp_path: Path) -> None:
    """Whatever the manifest keeps for validation; the ledger is charged as for everybody."""
    federation = _releasing(tmp_path)
    whole = federation.plan
    federation.plan = changed(whole, fold={"index": 2, "count": 3})
    used: list[tuple[int, int]] = []

    def look(name: str, message: Message) -> None:
        if name == "hospital-1" and message.metadata.message_type == TrainRequest.action:
            hospital = hospital_at(str(federation.settings_file(name)))
            population = hospital._studies[whole.study].population
            used.append((population.training.patient_count, population.validation.patient_count))

    federation.wire.on_request = look

    federation.run()

    settings = federation.settings("hospital-1")
    parts = [Source(find_task(whole.task), fold=Fold(index=i, count=3)).current(settings) for i in range(1, 4)]
    everybody = sum(part.validation.patient_count for part in parts)
    assert used == [(everybody - parts[1].validation.patient_count, parts[1].validation.patient_count)] * whole.rounds
    spent = hospital_at(str(federation.settings_file("hospital-1"))).books.budget.spent(whole.study)
    assert len(spent) == len(study_mechanisms(whole, 100))


def test_a_fold_needs_a_release_after_its_last_round() -> None:
    """Else it would train without a part of the patients for nothing."""
    plan = example_plan("breast-cancer", 4)

    for evaluation in (None, EVALUATION | {"every": plan.rounds - 1}):
        with pytest.raises(ValidationError, match="last round"):
            changed(plan, evaluation=evaluation, fold={"index": 1, "count": 5})
