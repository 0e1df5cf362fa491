"""Changed copies of images and series: as the plan says, one patient as before, and of one record only."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.augment import augmented
from client.dp_sgd import gradients_for, local_steps, made_up_records
from client.records.records import Records
from client.records.series import elapsed
from server.examples import example_plan
from shared_models.errors import ConfigError
from shared_models.nets.build import build_network
from shared_models.plan import Augmentation, Cnn, Lstm
from shared_models.tasks import ImageInput, SeriesInput, task_of
from tests.client.made_up import numeric, repeatable
from tests.client.made_up import task_of as task_with
from tests.federation import changed

IMAGE = task_with(ImageInput(channels=1, height=28, width=40))
SERIES = task_with(SeriesInput(variables=(numeric("pulse"), numeric("pressure")), steps=12, step_unit="hour"))


def pictures(count: int = 6) -> Records:
    """Random pictures of three patients."""
    inputs = torch.rand(count, 1, 28, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Records(inputs, torch.arange(count).float() % 2, np.arange(count) % 3, 3)


def changes(records: Records, **fields: Any) -> Tensor:
    """All records, changed once."""
    task = IMAGE if records.inputs.ndim == 4 else SERIES
    return augmented(records, task, Augmentation(**fields), repeatable()).inputs[torch.arange(len(records))]


def test_a_shift_moves_by_whole_pixels_and_repeats_the_edge() -> None:
    """Every changed picture is the old one at some offset within a tenth of each side."""
    records = pictures()

    for before, after in zip(records.inputs, changes(records, shift=0.1), strict=True):
        padded = torch.nn.functional.pad(before[None], (4, 4, 3, 3), mode="replicate")[0]
        offsets = [padded[:, y : y + 28, x : x + 40] for y in range(7) for x in range(9)]
        assert min(float((after - moved).abs().max()) for moved in offsets) < 1e-4


def test_a_flip_changes_sides_in_about_half() -> None:
    """Each picture is itself or its mirror image, and both occur."""
    records = pictures(40)

    after = changes(records, flip=True)

    same = (after - records.inputs).abs().amax(dim=(1, 2, 3)) < 1e-4
    mirrored = (after - records.inputs.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert bool((same ^ mirrored).all())
    assert 8 <= int(same.sum()) <= 32  # 40 coins: outside with probability below 1e-4, and the seed is fixed


def test_a_turn_keeps_angles_in_an_oblong_picture() -> None:
    """A disc in the middle stays a disc, whatever the angle."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(40) - 19.5, indexing="ij")
    disc = ((x**2 + y**2).sqrt() < 9).float() * 2 - 1
    records = Records(disc.expand(10, 1, 28, 40).clone(), torch.zeros(10), np.arange(10), 10)

    after = changes(records, rotate_degrees=180.0)

    assert float((after - records.inputs).abs().mean()) < 0.05  # the rim is resampled: 2 * pi * 9 of 1120 pixels
    bar = torch.full((28, 40), -1.0)
    bar[:, 18:22] = 1
    turned = changes(
        Records(bar.expand(10, 1, 28, 40).clone(), torch.zeros(10), np.arange(10), 10), rotate_degrees=90.0
    )
    assert float((turned - bar).abs().mean()) > 0.1


def test_contrast_and_noise_stay_in_the_range_of_pixels() -> None:
    """The public range is what the network may rely on."""
    after = changes(pictures(), contrast=0.5, noise=0.5)

    assert float(after.abs().max()) <= 1
    assert float((after - pictures().inputs).abs().max()) > 0.1


def test_what_is_missing_in_a_series_stays_missing() -> None:
    """Values change where there are some; dropped ones are gone, and their times go on as if they had not been."""
    rng = np.random.default_rng(1)
    mask = rng.random((20, 12, 2)) < 0.6
    values = np.where(mask, rng.uniform(-2, 2, mask.shape), 0)
    times = elapsed(mask)
    inputs = torch.from_numpy(np.concatenate([values, mask, times], axis=2)).float()
    records = Records(inputs, torch.zeros(20), np.arange(20), 20)

    after = changes(records, contrast=0.1, noise=0.1, drop=0.3).numpy()

    seen = after[:, :, 2:4] > 0
    assert not (seen & ~mask).any()
    assert 0.2 < 1 - seen.sum() / mask.sum() < 0.4
    assert not after[:, :, :2][~seen].any()
    np.testing.assert_array_equal(after[:, :, 4:], elapsed(seen))
    np.testing.assert_array_equal(changes(records, contrast=0.1).numpy()[:, :, 2:], inputs[:, :, 2:])


@pytest.mark.parametrize(
    ("network", "task"), [(Cnn(name="cnn", channels=(3,)), IMAGE), (Lstm(name="lstm", hidden=4), SERIES)]
)
def test_copies_are_one_patient_clipped_once(network: Cnn | Lstm, task: Any) -> None:
    """The clipped gradient of copies is that of their mean gradient, and never longer than the clip."""
    records = made_up_records(task, torch.Generator().manual_seed(1))
    copied = augmented(records, task, Augmentation(copies=5, contrast=0.2, noise=0.2), repeatable())
    assert copied.patient_count == records.patient_count
    np.testing.assert_array_equal(copied.record_counts, 5 * records.record_counts)
    plain = augmented(records, task, Augmentation(copies=5), repeatable())
    model = build_network(network, task, seed=1)

    def total(of: Records, clip: float) -> Tensor:
        with gradients_for(model, of, task, device="cpu", micro_batch=4) as gradients:
            return gradients.clipped_sum(np.arange(of.patient_count), clip=clip)

    torch.testing.assert_close(total(plain, 0.01), total(records, 0.01), rtol=1e-4, atol=1e-7)
    assert float(total(copied, 0.01).norm()) <= records.patient_count * 0.01
    assert float((total(copied, math.inf) - total(records, math.inf)).norm()) > 0


def test_every_time_is_another_change() -> None:
    """Two steps see two copies; torch's own generator is not touched."""
    state = torch.get_rng_state()
    records = augmented(pictures(), IMAGE, Augmentation(noise=0.1), repeatable())

    first, second = (records.inputs[torch.arange(6)] for _ in range(2))

    assert float((first - second).abs().max()) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_training_takes_the_plan_s_changes() -> None:
    """The same draws and noise, other gradients."""
    found = []
    for augmentation in (None, Augmentation(noise=0.5)):
        model = build_network(Cnn(name="cnn", channels=(3,)), IMAGE, seed=1)
        local_steps(
            model,
            pictures(),
            IMAGE,
            steps=2,
            learning_rate=0.5,
            clip=math.inf,
            noise_multiplier=0.0,
            sample_rate=1.0,
            expected_batch=3.0,
            random=repeatable(),
            augmentation=augmentation,
        )
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    assert float((found[0] - found[1]).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ("heart-disease", {"noise": 0.1}, "is not for task heart-disease"),
        ("note-specialty", {"copies": 4}, "is not for task note-specialty"),
        ("pneumonia", {"drop": 0.1}, "drop is not for task pneumonia"),
        ("icu-mortality", {"flip": True, "shift": 0.1}, "shift, flip is not for task icu-mortality"),
    ],
)
def test_changes_that_inputs_cannot_take_are_refused(task: str, fields: dict[str, Any], words: str) -> None:
    """Before anything is approved, by every party that reads the plan."""
    plan = changed(example_plan("breast-cancer", 4), task=task)
    plan = changed(plan, training=plan.training.model_dump(mode="json") | {"augmentation": fields})

    with pytest.raises(ConfigError, match=words):
        task_of(plan)


def test_class_weights_go_to_the_plan_s_own_labels() -> None:
    """A misspelt label would train without weights, and nobody would notice."""
    plan = example_plan("breast-cancer", 4)
    training = plan.training.model_dump(mode="json")

    weighed = task_of(changed(plan, training=training | {"class_weights": {"diagnosis": [1.0, 2.5]}}))
    assert weighed.choice is not None
    assert weighed.choice.weights == (1.0, 2.5)

    for wrong in ({"diagnoses": [1.0, 2.5]}, {"diagnosis": [1.0]}):
        with pytest.raises(ConfigError, match=r"no label .* of \d classes"):
            task_of(changed(plan, training=training | {"class_weights": wrong}))
