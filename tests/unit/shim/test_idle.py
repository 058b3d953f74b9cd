"""A server without a VM ends when nobody can need it; one that has or makes a VM never does by itself."""

import asyncio
import os
from pathlib import Path

import pytest
from shim_guest_helper import Shim, listening, shim_at, until

from katapod.rpc.client import TtrpcClient
from katapod.rpc.server import serve_ttrpc
from katapod.shim import idle
from katapod.shim.idle import IDLE_S, ORPHAN_S, PERIOD_S, Connections, Use, reason_to_end, watch_use

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


async def _ends(shim: Shim, connections: Connections, path: str, after_s: float) -> bool:
    """Whether the watch over a server ends it within that time."""
    ended = asyncio.Event()
    watching = asyncio.create_task(watch_use(shim.tasks, connections, path, ended.set))
    try:
        async with asyncio.timeout(after_s):
            await ended.wait()
            return True
    except TimeoutError:
        return False
    finally:
        watching.cancel()


async def test_a_served_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERIOD_S", "IDLE_S"):
        monkeypatch.setattr(idle, name, 0.05)
    monkeypatch.setattr(idle, "ORPHAN_S", 0.3)
    async with shim_at(tmp_path, monkeypatch) as shim:
        quiet = Connections()
        gate = shim.guest.hold["CreateContainer"] = asyncio.Event()
        creating = asyncio.create_task(shim.create("pod", pod="pod"))
        await until(lambda: "CreateContainer" in shim.guest.calls)
        assert not await _ends(shim, quiet, shim.path, 0.5), "a create is under way"
        gate.set()
        await creating
        await shim.call("Start", id="pod")
        os.rename(shim.path, f"{shim.path}.away")
        assert not await _ends(shim, quiet, shim.path, 0.5), "its pod lives"
        os.rename(f"{shim.path}.away", shim.path)
        shim.guest.processes["pod"].end(0)
        await shim.call("Wait", id="pod")
        await until(lambda: shim.tasks.pod is None)
        engine = Connections()
        engine.count(1)
        assert not await _ends(shim, engine, shim.path, 0.6), "the engine is there, and may ask for the exit"
        assert await _ends(shim, quiet, shim.path, 5), "it is not"
        await shim.call("Delete", id="pod")
        assert await _ends(shim, engine, shim.path, 5), "nothing is left to ask for"


async def test_connections_and_calls_are_counted(tmp_path: Path) -> None:
    connections, path = Connections(), str(tmp_path / "s")

    async def handle(service: str, method: str, payload: bytes) -> bytes:
        return b""

    server = await serve_ttrpc(listening(path), handle, connections.count)
    first, second = [await TtrpcClient.on_unix_path(path, "the shim") for _ in range(2)]
    await first.call_raw("s", "m", b"", 10)
    await second.call_raw("s", "m", b"", 10)
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
