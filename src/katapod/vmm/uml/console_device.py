"""A virtio console with named ports, served to a guest of User-mode Linux from our event loop.

The guest has each port as a character device, found by its name, as with QEMU's virtserialport. A pair of queues for
each port carries its bytes, another pair tells who is at which end. Source: Virtual I/O Device (VIRTIO) 1.2, section
5.3; Linux' drivers/char/virtio_console.c.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Mapping
from enum import IntEnum

from katapod.tasks import beside
from katapod.vmm.uml.backend import Backend, Queue, serve_first
from katapod.vmm.uml.console_port import Port
from katapod.vmm.uml.edges import Edges
from katapod.vmm.uml.vhost_user import Connection, VhostUserFailed

__all__ = ["CONSOLE_ID", "Console", "serving_console"]

log = logging.getLogger(__name__)

CONSOLE_ID = 3  # of this kind of device, for virtio_uml.device=SOCKET:ID
MULTIPORT = 1 << 1
CONTROL_IN, CONTROL_OUT = 2, 3  # queues
MESSAGES_MAX = 64  # of the guest's that are handled at once
_CONFIG = struct.Struct("<HHII")  # columns, rows, ports, emergency write
_CONTROL = struct.Struct("<IHH")  # port, event, value


class Event(IntEnum):
    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_READY = 3
    PORT_OPEN = 6
    PORT_NAME = 7


class _Told:
    """What the guest has yet to be told of one port, in this order."""

    def __init__(self) -> None:
        self.add = self.name = False
        self.open: list[bool] = []  # whether the host is here, alternating: of each, one at most


class Console:
    """Port n has the queues of _queues_of(n). `failure`: why it has ended by itself, if it has."""

    features = MULTIPORT

    def __init__(self, names: list[str]) -> None:
        self.failure: VhostUserFailed | None = None
        self.ended = asyncio.Event()
        self._hosts_gone = asyncio.Event()
        self.config = _CONFIG.pack(0, 0, len(names), 0)
        self.queue_count = 2 * len(names) + 2
        self.edges = Edges(self._fail)
        self._ports: list[Port] = []
        self._told = [_Told() for _ in names]
        for number, name in enumerate(names):
            self._ports.append(Port(name, self.edges, functools.partial(self._tell_open, number)))
        self._by_queue = {queue: port for n, port in enumerate(self._ports) for queue in _queues_of(n)}
        self._to_guest: Queue | None = None
        self._from_guest: Queue | None = None
        self._ready: set[int] = set()  # ports that the guest has

    def connect(self, name: str, sock: socket.socket) -> None:
        """Have the port's host at the other end of a stream socket, which is the console's from now on; a former host
        is hung up on."""
        if self.ended.is_set():
            sock.close()
            return
        try:
            next(port for port in self._ports if port.name == name).connect(sock)
        except (VhostUserFailed, OSError) as exc:
            sock.close()
            self._fail(exc)

    async def serve(self, listener: socket.socket) -> None:
        """Serve the first who connects, until it hangs up and the hosts have taken what it wrote, or until it fails.
        Returns then, with `failure` if it has failed."""
        backend = Backend(self, self.edges)
        try:
            await serve_first(listener, functools.partial(self._serve, backend), self.ended, "console")
        except (VhostUserFailed, OSError) as exc:
            self._fail(exc)
        finally:
            self.close()
            backend.close()

    async def _serve(self, backend: Backend, connection: Connection) -> None:
        await backend.serve(connection)
        for port in self._ports:
            port.finish()
        await self._hosts_gone.wait()

    def close(self) -> None:
        """Hang up on all hosts. Idempotent."""
        self.edges.close()
        self._to_guest = self._from_guest = None
        for port in self._ports:
            port.start_incoming(None)
            port.start_outgoing(None)
            port.disconnect()
        self.ended.set()

    def _fail(self, cause: Exception) -> None:
        if not isinstance(cause, VhostUserFailed | OSError):
            log.error("the guest's console has ended", exc_info=cause)
        if self.failure is None:
            said = cause if isinstance(cause, VhostUserFailed) else VhostUserFailed(f"cannot serve a console: {cause}")
            self.failure = said
            log.warning("the guest's console has ended: %s", said)
        self.ended.set()

    # Device

    def start(self, index: int, queue: Queue) -> None:
        self._set_queue(index, queue)

    def stop(self, index: int) -> None:
        self._set_queue(index, None)
        if index == CONTROL_OUT:  # the guest's driver has gone
            for port in self._ports:
                port.guest_closed()
            self._ready.clear()

    def kicked(self, index: int) -> None:
        if index == CONTROL_IN:
            self._tell()
        elif index == CONTROL_OUT:
            self._listen()
        elif index % 2:
            self._by_queue[index].to_host()
        else:
            self._by_queue[index].to_guest()

    def _set_queue(self, index: int, queue: Queue | None) -> None:
        if index == CONTROL_IN:
            self._to_guest = queue
        elif index == CONTROL_OUT:
            self._from_guest = queue
        elif index % 2:
            self._by_queue[index].start_outgoing(queue)
        else:
            self._by_queue[index].start_incoming(queue)

    # control

    def _tell_open(self, number: int, here: bool) -> None:
        if not any(port.host_is_here for port in self._ports):
            self._hosts_gone.set()
        if number in self._ready:
            waiting = self._told[number].open
            waiting.append(here)
            if len(waiting) == 3:  # gone, back and gone again is gone
                del waiting[:2]
            self._tell()

    def _tell(self) -> None:
        """Send what there is to tell, as far as the guest has offered buffers."""
        messages = self._messages()
        while self._to_guest is not None and messages:
            chains = self._to_guest.virtqueue.take(1, 1)
            if not chains:
                break
            chain, message = chains[0], messages.popleft()
            if not chain.writable or chain.writable[0].length < len(message):
                raise VhostUserFailed(f"cannot tell the guest of a port: its buffer has no {len(message)} bytes")
            chain.writable[0].write(message)
            self._to_guest.give_back([(chain.head, len(message))])
            self._forget_told(message)

    def _messages(self) -> deque[bytes]:
        messages: deque[bytes] = deque()
        for number, told in enumerate(self._told):
            if told.add:
                messages.append(_CONTROL.pack(number, Event.PORT_ADD, 1))
            if told.name:
                messages.append(_CONTROL.pack(number, Event.PORT_NAME, 1) + self._ports[number].name.encode())
            messages.extend(_CONTROL.pack(number, Event.PORT_OPEN, here) for here in told.open)
        return messages

    def _forget_told(self, message: bytes) -> None:
        number, event, _ = _CONTROL.unpack_from(message)
        told = self._told[number]
        if event == Event.PORT_ADD:
            told.add = False
        elif event == Event.PORT_NAME:
            told.name = False
        else:
            del told.open[0]

    def _listen(self) -> None:
        """Take what the guest tells. It waits for each message to be given back."""
        if self._from_guest is None:
            return
        for _ in range(MESSAGES_MAX):
            chains = self._from_guest.virtqueue.take(1, 1)
            if not chains:
                return
            said = b"".join(segment.read() for segment in chains[0].readable)
            if len(said) != _CONTROL.size:
                raise VhostUserFailed(f"cannot read what the guest tells of a port: {len(said)} bytes")
            self._hear(*_CONTROL.unpack(said))
            if self._from_guest is not None:
                self._from_guest.give_back([(chains[0].head, 0)])
        self.edges.go_on_later(self._listen)

    def _hear(self, number: int, event: int, value: int) -> None:
        if event not in (Event.DEVICE_READY, Event.PORT_READY, Event.PORT_OPEN):
            log.debug("the guest's console tells of an unknown event %d", event)
        elif event == Event.DEVICE_READY:
            self._device_ready(bool(value))
        elif number >= len(self._ports):
            raise VhostUserFailed(f"cannot serve port {number}: the console has {len(self._ports)}")
        elif event == Event.PORT_READY:
            self._port_ready(number, bool(value))
        elif value:
            self._ports[number].guest_opened()
        else:
            self._ports[number].guest_closed()

    def _device_ready(self, good: bool) -> None:
        if not good:
            raise VhostUserFailed("cannot serve a console: the guest's driver has failed")
        self._ready.clear()
        for told in self._told:
            told.add, told.name, told.open = True, False, []
        self._tell()

    def _port_ready(self, number: int, good: bool) -> None:
        if not good:
            raise VhostUserFailed(f"cannot serve port {self._ports[number].name}: the guest's driver has failed")
        self._ready.add(number)
        told, here = self._told[number], self._ports[number].host_is_here
        told.name, told.open = True, [True] if here else []
        self._tell()


def _queues_of(port: int) -> tuple[int, int]:
    """Towards the guest, and towards the host. The control queues come behind those of the first port."""
    first = 2 * port + (2 if port else 0)
    return first, first + 1


@contextlib.asynccontextmanager
async def serving_console(listener: socket.socket, ports: Mapping[str, socket.socket]) -> AsyncIterator[Console]:
    """Serve a console to the first guest's kernel that connects to `listener`, while the block runs.

    `ports` has the names of all ports, and for each a stream socket whose other end is the host's. All of these sockets
    are the console's from now on. When it ends, for whatever cause, the hosts read end of file.
    """
    listener.setblocking(False)
    console = Console(list(ports))
    with listener, contextlib.closing(console):
        for name, sock in ports.items():
            console.connect(name, sock)
        async with beside(console.serve(listener), name="console"):
            yield console
