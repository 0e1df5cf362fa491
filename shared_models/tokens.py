"""Texts to token ids by a hashing vocabulary: the same at every hospital, and nothing is learnt from anybody's texts.

A vocabulary that is counted from the records would be one more release, and a rare word in it (a name) would show whose
texts were counted. Here the id of a word is a hash of the word, so the vocabulary is public before anybody has a text.
"""

import hashlib
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

PADDING = 0
_WORD = re.compile(r"[^\W\d_]+|\d+(?:[.,]\d+)*")
_DIGIT = re.compile(r"\d")


def words(text: str) -> list[str]:
    """Words of a text: letters in lower case, and of a number only how it is written, each digit a 0.

    Numbers are blurred because they are what identifies: dates, telephone and record numbers. ``120.5`` is ``000.0``,
    so their size is left and their value is not.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [_DIGIT.sub("0", word) for word in _WORD.findall(plain)]


def blurred(text: str) -> str:
    """A text with each digit a 0, for a tokenizer that somebody else trained and that wants sentences."""
    return _DIGIT.sub("0", unicodedata.normalize("NFKC", text))


def token(word: str, *, vocabulary: int) -> int:
    """The id of a word, from 1 to ``vocabulary - 1``.

    Guarantees:
        * It depends on the word and the vocabulary's size alone: not on the machine, nor on any other text.
        * Two words share an id with probability ``1 / (vocabulary - 1)``.

    Source:
        Weinberger et al. 2009, the hashing trick; BLAKE2b, so that no list of words was needed to choose the function.
    """
    digest = hashlib.blake2b(word.encode(), digest_size=8, person=b"konsil-tokens-1 ").digest()
    return 1 + int.from_bytes(digest) % (vocabulary - 1)


def encode(text: str, *, vocabulary: int, length: int) -> NDArray[np.int64]:
    """Token ids of a text's first ``length`` words, shape ``(length,)``, padded with 0 at the end.

    Args:
        text: Any text.
        vocabulary: Number of ids, padding included; at least 2.
        length: Number of positions.
    """
    ids = [token(word, vocabulary=vocabulary) for word in words(text)[:length]]
    return np.array(ids + [PADDING] * (length - len(ids)), dtype=np.int64)
