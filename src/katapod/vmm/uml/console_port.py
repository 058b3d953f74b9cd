"""One port of a virtio console: bytes between its two queues and a stream socket, whose other end is the host's.

Full duplex and bounded. Towards the guest nothing is kept here: a socket is read into buffers that the guest has
offered, and not before the guest has opened the port. Towards the host about a BATCH is kept, and a buffer is given
back only when the socket has taken all of it, so a host that does not read stalls the guest's writer.

Each end sees the other come and go. When the guest closes its end, the host reads what was written before and then end
of file; when the host has hung up, the guest gets what it sent before, and is told. Without a host, what the guest
writes is dropped, as QEMU does.
"""

import contextlib
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator

from katapod.vmm.uml.backend import Queue
from katapod.vmm.uml.edges import READABLE, WRITABLE, Edges
from katapod.vmm.uml.vhost_user import VhostUserFailed
from katapod.vmm.uml.virtqueue import Chain, Virtqueue

__all__ = ["Port"]

BATCH = 256 * 1024  # bytes carried at once in one direction
ALL = 1 << 62  # bytes: whatever a ring has
BATCHES = 4  # after which others have their turn
IOV_MAX = 1024  # of one sendmsg
READABLE_ONLY = select.EPOLLIN | select.EPOLLOUT  # the other events tell of an end


class Port:
    """`tell_open` is called when the host comes (True) or goes."""

    def __init__(self, name: str, edges: Edges, tell_open: Callable[[bool], None]) -> None:
        self.name = name
        self.guest_is_here = False
        self._edges = edges
        self._tell_open = tell_open
        self._incoming: Queue | None = None  # to the guest
        self._outgoing: Queue | None = None  # to the host
        self._sock: socket.socket | None = None
        self._readable = self._writable = self._ended = False
        self._room: deque[Chain] = deque()  # offered by the guest, to be filled
        self._space = bytearray(BATCH)
        self._unsent: deque[memoryview] = deque()  # of the buffers whose heads follow, in the same order
        self._unsent_of: deque[list[int]] = deque()  # head, and how many pieces of it are left
        self._last_chains: int | None = None  # that the guest had written when it closed, and we have yet to send

    @property
    def host_is_here(self) -> bool:
        return self._sock is not None

    def connect(self, sock: socket.socket) -> None:
        """Have a host, whose socket the port owns from now on, in place of the former one. Raises OSError."""
        self.disconnect()
        self._drop()  # what was written when nobody was here is not for who comes now
        sock.setblocking(False)
        self._edges.watch(sock.fileno(), self._socket_changed)
        self._sock = sock
        self._readable = self._ended = False
        self._writable = True
        self._tell_open(True)

    def disconnect(self) -> None:
        """Hang up on the host, and drop what the guest has written for it. Idempotent."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._last_chains = None
        self._edges.forget(sock.fileno())
        with sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
            while sock.recv_into(self._space):  # what is unread would become a reset for the host
                pass
        self._tell_open(False)
        self._drop()

    def start_incoming(self, queue: Queue | None) -> None:
        self._incoming = queue
        if queue is not None:
            queue.virtqueue.ask_for_kicks(False)
        self._room.clear()

    def start_outgoing(self, queue: Queue | None) -> None:
        self._outgoing = queue
        self._unsent.clear()
        self._unsent_of.clear()

    def guest_opened(self) -> None:
        self.guest_is_here = True
        self.to_guest()

    def guest_closed(self) -> None:
        """The host is hung up on as soon as it has taken what was written until now. Idempotent."""
        if self.guest_is_here and self._last_chains is None and self._sock is not None:
            self._last_chains = self._outgoing.virtqueue.offered() if self._outgoing is not None else 0
            self.to_host()
        self.guest_is_here = False

    def finish(self) -> None:
        """The guest has gone: hang up on the host as soon as it has taken what was written."""
        self.guest_closed()
        if self._last_chains is None:
            self.disconnect()

    def to_host(self) -> None:
        """Carry what the guest has written as far as the socket takes it."""
        if self._sock is None:
            self._drop()
            return
        for _ in range(BATCHES):
            if self._outgoing is None or not (self._unsent_of or self._fetch(self._outgoing)):
                if self._last_chains == 0:
                    self.disconnect()
                return
            if not self._send(self._sock, self._outgoing):
                return
        self._edges.go_on_later(self.to_host)

    def to_guest(self) -> None:
        """Carry what the host has sent as far as the guest has offered buffers."""
        for _ in range(BATCHES):
            if self._sock is None or self._incoming is None or not self._guest_listens():
                return
            if not self._has_room(self._incoming.virtqueue) or not self._receive(self._sock, self._incoming):
                return
        self._edges.go_on_later(self.to_guest)

    def _guest_listens(self) -> bool:
        """Else the guest has closed the port since this host came: what comes now is not for who opens it next."""
        return self.guest_is_here and self._readable and self._last_chains is None

    def _has_room(self, virtqueue: Virtqueue) -> bool:
        """Whether the guest has offered buffers. It is asked to kick for new ones only if not."""
        if not self._room:
            self._room.extend(virtqueue.take(BATCH))
            if not self._room:
                virtqueue.ask_for_kicks(True)
                self._room.extend(virtqueue.take(BATCH))  # offered meanwhile, without a kick
            if self._room:
                virtqueue.ask_for_kicks(False)
        return bool(self._room)

    def _socket_changed(self, events: int) -> None:
        if events & READABLE:
            self._readable = True
            self._ended = self._ended or bool(events & ~READABLE_ONLY)
            self.to_guest()
        if events & WRITABLE and not self._writable and self._sock is not None:
            self._writable = True
            self._edges.await_writable(self._sock.fileno(), waiting=False)
            self.to_host()

    def _fetch(self, queue: Queue) -> bool:
        """Read the next chains; returns whether there are any."""
        chains = queue.virtqueue.take(BATCH, *([] if self._last_chains is None else [self._last_chains]))
        if self._last_chains is not None:
            self._last_chains -= len(chains)
        for chain in chains:
            pieces = [memoryview(segment.read()) for segment in chain.readable] or [memoryview(b"")]
            self._unsent.extend(pieces)
            self._unsent_of.append([chain.head, len(pieces)])
        return bool(chains)

    def _drop(self) -> None:
        """Give back unsent what the guest has written until now."""
        if self._outgoing is not None:
            heads = [head for head, _ in self._unsent_of]
            self._unsent.clear()
            self._unsent_of.clear()
            heads += [chain.head for chain in self._outgoing.virtqueue.take(ALL)]
            self._outgoing.give_back([(head, 0) for head in heads])

    def _send(self, sock: socket.socket, queue: Queue) -> bool:
        """Send what was read; returns whether the socket may take more."""
        if not self._writable:
            return False
        try:
            sent = sock.sendmsg(list(self._unsent)[:IOV_MAX])
        except BlockingIOError:
            self._writable = False
            self._edges.await_writable(sock.fileno())
            return False
        except OSError:  # the host has hung up
            self.disconnect()
            return False
        self._took(queue, sent)
        return True

    def _took(self, queue: Queue, count: int) -> None:
        """Give back the chains of which all bytes are among the first `count`."""
        done: list[tuple[int, int]] = []
        while self._unsent and count >= len(self._unsent[0]):
            count -= len(self._unsent.popleft())
            first = self._unsent_of[0]
            first[1] -= 1
            if not first[1]:
                done.append((first[0], 0))
                self._unsent_of.popleft()
        if count:
            self._unsent[0] = self._unsent[0][count:]
        queue.give_back(done)

    def _receive(self, sock: socket.socket, queue: Queue) -> bool:
        """Fill what the guest has offered; returns whether there may be more."""
        capacity = min(BATCH, sum(segment.length for chain in self._room for segment in chain.writable))
        if not capacity:
            raise VhostUserFailed(f"cannot use the buffers of port {self.name}: they have no room")
        try:
            count = sock.recv_into(self._space, capacity)
        except BlockingIOError:
            self._readable = False
            return False
        except OSError:
            count = 0
        if not count:
            self.disconnect()
            return False
        if count < capacity and not self._ended:
            self._readable = False
        queue.give_back(list(self._fill(memoryview(self._space)[:count])))
        return True

    def _fill(self, data: memoryview) -> Iterator[tuple[int, int]]:
        while data:
            chain = self._room.popleft()
            written = 0
            for segment in chain.writable:
                piece = data[: segment.length]
                if piece:
                    segment.write(piece)
                written += len(piece)
                data = data[len(piece) :]
            yield chain.head, written
