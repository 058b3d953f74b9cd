from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SettleRequest(_message.Message):
    __slots__ = ("zero_free_memory",)
    ZERO_FREE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    zero_free_memory: bool
    def __init__(self, zero_free_memory: _Optional[bool] = ...) -> None: ...

class SettleResponse(_message.Message):
    __slots__ = ("zeroed_bytes",)
    ZEROED_BYTES_FIELD_NUMBER: _ClassVar[int]
    zeroed_bytes: int
    def __init__(self, zeroed_bytes: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Span(_message.Message):
    __slots__ = ("name", "start_ns", "duration_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_ns: int
    duration_ns: int
    def __init__(self, name: _Optional[str] = ..., start_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("spans",)
    SPANS_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class RenameRequest(_message.Message):
    __slots__ = ("sandbox_id", "hostname")
    SANDBOX_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    sandbox_id: str
    hostname: str
    def __init__(self, sandbox_id: _Optional[str] = ..., hostname: _Optional[str] = ...) -> None: ...

class RenameResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("connection_id", "address", "port")
    CONNECTION_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    connection_id: int
    address: bytes
    port: int
    def __init__(self, connection_id: _Optional[int] = ..., address: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReceiveRequest(_message.Message):
    __slots__ = ("connection_id", "len")
    CONNECTION_ID_FIELD_NUMBER: _ClassVar[int]
    LEN_FIELD_NUMBER: _ClassVar[int]
    connection_id: int
    len: int
    def __init__(self, connection_id: _Optional[int] = ..., len: _Optional[int] = ...) -> None: ...

class ReceiveResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("connection_id", "data")
    CONNECTION_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    connection_id: int
    data: bytes
    def __init__(self, connection_id: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class SendResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DisconnectRequest(_message.Message):
    __slots__ = ("connection_id", "reset")
    CONNECTION_ID_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    connection_id: int
    reset: bool
    def __init__(self, connection_id: _Optional[int] = ..., reset: _Optional[bool] = ...) -> None: ...

class DisconnectResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProcessesRequest(_message.Message):
    __slots__ = ("container_id",)
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    def __init__(self, container_id: _Optional[str] = ...) -> None: ...

class ContainerProcess(_message.Message):
    __slots__ = ("pid", "exec_id")
    PID_FIELD_NUMBER: _ClassVar[int]
    EXEC_ID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    exec_id: str
    def __init__(self, pid: _Optional[int] = ..., exec_id: _Optional[str] = ...) -> None: ...

class ProcessesResponse(_message.Message):
    __slots__ = ("processes",)
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    processes: _containers.RepeatedCompositeFieldContainer[ContainerProcess]
    def __init__(self, processes: _Optional[_Iterable[_Union[ContainerProcess, _Mapping]]] = ...) -> None: ...

class ClockRequest(_message.Message):
    __slots__ = ("step_ns", "slew_ns", "other_source")
    STEP_NS_FIELD_NUMBER: _ClassVar[int]
    SLEW_NS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SOURCE_FIELD_NUMBER: _ClassVar[int]
    step_ns: int
    slew_ns: int
    other_source: bool
    def __init__(self, step_ns: _Optional[int] = ..., slew_ns: _Optional[int] = ..., other_source: _Optional[bool] = ...) -> None: ...

class ClockResponse(_message.Message):
    __slots__ = ("time_ns",)
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    time_ns: int
    def __init__(self, time_ns: _Optional[int] = ...) -> None: ...

class LetGoRequest(_message.Message):
    __slots__ = ("disk", "hardware_address")
    DISK_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    disk: str
    hardware_address: str
    def __init__(self, disk: _Optional[str] = ..., hardware_address: _Optional[str] = ...) -> None: ...

class LetGoResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TakeNamesRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: bytes
    def __init__(self, address: _Optional[bytes] = ...) -> None: ...

class TakeNamesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NextQueryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NextQueryResponse(_message.Message):
    __slots__ = ("query_id", "message", "stream")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    message: bytes
    stream: bool
    def __init__(self, query_id: _Optional[int] = ..., message: _Optional[bytes] = ..., stream: _Optional[bool] = ...) -> None: ...

class AnswerQueryRequest(_message.Message):
    __slots__ = ("query_id", "message")
    QUERY_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    query_id: int
    message: bytes
    def __init__(self, query_id: _Optional[int] = ..., message: _Optional[bytes] = ...) -> None: ...

class AnswerQueryResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
