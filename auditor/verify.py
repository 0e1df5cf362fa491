"""Does a hospital's ledger hold? Chain, signatures and head file; and every charge against its approval.

The rules of the budget are checked by code of the auditor's own, not by the hospital's.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from auditor.recompute import filter_epsilon
from shared_models.config import Frozen
from shared_models.errors import LedgerError
from shared_models.identity import fingerprint
from shared_models.privacy.entries import Chain, Entry, following, verify_head
from shared_models.privacy.head import Head
from shared_models.privacy.ledger import head_path, snapshot
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian

_TOLERANCE = 1e-9  # two implementations of one formula, in floating point

_Mechanism = PoissonGaussian | GaussianRelease


class Verified(Frozen):
    """A ledger that holds, and how far the checking went.

    Attributes:
        key: Fingerprint of the key that signs the next entry.
        rotations: How often the ledger was handed over to a new key; every hand-over holds.
        key_was_given: Whether this key came from elsewhere; otherwise only the ledger itself vouches for it.
        head_was_checked: Whether its head file was there; otherwise entries may be missing at the end.
    """

    hospital: str
    population: str
    entries: int
    charges: int
    key: str
    rotations: int
    key_was_given: bool
    head_was_checked: bool


def verify_ledger(path: Path, keys: Collection[bytes] = ()) -> Verified:
    """Verify one ledger file.

    Guarantees:
        * Any edit, deletion, insertion, reordering, replay or swapped key is found and named; a cut at the end is, if
          the head file lies beside the ledger.
        * Every charge was reserved by an approval, paid once, in order, and before its study was closed; what was
          charged and reserved never exceeded the study's limit or the population's budget.

    Args:
        path: The SQLite file.
        keys: Public keys that the auditor trusts; one of the ledger's must be among them. Best the newest: an old
            key still vouches for whatever it signed. Without any, the ledger's own word is taken.

    Raises:
        LedgerError: What does not hold.
    """
    with snapshot(path, head_path(path)) as (head, entries):
        return check_entries(entries, head, keys)[0]


def check_entries(
    entries: Iterable[Entry], head: Head | None, keys: Collection[bytes] = ()
) -> tuple[Verified, list[bytes]]:
    """Verify a ledger's entries, wherever they were read.

    Args:
        entries: Oldest first; read once.
        head: What the head file says; None if there is none.
        keys: As for ``verify_ledger``.

    Returns:
        What was verified, and all public keys of the chain, oldest first.

    Raises:
        LedgerError: What does not hold.
    """
    chain, rules = Chain(), Rules()
    for entry in following(entries, chain):
        rules.follow(entry)
    if chain.first is None:
        raise LedgerError("the ledger has no entries", hint="No budget was opened, or everything was cut off.")
    _refuse_foreign(chain, chain.first, keys)
    if head is not None:
        verify_head(head, chain)
    if rules.broken:
        more = f" (and {rules.broken - 1} more)" if rules.broken > 1 else ""
        raise LedgerError(f"{rules.problem}{more}", hint="The entries are genuine; the hospital broke its own rules.")
    verified = Verified(
        hospital=chain.first.hospital,
        population=chain.first.population or "",
        entries=chain.seq,
        charges=rules.charges,
        key=fingerprint(chain.keys[-1]),
        rotations=len(chain.keys) - 1,
        key_was_given=bool(keys),
        head_was_checked=head is not None,
    )
    return verified, chain.keys


def _refuse_foreign(chain: Chain, first: Entry, trusted: Collection[bytes]) -> None:
    """One trusted key is enough: old keys signed for the new ones, and the new ones for the chain so far."""
    if trusted and not set(chain.keys) & set(trusted):
        raise LedgerError(
            f"ledger entry 1: {first.hospital}'s ledger has another key ({fingerprint(chain.keys[-1])[:19]}…) than "
            "those given",
            hint="It is another hospital's ledger, or a forgery. Ask the consortium for the right key.",
        )


@dataclass
class _Study:
    digest: str
    reserved: Counter[_Mechanism]
    charged: Counter[_Mechanism] = field(default_factory=Counter)
    newest: dict[str, tuple[int, int]] = field(default_factory=dict)
    software: str | None = None  # that it was approved for again; None as long as it was approved once
    closed: bool = False


class Rules:
    """The rules of the budget, followed entry by entry; memory grows with the number of studies only.

    Attributes:
        broken: How many times genuine entries broke a rule.
        problem: The first of them, with the entry's number.
        charges: How many charges there were.
    """

    def __init__(self) -> None:
        self.broken, self.problem, self.charges = 0, "", 0
        self._opening: Entry | None = None
        self._studies: dict[str | None, _Study] = {}

    def follow(self, entry: Entry) -> None:
        """Take the next entry in."""
        for problem in self._problems(entry):
            self.problem = self.problem or problem
            self.broken += 1

    def _problems(self, entry: Entry) -> Iterator[str]:
        if self._opening is None:
            self._opening = entry
            yield from _open(entry)
            return
        if entry.population not in {None, self._opening.population}:
            yield f"ledger entry {entry.seq}: it belongs to population {entry.population}"
        if entry.kind == "plan-approved":
            yield from _approve(entry, self._studies, self._opening)
        elif entry.kind == "plan-reapproved":
            yield from _approve_again(entry, self._studies)
        elif entry.kind == "charge":
            self.charges += 1
            yield from _charge(entry, self._studies)
        elif entry.kind == "study-closed" and entry.study in self._studies:
            self._studies[entry.study].closed = True


def _open(opening: Entry) -> Iterator[str]:
    terms = opening.budget
    if terms is None:
        yield "ledger entry 1: it opens no budget"
    elif not terms.delta * 10 * terms.public_size <= 1 + _TOLERANCE:
        yield f"ledger entry 1: delta {terms.delta:g} is above 1 / (10 * {terms.public_size})"


def _approve(entry: Entry, studies: dict[str | None, _Study], opening: Entry) -> Iterator[str]:
    """Study and population limits can only be crossed here: a charge takes from what an approval set aside."""
    terms, limit = opening.budget, entry.limit
    if terms is None or limit is None:
        return
    if entry.study in studies:
        yield f"ledger entry {entry.seq}: it approves study {entry.study} a second time"
        return
    reserved = Counter({r.mechanism: r.charges for r in entry.reservation or ()})
    studies[entry.study] = _Study(entry.plan_digest or "", reserved)
    own = filter_epsilon(reserved.elements(), delta=limit.delta, order=terms.order)
    if not own <= limit.epsilon + _TOLERANCE:
        yield f"ledger entry {entry.seq}: study {entry.study} costs epsilon {own:.4g}, promised {limit.epsilon:g}"
    committed = [m for s in studies.values() for m in (s.charged if s.closed else s.reserved).elements()]
    total = filter_epsilon(committed, delta=terms.delta, order=terms.order)
    if not total <= terms.epsilon + _TOLERANCE:
        yield f"ledger entry {entry.seq}: epsilon {total:.4g} is spent or reserved, of a budget of {terms.epsilon:g}"


def _approve_again(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[str]:
    """The same plan for other software: it reserves nothing, and from here on no other software is charged for."""
    study, where = studies.get(entry.study), f"ledger entry {entry.seq}"
    if study is None:
        yield f"{where}: it approves study {entry.study} again, which was not approved"
        return
    if entry.plan_digest != study.digest:
        yield f"{where}: it approves another plan of study {entry.study} than was approved"
    if study.closed:
        yield f"{where}: it approves study {entry.study} again after its end"
    if entry.reservation is not None or entry.limit is not None:
        yield f"{where}: it reserves study {entry.study} a second time"
    study.software = entry.software_digest


def _charge(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[str]:
    study, mechanism, where = studies.get(entry.study), entry.mechanism, f"ledger entry {entry.seq}"
    if study is None or mechanism is None:
        yield f"{where}: it charges study {entry.study}, which was not approved"
        return
    if entry.plan_digest != study.digest:
        yield f"{where}: it charges study {entry.study} for another plan than was approved"
    if study.closed:
        yield f"{where}: it charges study {entry.study} after its end"
    if study.software is not None and entry.software_digest != study.software:
        yield f"{where}: it charges study {entry.study} by other software than was approved"
    turn = (entry.round or 0, entry.attempt or 0)
    if not turn > study.newest.get(mechanism.kind, (0, 0)):
        yield f"{where}: round {turn[0]}, attempt {turn[1]} of study {entry.study} was charged before"
    study.newest[mechanism.kind] = turn
    study.charged[mechanism] += 1
    if study.charged[mechanism] > study.reserved[mechanism]:
        yield f"{where}: it charges study {entry.study} for more than was reserved"
