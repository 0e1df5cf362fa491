"""A FHIR bulk export (NDJSON) -> a frame: one row per Patient, columns from Patient, Observation and Condition.

Files are read line by line; only what the manifest names is kept. Names, addresses, telecom and identifiers of a
Patient are never looked at: what is not named by the manifest does not leave the line.

Source:
    HL7 FHIR R4: Bulk Data Access; Patient, Observation (``final``, ``amended`` and ``corrected`` are results),
    Condition (``verificationStatus``, ``clinicalStatus``); dates may be a year, or a year and a month.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from client.records.manifest import Fhir, Manifest, Observation
from shared_models.errors import RecordsError

_RESULTS = {"final", "amended", "corrected"}
_NO_CONDITION = {"refuted", "entered-in-error"}
_ACTIVE = {"active", "recurrence", "relapse"}
_HINT = "Mend the export or [fhir] in the manifest, then run konsil-hospital check-data again."
_Resource = Mapping[str, Any]
ID = "id"


def read_export(manifest: Manifest) -> pd.DataFrame:
    """Read Patients, then what the other files say of them; the index is the Patient's line.

    Columns are ``id`` and those that ``[fhir]`` names; a value that a patient has not is an empty text.

    Raises:
        RecordsError: A file is missing; a line is no resource; a Patient is there twice; a quantity has another unit
            than the manifest says; or nothing at all is found for a code.
    """
    fhir = manifest.fhir
    assert fhir is not None  # noqa: S101  # the manifest's validator has seen to it
    day = _day(manifest, fhir)
    rows: dict[str, dict[str, str]] = {}
    lines = []
    for where, number, patient in _resources(manifest.file, "Patient"):
        identity = patient.get(ID)
        if not isinstance(identity, str) or not identity or identity in rows:
            raise RecordsError(f"{where}: the Patient has no id, or one that an earlier line has", hint=_HINT)
        rows[identity] = {ID: identity, **{c: _element(where, patient, e, day) for c, e in fhir.patient.items()}}
        rows[identity] |= dict.fromkeys(fhir.observation, "") | dict.fromkeys(fhir.condition, "no")
        lines.append(number)
    _add(fhir, rows)
    return pd.DataFrame(list(rows.values()), index=lines, dtype=object)


class _Wanted:
    """Which columns a code is for, and which of them came up at all."""

    def __init__(self, columns: Mapping[str, tuple[str, ...]]) -> None:
        self._exact: defaultdict[str, list[str]] = defaultdict(list)
        self._prefixes: list[tuple[str, str]] = []
        self._absent = dict.fromkeys(columns)
        for column, codes in columns.items():
            for code in codes:
                if code.endswith("*"):
                    self._prefixes.append((code[:-1], column))
                else:
                    self._exact[code].append(column)

    def columns(self, concept: object) -> list[str]:
        """Those that any coding of a concept is for, each once."""
        codes = _codes(concept)
        found = [column for code in codes for column in self._exact.get(code, ())]
        found += [column for prefix, column in self._prefixes for code in codes if code.startswith(prefix)]
        return list(dict.fromkeys(found))

    def came_up(self, column: str) -> None:
        self._absent.pop(column, None)

    @property
    def absent(self) -> list[str]:
        return list(self._absent)


def _add(fhir: Fhir, rows: dict[str, dict[str, str]]) -> None:
    """What Observations and Conditions say of the patients."""
    observed = _Wanted({column: wanted.codes for column, wanted in fhir.observation.items()})
    wanted_conditions = fhir.conditions
    conditions = _Wanted({column: wanted.codes for column, wanted in wanted_conditions.items()})
    times: dict[tuple[str, str], datetime] = {}
    for path in fhir.files:
        for where, _, resource in _resources(path, "Observation", "Condition"):
            patient = _subject(resource)
            if resource["resourceType"] == "Observation":
                for part in (resource, *_components(resource)):
                    for column in observed.columns(part.get("code")):
                        observed.came_up(column)
                        wanted = fhir.observation[column]
                        _observe(where, resource, part, column, wanted, rows.get(patient), times, patient)
            elif _holds(resource):
                for column in conditions.columns(resource.get("code")):
                    conditions.came_up(column)
                    if patient in rows and (wanted_conditions[column].clinical == "any" or _active(resource)):
                        rows[patient][column] = "yes"
    absent = [fhir.observation[column].codes for column in observed.absent]
    absent += [wanted_conditions[column].codes for column in conditions.absent]
    if absent:
        where = ", ".join(map(str, fhir.files)) or "fhir.files is empty"
        raise RecordsError(
            f"{where}: no resource has code {' or '.join(absent[0])}",
            hint="Check the code, and that its file is in fhir.files.",
        )


def _components(resource: _Resource) -> list[_Resource]:
    """Parts of an Observation with codes and values of their own, such as systolic and diastolic pressure."""
    found = resource.get("component")
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def _observe(
    where: str,
    resource: _Resource,
    part: _Resource,
    column: str,
    wanted: Observation,
    row: dict[str, str] | None,
    times: dict[tuple[str, str], datetime],
    patient: str,
) -> None:
    """Enter one observation, if it is a result, of a patient here, and newer (or older) than what is there."""
    if resource.get("status") not in _RESULTS or row is None:
        return
    value = _value(where, part, wanted)
    if value is None:
        return
    when = _time(where, resource)
    before = times.get((patient, column))
    if before is None or (when >= before if wanted.take == "newest" else when < before):
        times[patient, column], row[column] = when, value


def _value(where: str, resource: _Resource, wanted: Observation) -> str | None:
    """A quantity's number in the wanted unit, a coded value's code, a text, a whole number, or yes or no; else None."""
    quantity, coded = resource.get("valueQuantity"), resource.get("valueCodeableConcept")
    if isinstance(quantity, dict):
        if quantity.get("comparator"):
            return None  # "<5" is no number
        if wanted.unit is None or quantity.get("code", quantity.get("unit")) != wanted.unit:
            raise RecordsError(
                f"{where}: a quantity of {' or '.join(wanted.codes)} has another unit than the manifest's "
                f"{wanted.unit or '(none)'}",
                hint='Convert before the export, or name the unit: unit = "..." (UCUM).',
            )
        value = quantity.get("value")
        return None if value is None else str(value)
    if isinstance(coded, dict):
        return next((code.rpartition("|")[2] for code in _codes(coded)), None)
    if isinstance(resource.get("valueBoolean"), bool):
        return "yes" if resource["valueBoolean"] else "no"
    value = resource.get("valueString", resource.get("valueInteger"))
    return value if isinstance(value, str) else None


def _holds(resource: _Resource) -> bool:
    """Whether a Condition is one: not refuted, not entered by mistake."""
    return not any(code.rpartition("|")[2] in _NO_CONDITION for code in _codes(resource.get("verificationStatus")))


def _active(resource: _Resource) -> bool:
    """Whether a Condition is there now."""
    return any(code.rpartition("|")[2] in _ACTIVE for code in _codes(resource.get("clinicalStatus")))


def _element(where: str, patient: _Resource, element: str, day: date | None) -> str:
    if element == "gender":
        return str(patient.get("gender") or "")
    if element == "deceased":
        return "yes" if patient.get("deceasedBoolean") is True or patient.get("deceasedDateTime") else "no"
    born = patient.get("birthDate")
    if born is None or day is None:
        return ""
    try:
        birth = date.fromisoformat(_completed(str(born)))
    except ValueError:
        raise RecordsError(f"{where}: birthDate is no date", hint=_HINT) from None
    if birth > day:
        raise RecordsError(f"{where}: birthDate is after the manifest's fhir.date", hint=_HINT)
    return str(day.year - birth.year - ((day.month, day.day) < (birth.month, birth.day)))


def _subject(resource: _Resource) -> str:
    """The id of the Patient that a resource is about; empty where it is about something else."""
    subject = resource.get("subject")
    reference = subject.get("reference") if isinstance(subject, dict) else None
    kind, _, identity = str(reference or "").rpartition("/")
    return identity if kind.rpartition("/")[2] == "Patient" else ""


def _codes(concept: object) -> list[str]:
    """``system|code`` of each coding of a CodeableConcept."""
    coding = concept.get("coding") if isinstance(concept, dict) else None
    found = coding if isinstance(coding, list) else []
    return [f"{c.get('system', '')}|{c['code']}" for c in found if isinstance(c, dict) and "code" in c]


def _time(where: str, resource: _Resource) -> datetime:
    """When an observation was made. Without a time zone it is taken for UTC: only the order matters."""
    period = resource.get("effectivePeriod")
    text = resource.get("effectiveDateTime") or resource.get("effectiveInstant")
    text = text or (period.get("start") if isinstance(period, dict) else None) or resource.get("issued")
    try:
        found = datetime.fromisoformat(_completed(str(text)))
    except ValueError:
        raise RecordsError(f"{where}: the Observation has no effective time", hint=_HINT) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _completed(text: str) -> str:
    """A year, or a year and a month, with its first day, as FHIR's partial dates begin; anything else as it is."""
    return "-".join([*text.split("-"), "01", "01"][:3]) if re.fullmatch(r"\d{4}(-\d{2})?", text) else text


def _day(manifest: Manifest, fhir: Fhir) -> date | None:
    try:
        return date.fromisoformat(fhir.date) if fhir.date else None
    except ValueError:
        raise RecordsError(f"the manifest of {manifest.file}: fhir.date is no date", hint="YYYY-MM-DD.") from None


def _resources(path: Path, *kinds: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Resources of some kinds, with their place and line; numbers stay as they are written."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    resource = json.loads(line, parse_float=str, parse_int=str)
                except (ValueError, RecursionError):
                    raise RecordsError(f"{where}: is no JSON object", hint=_HINT) from None
                if not isinstance(resource, dict) or not isinstance(resource.get("resourceType"), str):
                    raise RecordsError(f"{where}: is no FHIR resource", hint=_HINT)
                if resource["resourceType"] in kinds:
                    yield where, number, resource
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist", hint="Check file and fhir.files in the manifest.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"{path} cannot be read: {type(error).__name__}", hint="NDJSON in UTF-8.") from None
