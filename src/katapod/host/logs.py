"""Size-limited files for streams without an end: guest consoles, VMM logs, container output."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from katapod.model.plain import console_text
from katapod.tasks import beside

__all__ = ["BoundedLog", "KeptPipe", "kept_pipe", "kept_socket", "read_tail"]

log = logging.getLogger(__name__)

LAST_WORDS_S = 0.5


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


class BoundedLog:
    """Keeps the newest `limit_bytes` of what is written, in two files: PATH and PATH.1 (the older half).

    Whoever writes may be hostile: the bytes are stored as they are and never parsed here.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self._half = max(4096, limit_bytes // 2)
        self._fd = _open(path)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append. Raises OSError (no space): what was not written is lost, later data is taken again."""
        for start in range(0, len(data), self._half):
            piece = memoryview(data)[start : start + self._half]
            if self._size + len(piece) > self._half:
                self._rotate()
            while piece:
                written = os.write(self._fd, piece)
                self._size += written
                piece = piece[written:]

    def _rotate(self) -> None:
        self._follow()
        with contextlib.suppress(FileNotFoundError):  # an earlier attempt came as far as this
            os.replace(self.path, f"{self.path}.1")
        fresh = _open(self.path)  # before the old one is closed: its number must not come to mean another file
        os.close(self._fd)
        self._fd, self._size = fresh, 0

    def _follow(self) -> None:
        """A log may have been moved since it was opened: a machine of the pool got another name."""
        place = Path(os.readlink(f"/proc/self/fd/{self._fd}"))
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(place), os.fstat(self._fd)):
                self.path = place

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_tail(path: Path, max_bytes: int = 4096, max_lines: int = 20) -> str:
    """Return the last lines of a bounded log as text fit for a terminal: control characters are dropped."""
    data = b""
    for part in (Path(f"{path}.1"), path):
        with contextlib.suppress(FileNotFoundError), part.open("rb") as handle:
            handle.seek(max(0, part.stat().st_size - max_bytes))
            data += handle.read(max_bytes)
    lines = console_text(data[-max_bytes:]).split("\n")
    return "\n".join([line for line in lines if line.strip()][-max_lines:])


class KeptPipe:
    """A pipe whose bytes end up in a bounded log. A child gets `write_end`; then ours is closed."""

    def __init__(self, write_end: int) -> None:
        self.write_end = write_end
        self.draining: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Close our copy of the write end. Idempotent."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    async def wait_end(self, limit_s: float) -> None:
        """Wait until all who have the write end are gone and their words are in the log, or the limit is reached."""
        if self.draining is not None:
            await asyncio.wait({self.draining}, timeout=limit_s)


@contextlib.asynccontextmanager
async def kept_pipe(path: Path, limit_bytes: int) -> AsyncIterator[KeptPipe]:
    """Keep in a bounded log what is written to the pipe while the block runs. Raises OSError."""
    with contextlib.closing(BoundedLog(path, limit_bytes)) as sink:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        pipe = KeptPipe(write_end)
        reader = asyncio.StreamReader()
        try:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", 0)
            )
            try:
                async with _draining(_drain(reader, sink), path.name) as pipe.draining:
                    with contextlib.closing(pipe):
                        yield pipe
            finally:
                transport.close()
        finally:
            pipe.close()


@contextlib.asynccontextmanager
async def kept_socket(
    sock: socket.socket, path: Path, limit_bytes: int, hear: Callable[[bytes], None] | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    """Keep in a bounded log what arrives on `sock`, which is closed at the end. The task ends when all who have its
    other end are gone and their words are in the log. `hear` is given it, too, and must raise nothing. Raises
    OSError."""
    with sock, contextlib.closing(BoundedLog(path, limit_bytes)) as sink:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        try:
            async with _draining(_drain(reader, sink, hear), path.name) as draining:
                yield draining
        finally:
            writer.transport.abort()


async def _drain(reader: asyncio.StreamReader, sink: BoundedLog, hear: Callable[[bytes], None] | None = None) -> None:
    warned = False
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            if hear is not None:
                hear(data)
            try:
                sink.write(data)
            except OSError as exc:  # a full disk must not stop the writer
                level = logging.DEBUG if warned else logging.WARNING
                log.log(level, "cannot keep %d bytes in %s: %s", len(data), sink.path, exc.strerror)
                warned = True


@contextlib.asynccontextmanager
async def _draining(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Run `work` beside the block; at its end let it see the end of its stream, then end it."""
    async with beside(work, name=f"keep-{name}") as task:
        try:
            yield task
        finally:
            await asyncio.wait({task}, timeout=LAST_WORDS_S)
