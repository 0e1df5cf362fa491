"""A hospital's state is lost and comes back from a backup; no backup ever gives a patient's budget back."""

import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from client.anchor import ROLLED_BACK
from client.backup import backup, restore, restore_keys
from client.books import LEDGER, Books
from client.doctor import examine
from client.registry import SUFFIX
from client.settings import read_settings
from shared_models.backup import MANIFEST, Manifest, check_backup
from shared_models.errors import BackupError, FederationError, LedgerError, PopulationError, RewindError
from shared_models.identity import create_key, load_key
from shared_models.privacy.ledger import Ledger, read_ledger
from tests.drills.consortium import read, say
from tests.federation import Federation, changed, make_federation, restart_hospitals
from tests.rounds.test_a_server_that_lies import HOSPITAL


@pytest.fixture(scope="module")
def years(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Four hospitals, and of one of them backups: ``old`` after one study, ``new`` after two; and all of it, aside."""
    made = make_federation(
        tmp_path_factory.mktemp("years"), rounds=1, privacy={"noise_multiplier": 40.0}, deadline_s=5.0
    )
    for name, copy in (("first", "old"), ("second", "new")):
        study(made, name)
        settings, file = made.settings(HOSPITAL), made.settings_file(HOSPITAL)
        backup(settings, file, made.folder / copy)
    shutil.copytree(made.folder, made.folder.with_name("aside"))
    return made


@pytest.fixture
def federation(years: Federation) -> Federation:
    """The same, as it was after the second study."""
    shutil.rmtree(years.folder)
    shutil.copytree(years.folder.with_name("aside"), years.folder)
    return years


def study(federation: Federation, name: str) -> list[str]:
    """Run a study of this name, and let go of every ledger; the codes with which it was refused here."""
    federation.plan = changed(federation.plan, study=name)
    federation.run(name)
    restart_hospitals()
    return [event["code"] for event in federation.events("refused", name) if event["hospital"] == HOSPITAL]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_hospital_comes_back_on_an_empty_machine_with_what_it_had_spent(federation: Federation) -> None:
    """Settings, keys, roster, ledger and registry are back; the next study is paid out of what was left."""
    settings, folder = federation.settings(HOSPITAL), federation.folder / "backup"
    made = say("konsil-hospital", "backup", federation.settings_file(HOSPITAL), folder)
    before, entries = contents(settings.state), read_ledger(settings.state / LEDGER)
    home = federation.settings_file(HOSPITAL).parent
    records = contents(settings.records)
    for path in [settings.state, settings.registry_folder, settings.keys.identity.parent]:
        shutil.rmtree(path)
    federation.settings_file(HOSPITAL).unlink()

    said = say("konsil-hospital", "restore", folder, home / "hospital.toml")

    assert made.code == said.code == 0, made.text + said.text
    assert "Nothing on this machine knows whether anything was charged after the backup" in said.text
    assert read_ledger(settings.state / LEDGER) == entries
    assert {name for name in before if not name.endswith(("-wal", "-shm", "lock"))} <= contents(settings.state).keys()
    assert contents(settings.records) == records
    assert stat.S_IMODE(settings.keys.identity.stat().st_mode) == 0o600
    assert study(federation, "third") == []
    assert federation.charges(HOSPITAL) == [(1, 1)] * 3


def test_a_restore_that_would_rewind_the_budget_is_refused(federation: Federation) -> None:
    """Nothing is changed, the message says what is later than the backup and how to go on."""
    folder = federation.folder / "old"
    state = federation.settings(HOSPITAL).state
    before = contents(state)

    said = say("konsil-hospital", "restore", folder, federation.settings_file(HOSPITAL))

    assert said.code == 1
    error, hint = said.last_words
    assert "this backup ends with entry" in error
    assert "the ledger here knows a later one" in error
    assert read(error, "restoring it would forget what was charged since, and refund it")
    assert "Restore a newer backup" in hint
    assert contents(state) == before


@pytest.mark.parametrize(
    ("left", "what"),
    [
        ("ledger.sqlite.head", "the head file"),
        ("receipts.jsonl", "a signed receipt"),
    ],
)
def test_any_trace_of_a_later_charge_refuses_the_rewind(federation: Federation, left: str, what: str) -> None:
    """The ledger is lost, and one small file beside it is not: it knows enough."""
    folder = federation.folder / "old"
    state = federation.settings(HOSPITAL).state
    for path in state.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(RewindError, match=f"{what} here knows a later one"):
        restore(folder, federation.settings_file(HOSPITAL))


def test_a_ledger_from_a_backup_is_noticed_by_what_the_coordinator_shows(federation: Federation) -> None:
    """On a machine that knows nothing, the old backup stops at the next study, and the newest one goes on."""
    old, new = federation.folder / "old", federation.folder / "new"
    state = federation.settings(HOSPITAL).state
    shutil.rmtree(state)
    restore(old, federation.settings_file(HOSPITAL))

    refused = study(federation, "third")
    start = say("konsil-hospital", "start", federation.settings_file(HOSPITAL))
    doctor = examine(federation.settings(HOSPITAL))
    with pytest.raises(RewindError, match="the receipt that the coordinator showed here knows"):
        restore(old, federation.settings_file(HOSPITAL))
    done = restore(new, federation.settings_file(HOSPITAL))

    assert refused == ["rolled-back"]
    assert start.code == 1
    assert "second, round 1" in start.last_words[0]
    assert read(start.last_words[0], "this hospital signed for study")
    assert "a budget is never refunded" in start.last_words[1]
    assert any(read(finding.text, "an old backup is in use") for finding in doctor)
    assert done.certain
    assert done.aside is not None
    assert (done.aside / ROLLED_BACK).exists()
    assert not (state / ROLLED_BACK).exists()
    assert study(federation, "fourth") == []
    assert federation.charges(HOSPITAL) == [(1, 1)] * 3


def test_a_backup_beside_a_busy_daemon_is_as_of_one_moment(federation: Federation) -> None:
    """Entries are appended all the while; every backup that succeeds restores, and none is torn."""
    settings, file = federation.settings(HOSPITAL), federation.settings_file(HOSPITAL)

    def append() -> None:
        with Ledger.open(settings.state / LEDGER, load_key(settings.keys.identity)) as ledger:
            for number in range(20):
                ledger.append("population-changed", population="all-patients", population_fingerprint=f"{number:064x}")
                time.sleep(0.05)

    writer = threading.Thread(target=append)
    writer.start()
    made: list[tuple[Path, Manifest]] = []
    while writer.is_alive():
        folder = federation.folder / f"backup-{len(made)}"
        with suppress(BackupError):  # it grew all the time
            made.append((folder, backup(settings, file, folder)))
    writer.join()
    made.append((federation.folder / "last", backup(settings, file, federation.folder / "last")))

    for folder, manifest in made:
        with Ledger.open(folder / "state" / LEDGER, load_key(settings.keys.identity)) as copy:
            assert copy.seq == manifest.facts["ledger_entries"]


def _change(folder: Path) -> None:
    path = folder / "state" / LEDGER
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _remove(folder: Path) -> None:
    (folder / "keys" / "identity.key").unlink()


def _add(folder: Path) -> None:
    (folder / "state" / "rolled-back.json").write_text("{}", encoding="ascii")


def _unfinished(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _other_version(folder: Path) -> None:
    fields = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps({**fields, "format": 2}), encoding="ascii")


@pytest.mark.parametrize("harm", [_change, _remove, _add, _unfinished, _other_version])
def test_a_backup_that_is_not_what_was_written_restores_nothing(
    federation: Federation, harm: Callable[[Path], None]
) -> None:
    """Each file is held against the manifest, before anything is touched."""
    folder = federation.folder / "new"
    harm(folder)
    state = federation.settings(HOSPITAL).state
    before = contents(state)

    with pytest.raises(FederationError) as refused:
        restore(folder, federation.settings_file(HOSPITAL))

    assert refused.value.hint
    assert contents(state) == before


def test_a_backup_is_its_owners_alone_and_never_overwrites(federation: Federation) -> None:
    """It holds private keys; and it holds no record."""
    folder = federation.folder / "new"

    settings, file = federation.settings(HOSPITAL), federation.settings_file(HOSPITAL)

    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()} == {0o700}
    with pytest.raises(BackupError, match="exists already"):
        backup(settings, file, folder)
    with pytest.raises(BackupError, match="which is backed up"):
        backup(settings, file, settings.state / "backup")
    rows = (settings.records / "data.csv").read_bytes().splitlines()[1]
    assert not any(rows in content for content in contents(folder).values())


def test_a_lost_key_comes_back_from_an_older_backup_and_the_ledger_stays(federation: Federation) -> None:
    """Keys are not state: only what is missing is put back, and the budget is where it was."""
    folder = federation.folder / "old"
    settings = federation.settings(HOSPITAL)
    entries = read_ledger(settings.state / LEDGER)
    settings.keys.identity.unlink()

    lost = say("konsil-hospital", "budget", federation.settings_file(HOSPITAL))
    said = say("konsil-hospital", "restore", folder, federation.settings_file(HOSPITAL), "--keys-only")

    assert lost.code == 1
    assert "identity.key cannot be read" in lost.last_words[0]
    assert said.code == 0, said.text
    assert "identity.key" in said.text
    assert stat.S_IMODE(settings.keys.identity.stat().st_mode) == 0o600
    assert read_ledger(settings.state / LEDGER) == entries
    Books.open(settings).close()


def test_a_key_that_was_replaced_since_does_not_come_back(federation: Federation) -> None:
    """The ledger goes on under the new one; an old backup cannot bring the old one into use again."""
    folder = federation.folder / "new"
    settings = federation.settings(HOSPITAL)
    new = create_key(settings.keys.identity.with_name("new.key"))
    with Ledger.open(settings.state / LEDGER, load_key(settings.keys.identity)) as ledger:
        ledger.rotate(new)
    settings.keys.identity.unlink()
    with pytest.raises(LedgerError, match="replaced since"):
        restore_keys(folder, federation.settings_file(HOSPITAL))
    settings.keys.identity.with_name("new.key").rename(settings.keys.identity)

    with pytest.raises(BackupError, match="another key than the backup's"):
        restore(folder, federation.settings_file(HOSPITAL))


def test_a_registry_forgets_nobody_when_a_backup_comes_back(federation: Federation) -> None:
    """Patients that are known here and not in the backup stay known; the other way round, they come back."""
    settings = federation.settings(HOSPITAL)
    (file,) = settings.registry_folder.glob(f"*{SUFFIX}")
    folder = federation.folder / "new"
    whole = file.read_bytes()
    file.unlink()

    restore(folder, federation.settings_file(HOSPITAL))

    assert file.read_bytes() == whole
    (settings.registry_folder / "local.key").unlink()
    with pytest.raises(PopulationError, match="has lost its key"):
        restore(folder, federation.settings_file(HOSPITAL))


@pytest.mark.parametrize("calls", range(1, 12, 2))
def test_a_restore_that_is_cut_off_opens_nothing_until_it_is_done_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """At no moment does the hospital look as if it never had a ledger: that would be a new budget."""
    settings, folder = federation.settings(HOSPITAL), federation.folder / "new"
    entries = read_ledger(settings.state / LEDGER)
    shutil.rmtree(settings.state)
    left = iter([True] * calls)

    def cut(path: Path, target: Path) -> Path:
        if path.parent.name.startswith("restoring-") and not next(left, False):
            raise KeyboardInterrupt
        os.replace(path, target)  # noqa: PTH105 - what is cut off here is Path.replace
        return target

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", cut)
        with suppress(KeyboardInterrupt):
            restore(folder, federation.settings_file(HOSPITAL))
    try:
        Books.open(settings).close()
        opened = True
    except LedgerError:
        opened = False
    if not opened:
        restore(folder, federation.settings_file(HOSPITAL))

    Books.open(settings).close()
    assert read_ledger(settings.state / LEDGER) == entries


def test_a_backup_of_another_hospital_is_refused(federation: Federation) -> None:
    """Also one that looks right otherwise."""
    folder = federation.folder / "new"
    other = next(name for name in federation.names if name != HOSPITAL)

    with pytest.raises(BackupError, match=f"this is a backup of {HOSPITAL}"):
        restore(folder, federation.settings_file(other))
    assert check_backup(folder, role="hospital").name == HOSPITAL
    with pytest.raises(BackupError, match="of a hospital"):
        check_backup(folder, role="coordinator")


def test_nothing_is_restored_beside_a_ledger_in_use(federation: Federation) -> None:
    """The same backup does it once the daemon is stopped."""
    folder = federation.folder / "new"
    books = Books.open(federation.settings(HOSPITAL))
    try:
        with pytest.raises(FederationError, match="in use by another process"):
            restore(folder, federation.settings_file(HOSPITAL))
    finally:
        books.close()

    restore(folder, federation.settings_file(HOSPITAL))
    Books.open(read_settings(federation.settings_file(HOSPITAL))).close()
