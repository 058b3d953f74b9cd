"""The ends of a process's streams at the caller's side: bytes in memory, or a descriptor of the caller's.

No end keeps more than BUFFER_MAX: who does not read stalls the writer in the guest, and who writes faster than the
guest reads is made to wait.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import IO, TypeAlias, TypeVar

from katapod.model.errors import UsageError
from katapod.sandbox.stdio import InputFd, NullSink, OutputFd, Sink, Source

__all__ = ["PIPE", "InputWriter", "OutputReader", "Stream", "open_input", "open_output"]

_End = TypeVar("_End", InputFd, OutputFd)

BUFFER_MAX = 256 * 1024

PIPE: int = asyncio.subprocess.PIPE
"""In place of a stream: bytes to and from this program, as in asyncio.create_subprocess_exec."""

Stream: TypeAlias = int | IO[bytes] | IO[str] | None
"""PIPE, a descriptor, or a file that has one; None: no input, or output that is thrown away."""


class OutputReader:
    """What a process writes. Iteration gives its lines."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended = False
        self._abandoned = False
        self._more = asyncio.Event()
        self._room = asyncio.Event()

    # the supervisor's side

    async def write(self, data: bytes) -> None:
        while len(self._buffer) >= BUFFER_MAX and not self._abandoned:
            self._room.clear()
            await self._room.wait()
        if not self._abandoned:
            self._buffer += data
            self._more.set()

    def close(self) -> None:
        self._ended = True
        self._more.set()

    def abandon(self) -> None:
        """Nobody reads it any more: what comes is thrown away, and stalls nobody."""
        self._abandoned = True
        self._room.set()

    # the caller's side

    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end; without a size all that comes until the end."""
        if size >= 0:
            await self._wait_for_more(1)
            return self._take(size)
        parts = []
        while part := await self.read(BUFFER_MAX):
            parts.append(part)
        return b"".join(parts)

    async def readline(self) -> bytes:
        """A line with its end; at the end of the stream what is left, then nothing. One longer than BUFFER_MAX comes in
        parts."""
        seen = 0
        while (place := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if seen >= BUFFER_MAX or not await self._wait_for_more(seen + 1):
                return self._take(len(self._buffer))
        return self._take(place + 1)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line

    async def _wait_for_more(self, size: int) -> bool:
        """Whether there are `size` bytes; waits until there are, or the end has come."""
        while len(self._buffer) < size and not self._ended:
            self._more.clear()
            await self._more.wait()
        return len(self._buffer) >= size

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._room.set()
        return data


class InputWriter:
    """What a process reads."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended = False  # by the caller
        self._broken = False  # nobody reads it any more
        self._more = asyncio.Event()
        self._room = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Pass `data` on, waiting for the process where it reads slowly. Raises BrokenPipeError if it has ended."""
        view = memoryview(data)
        while view:
            if self._broken or self._ended:
                raise BrokenPipeError("the process does not read its input any more")
            if room := BUFFER_MAX - len(self._buffer):
                self._buffer += view[:room]
                view = view[room:]
                self._more.set()
            else:
                self._room.clear()
                await self._room.wait()

    def close(self) -> None:
        """The end of the input: the process reads what was written before, then end of file. Idempotent."""
        self._ended = True
        self._more.set()

    # the supervisor's side

    async def read(self, size: int) -> bytes:
        while not self._buffer and not self._ended:
            self._more.clear()
            await self._more.wait()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._room.set()
        return data

    def break_off(self) -> None:
        self._broken = True
        self._room.set()


def open_input(stream: Stream, stack: contextlib.ExitStack) -> Source | None:
    """Raises UsageError. What it opens is closed with `stack`."""
    if stream is None:
        return None
    if stream == PIPE:
        writer = InputWriter()
        stack.callback(writer.break_off)
        return writer
    source = _opened(InputFd, stream, "stdin")
    stack.callback(source.close)
    return source


def open_output(stream: Stream, name: str, stack: contextlib.ExitStack) -> Sink:
    """Raises UsageError. What it opens is closed with `stack`, if its process has not closed it."""
    if stream is None:
        return NullSink()
    if stream == PIPE:
        reader = OutputReader()
        stack.callback(reader.close)
        return reader
    sink = _opened(OutputFd, stream, name)
    stack.callback(sink.close)
    return sink


def _opened(kind: Callable[[int], _End], stream: int | IO[bytes] | IO[str], name: str) -> _End:
    try:
        return kind(stream if isinstance(stream, int) else stream.fileno())
    except (AttributeError, OSError, ValueError) as exc:  # io.BytesIO, a closed file, a number that is none
        raise UsageError(
            f"cannot use {stream!r} as {name}: it has no descriptor that is open", hint="use PIPE"
        ) from exc
