"""How a hospital joins: it makes its keys and its ledger here, asks, and pins what the consortium signed for it."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from client.books import LEDGER, Books, report
from client.budget import budget_terms
from client.expiry import expiries
from client.keyfiles import certificate_request, create_new, create_node_key, create_tls_key, node_public_key, tls_key
from client.membership import Membership, accept, forget_root, genesis, own_member, read_pin
from client.process import refuse_second
from client.rotate import take_over, with_waiting_keys
from client.settings import Settings, read_settings
from shared_models.certificates import warnings
from shared_models.durable import replace_file
from shared_models.enrolment import (
    Kit,
    Request,
    UnsignedRequest,
    check_certificates,
    read_document,
    read_kit,
    sign_request,
    written,
)
from shared_models.errors import ConfigError, ForeignRosterError, GenesisError, RequestError
from shared_models.identity import create_key, fingerprint, load_key, public_bytes, read_public
from shared_models.privacy.ledger import stream_ledger
from shared_models.roster import SignedRoster, verify_roster

SETTINGS = "hospital.toml"

_TEMPLATE = """\
# One hospital of the consortium. Every key is explained in docs/hospital.md.
name = {name}
coordinator = {coordinator}
# control = "HOST:9093"     # the coordinator's control service, where evidence is left for auditors; see [policy]
records = {records}        # manifest.toml and the file that it names
state = {state}            # ledger and logs; must outlive the process
{registry}roster = "roster.json"     # written by konsil-hospital join
device = "auto"
threads = 1

[tls]
ca = "keys/ca.pem"
certificate = "keys/tls.pem"
key = "keys/tls.key"

[keys]
identity = "keys/identity.key"
node = "keys/node.key"
root = "keys/root.pub"

# A page for the steward's browser, on this machine only; its password: konsil-hospital page-password hospital.toml
# [page]
# port = 8470
# ... or stewards' certificates: konsil-hospital page-certificate hospital.toml

# Fixed when the ledger was opened, which init did: a change is refused.
[population]
name = "all-patients"
public_size = {public_size}
epsilon = {epsilon!r}
delta = {delta!r}
order = {order}

# What may happen here. Yours to change: it is read again before every message.
[policy]
tasks = {tasks}
networks = {networks}
minimum_noise_multiplier = 1.0
maximum_epsilon_per_study = {epsilon!r}
minimum_hospitals = 3
maximum_attempts = 10
maximum_rounds = 100
release_validation = false
send_checkpoints = false   # leave signed checkpoints of the ledger at the coordinator, for auditors
send_evidence = false      # leave evidence bundles there, at the end of each study and by `ledger send`
# hours = ["mon-fri 20:00-06:00"]
# Studies are asked for, one by one, unless a rule approves them in your absence:
# standing_approvals = [{{tasks = ["heart-disease"], maximum_epsilon = 0.5}}]
"""


def init(
    folder: Path,
    *,
    name: str,
    display_name: str,
    coordinator: str,
    public_size: int,
    epsilon: float,
    delta: float,
    order: int,
    tasks: Sequence[str] = ("breast-cancer", "heart-disease"),
    networks: Sequence[str] = ("logistic-regression", "mlp"),
    registry: Path | None = None,
    records: str = "records",
    state: str = "state",
) -> tuple[Path, Request]:
    """Make a hospital's folder: keys, settings, ledger, and the request to be admitted.

    Guarantees:
        * Nothing that is there is overwritten.
        * Private keys are 0600 and never leave the folder; the request holds public halves only.

    Args:
        folder: Made if missing.
        name: On the roster.
        display_name: For people.
        coordinator: host:port.
        public_size: Of the population, rounded.
        epsilon: Of its budget.
        delta: Of its budget.
        order: Of the budget's filter.
        tasks: That the policy permits, until somebody changes it.
        networks: The same.
        registry: That of the hospital's other populations, or of an enrolment before: whoever is in it has a budget.
        records: Folder of the records; relative to this one, or absolute.
        state: Folder of ledger and logs; the same.

    Returns:
        The request's file, and the request.

    Raises:
        ConfigError: There is a hospital in the folder already, or a value is out of range.
    """
    if registry is not None and not (registry / "local.key").is_file():
        raise ConfigError(
            f"{registry} is no registry: there is no local.key in it",
            hint="It is the folder `registry` beside the state folder of the population that was here before.",
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings_file = folder / SETTINGS
    text = _TEMPLATE.format(
        name=json.dumps(name),
        coordinator=json.dumps(coordinator),
        public_size=public_size,
        epsilon=epsilon,
        delta=delta,
        order=order,
        registry="" if registry is None else f"registry = {json.dumps(str(registry.absolute()))}\n",
        tasks=json.dumps(list(tasks)),
        networks=json.dumps(list(networks)),
        records=json.dumps(records),
        state=json.dumps(state),
    )
    create_new(settings_file, text.encode(), mode=0o600)
    try:
        settings = read_settings(settings_file)
        budget_terms(public_size=public_size, epsilon=epsilon, delta=delta, order=order)
    except ConfigError:
        settings_file.unlink()
        raise
    settings.keys.identity.parent.mkdir(exist_ok=True, mode=0o700)
    identity = create_key(settings.keys.identity)
    create_node_key(settings.keys.node)
    create_tls_key(settings.tls.key)
    Books.open(settings).close()
    request = UnsignedRequest(
        name=name,
        display_name=display_name,
        identity=public_bytes(identity).hex(),
        node_key=node_public_key(settings.keys.node),
        certificate_request=certificate_request(settings.tls.key, name),
        public_size=public_size,
        ledger_genesis=genesis(settings),
    )
    path, signed = folder / f"{name}.request.json", sign_request(identity, request)
    create_new(path, written(signed), mode=0o644)
    return path, signed


def join(settings: Settings, kit_file: Path, *, confirm: Callable[[str], bool], new_root: bool = False) -> SignedRoster:
    """Verify a kit and pin what is in it: the root key the first time, a newer roster every time.

    Keys that ``rotate`` made, and that the roster names, are taken into use.

    Args:
        settings: The hospital's own.
        kit_file: From the coordinator.
        confirm: Told the root key's fingerprint the first time; whether it is the one read out on the telephone.
        new_root: The consortium moves to another root key: it is confirmed as the first one was, and what was pinned
            under the old one is set aside.

    Raises:
        AlreadyRunningError: The root key changes, and the daemon runs.
        RosterError: Something in the kit is forged, substituted, old, or not for this hospital.
        LedgerError: A new identity key cannot take over the ledger; with the same kit, it can be tried again.
    """
    kit = read_kit(read_document(kit_file))
    root, moved = _confirmed_root(settings, kit, confirm, new_root=new_root)
    signed = verify_roster(kit.roster, root, pinned=None if moved else read_pin(settings.state))
    waiting = with_waiting_keys(settings, signed.member(settings.name))
    _check_ours(waiting, kit, signed)
    content = written(signed)
    if moved:
        refuse_second(settings.state)  # a daemon would go on with the old root
        forget_root(settings)
    files = {settings.tls.ca: kit.authority, settings.tls.certificate: kit.certificate}
    for path, text in files.items():
        replace_file(path, text.encode("ascii"))
    replace_file(settings.keys.root, f"{root.hex()}\n".encode("ascii"))
    replace_file(settings.roster, content)
    accepted = accept(settings, content, root)
    take_over(settings, waiting)
    return accepted


def status(settings: Settings) -> dict[str, Any]:
    """Who this hospital is, whom it is with, and what is left of its budget. Reads only.

    Raises:
        FederationError: The roster or the ledger is refused, with the reason.
    """
    signed = Membership(settings).signed()
    keys = (public_bytes(load_key(settings.keys.identity)).hex(), node_public_key(settings.keys.node))
    member = own_member(signed, settings.name, keys, time.time())
    head, entries = "", 0
    for entry in stream_ledger(settings.state / LEDGER):
        head, entries = entry.hash, entries + 1
    found = expiries(settings)
    return {
        "name": settings.name,
        "fingerprint": fingerprint(bytes.fromhex(member.identity)),
        "root_fingerprint": signed.root_fingerprint,
        "roster_version": signed.version,
        "members": [m.name for m in signed.members if m.valid(time.time())],
        "valid_until": time.strftime("%Y-%m-%d", time.gmtime(member.valid_until)),
        "ledger_entries": entries,
        "ledger_head": head,
        "epsilon_left": report(settings)["epsilon_left"],
        "expires": {expiry.what: expiry.until.strftime("%Y-%m-%d") for expiry in found},
        "warnings": warnings(found),
    }


def _confirmed_root(
    settings: Settings, kit: Kit, confirm: Callable[[str], bool], *, new_root: bool
) -> tuple[bytes, bool]:
    """The root key of a kit, and whether it takes the place of another one."""
    root = bytes.fromhex(kit.root)
    pinned = read_public(settings.keys.root) if settings.keys.root.exists() else None
    if pinned == root:
        return root, False
    if pinned is not None and not new_root:
        raise ForeignRosterError(
            "the kit holds another root key than the one this hospital pinned",
            hint="Somebody substituted it, or the consortium moves to a new one (then: join --new-root). Call first.",
        )
    if not confirm(fingerprint(root)):
        raise RequestError(
            "the root key's fingerprint was not confirmed; nothing was changed",
            hint="Call the coordinator, and compare every digit.",
        )
    return root, pinned is not None


def _check_ours(settings: Settings, kit: Kit, signed: SignedRoster) -> None:
    """Check that the kit is for this hospital: its name, its keys, its ledger, its coordinator."""
    if kit.name != settings.name:
        raise RequestError(f"this is the kit of {kit.name}, not of {settings.name}", hint="Get your own kit.")
    keys = (public_bytes(load_key(settings.keys.identity)).hex(), node_public_key(settings.keys.node))
    member = own_member(signed, settings.name, keys, time.time())
    if member.ledger_genesis not in {None, genesis(settings)}:
        raise GenesisError(
            "the roster names another first entry than this hospital's ledger has",
            hint="Bring back the ledger with which this hospital asked to be enrolled, or enrol anew.",
        )
    if signed.coordinator.address != settings.coordinator:
        raise RequestError(
            f"the roster's coordinator is {signed.coordinator.address}, the settings dial {settings.coordinator}",
            hint="Mend the settings, or call the coordinator.",
        )
    check_certificates(kit, signed, tls_key(settings.tls.key))
