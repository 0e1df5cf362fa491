"""Token ids: the same on every machine, for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.tokens import encode, token, words

KNOWN = [7205, 1747, 5388]  # of "fever", "000" and "müller" among 8192


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BP 120/80, T 37.5\N{DEGREE SIGN}C", ["bp", "000", "00", "t", "00.0", "c"]),
        ("M\N{LATIN SMALL LETTER U WITH DIAERESIS}ller's SIGN", ["müller", "s", "sign"]),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}\N{LATIN SMALL LIGATURE FI}", ["afi"]),
        ("x_1", ["x", "0"]),
        ("... --- 1,000", ["0,000"]),
        ("", []),
    ],
)
def test_words_are_letters_in_lower_case_or_the_shape_of_a_number(text: str, expected: list[str]) -> None:
    """Values of numbers are not in the tokens: a record number is only so many digits."""
    assert words(text) == expected


def test_known_answers() -> None:
    """Another id for a word would make two hospitals' models disagree: these never change."""
    assert [token(word, vocabulary=8192) for word in ("fever", "000", "müller")] == KNOWN
    assert encode("Fever 123", vocabulary=8192, length=4).tolist() == [*KNOWN[:2], 0, 0]


@given(text=st.text(max_size=50), vocabulary=st.integers(2, 10_000), length=st.integers(1, 20))
def test_ids_are_inside_the_vocabulary_and_padding_is_at_the_end(text: str, vocabulary: int, length: int) -> None:
    """Any text at all, lone surrogates included."""
    ids = encode(text, vocabulary=vocabulary, length=length)

    used = min(len(words(text)), length)
    assert ids.shape == (length,)
    assert ids.dtype == np.int64
    assert ((ids[:used] >= 1) & (ids[:used] < vocabulary)).all()
    assert not ids[used:].any()


def test_words_spread_over_the_vocabulary() -> None:
    """10,000 words in 64 ids: chi squared of 62 degrees of freedom stays below its 1 - 1e-6 quantile, 129."""
    counts = np.bincount([token(f"word{number}", vocabulary=64) for number in range(10_000)], minlength=64)[1:]

    expected = 10_000 / 63
    assert ((counts - expected) ** 2 / expected).sum() < 129
