"""New keys for old: made here, asked for like an enrolment, used once the consortium has signed them in."""

from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.books import LEDGER
from client.keyfiles import certificate_request, create_node_key, create_tls_key, node_public_key, tls_key
from client.membership import Membership, genesis
from client.settings import Settings
from shared_models.durable import replace_file, sync_folder
from shared_models.enrolment import Request, UnsignedRequest, key_digest, sign_request, written
from shared_models.errors import NotAMemberError
from shared_models.identity import create_key, load_key, public_bytes
from shared_models.privacy.ledger import Ledger, stream_ledger
from shared_models.roster import Member

Which = Literal["identity", "node", "tls"]


def rotate(settings: Settings, folder: Path, which: Which) -> tuple[Path, Request]:
    """Make a new key beside the old one, and the request to put it on the roster in its place.

    The old key stays in use until ``join`` has taken a kit whose roster names the new one. A key that waits is kept:
    asking again, or for another key too, asks for all that wait.

    Args:
        settings: The hospital's own.
        folder: Where the request goes, ``NAME.request.json``.
        which: The key to replace.

    Raises:
        IdentityError: A key cannot be read or written.
        RosterError: The roster is refused, or this hospital is not on it.
    """
    member = Membership(settings).signed().member(settings.name)
    if member is None:
        raise NotAMemberError(f"{settings.name} is not on the roster", hint="Enrol first: konsil-hospital init.")
    _make(settings, which)
    waiting = with_waiting_keys(settings)
    identity, before = load_key(waiting.keys.identity), load_key(settings.keys.identity)
    request = UnsignedRequest(
        name=settings.name,
        display_name=member.display_name,
        identity=public_bytes(identity).hex(),
        node_key=node_public_key(waiting.keys.node),
        certificate_request=certificate_request(waiting.tls.key, settings.name),
        public_size=settings.population.public_size,
        ledger_genesis=genesis(settings),
    )
    signed = sign_request(identity, request, before=before)
    path = folder / f"{settings.name}.request.json"
    replace_file(path, written(signed))
    return path, signed


def with_waiting_keys(settings: Settings, member: Member | None = None) -> Settings:
    """The settings with every key that waits in place of the one in use; of a member, only those that it names."""
    keys, tls = settings.keys, settings.tls
    identity, node, client = _waiting(keys.identity), _waiting(keys.node), _waiting(tls.key)
    if identity.exists() and (member is None or member.identity == public_bytes(load_key(identity)).hex()):
        keys = keys.model_copy(update={"identity": identity})
    if node.exists() and (member is None or member.node_key == node_public_key(node)):
        keys = keys.model_copy(update={"node": node})
    if client.exists() and (member is None or member.tls_key == key_digest(tls_key(client))):
        tls = tls.model_copy(update={"key": client})
    return settings.model_copy(update={"keys": keys, "tls": tls})


def take_over(settings: Settings, waiting: Settings) -> None:
    """Put keys that waited in the place of the old ones; the ledger is handed over first.

    Guarantees:
        * Killed anywhere, doing it again finishes it: both keys are on the disk until the ledger knows the new one.

    Raises:
        LedgerError: The ledger is in use (stop the daemon), or cannot be written.
    """
    pairs = (
        (waiting.keys.identity, settings.keys.identity),
        (waiting.keys.node, settings.keys.node),
        (waiting.tls.key, settings.tls.key),
    )
    if waiting.keys.identity != settings.keys.identity:
        _hand_over(settings, load_key(waiting.keys.identity))
    for new, old in pairs:
        if new != old:
            new.replace(old)
            sync_folder(old.parent)


def _hand_over(settings: Settings, key: Ed25519PrivateKey) -> None:
    """The ledger's next entries are signed by another key; done once, whatever was cut off."""
    path, public = settings.state / LEDGER, public_bytes(key).hex()
    if any(entry.new_public_key == public for entry in stream_ledger(path)):
        Ledger.open(path, key).close()  # what was cut off may have left the head file one entry behind
        return
    with Ledger.open(path, load_key(settings.keys.identity)) as ledger:
        ledger.rotate(key)


def _make(settings: Settings, which: Which) -> None:
    match which:
        case "identity":
            path = _waiting(settings.keys.identity)
            if not path.exists():
                create_key(path)
        case "node":
            path = _waiting(settings.keys.node)
            if not path.exists():
                create_node_key(path)
        case "tls":
            path = _waiting(settings.tls.key)
            if not path.exists():
                create_tls_key(path)


def _waiting(path: Path) -> Path:
    """Where a new key waits."""
    return path.with_name(f"{path.name}.next")
