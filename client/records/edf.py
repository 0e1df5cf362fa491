"""An EDF, EDF+, BDF or BDF+ recording -> channels.

Source:
    Kemp and Olivan 2003 (EDF+): the patient's field is code, sex, birthdate and name; X stands for what is left out.
"""

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

_FIELDS = ("patientname", "patientcode", "birthdate", "patient_additional", "admincode")


def read_edf(path: Path, patient: str | None, manifest: Manifest) -> list[Channel]:
    """The channels of a recording; samples are read one channel at a time.

    Args:
        path: The file.
        patient: Whose it is, as the row says; None where every row is a patient.
        manifest: Names the header fields that are left aside.

    Raises:
        RecordsError: The header identifies somebody and the manifest does not drop the field; its patient code is
            another patient's.
        Exception: The file is cut, or longer than its header says; or whatever pyedflib raises for one that is damaged
            or not contiguous.
    """
    with _opened(path) as file:
        _refuse_identifiers(path, file, patient, manifest)
        fields = [
            (file.getLabel(n), file.getPhysicalDimension(n), float(file.getSampleFrequency(n)), n)
            for n in range(file.signals_in_file)
        ]
    return [Channel(name, unit, frequency, partial(_samples, path, number)) for name, unit, frequency, number in fields]


def _samples(path: Path, number: int) -> NDArray[np.float64]:
    with _opened(path) as file:
        samples: NDArray[np.float64] = file.readSignal(number)
        return samples


def _opened(path: Path) -> Any:
    _check_length(path)  # pyedflib does it too, and prints what it finds
    return pyedflib.EdfReader(str(path), pyedflib.DO_NOT_READ_ANNOTATIONS, pyedflib.DO_NOT_CHECK_FILE_SIZE)


def _check_length(path: Path) -> None:
    """Refuse a file that is not as long as its header says.

    Raises:
        ValueError: It is not; or the header is none.
    """
    with path.open("rb") as stream:
        first = stream.read(256)
        signals = int(first[252:256])
        if not 0 < signals <= 4096:
            raise ValueError("no signals")
        fields = stream.read(256 * signals)[216 * signals : 224 * signals]
    samples = sum(int(fields[8 * number : 8 * number + 8]) for number in range(signals))
    sample_bytes = 3 if first[:1] == b"\xff" else 2  # BDF, EDF
    if path.stat().st_size != int(first[184:192]) + int(first[236:244]) * samples * sample_bytes:
        raise ValueError("another length")


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
