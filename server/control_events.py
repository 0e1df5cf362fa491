"""What a watcher hears: a journal's event to a typed message and back, and what of it a hospital may hear."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from shared_models.control import control_pb2 as pb
from shared_models.control.fields import to_dict

# The message of each kind of event; a kind that is not here, or has another field, travels as ``other``.
_FACTS: Mapping[str, str] = MappingProxyType(
    {
        "state": "state",
        "started": "started",
        "resumed": "started",
        "enrolled": "hospital",
        "pending": "hospital",
        "refused": "hospital",
        "left-out": "hospital",
        "set-aside": "hospital",
        "round": "round",
        "sum": "sum",
        "aborted": "attempt",
        "attempt-failed": "attempt",
        "waiting": "reason",
        "paused": "reason",
        "interrupted": "reason",
        "failed": "reason",
        "stopped": "reason",
        "quorum": "quorum",
    }
)

# What a hospital hears of a study that it is part of; what is not here it does not hear.
_OF_THE_STUDY = frozenset(
    {
        *("time", "event", "study", "plan_digest", "rounds", "rounds_done", "parameters", "state", "queue"),
        *("round", "attempt", "purpose", "opened", "threshold", "charged", "bytes_up", "stages", "stage", "seconds"),
        *("metrics_released", "metrics"),
    }
)
_OF_HOSPITALS = frozenset({"epsilon_filter", "dropped", "answered", "missing", "hospitals"})
_OF_ONE = frozenset({"hospital", "public_size", "same_software", "code", "reason"})


def to_message(study: str, position: int, event: Mapping[str, Any]) -> pb.Event:
    """A journal's event as it travels; nothing that it says is lost."""
    kind = str(event["event"])
    facts = {key: value for key, value in event.items() if key not in {"time", "event"}}
    message = pb.Event(study=study, position=position, time=str(event["time"]), kind=kind)
    part = _FACTS.get(kind, "other")
    try:
        getattr(message, part).SetInParent()
        ParseDict(facts, getattr(message, part))
    except ParseError:
        message.other.Clear()
        message.other.SetInParent()
        ParseDict(facts, message.other)
    return message


def from_message(message: pb.Event) -> dict[str, Any]:
    """The event as the journal has it, with ``study`` and ``position``. What was None is absent or empty."""
    part = message.WhichOneof("facts")
    facts = to_dict(getattr(message, part)) if part else {}
    return {"time": message.time, "event": message.kind, "study": message.study, **facts, "position": message.position}


def for_hospital(event: Mapping[str, Any], hospital: str) -> dict[str, Any] | None:
    """What a hospital may hear of an event: nothing of another hospital's; None if that is nothing at all."""
    if event.get("hospital", hospital) != hospital:
        return None
    own = _OF_THE_STUDY | (_OF_ONE if "hospital" in event else frozenset())
    heard = {key: value for key, value in event.items() if key in own}
    for key in _OF_HOSPITALS & event.keys():
        value = event[key]
        if isinstance(value, Mapping):
            heard[key] = {name: value[name] for name in value if name == hospital}
        elif isinstance(value, list):
            heard[key] = [name for name in value if name == hospital]
    return heard
