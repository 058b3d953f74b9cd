"""Bytes between our descriptors and a guest: real files, pipes, sockets and terminals; a guest made of a list."""

import asyncio
import errno
import fcntl
import os
import pty
import socket
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katapod.host.logs import BoundedLog
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.pb import agent_pb2
from katapod.rpc.server import serve_ttrpc
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox import stdio
from katapod.sandbox.stdio import LINE_MAX, GuestProcess, InputFd, LogSink, NullSink, OutputFd, TeeSink, carry

Pair = tuple[int, int]  # what is read from, what is written to


def pipe_pair() -> Pair:
    return os.pipe()


def socket_pair() -> Pair:
    first, second = socket.socketpair()
    return first.detach(), second.detach()


def terminal_pair() -> Pair:
    """What is written to the terminal's slave is read from its master."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    return master, slave


PAIRS = [pipe_pair, socket_pair, terminal_pair]
Opener = Callable[[], Pair]


@pytest.fixture(params=PAIRS, ids=lambda opener: opener.__name__)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    opener: Opener = request.param
    ends = opener()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError as exc:
            assert exc.errno == errno.EBADF  # noqa: PT017 - the test has closed it


def is_nonblocking(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)


async def read_all(fd: int, size: int) -> bytes:
    def work() -> bytes:
        data = b""
        while len(data) < size and (piece := os.read(fd, size - len(data))):
            data += piece
        return data

    return await asyncio.to_thread(work)


async def test_what_is_written_arrives_and_the_caller_keeps_its_flags(pair: Pair) -> None:
    """O_NONBLOCK would be seen by all who share the descriptor: the shell that started us, for one."""
    reader, writer = pair
    data = os.urandom(1_000_000)
    sink = OutputFd(writer)
    assert not is_nonblocking(writer)
    reading = asyncio.create_task(read_all(reader, len(data)))
    async with asyncio.timeout(60):
        await sink.write(data)
        assert await reading == data
    sink.close()
    sink.close()
    assert not is_nonblocking(writer)
    os.fstat(writer)


async def test_who_does_not_read_stalls_the_writer_but_not_the_loop(pair: Pair) -> None:
    _, writer = pair
    sink = OutputFd(writer)
    writing = asyncio.create_task(sink.write(bytes(2_000_000)))
    await asyncio.sleep(0.05)  # a loop that is blocked does not come back from it
    assert not writing.done()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    sink.close()


@pytest.mark.parametrize("opener", [pipe_pair, socket_pair])
async def test_without_a_second_opening_the_loop_is_not_blocked_either(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's pipe, or no /proc: the descriptor itself is used, and it blocks."""
    reader, writer = opener()

    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        sink, source = OutputFd(writer), InputFd(reader)
    while True:  # full, in small steps: a pipe then has pages that are not full
        os.set_blocking(writer, False)
        try:
            os.write(writer, b"x" * 1000)
        except BlockingIOError:
            break
        finally:
            os.set_blocking(writer, True)
    writing = asyncio.create_task(sink.write(b"y" * 100_000))
    await asyncio.sleep(0.05)  # a loop that is blocked does not come back from it
    got = b""
    async with asyncio.timeout(60):
        while not got.endswith(b"y" * 100_000):
            got += await source.read(65536)
        await writing
    sink.close()
    source.close()
    os.close(reader)
    os.close(writer)


async def test_nobody_will_ever_read(pair: Pair) -> None:
    reader, writer = pair
    sink = OutputFd(writer)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        await sink.write(bytes(100_000))
    sink.close()


async def test_the_reader_leaves_while_we_wait(pair: Pair) -> None:
    reader, writer = pair
    sink = OutputFd(writer)
    writing = asyncio.create_task(sink.write(bytes(2_000_000)))
    await asyncio.sleep(0.02)
    os.close(reader)
    async with asyncio.timeout(60):
        with pytest.raises(BrokenPipeError):
            await writing
    sink.close()


@pytest.mark.parametrize("opener", [pipe_pair, socket_pair])
async def test_a_source_waits_and_ends(opener: Opener) -> None:
    reader, writer = opener()
    source = InputFd(reader)
    assert not is_nonblocking(reader)
    reading = asyncio.create_task(source.read(100))
    await asyncio.sleep(0.02)
    assert not reading.done()
    os.write(writer, b"data")
    assert await reading == b"data"
    os.close(writer)
    assert await source.read(100) == b""
    assert not is_nonblocking(reader)
    source.close()
    os.close(reader)


async def test_a_terminal_as_source_and_its_hang_up() -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    source = InputFd(slave)
    os.write(master, b"typed")
    assert await source.read(100) == b"typed"
    assert not is_nonblocking(slave)
    os.close(master)
    async with asyncio.timeout(60):
        assert await source.read(100) == b""
    source.close()
    os.close(slave)


async def test_a_cancelled_read_leaves_the_data() -> None:
    reader, writer = os.pipe()
    source = InputFd(reader)
    reading = asyncio.create_task(source.read(100))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    os.write(writer, b"kept")
    assert await source.read(100) == b"kept"
    source.close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/full"])
async def test_devices_that_cannot_be_polled(path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    source, sink = InputFd(fd), OutputFd(fd)
    async with asyncio.timeout(60):
        assert len(await source.read(10)) == (0 if path == "/dev/null" else 10)
        if path == "/dev/full":
            with pytest.raises(OSError, match="No space"):
                await sink.write(b"x")
        else:
            await sink.write(b"x" * 100)
    source.close()
    sink.close()
    os.close(fd)


async def test_files_keep_their_place(tmp_path: Path) -> None:
    """`(kata-runtime run ...; echo more) > file`: one place in the file, shared with the shell."""
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"before ")
    sink = OutputFd(fd)
    await sink.write(b"ours ")
    sink.close()
    os.write(fd, b"after")
    assert (tmp_path / "f").read_bytes() == b"before ours after"
    os.lseek(fd, 7, os.SEEK_SET)
    source = InputFd(fd)
    assert await source.read(4) == b"ours"
    source.close()
    assert os.read(fd, 100) == b" after"
    os.close(fd)


# container logs


def logged(path: Path) -> list[tuple[str, str, str]]:
    """(stream, tag, text) of each line; the time must be one."""
    found = []
    for line in path.read_text().splitlines():
        stamp, stream, tag, text = line.split(" ", 3)
        time.strptime(stamp.partition(".")[0], "%Y-%m-%dT%H:%M:%S")
        assert len(stamp) == len("2026-01-01T00:00:00.123456789Z")
        found.append((stream, tag, text))
    return found


async def test_log_lines(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 1 << 20)
    out, err = LogSink(log, "stdout"), LogSink(log, "stderr")
    await out.write(b"one\ntw")
    await err.write(b"problem\n")
    await out.write(b"o\n\nrest")
    out.close()
    err.close()
    log.close()
    assert logged(tmp_path / "log") == [
        ("stdout", "F", "one"),
        ("stderr", "F", "problem"),
        ("stdout", "F", "two"),
        ("stdout", "F", ""),
        ("stdout", "P", "rest"),
    ]


@pytest.mark.parametrize("length", [LINE_MAX - 1, LINE_MAX, LINE_MAX + 1, 3 * LINE_MAX, 3 * LINE_MAX + 5])
@pytest.mark.parametrize("step", [1000, 1 << 20])
async def test_long_lines_come_in_parts(tmp_path: Path, length: int, step: int) -> None:
    log = BoundedLog(tmp_path / "log", 1 << 20)
    sink = LogSink(log, "stdout")
    data = b"x" * length + b"\nend\n"
    for start in range(0, len(data), step):
        await sink.write(data[start : start + step])
        assert len(sink._rest) < LINE_MAX
    sink.close()
    log.close()
    lines = logged(tmp_path / "log")
    assert "".join(text for _, tag, text in lines[:-1]) == "x" * length
    assert [tag for _, tag, _ in lines[:-2]] == ["P"] * (len(lines) - 2)
    assert [tag for _, tag, _ in lines[-2:]] == ["F", "F"]
    assert all(len(text) <= LINE_MAX for _, _, text in lines)


async def test_a_full_disk_does_not_stop_the_container(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    log = BoundedLog(tmp_path / "log", 1 << 20)
    sink = LogSink(log, "stdout")
    for _ in range(3):
        await sink.write(b"line\n")
    sink.close()
    log.close()
    assert [entry.getMessage() for entry in caplog.records] == [
        f"the log {tmp_path}/log is not complete: No space left on device"
    ]


# a guest


class Guest:
    """The agent's side of streams: reads what it is given, and says what it is told to."""

    def __init__(self, output: list[bytes], *, takes: int = 1 << 30, status: int = 0) -> None:
        self.output = output
        self.takes = takes
        self.status = status
        self.stdin = b""
        self.stdin_closed = asyncio.Event()
        self.ended = asyncio.Event()
        self.refuse_stdin: RpcError | None = None

    async def handle(self, service: str, method: str, payload: bytes) -> bytes:
        if method == "WriteStdin":
            if self.refuse_stdin:
                raise self.refuse_stdin
            data = agent_pb2.WriteStreamRequest.FromString(payload).data
            self.stdin += data[: self.takes]
            return agent_pb2.WriteStreamResponse(len=min(len(data), self.takes)).SerializeToString()
        if method == "CloseStdin":
            self.stdin_closed.set()
        elif method == "ReadStdout":
            if self.output:
                return agent_pb2.ReadStreamResponse(data=self.output.pop(0)).SerializeToString()
            await self.stdin_closed.wait()
        elif method == "WaitProcess":
            return agent_pb2.WaitProcessResponse(status=self.status).SerializeToString()
        return b""

    async def connect(self) -> tuple[GuestProcess, Callable[[], None]]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("")  # an abstract name of the kernel's choice
        listener.listen(1)
        address = listener.getsockname()
        server = await serve_ttrpc(listener, self.handle)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(address)
        client = await TtrpcClient.on_socket(sock, "the guest")

        def close() -> None:
            client.close()
            server.close()

        return GuestProcess(AgentClient(client), "c1", "c1", terminal=False), close


class Kept:
    def __init__(self) -> None:
        self.data = b""
        self.closed = 0

    async def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        self.closed += 1


async def carry_with(guest: Guest, stdin: InputFd | None, stdout: stdio.Sink) -> int:
    process, close = await guest.connect()
    try:
        async with asyncio.timeout(60):
            return await carry(process, stdin, stdout, NullSink())
    finally:
        close()
        await asyncio.sleep(0.01)


async def test_carry_to_the_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"input")
    os.close(writer)
    guest, out = Guest([b"a", b"b" * 300_000], status=7), Kept()
    tee = TeeSink(out, NullSink())
    assert await carry_with(guest, InputFd(reader), tee) == 7
    assert (guest.stdin, out.data, out.closed) == (b"input", b"a" + b"b" * 300_000, 1)
    os.close(reader)


async def test_without_stdin_it_is_closed_at_once() -> None:
    guest = Guest([])
    assert await carry_with(guest, None, NullSink()) == 0
    assert guest.stdin_closed.is_set()


async def test_a_guest_that_takes_little_at_a_time_gets_all() -> None:
    """WriteStdin answers with what it took, which may be less than it was given."""
    reader, writer = os.pipe()
    os.write(writer, b"0123456789")
    os.close(writer)
    guest = Guest([], takes=3)
    assert await carry_with(guest, InputFd(reader), NullSink()) == 0
    assert guest.stdin == b"0123456789"
    os.close(reader)


async def test_a_guest_that_takes_nothing_does_not_keep_us_busy() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"data")
    os.close(writer)
    guest = Guest([], takes=0)
    guest.stdin_closed.set()
    assert await carry_with(guest, InputFd(reader), NullSink()) == 0
    os.close(reader)


async def test_a_process_that_closed_its_stdin_is_no_error() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"data")
    guest = Guest([])
    guest.refuse_stdin = RpcError(StatusCode.INVALID_ARGUMENT, "broken pipe")
    guest.stdin_closed.set()
    assert await carry_with(guest, InputFd(reader), NullSink()) == 0
    os.close(reader)
    os.close(writer)


async def test_a_directory_as_stdin_is_an_empty_one(caplog: pytest.LogCaptureFixture) -> None:
    """`kata-runtime run -i busybox cat < /tmp`."""
    fd = os.open("/", os.O_RDONLY)
    guest = Guest([])
    assert await carry_with(guest, InputFd(fd), NullSink()) == 0
    assert "cannot read standard input: Is a directory" in caplog.text
    os.close(fd)


async def test_nobody_reads_our_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    guest = Guest([b"x" * 1000] * 5)
    with pytest.raises(BrokenPipeError):
        await carry_with(guest, None, OutputFd(writer))
    os.close(writer)


async def test_the_guest_goes_away() -> None:
    guest = Guest([])
    guest.handle = _hang  # type: ignore[method-assign]
    process, close = await guest.connect()
    carrying = asyncio.create_task(carry(process, None, NullSink(), NullSink()))
    await asyncio.sleep(0.02)
    close()
    async with asyncio.timeout(60):
        with pytest.raises(RpcError) as caught:
            await carrying
    assert caught.value.code is StatusCode.UNAVAILABLE
    await asyncio.sleep(0.01)


async def _hang(service: str, method: str, payload: bytes) -> bytes:
    await asyncio.sleep(60)
    return b""
