"""The guard against direct identifiers: which names it knows, and that a manifest can answer it."""

from pathlib import Path

import pytest

from client.records.identifiers import is_identifier, refuse_columns
from shared_models.errors import RecordsError
from shared_models.tasks import TASKS, SeriesInput, TableInput


@pytest.mark.parametrize(
    "name",
    [
        "Name", "last_name", "LastName", "Patient Name", "pat_name", "Vorname", "street", "HOME_ADDRESS", "zip", "PLZ",
        "phone-number", "E-Mail", "SSN", "social_security_no", "MRN", "medical_record_number", "NHS number", "DOB",
        "date of birth", "BirthDate", "patient_date_of_birth", "insurance_number", "IP", "licence number",
    ],
)  # fmt: skip
def test_usual_names_of_identifiers_are_known(name: str) -> None:
    """In any case, with any separators."""
    assert is_identifier(name)


@pytest.mark.parametrize(
    "name", ["age", "sex", "patient", "id", "stay", "named_drug", "street_drugs", "variable", "time"]
)
def test_names_of_findings_and_pseudonyms_are_not(name: str) -> None:
    """A pseudonym is what the patient column is for."""
    assert not is_identifier(name)


def test_no_installed_task_has_a_column_that_the_guard_refuses() -> None:
    """What a task asks for is not an identifier."""
    inputs = [task.input for task in TASKS.values()]
    names = [c.name for i in inputs if isinstance(i, TableInput) for c in i.columns]
    names += [v.name for i in inputs if isinstance(i, SeriesInput) for v in i.variables]

    assert [name for name in names if is_identifier(name)] == []


def test_the_hint_is_what_the_manifest_needs() -> None:
    """All columns at once; dropped, or given a meaning, they are let pass."""
    columns = ["mrn", "age", "Last Name", "zip"]

    with pytest.raises(RecordsError) as caught:
        refuse_columns(Path("data.csv"), columns, drop=[], mapped=["mrn"])
    refuse_columns(Path("data.csv"), columns, drop=["Last Name", "zip"], mapped=["mrn"])

    assert str(caught.value) == "data.csv holds what identifies patients: 'Last Name', 'zip'"
    assert 'drop = ["Last Name", "zip"]' in caught.value.hint
