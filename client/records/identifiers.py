"""The guard against direct identifiers: refused unless the manifest drops them, or gives them a meaning of its own.

It is a net with holes. It knows how columns, tags and header fields are usually named, and how a few things look in a
text; it cannot know that a name is a name. De-identify before the export; this is for what was forgotten.

Source:
    45 CFR 164.514(b)(2)(i), the identifiers of HIPAA's Safe Harbor; DICOM PS3.15 table E.1-1 for tags.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from shared_models.errors import RecordsError

# Names of columns and fields, in lower case and without separators; German and French ones beside the English.
_NAMES = frozenset(
    """
    name firstname lastname middlename fullname surname givenname familyname maidenname forename patientname patname
    vorname nachname geburtsname prenom nom nomdefamille initials nextofkin emergencycontact guardian relativename
    address addressline addressline1 addressline2 street streetaddress streetname housenumber homeaddress adresse
    strasse hausnummer rue zip zipcode postcode postalcode plz codepostal phone phonenumber telephone telephonenumber
    tel mobile mobilenumber cellphone fax faxnumber telefon telefonnummer email emailaddress mail ssn socialsecurity
    socialsecuritynumber nationalid nationalidnumber passport passportnumber mrn mrnumber medicalrecordnumber
    medicalrecord recordnumber chartnumber hospitalnumber nhsnumber nhsno insurancenumber healthplannumber
    policynumber memberid versichertennummer krankenversicherungsnummer ahvnumber accountnumber iban licensenumber
    licencenumber driverslicense driverlicense licenseplate vehicleid dob dateofbirth birthdate birthday geburtsdatum
    geburtstag datedenaissance ipaddress ip url website deviceserialnumber serialnumber fingerprint photo photograph
    """.split()  # noqa: SIM905  # a list of words reads better as words
)
_PARTS = (
    "patientname",
    "medicalrecordn",
    "socialsecurity",
    "dateofbirth",
    "streetaddress",
    "phonenumber",
    "emailaddress",
)
_SEPARATORS = re.compile(r"[\W_]+")

_IN_TEXT = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"),
    "a web address": re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE),
    "a social security number": re.compile(r"\b\d{3}-\d{2}-\d{4}\b"),
    "a telephone number": re.compile(r"(?<![\w.])(?:\+\d{1,3}[ -]?)?(?:\(\d{3}\) ?|\d{3}[ -])\d{3}[ -]\d{4}(?!\w)"),
    "a labelled record number": re.compile(
        r"\b(?:mrn|medical record (?:no|number)|account (?:no|number))\b[.:# ]*\d[\d-]{3,}", re.IGNORECASE
    ),
    "a labelled name": re.compile(r"\b(?:patient(?:'s)? name|name of patient)\s*:\s*[^\W\d_][^\n,;]*", re.IGNORECASE),
    "a labelled date of birth": re.compile(
        r"\b(?:dob|d\.o\.b\.|date of birth)\s*[:.]?\s*\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}", re.IGNORECASE
    ),
}
_ANY = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in _IN_TEXT.values()), re.IGNORECASE)


def is_identifier(name: str) -> bool:
    """Whether a column or field of this name is usually a direct identifier."""
    plain = _SEPARATORS.sub("", name.casefold())
    return plain in _NAMES or any(part in plain for part in _PARTS)


def refuse_columns(path: Path, columns: Iterable[str], *, drop: Iterable[str], mapped: Iterable[str]) -> None:
    """Refuse a file with columns whose names say that they identify somebody.

    Args:
        path: The file, for the message.
        columns: All of its columns, used or not.
        drop: Those that the manifest drops.
        mapped: Those that the manifest gives a meaning of its own: a patient column may be called ``mrn``.

    Raises:
        RecordsError: There are such columns, and the manifest says nothing about them; names only, no content.
    """
    said = {*drop, *mapped}
    refuse_found(path, [name for name in columns if is_identifier(name) and name not in said])


def refuse_found(path: Path, found: Sequence[str]) -> None:
    """Refuse a file in which columns, tags or header fields of these names identify somebody; return if there are none.

    Raises:
        RecordsError: There are some.
    """
    if found:
        raise RecordsError(
            f"{path} holds what identifies patients: {', '.join(map(repr, found))}",
            hint=f"Export without, or have it left aside: drop = [{', '.join(map(_quoted, found))}] in the manifest.",
        )


def found_in(text: str) -> str | None:
    """What in a text looks like an identifier, in words; None where nothing does."""
    if not _ANY.search(text):
        return None
    return next((what for what, pattern in _IN_TEXT.items() if pattern.search(text)), None)


def masked(text: str) -> str:
    """The text with a blank in place of whatever looks like an identifier."""
    for pattern in _IN_TEXT.values():
        text = pattern.sub(" ", text)
    return text


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
