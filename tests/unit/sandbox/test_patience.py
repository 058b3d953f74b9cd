"""What the host keeps a guest waiting does not count against it."""

import asyncio
import os

import pytest

from katapod.sandbox import patience
from katapod.sandbox.patience import patient_timeout, waited_s
from kit.loop_time import LoopClock


async def expires(limit_s: float, pid: int = 0) -> float:
    """After how long, in thousands of seconds that pass one after another."""
    clock = LoopClock()
    passed_s = 0

    async def pass_time() -> None:
        nonlocal passed_s
        async with patient_timeout(limit_s, pid or os.getpid()):
            while True:
                for _ in range(5):  # turns, in which the time that has passed is seen
                    await asyncio.sleep(0)
                clock.pass_time(1000)
                passed_s += 1000

    with pytest.raises(TimeoutError):
        await pass_time()
    return passed_s


async def test_a_guest_that_has_not_waited_has_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "waited_s", lambda pid: 5000.0)  # all of it before
    assert await expires(2000) == 2000


async def test_the_limit_grows_by_what_was_waited_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(patience, "waited_s", lambda pid: loop.time())  # it only waits
    assert await expires(2000) == 2000 * patience.PATIENCE


async def test_work_that_is_done_in_time_is_left_alone() -> None:
    async with patient_timeout(60, os.getpid()):
        await asyncio.sleep(0)
    async with patient_timeout(60, 2**22 + 1):  # no such process
        await asyncio.sleep(0)


def test_waiting_is_read_from_the_kernel() -> None:
    assert waited_s(os.getpid()) >= 0
    assert waited_s(2**22 + 1) == 0
