"""Who gets in by vsock: root of the host, and nobody else. The kernel's part is played by a socket of this test's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from katapod.agent.channel import VSOCK_CID_ANY, Listener, Stream, listen
from katapod.agent.loop import Loop, Tasks

HOST, LOCAL, GUEST = 2, 1, 42


class FakeVsock:
    """A listening vsock. `arrive` is a connection of a peer; its other end is returned."""

    current: FakeVsock

    def __init__(self, family: int, kind: int) -> None:
        assert family == socket.AF_VSOCK
        FakeVsock.current = self
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._waiting: list[tuple[int, tuple[int, int]]] = []
        self.bound = (0, 0)

    def bind(self, address: tuple[int, int]) -> None:
        self.bound = address

    def listen(self, backlog: int) -> None:
        assert backlog > 0

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        os.close(self._bell)
        for fd, _ in self._waiting:
            os.close(fd)

    def _accept(self) -> tuple[int, tuple[int, int]]:
        if not self._waiting:
            raise BlockingIOError
        return self._waiting.pop(0)

    def arrive(self, cid: int, port: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.settimeout(60)
        self._waiting.append((ours.detach(), (cid, port)))
        os.eventfd_write(self._bell, 1)
        return theirs


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


async def _greet(stream: Stream) -> bool:
    await stream.write(b"agent")
    return True


def _heard(loop: Loop, peers: list[tuple[int, int]]) -> list[bytes]:
    """What each of `peers`, who connect one after another, hears until its connection is closed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("_socket.socket", FakeVsock)
        listener = Listener(loop, "vsock://-1:1024")
    fake = FakeVsock.current
    assert fake.bound == (VSOCK_CID_ANY, 1024)
    ends = [fake.arrive(*peer) for peer in peers]

    async def main() -> list[bytes]:
        tasks = Tasks(loop, "test")
        serving = tasks.spawn("listener", listen(loop, listener, _greet))
        heard = []
        for end in ends:
            assert await loop.readable(end.fileno(), 60), "nothing is heard, and no end"
            heard.append(end.recv(100))
            loop.forget(end.fileno())
            end.close()
        assert not serving.done, "the listener has ended"
        tasks.cancel()
        await loop.wait_any([serving])
        return heard

    found: list[bytes] = loop.run(main())
    return found


@pytest.mark.parametrize(
    ("peer", "welcome"),
    [
        ((HOST, 1), True),
        ((HOST, 1023), True),
        ((HOST, 1024), False),  # anybody's of the host
        ((HOST, 0xFFFFFFFE), False),
        ((LOCAL, 1023), False),  # a process of the guest, by the loopback
        ((GUEST, 1023), False),  # by its own CID
        ((0, 1023), False),
        ((VSOCK_CID_ANY, 1023), False),
    ],
)
def test_only_a_privileged_port_of_the_host_is_served(loop: Loop, peer: tuple[int, int], welcome: bool) -> None:
    assert _heard(loop, [peer]) == [b"agent" if welcome else b""]


def test_the_refused_hold_nobody_up_and_are_told_once(loop: Loop, capfd: pytest.CaptureFixture[str]) -> None:
    peers = [(HOST, 5000 + number) for number in range(50)]
    assert _heard(loop, [*peers, (HOST, 900)]) == [b""] * 50 + [b"agent"]
    said = [line for line in capfd.readouterr().err.splitlines() if "refused" in line]
    assert said == ["kata-agent: warning: refused a vsock connection of CID 2, port 5000: it is not root of the host"]
