"""Record what a release says and writes: ``python -m tests.vectors.record_release``, once, before the release after it.

A whole study in memory, with real keys, ledgers and records: every message both ways, the coordinator's and the
hospitals' files, a ledger with an entry of every kind, the steward's approval and refusal, an evidence bundle; and the
JSON schema of each message, as strict as the release reads it. Later releases are held against it.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from typer.testing import CliRunner

from client.books import LEDGER, Books
from client.bundle import export
from client.cli import app
from shared_models import messages
from shared_models.config import read_toml
from shared_models.identity import load_key
from shared_models.messages import Body, Complained, Proposal
from shared_models.privacy.ledger import Ledger
from shared_models.secagg import protocol
from shared_models.secagg.secret_sharing import SealedShare, Secret, Shares, seal
from tests.federation import Federation, change_policy, changed, make_federation, restart_hospitals

FOLDER = Path(__file__).parent
ASKED = "hospital-1"  # its steward is asked; its ledger and its bundle are kept
WHOLE_BYTES = 400  # a vector of more is kept by its digest only
RELEASE = {"every": 1, "clip": 1.0, "noise_multiplier": 60.0, "bins": 20}


def record(folder: Path) -> dict[str, Any]:
    """All of it, by name; takes seconds.

    Args:
        folder: An empty one, to work in.
    """
    federation = make_federation(
        folder / "study", hospitals=3, rounds=1, evaluation=RELEASE, privacy={"noise_multiplier": 60.0}
    )
    change_policy(federation, ASKED, standing_approvals=[])
    plan, exchange = federation.plan, _recorded(federation)
    study = federation.run()
    restart_hospitals()
    settings = federation.settings(ASKED)
    export(settings, folder / "evidence")
    files = settings.state / "studies"
    return {
        "release": read_toml(FOLDER.parents[1] / "pyproject.toml", "project")["project"]["version"],
        "schemas": {kind.__name__: _schema(kind) for kind in bodies()},
        "plan": plan.model_dump(mode="json"),
        "plan_digest": plan.digest(),
        "identities": {name: key.hex() for name, key in federation.roster().identities.items()},
        "root": (settings.keys.root).read_text("utf-8").strip(),
        "exchange": [*exchange, _complained(folder / "cheated")],
        "hospital": {
            "roster.json": settings.roster.read_text("utf-8"),
            "approval.json": (files / f"{plan.study}.approval.json").read_text("utf-8"),
            "plan.json": (files / f"{plan.study}.plan.json").read_text("utf-8"),
            "refused.json": _refused(federation),
            "evidence": base64.b64encode((folder / "evidence").read_bytes()).decode(),
            "ledger": _every_kind(settings.state / LEDGER, federation),
        },
        "coordinator": {
            name: (study / name).read_text("utf-8") for name in ("receipts.jsonl", "sums.jsonl", "events.jsonl")
        }
        | {"last-receipts.json": (federation.folder / "last-receipts.json").read_text("utf-8")},
    }


def bodies() -> list[type[Body]]:
    """Every message that there is."""
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Body)]
    return [kind for kind in kinds if hasattr(kind, "action")]


def _schema(kind: type[Body]) -> Any:
    """What a body must be, without the words that explain it."""

    def bare(part: Any, name: str = "") -> Any:
        if isinstance(part, dict):
            words = set() if name in {"properties", "$defs"} else {"title", "description"}
            return {key: bare(value, key) for key, value in part.items() if key not in words}
        return [bare(one) for one in part] if isinstance(part, list) else part

    return bare(kind.model_json_schema())


def spoken(way: str, hospital: str, message: Message) -> dict[str, Any]:
    """One message as it crosses: its type, its body, and its vector where it is small."""
    (config,) = message.content.config_records.values()
    said: dict[str, Any] = {"way": way, "hospital": hospital, "action": message.metadata.message_type, **config}
    for record in message.content.array_records.values():
        (array,) = record.values()
        digest = hashlib.sha256(array.data).hexdigest()
        vector: dict[str, Any] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "stype": array.stype,
            "sha256": digest,
        }
        whole = {"data": base64.b64encode(array.data).decode()} if len(array.data) <= WHOLE_BYTES else {}
        said["vector"] = {**vector, **whole}
    return said


def _recorded(federation: Federation) -> list[dict[str, Any]]:
    """Fills up while the federation runs. The steward says yes before the second proposal."""
    found: list[dict[str, Any]] = []
    proposed = []

    def request(hospital: str, message: Message) -> None:
        if hospital == ASKED and message.metadata.message_type == Proposal.action:
            proposed.append(message)
            if len(proposed) == 2:
                _steward("approve", federation, federation.plan.digest())
        found.append(spoken("request", hospital, message))

    def reply(hospital: str, message: Message) -> Message:
        found.append(spoken("reply", hospital, message))
        return message

    federation.wire.on_request, federation.wire.tamper = request, reply
    return found


def _steward(command: str, federation: Federation, digest: str = "") -> None:
    options = ["--digest", digest] if digest else []
    arguments = [command, str(federation.settings_file(ASKED)), federation.plan.study, "--yes", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def _refused(federation: Federation) -> str:
    """Another study, which the steward refuses."""
    federation.plan = changed(federation.plan, study="unwanted", deadline_s=0.3)
    proposal = Proposal(plan=federation.plan.model_dump(mode="json"))
    federation.wire.on_request = lambda _hospital, _message: None
    federation.wire.tamper = lambda _hospital, message: message
    message = messages.request(proposal, None, node_id=100, group_id="1", ttl_s=60)
    federation.wire.deliver(ASKED, message)
    _steward("refuse", federation)
    restart_hospitals()
    return (federation.settings(ASKED).state / "studies/unwanted.refused.json").read_text("utf-8")


def _every_kind(path: Path, federation: Federation) -> list[dict[str, str]]:
    """The study's entries, and after them one of each kind that it had none of."""
    settings = federation.settings(ASKED)
    books = Books.open(settings)
    books.budget.population_is("5" * 64)
    books.ledger.append("conformance")
    books.ledger.append("checkpoint", evidence_digest="6" * 64)
    books.close()
    ledger = Ledger.open(path, load_key(settings.keys.identity))
    ledger.rotate(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    ledger.close()
    entries = federation.ledger(ASKED)
    return [{"body": entry.canonical.decode(), "signature": entry.signature} for entry in entries]


def _complained(folder: Path) -> dict[str, Any]:
    """A victim's answer to a share that its dealer spoiled."""
    federation = make_federation(folder, hospitals=4, rounds=1, privacy={"spare_charges": 1})
    found: list[dict[str, Any]] = []

    def reply(hospital: str, message: Message) -> Message:
        said = spoken("reply", hospital, message)
        found.extend([said] if said["type"] == Complained.__name__ else [])
        return message

    federation.wire.tamper = reply
    with _a_cheat("hospital-2", of=ASKED):
        federation.run()
    restart_hospitals()
    return found[0]


@contextmanager
def _a_cheat(dealer: str, *, of: str) -> Iterator[None]:
    """Let one dealer seal one share under a wrong key, once."""
    cheated: list[str] = []

    def cheat(shares: Shares, *, key: bytes | None, context: bytes, dealer: str, holder: str) -> SealedShare:
        if (dealer, holder) == spoil and not cheated:
            cheated.append(holder)
            shares, key = Shares(Secret(bytes(len(shares.of_seed.reveal()))), shares.of_key), bytes(32)
        return seal(shares, key=key, context=context, dealer=dealer, holder=holder)

    spoil = (dealer, of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "seal", cheat)
        yield


def main() -> None:
    """Write the file of this release; a release that is recorded already is not recorded again."""
    with TemporaryDirectory() as folder:
        found = record(Path(folder))
    path = FOLDER / f"release_{found['release'].replace('.', '_')}.json"
    if path.exists():
        sys.exit(f"{path} exists: what a release said does not change")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
