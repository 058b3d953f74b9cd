"""What a client of exec and the owner of the sandbox agree on."""

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from katapod import __version__
from katapod.supervisor import exec_server
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.exec_server import _Server

REQUEST = wire.frame(wire.REQUEST, wire.Request(__version__.encode(), [], 0, [b"box", b"true"], []).encode())
REQUEST_S, GO_S = 60.0, 6000.0


@pytest.mark.parametrize("word", [wire.GO, b""], ids=["goes", "goes away"])
async def test_a_client_that_has_been_taken_has_time_to_say_so(word: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, or without a CPU, for longer than a request may take: it could not go back afterwards."""
    monkeypatch.setattr(exec_server, "REQUEST_LIMIT_S", REQUEST_S)
    monkeypatch.setattr(exec_server, "GO_LIMIT_S", GO_S)
    command: Any = SimpleNamespace(name="box")
    sandbox: Any = SimpleNamespace(sandbox_id="box")
    server = _Server(sandbox, lambda words: command)
    carried_out = []

    async def carry_out(*_: object) -> None:
        carried_out.append(True)

    monkeypatch.setattr(server, "_carry_out", carry_out)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    null = os.open(os.devnull, os.O_RDONLY)
    with ours:
        socket.send_fds(ours, [REQUEST], [null] * 3)
        os.close(null)
        serving = asyncio.create_task(server._serve(theirs))
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(ours, wire.HEADER) == wire.frame(wire.TAKEN)
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 2 * REQUEST_S)
        await asyncio.sleep(0.01)
        assert not serving.done()
        if word:
            await loop.sock_sendall(ours, wire.frame(word))
    await asyncio.wait_for(serving, 60)
    assert carried_out == ([True] if word else [])
