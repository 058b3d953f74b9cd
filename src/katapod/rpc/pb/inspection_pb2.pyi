from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InspectRequest(_message.Message):
    __slots__ = ("entries_max", "text_max")
    ENTRIES_MAX_FIELD_NUMBER: _ClassVar[int]
    TEXT_MAX_FIELD_NUMBER: _ClassVar[int]
    entries_max: int
    text_max: int
    def __init__(self, entries_max: _Optional[int] = ..., text_max: _Optional[int] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("kernel", "kernel_build", "kernel_parameters", "agent", "init", "hostname", "uptime_s", "cpus", "memory_total", "memory_free", "memory_available", "modules", "mounts", "processes", "units", "links", "routes", "cut")
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    KERNEL_BUILD_FIELD_NUMBER: _ClassVar[int]
    KERNEL_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    INIT_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    MOUNTS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    kernel: str
    kernel_build: str
    kernel_parameters: str
    agent: str
    init: str
    hostname: str
    uptime_s: float
    cpus: int
    memory_total: int
    memory_free: int
    memory_available: int
    modules: _containers.RepeatedCompositeFieldContainer[GuestModule]
    mounts: _containers.RepeatedCompositeFieldContainer[GuestMount]
    processes: _containers.RepeatedCompositeFieldContainer[GuestProcess]
    units: _containers.RepeatedCompositeFieldContainer[GuestUnit]
    links: _containers.RepeatedCompositeFieldContainer[GuestLink]
    routes: _containers.RepeatedCompositeFieldContainer[GuestRoute]
    cut: bool
    def __init__(self, kernel: _Optional[str] = ..., kernel_build: _Optional[str] = ..., kernel_parameters: _Optional[str] = ..., agent: _Optional[str] = ..., init: _Optional[str] = ..., hostname: _Optional[str] = ..., uptime_s: _Optional[float] = ..., cpus: _Optional[int] = ..., memory_total: _Optional[int] = ..., memory_free: _Optional[int] = ..., memory_available: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[GuestModule, _Mapping]]] = ..., mounts: _Optional[_Iterable[_Union[GuestMount, _Mapping]]] = ..., processes: _Optional[_Iterable[_Union[GuestProcess, _Mapping]]] = ..., units: _Optional[_Iterable[_Union[GuestUnit, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[GuestLink, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[GuestRoute, _Mapping]]] = ..., cut: _Optional[bool] = ...) -> None: ...

class GuestModule(_message.Message):
    __slots__ = ("name", "size", "used")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    used: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., used: _Optional[int] = ...) -> None: ...

class GuestMount(_message.Message):
    __slots__ = ("source", "target", "fstype", "options")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    FSTYPE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    fstype: str
    options: str
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ..., fstype: _Optional[str] = ..., options: _Optional[str] = ...) -> None: ...

class GuestProcess(_message.Message):
    __slots__ = ("pid", "parent", "command", "state", "rss", "container")
    PID_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RSS_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    pid: int
    parent: int
    command: str
    state: str
    rss: int
    container: str
    def __init__(self, pid: _Optional[int] = ..., parent: _Optional[int] = ..., command: _Optional[str] = ..., state: _Optional[str] = ..., rss: _Optional[int] = ..., container: _Optional[str] = ...) -> None: ...

class GuestUnit(_message.Message):
    __slots__ = ("name", "load", "active", "sub", "what")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    SUB_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    load: str
    active: str
    sub: str
    what: str
    def __init__(self, name: _Optional[str] = ..., load: _Optional[str] = ..., active: _Optional[str] = ..., sub: _Optional[str] = ..., what: _Optional[str] = ...) -> None: ...

class GuestLink(_message.Message):
    __slots__ = ("name", "mac", "mtu", "up", "addresses", "rx_bytes", "rx_packets", "tx_bytes", "tx_packets", "rx_dropped", "tx_dropped")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    RX_BYTES_FIELD_NUMBER: _ClassVar[int]
    RX_PACKETS_FIELD_NUMBER: _ClassVar[int]
    TX_BYTES_FIELD_NUMBER: _ClassVar[int]
    TX_PACKETS_FIELD_NUMBER: _ClassVar[int]
    RX_DROPPED_FIELD_NUMBER: _ClassVar[int]
    TX_DROPPED_FIELD_NUMBER: _ClassVar[int]
    name: str
    mac: str
    mtu: int
    up: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int
    rx_dropped: int
    tx_dropped: int
    def __init__(self, name: _Optional[str] = ..., mac: _Optional[str] = ..., mtu: _Optional[int] = ..., up: _Optional[bool] = ..., addresses: _Optional[_Iterable[str]] = ..., rx_bytes: _Optional[int] = ..., rx_packets: _Optional[int] = ..., tx_bytes: _Optional[int] = ..., tx_packets: _Optional[int] = ..., rx_dropped: _Optional[int] = ..., tx_dropped: _Optional[int] = ...) -> None: ...

class GuestRoute(_message.Message):
    __slots__ = ("destination", "gateway", "device", "source")
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    destination: str
    gateway: str
    device: str
    source: str
    def __init__(self, destination: _Optional[str] = ..., gateway: _Optional[str] = ..., device: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...
