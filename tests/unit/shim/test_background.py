"""The owner of the shim's tasks: it ends them, and says what went wrong in them."""

import asyncio
import logging

import pytest

from katapod.shim.background import Background


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
    await background.close()  # nothing is left to do


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
