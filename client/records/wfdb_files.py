"""A WFDB recording (header and samples) -> channels.

Source:
    WFDB applications guide, header(5): names and comments of the header, and its checksums, the sums of all samples of
    a channel modulo 2**16.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client.records.extras import needed
from client.records.identifiers import is_identifier, refuse_found
from client.records.manifest import Manifest
from client.records.signals import Channel
from shared_models.errors import RecordsError

with needed("signals", "wfdb"):
    import wfdb


def sample_files(path: Path) -> list[Path]:
    """The files of samples that a header names, each beside it.

    Raises:
        RecordsError: It has several segments.
        Exception: Whatever wfdb raises for a damaged header.
    """
    header = _header(path)
    return [path.parent / name for name in dict.fromkeys(header.file_name or [])]  # wfdb reads no name with a slash


def read_wfdb(path: Path, manifest: Manifest) -> list[Channel]:
    """Read a recording, every channel at its own frequency.

    Guarantees:
        * Samples agree with the header's checksums, where it has some.

    Args:
        path: The header.
        manifest: Names the fields of the header's comments that are left aside.

    Raises:
        RecordsError: Comments identify somebody and the manifest does not drop them; a checksum does not agree.
        Exception: Whatever wfdb raises for a damaged file.
    """
    header = _header(path)
    _refuse_identifiers(path, header.comments or [], manifest)
    record: Any = wfdb.rdrecord(str(path.with_suffix("")), physical=False, smooth_frames=False)
    for number, samples in enumerate(record.e_d_signal):
        expected, skew = record.checksum[number], (record.skew or [0])[number] if record.skew else 0
        if expected is not None and not skew and int(np.sum(samples, dtype=np.int64)) % 65536 != int(expected) % 65536:
            raise RecordsError(
                f"{path}: the samples of channel {record.sig_name[number]!r} do not agree with the header's checksum",
                hint="A file is damaged or was replaced. Export the recording again.",
            )
    channels = []
    for number, samples in enumerate(record.dac(expanded=True)):
        frequency = float(record.fs) * int(record.samps_per_frame[number])
        if not (math.isfinite(frequency) and frequency > 0):
            raise ValueError("no frequency")
        unit = record.units[number] or "mV"  # what header(5) says of a unit that is left out
        channels.append(Channel(record.sig_name[number], unit, frequency, partial(np.asarray, samples)))
    return channels


def _header(path: Path) -> Any:
    header = wfdb.rdheader(str(path.with_suffix("")))
    if not isinstance(header, wfdb.Record):
        raise RecordsError(f"{path} has several segments", hint="Export it as one segment.")
    return header


def _refuse_identifiers(path: Path, comments: list[str], manifest: Manifest) -> None:
    """Comments are free text, customarily ``name: value`` or ``<name>: value``; a long one may hold several."""
    names = [part.split()[-1].strip("<>#") for line in comments for part in line.split(":")[:-1] if part.split()]
    whole = [line.partition(":")[0].strip("<># ") for line in comments if ":" in line]
    found = dict.fromkeys(name for name in (*whole, *names) if is_identifier(name))
    refuse_found(path, [name for name in found if name not in manifest.drop])
