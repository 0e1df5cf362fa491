"""Public data as a hospital would hold it: ``konsil-hospital example`` writes a folder that is ready for a study.

What a package ships is taken from there; anything else is fetched from its publisher, after the licence was shown and
accepted, and held against a pinned digest before anything reads it. A local copy goes the same way.
"""

import csv
import gzip
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.download import Pinned, fetch, read_copy
from client.enrol import SETTINGS, init
from client.made_up_notes import made_up_notes
from client.records.manifest import MANIFEST
from shared_models.errors import ConfigError
from shared_models.public_data import (
    HEART_CODES,
    HEART_COLUMNS,
    HEART_HOSPITALS,
    Table,
    breast_cancer_table,
    declared_size,
    every_fourth,
    write_manifest,
    write_table_folder,
)
from shared_models.tasks import find_task

EPSILON, ORDER = 4.0, 8  # of an example's budget
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"


@dataclass(frozen=True)
class Example:
    """One public data set.

    Attributes:
        task: That it is for.
        networks: That the folder's policy permits.
        licence: Of the data.
        source: Who made it, where it is, and what is to be known about it; sentences for people.
        parts: Hospitals that it consists of, if it does; the first is taken unless told otherwise.
        files: Which file each part needs, by part; one part of no name where there are none. Empty where a package
            ships the data, or where nothing can be fetched.
        write: Writes folders ``records`` and ``test`` below a folder, and returns the patients in ``records``. Its
            arguments are the folder, the part, and the content of the part's file, if there is one.
        optional: Without the file, something else stands in for it.
        elsewhere: What to do, where nothing is written here.
    """

    task: str
    networks: tuple[str, ...]
    licence: str
    source: str
    write: Callable[[Path, str, bytes | None], int]
    parts: tuple[str, ...] = ("",)
    files: Mapping[str, Pinned] = field(default_factory=dict)
    optional: bool = False
    elsewhere: str = ""


@dataclass(frozen=True)
class Written:
    """What was written: the hospital's settings, and how many patients its records have."""

    settings: Path
    patients: int
    public_size: int


def find_example(name: str) -> Example:
    """The example of that name.

    Raises:
        ConfigError: There is none; or its data has to be fetched by hand, and the hint says how.
    """
    if name not in EXAMPLES:
        raise ConfigError(f"there is no example {name!r}", hint=f"Choose one of {', '.join(sorted(EXAMPLES))}.")
    example = EXAMPLES[name]
    if example.elsewhere:
        raise ConfigError(f"the data of {name} is not fetched for you", hint=example.elsewhere)
    return example


def write_hospital(
    example: Example,
    folder: Path,
    *,
    part: str | None = None,
    data: Path | None = None,
    accept: Callable[[], bool],
    say: Callable[[str], None],
    name: str = "",
    coordinator: str = "127.0.0.1:9092",
    epsilon: float = EPSILON,
) -> Written:
    """Write a hospital: settings with a policy and a budget, keys, ledger, ``records``, and ``test`` beside them.

    Every fourth patient of each class goes into ``test``, unless the publisher has a test part.

    Guarantees:
        * Nothing is fetched before ``accept`` said yes, and nothing written before the data was checked.
        * Nothing that is there is overwritten, and where it fails, no records stay behind.

    Args:
        example: Which data.
        folder: Of the hospital; made if missing.
        part: Which of the example's hospitals.
        data: A local copy of the file (or a folder with it), in place of a download.
        accept: Whether the licence is accepted, which was shown before; asked where something is fetched.
        say: Told how far a download is.
        name: The hospital's name on a roster; the part's or the task's unless told otherwise.
        coordinator: host:port that the settings dial.
        epsilon: Of the budget.

    Raises:
        ConfigError: There is no such part, something is in the folder already, a package is missing, or the licence was
            not accepted.
        TransferError: The data cannot be fetched, or is not what it was when its digest was pinned.
    """
    part = part or example.parts[0]
    if part not in example.parts:
        raise ConfigError(
            f"there is no {part!r} in this example",
            hint=f"Choose one of {', '.join(example.parts)}." if example.parts != ("",) else "It has no parts.",
        )
    for taken in (folder / SETTINGS, folder / "records", folder / "test"):
        if taken.exists():
            raise ConfigError(f"{taken} exists: it is not overwritten", hint="Choose another folder.")
    content = _content(example, part, data, accept=accept, say=say)
    new = not folder.exists()
    try:
        patients = example.write(folder, part, content)
        size = declared_size(patients)
        init(
            folder,
            name=name or part or example.task,
            display_name=f"{part or example.task} (an example)",
            coordinator=coordinator,
            public_size=size,
            epsilon=epsilon,
            delta=1 / (10 * size),
            order=ORDER,
            tasks=(example.task,),
            networks=example.networks,
        )
    except BaseException:
        for made in [folder] if new else [folder / "records", folder / "test"]:
            shutil.rmtree(made, ignore_errors=True)
        raise
    return Written(folder / SETTINGS, patients, size)


def _content(
    example: Example, part: str, data: Path | None, *, accept: Callable[[], bool], say: Callable[[str], None]
) -> bytes | None:
    """The part's file, checked; None where there is none to be had or needed."""
    pinned = example.files.get(part)
    if data is not None:
        if pinned is None:
            raise ConfigError("this example reads no file", hint="Leave --data out.")
        return read_copy(pinned, data)
    if pinned is None or example.optional:
        return None
    if not accept():
        raise ConfigError("the licence was not accepted; nothing was fetched", hint="Read it; then --accept-licence.")
    return fetch(pinned, say=say)


# tables


def _write_parts(folder: Path, table: Table, manifest: Mapping[str, Any]) -> int:
    """Cut a table into ``records`` and ``test``; returns the rows of the former."""
    training, test = every_fourth(table.labels)
    for name, rows in (("records", training), ("test", test)):
        write_table_folder(folder / name, table.take(rows), manifest)
    return len(training)


def _write_breast_cancer(folder: Path, _part: str, _content: bytes | None) -> int:
    try:
        table = breast_cancer_table()
    except ImportError:
        raise ConfigError(
            "this example's data comes with scikit-learn, which is not installed",
            hint="pip install --constraint deploy/constraints.txt scikit-learn",
        ) from None
    return _write_parts(folder, table, {"task": "breast-cancer", "label": "diagnosis", "patient": "patient"})


def _write_heart_disease(folder: Path, _part: str, content: bytes | None) -> int:
    """UCI's ten first columns and its diagnosis; a cell without a value is a question mark, and its row is left out."""
    lines = [line for line in csv.reader(io.StringIO((content or b"").decode("ascii"))) if line]
    rows = tuple(tuple(_number(cell) for cell in [*line[:10], line[13]]) for line in lines)
    whole = np.array(["?" not in row for row in rows])
    labels = np.array([row[-1] != "0" for row in rows], dtype=np.int64)
    manifest = {
        "task": "heart-disease",
        "label": "num",
        "one_row_per_patient": True,
        "missing_values": ["?"],
        "incomplete_rows": "leave-out",
        "columns": HEART_COLUMNS,
        "categories": HEART_CODES,
    }
    table, training, test = Table((*HEART_COLUMNS.values(), "num"), rows, labels), *every_fourth(labels)
    for name, part in (("records", training), ("test", test)):
        write_table_folder(folder / name, table.take(part), manifest, usable=whole[part])
    return int(whole[training].sum())


def _write_lung(folder: Path, _part: str, _content: bytes | None) -> int:
    """NCCTG's trial; a quarter of its patients lack a value, and are left out."""
    try:
        from lifelines.datasets import load_lung  # noqa: PLC0415  # an example's alone
    except ImportError:
        raise ConfigError(
            "this example's data comes with lifelines, which is not installed",
            hint="pip install --constraint deploy/constraints.txt lifelines",
        ) from None
    data = load_lung()
    rows = tuple(
        tuple("NA" if np.isnan(value) else f"{value:g}" for value in row) for row in data.to_numpy(dtype=float)
    )
    whole = np.array(["NA" not in row[1:] for row in rows])  # the first is the institution, which no task asks for
    manifest = {
        "task": "lung-survival",
        "one_row_per_patient": True,
        "missing_values": ["NA"],
        "incomplete_rows": "leave-out",
        "columns": {
            "ecog": "ph.ecog",
            "karnofsky_physician": "ph.karno",
            "karnofsky_patient": "pat.karno",
            "meal_calories": "meal.cal",
            "weight_loss": "wt.loss",
            "days": "time",
            "died": "status",
        },
        "categories": {"sex": {"1": "male", "2": "female"}, "died": {"0": "no", "1": "yes"}},
    }
    table = Table(tuple(data.columns), rows, data["status"].to_numpy(dtype=np.int64))
    _write_parts(folder, table, manifest)
    return int(whole[every_fourth(table.labels)[0]].sum())


def _number(cell: str) -> str:
    """As codes are written: ``1.0`` is ``1``."""
    return cell if cell == "?" else f"{float(cell):g}"


# texts


def _write_notes(folder: Path, _part: str, content: bytes | None) -> int:
    """MTSamples' notes, or made-up ones."""
    classes = find_task("note-specialty").classes
    if content is None:
        notes: Sequence[tuple[int, str]] = made_up_notes(classes)
    else:
        lines = csv.DictReader(io.StringIO(gzip.decompress(content).decode("utf-8"), newline=""))
        notes = [(int(line["label"]), line["text"]) for line in lines]
    rows = tuple((f"note-{number:04d}", text, classes[label]) for number, (label, text) in enumerate(notes, start=1))
    table = Table(("note", "text", "specialty"), rows, np.array([label for label, _ in notes], dtype=np.int64))
    manifest = {"task": "note-specialty", "label": "specialty", "patient": "note", "found_in_text": "mask"}
    return _write_parts(folder, table, manifest)


# images


def _write_pneumonia(folder: Path, _part: str, content: bytes | None) -> int:
    """The publisher's training and validation images are the hospital's; its test images are for testing."""
    with np.load(io.BytesIO(content or b""), allow_pickle=False) as arrays:
        parts = {
            name: tuple(np.concatenate([arrays[f"{part}_{what}"] for part in of]) for what in ("images", "labels"))
            for name, of in (("records", ("train", "val")), ("test", ("test",)))
        }
    for name, (images, labels) in parts.items():
        _write_images(folder / name, images, labels.ravel())
    return len(parts["records"][0])


def _write_images(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "images.npz", images=images, finding=labels.astype(np.int64))
    task = find_task("pneumonia")
    manifest = {
        "task": task.name,
        "file": "images.npz",
        "label": "finding",
        "one_row_per_patient": True,
        "validation_fraction": 0.0,
        "categories": {task.label: {str(number): name for number, name in enumerate(task.classes)}},
    }
    write_manifest(folder / MANIFEST, manifest)


_HEART_DIGESTS = {
    "cleveland": (18461, "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"),
    "hungarian": (10263, "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"),
    "switzerland": (4109, "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"),
    "va": (6737, "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"),
}

EXAMPLES: Mapping[str, Example] = MappingProxyType(
    {
        "breast-cancer": Example(
            task="breast-cancer",
            networks=("logistic-regression", "mlp"),
            licence="CC BY 4.0",
            source="Breast Cancer Wisconsin (Diagnostic), W. Wolberg, O. Mangasarian, N. Street, W. Street (1993), UCI,"
            " as scikit-learn ships it. Patient numbers are made up.",
            write=_write_breast_cancer,
        ),
        "heart-disease": Example(
            task="heart-disease",
            networks=("logistic-regression", "mlp"),
            licence="CC BY 4.0",
            source="Heart Disease, A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano (1989), UCI, doi "
            "10.24432/C52P4X. Rows with a missing value are left out by the manifest.",
            write=_write_heart_disease,
            parts=tuple(HEART_HOSPITALS),
            files={
                part: Pinned(
                    name=f"processed.{file}.data",
                    url=f"{_UCI}processed.{file}.data",
                    most=_HEART_DIGESTS[file][0],
                    digests=(f"sha256:{_HEART_DIGESTS[file][1]}",),
                )
                for part, file in HEART_HOSPITALS.items()
            },
        ),
        "pneumonia": Example(
            task="pneumonia",
            networks=("cnn",),
            licence="CC BY 4.0",
            source="PneumoniaMNIST of MedMNIST v2, J. Yang et al. (2023), from D. Kermany et al. (2018), doi "
            "10.5281/zenodo.10519652. It does not say which images are of one child: each is declared a patient, "
            "which is not true of all.",
            write=_write_pneumonia,
            files={
                "": Pinned(
                    name="pneumoniamnist.npz",
                    url="https://zenodo.org/records/10519652/files/pneumoniamnist.npz?download=1",
                    most=5_000_000,
                    # The publisher states an MD5 alone. The other file has the same images in another order.
                    digests=(
                        "md5:28209eda62fecd6e6a2d98b1501bb15f",
                        "sha256:31010242097ace3a3fe9b97190125695de381f11e8b5d74b7b9610ea6c6e4819",
                    ),
                )
            },
        ),
        "note-specialty": Example(
            task="note-specialty",
            networks=("transformer",),
            licence="CC0; the made-up notes have no licence to keep to",
            source="Made-up notes of a few sentences, which mean nothing. With --data: transcribed notes of MTSamples, "
            "collected by T. Boyle, in the eight specialties of the task (mtsamples8.csv.gz).",
            write=_write_notes,
            files={
                "": Pinned(
                    name="mtsamples8.csv.gz",
                    url="https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions",
                    most=2_000_000,
                    digests=("sha256:4638dd92131441c4e7d1f87ce1e8a2f36cc325e56578756fab23003cf38cf757",),
                )
            },
            optional=True,
        ),
        "lung": Example(
            task="lung-survival",
            networks=("proportional-hazards", "mlp"),
            licence="none is stated; it is part of R's package survival (LGPL) and of lifelines (MIT)",
            source="Advanced lung cancer, C. Loprinzi et al. (1994), North Central Cancer Treatment Group; as "
            "lifelines ships it. Rows with a missing value are left out by the manifest.",
            write=_write_lung,
        ),
        "icu-mortality": Example(
            task="icu-mortality",
            networks=("lstm", "transformer"),
            licence="ODC-BY 1.0, as PhysioNet's page says",
            source="PhysioNet/CinC Challenge 2012.",
            write=lambda _folder, _part, _content: 0,
            elsewhere="Get set-a and Outcomes-a.txt from https://physionet.org/content/challenge-2012/1.0.0/ and "
            "accept PhysioNet's terms there; docs/hospital.md (Series) shows the manifest.",
        ),
    }
)
