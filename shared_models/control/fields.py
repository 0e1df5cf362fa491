"""Messages of the control service as dictionaries."""

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct


def to_dict(message: Message) -> dict[str, Any]:
    """A message's fields by their names, numbers as numbers; an optional field that is absent is left out."""
    if isinstance(message, Struct):
        return {key: _whole(value) for key, value in MessageToDict(message).items()}
    return {
        field.name: _value(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _whole(value: Any) -> Any:
    """The same, with whole numbers as such: a ``Struct`` knows only one kind of number."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))  # a map has no order of its own
    if field.message_type is not None:
        return [to_dict(item) for item in value] if field.is_repeated else to_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return list(value) if field.is_repeated else value
