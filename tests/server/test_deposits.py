"""What hospitals leave at the coordinator: whose it is, how large, whole or not at all; and who gets it."""

import hashlib
import resource
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import server.deposits
from server.deposits import FOLDER, KEPT_BUNDLES, KEPT_CONFLICTS, PART, Deposits
from shared_models.control import control_pb2 as pb
from shared_models.control.connection import deposit_chunks
from shared_models.control.control_pb2_grpc import ControlStub
from shared_models.control.deposits import CHECKPOINTS, CHUNK_BYTES, bundle_name
from shared_models.errors import (
    DepositError,
    EvidenceError,
    ForkedCheckpointError,
    MalformedCallError,
    NotAllowedError,
    RolledBackCheckpointError,
    TransferError,
)
from shared_models.identity import load_key, public_bytes
from shared_models.privacy.evidence import PARTS, pack, read_manifest
from tests.centre import Centre
from tests.link import Keys, checkpoint_chunks, made_checkpoint

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Of a coordinator and three hospitals."""
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Centre]:
    """Makes a service of a test's own, with limits of its own."""
    return lambda **limits: Centre(Keys(tmp_path), limits)


def bundle(keys: Keys, name: str, *, content: bytes = b"", signer: str | None = None) -> bytes:
    """A bundle whose manifest is a hospital's, and whose parts nobody looks at here."""
    path = keys.folder / f"{name}.zip"
    key = load_key(keys.folder / (signer or name) / "keys" / "identity.key")
    parts = dict.fromkeys(PARTS, b"") | {"ledger.jsonl": content}
    fields = {"software_digest": "0" * 64, "egress_digest": "0" * 64, "time": "2026-01-01T00:00:00.000Z"}
    pack(path, key, parts, hospital=name, **fields)
    return path.read_bytes()


def cut(data: bytes, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """In parts."""
    return (data[start : start + size] for start in range(0, len(data), size))


def bundle_chunks(data: bytes) -> Iterator[pb.Chunk]:
    """The deposit of a bundle."""
    return deposit_chunks("bundle", cut(data), len(data))


def leave(centre: Centre, chunks: Iterable[pb.Chunk], *, role: str = "hospital") -> bool:
    """Leave something, as north unless another role is told."""
    with centre.client(role) as client:
        return client.deposit(chunks, timeout_s=TIMEOUT_S)


def stored(centre: Centre) -> dict[str, bytes]:
    """Everything that lies in the folder of deposits."""
    folder = centre.settings.state / FOLDER
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# what is taken, and what is not


def test_checkpoints_are_kept_in_the_order_in_which_they_came(own: Callable[..., Centre]) -> None:
    """One that states nothing new is taken and not stored: a retry after a lost answer does no harm."""
    with own().serving() as centre:
        made = [made_checkpoint(centre.keys, "north", seq) for seq in (1, 3, 4)]
        again = made_checkpoint(centre.keys, "north", 4, minute=9)

        assert [leave(centre, checkpoint_chunks([one])) for one in [*made, made[2], again]] == [True] * 3 + [False] * 2

    assert stored(centre) == {f"north/{CHECKPOINTS}": b"".join(one.line() + b"\n" for one in made)}


@pytest.mark.parametrize(
    ("seq", "minute", "fork", "error"),
    [(4, 6, "b", ForkedCheckpointError), (2, 6, "a", RolledBackCheckpointError)],
    ids=["fork", "rollback"],
)
def test_a_checkpoint_that_contradicts_is_refused_and_kept(
    own: Callable[..., Centre], seq: int, minute: int, fork: str, error: type[Exception]
) -> None:
    """The hospital hears it; the auditor can read both. The next process of the coordinator knows it too."""
    centre = own()
    with centre.serving():
        first = made_checkpoint(centre.keys, "north", 4)
        against = made_checkpoint(centre.keys, "north", seq, minute=minute, fork=fork)
        leave(centre, checkpoint_chunks([first]))
        with pytest.raises(error):
            leave(centre, checkpoint_chunks([against]))
    with centre.serving():
        with pytest.raises(error):
            leave(centre, checkpoint_chunks([against]))
        leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 5, minute=7)]))
        codes = [entry.code for entry in centre.log() if entry.outcome == "failed"]

    assert stored(centre)[f"north/{CHECKPOINTS}"].startswith(first.line() + b"\n" + against.line() + b"\n")
    assert codes == [error.code] * 2  # type: ignore[attr-defined]


def test_a_flood_of_contradictions_fills_no_disk(keys: Keys, tmp_path: Path) -> None:
    """Enough are kept to prove it; each is refused."""
    deposits, identity = Deposits(tmp_path, largest=10**6), identity_of(keys, "north")
    deposits.keep_checkpoint(made_checkpoint(keys, "north", 50).line(), hospital="north", identity=identity)

    for number in range(KEPT_CONFLICTS + 20):
        line = made_checkpoint(keys, "north", 50, fork=str(number)).line()
        with pytest.raises(ForkedCheckpointError):
            deposits.keep_checkpoint(line, hospital="north", identity=identity)

    assert len((tmp_path / "north" / CHECKPOINTS).read_bytes().splitlines()) == 1 + KEPT_CONFLICTS


def identity_of(keys: Keys, name: str) -> bytes:
    return public_bytes(load_key(keys.folder / name / "keys" / "identity.key"))


def test_a_hospital_speaks_for_nobody_else(own: Callable[..., Centre]) -> None:
    """Not with another one's checkpoint or bundle, which anybody may have seen; nor under a key of its own making."""
    with own().serving() as centre:
        others = [
            checkpoint_chunks([made_checkpoint(centre.keys, "south", 1)]),
            bundle_chunks(bundle(centre.keys, "south")),
            bundle_chunks(bundle(centre.keys, "north", signer="south")),
        ]
        for chunks in others:
            with pytest.raises(
                DepositError, match=r"cannot leave a .* of south|another key than the roster has for north"
            ):
                leave(centre, chunks)
        for role in ("operator", "auditor", "viewer"):
            with pytest.raises(NotAllowedError):
                leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 1)]), role=role)

    assert stored(centre) == {}


def test_a_bundle_arrives_whole_and_the_newest_are_kept(own: Callable[..., Centre], tmp_path: Path) -> None:
    """Named by its content; the auditor gets it with its digest."""
    with own().serving() as centre:
        bundles = [bundle(centre.keys, "north", content=bytes([n]) * 200_000) for n in range(KEPT_BUNDLES + 1)]
        assert [leave(centre, bundle_chunks(data)) for data in bundles] == [True] * len(bundles)
        assert leave(centre, bundle_chunks(bundles[-1])) is False
        names = [bundle_name(hashlib.sha256(data).hexdigest()) for data in bundles]
        with centre.client("auditor") as client:
            listed = client.deposits()
            client.fetch_deposit("north", names[-1], tmp_path / "out.zip")
            with pytest.raises(DepositError, match="has left no"):
                client.fetch_deposit("north", names[0], tmp_path / "gone.zip")
            with pytest.raises(DepositError, match="has left no"):
                client.fetch_deposit("north", "../../coordinator.toml", tmp_path / "gone.zip")

    assert {file.name for file in listed} == set(names[1:])
    assert [bundle_name(file.sha256 or "") for file in listed] == [file.name for file in listed]
    assert (tmp_path / "out.zip").read_bytes() == bundles[-1]
    assert read_manifest(tmp_path / "out.zip").hospital == "north"
    assert set(stored(centre)) == {f"north/{name}" for name in names[1:]}


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 70_000, b"PK\5\6" + bytes(18)], ids=["nothing", "2", "x", "empty"])
def test_what_is_no_bundle_is_not_kept(own: Callable[..., Centre], data: bytes) -> None:
    """An archive of nothing, and no archive."""
    with own().serving() as centre, pytest.raises(EvidenceError):
        leave(centre, bundle_chunks(data))

    assert stored(centre) == {}


def test_an_archive_of_very_many_files_is_not_even_listed(tmp_path: Path) -> None:
    """Its list of files alone could fill a memory."""
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3000):
            archive.writestr(f"{number:064}", b"")

    with pytest.raises(EvidenceError, match=r"many\.zip: it has other parts"):
        read_manifest(path)


def test_what_is_too_large_is_refused_before_it_is_sent(own: Callable[..., Centre]) -> None:
    """By its header; and one that says less than it brings is cut off."""
    with own(maximum_deposit_bytes=100_000).serving() as centre:
        good = bundle(centre.keys, "north")
        for kind, size in (("bundle", 100_001), ("checkpoint", 4097)):
            with pytest.raises(DepositError, match=f"a {kind} of {size} bytes; at most"):
                leave(centre, deposit_chunks(kind, cut(b"x" * size, 4000), size))
        for size in (len(good) - 1, len(good) + 1):
            with pytest.raises(MalformedCallError, match="not what its header and footer say"):
                leave(centre, deposit_chunks("bundle", cut(good), size))
        with pytest.raises(DepositError, match="is nothing that is taken"):
            leave(centre, deposit_chunks("model", cut(good), len(good)))
        with pytest.raises(MalformedCallError):
            leave(centre, [pb.Chunk(header=pb.Header(name="bundle", size=3)), pb.Chunk(data=b"abc"), pb.Chunk()])

    assert stored(centre) == {}


def test_a_damaged_deposit_is_not_kept(own: Callable[..., Centre]) -> None:
    """The digest at the end is of something else."""
    with own().serving() as centre:
        *chunks, footer = bundle_chunks(bundle(centre.keys, "north"))
        footer.footer.sha256 = "0" * 64
        with pytest.raises(MalformedCallError):
            leave(centre, [*chunks, footer])

    assert stored(centre) == {}


def test_a_deposit_that_is_cut_off_leaves_nothing_and_can_be_sent_again(own: Callable[..., Centre]) -> None:
    """The hospital's process dies in the middle; the half that came is thrown away."""
    with own(request_timeout_s=5).serving() as centre:
        data, part = bundle(centre.keys, "north"), centre.settings.state / FOLDER / "north" / PART
        silence = threading.Event()

        def half() -> Iterator[pb.Chunk]:
            chunks = bundle_chunks(data)
            yield next(chunks)
            yield next(chunks)
            silence.wait(TIMEOUT_S)

        with centre.channel("hospital") as channel:
            call = ControlStub(channel).Deposit.future(half())
            until(part.exists)
            with pytest.raises(DepositError, match="is coming already"):
                leave(centre, bundle_chunks(data))
            call.cancel()
            silence.set()
        until(lambda: not part.exists())

        assert leave(centre, bundle_chunks(data))
        ends = Counter(entry.code for entry in centre.log() if entry.kind == "done")

    assert set(stored(centre)) == {f"north/{bundle_name(hashlib.sha256(data).hexdigest())}"}
    assert ends["deposit-under-way"] == ends[None] == 1
    assert ends["cancelled"] + ends["malformed-call"] == 1  # whichever the service notices first


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


# a disk that is full


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """Files of this process grow no further than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(keys: Keys, tmp_path: Path) -> None:
    """The bundle before stays, the checkpoints before stay, no half line and no half file; then it goes on."""
    deposits, identity = Deposits(tmp_path, largest=10**7), identity_of(keys, "north")
    first, second = (made_checkpoint(keys, "north", seq).line() for seq in (1, 2))
    deposits.keep_checkpoint(first, hospital="north", identity=identity)
    keep(deposits, bundle(keys, "north"), identity)
    before = {path.name: path.read_bytes() for path in (tmp_path / "north").iterdir()}
    large = bundle(keys, "north", content=b"".join(hashlib.sha256(bytes([n])).digest() for n in range(256)) * 10)

    with full_at(len(first) + 100), pytest.raises(DepositError, match="cannot be stored: File too large"):
        deposits.keep_checkpoint(second, hospital="north", identity=identity)
    with full_at(1000), pytest.raises(DepositError, match="cannot be stored: File too large"):
        keep(deposits, large, identity)

    assert {path.name: path.read_bytes() for path in (tmp_path / "north").iterdir()} == before
    assert deposits.keep_checkpoint(second, hospital="north", identity=identity)
    keep(deposits, large, identity)
    assert (tmp_path / "north" / CHECKPOINTS).read_bytes() == first + b"\n" + second + b"\n"


def keep(deposits: Deposits, data: bytes, identity: bytes) -> None:
    with closing(deposits.receive("north")) as incoming:
        for part in cut(data):
            incoming.write(part)
        incoming.keep(identity=identity)


def test_a_bundle_that_stalls_gives_way_to_the_next(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection died, and nobody noticed: what comes late is refused, and the next is kept whole."""
    deposits, whole = Deposits(tmp_path, largest=1 << 20), bundle(keys, "north")
    with closing(deposits.receive("north")) as stalled:
        stalled.write(whole[:10])
        with pytest.raises(DepositError, match="is coming already"):
            deposits.receive("north")

        monkeypatch.setattr(server.deposits, "STALLED_S", 0.0)
        with closing(deposits.receive("north")) as incoming:
            with pytest.raises(DepositError, match="has taken this one's place"):
                stalled.write(whole[10:])
            stalled.close()
            incoming.write(whole)
            incoming.keep(identity=identity_of(keys, "north"))

    assert [path.read_bytes() for _, path in deposits.files()] == [whole]


def test_half_a_bundle_that_a_killed_process_left_is_removed(keys: Keys, tmp_path: Path) -> None:
    """Nobody is handed it, and it takes no room; what was whole stays."""
    identity = identity_of(keys, "north")
    deposits = Deposits(tmp_path, largest=10**6)
    keep(deposits, bundle(keys, "north"), identity)
    whole = {path.name for path in (tmp_path / "north").iterdir()}
    with closing(deposits.receive("north")) as incoming:
        incoming.write(b"half")
        assert (tmp_path / "north" / PART).exists()

        Deposits(tmp_path, largest=10**6)  # the next process, while this one never got to its end

        assert {path.name for path in (tmp_path / "north").iterdir()} == whole


def test_a_line_that_a_crash_cut_never_was(keys: Keys, tmp_path: Path) -> None:
    """It is not handed out, and the next one takes its place."""
    identity, lines = identity_of(keys, "north"), [made_checkpoint(keys, "north", seq).line() for seq in (1, 2, 3)]
    Deposits(tmp_path, largest=1).keep_checkpoint(lines[0], hospital="north", identity=identity)
    path = tmp_path / "north" / CHECKPOINTS
    path.write_bytes(path.read_bytes() + lines[1][:100])

    deposits = Deposits(tmp_path, largest=1)
    assert [line for line, _ in deposits.checkpoints("north", 0, at_most=10**6)] == lines[:1]
    deposits.keep_checkpoint(lines[2], hospital="north", identity=identity)

    assert path.read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"


def test_there_is_a_bound_on_checkpoints(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hospital cannot fill the disk; what is there stays readable."""
    identity = identity_of(keys, "north")
    first, second = (made_checkpoint(keys, "north", seq).line() for seq in (1, 2))
    monkeypatch.setattr(server.deposits, "LARGEST_CHECKPOINTS", len(first) + 1)
    deposits = Deposits(tmp_path, largest=1)
    deposits.keep_checkpoint(first, hospital="north", identity=identity)

    for _ in range(2):
        with pytest.raises(DepositError, match="too many checkpoints of north"):
            deposits.keep_checkpoint(second, hospital="north", identity=identity)

    assert deposits.checkpoints("north", 0, at_most=1000) == [(first, len(first) + 1)]


# who gets it


def test_checkpoints_are_heard_as_they_come(own: Callable[..., Centre]) -> None:
    """First what there is, then that this is all, then each new one at once; also those that contradict."""
    with own().serving() as centre, centre.client("auditor") as client:
        for name, seq in (("north", 1), ("north", 2)):
            leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, name, seq)]))
        heard = client.checkpoints()
        first = [next(heard) for _ in range(3)]
        fork = made_checkpoint(centre.keys, "north", 2, fork="b")
        with pytest.raises(ForkedCheckpointError):
            leave(centre, checkpoint_chunks([fork]))
        then = [next(heard) for _ in range(2)]

    assert [news.line for news in first] == [made_checkpoint(centre.keys, "north", n).line() for n in (1, 2)] + [None]
    assert [news.line for news in then] == [fork.line(), None]


def test_following_goes_on_after_a_restart_of_the_coordinator(own: Callable[..., Centre]) -> None:
    """Nothing is missed, and nothing told twice."""
    centre, told = own(), list[str]()
    with centre.client("auditor") as client:
        heard = client.checkpoints(lost=told.append)
        with centre.serving():
            leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 1)]))
            first = next(heard)
        with centre.serving():
            leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 2)]))
            second = next(news for news in heard if news.line)

    assert [news.line for news in (first, second)] == [
        made_checkpoint(centre.keys, "north", number).line() for number in (1, 2)
    ]
    assert told


@pytest.mark.parametrize("after", [1, 10**12])
def test_a_position_that_there_is_not_is_refused(own: Callable[..., Centre], after: int) -> None:
    """Half a checkpoint is nobody's."""
    with own().serving() as centre:
        leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 1)]))
        with centre.channel("auditor") as channel, pytest.raises(grpc.RpcError) as caught:
            next(iter(ControlStub(channel).Checkpoints(pb.CheckpointsRequest(after={"north": after}))))

    assert caught.value.details() == TransferError.code


def test_the_checkpoints_file_is_gone_on_with_as_it_was(own: Callable[..., Centre], tmp_path: Path) -> None:
    """It grows while it is fetched: what comes is what there was at the beginning."""
    with own().serving() as centre, centre.client("auditor") as client:
        leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 1)]))
        whole = stored(centre)[f"north/{CHECKPOINTS}"]
        (tmp_path / "out.part").write_bytes(whole[:100])
        (tmp_path / "out.snapshot").write_text(str(len(whole)), encoding="ascii")
        leave(centre, checkpoint_chunks([made_checkpoint(centre.keys, "north", 2)]))

        client.fetch_deposit("north", CHECKPOINTS, tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == whole


def test_the_roster_is_the_one_that_was_signed(own: Callable[..., Centre], tmp_path: Path) -> None:
    """As it lies there, with the root key's signature."""
    with own().serving() as centre, centre.client("auditor") as client:
        client.fetch_roster(tmp_path / "roster.json")

    assert (tmp_path / "roster.json").read_bytes() == centre.settings.roster.read_bytes()


def test_a_stranger_key_is_refused_even_for_ones_own_name(keys: Keys, tmp_path: Path) -> None:
    """The roster says which key is whose, not the deposit."""
    other = public_bytes(Ed25519PrivateKey.generate())

    line = made_checkpoint(keys, "north", 1).line()
    with pytest.raises(DepositError, match="another key than the roster has for north"):
        Deposits(tmp_path, largest=1).keep_checkpoint(line, hospital="north", identity=other)

    assert list(tmp_path.iterdir()) == []
