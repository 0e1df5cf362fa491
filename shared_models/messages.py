"""Typed messages between coordinator and hospitals; the only file that knows Flower's records and their keys.

Every message is one JSON body (validated by a frozen model, unknown keys refused) and at most one flat vector:
parameters as little-endian float32 on the way out, encrypted sums' lanes as little-endian uint32 on the way back.
Nothing here is ever unpickled, and a vector's size is checked before it is read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from shared_models.config import ALWAYS_WRITTEN, Name, explain
from shared_models.errors import FederationError, ProtocolError, UnsupportedMessageError
from shared_models.receipts import Anchor, Digest, Receipt, SignedReceipt
from shared_models.secagg.key_agreement import Advertisement, Announcement, SecAggMessage
from shared_models.secagg.protocol import (
    Agreement,
    Cohort,
    Complaint,
    Dealing,
    Delivery,
    Revealed,
    Survivors,
    Unmasking,
)
from shared_models.versions import refuse_version

PARAMETERS, LANES = "<f4", "<u4"  # what a vector can be: parameters, or integers modulo 2**32 under masks
MAXIMUM_BODY_BYTES = 1_000_000

Vector = NDArray[np.float32]
Lanes = NDArray[np.uint32]

_BODY, _VECTOR = "konsil", "vector"


class Body(SecAggMessage):
    """What every message has.

    ``action`` is Flower's message type: it routes the message at the hospital. ``vector`` is the type of the vector
    that comes along; None where none does. ``version`` is the wire's: it grows only when a release says something that
    the release before it could not read.
    """

    action: ClassVar[str]
    vector: ClassVar[str | None] = None

    version: Annotated[Literal[1], ALWAYS_WRITTEN] = 1


class Proposal(Body):
    """The coordinator proposes a study: the whole plan, as canonical JSON; and what it holds of this hospital."""

    action: ClassVar[str] = "query.propose"
    plan: dict[str, Any]
    anchor: Annotated[Anchor, ALWAYS_WRITTEN] = Anchor()


class Enrolment(Body):
    """A hospital takes part: it approved exactly this plan. ``public_size`` is declared by its steward, not counted."""

    action: ClassVar[str] = "query.propose"
    plan_digest: Digest
    public_size: Annotated[int, Field(ge=1, le=10**9)]
    software_digest: Digest


class AdvertiseRequest(Body):
    """Stage 1 of a sum: what will be summed, of whom, and how many must stay, the same for all.

    The anchor is not: it is what the coordinator holds of this hospital.
    """

    action: ClassVar[str] = "query.advertise"
    announcement: Announcement
    anchor: Annotated[Anchor, ALWAYS_WRITTEN] = Anchor()


class Advertised(Body):
    """Stage 1, back: the hospital's fresh public keys."""

    action: ClassVar[str] = "query.advertise"
    advertisement: Advertisement


class ShareRequest(Body):
    """Stage 2: everybody's public keys."""

    action: ClassVar[str] = "query.share"
    cohort: Cohort


class Dealt(Body):
    """Stage 2, back: sealed shares for everybody, and the commitment to them."""

    action: ClassVar[str] = "query.share"
    dealing: Dealing


class SumRequest(Body):
    """Stage 3, for either purpose: the shares for this hospital; study, round and attempt are those announced."""

    vector: ClassVar[str | None] = PARAMETERS
    delivery: Delivery


class TrainRequest(SumRequest):
    """Train one round from the parameters that come along."""

    action: ClassVar[str] = "train.round"


class EvaluateRequest(SumRequest):
    """Release noised validation statistics of the parameters that come along."""

    action: ClassVar[str] = "evaluate.round"


class Upload(Body):
    """A hospital's contribution to one attempt at a sum: the masked vector and the receipt that says it was paid for.

    ``context`` is the attempt's; with it in the receipt, a payment belongs to one sum and no other.
    """

    vector: ClassVar[str | None] = LANES
    study: Name
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    attempt: Annotated[int, Field(ge=1, le=1_000)]
    context: Digest
    receipt: Receipt


def signed_receipt(upload: Upload) -> SignedReceipt:
    """What an upload's signature covers, with it: all of the body."""
    return SignedReceipt.model_validate({"type": type(upload).__name__, **upload.model_dump()})


def receipt_payload(upload: Upload) -> bytes:
    """What the hospital signs: everything in the receipt but the signature, bound to study, round and attempt."""
    return signed_receipt(upload).payload()


class Update(Upload):
    """Stage 3, back: local minus global parameters, noised, bounded, weighed, quantized and masked."""

    action: ClassVar[str] = "train.round"


class ReleasedStatistics(Upload):
    """Stage 3, back: additive validation statistics, clipped per patient, noised, quantized and masked."""

    action: ClassVar[str] = "evaluate.round"


class Complained(Body):
    """Stage 3, back, instead of an upload: a dealer is at fault, and this attempt is over."""

    action: ClassVar[str] = "train.round"
    complaint: Complaint


class AgreeRequest(Body):
    """Stage 4: who uploaded."""

    action: ClassVar[str] = "query.agree"
    survivors: Survivors


class Agreed(Body):
    """Stage 4, back: the hospital's signature on who uploaded."""

    action: ClassVar[str] = "query.agree"
    agreement: Agreement


class UnmaskRequest(Body):
    """Stage 5: the signatures on who uploaded."""

    action: ClassVar[str] = "query.unmask"
    unmasking: Unmasking


class Unmasked(Body):
    """Stage 5, back: one share per peer."""

    action: ClassVar[str] = "query.unmask"
    revealed: Revealed


class StudyEnd(Body):
    """The study is over: the hospital closes it and releases what was reserved and never charged."""

    action: ClassVar[str] = "query.finish"
    study: Name
    plan_digest: Digest


class PrivacyStatement(Body):
    """What the study cost at one hospital, by the hospital's own ledger.

    ``epsilon`` is the tight figure "for the schedule as executed, valid if it was fixed in advance"; ``epsilon_filter``
    is what was enforced. ``engine`` says where gradients per patient came from, if not from the engine that this
    software prefers; it is left out otherwise, so that coordinators of before can read the statement.
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
    engine: Literal["opacus-hooks", "unknown"] | None = None


class Refusal(Body):
    """A hospital's no: a code from ``errors.py``, never a text. The reason is in the hospital's own log."""

    action: ClassVar[str] = "refusal"
    code: Annotated[str, Field(pattern=r"^[a-z-]{1,32}$")]


REPLIES: dict[str, tuple[type[Body], ...]] = {
    Proposal.action: (Enrolment,),
    AdvertiseRequest.action: (Advertised,),
    ShareRequest.action: (Dealt,),
    TrainRequest.action: (Update, Complained),
    EvaluateRequest.action: (ReleasedStatistics, Complained),
    AgreeRequest.action: (Agreed,),
    UnmaskRequest.action: (Unmasked,),
    StudyEnd.action: (PrivacyStatement,),
}

BodyType = TypeVar("BodyType", bound=Body)


def encode(body: Body, vector: Vector | Lanes | ArrayRecord | None = None) -> RecordDict:
    """Put a message into Flower's records; a vector may be one already, and is not copied then."""
    if (body.vector is not None) != (vector is not None):
        raise ProtocolError(f"{type(body).__name__} and its vector do not belong together")
    records = RecordDict()
    records[_BODY] = ConfigRecord({"type": type(body).__name__, "json": body.model_dump_json()})
    if body.vector is not None and vector is not None:
        records[_VECTOR] = vector if isinstance(vector, ArrayRecord) else _array_record(vector, body.vector)
    return records


def _array_record(vector: Vector | Lanes, dtype: str) -> ArrayRecord:
    data = np.ascontiguousarray(vector, dtype=dtype).tobytes()
    return ArrayRecord({_VECTOR: Array(dtype=dtype, shape=(len(vector),), stype="raw", data=data)})


def decode(records: RecordDict, expected: type[BodyType]) -> tuple[BodyType, Vector | Lanes | None]:
    """Take a message out of Flower's records, checking everything before it is used.

    Raises:
        UnsupportedMessageError: It is of another version of the wire.
        ProtocolError: A record is missing, extra, too large, of another type, or does not validate; or the vector's
            declared shape, dtype and bytes disagree, or it holds NaN or infinity.
    """
    wanted = {_BODY, _VECTOR} if expected.vector else {_BODY}
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
        refuse_version(error, expected.__name__, UnsupportedMessageError)
        raise ProtocolError(f"{expected.__name__} is malformed: {explain(error)}", hint=_PEER_HINT) from None
    return body, _decode_vector(records, expected.vector) if expected.vector else None


def body_text(message: Message) -> object:
    """What a message holds where its JSON body should be; unchecked, and None where there is nothing."""
    config = message.content.config_records.get(_BODY) if message.has_content() else None
    return config.get("json") if config else None


_PEER_HINT = "The peer runs another version, or is hostile; its message was dropped."


def _decode_vector(records: RecordDict, dtype: str) -> Vector | Lanes:
    arrays = records.array_records.get(_VECTOR)
    if arrays is None or set(arrays) != {_VECTOR}:
        raise ProtocolError("the vector of a message is missing", hint=_PEER_HINT)
    array = arrays[_VECTOR]
    if array.dtype != dtype or array.stype != "raw" or len(array.shape) != 1:
        raise ProtocolError("a vector has the wrong dtype or shape", hint=_PEER_HINT)
    if len(array.data) != array.shape[0] * np.dtype(dtype).itemsize:
        raise ProtocolError("a vector's length and its bytes disagree", hint=_PEER_HINT)
    vector: Vector | Lanes = np.frombuffer(array.data, dtype=dtype)
    if not np.isfinite(vector).all():
        raise ProtocolError("a vector holds NaN or infinity", hint="The sender's training diverged, or it is hostile.")
    return vector


def request(
    body: Body, vector: Vector | Lanes | ArrayRecord | None, *, node_id: int, group_id: str, ttl_s: float
) -> Message:
    """Wrap a coordinator's request into a Flower message to one node."""
    return Message(encode(body, vector), dst_node_id=node_id, message_type=body.action, group_id=group_id, ttl=ttl_s)


def request_all(requests: Mapping[int, tuple[Body, Vector | None]], *, group_id: str, ttl_s: float) -> list[Message]:
    """Wrap requests to several nodes, by node id. Those that bring the same vector share one copy of it."""
    records: dict[int, ArrayRecord] = {}
    messages = []
    for node_id, (body, vector) in requests.items():
        if vector is not None and body.vector is not None and id(vector) not in records:
            records[id(vector)] = _array_record(vector, body.vector)
        shared = None if vector is None else records[id(vector)]
        messages.append(request(body, shared, node_id=node_id, group_id=group_id, ttl_s=ttl_s))
    return messages


def reply(body: Body, vector: Vector | Lanes | None, to: Message) -> Message:
    """Wrap a hospital's answer into a Flower message."""
    return Message(encode(body, vector), reply_to=to)


def refusal_of(error: Exception) -> Refusal:
    """What answers no. Only the error's code crosses the wire, never its text: a text can hold a patient's values."""
    return Refusal(code=error.code if isinstance(error, FederationError) else FederationError.code)


def read_reply(message: Message) -> tuple[Body, Vector | Lanes | None]:
    """Take a hospital's answer: what the request's type allows, or a ``Refusal``.

    Raises:
        ProtocolError: It is neither; or Flower reports that the node failed.
    """
    if message.has_error():
        raise ProtocolError(f"no reply came back (Flower code {message.error.code})", hint="See the hospital's log.")
    records = message.content
    said = records.config_records.get(_BODY, ConfigRecord()).get("type")
    if said == Refusal.__name__:
        return decode(records, Refusal)
    allowed = REPLIES.get(message.metadata.message_type)
    if allowed is None:
        raise ProtocolError("a reply of an unknown kind", hint=_PEER_HINT)
    return decode(records, next((kind for kind in allowed if kind.__name__ == said), allowed[0]))


def let_go(message: Message) -> None:
    """Drop a message's arrays once they have been read; a vector that was taken out of it stays.

    Flower's records refer to themselves, so that without this every vector would stay in memory until Python's garbage
    collector happens to look: with a hundred hospitals dozens of models at once.
    """
    if message.has_content():
        for arrays in message.content.array_records.values():
            arrays.clear()


def not_admitted(to: Message) -> Message:
    """Flower's own error reply, with a fixed text, for a message that no hospital code will look at."""
    return Message(Error(code=403, reason="not admitted"), reply_to=to)
