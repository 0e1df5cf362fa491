"""The generator of sampling and noise."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]  # scipy ships no types

from client.dp_sgd import add_noise, normal_from
from client.randomness import SecureRandom, require_system_key
from shared_models.errors import ConfigError
from tests.client.made_up import repeatable


def test_uniforms_are_the_aes_keystream() -> None:
    """Each uniform is the upper 53 bits of 8 bytes of AES-256-CTR, recomputed here block by block."""
    key = bytes(range(32))
    blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305  # the bare block cipher, fed with counters

    uniforms = SecureRandom.for_tests(key).uniform(6)

    stream = b"".join(blocks.update(counter.to_bytes(16, "big")) for counter in range(3))
    words = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, 48, 8)]
    assert uniforms.tolist() == [(word >> 11) / 2**53 for word in words]


def test_uniforms_are_uniform() -> None:
    """They lie in [0, 1) and pass a Kolmogorov-Smirnov test."""
    uniforms = repeatable().uniform(200_000)

    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert stats.kstest(uniforms, "uniform").pvalue > 0.001


def test_gaussians_are_standard_normal_and_independent() -> None:
    """They pass a Kolmogorov-Smirnov test, and neither neighbours nor the two halves of a pair are correlated."""
    n = 1 << 18
    normal = repeatable(1).gaussian(n)

    assert stats.kstest(normal, "norm").pvalue > 0.001
    for lag in (1, 1 << 13, 1 << 14):  # a pair's halves lie up to 2**14 apart
        assert abs(np.mean(normal[lag:] * normal[:-lag])) < 5 / np.sqrt(n - lag)
        assert abs(np.mean(normal[lag:] ** 2 * normal[:-lag] ** 2) - 1) < 5 * np.sqrt(8 / (n - lag))


@pytest.mark.parametrize("n", [0, 1, 2, 7, (1 << 15) + 1])
def test_any_number_of_gaussians_can_be_drawn(n: int) -> None:
    """Odd numbers, none, and one past a chunk."""
    normal = repeatable().gaussian(n)

    assert normal.shape == (n,)
    assert normal.dtype == np.float64
    assert len(np.unique(normal)) == n


@pytest.mark.parametrize("word", [0.0, 1 - 2.0**-53])
def test_the_extreme_uniforms_give_finite_noise(word: float) -> None:
    """Neither end of [0, 1) meets the logarithm's pole; the largest noise is 8.57 standard deviations."""

    class Extreme(SecureRandom):
        def uniform(self, n: int) -> NDArray[np.float64]:
            return np.full(n, word)

    normal = Extreme(bytes(32)).gaussian(2)

    assert np.isfinite(normal).all()
    assert np.abs(normal).max() <= 8.58


def test_two_hospitals_never_share_a_stream() -> None:
    """Two system generators differ although torch, numpy and Python are seeded alike."""
    streams = []
    for _ in range(2):
        torch.manual_seed(0)
        streams.append(SecureRandom.from_system().gaussian(1000))

    # Independent: the mean of 1000 products has standard deviation 1/sqrt(1000); 7 of them is beyond 1e-10.
    assert abs(np.mean(streams[0] * streams[1])) < 7 / np.sqrt(1000)


def test_torch_seeds_neither_change_the_stream_nor_are_changed() -> None:
    """The generator and torch's global one know nothing of each other."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = repeatable().gaussian(1001)
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(2)
    np.testing.assert_array_equal(repeatable().gaussian(1001), first)


def test_the_key_cannot_be_read_copied_or_stored() -> None:
    """No attribute or text holds it, and a copy that would repeat the stream cannot be made."""
    key = b"a key of exactly thirty-two byte"
    random = SecureRandom.for_tests(key)

    assert repr(random) == "SecureRandom(keyed_by_system=False)"
    assert key not in [value for value in vars(random).values() if isinstance(value, bytes)]
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(random)


def test_a_forked_process_cannot_repeat_its_parents_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork would carry the stream's position along; the owner's process id is checked at every draw."""
    random = SecureRandom.from_system()
    child = os.getpid() + 1
    monkeypatch.setattr("client.randomness.os.getpid", lambda: child)

    with pytest.raises(ConfigError, match="forked"):
        random.gaussian(1)


def test_production_refuses_a_repeatable_generator() -> None:
    """Only tests may know the noise."""
    require_system_key(SecureRandom.from_system(), allow_test_random=False)
    require_system_key(repeatable(), allow_test_random=True)
    with pytest.raises(ConfigError, match="operating system"):
        require_system_key(repeatable(), allow_test_random=False)


def test_a_short_key_is_refused() -> None:
    """AES would accept 16 bytes and quietly be AES-128."""
    with pytest.raises(ConfigError):
        SecureRandom.for_tests(bytes(16))


def test_a_gpu_s_arithmetic_makes_normal_numbers_of_uniform_ones() -> None:
    """Box and Muller's formula, term for term; the least and the greatest uniform number included."""
    uniform = np.concatenate([[0.0, 1 - 2**-53, 0.25], repeatable().uniform(200_001)])
    first, second = uniform[:100_002], uniform[100_002:]
    radius = np.sqrt(-2 * np.log(1 - first))

    made = normal_from(torch.from_numpy(uniform)).numpy()

    wanted = np.concatenate([radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)])
    assert np.isfinite(made).all()
    assert np.abs(made - wanted).max() < 1e-13
    assert stats.kstest(made[3:100_002], "norm").pvalue > 0.001
    assert abs(np.corrcoef(made[3:100_002], made[100_005:])[0, 1]) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [1, 2, 100_001])
def test_a_gpu_adds_noise_to_every_coordinate(size: int) -> None:
    """As many numbers as coordinates, odd or even, of the deviation asked for."""
    total = torch.zeros(size, dtype=torch.float64, device="cuda")

    noisy = add_noise(total, standard_deviation=3.0, random=repeatable()).cpu().numpy()

    assert (noisy != 0).all()
    if size > 2:
        assert stats.kstest(noisy / 3, "norm").pvalue > 0.001
