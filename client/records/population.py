"""The patients that a round uses: the records as they are on the disk now, less those who said no.

Files of patients are opened for reading only. Nothing of them is written anywhere that could be read: what does not fit
into memory lies in nameless files under keys that are in memory alone, and is gone with the process.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from client.keys import local_key, split_key
from client.records.frames import Flags
from client.records.manifest import Manifest, read_manifest
from client.records.on_disk import OnDemand
from client.records.opt_out import read_opt_outs
from client.records.patient_ids import fingerprint, members, plain
from client.records.records import Records
from client.records.scratch import Room
from client.records.stamps import Stamp, changed, stamps
from client.records.tabular import Table, checked_table, split_table
from client.settings import Settings
from shared_models.errors import RecordsError
from shared_models.plan import Fold
from shared_models.tasks import Task

_State = tuple[Manifest, Mapping[Path, Stamp], bool, frozenset[str]]


@dataclass(frozen=True, eq=False)
class Population:
    """Who is used, fixed for one attempt at a round. No true count of it ever leaves.

    Attributes:
        training: Records to train on; possibly of nobody.
        validation: Records to evaluate on.
        fingerprint: Keyed hash of all these patients, for the ledger.
        members: Keyed hash of each, for the hospital's registry.
    """

    training: Records
    validation: Records
    fingerprint: str
    members: frozenset[bytes]


class Source:
    """Reads one hospital's records for one task, again only when manifest, a file or the opt-out list have changed.

    What a database answers has no stamp: a query is run again each time.

    Args:
        task: What the records are read for.
        fold: Of a cross-validation: who validates, in place of the manifest's validation part.
    """

    def __init__(self, task: Task, *, fold: Fold | None = None) -> None:
        self._task, self._fold = task, fold
        self._read: tuple[_State, Mapping[Path, Stamp], Population] | None = None

    def current(self, settings: Settings) -> Population:
        """The population as it is on the disk now, where the settings say that it is.

        Guarantees:
            * Nobody on the opt-out list is in it.
            * It is refused, or not, by what the file holds before opt-outs: nobody is noticed by saying no.

        Raises:
            RecordsError: The records do not fit the task, have no patient ids to hold the list against, or changed
                while they were read.
            ConfigError: The opt-out list cannot be read.
        """
        opt_outs = read_opt_outs(settings.opt_out)
        manifest = read_manifest(settings.records)
        state = (manifest, stamps(manifest.files), settings.opt_out is not None, opt_outs)
        if self._read is None or self._read[0] != state or manifest.sql or changed(self._read[1]):
            self._read = None  # else there would be room for both
            files, population = _population(settings, manifest, self._task, opt_outs, self._fold)
            if (path := changed(state[1])) is not None:
                raise RecordsError(f"{path} changed while it was read", hint="Replace it by renaming.")
            self._read = state, files, population
        return self._read[2]


def _population(
    settings: Settings, manifest: Manifest, task: Task, opt_outs: frozenset[str], fold: Fold | None
) -> tuple[Mapping[Path, Stamp], Population]:
    """Read and check everything, then leave out who said no; also the files that the rows name."""
    room = room_of(settings)
    table = checked_table(manifest, task, room=room)
    out = opted_out(table, manifest, opt_outs, listed=settings.opt_out is not None)
    parts = split_table(table, manifest, task, split_key=split_key(settings.state), opted_out=out, fold=fold, room=room)
    training, validation = (_forgiving(part) for part in parts)
    return table.files, Population(
        training,
        validation,
        fingerprint=fingerprint(_left(table, out), local_key(settings.state, "population fingerprint")),
        members=members(_left(table, out), local_key(settings.registry_folder, "patients")),
    )


def _forgiving(records: Records) -> Records:
    """Records for use after a charge: what turns out to be unreadable counts as zero, and raises nothing."""
    if isinstance(records.inputs, OnDemand):
        return replace(records, inputs=records.inputs.forgiving())
    return records


def room_of(settings: Settings) -> Room:
    """Where what was encoded may lie."""
    return Room(settings.records_memory_mb << 20, settings.state)


def _left(table: Table, out: Flags) -> Iterator[str]:
    """Ids of the patients who did not say no."""
    said_no = set(table.patients.rows[out].tolist())
    return (patient for place, patient in enumerate(table.patients.names) if place not in said_no)


def opted_out(table: Table, manifest: Manifest, opt_outs: frozenset[str], *, listed: bool) -> Flags:
    """Which rows belong to patients who said no.

    Args:
        table: As it was read, with everybody.
        manifest: Of this table.
        opt_outs: As ``read_opt_outs`` returned them.
        listed: The settings name a list, if an empty one.

    Raises:
        RecordsError: There is a list, and the records cannot be held against it.
    """
    if listed and manifest.patient is None:
        raise RecordsError(
            f"the settings name an opt-out list, and {manifest.file} has no patient column to hold it against",
            hint='Name the column in the manifest: patient = "...".',
        )
    if listed and any(patient.startswith("#") for patient in table.patients.names):
        raise RecordsError(
            f"{manifest.file} has patient ids that begin with #, which would be comments in the opt-out list",
            hint="Export ids without it.",
        )
    if not opt_outs:
        return np.zeros(len(table.patients.rows), dtype=np.bool_)
    return np.array([plain(patient) in opt_outs for patient in table.patients.names])[table.patients.rows]
