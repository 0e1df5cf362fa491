"""Typed messages between coordinator and hospitals; the only file that knows Flower's records and their keys.

Every message is one JSON body (validated by a frozen model, unknown keys refused) and at most one flat vector of
little-endian float32. Nothing here is ever unpickled, and a vector's size is checked before it is read.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import rfc8785
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from shared_models.config import Frozen, Name, explain
from shared_models.errors import FederationError, ProtocolError

WIRE_VERSION = 1
VECTOR_DTYPE = "<f4"  # float32 only: noise is added in float64, and rounding after it hides the low bits
MAXIMUM_BODY_BYTES = 1_000_000

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Vector = NDArray[np.float32]

_BODY, _VECTOR = "konsil", "vector"


class Body(Frozen):
    """What every message has. ``action`` is Flower's message type: it routes the message at the hospital."""

    action: ClassVar[str]
    has_vector: ClassVar[bool] = False

    version: Literal[1] = 1


class Proposal(Body):
    """The coordinator proposes a study: the whole plan, as canonical JSON."""

    action: ClassVar[str] = "query.propose"
    plan: dict[str, Any]


class Enrolment(Body):
    """A hospital takes part: it approved exactly this plan. ``public_size`` is declared by its steward, not counted."""

    action: ClassVar[str] = "query.propose"
    plan_digest: Digest
    public_size: Annotated[int, Field(ge=1, le=10**9)]
    software_digest: Digest


class RoundRequest(Body):
    """What train and evaluate requests share: which study, round and attempt, and the digest of the parameters sent."""

    has_vector: ClassVar[bool] = True
    study: Name
    plan_digest: Digest
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    attempt: Annotated[int, Field(ge=1, le=1_000)]
    parameters_digest: Digest


class TrainRequest(RoundRequest):
    """Train one round from the parameters that come along."""

    action: ClassVar[str] = "train.round"


class EvaluateRequest(RoundRequest):
    """Release noised validation statistics of the parameters that come along."""

    action: ClassVar[str] = "evaluate.round"


class Receipt(Frozen):
    """What a hospital signs with every upload: the ledger entry that paid for it, and what its study has cost so far.

    Attributes:
        entry_hash: SHA-256 of the charge entry.
        chain_head: Hash of the newest entry of the hospital's ledger.
        mechanism: The mechanism charged, as in the ledger.
        charges: Charges of this study so far.
        epsilon_filter: What the hospital's Renyi filter holds the study at so far, per patient.
        signature: Ed25519 signature of the hospital over all of the above and the request's study, round and attempt.
    """

    entry_hash: Digest
    chain_head: Digest
    mechanism: dict[str, Any]
    charges: Annotated[int, Field(ge=1)]
    epsilon_filter: Annotated[float, Field(ge=0)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Upload(Body):
    """A hospital's contribution to one attempt at a round: the vector and the receipt that says it was paid for."""

    study: Name
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    attempt: Annotated[int, Field(ge=1, le=1_000)]
    receipt: Receipt


def receipt_payload(upload: Upload) -> bytes:
    """What the hospital signs: everything in the receipt but the signature, bound to study, round and attempt."""
    fields = upload.model_dump(mode="json", exclude={"receipt": {"signature"}})
    return rfc8785.dumps({"type": type(upload).__name__, **fields})


class Update(Upload):
    """Local minus global parameters, noised and bounded."""

    action: ClassVar[str] = "train.round"
    has_vector: ClassVar[bool] = True


class ReleasedStatistics(Upload):
    """Additive validation statistics, clipped per patient and noised."""

    action: ClassVar[str] = "evaluate.round"
    has_vector: ClassVar[bool] = True


class StudyEnd(Body):
    """The study is over: the hospital closes it and releases what was reserved and never charged."""

    action: ClassVar[str] = "query.finish"
    study: Name
    plan_digest: Digest


class PrivacyStatement(Body):
    """What the study cost at one hospital, by the hospital's own ledger.

    ``epsilon`` is the tight figure "for the schedule as executed, valid if it was fixed in advance"; ``epsilon_filter``
    is what was enforced.
    """

    action: ClassVar[str] = "query.finish"
    study: Name
    rounds: Annotated[int, Field(ge=0)]
    epsilon: Annotated[float, Field(ge=0)]
    epsilon_filter: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["patient"]
    neighbouring: str
    accountant: str
    budget_epsilon: Annotated[float, Field(gt=0)]
    public_size: Annotated[int, Field(ge=1)]


class Refusal(Body):
    """A hospital's no: a code from ``errors.py``, never a text. The reason is in the hospital's own log."""

    action: ClassVar[str] = "refusal"
    code: Annotated[str, Field(pattern=r"^[a-z-]{1,32}$")]


REPLIES: dict[str, type[Body]] = {
    Proposal.action: Enrolment,
    TrainRequest.action: Update,
    EvaluateRequest.action: ReleasedStatistics,
    StudyEnd.action: PrivacyStatement,
}

BodyType = TypeVar("BodyType", bound=Body)


def encode(body: Body, vector: Vector | None = None) -> RecordDict:
    """Put a message into Flower's records."""
    if body.has_vector != (vector is not None):
        raise ProtocolError(f"{type(body).__name__} and its vector do not belong together")
    records = RecordDict()
    fields = body.model_dump(mode="json")
    records[_BODY] = ConfigRecord({"type": type(body).__name__, "json": json.dumps(fields, allow_nan=False)})
    if vector is not None:
        data = np.ascontiguousarray(vector, dtype=VECTOR_DTYPE).tobytes()
        array = Array(dtype=VECTOR_DTYPE, shape=(len(vector),), stype="raw", data=data)
        records[_VECTOR] = ArrayRecord({_VECTOR: array})
    return records


def decode(records: RecordDict, expected: type[BodyType]) -> tuple[BodyType, Vector | None]:
    """Take a message out of Flower's records, checking everything before it is used.

    Raises:
        ProtocolError: A record is missing, extra, too large, of another type, or does not validate; or the vector's
            declared shape, dtype and bytes disagree, or it holds NaN or infinity.
    """
    wanted = {_BODY, _VECTOR} if expected.has_vector else {_BODY}
    if set(records) != wanted:
        raise ProtocolError(f"{expected.__name__} came with other records than it has", hint=_PEER_HINT)
    config = records.config_records.get(_BODY)
    text = config.get("json") if config else None
    if config is None or set(config) != {"type", "json"} or config["type"] != expected.__name__:
        raise ProtocolError(f"a peer sent something else than {expected.__name__}", hint=_PEER_HINT)
    if not isinstance(text, str) or len(text) > MAXIMUM_BODY_BYTES:
        raise ProtocolError(f"the body of {expected.__name__} is missing or too large", hint=_PEER_HINT)
    try:
        body = expected.model_validate_json(text)
    except ValidationError as error:
        raise ProtocolError(f"{expected.__name__} is malformed: {explain(error)}", hint=_PEER_HINT) from None
    return body, _decode_vector(records) if expected.has_vector else None


_PEER_HINT = "The peer runs another version, or is hostile; its message was dropped."


def _decode_vector(records: RecordDict) -> Vector:
    arrays = records.array_records.get(_VECTOR)
    if arrays is None or set(arrays) != {_VECTOR}:
        raise ProtocolError("the vector of a message is missing", hint=_PEER_HINT)
    array = arrays[_VECTOR]
    if array.dtype != VECTOR_DTYPE or array.stype != "raw" or len(array.shape) != 1:
        raise ProtocolError("a vector has the wrong dtype or shape", hint=_PEER_HINT)
    if len(array.data) != array.shape[0] * np.dtype(VECTOR_DTYPE).itemsize:
        raise ProtocolError("a vector's length and its bytes disagree", hint=_PEER_HINT)
    vector: Vector = np.frombuffer(array.data, dtype=VECTOR_DTYPE)
    if not np.isfinite(vector).all():
        raise ProtocolError("a vector holds NaN or infinity", hint="The sender's training diverged, or it is hostile.")
    return vector


def request(body: Body, vector: Vector | None, *, node_id: int, group_id: str, ttl_s: float) -> Message:
    """Wrap a coordinator's request into a Flower message to one node."""
    return Message(encode(body, vector), dst_node_id=node_id, message_type=body.action, group_id=group_id, ttl=ttl_s)


def reply(body: Body, vector: Vector | None, to: Message) -> Message:
    """Wrap a hospital's answer into a Flower message."""
    return Message(encode(body, vector), reply_to=to)


def refuse(error: Exception, to: Message) -> Message:
    """Answer no. Only the error's code crosses the wire, never its text: a text can hold a patient's values."""
    code = error.code if isinstance(error, FederationError) else FederationError.code
    return Message(encode(Refusal(code=code)), reply_to=to)


def read_reply(message: Message) -> tuple[Body, Vector | None]:
    """Take a hospital's answer: what the request's type allows, or a ``Refusal``.

    Raises:
        ProtocolError: It is neither; or Flower reports that the node failed.
    """
    if message.has_error():
        raise ProtocolError(f"no reply came back (Flower code {message.error.code})", hint="See the hospital's log.")
    records = message.content
    if records.config_records.get(_BODY, ConfigRecord()).get("type") == Refusal.__name__:
        return decode(records, Refusal)
    expected = REPLIES.get(message.metadata.message_type)
    if expected is None:
        raise ProtocolError("a reply of an unknown kind", hint=_PEER_HINT)
    return decode(records, expected)


def not_admitted(to: Message) -> Message:
    """Flower's own error reply, with a fixed text, for a message that no hospital code will look at."""
    return Message(Error(code=403, reason="not admitted"), reply_to=to)
