"""Validation statistics are off by default; where a plan releases them they are noised and paid for."""

from pathlib import Path

import tomli_w

from shared_models.config import read_toml
from shared_models.privacy.mechanisms import GaussianRelease, filter_epsilon, total_divergence
from tests.federation import Federation, make_federation

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
