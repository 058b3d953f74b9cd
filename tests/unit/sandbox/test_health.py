"""What the owner makes of an agent that breaks off, over a real connection, and of disks that fail on the host."""

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from katapod.model.errors import KatapodError, NoSpace
from katapod.plan.hotplug import plan_layered_disk
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


def taken(**event: object) -> tuple[KatapodError | None, list[dict[str, Any]]]:
    """What becomes of a BLOCK_IO_ERROR: why the sandbox is dead, if it is, and what was saved."""
    layer = plan_layered_disk("root-1", Path("/sandbox/root.qcow2"), Path("/image/root.ext4"), 3)
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    saved: list[dict[str, Any]] = []
    sandbox: Any = SimpleNamespace(
        sandbox_id="s1",
        death=death,
        vm=SimpleNamespace(stopping=False),
        save=lambda **changes: saved.append(changes),
        _disks={"root-1": (3, layer)},
        _told_disks=set(),
    )
    for _ in range(2):
        lifecycle.Sandbox.take_disk_error(sandbox, event)
    return death.result() if death.done() else None, saved


async def test_a_disk_that_the_host_cannot_write() -> None:
    dead, saved = taken(**{"node-name": "drive-root-1", "operation": "write", "action": "stop", "nospace": True})
    assert isinstance(dead, NoSpace)
    assert str(dead) == "sandbox s1 was ended: the host cannot write /sandbox/root.qcow2: No space left on device"
    assert saved == []
    dead, _ = taken(**{"node-name": "drive-root-1", "operation": "write", "action": "stop", "nospace": False})
    assert not isinstance(dead, NoSpace)
    assert str(dead).endswith("the host cannot write /sandbox/root.qcow2: Input/output error")


async def test_an_error_that_the_guest_was_told_of(caplog: pytest.LogCaptureFixture) -> None:
    dead, saved = taken(**{"node-name": "drive-root-1", "operation": "read", "action": "report", "reason": "\x1b[2J"})
    assert dead is None
    assert saved == [{"error": "the host cannot read /sandbox/root.qcow2: Input/output error"}]
    assert caplog.messages == ["the host cannot read /sandbox/root.qcow2: Input/output error; the guest was told"]


async def test_an_error_of_a_disk_that_is_not_known() -> None:
    """QEMU may be somebody else's by now."""
    dead, _ = taken(**{"node-name": "\x1b[2J" + "x" * 1000, "action": "stop"})
    assert str(dead) == "sandbox s1 was ended: the host cannot read disk '\\x1b[2J" + "x" * 60 + "': Input/output error"
