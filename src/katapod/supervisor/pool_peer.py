"""A client of the pool, seen from the member that has it: its request, its streams, its signals, its end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from types import TracebackType
from typing import Any

from katapod.supervisor import pool_wire as wire
from katapod.supervisor.request_reader import RequestReader
from katapod.supervisor.run import FORWARDED, cancel_once

__all__ = ["Client", "read_request"]

DESCRIPTORS = 4  # standard input, output and error, the working directory
READ_SIZE = 65536
PASSED = frozenset({*FORWARDED, signal.SIGWINCH})


def read_request(connection: socket.socket, limit_s: float) -> tuple[wire.Request, list[int]]:
    """Return a client's request and its descriptors, the caller's to close. Blocks.

    Raises FrameError, OSError; TimeoutError among them.
    """
    connection.settimeout(limit_s)
    reader = RequestReader(DESCRIPTORS)
    try:
        while (request := reader.read(connection)) is None:
            pass
    except BaseException:
        for fd in reader.fds:
            os.close(fd)
        raise
    return request, reader.fds


class Client:
    """The other end of `connection`, until `end` or `close`."""

    def __init__(self, connection: socket.socket) -> None:
        self.request: wire.Request | None = None
        self.fds: list[int] = []
        self.signals: list[int] = []  # that it has passed on
        self._connection = connection
        self._data = b""
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def words(self) -> list[str]:
        assert self.request is not None
        return [os.fsdecode(word) for word in self.request.words]

    def refuse(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(wire.frame(wire.REFUSED))
        self.close()

    def agree(self, limit_s: float) -> None:
        """Say that it is taken, and hear that it still wants to be. Blocks. Raises OSError, FrameError."""
        self._connection.settimeout(limit_s)
        self._connection.sendall(wire.frame(wire.TAKEN))
        answer = self._connection.recv(wire.HEADER, socket.MSG_WAITALL)
        if answer != wire.frame(wire.GO):
            raise wire.FrameError("the client has gone")
        self._connection.setblocking(False)

    def become(self) -> None:
        """Take on its streams, directory, umask and environment: from here on we speak for it. Raises OSError."""
        assert self.request is not None
        *streams, cwd = self.fds
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        _go_to(cwd)
        self._close_descriptors()
        os.umask(self.request.umask)
        os.environ.clear()
        for entry in self.request.environment:
            name, equals, value = entry.partition(b"=")
            if name and equals:
                os.environb[name] = value
        root = logging.getLogger()
        for handler in root.handlers[:]:  # the flags of its command line set up others
            root.removeHandler(handler)
        root.setLevel(logging.WARNING)

    def follow(self, task: "asyncio.Task[Any]") -> None:
        """Pass its signals on to this process, and cancel `task` when it has gone."""
        self._task = task
        asyncio.get_running_loop().add_reader(self._connection, self._hear)

    def _hear(self) -> None:
        try:
            data = self._connection.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._data += data
        try:
            while len(self._data) >= wire.HEADER:
                length, kind = wire.parse_header(self._data)
                if len(self._data) < wire.HEADER + length:
                    break
                payload, self._data = self._data[wire.HEADER :][:length], self._data[wire.HEADER + length :]
                if kind == wire.SIGNAL and (number := int(payload)) in PASSED:
                    self.signals.append(number)
                    os.kill(os.getpid(), number)
        except (ValueError, wire.FrameError):
            data = b""
        if not data:
            self._stop_hearing()
            assert self._task is not None
            cancel_once(self._task)

    def _stop_hearing(self) -> None:
        if self._task is not None:
            asyncio.get_running_loop().remove_reader(self._connection)

    def end(self, status: int) -> None:
        """Tell it the exit status. Idempotent; one that has gone does not mind."""
        if self._connection.fileno() < 0:
            return
        self._stop_hearing()
        with contextlib.suppress(OSError):
            self._connection.sendall(wire.frame(wire.EXIT, b"%d" % status))
        self.close()

    def leave_streams(self) -> None:
        """Let go of its streams: it has ended, and we have not."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        os.chdir("/")

    def close(self) -> None:
        self._close_descriptors()
        self._connection.close()

    def _close_descriptors(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def _go_to(directory: int) -> None:
    """Make it our working directory, as our own mounts have it: the path of one among the client's could not be told.
    Raises OSError."""
    os.fchdir(directory)
    path = os.readlink("/proc/self/cwd")
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.fstat(directory)):
            os.chdir(path)
