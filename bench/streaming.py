"""Private training on records that are larger than memory: peak memory, and seconds to the first batch.

Folders are made, one after the other. ``xrays``: grey PNG files of 2048 x 2048 pixels, as radiographs come.
``photographs``: PNG files in colour that have the task's own 224 x 224 pixels, so that the *decoded* set is as large as
the folder. ``table``: CSV with 30 numbers a row. ``measurements``: CSV in long form, 48 steps of 8 variables a record.
``notes``: CSV with a text of some 300 words a row. ``outlines``: a compressed ``.npz`` file with images of 128 x 128
pixels and their masks. Pixels are noise and PNG files not compressed, so a gigabyte of pictures is a gigabyte on the
disk; before training they are pushed out of the page cache. A process of its own then reads and trains as a hospital's
daemon does: checks, Poisson draws, decoding, clipping, noise. Its clock starts when it begins to read, and its peak is
the kernel's own figure for it (``VmHWM``). Everything is deleted at the end.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from shared_models.plan import Cnn, Lstm, Mlp, Network, Transformer, UNet
from shared_models.tasks import Choice, ImageInput, Numeric, Outline, SeriesInput, TableInput, Task, TokensInput

PEAK_MB, FIRST_BATCH_S = 1500, 5.0
SIZE = 224  # of the task
BATCH = 64
COLUMNS, STEPS, VARIABLES, PER_RECORD, TOKENS, SIDE = 30, 48, 8, 250, 512, 128

HOSPITAL = """
name = "north"
coordinator = "coordinator.example:9092"
records = "records"
state = "state"
roster = "roster.json"
records_memory_mb = {memory}

[tls]
ca = "keys/ca.pem"
certificate = "keys/tls.pem"
key = "keys/tls.key"

[keys]
identity = "keys/identity.key"
node = "keys/node.key"
root = "root.pub"

[population]
name = "all-patients"
public_size = {size}
epsilon = 2.0
delta = 1e-7
order = 14

[policy]
tasks = ["records"]
networks = ["cnn", "lstm", "mlp", "transformer", "unet"]
minimum_noise_multiplier = 0.5
maximum_epsilon_per_study = 1.0
minimum_hospitals = 3
maximum_rounds = 100
maximum_attempts = 10
"""
MANIFEST = """
task = "records"
file = "{file}"
{label}
patient = "patient"
validation_fraction = 0.1
{sections}
"""


@dataclass(frozen=True)
class Kind:
    """Records of one kind.

    Attributes:
        task: What is learnt from them.
        network: By which network.
        write: Writes at least so many bytes of them into a folder; returns how many patients there are.
        file: That the manifest names.
        sections: Of the manifest, besides.
        label: Column of the label; none of an outline.
    """

    task: Task
    network: Network
    write: Callable[[Path, int], int]
    file: str = "data.csv"
    sections: str = ""
    label: str = "finding"


FINDING = Choice(name="finding", classes=("normal", "abnormal"))


def task_of(content: ImageInput | TableInput | SeriesInput | TokensInput, head: Choice | Outline = FINDING) -> Task:
    """A task over made-up records."""
    return Task(name="records", description="Noise.", input=content, heads=(head,))


def numeric(number: int) -> Numeric:
    """A column, or a variable."""
    return Numeric(name=f"c{number}", unit="unit", low=0, high=1)


def pictures(folder: Path, size: int, *, side: int, channels: int) -> int:
    """PNG files, and a row for each."""
    rng, files, written = np.random.default_rng(0), 0, 0
    with (folder / "data.csv").open("w", encoding="utf-8") as index:
        index.write("patient,images,finding\n")
        while written < size:
            name = f"{files:06}.png"
            (folder / name).write_bytes(png(rng.integers(0, 256, (side, side, channels), dtype=np.uint8)))
            index.write(f"p{files},{name},{FINDING.classes[files % 2]}\n")
            written += (folder / name).stat().st_size
            files += 1
    return files


def rows(folder: Path, size: int, header: str, contents: list[str], *, per_patient: int) -> int:
    """CSV whose rows have a patient, one of some contents, and a finding."""
    number = 0
    with (folder / "data.csv").open("w", encoding="utf-8") as file:
        file.write(header + "\n")
        while file.tell() < size:
            file.writelines(
                f"p{row // per_patient},{contents[row % len(contents)]},{FINDING.classes[row % 2]}\n"
                for row in range(number, number + 1000)
            )
            number += 1000
    return -(-number // per_patient)


def table(folder: Path, size: int) -> int:
    """Five rows a patient."""
    cells = np.random.default_rng(0).random((2003, COLUMNS))
    names = ",".join(f"c{number}" for number in range(COLUMNS))
    contents = [",".join(f"{value:.4f}" for value in row) for row in cells]
    return rows(folder, size, f"patient,{names},finding", contents, per_patient=5)


def notes(folder: Path, size: int) -> int:
    """Words of one to nine letters, which tell nothing."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(1, 10))) for _ in range(2000)]
    contents = [" ".join(rng.choice(words, 300)) for _ in range(1009)]
    return rows(folder, size, "patient,text,finding", contents, per_patient=1)


def measurements(folder: Path, size: int) -> int:
    """A record's measurements are scattered over the file, as in an export by time."""
    rng, line, stays = np.random.default_rng(0), 25, 0
    stays = max(10, size // (line * PER_RECORD))
    (folder / "data.csv").write_text(
        "stay,patient,finding\n" + "".join(f"s{n},p{n},{FINDING.classes[n % 2]}\n" for n in range(stays)), "utf-8"
    )
    with (folder / "measured.csv").open("w", encoding="utf-8") as file:
        file.write("stay,at,name,value\n")
        while file.tell() < size:
            columns = rng.integers(0, [stays, STEPS * 60, VARIABLES, 10_000], (100_000, 4)).tolist()
            file.writelines(
                f"s{stay},{at / 60:.2f},c{name},{value / 10_000:.4f}\n" for stay, at, name, value in columns
            )
    return stays


def outlines(folder: Path, size: int) -> int:
    """As large in the archive as they are in memory: noise cannot be compressed."""
    count, rng = max(10, size // (SIDE * SIDE)), np.random.default_rng(0)

    def noise(images: int) -> NDArray[np.uint8]:
        return rng.integers(0, 256, (images, SIDE, SIDE), dtype=np.uint8)

    def boxes(images: int) -> NDArray[np.uint8]:
        masks = np.zeros((images, SIDE, SIDE), dtype=np.uint8)
        masks[:, SIDE // 4 : SIDE // 2, SIDE // 4 : SIDE // 2] = 1
        return masks

    with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, made in (("images", noise), ("outline", boxes)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(
                    member, {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE)}
                )
                for images in shares(count):
                    member.write(made(images).tobytes())
        with archive.open("patient.npy", "w") as member:
            npy.write_array(member, np.arange(count))
    return count


def shares(count: int, most: int = 500) -> Iterator[int]:
    """A count, so many at once."""
    for first in range(0, count, most):
        yield min(most, count - first)


KINDS = {
    "xrays": Kind(
        task_of(ImageInput(channels=1, height=SIZE, width=SIZE)),
        Cnn(name="cnn"),
        lambda folder, size: pictures(folder, size, side=2048, channels=1),
        sections='[images]\nresize = "stretch"',
    ),
    "photographs": Kind(
        task_of(ImageInput(channels=3, height=SIZE, width=SIZE)),
        Cnn(name="cnn"),
        lambda folder, size: pictures(folder, size, side=SIZE, channels=3),
        sections='[images]\nresize = "stretch"',
    ),
    "table": Kind(task_of(TableInput(columns=tuple(map(numeric, range(COLUMNS))))), Mlp(name="mlp"), table),
    "measurements": Kind(
        task_of(SeriesInput(variables=tuple(map(numeric, range(VARIABLES))), steps=STEPS, step_unit="hour")),
        Lstm(name="lstm"),
        measurements,
        sections='[series]\nfile = "measured.csv"\nrecord = "stay"\ntime = "at"\nvariable = "name"\nvalue = "value"',
    ),
    "notes": Kind(task_of(TokensInput(vocabulary=8192, length=TOKENS)), Transformer(name="transformer"), notes),
    "outlines": Kind(
        task_of(ImageInput(channels=1, height=SIDE, width=SIDE), Outline(name="outline")),
        UNet(name="unet", channels=(4, 8)),
        outlines,
        file="data.npz",
        label="",
    ),
}
PICTURES = ("xrays", "photographs")  # with a limit for the first batch: all else is read as a whole before it


def make_folder(folder: Path, kind: str, size: int, *, kept_mb: int) -> int:
    """Write a hospital's folder with at least so many bytes of records, out of the page cache. Returns the patients."""
    records = folder / "records"
    records.mkdir()
    made = KINDS[kind]
    patients = made.write(records, size)
    label = f'label = "{made.label}"' if made.label else ""
    (records / "manifest.toml").write_text(
        MANIFEST.format(file=made.file, label=label, sections=made.sections), encoding="utf-8"
    )
    (folder / "hospital.toml").write_text(HOSPITAL.format(memory=kept_mb, size=max(10, patients)), encoding="utf-8")
    os.sync()
    for path in records.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return patients


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file whose pixels are stored, not compressed: ten thousands of files in a minute.

    Source:
        RFC 2083: chunks of length, kind, content and checksum; each row after the number of its filter, here none.
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def train_on(folder: Path, kind: str, steps: int) -> dict[str, float]:
    """What the measured process does; returns its figures."""
    import torch

    from client.dp_sgd import local_steps
    from client.loader import PoissonLoader
    from client.randomness import SecureRandom
    from client.records.population import Source
    from client.settings import read_settings
    from shared_models.nets.build import build_network

    torch.set_num_threads(1)
    task = KINDS[kind].task
    settings = read_settings(folder / "hospital.toml")
    model = build_network(KINDS[kind].network, task, seed=0)
    before_mb = peak_mb()
    started, used = time.perf_counter(), time.process_time()
    records = Source(task).current(settings).training
    opened = time.perf_counter()
    rate, random = min(1.0, BATCH / len(records)), SecureRandom.from_system()
    inputs, _, _ = records.select(PoissonLoader(records, rate, random).draw())
    first, used = time.perf_counter(), time.process_time() - used
    scratch_mb = disk_mb(settings.state)
    assert inputs.isfinite().all()
    del inputs
    report = local_steps(
        model, records, task, steps=steps, learning_rate=0.1, clip=1.0, noise_multiplier=1.0, sample_rate=rate,
        expected_batch=max(1, round(rate * records.patient_count)), random=random,
    )  # fmt: skip
    ended = time.perf_counter()
    assert report.not_finite == 0
    return {
        "open_s": opened - started,
        "first_batch_s": first - started,
        "first_batch_cpu_s": used,
        "step_s": (ended - first) / steps,
        "drawn": report.drawn,
        "records": len(records),
        "scratch_mb": scratch_mb,
        "peak_mb": peak_mb(),
        "before_mb": before_mb,
    }


def peak_mb() -> float:
    """The most memory that this process has had, in megabytes of a million bytes, as the kernel has counted."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def disk_mb(folder: Path) -> float:
    """Size of this process's files without a name in a folder."""
    links = [(path, str(path.readlink())) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return (
        sum(p.stat().st_size for p, name in links if name.startswith(f"{folder.resolve()}/") and "deleted" in name)
        / 1e6
    )


def measure(kind: str, size: int, steps: int, *, kept_mb: int, where: Path | None) -> dict[str, float]:
    """Make one folder, train on it in a process of its own, and delete it."""
    with tempfile.TemporaryDirectory(prefix="konsil-bench-", dir=where) as temporary:
        folder = Path(temporary)
        patients = make_folder(folder, kind, size, kept_mb=kept_mb)
        on_disk = sum(path.stat().st_blocks * 512 for path in (folder / "records").iterdir())
        command = [sys.executable, __file__, "--train", str(folder), "--kind", kind, "--steps", str(steps)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(found.stdout.splitlines()[-1]) | {"patients": patients, "folder_gb": on_disk / 1e9}
    return {f"streaming_{kind}_{name}": value for name, value in figures.items()}


def report(kind: str, found: dict[str, float]) -> None:
    """Print one folder's figures beside the limits."""
    figures = {name.removeprefix(f"streaming_{kind}_"): value for name, value in found.items()}
    peak, first = figures["peak_mb"], figures["first_batch_s"]
    print(
        f"{kind}: {figures['folder_gb']:.2f} GB on the disk, {figures['records']:.0f} records to train on, "
        f"{figures['patients']:.0f} patients in all; {figures['scratch_mb']:.0f} MB of it encoded in a nameless file"
    )
    print(
        f"  peak memory {peak:.0f} MB, of which {figures['before_mb']:.0f} MB before anything was read "
        f"(target <= {PEAK_MB}: {'met' if peak <= PEAK_MB else 'missed'})"
    )
    limit = f" (target <= {FIRST_BATCH_S:g}: {'met' if first <= FIRST_BATCH_S else 'missed'})"
    print(
        f"  first batch after {first:.2f} s, checks of all records {figures['open_s']:.2f} s of it, "
        f"{figures['first_batch_cpu_s']:.2f} s of processor time{limit if kind in PICTURES else ''}"
    )
    print(f"  a private step of {BATCH} records {figures['step_s']:.2f} s (load {os.getloadavg()[0]:.1f})", flush=True)


def main() -> None:
    """Measure, print, and say which limits are kept."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of each folder of pictures on the disk")
    parser.add_argument("--other-gigabytes", type=float, default=1.0, help="size of each other folder on the disk")
    parser.add_argument("--steps", type=int, default=20, help="private steps")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this folder")
    parser.add_argument("--memory-mb", type=int, default=512, help="records_memory_mb of the hospital")
    parser.add_argument("--folder", type=Path, help="where the folders are made; the system's temporary one otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        print(json.dumps(train_on(options.train, options.kind[0], options.steps)))
        return
    if not (options.gigabytes > 0 and options.other_gigabytes > 0 and options.steps >= 1 and options.memory_mb >= 0):
        parser.error("sizes and --steps must be positive, --memory-mb not negative")
    figures: dict[str, float] = {}
    for kind in options.kind or KINDS:
        size = int((options.gigabytes if kind in PICTURES else options.other_gigabytes) * 1e9)
        found = measure(kind, size, options.steps, kept_mb=options.memory_mb, where=options.folder)
        report(kind, found)
        figures |= found
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
