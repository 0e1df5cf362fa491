"""A throw-away consortium for trials on one machine: a root key, and a roster over the keys that hospitals made.

The real steps are in ``server/enrol.py``; a trial plays them at once.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.pki import VALID_FOR
from shared_models.identity import create_key, fingerprint, load_key, public_bytes, read_public
from shared_models.roster import Coordinator, Member, UnsignedRoster, sign_roster


def trial_root(folder: Path) -> Ed25519PrivateKey:
    """The trial's root key, made the first time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "root.key"
    return load_key(path) if path.exists() else create_key(path)


def trial_roster(
    root: Ed25519PrivateKey,
    public: Path,
    sizes: Mapping[str, int],
    *,
    version: int = 1,
    revoked: Iterable[str] = (),
    address: str = "127.0.0.1:9443",
) -> UnsignedRoster:
    """A roster over the public keys in one folder.

    Args:
        root: Who will sign it.
        public: Holds ``NAME.identity.pub``, ``NAME.node.pub``, and ``NAME.tls.pub`` where hospitals have certificates.
        sizes: Each member's public size, by name.
        version: Of the roster.
        revoked: Names of members that were turned out.
        address: Where the coordinator is reached.
    """
    start, gone = int(time.time()) - 3600, set(revoked)
    members = [
        Member(
            name=name,
            display_name=name,
            identity=read_public(public / f"{name}.identity.pub").hex(),
            node_key=(public / f"{name}.node.pub").read_text("ascii").strip(),
            tls_key=_tls_key(public, name),
            public_size=size,
            valid_from=start,
            valid_until=start + int(VALID_FOR.total_seconds()),
            revoked=name in gone,
        )
        for name, size in sizes.items()
    ]
    return UnsignedRoster(
        consortium="trial",
        version=version,
        coordinator=Coordinator(name="coordinator", address=address),
        members=tuple(members),
        root_fingerprint=fingerprint(public_bytes(root)),
    )


def _tls_key(public: Path, name: str) -> str:
    """As published; made up in a trial without a network, where nobody has a certificate."""
    path = public / f"{name}.tls.pub"
    return path.read_text("ascii").strip() if path.exists() else hashlib.sha256(f"trial {name}".encode()).hexdigest()


def hand_out(root: Ed25519PrivateKey, roster: UnsignedRoster, homes: Iterable[Path]) -> None:
    """Sign a roster and give it, with the root public key, to everybody."""
    text = sign_roster(root, roster).model_dump_json(indent=2) + "\n"
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
        (home / "roster.json").write_text(text, encoding="utf-8")
        (home / "root.pub").write_text(public_bytes(root).hex() + "\n", encoding="ascii")
