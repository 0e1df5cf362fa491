"""What older peers, older ledgers and auditors rely on has not changed."""

import json

import pytest

from tests.vectors.regenerate import FILE, known_answers

COMMITTED = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(COMMITTED))
def test_it_is_what_it_was(name: str) -> None:
    """Digests, signatures, records and random streams to the bit; figures of accounting to the last digits."""
    now = json.loads(json.dumps(known_answers()[name]))

    if isinstance(COMMITTED[name], float):
        assert now == pytest.approx(COMMITTED[name], rel=1e-12)
    elif name in {"renyi_divergence", "metrics"}:
        assert now == {key: pytest.approx(value, rel=1e-12) for key, value in COMMITTED[name].items()}
    else:
        assert now == COMMITTED[name]


def test_nothing_is_missing() -> None:
    """Every vector that the script makes is committed."""
    assert set(known_answers()) == set(COMMITTED)
