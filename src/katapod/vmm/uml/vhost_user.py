"""vhost-user: how a VMM hands the rings of a virtio device to another process, over a unix socket. Messages only.

A message is a header of request, flags and size, a payload, and descriptors beside it. What comes from the front end,
the VMM, is hostile: a payload has at most PAYLOAD_MAX bytes, a message at most DESCRIPTORS_MAX descriptors, and each
kind of payload its one shape. Source: QEMU's docs/interop/vhost-user, Linux' arch/um/drivers/vhost_user.h.

KatapodError
`-- VhostUserFailed    a guest's kernel broke a rule of vhost-user or virtio, or its VMM has; the device has ended
"""

import array
import asyncio
import os
import socket
import struct
from enum import IntEnum
from types import TracebackType
from typing import Self

from msgspec import Struct

from katapod.model.errors import KatapodError

__all__ = [
    "CONFIG_MAX",
    "DESCRIPTORS_MAX",
    "HEADER",
    "NEED_REPLY",
    "PAYLOAD_MAX",
    "PROTOCOL_FEATURES",
    "PROTOCOL_OFFERED",
    "REPLY",
    "REPLY_ACK",
    "VERSION",
    "ConfigSpace",
    "Connection",
    "Frame",
    "Region",
    "Request",
    "RingAddresses",
    "RingState",
    "VhostUserFailed",
    "parse_integer",
    "parse_memory_table",
    "parse_ring_descriptor",
    "render_memory_table",
]

HEADER = struct.Struct("<III")
PAYLOAD_MAX = 512
DESCRIPTORS_MAX = 8
CONFIG_MAX = 256
VERSION, VERSION_MASK, REPLY, NEED_REPLY = 1, 3, 4, 8
PROTOCOL_FEATURES = 1 << 30  # of the features: there are protocol features
PROTOCOL_OFFERED = 1 << 9 | 1 << 5
"""The protocol features that our devices have: their configuration is read by messages, and the front end gets a socket
for requests of ours. We have none, but Linux 6.1 to 6.12 allocate a device's interrupt together with that socket."""
REPLY_ACK = 1 << 3  # of the protocol features: what has no answer of its own is acknowledged if its flags ask for that

_INTEGER = struct.Struct("<Q")
_RING_STATE = struct.Struct("<II")
_RING_ADDRESSES = struct.Struct("<IIQQQQ")
_CONFIG = struct.Struct("<III")
_TABLE = struct.Struct("<II")
_REGION = struct.Struct("<QQQQ")
_RING_INDEX, _NO_DESCRIPTOR = 0xFF, 1 << 8


class VhostUserFailed(KatapodError):
    pass


class Request(IntEnum):
    """Those that a front end may send us."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25


class Frame:
    """One message. It owns its descriptors until they are taken; leaving its block closes the others."""

    def __init__(self, request: int, flags: int, payload: bytes, descriptors: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.descriptors = descriptors

    def take_descriptors(self) -> list[int]:
        """The caller closes them."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self.take_descriptors():
            os.close(fd)


class Region(Struct, frozen=True):
    """A piece of the guest's memory. Rings are given by the front end's own addresses, buffers by the guest's."""

    guest_address: int
    size: int  # bytes
    user_address: int
    file_offset: int


class RingState(Struct, frozen=True):
    index: int
    value: int  # size, base or whether it is enabled

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(*_unpack(_RING_STATE, payload, "state of a ring"))


class RingAddresses(Struct, frozen=True):
    """User addresses of the three parts of a ring."""

    index: int
    descriptors: int
    used: int
    available: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        index, flags, descriptors, used, available, _ = _unpack(_RING_ADDRESSES, payload, "addresses of a ring")
        if flags:
            raise VhostUserFailed(f"cannot use ring {index}: its flags are {flags:#x}, and logging was not offered")
        return cls(index, descriptors, used, available)


class ConfigSpace(Struct, frozen=True):
    """A piece of a device's configuration that is asked for."""

    offset: int
    size: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        offset, size, _ = _CONFIG.unpack_from(payload.ljust(_CONFIG.size, b"\0"))
        if size > CONFIG_MAX or offset > CONFIG_MAX or len(payload) != _CONFIG.size + size:
            raise VhostUserFailed(f"cannot tell a configuration: {size} bytes at {offset}, asked in {len(payload)}")
        return cls(offset, size)

    def answer(self, config: bytes) -> bytes:
        """The payload with that piece of `config`; what lies behind its end is zero."""
        piece = config[self.offset : self.offset + self.size]
        return _CONFIG.pack(self.offset, self.size, 0) + piece.ljust(self.size, b"\0")


def parse_integer(payload: bytes) -> int:
    (value,) = _unpack(_INTEGER, payload, "integer")
    return value


def render_integer(value: int) -> bytes:
    return _INTEGER.pack(value)


def parse_ring_descriptor(frame: Frame) -> tuple[int, int | None]:
    """The ring's index, and its descriptor, which the caller closes; None: the ring is to do without."""
    value = parse_integer(frame.payload)
    index, bare = value & _RING_INDEX, bool(value & _NO_DESCRIPTOR)
    if value > _RING_INDEX | _NO_DESCRIPTOR or len(frame.descriptors) != (0 if bare else 1):
        raise VhostUserFailed(f"cannot use a ring's descriptor: {value:#x} with {len(frame.descriptors)} of them")
    return index, None if bare else frame.take_descriptors()[0]


def parse_memory_table(frame: Frame) -> tuple[Region, ...]:
    """One region for each of the frame's descriptors. Behind them there may be room for more, as Linux sends it."""
    count, _ = _TABLE.unpack_from(frame.payload.ljust(_TABLE.size, b"\0"))
    if not 0 < count <= DESCRIPTORS_MAX or len(frame.payload) < _TABLE.size + count * _REGION.size:
        raise VhostUserFailed(f"cannot use guest memory: {count} regions in {len(frame.payload)} bytes")
    if count != len(frame.descriptors):
        raise VhostUserFailed(f"cannot use guest memory: {count} regions, {len(frame.descriptors)} descriptors")
    regions = [Region(*_REGION.unpack_from(frame.payload, _TABLE.size + n * _REGION.size)) for n in range(count)]
    for region in regions:
        if (
            not region.size
            or max(region.guest_address, region.user_address, region.file_offset) + region.size > 1 << 63
        ):
            raise VhostUserFailed(f"cannot use guest memory: a region of {region.size:#x} bytes ends beyond all memory")
    return tuple(regions)


def render_memory_table(regions: tuple[Region, ...]) -> bytes:
    """As parse_memory_table reads it, without room for more."""
    return _TABLE.pack(len(regions), 0) + b"".join(
        _REGION.pack(each.guest_address, each.size, each.user_address, each.file_offset) for each in regions
    )


def _unpack(shape: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != shape.size:
        raise VhostUserFailed(f"cannot read the {what}: {len(payload)} bytes in place of {shape.size}")
    return shape.unpack(payload)


class Connection:
    """One end of a vhost-user socket, which it owns. `peer` names the other end in errors."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer

    async def receive(self) -> Frame | None:
        """The next message; None once the peer has hung up. Raises VhostUserFailed."""
        await asyncio.sleep(0)  # a peer that never stops sending must not keep others from their turn
        descriptors: list[int] = []
        try:
            header = await self._read(HEADER.size, descriptors)
            if not header:
                return None
            request, flags, size = HEADER.unpack(header)
            if size > PAYLOAD_MAX or flags & VERSION_MASK != VERSION:
                raise self._fault(f"request {request} has flags {flags:#x} and {size} bytes")
            payload = await self._read(size, descriptors)
            if len(payload) < size:
                raise self._fault("it hung up within a message")
            frame = Frame(request, flags, payload, descriptors)
            descriptors = []
            return frame
        except ConnectionResetError:  # it hung up with an answer of ours unread
            return None
        except OSError as exc:
            raise self._fault(exc.strerror or str(exc)) from exc
        finally:
            for fd in descriptors:
                os.close(fd)

    async def send(
        self, request: int, payload: bytes, *, flags: int = VERSION, descriptors: list[int] | None = None
    ) -> None:
        """The caller keeps `descriptors`. That the peer has hung up is seen by receive(). Raises VhostUserFailed."""
        data = HEADER.pack(request, flags, len(payload)) + payload
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            while data:
                try:
                    sent = self._sock.sendmsg([data], beside)
                except BlockingIOError:
                    await _ready(self._sock, writing=True)
                else:
                    data, beside = data[sent:], []
        except (BrokenPipeError, ConnectionResetError):
            return
        except OSError as exc:
            raise self._fault(exc.strerror or str(exc)) from exc

    async def reply(self, request: int, payload: bytes) -> None:
        await self.send(request, payload, flags=VERSION | REPLY)

    def close(self) -> None:
        self._sock.close()

    def _fault(self, cause: str) -> VhostUserFailed:
        return VhostUserFailed(f"cannot speak vhost-user with {self._peer}: {cause}")

    async def _read(self, size: int, descriptors: list[int]) -> bytes:
        """Exactly `size` bytes, nothing at the end of the stream, and `descriptors` that came with them."""
        data = b""
        while len(data) < size:
            try:
                piece, beside, flags, _ = self._sock.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _ready(self._sock, writing=False)
                continue
            for level, kind, content in beside:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(content[: len(content) // 4 * 4])
                    descriptors.extend(received)
            if flags & socket.MSG_CTRUNC or len(descriptors) > DESCRIPTORS_MAX:
                raise self._fault(f"a message has more than {DESCRIPTORS_MAX} descriptors")
            if not piece:
                if data:
                    raise self._fault("it hung up within a message")
                return b""
            data += piece
        return data


async def _ready(sock: socket.socket, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    (loop.add_writer if writing else loop.add_reader)(sock, tell)
    try:
        await ready
    finally:
        (loop.remove_writer if writing else loop.remove_reader)(sock)
