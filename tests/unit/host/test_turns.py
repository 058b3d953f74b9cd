"""Starts take turns: so many at a time, whoever ends however."""

import asyncio
import os
import sys
from pathlib import Path

from katapod.host.turns import turn

HOLDER = """
import asyncio, sys
from pathlib import Path
from katapod.host.turns import turn
async def hold():
    async with turn(Path(sys.argv[1]), 1):
        print("held", flush=True)
        await asyncio.sleep(1000)
asyncio.run(hold())
"""


async def test_no_more_than_there_are_places(tmp_path: Path) -> None:
    here, most, done = 0, 0, 0

    async def start() -> None:
        nonlocal here, most, done
        async with turn(tmp_path / "vc" / "starts", 2, 60.0):
            here += 1
            most = max(most, here)
            await asyncio.sleep(0.01)
            here -= 1
            done += 1

    await asyncio.gather(*(start() for _ in range(7)))
    assert (most, done) == (2, 7)


async def test_it_is_no_reason_not_to_start(tmp_path: Path) -> None:
    async with turn(tmp_path / "starts", 1, 60.0), turn(tmp_path / "starts", 1, 0.05):
        pass


async def test_a_place_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "starts"
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, os.fspath(lock)), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"held\n"
        waiting = asyncio.ensure_future(_taken(lock))
        await asyncio.sleep(0.1)
        assert not waiting.done()
    finally:
        holder.kill()
        await holder.wait()
    await asyncio.wait_for(waiting, 60)


async def test_who_gives_up_waiting_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "starts"
    async with turn(lock, 1, 60.0):
        waiting = asyncio.ensure_future(_taken(lock))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
    await asyncio.wait_for(_taken(lock), 60)


async def _taken(lock: Path) -> None:
    async with turn(lock, 1, 3600.0):
        pass
