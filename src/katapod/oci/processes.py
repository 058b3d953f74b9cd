"""What the supervisor holds of each process: its streams, its proxy on the host, how it ended."""

import array
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import termios
from collections.abc import Awaitable, Callable

from katapod.model.errors import KatapodError
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.stdio import GuestProcess, InputFd, OutputFd, Sink, Source

__all__ = ["ExecProcess", "ProcessStreams", "ProxyLink"]

log = logging.getLogger(__name__)

SIGNAL_MAX = 64


class _Kept:
    """A sink that outlives its reader: what nobody reads any more is lost, and the process goes on."""

    def __init__(self, sink: OutputFd) -> None:
        self._sink = sink
        self._broken = False

    async def write(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            await self._sink.write(data)
        except OSError as exc:
            log.info("output is lost from here on: %s", exc.strerror)
            self._broken = True

    def close(self) -> None:
        self._sink.close()


class ProcessStreams:
    """The descriptors that a command handed over: of standard input, output and error, or of one terminal."""

    def __init__(self, fds: list[int], *, terminal: bool) -> None:
        self._fds = fds
        self._terminal = terminal
        self.stdin: InputFd | None = None
        self.opened: list[InputFd | OutputFd] = []

    def open(self) -> tuple[Source, Sink, Sink]:
        """The sinks are closed by who writes to them. Raises OSError."""
        stdin = InputFd(self._fds[0])
        self.opened.append(stdin)
        stdout = OutputFd(self._fds[0 if self._terminal else 1])
        self.opened.append(stdout)
        stderr = OutputFd(self._fds[0 if self._terminal else 2])
        self.opened.append(stderr)
        return stdin, _Kept(stdout), _Kept(stderr)

    def size(self) -> tuple[int, int] | None:
        """Rows and columns of the terminal; None without one, or if nobody has set them."""
        if not self._terminal or not self._fds:
            return None
        found = array.array("H", [0, 0, 0, 0])
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fds[0], termios.TIOCGWINSZ, found)
        return (found[0], found[1]) if found[0] and found[1] else None

    def close(self) -> None:
        """Idempotent. Readers see the end once nobody else has them open."""
        for stream in self.opened:
            with contextlib.suppress(OSError):
                stream.close()
        self.opened = []
        while self._fds:
            os.close(self._fds.pop())


class ProxyLink:
    """The supervisor's end of a proxy's connection (host/proxy.c)."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self.told = False  # how to end: what comes of it then is no news

    async def listen(self, on_signal: Callable[[int], Awaitable[None]], on_end: Callable[[], Awaitable[None]]) -> None:
        """Hear its signals until it ends; `on_end` is for an end that we have not asked for."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._socket, 64):
                for number in data:
                    if 0 < number <= SIGNAL_MAX:
                        await on_signal(number)
        if not self.told:
            await on_end()

    def exit(self, status: int) -> None:
        """Idempotent: the first order counts."""
        self._order(b"x", status & 0xFF)

    def die(self, number: int) -> None:
        self._order(b"s", number)

    def _order(self, kind: bytes, number: int) -> None:
        if self.told:
            return
        self.told = True
        with contextlib.suppress(OSError):  # it has been killed
            self._socket.send(kind + bytes([number]))

    async def wait_end(self, limit_s: float) -> None:
        """Until it has closed its end, by ending."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(limit_s):
                while await loop.sock_recv(self._socket, 64):
                    pass

    def close(self) -> None:
        self._socket.close()


class ExecProcess:
    """A further process, and how signals reach it."""

    def __init__(self, sandbox: Sandbox, guest: GuestProcess, proxy: ProxyLink, streams: ProcessStreams) -> None:
        self._sandbox = sandbox
        self.guest = guest
        self.proxy = proxy
        self.streams = streams
        self.following: asyncio.Task[None] | None = None

    async def signal(self, number: int) -> None:
        """As it came to its proxy."""
        with contextlib.suppress(KatapodError):
            size = self.streams.size() if number == signal.SIGWINCH else None
            await self._sandbox.guard(self.guest.resize(*size) if size is not None else self.guest.signal(number))
