"""The streams of a process, as containerd names them: FIFOs, files, or a logging program.

FIFOs are opened for reading and writing, so that a missing peer neither blocks, nor causes SIGPIPE, nor ends a
container's input: containerd may restart. Only CloseIO ends the input. Source: core/runtime/v2/README.md of containerd.
"""

import array
import asyncio
import contextlib
import fcntl
import logging
import os
import stat
import termios
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from katapod.host.process import Child, spawn, stop_child
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.sandbox.stdio import Descriptor, NullSink, Sink, Source
from katapod.tasks import beside

__all__ = ["FifoInput", "IoUris", "Streams", "open_streams"]

log = logging.getLogger(__name__)

_Opened = TypeVar("_Opened")

OUTPUT_READ_S = 1.0
OUTPUT_POLL_S = 0.005
LOGGER_READY_S = 10.0
LOGGER_END_S = 10.0
LOGGER_FDS = (3, 4, 5)  # stdout, stderr, and what it closes when it is ready


class IoUris:
    """The URIs of a process's streams in a request. Empty: none."""

    def __init__(self, stdin: str, stdout: str, stderr: str, terminal: bool) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = "" if terminal else stderr
        self.terminal = terminal


class FifoInput:
    """The read end of a FIFO. Its end of file is announced by CloseIO, not seen."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._descriptor = Descriptor(self._fd, ours=True)
        self._ended = asyncio.Event()
        self.drained = asyncio.Event()  # nothing more will be read

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none once the end has been announced and everything before it has been read."""
        while True:
            with contextlib.suppress(BlockingIOError):
                return os.read(self._fd, size)
            if self._ended.is_set():
                self.drained.set()
                return b""
            async with (
                beside(self._descriptor.wait_readable(), name="wait-input") as ready,
                beside(self._ended.wait(), name="wait-input-end") as ended,
            ):
                await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)

    def end(self) -> None:
        self._ended.set()

    def close(self) -> None:
        self.end()
        self.drained.set()
        self._descriptor.close()


class _FifoOutput:
    """The write end of a FIFO. A reader that does not read stalls the process in the guest."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), ours=True)
        try:
            self._look = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never read from; outlives close()
        except OSError:
            self.close()
            raise

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._descriptor.write(view) :]

    async def wait_read(self) -> None:
        """Wait until the reader has everything: on exit containerd 1.6 discards what it has not read. A reader that
        reads nothing for a second is not waited for."""
        deadline = time.monotonic() + OUTPUT_READ_S
        while self._unread() and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody tells that a pipe is empty
            await asyncio.sleep(OUTPUT_POLL_S)

    async def finish(self) -> None:
        """Called once, when everything has been written."""
        try:
            await self.wait_read()
        finally:
            os.close(self._look)

    def _unread(self) -> int:
        count = array.array("i", [0])
        fcntl.ioctl(self._look, termios.FIONREAD, count)
        return count[0]

    def close(self) -> None:
        self._descriptor.close()


class _File:
    """A file that is appended to. What cannot be written is lost: a full disk must not end the process."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._open = True
        self._complete = True

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._write_all, data)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as exc:
            if self._complete:
                log.warning("the output in %s is not complete: %s", self._path, exc.strerror)
            self._complete = False

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)


class _Pipe:
    """Our end of a pipe to a logging program. Output that the program no longer reads is lost."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._descriptor = Descriptor(fd, ours=True)
        self._broken = False

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._broken:
            try:
                view = view[await self._descriptor.write(view) :]
            except BrokenPipeError:
                self._broken = True

    def close(self) -> None:
        self._descriptor.close()


class Streams:
    """The streams of one process, open."""

    def __init__(self, stdin: Source | None, stdout: Sink, stderr: Sink) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr

    def end_input(self) -> None:
        """CloseIO: what was written before it is still read."""
        if isinstance(self.stdin, FifoInput):
            self.stdin.end()

    async def wait_output_read(self) -> None:
        """Wait until what has been written so far has been read, or nobody reads."""
        for sink in (self.stdout, self.stderr):
            if isinstance(sink, _FifoOutput):
                await sink.wait_read()

    async def wait_input_read(self, limit_s: float) -> None:
        if isinstance(self.stdin, FifoInput):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self.stdin.drained.wait()


@contextlib.asynccontextmanager
async def open_streams(uris: IoUris, container_id: str, namespace: str) -> AsyncIterator[Streams]:
    """Open the streams of a process; at the end of the block they are closed, and a logging program gets time to exit.

    Raises UsageError for an unknown scheme, NotFound and KatapodError for what cannot be opened.
    """
    async with contextlib.AsyncExitStack() as stack:
        stdin: Source | None = None
        if uris.stdin:
            opened = _open(uris.stdin, _open_input)
            stack.callback(opened.close)
            stdin = opened
        if uris.stdout.startswith("binary:"):
            stdout, stderr = await stack.enter_async_context(_logging_program(uris, container_id, namespace))
        else:
            stdout = _open_until_read(stack, uris.stdout)
            stderr = _open_until_read(stack, uris.stderr)
        yield Streams(stdin, stdout, stderr)


def _open(uri: str, opener: Callable[[str], _Opened]) -> _Opened:
    try:
        return opener(uri)
    except ValueError as exc:  # no URI, or a path with a NUL
        raise UsageError(f"cannot open the stream {uri!r}: {exc}") from exc
    except FileNotFoundError as exc:
        raise NotFound(f"cannot open the stream {uri}: {exc.strerror}") from exc
    except OSError as exc:
        raise KatapodError(f"cannot open the stream {uri}: {exc.strerror}") from exc


def _open_input(uri: str) -> FifoInput:
    path = _path_of(uri, ("", "fifo"))
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        raise UsageError(f"cannot read standard input from {uri}: it is not a FIFO")
    return FifoInput(path)


def _open_until_read(stack: contextlib.AsyncExitStack, uri: str) -> Sink:
    sink = _open(uri, _open_output)
    stack.callback(sink.close)
    if isinstance(sink, _FifoOutput):
        stack.push_async_callback(sink.finish)
    return sink


def _open_output(uri: str) -> Sink:
    if not uri:
        return NullSink()
    path = _path_of(uri, ("", "fifo", "file"))
    return _File(path) if urlsplit(uri).scheme == "file" else _FifoOutput(path)


def _path_of(uri: str, schemes: tuple[str, ...]) -> str:
    parts = urlsplit(uri)
    if parts.scheme not in schemes:
        raise UsageError(f"cannot open the stream {uri}: use a FIFO, file:///PATH or binary:///PROGRAM")
    if not parts.scheme:
        return uri  # a plain path: nothing in it is quoted
    if not parts.path.startswith("/"):
        raise UsageError(f"cannot open the stream {uri}: the path is not absolute")
    return unquote(parts.path)


@contextlib.asynccontextmanager
async def _logging_program(uris: IoUris, container_id: str, namespace: str) -> AsyncIterator[tuple[Sink, Sink]]:
    """Start the program of binary:///PROGRAM?KEY=VALUE, with KEY VALUE as arguments and the streams as descriptors 3
    and 4; it closes 5 when it is ready. Raises KatapodError."""
    parts = _open(uris.stdout, urlsplit)
    program = unquote(parts.path)
    if not program.startswith("/") or "\0" in uris.stdout or "\0" in program:
        raise UsageError(f"cannot open the stream {uris.stdout!r}: the path is not absolute")
    words = [word for pair in parse_qsl(parts.query, keep_blank_values=True) for word in pair if word]
    async with contextlib.AsyncExitStack() as stack:
        ours: list[int] = []
        theirs: dict[int, int] = {}
        with contextlib.ExitStack() as handed:
            for number in LOGGER_FDS:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                own, other = (reader, writer) if number == LOGGER_FDS[2] else (writer, reader)
                ours.append(own)
                theirs[number] = other
                handed.callback(os.close, other)
            stdout, stderr = _Pipe(ours[0]), _Pipe(ours[1])
            ready = Descriptor(ours[2], ours=True)
            os.set_blocking(ours[2], False)
            for end in (stdout, stderr, ready):
                stack.callback(end.close)
            null = stack.enter_context(open(os.devnull, "wb"))
            environment = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
            child = await spawn([program, *words], output=null, fds_as=theirs, env=environment)
        stack.push_async_callback(stop_child, child)
        try:
            async with asyncio.timeout(LOGGER_READY_S):
                await ready.read(1)
        except TimeoutError as exc:
            raise KatapodError(f"cannot start {program}: it was not ready within {LOGGER_READY_S:g} s") from exc
        yield stdout, stderr
        stdout.close()
        stderr.close()
        await _wait_end(child)


async def _wait_end(child: Child) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOGGER_END_S):
            await child.process.wait()
