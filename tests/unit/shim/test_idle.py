"""A server without a VM ends when nobody can need it; one that has or makes a VM never does by itself."""

import asyncio
import os
from pathlib import Path

import pytest
from shim_guest_helper import Shim, listening, shim_at

from katapod.rpc.client import TtrpcClient
from katapod.rpc.server import serve_ttrpc
from katapod.shim import idle
from katapod.shim.idle import IDLE_S, ORPHAN_S, PERIOD_S, Connections, Use, reason_to_end, watch_use
from kit.loop_time import LIMIT_S, until

FRESH = Use(vm=False, tasks=False, connections=0, quiet_s=0, reachable=True)


@pytest.mark.parametrize(
    ("use", "ends"),
    [
        (FRESH, ""),
        (Use(False, False, 0, IDLE_S - 1, True), ""),  # the engine has started it, and is slow
        (Use(False, False, 0, IDLE_S, True), "no task"),
        (Use(False, False, 1, IDLE_S, True), "no task"),  # the engine gave a failed create up, and stays connected
        (Use(True, False, 0, ORPHAN_S, True), ""),  # its create is under way
        (Use(True, True, 0, 10 * ORPHAN_S, False), ""),  # a pod goes on without its engine, whatever was removed
        (Use(False, True, 1, 10 * ORPHAN_S, True), ""),  # the engine is to ask for the exit
        (Use(False, True, 1, 10 * ORPHAN_S, False), ""),
        (Use(False, True, 0, ORPHAN_S - 1, True), ""),  # it restarts
        (Use(False, True, 0, ORPHAN_S, True), "no engine has been connected"),
        (Use(False, True, 0, PERIOD_S, False), "removed"),
        (Use(False, True, 0, PERIOD_S - 1, False), ""),
    ],
)
def test_reasons(use: Use, ends: str) -> None:
    assert ends in reason_to_end(use)
    assert bool(ends) is bool(reason_to_end(use))


async def _ends(shim: Shim, connections: Connections, path: str) -> bool:
    """Whether the watch over a server ends it, once all its limits are over."""
    await asyncio.sleep(idle.ORPHAN_S)
    ended = asyncio.Event()
    looks, reason_to_end = 0, idle.reason_to_end

    def counted(use: Use) -> str:
        nonlocal looks
        looks += 1
        return reason_to_end(use)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle, "reason_to_end", counted)
        watching = asyncio.create_task(watch_use(shim.tasks, connections, path, ended.set))
        await until(lambda: looks == 3 or ended.is_set())
        watching.cancel()
    return ended.is_set()


async def test_a_served_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERIOD_S", "IDLE_S"):
        monkeypatch.setattr(idle, name, 0.02)
    monkeypatch.setattr(idle, "ORPHAN_S", 0.1)
    async with shim_at(tmp_path, monkeypatch) as shim:
        quiet = Connections()
        gate = shim.guest.hold["CreateContainer"] = asyncio.Event()
        creating = asyncio.create_task(shim.create("pod", pod="pod"))
        await until(lambda: "CreateContainer" in shim.guest.calls)
        assert not await _ends(shim, quiet, shim.path), "a create is under way"
        gate.set()
        await creating
        await shim.call("Start", id="pod")
        os.rename(shim.path, f"{shim.path}.away")
        assert not await _ends(shim, quiet, shim.path), "its pod lives"
        os.rename(f"{shim.path}.away", shim.path)
        shim.guest.processes["pod"].end(0)
        await shim.call("Wait", id="pod")
        await until(lambda: shim.tasks.pod is None)
        engine = Connections()
        engine.count(1)
        assert not await _ends(shim, engine, shim.path), "the engine is there, and may ask for the exit"
        assert await _ends(shim, quiet, shim.path), "it is not"
        await shim.call("Delete", id="pod")
        assert await _ends(shim, engine, shim.path), "nothing is left to ask for"


async def test_connections_and_calls_are_counted(tmp_path: Path) -> None:
    connections, path = Connections(), str(tmp_path / "s")

    async def handle(service: str, method: str, payload: bytes) -> bytes:
        return b""

    server = await serve_ttrpc(listening(path), handle, connections.count)
    first, second = [await TtrpcClient.on_unix_path(path, "the shim") for _ in range(2)]
    await first.call_raw("s", "m", b"", LIMIT_S)
    await second.call_raw("s", "m", b"", LIMIT_S)
    assert connections.open == 2
    first.close()
    second.close()
    await until(lambda: not connections.open)
    connections.count_call(1)
    await asyncio.sleep(0.02)
    assert connections.quiet_s == 0
    connections.count_call(-1)
    await asyncio.sleep(0.02)
    assert connections.quiet_s > 0
    server.close()
