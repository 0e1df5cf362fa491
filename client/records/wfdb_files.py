"""A WFDB recording (header and samples) -> channels.

Source:
    WFDB applications guide, header(5): names and comments of the header, and its checksums, the sums of all samples of
    a channel modulo 2**16; multi-segment records, whose first segment may be a layout of length 0, and null segments.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from client.records.extras import needed
from client.records.identifiers import is_identifier, refuse_found
from client.records.manifest import Manifest
from client.records.pictures import decoding
from client.records.signals import Channel
from shared_models.errors import RecordsError

with needed("signals", "wfdb"):
    import wfdb

_NULL = "~"  # a segment, or a file of samples, that there is none of
_DAMAGED = "A file is damaged or was replaced. Export the recording again."


def files_beside(path: Path) -> list[Path]:
    """The files that a header names, each beside it: its samples', or those of its segments with their headers.

    Raises:
        RecordsError: A segment has segments.
        Exception: Whatever wfdb raises for a damaged header.
    """
    header = _header(path)
    if isinstance(header, wfdb.MultiRecord):
        there = [(one.path, *_samples(one.path, one.header)) for one in _segments(path, header) if one]
        return list(dict.fromkeys(file for files in there for file in files))
    return _samples(path, header)


def _samples(path: Path, header: Any) -> list[Path]:
    return [path.parent / name for name in dict.fromkeys(header.file_name or []) if name != _NULL]


def read_wfdb(path: Path, manifest: Manifest) -> list[Channel]:
    """Read a recording, every channel at its own frequency.

    Guarantees:
        * Samples agree with the header's checksums, where it has some.
        * Of several segments each sample has its time; a null segment, and a segment without a channel, is a gap.

    Args:
        path: The header.
        manifest: Names the fields of the header's comments that are left aside.

    Raises:
        RecordsError: Comments identify somebody and the manifest does not drop them; a checksum does not agree; a
            segment is not what the header of the whole says, or has another unit than the one before.
        Exception: Whatever wfdb raises for a damaged file.
    """
    header = _header(path)
    _refuse_identifiers(path, header.comments or [], manifest)
    if isinstance(header, wfdb.MultiRecord):
        return _joined(path, header, manifest)
    return _channels(path)


def _joined(path: Path, header: Any, manifest: Manifest) -> list[Channel]:
    """The channels of all segments, in the order in which they come up."""
    found: dict[str, list[tuple[float, Channel]]] = {}
    start, fs = 0, float(header.fs)
    for one, length in zip(_segments(path, header), map(int, header.seg_len), strict=True):
        if one is not None:
            segment = one.path
            if one.header.fs != header.fs or (length and one.header.sig_len != length):
                raise RecordsError(
                    f"{segment} is not the segment that {path.name} says: of another length or frequency", hint=_DAMAGED
                )
            _refuse_identifiers(segment, one.header.comments or [], manifest)
            channels = _channels(segment) if length else []  # the first may be a layout, and has no samples
            if len({channel.name for channel in channels}) < len(channels):
                raise RecordsError(f"{segment} has a channel twice", hint="Give channels names of their own.")
            for channel in channels:
                found.setdefault(channel.name, []).append((start / fs, channel))
        start += length
    if header.sig_len not in {None, start}:
        raise RecordsError(f"{path} is longer or shorter than its segments", hint=_DAMAGED)
    return [_join(path, pieces) for pieces in found.values()]


def _join(path: Path, pieces: list[tuple[float, Channel]]) -> Channel:
    _, first = pieces[0]
    if any(channel.unit != first.unit for _, channel in pieces):
        raise RecordsError(f"{path}: channel {first.name!r} changes its unit", hint="Export it in one unit.")
    samples = [channel.read() for _, channel in pieces]
    times = [
        start + np.arange(len(some)) / channel.frequency for (start, channel), some in zip(pieces, samples, strict=True)
    ]
    return Channel(
        first.name, first.unit, first.frequency, partial(np.concatenate, samples), partial(np.concatenate, times)
    )


class _Segment(NamedTuple):
    """A segment's header: where it is, and what it says."""

    path: Path
    header: Any


def _segments(path: Path, header: Any) -> list[_Segment | None]:
    """Each segment; None of a null one."""
    paths = [None if name == _NULL else path.with_name(f"{name}.hea") for name in header.seg_name]
    found = [None if one is None else _Segment(one, _header(one)) for one in paths]
    for one in found:
        if one is not None and isinstance(one.header, wfdb.MultiRecord):
            raise RecordsError(f"{one.path} is a segment and has segments", hint=_DAMAGED)
    return found


def _channels(path: Path) -> list[Channel]:
    """The channels of one segment."""
    record: Any = wfdb.rdrecord(str(path.with_suffix("")), physical=False, smooth_frames=False)
    for number, samples in enumerate(record.e_d_signal):
        expected, skew = record.checksum[number], (record.skew or [0])[number] if record.skew else 0
        if expected is not None and not skew and int(np.sum(samples, dtype=np.int64)) % 65536 != int(expected) % 65536:
            raise RecordsError(
                f"{path}: the samples of channel {record.sig_name[number]!r} do not agree with the header's checksum",
                hint=_DAMAGED,
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
    with decoding(path):  # a segment's is named by its own file
        return wfdb.rdheader(str(path.with_suffix("")))


def _refuse_identifiers(path: Path, comments: list[str], manifest: Manifest) -> None:
    """Comments are free text, customarily ``name: value`` or ``<name>: value``; a long one may hold several."""
    names = [part.split()[-1].strip("<>#") for line in comments for part in line.split(":")[:-1] if part.split()]
    whole = [line.partition(":")[0].strip("<># ") for line in comments if ":" in line]
    found = dict.fromkeys(name for name in (*whole, *names) if is_identifier(name))
    refuse_found(path, [name for name in found if name not in manifest.drop])
