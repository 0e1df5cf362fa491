"""Does a hospital's ledger hold? Chain, signatures and head file; and every charge against its approval.

The rules of the budget are checked by code of the auditor's own, not by the hospital's.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from auditor.findings import Finding
from auditor.recompute import filter_epsilon
from shared_models.config import Frozen
from shared_models.errors import LedgerError
from shared_models.identity import fingerprint
from shared_models.privacy.entries import Chain, Entry, following, verify_head
from shared_models.privacy.head import Head
from shared_models.privacy.ledger import head_path, snapshot
from shared_models.privacy.mechanisms import GaussianRelease, PoissonGaussian

_TOLERANCE = 1e-9  # two implementations of one formula, in floating point

MOST_FINDINGS = 1000  # of one kind of check; whoever has so many has to begin anew anyway

_Mechanism = PoissonGaussian | GaussianRelease
_Problem = tuple[str, str]  # code and sentence


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
        rules = Rules()
        verified, _ = check_entries(entries, head, keys, rules.follow)
    if rules.broken:
        first, more = rules.findings[0], f" (and {rules.broken - 1} more)" if rules.broken > 1 else ""
        raise LedgerError(
            f"ledger entry {first.entry}: {first.what}{more}",
            hint="The entries are genuine; the hospital broke its own rules.",
        )
    return verified


def check_entries(
    entries: Iterable[Entry], head: Head | None, keys: Collection[bytes], follow: Callable[[Entry], None]
) -> tuple[Verified, list[bytes]]:
    """Verify the chain of a ledger, wherever its entries were read.

    Args:
        entries: Oldest first; read once.
        head: What the head file says; None if there is none.
        keys: As for ``verify_ledger``.
        follow: Is given each entry, once it is known to follow.

    Returns:
        What was verified, and all public keys of the chain, oldest first.

    Raises:
        LedgerError: What does not hold.
    """
    chain, charges = Chain(), 0
    for entry in following(entries, chain):
        charges += entry.kind == "charge"
        follow(entry)
    if chain.first is None:
        raise LedgerError("the ledger has no entries", hint="No budget was opened, or everything was cut off.")
    _refuse_foreign(chain, chain.first, keys)
    if head is not None:
        verify_head(head, chain)
    verified = Verified(
        hospital=chain.first.hospital,
        population=chain.first.population or "",
        entries=chain.seq,
        charges=charges,
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
    newest: dict[str, Entry] = field(default_factory=dict)  # the last charge of each kind of mechanism
    done: set[str] = field(default_factory=set)  # kinds whose last charge is known to have been used
    software: str | None = None  # that it was approved for again; None as long as it was approved once
    closed: bool = False


class Rules:
    """The rules of the budget, followed entry by entry; memory grows with the number of studies only.

    Attributes:
        broken: How many times genuine entries broke a rule.
        findings: The first of them, at most ``MOST_FINDINGS``.
    """

    def __init__(self) -> None:
        self.broken, self.findings = 0, list[Finding]()
        self._opening: Entry | None = None
        self._studies: dict[str | None, _Study] = {}

    def follow(self, entry: Entry) -> None:
        """Take the next entry in."""
        for code, what in self._problems(entry):
            self.broken += 1
            if len(self.findings) < MOST_FINDINGS:
                self.findings.append(finding_at(entry, code, what))

    def _problems(self, entry: Entry) -> Iterator[_Problem]:
        if self._opening is None:
            self._opening = entry
            yield from _open(entry)
            return
        if entry.population not in {None, self._opening.population}:
            yield "foreign-population", f"it belongs to population {entry.population}"
        if entry.kind == "plan-approved":
            yield from _approve(entry, self._studies, self._opening)
        elif entry.kind == "plan-reapproved":
            yield from _approve_again(entry, self._studies)
        elif entry.kind == "charge":
            yield from _charge(entry, self._studies)
        elif entry.kind in {"round-done", "release"}:
            yield from _use(entry, self._studies)
        elif entry.kind == "study-closed":
            yield from _close(entry, self._studies)


def finding_at(entry: Entry, code: str, what: str) -> Finding:
    """A finding about one ledger entry."""
    return Finding(
        code=code,
        party=entry.hospital,
        what=what,
        study=entry.study,
        round=entry.round,
        attempt=entry.attempt,
        entry=entry.seq,
    )


def _open(opening: Entry) -> Iterator[_Problem]:
    terms = opening.budget
    if terms is None:
        yield "budget-not-opened", "it opens no budget"
    elif not terms.delta * 10 * terms.public_size <= 1 + _TOLERANCE:
        yield "delta-too-large", f"delta {terms.delta:g} is above 1 / (10 * {terms.public_size})"


def _approve(entry: Entry, studies: dict[str | None, _Study], opening: Entry) -> Iterator[_Problem]:
    """Study and population limits can only be crossed here: a charge takes from what an approval set aside."""
    terms, limit = opening.budget, entry.limit
    if terms is None or limit is None:
        return
    if entry.study in studies:
        yield "approved-twice", f"it approves study {entry.study} a second time"
        return
    reserved = Counter({r.mechanism: r.charges for r in entry.reservation or ()})
    studies[entry.study] = _Study(entry.plan_digest or "", reserved)
    own = filter_epsilon(reserved, delta=limit.delta, order=terms.order)
    if not own <= limit.epsilon + _TOLERANCE:
        yield "study-over-limit", f"study {entry.study} costs epsilon {own:.4g}, promised {limit.epsilon:g}"
    committed = sum((s.charged if s.closed else s.reserved for s in studies.values()), Counter[_Mechanism]())
    total = filter_epsilon(committed, delta=terms.delta, order=terms.order)
    if not total <= terms.epsilon + _TOLERANCE:
        yield "budget-exceeded", f"epsilon {total:.4g} is spent or reserved, of a budget of {terms.epsilon:g}"


def _approve_again(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[_Problem]:
    """The same plan for other software: it reserves nothing, and from here on no other software is charged for."""
    study = studies.get(entry.study)
    if study is None:
        yield "not-approved", f"it approves study {entry.study} again, which was not approved"
        return
    if entry.plan_digest != study.digest:
        yield "another-plan", f"it approves another plan of study {entry.study} than was approved"
    if study.closed:
        yield "after-the-end", f"it approves study {entry.study} again after its end"
    if entry.reservation is not None or entry.limit is not None:
        yield "reserved-twice", f"it reserves study {entry.study} a second time"
    study.software = entry.software_digest


def _charge(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[_Problem]:
    study, mechanism = studies.get(entry.study), entry.mechanism
    if study is None or mechanism is None:
        yield "not-approved", f"it charges study {entry.study}, which was not approved"
        return
    if entry.plan_digest != study.digest:
        yield "another-plan", f"it charges study {entry.study} for another plan than was approved"
    if study.closed:
        yield "after-the-end", f"it charges study {entry.study} after its end"
    if study.software is not None and entry.software_digest != study.software:
        yield "other-software", f"it charges study {entry.study} by other software than was approved"
    last = study.newest.get(mechanism.kind)
    if last is not None and not _turn(entry) > _turn(last):
        number, attempt = _turn(entry)
        yield "charged-before", f"round {number}, attempt {attempt} of study {entry.study} was charged before"
    study.newest[mechanism.kind] = entry
    study.done.discard(mechanism.kind)
    study.charged[mechanism] += 1
    if study.charged[mechanism] > study.reserved[mechanism]:
        yield "over-reservation", f"it charges study {entry.study} for more than was reserved"


def _use(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[_Problem]:
    """Training that was done and statistics that were released: of the newest charge, once, and at its price."""
    study = studies.get(entry.study)
    kind = "gaussian-release" if entry.kind == "release" else "poisson-gaussian"
    paid = study.newest.get(kind) if study else None
    if study is None or paid is None or _turn(paid) != _turn(entry):
        yield "not-paid", f"round {entry.round}, attempt {entry.attempt} was not charged before"
        return
    if entry.plan_digest != study.digest:
        yield "another-plan", f"it belongs to another plan of study {entry.study} than was approved"
    if entry.kind == "release" and entry.mechanism != paid.mechanism:
        yield "release-price", f"the release was another mechanism than ledger entry {paid.seq} paid for"
    if kind in study.done:
        yield "used-twice", f"the charge of ledger entry {paid.seq} was used before"
    study.done.add(kind)


def _close(entry: Entry, studies: dict[str | None, _Study]) -> Iterator[_Problem]:
    study = studies.get(entry.study)
    if study is None:
        yield "not-approved", f"it ends study {entry.study}, which was not approved"
        return
    if study.closed:
        yield "after-the-end", f"it ends study {entry.study} a second time"
    if entry.plan_digest != study.digest:
        yield "another-plan", f"it ends another plan of study {entry.study} than was approved"
    study.closed = True


def _turn(entry: Entry) -> tuple[int, int]:
    return entry.round or 0, entry.attempt or 0
