"""Patient ids: which spellings mean one patient, and keyed hashes that say nothing without the hospital's key."""

import hashlib
import hmac
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MEMBER_BYTES = 16  # two of a million patients share one with probability below 2**-88


@dataclass(frozen=True, eq=False)
class Patients:
    """Whose the rows of a file are.

    Attributes:
        names: The distinct ids, in the order of their first row; may be made anew each time they are asked for.
        rows: For each row the place of its patient among them, shape ``(n,)``.
    """

    names: Iterable[str]
    rows: NDArray[np.int64]

    @property
    def ids(self) -> list[str]:
        """The id of each row."""
        names = list(self.names)
        return [names[place] for place in self.rows]


class Numbering:
    """Finds out whose the rows of a file are, part after part."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._rows = [np.empty(0, dtype=np.int64)]

    def add(self, ids: Iterable[str]) -> "Numbering":
        """The id of each of the next rows."""
        places = self._places
        self._rows.append(np.array([places.setdefault(i, len(places)) for i in ids], dtype=np.int64))
        return self

    def patients(self) -> Patients:
        """Of all rows."""
        return Patients(list(self._places), np.concatenate(self._rows))


def plain(patient: str) -> str:
    """One spelling for ids that differ by case, white space, full-width forms or a number's leading zeros only.

    It errs on the side of the patient: who is written down as ``p-17 `` is also meant by ``P-17``, and a new export in
    which 0017 has become 17 holds the same patients. Two ids that differ in anything else are two patients.
    """
    text = "".join(unicodedata.normalize("NFKC", patient).casefold().split())
    return text.lstrip("0") or "0" if text.isascii() and text.isdigit() else text


def fingerprint(patients: Iterable[str], key: bytes) -> str:
    """Keyed hash of a set of patients, in hexadecimal: what the ledger says about who is in.

    Guarantees:
        * Two sets have one fingerprint only if they are equal, up to collisions of SHA-256; order and repetition of
          ids don't matter.
        * Without ``key`` it says nothing about anybody: nobody else can compute the fingerprint of a set they guess.

    Args:
        patients: Ids exactly as the records spell them.
        key: The hospital's own; it never leaves.
    """
    hashes = sorted({hmac.digest(key, b"patient\0" + patient.encode(), "sha256") for patient in patients})
    return hmac.new(key, b"set\0" + b"".join(hashes), hashlib.sha256).hexdigest()


def members(patients: Iterable[str], key: bytes) -> frozenset[bytes]:
    """A keyed hash of ``MEMBER_BYTES`` bytes per patient, to find patients that two record sets share."""
    return frozenset(
        hmac.digest(key, b"member\0" + plain(patient).encode(), "sha256")[:MEMBER_BYTES] for patient in patients
    )
