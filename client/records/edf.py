"""An EDF, EDF+, BDF or BDF+ recording -> channels.

Source:
    Kemp and Olivan 2003 (EDF+): the patient's field is code, sex, birthdate and name; X stands for what is left out.
    Section 2.2.4: each record's first annotation is the time at which it begins, and an EDF+D file has gaps between.
"""

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.records.extras import needed
from client.records.identifiers import refuse_found
from client.records.manifest import Manifest
from client.records.patient_ids import plain
from client.records.signals import Channel
from shared_models.errors import RecordsError

with needed("signals", "pyedflib"):
    import pyedflib

_QUIETLY = (pyedflib.DO_NOT_READ_ANNOTATIONS, pyedflib.DO_NOT_CHECK_FILE_SIZE)
_ANNOTATIONS, _WITH_GAPS = {b"EDF Annotations", b"BDF Annotations"}, {b"EDF+D", b"BDF+D"}
_AGAIN = "Export the recording again, or each part of it as a file of its own."
_BEGINS = re.compile(rb"([+-]\d+(?:\.\d+)?)\x14\x14")
_FIELDS = ("patientname", "patientcode", "birthdate", "patient_additional", "admincode")


def read_edf(path: Path, patient: str | None, manifest: Manifest) -> list[Channel]:
    """The channels of a recording; samples are read one channel at a time.

    Args:
        path: The file.
        patient: Whose it is, as the row says; None where every row is a patient.
        manifest: Names the header fields that are left aside.

    Guarantees:
        * Each sample of a file with gaps (EDF+D, BDF+D) has the time that its record says.

    Raises:
        RecordsError: The header identifies somebody and the manifest does not drop the field; its patient code is
            another patient's; records overlap, or do not say when they begin.
        Exception: The file is cut, or longer than its header says; or whatever pyedflib raises for one that is damaged.
    """
    with _opened(path) as file:
        _refuse_identifiers(path, file, patient, manifest)
        fields = [
            (file.getLabel(n), file.getPhysicalDimension(n), float(file.getSampleFrequency(n)), n)
            for n in range(file.signals_in_file)
        ]
    layout = _Layout.of(path)
    begins = _begins(path, layout, max(frequency for _, _, frequency, _ in fields)) if layout.gaps else None
    return [
        Channel(
            name,
            unit,
            frequency,
            partial(_samples, path, number),
            None if begins is None else partial(_times, begins, frequency, layout.duration_s),
        )
        for name, unit, frequency, number in fields
    ]


def _samples(path: Path, number: int) -> NDArray[np.float64]:
    with _opened(path) as file:
        samples: NDArray[np.float64] = file.readSignal(number)
        return samples


def _times(begins: NDArray[np.float64], frequency: float, duration_s: float) -> NDArray[np.float64]:
    """Seconds since the first record's begin of each sample of a channel."""
    within: NDArray[np.float64] = np.arange(round(frequency * duration_s)) / frequency
    return (begins[:, None] + within).ravel()


@dataclass(frozen=True)
class _Layout:
    """What the header says of the records.

    Attributes:
        begin: Byte at which the first record begins.
        duration_s: Of a record, in seconds.
        samples: Of each signal in a record; an annotation's are its bytes, two or three at a time.
        wide: Bytes of a sample.
        annotations: The first signal that is one.
        gaps: Whether there may be time between two records.
    """

    begin: int
    records: int
    duration_s: float
    samples: tuple[int, ...]
    wide: int
    annotations: int | None
    gaps: bool

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(self.samples) * self.wide

    @classmethod
    def of(cls, path: Path) -> "_Layout":
        """Read it.

        Raises:
            ValueError: There is no header, or the file is not as long as it says.
        """
        with path.open("rb") as stream:
            first = stream.read(256)
            signals = int(first[252:256])
            if not 0 < signals <= 4096:
                raise ValueError("no signals")
            fields = stream.read(256 * signals)
        samples = tuple(int(fields[216 * signals + 8 * n :][:8]) for n in range(signals))
        labels = [fields[16 * n :][:16].strip() for n in range(signals)]
        found = cls(
            begin=int(first[184:192]),
            records=int(first[236:244]),
            duration_s=float(first[244:252]),
            samples=samples,
            wide=3 if first[:1] == b"\xff" else 2,  # BDF, EDF
            annotations=next((n for n, label in enumerate(labels) if label in _ANNOTATIONS), None),
            gaps=first[192:197] in _WITH_GAPS,
        )
        if path.stat().st_size != found.begin + found.records * found.record_bytes:
            raise ValueError("another length")
        return found


def _begins(path: Path, layout: _Layout, frequency: float) -> NDArray[np.float64]:
    """When each record of a file with gaps begins, in seconds after the first.

    Raises:
        RecordsError: One does not say so, or begins before the one before is over: by half a sample or more of the
            fastest channel, since times are written with some digits only.
    """
    if layout.annotations is None or not layout.duration_s > 0:
        raise RecordsError(f"{path} has gaps, and does not say where", hint=_AGAIN)
    begins = np.empty(layout.records)
    skipped = sum(layout.samples[: layout.annotations]) * layout.wide
    with path.open("rb") as stream:
        for number in range(layout.records):
            stream.seek(layout.begin + number * layout.record_bytes + skipped)
            told = _BEGINS.match(stream.read(layout.samples[layout.annotations] * layout.wide))
            if told is None:
                raise RecordsError(f"{path}: record {number} does not say when it begins", hint=_AGAIN)
            begins[number] = float(told[1])
    overlapping = np.flatnonzero(np.diff(begins) < layout.duration_s - 0.5 / frequency)
    if len(overlapping):
        raise RecordsError(f"{path}: record {overlapping[0] + 1} begins before the one before is over", hint=_AGAIN)
    return begins - begins[0]


def _opened(path: Path) -> Any:
    if _Layout.of(path).gaps:  # its length is checked by this; pyedflib does it too, and prints what it finds
        return _without_gaps(path)
    return pyedflib.EdfReader(str(path), *_QUIETLY)


def _without_gaps(path: Path) -> Any:
    """What pyedflib, which reads no file with gaps, gets: a copy, in memory, whose header does not mention them."""
    content = bytearray(path.read_bytes())
    content[192:197] = content[192:196] + b"C"
    memory = os.memfd_create("recording")
    try:
        with os.fdopen(memory, "wb", closefd=False) as file:
            file.write(content)
        return pyedflib.EdfReader(f"/proc/self/fd/{memory}", *_QUIETLY)
    finally:
        os.close(memory)


def _refuse_identifiers(path: Path, file: Any, patient: str | None, manifest: Manifest) -> None:
    """A patient code that is the row's own patient is a pseudonym which the hospital has chosen, and a check."""
    header: dict[str, Any] = file.getHeader()
    filled = [name for name in _FIELDS if str(header.get(name) or "").strip("X,_. ")]
    if bytes(file.patient).strip(b"\0 "):  # EDF without +: one field for anything
        filled.append("patient")
    filled = [name for name in filled if name not in manifest.drop]
    if "patientcode" in filled and patient is not None:
        if plain(str(header["patientcode"])) != plain(patient):
            raise RecordsError(
                f"{path}: the patient code is not the patient that the row names",
                hint='Mend the row; or drop = ["patientcode"], if the row has a pseudonym that the file has not.',
            )
        filled.remove("patientcode")
    refuse_found(path, filled)
