"""An owner of tasks: it ends them, and says what went wrong in them."""

import asyncio
import logging

import pytest

from katapod.tasks import Background


async def test_closing_cancels_and_waits() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ended.set()

    background = Background()
    task = background.start(work(), name="work")
    await asyncio.sleep(0)
    await background.close()
    assert ended.is_set()
    assert task.cancelled()
    assert not background
    await background.close()  # nothing is left to do


async def test_what_a_task_starts_at_its_end_is_ended_too() -> None:
    ended = []

    async def last() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("last")

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            background.start(last(), name="last")
            await asyncio.sleep(0.01)  # it begins
            ended.append("work")

    async with Background() as background:
        background.start(work(), name="work")
        await asyncio.sleep(0)
    assert ended == ["work", "last"]


async def test_how_many_run() -> None:
    async with Background() as background:
        stop = asyncio.Event()
        tasks = {background.start(stop.wait(), name="wait") for _ in range(3)}
        assert len(background) == 3
        stop.set()
        await asyncio.wait(tasks)
        await asyncio.sleep(0)
        assert len(background) == 0


async def test_an_unexpected_error_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ZeroDivisionError("a bug")

    background = Background()
    with caplog.at_level(logging.ERROR):
        task = background.start(work(), name="work")
        await asyncio.wait({task})
        await asyncio.sleep(0)
    assert "unexpected error in the task work" in caplog.text
    assert "a bug" in caplog.text
    await background.close()
