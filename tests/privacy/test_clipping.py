"""One patient's share of a step, and of a release, is bounded whatever the records say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.dp_sgd import PatientGradients
from client.evaluate import released_statistics
from client.records.records import Records
from shared_models.nets.build import build_network
from shared_models.plan import EvaluationPlan, Mlp
from tests.client.made_up import chosen, repeatable, table, table_records, task_of

TASK = task_of(table(5))


def network() -> nn.Module:
    """A small network whose gradients are longer than the clips used here."""
    return build_network(Mlp(name="mlp", hidden=(4,)), TASK, seed=0)


def clipped_sum(records: Records, clip: float, micro_batch: int = 256) -> Tensor:
    """The sum over all patients before noise."""
    with PatientGradients(network(), records, TASK, device="cpu", micro_batch=micro_batch) as gradients:
        return gradients.clipped_sum(np.arange(records.patient_count), clip=clip)


def release(records: Records, clip: float, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Statistics as they would leave."""
    plan = EvaluationPlan(every=1, clip=clip, noise_multiplier=1.0, bins=10)
    return released_statistics(network(), records, TASK, plan=plan, random=repeatable(seed), allow_test_random=True)


@pytest.mark.parametrize("micro_batch", [3, 256])
def test_twenty_copies_of_a_record_move_the_model_no_further_than_one(micro_batch: int) -> None:
    """The unit is the patient: copying a patient's record changes nothing at all."""
    records = table_records(np.arange(6))
    copied = chosen(records, [0] * 20 + [1, 2, 3, 4, 5])

    torch.testing.assert_close(
        clipped_sum(copied, 0.1, micro_batch), clipped_sum(records, 0.1, micro_batch), rtol=0, atol=1e-8
    )


@settings(max_examples=40, deadline=None)
@given(
    owners=st.lists(st.integers(0, 5), min_size=2, max_size=25),
    clip=st.floats(1e-4, 1e3),
    size=st.sampled_from([1e-3, 1.0, 1e6, 1e30]),
    micro_batch=st.sampled_from([1, 4, 256]),
)
def test_one_patient_more_or_less_moves_a_step_by_at_most_the_clip(
    owners: list[int], clip: float, size: float, micro_batch: int
) -> None:
    """With all records, of any number and size: also where a norm in float32 would overflow."""
    _, patients = np.unique([6, *owners], return_inverse=True)  # somebody is always left
    records = table_records(patients)
    records.inputs[:].mul_(size)

    everyone = clipped_sum(records, clip, micro_batch)
    for patient in range(records.patient_count - 1):
        without = clipped_sum(chosen(records, np.flatnonzero(records.patients != patient)), clip, micro_batch)
        # Beside the clip only the rounding of a float64 sum of at most 7 terms and, in float32, of who shares a batch.
        assert (everyone - without).norm() <= clip * (1 + 1e-5)


def test_a_long_gradient_is_shortened_and_a_short_one_left() -> None:
    """Clipping is ``g * min(1, C / |g|)``, never a scaling of everybody."""
    records = table_records([0])
    length = clipped_sum(records, math.inf).norm().item()

    assert clipped_sum(records, length / 10).norm().item() == pytest.approx(length / 10, rel=1e-9)
    assert clipped_sum(records, length / 10).norm().item() <= length / 10
    torch.testing.assert_close(clipped_sum(records, length * 10), clipped_sum(records, math.inf), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(owners=st.lists(st.integers(0, 5), min_size=2, max_size=25), clip=st.floats(1e-3, 10))
def test_one_patient_more_or_less_moves_a_release_by_at_most_the_clip(owners: list[int], clip: float) -> None:
    """With equal noise, two releases differ by at most S when one patient is left out with all records."""
    _, patients = np.unique([6, *owners], return_inverse=True)
    records = table_records(patients)
    records.inputs[:][0] = math.nan  # a record without a finite score counts as zero

    everyone = release(records, clip)
    for patient in range(records.patient_count - 1):
        without = release(chosen(records, np.flatnonzero(records.patients != patient)), clip)
        assert np.linalg.norm(everyone - without) <= clip * (1 + 1e-5)


@pytest.mark.parametrize("clip", [0.7, 1e3])
def test_copies_of_a_record_change_no_release(clip: float) -> None:
    """A patient with twenty records weighs as much in the statistics as one with one, clipped or not."""
    records = table_records(np.arange(6))
    copied = chosen(records, [0] * 20 + [1, 2, 3, 4, 5])

    np.testing.assert_allclose(release(copied, clip), release(records, clip), atol=1e-9)
