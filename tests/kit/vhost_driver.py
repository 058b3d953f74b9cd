"""The other end of a vhost-user back end: a front end with memory of its own, and real rings in it.

`FrontEnd` speaks the messages, `DriverQueue` is one split virtqueue, `GuestConsole` a driver of a virtio console that
does what Linux' does. Addresses of the guest, of the front end and offsets in the file all differ, so none is taken for
another.
"""

import array
import asyncio
import contextlib
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

__all__ = [
    "GUEST",
    "INDIRECT",
    "MESSAGE",
    "OFFSET",
    "PORT_OPEN",
    "PORT_READY",
    "REGION",
    "SIZE",
    "USER",
    "WRITE",
    "DriverQueue",
    "FrontEnd",
    "GuestConsole",
    "guest_console",
]

MESSAGE = struct.Struct("<III")
REGION = struct.Struct("<QQQQ")
GUEST, USER, OFFSET, SIZE = 0x10_0000, 0x7F00_0000, 0x2000, 8 << 20
NEXT, WRITE, INDIRECT = 1, 2, 4
LIMIT_S = 180.0
BUFFER = 4096  # of Linux' driver, towards the guest
CONTROL = struct.Struct("<IHH")
DEVICE_READY, PORT_ADD, PORT_READY, PORT_OPEN, PORT_NAME = 0, 1, 3, 6, 7


class FrontEnd:
    """`memory` is the guest's, from its guest address GUEST on. `close` when done."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.file = os.memfd_create("guest-memory")
        os.truncate(self.file, OFFSET + SIZE)
        self.memory = memoryview(mmap.mmap(self.file, OFFSET + SIZE))[OFFSET:]
        self.queues: list[DriverQueue] = []
        self.requests, self._requests_far = socket.socketpair()
        self._free = 0

    @classmethod
    async def connect(cls, path: Path) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def close(self) -> None:
        self.hang_up()
        for queue in self.queues:
            queue.close()
        self.requests.close()
        self._requests_far.close()
        os.close(self.file)

    def hang_up(self) -> None:
        self.sock.close()

    def allocate(self, size: int) -> int:
        """Offset in the memory, aligned to 4096."""
        offset, self._free = self._free, self._free + -(-size // 4096) * 4096
        assert self._free <= SIZE
        return offset

    def send(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = (), *, flags: int = 1) -> None:
        self.send_raw(MESSAGE.pack(request, flags, len(payload)) + payload, descriptors)

    def send_raw(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        assert self.sock.sendmsg([data], beside) == len(data)

    async def ask(self, request: int, payload: bytes = b"", *, flags: int = 1) -> bytes:
        """The payload of the answer."""
        self.send(request, payload, flags=flags)
        answered, flags, size = MESSAGE.unpack(await self._receive(MESSAGE.size))
        assert (answered, flags) == (request, 5)
        return await self._receive(size)

    async def _receive(self, size: int) -> bytes:
        data = b""
        async with asyncio.timeout(LIMIT_S):
            while len(data) < size:
                piece = await asyncio.get_running_loop().sock_recv(self.sock, size - len(data))
                if not piece:
                    raise EOFError
                data += piece
        return data

    async def hung_up_on(self) -> bool:
        """Wait until the back end has hung up."""
        try:
            await self._receive(1)
        except (EOFError, ConnectionResetError):
            return True
        return False

    async def negotiate(self, features: int) -> None:
        """As Linux' virtio_uml does."""
        self.send(3)
        (offered,) = struct.unpack("<Q", await self.ask(1))
        assert offered & features == features
        (protocol,) = struct.unpack("<Q", await self.ask(15))
        assert protocol & ~(1 << 3) == 1 << 9 | 1 << 5
        self.send(16, struct.pack("<Q", protocol))
        self.send(21, descriptors=[self._requests_far.fileno()])
        self._requests_far.close()
        self.send(2, struct.pack("<Q", features | 1 << 30))

    def send_memory(self, *, room_for_two: bool = True) -> None:
        table = struct.pack("<II", 1, 0) + REGION.pack(GUEST, SIZE, USER, OFFSET)
        self.send(5, table + bytes(32 if room_for_two else 0), [self.file])

    def add_queue(self, size: int = 256) -> "DriverQueue":
        """Set the next queue up, not enabled."""
        queue = DriverQueue(self, len(self.queues), size)
        self.queues.append(queue)
        queue.describe()
        return queue

    def enable(self, queue: "DriverQueue", *, on: bool = True) -> None:
        self.send(18, struct.pack("<II", queue.index, on))


class DriverQueue:
    """A split virtqueue. Each buffer is one descriptor, but for `offer_chain`."""

    def __init__(self, front_end: FrontEnd, index: int, size: int) -> None:
        self.front_end, self.index, self.size = front_end, index, size
        self.table = front_end.allocate(16 * size)
        self.available = front_end.allocate(6 + 2 * size)
        self.used = front_end.allocate(6 + 8 * size)
        self.offered = self.seen = 0
        self.free = list(range(size))
        self.chains: dict[int, list[tuple[int, int]]] = {}  # head -> offset and length of its buffers
        self._indices: dict[int, list[int]] = {}  # head -> its descriptors
        self.kick_fd = os.eventfd(0, 0)
        self.call, self.call_far = socket.socketpair()
        self.call.setblocking(False)

    def close(self) -> None:
        os.close(self.kick_fd)
        self.call.close()
        self.call_far.close()

    def describe(self) -> None:
        """Send all of it but the kick."""
        send, at = self.front_end.send, struct.Struct("<II")
        send(13, struct.pack("<Q", self.index), [self.call_far.fileno()])
        send(8, at.pack(self.index, self.size))
        send(10, at.pack(self.index, self.offered))
        parts = (USER + self.table, USER + self.used, USER + self.available, 2**64 - 1)
        send(9, struct.pack("<IIQQQQ", self.index, 0, *parts))

    def send_kick(self) -> None:
        self.front_end.send(12, struct.pack("<Q", self.index), [self.kick_fd])

    def set_descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.front_end.memory, self.table + 16 * index, address, length, flags, following)

    def set_available(self, head: int) -> None:
        struct.pack_into("<H", self.front_end.memory, self.available + 4 + 2 * (self.offered % self.size), head)
        self.offered = (self.offered + 1) & 0xFFFF
        self.set_index(self.offered)

    def set_index(self, index: int) -> None:
        struct.pack_into("<H", self.front_end.memory, self.available + 2, index)

    def set_flags(self, flags: int) -> None:
        struct.pack_into("<H", self.front_end.memory, self.available, flags)

    def offer_chain(self, buffers: Sequence[tuple[int, int]], *, writable: bool) -> int:
        """Offset and length of each buffer; returns the head."""
        indices = [self.free.pop() for _ in buffers]
        for place, ((offset, length), index) in enumerate(zip(buffers, indices, strict=True)):
            last = place == len(buffers) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.set_descriptor(index, GUEST + offset, length, flags, 0 if last else indices[place + 1])
        self.chains[indices[0]] = list(buffers)
        self._indices[indices[0]] = indices
        self.set_available(indices[0])
        return indices[0]

    def kick(self) -> None:
        """Tell the device of what is offered, if it wants that."""
        (flags,) = struct.unpack_from("<H", self.front_end.memory, self.used)
        if not flags & 1:
            os.eventfd_write(self.kick_fd, 1)

    def take_used(self) -> list[tuple[list[tuple[int, int]], int]]:
        """Buffers that were given back, and the bytes written to them."""
        (index,) = struct.unpack_from("<H", self.front_end.memory, self.used + 2)
        found = []
        while self.seen != index:
            at = self.used + 4 + 8 * (self.seen % self.size)
            head, written = struct.unpack_from("<II", self.front_end.memory, at)
            found.append((self.chains.pop(head), written))
            self.free.extend(self._indices.pop(head))
            self.seen = (self.seen + 1) & 0xFFFF
        return found

    async def wait_used(self) -> list[tuple[list[tuple[int, int]], int]]:
        """The same, at least one: waits for interrupts."""
        async with asyncio.timeout(LIMIT_S):
            while not (found := self.take_used()):
                await self.interrupted()
        return found

    async def interrupted(self) -> None:
        await asyncio.get_running_loop().sock_recv(self.call, 4096)

    def was_interrupted(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(self.call.recv(4096))
        return False


class _GuestPort:
    def __init__(self, incoming: DriverQueue, outgoing: DriverQueue) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.name = ""
        self.added = self.host_is_here = False
        self.told: list[bool] = []  # all that was said of the host


class GuestConsole:
    """A driver of a virtio console, with the reader and writer of each port's device node."""

    def __init__(self, front_end: FrontEnd, ports: int) -> None:
        self.front_end = front_end
        queues = [front_end.add_queue() for _ in range(2 * ports + 2)]
        self.control_in, self.control_out = queues[2], queues[3]
        numbers = [0, *range(4, len(queues), 2)]
        self.ports = [_GuestPort(queues[n], queues[n + 1]) for n in numbers]
        for queue in queues:
            queue.send_kick()
            front_end.enable(queue)
        self._offer_room(self.control_in, 16)
        self.said = front_end.allocate(CONTROL.size)
        self.written = [front_end.allocate(64 * 32768) for _ in self.ports]
        self._telling = asyncio.Lock()
        self._listening = asyncio.create_task(self._listen())

    def _offer_room(self, queue: DriverQueue, count: int) -> None:
        for _ in range(count):
            queue.offer_chain([(self.front_end.allocate(BUFFER), BUFFER)], writable=True)
        queue.kick()

    async def tell(self, port: int, event: int, value: int) -> None:
        """Send a control message, and wait until it is given back."""
        async with self._telling:
            self.tell_unheard(port, event, value)
            await self.control_out.wait_used()

    def tell_unheard(self, port: int, event: int, value: int) -> None:
        CONTROL.pack_into(self.front_end.memory, self.said, port, event, value)
        self.control_out.offer_chain([(self.said, CONTROL.size)], writable=False)
        self.control_out.kick()

    async def _listen(self) -> None:
        """Do what the device tells, for ever."""
        while True:
            await self.control_in.interrupted()
            for buffers, written in self.control_in.take_used():
                offset = buffers[0][0]
                number, event, value = CONTROL.unpack_from(self.front_end.memory, offset)
                port = self.ports[number]
                if event == PORT_ADD:
                    port.added = True
                    self._offer_room(port.incoming, 64)
                elif event == PORT_NAME:
                    port.name = bytes(self.front_end.memory[offset + CONTROL.size : offset + written]).decode()
                elif event == PORT_OPEN:
                    port.host_is_here = bool(value)
                    port.told.append(bool(value))
                self.control_in.offer_chain(buffers, writable=True)
                self.control_in.kick()
                if event == PORT_ADD:
                    await self.tell(number, PORT_READY, 1)

    async def stop_listening(self) -> None:
        """Raises what has gone wrong in it."""
        self._listening.cancel()
        await asyncio.wait({self._listening})
        if not self._listening.cancelled() and (error := self._listening.exception()) is not None:
            raise error

    async def open(self, number: int) -> None:
        await self.tell(number, PORT_OPEN, 1)

    async def close(self, number: int) -> None:
        await self.tell(number, PORT_OPEN, 0)

    async def read(self, number: int) -> bytes:
        """What has arrived, at least one byte."""
        queue, data = self.ports[number].incoming, b""
        for buffers, written in await queue.wait_used():
            data += bytes(self.front_end.memory[buffers[0][0] : buffers[0][0] + written])
            queue.offer_chain(buffers, writable=True)
        queue.kick()
        return data

    async def read_exactly(self, number: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await self.read(number)
        return data

    async def write(self, number: int, data: bytes) -> None:
        """Returns when all of it is offered; 64 buffers of 32 KiB may be with the device."""
        queue = self.ports[number].outgoing
        for start in range(0, len(data), 32768):
            while len(queue.chains) >= 64:
                await queue.wait_used()
            taken = {buffers[0][0] for buffers in queue.chains.values()}
            place = next(at for n in range(64) if (at := self.written[number] + n * 32768) not in taken)
            piece = data[start : start + 32768]
            self.front_end.memory[place : place + len(piece)] = piece
            queue.offer_chain([(place, len(piece))], writable=False)
            queue.kick()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the device tells."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():  # noqa: ASYNC110 - memory tells nobody that it has changed
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def guest_console(path: Path, ports: int) -> AsyncIterator[GuestConsole]:
    """Connect to a console with so many ports, all with a host, and have its driver run while the block does."""
    front_end = await FrontEnd.connect(path)
    try:
        await front_end.negotiate(1 << 32 | 1 << 1)
        front_end.send_memory()
        guest = GuestConsole(front_end, ports)
        try:
            await guest.tell(2**32 - 1, DEVICE_READY, 1)
            await guest.until(lambda: all(port.host_is_here for port in guest.ports))
            yield guest
        finally:
            await guest.stop_listening()
    finally:
        front_end.close()
