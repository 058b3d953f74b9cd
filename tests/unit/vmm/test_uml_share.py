"""The go-between before virtiofsd, with a daemon that only listens and answers what it is told to."""

import array
import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katapod.vmm.uml.share_device import Share, joining_share
from katapod.vmm.uml.vhost_user import VhostUserFailed
from kit.vhost_driver import GUEST, MESSAGE, OFFSET, REGION, SIZE, USER, FrontEnd

LIMIT_S = 60.0
FEATURES = 1 << 32 | 1 << 30


class Daemon:
    """The other end of what the go-between takes for virtiofsd."""

    def __init__(self) -> None:
        self.sock, self.far = socket.socketpair()
        self.sock.setblocking(False)

    async def receive(self) -> tuple[int, bytes, list[int]]:
        """Request, payload, descriptors."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    header, beside, _, _ = self.sock.recvmsg(MESSAGE.size, socket.CMSG_SPACE(32))
                    break
                except BlockingIOError:
                    ready = loop.create_future()
                    loop.add_reader(self.sock, ready.set_result, None)
                    await ready
                    loop.remove_reader(self.sock)
            if not header:
                raise EOFError
            request, flags, size = MESSAGE.unpack(header)
            assert flags == 1
            descriptors = array.array("i")
            for _, _, content in beside:
                descriptors.frombytes(content)
            return request, await loop.sock_recv(self.sock, size) if size else b"", list(descriptors)

    def answer(self, request: int, payload: bytes) -> None:
        self.sock.send(MESSAGE.pack(request, 5, len(payload)) + payload)


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.sock.close()


@pytest.fixture
async def share(daemon: Daemon, tmp_path: Path) -> AsyncIterator[Share]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        async with joining_share(listener, daemon.far, "kataShared") as share:
            yield share


@pytest.fixture
async def front_end(share: Share, tmp_path: Path) -> AsyncIterator[FrontEnd]:
    front_end = await FrontEnd.connect(tmp_path / "s")
    yield front_end
    front_end.close()


async def negotiate(front_end: FrontEnd, daemon: Daemon) -> None:
    async def answer() -> None:
        assert await daemon.receive() == (3, b"", [])
        assert await daemon.receive() == (1, b"", [])
        daemon.answer(1, struct.pack("<Q", FEATURES))
        assert await daemon.receive() == (2, struct.pack("<Q", FEATURES), [])

    await asyncio.gather(front_end.negotiate(1 << 32), answer())


async def ended(share: Share) -> str:
    async with asyncio.timeout(LIMIT_S):
        await share.ended.wait()
    return str(share.failure or "")


async def test_the_daemon_is_not_asked_for_what_it_does_not_have(front_end: FrontEnd, daemon: Daemon) -> None:
    await negotiate(front_end, daemon)
    answer = await front_end.ask(24, struct.pack("<III", 0, 40, 0) + bytes(40))
    assert answer[12:] == b"kataShared".ljust(36, b"\0") + struct.pack("<I", 1)


async def test_memory_and_rings_reach_the_daemon(front_end: FrontEnd, daemon: Daemon) -> None:
    await negotiate(front_end, daemon)
    front_end.send_memory(room_for_two=True)
    request, payload, descriptors = await daemon.receive()
    assert (request, payload) == (5, struct.pack("<II", 1, 0) + REGION.pack(GUEST, SIZE, USER, OFFSET))
    assert os.path.sameopenfile(descriptors[0], front_end.file)
    os.close(descriptors[0])
    queue = front_end.add_queue()
    queue.send_kick()
    front_end.enable(queue)
    requests = []
    for _ in range(6):
        request, payload, descriptors = await daemon.receive()
        requests.append(request)
        if request == 12:
            os.eventfd_write(descriptors[0], 5)
            assert os.eventfd_read(queue.kick_fd) == 5
        for fd in descriptors:
            os.close(fd)
    assert requests == [13, 8, 10, 9, 12, 18]


async def test_a_ring_is_enabled_once_the_daemon_knows(front_end: FrontEnd, daemon: Daemon) -> None:
    """The Rust daemon loses a kick that comes before, and the guest waits for ever."""
    await negotiate(front_end, daemon)
    enabling = asyncio.create_task(front_end.ask(18, struct.pack("<II", 0, 1), flags=9))
    assert await daemon.receive() == (18, struct.pack("<II", 0, 1), [])
    assert await daemon.receive() == (1, b"", [])
    for _ in range(20):
        await asyncio.sleep(0)
    assert not enabling.done()
    daemon.answer(1, struct.pack("<Q", FEATURES))
    assert await enabling == struct.pack("<Q", 0)
    assert await front_end.ask(8, struct.pack("<II", 0, 256), flags=9) == struct.pack("<Q", 0)
    assert await daemon.receive() == (8, struct.pack("<II", 0, 256), [])


async def test_the_daemon_sees_the_guest_go(share: Share, front_end: FrontEnd, daemon: Daemon) -> None:
    await negotiate(front_end, daemon)
    front_end.hang_up()
    with pytest.raises(EOFError):
        await daemon.receive()
    assert await ended(share) == ""


async def test_a_guest_that_goes_without_its_answer(share: Share, front_end: FrontEnd, daemon: Daemon) -> None:
    """As a kernel that is killed; nobody has broken a rule."""
    await negotiate(front_end, daemon)
    front_end.send(18, struct.pack("<II", 0, 1), flags=9)
    front_end.send(8, struct.pack("<II", 0, 256), flags=9)
    assert (await daemon.receive())[0] == 18
    assert (await daemon.receive())[0] == 1
    front_end.hang_up()
    daemon.answer(1, struct.pack("<Q", FEATURES))
    assert await ended(share) == ""


async def test_the_guest_sees_the_daemon_go(share: Share, front_end: FrontEnd, daemon: Daemon) -> None:
    """Its kernel looks at the socket for requests: at its end the device is broken, and what is asked of it fails."""
    await negotiate(front_end, daemon)
    daemon.sock.close()
    front_end.requests.settimeout(LIMIT_S)
    assert await asyncio.to_thread(front_end.requests.recv, 1) == b""
    assert await front_end.hung_up_on()
    assert await ended(share) == ""


async def test_nothing_is_kept_of_a_socket_for_requests_that_is_none(
    share: Share, front_end: FrontEnd, daemon: Daemon
) -> None:
    read_end, write_end = os.pipe()
    front_end.send(21, b"", descriptors=[write_end])
    os.close(write_end)
    front_end.hang_up()
    await ended(share)
    os.set_blocking(read_end, False)
    assert os.read(read_end, 1) == b""  # all others have closed it
    os.close(read_end)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (MESSAGE.pack(6, 1, 0), "request 6"),
        (MESSAGE.pack(25, 1, 12) + bytes(12), "request 25"),
        (MESSAGE.pack(1, 1, 600), "600 bytes"),
        (MESSAGE.pack(5, 1, 8) + struct.pack("<II", 3, 0), "3 regions"),
        (MESSAGE.pack(24, 1, 12) + struct.pack("<III", 0, 300, 0), "300 bytes"),
        (MESSAGE.pack(16, 1, 8) + struct.pack("<Q", 1), "what was not offered"),
    ],
)
async def test_a_guest_that_breaks_the_rules(
    share: Share, front_end: FrontEnd, daemon: Daemon, data: bytes, why: str
) -> None:
    front_end.send_raw(data)
    assert why in await ended(share)
    assert await front_end.hung_up_on()
    with pytest.raises(EOFError):
        await daemon.receive()


async def test_descriptors_that_a_request_does_not_have(share: Share, front_end: FrontEnd, daemon: Daemon) -> None:
    """What a daemon does with those is nothing to rely on: it may keep them."""
    front_end.send(3, b"", descriptors=[front_end.file])
    assert "request 3" in await ended(share)
    with pytest.raises(EOFError):
        await daemon.receive()


async def test_a_daemon_that_answers_what_nobody_asked(share: Share, front_end: FrontEnd, daemon: Daemon) -> None:
    await negotiate(front_end, daemon)
    daemon.answer(24, bytes(12))
    assert "an answer of virtiofsd" in await ended(share)


@pytest.mark.parametrize("tag", ["", "x" * 37])
async def test_a_tag_that_does_not_fit(tag: str, tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        pytest.raises(VhostUserFailed, match="1 to 36 bytes"),
    ):
        async with joining_share(listener, tmp_path / "none", tag):
            pytest.fail("it was joined")


async def test_no_daemon_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        async with joining_share(listener, tmp_path / "none", "t") as share:
            front_end = await FrontEnd.connect(tmp_path / "s")
            assert "No such file" in await ended(share)
            front_end.close()
