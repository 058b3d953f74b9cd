"""When a guest is taken for dead, over a real connection, or for disks of the host: what is slow is not dead."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from katapod.model.devices import DeviceTable, DiskEntry
from katapod.model.errors import KatapodError, NoSpace
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.sandbox import health, lifecycle
from katapod.sandbox.errors import AgentFailed
from katapod.sandbox.health import watch_health
from katapod.vmm.qemu.process import busy_s, disk_error


class Console:
    async def answers(self) -> bool:
        return False


def sandbox_of(agent: AgentClient, pid: int, *, stopping: bool = False) -> Any:
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    vm = SimpleNamespace(stopping=stopping, pid=pid, busy_s=lambda: busy_s(pid))
    return SimpleNamespace(sandbox_id="s1", agent=agent, death=death, vm=vm, console=Console())


@pytest.mark.parametrize("stopping", [False, True])
async def test_an_agent_that_breaks_off(stopping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sandbox is dead, unless it was told to end."""
    monkeypatch.setattr(health, "CAUSE_LIMIT_S", 0.1)
    ours, theirs = socket.socketpair()
    agent = AgentClient(await TtrpcClient.on_socket(ours, "the agent"))
    sandbox = sandbox_of(agent, os.getpid(), stopping=stopping)
    watch = asyncio.create_task(watch_health(sandbox))
    theirs.close()
    await asyncio.wait_for(watch, 60)
    assert sandbox.death.done() is not stopping
    if not stopping:
        assert isinstance(sandbox.death.result(), AgentFailed)
        assert str(sandbox.death.result()).startswith("the agent of sandbox s1 has gone: ")


@contextmanager
def guest(code: str) -> Iterator[int]:
    """A process that does what a VMM does for a guest that is busy, or idle."""
    with subprocess.Popen([sys.executable, "-c", f"print(flush=True); {code}"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # its start is work of another kind
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("code", "talks", "dies"),
    [
        ("import time; time.sleep(60)", False, True),
        ("exec('while True: pass')", False, False),
        ("import time; time.sleep(60)", True, False),
    ],
    ids=["idle and silent", "busy", "slow, but answers something"],
)
async def test_an_agent_that_owes_an_answer(
    code: str, talks: bool, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HEALTH_PERIOD_S", 0.05)
    monkeypatch.setattr(health, "HEALTH_LIMIT_S", 0.5)
    ours, theirs = socket.socketpair()
    with guest(code) as pid, theirs:
        agent = AgentClient(await TtrpcClient.on_socket(ours, "the agent"))
        sandbox = sandbox_of(agent, pid)
        watch = asyncio.create_task(watch_health(sandbox))
        for _ in range(20):
            await asyncio.sleep(0.1)
            if talks:
                theirs.send(bytes((0, 0, 0, 0, 0, 0, 0, 99, 2, 0)))  # an answer to a call that nobody waits for
        assert sandbox.death.done() is dies
        if dies:
            assert "its agent did not answer for 0.5 s, and its guest had time to" in str(sandbox.death.result())
        watch.cancel()
        await asyncio.wait({watch})
        agent.connection.close()


def test_what_has_ended_is_not_busy() -> None:
    with guest("pass") as pid:
        assert busy_s(pid) >= 0
    assert busy_s(pid) == 0


def taken(**event: object) -> tuple[KatapodError | None, list[dict[str, Any]]]:
    """What becomes of a BLOCK_IO_ERROR: why the sandbox is dead, if it is, and what was saved."""
    layer = DiskEntry("root-1", 3, "/sandbox/root.qcow2", base="/image/root.ext4")
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    saved: list[dict[str, Any]] = []
    sandbox: Any = SimpleNamespace(
        sandbox_id="s1",
        death=death,
        vm=SimpleNamespace(stopping=False),
        save=lambda **changes: saved.append(changes),
        devices=SimpleNamespace(table=DeviceTable(disks=(layer,))),
        _told_disks=set(),
    )
    for _ in range(2):
        lifecycle.Sandbox.take_disk_error(sandbox, disk_error(event))
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
