"""Which consortium this hospital is in: the signed roster, pinned, and read again when its file has changed."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from client.books import LEDGER
from client.keyfiles import node_public_key
from client.settings import Settings
from shared_models.durable import replace_file
from shared_models.errors import GenesisError, NotAMemberError, RosterError
from shared_models.identity import fingerprint, load_key, public_bytes, read_public
from shared_models.privacy.ledger import stream_ledger
from shared_models.roster import Member, Pin, SignedRoster, members_now, verify_roster
from shared_models.secagg.key_agreement import Roster

PIN = "roster-pin.json"
ROSTERS = "rosters"  # every one that was accepted


class Membership:
    """The hospital's place in its consortium.

    The file is a few kilobytes: its bytes are compared at every message.

    Guarantees:
        * Nothing is answered under a roster that the root key did not sign, or that is older than one seen before,
          also before a restart: what was seen is on the disk.
        * A hospital that was revoked, or is on the roster with other keys than its own, takes part in nothing.

    Raises:
        RosterError: With the reason why there is no place for this hospital.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._root = read_public(settings.keys.root)
        self._identity = public_bytes(load_key(settings.keys.identity))
        self._node_key = node_public_key(settings.keys.node)
        self._seen: bytes | None = None
        self._signed: SignedRoster | None = None
        self.signed()

    def signed(self) -> SignedRoster:
        """The roster as its file has it now.

        Raises:
            RosterError: It is missing, not the consortium's, or older than what was seen before.
        """
        content = _content(self._settings.roster)
        if self._signed is None or content != self._seen:
            self._signed, self._seen = None, None  # until it is accepted, nothing else counts
            self._signed = accept(self._settings, content, self._root)
            self._seen = content
        return self._signed

    def now(self) -> Roster:
        """Everybody's identity keys at this moment.

        Raises:
            RosterError: The roster is refused, or this hospital is no member.
        """
        signed, now = self.signed(), time.time()
        self._own(signed, now)
        return members_now(signed, now)

    def check_genesis(self, first_entry: str) -> None:
        """Check that the ledger in use began as the consortium was told.

        Args:
            first_entry: Hash of the first entry of the hospital's ledger.

        Raises:
            GenesisError: It is another ledger: a budget that was started again.
        """
        member = self._own(self.signed(), time.time())
        if member.ledger_genesis not in {None, first_entry}:
            raise GenesisError(
                f"this ledger begins with {first_entry[:12]}…, and the roster says {member.ledger_genesis:.12}…",
                hint="Patients' budget cannot begin anew. Bring back the ledger with which this hospital was enrolled.",
            )

    def _own(self, signed: SignedRoster, now: float) -> Member:
        keys = (self._identity.hex(), self._node_key)
        return own_member(signed, self._settings.name, keys, now)


def own_member(signed: SignedRoster, name: str, keys: tuple[str, str], now: float) -> Member:
    """This hospital's own entry.

    Args:
        signed: The roster.
        name: The hospital's.
        keys: Its identity key in hexadecimal, and its node key as OpenSSH writes it.
        now: Unix time.

    Raises:
        NotAMemberError: There is none, it has other keys, or it is revoked or not valid now.
    """
    member = signed.member(name)
    if member is None:
        raise NotAMemberError(
            f"{name} is not on roster version {signed.version}", hint="Ask the coordinator to enrol this hospital."
        )
    if (member.identity, member.node_key) != keys:
        raise NotAMemberError(
            f"{name} is on roster version {signed.version} with other keys than its own",
            hint="Somebody put other keys in their place. Call the coordinator.",
        )
    if member.revoked:
        raise NotAMemberError(
            f"{name} was revoked in roster version {signed.version} or before", hint="Call the coordinator."
        )
    if not member.valid(now):
        raise NotAMemberError(
            f"{name} is a member from {_day(member.valid_from)} to {_day(member.valid_until)}, not now",
            hint="Renew it (konsil-hospital rotate hospital.toml tls, then as at enrolment), or mend the clock here.",
        )
    return member


def read_roster(settings: Settings) -> Roster:
    """Everybody's identity keys at this moment, for looking at: by a command beside the daemon, for example.

    A hospital that was turned out may look too: it still has to show its evidence.

    Raises:
        RosterError: The roster is refused.
    """
    signed = accept(settings, _content(settings.roster), read_public(settings.keys.root))
    return members_now(signed, time.time())


def accept(settings: Settings, content: bytes, root: bytes) -> SignedRoster:
    """Verify a roster against what was seen before, and remember it durably if it is newer.

    Raises:
        RosterError: It is refused.
    """
    pinned = read_pin(settings.state)
    signed = verify_roster(content, root, pinned=pinned)
    if pinned is None or signed.version > pinned.version:
        _keep(settings.state, signed, content)
        _write_pin(settings.state, Pin(signed.version, signed.digest))
    return signed


def read_pin(state: Path) -> Pin | None:
    """The newest roster that was accepted here; None before the first.

    Raises:
        RosterError: The file is damaged. Nothing is guessed: an old roster would be taken for new.
    """
    path = state / PIN
    try:
        fields = json.loads(path.read_bytes())
        return Pin(int(fields["version"]), str(fields["digest"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError):
        raise RosterError(
            f"{path} is damaged", hint="Write the newest roster's version and digest into it; see docs/hospital.md."
        ) from None


def accepted(settings: Settings) -> list[SignedRoster]:
    """Every roster that was accepted here, oldest first: whom this hospital took its peers for, and when.

    Raises:
        RosterError: One cannot be read any more.
    """
    root = read_public(settings.keys.root)
    kept = [verify_roster(_content(path), root) for path in (settings.state / ROSTERS).glob("*.json")]
    return sorted(kept, key=lambda roster: roster.version)


def forget_root(settings: Settings) -> None:
    """Set aside what was accepted under the pinned root key, so that another one can begin: its rosters, and the pin.

    Raises:
        RosterError: It cannot be done.
    """
    rosters, name = settings.state / ROSTERS, fingerprint(read_public(settings.keys.root)).replace(":", "")[:16]
    try:
        aside = rosters.with_name(f"{ROSTERS}-of-{name}")
        aside.mkdir(exist_ok=True, mode=0o700)
        for path in rosters.glob("*.json"):  # cut off here, it can be done again
            path.replace(aside / path.name)
        (settings.state / PIN).unlink(missing_ok=True)
    except OSError as error:
        raise RosterError(f"{rosters} cannot be set aside: {error.strerror}", hint="Check the disk.") from None


def genesis(settings: Settings) -> str:
    """Hash of the first entry of this hospital's ledger.

    Raises:
        GenesisError: It has none.
    """
    for entry in stream_ledger(settings.state / LEDGER):
        return entry.hash
    raise GenesisError("this hospital's ledger is empty", hint="Run konsil-hospital init in an empty folder.")


def _keep(state: Path, signed: SignedRoster, content: bytes) -> None:
    _write(state / ROSTERS / f"{signed.version}.json", content)


def _write_pin(state: Path, pin: Pin) -> None:
    _write(state / PIN, json.dumps(asdict(pin)).encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, content)
    except OSError as error:
        raise RosterError(f"{path} cannot be written: {error.strerror}", hint="Check the disk.") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RosterError(
            f"roster {path} cannot be read: {error.strerror}", hint="Get the signed roster: konsil-hospital join."
        ) from None


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
