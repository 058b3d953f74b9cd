"""Bytes between file descriptors of this process and processes in a guest.

Nothing here blocks the event loop and nothing is buffered beyond one chunk: who does not read stalls the
writer in the guest, and loses nothing.
"""

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from katapod.host.logs import BoundedLog
from katapod.rpc.agent import AgentClient
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.tasks import beside

__all__ = [
    "Descriptor",
    "GuestProcess",
    "InputFd",
    "LogSink",
    "NullSink",
    "OutputFd",
    "Sink",
    "Source",
    "TeeSink",
    "carry",
]

log = logging.getLogger(__name__)

CHUNK = 256 * 1024  # bytes asked of the guest, and written to it, at once
QUIET_S = 0.5  # without output after a process' end: it wrote no more
QUIET_POLL_S = 0.05
OWN_CHUNKS = 6  # of the largest pipe, and what was on its way
LINE_MAX = 16 * 1024  # bytes of one line in a container log, as in the CRI


class Sink(Protocol):
    async def write(self, data: bytes) -> None:
        """Take all of `data`. Raises BrokenPipeError when nobody will ever read it."""

    def close(self) -> None:
        """Called once, after the last write."""


class Source(Protocol):
    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none at the end. Raises OSError."""


class NullSink:
    async def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class OutputFd:
    """A descriptor of ours as a sink: file, pipe, terminal, socket or device."""

    def __init__(self, fd: int) -> None:
        self._fd = _without_blocking(fd, os.O_WRONLY)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[await self._fd.write(view) :]
            except OSError as exc:
                if exc.errno in (errno.EIO, errno.ECONNRESET):  # the terminal or the peer is gone
                    raise BrokenPipeError(exc.errno, exc.strerror) from exc
                raise

    def close(self) -> None:
        self._fd.close()


class InputFd:
    """A descriptor of ours as a source."""

    def __init__(self, fd: int) -> None:
        self._fd = _without_blocking(fd, os.O_RDONLY)

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none at the end. Raises OSError."""
        try:
            return await self._fd.read(size)
        except OSError as exc:
            if exc.errno == errno.EIO:  # the terminal has hung up
                return b""
            raise

    def close(self) -> None:
        self._fd.close()


class Descriptor:
    """A descriptor that does not block (O_NONBLOCK): reads and writes wait on the event loop.

    Not polled, it is a file: always ready."""

    def __init__(self, number: int, *, ours: bool) -> None:
        self.number = number
        self._ours = ours
        self._pollable = _is_pollable(number)

    async def read(self, size: int) -> bytes:
        while True:
            if self._pollable:
                await self.wait_readable()
            with contextlib.suppress(BlockingIOError):
                return self._read(size)

    async def write(self, data: memoryview) -> int:
        """Write some of `data`; returns how much."""
        while True:
            with contextlib.suppress(BlockingIOError):
                return self._write(data)
            await self._wait_writable()

    def _read(self, size: int) -> bytes:
        return os.read(self.number, size)

    def _write(self, data: memoryview) -> int:
        return os.write(self.number, data)

    async def wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(self.number, _fulfil, ready)
        try:
            await ready
        finally:
            loop.remove_reader(self.number)

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self.number, _fulfil, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self.number)

    def close(self) -> None:
        if self._ours:
            self._ours = False
            os.close(self.number)


class _Socket(Descriptor):
    """A socket cannot be opened once more: each call says that it must not block."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(fd))
        super().__init__(self._socket.fileno(), ours=True)

    def _read(self, size: int) -> bytes:
        return self._socket.recv(size, socket.MSG_DONTWAIT)

    def _write(self, data: memoryview) -> int:
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._socket.close()


class _BlockingPipe(Descriptor):
    """A pipe or terminal that could not be opened once more: what polls as writable takes PIPE_BUF bytes."""

    async def write(self, data: memoryview) -> int:
        if self._pollable:
            await self._wait_writable()
        return self._write(data[: select.PIPE_BUF])


def _fulfil(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _without_blocking(fd: int, mode: int) -> Descriptor:
    """O_NONBLOCK belongs to the open file, which we share with our parent: setting it on the shell's terminal
    would break the shell. So pipes and terminals are opened once more, for us alone."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISBLK(kind):
        return Descriptor(fd, ours=False)
    if stat.S_ISSOCK(kind):
        return _Socket(fd)
    try:
        again = os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return _BlockingPipe(fd, ours=False)
    return Descriptor(again, ours=True)


def _is_pollable(fd: int) -> bool:
    """epoll(7) refuses what is always ready: files, directories, and devices such as /dev/null."""
    with select.epoll() as probe:
        try:
            probe.register(fd, 0)
        except PermissionError:
            return False
    return True


class LogSink:
    """Writes a stream to a container log, a line each: time, stream name, F (full) or P (part), text.

    The format is the CRI's, so that the usual tools read it. A log that cannot be written stops nothing: `tell` is
    called with the reason, once.
    """

    def __init__(self, log: BoundedLog, stream: str, tell: Callable[[str], None] = log.warning) -> None:
        self._log = log
        self._tell = tell
        self._stream = stream.encode()
        self._rest = b""
        self._complete = True

    async def write(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        entries = [entry for line in lines for entry in self._entries(line, b"F")]
        whole = len(self._rest) - len(self._rest) % LINE_MAX
        entries += self._entries(self._rest[:whole], b"P")
        self._rest = self._rest[whole:]
        self._put(entries)

    def _entries(self, line: bytes, tag: bytes) -> list[bytes]:
        if not line:
            return [tag + b" \n"] if tag == b"F" else []
        *parts, last = [line[start : start + LINE_MAX] for start in range(0, len(line), LINE_MAX)]
        return [*(b"P " + part + b"\n" for part in parts), tag + b" " + last + b"\n"]

    def _put(self, entries: list[bytes]) -> None:
        if not entries:
            return
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
        head = f"{stamp}.{now % 10**9:09d}Z ".encode() + self._stream + b" "
        try:
            self._log.write(head + head.join(entries))  # at once: a call for each line would hold up the loop
        except OSError as exc:
            if self._complete:
                self._tell(f"the log {self._log.path} is not complete: {exc.strerror}")
            self._complete = False

    def close(self) -> None:
        self._put(self._entries(self._rest, b"P"))
        self._rest = b""


class TeeSink:
    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    async def write(self, data: bytes) -> None:
        for sink in self._sinks:
            await sink.write(data)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class GuestProcess:
    """A process in a guest: a container's own (exec_id = container_id) or one started by exec."""

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str, *, terminal: bool) -> None:
        self.agent = agent
        self.container_id = container_id
        self.exec_id = exec_id
        self.terminal = terminal

    async def resize(self, rows: int, columns: int) -> None:
        await self.agent.call(
            "TtyWinResize",
            agent_pb2.TtyWinResizeRequest(
                container_id=self.container_id, exec_id=self.exec_id, row=rows, column=columns
            ),
        )

    async def signal(self, number: int) -> None:
        await self.agent.call(
            "SignalProcess",
            agent_pb2.SignalProcessRequest(container_id=self.container_id, exec_id=self.exec_id, signal=number),
        )

    async def wait(self) -> int:
        return await self.agent.wait_process(self.container_id, self.exec_id)

    async def feed(self, source: Source) -> None:
        """Copy `source` to stdin until it ends, then close stdin. Ends quietly when the process has gone."""
        try:
            while data := await _read_or_end(source):
                while data:
                    taken = await self.agent.write_stdin(self.container_id, self.exec_id, data)
                    if not taken:  # it will never take the rest
                        return
                    data = data[taken:]
            await self.close_stdin()
        except RpcError as exc:
            if exc.code is StatusCode.UNAVAILABLE:
                raise

    async def close_stdin(self) -> None:
        with contextlib.suppress(RpcError):
            await self.agent.call(
                "CloseStdin", agent_pb2.CloseStdinRequest(container_id=self.container_id, exec_id=self.exec_id)
            )


async def _read_or_end(source: Source) -> bytes:
    try:
        return await source.read(CHUNK)
    except OSError as exc:  # a directory, a broken disk: the process sees the end of its input
        log.warning("cannot read standard input: %s", exc.strerror)
        return b""


class _Copy:
    """One output stream of a process on its way to `sink`, until it ends."""

    def __init__(self, process: GuestProcess, method: str, sink: Sink, group: asyncio.TaskGroup) -> None:
        """`method`: ReadStdout or ReadStderr."""
        self._process = process
        self._method = method
        self._sink = sink
        self._chunks = 0
        self._writing = False
        self._quiet_since = time.monotonic()
        self.task = group.create_task(self._run(), name=method)

    async def _run(self) -> None:
        process = self._process
        try:
            while data := await process.agent.read_stream(self._method, process.container_id, process.exec_id, CHUNK):
                self._writing = True
                await self._sink.write(data)
                self._writing = False
                self._chunks += 1
                self._quiet_since = time.monotonic()
        finally:
            self._sink.close()

    def process_has_ended(self) -> None:
        self._chunks = 0
        self._quiet_since = time.monotonic()

    @property
    def has_its_own(self) -> bool:
        """Whether all is through that the process itself wrote before its end: a pipe holds no more than OWN_CHUNKS."""
        quiet = not self._writing and time.monotonic() - self._quiet_since >= QUIET_S
        return quiet or self._chunks >= OWN_CHUNKS


async def _feed(process: GuestProcess, stdin: Source | None) -> None:
    with contextlib.suppress(RpcError):  # of a guest that fails: the outputs tell
        await (process.feed(stdin) if stdin else process.close_stdin())


async def carry(
    process: GuestProcess,
    stdin: Source | None,
    stdout: Sink,
    stderr: Sink,
    on_exit: Callable[[int], Awaitable[None]] | None = None,
) -> int:
    """Carry all streams of a started process to its end; returns its exit status.

    Other processes may hold its streams open then. With `on_exit`, that is awaited with the exit status once all is
    through that the process itself wrote, and the streams are carried until their last writer closes them; without,
    what such others write is lost.

    Raises BrokenPipeError when nobody reads our output any more, RpcError when the guest fails. With a
    terminal the guest has one output stream.
    """
    try:
        async with beside(_feed(process, stdin), name="stdin") as feeding, asyncio.TaskGroup() as group:
            copies = [_Copy(process, "ReadStdout", stdout, group)]
            if not process.terminal:
                copies.append(_Copy(process, "ReadStderr", stderr, group))
            status = await process.wait()
            for copy in copies:
                copy.process_has_ended()
            while left := {copy.task for copy in copies if not (copy.task.done() or copy.has_its_own)}:
                await asyncio.wait(left, timeout=QUIET_POLL_S)
            if on_exit is not None:
                feeding.cancel()
                await on_exit(status)
            else:
                for copy in copies:
                    copy.task.cancel()
        return status
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
