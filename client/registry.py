"""The hospital's registry: which patients have ever been used, per population, so that nobody is paid for twice.

A budget belongs to patients, not to a file or a folder. Each ledger has one file here, with a keyed hash of every
patient whose records it has paid for. Records that hold a patient of another ledger's file are refused, whatever they
are called and however they were cut or exported: they have to be used under that ledger's budget.
"""

import fcntl
import hmac
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.books import LEDGER, Books
from client.keys import local_key
from client.records.manifest import read_manifest
from client.records.patient_ids import MEMBER_BYTES
from client.records.population import Source
from client.settings import Settings
from shared_models.backup import copy_folder
from shared_models.durable import replace_file
from shared_models.errors import PopulationError
from shared_models.privacy.ledger import read_ledger
from shared_models.tasks import find_task

SUFFIX = ".patients"
_FORMAT = "konsil-patients/1"
_TAG_BYTES = 32
_RESTORE = "Restore the registry folder from its newest backup, key included. Nothing trains until then."


@dataclass(frozen=True)
class Used:
    """One ledger's file.

    Attributes:
        population: Its name, for messages.
        state: Where the ledger was when the file was written.
        members: A keyed hash of each patient ever used; it never loses one, also when a patient says no or leaves.
    """

    population: str
    state: Path
    members: frozenset[bytes]


class Registry:
    """One population's view of the registry.

    Guarantees:
        * A patient is in the file of at most one ledger, before the first charge that the patient is part of.
        * A registry that is gone, damaged, or has another key than its files stops training; it is never begun anew
          beside a ledger that has spent something.

    Args:
        settings: Name the population, its state folder and the registry's.
        opening: Hash of the ledger's first entry, which no other ledger has; None before there is a ledger.
    """

    def __init__(self, settings: Settings, opening: str | None) -> None:
        self._folder, self._state = settings.registry_folder, settings.state.absolute()
        self._population, self._opening = settings.population.name, opening
        self._claimed: frozenset[bytes] | None = None  # as this process has last written it

    def check(self, members: frozenset[bytes], *, has_spent: bool) -> None:
        """Refuse patients whom another ledger has paid for; writes nothing.

        Args:
            members: Of the records, as ``patient_ids.members`` hashes them.
            has_spent: This ledger has charges, so that its file must be there.

        Raises:
            PopulationError: A patient is shared; this ledger is a copy of another; or the registry can't be trusted.
        """
        with _explained(self._folder):
            own = self._own()
            if own is None and has_spent:
                raise PopulationError(
                    f"the registry {self._folder} does not know population {self._population}, which has charges",
                    hint=f"Is registry = ... the right folder? {_RESTORE}",
                )
            if own is not None:
                self._refuse_a_copy(own)
            for path in self._others():
                self._refuse_shared(members, _read(path))

    def claim(self, members: frozenset[bytes], *, has_spent: bool) -> None:
        """``check``, then note these patients as used by this ledger; on the disk when it returns.

        Raises:
            PopulationError: As ``check`` does; or the file can't be written.
        """
        if self._claimed is not None and members <= self._claimed:
            return
        with _explained(self._folder), self._lock():
            self.check(members, has_spent=has_spent)
            own = self._own()
            now = Used(self._population, self._state, members | (own.members if own else frozenset()))
            if now != own:
                _write(self._path, now)
        self._claimed = now.members

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._opening}{SUFFIX}"

    def _others(self) -> list[Path]:
        """Files of the other ledgers. Not by ``glob``, to which a folder that can't be read is an empty one."""
        files = self._folder.iterdir() if self._folder.exists() else ()
        return sorted(path for path in files if path.suffix == SUFFIX and path != self._path)

    def _own(self) -> Used | None:
        return _read(self._path) if self._path.exists() else None

    def _refuse_a_copy(self, own: Used) -> None:
        """A state folder may move. That the ledger is in both places means that it was copied, and would pay twice."""
        there, here = own.state / LEDGER, self._state / LEDGER
        if there.exists() and not (here.exists() and there.samefile(here)):
            raise PopulationError(
                f"{self._state} is a copy of {own.state}, where the budget of population {own.population} is",
                hint="Use that state folder; or, if you moved it, remove what is left at the old place.",
            )

    def _refuse_shared(self, members: frozenset[bytes], other: Used) -> None:
        if not members.isdisjoint(other.members):
            raise PopulationError(
                f"these records hold patients whom the budget of population {other.population} has paid for (state "
                f"folder {other.state}): a patient has one budget, however often the records are exported",
                hint="Use these records with that population's settings, or list the shared patients in opt_out.",
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time, of all populations: two that begin at once must not both miss each other."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _read(path: Path) -> Used:
    """One file, once its tag is right: written with its registry's key, and unchanged since."""
    content = path.read_bytes()
    body, tag = content[:-_TAG_BYTES], content[-_TAG_BYTES:]
    if not hmac.compare_digest(tag, _tag(path.parent, body)):
        raise PopulationError(f"{path} is damaged, or the registry's key is another one", hint=_RESTORE)
    head, _, hashes = body.partition(b"\n")
    fields = json.loads(head)
    found = frozenset(hashes[at : at + MEMBER_BYTES] for at in range(0, len(hashes), MEMBER_BYTES))
    return Used(fields["population"], Path(fields["state"]), found)


def _write(path: Path, used: Used) -> None:
    head = {"format": _FORMAT, "population": used.population, "state": str(used.state)}
    body = b"\n".join([json.dumps(head).encode(), b"".join(sorted(used.members))])
    replace_file(path, body, _tag(path.parent, body))


def _tag(folder: Path, body: bytes) -> bytes:
    return hmac.digest(local_key(folder, "registry file"), body, "sha256")


def merge_registry(source: Path, folder: Path) -> None:
    """Bring a backup's registry here: files that are missing, and patients that the files here have forgotten.

    Guarantees:
        * No patient is forgotten: what is here stays.

    Raises:
        PopulationError: The registry here has another key, or a file is damaged: nothing is guessed.
    """
    with _explained(folder):
        if not (folder / "local.key").exists():
            if folder.exists() and any(path.suffix == SUFFIX for path in folder.iterdir()):
                raise PopulationError(f"the registry {folder} has lost its key", hint=_RESTORE)
            copy_folder(source, folder)
            return
        if (folder / "local.key").read_bytes() != (source / "local.key").read_bytes():
            raise PopulationError(
                f"the registry {folder} has another key than the backup's",
                hint="Two registries cannot be compared. Move the one away that nothing was charged with.",
            )
        for path in source.glob(f"*{SUFFIX}"):
            _merge(path, folder / path.name)


def _merge(source: Path, here: Path) -> None:
    there = _read(source)
    own = _read(here) if here.exists() else there
    if not here.exists() or not there.members <= own.members:
        _write(here, Used(own.population, own.state, own.members | there.members))


def open_registry(settings: Settings, books: Books) -> Registry:
    """The registry as the population whose books these are sees it."""
    return Registry(settings, books.budget.opening)


def check_records(settings: Settings) -> None:
    """Refuse, for ``check-data``, what a study would be refused for: records that share a patient with another budget.

    Raises:
        PopulationError, RecordsError, LedgerError: With the reason.
    """
    ledger = settings.state / LEDGER
    entries = read_ledger(ledger) if ledger.exists() else []
    has_spent = any(entry.kind == "charge" for entry in entries)
    population = Source(find_task(read_manifest(settings.records).task)).current(settings)
    Registry(settings, entries[0].hash if entries else None).check(population.members, has_spent=has_spent)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A disk's no as ours."""
    try:
        yield
    except OSError as error:
        raise PopulationError(f"the registry {path} cannot be used: {error.strerror}", hint=_RESTORE) from None
