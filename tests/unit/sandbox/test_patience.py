"""What the host keeps a guest waiting does not count against it."""

import asyncio
import os

import pytest

from katapod.sandbox import patience
from katapod.sandbox.patience import patient_timeout, waited_s


async def expires(limit_s: float, pid: int = 0) -> float:
    """After how long, in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        async with patient_timeout(limit_s, pid or os.getpid()):
            await asyncio.sleep(60)
    return loop.time() - began


async def test_a_guest_that_has_not_waited_has_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "waited_s", lambda pid: 5.0)  # all of it before
    assert await expires(0.05) < 5


async def test_the_limit_grows_by_what_was_waited_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(patience, "waited_s", lambda pid: loop.time())  # it only waits
    assert await expires(0.05) >= 0.05 * patience.PATIENCE


async def test_work_that_is_done_in_time_is_left_alone() -> None:
    async with patient_timeout(60, os.getpid()):
        await asyncio.sleep(0)
    async with patient_timeout(60, 2**22 + 1):  # no such process
        await asyncio.sleep(0)


def test_waiting_is_read_from_the_kernel() -> None:
    assert waited_s(os.getpid()) >= 0
    assert waited_s(2**22 + 1) == 0
