"""What the owner makes of an agent that breaks off, over a real connection."""

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from katapod.model.errors import KatapodError
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.sandbox import lifecycle
from katapod.sandbox.errors import AgentFailed
from katapod.sandbox.lifecycle import _watch_health


@pytest.mark.parametrize("stopping", [False, True])
async def test_an_agent_that_breaks_off(stopping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sandbox is dead, unless it was told to end."""
    monkeypatch.setattr(lifecycle, "CAUSE_LIMIT_S", 0.1)
    ours, theirs = socket.socketpair()
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    agent = AgentClient(await TtrpcClient.on_socket(ours, "the agent"))
    sandbox: Any = SimpleNamespace(sandbox_id="s1", agent=agent, death=death, vm=SimpleNamespace(stopping=stopping))
    watch = asyncio.create_task(_watch_health(sandbox))
    theirs.close()
    await asyncio.wait_for(watch, 5)
    assert death.done() is not stopping
    if not stopping:
        assert isinstance(death.result(), AgentFailed)
        assert str(death.result()).startswith("the agent of sandbox s1 has gone: ")
