"""When a guest is taken for dead, over a real connection, or for disks of the host: what is slow is not dead."""

import asyncio
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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


def idle() -> float:
    """Of virtual CPUs that sleep."""
    return 0.0


def sandbox_of(agent: AgentClient, vcpus: Callable[[], float] = idle, *, stopping: bool = False) -> Any:
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    vm = SimpleNamespace(stopping=stopping, busy_s=vcpus)
    return SimpleNamespace(sandbox_id="s1", agent=agent, death=death, vm=vm, console=Console())


@pytest.mark.parametrize("stopping", [False, True])
async def test_an_agent_that_breaks_off(stopping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sandbox is dead, unless it was told to end."""
    monkeypatch.setattr(health, "CAUSE_LIMIT_S", 0.1)
    ours, theirs = socket.socketpair()
    agent = AgentClient(await TtrpcClient.on_socket(ours, "the agent"))
    sandbox = sandbox_of(agent, stopping=stopping)
    watch = asyncio.create_task(watch_health(sandbox))
    theirs.close()
    await asyncio.wait_for(watch, 60)
    assert sandbox.death.done() is not stopping
    if not stopping:
        assert isinstance(sandbox.death.result(), AgentFailed)
        assert str(sandbox.death.result()).startswith("the agent of sandbox s1 has gone: ")


class Owing(AgentClient):
    """Answers no check; where it talks, it answers something else meanwhile."""

    def __init__(self, connection: TtrpcClient, peer: socket.socket, *, talks: bool) -> None:
        super().__init__(connection)
        self.checks = 0
        self.checked_often = asyncio.Event()
        self._peer = peer
        self._talks = talks

    async def check(self, timeout_s: float | None) -> None:
        self.checks += 1
        if self.checks > 3:
            self.checked_often.set()
        asked_at = time.monotonic()
        try:
            await super().check(timeout_s)
        finally:
            if self._talks:
                self._peer.send(bytes((0, 0, 0, 0, 0, 0, 0, 99, 2, 0)))  # an answer to a call that nobody waits for
                while self.connection.heard_at <= asked_at:  # noqa: ASYNC110 - the connection tells nobody
                    await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("hours_a_look", "talks", "dies"),
    [(0.0, False, True), (1.0, False, False), (0.0, True, False)],
    ids=["idle and silent", "busy", "slow, but answers something"],
)
async def test_an_agent_that_owes_an_answer(
    hours_a_look: float, talks: bool, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HEALTH_PERIOD_S", 0.01)
    monkeypatch.setattr(health, "HEALTH_LIMIT_S", 0.1)
    ours, theirs = socket.socketpair()
    with theirs:
        agent = Owing(await TtrpcClient.on_socket(ours, "the agent"), theirs, talks=talks)
        busy_s = itertools.count(0.0, 3600 * hours_a_look)
        sandbox = sandbox_of(agent, lambda: next(busy_s))
        watch = asyncio.create_task(watch_health(sandbox))
        sandbox.death.add_done_callback(lambda _: agent.checked_often.set())
        await asyncio.wait_for(agent.checked_often.wait(), 60)
        assert sandbox.death.done() is dies
        if dies:
            assert "its agent did not answer for 0.1 s, and its guest had time to" in str(sandbox.death.result())
        watch.cancel()
        await asyncio.wait({watch})
        agent.connection.close()


def test_what_a_process_has_done_counts_as_busy() -> None:
    """What it waits for a CPU counts, too; what has ended is not busy."""
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = busy_s(process.pid)
        while busy_s(process.pid) < before + 0.1:
            time.sleep(0.01)
        process.kill()
    assert busy_s(process.pid) == 0


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
