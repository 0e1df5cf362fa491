from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_PENDING: _ClassVar[State]
    STATE_QUEUED: _ClassVar[State]
    STATE_RUNNING: _ClassVar[State]
    STATE_PAUSED: _ClassVar[State]
    STATE_FINISHED: _ClassVar[State]
    STATE_FAILED: _ClassVar[State]
    STATE_STOPPED: _ClassVar[State]
STATE_UNSPECIFIED: State
STATE_PENDING: State
STATE_QUEUED: State
STATE_RUNNING: State
STATE_PAUSED: State
STATE_FINISHED: State
STATE_FAILED: State
STATE_STOPPED: State

class SubmitRequest(_message.Message):
    __slots__ = ("toml", "json")
    TOML_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    toml: str
    json: str
    def __init__(self, toml: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StudyRequest(_message.Message):
    __slots__ = ("study",)
    STUDY_FIELD_NUMBER: _ClassVar[int]
    study: str
    def __init__(self, study: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("study", "after")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    study: str
    after: int
    def __init__(self, study: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("study", "offset", "snapshot", "hospital", "name")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    study: str
    offset: int
    snapshot: str
    hospital: str
    name: str
    def __init__(self, study: _Optional[str] = ..., offset: _Optional[int] = ..., snapshot: _Optional[str] = ..., hospital: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class Deposited(_message.Message):
    __slots__ = ("sha256", "known")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    known: bool
    def __init__(self, sha256: _Optional[str] = ..., known: _Optional[bool] = ...) -> None: ...

class DepositsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DepositFile(_message.Message):
    __slots__ = ("hospital", "name", "size", "sha256", "changed_at")
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CHANGED_AT_FIELD_NUMBER: _ClassVar[int]
    hospital: str
    name: str
    size: int
    sha256: str
    changed_at: float
    def __init__(self, hospital: _Optional[str] = ..., name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ..., changed_at: _Optional[float] = ...) -> None: ...

class DepositList(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[DepositFile]
    def __init__(self, files: _Optional[_Iterable[_Union[DepositFile, _Mapping]]] = ...) -> None: ...

class CheckpointsRequest(_message.Message):
    __slots__ = ("after",)
    class AfterEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: _containers.ScalarMap[str, int]
    def __init__(self, after: _Optional[_Mapping[str, int]] = ...) -> None: ...

class CheckpointNews(_message.Message):
    __slots__ = ("hospital", "position", "checkpoint")
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    hospital: str
    position: int
    checkpoint: bytes
    def __init__(self, hospital: _Optional[str] = ..., position: _Optional[int] = ..., checkpoint: _Optional[bytes] = ...) -> None: ...

class Study(_message.Message):
    __slots__ = ("number", "name", "state", "wish", "reason", "rounds_done", "rounds", "position", "submitted_by", "submitted_at", "changed_at", "plan_digest", "task", "plan")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WISH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_BY_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_AT_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    number: int
    name: str
    state: State
    wish: str
    reason: str
    rounds_done: int
    rounds: int
    position: int
    submitted_by: str
    submitted_at: float
    changed_at: float
    plan_digest: str
    task: str
    plan: str
    def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., state: _Optional[_Union[State, str]] = ..., wish: _Optional[str] = ..., reason: _Optional[str] = ..., rounds_done: _Optional[int] = ..., rounds: _Optional[int] = ..., position: _Optional[int] = ..., submitted_by: _Optional[str] = ..., submitted_at: _Optional[float] = ..., changed_at: _Optional[float] = ..., plan_digest: _Optional[str] = ..., task: _Optional[str] = ..., plan: _Optional[str] = ...) -> None: ...

class Studies(_message.Message):
    __slots__ = ("studies",)
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    studies: _containers.RepeatedCompositeFieldContainer[Study]
    def __init__(self, studies: _Optional[_Iterable[_Union[Study, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("study", "position", "time", "kind", "state", "started", "hospital", "round", "sum", "attempt", "reason", "quorum", "other")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    study: str
    position: int
    time: str
    kind: str
    state: StateFacts
    started: StartedFacts
    hospital: HospitalFacts
    round: RoundFacts
    sum: SumFacts
    attempt: AttemptFacts
    reason: ReasonFacts
    quorum: QuorumFacts
    other: _struct_pb2.Struct
    def __init__(self, study: _Optional[str] = ..., position: _Optional[int] = ..., time: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[_Union[StateFacts, _Mapping]] = ..., started: _Optional[_Union[StartedFacts, _Mapping]] = ..., hospital: _Optional[_Union[HospitalFacts, _Mapping]] = ..., round: _Optional[_Union[RoundFacts, _Mapping]] = ..., sum: _Optional[_Union[SumFacts, _Mapping]] = ..., attempt: _Optional[_Union[AttemptFacts, _Mapping]] = ..., reason: _Optional[_Union[ReasonFacts, _Mapping]] = ..., quorum: _Optional[_Union[QuorumFacts, _Mapping]] = ..., other: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class StateFacts(_message.Message):
    __slots__ = ("state", "reason", "rounds_done", "rounds", "queue")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    state: str
    reason: str
    rounds_done: int
    rounds: int
    queue: int
    def __init__(self, state: _Optional[str] = ..., reason: _Optional[str] = ..., rounds_done: _Optional[int] = ..., rounds: _Optional[int] = ..., queue: _Optional[int] = ...) -> None: ...

class StartedFacts(_message.Message):
    __slots__ = ("study", "plan_digest", "rounds", "parameters", "rounds_done")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_DONE_FIELD_NUMBER: _ClassVar[int]
    study: str
    plan_digest: str
    rounds: int
    parameters: int
    rounds_done: int
    def __init__(self, study: _Optional[str] = ..., plan_digest: _Optional[str] = ..., rounds: _Optional[int] = ..., parameters: _Optional[int] = ..., rounds_done: _Optional[int] = ...) -> None: ...

class HospitalFacts(_message.Message):
    __slots__ = ("hospital", "public_size", "same_software", "code", "round", "stage", "reason")
    HOSPITAL_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAME_SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    hospital: str
    public_size: int
    same_software: bool
    code: str
    round: int
    stage: str
    reason: str
    def __init__(self, hospital: _Optional[str] = ..., public_size: _Optional[int] = ..., same_software: _Optional[bool] = ..., code: _Optional[str] = ..., round: _Optional[int] = ..., stage: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RoundFacts(_message.Message):
    __slots__ = ("round", "rounds", "answered", "missing", "epsilon_filter", "metrics_released", "stages", "seconds", "checkpoint")
    class EpsilonFilterEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricsReleasedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class StagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FILTER_FIELD_NUMBER: _ClassVar[int]
    METRICS_RELEASED_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    round: int
    rounds: int
    answered: _containers.RepeatedScalarFieldContainer[str]
    missing: _containers.RepeatedScalarFieldContainer[str]
    epsilon_filter: _containers.ScalarMap[str, float]
    metrics_released: _containers.ScalarMap[str, float]
    stages: _containers.ScalarMap[str, float]
    seconds: float
    checkpoint: str
    def __init__(self, round: _Optional[int] = ..., rounds: _Optional[int] = ..., answered: _Optional[_Iterable[str]] = ..., missing: _Optional[_Iterable[str]] = ..., epsilon_filter: _Optional[_Mapping[str, float]] = ..., metrics_released: _Optional[_Mapping[str, float]] = ..., stages: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class SumFacts(_message.Message):
    __slots__ = ("purpose", "round", "attempt", "opened", "answered", "threshold", "hospitals", "dropped", "at_fault", "bytes_up", "stages")
    class DroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class StagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    HOSPITALS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    AT_FAULT_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    purpose: str
    round: int
    attempt: int
    opened: bool
    answered: _containers.RepeatedScalarFieldContainer[str]
    threshold: int
    hospitals: int
    dropped: _containers.ScalarMap[str, int]
    at_fault: str
    bytes_up: int
    stages: _containers.ScalarMap[str, float]
    def __init__(self, purpose: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., opened: _Optional[bool] = ..., answered: _Optional[_Iterable[str]] = ..., threshold: _Optional[int] = ..., hospitals: _Optional[int] = ..., dropped: _Optional[_Mapping[str, int]] = ..., at_fault: _Optional[str] = ..., bytes_up: _Optional[int] = ..., stages: _Optional[_Mapping[str, float]] = ...) -> None: ...

class AttemptFacts(_message.Message):
    __slots__ = ("purpose", "round", "attempt", "charged", "reason", "answered")
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHARGED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    purpose: str
    round: int
    attempt: int
    charged: bool
    reason: str
    answered: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, purpose: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., charged: _Optional[bool] = ..., reason: _Optional[str] = ..., answered: _Optional[_Iterable[str]] = ...) -> None: ...

class ReasonFacts(_message.Message):
    __slots__ = ("reason", "error", "hint")
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    error: str
    hint: str
    def __init__(self, reason: _Optional[str] = ..., error: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class QuorumFacts(_message.Message):
    __slots__ = ("hospitals",)
    HOSPITALS_FIELD_NUMBER: _ClassVar[int]
    hospitals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hospitals: _Optional[_Iterable[str]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("header", "data", "footer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FOOTER_FIELD_NUMBER: _ClassVar[int]
    header: Header
    data: bytes
    footer: Footer
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., data: _Optional[bytes] = ..., footer: _Optional[_Union[Footer, _Mapping]] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("name", "size", "snapshot")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    snapshot: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., snapshot: _Optional[str] = ...) -> None: ...

class Footer(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "text", "hint")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    code: str
    text: str
    hint: str
    def __init__(self, code: _Optional[str] = ..., text: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...
