"""The line on notes, whole, with a tiny encoder and made-up notes in place of MiniLM and MTSamples."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from lines import mtsamples
from medicine import TARGETS

from server.demo import plan_text
from shared_models.encoding import NULL_COORDINATES
from shared_models.plan import read_plan
from tests.federation import changed
from tests.rounds.test_other_records import WORDS
from tests.tiny_bases import write_encoder

NAMES = {"urology": "Urology", "ophthalmology": "Ophthalmology"}
TYPES = ("Surgery", "Consult - History and Phy.", "Radiology", "Letters")


def write_notes(file: Path) -> None:
    """Ten notes of each kind and specialty, in the columns of MTSamples."""
    rng = np.random.default_rng(0)
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["note_id", "specialty", "label", "note_type", "text"])
        for number in range(80):
            specialty = list(WORDS)[number % 2]
            text = " ".join(rng.choice(WORDS[specialty].split(), 8))
            writer.writerow([number, NAMES[specialty], number % 2, TYPES[number // 20], text])


def test_the_line_on_notes_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Federated, pooled, each kind of note alone, and a private study: every figure has its spread, and targets theirs.

    Two classes of eight that are easy to tell apart have a macro-F1 of a half by chance.
    """
    write_notes(tmp_path / "mtsamples8" / "mtsamples8.csv.gz")
    encoder = write_encoder(tmp_path / "encoder")
    monkeypatch.setattr(mtsamples, "encoder_folder", lambda: tmp_path / "encoder")
    for place, privacy in (
        ("PLAN", {"sample_rate": 0.5}),
        ("PRIVATE", {"sample_rate": 0.5, "noise_multiplier": 2.0, "clip": 0.5, "delta": 1e-3}),
    ):
        plan = changed(
            read_plan(getattr(mtsamples, place)), rounds=3, weight_cap=20, deadline_s=60.0,
            network={"base": encoder, "length": 12, "rank": 2, "alpha": 4.0},
            training={"steps": 8, "learning_rate": 0.3}, privacy={**privacy, "epsilon": 200.0},
        )  # fmt: skip
        (tmp_path / f"{place}.toml").write_text(plan_text(plan), encoding="utf-8")
        monkeypatch.setattr(mtsamples, place, tmp_path / f"{place}.toml")

    figures = mtsamples.measure(tmp_path, 1)

    wanted = {target.figure for target in TARGETS if target.figure.startswith("mtsamples")}
    alone = {f"mtsamples_f1_{name}_alone" for name in ("surgery", "consult", "radiology", "other")}
    assert wanted | alone | {"mtsamples_f1_pooled", "mtsamples_epsilon"} <= set(figures)
    assert all(figures[f"{name}_sd"] == 0 for name in figures if f"{name}_sd" in figures)
    assert figures["mtsamples_f1"] > 0.7
    assert 0 <= figures["mtsamples_f1_pooled"] <= 1
    assert 0 < figures["mtsamples_epsilon"] <= 200
    trained = 2 * 2 * 2 * 2 * 16 + 16 * 8 + 8
    assert figures["mtsamples_trained_parameters"] == trained
    assert figures["mtsamples_bytes_fraction"] < (trained + NULL_COORDINATES) / (trained + NULL_COORDINATES + 5000)
