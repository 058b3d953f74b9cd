"""The go-between before a qemu-storage-daemon: the size that it has a guest see."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katapod.vmm.uml.disk_link import CONFIG_BYTES, CONFIG_CHANGED, DiskLink, joining_disk
from katapod.vmm.uml.vhost_user import VhostUserFailed
from kit.vhost_driver import FrontEnd

LIMIT_S = 60.0
HEADER = struct.Struct("<III")
PIECE = struct.Struct("<III")
CONFIG = struct.pack("<Q", 2048) + bytes(range(8, CONFIG_BYTES))


class Daemon:
    """Answers for its configuration, and keeps what else it is sent."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self.answer = CONFIG

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                request, _, size = HEADER.unpack(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(size)
                if request == 24:
                    content = PIECE.pack(0, len(self.answer), 0) + self.answer
                    writer.write(HEADER.pack(24, 5, len(content)) + content)
                else:
                    self.got.put_nowait((request, payload))
        writer.close()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon()
    server = await asyncio.start_unix_server(daemon.serve, tmp_path / "daemon")
    yield daemon
    server.close()


@pytest.fixture
async def link(daemon: Daemon, tmp_path: Path) -> AsyncIterator[DiskLink]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        async with joining_disk(listener, tmp_path / "daemon") as link:
            yield link


@pytest.fixture
async def front_end(link: DiskLink, tmp_path: Path) -> AsyncIterator[FrontEnd]:
    front_end = await FrontEnd.connect(tmp_path / "s")
    yield front_end
    front_end.close()


async def config_of(front_end: FrontEnd, offset: int, size: int) -> bytes:
    answer = await front_end.ask(24, PIECE.pack(offset, size, 0) + bytes(size))
    return answer[PIECE.size :]


async def test_the_guest_reads_the_daemons_configuration(front_end: FrontEnd) -> None:
    assert await config_of(front_end, 0, CONFIG_BYTES) == CONFIG
    assert await config_of(front_end, 20, 4) == CONFIG[20:24]


async def test_a_new_size_is_told_and_read(link: DiskLink, front_end: FrontEnd) -> None:
    with pytest.raises(VhostUserFailed, match="it does not use the disk"):
        link.resize(1 << 30)
    near, far = socket.socketpair()
    with near, far:
        front_end.send(21, b"", [far.fileno()])
        await config_of(front_end, 0, 8)
        link.resize(1 << 30)
        near.settimeout(LIMIT_S)
        assert near.recv(100) == CONFIG_CHANGED == HEADER.pack(2, 1, 0)
    assert await config_of(front_end, 0, 8) == struct.pack("<Q", 1 << 21)


async def test_a_driver_may_write_whether_there_is_a_cache_and_nothing_else(
    front_end: FrontEnd, daemon: Daemon
) -> None:
    for offset, content in ((0, bytes(8)), (32, b"\1"), (31, b"\1\1")):
        front_end.send(25, PIECE.pack(offset, len(content), 0) + content)
    assert await config_of(front_end, 0, CONFIG_BYTES) == CONFIG[:32] + b"\1" + CONFIG[33:]
    async with asyncio.timeout(LIMIT_S):
        assert await daemon.got.get() == (21, b""), "a socket for what that of QEMU 10 says of a new size"
        assert await daemon.got.get() == (25, PIECE.pack(32, 1, 0) + b"\1")
    assert daemon.got.empty()


async def test_a_daemon_that_tells_nothing_of_itself_ends_the_disk(
    link: DiskLink, daemon: Daemon, front_end: FrontEnd
) -> None:
    daemon.answer = b"short"
    async with asyncio.timeout(LIMIT_S):
        await link.ended.wait()
    assert "does not tell it" in str(link.failure)
