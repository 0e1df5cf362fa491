"""What a peer does wrong costs that peer its place, and nobody else anything."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message

from shared_models.errors import ProtocolError
from shared_models.messages import StudyEnd, Update, decode, encode
from tests.federation import Federation

BAD = "hospital-2"


def _array(reply: Message) -> Array:
    return reply.content.array_records["vector"]["vector"]


def _replace(reply: Message, values: np.ndarray, dtype: str = "<u4") -> Message:
    data = values.astype(dtype).tobytes()
    array = Array(dtype=dtype, shape=values.shape, stype="raw", data=data)
    reply.content["vector"] = ArrayRecord({"vector": array})
    return reply


def _values(reply: Message) -> np.ndarray:
    return np.frombuffer(_array(reply).data, dtype="<u4").copy()


def of_floats(reply: Message) -> Message:
    return _replace(reply, np.full(len(_values(reply)), np.nan, dtype=np.float32), "<f4")


def too_short(reply: Message) -> Message:
    return _replace(reply, _values(reply)[:-1])


def of_another_dtype(reply: Message) -> Message:
    return _replace(reply, _values(reply).astype(np.uint64), "<u8")


def of_another_shape(reply: Message) -> Message:
    return _replace(reply, _values(reply)[None, :])


def with_bytes_missing(reply: Message) -> Message:
    array = _array(reply)
    shorter = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data[:-4])
    reply.content["vector"] = ArrayRecord({"vector": shorter})
    return reply


def of_another_round(reply: Message) -> Message:
    body, vector = decode(reply.content, Update)
    reply.content = encode(body.model_copy(update={"round": 99}), vector)
    return reply


def with_a_forged_receipt(reply: Message) -> Message:
    body, vector = decode(reply.content, Update)
    receipt = body.receipt.model_copy(update={"epsilon_filter": 0.0})
    reply.content = encode(body.model_copy(update={"receipt": receipt}), vector)
    return reply


def with_an_unknown_key(reply: Message) -> Message:
    config = reply.content.config_records["konsil"]
    config["json"] = str(config["json"]).replace("{", '{"surprise": 1, ', 1)
    return reply


def with_no_body(reply: Message) -> Message:
    del reply.content["konsil"]
    return reply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (of_floats, "dtype or shape"),
        (too_short, "vector"),
        (of_another_dtype, "dtype or shape"),
        (of_another_shape, "dtype or shape"),
        (with_bytes_missing, "bytes disagree"),
        (of_another_round, "another round"),
        (with_a_forged_receipt, "signature"),
        (with_an_unknown_key, "surprise: unknown key"),
        (with_no_body, "other records"),
    ],
)
def test_it_is_left_out_and_the_round_goes_on(
    federation: Federation, spoil: Callable[[Message], Message], reason: str
) -> None:
    """The journal names the hospital and why; the other three are averaged; the model stays finite."""

    def tamper(hospital: str, reply: Message) -> Message:
        upload = reply.metadata.group_id == "1" and reply.metadata.message_type == Update.action
        return spoil(reply) if hospital == BAD and upload else reply

    federation.wire.tamper = tamper

    federation.run()

    (left_out,) = federation.events("left-out")
    assert left_out["hospital"] == BAD
    assert reason in left_out["reason"]
    assert federation.events("round")[0]["missing"] == [BAD]
    assert federation.events("round")[1]["missing"] == []


def test_a_vector_and_its_message_belong_together() -> None:
    """Our own side refuses to send a vector where none belongs: a mistake here must not look like a peer's."""
    body = StudyEnd(study="a-study", plan_digest="0" * 64)

    with pytest.raises(ProtocolError, match="do not belong together"):
        encode(body, np.zeros(3, dtype=np.float32))
