"""One process of a container: its stdio, terminal and exit.

Nothing is read from a process before the host asks, so without a reader the process blocks on its pipe and no output is
lost; a write is answered when all of it is in the pipe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios

from katapod.agent.loop import Future, Lock, Loop
from katapod.rpc.status import RpcError, StatusCode

__all__ = ["DRAIN_S", "READ_MAX", "Process", "Stdio", "open_streams", "read_stdio", "write_stdin"]

READ_MAX = 256 * 1024  # bytes of one ReadStdout, however many are asked for
DRAIN_S = 0.5  # how long after the exit of a process its output is read if other processes keep it open


class Output:
    """The read end of stdout, stderr or a terminal."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.at_end = False
        self.lock = Lock()


class Stdio:
    """The agent's ends of a process's streams. Owns the descriptors."""

    def __init__(self, loop: Loop, stdin: int, stdout: int, stderr: int, terminal: bool) -> None:
        """With a terminal, stdin and stdout are both the master's descriptor and stderr is -1."""
        self._loop = loop
        self.terminal = terminal
        self.stdin = stdin
        self.stdin_lock = Lock()
        self.stdout = Output(stdout)
        self.stderr = Output(stderr) if stderr >= 0 else None
        for fd in {stdin, stdout, stderr} - {-1}:
            os.set_blocking(fd, False)

    def close_stdin(self) -> None:
        """Idempotent. A terminal stays open: its end of input is typed."""
        if not self.terminal and self.stdin >= 0:
            self._loop.close_fd(self.stdin)
            self.stdin = -1

    def close(self) -> None:
        self.close_stdin()
        self.stdin = -1
        for output in (self.stdout, self.stderr):
            if output is not None and output.fd >= 0:
                self._loop.close_fd(output.fd)
                output.fd = -1
                output.at_end = True

    @property
    def drained(self) -> bool:
        return self.stdout.at_end and (self.stderr is None or self.stderr.at_end)

    def resize(self, rows: int, columns: int) -> None:
        """Raises RpcError (UNAVAILABLE) if there is no terminal."""
        if not self.terminal:
            raise RpcError(StatusCode.UNAVAILABLE, "cannot resize the terminal: the process has none")
        size = struct.pack("HHHH", min(rows, 0xFFFF), min(columns, 0xFFFF), 0, 0)
        fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, size)


def open_streams(loop: Loop, pipe_size_bytes: int) -> tuple[Stdio, tuple[int, int, int]]:
    """Three pipes: our ends, and descriptors 0 to 2 for the container, which the caller closes."""
    theirs_in, ours_in = os.pipe2(os.O_CLOEXEC)
    ours_out, theirs_out = os.pipe2(os.O_CLOEXEC)
    ours_err, theirs_err = os.pipe2(os.O_CLOEXEC)
    if pipe_size_bytes:
        for fd in (ours_in, ours_out, ours_err):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, pipe_size_bytes)
    return Stdio(loop, ours_in, ours_out, ours_err, terminal=False), (theirs_in, theirs_out, theirs_err)


class Process:
    """A process that runs in a container (its init, or an exec)."""

    def __init__(self, exec_id: str, pid: int, stdio: Stdio, wait_status: Future) -> None:
        self.exec_id = exec_id
        self.pid = pid
        self.stdio = stdio
        self.waited = False  # WaitProcess has delivered its exit status: only its output may still be read
        self.readers = 0  # calls that wait for output
        self.ended = Future()  # the exit status, or 128 + signal
        self._wait_status = wait_status
        wait_status.on_done(self._on_exit)

    def _on_exit(self) -> None:
        code = os.waitstatus_to_exitcode(self._wait_status.result())
        self.stdio.close_stdin()
        self.ended.set(code if code >= 0 else 128 - code)

    def kill(self, number: int) -> None:
        """Send a signal; it is not an error if the process has ended. Raises OSError, RpcError."""
        if self.ended.done:
            return
        if not 0 < number <= 64:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot signal: invalid signal {number}")
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


async def read_stdio(loop: Loop, process: Process, output: Output, size: int, drain_s: float | None = DRAIN_S) -> bytes:
    """Up to `size` bytes; blocks; empty at the end of the stream, which is when all writers have closed it, or
    `drain_s` after the exit of the process if nothing more is written (None: never)."""
    process.readers += 1
    try:
        return await _read(loop, process, output, size, drain_s)
    finally:
        process.readers -= 1


async def _read(loop: Loop, process: Process, output: Output, size: int, drain_s: float | None) -> bytes:
    size = max(1, min(size, READ_MAX))
    async with output.lock:
        while not output.at_end:
            try:
                data = os.read(output.fd, size)
            except BlockingIOError:
                if not await _more_may_come(loop, process, output.fd, drain_s):
                    data = b""
                else:
                    continue
            except OSError as exc:
                if exc.errno != errno.EIO:  # EIO: the terminal has been closed by all
                    raise
                data = b""
            if data:
                return data
            output.at_end = True
    return b""


async def _more_may_come(loop: Loop, process: Process, fd: int, drain_s: float | None) -> bool:
    if process.ended.done or drain_s is None:
        return await loop.readable(fd, drain_s)
    readable = Future()

    # Output, or the exit of the process, after which drain_s remains.
    waiter = loop.watch_readable(fd, readable)
    try:
        await loop.wait_any([readable, process.ended])
    finally:
        waiter()
    return readable.done or await loop.readable(fd, drain_s)


async def write_stdin(loop: Loop, process: Process, data: bytes) -> int:
    """Write all of `data`; empty data closes stdin. Raises RpcError (FAILED_PRECONDITION) if it is closed."""
    stdio = process.stdio
    async with stdio.stdin_lock:
        if not data:
            stdio.close_stdin()
            return 0
        view = memoryview(data)
        while view:
            if stdio.stdin < 0 or process.ended.done:
                raise RpcError(StatusCode.FAILED_PRECONDITION, "cannot write to stdin: it is closed")
            try:
                view = view[os.write(stdio.stdin, view) :]
            except BlockingIOError:
                await loop.writable(stdio.stdin)
            except (BrokenPipeError, OSError) as exc:
                if exc.errno not in (errno.EPIPE, errno.EIO):
                    raise
                raise RpcError(
                    StatusCode.FAILED_PRECONDITION, "cannot write to stdin: the process has closed it"
                ) from exc
        return len(data)
