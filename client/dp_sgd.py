"""Local steps of DP-SGD: gradient per patient, clip, sum, add noise, descend.

Gradients come from ``client/clipping``, or from Opacus's hooks where a layer is not covered there; Opacus's privacy
engine, optimizer, loader and accountant are not used. Each step is one sampled Gaussian mechanism over *patients*; what
it costs is charged in the ledger before this file is called, and nothing here can refund it.
"""

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.augment import augmented
from client.clipping.book_keeping import BookKeeping, covers
from client.clipping.gradients import Gradients
from client.clipping.several import SeveralDevices
from client.loader import PoissonLoader
from client.randomness import SecureRandom, require_system_key
from client.records.records import Records
from shared_models.errors import ConfigError
from shared_models.nets.losses import loss_per_record
from shared_models.plan import Augmentation, PrivacyPlan, TrainingPlan
from shared_models.tasks import (
    Choice,
    Head,
    Outline,
    Quantity,
    SeriesInput,
    Survival,
    TableInput,
    Task,
    TokensInput,
)
from shared_models.update import trainable

log = logging.getLogger("konsil.hospital")

# Opacus hooks the input of every layer; that the first layer's input needs no gradient is expected, not a fault.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")

_TOKENS = 32  # of a made-up text for a pretrained encoder
_TOLERANCE = 1e-4  # of the self-check, relative: float32 rounding stays below 1e-5, the traps are off by 1e-2 to 1e2


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What happened in the steps of one round: for the hospital's own eyes, never sent, because it is not noised.

    Attributes:
        steps: Steps taken, empty draws included.
        drawn: Patients drawn, over all steps.
        clipped: Of these, the ones whose gradient was longer than C.
        not_finite: Of these, the ones whose gradient was NaN or infinite and counted as zero.
    """

    steps: int
    drawn: int
    clipped: int
    not_finite: int


def train(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    training: TrainingPlan,
    privacy: PrivacyPlan,
    expected_batch: float,
    random: SecureRandom,
    device: str | torch.device = "cpu",
    others: Sequence[torch.device] = (),
    micro_batch: int = 256,
    precision: torch.dtype = torch.float32,
    null: NDArray[np.float64] | None = None,
    allow_test_random: bool = False,
) -> TrainingReport:
    """Train in place for the steps of one round, under the plan's mechanism.

    The proximal term of FedProx, mu/2 times the squared distance from the round's global parameters, depends on no
    record. So its gradient, mu times that distance, is added after clipping and noise, where it costs no privacy. It
    must not be clipped with a patient's gradient: it would take up room that is the patient's, once for all drawn.

    Guarantees:
        * Adding or removing one patient, with all records, moves each step's sum by at most ``privacy.clip`` in L2
          norm before noise of standard deviation ``noise_multiplier * clip`` per coordinate is added.
        * The number of steps, the denominator and the noise depend on the plan and the public size only.
        * No record's content raises an exception: a patient whose gradient is not finite counts as zero.
        * Torch's global generator is neither read nor advanced.

    Args:
        model: A network that passed ``self_check``; changed in place and moved to ``device``.
        records: Training records.
        task: Names the loss.
        training: Steps, learning rate of this round, the proximal term, and how records are changed each time.
        privacy: Clip C, noise multiplier and sample rate q.
        expected_batch: Denominator of every step, in patients: q times the *public* size, never a true count.
        random: Source of sampling and noise, fresh for every charge.
        device: Where gradients are computed.
        others: Further devices, which take their part of the patients drawn.
        micro_batch: Most records at once on a device; bounds memory, changes no result beyond rounding.
        precision: Of the forward and backward pass (``Gradients``); noise and the clip do not depend on it.
        null: Further coordinates, moved in place, whose gradient is zero for every patient: the same noise as the
            parameters', and nothing else.
        allow_test_random: Accept a repeatable generator. Tests only.

    Returns:
        Counts for the local log.

    Source:
        Abadi et al., arXiv:1607.00133, Algorithm 1. The proximal term: Li et al., arXiv:1812.06127, Algorithm 2.

    Raises:
        ConfigError: ``random`` is not keyed by the operating system, or a setting is out of range.
    """
    require_system_key(random, allow_test_random=allow_test_random)
    return local_steps(
        model,
        records,
        task,
        steps=training.steps,
        learning_rate=training.learning_rate,
        proximal=training.proximal,
        augmentation=training.augmentation,
        clip=privacy.clip,
        noise_multiplier=privacy.noise_multiplier,
        sample_rate=privacy.sample_rate,
        expected_batch=expected_batch,
        random=random,
        device=device,
        others=others,
        micro_batch=micro_batch,
        precision=precision,
        null=null,
    )


def local_steps(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    steps: int,
    learning_rate: float,
    clip: float,
    noise_multiplier: float,
    sample_rate: float,
    expected_batch: float,
    random: SecureRandom,
    proximal: float = 0.0,
    augmentation: Augmentation | None = None,
    device: str | torch.device = "cpu",
    others: Sequence[torch.device] = (),
    micro_batch: int = 256,
    precision: torch.dtype = torch.float32,
    null: NDArray[np.float64] | None = None,
) -> TrainingReport:
    """The steps that ``train`` takes, with every number of the mechanism in the open.

    ``clip=math.inf, noise_multiplier=0`` switches privacy off, for comparison with plain FedAvg in tests. No plan can
    ask for it: ``PrivacyPlan`` refuses both values.

    Raises:
        ConfigError: A number is not in its range; written so that NaN fails.
    """
    if not (clip > 0 and 0 <= noise_multiplier < math.inf and 0 < expected_batch < math.inf and learning_rate > 0):
        raise ConfigError("clip, noise, expected batch or learning rate is out of range", hint="Mend the study plan.")
    if noise_multiplier > 0 and clip == math.inf:
        raise ConfigError("noise needs a finite clip", hint="Mend the study plan.")
    pull = learning_rate * proximal  # the share of the way back to the global parameters that a step goes
    if not 0 <= pull <= 1:
        raise ConfigError("learning rate times proximal is not in 0..1", hint="Mend the study plan.")
    if augmentation is not None:
        records = augmented(records, task, augmentation, random)
    loader = PoissonLoader(records, sample_rate, random)
    standard_deviation = noise_multiplier * clip if noise_multiplier else 0.0  # 0 times an infinite clip is NaN
    drawn = 0
    size = sum(parameter.numel() for parameter in trainable(model).values())
    # Where gradients are computed elsewhere, the processor makes the noise's bits in the meantime.
    elsewhere = standard_deviation > 0 and torch.device(device).type != "cpu"
    with (
        _on_all(
            model, records, task, devices=[torch.device(device), *others], micro_batch=micro_batch, precision=precision
        ) as gradients,
        ThreadPoolExecutor(1) if elsewhere else nullcontext() as maker,
    ):
        start = gradients.position() if pull else None
        for _ in range(steps):
            patients = loader.draw()
            drawn += len(patients)
            made = maker.submit(_pairs, random, size) if maker is not None else None
            total = gradients.clipped_sum(patients, clip=clip)
            noisy = add_noise(total, standard_deviation=standard_deviation, random=random, made=made)
            if start is not None:
                gradients.return_towards(start, share=pull)
            gradients.descend(noisy.div_(expected_batch), learning_rate=learning_rate)
            if null is not None and standard_deviation:
                null *= 1 - pull  # they start at zero and are pulled back to it, as the parameters are
                null -= learning_rate * standard_deviation / expected_batch * random.gaussian(len(null))
        clipped, not_finite = gradients.counts()
    return TrainingReport(steps=steps, drawn=drawn, clipped=clipped, not_finite=not_finite)


def add_noise(
    total: Tensor, *, standard_deviation: float, random: SecureRandom, made: Future[NDArray[np.float64]] | None = None
) -> Tensor:
    """Add independent Gaussian noise in float64, in place, to every coordinate, also where the sum is empty or zero.

    On a GPU it is the GPU that makes noise of uniform numbers; ``made`` are those, of the same stream, one or more for
    each coordinate, which a thread makes meanwhile.
    """
    if standard_deviation == 0:
        return total
    if total.device.type == "cpu":
        random.add_gaussian(total.numpy(), standard_deviation=standard_deviation)
        return total
    size = total.numel()
    uniform = _pairs(random, size) if made is None else made.result()
    return total.add_(normal_from(torch.from_numpy(uniform).to(total.device))[:size], alpha=standard_deviation)


def _pairs(random: SecureRandom, size: int) -> NDArray[np.float64]:
    """Uniform numbers for so many normal ones, which are made in pairs."""
    return random.uniform(size + size % 2)


def normal_from(uniform: Tensor) -> Tensor:
    """As many independent standard normal numbers as there are uniform ones in [0, 1), an even number; float64.

    Source:
        Box and Muller, Annals of Mathematical Statistics 29(2), 1958.
    """
    first, second = uniform.chunk(2)
    radius = (1 - first).log().mul_(-2).sqrt_()  # 1 - u lies in (0, 1], so that the logarithm is finite
    angle = second * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


def _on_all(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    devices: Sequence[torch.device],
    micro_batch: int,
    precision: torch.dtype,
) -> Gradients | SeveralDevices:
    """The engine of the only device, or one for each."""

    def engine(model: nn.Module, records: Records, device: torch.device) -> Gradients:
        return gradients_for(model, records, task, device=device, micro_batch=micro_batch, precision=precision)

    return engine(model, records, devices[0]) if len(devices) == 1 else SeveralDevices(model, records, devices, engine)


def gradients_for(
    model: nn.Module,
    records: Records,
    task: Task,
    *,
    device: str | torch.device,
    micro_batch: int,
    precision: torch.dtype = torch.float32,
) -> Gradients:
    """The engine for a network: book-keeping where it covers every layer that trains, else Opacus's hooks.

    The choice depends on the network's layers alone, so that the self-check tries the engine that training will use.
    Arguments as for ``Gradients``; Opacus's hooks compute in float32 whatever the precision.
    """
    if covers(model):
        return BookKeeping(model, records, task, device=device, micro_batch=micro_batch, precision=precision)
    log.info("gradients per patient come from Opacus's hooks, in float32: book-keeping does not cover some layer")
    return PatientGradients(model, records, task, device=device, micro_batch=micro_batch)


class PatientGradients(Gradients):
    """Gradients per patient by Opacus's hooks: for networks with a layer that the book-keeping engine does not cover.

    Opacus is wrapped around the network once per round, not once per step. Its bookkeeping on the network is wiped
    before every batch: a layer whose output is not used in a batch would otherwise leave a half-finished gradient that
    is added to the next batch's.
    """

    rounding = 1 - 2.0**-40  # norms and sums are taken in float64

    def _hook(self) -> None:
        # 52 MB and most of a second, which a hospital whose networks book-keeping covers never spends.
        from opacus.grad_sample import GradSampleModule  # noqa: PLC0415

        try:
            # strict: a trainable layer with buffers, such as BatchNorm, mixes patients and is refused.
            self._hooked = GradSampleModule(self._model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise _refused("a trainable layer has buffers") from error

    def _unhook(self) -> None:
        self._forget()
        self._hooked.cleanup()

    def _add_group(self, total: Tensor, patients: NDArray[np.int64], clip: float) -> None:
        means = self._means(patients)
        # In float64 the norm of finite float32 numbers cannot overflow.
        norms = torch.stack([torch.linalg.vector_norm(mean, dim=1, dtype=torch.float64) for mean in means]).norm(dim=0)
        factors = self._clip_factors(norms, clip)
        # A NaN times zero is NaN: patients who count as zero are emptied as well.
        total += torch.cat([factors @ mean.nan_to_num_(0, 0, 0).double() for mean in means])

    def _means(self, patients: NDArray[np.int64]) -> list[Tensor]:
        """Each patient's mean gradient over all own records: per parameter, shape ``(patients, size)``."""
        counts = self._records.record_counts[patients]
        if counts.sum() == len(patients) <= self._micro_batch:
            inputs, targets, _ = self._records.select(patients)
            return self._record_gradients(inputs, targets)
        kind = self._parameters[0].dtype  # float64 in the self-check
        share = torch.from_numpy(1 / counts).to(self.device, kind)
        means = [torch.zeros(len(patients), size, device=self.device, dtype=kind) for size in self._sizes]
        for inputs, targets, owners in self._records.parts(patients, self._micro_batch):
            owner = torch.from_numpy(owners).to(self.device)
            for mean, gradient in zip(means, self._record_gradients(inputs, targets), strict=True):
                mean.index_add_(0, owner, gradient * share[owner, None])
        return means

    def _record_gradients(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Each record's own gradient: per parameter, shape ``(records, size)``."""
        self._forget()
        # The sum: a mean would divide by the number of records drawn, which is private.
        self._losses(inputs, targets).sum().backward()
        return [_gradient_per_record(parameter, len(inputs)) for parameter in self._parameters]

    def _forget(self) -> None:
        """Wipe what Opacus and autograd left on the network."""
        for parameter in self._parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus's own attributes, this and the next two
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.__dict__.pop("_current_grad_sample", None)
        for module in self._model.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)


def _gradient_per_record(parameter: nn.Parameter, records: int) -> Tensor:
    """What Opacus found for one parameter, flat per record; zero where the loss does not depend on it."""
    found = parameter.grad_sample  # type: ignore[attr-defined]  # set by Opacus
    if found is None:
        return torch.zeros(records, parameter.numel(), device=parameter.device)
    if not isinstance(found, Tensor) or found.shape != (records, *parameter.shape):
        raise ConfigError(
            "a layer does not keep records apart: its gradient has another batch size than its input",
            hint="Use a network from shared_models/nets; layers must not broadcast over the batch.",
        )
    return found.reshape(records, -1)


def self_check(model: nn.Module, task: Task, *, clip: float, micro_batch: int = 2) -> None:
    """Refuse a network for which gradients per patient would be wrong, before any record is read.

    Each engine is silently wrong for some modules: both for one that mixes records, book-keeping for one that uses a
    layer's weight past the layer, Opacus for one that owns a parameter and receives its input by keyword. So a copy of
    the network sees a few made-up records, its gradients are computed once more by autograd, one record at a time, and
    everything is compared. The copy's trainable parameters are moved a little first: a layer that starts at zero would
    hide every layer before it.

    Guarantees (for the made-up records, up to relative 1e-4):
        * The clipped sum equals the sum of clipped brute-force gradients, with clipping off, at C, and at a clip that
          binds for every patient.
        * Leaving out any one patient moves the sum by at most the clip.
        * Every trainable parameter takes part in every record's loss.
        * ``model`` and torch's global generator are unchanged.

    Args:
        model: Network, as built from the plan.
        task: Names inputs and loss.
        clip: C of the plan.
        micro_batch: Small, so that groups of patients and parts of a patient occur.

    Raises:
        ConfigError: Any of this fails; the network must not be trained.
    """
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(model).cpu().double().train()  # in float32 a rounded kink of a ReLU passes for a fault
    with torch.no_grad():
        for parameter in trainable(trial).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    records = made_up_records(task, generator)
    if records.inputs[:].is_floating_point():
        records = replace(records, inputs=records.inputs[:].double())
    try:
        truth = _gradients_by_brute_force(trial, records, task)
        with gradients_for(trial, records, task, device="cpu", micro_batch=micro_batch) as gradients:
            _compare(gradients, truth, clip)
    except ConfigError:
        raise
    except Exception as error:
        # Whatever torch or Opacus stumbles over here it would stumble over during training, after a charge.
        raise _refused(f"{type(error).__name__} while gradients per patient were computed") from error


def _compare(gradients: Gradients, truth: Tensor, clip: float) -> None:
    """The self-check's comparisons; ``truth`` holds each patient's mean gradient, shape ``(patients, d)``."""
    norms = truth.norm(dim=1)
    if not (norms > 0).all():
        raise _refused("its loss has no finite gradient that differs from zero")
    everyone = np.arange(len(truth))
    for limit in (math.inf, clip, 0.5 * norms.min().item()):
        total = gradients.clipped_sum(everyone, clip=limit)
        clipped = truth * (limit / norms).clamp(max=1)[:, None]
        allowed = _TOLERANCE * clipped.norm(dim=1).sum()
        if not (total - clipped.sum(dim=0)).norm() <= allowed:
            raise _refused("its gradients per patient differ from those of single records")
        for patient in everyone:
            without = gradients.clipped_sum(np.delete(everyone, patient), clip=limit)
            if not (total - without).norm() <= limit + allowed:
                raise _refused("one patient can contribute more than the clip")


def _gradients_by_brute_force(model: nn.Module, records: Records, task: Task) -> Tensor:
    """Each patient's mean gradient, shape ``(patients, d)`` in float64: one record at a time, without Opacus."""
    parameters = trainable(model)
    if not parameters:
        raise _refused("it has no trainable parameter")
    means = torch.zeros(records.patient_count, sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for row, patient in enumerate(records.patients):
        loss = loss_per_record(task, model(records.inputs[row : row + 1]), records.targets[row : row + 1])
        if loss.shape != (1,):
            raise _refused("it does not give one loss per record")
        found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is None:
                raise _refused(f"parameter {name} has no part in the loss of some record")
        flat = torch.cat([gradient.flatten() for gradient in found]).double()
        means[patient] += flat / records.record_counts[patient]
    return means


def made_up_records(task: Task, generator: torch.Generator) -> Records:
    """Seven records of four patients that fit the task: one patient with three records, one with two."""
    patients = np.array([0, 1, 1, 2, 3, 3, 3], dtype=np.int64)
    n = len(patients)
    if isinstance(task.input, TokensInput):
        # A pretrained encoder takes texts of any length up to its plan's, and short ones cost a tenth.
        length = task.input.length if task.input.base is None else min(task.input.length, _TOKENS)
        inputs = torch.randint(1, task.input.vocabulary, (n, length), generator=generator)
        # Every other record is padded in its second half.
        inputs[::2, (length + 1) // 2 :] = 0
    else:
        inputs = torch.rand(n, *_input_shape(task), generator=generator) * 2 - 1
    if isinstance(task.input, SeriesInput):
        values, mask, since = inputs.chunk(3, dim=2)
        mask.copy_((mask > 0).float())
        values.mul_(mask)
        since.abs_()
    return Records(inputs, _made_up_targets(task, n, generator), patients, int(patients.max()) + 1)


def _made_up_targets(task: Task, n: int, generator: torch.Generator) -> Tensor:
    """Every class, intervals with and without an event, and of several heads one that is not known."""
    if task.choice is not None:
        classes = torch.arange(n) % len(task.choice.classes)
        return classes.float() if task.outputs == 1 else classes
    parts = [_made_up_target(head, n, width[1], generator) for head, width in zip(task.heads, task.widths, strict=True)]
    for number, (head, part) in enumerate(zip(task.heads, parts, strict=True)):
        if len(parts) > 1 and isinstance(head, Choice | Quantity):
            part[number % n] = torch.nan
    return torch.cat(parts, dim=1)


def _made_up_target(head: Head, n: int, width: int, generator: torch.Generator) -> Tensor:
    match head:
        case Choice(classes=names):
            return (torch.arange(n) % len(names)).float()[:, None]
        case Quantity():
            return torch.rand(n, 1, generator=generator) * 4 - 2
        case Survival(edges=edges):
            passed = (torch.arange(n) + 1) % len(edges)
            return torch.stack([passed, 1 - passed % 2], dim=1).float()  # nobody was seen for no interval at all
        case Outline():
            return (torch.rand(n, width, generator=generator) < 0.5).float()


def _input_shape(task: Task) -> tuple[int, ...]:
    """Shape of one record that is not made of tokens."""
    if isinstance(task.input, TableInput):
        return (task.input.width,)
    if isinstance(task.input, SeriesInput):
        return (task.input.steps, 3 * len(task.input.variables))
    if isinstance(task.input, TokensInput):
        return (task.input.length,)
    return (task.input.channels, task.input.height, task.input.width)


def _refused(reason: str) -> ConfigError:
    """The self-check's verdict."""
    return ConfigError(
        f"the network failed its privacy self-check: {reason}",
        hint="Use a network from shared_models/nets, or mend the layer; it must not be trained on records.",
    )
