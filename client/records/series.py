"""Measurements in long form (record, time, variable, value) -> series: binned, masked, checked against public ranges.

The file may be larger than memory, and so may be the series. It is read in parts; where there is no room for the bins
of all records at once, measurements are dealt to heaps of neighbouring records first, and heap after heap is binned.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.records.frames import CHECK, check_header, checked, explained, header_of, missing, refuse, rows_of, texts
from client.records.identifiers import refuse_columns
from client.records.manifest import LongForm, Manifest
from client.records.on_disk import walk
from client.records.scratch import ROOM, Room, Stored
from shared_models.errors import RecordsError
from shared_models.tasks import Numeric, SeriesInput

_AT_ONCE = 200_000  # rows of the long form in memory
_MOST_HEAPS = 500  # each is a file without a name
_SHARE = 0.25  # of the room, for the bins of one heap
_BINS = 64  # bytes that binning takes for a step of a variable, at most
_MEASUREMENT = np.dtype([("record", "<i4"), ("variable", "<i4"), ("time", "<f8"), ("value", "<f8")])
_STEP = {
    unit: pd.Timedelta(1, code) for unit, code in (("second", "s"), ("minute", "min"), ("hour", "h"), ("day", "D"))
}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Account:
    """What all rows' series hold, and what was left aside.

    Attributes:
        seen: Of each variable the cells with a value, the least and the greatest value.
        left_out: Measurements that were left aside, by reason.
        empty: Rows without any value.
    """

    seen: Mapping[str, tuple[int, float, float]]
    left_out: Mapping[str, int]
    empty: NDArray[np.bool_]


@dataclass(frozen=True)
class Series(Account):
    """The series of all rows too.

    Attributes:
        inputs: As ``SeriesInput`` says, shape ``(n, steps, 3 * variables)``.
    """

    inputs: NDArray[np.float32]


class Bins:
    """Values of many records, gathered into steps.

    Guarantees:
        * A cell holds the last, the mean or the sum of the values in its step, as the task's variable says; of two at
          the same time the later in the file is the last.
        * The order in which values are added changes nothing else.

    Args:
        schema: Steps and variables.
        records: How many.
    """

    def __init__(self, schema: SeriesInput, records: int) -> None:
        self._schema = schema
        shape = (records, schema.steps, len(schema.variables))
        self._values = np.zeros(shape, dtype=np.float64)
        self._counts = np.zeros(shape, dtype=np.int32)
        self._times = np.full(shape, -np.inf, dtype=np.float64)
        self._least, self._greatest = np.full(shape[2], np.inf), np.full(shape[2], -np.inf)

    def add(self, records: NDArray[np.int64], times: Floats, variables: NDArray[np.int64], values: Floats) -> None:
        """Add values that are inside their public range.

        Args:
            records: Row of each, shape ``(k,)``.
            times: When, in steps since the record's start, each in ``[0, steps)``.
            variables: Index of the variable.
            values: In the variable's unit.
        """
        cells = (records, times.astype(np.int64), variables)
        np.minimum.at(self._least, variables, values)
        np.maximum.at(self._greatest, variables, values)
        np.add.at(self._counts, cells, 1)
        is_last = np.array([v.within_step == "last" for v in self._schema.variables])[variables]
        added = tuple(index[~is_last] for index in cells)
        np.add.at(self._values, added, values[~is_last])
        order = np.flatnonzero(is_last)[np.argsort(times[is_last], kind="stable")]
        order = order[times[order] >= self._times[tuple(index[order] for index in cells)]]
        ordered = tuple(index[order] for index in cells)
        # Of several values for one cell numpy keeps the one that comes last: the latest.
        self._values[ordered], self._times[ordered] = values[order], times[order]

    def finish(self) -> tuple[Series, dict[str, int]]:
        """Encode what was gathered.

        Returns:
            The series; and by variable how many sums of several values in one step were outside its public range. Those
            are left out, and counted.
        """
        mask, beyond = self._counts > 0, {}
        for number, variable in enumerate(self._schema.variables):
            cells, here = self._values[:, :, number], mask[:, :, number]
            if variable.within_step == "mean":
                np.divide(cells, self._counts[:, :, number], out=cells, where=here)
                np.clip(cells, variable.low, variable.high, out=cells, where=here)  # rounding, in the last digit
            outside = here & ~((cells >= variable.low) & (cells <= variable.high))
            here &= ~outside
            beyond[variable.name] = int(outside.sum())
            cells[here] = variable.scaled(cells[here])
        self._values[~mask] = 0
        inputs = np.concatenate([self._values, mask, elapsed(mask)], axis=2, dtype=np.float32)
        counts = mask.sum(axis=(0, 1)).tolist()
        fields = zip(self._schema.variables, counts, self._least.tolist(), self._greatest.tolist(), strict=True)
        return Series(
            inputs=inputs,
            seen={variable.name: (count, least, greatest) for variable, count, least, greatest in fields},
            left_out={"out of range": sum(beyond.values())},
            empty=np.logical_not(mask.any(axis=(1, 2))),
        ), beyond


def refuse_sums(manifest: Manifest, schema: SeriesInput, beyond: Mapping[str, int]) -> None:
    """Refuse sums of several values in one step that are outside their variable's public range, if the manifest does.

    Raises:
        RecordsError: Names the first such variable, and how many sums that are.
    """
    for variable in schema.variables:
        if manifest.out_of_range == "refuse" and beyond[variable.name]:
            raise RecordsError(
                f"{manifest.file}: the sum of {variable.name} in one step is outside the public range {variable.low:g} "
                f"to {variable.high:g} {variable.unit} ({beyond[variable.name]} times)",
                hint=CHECK,
            )


class Total:
    """What several stretches of records hold together.

    Args:
        schema: Names the variables.
        left_out: Measurements that were left aside already, by reason.
    """

    def __init__(self, schema: SeriesInput, left_out: Mapping[str, int] | None = None) -> None:
        self._seen = {variable.name: (0, np.inf, -np.inf) for variable in schema.variables}
        self._left_out, self._empty = Counter(left_out), [np.empty(0, dtype=np.bool_)]

    def add(self, found: Account) -> None:
        """The next stretch."""
        for name, (cells, least, greatest) in found.seen.items():
            known = self._seen[name]
            self._seen[name] = known[0] + cells, min(known[1], least), max(known[2], greatest)
        self._left_out.update(found.left_out)
        self._empty.append(found.empty)

    def account(self) -> Account:
        """Of all stretches."""
        return Account(self._seen, dict(self._left_out), np.concatenate(self._empty))


def elapsed(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Steps since a variable was last seen before each step; since the start where it never was.

    Source:
        Che et al. 2018 (GRU-D), equation for the time interval: 0 at the first step.
    """
    found = np.zeros(mask.shape, dtype=np.float32)
    for step in range(1, mask.shape[1]):
        found[:, step] = np.where(mask[:, step - 1], 1, found[:, step - 1] + 1)
    return found


def read_long_form(
    manifest: Manifest, schema: SeriesInput, frame: pd.DataFrame, room: Room = ROOM
) -> tuple[Account, Stored]:
    """Read and bin the measurements of each row.

    Args:
        manifest: Names the long form and its columns.
        schema: Variables with their public ranges, and steps.
        frame: A row per record; its label and patient are read elsewhere.
        room: Where series may lie; binning takes up to a quarter more.

    Returns:
        What all series hold; and the series, as ``SeriesInput`` says, shape ``(n, steps, 3 * variables)``.

    Raises:
        RecordsError: A column or variable is missing; two rows have one key; a time or value is no number, or a value
            is outside its public range and the manifest does not leave such values out; with file, row and column.
    """
    long_form = manifest.series
    assert long_form is not None  # noqa: S101  # whoever calls has looked
    rows = _keys(manifest, frame, long_form)
    starts = _starts(manifest, frame, long_form)
    names = {manifest.column(variable.name): number for number, variable in enumerate(schema.variables)}
    found = np.zeros(len(names), dtype=np.bool_)
    left_out = dict.fromkeys(("of other records", "of other variables", "missing", "at other times", "out of range"), 0)
    file = manifest.model_copy(update={"file": long_form.file})  # errors name the file that they are in

    def measurements(part: pd.DataFrame) -> NDArray[np.void]:
        records = rows.get_indexer(pd.Index(texts(part[long_form.record])))
        variables = texts(part[long_form.variable]).map(lambda name: names.get(name, -1)).to_numpy(dtype=np.int64)
        here, known = records >= 0, variables >= 0
        left_out["of other records"] += int((~here).sum())
        left_out["of other variables"] += int((here & ~known).sum())
        kept, records, variables = part[here & known], records[here & known], variables[here & known]
        found[variables] = True
        values, times = _measured(file, kept, variables, schema), _times(file, kept, records, starts, schema)
        inside = _inside_the_range(file, kept, variables, values, schema)
        held = (times >= 0) & (times < schema.steps)
        empty = np.isnan(values)
        left_out["missing"] += int(empty.sum())
        left_out["at other times"] += int((held < ~empty).sum())
        left_out["out of range"] += int((~inside & held & ~empty).sum())
        use = held & inside & ~empty
        measured = np.empty(int(use.sum()), dtype=_MEASUREMENT)
        for name, column in (("record", records), ("variable", variables), ("time", times), ("value", values)):
            measured[name] = column[use]
        return measured

    heaps = _Heaps(len(frame), schema, room)
    for measured in checked(_parts(file, long_form), measurements):
        heaps.add(measured)
    _refuse_absent(schema, found, long_form)
    total, beyond = Total(schema, left_out), Counter[str]()
    series = Stored((schema.steps, 3 * len(schema.variables)), np.float32, room)
    for bins in heaps.binned():
        stretch, sums = bins.finish()
        total.add(stretch)
        beyond.update(sums)
        series.append(stretch.inputs)
    refuse_sums(file, schema, beyond)
    return total.account(), series


class _Heaps:
    """Measurements by stretches of neighbouring records, each so short that there is room for its bins.

    Args:
        records: How many.
        schema: Steps and variables.
        room: For the bins of one stretch; measurements of several lie on the disk until it is their turn.
    """

    def __init__(self, records: int, schema: SeriesInput, room: Room) -> None:
        self._schema, self._records = schema, records
        most = int(_SHARE * room.memory) // (_BINS * schema.steps * len(schema.variables))
        self._most = max(1, most, records // _MOST_HEAPS + 1)
        self._whole = Bins(schema, records) if records <= self._most else None
        elsewhere = Room(0, room.folder)
        heaps = 0 if self._whole else -(-records // self._most)
        self._heaps = [Stored((), _MEASUREMENT, elsewhere) for _ in range(heaps)]

    def add(self, measured: NDArray[np.void]) -> None:
        """Measurements, later in the file than those before."""
        if self._whole:
            _bin(self._whole, measured, 0)
            return
        heap = measured["record"] // self._most
        for number in np.unique(heap):
            self._heaps[number].append(measured[heap == number])

    def binned(self) -> Iterator[Bins]:
        """The bins of each stretch, in the records' order."""
        if self._whole:
            yield self._whole
        for number, heap in enumerate(self._heaps):
            first = number * self._most
            bins = Bins(self._schema, min(self._most, self._records - first))
            for measured in walk(heap):
                _bin(bins, measured, first)
            yield bins


def _bin(bins: Bins, measured: NDArray[np.void], first: int) -> None:
    records, variables = (measured[name].astype(np.int64) for name in ("record", "variable"))
    bins.add(records - first, measured["time"], variables, measured["value"])


# the rows that measurements belong to


def _keys(manifest: Manifest, frame: pd.DataFrame, long_form: LongForm) -> "pd.Index[str]":
    """The key of each row, each there once."""
    wanted = [long_form.record, *([long_form.start] if long_form.start else [])]
    check_header(manifest.file, list(frame.columns), wanted)
    refuse(manifest, frame, long_form.record, missing(frame[long_form.record], manifest), "the key is missing")
    keys = texts(frame[long_form.record])
    refuse(manifest, frame, long_form.record, keys.duplicated().to_numpy(), "an earlier row has this key", quoted=False)
    return pd.Index(keys)


def _starts(manifest: Manifest, frame: pd.DataFrame, long_form: LongForm) -> NDArray[np.datetime64] | None:
    if long_form.start is None:
        return None
    return _instants(manifest, frame, long_form.start)


def _instants(manifest: Manifest, frame: pd.DataFrame, column: str) -> NDArray[np.datetime64]:
    """ISO 8601 times; those without a zone are all taken for one and the same."""
    found = pd.to_datetime(texts(frame[column]), format="ISO8601", errors="coerce", utc=True)
    refuse(manifest, frame, column, found.isna().to_numpy(), "is no ISO 8601 time", quoted=False)
    return found.dt.tz_localize(None).to_numpy(dtype="datetime64[us]")  # of nanoseconds 300 years wrap around


# the measurements


def _parts(file: Manifest, long_form: LongForm) -> Iterator[pd.DataFrame]:
    """The long form in parts, with the columns that are needed; the index is the row number of an editor."""
    path = long_form.file
    wanted = [long_form.record, long_form.time, long_form.variable, long_form.value]
    with explained(path):
        names = header_of(path)
        check_header(path, names, wanted)
        refuse_columns(path, names, drop=file.drop, mapped=wanted)
        yield from rows_of(path, names, _AT_ONCE, wanted)


def _measured(file: Manifest, kept: pd.DataFrame, variables: NDArray[np.int64], schema: SeriesInput) -> Floats:
    """Values as numbers; NaN where one is missing."""
    column = file.series.value  # type: ignore[union-attr]  # whoever calls has looked
    absent = missing(kept[column], file)
    cells = texts(kept[column])
    values = pd.to_numeric(cells.where(~absent, "0"), errors="coerce").to_numpy(dtype=np.float64) + 0.0
    wrong = ~np.isfinite(values)
    unit = schema.variables[variables[np.argmax(wrong)]].unit if len(wrong) else ""
    refuse(file, kept, column, wrong, f"is not a number ({unit} expected)", quoted=False)
    values[absent] = np.nan
    return values


def _times(
    file: Manifest,
    kept: pd.DataFrame,
    records: NDArray[np.int64],
    starts: NDArray[np.datetime64] | None,
    schema: SeriesInput,
) -> Floats:
    """Steps since each record's start."""
    column = file.series.time  # type: ignore[union-attr]  # whoever calls has looked
    if starts is not None:
        if schema.step_unit not in _STEP:
            raise RecordsError(
                f"the task counts in {schema.step_unit}, and [series] names a start", hint="Give times as numbers."
            )
        since = _instants(file, kept, column) - starts[records]
        return since / _STEP[schema.step_unit].to_timedelta64()
    times = pd.to_numeric(texts(kept[column]), errors="coerce").to_numpy(dtype=np.float64)
    refuse(file, kept, column, ~np.isfinite(times), f"is not a time ({schema.step_unit} expected)", quoted=False)
    return times


def _inside_the_range(
    file: Manifest, kept: pd.DataFrame, variables: NDArray[np.int64], values: Floats, schema: SeriesInput
) -> NDArray[np.bool_]:
    """Which values are inside their variable's public range, or missing; refuses others unless they are left out."""
    low, high = (np.array([getattr(v, end) for v in schema.variables])[variables] for end in ("low", "high"))
    outside = (values < low) | (values > high)
    if file.out_of_range == "refuse" and len(outside):
        variable: Numeric = schema.variables[variables[np.argmax(outside)]]
        what = f"{variable.name} is outside the public range {variable.low:g} to {variable.high:g} {variable.unit}"
        refuse(file, kept, file.series.value, outside, what, quoted=False)  # type: ignore[union-attr]
    return ~outside


def _refuse_absent(schema: SeriesInput, found: NDArray[np.bool_], long_form: LongForm) -> None:
    """A variable without a single measurement is more likely misspelt than never measured."""
    names = [variable.name for variable, here in zip(schema.variables, found, strict=True) if not here]
    absent = [name for name in names if name not in long_form.absent_variables]
    if absent:
        raise RecordsError(
            f"{long_form.file} has no measurement of {', '.join(absent)}",
            hint="Translate the name in [columns]; or declare absent_variables = [...] in [series].",
        )
