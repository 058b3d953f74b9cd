"""Streams as containerd names them, with real FIFOs, files and a real logging program."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.shim import streams as streams_module
from katapod.shim.streams import FifoInput, IoUris, open_streams

BULK = os.urandom(1 << 20)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With logging programs, which may be slow to begin and to end."""
    monkeypatch.setattr(streams_module, "LOGGER_READY_S", 60.0)
    monkeypatch.setattr(streams_module, "LOGGER_END_S", 60.0)


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return str(path)


async def test_input_ends_when_that_is_said_and_not_when_nobody_writes(fifo: str) -> None:
    source = FifoInput(fifo)
    try:
        with open(fifo, "wb", buffering=0) as writer:
            writer.write(b"first")
        assert await source.read(100) == b"first"
        waiting = asyncio.create_task(source.read(100))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "the writer has gone, but may come again"
        with open(fifo, "wb", buffering=0) as writer:
            writer.write(b"second")
        assert await waiting == b"second"
        with open(fifo, "wb", buffering=0) as writer:
            writer.write(b"last")
        source.end()
        assert await source.read(2) == b"la", "what was written before the end is still read"
        assert await source.read(100) == b"st"
        assert await source.read(100) == b""
        assert source.drained.is_set()
    finally:
        source.close()


async def test_output_waits_for_its_reader(fifo: str) -> None:
    async with open_streams(IoUris("", fifo, "", terminal=False), "c", "ns") as streams:
        assert streams.stdin is None
        writing = asyncio.create_task(streams.stdout.write(BULK))
        await asyncio.sleep(0.05)
        assert not writing.done(), "nobody reads"

        def read_all() -> bytes:
            found = b""
            with open(fifo, "rb", buffering=0) as reader:
                while len(found) < len(BULK):
                    found += reader.read(65536)
            return found

        assert await asyncio.to_thread(read_all) == BULK
        await writing
        await streams.stderr.write(b"nobody wants it")


async def test_the_last_output_is_read_before_its_stream_closes(fifo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """containerd 1.6 drops what it has not read when it hears of the exit, which is told when this is over."""
    monkeypatch.setattr(streams_module, "OUTPUT_READ_S", 60.0)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    stack = contextlib.AsyncExitStack()
    streams = await stack.enter_async_context(open_streams(IoUris("", fifo, "", False), "c1", "ns"))
    await streams.stdout.write(b"last words")
    streams.stdout.close()  # as at the end of the guest's output
    closing = asyncio.create_task(stack.aclose())
    await asyncio.sleep(0.1)
    assert not closing.done()
    assert os.read(reader, 100) == b"last words"
    await asyncio.wait_for(closing, 60)
    os.close(reader)


async def test_a_reader_that_does_not_read_keeps_nobody(fifo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "OUTPUT_READ_S", 0.1)
    async with asyncio.timeout(60):
        async with open_streams(IoUris("", fifo, "", False), "c1", "ns") as streams:
            await streams.stdout.write(b"to nobody")


async def test_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "a b"
    uri = f"file://{str(path).replace(' ', '%20')}"
    for text in (b"one\n", b"two\n"):
        async with open_streams(IoUris("", uri, uri, terminal=False), "c", "ns") as streams:
            await streams.stdout.write(text)
    assert path.read_bytes() == b"one\ntwo\n"


async def test_logging_program(tmp_path: Path) -> None:
    program, found = tmp_path / "logger", tmp_path / "found"
    program.write_text(
        f'#!/bin/sh\nexec > "{found}"\necho "$CONTAINER_ID $CONTAINER_NAMESPACE $*"\nexec 5>&-\ncat <&3\ncat <&4\n'
    )
    program.chmod(0o755)
    uri = f"binary://{program}?tag=a%20b&flag="
    async with open_streams(IoUris("", uri, uri, terminal=False), "c1", "k8s.io") as streams:
        await streams.stdout.write(b"to out\n")
        await streams.stderr.write(b"to err\n")
    assert found.read_text() == "c1 k8s.io tag a b flag\nto out\nto err\n"


async def test_logging_program_that_is_not_there(tmp_path: Path) -> None:
    uri = f"binary://{tmp_path / 'none'}"
    with pytest.raises(KatapodError, match="cannot run"):
        async with open_streams(IoUris("", uri, uri, terminal=False), "c", "ns"):
            pass


@pytest.mark.parametrize(
    ("uris", "kind", "said"),
    [
        (IoUris("", "stream+unix:///x", "", terminal=False), UsageError, "use a FIFO"),
        (IoUris("", "file:x", "", terminal=False), UsageError, "the path is not absolute"),
        (IoUris("", "/no/such/fifo", "", terminal=False), NotFound, "No such file"),
        (IoUris("/dev/null", "", "", terminal=False), UsageError, "not a FIFO"),
        (IoUris("file:///x", "", "", terminal=False), UsageError, "use a FIFO"),
    ],
)
async def test_what_cannot_be_opened(uris: IoUris, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        async with open_streams(uris, "c", "ns"):
            pass


def test_a_terminal_has_one_output() -> None:
    assert IoUris("", "/out", "/err", terminal=True).stderr == ""


async def test_input_is_read_to_the_end_that_was_said(fifo: str) -> None:
    """More than a FIFO holds, from a writer that has gone by then."""

    def write_all() -> None:
        with open(fifo, "wb") as writer:
            writer.write(BULK)

    async with open_streams(IoUris(fifo, "", "", terminal=False), "c", "ns") as streams:
        assert streams.stdin is not None
        writing = asyncio.create_task(asyncio.to_thread(write_all))
        found = b""
        while len(found) < len(BULK) - 60_000:
            found += await streams.stdin.read(65536)
        await writing
        streams.end_input()
        waiting = asyncio.create_task(streams.wait_input_read(60))
        while data := await streams.stdin.read(65536):
            found += data
        await waiting
        assert found == BULK
        assert await streams.stdin.read(1) == b""


async def test_end_of_input_is_not_waited_for_where_nobody_reads_it(fifo: str) -> None:
    async with open_streams(IoUris(fifo, "", "", terminal=False), "c", "ns") as streams:
        with open(fifo, "wb", buffering=0) as writer:
            writer.write(b"left")
        streams.end_input()
        await streams.wait_input_read(0.05)
        assert isinstance(streams.stdin, FifoInput)
        assert not streams.stdin.drained.is_set()
    assert streams.stdin.drained.is_set(), "nobody will read any more"


@pytest.fixture
def logger(tmp_path: Path) -> Callable[[str], str]:
    """Makes a logging program of a shell script; returns its URI. It writes its pid to `pid` in its directory."""

    def make(script: str) -> str:
        program = tmp_path / "logger"
        program.write_text(f"#!/bin/sh\necho $$ > '{tmp_path}/pid'\n{script}\n")
        program.chmod(0o755)
        return f"binary://{program}"

    return make


def runs(tmp_path: Path) -> bool:
    """Not if it was ended before it could say its pid."""
    with contextlib.suppress(FileNotFoundError):
        said = (tmp_path / "pid").read_text()
        return bool(said) and os.path.exists(f"/proc/{int(said)}")
    return False


async def test_logging_program_that_ends_early_loses_what_follows(tmp_path: Path, logger: Callable[[str], str]) -> None:
    uri = logger('exec 5>&-; head -c 4 <&3 > "${0%/*}"/found; exit 3')
    async with open_streams(IoUris("", uri, uri, terminal=False), "c", "ns") as streams:
        for _ in range(4):
            await streams.stdout.write(BULK)
            await streams.stderr.write(BULK)
    assert (tmp_path / "found").read_bytes() == BULK[:4]
    assert not runs(tmp_path)


async def test_logging_program_that_does_not_read_stalls_who_writes(
    tmp_path: Path, logger: Callable[[str], str]
) -> None:
    uri = logger('exec 5>&-; read go < "${0%/*}"/fifo; cat <&3 > "${0%/*}"/found')
    os.mkfifo(tmp_path / "fifo")
    async with open_streams(IoUris("", uri, "", terminal=True), "c", "ns") as streams:
        writing = asyncio.create_task(streams.stdout.write(BULK))
        await asyncio.sleep(0.05)
        assert not writing.done()
        await asyncio.to_thread((tmp_path / "fifo").write_text, "go\n")
        await writing
    assert (tmp_path / "found").read_bytes() == BULK
    assert not runs(tmp_path)


async def test_logging_program_that_is_never_ready_is_ended(
    tmp_path: Path, logger: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "LOGGER_READY_S", 0.3)
    uri = logger("exec sleep 1000")
    with pytest.raises(KatapodError, match="was not ready within"):
        async with open_streams(IoUris("", uri, uri, terminal=False), "c", "ns"):
            pass
    assert not runs(tmp_path)


async def test_logging_program_that_does_not_end_is_ended(
    tmp_path: Path, logger: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "LOGGER_END_S", 0.2)
    uri = logger("exec 5>&-; exec sleep 1000")
    async with open_streams(IoUris("", uri, uri, terminal=False), "c", "ns"):
        pass
    assert not runs(tmp_path)


async def test_nothing_stays_open(tmp_path: Path, fifo: str, logger: Callable[[str], str]) -> None:
    def descriptors() -> set[str]:
        return {
            f"{each}:{os.readlink(f'/proc/self/fd/{each}')}" for each in os.listdir("/proc/self/fd") if opened(each)
        }

    def opened(number: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{number}")

    program = logger("exec 5>&-; cat <&3; cat <&4")
    async with open_streams(IoUris(fifo, program, "", terminal=False), "c", "ns"):
        pass  # what asyncio opens once, for children
    before = descriptors()
    for stdout, stderr in ((fifo, fifo), (f"file://{tmp_path}/log", ""), (program, program), ("", fifo)):
        async with open_streams(IoUris(fifo, stdout, stderr, terminal=False), "c", "ns"):
            pass
    for stdout, stderr in (("/no/such", ""), (fifo, "/no/such"), ("binary:///no/such", ""), (fifo, "what:/x")):
        with pytest.raises(KatapodError):
            async with open_streams(IoUris(fifo, stdout, stderr, terminal=False), "c", "ns"):
                pass
    assert descriptors() == before
