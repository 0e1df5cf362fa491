"""What left this hospital: a line for every reply, by field, with its price; and every byte around it, counted.

There is a line for everything that is left for auditors, too. Each is written before its first byte goes out, or
nothing goes out.
"""

import hashlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from client.evidence import EvidenceFile
from shared_models.messages import Body, Lanes, Proposal, Upload
from shared_models.secagg.key_agreement import Announcement

if TYPE_CHECKING:
    import httpx

    from client.settings import Settings

EGRESS = "egress.jsonl"
LARGEST_LOG = 64 * 2**20  # about 7,000 rounds; three such files are kept
FREE = "free: public or protocol"
COUNTS_EVERY_S = 900.0


class EgressLog:
    """The log in one state folder.

    Guarantees:
        * ``reply`` lists every field of a body and its vector; their sizes, with JSON's own punctuation, add up to the
          bytes of the body and of the vector, whose digest is in the line.
        * ``count`` takes in every byte of an HTTP request, line, headers and body; the counts are written after each
          reply, at least every 15 minutes while there are calls, and at the end of a connection.
        * ``deposit`` lists what is left for auditors by part, and counts the bytes of the messages that carry it. What
          HTTP/2 adds, the same few headers for each call, its frames' and control frames' bytes, is not counted.
    """

    def __init__(self, settings: "Settings") -> None:
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = EvidenceFile(settings.state / EGRESS, largest=LARGEST_LOG, keep_s=settings.logs.audit_s)
        self._to, self._turn, self._written = settings.coordinator, threading.Lock(), time.monotonic()
        self._calls: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._headers: Counter[str] = Counter()

    def reply(
        self, body: Body, vector: Lanes | None, *, about: Announcement | None = None, to: Body | None = None
    ) -> None:
        """List a reply that is about to leave.

        Args:
            body: What it says.
            vector: What comes with it.
            about: The attempt at hand, for the study, round and attempt of a body that does not say.
            to: The request, for the study of a proposal.

        Raises:
            LedgerError: It could not be written; then nothing may leave.
        """
        text = body.model_dump_json().encode()
        data = np.ascontiguousarray(vector if vector is not None else [], dtype=body.vector or "<u4")
        digest = hashlib.sha256(text)
        digest.update(data.data)
        charge = f"charge {body.receipt.entry_hash}" if isinstance(body, Upload) else FREE
        sizes = {name: _size(body, name) for name in type(body).model_fields}
        fields = {name: {"bytes": size, "price": FREE} for name, size in sizes.items()}
        fields["JSON punctuation"] = {"bytes": len(text) - sum(sizes.values()), "price": FREE}
        if vector is not None:
            fields["vector"] = {"bytes": data.nbytes, "price": charge}
        self._file.write(
            what="reply",
            message=type(body).__name__,
            to=self._to,
            **_subject(body, about, to),
            fields=fields,
            bytes=len(text) + data.nbytes,
            sha256=digest.hexdigest(),
        )

    def not_admitted(self) -> None:
        """List the fixed answer to a message of an unknown kind."""
        self._file.write(what="reply", message="not admitted", to=self._to, fields={}, bytes=0)

    def deposit(self, kind: str, fields: Mapping[str, int], *, sha256: str, crossing: int, to: str) -> None:
        """List something that is about to be left for auditors, at the coordinator's control service.

        Args:
            kind: What it is.
            fields: Bytes of each part of it.
            sha256: Of all of it.
            crossing: Bytes of the messages that carry it, each with the five that gRPC puts before it.
            to: Address of the service.

        Raises:
            LedgerError: It could not be written; then nothing may leave.
        """
        self._file.write(
            what="deposit",
            message=kind,
            to=to,
            fields={name: {"bytes": size, "price": FREE} for name, size in fields.items()},
            bytes=sum(fields.values()),
            sha256=sha256,
            calls={"Deposit": {"count": 1, "line": 0, "headers": 0, "body": crossing}},
        )

    def count(self, request: "httpx.Request") -> None:
        """Take in one HTTP/1.1 request, before it is sent."""
        line = len(request.method) + 1 + len(request.url.raw_path) + len(" HTTP/1.1\r\n")
        headers = {name.decode("latin-1").lower(): len(name) + len(value) + 4 for name, value in request.headers.raw}
        with self._turn:
            call = self._calls[request.url.path.rpartition("/")[2]]
            call.update(count=1, line=line, headers=sum(headers.values()) + 2, body=len(request.content))
            self._headers.update(headers)
            late = time.monotonic() - self._written > COUNTS_EVERY_S
        if late:
            self.write_counts()

    def write_counts(self) -> None:
        """Write what was counted since the last time."""
        with self._turn:
            calls, headers = {name: dict(call) for name, call in self._calls.items()}, dict(self._headers)
            self._calls.clear()
            self._headers.clear()
            self._written = time.monotonic()
        if calls:
            self._file.write(what="calls", to=self._to, calls=calls, headers=headers)


def _size(body: Body, name: str) -> int:
    """Bytes of one field in the body's JSON, its name included."""
    return len(body.model_dump_json(include={name}).encode()) - len("{}")


def _subject(body: Body, about: Announcement | None, to: Body | None) -> dict[str, Any]:
    if isinstance(to, Proposal):
        return {"study": to.plan["study"]}
    of = body if hasattr(body, "study") else about
    return {name: getattr(of, name) for name in ("study", "round", "attempt") if hasattr(of, name)}


def summary(lines: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Totals by study, message and field, and by kind of call.

    Returns:
        ``fields``: rows of study, message, field, times, bytes, price; ``calls``: rows of call, times, bytes;
        ``headers``: bytes by name of the header.
    """
    fields: defaultdict[tuple[str, str, str], list[Any]] = defaultdict(lambda: [0, 0, set()])
    calls: defaultdict[str, Counter[str]] = defaultdict(Counter)
    headers: Counter[str] = Counter()
    for line in lines:
        for name, field in line.get("fields", {}).items():
            row = fields[line.get("study", "-"), line["message"], name]
            row[0] += 1
            row[1] += field["bytes"]
            row[2] |= {field["price"]}
        for name, call in line.get("calls", {}).items():
            calls[name].update(call)
        headers.update(line.get("headers", {}))
    return {
        "fields": [_row(*key, *row) for key, row in sorted(fields.items())],
        "calls": [{"call": name, **call} for name, call in sorted(calls.items())],
        "headers": dict(headers),
    }


def _row(study: str, message: str, field: str, times: int, size: int, prices: set[str]) -> Mapping[str, Any]:
    charges = len(prices - {FREE})
    price = f"{charges} charge{'' if charges == 1 else 's'}" if charges else FREE
    return {"study": study, "message": message, "field": field, "times": times, "bytes": size, "price": price}
