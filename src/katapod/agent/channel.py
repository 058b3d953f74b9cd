"""How the host reaches the agent: a virtio-serial port, vsock or a unix socket. Bytes only, no ttrpc.

A virtio-serial port can be open only once in the guest, reads end of file while no host is connected, returns at most 4
KiB per read and takes at most 32 KiB per write. The kernel does one such step for each element of the vector of readv
and writev, so one system call can transfer more.
"""

from __future__ import annotations

import os
import select

from katapod.agent import log
from katapod.agent.loop import Lock, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

__all__ = ["VSOCK_CID_ANY", "Listener", "Stream", "find_port", "listen", "serve_port"]

READ_STEP, READ_STEPS = 4096, 32
WRITE_STEP, WRITE_STEPS = 32768, 16
HOST_POLL_S = 0.01  # of what is to be written to a host that the port has yet to tell of
VSOCK_CID_ANY, VSOCK_CID_HOST = 0xFFFFFFFF, 2
PRIVILEGED_PORT_MAX = 1023
PORTS_PATH = "/sys/class/virtio-ports"


class Stream:
    """One connection of the host: bytes in, bytes out. `close` when done."""

    def __init__(self, loop: Loop, fd: int) -> None:
        self._loop = loop
        self._fd = fd
        self._lock = Lock()
        self._space = [bytearray(READ_STEP) for _ in range(READ_STEPS)]
        self._awaits_host = False
        self.unsent_bytes = 0

    async def read(self) -> bytes:
        """Return what has arrived, at most 128 KiB; empty at the end. Raises OSError."""
        while True:
            try:
                count = os.readv(self._fd, self._space)
            except BlockingIOError:
                await self._loop.readable(self._fd)
                continue
            if count == READ_STEP * READ_STEPS:
                return b"".join(self._space)
            full, rest = divmod(count, READ_STEP)
            return b"".join(self._space[:full]) + bytes(memoryview(self._space[full])[:rest])

    async def write(self, data: bytes) -> None:
        """Send all of `data`; writers take turns. Raises OSError."""
        self.unsent_bytes += len(data)
        try:
            async with self._lock:
                view = memoryview(data)
                while view:
                    window = view[: WRITE_STEP * WRITE_STEPS]
                    pieces = [window[i : i + WRITE_STEP] for i in range(0, len(window), WRITE_STEP)]
                    try:
                        view = view[os.writev(self._fd, pieces) :]
                    except BlockingIOError:
                        if self._awaits_host:  # and watches the descriptor for that
                            await self._loop.sleep(HOST_POLL_S)
                        else:
                            await self._loop.writable(self._fd)
        finally:
            self.unsent_bytes -= len(data)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            self._loop.close_fd(self._fd)
            self._fd = -1

    def host_is_gone(self) -> bool:
        """Whether a virtio-serial port has no host, as far as the kernel knows: it learns of a host from a work queue,
        and of a host's data from an interrupt, so that what a host sends first may be here before it is."""
        port = select.poll()
        port.register(self._fd, 0)
        return any(mask & select.POLLHUP for _, mask in port.poll(0))

    async def host_present(self) -> None:
        """Wait until a host is connected to a virtio-serial port."""
        self._awaits_host = True
        self._loop.forget(self._fd)
        try:
            while await self._loop.next_edge(self._fd) & select.EPOLLHUP:
                pass
        finally:
            self._awaits_host = False
            self._loop.forget(self._fd)


def find_port(name: str) -> str | None:
    """Return the device node of the virtio-serial port `name`, if it exists."""
    try:
        nodes = os.listdir(PORTS_PATH)
    except FileNotFoundError:
        return None
    for node in nodes:
        try:
            with open(f"{PORTS_PATH}/{node}/name") as handle:
                found = handle.read().strip()
        except OSError:
            continue  # a port without a name, or one that is being removed
        if found == name and os.path.exists(f"/dev/{node}"):
            return f"/dev/{node}"
    return None


async def serve_port(
    loop: Loop, path: str, serve: Callable[[Stream], Coroutine[object, None, bool]], on_open: Callable[[], None]
) -> None:
    """Serve one host after another on the port `path`, forever.

    `serve` returns when the host has gone, with False if what it sent was invalid: then the port is reopened, which
    discards the pending input. Raises OSError if the port cannot be opened.
    """
    while True:
        stream = Stream(loop, os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        on_open()
        try:
            while True:
                await stream.host_present()
                if not await serve(stream):
                    break
        finally:
            stream.close()


class Listener:
    """A listening socket at `address`: unix:///PATH or vsock://CID:PORT (CID -1 is any).

    On vsock only root of the host is accepted: its CID, from a privileged port. Other users of the host and processes
    of the guest can connect as well, and whoever controls the agent controls all containers. Source: vsock(7).
    """

    def __init__(self, loop: Loop, address: str) -> None:
        """Raises OSError, or ValueError for any other address."""
        import _socket

        self._loop = loop
        self._refused = 0
        scheme, _, rest = address.partition("://")
        self._is_vsock = scheme == "vsock"
        if scheme == "unix" and rest.startswith("/"):
            self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
            if os.path.exists(rest):
                os.unlink(rest)
            self._socket.bind(rest)
        elif self._is_vsock:
            cid, _, port = rest.partition(":")
            self._socket = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
            self._socket.bind((VSOCK_CID_ANY if cid == "-1" else int(cid), int(port)))
        else:
            raise ValueError(f"cannot listen on {address!r}: use unix:///PATH or vsock://CID:PORT")
        self._socket.listen(16)
        self._accept: Any = self._socket._accept  # type: ignore[attr-defined]

    async def accept(self) -> int:
        """Return the descriptor of the next connection; the caller owns it. Raises OSError."""
        while True:
            try:
                fd, peer = self._accept()
            except (BlockingIOError, ConnectionAbortedError):
                await self._loop.readable(self._socket.fileno())
                continue
            if self._is_vsock and not _is_host(peer):
                os.close(fd)
                self._refuse(peer)
                await self._loop.turn()  # a client that keeps connecting must not starve other tasks
                continue
            os.set_blocking(fd, False)
            return int(fd)

    def _refuse(self, peer: tuple[int, int]) -> None:
        self._refused += 1
        if self._refused == 1:  # further ones would only fill the console
            log.warning(f"refused a vsock connection of CID {peer[0]}, port {peer[1]}: it is not root of the host")

    def close(self) -> None:
        self._loop.forget(self._socket.fileno())
        self._socket.close()


def _is_host(peer: tuple[int, int]) -> bool:
    cid, port = peer
    return cid == VSOCK_CID_HOST and port <= PRIVILEGED_PORT_MAX


async def listen(loop: Loop, listener: Listener, serve: Callable[[Stream], Coroutine[object, None, bool]]) -> None:
    """Serve every connection in its own task, forever."""
    from katapod.agent.loop import Tasks

    connections = Tasks(loop, "channel")

    async def one(fd: int) -> None:
        stream = Stream(loop, fd)
        try:
            await serve(stream)
        finally:
            stream.close()

    try:
        while True:
            fd = await listener.accept()
            log.debug("a host connected")
            connections.spawn(f"connection-{fd}", one(fd))
    finally:
        connections.cancel()
        listener.close()
