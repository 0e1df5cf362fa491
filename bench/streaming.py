"""Private training on a folder of pictures that is larger than memory: peak memory, and seconds to the first batch.

Two folders are made, one after the other: ``xrays``, grey PNG files of 2048 x 2048 pixels, as radiographs come; and
``photographs``, PNG files in colour that have the task's own 224 x 224 pixels, so that the *decoded* set is as large as
the folder. Pixels are noise and files not compressed, so a gigabyte of pictures is a gigabyte on the disk; before
training they are pushed out of the page cache. A process of its own then reads and trains as a hospital's daemon does:
headers of all files, Poisson draws, decoding, clipping, noise. Its clock starts when it begins to read, and its peak is
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
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PEAK_MB, FIRST_BATCH_S = 1500, 5.0
KINDS = {"xrays": (2048, 1), "photographs": (224, 3)}  # pixels of a side, channels
SIZE = 224  # of the task
BATCH = 64

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
tasks = ["pictures"]
networks = ["cnn"]
minimum_noise_multiplier = 0.5
maximum_epsilon_per_study = 1.0
minimum_hospitals = 3
maximum_rounds = 100
maximum_attempts = 10
"""
MANIFEST = """
task = "pictures"
file = "index.csv"
label = "finding"
patient = "patient"
validation_fraction = 0.1

[images]
resize = "stretch"
"""


def make_folder(folder: Path, kind: str, size: int, *, kept_mb: int) -> int:
    """Write a hospital's folder with at least so many bytes of pictures, out of the page cache. Returns the files."""
    side, channels = KINDS[kind]
    records = folder / "records"
    records.mkdir()
    rng, files, written = np.random.default_rng(0), 0, 0
    with (records / "index.csv").open("w", encoding="utf-8") as index:
        index.write("patient,images,finding\n")
        while written < size:
            name = f"{files:06}.png"
            (records / name).write_bytes(png(rng.integers(0, 256, (side, side, channels), dtype=np.uint8)))
            index.write(f"p{files},{name},{('normal', 'abnormal')[files % 2]}\n")
            written += (records / name).stat().st_size
            files += 1
    (records / "manifest.toml").write_text(MANIFEST, encoding="utf-8")
    (folder / "hospital.toml").write_text(HOSPITAL.format(memory=kept_mb, size=max(10, files)), encoding="utf-8")
    os.sync()
    for path in records.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return files


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
    from shared_models.plan import Cnn
    from shared_models.tasks import Choice, ImageInput, Task

    torch.set_num_threads(1)
    task = Task(
        name="pictures",
        description="Noise.",
        input=ImageInput(channels=3 if KINDS[kind][1] == 3 else 1, height=SIZE, width=SIZE),
        heads=(Choice(name="finding", classes=("normal", "abnormal")),),
    )
    settings = read_settings(folder / "hospital.toml")
    model = build_network(Cnn(name="cnn"), task, seed=0)
    before_mb = peak_mb()
    started, used = time.perf_counter(), time.process_time()
    records = Source(task).current(settings).training
    opened = time.perf_counter()
    rate, random = min(1.0, BATCH / records.patient_count), SecureRandom.from_system()
    inputs, _, _ = records.select(PoissonLoader(records, rate, random).draw())
    first, used = time.perf_counter(), time.process_time() - used
    assert inputs.isfinite().all()
    del inputs
    report = local_steps(
        model, records, task, steps=steps, learning_rate=0.1, clip=1.0, noise_multiplier=1.0, sample_rate=rate,
        expected_batch=BATCH, random=random,
    )  # fmt: skip
    ended = time.perf_counter()
    assert report.not_finite == 0
    return {
        "open_s": opened - started,
        "first_batch_s": first - started,
        "first_batch_cpu_s": used,
        "step_s": (ended - first) / steps,
        "drawn": report.drawn,
        "peak_mb": peak_mb(),
        "before_mb": before_mb,
    }


def peak_mb() -> float:
    """The most memory that this process has had, in megabytes of a million bytes, as the kernel has counted."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def measure(kind: str, size: int, steps: int, *, kept_mb: int, where: Path | None) -> dict[str, float]:
    """Make one folder, train on it in a process of its own, and delete it."""
    with tempfile.TemporaryDirectory(prefix="konsil-bench-", dir=where) as temporary:
        folder = Path(temporary)
        files = make_folder(folder, kind, size, kept_mb=kept_mb)
        on_disk = sum(path.stat().st_blocks * 512 for path in (folder / "records").iterdir())
        command = [sys.executable, __file__, "--train", str(folder), "--kind", kind, "--steps", str(steps)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(found.stdout.splitlines()[-1]) | {"files": files, "folder_gb": on_disk / 1e9}
    return {f"streaming_{kind}_{name}": value for name, value in figures.items()}


def report(kind: str, found: dict[str, float]) -> None:
    """Print one folder's figures beside the limits."""
    figures = {name.removeprefix(f"streaming_{kind}_"): value for name, value in found.items()}
    peak, first = figures["peak_mb"], figures["first_batch_s"]
    print(f"{kind}: {figures['files']:.0f} files, {figures['folder_gb']:.2f} GB on the disk")
    print(
        f"  peak memory {peak:.0f} MB, of which {figures['before_mb']:.0f} MB before anything was read "
        f"(target <= {PEAK_MB}: {'met' if peak <= PEAK_MB else 'missed'})"
    )
    print(
        f"  first batch after {first:.2f} s, headers of all files {figures['open_s']:.2f} s of it, "
        f"{figures['first_batch_cpu_s']:.2f} s of processor time "
        f"(target <= {FIRST_BATCH_S:g}: {'met' if first <= FIRST_BATCH_S else 'missed'})"
    )
    print(f"  a private step of {BATCH} pictures {figures['step_s']:.2f} s (load {os.getloadavg()[0]:.1f})", flush=True)


def main() -> None:
    """Measure, print, and say which limits are kept."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of each folder on the disk")
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
    if not (options.gigabytes > 0 and options.steps >= 1 and options.memory_mb >= 0):
        parser.error("--gigabytes and --steps must be positive, --memory-mb not negative")
    figures: dict[str, float] = {}
    for kind in options.kind or KINDS:
        size = int(options.gigabytes * 1e9)
        found = measure(kind, size, options.steps, kept_mb=options.memory_mb, where=options.folder)
        report(kind, found)
        figures |= found
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
