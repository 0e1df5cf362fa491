"""Rows from JSON lines, a database or a FHIR export: the same table as from CSV, and refused with which words."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomli_w
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from client.records.manifest import read_manifest
from client.records.population import Source
from client.records.tabular import Table, checked_table
from shared_models.errors import RecordsError
from shared_models.tasks import Categorical, Choice, Numeric, TableInput, Task
from tests.client.test_population import settings

TASK = Task(
    name="small",
    description="Small enough to read.",
    input=TableInput(
        columns=(
            Numeric(name="age", unit="year", low=0, high=100),
            Categorical(name="stage", categories=("i", "ii", "iii")),
        )
    ),
    heads=(Choice(name="outcome", classes=("well", "ill")),),
)
MANIFEST: dict[str, Any] = {
    "task": "small",
    "file": "data.jsonl",
    "label": "outcome",
    "patient": "id",
    "validation_fraction": 0.0,
}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "age": 0, "stage": "i", "outcome": "well"},
    {"id": "b", "age": 50.5, "stage": "ii", "outcome": "ill"},
    {"id": "a", "age": 100, "stage": "iii", "outcome": "ill"},
]


def write(folder: Path, **changes: Any) -> Path:
    """Write a manifest; a change to None leaves the key out."""
    manifest = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest), encoding="utf-8")
    return folder


def read(folder: Path) -> Table:
    """The checked table."""
    return checked_table(read_manifest(folder), TASK)


def of_rows(table: Table) -> list[int]:
    """The label of each row."""
    return [int(label) for label in table.labels[:]]


def refusal(folder: Path) -> str:
    """The words with which a folder is refused, on one line."""
    with pytest.raises(RecordsError) as caught:
        read(folder)
    assert "\n" not in f"{caught.value}{caught.value.hint}"
    return f"{caught.value} | {caught.value.hint}"


def check(table: Table) -> None:
    """The table is that of ``ROWS``."""
    assert table.content[:]["age"].tolist() == [0, 50.5, 100]
    assert table.content[:]["stage"].tolist() == [0, 1, 2]
    assert table.labels[:].tolist() == [0, 1, 1]
    assert table.patients.ids == ["a", "b", "a"]


# JSON lines


def lines(folder: Path, *texts: str) -> Path:
    """Write lines as they are."""
    (folder / "data.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return write(folder)


def test_json_lines_are_rows(tmp_path: Path) -> None:
    """Numbers as they are written, blank lines left out, a key that is left out is missing."""
    check(read(lines(tmp_path, json.dumps(ROWS[0]), "", *map(json.dumps, ROWS[1:]))))

    lines(tmp_path, json.dumps(ROWS[0]), "", json.dumps({"id": "b", "stage": None, "outcome": "ill"}))
    assert "data.jsonl, row 3, column 'age', value '': the value is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "Hans"', "line 2: is no JSON object"),
        ('["Hans"]', "line 2: is no JSON object"),
        ('{"id": "Hans \\ud800", "age": 1, "stage": "i", "outcome": "ill"}', "line 2: is no JSON object"),
        ('"Hans"', "line 2: is no JSON object"),
        ("[" * 100_000, "line 2: is no JSON object"),
        ('{"id": "Hans", "id": "b"}', "line 2: a key is there twice"),
        ('{"id": {"name": "Hans"}}', "line 2: the value of a key is no plain value"),
        ('{"id": "a", "age": true, "stage": "i", "outcome": "ill"}', "row 2, column 'age', value 'true': is not"),
        ('{"id": "a", "age": NaN, "stage": "i", "outcome": "ill"}', "column 'age', value 'NaN': is not a finite"),
        ('{"id": "a", "age": 1e999, "stage": "i", "outcome": "ill"}', "column 'age', value '1e999': is not a finite"),
    ],
)  # fmt: skip
def test_lines_that_are_no_rows_are_refused(tmp_path: Path, line: str, words: str) -> None:
    """With file and line, and without quoting it."""
    text = refusal(lines(tmp_path, json.dumps(ROWS[0]), line))

    assert words in text
    assert "Hans" not in text


@examples(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["data.jsonl", "data.csv"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
)
def test_a_damaged_file_is_an_error_or_inside_the_public_ranges(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, cut: float, flips: list[tuple[float, int]]
) -> None:
    """Rows of text have no checksum: what passes has the schema's categories and ranges, and nothing is printed."""
    data = bytearray("".join(json.dumps(row) + "\n" for row in ROWS), "ascii")
    if name == "data.csv":
        data = bytearray(b"id,age,stage,outcome\na,0,i,well\nb,50.5,ii,ill\na,100,iii,ill\n")
    for place, change in flips:
        data[int(place * (len(data) - 1))] ^= change
    (tmp_path / name).write_bytes(data if flips else data[: int(cut * len(data))])
    write(tmp_path, file=name)

    try:
        table: Table | None = read(tmp_path)
    except RecordsError as error:
        if name not in str(error):
            raise
        table = None

    if table is not None:
        assert ((table.content[:]["age"] >= 0) & (table.content[:]["age"] <= 100)).all()
        assert len(table.patients.ids) <= 3
    assert capfd.readouterr() == ("", "")


@examples(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1))
def test_a_parquet_file_that_was_cut_is_an_error(tmp_path: Path, cut: float) -> None:
    """What describes a Parquet file is at its end."""
    pd.DataFrame(ROWS).to_parquet(tmp_path / "data.parquet")
    check(read(write(tmp_path, file="data.parquet")))
    data = (tmp_path / "data.parquet").read_bytes()
    (tmp_path / "data.parquet").write_bytes(data[: int(cut * (len(data) - 1))])

    assert "data.parquet cannot be read" in refusal(tmp_path)


@examples(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_changed_parquet_file_is_an_error_or_inside_the_public_ranges(
    tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    """Its pages have no checksums, unless the writer was asked for some."""
    pd.DataFrame(ROWS).to_parquet(tmp_path / "data.parquet")
    data = bytearray((tmp_path / "data.parquet").read_bytes())
    for place, change in flips:
        data[int(place * (len(data) - 1))] ^= change
    (tmp_path / "data.parquet").write_bytes(data)
    write(tmp_path, file="data.parquet")

    try:
        table: Table | None = read(tmp_path)
    except RecordsError as error:
        if "data.parquet" not in str(error):
            raise
        table = None

    assert table is None or ((table.content[:]["age"] >= 0) & (table.content[:]["age"] <= 100)).all()


def test_an_index_that_pandas_wrote_is_a_column(tmp_path: Path) -> None:
    """Who exports with the id as index has not lost it."""
    pd.DataFrame(ROWS).set_index("id").to_parquet(tmp_path / "data.parquet")

    check(read(write(tmp_path, file="data.parquet")))


# a database


def database(folder: Path, query: str, **changes: Any) -> Path:
    """A SQLite file with a table, a query beside the manifest, and the address in a file of its own."""
    path = folder / "records.db"
    if not path.exists():
        with sqlite3.connect(path) as connection:
            connection.execute("create table stay (id text, age real, stage text, outcome text, mrn text)")
            rows = [(row["id"], row["age"], row["stage"], row["outcome"], "4711") for row in ROWS]
            connection.executemany("insert into stay values (?, ?, ?, ?, ?)", rows)
        connection.close()
    (folder / "data.sql").write_text(query, encoding="utf-8")
    url = folder / "database.url"
    url.write_text(f"sqlite:///{path}\n", encoding="utf-8")
    url.chmod(0o600)
    return write(folder, **{"file": "data.sql", "sql": {"url_file": "database.url"}} | changes)


QUERY = "-- stays of adults; all of them\nselect id, age, stage, outcome from stay"


def test_a_query_is_a_table(tmp_path: Path) -> None:
    """Comments and a last semicolon are fine."""
    check(read(database(tmp_path, QUERY + ";\n")))
    check(read(database(tmp_path, "with s as (select * from stay) select id, age, stage, outcome from s")))


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("delete from stay", "data.sql is not one SELECT"),
        ("select 1; delete from stay", "data.sql is not one SELECT"),
        ("with x as (select 1) delete from stay", "the query of {folder}/data.sql failed: OperationalError"),
        ("select 'Hans' from nowhere", "the query of {folder}/data.sql failed: OperationalError"),
        ("select id, age, stage from stay", "data.sql has no column 'outcome'"),
        ("select * from stay", "data.sql holds what identifies patients: 'mrn'"),
        ("select id, age + 99 as age, stage, outcome from stay", "data.sql, row 2, column 'age', value '149.5'"),
        ("select * from stay where 1 = 0", "data.sql has a header but no records"),
    ],
)
def test_a_query_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, query: str, words: str) -> None:
    """Nothing of the query is quoted; the rows are still there."""
    text = refusal(database(tmp_path, query))

    assert words.format(folder=tmp_path) in text
    assert "Hans" not in text
    check(read(database(tmp_path, QUERY)))


def test_postgresql_is_read_and_cannot_be_written(tmp_path: Path, postgres: str) -> None:
    """Numbers, dates and truth values as texts; a SELECT that changes something fails, and changes nothing."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(postgres)
    with engine.begin() as connection:
        connection.exec_driver_sql("create table stay (id text, age numeric, stage text, outcome text)")
        connection.exec_driver_sql("create sequence counter")
        for row in ROWS:
            connection.execute(sqlalchemy.text("insert into stay values (:id, :age, :stage, :outcome)"), row)
    try:
        database(tmp_path, QUERY)
        (tmp_path / "database.url").write_text(postgres, encoding="utf-8")
        check(read(tmp_path))
        hidden = {
            "with gone as (delete from stay returning *) select * from gone": "FeatureNotSupported",  # in a cursor
            "select nextval('counter')": "ReadOnlySqlTransaction",
        }
        for query, error in hidden.items():
            (tmp_path / "data.sql").write_text(query, encoding="utf-8")
            assert f"data.sql failed: {error}" in refusal(tmp_path)
        (tmp_path / "data.sql").write_text(QUERY, encoding="utf-8")
        check(read(tmp_path))
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("drop table stay")
            connection.exec_driver_sql("drop sequence counter")
        engine.dispose()


def test_an_address_is_kept_from_others_and_out_of_errors(tmp_path: Path) -> None:
    """It may hold a password."""
    database(tmp_path, QUERY)
    url = tmp_path / "database.url"
    url.chmod(0o644)
    assert "database.url can be read by others" in refusal(tmp_path)
    url.chmod(0o600)
    for address in ("postgresql+psycopg://konsil:secret@127.0.0.1:1/x", "nosuch://konsil:secret@host/x", "secret"):
        url.write_text(address, encoding="utf-8")
        assert "secret" not in refusal(tmp_path)


def test_a_round_asks_the_database_again(tmp_path: Path) -> None:
    """Nothing on the disk says that a database has changed."""
    own = settings(tmp_path)
    for path in (tmp_path / "records").iterdir():
        path.unlink()
    database(tmp_path / "records", QUERY)
    source = Source(TASK)
    before = source.current(own).training.patient_count
    with sqlite3.connect(tmp_path / "records" / "records.db") as connection:
        connection.execute("insert into stay values ('c', 1, 'i', 'ill', '')")
    connection.close()

    assert (before, source.current(own).training.patient_count) == (2, 3)


# FHIR


LOINC, SNOMED = "http://loinc.org", "http://snomed.info/sct"
FHIR: dict[str, Any] = {
    "files": ["Observation.ndjson", "Condition.ndjson"],
    "date": "2024-06-30",
    "patient": {"age": "age"},
    "observation": {"stage": {"code": f"{LOINC}|21908-9"}},
    "condition": {"outcome": f"{SNOMED}|22298006"},
}


def patient(identity: str, born: str, **more: Any) -> dict[str, Any]:
    """A Patient with everything that must not be read."""
    name = [{"family": "Miller", "given": ["Hans"]}]
    return {"resourceType": "Patient", "id": identity, "birthDate": born, "name": name, "gender": "male"} | more


def observation(identity: str, when: str, code: str = "21908-9", status: str = "final", **value: Any) -> dict[str, Any]:
    """An Observation of a patient."""
    return {
        "resourceType": "Observation",
        "status": status,
        "subject": {"reference": f"Patient/{identity}"},
        "effectiveDateTime": when,
        "code": {"coding": [{"system": LOINC, "code": code}, {"system": "local", "code": "x"}]},
    } | value


def stage(code: str) -> dict[str, Any]:
    """A coded value."""
    return {"valueCodeableConcept": {"coding": [{"code": code}]}}


def condition(identity: str, status: str = "confirmed") -> dict[str, Any]:
    """A Condition of a patient."""
    return {
        "resourceType": "Condition",
        "subject": {"reference": f"https://ehr.example.org/fhir/Patient/{identity}"},
        "code": {"coding": [{"system": SNOMED, "code": "22298006"}]},
        "verificationStatus": {"coding": [{"code": status}]},
    }


PATIENTS = [patient("a", "2024-06-30"), patient("b", "1973-07-01"), patient("c", "1924")]
OBSERVATIONS = [
    observation("a", "2024-01-02T03:04:05Z", **stage("i")),
    observation("a", "2024-01-01", **stage("iii")),  # older, though later in the file
    observation("b", "2024-01-01", **stage("ii")),
    observation("b", "2024-01-02", status="entered-in-error", **stage("iii")),
    observation("c", "2023-12-31T23:30:00-01:00", **stage("iii")),  # half an hour after the next
    observation("c", "2024-01-01T00:00:00Z", **stage("i")),
    observation("c", "2025-01-01", code="other", **stage("i")),
    observation("z", "2024-01-01", **stage("i")),
]
CONDITIONS = [condition("b"), condition("c"), condition("a", "refuted")]


def export(
    folder: Path,
    patients: Any = PATIENTS,
    observations: Any = OBSERVATIONS,
    conditions: Any = CONDITIONS,
    **changes: Any,
) -> Path:
    """A bulk export, and its manifest."""
    for name, resources in (("Patient", patients), ("Observation", observations), ("Condition", conditions)):
        text = "".join(json.dumps(resource) + "\n" for resource in resources)
        (folder / f"{name}.ndjson").write_text(text, encoding="utf-8")
    codes = {"outcome": {"no": "well", "yes": "ill"}}
    return write(folder, file="Patient.ndjson", categories=codes, fhir=FHIR | changes)


def test_an_export_is_a_table_of_patients(tmp_path: Path) -> None:
    """Age at the manifest's date, the newest result of a code, whether there is a condition."""
    table = read(export(tmp_path))

    assert table.patients.ids == ["a", "b", "c"]
    assert table.content[:]["age"].tolist() == [0, 50, 100]  # b's birthday is the next day
    assert table.content[:]["stage"].tolist() == [0, 1, 2]
    assert table.labels[:].tolist() == [0, 1, 1]


def test_quantities_have_the_manifests_unit(tmp_path: Path) -> None:
    """Another unit is an error, "less than" is no number; the oldest result where the manifest wants it."""
    heights = [
        observation("a", f"2024-01-0{day}", code="8302-2", valueQuantity={"value": value, "code": "cm"} | more)
        for day, value, more in ((1, 5, {"comparator": "<"}), (2, 60, {}), (3, 70, {}))
    ]
    take = {"stage": FHIR["observation"]["stage"]}
    fhir = {"patient": {}, "observation": take | {"age": {"code": f"{LOINC}|8302-2", "unit": "cm", "take": "oldest"}}}
    folder = export(tmp_path, PATIENTS[:1], OBSERVATIONS[:1] + heights, [condition("a")], **fhir)

    assert read(folder).content[:]["age"].tolist() == [60]
    (folder / "Observation.ndjson").write_text(
        (folder / "Observation.ndjson").read_text().replace('"cm"', '"[in_i]"'), encoding="utf-8"
    )
    text = refusal(folder)
    assert "Observation.ndjson, line 3: a quantity of http://loinc.org|8302-2 has another unit than" in text


def pressure(identity: str, when: str, systolic: float, **more: Any) -> dict[str, Any]:
    """A blood pressure, as FHIR R4's own profile has it: one Observation with two components."""
    parts = [
        {"code": {"coding": [{"system": LOINC, "code": code}]}, "valueQuantity": {"value": value, "code": "mm[Hg]"}}
        for code, value in (("8480-6", systolic), ("8462-4", 80))
    ]
    return observation(identity, when, code="85354-9", component=parts) | more


def test_components_of_an_observation_are_values_of_its_patient(tmp_path: Path) -> None:
    """The systolic pressure, the newest of results only; the panel's own code has no value."""
    pressures = [
        pressure("a", "2024-01-01", 120),
        pressure("a", "2024-02", 57),
        pressure("a", "2024-03-01", 99, status="entered-in-error"),
    ]
    take = FHIR["observation"] | {"age": {"code": f"{LOINC}|8480-6", "unit": "mm[Hg]"}}

    table = read(
        export(tmp_path, PATIENTS[:1], OBSERVATIONS[:1] + pressures, [condition("a")], patient={}, observation=take)
    )

    assert table.content[:]["age"].tolist() == [57]


def test_a_column_may_have_several_codes_and_beginnings_of_codes(tmp_path: Path) -> None:
    """Any of a list, and all that begin as one does; of one code two columns have a value each."""
    icd = "http://hl7.org/fhir/sid/icd-10"
    ill = [condition(identity) for identity in "abc"]
    for one, code in zip(ill, ("I21.4", "I210", "I20.0"), strict=True):
        one["code"]["coding"] = [{"system": icd, "code": code}]
    stages = [
        observation("a", "2024", code="one", **stage("i")),
        observation("b", "2024-02", code="two", **stage("ii")),
    ]
    stages += [observation("c", "2024-02-03", code="two", **stage("iii"))]
    codes = {"stage": {"code": [f"{LOINC}|one", f"{LOINC}|two"]}}

    def labels(*wanted: str) -> list[int]:
        return of_rows(
            read(export(tmp_path, PATIENTS, stages, ill, observation=codes, condition={"outcome": list(wanted)}))
        )

    assert labels(f"{icd}|I21*") == [1, 1, 0]
    assert labels(f"{icd}|I21*", f"{icd}|I20.0") == [1, 1, 1]
    assert labels(f"{icd}|I20.0") == [0, 0, 1]
    table = read(export(tmp_path, PATIENTS, stages, ill, observation=codes, condition={"outcome": f"{icd}|*"}))
    assert table.content[:]["stage"].tolist() == [0, 1, 2]
    (tmp_path / "Observation.ndjson").write_text("", encoding="utf-8")
    assert f"no resource has code {LOINC}|one or {LOINC}|two" in refusal(tmp_path)


def test_one_code_may_be_in_two_columns(tmp_path: Path) -> None:
    """The newest and the oldest of the same results."""
    both = {
        "stage": {"code": f"{LOINC}|21908-9"},
        "age": {"code": f"{LOINC}|21908-9", "take": "oldest"},
    }
    observations = [observation("a", "2024-01-01", valueInteger=44), observation("a", "2024-02-01", **stage("ii"))]

    table = read(export(tmp_path, PATIENTS[:1], observations, [condition("a")], patient={}, observation=both))

    assert (table.content[:]["age"].tolist(), table.content[:]["stage"].tolist()) == ([44], [1])


def test_only_what_a_patient_has_now_counts_where_the_manifest_says_so(tmp_path: Path) -> None:
    """A condition that is over, one that came back, and one of which nothing is said."""
    ill = [condition(identity) for identity in "abc"]
    for one, status in zip(ill, ("resolved", "relapse", None), strict=True):
        if status:
            one["clinicalStatus"] = {"coding": [{"code": status}]}
    code = f"{SNOMED}|22298006"

    now = read(export(tmp_path, conditions=ill, condition={"outcome": {"code": code, "clinical": "active"}}))
    ever = read(export(tmp_path, conditions=ill, condition={"outcome": {"code": [code]}}))

    assert (of_rows(now), of_rows(ever)) == ([0, 1, 0], [1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"patients": [*PATIENTS, PATIENTS[0]]},
            "Patient.ndjson, line 4: the Patient has no id, or one that an earlier",
        ),
        ({"patients": [patient("a", "Hans")]}, "Patient.ndjson, line 1: birthDate is no date"),
        ({"patients": [patient("a", "2025")]}, "Patient.ndjson, line 1: birthDate is after"),
        ({"patients": ["Hans"]}, "Patient.ndjson, line 1: is no FHIR resource"),
        ({"patients": []}, "Patient.ndjson has a header but no records"),
        ({"observations": [observation("a", "Hans", **stage("i"))]}, "line 1: the Observation has no effective time"),
        ({"observations": OBSERVATIONS[:2]}, "Patient.ndjson, row 2, column 'stage', value '': the value is missing"),
        ({"observations": []}, "no resource has code http://loinc.org|21908-9"),
        ({"files": ["None.ndjson"]}, "None.ndjson does not exist"),
        ({"files": ["../Observation.ndjson"]}, "must be a relative path to a file inside"),
        ({"date": None}, "an age needs the date"),
        ({"date": "2024-02-31"}, "fhir.date is no date"),
    ],
)
def test_an_export_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """With file and line; nothing of a resource is quoted."""
    if "date" in changes and changes["date"] is None:
        folder = export(tmp_path)
        manifest = (folder / "manifest.toml").read_text(encoding="utf-8").replace('date = "2024-06-30"\n', "")
        (folder / "manifest.toml").write_text(manifest, encoding="utf-8")
    else:
        folder = export(tmp_path, **changes)

    text = refusal(folder)

    assert words in text
    assert "Hans" not in text


@examples(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["Patient.ndjson", "Observation.ndjson", "Condition.ndjson"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
)
def test_a_damaged_export_is_an_error_or_a_table(
    tmp_path: Path, name: str, cut: float, flips: list[tuple[float, int]]
) -> None:
    """Never a traceback, and never a patient more than there are lines."""
    export(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    for place, change in flips:
        data[int(place * (len(data) - 1))] ^= change
    (tmp_path / name).write_bytes(data if flips else data[: int(cut * len(data))])

    try:
        table: Table | None = read(tmp_path)
    except RecordsError:
        table = None

    assert table is None or len(table.patients.ids) <= len(PATIENTS)


def test_sections_and_files_need_each_other(tmp_path: Path) -> None:
    """A query without an address, an address without a query, an export without columns; [series] for a table."""
    assert "a file that ends in .sql and a section [sql] need each other" in refusal(write(tmp_path, file="a.sql"))
    assert "need each other" in refusal(write(tmp_path, sql={"url_file": "x"}))
    assert "a file that ends in .ndjson and a section [fhir] need each other" in refusal(
        write(tmp_path, file="a.ndjson")
    )
    long = {"file": "m.csv", "record": "r", "time": "t", "variable": "n", "value": "v"}
    assert "[series] is not for task small, whose inputs are of kind table" in refusal(write(tmp_path, series=long))
    assert "[images] is not for task small" in refusal(write(tmp_path, images={}))
