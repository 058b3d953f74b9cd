"""Queries to a name server on the loopback of a network namespace: taken in a guest, asked on the host."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.host.loopback import listen_on_loopback
from katapod.host.names import ask, serves_names
from katapod.host.netns import in_netns
from kit.kata import RUN_PREFIX
from kit.pod_network import NETNS, open_netns

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SERVER = "127.0.0.11"
# The agent's part, which answers each query with its letters in upper case and, by TCP, with a tail
AGENT = """
import _socket
from katapod.agent.loop import Loop
from katapod.agent.names import Names

async def main(loop):
    names = Names(loop)
    names.take(_socket.inet_aton("127.0.0.11"))
    print("ready", flush=True)
    while True:
        number, query = await names.next()
        names.answer(number, query.message.upper() + (b"" if query.client else b"!" * 60000))

loop = Loop()
loop.run(main(loop))
"""


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"{RUN_PREFIX}names"
    with open_netns(name):
        yield NETNS / name


@contextlib.contextmanager
def agent_in(netns: Path) -> Iterator[None]:
    agent = subprocess.Popen(
        ["nsenter", f"--net={netns}", sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True
    )
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "ready\n"
        yield
    finally:
        agent.kill()
        agent.communicate()


async def test_a_guest_asks(netns: Path) -> None:
    """By UDP and TCP, a server of the guest's own at port 53 of all addresses notwithstanding."""
    with agent_in(netns):
        own = in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        listening = in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        with own, listening:
            own.bind(("0.0.0.0", 53))
            listening.bind(("0.0.0.0", 53))
            listening.listen()
            assert await ask(netns, SERVER, b"by packet", stream=False) == b"BY PACKET"
            assert await ask(netns, SERVER, b"by stream", stream=True) == b"BY STREAM" + b"!" * 60000
            own.settimeout(60)
            other = in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with other:
                other.sendto(b"to the guest's own", ("127.0.0.1", 53))
                assert own.recv(100) == b"to the guest's own"


async def test_more_queries_than_are_kept(netns: Path) -> None:
    """Streams that ask nothing do not keep others from asking."""
    with agent_in(netns), contextlib.ExitStack() as stack:
        for _ in range(40):
            idle = in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            stack.enter_context(idle).connect((SERVER, 53))
        async with asyncio.timeout(120):
            answers = await asyncio.gather(*(ask(netns, SERVER, b"%d" % n, stream=False) for n in range(40)))
        assert answers == [b"%d" % n for n in range(40)]


def test_whether_a_server_is_there(netns: Path) -> None:
    assert not serves_names(netns, SERVER)
    with in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
        server.bind((SERVER, 0))
        assert serves_names(netns, SERVER)
        assert not serves_names(netns, "127.0.0.1")


async def test_the_engines_server_is_not_hidden(netns: Path) -> None:
    """Connections to the namespace's loopback are for the guest; those to dockerd's server are for that."""
    listener = listen_on_loopback(netns)
    server = in_netns(netns, lambda: socket.create_server((SERVER, 53)))

    def serve() -> None:
        client, _ = server.accept()
        with client:
            client.recv(100)
            client.sendall(b"\0\6answer")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        async with asyncio.timeout(120):
            assert await ask(netns, SERVER, b"query", stream=True) == b"answer"
        with in_netns(netns, lambda: socket.create_connection(("127.0.0.1", 53), 60)) as client:
            accepted, _ = await asyncio.get_running_loop().sock_accept(listener.sockets[0])
            with accepted:
                assert accepted.getsockname() == client.getpeername()
    finally:
        listener.close()
        server.close()
        thread.join()
