"""Streams as containerd names them, with real FIFOs, files and a real logging program."""

import asyncio
import os
from pathlib import Path

import pytest

from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.shim.streams import FifoInput, IoUris, open_streams

BULK = os.urandom(1 << 20)


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
        f'#!/bin/sh\nexec > {found}\necho "$CONTAINER_ID $CONTAINER_NAMESPACE $*"\nexec 5>&-\ncat <&3\ncat <&4\n'
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
        (IoUris("", "stream+unix:///x", "", terminal=False), UsageError, "streams are FIFOs"),
        (IoUris("", "file:x", "", terminal=False), UsageError, "no absolute path"),
        (IoUris("", "/no/such/fifo", "", terminal=False), NotFound, "No such file"),
        (IoUris("/dev/null", "", "", terminal=False), UsageError, "not a FIFO"),
        (IoUris("file:///x", "", "", terminal=False), UsageError, "streams are FIFOs"),
    ],
)
async def test_what_cannot_be_opened(uris: IoUris, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        async with open_streams(uris, "c", "ns"):
            pass


def test_a_terminal_has_one_output() -> None:
    assert IoUris("", "/out", "/err", terminal=True).stderr == ""
