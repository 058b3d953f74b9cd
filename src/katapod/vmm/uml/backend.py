"""The vhost-user back end of a virtio device, whichever: what a front end sets up becomes queues, and kicks of them.

One front end, once: whoever connects first. A ring is active when it is enabled and has a descriptor for kicks; while
one is active nothing about it or the memory may change. Interrupts go over a socket, since User-mode Linux takes a
signal for input there, which an eventfd does not send.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from msgspec import Struct, field

from katapod.tasks import beside
from katapod.vmm.uml.edges import READABLE, Edges
from katapod.vmm.uml.vhost_user import (
    PROTOCOL_FEATURES,
    PROTOCOL_OFFERED,
    ConfigSpace,
    Connection,
    Frame,
    Request,
    RingAddresses,
    RingState,
    VhostUserFailed,
    parse_integer,
    parse_memory_table,
    parse_ring_descriptor,
    render_integer,
)
from katapod.vmm.uml.virtqueue import GuestMemory, Virtqueue

__all__ = ["VERSION_1", "Backend", "Device", "Queue", "serve_first"]

VERSION_1 = 1 << 32  # feature: not a legacy device
EVENTFD = "anon_inode:[eventfd]"
INTERRUPT = (1).to_bytes(8, "little")


class Queue:
    """An active queue: a Virtqueue, and how its driver is interrupted."""

    def __init__(self, virtqueue: Virtqueue, call: socket.socket | None) -> None:
        self.virtqueue = virtqueue
        self._call = call

    def give_back(self, chains: list[tuple[int, int]]) -> None:
        """Return chains, head and bytes written, and interrupt the driver if it wants that."""
        if chains and self.virtqueue.give_back(chains) and self._call is not None:
            with contextlib.suppress(OSError):  # it has gone, or so many are pending that it will look anyway
                self._call.send(INTERRUPT, socket.MSG_DONTWAIT)


class Device(Protocol):
    """What is behind the queues. Its methods raise VhostUserFailed for what a driver may not do."""

    features: int  # beside those of the transport; a driver has to take them all
    config: bytes
    queue_count: int

    def start(self, index: int, queue: Queue) -> None: ...
    def stop(self, index: int) -> None: ...
    def kicked(self, index: int) -> None: ...


class _Ring(Struct):
    """What the front end has said of a ring."""

    size: int = 0
    base: int = 0
    addresses: RingAddresses | None = None
    enabled: bool = False
    kick: int | None = None  # descriptors are ours
    call: socket.socket | None = None
    queue: Queue | None = field(default=None)  # while it is active


class Backend:
    """Serves `device` to one front end. `close` when done."""

    def __init__(self, device: Device, edges: Edges) -> None:
        self._device = device
        self._edges = edges
        self._offered = device.features | VERSION_1 | PROTOCOL_FEATURES
        self._memory: GuestMemory | None = None
        self._request_socket: int | None = None  # kept open: its end tells the guest's kernel that the device has gone
        self._rings = [_Ring() for _ in range(device.queue_count)]

    async def serve(self, connection: Connection) -> None:
        """Until the front end hangs up. Raises VhostUserFailed."""
        while (frame := await connection.receive()) is not None:
            with frame:
                answer = self._handle(frame)
                if answer is not None:
                    await connection.reply(frame.request, answer)

    def close(self) -> None:
        """Idempotent."""
        for index, ring in enumerate(self._rings):
            ring.enabled = False
            self._settle(index, ring)
            self._set_kick(ring, None)
            if ring.call is not None:
                ring.call.close()
                ring.call = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._request_socket is not None:
            os.close(self._request_socket)
            self._request_socket = None

    def _handle(self, frame: Frame) -> bytes | None:
        """Do what is asked; returns the payload of the answer, if the request has one."""
        match frame.request:
            case Request.GET_FEATURES:
                return render_integer(self._offered)
            case Request.GET_PROTOCOL_FEATURES:
                return render_integer(PROTOCOL_OFFERED)
            case Request.GET_CONFIG:
                return ConfigSpace.parse(frame.payload).answer(self._device.config)
            case Request.SET_OWNER | Request.SET_CONFIG:
                pass  # our devices' configuration is for the driver to read: what it writes concerns nobody
            case Request.SET_FEATURES:
                self._take_features(parse_integer(frame.payload))
            case Request.SET_PROTOCOL_FEATURES:
                if parse_integer(frame.payload) & ~PROTOCOL_OFFERED:
                    raise VhostUserFailed("cannot serve a device: the front end wants what was not offered")
            case Request.SET_MEM_TABLE:
                self._take_memory(frame)
            case Request.SET_BACKEND_REQ_FD:
                self._take_request_socket(frame)
            case _:
                self._set_ring(frame)
        return None

    def _take_features(self, features: int) -> None:
        needed = self._device.features | VERSION_1
        if features & ~self._offered or features & needed != needed:
            raise VhostUserFailed(f"cannot serve a device: of {self._offered:#x} the driver takes {features:#x}")

    def _take_memory(self, frame: Frame) -> None:
        if any(ring.queue for ring in self._rings):
            raise VhostUserFailed("cannot take other guest memory: rings are active")
        regions = parse_memory_table(frame)
        memory = GuestMemory(regions, frame.descriptors)
        if self._memory is not None:
            self._memory.close()
        self._memory = memory

    def _take_request_socket(self, frame: Frame) -> None:
        if len(frame.descriptors) != 1 or self._request_socket is not None:
            raise VhostUserFailed("cannot take a socket for requests: there is one, or none was sent")
        self._request_socket = frame.take_descriptors()[0]

    def _set_ring(self, frame: Frame) -> None:
        match frame.request:
            case Request.SET_VRING_CALL:
                index, fd = parse_ring_descriptor(frame)
                self._set_call(index, fd)
            case Request.SET_VRING_KICK:
                index, fd = parse_ring_descriptor(frame)
                self._take_kick(index, fd)
            case Request.SET_VRING_ENABLE:
                state = RingState.parse(frame.payload)
                self._ring(state.index, idle=False).enabled = bool(state.value)
                self._settle(state.index, self._rings[state.index])
            case Request.SET_VRING_NUM:
                state = RingState.parse(frame.payload)
                self._ring(state.index).size = state.value
            case Request.SET_VRING_BASE:
                state = RingState.parse(frame.payload)
                self._ring(state.index).base = state.value
            case Request.SET_VRING_ADDR:
                addresses = RingAddresses.parse(frame.payload)
                self._ring(addresses.index).addresses = addresses
            case _:
                raise VhostUserFailed(f"cannot serve a device: request {frame.request} is unknown")

    def _ring(self, index: int, *, idle: bool = True) -> _Ring:
        if index >= len(self._rings):
            raise VhostUserFailed(f"cannot set up ring {index}: the device has {len(self._rings)}")
        if idle and self._rings[index].queue is not None:
            raise VhostUserFailed(f"cannot set up ring {index}: it is active")
        return self._rings[index]

    def _set_call(self, index: int, fd: int | None) -> None:
        call = None
        if fd is not None:
            try:
                call = socket.socket(fileno=fd)
            except OSError as exc:
                os.close(fd)
                raise VhostUserFailed(f"cannot interrupt the guest: {exc.strerror}") from exc
        if call is not None and (call.family, call.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            call.close()
            raise VhostUserFailed("cannot interrupt the guest: its descriptor is no stream socket")
        try:
            ring = self._ring(index)
        except VhostUserFailed:
            if call is not None:
                call.close()
            raise
        if ring.call is not None:
            ring.call.close()
        ring.call = call

    def _take_kick(self, index: int, fd: int | None) -> None:
        if fd is None or os.readlink(f"/proc/self/fd/{fd}") != EVENTFD:
            if fd is not None:
                os.close(fd)
            raise VhostUserFailed("cannot be kicked by the guest: its descriptor is no eventfd")
        try:
            ring = self._ring(index)
        except VhostUserFailed:
            os.close(fd)
            raise
        self._set_kick(ring, fd)
        self._settle(index, ring)

    def _set_kick(self, ring: _Ring, fd: int | None) -> None:
        if ring.kick is not None:
            os.close(ring.kick)
        ring.kick = fd

    def _settle(self, index: int, ring: _Ring) -> None:
        """Have the ring active if, and only if, it should be."""
        if ring.enabled and ring.kick is not None and ring.queue is None:
            if self._memory is None or ring.addresses is None:
                raise VhostUserFailed(f"cannot use ring {index}: its memory or its addresses are missing")
            virtqueue = Virtqueue(self._memory, ring.size, ring.addresses, ring.base)
            ring.queue = Queue(virtqueue, ring.call)
            self._device.start(index, ring.queue)
            self._edges.watch(ring.kick, lambda events: self._device.kicked(index) if events & READABLE else None)
        elif not ring.enabled and ring.queue is not None and ring.kick is not None:
            self._edges.forget(ring.kick)
            ring.base, ring.queue = ring.queue.virtqueue.returned, None
            self._device.stop(index)


async def serve_first(
    listener: socket.socket,
    serve: Callable[[Connection], Coroutine[Any, Any, None]],
    ended: asyncio.Event,
    name: str,
) -> None:
    """Have `serve` serve the first who connects, until it returns or the device has `ended`. Raises as it does, and
    OSError."""
    front_end, _ = await asyncio.get_running_loop().sock_accept(listener)
    listener.close()  # a guest's kernel has each of its devices once
    connection = Connection(front_end, "the guest's kernel")
    with contextlib.closing(connection):
        async with (
            beside(serve(connection), name=f"{name}-control") as control,
            beside(ended.wait(), name=f"{name}-end") as end,
        ):
            await asyncio.wait({control, end}, return_when=asyncio.FIRST_COMPLETED)
            if control.done():
                control.result()
