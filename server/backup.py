"""The coordinator's backup and its way back: settings, certificates, rosters and state; never the root key.

A database elsewhere is not in it: PostgreSQL has tools of its own. A coordinator that was restored knows less than its
hospitals do; they refuse what they have done before, so nothing is charged twice.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import make_url

from server.audit import LOG
from server.enrol import STAGED, next_roster
from server.expiry import CERTIFICATES, ISSUED
from server.renew import WAITING
from server.roles import WITHDRAWN
from server.settings import Settings, read_settings
from shared_models.backup import Manifest, check_backup, copy_file, copy_folder, copy_sqlite, write_backup
from shared_models.errors import BackupError
from shared_models.privacy.head import head_path

SETTINGS, STATE = "coordinator.toml", "state"
DATABASE = "coordinator.sqlite"
MOST_TRIES = 5
_NEW = "restoring"  # a folder in the state folder
_AUDIT = frozenset({LOG, head_path(Path(LOG)).name})


def backup(settings: Settings, settings_file: Path, target: Path) -> Manifest:
    """Copy all that a coordinator needs into a new folder; it may be running.

    Guarantees:
        * What the database says is there, is: it is copied first. The audit log and its head are of one moment.

    Raises:
        BackupError: The folder exists, or the disk does not take it.
        RosterError: The roster is refused, or there is none.
    """

    def fill(folder: Path) -> dict[str, str | int]:
        state = folder / STATE
        state.mkdir(mode=0o700)
        if own_database(settings):
            copy_sqlite(settings.state / DATABASE, state / DATABASE)
        if (settings.state / LOG).exists():
            _copy_audit(settings.state, state)
        copy_folder(settings.state, state, without=_left_out)
        copy_file(settings_file, folder / SETTINGS)
        for name, path in _single_files(settings):
            if path.is_dir():
                copy_folder(path, folder / name)
            elif path.exists():
                copy_file(path, folder / name)
        shown = make_url(settings.database_url).render_as_string(hide_password=True)
        return {"database": DATABASE if own_database(settings) else f"elsewhere: {shown}"}

    return write_backup(
        target, fill, role="coordinator", name=next_roster(settings).coordinator.name, outside=settings.state
    )


def restore(folder: Path, settings_file: Path) -> Manifest:
    """Put a backup where there is no coordinator yet; nothing is overwritten.

    Raises:
        BackupError: It is damaged, or there is a coordinator already.
    """
    manifest = check_backup(folder, role="coordinator")
    made = not settings_file.exists()
    try:
        if made:
            copy_file(folder / SETTINGS, settings_file)
        settings = read_settings(settings_file)
        _refuse_another_state(settings.state)
        for name, path in _single_files(settings):
            if (folder / name).is_dir() and not path.exists():
                copy_folder(folder / name, path)
            elif (folder / name).is_file() and not path.exists():
                copy_file(folder / name, path)
        _put_state(folder / STATE, settings.state)
    except OSError as error:
        raise BackupError(
            f"{error.filename or settings_file} cannot be written: {error.strerror}",
            hint="Make room, or check who may write there; then give the same command again.",
        ) from None
    except BackupError:
        if made:
            settings_file.unlink(missing_ok=True)
        raise
    return manifest


def _put_state(source: Path, state: Path) -> None:
    """All of it, or nothing that a coordinator would begin with; the folder may be a mount of its own."""
    new = state / _NEW
    shutil.rmtree(new, ignore_errors=True)
    try:
        copy_folder(source, new)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for path in new.iterdir():
        path.rename(state / path.name)
    new.rmdir()


def _refuse_another_state(state: Path) -> None:
    if state.exists() and any(path.name != _NEW for path in state.iterdir()):
        raise BackupError(
            f"{state} holds a coordinator's state: restoring would rewind its studies and its audit log",
            hint="If it is lost or damaged, move it aside first (mv), and keep it: auditors may ask for it.",
        )


def own_database(settings: Settings) -> bool:
    """Whether the database is the file in the state folder, and there is one."""
    return settings.database is None and (settings.state / DATABASE).exists()


def _copy_audit(source: Path, target: Path) -> None:
    """The log and its head file as of one moment."""
    head = head_path(source / LOG)
    for _ in range(MOST_TRIES):
        before = head.read_bytes()
        for name in _AUDIT:
            (target / name).unlink(missing_ok=True)
            copy_file(source / name, target / name)
        if before == head.read_bytes() == head_path(target / LOG).read_bytes():
            return
    raise BackupError("the audit log grows all the time", hint="Try again when fewer calls come.")


def _left_out(path: Path) -> bool:
    """What is copied apart, or is of a process."""
    name = path.name
    apart = name in {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"} or name in _AUDIT
    return apart or path.parts[0] in {"spool", _NEW} or name.endswith((".lock", ".new", ".partial"))


def _single_files(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Where each file or folder lies in a backup, and here. The root key is none of them: it lives elsewhere."""
    tls, beside = settings.tls, settings.roster.with_name
    yield "tls/ca.pem", tls.ca
    yield "tls/tls.pem", tls.certificate
    yield "tls/tls.key", tls.key
    if tls.authority_key is not None:
        yield "tls/ca.key", tls.authority_key
    if settings.page is not None and settings.page.token_file is not None:
        yield "page.token", settings.page.token_file
    yield "roster.json", settings.roster
    yield "root.pub", settings.root
    for name in (STAGED, WITHDRAWN, CERTIFICATES, ISSUED, WAITING):
        yield name, beside(name)
