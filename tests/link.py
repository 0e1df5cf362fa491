"""A real SuperLink on loopback with real keys and certificates, and real connections to it, for tests of both sides."""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message

from client.books import Books
from client.daemon import serve
from client.process import Ending
from client.settings import Settings as HospitalSettings
from client.settings import read_settings as read_hospital
from server.demo import coordinator_settings, free_port, hospital_settings
from server.examples import example_plan, write_example
from server.pki import Authority, create_hospital_keys, publish_tls_key
from server.settings import Settings as CoordinatorSettings
from server.settings import read_settings as read_coordinator
from server.trial import hand_out, trial_root, trial_roster
from shared_models.control.connection import deposit_chunks
from shared_models.control.control_pb2 import Chunk
from shared_models.identity import load_key, public_bytes, sign
from shared_models.privacy.checkpoint import SIGNED, Checkpoint, SignedCheckpoint
from shared_models.roster import UnsignedRoster

Handler = Callable[[Message, Context], Message]


def ready_hospital(folder: Path) -> "Keys":
    """Keys of a coordinator and its hospitals; north has records and a ledger, and is ready for studies."""
    made = Keys(folder)
    example = write_example("breast-cancer", folder / "data", hospitals=3, seed=0)
    shutil.copytree(example.hospitals[0].folder, folder / "north" / "records")
    Books.open(made.hospital("north")).close()
    return made


@dataclass
class Keys:
    """A folder with an authority, a coordinator and hospitals, as the demo lays them out."""

    folder: Path
    names: tuple[str, ...] = ("north", "south", "east")
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.authority = Authority(self.folder / "authority")
        self.coordinator_certificate(self.authority)
        for name in self.names:
            self.add_hospital(name)
        self.root = trial_root(self.folder / "root")
        self.sign_roster(version=1)
        settings = coordinator_settings(self.port, self.authority.certificate)
        (self.folder / "coordinator" / "coordinator.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")

    def roster(self, *, version: int = 1, revoked: Iterable[str] = ()) -> UnsignedRoster:
        """A roster of all hospitals."""
        sizes = dict.fromkeys(self.names, 100)
        return trial_roster(
            self.root, self.folder / "coordinator" / "hospitals", sizes, version=version, revoked=revoked
        )

    def sign_roster(self, *, version: int, revoked: Iterable[str] = ()) -> None:
        """Sign a roster and give it to everybody."""
        homes = [self.folder / name for name in ("coordinator", *self.names)]
        hand_out(self.root, self.roster(version=version, revoked=revoked), homes)

    def coordinator_certificate(self, authority: Authority) -> None:
        """Make, or make anew, the coordinator's TLS key and certificate."""
        for file in (self.folder / "coordinator").glob("tls.*"):
            file.unlink()
        authority.issue(self.folder / "coordinator", "coordinator", hosts=["127.0.0.1"])

    def hospital_certificate(self, name: str, authority: Authority) -> None:
        """Make, or make anew, a hospital's TLS key and certificate."""
        for file in (self.folder / name / "keys").glob("tls.*"):
            file.unlink()
        authority.issue(self.folder / name / "keys", name)

    def add_hospital(self, name: str, *, public: str = "coordinator/hospitals") -> None:
        """A hospital's keys and settings; ``public`` is where the public halves go."""
        create_hospital_keys(self.folder / name / "keys", self.folder / public, name)
        self.authority.issue(self.folder / name / "keys", name)
        publish_tls_key(self.folder / name / "keys" / "tls.pem", self.folder / public / f"{name}.tls.pub")
        records = self.folder / name / "records"
        settings = hospital_settings(
            name, records, 100, example_plan("breast-cancer", 3), self.port, self.authority.certificate
        )
        self.hospital_file(name).write_text(tomli_w.dumps(settings), encoding="utf-8")

    def hospital_file(self, name: str) -> Path:
        """Where a hospital's settings lie."""
        return self.folder / name / "hospital.toml"

    def hospital(self, name: str) -> HospitalSettings:
        """A hospital's settings."""
        return read_hospital(self.hospital_file(name))

    def coordinator(self) -> CoordinatorSettings:
        """The coordinator's settings."""
        return read_coordinator(self.folder / "coordinator" / "coordinator.toml")

    def expired(self, name: str) -> Authority:
        """An authority whose certificates ran out half an hour ago."""
        return Authority(self.folder / name, valid_for=timedelta(minutes=30))

    @contextmanager
    def connected(self, name: str, handler: Handler) -> Iterator[threading.Thread]:
        """A hospital's daemon loop in a thread of this process, with a handler of the test's."""
        over = Ending()
        arguments = (self.hospital(name), self.hospital_file(name), handler)
        thread = threading.Thread(target=serve, args=arguments, kwargs={"until": over}, daemon=True)
        thread.start()
        try:
            yield thread
        finally:
            over.set()


def made_checkpoint(keys: Keys, name: str, seq: int, *, minute: int | None = None, fork: str = "a") -> SignedCheckpoint:
    """A hospital's checkpoint of a ledger that there need not be; see ``signed_checkpoint``."""
    key = load_key(keys.folder / name / "keys" / "identity.key")
    return signed_checkpoint(key, name, seq, minute=minute, fork=fork)


def signed_checkpoint(
    key: Ed25519PrivateKey, name: str, seq: int, *, minute: int | None = None, fork: str = "a"
) -> SignedCheckpoint:
    """A checkpoint of a ledger that there need not be.

    Args:
        key: Signs it.
        name: The hospital that it says it is of.
        seq: Number of the entry; its hash is made of it.
        minute: When it was signed; as many minutes after a moment as there are entries, unless told otherwise.
        fork: Names one of several histories.
    """
    unsigned = Checkpoint(
        format="konsil-checkpoint/1",
        hospital=name,
        population="all-patients",
        seq=seq,
        entry_hash=sha256(f"{fork} {seq}".encode()).hexdigest(),
        time=f"2026-01-01T00:{seq if minute is None else minute:02}:00.000Z",
        public_key=public_bytes(key).hex(),
    )
    return SignedCheckpoint(**unsigned.model_dump(), signature=sign(key, SIGNED, unsigned.payload()).hex())


def checkpoint_chunks(checkpoints: Iterable[SignedCheckpoint]) -> Iterator[Chunk]:
    """The deposit of one checkpoint."""
    (one,) = checkpoints
    return deposit_chunks("checkpoint", [one.line()], len(one.line()))
