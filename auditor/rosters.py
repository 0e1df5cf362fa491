"""Who is in the consortium, as its root key signed it: which keys count, and under which lists sums were made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from auditor.evidence import Witness
from auditor.findings import COORDINATOR, Finding
from shared_models.errors import RosterError
from shared_models.privacy.evidence import Bundle
from shared_models.roster import SignedRoster, members_now, verify_roster
from shared_models.secagg.key_agreement import Roster

MOST_MOMENTS = 500  # at which somebody became a member or ceased to be one, of one list


@dataclass
class Rosters:
    """Every list of members that evidence was made under.

    Attributes:
        by_digest: Identity keys by the digest that announcements carry.
        newest: The newest list that the root key signed; None without a root key, or where nobody shows one.
        findings: What is wrong with the lists that were shown.
    """

    by_digest: dict[str, Roster] = field(default_factory=dict)
    newest: SignedRoster | None = None
    findings: list[Finding] = field(default_factory=list)


def read_rosters(bundles: Iterable[Bundle], root: bytes | None) -> Rosters:
    """Take in the lists that hospitals show.

    With a root key only lists that it signed count, but for bundles of format 1, which carry none. Without one, each
    hospital's word is taken for who its peers were.

    Args:
        bundles: As they were opened.
        root: The consortium's root public key, from elsewhere.
    """
    rosters, versions = Rosters(), dict[int, tuple[str, str]]()
    bundles, known = list(bundles), set[tuple[str, str]]()
    for bundle in bundles:
        name = bundle.manifest.hospital
        for shown in bundle.rosters:
            if root is None or (shown.digest, shown.signature) in known:  # most hospitals show the same ones
                continue
            try:
                signed = verify_roster(shown.model_dump(mode="json"), root)
            except RosterError as error:
                rosters.findings.append(Finding(code="roster-unsigned", party=name, what=str(error)))
                continue
            known.add((signed.digest, signed.signature))
            who, digest = versions.setdefault(signed.version, (name, signed.digest))
            if digest != signed.digest:
                what = f"{who} and {name} hold different rosters of version {signed.version}, both signed"
                rosters.findings.append(Finding(code="roster-fork", party=COORDINATOR, what=what))
            if rosters.newest is None or signed.version > rosters.newest.version:
                rosters.newest = signed
            rosters.by_digest |= _of_all_times(signed)
    for bundle in bundles:
        _take_own(bundle, rosters, root)
    return rosters


def _take_own(bundle: Bundle, rosters: Rosters, root: bytes | None) -> None:
    """The list that the hospital used when it packed: it must be what it says, and one of those that were signed."""
    roster, name = bundle.roster, bundle.manifest.hospital
    if Roster.of(roster.identities).digest != roster.digest:
        what = "the roster in the bundle is not the one that its digest says"
        rosters.findings.append(Finding(code="roster-unsigned", party=name, what=what))
    elif root is None or bundle.manifest.format == "konsil-evidence/1":
        rosters.by_digest.setdefault(roster.digest, roster)
    elif roster.digest not in rosters.by_digest:
        what = "the roster in use there is none that the consortium's root key signed"
        rosters.findings.append(Finding(code="roster-unsigned", party=name, what=what))


def _of_all_times(signed: SignedRoster) -> Mapping[str, Roster]:
    """Members come and go by date within one list: every set of them that there was."""
    moments = sorted({moment for m in signed.members for moment in (m.valid_from, m.valid_until)})[:MOST_MOMENTS]
    found = [members_now(signed, moment) for moment in moments]
    return {roster.digest: roster for roster in found}


def check_members(witnesses: Iterable[Witness], rosters: Rosters) -> list[Finding]:
    """Compare hospitals' ledgers with what the consortium knows of them; nothing where no signed list is known."""
    newest = rosters.newest
    return [] if newest is None else [found for witness in witnesses for found in _compare(witness, newest)]


def _compare(witness: Witness, newest: SignedRoster) -> Iterable[Finding]:
    name, record = witness.hospital, witness.record
    member = newest.member(name)
    if member is None:
        yield Finding(code="not-a-member", party=name, what=f"it is not on roster version {newest.version}")
        return
    if bytes.fromhex(member.identity) not in witness.keys:
        what = f"its ledger has another key than roster version {newest.version} knows it by"
        yield Finding(code="foreign-key", party=name, what=what)
    if member.ledger_genesis not in {None, record.lines[0].hash}:
        what = "its ledger begins with another entry than the one with which it was enrolled"
        yield Finding(code="another-ledger", party=name, what=what, entry=1)
    if member.public_size != record.terms.public_size:
        what = f"its budget counts {record.terms.public_size} patients, the roster {member.public_size}"
        yield Finding(code="public-size-differs", party=name, what=what, entry=1)
    if member.revoked:
        yield Finding(
            code="revoked", party=name, what=f"it was turned out by roster version {newest.version} or before"
        )
