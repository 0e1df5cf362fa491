"""Hospitals with this version and with an older one still agree on every mask."""

import json

import pytest

from tests.vectors.regenerate_secagg import FILE, known_answers

COMMITTED = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(COMMITTED))
def test_it_is_what_it_was(name: str) -> None:
    """To the bit: keys, shares, keystreams, a whole round with a drop-out, and its transcript."""
    assert json.loads(json.dumps(known_answers()[name])) == COMMITTED[name]


def test_nothing_is_missing() -> None:
    """Every vector that the script makes is committed."""
    assert set(known_answers()) == set(COMMITTED)


def test_the_round_adds_up() -> None:
    """North, south and west sent 0..5 times the length of their names: 5 + 5 + 4."""
    assert COMMITTED["round"]["total"] == [14 * i for i in range(6)]
