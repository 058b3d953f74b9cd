"""A process in a container, and what became of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

from msgspec import Struct

from katapod.api.options import signal_number
from katapod.api.streams import InputWriter, OutputReader, Stream, open_input, open_output
from katapod.model.errors import KatapodError
from katapod.sandbox.stdio import GuestProcess, Sink, Source
from katapod.tasks import beside, end_tasks, finish

__all__ = ["OUTPUT_MAX", "CommandFailed", "Completed", "Ends", "Process", "checked", "following", "open_ends"]

OUTPUT_MAX = 64 * 1024 * 1024  # bytes of each stream that are kept in memory
END_LIMIT_S = 10.0  # for a killed process to be gone


class CommandFailed(KatapodError):
    """A command that was to succeed has ended with another status than zero: that of `completed`."""

    def __init__(self, what: str, completed: "Completed") -> None:
        super().__init__(what)
        self.completed = completed


class Completed(Struct, frozen=True):
    """A process that has ended. `exit_code`: 128 + N if signal N killed it. `oom_killed`: its container's memory limit
    did."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    oom_killed: bool = False

    @property
    def text(self) -> str:
        """Its standard output; what is no UTF-8 is replaced."""
        return self.stdout.decode(errors="replace")


def checked(done: Completed, command: tuple[str, ...]) -> Completed:
    """Itself. Raises CommandFailed if the status is not zero."""
    if done.exit_code == 0:
        return done
    said = done.stderr.decode(errors="replace").strip()[-500:]
    why = "its memory limit killed it" if done.oom_killed else f"status {done.exit_code}"
    shown = " ".join(command) or "the image's command"
    raise CommandFailed(f"cannot run {shown}: {why}{f': {said}' if said else ''}", done)


class Ends(Struct, frozen=True):
    """The streams of a process: for the supervisor, and what of them the caller has."""

    source: Source | None
    out: Sink
    err: Sink

    def abandon(self) -> None:
        for end in (self.out, self.err):
            if isinstance(end, OutputReader):
                end.abandon()


@contextlib.contextmanager
def open_ends(stdin: Stream, stdout: Stream, stderr: Stream) -> Iterator[Ends]:
    """While the block runs. Raises UsageError."""
    with contextlib.ExitStack() as stack:
        yield Ends(open_input(stdin, stack), open_output(stdout, "stdout", stack), open_output(stderr, "stderr", stack))


class Process:
    """A process that this program has started in a container; `stdin`, `stdout` and `stderr` are there where PIPE was
    asked for. With a terminal all output is in `stdout`."""

    def __init__(
        self,
        guest: GuestProcess,
        ends: Ends,
        following: "asyncio.Task[int]",
        send: Callable[[int], Awaitable[None]],
        guard: Callable[[Coroutine[Any, Any, None]], Awaitable[None]],
    ) -> None:
        self.stdin = ends.source if isinstance(ends.source, InputWriter) else None
        self.stdout = ends.out if isinstance(ends.out, OutputReader) else None
        self.stderr = ends.err if isinstance(ends.err, OutputReader) else None
        self._guest = guest
        self._following = following
        self._send = send
        self._guard = guard

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and if its sandbox has died before it: then `wait` tells why."""
        task = self._following
        return task.result() if task.done() and not task.cancelled() and task.exception() is None else None

    async def wait(self) -> int:
        """Its exit code, once it has ended and all its output has been passed on: 128 + N if signal N killed it.

        A PIPE that nobody reads is full at some time, and the process never ends then. Raises KatapodError if its
        sandbox died.
        """
        await asyncio.wait({self._following})
        if self._following.cancelled():
            raise KatapodError("cannot wait for the process: its container has been closed")
        return self._following.result()

    async def kill(self, signal: int | str = "KILL") -> None:
        """Send a signal, by name or number. Raises UsageError; KatapodError if it has ended."""
        await self._send(signal_number(signal))

    async def resize(self, rows: int, columns: int) -> None:
        """The size of its terminal. Raises KatapodError."""
        await self._guard(self._guest.resize(rows, columns))

    async def communicate(self, input: bytes = b"") -> tuple[bytes, bytes]:
        """Write `input`, and read all output until the process has ended: standard output and error, each empty where
        it is no PIPE. Raises KatapodError if its sandbox died, or one stream has more than OUTPUT_MAX bytes."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed(input), name="feed")
            out = group.create_task(_keep(self.stdout), name="keep-stdout")
            err = group.create_task(_keep(self.stderr), name="keep-stderr")
        await self.wait()
        for kept in (out.result(), err.result()):
            if kept is None:
                raise KatapodError(f"cannot keep the output of a process: it is more than {OUTPUT_MAX >> 20} MiB")
        return out.result() or b"", err.result() or b""

    async def _feed(self, data: bytes) -> None:
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # as with subprocess: it need not read all
                await self.stdin.write(data)
            self.stdin.close()


async def _keep(reader: OutputReader | None) -> bytes | None:
    """All of it; None if that is more than OUTPUT_MAX, and the rest is thrown away."""
    kept = bytearray()
    while reader is not None and (data := await reader.read(OUTPUT_MAX)):
        if len(kept) + len(data) > OUTPUT_MAX:
            reader.abandon()
            return None
        kept += data
    return bytes(kept)


@contextlib.asynccontextmanager
async def following(
    process: Callable[["asyncio.Task[int]"], Process], work: Coroutine[Any, Any, int], ends: Ends
) -> AsyncIterator[Process]:
    """A process whose streams are carried by `work` while the block runs. If it has not ended then it is killed."""
    async with beside(work, name="carry", may_fail=True) as task:
        made = process(task)
        try:
            yield made
        finally:
            ends.abandon()
            if not task.done():
                await finish(_end(made, task), name="end-process")


async def _end(process: Process, task: "asyncio.Task[int]") -> None:
    with contextlib.suppress(KatapodError):
        await process.kill()

    await asyncio.wait({task}, timeout=END_LIMIT_S)
    await end_tasks({task})
