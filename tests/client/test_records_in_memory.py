"""Records in memory: which rows belong to whom."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.records.records import Records
from shared_models.errors import RecordsError
from tests.client.made_up import table_records


@given(owners=st.lists(st.integers(0, 6), min_size=1, max_size=30), seed=st.integers(0, 2**32 - 1))
def test_a_patient_is_selected_with_all_records(owners: list[int], seed: int) -> None:
    """Selecting patients gives exactly their rows, each with the position of its patient, in groups."""
    _, patients = np.unique(owners, return_inverse=True)
    records = table_records(patients)
    rng = np.random.default_rng(seed)
    wanted = rng.permutation(records.patient_count)[: rng.integers(records.patient_count + 1)]

    inputs, targets, positions = records.select(wanted)

    rows = torch.tensor([row for patient in wanted for row in np.flatnonzero(patients == patient)], dtype=torch.int64)
    assert torch.equal(inputs, records.inputs[rows])
    assert torch.equal(targets, records.targets[rows])
    np.testing.assert_array_equal(wanted[positions], patients[rows.numpy()])
    assert (np.diff(positions) >= 0).all()


def test_no_records_are_valid_records() -> None:
    """A hospital may have no validation part."""
    records = Records(torch.empty(0, 3), torch.empty(0), np.empty(0, dtype=np.int64), 0)

    assert len(records) == 0
    assert len(records.select(np.empty(0, dtype=np.int64))[0]) == 0


@pytest.mark.parametrize("patients", [[0, 2], [-1, 0], [0, 0, 0]])
def test_gaps_and_wrong_lengths_are_refused(patients: list[int]) -> None:
    """A patient index without records would count somebody who is not there."""
    with pytest.raises(RecordsError):
        Records(torch.zeros(2, 3), torch.zeros(2), np.array(patients, dtype=np.int64), 2)


def test_printing_records_shows_no_values() -> None:
    """A log line must not hold a patient's values."""
    assert repr(table_records([0, 0, 1])) == "Records(3 records, 2 patients)"
