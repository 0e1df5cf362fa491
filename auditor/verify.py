"""Does a hospital's ledger hold? Chain, signatures and head file; and every charge against its approval.

The rules of the budget are checked by code of the auditor's own, not by the hospital's.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from auditor.recompute import filter_epsilon
from shared_models.config import Frozen
from shared_models.errors import LedgerError
from shared_models.identity import fingerprint
from shared_models.privacy.ledger import Entry, head_path, read_head, read_ledger, verify_entries, verify_head
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian

_TOLERANCE = 1e-9  # two implementations of one formula, in floating point

_Mechanism = PoissonGaussian | GaussianRelease


class Verified(Frozen):
    """A ledger that holds, and how far the checking went.

    Attributes:
        key: Fingerprint of the key that signed every entry.
        key_was_given: Whether this key came from elsewhere; otherwise only the ledger itself vouches for it.
        head_was_checked: Whether its head file was there; otherwise entries may be missing at the end.
    """

    hospital: str
    population: str
    entries: int
    charges: int
    key: str
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
        keys: Public keys that the auditor trusts; the ledger's must be one of them. Without any, the ledger's own word
            is taken.

    Raises:
        LedgerError: What does not hold.
    """
    entries = read_ledger(path)
    if not entries:
        raise LedgerError(f"{path} has no entries", hint="No budget was opened, or everything was cut off.")
    first = entries[0]
    key = _key(first, keys)
    verify_entries(entries, key)
    head = head_path(path)
    if head.exists():
        verify_head(read_head(head), entries, key)
    problems = list(broken_rules(entries))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LedgerError(f"{problems[0]}{more}", hint="The entries are genuine; the hospital broke its own rules.")
    return Verified(
        hospital=first.hospital,
        population=first.population or "",
        entries=len(entries),
        charges=sum(entry.kind == "charge" for entry in entries),
        key=fingerprint(key),
        key_was_given=bool(keys),
        head_was_checked=head.exists(),
    )


def _key(first: Entry, trusted: Collection[bytes]) -> bytes:
    key = bytes.fromhex(first.public_key or "")
    if not key:
        raise LedgerError("ledger entry 1: it names no key", hint="A ledger starts with the opening of a budget.")
    if trusted and key not in trusted:
        raise LedgerError(
            f"ledger entry 1: {first.hospital}'s ledger has another key ({fingerprint(key)[:19]}…) than those given",
            hint="It is another hospital's ledger, or a forgery. Ask the consortium for the right key.",
        )
    return key


@dataclass
class _Study:
    digest: str
    reserved: Counter[_Mechanism]
    charged: Counter[_Mechanism] = field(default_factory=Counter)
    newest: dict[str, tuple[int, int]] = field(default_factory=dict)
    closed: bool = False


def broken_rules(entries: Sequence[Entry]) -> Iterator[str]:
    """Every rule of the budget that genuine entries break, each with the entry's number."""
    opening = entries[0]
    terms = opening.budget
    if terms is None:
        yield "ledger entry 1: it opens no budget"
        return
    if not terms.delta * 10 * terms.public_size <= 1 + _TOLERANCE:
        yield f"ledger entry 1: delta {terms.delta:g} is above 1 / (10 * {terms.public_size})"
    studies: dict[str | None, _Study] = {}
    for entry in entries[1:]:
        if entry.population not in {None, opening.population}:
            yield f"ledger entry {entry.seq}: it belongs to population {entry.population}"
        if entry.kind == "plan-approved":
            yield from _approve(entry, studies, opening)
        elif entry.kind == "charge":
            yield from _charge(entry, studies)
        elif entry.kind == "study-closed" and entry.study in studies:
            studies[entry.study].closed = True


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


def _charge(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[str]:
    study, mechanism, where = studies.get(entry.study), entry.mechanism, f"ledger entry {entry.seq}"
    if study is None or mechanism is None:
        yield f"{where}: it charges study {entry.study}, which was not approved"
        return
    if entry.plan_digest != study.digest:
        yield f"{where}: it charges study {entry.study} for another plan than was approved"
    if study.closed:
        yield f"{where}: it charges study {entry.study} after its end"
    turn = (entry.round or 0, entry.attempt or 0)
    if not turn > study.newest.get(mechanism.kind, (0, 0)):
        yield f"{where}: round {turn[0]}, attempt {turn[1]} of study {entry.study} was charged before"
    study.newest[mechanism.kind] = turn
    study.charged[mechanism] += 1
    if study.charged[mechanism] > study.reserved[mechanism]:
        yield f"{where}: it charges study {entry.study} for more than was reserved"
