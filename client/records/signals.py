"""Recordings (WFDB, EDF), named by the rows of a table -> series: resampled to the task's steps.

Each file is decoded by ``wfdb_files.py`` or ``edf.py``, one recording in memory at a time: all of them once before a
study, since a recording may turn out to be empty, and then again when a batch needs them. A step holds the mean of its
samples (or their last or sum, as the task's variable says); where a recording has fewer samples than steps, or a gap,
the steps between are masked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.frames import check_header, texts
from client.records.manifest import SIGNALS, Manifest
from client.records.on_disk import OnDisk, Whole, digest, refuse_changed
from client.records.pictures import decoding, inside
from client.records.series import Account, Bins, Series, Total, refuse_sums
from client.records.stamps import stamps
from shared_models.errors import RecordsError
from shared_models.tasks import Numeric, SeriesInput

STEP_S = {"millisecond": 1e-3, "second": 1.0, "minute": 60.0, "hour": 3600.0}
_VOLT = {"v": 1.0, "mv": 1e-3, "uv": 1e-6, "\N{GREEK SMALL LETTER MU}v": 1e-6, "nv": 1e-9}  # of the case-folded unit


@dataclass(frozen=True)
class Channel:
    """One channel of one recording.

    Attributes:
        name: As the file has it.
        unit: Of the samples, as the file has it.
        frequency: Samples per second.
        read: Reads the samples, shape ``(k,)``; NaN where the file says that there is none.
        times: Seconds since the recording's begin of these samples, which grow; None where one follows the other from
            0 on. Where nothing was recorded there is no sample.
    """

    name: str
    unit: str
    frequency: float
    read: Callable[[], NDArray[np.float64]]
    times: Callable[[], NDArray[np.float64]] | None = None


def read_signals(manifest: Manifest, schema: SeriesInput, frame: pd.DataFrame) -> tuple[Account, OnDisk]:
    """Check the recording of each row by reading it, and say how it is read again and resampled.

    Args:
        manifest: Names the column of paths (WFDB's header ``.hea``, or ``.edf``) and translates channels' names.
        schema: Variables with their units and public ranges, and steps.
        frame: A row per record.

    Returns:
        What all recordings hold; and the series, as ``SeriesInput`` says, shape ``(n, steps, 3 * variables)``.

    Raises:
        RecordsError: A file is damaged or identifies somebody; a channel is missing, of another unit, or there twice; a
            sample is outside its public range and the manifest does not leave such samples out; names the file.
    """
    if schema.step_unit not in STEP_S:
        raise RecordsError(
            f"the task counts in {schema.step_unit}, and recordings in seconds",
            hint="Give series in long form: [series].",
        )
    column = manifest.column(SIGNALS)
    check_header(manifest.file, list(frame.columns), [column])
    paths = inside(manifest, frame, column)
    files = [_files(path) for path in paths]
    before = stamps(dict.fromkeys(file for some in files for file in some))
    patients = list(texts(frame[manifest.patient])) if manifest.patient else [None] * len(paths)

    def read(number: int) -> Series:
        return _read(paths[number], patients[number], manifest, schema)

    account, whole = _walk(read, len(paths), schema)
    refuse_changed(before)
    return account, OnDisk(
        lambda number: read(number).inputs[0],
        shape=(len(paths), schema.steps, 3 * len(schema.variables)),
        dtype=np.float32,
        files_of=lambda number: files[number],
        stamps=before,
        whole=whole,
    )


def _walk(read: Callable[[int], Series], count: int, schema: SeriesInput) -> tuple[Account, Whole]:
    """Read every recording once, and keep what they hold together, and a digest of each."""
    total, digests = Total(schema), []
    for number in range(count):
        one = read(number)
        total.add(one)
        digests.append(digest(one.inputs[0]))
    return total.account(), Whole(digests, math.nan, math.nan)


def _read(path: Path, patient: str | None, manifest: Manifest, schema: SeriesInput) -> Series:
    """One recording."""
    bins, left_out = Bins(schema, 1), {"missing": 0, "at other times": 0, "out of range": 0}
    with decoding(path):
        channels = _channels(path, patient, manifest)
        for variable in range(len(schema.variables)):
            _add(bins, path, variable, channels, schema, manifest, left_out)
        series, beyond = bins.finish()
        refuse_sums(manifest, schema, beyond)
        return replace(series, left_out=left_out | {"out of range": left_out["out of range"] + sum(beyond.values())})


def _add(
    bins: Bins,
    path: Path,
    number: int,
    channels: list[Channel],
    schema: SeriesInput,
    manifest: Manifest,
    left_out: dict[str, int],
) -> None:
    """One channel of one recording into its bins."""
    variable = schema.variables[number]
    channel = _find(path, channels, manifest.column(variable.name))
    values = channel.read() * _factor(path, channel, variable)
    # The small shift keeps a sample that is due exactly at a step's begin from falling into the step before.
    seconds = channel.times() if channel.times else np.arange(len(values)) / channel.frequency
    times = seconds / STEP_S[schema.step_unit] * (1 + 1e-12)
    known, held = np.isfinite(values), times < schema.steps
    good = (values >= variable.low) & (values <= variable.high)
    outside = known & held & ~good
    if manifest.out_of_range == "refuse" and outside.any():
        raise RecordsError(
            f"{path}, sample {np.flatnonzero(outside)[0]} of channel {channel.name!r}: is outside the public range "
            f"{variable.low:g} to {variable.high:g} {variable.unit} (and {int(outside.sum()) - 1} more like it)",
            hint='Mend the recording; or out_of_range = "leave-out" in the manifest.',
        )
    left_out["missing"] += int((~known).sum())
    left_out["at other times"] += int((known & ~held).sum())
    left_out["out of range"] += int(outside.sum())
    use = np.flatnonzero(good & held)
    bins.add(np.zeros(len(use), dtype=np.int64), times[use], np.full(len(use), number), values[use])


def _find(path: Path, channels: list[Channel], name: str) -> Channel:
    found = [channel for channel in channels if channel.name == name]
    if len(found) != 1:
        raise RecordsError(
            f"{path} has {'no' if not found else 'more than one'} channel {name!r}",
            hint="Translate the task's variables to the file's channels in [columns].",
        )
    return found[0]


def _factor(path: Path, channel: Channel, variable: Numeric) -> float:
    """From the file's unit to the task's: equal, or both of them volts."""
    here, there = (unit.strip().replace("\N{MICRO SIGN}", "u").casefold() for unit in (channel.unit, variable.unit))
    if here == there:
        return 1.0
    if here in _VOLT and there in _VOLT:
        return _VOLT[here] / _VOLT[there]
    raise RecordsError(
        f"{path}: channel {channel.name!r} is in {channel.unit.strip() or 'no unit'}, the task in {variable.unit}",
        hint="Convert before the export.",
    )


def _channels(path: Path, patient: str | None, manifest: Manifest) -> list[Channel]:
    if path.name.lower().endswith(".hea"):
        from client.records.wfdb_files import read_wfdb  # noqa: PLC0415  # it imports an extra

        return read_wfdb(path, manifest)
    if path.name.lower().endswith((".edf", ".bdf")):
        from client.records.edf import read_edf  # noqa: PLC0415  # it imports an extra

        return read_edf(path, patient, manifest)
    raise RecordsError(f"{path} is of no kind that is read", hint="Recordings end in .hea (WFDB), .edf or .bdf.")


def _files(path: Path) -> list[Path]:
    """The files of a recording: a WFDB header has its samples, or its segments, beside it."""
    if not path.name.lower().endswith(".hea"):
        return [path]
    with decoding(path):
        from client.records.wfdb_files import files_beside  # noqa: PLC0415  # it imports an extra

        return [path, *files_beside(path)]
