"""A hospital's backup and its way back: everything but the records; and a budget is never rewound by it.

A backup is as of one moment, also beside the daemon. What was charged after it is not in it: restoring it would refund
that. So whatever this machine still knows of a later charge refuses it; and where the machine knows nothing, the
coordinator does, which shows the hospital what it signed last (``anchor.py``).
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from client.anchor import ROLLED_BACK
from client.books import LEDGER
from client.bundle import RECEIPTS
from client.deposit import NEWEST
from client.evidence import read_evidence
from client.membership import PIN, ROSTERS, read_pin
from client.positions import POSITIONS
from client.process import PROCESS, refuse_second
from client.registry import merge_registry
from client.settings import PageTls, Settings, read_settings
from shared_models.backup import Manifest, check_backup, copy_file, copy_folder, copy_sqlite, write_backup
from shared_models.durable import replace_file, sync_folder
from shared_models.errors import BackupError, FederationError, LedgerError, RewindError
from shared_models.identity import load_key, public_bytes
from shared_models.privacy.checkpoint import read_checkpoint
from shared_models.privacy.entries import GENESIS, Chain, verify_entries, verify_head
from shared_models.privacy.head import head_path, read_head
from shared_models.privacy.ledger import stream_ledger, unused
from shared_models.receipts import SignedReceipt

SETTINGS, STATE, REGISTRY = "hospital.toml", "state", "registry"
MOST_TRIES = 5
_NEW, _OLD = "restoring-", "before-"  # folders in the state folder
_LEFT_OUT = frozenset({LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", head_path(Path(LEDGER)).name, PROCESS, "outbox.zip"})
_PROCEED = (
    "Restore a newer backup. If there is none, the budget of these patients is spent: see 'When the newest ledger is "
    "lost' in docs/operations.md."
)


class Restored(NamedTuple):
    """What was put back.

    Attributes:
        manifest: Of the backup.
        entries: Of the ledger that is in use now.
        aside: Where what was in the state folder before is now; None where there was nothing.
        certain: Whether something here knew the newest entry; if not, only the coordinator can tell.
    """

    manifest: Manifest
    entries: int
    aside: Path | None
    certain: bool


def backup(settings: Settings, settings_file: Path, target: Path) -> Manifest:
    """Copy settings, keys, roster, state and registry into a new folder; no records. The daemon may be running.

    Guarantees:
        * Ledger, head file and all the rest are as of one moment between two entries.
        * The copy of the ledger has been verified: a backup that would not restore is none.

    Raises:
        BackupError: Entries are written all the time; the folder exists; or the disk does not take it.
        LedgerError: The ledger itself does not hold.
    """

    def fill(folder: Path) -> dict[str, str | int]:
        for _ in range(MOST_TRIES):
            for part in (STATE, REGISTRY):
                shutil.rmtree(folder / part, ignore_errors=True)
            # The ledger first: positions and the registry may know more than it, never less.
            _copy_ledger(settings.state, folder / STATE)
            copy_folder(settings.state, folder / STATE, without=_left_out)
            if settings.registry_folder.exists():
                copy_folder(settings.registry_folder, folder / REGISTRY, without=lambda path: path.name == "lock")
            if read_head(head_path(settings.state / LEDGER)) == read_head(head_path(folder / STATE / LEDGER)):
                break
        else:
            raise BackupError("the ledger grows all the time", hint="Try again between two rounds, or stop the daemon.")
        chain = _verified(settings, folder / STATE / LEDGER)
        copy_file(settings_file, folder / SETTINGS)
        for name, path in _single_files(settings, folder):
            if path.exists():
                copy_file(path, folder / name)
        return {"ledger_entries": chain.seq, "ledger_head": chain.hash}

    return write_backup(target, fill, role="hospital", name=settings.name, outside=settings.state)


def restore(folder: Path, settings_file: Path) -> Restored:
    """Put a backup in place, unless that would forget a charge that this machine knows of.

    Guarantees:
        * What was in the state folder is set aside in it, never removed. Keys are never overwritten. What only grows
          (positions, the registry, the newest roster seen) keeps what is here where that knows more.
        * Killed anywhere, it leaves a hospital that does not open, or one that is restored; never one that would begin
          a new ledger. Doing it again finishes it. The state folder may be a mount of its own.

    Args:
        folder: The backup.
        settings_file: Where ``hospital.toml`` lies, or will: it comes out of the backup if it is not there.

    Raises:
        RewindError: The ledger, the head file, a receipt or a checkpoint here knows more than the backup.
        BackupError: It is damaged, of another hospital, or holds another key than is in use here.
        AlreadyRunningError: The daemon runs.
        LedgerError: The backup's ledger does not hold; or somebody has the ledger here open.
    """
    manifest = check_backup(folder, role="hospital")
    settings, made = _settings(folder, settings_file, manifest)
    try:
        refuse_second(settings.state)
        _refuse_other_keys(folder, settings)
        certain = _refuse_rewind(folder, settings)
        with _disk(settings.state):
            settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            with unused(settings.state / LEDGER):
                aside = _put_back(folder, settings)
    except BaseException:
        if made:
            settings_file.unlink(missing_ok=True)
        raise
    chain = verify_entries(stream_ledger(settings.state / LEDGER))
    if chain.hash != manifest.facts["ledger_head"]:
        raise LedgerError("the restored ledger is not the backup's", hint="Have the disk looked at.")
    return Restored(manifest, chain.seq, aside, certain)


def restore_keys(folder: Path, settings_file: Path) -> list[Path]:
    """Put back the keys, certificates and roster that are missing here; nothing else is touched.

    Returns:
        The files that were missing.

    Raises:
        BackupError: The backup is damaged, or of another hospital; another key is in use here.
        LedgerError: The ledger here goes on under another identity: this key was replaced since.
    """
    manifest = check_backup(folder, role="hospital")
    settings = read_settings(settings_file)
    _refuse_another(settings, manifest)
    _refuse_other_keys(folder, settings)
    if not settings.keys.identity.exists() and (settings.state / LEDGER).exists():
        chain = verify_entries(stream_ledger(settings.state / LEDGER))
        if chain.keys and chain.keys[-1] != public_bytes(load_key(folder / "keys/identity.key")):
            raise LedgerError(
                "the ledger goes on under another identity key than the backup's: it was replaced since",
                hint="Use a backup that was made after the replacement.",
            )
    with _disk(settings.keys.identity):
        return _put_files(folder, settings)


def _copy_ledger(source: Path, target: Path) -> None:
    """The head file, then the ledger: whoever compares the heads afterwards knows whether both are of one moment."""
    target.mkdir(mode=0o700)
    copy_file(head_path(source / LEDGER), head_path(target / LEDGER))
    copy_sqlite(source / LEDGER, target / LEDGER)


def _verified(settings: Settings, copy: Path) -> Chain:
    """The chain of a copy, once it is known to be what this hospital could open."""
    chain = verify_entries(stream_ledger(copy))
    verify_head(read_head(head_path(copy)), chain, own_key=public_bytes(load_key(settings.keys.identity)))
    return chain


def _left_out(path: Path) -> bool:
    """What is copied apart, or is of a process: locks, and files that were being written."""
    name = path.name
    temporary = name.endswith((".new", ".partial")) or path.parts[0].startswith((".room-", "tmp"))
    return name in _LEFT_OUT or temporary or _apart(path)


def _apart(path: Path) -> bool:
    """What no restore touches: locks, and what restores have set aside."""
    return path.name.endswith(".lock") or path.parts[0].startswith((_NEW, _OLD))


def _single_files(settings: Settings, backup: Path) -> Iterator[tuple[str, Path]]:
    """Where each file lies in a backup, and here; a key that waits beside the one in use."""
    keys, tls = settings.keys, settings.tls
    for name, path in (("identity", keys.identity), ("node", keys.node), ("tls", tls.key)):
        yield f"keys/{name}.key", path
        yield f"keys/{name}.key.next", path.with_name(f"{path.name}.next")
    yield "keys/root.pub", keys.root
    yield "keys/tls.pem", tls.certificate
    yield "keys/ca.pem", tls.ca
    yield "roster.json", settings.roster
    if settings.opt_out is not None:
        yield "opt-out.txt", settings.opt_out
    if settings.page is not None and settings.page.tls is not None:
        yield from _page_files(settings.page.tls, backup / "page")


def _page_files(files: PageTls, backup: Path) -> Iterator[tuple[str, Path]]:
    """Of the page's TLS; and of the hospital's own authority, whose certificates may have to be revoked."""
    own = files.stewards.parent
    issued = {path.name for folder in (own, backup) for path in folder.glob("steward-*.pem")}
    named = [files.certificate, files.key, files.stewards, files.revoked]
    for path in (*named, own / "authority.key", *(own / name for name in sorted(issued))):
        if path is not None:
            yield f"page/{path.name}", path


def _settings(folder: Path, settings_file: Path, manifest: Manifest) -> tuple[Settings, bool]:
    """The settings that are here; else those of the backup, put in place."""
    made = not settings_file.exists()
    if made:
        with _disk(settings_file):
            copy_file(folder / SETTINGS, settings_file)
    settings = read_settings(settings_file)
    _refuse_another(settings, manifest)
    return settings, made


def _refuse_another(settings: Settings, manifest: Manifest) -> None:
    if settings.name != manifest.name:
        raise BackupError(
            f"this is a backup of {manifest.name}, and the settings are of {settings.name}",
            hint="Give the settings file of that hospital, or one that does not exist yet.",
        )


def _refuse_other_keys(folder: Path, settings: Settings) -> None:
    for name, here in _single_files(settings, folder):
        there = folder / name
        if not (name.startswith("keys/") and name.endswith(".key") and here.exists() and there.exists()):
            continue
        if here.read_bytes() != there.read_bytes():
            raise BackupError(
                f"{here} is another key than the backup's: it was replaced since, or is of another enrolment",
                hint="Keys are never overwritten. Use a newer backup; or move the key away if it is the wrong one.",
            )


def _refuse_rewind(folder: Path, settings: Settings) -> bool:
    """Whether something here knew of entries, all of which the backup has."""
    path = folder / STATE / LEDGER
    verify_entries(stream_ledger(path))
    known = {GENESIS: ""}
    for entry in stream_ledger(path):
        known[entry.hash] = f"entry {entry.seq} of {entry.time}"
    newest = list(known.values())[-1]
    certain = False
    for what, digest in _known_here(settings):
        certain = True
        if digest not in known:
            raise RewindError(
                f"this backup ends with {newest}, and {what} here knows a later one ({digest[:12]}…): restoring it "
                "would forget what was charged since, and refund it",
                hint=_PROCEED,
            )
    return certain


def _known_here(settings: Settings) -> Iterator[tuple[str, str]]:
    """Hashes of entries that this machine knows of. What is damaged says nothing; that is why it is restored."""
    state = settings.state
    with suppress(FederationError):
        for last in deque(stream_ledger(state / LEDGER), maxlen=1):
            yield "the ledger", last.hash
    with suppress(FederationError):
        yield "the head file", read_head(head_path(state / LEDGER)).hash
    with suppress(FederationError, OSError):
        yield "the newest checkpoint", read_checkpoint((state / NEWEST).read_bytes()).entry_hash
    with suppress(OSError, ValueError):
        shown = SignedReceipt.model_validate_json((state / ROLLED_BACK).read_bytes()).receipt
        yield "the receipt that the coordinator showed", shown.entry_hash
        yield "the receipt that the coordinator showed", shown.chain_head
    with suppress(FederationError, OSError, ValueError, LookupError):
        for line in read_evidence(state / RECEIPTS):
            yield "a signed receipt", str(line["receipt"]["receipt"]["entry_hash"])


def _put_back(folder: Path, settings: Settings) -> Path | None:
    """File by file, by renaming. The head file first: from then on no ledger opens but the one that comes last."""
    state, stamp = settings.state, f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    new, aside = state / f"{_NEW}{stamp}", state / f"{_OLD}{stamp}"
    for left in state.glob(f"{_NEW}*"):  # by one that was cut off
        shutil.rmtree(left)
    try:
        copy_folder(folder / STATE, new)
        _keep_what_knows_more(state, new)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if (folder / REGISTRY).exists():
        merge_registry(folder / REGISTRY, settings.registry_folder)
    _put_files(folder, settings)
    head, ledger = head_path(Path(LEDGER)), Path(LEDGER)
    rest = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    for name in (head, *(name for name in rest if name not in {head, ledger}), ledger):
        if name == ledger:
            _move_aside(state, aside, [Path(f"{LEDGER}-wal"), Path(f"{LEDGER}-shm")])  # of another ledger than this
        if (state / name).exists():
            copy_file(state / name, aside / name)
        (state / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        (new / name).replace(state / name)
        sync_folder((state / name).parent)
    here = [path.relative_to(state) for path in state.rglob("*") if path.is_file()]
    _move_aside(state, aside, [name for name in here if name not in rest and not _apart(name)])
    shutil.rmtree(new)
    return aside if aside.exists() else None


def _move_aside(state: Path, aside: Path, names: list[Path]) -> None:
    for name in names:
        if (state / name).exists():
            (aside / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (state / name).rename(aside / name)


def _keep_what_knows_more(old: Path, new: Path) -> None:
    """Positions, the newest roster seen, and what was kept to be shown, where that goes on from what the backup has.

    To forget a position would let an attempt be repeated; to forget a roster, an old list pass for new.
    """
    with suppress(OSError, ValueError, TypeError, AttributeError):
        here = json.loads((old / POSITIONS).read_bytes())
        there = json.loads((new / POSITIONS).read_bytes()) if (new / POSITIONS).exists() else {}
        highest = {key: max(there.get(key, [0, 0]), here.get(key, [0, 0])) for key in {**there, **here}}
        replace_file(new / POSITIONS, json.dumps(highest).encode())
    with suppress(FederationError):
        pinned, backed_up = read_pin(old), read_pin(new)
        if pinned is not None and (backed_up is None or pinned.version > backed_up.version):
            replace_file(new / PIN, (old / PIN).read_bytes())
    for path in [*(old / ROSTERS).glob("*.json"), *old.glob("*.jsonl*")]:
        there = new / path.relative_to(old)
        if not there.exists() or path.read_bytes().startswith(there.read_bytes()):
            there.unlink(missing_ok=True)
            copy_file(path, there)


def _put_files(folder: Path, settings: Settings) -> list[Path]:
    """Files that are missing here."""
    missing = [(folder / name, here) for name, here in _single_files(settings, folder) if not here.exists()]
    written = [(source, here) for source, here in missing if source.exists()]
    for source, here in written:
        copy_file(source, here)
    return [here for _, here in written]


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """The disk's no, as ours."""
    try:
        yield
    except OSError as error:
        raise BackupError(
            f"{error.filename or path} cannot be written: {error.strerror}",
            hint="Make room, or check who may write there; then give the same command again.",
        ) from None
