"""What this hospital leaves at the coordinator for auditors, where policy permits: checkpoints, and evidence bundles.

It calls the coordinator's control service, as it calls everything: from here, over mutual TLS. Everything that is sent
is in the egress log first. Training never waits for it, and never fails with it.
"""

import fcntl
import logging
import os
import random
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import rfc8785

from client.books import LEDGER
from client.bundle import export
from client.egress import EgressLog
from client.settings import Settings, read_settings
from shared_models.control.access import Access
from shared_models.control.connection import ControlConnection, deposit_chunks
from shared_models.control.control_pb2 import Chunk
from shared_models.control.deposits import CHUNK_BYTES
from shared_models.durable import replace_file
from shared_models.errors import (
    CheckpointError,
    ConfigError,
    DepositError,
    DepositUnderWayError,
    FederationError,
    LedgerError,
    PolicyError,
)
from shared_models.identity import load_key
from shared_models.privacy.checkpoint import SignedCheckpoint, read_checkpoint, sign_checkpoint
from shared_models.privacy.head import read_head
from shared_models.privacy.ledger import head_path

log = logging.getLogger("konsil.hospital")

BETWEEN_S = 60.0  # least time between two checkpoints, unless a study is over
SHORTEST_RETRY_S, LONGEST_RETRY_S = 2.0, 600.0
CALL_TIMEOUT_S, BUNDLE_TIMEOUT_S = 30.0, 3600.0
OUTBOX = "outbox.zip"
NEWEST, SIGNING = "checkpoint.json", "checkpoint.lock"  # the newest that was signed here
_PREFIX_BYTES = 5  # of each message on a gRPC stream


def own_checkpoint(settings: Settings) -> SignedCheckpoint:
    """A checkpoint of this hospital's ledger as it is now; reads the head file, so that the daemon may be running.

    Guarantees:
        * Of two, also by two processes at a time, the one with the later time knows no fewer entries, wherever the
          clock goes: an honest hospital never contradicts itself.

    Raises:
        LedgerError: The head file or the newest checkpoint cannot be read, or the new one not be kept.
        CheckpointError: The head file states nothing under this hospital's key.
    """
    key, kept = load_key(settings.keys.identity), settings.state / NEWEST
    try:
        with _alone(settings.state / SIGNING):
            before = read_checkpoint(kept.read_bytes()) if kept.exists() else None
            newest = read_head(head_path(settings.state / LEDGER)).statements[0]
            after = before.time if before else None
            signed = sign_checkpoint(
                key, newest, hospital=settings.name, population=settings.population.name, after=after
            )
            replace_file(kept, signed.line())
    except OSError as error:
        raise LedgerError(f"{kept} cannot be written: {error.strerror}", hint="Check the disk.") from None
    return signed


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def send_checkpoint(settings: Settings, egress: EgressLog, checkpoint: SignedCheckpoint) -> bool:
    """Leave a checkpoint at the coordinator. Returns whether it is new there.

    Raises:
        PolicyError: Policy does not permit it.
        CheckpointError: It contradicts an earlier one: this ledger was rolled back, or there are two of it.
        LedgerError: It could not be listed in the egress log; nothing was sent.
        FederationError: The coordinator does not take it; no connection.
    """
    if not settings.policy.send_checkpoints:
        raise PolicyError("policy sends no checkpoints", hint="Set send_checkpoints = true in [policy].")
    line = checkpoint.line()
    fields = {name: len(rfc8785.dumps({name: value})) - 2 for name, value in checkpoint.model_dump(mode="json").items()}
    fields["JSON punctuation"] = len(line) - sum(fields.values())
    return _send(settings, egress, "checkpoint", lambda: iter([line]), fields)


def send_bundle(settings: Settings, egress: EgressLog, bundle: Path) -> bool:
    """Leave an evidence bundle at the coordinator. Returns whether it is new there.

    Raises:
        PolicyError: Policy does not permit it.
        LedgerError: It could not be listed in the egress log; nothing was sent.
        FederationError: It cannot be read; the coordinator does not take it; no connection.
    """
    if not settings.policy.send_evidence:
        raise PolicyError("policy sends no evidence bundles", hint="Set send_evidence = true in [policy].")
    try:
        with zipfile.ZipFile(bundle) as archive:
            fields = {item.filename: item.compress_size for item in archive.infolist()}
        fields["archive"] = bundle.stat().st_size - sum(fields.values())
        return _send(settings, egress, "bundle", lambda: _parts(bundle), fields)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{bundle} cannot be sent: {error}", hint="Give what ledger export wrote.") from None


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _send(
    settings: Settings, egress: EgressLog, kind: str, parts: Callable[[], Iterator[bytes]], fields: Mapping[str, int]
) -> bool:
    """List it, then send it: the same bytes, or not to the end."""
    if settings.control is None:
        raise ConfigError("the settings do not say where the control service is", hint="Set control = HOST:PORT.")
    size, crossing, sha256 = sum(fields.values()), 0, ""
    for chunk in deposit_chunks(kind, parts(), size):
        crossing += _PREFIX_BYTES + chunk.ByteSize()
        sha256 = chunk.footer.sha256
    tls = settings.tls
    access = Access(connect=settings.control, ca=tls.ca, certificate=tls.certificate, key=tls.key)
    with ControlConnection(access) as connection:
        egress.deposit(kind, fields, sha256=sha256, crossing=crossing, to=settings.control)
        timeout_s = CALL_TIMEOUT_S if kind == "checkpoint" else BUNDLE_TIMEOUT_S
        return connection.deposit(_unchanged(deposit_chunks(kind, parts(), size), sha256), timeout_s=timeout_s)


def _unchanged(chunks: Iterator[Chunk], sha256: str) -> Iterator[Chunk]:
    """The chunks of what was listed; of anything else no footer, so that it is not stored."""
    for chunk in chunks:
        if chunk.HasField("footer") and chunk.footer.sha256 != sha256:
            return
        yield chunk


class Courier:
    """A thread of the daemon that sends what policy permits; a context manager.

    Guarantees:
        * Nothing waits for it, and nothing that goes wrong in it reaches the daemon: it is logged, once for as long as
          it goes on, and tried again, with pauses that grow.
        * At most one checkpoint a minute, and one more at the end of each study; none says what the one before said.

    Args:
        settings: The hospital's own; the policy is read again before anything is sent.
        settings_file: Where they come from.
    """

    def __init__(self, settings: Settings, settings_file: Path) -> None:
        self._settings, self._file = settings, settings_file
        self._over, self._bell, self._study_over = threading.Event(), threading.Event(), threading.Event()
        self._stated = ""  # hash of the entry that the newest checkpoint is about
        self._logged = ""
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def __enter__(self) -> "Courier":
        if self._settings.control is not None:
            self._egress = EgressLog(self._settings)
            self._bell.set()  # what the process before did not get to send
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def notice(self, *, study_over: bool) -> None:
        """A message was answered, so that the ledger may have grown; returns at once."""
        if study_over:
            self._study_over.set()
        self._bell.set()

    def _run(self) -> None:
        retry_s = 0.0
        while not self._over.is_set():
            self._bell.wait()
            self._bell.clear()
            began = time.monotonic()
            failed = not self._tried(self._leave_checkpoint)
            if self._study_over.is_set():
                self._study_over.clear()
                if not self._tried(self._leave_bundle):
                    self._study_over.set()
                    failed = True
            retry_s = min(max(2 * retry_s, SHORTEST_RETRY_S), LONGEST_RETRY_S) if failed else 0.0
            if failed:
                self._bell.set()
            else:
                self._logged = ""
            self._rest(began, retry_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret

    def _rest(self, began: float, retry_s: float) -> None:
        """Until the next one may be sent; the end of a study is not waited with, unless the connection fails."""
        until = began + (retry_s or BETWEEN_S)
        while (left := until - time.monotonic()) > 0 and not self._over.is_set():
            if not retry_s and self._study_over.wait(min(left, 1.0)):
                return
            if retry_s:
                self._over.wait(left)

    def _tried(self, leave: Callable[[], None]) -> bool:
        """Whether it need not be tried again: it was sent, or would be refused again."""
        try:
            leave()
        except DepositUnderWayError as waits:  # the one before broke off, and the other side has not noticed yet
            log.warning("what is left for auditors waits: %s", waits)
            return False
        except (CheckpointError, DepositError) as refused:
            log.error("%s (%s)", refused, refused.hint)  # noqa: TRY400 - no traceback for what is known
        except FederationError as error:
            if error.code != self._logged:
                log.warning("what is left for auditors was not sent: %s (%s)", error, error.hint)
            self._logged = error.code
            return False
        except Exception as error:  # whatever this is, the daemon goes on; its text could be anything
            log.error("what is left for auditors was not sent: %s", type(error).__name__)  # noqa: TRY400
            return False
        return True

    def _leave_checkpoint(self) -> None:
        settings = self._now()
        if not settings.policy.send_checkpoints or read_head(head_path(settings.state / LEDGER)).hash == self._stated:
            return
        checkpoint = own_checkpoint(settings)
        try:
            send_checkpoint(settings, self._egress, checkpoint)
        except CheckpointError:  # it is kept there as evidence: said once
            self._stated = checkpoint.entry_hash
            raise
        self._stated = checkpoint.entry_hash

    def _leave_bundle(self) -> None:
        settings = self._now()
        if not settings.policy.send_evidence:
            return
        bundle = settings.state / OUTBOX
        try:
            export(settings, bundle)
            send_bundle(settings, self._egress, bundle)
        finally:
            bundle.unlink(missing_ok=True)

    def _now(self) -> Settings:
        """The settings with the policy as its file has it."""
        return self._settings.model_copy(update={"policy": read_settings(self._file).policy})
