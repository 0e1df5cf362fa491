"""What every test shares: nothing of a hospital stays open from one test to the next."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.federation import Federation, make_federation, restart_hospitals


@pytest.fixture(autouse=True)
def _close_hospitals() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    restart_hospitals()


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Four hospitals, three rounds of the default study."""
    return make_federation(tmp_path, rounds=3)
