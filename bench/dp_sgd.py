"""Seconds and memory of a private step, relative to plain SGD: ours, and each of Opacus's modes.

A plain step is the identical network, eager, in the same process and with as many threads: forward, mean loss,
backward, ``torch.optim.SGD``. Ours is ``client.dp_sgd.local_steps``, with everybody drawn, noise included. Opacus's
modes are its own privacy engine with its own noise: hooks, functorch, expanded weights (``ew``) and ghost clipping.

All contenders take turns in one process; the figures are medians over the repeats. On the processor they are processor
seconds per step with one thread, so that other work on the machine counts little; memory is how far a fresh process
grows from before the network is built to the highest point of three steps. On a GPU (``--device cuda``) they are
seconds on the clock, the GPU's work included, and the highest point of torch's own memory; ``ours-bf16`` joins in, and
for the Transformer there is the part of the chip's measured bf16 matrix rate that ours reaches. A mode that cannot run
a network is left out, with the reason. ``NAME_opacus_best`` is the fastest of Opacus's modes over plain SGD.

``lora`` is a BERT of MiniLM's shape with made-up weights, adapters of rank 4 in its top two layers. What the frozen
layers give is computed once for each record, by every contender but the modes that work on functions.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from opacus import PrivacyEngine
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

from client.clipping.book_keeping import covers
from client.dp_sgd import local_steps
from client.memory import freed_memory_kept
from client.randomness import SecureRandom
from client.records.records import Records
from shared_models import plan
from shared_models.nets.build import build_network
from shared_models.nets.losses import loss_per_record
from shared_models.pretrained import digest_of, offer_files
from shared_models.tasks import Choice, ImageInput, Numeric, SeriesInput, TableInput, Task, TokensInput

CLIP, NOISE_MULTIPLIER, LEARNING_RATE = 0.5, 1.0, 0.05
STEPS = 3  # of one turn
OPACUS = ("hooks", "functorch", "ew", "ghost")
CONTENDERS = ("plain", "ours", *OPACUS)
OURS = {"ours": torch.float32, "ours-bf16": torch.bfloat16}
TARGETS: dict[str, float | None] = {
    "cnn28": 1.35,
    "cnn64": 1.25,
    "lstm140": 1.45,
    "lstm48": 2.2,
    "transformer": 1.2,
    "mlp": 1.5,
    "lora": None,
}
MEMORY_TARGET = 1.3
BASE = {  # MiniLM's configuration
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}

Turn = Callable[[], object]


class Case(NamedTuple):
    """A network, and one batch for it; every patient has one record. A base is the folder that the network needs."""

    network: plan.Network
    task: Task
    batch: int
    base: Path | None = None


def cases(folder: Path) -> dict[str, list[Case]]:
    """What is measured; where a name has two networks, its figures are those of the worse one."""
    number = [Numeric(name=f"v{i}", unit="1", low=-1, high=1) for i in range(784)]
    small = ImageInput(channels=1, height=28, width=28)
    middle = ImageInput(channels=3, height=64, width=64)
    long = SeriesInput(variables=(number[0],), steps=140, step_unit="min")
    wide = SeriesInput(variables=tuple(number[:37]), steps=48, step_unit="h")
    words = TokensInput(vocabulary=1000, length=128)
    base = write_base(folder / "base")
    notes = TokensInput(vocabulary=BASE["vocab_size"], length=128, base=base)
    adapted = plan.PretrainedEncoder(name="pretrained-encoder", base=base, length=128)
    return {
        "cnn28": [Case(plan.Cnn(name="cnn"), task_of(small, 10), 64)],
        "cnn64": [Case(plan.Cnn(name="cnn"), task_of(middle, 10), 64)],
        "lstm140": [Case(plan.Lstm(name="lstm", hidden=64, layers=1), task_of(long, 2), 64)],
        "lstm48": [Case(plan.Lstm(name="lstm", hidden=64, layers=1), task_of(wide, 2), 64)],
        "transformer": [
            Case(plan.Transformer(name="transformer", width=128, heads=4, layers=layers), task_of(words, 2), 64)
            for layers in (2, 4)
        ],
        "mlp": [Case(plan.Mlp(name="mlp", hidden=(256, 128)), task_of(TableInput(columns=tuple(number)), 10), 256)],
        "lora": [Case(adapted, task_of(notes, 8), 64, folder / "base")],
    }


def write_base(folder: Path) -> str:
    """Files of a BERT of MiniLM's shape that knows nothing. Returns its digest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(**BASE)).save_pretrained(folder)
    Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))  # noqa: S106 - no secret
    return digest_of(folder)


def task_of(inputs: ImageInput | SeriesInput | TokensInput | TableInput, classes: int) -> Task:
    """A task that nobody has."""
    return Task(
        name="made-up",
        description="Made up for a benchmark.",
        input=inputs,
        heads=(Choice(name="label", classes=tuple(f"class {i}" for i in range(classes))),),
    )


def made_up(case: Case, device: str) -> Records:
    """One batch of records, where it is computed on."""
    generator = torch.Generator().manual_seed(0)
    match case.task.input:
        case TokensInput(vocabulary=vocabulary, length=length):
            inputs = torch.randint(1, vocabulary, (case.batch, length), generator=generator)
        case SeriesInput(variables=variables, steps=steps):
            inputs = torch.rand(case.batch, steps, 3 * len(variables), generator=generator)
        case TableInput(width=width):
            inputs = torch.rand(case.batch, width, generator=generator)
        case ImageInput() as image:
            inputs = torch.rand(case.batch, image.channels, image.height, image.width, generator=generator)
    targets = torch.randint(len(case.task.classes), (case.batch,), generator=generator)
    labels = targets.float() if case.task.outputs == 1 else targets
    return Records(inputs.to(device), labels.to(device), np.arange(case.batch), case.batch)


def prepare(contender: str, case: Case, records: Records, device: str) -> Turn:
    """A turn of ``STEPS`` steps, ready to be taken again and again."""
    if case.base is not None:
        offer_files([case.base])
    model = build_network(case.network, case.task, seed=0).to(device)
    if contender in OURS:
        assert covers(model)
        return lambda: ours(model, case.task, records, device, OURS[contender])
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if contender == "plain":
        return lambda: plain(model, optimizer, case.task, records)
    return opacus(contender, model.train(), optimizer, case.task, records)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, records: Records) -> None:
    """Steps without privacy."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss: Tensor = loss_per_record(task, model(records.inputs), records.targets[:]).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        optimizer.step()


def ours(model: nn.Module, task: Task, records: Records, device: str, precision: torch.dtype) -> None:
    """Steps as hospitals take them."""
    local_steps(
        model,
        records,
        task,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        clip=CLIP,
        noise_multiplier=NOISE_MULTIPLIER,
        sample_rate=1.0,
        expected_batch=float(len(records)),
        random=SecureRandom.from_system(),
        device=device,
        precision=precision,
    )


def opacus(mode: str, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, records: Records) -> Turn:
    """Steps of Opacus's own optimizer, under its own loss where a mode needs one."""

    class Loss(nn.Module):
        reduction = "mean"

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            losses = loss_per_record(task, outputs, targets)
            return losses if self.reduction == "none" else losses.mean()

    loss: nn.Module = Loss()
    loader = DataLoader(TensorDataset(records.inputs[:].cpu(), records.targets[:].cpu()), batch_size=len(records))
    private = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        criterion=loss,
        data_loader=loader,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, stepper = private[0], private[1]
    criterion = private[2] if mode == "ghost" else loss

    def turn() -> None:
        for _ in range(STEPS):
            stepper.zero_grad()
            criterion(wrapped(records.inputs), records.targets[:]).backward()
            stepper.step()

    return turn


def seconds_per_step(case: Case, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each contender that can run the network; they take turns."""
    records = made_up(case, device)
    turns: dict[str, Turn] = {}
    for contender in CONTENDERS if device == "cpu" else (*CONTENDERS, "ours-bf16"):
        try:
            turn = prepare(contender, case, records, device)
            turn()  # warms up, and shows whether it runs at all
            turns[contender] = turn
        except Exception as error:
            if contender not in OPACUS:
                raise
            print(f"  {contender} cannot: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    spent: dict[str, list[float]] = {contender: [] for contender in turns}
    for _ in range(repeats):
        for contender, turn in turns.items():
            started = now(device)
            turn()
            spent[contender].append((now(device) - started) / STEPS)
    return {contender: statistics.median(times) for contender, times in spent.items()}


def now(device: str) -> float:
    """Processor seconds, or seconds on the clock once the GPU has done what it was told."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb(contender: str, case: Case, device: str) -> float | None:
    """Memory up to the highest point; None where the contender cannot run the network."""
    if device != "cpu":
        records = made_up(case, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepare(contender, case, records, device)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("forkserver")  # fresh, but imports are done once
    there, here = context.Pipe()
    child = context.Process(target=report_growth, args=(here, contender, case))
    child.start()
    here.close()
    try:
        grown: float | None = there.recv()
    except EOFError:
        grown = None
    child.join()
    return grown


def report_growth(answer: Connection, contender: str, case: Case) -> None:
    """Run in a process of its own: warm torch up with a few records, then count from there."""
    quiet()
    few = case._replace(batch=2)
    try:
        prepare(contender, few, made_up(few, "cpu"), "cpu")()
        records = made_up(case, "cpu")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest point is forgotten
        before = resident_mb("VmRSS")
        with freed_memory_kept():
            prepare(contender, case, records, "cpu")()
    except Exception:
        if contender not in OPACUS:
            raise
        return
    answer.send(resident_mb("VmHWM") - before)


def resident_mb(name: str) -> float:
    """A figure of this process, from proc(5)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def quiet() -> None:
    """One thread, and no warnings of Opacus's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def measure(name: str, several: list[Case], repeats: int, device: str) -> dict[str, float]:
    """Ratios of one name, and the absolute figures that they are made from."""
    figures: dict[str, float] = {}
    for case in several:
        layers = f", {case.network.layers} layers" if isinstance(case.network, plan.Transformer) else ""
        print(f"{name}{layers}, batch {case.batch}")
        seconds = seconds_per_step(case, repeats, device)
        memory = {contender: peak_mb(contender, case, device) for contender in seconds}
        for contender, each in seconds.items():
            ratio, grown = each / seconds["plain"], memory[contender]
            size = "" if grown is None else f"{grown:8.0f} MB"
            rate = case.batch / each
            print(f"  {contender:<10} {1000 * each:8.2f} ms {ratio:6.2f} times plain {rate:9.0f} records/s {size}")
        plain_mb, ours_mb = memory["plain"], memory["ours"]
        assert plain_mb is not None
        assert ours_mb is not None
        best = min((each for contender, each in seconds.items() if contender in OPACUS), default=float("nan"))
        found = {
            name: seconds["ours"] / seconds["plain"],
            f"{name}_memory": ours_mb / plain_mb,
            f"{name}_opacus_best": best / seconds["plain"],
            **{f"{name}_{contender}_ms": 1000 * each for contender, each in seconds.items()},
        }
        if device != "cpu" and isinstance(case.network, plan.Transformer):
            for contender in OURS:
                found[f"{name}_{contender}_of_bf16_rate"] = transformer_flops(case) / seconds[contender] / matrix_rate()
                print(f"  {contender}: {found[f'{name}_{contender}_of_bf16_rate']:.4f} of the bf16 matrix rate")
        if not found[name] <= figures.get(name, 0.0):
            memory_so_far = figures.get(f"{name}_memory", 0.0)
            figures = found
            figures[f"{name}_memory"] = max(found[f"{name}_memory"], memory_so_far)
    for key, target in ((name, TARGETS[name]), (f"{name}_memory", MEMORY_TARGET)):
        if target is None or device != "cpu":  # the targets are for processors
            print(f"{key}: {figures[key]:.2f} times plain")
            continue
        met = "met" if figures[key] <= target else "MISSED"
        print(f"{key}: {figures[key]:.2f} times plain, target <= {target}: {met}")
    met = "met" if figures[name] <= figures[f"{name}_opacus_best"] else "MISSED"
    print(f"{name}: Opacus's best mode takes {figures[f'{name}_opacus_best']:.2f} times plain; ours no slower: {met}")
    return figures


def transformer_flops(case: Case) -> float:
    """Multiplications and additions of the matrix products of a plain step: forward, and twice that backward."""
    assert isinstance(case.network, plan.Transformer)
    assert isinstance(case.task.input, TokensInput)
    width, length = case.network.width, case.task.input.length
    model = build_network(case.network, case.task, seed=0)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attention = 2 * case.network.layers * length * width  # scores, and values weighed by them
    return 3 * 2.0 * case.batch * length * (weights + attention)


@functools.cache
def matrix_rate() -> float:
    """Operations a second of this GPU's bf16 matrix product of 8192 by 8192: median of ten."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    spent = []
    for _ in range(13):
        started = now("cuda")
        a @ b
        spent.append(now("cuda") - started)
    return 2 * 8192.0**3 / statistics.median(spent[3:])


def noise_ratio(repeats: int, numbers: int = 235_146) -> float:
    """Processor time of the noise of the largest step here over that of ``torch.randn``."""
    random = SecureRandom.from_system()
    spent: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(max(10, repeats)):
        for name, draw in (("ours", random.gaussian), ("torch", torch.randn)):
            started = time.process_time()
            draw(numbers)
            spent[name].append(time.process_time() - started)
    return statistics.median(spent["ours"]) / statistics.median(spent["torch"])


def main() -> None:
    """Measure, print, and say which targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="turns of each contender (default: 9)")
    parser.add_argument("--only", choices=tuple(TARGETS), nargs="+", help="some of the networks (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes (default: cpu)")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    quiet()
    figures: dict[str, float] = {}
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with TemporaryDirectory(prefix="konsil-bench-") as folder, freed_memory_kept():  # as hospitals do; for all
        for name, several in cases(Path(folder)).items():
            if name in (options.only or TARGETS):
                figures |= measure(name, several, options.runs, options.device)
                sys.stdout.flush()
    figures["noise_over_randn"] = noise_ratio(options.runs)
    print(f"noise: {figures['noise_over_randn']:.2f} times torch.randn, target <= 2")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
