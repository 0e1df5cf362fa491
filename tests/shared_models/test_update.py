"""Update: model <-> vector <-> file without losing a bit, and nothing half-done when a peer or a disk is wrong."""

import hashlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from shared_models.errors import ConfigError, ProtocolError
from shared_models.nets.tabular import mlp
from shared_models.plan import PrivacyPlan, TrainingPlan
from shared_models.update import (
    bound_update,
    check_vector,
    load_model,
    parameters_to_vector,
    save_model,
    update_bound,
    vector_digest,
    vector_to_parameters,
)

SIZE = 4 * 3 + 3 + 3 * 2 + 2
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = arrays(np.float32, SIZE, elements=FINITE)


def _model() -> nn.Module:
    return mlp(4, (3,), 2)


@given(vector=VECTORS)
def test_a_vector_survives_the_model_to_the_bit(vector: NDArray[np.float32]) -> None:
    """Minus zero and subnormal numbers included: digests are taken over these bytes."""
    model = _model()

    vector_to_parameters(vector, model)

    assert parameters_to_vector(model).tobytes() == vector.tobytes()


def test_the_order_is_that_of_the_named_parameters() -> None:
    """Masks and averages are taken entry by entry, so both sides must mean the same entry."""
    model = _model()

    vector_to_parameters(np.arange(SIZE, dtype=np.float32), model)

    starts = {name: float(parameter.detach().flatten()[0]) for name, parameter in model.named_parameters()}
    assert starts == {"0.weight": 0.0, "0.bias": 12.0, "2.weight": 15.0, "2.bias": 21.0}


def test_a_vector_is_a_copy_in_both_directions() -> None:
    """The global parameters are kept while training changes the model; a received message is read-only memory."""
    model = _model()
    received = np.frombuffer(np.ones(SIZE, dtype=np.float32).tobytes(), dtype=np.float32)

    vector_to_parameters(received, model)
    before = parameters_to_vector(model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)

    assert (before == 1).all()
    assert (received == 1).all()


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (np.zeros(SIZE - 1, dtype=np.float32), "shape"),
        (np.zeros((1, SIZE), dtype=np.float32), "shape"),
        (np.zeros(SIZE), "float64, not float32"),
        (np.zeros(SIZE, dtype=">f4"), "not float32"),
        (np.zeros(SIZE, dtype=np.int32), "not float32"),
        ([0.0] * SIZE, "list, not float32"),
        (np.full(SIZE, np.nan, dtype=np.float32), "23 of the vector's 23 numbers are NaN or infinite"),
        (np.append(np.zeros(SIZE - 1), np.inf).astype(np.float32), "1 of the vector's 23 numbers"),
    ],
)
def test_a_peers_broken_vector_is_refused_and_nothing_changes(sent: NDArray[np.float32], complaint: str) -> None:
    """Refused before the first parameter is written."""
    model = _model()
    before = parameters_to_vector(model)

    with pytest.raises(ProtocolError, match=complaint):
        vector_to_parameters(sent, model)

    assert (parameters_to_vector(model) == before).all()


@given(vector=VECTORS, position=st.integers(0, SIZE - 1), other=FINITE)
def test_the_digest_names_the_bytes(vector: NDArray[np.float32], position: int, other: float) -> None:
    """It is SHA-256 over little-endian float32, and any other number changes it."""
    changed = vector.copy()
    changed[position] = other
    assume(changed.tobytes() != vector.tobytes())

    assert vector_digest(vector) == hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()
    assert vector_digest(vector[::-1][::-1].astype(">f4")) == vector_digest(vector)
    assert vector_digest(changed) != vector_digest(vector)


@settings(max_examples=200)
@given(
    update=arrays(np.float64, st.integers(1, 30), elements=st.floats(allow_nan=False, allow_infinity=False)),
    limit=st.floats(1e-6, 1e6),
)
def test_a_bounded_update_is_no_longer_than_the_limit(update: NDArray[np.float64], limit: float) -> None:
    """Also where squares overflow or vanish; within the limit not a bit changes, beyond it the direction stays."""
    bounded = bound_update(update, limit)

    norm = math.hypot(*bounded)
    assert norm <= limit * (1 + 1e-12)
    if math.hypot(*update) <= limit * (1 - 1e-12):
        assert bounded.tobytes() == update.tobytes()
    elif math.hypot(*update) > limit * (1 + 1e-12):
        assert norm == pytest.approx(limit)
        largest = np.abs(update).max()
        np.testing.assert_allclose(bounded / np.abs(bounded).max(), update / largest, rtol=1e-9, atol=1e-12)


def test_a_bound_is_taken_in_float64() -> None:
    """Thousands of float32 squares would lose the last digits of the norm."""
    bounded = bound_update(np.full(100_000, 0.1, dtype=np.float32), 1.0)

    assert bounded.dtype == np.float64
    assert np.linalg.norm(bounded) == pytest.approx(1.0, rel=1e-12)


def test_an_update_that_is_not_finite_or_a_limit_that_is_none_is_refused() -> None:
    """A NaN would pass every comparison with the limit."""
    with pytest.raises(ProtocolError, match="NaN or infinite"):
        bound_update(np.array([0.0, np.nan]), 1.0)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="is not positive"):
            bound_update(np.zeros(2), limit)


def _plans(noise_multiplier: float) -> tuple[TrainingPlan, PrivacyPlan]:
    privacy = PrivacyPlan(clip=0.5, noise_multiplier=noise_multiplier, sample_rate=0.1, epsilon=1.0, delta=1e-5)
    return TrainingPlan(learning_rate=0.1, steps=20), privacy


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sigma=st.floats(0.3, 5.0), length=st.sampled_from([10, 1000]))
def test_an_honest_update_stays_below_its_bound(seed: int, sigma: float, length: int) -> None:
    """Even where every drawn patient pulls the same way with full strength, and the draws vary."""
    rng = np.random.default_rng(seed)
    training, privacy = _plans(sigma)
    expected_batch = 50.0

    drawn = rng.binomial(500, privacy.sample_rate, size=training.steps)
    gradients = np.outer(drawn * privacy.clip, np.eye(length)[0])
    noise = rng.normal(scale=sigma * privacy.clip, size=gradients.shape)
    update = training.learning_rate * ((gradients + noise) / expected_batch).sum(axis=0)

    limit = update_bound(training=training, privacy=privacy, parameters=length, expected_batch=expected_batch)
    assert np.linalg.norm(update) <= limit
    assert limit == 1.5 * 20 * 0.1 * (0.5 + sigma * 0.5 * math.sqrt(length) / 50)


@pytest.mark.parametrize("expected_batch", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_needs_a_batch(expected_batch: float) -> None:
    """An infinite or NaN bound would bind nothing."""
    training, privacy = _plans(1.0)

    with pytest.raises(ConfigError, match="expected batch"):
        update_bound(training=training, privacy=privacy, parameters=3, expected_batch=expected_batch)


@settings(max_examples=30, deadline=None)
@given(vector=VECTORS, metadata=st.dictionaries(st.text(), st.text(), max_size=4))
def test_a_model_survives_the_file_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, vector: NDArray[np.float32], metadata: dict[str, str]
) -> None:
    """Parameters and metadata, whatever text it holds; no temporary file stays."""
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    saved, loaded = _model(), _model()
    vector_to_parameters(vector, saved)

    save_model(path, saved, metadata)

    assert load_model(path, loaded) == metadata
    assert parameters_to_vector(loaded).tobytes() == vector.tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


@given(metadata=st.dictionaries(st.text(), st.text(), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_equal_models_are_equal_files(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str]) -> None:
    """Two coordinators that saved the same model can compare digests of files."""
    folder, model = tmp_path_factory.mktemp("models"), _model()

    save_model(folder / "one", model, metadata)
    save_model(folder / "two", model, dict(reversed(metadata.items())))

    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


def test_a_model_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    """The path is taken by a folder, or lies in none: a named error, no temporary file."""
    (tmp_path / "taken").mkdir()

    for path in (tmp_path / "taken", tmp_path / "missing" / "model.safetensors"):
        with pytest.raises(ConfigError, match="cannot be written"):
            save_model(path, _model(), {})

    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


WRITER = """
import sys, torch
from pathlib import Path
from shared_models.nets.tabular import mlp
from shared_models.update import save_model
torch.set_num_threads(1)
model = mlp(200, (200,), 2)
for turn in range(100_000):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, turn)
    save_model(Path(sys.argv[1]), model, {"turn": str(turn)})
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    """SIGKILL in the middle of saving over and over: the file at the path is always one model, complete."""
    path = tmp_path / "model.safetensors"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()

    loaded = mlp(200, (200,), 2)
    turn = float(load_model(path, loaded)["turn"])

    assert (parameters_to_vector(loaded) == turn).all()


def _without_a_tensor(path: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 4)}, path)


def _with_another_shape(path: Path) -> None:
    save_model(path, mlp(4, (5,), 2), {})


def _with_nan(path: Path) -> None:
    broken = _model()
    nn.init.constant_(next(broken.parameters()), math.nan)
    save_model(path, broken, {})


def _with_doubles(path: Path) -> None:
    save_model(path, _model().double(), {})


def _cut_short(path: Path) -> None:
    save_model(path, _model(), {})
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_without_a_tensor, r"parameters \['0.bias', '2.bias', '2.weight'\] are in only one of the two"),
        (_with_another_shape, "is torch.float32 of shape"),
        (_with_nan, "parameter 0.weight holds NaN or infinite numbers"),
        (_with_doubles, "is torch.float64 of shape"),
        (_cut_short, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("not a model, but longer than a header"), "cannot be read"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda _: None, "does not exist"),
    ],
)
def test_a_damaged_or_foreign_model_file_is_refused_and_nothing_changes(
    tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    """The message names the file and what is wrong; the model stays as it was."""
    path, model = tmp_path / "model.safetensors", _model()
    before = parameters_to_vector(model)
    damage(path)

    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_model(path, model)

    assert str(path) in str(refusal.value)
    assert (parameters_to_vector(model) == before).all()


def test_check_vector_accepts_what_is_right() -> None:
    """The other tests show what it refuses."""
    check_vector(np.zeros(3, dtype=np.float32), 3)
