"""A second budget over the same patients is refused, however the records are dressed up; a new export inherits."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from client.books import LEDGER, report
from client.round import Hospital
from shared_models.errors import PopulationError
from shared_models.messages import Proposal
from shared_models.privacy.ledger import read_ledger
from tests.client.test_cli import run
from tests.federation import Federation, changed, restart

HOSPITAL = "hospital-1"


def second_population(federation: Federation, records: Path | None = None) -> Path:
    """Settings of hospital-1 for a second population with a state folder of its own; the same records by default."""
    first = federation.settings(HOSPITAL)
    text = federation.settings_file(HOSPITAL).read_text(encoding="utf-8")
    text = text.replace('state = "state"', 'state = "second-state"').replace('"all-patients"', '"second"')
    path = federation.settings_file(HOSPITAL).with_name("second.toml")
    path.write_text(text.replace(str(first.records), str(records or first.records)), encoding="utf-8")
    return path


def propose(federation: Federation, settings_file: Path, study: str = "another") -> None:
    """The federation's study under a new name, proposed to a hospital by these settings."""
    hospital = Hospital.open(settings_file)
    try:
        hospital.enrol(Proposal(plan=changed(federation.plan, study=study).model_dump(mode="json")))
    finally:
        hospital.close()


def export(federation: Federation, change: Callable[[pd.DataFrame], pd.DataFrame], *, parquet: bool = False) -> Path:
    """Another records folder, made from hospital-1's."""
    folder = federation.folder / "export"
    source = federation.settings(HOSPITAL).records
    text = (source / "manifest.toml").read_text(encoding="utf-8")
    folder.mkdir()
    frame = change(pd.read_csv(source / "data.csv", dtype=str))
    if parquet:
        frame.to_parquet(folder / "renamed.parquet")
        text = text.replace('"data.csv"', '"renamed.parquet"')
    else:
        frame.to_csv(folder / "data.csv", index=False)
    (folder / "manifest.toml").write_text(text, encoding="utf-8")
    return folder


def same(frame: pd.DataFrame) -> pd.DataFrame:
    return frame


def shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sample(frac=1, random_state=1)


def one_known_patient_among_strangers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(patient=["stranger-" + p if n else p for n, p in enumerate(frame["patient"])])


def other_spelling(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(patient="  " + frame["patient"].str.upper() + " ")


def strangers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(patient="stranger-" + frame["patient"])


def opening_only(settings_file: Path) -> bool:
    """Whether nothing was approved there, let alone charged."""
    kinds = [entry.kind for entry in read_ledger(settings_file.parent / "second-state" / LEDGER)]
    return kinds == ["budget-opened"]


# refused


@pytest.mark.parametrize("change", [same, shuffled, one_known_patient_among_strangers, other_spelling])
@pytest.mark.parametrize("parquet", [False, True], ids=["csv", "renamed parquet"])
def test_records_that_share_a_patient_get_no_second_budget(
    change: Callable[[pd.DataFrame], pd.DataFrame], parquet: bool, federation: Federation
) -> None:
    """A copy, a new order, one known patient, other spelling, another file: refused before approval, with the name."""
    federation.run()
    settings_file = second_population(federation, export(federation, change, parquet=parquet))

    with pytest.raises(PopulationError, match="population all-patients has paid for") as caught:
        propose(federation, settings_file)

    assert opening_only(settings_file)
    assert "patient-" not in f"{caught.value} {caught.value.hint}"


def test_the_subset_that_would_be_cheapest_is_refused_too(federation: Federation) -> None:
    """One patient of the first population, as records of a second: whoever was used once has that budget for good."""
    federation.run()
    settings_file = second_population(federation, export(federation, lambda frame: frame.groupby("diagnosis").head(1)))

    with pytest.raises(PopulationError, match="population all-patients"):
        propose(federation, settings_file)


def test_a_patient_who_left_or_said_no_keeps_what_was_spent(federation: Federation) -> None:
    """Gone from the first population's records by now, and still known."""
    federation.run()
    data = federation.settings(HOSPITAL).records / "data.csv"
    everybody = pd.read_csv(data, dtype=str)
    folder = export(federation, lambda frame: frame.groupby("diagnosis").head(2))
    everybody[~everybody["patient"].isin(pd.read_csv(folder / "data.csv", dtype=str)["patient"])].to_csv(
        data, index=False
    )
    restart(federation, HOSPITAL)

    with pytest.raises(PopulationError, match="population all-patients"):
        propose(federation, second_population(federation, folder))


def test_check_data_says_so_before_any_coordinator_asks(federation: Federation) -> None:
    """The steward hears of it first; with the settings of the population that they belong to, they are fine."""
    federation.run()

    assert "fit for training" in run("check-data", federation.settings_file(HOSPITAL)).output
    with pytest.raises(PopulationError, match="population all-patients"):
        run("check-data", second_population(federation))


def test_over_the_wire_it_is_records_that_do_not_fit(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """The coordinator hears the code that any unfit records have; the log names the cause.

    One that shows the hospital what it signed would be answered before that: another ledger lacks it.
    """
    federation.run()
    (federation.folder / "last-receipts.json").unlink()
    caplog.clear()
    federation.wire._settings_files[HOSPITAL] = second_population(federation)
    federation.plan = changed(federation.plan, study="another")

    federation.run("another")

    (event,) = federation.events("refused", "another")
    assert (event["hospital"], event["code"]) == (HOSPITAL, "records")
    assert "population all-patients has paid for" in caplog.text


# permitted


def test_other_patients_have_a_budget_of_their_own(federation: Federation) -> None:
    """Two populations of one hospital, side by side."""
    federation.run()

    propose(federation, second_population(federation, export(federation, strangers)))


def test_who_is_on_the_second_lists_opt_outs_is_not_shared(federation: Federation) -> None:
    """The way out that the hint names: the first population keeps the patient."""
    federation.run()
    folder = export(federation, one_known_patient_among_strangers)
    known = pd.read_csv(folder / "data.csv", dtype=str)["patient"][0]
    settings_file = second_population(federation, folder)
    text = settings_file.read_text(encoding="utf-8")
    settings_file.write_text('opt_out = "no.txt"\n' + text, encoding="utf-8")
    settings_file.with_name("no.txt").write_text(f"{known}\n", encoding="utf-8")

    propose(federation, settings_file)


def test_a_new_export_under_the_same_settings_inherits_what_was_spent(federation: Federation) -> None:
    """Renamed, shuffled, cut or grown: it is the ledger's population, and pays out of what is left."""
    federation.run()
    before = report(federation.settings(HOSPITAL))
    restart(federation, HOSPITAL)
    settings_file = federation.settings_file(HOSPITAL)
    text = settings_file.read_text(encoding="utf-8")
    folder = export(federation, one_known_patient_among_strangers, parquet=True)
    settings_file.write_text(text.replace(str(federation.settings(HOSPITAL).records), str(folder)), encoding="utf-8")

    propose(federation, settings_file)

    after = report(federation.settings(HOSPITAL))
    assert after["epsilon_filter"] == before["epsilon_filter"] > 0
    assert after["epsilon_left"] < before["epsilon_left"]
