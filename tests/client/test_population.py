"""Which patients a round uses: their keyed fingerprint, and that a change on the disk is noticed."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from client.records.patient_ids import fingerprint, members, plain
from client.records.population import Source
from client.records.tabular import checked_table
from client.settings import Settings
from shared_models.errors import ConfigError, RecordsError
from shared_models.tasks import Task
from tests.client.test_records import ROWS, TASK, write
from tests.client.test_settings import SETTINGS, read

IDS = st.sets(st.text(min_size=1, max_size=8), max_size=12)
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


# fingerprints


@examples(deadline=None)
@given(one=IDS, other=IDS, seed=st.integers(0, 2**16))
@example(one={"a", "b"}, other={"ab"}, seed=0)
@example(one=set(), other={""}, seed=0)
def test_a_fingerprint_changes_if_and_only_if_the_set_does(one: set[str], other: set[str], seed: int) -> None:
    """Not with the order of rows, nor with the number of rows of a patient."""
    rows = [*one, *one]
    random.Random(seed).shuffle(rows)

    assert fingerprint(rows, KEY) == fingerprint(one, KEY)
    assert (fingerprint(one, KEY) == fingerprint(other, KEY)) is (one == other)


@examples(deadline=None)
@given(patients=IDS, more=st.text(min_size=1, max_size=8))
def test_one_patient_more_or_less_is_another_fingerprint(patients: set[str], more: str) -> None:
    """The smallest change there is."""
    assert fingerprint(patients | {more}, KEY) != fingerprint(patients - {more}, KEY)


@examples(deadline=None)
@given(patients=IDS)
def test_hospitals_with_the_same_patients_have_different_fingerprints(patients: set[str]) -> None:
    """Whoever sees both cannot tell that they are equal; nor test a guess without the key."""
    assert fingerprint(patients, KEY) != fingerprint(patients, OTHER_KEY)
    assert members(patients, KEY).isdisjoint(members(patients, OTHER_KEY))


@examples(deadline=None)
@given(patient=st.text(max_size=20))
def test_white_space_and_case_never_tell_patients_apart(patient: str) -> None:
    """Whatever else is in an id."""
    assert plain(f" {patient}\t") == plain(patient) == plain(patient.casefold())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("P-17", " p-17 ", True),
        ("0017", "17", True),
        ("000", "0", True),
        ("P 17", "P17", True),
        ("\uff11\uff17", "17", True),  # full-width digits
        ("P017", "P17", False),
        ("P-17", "P17", False),
        ("1.0", "1", False),
        ("", "0", False),
    ],
)
def test_which_spellings_mean_one_patient(one: str, other: str, same: bool) -> None:
    """What spreadsheets and exports do to ids is undone; anything more could take two patients for one."""
    assert (plain(one) == plain(other)) is same
    assert (members([one], KEY) == members([other], KEY)) is same


# the disk


def settings(folder: Path, *, opt_out: bool = False) -> Settings:
    """A hospital over the small records."""
    (folder / "records").mkdir(exist_ok=True)
    write(folder / "records")
    line = 'opt_out = "opt-out.txt"\n' if opt_out else ""
    return read(folder, line + SETTINGS.replace("/var/lib/konsil", "state"))


def test_nothing_is_read_again_while_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round must not cost a reading of everything."""
    readings = []

    def counted(*arguments: object, **options: Any) -> object:
        readings.append(arguments)
        return checked_table(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("client.records.population.checked_table", counted)
    source, own = Source(TASK), settings(tmp_path)

    assert source.current(own) is source.current(own)
    assert len(readings) == 1


def test_a_new_export_is_noticed_however_it_was_put_there(tmp_path: Path) -> None:
    """Replaced, written over, of the same length, with its old time put back."""
    source, own = Source(TASK), settings(tmp_path)
    data = tmp_path / "records" / "data.csv"
    before, text, times = source.current(own), data.read_text(encoding="utf-8"), data.stat()

    (tmp_path / "records" / "new.csv").write_text(text.replace("b,50", "c,50"), encoding="utf-8")
    (tmp_path / "records" / "new.csv").replace(data)
    replaced = source.current(own)
    data.write_text(text.replace("b,50", "d,50"), encoding="utf-8")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    written = source.current(own)

    assert len({before.fingerprint, replaced.fingerprint, written.fingerprint}) == 3


def test_row_order_and_values_are_not_part_of_a_fingerprint(tmp_path: Path) -> None:
    """It names patients, not what is known of them."""
    source, own = Source(TASK), settings(tmp_path)
    before = source.current(own)

    write(tmp_path / "records", [ROWS[0], "b,51,1,ill", *reversed(ROWS[1:2]), ROWS[3]])

    assert source.current(own) is not before
    assert source.current(own).fingerprint == before.fingerprint


def test_who_says_no_is_gone_and_back_when_the_list_says_so(tmp_path: Path) -> None:
    """The fingerprint follows, and the same set has the same one again."""
    source, own = Source(TASK), settings(tmp_path, opt_out=True)
    path = tmp_path / "opt-out.txt"
    path.write_text("# nobody\n", encoding="utf-8")
    everybody = source.current(own)
    path.write_text("b\n", encoding="utf-8")
    without = source.current(own)
    path.write_text("not-here\n", encoding="utf-8")

    assert without.training.patient_count == everybody.training.patient_count - 1
    assert without.members < everybody.members
    assert without.fingerprint != everybody.fingerprint == source.current(own).fingerprint


def test_a_list_or_a_file_that_is_gone_stops_everything(tmp_path: Path) -> None:
    """What is in memory is not used instead: who is in it may have said no since."""
    source, own = Source(TASK), settings(tmp_path, opt_out=True)
    path = tmp_path / "opt-out.txt"
    path.write_text("", encoding="utf-8")
    source.current(own)

    path.unlink()
    with pytest.raises(ConfigError, match="opt-out list"):
        source.current(own)
    path.write_text("", encoding="utf-8")
    (tmp_path / "records" / "data.csv").unlink()
    with pytest.raises(RecordsError, match="cannot be read: No such file"):
        source.current(own)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an export must not pass for all of it; the next attempt reads again."""
    source, own = Source(TASK), settings(tmp_path)

    def slow(manifest: object, task: Task, **options: Any) -> object:
        found = checked_table(manifest, task, **options)  # type: ignore[arg-type]
        write(tmp_path / "records", [*ROWS, "c,1,1,ill"])
        return found

    with monkeypatch.context() as patched:
        patched.setattr("client.records.population.checked_table", slow)
        with pytest.raises(RecordsError, match="changed while it was read"):
            source.current(own)

    assert source.current(own).training.patient_count == 3


def test_a_list_that_the_settings_begin_to_name_is_honoured(tmp_path: Path) -> None:
    """Where settings are read anew while the daemon runs; also when the list is empty and only its demands are new."""
    source, own = Source(TASK), settings(tmp_path)
    everybody = source.current(own)
    (tmp_path / "opt-out.txt").write_text("b\n", encoding="utf-8")

    assert source.current(settings(tmp_path, opt_out=True)).training.patient_count == 1
    (tmp_path / "opt-out.txt").write_text("", encoding="utf-8")
    write(tmp_path / "records", ["age,stage,outcome", "0,1,well", "9,1,ill"], patient=None, one_row_per_patient=True)
    assert source.current(own) is not everybody
    with pytest.raises(RecordsError, match="no patient column"):
        source.current(own.model_copy(update={"opt_out": tmp_path / "opt-out.txt"}))
