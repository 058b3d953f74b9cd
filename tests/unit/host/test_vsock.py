"""Connections to guests by vsock come from a privileged port, on a kernel that has one in this test's place."""

import asyncio
import errno
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from katapod.host import vsock
from katapod.host.vsock import PRIVILEGED_PORT_MAX, connect_vsock

SOURCES = Path(vsock.__file__).parents[1]


class FakeSocket:
    """A vsock of a host where the ports `taken` are in use."""

    taken: set[int]
    error = errno.EADDRINUSE
    made: "list[FakeSocket]"

    def __init__(self, family: int, kind: int) -> None:
        assert family == socket.AF_VSOCK
        assert kind == socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        self.port = 0
        self.peer = (0, 0)
        self.closed = False
        self.made.append(self)

    def bind(self, address: tuple[int, int]) -> None:
        cid, port = address
        assert cid == socket.VMADDR_CID_ANY
        if port in self.taken:
            raise OSError(self.error, "in use")
        self.port = port

    def connect(self, address: tuple[int, int]) -> None:
        if address[0] == 99:
            raise ConnectionResetError(errno.ECONNRESET, "nobody listens")
        self.peer = address

    def close(self) -> None:
        self.closed = True


@pytest.fixture
async def kernel(monkeypatch: pytest.MonkeyPatch) -> type[FakeSocket]:
    monkeypatch.setattr(FakeSocket, "taken", set(), raising=False)
    monkeypatch.setattr(FakeSocket, "made", [], raising=False)
    constants = {name: getattr(socket, name) for name in ("AF_VSOCK", "SOCK_STREAM", "SOCK_NONBLOCK", "VMADDR_CID_ANY")}
    monkeypatch.setattr(vsock, "socket", SimpleNamespace(socket=FakeSocket, **constants))

    async def sock_connect(sock: FakeSocket, address: tuple[int, int]) -> None:
        sock.connect(address)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", sock_connect)
    return FakeSocket


async def test_the_host_connects_from_a_privileged_port(kernel: type[FakeSocket]) -> None:
    await connect_vsock(42, 1024)
    (sock,) = kernel.made
    assert 0 < sock.port <= PRIVILEGED_PORT_MAX < 1024
    assert (sock.peer, sock.closed) == ((42, 1024), False)


async def test_the_last_free_port_is_found(kernel: type[FakeSocket]) -> None:
    kernel.taken = set(range(1, PRIVILEGED_PORT_MAX + 1)) - {517}
    await connect_vsock(42, 1024)
    assert kernel.made[0].port == 517


async def test_without_a_free_port_the_error_says_so(kernel: type[FakeSocket]) -> None:
    kernel.taken = set(range(1, PRIVILEGED_PORT_MAX + 1))
    with pytest.raises(OSError, match="all 1023 privileged vsock ports of this host are in use") as caught:
        await connect_vsock(42, 1024)
    assert caught.value.errno == errno.EADDRINUSE
    assert kernel.made[0].closed


async def test_another_error_of_bind_is_told_at_once(kernel: type[FakeSocket], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.taken = set(range(1, PRIVILEGED_PORT_MAX + 1))
    monkeypatch.setattr(kernel, "error", errno.EACCES)
    with pytest.raises(PermissionError):
        await connect_vsock(42, 1024)
    assert kernel.made[0].closed


async def test_a_refused_connection_gives_its_port_back(kernel: type[FakeSocket]) -> None:
    with pytest.raises(ConnectionResetError):
        await connect_vsock(99, 1024)
    assert kernel.made[0].closed


def test_there_is_one_door_to_vsock_on_either_side() -> None:
    users = {str(p.relative_to(SOURCES)) for p in SOURCES.rglob("*.py") if re.search(r"\.AF_VSOCK\b", p.read_text())}
    assert users == {"host/vsock.py", "agent/channel.py"}
