"""Work side by side, and work that goes to its end."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from katapod.host.logs import kept_pipe
from katapod.host.tasks import beside, together


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_together_waits_for_both_however_often_it_is_cancelled(times: int) -> None:
    ended = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.02)
            ended.append(name)

    task = asyncio.create_task(together(work("one"), work("other")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == ["one", "other"]


@pytest.mark.parametrize("times", [0, 1, 2, 3])
async def test_what_runs_beside_a_block_has_ended_with_it_however_often_that_is_cancelled(times: int) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.02)
            ended.append("work")

    async def block() -> None:
        async with beside(work(), name="work") as task:
            await asyncio.sleep(1000 if times else 0)
        assert task.done()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError) if times else contextlib.nullcontext():
        await task
    assert ended == ["work"]


async def test_a_log_that_is_cancelled_twice_is_not_kept_on(tmp_path: Path) -> None:
    held: list[int] = []

    async def work() -> None:
        async with kept_pipe(tmp_path / "log", 1000) as pipe:
            held.append(os.dup(pipe.write_end))  # as a program does that does not end
            await asyncio.sleep(1000)

    before = asyncio.all_tasks()
    task = asyncio.create_task(work())
    while not held:  # noqa: ASYNC110 - a turn or two
        await asyncio.sleep(0)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(held[0])
    assert asyncio.all_tasks() == before
